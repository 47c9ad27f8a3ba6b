//! What an optimiser remembers in the host's memory (Megatron-Core's `optimizer_cpu_offload`): it comes to the device for the update of
//! its parameter, and leaves after.

use std::collections::VecDeque;

use super::optimizer::{Optimizer, State};
use crate::meta::Meta;
use crate::nn::Param;
use crate::{Device, Error, Later, Result, Tensor, VarId};

/// About the most bytes that are on the device or on their way from it, where no single parameter has more.
const TOGETHER: usize = 1 << 26;

/// What is on its way to the host.
#[derive(Debug)]
pub(super) struct Offload {
    leaving: VecDeque<Leaving>,
    bytes: usize,
    /// What stands for the host's memory where a device has no data.
    shapes: Device,
}

/// What is remembered of one parameter.
#[derive(Debug)]
struct Leaving {
    var: VarId,
    bytes: usize,
    values: Vec<Value>,
}

#[derive(Debug)]
enum Value {
    Later(Later),
    Shape(Tensor),
}

impl Default for Offload {
    fn default() -> Self {
        Self { leaving: VecDeque::new(), bytes: 0, shapes: Meta::default().device() }
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.dtype().size()
}

/// A tensor on a device, which may have no data.
pub(super) fn brought(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    if tensor.device().same(device) || device.backend().has_data() {
        return tensor.to_device(device);
    }
    Tensor::empty(tensor.dims(), tensor.dtype(), device)
}

impl State {
    /// All of it on the device where it is updated.
    pub(super) fn bring(&mut self, device: &Device) -> Result<()> {
        self.slots.iter_mut().chain(&mut self.whole).try_for_each(|slot| {
            *slot = brought(slot, device)?;
            Ok(())
        })
    }
}

impl Optimizer {
    /// With what it remembers in the host's memory, for parameters on a device of another memory. The results are the same bits.
    #[must_use]
    pub fn with_cpu_offload(mut self, on: bool) -> Self {
        self.offload = on.then(Offload::default);
        self
    }

    /// Bytes of what it remembers in the host's memory.
    pub fn offloaded(&self) -> u64 {
        let of = |state: &State| state.slots.iter().chain(&state.whole).map(bytes).sum::<usize>() as u64;
        if self.offload.is_some() { self.state.values().map(of).sum() } else { 0 }
    }

    /// Parameters whose updates run together, so that little more than [`TOGETHER`] of what is remembered is on the device.
    pub(super) fn together<'a>(&self, all: Vec<(&'a Param, &'a Tensor)>) -> Vec<Vec<(&'a Param, &'a Tensor)>> {
        if self.offload.is_none() {
            return vec![all];
        }
        let slots = self.rule.slots().len().max(1);
        let (mut parts, mut filled) = (Vec::<Vec<_>>::new(), usize::MAX);
        for (param, gradient) in all {
            let bytes = slots * param.numel() * param.kept_dtype().size();
            filled = filled.saturating_add(bytes);
            match parts.last_mut().filter(|_| filled <= TOGETHER) {
                Some(part) => part.push((param, gradient)),
                None => {
                    parts.push(vec![(param, gradient)]);
                    filled = bytes;
                }
            }
        }
        parts
    }

    /// Sends what is remembered of a parameter to the host, behind the work so far. What was sent before arrives where that is much.
    pub(super) fn leave(&mut self, param: &Param) -> Result<()> {
        let (Some(offload), Some(var)) = (&mut self.offload, param.var()) else { return Ok(()) };
        let Some(state) = self.state.get_mut(&var) else { return Ok(()) };
        let data = param.device().backend().has_data();
        let leave = |slot: &Tensor| match data {
            true => slot.read_later().map(Value::Later),
            false => Tensor::empty(slot.dims(), slot.dtype(), &offload.shapes).map(Value::Shape),
        };
        let slots = || state.slots.iter().chain(&state.whole);
        let (values, bytes) = (slots().map(leave).collect::<Result<_>>()?, slots().map(bytes).sum());
        for slot in state.slots.iter_mut().chain(&mut state.whole) {
            *slot = Tensor::empty(&[0], slot.dtype(), &offload.shapes)?;
        }
        offload.leaving.push_back(Leaving { var, bytes, values });
        offload.bytes += bytes;
        while self.offload.as_ref().is_some_and(|offload| offload.bytes > TOGETHER && offload.leaving.len() > 1) {
            self.arrive_one()?;
        }
        Ok(())
    }

    /// Waits until all that was sent is there.
    pub(super) fn arrive(&mut self) -> Result<()> {
        while self.offload.as_ref().is_some_and(|offload| !offload.leaving.is_empty()) {
            self.arrive_one()?;
        }
        Ok(())
    }

    fn arrive_one(&mut self) -> Result<()> {
        let Some(offload) = &mut self.offload else { return Ok(()) };
        let Some(Leaving { var, bytes, values }) = offload.leaving.pop_front() else { return Ok(()) };
        offload.bytes -= bytes;
        let Some(state) = self.state.get_mut(&var) else { return Ok(()) };
        for (slot, value) in state.slots.iter_mut().chain(&mut state.whole).zip(values) {
            *slot = match value {
                Value::Later(later) => later.on_host()?,
                Value::Shape(shape) => shape,
            };
        }
        Ok(())
    }

    /// Checks that nothing is on its way: a step that failed leaves it so.
    pub(super) fn check_arrived(&self) -> Result<()> {
        match &self.offload {
            Some(offload) if !offload.leaving.is_empty() => {
                Err(Error::argument(self.rule.name(), "a step that came to its end", "one that failed"))
            }
            _ => Ok(()),
        }
    }

    /// Where what is remembered of a parameter lies between updates.
    pub(super) fn home(&self, param: &Param) -> Device {
        if self.offload.is_some() { Device::cpu() } else { param.device().clone() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use serde_json::{Map, Value};

    use super::*;
    use crate::backend::call::{Checked, Upload};
    use crate::backend::{Backend, Decorator};
    use crate::nn::{Init, ParamBuilder, Params, Placement};
    use crate::optim::{OptimizerStep, RULES, Rates, Rounding, RuleEntry, StepConfig};
    use crate::{DType, Philox, Tape};

    /// A device beside the host, whose uploads are counted.
    #[derive(Debug)]
    struct Card {
        inner: Device,
        uploaded: Arc<AtomicUsize>,
    }

    impl Decorator for Card {
        fn inner(&self) -> &dyn Backend {
            self.inner.backend()
        }

        fn upload(&self, call: Checked<Upload<'_>>) -> Result<()> {
            self.uploaded.fetch_add(call.bytes.len(), Ordering::Relaxed);
            self.inner().upload(call)
        }
    }

    const RATES: Rates = Rates { lr: 0.01, weight_decay: 0.1 };

    fn params(placement: Placement, device: &Device) -> Result<Params> {
        let root = ParamBuilder::with_plan(1, placement, device);
        root.get("matrix", &[12, 8], Init::Normal { std: 1.0 })?;
        root.get("vector", &[20], Init::Normal { std: 1.0 })?;
        Ok(root.params())
    }

    /// Steps of a loss that all parameters are in, with or without clipping: the parameters and what is remembered.
    fn trained(mut optimizer: Optimizer, params: &Params, clip: bool, steps: u64) -> Result<Vec<(String, Vec<u8>)>> {
        let config = StepConfig { micro_batches: 1, max_norm: clip.then_some(0.5), skip_non_finite: false };
        for step in 0..steps {
            let mut one = OptimizerStep::new(config, RATES, &mut optimizer, params, None)?;
            let tape = Tape::new();
            let mut loss: Option<Tensor> = None;
            for param in params.iter() {
                let target = Philox::new(step).normal(param.dims(), param.device())?.to_dtype(param.dtype())?;
                let part = tape.attach(&param.value()?).sub(&target)?.square()?.to_dtype(DType::F32)?.mean_all()?;
                loss = Some(loss.map_or(Ok(part.clone()), |loss| loss.add(&part))?);
            }
            one.backward(&tape, &loss.unwrap(), &[])?;
        }
        let kept = params.iter().map(|p| Ok((p.path().to_owned(), p.kept()?.to_bytes()?)));
        let slots = optimizer.tensors(params)?.into_iter().map(|(name, tensor)| Ok((name, tensor.to_bytes()?)));
        kept.chain(slots).collect()
    }

    #[test]
    fn what_is_on_the_host_gives_the_same_bits_by_every_rule() -> Result<()> {
        let uploaded = Arc::new(AtomicUsize::new(0));
        let card = Device::new(Card { inner: Device::cpu(), uploaded: uploaded.clone() });
        let bf16 = Placement::trained(DType::BF16);
        for entry in RULES {
            for (placement, rounding) in [
                (Placement::trained(DType::F32), Rounding::Nearest),
                (bf16.with_master(DType::F32), Rounding::Nearest),
                (bf16, Rounding::Kahan),
            ] {
                for clip in [false, true] {
                    let run = |offload: bool| -> Result<_> {
                        let rule = RuleEntry::rule(entry.name, Value::Object(Map::new()))?;
                        let optimizer = Optimizer::boxed(rule).with_rounding(rounding.clone());
                        trained(optimizer.with_cpu_offload(offload), &params(placement, &card)?, clip, 3)
                    };
                    assert_eq!(run(true)?, run(false)?, "{} {rounding:?}, clipped {clip}", entry.name);
                }
            }
        }
        // What is remembered comes once for each step but the first, which makes it.
        let came = |offload: bool, steps: u64| -> Result<usize> {
            let before = uploaded.load(Ordering::Relaxed);
            let optimizer = Optimizer::new(crate::optim::AdamW::default()).with_cpu_offload(offload);
            trained(optimizer, &params(Placement::trained(DType::F32), &card)?, false, steps)?;
            Ok(uploaded.load(Ordering::Relaxed) - before)
        };
        let all = 2 * 4 * (12 * 8 + 20);
        for steps in [1, 4] {
            assert_eq!(came(true, steps)? - came(false, steps)?, (steps as usize - 1) * all, "{steps} steps");
        }
        Ok(())
    }

    #[test]
    fn a_device_has_little_of_what_is_remembered() -> Result<()> {
        let meta = Meta::default();
        let device = meta.device();
        let root = ParamBuilder::new(1, DType::F32, &device);
        let (width, layers) = (4096, 8);
        (0..layers).try_for_each(|i| root.get(&format!("{i}"), &[width, width], Init::Zeros).map(drop))?;
        let (params, one) = (root.params(), (4 * width * width) as u64);
        for clip in [false, true] {
            let mut optimizer = Optimizer::new(crate::optim::AdamW::default()).with_cpu_offload(true);
            for _ in 0..2 {
                let config = StepConfig { micro_batches: 1, max_norm: clip.then_some(1.0), skip_non_finite: false };
                let mut step = OptimizerStep::new(config, RATES, &mut optimizer, &params, None)?;
                let tape = Tape::new();
                let sum = params.iter().try_fold(None, |sum: Option<Tensor>, param| -> Result<_> {
                    let part = tape.attach(&param.value()?).sum_all()?;
                    Ok(Some(sum.map_or(Ok(part.clone()), |sum| sum.add(&part))?))
                })?;
                step.backward(&tape, &sum.unwrap(), &[])?;
            }
            let all = layers as u64 * one;
            assert_eq!((meta.used() / one, optimizer.offloaded()), (layers as u64, 2 * all));
            // The weights, their gradients where they are kept, one parameter's two moments, and those that leave.
            assert!(meta.peak() <= 2 * all + 6 * one, "{} of {all}", meta.peak());
        }
        Ok(())
    }
}
