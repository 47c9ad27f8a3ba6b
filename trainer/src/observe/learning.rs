//! Whether anything is learned: said in words where it is not.

use std::collections::BTreeMap;

use flowtape_engine::nn::Param;

use crate::Result;
use crate::hooks::{Cause, Event, Hook};
use crate::record::{StepRecord, group_of};
use crate::train::{Session, WINDOW};
use crate::trainer::Trainer;

/// Steps from one look at the weights to the next; a multiple of those from one look at the gradients to the next.
const LOOK: u64 = 100;
/// Numbers of each parameter that are compared from one step to the next.
const SAMPLE: usize = 1024;
/// The greatest change of weights in a step, relative to their size, that is no jump.
const JUMP: f64 = 0.1;
/// Steps after which a loss should have fallen.
const PATIENCE: usize = 1000;

/// Looks at the weights and their gradients every 100 steps, and at the loss: tells what does not move, once.
#[derive(Debug, Default)]
pub struct Learning {
    losses: Vec<f64>,
    /// Some numbers of each trained parameter, by its path.
    before: BTreeMap<String, Vec<f32>>,
    told: Vec<&'static str>,
}

impl Learning {
    fn tell(&mut self, kind: &'static str, what: Option<String>, run: &mut Session<'_>) -> Result<()> {
        match what {
            Some(what) if !self.told.contains(&kind) => {
                self.told.push(kind);
                run.emit(Event::Noticed(&what))
            }
            _ => Ok(()),
        }
    }

    fn look(&mut self, record: &StepRecord, run: &mut Session<'_>) -> Result<()> {
        let step = record.step;
        let now = sampled(run.trainer())?;
        let moves = Moves::between(&std::mem::take(&mut self.before), &now);
        self.tell("moves", moves.words().map(|what| format!("step {step}: {what}")), run)?;
        self.tell(
            "gradients",
            without_gradient(&record.gradient_squares).map(|what| format!("step {step}: {what}")),
            run,
        )
    }
}

impl Hook for Learning {
    fn needs_state(&self, step: u64) -> bool {
        step.is_multiple_of(LOOK) || (step + 1).is_multiple_of(LOOK)
    }

    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        match event {
            Event::Begin(begin) => self.losses = begin.history.iter().map(|record| record.loss).collect(),
            Event::Step(record) => {
                self.losses.push(record.loss);
                if (record.step + 1).is_multiple_of(LOOK) {
                    self.before = sampled(run.trainer())?;
                } else if record.step.is_multiple_of(LOOK) && !self.before.is_empty() {
                    self.look(record, run)?;
                }
                if self.losses.len() == PATIENCE {
                    self.tell("loss", still(&self.losses), run)?;
                }
            }
            Event::Stopped(Cause::Finished) if self.losses.len() >= 2 * WINDOW => {
                self.tell("loss", still(&self.losses), run)?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// Some numbers of each trained parameter.
fn sampled(trainer: &Trainer) -> Result<BTreeMap<String, Vec<f32>>> {
    let trained = trainer.model().params().iter().filter(|param| param.var().is_some() && param.is_here());
    let some = |param: &Param| -> Result<Vec<f32>> {
        let n = param.numel();
        Ok(param.kept()?.reshape(&[n])?.narrow(0, 0, n.min(SAMPLE))?.to_vec()?)
    };
    trained.map(|param| Ok((param.path().to_owned(), some(param)?))).collect()
}

/// What a step changed.
#[derive(Debug, Default)]
struct Moves {
    /// The change relative to the weights, by the first part of their paths.
    ratios: BTreeMap<String, f64>,
}

impl Moves {
    fn between(before: &BTreeMap<String, Vec<f32>>, after: &BTreeMap<String, Vec<f32>>) -> Self {
        let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for (path, old) in before {
            let Some(new) = after.get(path) else { continue };
            let (change, size) = sums.entry(group_of(path).to_owned()).or_default();
            for (old, new) in old.iter().zip(new) {
                *change += f64::from(new - old).powi(2);
                *size += f64::from(*old).powi(2);
            }
        }
        let ratio = |(change, size): (f64, f64)| if change == 0.0 { 0.0 } else { (change / size).sqrt() };
        Self { ratios: sums.into_iter().map(|(group, sums)| (group, ratio(sums))).collect() }
    }

    /// What is wrong with it, in words.
    fn words(&self) -> Option<String> {
        let of = |chosen: &dyn Fn(f64) -> bool| -> Vec<&str> {
            self.ratios.iter().filter(|(_, ratio)| chosen(**ratio)).map(|(group, _)| &group[..]).collect()
        };
        let (still, jumping) = (of(&|ratio| ratio == 0.0), of(&|ratio| ratio > JUMP));
        if !still.is_empty() && still.len() == self.ratios.len() {
            return Some(
                "no weight moved in this step: the learning rate may be too small for the weights' dtype, or all are held".into(),
            );
        }
        if !still.is_empty() {
            return Some(format!("the weights of {} did not move in this step", listed(&still)));
        }
        if !jumping.is_empty() {
            let most = self.ratios.values().copied().fold(0.0, f64::max);
            return Some(format!(
                "this step changed the weights of {} by up to {:.0} % of their size (about 0.1 % is usual): the learning rate may be \
                 too large",
                listed(&jumping),
                100.0 * most
            ));
        }
        None
    }
}

/// The first of some names, and how many more there are.
fn listed(names: &[&str]) -> String {
    let first = names.iter().take(3).copied().collect::<Vec<_>>().join(", ");
    if names.len() > 3 { format!("{first} and {} more", names.len() - 3) } else { first }
}

/// Which parameters got a gradient of zero.
fn without_gradient(squares: &[(String, f64)]) -> Option<String> {
    let zero: Vec<&str> = squares.iter().filter(|(_, sum)| *sum == 0.0).map(|(path, _)| &path[..]).collect();
    (!zero.is_empty()).then(|| format!("{} of {} gradients are zero: {}", zero.len(), squares.len(), listed(&zero)))
}

/// That a loss has not fallen by more than its noise from the first to the last steps.
fn still(losses: &[f64]) -> Option<String> {
    let finite: Vec<f64> = losses.iter().copied().filter(|loss| loss.is_finite()).collect();
    let n = WINDOW.min(finite.len() / 2);
    let moments = |part: &[f64]| {
        let mean = part.iter().sum::<f64>() / part.len() as f64;
        (mean, part.iter().map(|loss| (loss - mean).powi(2)).sum::<f64>() / (part.len() as f64 - 1.0))
    };
    if n < 2 {
        return None;
    }
    let ((first, var), (last, other_var)) = (moments(&finite[..n]), moments(&finite[finite.len() - n..]));
    // Two standard errors of the difference.
    let noise = 2.0 * ((var + other_var) / n as f64).sqrt();
    (last > first - noise).then(|| {
        format!(
            "the loss does not move: {first:.4} in the first {n} steps and {last:.4} in the last of {}, which is within its noise \
             ({noise:.4}); look at the learning rate, at the data, and at what is trained",
            losses.len()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_falls_is_not_told_and_one_that_wavers_is() {
        let noise = |i: usize| (i as f64 * 12.9898).sin() * 0.1;
        let run = |slope: f64| -> Vec<f64> { (0..1000).map(|i| 1.0 + noise(i) - slope * i as f64 / 1000.0).collect() };
        assert!(still(&run(0.0)).is_some() && still(&run(-0.5)).is_some());
        assert!(still(&run(0.5)).is_none() && still(&run(0.1)).is_none());
        assert!(still(&[1.0, f64::NAN]).is_none());
    }

    #[test]
    fn what_does_not_move_is_named_by_its_group() {
        let of = |values: &[(&str, f32)]| values.iter().map(|(path, v)| ((*path).to_owned(), vec![*v; 4])).collect();
        let words = |after: &[(&str, f32)]| {
            Moves::between(&of(&[("a.0.w", 1.0), ("a.1.w", 2.0), ("b.w", 1.0)]), &of(after)).words()
        };
        assert_eq!(words(&[("a.0.w", 1.001), ("a.1.w", 2.001), ("b.w", 0.999)]), None);
        assert!(words(&[("a.0.w", 1.0), ("a.1.w", 2.0), ("b.w", 1.0)]).unwrap().contains("no weight moved"));
        assert!(
            words(&[("a.0.w", 1.001), ("a.1.w", 2.0), ("b.w", 1.0)]).unwrap().contains("weights of b did not move")
        );
        let jump = words(&[("a.0.w", 1.0), ("a.1.w", 2.001), ("b.w", 1.5)]).unwrap();
        assert!(jump.contains("weights of b by up to 50 %"), "{jump}");
        let zero = without_gradient(&[("a".into(), 0.0), ("b".into(), 1.0), ("c".into(), 0.0)]).unwrap();
        assert!(zero.contains("2 of 3 gradients are zero: a, c") && without_gradient(&[("b".into(), 1.0)]).is_none());
    }
}
