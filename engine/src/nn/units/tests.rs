//! A small model whose blocks come and go, beside one that has them all.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::backend::call::{Checked, Upload};
use crate::backend::{Backend, Decorator};
use crate::comm::{Comm, Threads};
use crate::meta::Meta;
use crate::nn::{Blocks, Init, Linear, ParamBuilder, Placement, RmsNorm};
use crate::quant::Format;
use crate::{DType, Device, Philox, Tape};

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
    fn among(comm: Option<&Arc<dyn Comm>>, builder: impl Fn(&Device) -> ParamBuilder, device: &Device) -> Result<Self> {
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
        let owners = Units::owners(&Model::new(builder(&Meta::default().device()), width, false)?.root.params(), world);
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
            let threads: Vec<_> = comms.into_iter().zip(&metas).map(|both| scope.spawn(move || run(both))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap())
        })?;
    }
    Ok(())
}

/// All weights of blocks, which the host keeps, or those of some.
fn swapped(builder: impl Fn(&Device) -> ParamBuilder, count: usize, width: usize, device: &Device) -> Result<Model> {
    let shapes = Model::new(builder(&Meta::default().device()), width, false)?;
    Model::new(builder(device).sharing(Units::swapped(&shapes.root.params(), count)), width, false)
}

#[test]
fn blocks_of_the_host_give_the_bits_of_those_of_the_device() -> Result<()> {
    let cpu = Device::cpu();
    for format in [None, Some(Format::Int8), Some(Format::Fp8), Some(Format::Nf4)] {
        let builder =
            |device: &Device| ParamBuilder::with_plan(3, Placement::frozen(DType::F32).quantised(format), device);
        let expected = results(&Model::among(None, builder, &cpu)?, &cpu)?;
        for count in [1, 3, BLOCKS, BLOCKS + 1] {
            let model = swapped(builder, count, 8, &cpu)?;
            assert_eq!(results(&model, &cpu)?, expected, "{format:?}, {count} blocks");
            let params = model.root.params();
            let homes = params.iter().filter(|p| p.home().is_some()).count();
            assert_eq!(homes, 4 * count.min(BLOCKS));
            // What is kept is what was made, and what is written is what comes next.
            let whole = Model::among(None, builder, &cpu)?.root.params();
            for (param, other) in params.iter().zip(whole.iter()) {
                assert_eq!(param.kept()?.to_vec::<f32>()?, other.kept()?.to_vec::<f32>()?, "{}", param.path());
                param.copy_from(&Tensor::zeros(param.dims(), DType::F32, &cpu)?)?;
            }
            let one = model.forward(&Tensor::ones(&[1, 8], DType::F32, &cpu)?)?.item()?;
            assert!((one - 1.0).abs() < 1e-6, "{format:?}: {one}");
        }
    }
    // What is trained stays.
    let trained = ParamBuilder::new(3, DType::F32, &cpu);
    assert!(Units::swappable(&Model::new(trained, 8, false)?.root.params()).is_empty());
    Ok(())
}

/// Counts the uploads of matrices.
#[derive(Debug)]
struct Counted {
    inner: Device,
    uploads: Arc<AtomicUsize>,
}

impl Decorator for Counted {
    fn inner(&self) -> &dyn Backend {
        self.inner.backend()
    }

    fn upload(&self, call: Checked<Upload<'_>>) -> Result<()> {
        if call.bytes.len() >= 1 << 10 {
            self.uploads.fetch_add(1, Ordering::Relaxed);
        }
        self.inner().upload(call)
    }
}

#[test]
fn a_block_of_the_host_comes_once_for_each_way() -> Result<()> {
    let uploads = Arc::new(AtomicUsize::new(0));
    let device = Device::new(Counted { inner: Device::cpu(), uploads: uploads.clone() });
    let builder = |device: &Device| ParamBuilder::with_plan(3, Placement::frozen(DType::F32), device);
    for count in [2, BLOCKS] {
        let model = swapped(builder, count, 64, &device)?;
        for step in 0..4 {
            let before = uploads.load(Ordering::Relaxed);
            let tape = Tape::new();
            tape.backward(&model.forward(&tape.leaf(&Tensor::ones(&[1, 64], DType::F32, &device)?))?)?;
            let came = uploads.load(Ordering::Relaxed) - before;
            // Two matrices each. The last block of a forward pass is there for backward, and the last one of that for the next step.
            // Once it is known what a step begins with, that is sent for behind the one before.
            let blocks = if step < 2 { 2 * count - 1 } else { 2 * count - 2 };
            assert_eq!(came, 2 * blocks, "step {step} of {count} blocks");
        }
    }
    Ok(())
}

#[test]
fn a_device_has_two_blocks_of_the_host() -> Result<()> {
    let width = 64;
    let builder = |device: &Device| ParamBuilder::with_plan(3, Placement::frozen(DType::F32), device);
    let block = 4 * (4 * width * width + 3 * width) as u64;
    let meta = Meta::default();
    let device = meta.device();
    let model = swapped(builder, BLOCKS, width, &device)?;
    let own = meta.used();
    assert!(own < block / 8, "{own}");
    let x = Tensor::ones(&[1, width], DType::F32, &device)?;
    for _ in 0..3 {
        let tape = Tape::new();
        tape.backward(&model.forward(&tape.leaf(&x))?)?;
    }
    let (peak, two) = (meta.peak() - own, 2 * block);
    assert!(peak > block && (peak as f64) < 1.15 * two as f64, "{peak} of {two}");
    Ok(())
}
