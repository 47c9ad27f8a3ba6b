//! Dynamic loss scaling: small gradients stay normal numbers of f16 (Micikevicius et al. 2018).

use serde::{Deserialize, Serialize};

use crate::expr::Function;
use crate::ops::pointwise::run_pointwise;
use crate::{Device, Error, Later, Result, Tensor};

/// How the scale moves, with the names and defaults of PyTorch's `GradScaler`.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct LossScaleConfig {
    /// The first scale.
    pub init_scale: f64,
    /// What it is multiplied with after `growth_interval` steps in a row without an overflow.
    pub growth_factor: f64,
    /// What it is multiplied with after an overflow.
    pub backoff_factor: f64,
    /// Steps in a row without an overflow after which it grows.
    pub growth_interval: u64,
}

impl Default for LossScaleConfig {
    fn default() -> Self {
        Self { init_scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 }
    }
}

impl LossScaleConfig {
    /// Checks it.
    ///
    /// # Errors
    /// When a value is outside its range.
    pub fn check(&self) -> Result<()> {
        let Self { init_scale, growth_factor, backoff_factor, growth_interval } = *self;
        let scale = init_scale >= LossScaleState::LEAST && init_scale <= f64::from(f32::MAX);
        if scale && growth_factor >= 1.0 && backoff_factor > 0.0 && backoff_factor < 1.0 && growth_interval > 0 {
            return Ok(());
        }
        let least = LossScaleState::LEAST;
        let expected = format!(
            "init_scale from {least:e} to the largest f32, growth_factor of at least 1, backoff_factor between 0 and 1, \
             growth_interval of at least 1"
        );
        Err(Error::argument("loss_scale", expected, self))
    }
}

/// Where a loss scale stands.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct LossScaleState {
    /// What the loss is multiplied with.
    pub scale: f64,
    /// Steps since the scale moved last.
    pub growth_tracker: u64,
    /// Steps that were skipped so far because a gradient was not finite.
    pub skipped_steps: u64,
}

impl LossScaleState {
    /// The least scale: where even that overflows, the forward pass does, and no scale helps.
    const LEAST: f64 = 1e-4;

    /// Of the values that [`LossScale::read_later`] reads.
    ///
    /// # Errors
    /// When the scale fell so low that it is not the scale's fault: the loss itself is not finite.
    pub fn read(values: Later) -> Result<Self> {
        let values: Vec<f64> = values.wait()?;
        let [scale, tracker, skipped] = values[..] else {
            return Err(Error::shape("loss scale", "[3]", values.len()));
        };
        if scale < Self::LEAST {
            let what = format!("the gradient, though the loss scale fell to {scale:e} over {skipped} skipped steps,");
            return Err(Error::NonFinite { op: "loss scale", what });
        }
        Ok(Self { scale, growth_tracker: tracker as u64, skipped_steps: skipped as u64 })
    }
}

/// What a loss is multiplied with before the backward pass; the optimiser takes it off again. It is a value on the device: a
/// step that overflows is skipped and makes it smaller without the host's knowing.
#[derive(Debug)]
pub struct LossScale {
    /// The new values of scale, tracker and skipped steps from the old ones and the gradients' coefficient.
    update: Function,
    /// Scale, tracker and skipped steps, f32 `[3]`.
    state: Tensor,
}

impl LossScale {
    /// At its first scale.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(config: LossScaleConfig, device: &Device) -> Result<Self> {
        let LossScaleConfig { init_scale, growth_factor, backoff_factor, growth_interval } = config;
        let update = Function::build(|[scale, tracker, skipped, coefficient]| {
            let finite = |then, otherwise| coefficient.select_lt(f64::INFINITY, then, otherwise);
            let grown = scale * growth_factor;
            let grown = grown.select_lt(f64::INFINITY, grown, scale);
            let (next, interval) = (tracker + 1.0, growth_interval as f64);
            [
                finite(next.select_lt(interval, scale, grown), scale * backoff_factor),
                coefficient.select_lt(f64::INFINITY, next.select_lt(interval, next, 0.0), 0.0),
                finite(skipped, skipped + 1.0),
            ]
        });
        let state = LossScaleState { scale: init_scale, growth_tracker: 0, skipped_steps: 0 };
        Ok(Self { update, state: values(state, device)? })
    }

    /// Goes on from another state.
    ///
    /// # Errors
    /// When the device fails.
    pub fn load(&mut self, state: LossScaleState) -> Result<()> {
        self.state = values(state, self.state.device())?;
        Ok(())
    }

    /// The scale, without axes: the cotangent of a loss.
    ///
    /// # Errors
    /// Never in practice: a view of the state.
    pub fn scale(&self) -> Result<Tensor> {
        self.state.narrow(0, 0, 1)?.reshape(&[])
    }

    /// Reads the state now, but waits for it only in [`LossScaleState::read`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn read_later(&self) -> Result<Later> {
        self.state.read_later()
    }

    /// A step is through. `coefficient` is what its gradients were multiplied with: NaN if it was skipped.
    ///
    /// # Errors
    /// When the device fails.
    pub fn update(&mut self, coefficient: &Tensor) -> Result<()> {
        let views = (0..3).map(|i| self.state.narrow(0, i, 1)).collect::<Result<Vec<_>>>()?;
        let outputs: Vec<&Tensor> = views.iter().collect();
        let inputs: Vec<&Tensor> = outputs.iter().copied().chain([coefficient]).collect();
        run_pointwise(&self.update, &inputs, &[], &outputs)
    }
}

fn values(state: LossScaleState, device: &Device) -> Result<Tensor> {
    let LossScaleState { scale, growth_tracker, skipped_steps } = state;
    Tensor::from_slice(&[scale as f32, growth_tracker as f32, skipped_steps as f32], &[3], device)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `torch._amp_update_scale_` documents it.
    #[test]
    fn the_scale_falls_with_an_overflow_and_grows_after_an_interval_without() -> Result<()> {
        let config = LossScaleConfig { growth_interval: 3, ..LossScaleConfig::default() };
        let cpu = Device::cpu();
        let mut scale = LossScale::new(config, &cpu)?;
        let (mut expected, mut tracker, mut skipped) = (65536.0, 0, 0);
        for finite in [true, true, false, true, true, true, true, false, false, true] {
            scale.update(&Tensor::full(&[], if finite { 0.5 } else { f64::NAN }, crate::DType::F32, &cpu)?)?;
            if finite {
                tracker += 1;
                if tracker == 3 {
                    (expected, tracker) = (expected * 2.0, 0);
                }
            } else {
                (expected, tracker, skipped) = (expected * 0.5, 0, skipped + 1);
            }
            let state = LossScaleState { scale: expected, growth_tracker: tracker, skipped_steps: skipped };
            assert_eq!(LossScaleState::read(scale.read_later()?)?, state);
            assert_eq!(scale.scale()?.item()?, expected);
            // Another one goes on from there.
            scale = LossScale::new(config, &cpu)?;
            scale.load(state)?;
        }
        // A scale does not grow past what f32 holds, and one that can't help is an error.
        let state = |scale| LossScaleState { scale, growth_tracker: 2, skipped_steps: 0 };
        scale.load(state(2f64.powi(127)))?;
        scale.update(&Tensor::ones(&[], crate::DType::F32, &cpu)?)?;
        assert_eq!(scale.scale()?.item()?, 2f64.powi(127));
        scale.load(state(1e-5))?;
        assert!(matches!(LossScaleState::read(scale.read_later()?), Err(Error::NonFinite { .. })));
        Ok(())
    }
}
