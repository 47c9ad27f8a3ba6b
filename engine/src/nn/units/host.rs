//! Blocks whose frozen weights the host keeps: they come to the device, which has less memory, while their block is computed with.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Coming, Keeper, Units};
use crate::Result;
use crate::nn::{Param, Params, Role};

/// The blocks, by their paths.
#[derive(Debug)]
pub(super) struct Swapped(HashSet<String>);

impl Swapped {
    /// Whether the host keeps a parameter of a block: what is trained stays where it is trained.
    pub fn has(&self, block: &str, role: Role) -> bool {
        role == Role::Frozen && self.0.contains(block)
    }
}

/// Begins to bring a block's parameters: uploads, which a device takes beside its work where it can.
pub(super) fn send_for(members: Vec<Param>) -> Result<Coming> {
    let values = members.into_iter().map(|param| param.upload().map(|value| (param, value)));
    Ok(Coming { values: values.collect::<Result<_>>()?, ..Coming::default() })
}

impl Units {
    /// The blocks that the host may keep, by their paths in the order in which they were made: those with frozen weights.
    pub fn swappable(params: &Params) -> Vec<&str> {
        let frozen = params.iter().filter(|param| param.role() == Role::Frozen);
        let mut blocks: Vec<&str> = frozen.filter_map(Param::block).collect();
        let mut seen = HashSet::new();
        blocks.retain(|block| seen.insert(*block));
        blocks
    }

    /// The frozen weights of so many blocks in the host's memory, all if there are fewer; the blocks lie evenly among the others, so that
    /// one comes while others are computed with. A model on a device without data tells which blocks there are.
    pub fn swapped(params: &Params, count: usize) -> Arc<Self> {
        let all = Self::swappable(params);
        let count = count.min(all.len());
        let some = (0..count).map(|i| all[i * all.len() / count].to_owned());
        Self::of(Keeper::Host(Swapped(some.collect())))
    }
}
