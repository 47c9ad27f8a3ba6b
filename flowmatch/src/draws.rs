//! Every random number of a step comes through [`Draws`]: from a generator, or from a record that is replayed.

use std::collections::VecDeque;

use flowtape_engine::{Device, Philox, Tensor};

use crate::{Error, Result, TimestepSample};

/// A source of random numbers.
///
/// A step draws in this order: the task type (videos only), the uniform-or-not decision (strategies with a
/// `mix_uniform_ratio`), `u` or σ, the noise, the noise of further streams, and then whatever the adapter draws.
pub trait Draws {
    /// `n` uniform numbers in `[0, 1)`.
    ///
    /// # Errors
    /// When a record does not hold them.
    fn uniform(&mut self, n: usize) -> Result<Vec<f32>>;

    /// `n` standard normal numbers.
    ///
    /// # Errors
    /// When a record does not hold them.
    fn normal(&mut self, n: usize) -> Result<Vec<f32>>;

    /// `n` numbers of the distribution Beta(`alpha`, `beta`).
    ///
    /// # Errors
    /// When a record does not hold them.
    fn beta(&mut self, n: usize, alpha: f64, beta: f64) -> Result<Vec<f32>>;

    /// One uniform number in `[0, 1)` for a decision on a whole batch (the reference takes it from Python's `random`).
    ///
    /// # Errors
    /// When a record does not hold it.
    fn decision(&mut self) -> Result<f64>;

    /// A standard normal f32 tensor on `device`.
    ///
    /// # Errors
    /// When a record does not hold it, or memory runs out.
    fn noise(&mut self, dims: &[usize], device: &Device) -> Result<Tensor>;

    /// σ and timesteps of `batch_size` samples that are known already, so that the strategy draws nothing: a record may hold them
    /// instead of what they came from.
    ///
    /// # Errors
    /// When a record holds those of another number of samples.
    fn timesteps(&mut self, batch_size: usize) -> Result<Option<TimestepSample>> {
        let _ = batch_size;
        Ok(None)
    }
}

/// Draws from Philox4x32-10. The generator's state is all there is to save.
#[derive(Clone, Debug)]
pub struct PhiloxDraws {
    /// The generator.
    pub philox: Philox,
}

impl PhiloxDraws {
    /// Draws that depend on `seed` alone.
    pub fn new(seed: u64) -> Self {
        Self { philox: Philox::new(seed) }
    }

    /// A gamma variate of shape `a` and scale 1: Marsaglia and Tsang, "A simple method for generating gamma
    /// variables" (2000); below 1 the shape is raised by one and the result multiplied by `U^(1/a)`.
    fn gamma(&mut self, a: f64) -> f64 {
        let boost = if a < 1.0 { (1.0 - self.philox.next_f64()).powf(1.0 / a) } else { 1.0 };
        let d = if a < 1.0 { a + 1.0 } else { a } - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            // Box-Muller; 1 - U lies in (0, 1], so that the logarithm is finite.
            let (u1, u2) = (1.0 - self.philox.next_f64(), self.philox.next_f64());
            let x = (-2.0 * u1.ln()).sqrt() * (std::f64::consts::TAU * u2).cos();
            let v = (1.0 + c * x).powi(3);
            let u = 1.0 - self.philox.next_f64();
            if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return boost * d * v;
            }
        }
    }
}

impl Draws for PhiloxDraws {
    fn uniform(&mut self, n: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0; n];
        self.philox.fill_uniform(&mut values);
        Ok(values)
    }

    fn normal(&mut self, n: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0; n];
        self.philox.fill_normal(&mut values);
        Ok(values)
    }

    fn beta(&mut self, n: usize, alpha: f64, beta: f64) -> Result<Vec<f32>> {
        let mut one = || {
            let (a, b) = (self.gamma(alpha), self.gamma(beta));
            // Both underflow for tiny shapes: then the value is one of the ends, and either is as good.
            if a + b > 0.0 { (a / (a + b)) as f32 } else { 0.0 }
        };
        Ok((0..n).map(|_| one()).collect())
    }

    fn decision(&mut self) -> Result<f64> {
        Ok(self.philox.next_f64())
    }

    fn noise(&mut self, dims: &[usize], device: &Device) -> Result<Tensor> {
        Ok(self.philox.normal(dims, device)?)
    }
}

/// One recorded call.
#[derive(Clone, Debug)]
pub enum Recorded {
    /// Of [`Draws::uniform`].
    Uniform(Vec<f32>),
    /// Of [`Draws::normal`]: standard normals.
    Normal(Vec<f32>),
    /// Of [`Draws::beta`].
    Beta(Vec<f32>),
    /// Of [`Draws::decision`].
    Decision(f64),
    /// Of [`Draws::noise`].
    Noise(Tensor),
    /// Of [`Draws::timesteps`], in place of the uniform-or-not decision and `u` or σ.
    Timesteps(TimestepSample),
}

impl Recorded {
    fn describe(&self) -> String {
        match self {
            Self::Uniform(v) => format!("{} uniform numbers", v.len()),
            Self::Normal(v) => format!("{} normal numbers", v.len()),
            Self::Beta(v) => format!("{} beta numbers", v.len()),
            Self::Decision(_) => "a decision".to_owned(),
            Self::Noise(t) => format!("noise of shape {:?}", t.dims()),
            Self::Timesteps(sample) => format!("timesteps of {} samples", sample.sigma.len()),
        }
    }
}

/// Replays recorded calls in order. A call of another kind or size than the next recorded one is an error.
#[derive(Clone, Debug, Default)]
pub struct RecordedDraws {
    queue: VecDeque<Recorded>,
}

impl RecordedDraws {
    /// Draws that give `calls`, in order.
    pub fn new(calls: impl IntoIterator<Item = Recorded>) -> Self {
        Self { queue: calls.into_iter().collect() }
    }

    /// How many calls are left.
    pub fn remaining(&self) -> usize {
        self.queue.len()
    }

    fn take<T>(&mut self, expected: String, pick: impl Fn(&Recorded) -> Option<T>) -> Result<T> {
        match self.queue.front().map(|next| (pick(next), next)) {
            Some((Some(value), _)) => {
                self.queue.pop_front();
                Ok(value)
            }
            Some((None, next)) => Err(Error::Draws { expected, got: next.describe() }),
            None => Err(Error::Draws { expected, got: "the end of the record".to_owned() }),
        }
    }
}

impl Draws for RecordedDraws {
    fn uniform(&mut self, n: usize) -> Result<Vec<f32>> {
        self.take(format!("{n} uniform numbers"), |next| match next {
            Recorded::Uniform(v) if v.len() == n => Some(v.clone()),
            _ => None,
        })
    }

    fn normal(&mut self, n: usize) -> Result<Vec<f32>> {
        self.take(format!("{n} normal numbers"), |next| match next {
            Recorded::Normal(v) if v.len() == n => Some(v.clone()),
            _ => None,
        })
    }

    fn beta(&mut self, n: usize, _: f64, _: f64) -> Result<Vec<f32>> {
        self.take(format!("{n} beta numbers"), |next| match next {
            Recorded::Beta(v) if v.len() == n => Some(v.clone()),
            _ => None,
        })
    }

    fn decision(&mut self) -> Result<f64> {
        self.take("a decision".to_owned(), |next| match next {
            Recorded::Decision(value) => Some(*value),
            _ => None,
        })
    }

    fn noise(&mut self, dims: &[usize], _: &Device) -> Result<Tensor> {
        self.take(format!("noise of shape {dims:?}"), |next| match next {
            Recorded::Noise(t) if t.dims() == dims => Some(t.clone()),
            _ => None,
        })
    }

    fn timesteps(&mut self, batch_size: usize) -> Result<Option<TimestepSample>> {
        if !matches!(self.queue.front(), Some(Recorded::Timesteps(_))) {
            return Ok(None);
        }
        let known = self.take(format!("timesteps of {batch_size} samples"), |next| match next {
            Recorded::Timesteps(sample) if sample.sigma.len() == batch_size => Some(sample.clone()),
            _ => None,
        });
        known.map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_replay_in_order_and_say_what_does_not_fit() {
        let mut draws = RecordedDraws::new([Recorded::Uniform(vec![0.5]), Recorded::Decision(0.25)]);
        let error = draws.normal(1).unwrap_err().to_string();
        assert!(error.contains("1 normal numbers") && error.contains("1 uniform numbers"), "{error}");
        assert!(draws.uniform(2).is_err());
        assert_eq!(draws.uniform(1).unwrap(), [0.5]);
        assert_eq!(draws.decision().unwrap(), 0.25);
        let error = draws.noise(&[2], &Device::cpu()).unwrap_err().to_string();
        assert!(error.contains("noise of shape [2]") && error.contains("end"), "{error}");
    }

    #[test]
    fn known_timesteps_take_the_place_of_what_they_come_from() {
        let known = TimestepSample { sigma: vec![0.25], timesteps: vec![250.0], method: "mode".into() };
        let config = crate::FlowMatchingConfig::default();
        let sampler = crate::TimestepSampler::new(&config).unwrap();
        let mut draws = RecordedDraws::new([Recorded::Timesteps(known.clone())]);
        assert!(sampler.sample_timesteps(2, &mut draws).unwrap_err().to_string().contains("timesteps of 2 samples"));
        assert_eq!(sampler.sample_timesteps(1, &mut draws).unwrap(), known);
        assert_eq!(draws.remaining(), 0);
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let all = |seed| {
            let mut d = PhiloxDraws::new(seed);
            let noise = d.noise(&[2, 3], &Device::cpu()).unwrap().to_vec::<f32>().unwrap();
            (d.uniform(5).unwrap(), d.normal(5).unwrap(), d.beta(5, 0.5, 2.0).unwrap(), d.decision().unwrap(), noise)
        };
        assert_eq!(all(9), all(9));
        assert_ne!(all(9), all(10));
    }
}
