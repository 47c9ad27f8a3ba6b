//! Shifts that depend on the sequence length, and the density helpers beside them.

use crate::timestep::mode;
use crate::{Draws, Result, TimestepSampling};

/// How `t` is shifted towards noise for longer sequences.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum TimeShift {
    /// `e^μ / (e^μ + 1/t - 1)` with `μ = base + (max - base) · L / 4096`.
    Linear {
        /// μ at length 0.
        base_shift: f64,
        /// μ at length 4096.
        max_shift: f64,
    },
    /// `μ / (μ + 1/t - 1)` with `μ = max(1, 3 √(L / 16384))`.
    Sqrt,
    /// `c / (c + 1/t - 1)`.
    Constant {
        /// `c`.
        constant: f64,
    },
    /// `t` itself.
    None,
}

impl TimeShift {
    /// The kind of that name with these parameters: `linear`, `sqrt`, `constant`; any other name shifts nothing, as in
    /// the reference.
    pub fn from_name(name: &str, base_shift: f64, max_shift: f64, constant: f64) -> Self {
        match name {
            "linear" => Self::Linear { base_shift, max_shift },
            "sqrt" => Self::Sqrt,
            "constant" => Self::Constant { constant },
            _ => Self::None,
        }
    }

    /// The kind of that name with the reference's defaults: base 0.5, max 1.15, constant 3.
    pub fn with_defaults(name: &str) -> Self {
        Self::from_name(name, 0.5, 1.15, 3.0)
    }

    /// The `s` of `s / (s + 1/t - 1)`, where there is one.
    fn shift(self, image_seq_len: usize) -> Option<f64> {
        let len = image_seq_len as f64;
        match self {
            Self::Linear { base_shift, max_shift } => {
                Some((base_shift + (max_shift - base_shift) * (len / 4096.0)).exp())
            }
            Self::Sqrt => Some((3.0 * (len / (128.0 * 128.0)).sqrt()).max(1.0)),
            Self::Constant { constant } => Some(constant),
            Self::None => None,
        }
    }
}

/// `t` in `[0, 1]` as σ, for a sequence of `image_seq_len` tokens. Arithmetic is f64, the result rounded to f32.
pub fn time_shift(t: &[f32], image_seq_len: usize, kind: TimeShift) -> Vec<f32> {
    match kind.shift(image_seq_len) {
        Some(shift) => t.iter().map(|t| (shift / (shift + (1.0 / f64::from(*t) - 1.0))) as f32).collect(),
        None => t.to_vec(),
    }
}

/// `u` of the named density: `logit_normal`, `mode` (not clamped, unlike the pipeline's), or else uniform. `[n]`.
///
/// # Errors
/// When the draws run out.
pub fn compute_density_for_timestep_sampling(
    weighting_scheme: &str,
    n: usize,
    logit: (f64, f64),
    mode_scale: f64,
    draws: &mut dyn Draws,
) -> Result<Vec<f32>> {
    match weighting_scheme {
        "logit_normal" => TimestepSampling::LogitNormal { mean: logit.0, std: logit.1 }.sample(n, draws),
        "mode" => Ok(draws.uniform(n)?.into_iter().map(|u| mode(u, mode_scale as f32)).collect()),
        _ => draws.uniform(n),
    }
}

/// `1 + shift · σ`. The reference's default shift is 3.
pub fn get_flow_match_loss_weight(sigma: &[f32], shift: f64) -> Vec<f32> {
    sigma.iter().map(|s| 1.0 + shift as f32 * s).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PhiloxDraws, Recorded, RecordedDraws};

    #[test]
    fn shifts_follow_their_formulas() {
        let at = |kind, len| f64::from(time_shift(&[0.25], len, kind)[0]);
        let formula = |s: f64| s / (s + 3.0);
        for (kind, len, shift) in [
            (TimeShift::with_defaults("linear"), 0, 0.5f64.exp()),
            (TimeShift::with_defaults("linear"), 2048, 0.825f64.exp()),
            (TimeShift::with_defaults("linear"), 4096, 1.15f64.exp()),
            (TimeShift::with_defaults("sqrt"), 16, 1.0),
            (TimeShift::with_defaults("sqrt"), 16384, 3.0),
            (TimeShift::with_defaults("sqrt"), 65536, 6.0),
            (TimeShift::with_defaults("constant"), 99, 3.0),
            (TimeShift::from_name("constant", 0.0, 0.0, 7.5), 99, 7.5),
        ] {
            assert!((at(kind, len) - formula(shift)).abs() < 1e-7, "{kind:?} {len}");
        }
        assert_eq!(time_shift(&[0.0, 0.3, 1.0], 256, TimeShift::with_defaults("whatever")), [0.0, 0.3, 1.0]);
        assert_eq!(time_shift(&[0.0, 1.0], 256, TimeShift::Sqrt), [0.0, 1.0]);
    }

    #[test]
    fn densities() {
        let mut philox = PhiloxDraws::new(4);
        for scheme in ["uniform", "logit_normal", "mode", "unheard_of"] {
            let u = compute_density_for_timestep_sampling(scheme, 33, (0.0, 1.0), 1.29, &mut philox).unwrap();
            assert_eq!(u.len(), 33);
        }
        let mut draws = RecordedDraws::new([Recorded::Uniform(vec![0.3]), Recorded::Uniform(vec![0.0])]);
        let unknown = compute_density_for_timestep_sampling("unheard_of", 1, (0.0, 1.0), 1.29, &mut draws);
        assert_eq!(unknown.unwrap(), [0.3]);
        // Not clamped: at u = 0 the mode density's inverse is 1 for any scale.
        let mode = compute_density_for_timestep_sampling("mode", 1, (0.0, 1.0), 1.29, &mut draws).unwrap();
        assert_eq!(mode, [1.0]);
    }

    #[test]
    fn loss_weight_helper() {
        assert_eq!(get_flow_match_loss_weight(&[0.0, 0.5, 1.0], 3.0), [1.0, 2.5, 4.0]);
        assert_eq!(get_flow_match_loss_weight(&[0.0, 0.5, 1.0], 0.0), [1.0; 3]);
    }
}
