//! `loss.svg`.

use crate::Result;
use crate::hooks::{Event, Hook};
use crate::picture::save_loss_curve;
use crate::train::Session;

/// Draws the losses with each checkpoint, and at the end.
#[derive(Debug, Default)]
pub struct LossCurve {
    losses: Vec<(u64, f64)>,
}

impl Hook for LossCurve {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        match event {
            Event::Begin(begin) => self.losses = begin.history.iter().map(|r| (r.step, r.loss)).collect(),
            Event::Step(record) => self.losses.push((record.step, record.loss)),
            Event::Saved(_) | Event::Stopped(_) => {
                if let Err(error) = save_loss_curve(&run.folder().curve_path(), &self.losses) {
                    tracing::warn!("{error}; the run goes on");
                }
            }
            _ => {}
        }
        Ok(())
    }
}
