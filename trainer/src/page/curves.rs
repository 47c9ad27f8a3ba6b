//! Curves of any number of steps, in bounded memory.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::StepRecord;
use crate::validation::BINS;

/// The most points of a curve; there are at least half as many as soon as there were so many steps.
const POINTS: usize = 2000;

/// Sums of some values, with the least and the greatest. Those that are not finite are left out.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Stat {
    sum: f64,
    count: u64,
    min: f64,
    max: f64,
}

impl Default for Stat {
    fn default() -> Self {
        Self { sum: 0.0, count: 0, min: f64::INFINITY, max: f64::NEG_INFINITY }
    }
}

impl Stat {
    fn add(&mut self, value: f64) {
        self.weigh(value, 1);
    }

    /// A mean of so many values.
    fn weigh(&mut self, mean: f64, count: u64) {
        if mean.is_finite() && count > 0 {
            self.merge(&Self { sum: mean * count as f64, count, min: mean, max: mean });
        }
    }

    fn merge(&mut self, other: &Self) {
        self.sum += other.sum;
        self.count += other.count;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }
}

/// Steps side by side.
#[derive(Clone, Debug, Default)]
struct Point {
    /// The last of them.
    step: u64,
    epoch: u64,
    lr: f64,
    loss: Stat,
    grad_norm: Stat,
    groups: BTreeMap<String, Stat>,
    sigma: [Stat; BINS],
    seconds: Stat,
    samples: f64,
    memory: Stat,
    loss_scale: Stat,
}

impl Point {
    fn of(record: &StepRecord) -> Self {
        let mut point = Self { step: record.step, epoch: record.epoch, lr: record.lr, ..Self::default() };
        point.loss.add(record.loss);
        point.grad_norm.add(record.grad_norm);
        for (group, norm) in &record.grad_norm_by_group {
            point.groups.entry(group.clone()).or_default().add(*norm);
        }
        let bins = record.by_sigma.counts.iter().zip(&record.by_sigma.losses);
        for (stat, (count, loss)) in point.sigma.iter_mut().zip(bins) {
            stat.weigh(loss.unwrap_or(f64::NAN), *count);
        }
        // Runs of before have no time.
        let seconds = if record.step_time > 0.0 { record.step_time } else { 1.0 };
        point.seconds.add(seconds);
        point.samples = record.samples_per_second * seconds;
        point.memory.add(record.memory.allocated);
        point.loss_scale.add(record.loss_scale.unwrap_or(f64::NAN));
        point
    }

    fn merge(&mut self, other: &Self) {
        let Self { step, epoch, lr, loss, grad_norm, groups, sigma, seconds, samples, memory, loss_scale } = other;
        (self.step, self.epoch, self.lr) = (*step, *epoch, *lr);
        self.samples += samples;
        for (own, other) in [
            (&mut self.loss, loss),
            (&mut self.grad_norm, grad_norm),
            (&mut self.seconds, seconds),
            (&mut self.memory, memory),
            (&mut self.loss_scale, loss_scale),
        ] {
            own.merge(other);
        }
        self.sigma.iter_mut().zip(sigma).for_each(|(own, other)| own.merge(other));
        for (group, stat) in groups {
            self.groups.entry(group.clone()).or_default().merge(stat);
        }
    }
}

/// What a run's steps came to. Where there are many, each point is of several steps: their mean, and the least and greatest loss.
#[derive(Clone, Debug)]
pub(super) struct Curves {
    /// Steps of a point.
    width: u64,
    points: Vec<Point>,
}

impl Default for Curves {
    fn default() -> Self {
        Self { width: 1, points: Vec::new() }
    }
}

impl Curves {
    /// One more step; one that is not after all others is passed over.
    pub fn add(&mut self, record: &StepRecord) {
        let before = self.points.last().map_or(0, |point| point.step);
        if record.step <= before {
            return;
        }
        let point = Point::of(record);
        let place = |step: u64| (step - 1) / self.width;
        match self.points.last_mut() {
            Some(last) if place(last.step) == place(record.step) => last.merge(&point),
            _ => self.points.push(point),
        }
        while self.points.len() > POINTS {
            self.thin();
        }
    }

    /// Makes points of twice as many steps.
    fn thin(&mut self) {
        self.width *= 2;
        for point in std::mem::take(&mut self.points) {
            match self.points.last_mut() {
                Some(last) if (last.step - 1) / self.width == (point.step - 1) / self.width => last.merge(&point),
                _ => self.points.push(point),
            }
        }
    }

    /// The last step; 0 if there is none.
    pub fn last_step(&self) -> u64 {
        self.points.last().map_or(0, |point| point.step)
    }

    /// Columns by name, as the page takes them. What is not finite or not there is null.
    pub fn columns(&self) -> Value {
        let column = |of: &dyn Fn(&Point) -> f64| self.points.iter().map(|p| short(of(p))).collect::<Vec<_>>();
        let mut names: Vec<&String> = self.points.iter().flat_map(|point| point.groups.keys()).collect();
        names.sort_unstable();
        names.dedup();
        let of_group = |name: &String| column(&|p| p.groups.get(name).map_or(f64::NAN, Stat::mean));
        let groups: BTreeMap<&String, Vec<Value>> = names.into_iter().map(|name| (name, of_group(name))).collect();
        let sigma: Vec<_> = (0..BINS).map(|bin| column(&|p| p.sigma[bin].mean())).collect();
        let counts: Vec<u64> =
            (0..BINS).map(|bin| self.points.iter().map(|point| point.sigma[bin].count).sum()).collect();
        json!({
            "width": self.width,
            "step": self.points.iter().map(|point| point.step).collect::<Vec<_>>(),
            "epoch": self.points.iter().map(|point| point.epoch).collect::<Vec<_>>(),
            "loss": column(&|p| p.loss.mean()),
            "loss_min": column(&|p| p.loss.min),
            "loss_max": column(&|p| p.loss.max),
            "lr": column(&|p| p.lr),
            "grad_norm": column(&|p| p.grad_norm.mean()),
            "groups": groups,
            "sigma": sigma,
            "sigma_counts": counts,
            "step_time": column(&|p| p.seconds.mean()),
            "samples_per_sec": column(&|p| p.samples / p.seconds.sum),
            "memory": column(&|p| p.memory.mean()),
            "loss_scale": column(&|p| p.loss_scale.mean()),
        })
    }
}

/// A number with six digits, null where it is not finite: more can't be seen, and the page is smaller.
pub(super) fn short(value: f64) -> Value {
    format!("{value:.5e}").parse::<f64>().map_or(Value::Null, |value| json!(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_steps_are_as_many_points_as_can_be_seen() {
        let mut curves = Curves::default();
        let steps = 1_000_000;
        for step in 1..=steps {
            let loss = if step % 1000 == 0 { f64::NAN } else { step as f64 };
            curves.add(&StepRecord { step, loss, step_time: 0.5, samples_per_second: 8.0, ..StepRecord::default() });
        }
        // One of before is no new one.
        curves.add(&StepRecord { step: 7, ..StepRecord::default() });
        let columns = curves.columns();
        let of = |name: &str| columns[name].as_array().unwrap().clone();
        let (shown, loss) = (of("step"), of("loss"));
        assert!((POINTS / 2..=POINTS).contains(&shown.len()) && loss.len() == shown.len());
        assert_eq!((shown.last().unwrap().as_u64(), curves.last_step()), (Some(steps), steps));
        let width = columns["width"].as_u64().unwrap();
        // The mean of the numbers from 1 to the width, and those that are NaN left out.
        assert!((loss[0].as_f64().unwrap() - (width + 1) as f64 / 2.0).abs() < 1.0);
        assert_eq!((of("loss_min")[0].as_f64(), of("loss_max")[0].as_f64()), (Some(1.0), Some(width as f64)));
        assert!(of("samples_per_sec").iter().all(|rate| rate.as_f64() == Some(8.0)));
        assert!(of("lr").iter().all(|lr| lr.as_f64() == Some(0.0)) && of("loss_scale").iter().all(Value::is_null));
    }

    #[test]
    fn what_is_not_a_number_is_null() {
        let mut curves = Curves::default();
        curves.add(&StepRecord { step: 1, loss: f64::NAN, grad_norm: f64::INFINITY, ..StepRecord::default() });
        let columns = curves.columns();
        assert!(
            ["loss", "loss_min", "loss_max", "grad_norm"].iter().all(|name| columns[name][0].is_null()),
            "{columns}"
        );
        assert_eq!(short(0.123_456_789), json!(0.123_457));
    }
}
