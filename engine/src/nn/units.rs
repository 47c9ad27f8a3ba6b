//! Blocks whose parameters ranks share out: each parameter is whole on one rank, and on the others while its block is computed with.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::param::WeakParam;
use super::{Param, Params};
use crate::comm::{Collective, Comm, Work};
use crate::quant::QTensor;
use crate::{DType, Error, Result, Tensor};

/// Bytes that a parameter's place is a multiple of where several travel together: what kernels like best.
const ALIGN: usize = 256;

/// The units of a model that ranks share out (ZeRO's stage 3, Rajbhandari et al. 2020; PyTorch's `fully_shard` by block): all parameters
/// of a block but those of adapters. What is outside of blocks is whole on all ranks.
///
/// A block comes when something asks for one of its parameters' values, in forward or in backward, and goes when another one comes. All
/// ranks run the same model, so they ask in the same order. What came behind what is remembered: the block that came behind the last two
/// before is sent for while the present one is computed with.
#[derive(Debug)]
pub struct Units {
    group: Arc<dyn Comm>,
    owners: HashMap<String, usize>,
    state: Mutex<State>,
}

/// Where a parameter of a block is kept.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    pub units: Arc<Units>,
    /// Which block.
    pub unit: usize,
    /// The rank of the group that has it.
    pub owner: usize,
}

impl Home {
    /// Whether this rank has it.
    pub fn is_own(&self) -> bool {
        self.owner == self.units.group.rank()
    }
}

#[derive(Debug, Default)]
struct State {
    /// Blocks by their paths, in the order in which they were made.
    places: HashMap<Arc<str>, usize>,
    units: Vec<Vec<WeakParam>>,
    /// The block that is here, and the one before it.
    here: Option<usize>,
    before: Option<usize>,
    /// The one that was sent for.
    coming: Option<(usize, Vec<Part>)>,
    /// What came behind the last two.
    behind: HashMap<(Option<usize>, usize), usize>,
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

/// The same on its way.
#[derive(Debug)]
struct Part {
    row: Row,
    values: Tensor,
    work: Box<dyn Work>,
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

impl Units {
    /// For the ranks of a group. `owners` are ranks by the paths of parameters ([`Units::owners`]), the same on all of them.
    pub fn new(group: Arc<dyn Comm>, owners: HashMap<String, usize>) -> Arc<Self> {
        Arc::new(Self { group, owners, state: Mutex::default() })
    }

    /// Who keeps which parameter of a model's blocks, by their sizes alone: a model on a device without data tells.
    pub fn owners(params: &Params, ranks: usize) -> HashMap<String, usize> {
        let all = params.iter().filter(|param| param.block().is_some());
        let mut loads = vec![0; ranks];
        share_out(all, &mut loads).into_iter().map(|(param, owner)| (param.path().to_owned(), owner)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a parameter of a block is kept.
    pub(super) fn home(self: &Arc<Self>, block: &Arc<str>, path: &str) -> Option<Home> {
        let owner = *self.owners.get(path)?;
        let mut state = self.lock();
        let next = state.units.len();
        let unit = *state.places.entry(block.clone()).or_insert(next);
        if unit == next {
            state.units.push(Vec::new());
        }
        Some(Home { units: self.clone(), unit, owner })
    }

    /// Takes a parameter into its block.
    pub(super) fn add(&self, unit: usize, param: &Param) {
        let mut state = self.lock();
        if state.here == Some(unit) {
            // What is asked for while a model is made: the rest of its block is not there yet.
            state.leave();
        }
        if let Some(members) = state.units.get_mut(unit) {
            members.push(param.downgrade());
        }
    }

    /// Sees that a block's parameters are here.
    pub(super) fn arrive(&self, unit: usize) -> Result<()> {
        let mut state = self.lock();
        if state.here == Some(unit) {
            return Ok(());
        }
        let (before, here) = (state.before, state.here);
        state.leave();
        let on_its_way = match state.coming.take() {
            Some((coming, parts)) if coming == unit => parts,
            other => {
                // Nobody writes to its memory when that is let go.
                other.into_iter().flat_map(|(_, parts)| parts).try_for_each(|part| part.work.wait())?;
                self.send_for(&state, unit)?
            }
        };
        on_its_way.into_iter().try_for_each(|part| self.take(part))?;
        if let Some(here) = here {
            state.behind.insert((before, here), unit);
        }
        (state.before, state.here) = (here, Some(unit));
        if let Some(&next) = state.behind.get(&(here, unit)).filter(|next| **next != unit) {
            state.coming = Some((next, self.send_for(&state, next)?));
        }
        Ok(())
    }

    /// Begins to bring a block's parameters.
    fn send_for(&self, state: &State, unit: usize) -> Result<Vec<Part>> {
        let gone = || Error::argument("a block's parameters", "a model that is there", "one that is gone");
        let members = state.units.get(unit).into_iter().flatten();
        let members = members.map(|param| param.upgrade().ok_or_else(gone)).collect::<Result<Vec<_>>>()?;
        let begin = |row: Row| {
            let values = Tensor::empty(&[row.len], row.dtype, row.members[0].0.device())?;
            for (param, start) in row.members.iter().filter(|_| row.owner == self.group.rank()) {
                let own = param.to_give()?;
                values.run_of(*start, own.dims()).copy_from(&own)?;
            }
            let work = self.group.start(Collective::broadcast(&*self.group, &values, row.owner)?)?;
            Ok(Part { row, values, work })
        };
        (0..self.group.world_size()).flat_map(|owner| Row::of(owner, &members)).map(begin).collect()
    }

    /// Waits for a part, and gives its values to the parameters.
    fn take(&self, part: Part) -> Result<()> {
        let Part { row: Row { owner, members, .. }, values, work } = part;
        work.wait()?;
        if owner == self.group.rank() {
            return Ok(());
        }
        members.into_iter().try_for_each(|(param, start)| match param.format() {
            Some(_) => param.take(&values.run_of(start, &[elements(&param)])),
            None => param.take(&values.run_of(start, param.dims())),
        })
    }

    /// Lets go what came from other ranks: their parameters were written. All ranks call it together.
    ///
    /// # Errors
    /// When a rank has failed.
    pub fn forget(&self) -> Result<()> {
        let mut state = self.lock();
        state.leave();
        (state.here, state.before) = (None, None);
        let coming = state.coming.take();
        coming.into_iter().flat_map(|(_, parts)| parts).try_for_each(|part| part.work.wait())
    }
}

impl State {
    /// Lets the block go that is here.
    fn leave(&mut self) {
        let Some(here) = self.here.take() else { return };
        let members = self.units.get(here).into_iter().flatten().filter_map(WeakParam::upgrade);
        members.filter(|param| !param.is_here()).for_each(|param| param.let_go());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Threads;
    use crate::meta::Meta;
    use crate::nn::{Blocks, Init, Linear, ParamBuilder, Placement, RmsNorm};
    use crate::quant::Format;
    use crate::{Device, Philox, Tape};

    const BLOCKS: usize = 5;

    struct Model {
        blocks: Blocks<(RmsNorm, Linear, Linear)>,
        root: ParamBuilder,
    }

    impl Model {
        fn new(root: ParamBuilder, width: usize, checkpointing: bool) -> Result<Self> {
            root.get("outside", &[width], Init::Ones)?;
            let mut blocks = Blocks::new(&root.sub("blocks"), BLOCKS, |params, _| {
                let (first, second) = (params.sub("first"), params.sub("second"));
                let norm = RmsNorm::new(&params.sub("norm"), width, 1e-6)?;
                Ok::<_, Error>((
                    norm,
                    Linear::new(&first, width, 2 * width, true)?,
                    Linear::new(&second, 2 * width, width, false)?,
                ))
            })?;
            blocks.set_checkpointing(checkpointing);
            Ok(Self { blocks, root })
        }

        /// Shared out among ranks, where there are such.
        fn among(
            comm: Option<&Arc<dyn Comm>>,
            builder: impl Fn(&Device) -> ParamBuilder,
            device: &Device,
        ) -> Result<Self> {
            let Some(comm) = comm else { return Self::new(builder(device), 8, false) };
            let shapes = Self::new(builder(&Meta::default().device()), 8, false)?;
            let owners = Units::owners(&shapes.root.params(), comm.world_size());
            Self::new(builder(device).sharing(Units::new(comm.clone(), owners)), 8, false)
        }

        fn forward(&self, x: &Tensor) -> Result<Tensor> {
            let [y] = self.blocks.run([x.clone()], [], |(norm, first, second), [x], []| {
                Ok([x.add(&second.forward(&first.forward(&norm.forward(x)?)?.square()?)?)?])
            })?;
            y.square()?.mean_all()
        }
    }

    /// The loss, and the gradients of the input and of what is trained, of a forward pass alone and of several with backward passes: the
    /// order of blocks is another each time.
    fn results(model: &Model, device: &Device) -> Result<Vec<Vec<f32>>> {
        let x = Philox::new(5).normal(&[3, 8], device)?;
        let mut all = Vec::new();
        for backward in [false, true, true, false, false, true] {
            let tape = Tape::new();
            let leaf = tape.leaf(&x);
            let loss = model.forward(&leaf)?;
            all.push(loss.to_vec()?);
            if backward {
                let gradients = tape.backward(&loss)?;
                let params = model.root.params();
                let found = [gradients.of(&leaf)].into_iter().chain(params.iter().map(|param| gradients.of(param)));
                all.extend(found.flatten().map(Tensor::to_vec).collect::<Result<Vec<_>>>()?);
            }
        }
        Ok(all)
    }

    #[test]
    fn blocks_that_come_and_go_give_the_bits_of_a_whole_model() -> Result<()> {
        let cpu = Device::cpu();
        for format in [None, Some(Format::Int8), Some(Format::Fp8), Some(Format::Nf4)] {
            let builder = |device: &Device| match format {
                None => ParamBuilder::new(3, DType::F32, device),
                Some(_) => ParamBuilder::with_plan(3, Placement::frozen(DType::F32).quantised(format), device),
            };
            let expected = results(&Model::among(None, builder, &cpu)?, &cpu)?;
            for world in [2, 3, 7] {
                let all = Threads::run(world, &cpu, |comm| {
                    let model = Model::among(Some(&comm), builder, &cpu)?;
                    let found = results(&model, &cpu)?;
                    // What was written is what comes next.
                    let params = model.root.params();
                    params
                        .iter()
                        .filter(|p| p.format().is_none())
                        .try_for_each(|p| p.copy_from(&Tensor::zeros(p.dims(), DType::F32, &cpu)?))?;
                    let zero = model.forward(&Tensor::ones(&[1, 8], DType::F32, &cpu)?)?.item()?;
                    Ok::<_, Error>((found, zero, params.iter().map(|p| p.is_here()).collect::<Vec<_>>()))
                });
                let all = all.into_iter().collect::<Result<Vec<_>>>()?;
                for (found, zero, _) in &all {
                    assert_eq!(found, &expected, "{format:?}, {world} ranks");
                    assert!((*zero - 1.0).abs() < 1e-6, "{format:?}: {zero}");
                }
                // One rank keeps each but the one outside of blocks.
                let kept = |i: usize| all.iter().filter(|(.., here)| here[i]).count();
                let kept: Vec<usize> = (0..all[0].2.len()).map(kept).collect();
                assert!(kept[0] == world && kept[1..].iter().all(|n| *n == 1), "{kept:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_rank_has_its_share_and_two_blocks() -> Result<()> {
        let (width, world) = (64, 4);
        // Frozen, so that there are no gradients beside the weights.
        let builder = |device: &Device| ParamBuilder::with_plan(3, Placement::frozen(DType::F32), device);
        let block = 4 * (4 * width * width + 3 * width) as u64;
        for checkpointing in [false, true] {
            let metas: Vec<Meta> = (0..world).map(|_| Meta::default()).collect();
            let comms = Threads::on(&metas.iter().map(Meta::device).collect::<Vec<_>>());
            let owners =
                Units::owners(&Model::new(builder(&Meta::default().device()), width, false)?.root.params(), world);
            let run = |(comm, meta): (Arc<dyn Comm>, &Meta)| -> Result<()> {
                let device = comm.device();
                let builder = builder(&device).sharing(Units::new(comm, owners.clone()));
                let model = Model::new(builder, width, checkpointing)?;
                let own = meta.used();
                assert!(own as f64 <= 1.3 * (BLOCKS as u64 * block) as f64 / world as f64, "{own}");
                // One row: what is computed is small beside the weights.
                let x = Tensor::ones(&[1, width], DType::F32, &device)?;
                for _ in 0..3 {
                    let tape = Tape::new();
                    tape.backward(&model.forward(&tape.leaf(&x))?)?;
                }
                let (peak, two) = (meta.peak() - own, 2 * block);
                assert!(peak > block && (peak as f64) < 1.15 * two as f64, "{peak} of {two}");
                Ok(())
            };
            let run = &run;
            std::thread::scope(|scope| {
                let threads: Vec<_> =
                    comms.into_iter().zip(&metas).map(|both| scope.spawn(move || run(both))).collect();
                threads.into_iter().try_for_each(|thread| thread.join().unwrap())
            })?;
        }
        Ok(())
    }
}
