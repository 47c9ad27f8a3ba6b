//! How a training step's time and memory grow with the batch, the tokens, the width and the depth.

use std::fmt::Write as _;
use std::path::Path;

use flowtape_engine::Device;
use flowtape_engine::files::write_whole;
use flowtape_engine::meta::Meta;
use flowtape_trainer::recipe::Dtype;
use plotters::prelude::{
    ChartBuilder, Circle, Color, IntoDrawingArea, IntoLogRange, LineSeries, RGBColor, SVGBackend, WHITE,
};
use serde::Serialize;

use super::{Options, Work, step};
use crate::{Error, Result};

/// One size of one sweep, and what a step of it takes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Point {
    /// What is varied: `batch`, `tokens`, `width` or `depth`.
    pub axis: &'static str,
    /// Its value; tokens are those of an image, depth counts blocks.
    pub value: usize,
    /// What flows where.
    pub dtype: Dtype,
    /// Numbers that are trained.
    pub params: u64,
    /// 10^9 floating-point operations of a step.
    pub gflop: f64,
    /// Seconds of a step, the median.
    pub s_step: f64,
    /// The fastest.
    pub s_min: f64,
    /// `gflop / s_step`.
    pub gflops: f64,
    /// The most bytes of tensors at once, in MiB: weights, moments, gradients and activations.
    pub memory_mb: f64,
}

/// What is varied, and the sizes.
fn sweeps() -> Vec<(&'static str, Vec<(usize, Work)>)> {
    let base = Work { batch: 1, image: (16, 16), text: 16, ..Work::s() };
    let with = |values: &[usize], make: &dyn Fn(usize) -> Work| values.iter().map(|&v| (v, make(v))).collect();
    let powers = |from: u32, to: u32| (from..=to).map(|p| 1usize << p).collect::<Vec<_>>();
    vec![
        ("batch", with(&powers(0, 5), &|batch| Work { batch, image: (8, 8), ..base.clone() })),
        // 8 x 8, 8 x 16, 16 x 16, ...
        (
            "tokens",
            with(&powers(6, 12), &|n| {
                let height = 1 << (n.ilog2() / 2);
                Work { image: (height, n / height), ..base.clone() }
            }),
        ),
        ("width", with(&powers(7, 10), &|width| Work { heads: width / 64, ..base.clone() })),
        ("depth", with(&powers(1, 5), &|blocks| Work { double: blocks / 2, single: blocks / 2, ..base.clone() })),
    ]
}

/// The most bytes of tensors that a step after the first holds at once, from a step on the device without data.
///
/// # Errors
/// When the sizes do not fit the model.
pub fn memory(work: &Work, dtype: Dtype) -> Result<u64> {
    let meta = Meta::default();
    step(work, &meta.device(), &Options { dtype, steps: 1, warmup: 1, at_once: true, profile: false, lora: None })?;
    Ok(meta.peak())
}

/// Measures all sweeps, `steps` steps of each size; `report` gets each point as soon as it is measured.
///
/// # Errors
/// When the device fails or memory runs out.
pub fn scaling(device: &Device, dtype: Dtype, steps: usize, mut report: impl FnMut(&Point)) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for (axis, sizes) in sweeps() {
        for (value, work) in sizes {
            let m =
                step(&work, device, &Options { dtype, steps, warmup: 1, at_once: true, profile: false, lora: None })?;
            let memory_mb = memory(&work, dtype)? as f64 / f64::from(1 << 20);
            let point = Point {
                axis,
                value,
                dtype,
                params: m.params,
                gflop: m.gflop,
                s_step: m.s_step,
                s_min: m.s_min,
                gflops: m.gflops,
                memory_mb: (memory_mb * 10.0).round() / 10.0,
            };
            report(&point);
            points.push(point);
        }
    }
    Ok(points)
}

/// A Markdown table.
pub fn table(points: &[Point]) -> String {
    let mut out = "| varied | value | parameters | GFLOP | step, s | fastest, s | GFLOP/s | memory, MiB |\n".to_owned();
    out += "|---|---|---|---|---|---|---|---|\n";
    for p in points {
        let Point { axis, value, params, gflop, s_step, s_min, gflops, memory_mb, .. } = p;
        // Writing to a string does not fail.
        let _ =
            writeln!(out, "| {axis} | {value} | {params} | {gflop} | {s_step} | {s_min} | {gflops} | {memory_mb} |");
    }
    out
}

/// Time and memory over each axis, both in powers of two, as an SVG.
///
/// # Errors
/// When the file can't be written.
pub fn plot(path: &Path, points: &[Point]) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::Picture { path: path.into(), what: e.to_string() };
    write_whole(path, |partial| {
        let area = SVGBackend::new(partial, (1200, 560)).into_drawing_area();
        area.fill(&WHITE).map_err(|e| failed(&e))?;
        let panels = area.split_evenly((2, 4));
        let axes = ["batch", "tokens", "width", "depth"];
        for (i, panel) in panels.iter().enumerate() {
            let (axis, name) = (axes[i % 4], if i < 4 { "s a step" } else { "MiB" });
            let of = |p: &Point| if i < 4 { p.s_min } else { p.memory_mb };
            let line: Vec<(f64, f64)> =
                points.iter().filter(|p| p.axis == axis).map(|p| (p.value as f64, of(p).max(1e-6))).collect();
            let ends = |values: &mut dyn Iterator<Item = f64>| {
                let (low, high) = values.fold((f64::INFINITY, 0f64), |(a, b), v| (a.min(v), b.max(v)));
                if low <= high { (0.8 * low, 1.25 * high) } else { (0.5, 2.0) }
            };
            let (left, right) = ends(&mut line.iter().map(|p| p.0));
            let (low, high) = ends(&mut line.iter().map(|p| p.1));
            let mut chart = ChartBuilder::on(panel)
                .margin(10)
                .x_label_area_size(36)
                .y_label_area_size(56)
                .build_cartesian_2d((left..right).log_scale().base(2.0), (low..high).log_scale().base(2.0))
                .map_err(|e| failed(&e))?;
            let mut mesh = chart.configure_mesh();
            let short = |v: &f64| if *v < 1.0 { format!("{v:.3}") } else { format!("{v}") };
            mesh.x_desc(axis).y_desc(name).x_labels(8).y_labels(8).light_line_style(WHITE);
            mesh.x_label_formatter(&short).y_label_formatter(&short);
            mesh.draw().map_err(|e| failed(&e))?;
            let colour = RGBColor(20, 70, 160);
            chart.draw_series(LineSeries::new(line.clone(), colour.stroke_width(2))).map_err(|e| failed(&e))?;
            let dots = line.into_iter().map(|at| Circle::new(at, 3, colour.filled()));
            chart.draw_series(dots).map_err(|e| failed(&e))?;
        }
        area.present().map_err(|e| failed(&e))
    })
}

#[cfg(test)]
mod tests {
    use flowtape_engine::cpu::Cpu;

    use super::*;

    fn of(axis: &str) -> Vec<(usize, Work)> {
        sweeps().into_iter().find(|(name, _)| *name == axis).unwrap().1
    }

    #[test]
    fn memory_is_linear_in_tokens_and_in_the_batch() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Mixed] {
            for axis in ["tokens", "batch"] {
                let all: Vec<(f64, f64)> =
                    of(axis).iter().map(|(n, work)| (*n as f64, memory(work, dtype).unwrap() as f64)).collect();
                // What each further token takes is the same from the first doubling to the last; blocks of memory round up
                // by at most an eighth, and what does not grow hides a part of the first.
                let slopes: Vec<f64> = all.windows(2).map(|w| (w[1].1 - w[0].1) / (w[1].0 - w[0].0)).collect();
                let (last, largest) = (slopes[slopes.len() - 1], slopes.iter().copied().fold(0.0, f64::max));
                assert!(largest < 1.25 * last && last > 0.0, "{axis}, {dtype:?}: {slopes:?}");
                // A quadratic term would show in the last doubling.
                let before = slopes[slopes.len() - 2];
                assert!((last / before - 1.0).abs() < 0.15, "{axis}, {dtype:?}: {slopes:?}");
            }
        }
    }

    #[test]
    fn the_device_without_data_counts_what_the_cpu_takes() {
        let (_, work) = &of("batch")[1];
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Mixed] {
            let device = Device::new(Cpu::default());
            step(work, &device, &Options { dtype, steps: 1, warmup: 1, at_once: true, profile: false, lora: None })
                .unwrap();
            let (real, counted) = (device.backend().memory().peak as f64, memory(work, dtype).unwrap() as f64);
            assert!((real / counted - 1.0).abs() < 0.03, "{dtype:?}: {real} and {counted}");
        }
    }

    #[test]
    fn points_become_a_table_and_a_picture() {
        let point = |axis, value: usize| Point {
            axis,
            value,
            dtype: Dtype::F32,
            params: 10,
            gflop: 1.5,
            s_step: 0.25 * value as f64,
            s_min: 0.25 * value as f64,
            gflops: 6.0,
            memory_mb: 3.0 * value as f64,
        };
        let points = [point("tokens", 64), point("tokens", 4096), point("depth", 2)];
        assert!(table(&points).contains("| tokens | 4096 | 10 | 1.5 | 1024 |"), "{}", table(&points));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scaling.svg");
        plot(&path, &points).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("polyline") && svg.contains("tokens"));
        plot(&folder.path().join("none.svg"), &[]).unwrap();
    }
}
