//! How ranks share a run.

use std::sync::Arc;

use flowtape_engine::comm::Comm;
use flowtape_engine::nn::Params;
use flowtape_engine::optim::Ranks;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Sharding, by NeMo's names. What is shared out are gradients, what the optimiser remembers and wider copies (ZeRO's stages 1 and 2);
/// weights stay whole on each rank. Without this section, or with `ddp`, all ranks have all. The results are the same.
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
}

impl Fsdp {
    /// The ranks of a run. All of them call it together.
    pub(crate) fn ranks(&self, comm: Arc<dyn Comm>, params: &Params) -> Result<Ranks> {
        let world = comm.world_size();
        let refused = |what: String| Err(Error::Run { path: "recipe".into(), what });
        if let Some(size) = self.dp_size.filter(|size| *size != world) {
            if world > 1 {
                return refused(format!("fsdp.dp_size: expected the number of ranks, {world}, or nothing, got {size}"));
            }
            tracing::warn!("fsdp.dp_size is {size}, and one rank trains: start as many, or leave it out");
        }
        let copies = self.dp_replicate_size.unwrap_or(1);
        if world == 1 || copies == world {
            return Ok(Ranks::replicated(comm));
        }
        if !world.is_multiple_of(copies) {
            return refused(format!("fsdp.dp_replicate_size: expected a divisor of the {world} ranks, got {copies}"));
        }
        Ok(Ranks::sharded(comm, params, copies)?)
    }
}
