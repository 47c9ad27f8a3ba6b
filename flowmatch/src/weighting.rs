//! How much each sample's loss counts.

use flowtape_engine::platform::math::exp;

use crate::{Error, Result};

/// The weight of a sample's loss as a function of its σ.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub enum LossWeighting {
    /// 1.
    Off,
    /// `1 + flow_shift · σ`.
    Linear {
        /// The flow shift.
        flow_shift: f64,
    },
    /// A bell around the middle, from a table by timestep.
    Bsmntw {
        /// One weight per training timestep; see [`bsmntw_table`].
        table: Vec<f32>,
    },
    /// Min-SNR-γ (Hang et al. 2023) for a velocity: `min(SNR, γ) σ² = min((1 - σ)², γ σ²)`, with `SNR = ((1 - σ) / σ)²`. A velocity's
    /// squared error times σ² is that of the clean sample which it stands for, and that one's weight is `min(SNR, γ)`.
    MinSnr {
        /// The bound.
        gamma: f64,
    },
    /// CosMap (Esser et al. 2024): `2 / (π (1 - 2σ + 2σ²))`, as if σ had been drawn along a cosine.
    CosMap,
}

impl LossWeighting {
    /// The schemes that a recipe may name.
    pub const NAMES: [&str; 4] = ["linear", "bsmntw", "min_snr", "cosmap"];

    /// From the values of a recipe.
    ///
    /// # Errors
    /// When the scheme is not known, whether it is in use or not.
    pub fn new(used: bool, scheme: &str, flow_shift: f64, num_train_timesteps: usize, gamma: f64) -> Result<Self> {
        match (used, scheme) {
            (true, "linear") => Ok(Self::Linear { flow_shift }),
            (true, "bsmntw") => Ok(Self::Bsmntw { table: bsmntw_table(num_train_timesteps) }),
            (true, "min_snr") => Ok(Self::MinSnr { gamma }),
            (true, "cosmap") => Ok(Self::CosMap),
            (false, known) if Self::NAMES.contains(&known) => Ok(Self::Off),
            _ => Err(Error::config("loss_weighting_scheme", format!("one of {:?}", Self::NAMES), scheme)),
        }
    }

    /// The formula, for the log.
    pub fn formula(&self) -> String {
        match self {
            Self::Off => "1".to_owned(),
            Self::Linear { flow_shift } => format!("1 + {flow_shift} * σ"),
            Self::Bsmntw { table } => format!("bsmntw over {} timesteps", table.len()),
            Self::MinSnr { gamma } => format!("min((1 - σ)², {gamma} σ²)"),
            Self::CosMap => "2 / (π (1 - 2σ + 2σ²))".to_owned(),
        }
    }

    /// The weight of each σ.
    pub fn weights(&self, sigma: &[f32]) -> Vec<f32> {
        match self {
            Self::Off => vec![1.0; sigma.len()],
            Self::Linear { flow_shift } => sigma.iter().map(|s| 1.0 + *flow_shift as f32 * s).collect(),
            Self::Bsmntw { table } => {
                // The cast truncates towards zero, and NaN and negatives go to 0.
                let index = |s: &f32| ((s * table.len() as f32) as usize).min(table.len().saturating_sub(1));
                sigma.iter().map(|s| table.get(index(s)).copied().unwrap_or(1.0)).collect()
            }
            Self::MinSnr { gamma } => {
                sigma.iter().map(|s| ((1.0 - s) * (1.0 - s)).min(*gamma as f32 * s * s)).collect()
            }
            Self::CosMap => {
                let bottom = |s: &f32| std::f32::consts::PI * (1.0 - 2.0 * s + 2.0 * s * s);
                sigma.iter().map(|s| 2.0 / bottom(s)).collect()
            }
        }
    }
}

/// The bell-shaped table `exp(-2 ((t - T/2) / T)²)`, lowered by its least entry and scaled to the sum `T`.
/// Entry 0 is exactly 0.
pub fn bsmntw_table(num_train_timesteps: usize) -> Vec<f32> {
    let steps = num_train_timesteps as f32;
    let bell = |t: usize| {
        let x = (t as f32 - steps / 2.0) / steps;
        // The difference of nearly equal values follows: the nearest f32 to exp keeps its rounding the reference's.
        exp(-2.0 * x * x)
    };
    let mut table: Vec<f32> = (0..num_train_timesteps).map(bell).collect();
    let least = table.iter().copied().fold(f32::INFINITY, f32::min);
    table.iter_mut().for_each(|w| *w -= least);
    let sum: f64 = table.iter().map(|w| f64::from(*w)).sum();
    if sum > 0.0 {
        let scale = (f64::from(steps) / sum) as f32;
        table.iter_mut().for_each(|w| *w *= scale);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_and_off() {
        let linear = LossWeighting::new(true, "linear", 3.0, 1000, 5.0).unwrap();
        assert_eq!(linear.weights(&[0.0, 0.5, 1.0]), [1.0, 2.5, 4.0]);
        for scheme in LossWeighting::NAMES {
            assert_eq!(LossWeighting::new(false, scheme, 3.0, 1000, 5.0).unwrap().weights(&[0.1, 0.9]), [1.0, 1.0]);
        }
    }

    #[test]
    fn bsmntw_is_a_bell_of_mean_one() {
        for steps in [7, 10, 1000] {
            let table = bsmntw_table(steps);
            assert_eq!((table.len(), table[0]), (steps, 0.0));
            assert!((table.iter().sum::<f32>() / steps as f32 - 1.0).abs() < 1e-5);
            let peak = (0..steps).max_by(|a, b| table[*a].total_cmp(&table[*b])).unwrap();
            assert!(peak == steps / 2 || peak == steps.div_ceil(2), "{steps}: {peak}");
            // The closed form, in f64.
            let x = |t: usize| (t as f64 - steps as f64 / 2.0) / steps as f64;
            let bell: Vec<f64> = (0..steps).map(|t| (-2.0 * x(t) * x(t)).exp()).collect();
            let raised: Vec<f64> = bell.iter().map(|w| w - bell[0]).collect();
            let sum: f64 = raised.iter().sum();
            for (got, want) in table.iter().zip(raised) {
                assert!((f64::from(*got) - want * steps as f64 / sum).abs() < 2e-6);
            }
        }
        let weighting = LossWeighting::new(true, "bsmntw", 3.0, 1000, 5.0).unwrap();
        let weights = weighting.weights(&[0.5, 0.1, 0.0, 1.0, 0.0019, 0.002]);
        let table = bsmntw_table(1000);
        assert!(weights[0] > weights[1]);
        assert_eq!(weights[2..], [0.0, table[999], table[1], table[2]]);
    }

    /// By the papers' own forms: the weight of the clean sample's error, and the density of CosMap's σ.
    #[test]
    fn min_snr_and_cosmap_are_the_papers() {
        let sigma: Vec<f32> = (1..100).map(|i| i as f32 / 100.0).collect();
        for gamma in [1.0, 5.0] {
            let weights = LossWeighting::new(true, "min_snr", 3.0, 1000, gamma).unwrap().weights(&sigma);
            for (weight, s) in weights.iter().zip(&sigma) {
                let s = f64::from(*s);
                let expected = ((1.0 - s) / s).powi(2).min(gamma) * s * s;
                assert!((f64::from(*weight) - expected).abs() < 1e-6, "{s}: {weight} instead of {expected}");
            }
        }
        let weighting = LossWeighting::new(true, "min_snr", 3.0, 1000, 5.0).unwrap();
        assert_eq!(weighting.weights(&[0.0, 1.0]), [0.0, 0.0]);
        // CosMap draws σ = 1 - 1 / (tan(π u / 2) + 1) of a uniform u: its density is the slope of u.
        let u = |s: f64| 2.0 / std::f64::consts::PI * (1.0 / (1.0 - s) - 1.0).atan();
        for (weight, s) in LossWeighting::CosMap.weights(&sigma).iter().zip(&sigma) {
            let s = f64::from(*s);
            let slope = (u(s + 1e-6) - u(s - 1e-6)) / 2e-6;
            assert!((f64::from(*weight) - slope).abs() < 1e-4, "{s}: {weight} instead of {slope}");
        }
    }

    #[test]
    fn an_unknown_scheme_is_an_error_that_names_the_known() {
        for used in [true, false] {
            let error = LossWeighting::new(used, "nope", 3.0, 10, 5.0).unwrap_err().to_string();
            assert!(["loss_weighting_scheme", "nope", "linear", "bsmntw"].iter().all(|w| error.contains(w)), "{error}");
        }
    }
}
