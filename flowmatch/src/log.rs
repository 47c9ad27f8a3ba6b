//! What a step tells the log, as text: the pipeline emits it through `tracing` at level debug, target [`TARGET`].
//!
//! A detailed log reads tensors back from the device, so nothing is computed unless the target is enabled.

use flowtape_engine::Tensor;

use crate::metrics::Range;
use crate::{Noised, Result};

/// The target of the events.
pub const TARGET: &str = "flow_matching";

const RULE: &str = "================================================================================";

/// How noise was added: strategy, σ, timesteps, ranges, and whether the noisy range is plausible.
///
/// # Errors
/// When the device fails.
pub fn detailed(step: u64, flow_shift: f64, latents: &Tensor, noised: &Noised) -> Result<String> {
    let (s, t) = (Range::of(&noised.sample.sigma), Range::of(&noised.sample.timesteps));
    let (clean, noise) = (Range::of_tensor(latents)?, Range::of_tensor(&noised.noise)?);
    let noisy = Range::of_tensor(&noised.noisy_latents)?;
    let batch = noised.sample.sigma.len();
    let spread = if batch > 1 {
        format!("[SIGMA] Mean: {:.4}, Std: {:.4}", s.mean, s.std)
    } else {
        format!("[SIGMA] Value: {:.4}", s.mean)
    };
    let most = [clean.max, clean.min, noise.max, noise.min].iter().fold(0.0, |m: f64, v| m.max(v.abs())) * 1.5;
    let verdict = if noisy.max.abs() > most || noisy.min.abs() > most {
        format!("WARNING: Noisy range seems large! Expected ~{most:.1}")
    } else {
        "Noisy latents range is reasonable".to_owned()
    };
    Ok(format!(
        "{RULE}\n[STEP {step}] FLOW MATCHING\n{RULE}\n[INFO] Using: x_t = (1-σ)x_0 + σ*ε\n\
         [SAMPLING] Method: {}\n[FLOW] Shift: {flow_shift}\n[BATCH] Size: {batch}\n\
         [SIGMA] Range: [{:.4}, {:.4}]\n{spread}\n[TIMESTEPS] Range: [{:.2}, {:.2}]\n\
         [RANGES] Clean latents: [{:.4}, {:.4}]\n[RANGES] Noise:         [{:.4}, {:.4}]\n\
         [RANGES] Noisy latents: [{:.4}, {:.4}]\n{verdict}\n{RULE}",
        noised.sample.method,
        s.min,
        s.max,
        t.min,
        t.max,
        clean.min,
        clean.max,
        noise.min,
        noise.max,
        noisy.min,
        noisy.max,
    ))
}

/// The same in one line.
///
/// # Errors
/// When the device fails.
pub fn summary(step: u64, noised: &Noised) -> Result<String> {
    let (s, t) = (Range::of(&noised.sample.sigma), Range::of(&noised.sample.timesteps));
    let noisy = Range::of_tensor(&noised.noisy_latents)?;
    Ok(format!(
        "[STEP {step}] σ=[{:.3},{:.3}] | t=[{:.1},{:.1}] | noisy=[{:.1},{:.1}] | {}",
        s.min, s.max, t.min, t.max, noisy.min, noisy.max, noised.sample.method
    ))
}

/// The scalars of a loss, for its logs.
#[derive(Clone, Copy, Debug)]
pub struct LossValues<'a> {
    /// The weighted loss, auxiliary losses included.
    pub weighted: f64,
    /// The plain mean squared error.
    pub unweighted: f64,
    /// One weight per sample.
    pub weights: &'a [f32],
}

/// How the loss came about.
///
/// # Errors
/// When the device fails.
pub fn loss_detailed(
    step: u64,
    formula: &str,
    model_pred: &Tensor,
    target: &Tensor,
    loss: LossValues<'_>,
) -> Result<String> {
    let (pred, target, w) = (Range::of_tensor(model_pred)?, Range::of_tensor(target)?, Range::of(loss.weights));
    Ok(format!(
        "{RULE}\n[STEP {step}] LOSS DEBUG\n{RULE}\n[TARGET] Flow matching: v = ε - x_0\n\
         [RANGES] Model pred: [{:.4}, {:.4}]\n[RANGES] Target (v): [{:.4}, {:.4}]\n\
         [WEIGHTS] Formula: {formula}\n[WEIGHTS] Range: [{:.4}, {:.4}]\n[WEIGHTS] Mean: {:.4}\n\
         [LOSS] Unweighted: {:.6}\n[LOSS] Weighted:   {:.6}\n[LOSS] Impact:     {:.3}x\n{RULE}",
        pred.min,
        pred.max,
        target.min,
        target.max,
        w.min,
        w.max,
        w.mean,
        loss.unweighted,
        loss.weighted,
        loss.weighted / loss.unweighted.max(1e-8),
    ))
}

/// The same in one line.
pub fn loss_summary(step: u64, loss: LossValues<'_>) -> String {
    let w = Range::of(loss.weights);
    format!("[STEP {step}] Loss: {:.6} | w=[{:.2},{:.2}]", loss.weighted, w.min, w.max)
}
