//! How ranks share a run.

use std::sync::Arc;

use flowtape_data::Rank;
use flowtape_engine::comm::Comm;
use flowtape_engine::optim::Groups;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Error, Recipe, Result};

/// Sharding, by NeMo's names. Gradients, what the optimiser remembers, wider copies and the weights of blocks are shared out (ZeRO's stage
/// 3); a block's weights are whole on a rank while it is computed with. Without this section, or with `ddp`, all ranks have all. The
/// results are the same.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Fsdp {
    /// Ranks that train together, for a check; as many as are started if it is left out.
    #[schemars(range(min = 1, max = 65_536))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dp_size: Option<usize>,
    /// Groups of ranks, each of which has everything: parameters are shared out inside of a group. One if it is left out.
    #[schemars(range(min = 1, max = 65_536))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dp_replicate_size: Option<usize>,
    /// Whether a block's weights go when it is computed, as by PyTorch's `fully_shard`; they do if it is left out. Where they do not, all
    /// ranks keep all weights (ZeRO's stages 1 and 2): less is sent, and more memory is taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reshard_after_forward: Option<bool>,
    /// Neighbouring ranks that share the tokens of each sample, and each heads of the attention (context parallelism by Ulysses), for
    /// long videos. One, so that each has samples of its own, if it is left out.
    #[schemars(range(min = 1, max = 65_536))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cp_size: Option<usize>,
}

/// How the ranks of a run share its samples.
#[derive(Clone, Debug)]
pub(crate) struct Sharing {
    /// Which batches this rank takes: ranks that share the tokens of samples take the same ones.
    pub batches: Rank,
    /// The ranks that share the tokens of this one's samples, where there are several.
    pub tokens: Option<Arc<dyn Comm>>,
}

impl Recipe {
    /// How many of so many ranks have samples of their own.
    ///
    /// # Errors
    /// When ranks that share tokens do not form whole groups.
    pub(crate) fn batch_ranks(&self, world: usize) -> Result<usize> {
        let shared = self.fsdp.as_ref().and_then(|fsdp| fsdp.cp_size).unwrap_or(1);
        if world == 1 {
            return Ok(1);
        }
        if shared == 0 || !world.is_multiple_of(shared) {
            let what = format!("fsdp.cp_size: expected a divisor of the {world} ranks, got {shared}");
            return Err(Error::Run { path: "recipe".into(), what });
        }
        Ok(world / shared)
    }

    /// What this rank has of the samples. All ranks call it together.
    pub(crate) fn sharing_among(&self, comm: &Arc<dyn Comm>) -> Result<Sharing> {
        let count = self.batch_ranks(comm.world_size())?;
        let shared = comm.world_size() / count;
        let tokens = if shared > 1 { Some(comm.split(&|rank| rank / shared)?) } else { None };
        Ok(Sharing { batches: Rank { index: (comm.rank() / shared) as u64, count: count as u64 }, tokens })
    }
}

impl Fsdp {
    /// Whether ranks share out the weights of blocks too.
    pub(crate) fn shares_weights(&self) -> bool {
        self.reshard_after_forward.unwrap_or(true)
    }

    /// The groups of a run's ranks; nothing where each rank has everything. All of them call it together.
    pub(crate) fn groups(&self, comm: &Arc<dyn Comm>) -> Result<Option<Groups>> {
        let world = comm.world_size();
        let refused = |what: String| Err(Error::Run { path: "recipe".into(), what });
        let sharing = self.cp_size.unwrap_or(1);
        if let Some(size) = self.dp_size.filter(|size| *size * sharing != world) {
            if world > 1 {
                let expected = match sharing {
                    1 => format!("the number of ranks, {world}"),
                    _ => format!("the number of ranks, {world}, by fsdp.cp_size ({sharing})"),
                };
                return refused(format!("fsdp.dp_size: expected {expected}, or nothing, got {size}"));
            }
            tracing::warn!("fsdp.dp_size is {size}, and one rank trains: start as many, or leave it out");
        }
        let copies = self.dp_replicate_size.unwrap_or(1);
        if world == 1 || copies == world {
            return Ok(None);
        }
        if !world.is_multiple_of(copies) {
            return refused(format!("fsdp.dp_replicate_size: expected a divisor of the {world} ranks, got {copies}"));
        }
        Ok(Some(Groups::new(comm.clone(), copies)?))
    }
}
