//! `loss.svg`.

use std::path::Path;

use flowtape_engine::files::write_whole;
use plotters::prelude::{ChartBuilder, Color, IntoDrawingArea, LineSeries, RGBColor, SVGBackend, WHITE};

use crate::hooks::{Event, Hook};
use crate::train::Session;
use crate::{Error, Result};

/// Steps on each side over which the smooth curve averages.
const SMOOTH: usize = 10;

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

/// Writes the losses by step, and their running mean, as an SVG.
fn save_loss_curve(path: &Path, losses: &[(u64, f64)]) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::Picture { path: path.into(), what: e.to_string() };
    let last = losses.last().map_or(1, |l| l.0.max(1));
    let mut sorted: Vec<f64> = losses.iter().map(|l| l.1).filter(|l| l.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    // The first few losses are far above the rest: the scale leaves out one in fifty.
    let top = sorted.get(sorted.len() * 49 / 50).map_or(1.0, |v| v * 1.15);
    let around = |i: usize| {
        let window = &losses[i.saturating_sub(SMOOTH)..losses.len().min(i + SMOOTH + 1)];
        (losses[i].0, window.iter().map(|l| l.1).sum::<f64>() / window.len() as f64)
    };
    let smooth: Vec<(u64, f64)> = (0..losses.len()).map(around).collect();
    write_whole(path, |partial| {
        let area = SVGBackend::new(partial, (900, 420)).into_drawing_area();
        area.fill(&WHITE).map_err(|e| failed(&e))?;
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(56)
            .caption("loss", ("sans-serif", 18))
            .build_cartesian_2d(0..last, 0.0..top)
            .map_err(|e| failed(&e))?;
        let mesh = chart.configure_mesh().x_desc("step").light_line_style(WHITE).draw();
        mesh.map_err(|e| failed(&e))?;
        let inside = |points: Vec<(u64, f64)>| points.into_iter().map(move |(s, l)| (s, l.min(top)));
        let (pale, strong) = (RGBColor(160, 190, 230), RGBColor(20, 70, 160));
        chart.draw_series(LineSeries::new(inside(losses.to_vec()), pale.stroke_width(1))).map_err(|e| failed(&e))?;
        chart.draw_series(LineSeries::new(inside(smooth), strong.stroke_width(2))).map_err(|e| failed(&e))?;
        area.present().map_err(|e| failed(&e))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_an_svg() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        save_loss_curve(&path, &(1..50).map(|i| (i, 1.0 / i as f64)).collect::<Vec<_>>())?;
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("polyline"));
        save_loss_curve(&path, &[])
    }
}
