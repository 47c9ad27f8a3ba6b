//! Whether steps are large enough for the weights' dtype.

use flowtape_engine::nn::Params;
use flowtape_engine::ops::pointwise::pointwise;
use flowtape_engine::{DType, Result, Tensor};

/// Rules whose steps are about as long as the learning rate, whatever the gradients are.
const OF_LEARNING_RATE: [&str; 5] = ["adamw", "adam", "lion", "adamwschedulefree", "adamw8bit"];
/// The share of the weights from which on a warning is due.
const MANY: f64 = 0.5;

/// The share of the trained weights that a step of this length leaves as they are, since it is less than half of what lies between
/// two of their dtype's numbers. None where the rule's steps have other lengths, or no weight is narrow.
pub(crate) fn share_that_stays(rule: &str, lr: f64, params: &Params) -> Result<Option<f64>> {
    if !OF_LEARNING_RATE.contains(&rule) {
        return Ok(None);
    }
    let (mut all, mut stay) = (0.0, 0.0);
    for param in params.iter().filter(|param| param.var().is_some() && param.is_here()) {
        let kept = param.kept()?;
        // Bits of the fraction, and one for a half.
        let half = match kept.dtype() {
            DType::BF16 => 2f64.powi(-9),
            DType::F16 => 2f64.powi(-12),
            _ => continue,
        };
        let stays: Tensor = pointwise([&kept.to_dtype(DType::F32)?], |[w]| (w.abs() * half).select_lt(lr, 0.0, 1.0))?;
        stay += stays.sum_all()?.item()?;
        all += param.numel() as f64;
    }
    Ok((all > 0.0).then(|| stay / all))
}

/// Warns where most steps would be rounded away.
pub(crate) fn warn(rule: &str, lr: f64, params: &Params) -> Result<()> {
    if let Some(share) = share_that_stays(rule, lr, params)?.filter(|share| *share > MANY) {
        tracing::warn!(
            "steps of {lr:e} are rounded away for {:.0} % of the weights, which are kept in 16 bits: train with dtype=mixed, which keeps \
             them in f32, or with dtype=bf16_kahan or bf16_stochastic",
            100.0 * share
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use flowtape_engine::Device;
    use flowtape_engine::nn::{Init, ParamBuilder, Placement};

    use super::*;

    /// The share by the arithmetic of the dtype itself: weights that adding a step, and taking it away, leaves as they are.
    #[test]
    fn what_is_counted_is_what_rounding_takes_away() -> Result<()> {
        for (dtype, lr) in [(DType::BF16, 1e-4), (DType::BF16, 1e-2), (DType::F16, 1e-5), (DType::F16, 1e-4)] {
            let builder = ParamBuilder::with_plan(1, Placement::trained(dtype), &Device::cpu());
            let w = builder.get("w", &[4000], Init::Normal { std: 0.1 })?.kept()?;
            let moved = |by: f64| w.to_dtype(DType::F32)?.add_scalar(by)?.to_dtype(dtype)?.to_vec::<f32>();
            let (up, down, own) = (moved(lr)?, moved(-lr)?, w.to_vec::<f32>()?);
            let stays = |i: &usize| up[*i] == own[*i] && down[*i] == own[*i];
            let share = (0..own.len()).filter(stays).count() as f64 / own.len() as f64;
            let found = share_that_stays("adamw", lr, &builder.params())?.unwrap();
            // The distance of numbers doubles within a power of two: the count is the cautious one.
            let wider = share_that_stays("adamw", lr / 2.0, &builder.params())?.unwrap();
            assert!(found <= share && share <= wider, "{dtype} {lr}: {found} {share} {wider}");
        }
        let builder =
            ParamBuilder::with_plan(1, Placement::trained(DType::BF16).with_master(DType::F32), &Device::cpu());
        builder.get("w", &[4], Init::Ones)?;
        assert_eq!(share_that_stays("adamw", 1e-9, &builder.params())?, None);
        Ok(())
    }
}
