//! One exchange between all ranks, with its operands.

use super::Comm;
use crate::backend::call::{Call, CopyTo, has_dtype, is_dense, is_float, is_same_view, overlap};
use crate::{Error, Result, Tensor};

/// What ranks do together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// All have what one has.
    Broadcast {
        /// The one.
        root: usize,
    },
    /// One has the sum of all.
    Reduce {
        /// The one.
        root: usize,
    },
    /// All have the sum of all.
    AllReduce,
    /// Each has its part of the sum of all.
    ReduceScatter,
    /// All have the parts of all.
    AllGather,
    /// Each has its part of all.
    AllToAll,
}

impl Kind {
    /// The name in errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Broadcast { .. } => "broadcast",
            Self::Reduce { .. } => "reduce",
            Self::AllReduce => "all-reduce",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
            Self::AllToAll => "all-to-all",
        }
    }
}

/// A collective whose operands keep its contract: plain tensors of one dtype on one device, row-major without gaps. Part `r` of one of
/// `N * n` elements for N ranks is elements `r * n` to `(r + 1) * n`.
#[derive(Clone, Debug)]
pub struct Collective {
    kind: Kind,
    source: Tensor,
    target: Tensor,
}

impl Collective {
    /// `tensor = tensor of rank root`, of any dtype.
    ///
    /// # Errors
    /// When there is no such rank, or the tensor has gaps.
    pub fn broadcast(comm: &dyn Comm, tensor: &Tensor, root: usize) -> Result<Self> {
        Self::in_place(Self::rooted(comm, Kind::Broadcast { root }, root)?, tensor)
    }

    /// `tensor of rank root = sum over ranks of tensor`: floats. The tensors of the others stay as they are.
    ///
    /// # Errors
    /// When there is no such rank, or the tensor has gaps or other numbers.
    pub fn reduce(comm: &dyn Comm, tensor: &Tensor, root: usize) -> Result<Self> {
        is_float("reduce", "a tensor", tensor)?;
        Self::in_place(Self::rooted(comm, Kind::Reduce { root }, root)?, tensor)
    }

    /// `tensor = sum over ranks of tensor`: floats.
    ///
    /// # Errors
    /// When the tensor has gaps or other numbers.
    pub fn all_reduce(_: &dyn Comm, tensor: &Tensor) -> Result<Self> {
        is_float("all-reduce", "a tensor", tensor)?;
        Self::in_place(Kind::AllReduce, tensor)
    }

    /// `target = sum over ranks of this rank's part of source`: floats. The target may be exactly this rank's part of the source.
    ///
    /// # Errors
    /// When the source has not as many elements as all ranks' targets, or an operand does not fit.
    pub fn reduce_scatter(comm: &dyn Comm, source: &Tensor, target: &Tensor) -> Result<Self> {
        is_float("reduce-scatter", "a source", source)?;
        let own = part_of(source, comm);
        Self::apart(
            Kind::ReduceScatter,
            comm,
            (source, source.numel()),
            (target, comm.world_size() * target.numel()),
            own,
        )
    }

    /// `target's part r = source of rank r`, of any dtype. The source may be exactly this rank's part of the target.
    ///
    /// # Errors
    /// When the target has not as many elements as all ranks' sources, or an operand does not fit.
    pub fn all_gather(comm: &dyn Comm, source: &Tensor, target: &Tensor) -> Result<Self> {
        let own = part_of(target, comm);
        Self::apart(Kind::AllGather, comm, (source, comm.world_size() * source.numel()), (target, target.numel()), own)
    }

    /// `target's part r = this rank's part of the source of rank r`, of any dtype.
    ///
    /// # Errors
    /// When both have not as many elements, in as many equal parts as there are ranks, or an operand does not fit.
    pub fn all_to_all(comm: &dyn Comm, source: &Tensor, target: &Tensor) -> Result<Self> {
        Self::apart(Kind::AllToAll, comm, (source, source.numel()), (target, target.numel()), None)
    }

    fn rooted(comm: &dyn Comm, kind: Kind, root: usize) -> Result<Kind> {
        let world = comm.world_size();
        if root < world { Ok(kind) } else { Err(Error::argument(kind.name(), format!("a rank below {world}"), root)) }
    }

    fn in_place(kind: Kind, tensor: &Tensor) -> Result<Self> {
        is_dense(kind.name(), "a tensor", tensor)?;
        tensor.storage().touch();
        Ok(Self { kind, source: tensor.detach(), target: tensor.detach() })
    }

    /// `own` is the part of one operand that the other may be.
    fn apart(
        kind: Kind,
        comm: &dyn Comm,
        (source, of_source): (&Tensor, usize),
        (target, of_target): (&Tensor, usize),
        own: Option<Tensor>,
    ) -> Result<Self> {
        let op = kind.name();
        is_dense(op, "a source", source)?;
        is_dense(op, "a target", target)?;
        has_dtype(op, "a target", target, source.dtype())?;
        if !source.device().same(target.device()) {
            let [expected, got] = [source, target].map(|t| t.device().backend().name().to_owned());
            return Err(Error::Device { op, expected, got });
        }
        let world = comm.world_size();
        if of_source != of_target || !of_source.is_multiple_of(world) {
            let expected = format!("as many elements on both sides, in parts for {world} ranks");
            return Err(Error::shape(op, expected, (source.dims(), target.dims())));
        }
        let smaller = flat(if source.numel() < target.numel() { source } else { target });
        if overlap(source, target) && !own.is_some_and(|own| is_same_view(&own, &smaller)) {
            let what = format!("a target {target:?} that shares memory with the source {source:?}");
            return Err(Error::Overlap { op, what });
        }
        target.storage().touch();
        Ok(Self { kind, source: source.detach(), target: target.detach() })
    }

    /// What is done.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What is read; the same as the target where it is done in place.
    pub fn source(&self) -> &Tensor {
        &self.source
    }

    /// What is written.
    pub fn target(&self) -> &Tensor {
        &self.target
    }

    /// Whether another rank's is the same one, but for the memory.
    pub fn agrees(&self, other: &Self) -> bool {
        let sizes = |c: &Self| (c.source.numel(), c.target.numel(), c.source.dtype());
        self.kind == other.kind && sizes(self) == sizes(other)
    }

    /// For people: what is done, with how much.
    pub fn shown(&self) -> String {
        format!("{} of {} x {}", self.kind.name(), self.source.numel(), self.source.dtype())
    }

    /// Bytes that each of so many ranks sends at least, as in a ring; of the last one in a chain to or from a root it is nothing.
    pub fn sent(&self, ranks: usize) -> u64 {
        let all = self.source.numel().max(self.target.numel()) as u64 * self.source.dtype().size() as u64;
        let (ranks, others) = (ranks as u64, ranks.saturating_sub(1) as u64);
        match self.kind {
            _ if others == 0 => 0,
            Kind::Broadcast { .. } | Kind::Reduce { .. } => all,
            Kind::AllReduce => 2 * all * others / ranks,
            Kind::ReduceScatter | Kind::AllGather | Kind::AllToAll => all * others / ranks,
        }
    }

    /// What it comes to where one rank is alone.
    ///
    /// # Errors
    /// When the device fails.
    pub fn alone(&self) -> Result<()> {
        copy(&flat(&self.source), &flat(&self.target))
    }
}

/// Copies bits, unless both are the same memory.
pub(super) fn copy(source: &Tensor, target: &Tensor) -> Result<()> {
    if source.numel() == 0 || is_same_view(source, target) {
        return Ok(());
    }
    CopyTo { source, target }.run()
}

/// The same elements in one axis.
pub(super) fn flat(tensor: &Tensor) -> Tensor {
    tensor.run_of(0, &[tensor.numel()])
}

/// Part `rank` of so many equal ones.
pub(super) fn part(tensor: &Tensor, rank: usize, world: usize) -> Tensor {
    let len = tensor.numel() / world;
    tensor.run_of(rank * len, &[len])
}

/// This rank's part, where the tensor has no gaps.
fn part_of(tensor: &Tensor, comm: &dyn Comm) -> Option<Tensor> {
    tensor.layout().is_contiguous().then(|| part(tensor, comm.rank(), comm.world_size()))
}
