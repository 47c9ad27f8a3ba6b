//! Pictures of a run: grids of samples and the loss curve.

use std::io::BufWriter;
use std::path::Path;

use flowtape_engine::files::write_whole;
use plotters::prelude::{ChartBuilder, Color, IntoDrawingArea, LineSeries, RGBColor, SVGBackend, WHITE};

use crate::digits::{PIXELS, SIDE};
use crate::error::io;
use crate::{Error, Result};

/// Pixels of the picture per pixel of an image.
const ZOOM: usize = 6;
/// Steps on each side over which the smooth curve averages.
const SMOOTH: usize = 10;
/// Pixels between images.
const GAP: usize = 4;

/// Writes images (grey, -1 black to 1 white, [`PIXELS`] each) as a grid with `columns` columns.
///
/// # Errors
/// When the file can't be written.
pub fn save_grid(path: &Path, images: &[f32], columns: usize) -> Result<()> {
    let count = images.len() / PIXELS;
    let columns = columns.clamp(1, count.max(1));
    let (cell, rows) = (SIDE * ZOOM + GAP, count.div_ceil(columns));
    let (width, height) = (columns * cell + GAP, rows * cell + GAP);
    let mut grey = vec![40u8; width * height];
    for (i, image) in images.chunks_exact(PIXELS).enumerate() {
        let (left, top) = (GAP + i % columns * cell, GAP + i / columns * cell);
        for y in 0..SIDE * ZOOM {
            for x in 0..SIDE * ZOOM {
                let value = image[y / ZOOM * SIDE + x / ZOOM];
                grey[(top + y) * width + left + x] = ((value.clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8;
            }
        }
    }
    write_whole(path, |partial| {
        let file = std::fs::File::create(partial).map_err(io(path))?;
        let mut encoder = png::Encoder::new(BufWriter::new(file), width as u32, height as u32);
        encoder.set_color(png::ColorType::Grayscale);
        let failed = |e: png::EncodingError| Error::Picture { path: path.into(), what: e.to_string() };
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&grey).map_err(failed)?;
        writer.finish().map_err(failed)
    })
}

/// Writes the losses by step, and their running mean, as an SVG.
///
/// # Errors
/// When the file can't be written.
pub fn save_loss_curve(path: &Path, losses: &[(u64, f64)]) -> Result<()> {
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
    fn a_grid_shows_each_image_at_its_place() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("grid.png");
        let images = [vec![-1.0; PIXELS], vec![1.0; PIXELS], vec![0.0; PIXELS]].concat();
        save_grid(&path, &images, 2)?;
        let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut grey = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut grey).unwrap();
        let cell = SIDE * ZOOM + GAP;
        assert_eq!((info.width as usize, info.height as usize), (2 * cell + GAP, 2 * cell + GAP));
        let at =
            |row: usize, column: usize| grey[(GAP + row * cell + 1) * info.width as usize + GAP + column * cell + 1];
        assert_eq!((at(0, 0), at(0, 1), at(1, 0), at(1, 1)), (0, 255, 128, 40));
        assert!(save_grid(&folder.path().join("no/grid.png"), &images, 2).is_err());
        Ok(())
    }

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
