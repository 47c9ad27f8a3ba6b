//! Who updates what, where several ranks train together.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::SquareSums;
use crate::comm::{Collective, Comm, Work};
use crate::nn::{Home, Param, Params, Units, share_out};
use crate::{DType, Device, Error, Gradients, Result, Tensor, VarId};

/// Bytes of a bucket, as in PyTorch's `DistributedDataParallel`: large enough to use a network's whole bandwidth, small enough that the
/// first one leaves while backward still has most to do.
const BUCKET: usize = 25 << 20;

/// The ranks of a run, and which of them updates which parameter.
#[derive(Clone, Debug)]
pub struct Ranks {
    comm: Arc<dyn Comm>,
    shards: Option<Shards>,
    bucket_bytes: usize,
}

/// Ranks in groups of neighbours, each of which has everything.
#[derive(Clone, Debug)]
pub struct Groups {
    comm: Arc<dyn Comm>,
    /// The ranks that share the parameters out.
    group: Arc<dyn Comm>,
    /// The ranks of other groups that have the same share.
    copies: Arc<dyn Comm>,
}

impl Groups {
    /// As many groups as there are `copies`. All ranks call it together.
    ///
    /// # Errors
    /// When the ranks do not form so many groups, or one fails.
    pub fn new(comm: Arc<dyn Comm>, copies: usize) -> Result<Self> {
        let all = comm.world_size();
        if copies == 0 || !all.is_multiple_of(copies) {
            return Err(Error::argument("sharding", format!("a number of groups that {all} ranks form"), copies));
        }
        let world = all / copies;
        let (group, copies) = (comm.split(&|rank| rank / world)?, comm.split(&|rank| rank % world)?);
        Ok(Self { comm, group, copies })
    }

    /// The group of this rank.
    pub fn group(&self) -> &Arc<dyn Comm> {
        &self.group
    }
}

/// Who has what, where ranks share out the parameters.
#[derive(Clone, Debug)]
struct Shards {
    group: Arc<dyn Comm>,
    copies: Arc<dyn Comm>,
    /// Ranks of the group by the parameters' variables; all ranks update the other parameters.
    owners: HashMap<VarId, usize>,
    /// The blocks whose values are shared out too.
    units: Option<Arc<Units>>,
}

impl Ranks {
    /// All ranks update all parameters, from the same sums: `DistributedDataParallel`.
    pub fn replicated(comm: Arc<dyn Comm>) -> Self {
        Self { comm, shards: None, bucket_bytes: BUCKET }
    }

    /// Each parameter is updated by one rank, which alone has the sum of its gradients, what the optimiser remembers of it and its wider
    /// copy: ZeRO's stages 1 and 2 (Rajbhandari et al. 2020) by whole parameters, so that rules which mix a matrix's elements work as
    /// on one rank. The wider copies of the others are let go here. Parameters of adapters are small, and all ranks update them.
    ///
    /// With several `copies` the ranks form as many groups of neighbours, each of which has it all, and gradients are summed in a group
    /// first: PyTorch's hybrid sharding. All ranks call it together.
    ///
    /// # Errors
    /// When the ranks do not form so many groups, or one fails.
    pub fn sharded(comm: Arc<dyn Comm>, params: &Params, copies: usize) -> Result<Self> {
        Self::in_groups(Groups::new(comm, copies)?, params)
    }

    /// The same of ranks that are in groups already. Of a model whose blocks they share out ([`Units`]), a parameter is updated where it
    /// is kept.
    ///
    /// # Errors
    /// When a rank fails.
    pub fn in_groups(groups: Groups, params: &Params) -> Result<Self> {
        let Groups { comm, group, copies } = groups;
        let mut loads = vec![0; group.world_size()];
        let mut owners = HashMap::new();
        for (param, home) in params.iter().filter_map(|param| Some((param, param.home()?))) {
            loads[home.owner] += param.numel();
            owners.extend(param.var().map(|var| (var, home.owner)));
            if param.var().is_some() && home.is_own() && param.device().backend().has_data() {
                // All groups begin with the same bits, whatever machines they are.
                let kept = param.kept()?.contiguous()?;
                copies.broadcast(&kept, 0)?;
                param.copy_from(&kept)?;
            }
        }
        let whole = |param: &&Param| param.var().is_some() && !param.is_adapter() && param.home().is_none();
        for (param, owner) in share_out(params.iter().filter(whole), &mut loads) {
            owners.extend(param.var().map(|var| (var, owner)));
            if owner != group.rank() {
                param.forget_master();
            }
        }
        let units = params.units().cloned();
        Ok(Self { comm, shards: Some(Shards { group, copies, owners, units }), bucket_bytes: BUCKET })
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
        self.shards.as_ref().is_some_and(|shards| !shards.owners.is_empty())
    }

    /// Whether a rank keeps a share of the blocks' parameters alone.
    pub fn shares_weights(&self) -> bool {
        self.shards.as_ref().is_some_and(|shards| shards.units.is_some())
    }

    /// Which of those that share out the parameters this one is, and how many they are; nothing where others have the same share and come
    /// first, and where nothing is shared out.
    pub fn share(&self) -> Option<(usize, usize)> {
        let shards = self.shards.as_ref().filter(|shards| self.is_sharded() && shards.copies.rank() == 0)?;
        Some((shards.group.rank(), shards.group.world_size()))
    }

    /// Whether this rank updates a parameter.
    pub fn updates(&self, param: &Param) -> bool {
        match &self.shards {
            Some(shards) => self.owner(param).is_none_or(|owner| owner == shards.group.rank()),
            None => true,
        }
    }

    /// The rank that updates a parameter, where it is one alone.
    fn owner(&self, param: &Param) -> Option<usize> {
        self.shards.as_ref().and_then(|shards| shards.owners.get(&param.var()?).copied())
    }

    /// Buckets of trained parameters in the reverse order of how they were made, in which gradients become final, with elements as
    /// large as `dtype_of` says.
    pub(super) fn buckets<'a>(&self, params: &'a Params, dtype_of: impl Fn(&Param) -> DType) -> Vec<Bucket<'a>> {
        self.buckets_of(params.iter().rev().filter(|param| param.var().is_some()), dtype_of)
    }

    fn buckets_of<'a>(
        &self,
        params: impl Iterator<Item = &'a Param>,
        dtype_of: impl Fn(&Param) -> DType,
    ) -> Vec<Bucket<'a>> {
        let group = self.shards.as_ref().map_or(1, |shards| shards.group.world_size());
        let mut buckets: Vec<Bucket<'a>> = Vec::new();
        let mut bytes = 0;
        for param in params {
            let (dtype, shared_out) = (dtype_of(param), self.owner(param).is_some());
            let size = param.numel() * dtype.size();
            let is_like = |last: &Bucket<'_>| last.dtype == dtype && last.shared_out == shared_out;
            if buckets.last().is_none_or(|last| !is_like(last) || bytes + size > self.bucket_bytes) {
                let parts = if shared_out { group } else { 1 };
                buckets.push(Bucket { members: Vec::new(), dtype, shared_out, lens: vec![0; parts], owner: None });
                bytes = 0;
            }
            bytes += size;
            if let Some(bucket) = buckets.last_mut() {
                let part = self.owner(param).unwrap_or(0);
                bucket.members.push(Member { param, part, start: bucket.lens[part] });
                bucket.lens[part] += param.numel();
            }
        }
        buckets.iter_mut().for_each(Bucket::settle);
        buckets
    }

    /// The norm of all gradients, of which each rank has those that it updates.
    pub(super) fn norm_sums(&self, params: &Params, gradients: &Gradients, device: &Device) -> Result<SquareSums> {
        let sums = SquareSums::new(params.iter().filter_map(Param::var).count(), device)?;
        let trained = params.iter().filter(|param| param.var().is_some());
        for (place, param) in trained.enumerate().filter(|(_, param)| self.counts(param)) {
            if let Some(gradient) = gradients.of(param) {
                sums.add(place, gradient)?;
            }
        }
        self.all_reduce_sums(&sums)?;
        Ok(sums)
    }

    /// Whether this rank is the one of its group that a parameter counts for where something is done once for each: sums over all
    /// gradients, files.
    pub fn counts(&self, param: &Param) -> bool {
        let first = self.shards.as_ref().is_none_or(|shards| shards.group.rank() == 0);
        self.updates(param) && (first || self.owner(param).is_some())
    }

    /// Adds the sums of what each rank of a group counts.
    pub(super) fn all_reduce_sums(&self, sums: &SquareSums) -> Result<()> {
        self.shards.as_ref().map_or(Ok(()), |shards| sums.all_reduce(&*shards.group))
    }

    /// Begins to add up a bucket of all ranks, and gives the memory of what this rank has of the sums then.
    pub(super) fn sum(&self, bucket: &Bucket<'_>, buffer: Tensor) -> Result<(Tensor, Box<dyn Work>)> {
        let Some(shards) = self.shards.as_ref().filter(|_| bucket.shared_out) else {
            let work = self.comm.start(Collective::all_reduce(&*self.comm, &buffer)?)?;
            return Ok((buffer, work));
        };
        let (sums, work) = match bucket.owner {
            Some(owner) => (buffer.clone(), shards.group.start(Collective::reduce(&*shards.group, &buffer, owner)?)?),
            None => {
                let sums = Tensor::empty(&[bucket.part_len()], bucket.dtype, buffer.device())?;
                let work = shards.group.start(Collective::reduce_scatter(&*shards.group, &buffer, &sums)?)?;
                (sums, work)
            }
        };
        if shards.copies.is_alone() || bucket.owner.is_some_and(|owner| owner != shards.group.rank()) {
            return Ok((sums, work));
        }
        work.wait()?;
        let work = shards.copies.start(Collective::all_reduce(&*shards.copies, &sums)?)?;
        Ok((sums, work))
    }

    /// Gives what each rank has of its own to all ranks of its group, but for the blocks that they share out: `own` says what this rank
    /// has, and all of it goes to `each`.
    fn exchange(
        &self,
        params: &Params,
        dtype_of: impl Fn(&Param) -> DType,
        own: impl Fn(&Param) -> Result<Tensor>,
        mut each: impl FnMut(&Param, Tensor) -> Result<()>,
    ) -> Result<()> {
        let Some(shards) = &self.shards else { return Ok(()) };
        let everywhere = |param: &&Param| self.owner(param).is_some() && param.home().is_none();
        for bucket in self.buckets_of(params.iter().rev().filter(everywhere), dtype_of) {
            let Some(first) = bucket.members.first() else { continue };
            let all = bucket.buffer(first.param.device())?;
            for member in bucket.members.iter().filter(|member| self.updates(member.param)) {
                bucket.view(&all, member).copy_from(&own(member.param)?)?;
            }
            let collective = match bucket.owner {
                Some(owner) => Collective::broadcast(&*shards.group, &all, owner)?,
                None => {
                    let part = all.run_of(shards.group.rank() * bucket.part_len(), &[bucket.part_len()]);
                    Collective::all_gather(&*shards.group, &part, &all)?
                }
            };
            shards.group.start(collective)?.wait()?;
            bucket.members.iter().try_for_each(|member| each(member.param, bucket.view(&all, member)))?;
        }
        Ok(())
    }

    /// Goes through the trained parameters as they are kept, in their wider dtype: on all ranks, but for those of blocks that ranks share
    /// out, which each rank has its own of.
    ///
    /// # Errors
    /// Those of `each`, and when a rank or the device fails.
    pub fn each_kept(&self, params: &Params, mut each: impl FnMut(&Param, Tensor) -> Result<()>) -> Result<()> {
        let is_own = |param: &Param| self.owner(param).is_none() || param.home().is_some_and(Home::is_own);
        let trained = params.iter().filter(|param| param.var().is_some() && is_own(param));
        trained.into_iter().try_for_each(|param| each(param, param.kept()?))?;
        self.exchange(params, Param::kept_dtype, Param::kept, each)
    }

    /// What ranks have of their own, all of it on the first rank and nothing on the others; `own` is what this rank has.
    /// Tensors are on the host then. All ranks call it together.
    ///
    /// # Errors
    /// When a rank or the device fails.
    pub fn collect(&self, own: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
        let Some(Shards { group, copies, .. }) = self.shards.as_ref().filter(|_| self.is_sharded()) else {
            return Ok(own);
        };
        if copies.rank() > 0 {
            return Ok(Vec::new());
        }
        let mut all = if group.rank() == 0 { own.clone() } else { Vec::new() };
        // What all ranks remember is the first one's.
        let mut names: HashSet<String> = own.iter().map(|(name, _)| name.clone()).collect();
        for root in 1..group.world_size() {
            let mut list = String::new();
            for (name, tensor) in own.iter().filter(|_| group.rank() == root) {
                let dims: Vec<String> = tensor.dims().iter().map(usize::to_string).collect();
                list += &format!("{name}\t{}\t{}\n", tensor.dtype().name(), dims.join(" "));
            }
            let list = group.share(list.as_bytes(), root)?;
            let list = String::from_utf8_lossy(&list).into_owned();
            for (i, line) in list.lines().enumerate() {
                let unread = || Error::argument("collect", "a name, a dtype and sizes", line);
                let [name, dtype, dims] = line.split('\t').collect::<Vec<_>>()[..] else { return Err(unread()) };
                let all_dtypes = [DType::F32, DType::BF16, DType::F16, DType::F64, DType::U32];
                let dtype = all_dtypes.into_iter().find(|d| d.name() == dtype).ok_or_else(unread)?;
                let dims = dims.split_whitespace().map(|d| d.parse().map_err(|_| unread()));
                let dims = dims.collect::<Result<Vec<usize>>>()?;
                let tensor = match own.get(i).filter(|_| group.rank() == root) {
                    Some((_, tensor)) => tensor.to_device(&group.device())?.contiguous()?,
                    None => Tensor::empty(&dims, dtype, &group.device())?,
                };
                group.broadcast(&tensor, root)?;
                if group.rank() == 0 && names.insert(name.into()) {
                    all.push((name.into(), tensor.to_device(&Device::cpu())?));
                }
            }
        }
        Ok(all)
    }

    /// Writes the trained parameters of the first rank over those of all others, but for blocks that ranks share out.
    ///
    /// # Errors
    /// When a rank or the device fails.
    pub fn align(&self, params: &Params) -> Result<()> {
        if self.comm.is_alone() {
            return Ok(());
        }
        let whole = |param: &&Param| param.var().is_some() && param.home().is_none();
        for param in params.iter().filter(whole) {
            let kept = param.kept()?.contiguous()?;
            self.comm.broadcast(&kept, 0)?;
            param.copy_from(&kept)?;
        }
        Ok(())
    }

    /// Hands the parameters that each rank updated to all others; those of blocks that ranks share out come with their blocks.
    ///
    /// # Errors
    /// When a rank or the device fails.
    pub fn gather(&self, params: &Params) -> Result<()> {
        self.exchange(params, Param::dtype, Param::resident, |param, value| {
            if self.updates(param) { Ok(()) } else { param.resident()?.copy_from(&value) }
        })?;
        params.units().map_or(Ok(()), |units| units.forget())
    }
}

/// Parameters whose values or gradients travel together: side by side in one tensor, in as many equal parts as there are ranks where
/// each parameter is one's. A part begins with an element for each of its parameters that tells whether there is a gradient.
#[derive(Debug)]
pub(super) struct Bucket<'a> {
    pub members: Vec<Member<'a>>,
    pub dtype: DType,
    /// Whether each of them is one rank's.
    pub shared_out: bool,
    /// Elements of the parts; the longest decides.
    lens: Vec<usize>,
    /// The rank that has all of them, where it is one: parts for the others, as long as its own, would take their number of times the
    /// memory, such as of a matrix that fills a bucket.
    owner: Option<usize>,
}

#[derive(Debug)]
pub(super) struct Member<'a> {
    pub param: &'a Param,
    /// Which part it lies in, and where.
    pub part: usize,
    start: usize,
}

impl Bucket<'_> {
    /// Puts the flags in front, and makes one part of what one rank has.
    fn settle(&mut self) {
        let flags: Vec<usize> = (0..self.lens.len()).map(|part| self.flags(part)).collect();
        self.lens.iter_mut().zip(&flags).for_each(|(len, flags)| *len += flags);
        self.members.iter_mut().for_each(|member| member.start += flags[member.part]);
        let Some(first) = self.members.first().map(|member| member.part).filter(|_| self.shared_out) else { return };
        if self.members.iter().all(|member| member.part == first) {
            self.owner = Some(first);
            self.lens = vec![self.lens[first]];
            self.members.iter_mut().for_each(|member| member.part = 0);
        }
    }

    pub fn part_len(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0)
    }

    /// Memory for all of it.
    pub fn buffer(&self, device: &Device) -> Result<Tensor> {
        Tensor::empty(&[self.lens.len() * self.part_len()], self.dtype, device)
    }

    /// Where a member lies in all of it.
    pub fn view(&self, buffer: &Tensor, member: &Member<'_>) -> Tensor {
        member.value(&buffer.run_of(member.part * self.part_len(), &[self.part_len()]))
    }

    /// Members of a part.
    fn flags(&self, part: usize) -> usize {
        self.members.iter().filter(|member| member.part == part).count()
    }

    /// Says which members have a gradient.
    ///
    /// # Errors
    /// When the device fails.
    pub fn flag(&self, buffer: &Tensor, came: &[bool]) -> Result<()> {
        for part in 0..self.lens.len() {
            let members = self.members.iter().zip(came).filter(|(member, _)| member.part == part);
            let flags: Vec<f32> = members.map(|(_, came)| f32::from(u8::from(*came))).collect();
            let (start, size) = (part * self.part_len(), [flags.len()]);
            let flags = Tensor::from_vec(flags, &size, buffer.device())?.to_dtype(self.dtype)?;
            buffer.run_of(start, &size).copy_from(&flags)?;
        }
        Ok(())
    }

    /// Which members of a part have a gradient, in their order, by the part's sums.
    ///
    /// # Errors
    /// When the device fails.
    pub fn flagged(&self, sums: &Tensor, part: usize) -> Result<Vec<bool>> {
        let flags = sums.run_of(0, &[self.flags(part)]).to_vec::<f64>()?;
        Ok(flags.into_iter().map(|flag| flag > 0.0).collect())
    }
}

impl Member<'_> {
    /// Where it lies in its part.
    pub fn value(&self, part: &Tensor) -> Tensor {
        part.run_of(self.start, self.param.dims())
    }
}
