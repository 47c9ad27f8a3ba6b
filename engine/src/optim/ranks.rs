//! Who updates what, where several ranks train together.

use std::collections::HashMap;
use std::sync::Arc;

use super::SquareSums;
use crate::comm::{Collective, Comm};
use crate::nn::{Param, Params};
use crate::{DType, Device, Gradients, Result, Tensor, VarId};

/// Bytes of a bucket, as in PyTorch's `DistributedDataParallel`: large enough to use a network's whole bandwidth, small enough that the
/// first one leaves while backward still has most to do.
const BUCKET: usize = 25 << 20;

/// The ranks of a run, and which of them updates which parameter.
#[derive(Clone, Debug)]
pub struct Ranks {
    pub(super) comm: Arc<dyn Comm>,
    /// By the parameters' variables, where each is updated by one rank alone; else all ranks update all.
    pub(super) owners: Option<HashMap<VarId, usize>>,
    pub(super) bucket_bytes: usize,
}

impl Ranks {
    /// All ranks update all parameters, from the same sums: `DistributedDataParallel`.
    pub fn replicated(comm: Arc<dyn Comm>) -> Self {
        Self { comm, owners: None, bucket_bytes: BUCKET }
    }

    /// Each parameter is updated by one rank, which alone has the sum of its gradients, what the optimiser remembers of it and its wider
    /// copy: ZeRO's stages 1 and 2 (Rajbhandari et al. 2020) by whole parameters, so that rules which mix a matrix's elements work as
    /// on one rank. The wider copies of the others are let go here.
    pub fn sharded(comm: Arc<dyn Comm>, params: &Params) -> Self {
        let (rank, world) = (comm.rank(), comm.world_size());
        let mut trained: Vec<&Param> = params.iter().filter(|param| param.var().is_some()).collect();
        // The largest first, each to the rank that has least so far: a stable sort, so that all ranks come to the same.
        trained.sort_by_key(|param| std::cmp::Reverse(param.numel()));
        let (mut loads, mut owners) = (vec![0usize; world], HashMap::new());
        for param in trained {
            let owner = (0..world).min_by_key(|rank| loads[*rank]).unwrap_or(0);
            loads[owner] += param.numel();
            owners.extend(param.var().map(|var| (var, owner)));
            if owner != rank {
                param.forget_master();
            }
        }
        Self { comm, owners: Some(owners), bucket_bytes: BUCKET }
    }

    /// With buckets of another size.
    #[must_use]
    pub fn with_bucket_bytes(self, bucket_bytes: usize) -> Self {
        Self { bucket_bytes, ..self }
    }

    /// The ranks.
    pub fn comm(&self) -> &Arc<dyn Comm> {
        &self.comm
    }

    /// Whether each parameter is updated by one rank alone.
    pub fn is_sharded(&self) -> bool {
        self.owners.is_some()
    }

    /// Whether this rank updates a parameter.
    pub fn updates(&self, param: &Param) -> bool {
        self.owner(param).is_none_or(|owner| owner == self.comm.rank())
    }

    /// The rank that updates a parameter, where it is one alone.
    pub(super) fn owner(&self, param: &Param) -> Option<usize> {
        self.owners.as_ref().and_then(|owners| owners.get(&param.var()?).copied())
    }

    /// Buckets of trained parameters in the reverse order of how they were made, in which gradients become final, with elements as
    /// large as `dtype_of` says.
    pub(super) fn buckets<'a>(&self, params: &'a Params, dtype_of: impl Fn(&Param) -> DType) -> Vec<Bucket<'a>> {
        let parts = if self.is_sharded() { self.comm.world_size() } else { 1 };
        let mut buckets: Vec<Bucket<'a>> = Vec::new();
        let mut bytes = 0;
        for param in params.iter().rev().filter(|param| param.var().is_some()) {
            let dtype = dtype_of(param);
            let size = param.numel() * dtype.size();
            if buckets.last().is_none_or(|last| last.dtype != dtype || bytes + size > self.bucket_bytes) {
                buckets.push(Bucket { members: Vec::new(), dtype, lens: vec![0; parts] });
                bytes = 0;
            }
            bytes += size;
            if let Some(bucket) = buckets.last_mut() {
                let part = self.owner(param).unwrap_or(0);
                bucket.members.push(Member { param, part, start: bucket.lens[part] });
                bucket.lens[part] += param.numel() + 1;
            }
        }
        buckets
    }

    /// The norm of all gradients, of which each rank has those that it updates.
    pub(super) fn norm_sums(&self, params: &Params, gradients: &Gradients, device: &Device) -> Result<SquareSums> {
        let trained = params.iter().filter_map(Param::var);
        let sums = SquareSums::new(trained.clone().count(), device)?;
        for (place, var) in trained.enumerate() {
            if let Some(gradient) = gradients.get(var) {
                sums.add(place, gradient)?;
            }
        }
        sums.all_reduce(&*self.comm)?;
        Ok(sums)
    }

    /// Writes the trained parameters of the first rank over those of all others.
    ///
    /// # Errors
    /// When a rank or the device fails.
    pub fn align(&self, params: &Params) -> Result<()> {
        if self.comm.is_alone() {
            return Ok(());
        }
        for param in params.iter().filter(|param| param.var().is_some()) {
            let kept = param.kept()?.contiguous()?;
            self.comm.broadcast(&kept, 0)?;
            param.copy_from(&kept)?;
        }
        Ok(())
    }

    /// Hands the parameters that each rank updated to all others.
    ///
    /// # Errors
    /// When a rank or the device fails.
    pub fn gather(&self, params: &Params) -> Result<()> {
        if !self.is_sharded() {
            return Ok(());
        }
        for bucket in self.buckets(params, Param::dtype) {
            let Some(first) = bucket.members.first() else { continue };
            let all = bucket.buffer(first.param.device())?;
            let own = |member: &&Member<'_>| member.part == self.comm.rank();
            for member in bucket.members.iter().filter(own) {
                bucket.view(&all, member)?.copy_from(&member.param.value()?.detach())?;
            }
            let part = bucket.part(&all, self.comm.rank());
            self.comm.start(Collective::all_gather(&*self.comm, &part, &all)?)?.wait()?;
            for member in bucket.members.iter().filter(|member| !own(member)) {
                member.param.value()?.copy_from(&bucket.view(&all, member)?)?;
            }
        }
        Ok(())
    }
}

/// Parameters whose values or gradients travel together: side by side in one tensor, in as many equal parts as there are ranks where
/// each parameter is one's. Behind each of them is an element that tells whether there is a gradient.
#[derive(Debug)]
pub(super) struct Bucket<'a> {
    pub members: Vec<Member<'a>>,
    pub dtype: DType,
    /// Elements of the parts; the longest decides.
    lens: Vec<usize>,
}

#[derive(Debug)]
pub(super) struct Member<'a> {
    pub param: &'a Param,
    /// Which part it lies in, and where.
    pub part: usize,
    start: usize,
}

impl Bucket<'_> {
    fn part_len(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0)
    }

    /// Memory for all of it.
    pub fn buffer(&self, device: &Device) -> Result<Tensor> {
        Tensor::empty(&[self.lens.len() * self.part_len()], self.dtype, device)
    }

    /// A rank's part, or all of it where there are no parts.
    pub fn part(&self, buffer: &Tensor, rank: usize) -> Tensor {
        let (rank, len) = (if self.lens.len() == 1 { 0 } else { rank }, self.part_len());
        buffer.run_of(rank * len, &[len])
    }

    /// Where a member lies.
    pub fn view(&self, buffer: &Tensor, member: &Member<'_>) -> Result<Tensor> {
        Ok(buffer.run_of(member.part * self.part_len() + member.start, member.param.dims()))
    }

    /// Whether there is a gradient of a member: more than 0 where there is.
    pub fn flag(&self, buffer: &Tensor, member: &Member<'_>) -> Tensor {
        buffer.run_of(member.part * self.part_len() + member.start + member.param.numel(), &[1])
    }
}
