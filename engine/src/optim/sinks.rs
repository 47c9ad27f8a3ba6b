//! What happens to gradients between the tape and the parameters: sinks that hand gradients on to the next one.
//!
//! | chain | where |
//! |---|---|
//! | [`Step`] | nothing needs all gradients together: each is used and gone at once |
//! | [`Clip`] | their norm limits them, or an overflow of one skips the step |
//! | [`Reduce`] before either | several ranks train together |
//! | [`Accumulate`] before these | a step has several micro-batches: their sum is what ranks exchange, as NeMo defers it |
//!
//! [`OptimizerStep`] builds the chain.

use std::collections::{HashMap, HashSet};

use super::optimizer::{Optimizer, Rates};
use super::ranks::Ranks;
use super::reduce::Reduce;
use super::{LossScale, SquareSums, clip};
use crate::nn::{Param, Params};
use crate::tape::wide_sum;
use crate::{DType, Device, Error, GradientSink, Gradients, Result, Tape, Tensor, VarId};

/// A sink of the gradients of a step.
pub trait StepSink: GradientSink {
    /// The backward pass of a micro-batch is through. Where it was the step's last one, the parameters are updated when this
    /// returns the L2 norm of all gradients before clipping, still on the device, without axes.
    ///
    /// # Errors
    /// When no gradient came, or the device fails.
    fn end(&mut self) -> Result<Option<Tensor>>;
}

/// Updates each parameter as soon as its gradient is final and lets the gradient go: never are all gradients in memory
/// together. The bits are those of [`Optimizer::step`] without clipping.
#[derive(Debug)]
pub struct Step<'a> {
    optimizer: &'a mut Optimizer,
    targets: Vec<&'a Param>,
    rates: Rates,
    /// The places of the parameters in their order.
    places: HashMap<VarId, usize>,
    squares: Option<SquareSums>,
    /// Those that share out the parameters.
    ranks: Option<&'a Ranks>,
}

impl<'a> Step<'a> {
    /// For the parameters of a model.
    pub fn new(optimizer: &'a mut Optimizer, params: &'a Params, rates: Rates) -> Self {
        let targets: Vec<_> = params.iter().collect();
        let places = targets.iter().enumerate().filter_map(|(i, t)| Some((t.var()?, i))).collect();
        Self { optimizer, targets, rates, places, squares: None, ranks: None }
    }
}

impl GradientSink for Step<'_> {
    /// Gradients of what is no parameter are let go.
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        let Some(&place) = self.places.get(&var) else { return Ok(()) };
        let counts = self.ranks.is_none_or(|ranks| ranks.counts(self.targets[place]));
        let squares = self.squares(gradient.device())?;
        if counts {
            squares.add(place, &gradient)?;
        }
        self.optimizer.step_one(self.targets[place], &gradient, self.rates)
    }
}

impl Step<'_> {
    /// The sums of the step; it begins with them.
    fn squares(&mut self, device: &Device) -> Result<&SquareSums> {
        Ok(match &mut self.squares {
            Some(squares) => squares,
            none => {
                self.optimizer.begin(self.rates)?;
                none.insert(SquareSums::new(self.targets.len(), device)?)
            }
        })
    }
}

impl StepSink for Step<'_> {
    fn end(&mut self) -> Result<Option<Tensor>> {
        if let (Some(ranks), Some(first)) = (self.ranks, self.targets.first()) {
            // A rank may have nothing to update.
            ranks.all_reduce_sums(self.squares(first.device())?)?;
        }
        let squares = self.squares.take();
        self.optimizer.arrive()?;
        squares.ok_or_else(|| Error::argument("optimizer step", "at least one gradient", 0))?.norm().map(Some)
    }
}

/// Keeps all gradients, limits their norm, and then updates all parameters. With a loss scale a step whose gradients are not
/// all finite is skipped; without one it is an error as soon as the host knows.
#[derive(Debug)]
pub struct Clip<'a> {
    optimizer: &'a mut Optimizer,
    params: &'a Params,
    rates: Rates,
    max_norm: Option<f64>,
    scale: Option<&'a mut LossScale>,
    skip_non_finite: bool,
    gradients: Gradients,
    /// Those that share out the parameters.
    ranks: Option<&'a Ranks>,
}

impl<'a> Clip<'a> {
    /// For the parameters of a model. The gradients are those of a loss that was multiplied with `scale`.
    pub fn new(
        optimizer: &'a mut Optimizer,
        params: &'a Params,
        rates: Rates,
        max_norm: Option<f64>,
        scale: Option<&'a mut LossScale>,
    ) -> Self {
        let (skip_non_finite, gradients) = (false, Gradients::default());
        Self { optimizer, params, rates, max_norm, scale, skip_non_finite, gradients, ranks: None }
    }
}

impl GradientSink for Clip<'_> {
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        self.gradients.insert(var, gradient);
        Ok(())
    }
}

impl StepSink for Clip<'_> {
    fn end(&mut self) -> Result<Option<Tensor>> {
        let gradients = std::mem::take(&mut self.gradients);
        let scale = self.scale.as_ref().map(|scale| scale.scale()).transpose()?;
        let clipping = match (self.ranks, self.params.iter().next()) {
            (Some(ranks), Some(first)) => {
                let sums = ranks.norm_sums(self.params, &gradients, first.device())?;
                let dtype = first.dtype().promote(DType::F32);
                clip::clip_sums(&sums, dtype, self.max_norm, scale.as_ref())?
            }
            _ => clip::clip_scaled(&gradients, self.max_norm, scale.as_ref())?,
        };
        let coefficient = &clipping.coefficient;
        match &mut self.scale {
            Some(scale) => {
                self.optimizer.step_or_skip(self.params, &gradients, self.rates, coefficient)?;
                scale.update(coefficient)?;
            }
            None if self.skip_non_finite => {
                self.optimizer.step_or_skip(self.params, &gradients, self.rates, coefficient)?;
            }
            None => self.optimizer.step(self.params, &gradients, self.rates, Some(coefficient))?,
        }
        Ok(Some(clipping.norm))
    }
}

/// Adds up the gradients of micro-batches, in f32 (f64 for f64) whatever the dtype of the parameters. Those of the last
/// micro-batch go on with the sum as soon as they are final.
#[derive(Debug)]
pub struct Accumulate<S> {
    next: S,
    /// Micro-batches still to come, with the one that runs.
    left: usize,
    sums: Gradients,
}

impl<S: StepSink> Accumulate<S> {
    /// The sum of so many micro-batches goes to `next`.
    pub fn new(micro_batches: usize, next: S) -> Self {
        Self { next, left: micro_batches, sums: Gradients::default() }
    }
}

impl<S: StepSink> GradientSink for Accumulate<S> {
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        let sum = match self.sums.remove(var) {
            Some(before) => wide_sum(before, gradient)?,
            None => gradient,
        };
        if self.left <= 1 {
            return self.next.gradient(var, sum);
        }
        self.sums.insert(var, sum);
        Ok(())
    }
}

impl<S: StepSink> StepSink for Accumulate<S> {
    fn end(&mut self) -> Result<Option<Tensor>> {
        self.left = self.left.saturating_sub(1);
        if self.left > 0 {
            return Ok(None);
        }
        // Parameters that the last micro-batch did not reach.
        let vars: Vec<VarId> = self.sums.iter().map(|(var, _)| var).collect();
        for var in vars {
            if let Some(sum) = self.sums.remove(var) {
                self.next.gradient(var, sum)?;
            }
        }
        self.next.end()
    }
}

impl GradientSink for Box<dyn StepSink + '_> {
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        (**self).gradient(var, gradient)
    }
}

impl StepSink for Box<dyn StepSink + '_> {
    fn end(&mut self) -> Result<Option<Tensor>> {
        (**self).end()
    }
}

/// What decides how gradients become a step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct StepConfig {
    /// Backward passes of a step.
    pub micro_batches: usize,
    /// The greatest norm of all gradients together.
    pub max_norm: Option<f64>,
    /// Whether a step whose gradients are not all finite is skipped, instead of being an error.
    pub skip_non_finite: bool,
}

/// One step of an optimiser, from losses to updated parameters.
///
/// ```
/// # use flowtape_engine::{DType, Device, Tape, Tensor, nn::{Linear, ParamBuilder}, optim::*};
/// # fn main() -> flowtape_engine::Result<()> {
/// let builder = ParamBuilder::new(0, DType::F32, &Device::cpu());
/// let (layer, params) = (Linear::new(&builder, 3, 1, true)?, builder.params());
/// let mut optimizer = Optimizer::new(AdamW::default());
/// let config = StepConfig { micro_batches: 1, max_norm: Some(1.0), skip_non_finite: false };
/// let rates = Rates { lr: 1e-3, weight_decay: 0.01 };
/// let mut step = OptimizerStep::new(config, rates, &mut optimizer, &params, None)?;
/// let tape = Tape::new();
/// let x = tape.attach(&Tensor::ones(&[4, 3], DType::F32, &Device::cpu())?);
/// let loss = layer.forward(&x)?.square()?.mean_all()?;
/// let norm = step.backward(&tape, &loss, &[])?;
/// assert!(norm.is_some());
/// # Ok(())
/// # }
/// ```
pub struct OptimizerStep<'a> {
    sink: Box<dyn StepSink + 'a>,
    params: &'a Params,
    /// The scale of the loss.
    scale: Option<Tensor>,
}

impl<'a> OptimizerStep<'a> {
    /// A step of a rank that is alone.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(
        config: StepConfig,
        rates: Rates,
        optimizer: &'a mut Optimizer,
        params: &'a Params,
        scale: Option<&'a mut LossScale>,
    ) -> Result<Self> {
        Self::on_ranks(config, rates, optimizer, params, scale, None)
    }

    /// The one place that builds the chain of sinks.
    ///
    /// # Errors
    /// When the device fails, or ranks share out the parameters of a rule that sums over all of them.
    pub fn on_ranks(
        config: StepConfig,
        rates: Rates,
        optimizer: &'a mut Optimizer,
        params: &'a Params,
        scale: Option<&'a mut LossScale>,
        ranks: Option<&'a Ranks>,
    ) -> Result<Self> {
        let cotangent = scale.as_ref().map(|scale| scale.scale()).transpose()?;
        let sharing = ranks.filter(|ranks| ranks.is_sharded());
        if sharing.is_some() {
            optimizer.check_shareable()?;
        }
        let together = config.max_norm.is_some() || scale.is_some() || config.skip_non_finite || optimizer.needs_all();
        let mut sink: Box<dyn StepSink + 'a> = if together {
            let clip = Clip::new(optimizer, params, rates, config.max_norm, scale);
            Box::new(Clip { skip_non_finite: config.skip_non_finite, ranks: sharing, ..clip })
        } else {
            Box::new(Step { ranks: sharing, ..Step::new(optimizer, params, rates) })
        };
        if let Some(ranks) = ranks.filter(|ranks| !ranks.comm().is_alone()) {
            sink = Box::new(Reduce::new(ranks, params, sink));
        }
        if config.micro_batches > 1 {
            sink = Box::new(Accumulate::new(config.micro_batches, sink));
        }
        Ok(Self { sink, params, scale: cotangent })
    }

    /// With another sink in front of the chain, which `wrap` makes from it.
    #[must_use]
    pub fn behind<S: StepSink + 'a>(self, wrap: impl FnOnce(Box<dyn StepSink + 'a>) -> S) -> Self {
        Self { sink: Box::new(wrap(self.sink)), ..self }
    }

    /// Runs backward from the loss of a micro-batch (one element; its share of the step's loss), multiplied with the loss
    /// scale where there is one. After the last micro-batch the parameters are updated, and the norm of all gradients comes
    /// back, still on the device.
    ///
    /// # Errors
    /// When the tape fails, or a parameter got no gradient that is not named in `without`. Where parameters are updated
    /// on the way, they are then.
    pub fn backward(&mut self, tape: &Tape, loss: &Tensor, without: &[String]) -> Result<Option<Tensor>> {
        let cotangent = match &self.scale {
            Some(scale) => scale.to_dtype(loss.dtype())?.reshape(loss.dims())?,
            None => Tensor::ones(loss.dims(), loss.dtype(), loss.device())?,
        };
        let vars = self.params.iter().filter_map(Param::var).collect();
        let mut front = Front { sink: &mut self.sink, vars, reached: HashSet::new() };
        tape.backward_with(&[(loss, &cotangent)], &mut front)?;
        let reached = front.reached;
        self.params.check_reached(|var| reached.contains(&var), without)?;
        self.sink.end()
    }
}

/// Lets the gradients of parameters through, and notes which came.
struct Front<'s, 'a> {
    sink: &'s mut Box<dyn StepSink + 'a>,
    vars: HashSet<VarId>,
    reached: HashSet<VarId>,
}

impl GradientSink for Front<'_, '_> {
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        if !self.vars.contains(&var) {
            return Ok(());
        }
        self.reached.insert(var);
        self.sink.gradient(var, gradient)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Init, ParamBuilder, Placement};
    use crate::optim::{AdamW, LossScaleConfig, LossScaleState, Sgd};
    use crate::{DType, Device, Philox};

    const RATES: Rates = Rates { lr: 1e-2, weight_decay: 0.1 };
    const DTYPES: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::F64];

    /// Keeps what comes, and how often something came.
    #[derive(Debug, Default)]
    struct Kept {
        gradients: Gradients,
        came: usize,
    }

    impl GradientSink for &mut Kept {
        fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
            self.came += 1;
            self.gradients.gradient(var, gradient)
        }
    }

    impl StepSink for &mut Kept {
        fn end(&mut self) -> Result<Option<Tensor>> {
            Tensor::ones(&[], DType::F32, &Device::cpu()).map(Some)
        }
    }

    #[test]
    fn a_thousand_gradients_of_one_add_up_to_a_thousand_in_every_dtype() -> Result<()> {
        for dtype in DTYPES {
            let builder = ParamBuilder::new(0, dtype, &Device::cpu());
            let (w, late) = (builder.get("w", &[3], Init::Ones)?, builder.get("late", &[2], Init::Ones)?);
            let mut kept = Kept::default();
            let mut sums = Accumulate::new(1000, &mut kept);
            for i in 0..1000 {
                sums.gradient(w.var().unwrap(), Tensor::ones(&[3], dtype, &Device::cpu())?)?;
                // One that the last micro-batches do not reach.
                if i < 500 {
                    sums.gradient(late.var().unwrap(), Tensor::ones(&[2], dtype, &Device::cpu())?)?;
                }
                assert_eq!(sums.end()?.is_some(), i == 999, "{dtype}");
            }
            assert_eq!(kept.came, 2);
            let sum = kept.gradients.of(&w).unwrap();
            assert_eq!(sum.dtype(), if dtype == DType::F64 { DType::F64 } else { DType::F32 });
            assert_eq!(sum.to_vec::<f64>()?, [1000.0; 3], "{dtype}");
            assert_eq!(kept.gradients.of(&late).unwrap().to_vec::<f64>()?, [500.0; 2], "{dtype}");
        }
        Ok(())
    }

    /// Two parameters of a loss whose gradients are the inputs.
    struct Model {
        params: Params,
        tensors: [Param; 2],
    }

    impl Model {
        fn new(dtype: DType, masters: DType) -> Result<Self> {
            let builder = ParamBuilder::with_plan(1, Placement::trained(dtype).with_master(masters), &Device::cpu());
            let normal = Init::Normal { std: 1.0 };
            let tensors = [builder.get("a", &[5], normal)?, builder.get("b", &[3, 2], normal)?];
            Ok(Self { params: builder.params(), tensors })
        }

        /// A loss on a tape, with gradients of about `size`.
        fn loss(&self, tape: &Tape, seed: u64, size: f64) -> Result<Tensor> {
            let (cpu, mut random) = (Device::cpu(), Philox::new(seed));
            let mut total = tape.attach(&Tensor::zeros(&[], DType::F32, &cpu)?);
            for p in &self.tensors {
                let x = random.normal(p.dims(), &cpu)?.mul_scalar(size)?.to_dtype(p.dtype())?;
                let products = tape.attach(&x).mul(&p.value()?)?.to_dtype(DType::F32)?;
                total = total.add(&products.sum_all()?)?;
            }
            Ok(total)
        }

        fn kept(&self) -> Result<Vec<Vec<f64>>> {
            self.params.iter().map(|p| p.kept()?.to_vec()).collect()
        }
    }

    /// Three steps: the parameters after each, and the norms.
    #[expect(clippy::type_complexity)]
    fn steps(
        dtype: DType,
        masters: DType,
        config: StepConfig,
        mut scale: Option<LossScale>,
    ) -> Result<(Vec<Vec<Vec<f64>>>, Vec<f64>)> {
        let model = Model::new(dtype, masters)?;
        let mut optimizer = Optimizer::new(AdamW::default());
        let (mut after, mut norms) = (Vec::new(), Vec::new());
        for step in 0..3 {
            let mut sinks = OptimizerStep::new(config, RATES, &mut optimizer, &model.params, scale.as_mut())?;
            let mut norm = None;
            for i in 0..config.micro_batches {
                assert!(norm.is_none());
                let tape = Tape::new();
                let loss = model.loss(&tape, (step * config.micro_batches + i) as u64, 1.0)?;
                norm = sinks.backward(&tape, &loss, &[])?;
            }
            drop(sinks);
            norms.push(norm.unwrap().item()?);
            after.push(model.kept()?);
        }
        Ok((after, norms))
    }

    #[test]
    fn all_chains_come_to_the_same_bits_where_nothing_limits() -> Result<()> {
        for (dtype, masters) in DTYPES.map(|d| (d, d)).into_iter().chain([(DType::BF16, DType::F32)]) {
            for micro_batches in [1, 3] {
                let config = |max_norm| StepConfig { micro_batches, max_norm, skip_non_finite: false };
                let at_once = steps(dtype, masters, config(None), None)?;
                let together = steps(dtype, masters, config(Some(1e30)), None)?;
                assert_eq!(at_once, together, "{dtype}, {micro_batches} micro-batches");
                // A power of two changes nothing but the exponents.
                let scale = LossScale::new(LossScaleConfig { init_scale: 8.0, ..Default::default() }, &Device::cpu())?;
                assert_eq!(at_once, steps(dtype, masters, config(None), Some(scale))?, "{dtype}, scaled");
            }
        }
        Ok(())
    }

    #[test]
    fn a_limit_is_that_of_the_unscaled_gradients() -> Result<()> {
        let run = |scale: Option<f64>| -> Result<f64> {
            let model = Model::new(DType::F64, DType::F64)?;
            let before = model.kept()?;
            let mut optimizer = Optimizer::new(Sgd::default());
            let config = |init_scale| LossScaleConfig { init_scale, ..LossScaleConfig::default() };
            let mut scale = scale.map(|s| LossScale::new(config(s), &Device::cpu())).transpose()?;
            let (rates, limit) = (
                Rates { lr: 1.0, weight_decay: 0.0 },
                StepConfig { micro_batches: 1, max_norm: Some(0.5), skip_non_finite: false },
            );
            let tape = Tape::new();
            let loss = model.loss(&tape, 7, 1.0)?;
            OptimizerStep::new(limit, rates, &mut optimizer, &model.params, scale.as_mut())?.backward(
                &tape,
                &loss,
                &[],
            )?;
            let moved = before.iter().flatten().zip(model.kept()?.into_iter().flatten().collect::<Vec<_>>());
            Ok(moved.map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt())
        };
        for scale in [None, Some(1.0), Some(1024.0)] {
            let moved = run(scale)?;
            assert!((moved - 0.5).abs() < 1e-5, "{scale:?}: {moved}");
        }
        Ok(())
    }

    /// With a loss scale an overflow changes nothing but the scale, and the run goes on as if it had not been; without one it
    /// is an error.
    #[test]
    fn an_overflow_skips_the_whole_step_and_is_counted() -> Result<()> {
        let run = |sizes: &[f64], scaled: bool| -> Result<(Vec<Vec<f64>>, Option<LossScaleState>)> {
            let model = Model::new(DType::F16, DType::F32)?;
            let mut optimizer = Optimizer::new(AdamW::default());
            let config = LossScaleConfig { init_scale: 16.0, ..LossScaleConfig::default() };
            let mut scale = if scaled { Some(LossScale::new(config, &Device::cpu())?) } else { None };
            let mut good = 0;
            for &size in sizes {
                let limit = StepConfig { micro_batches: 1, max_norm: Some(1e9), skip_non_finite: false };
                let tape = Tape::new();
                // The same gradients in every step that counts.
                let loss = model.loss(&tape, good, size)?;
                good += u64::from(size == 1.0);
                OptimizerStep::new(limit, RATES, &mut optimizer, &model.params, scale.as_mut())?.backward(
                    &tape,
                    &loss,
                    &[],
                )?;
            }
            let state = scale.map(|scale| LossScaleState::read(scale.read_later()?)).transpose()?;
            Ok((model.kept()?, state))
        };
        // 16 times 60,000 is more than f16 holds.
        let (with, state) = run(&[6e4, 1.0, 6e4, 1.0, 1.0], true)?;
        assert_eq!(state, Some(LossScaleState { scale: 4.0, growth_tracker: 2, skipped_steps: 2 }));
        assert_eq!(with, run(&[1.0, 1.0, 1.0], true)?.0);
        assert!(matches!(run(&[1.0, f64::INFINITY], false), Err(Error::NonFinite { .. })));
        Ok(())
    }

    #[test]
    fn a_parameter_that_no_gradient_reached_is_named() -> Result<()> {
        let model = Model::new(DType::F32, DType::F32)?;
        for max_norm in [None, Some(1.0)] {
            let mut optimizer = Optimizer::new(AdamW::default());
            let config = StepConfig { micro_batches: 1, max_norm, skip_non_finite: false };
            let mut step = OptimizerStep::new(config, RATES, &mut optimizer, &model.params, None)?;
            let tape = Tape::new();
            let loss = model.tensors[0].value()?.square()?.sum_all()?;
            let error = step.backward(&tape, &loss, &[]).unwrap_err();
            assert!(matches!(error, Error::MissingGradient { names } if names == ["b"]));
            let loss = model.tensors[0].value()?.square()?.sum_all()?;
            assert!(step.backward(&tape, &loss, &["b".into()])?.is_some());
        }
        Ok(())
    }
}
