//! Blocks whose parameters ranks share out: each parameter is whole on one rank, and on the others while its block is computed with.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Coming, Keeper, Units};
use crate::comm::{Collective, Comm};
use crate::nn::{Param, Params};
use crate::quant::QTensor;
use crate::{DType, Result, Tensor};

/// Bytes that a parameter's place is a multiple of where several travel together: what kernels like best.
const ALIGN: usize = 256;

/// Which rank keeps what (ZeRO's stage 3, Rajbhandari et al. 2020; PyTorch's `fully_shard` by block). What is outside of blocks is whole
/// on all ranks. All of them run the same model, so they ask in the same order.
#[derive(Debug)]
pub(super) struct Shared {
    group: Arc<dyn Comm>,
    owners: HashMap<String, usize>,
}

/// What one rank gives of a block in one dtype, side by side in one tensor.
#[derive(Debug)]
struct Row {
    owner: usize,
    dtype: DType,
    /// With their first elements.
    members: Vec<(Param, usize)>,
    len: usize,
}

impl Row {
    /// What a rank gives of a block; none of them is empty.
    fn of(owner: usize, block: &[Param]) -> Vec<Self> {
        let mut rows: Vec<Self> = Vec::new();
        for param in block.iter().filter(|param| param.home().is_some_and(|home| home.owner == owner)) {
            let (dtype, len) = (dtype(param), elements(param));
            match rows.iter_mut().find(|row| row.dtype == dtype) {
                Some(row) => {
                    let start = row.len.next_multiple_of(ALIGN / dtype.size());
                    row.members.push((param.clone(), start));
                    row.len = start + len;
                }
                None => rows.push(Self { owner, dtype, members: vec![(param.clone(), 0)], len }),
            }
        }
        rows
    }
}

impl Shared {
    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    /// The rank that keeps a parameter.
    pub fn owner(&self, path: &str) -> Option<usize> {
        self.owners.get(path).copied()
    }

    /// Begins to bring a block's parameters: each rank gives what it keeps.
    pub fn send_for(&self, members: &[Param]) -> Result<Coming> {
        let mut coming = Coming::default();
        for row in (0..self.group.world_size()).flat_map(|owner| Row::of(owner, members)) {
            let values = Tensor::empty(&[row.len], row.dtype, row.members[0].0.device())?;
            let is_own = row.owner == self.rank();
            for (param, start) in row.members {
                if is_own {
                    let own = param.to_give()?;
                    values.run_of(start, own.dims()).copy_from(&own)?;
                } else {
                    let dims = if param.format().is_some() { &[elements(&param)][..] } else { param.dims() };
                    let value = values.run_of(start, dims);
                    coming.values.push((param, value));
                }
            }
            coming.works.push(self.group.start(Collective::broadcast(&*self.group, &values, row.owner)?)?);
            coming.given.extend(is_own.then_some(values));
        }
        Ok(coming)
    }
}

impl Units {
    /// For the ranks of a group. `owners` are ranks by the paths of parameters ([`Units::owners`]), the same on all of them.
    pub fn new(group: Arc<dyn Comm>, owners: HashMap<String, usize>) -> Arc<Self> {
        Self::of(Keeper::Ranks(Shared { group, owners }))
    }

    /// Who keeps which parameter of a model's blocks, by their sizes alone: a model on a device without data tells.
    pub fn owners(params: &Params, ranks: usize) -> HashMap<String, usize> {
        let all = params.iter().filter(|param| param.block().is_some());
        let mut loads = vec![0; ranks];
        share_out(all, &mut loads).into_iter().map(|(param, owner)| (param.path().to_owned(), owner)).collect()
    }
}

/// Elements that travel of a parameter, and their dtype.
fn elements(param: &Param) -> usize {
    match (param.format(), param.dims()) {
        (Some(format), &[rows, columns]) => QTensor::words_of(format, [rows, columns]),
        _ => param.numel(),
    }
}

fn dtype(param: &Param) -> DType {
    if param.format().is_some() { DType::U32 } else { param.dtype() }
}

/// Ranks for parameters: the largest first, each to the rank that has least so far. All ranks come to the same.
pub(crate) fn share_out<'a>(params: impl Iterator<Item = &'a Param>, loads: &mut [usize]) -> Vec<(&'a Param, usize)> {
    let mut all: Vec<&Param> = params.collect();
    all.sort_by_key(|param| std::cmp::Reverse(param.numel()));
    let mut next = |param: &'a Param| {
        let owner = (0..loads.len()).min_by_key(|rank| loads[*rank]).unwrap_or(0);
        if let Some(load) = loads.get_mut(owner) {
            *load += param.numel();
        }
        (param, owner)
    };
    all.into_iter().map(&mut next).collect()
}
