//! Pictures of a run: grids of samples.

use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};

use flowtape_engine::files::write_whole;

use crate::error::io;
use crate::generate::Samples;
use crate::{Error, Result};

/// Pixels of the picture per pixel of an image, at most, and how high an image is shown at most.
const ZOOM: usize = 6;
const SHOWN: usize = 128;
/// Pixels between images.
const GAP: usize = 4;

/// Milliseconds that a frame of an animation is shown.
const FRAME_TIME: u16 = 120;

/// Images of one size as one picture.
struct Canvas {
    bytes: Vec<u8>,
    channels: usize,
    width: usize,
    height: usize,
}

impl Canvas {
    /// Images (-1 black to 1 white) of `channels` (grey, or red, green and blue) and `sides` (rows, columns), `columns` of them
    /// side by side.
    fn new<'a>(
        images: impl ExactSizeIterator<Item = &'a [f32]>,
        channels: usize,
        sides: (usize, usize),
        columns: usize,
    ) -> Self {
        let zoom = (SHOWN / sides.0.max(1)).clamp(1, ZOOM);
        let columns = columns.clamp(1, images.len().max(1));
        let rows = images.len().div_ceil(columns);
        let cell = (sides.0 * zoom + GAP, sides.1 * zoom + GAP);
        let (width, height) = (columns * cell.1 + GAP, rows * cell.0 + GAP);
        let mut bytes = vec![40u8; width * height * channels];
        for (i, image) in images.enumerate() {
            let (top, left) = (GAP + i / columns * cell.0, GAP + i % columns * cell.1);
            for y in 0..sides.0 * zoom {
                for x in 0..sides.1 * zoom {
                    for channel in 0..channels {
                        let value = image[(channel * sides.0 + y / zoom) * sides.1 + x / zoom];
                        bytes[((top + y) * width + left + x) * channels + channel] = byte(value);
                    }
                }
            }
        }
        Self { bytes, channels, width, height }
    }
}

/// Writes images (grey, -1 black to 1 white) of `sides` (rows, columns) as a grid with `columns` columns.
///
/// # Errors
/// When the file can't be written.
pub fn save_grid(path: &Path, images: &[f32], sides: (usize, usize), columns: usize) -> Result<()> {
    save_png(path, &[Canvas::new(images.chunks_exact(sides.0 * sides.1), 1, sides, columns)])
}

/// Writes videos of `sides` (frames, rows, columns) as a grid with `columns` columns: an animated PNG in which all of them
/// play.
///
/// # Errors
/// When the file can't be written.
pub fn save_animation(path: &Path, videos: &[f32], sides: (usize, usize, usize), columns: usize) -> Result<()> {
    let (frames, height, width) = sides;
    let videos: Vec<&[f32]> = videos.chunks_exact(frames * height * width).collect();
    let frame = |i: usize| videos.iter().map(move |v| &v[i * height * width..][..height * width]);
    let frames = (0..frames).map(|i| Canvas::new(frame(i), 1, (height, width), columns));
    save_png(path, &frames.collect::<Vec<_>>())
}

/// Checks that a picture can be written to a path, before the work that makes it: its name says its format, and its folder is
/// there.
///
/// # Errors
/// When the name ends in no known format or is a folder's, or the file can't be made.
pub fn check_path(path: &Path) -> Result<()> {
    let wrong = |what: String| Err(Error::Picture { path: path.into(), what });
    let is_folder = path.to_string_lossy().ends_with(std::path::is_separator) || path.is_dir();
    if is_folder || path.file_name().is_none() {
        return wrong("is a folder: name a file in it, such as samples.png".into());
    }
    if !path.extension().is_some_and(|end| end.eq_ignore_ascii_case("png") || end.eq_ignore_ascii_case("apng")) {
        return wrong("expected a name that ends in .png (or .apng): pictures are PNGs, films animated ones".into());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        return wrong(format!("there is no folder {}: make it first", folder.display()));
    }
    // What is there already stays as it is until the new one is whole.
    let probe = tempfile::Builder::new().prefix(".flowtape").tempfile_in(folder);
    probe.map(drop).map_err(io(folder))
}

/// A picture that stands beside another one: `kind` comes before the ending of its name; with none it is that one.
pub fn beside(path: &Path, kind: &str) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(kind);
    if let Some(end) = path.extension() {
        name.push(".");
        name.push(end);
    }
    path.with_file_name(name)
}

/// Writes samples as a grid; grey videos as one that plays, and the frames of each row's first one side by side. `path` says
/// where, from a suffix of the name.
///
/// # Errors
/// When a file can't be written, or the samples are neither grey nor in colour.
pub fn save_samples(samples: &Samples, columns: usize, path: impl Fn(&str) -> PathBuf) -> Result<()> {
    let pixels = &samples.pixels;
    match samples.dims[..] {
        [1, height, width] => save_grid(&path(""), pixels, (height, width), columns),
        [3, height, width] => {
            let images = pixels.chunks_exact(3 * height * width);
            save_png(&path(""), &[Canvas::new(images, 3, (height, width), columns)])
        }
        [3, frames, height, width] => {
            let (picture, video) = (height * width, 3 * frames * height * width);
            // A video's channels are films: a frame has one picture of each.
            let frame = |video: &[f32], i: usize| -> Vec<f32> {
                (0..3).flat_map(|channel| &video[(channel * frames + i) * picture..][..picture]).copied().collect()
            };
            let canvas = |i: usize| {
                let images: Vec<Vec<f32>> = pixels.chunks_exact(video).map(|video| frame(video, i)).collect();
                Canvas::new(images.iter().map(Vec::as_slice), 3, (height, width), columns)
            };
            save_png(&path(""), &(0..frames).map(canvas).collect::<Vec<_>>())
        }
        [1, frames, height, width] => {
            save_animation(&path(""), pixels, (frames, height, width), columns)?;
            let videos = pixels.chunks_exact(frames * height * width);
            let firsts: Vec<f32> = videos.step_by(columns).flatten().copied().collect();
            save_grid(&path("_frames"), &firsts, (height, width), frames)
        }
        _ => {
            let what = format!("expected samples that are grey or in colour, got {:?}", samples.dims);
            Err(Error::Picture { path: path(""), what })
        }
    }
}

/// Writes a grey picture (-1 black to 1 white) of `sides` (rows, columns), a pixel for each number: what [`load_grey`] reads.
///
/// # Errors
/// When the file can't be written.
pub fn save_grey(path: &Path, pixels: &[f32], (height, width): (usize, usize)) -> Result<()> {
    save_png(path, &[Canvas { bytes: pixels.iter().map(|v| byte(*v)).collect(), channels: 1, width, height }])
}

/// A pixel's byte.
fn byte(value: f32) -> u8 {
    ((value.clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8
}

/// Writes one picture, or several of one size as an animation.
fn save_png(path: &Path, frames: &[Canvas]) -> Result<()> {
    let Some(Canvas { width, height, channels, .. }) = frames.first() else { return Ok(()) };
    let failed = |e: png::EncodingError| Error::Picture { path: path.into(), what: e.to_string() };
    write_whole(path, |partial| {
        let file = std::fs::File::create(partial).map_err(io(path))?;
        let mut encoder = png::Encoder::new(BufWriter::new(file), *width as u32, *height as u32);
        encoder.set_color(if *channels == 3 { png::ColorType::Rgb } else { png::ColorType::Grayscale });
        if frames.len() > 1 {
            encoder.set_animated(frames.len() as u32, 0).map_err(failed)?;
            encoder.set_frame_delay(FRAME_TIME, 1000).map_err(failed)?;
        }
        let mut writer = encoder.write_header().map_err(failed)?;
        for frame in frames {
            writer.write_image_data(&frame.bytes).map_err(failed)?;
        }
        writer.finish().map_err(failed)
    })
}

/// Reads a grey PNG of `sides` (rows, columns) as numbers from -1 (black) to 1 (white).
///
/// # Errors
/// When it can't be read, or has another size or more than one colour channel.
pub fn load_grey(path: &Path, sides: (usize, usize)) -> Result<Vec<f32>> {
    let failed = |what: String| Error::Picture { path: path.into(), what };
    let file = std::fs::File::open(path).map_err(io(path))?;
    let mut decoder = png::Decoder::new(BufReader::new(file));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(|e| failed(e.to_string()))?;
    let mut grey = vec![0; reader.output_buffer_size().unwrap_or(0)];
    let info = reader.next_frame(&mut grey).map_err(|e| failed(e.to_string()))?;
    let got = (info.height as usize, info.width as usize);
    if got != sides || info.color_type != png::ColorType::Grayscale {
        let (rows, columns) = sides;
        let what = format!(
            "expected a grey picture of {columns} x {rows} pixels, got {:?} of {} x {}",
            info.color_type, got.1, got.0
        );
        return Err(failed(what));
    }
    Ok(grey[..got.0 * got.1].iter().map(|g| f32::from(*g) / 127.5 - 1.0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builtin::digits::{PIXELS, SIDE};

    #[test]
    fn videos_play_side_by_side_and_grey_pictures_are_read_back() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("videos.png");
        // Two videos: one grows bright, the other dark.
        let level = |i: usize| i as f32 - 1.0;
        let video = |f: &dyn Fn(usize) -> f32| (0..3).flat_map(|i| vec![f(i); 6]).collect::<Vec<f32>>();
        save_animation(&path, &[video(&level), video(&|i| -level(i))].concat(), (3, 2, 3), 2)?;
        let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        assert_eq!(reader.info().animation_control().unwrap().num_frames, 3);
        let mut grey = vec![0; reader.output_buffer_size().unwrap()];
        for expected in [(0, 255), (128, 128), (255, 0)] {
            let width = reader.next_frame(&mut grey).unwrap().width as usize;
            let row = &grey[(GAP + 1) * width..];
            assert_eq!((row[GAP + 1], row[GAP + 3 * ZOOM + GAP + 1]), expected);
        }
        let still = folder.path().join("grey.png");
        let canvas = Canvas { bytes: vec![0, 255, 51, 0, 0, 0], channels: 1, width: 3, height: 2 };
        save_png(&still, &[canvas])?;
        assert_eq!(load_grey(&still, (2, 3))?[..3], [-1.0, 1.0, -0.6]);
        let error = load_grey(&still, (3, 3)).unwrap_err().to_string();
        assert!(error.contains("3 x 3") && error.contains("3 x 2"), "{error}");
        assert!(load_grey(&folder.path().join("none.png"), (1, 1)).is_err());
        Ok(())
    }

    #[test]
    fn a_grid_shows_each_image_at_its_place() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("grid.png");
        let images = [vec![-1.0; PIXELS], vec![1.0; PIXELS], vec![0.0; PIXELS]].concat();
        save_grid(&path, &images, (SIDE, SIDE), 2)?;
        let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut grey = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut grey).unwrap();
        let cell = SIDE * ZOOM + GAP;
        assert_eq!((info.width as usize, info.height as usize), (2 * cell + GAP, 2 * cell + GAP));
        let at =
            |row: usize, column: usize| grey[(GAP + row * cell + 1) * info.width as usize + GAP + column * cell + 1];
        assert_eq!((at(0, 0), at(0, 1), at(1, 0), at(1, 1)), (0, 255, 128, 40));
        assert!(save_grid(&folder.path().join("no/grid.png"), &images, (SIDE, SIDE), 2).is_err());
        Ok(())
    }

    #[test]
    fn a_name_that_can_not_be_written_is_told_before_the_work() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path("sub.png")).unwrap();
        for name in ["a.png", "v1.5.PNG", ".x.png", "film.apng", "with space.png"] {
            check_path(&path(name)).unwrap();
            assert_eq!(beside(&path(name), ""), path(name));
        }
        for (name, part) in [
            ("model_v1.5", "ends in .png"),
            ("s.jpg", "ends in .png"),
            ("s", "ends in .png"),
            (".png", "ends in .png"),
            ("sub.png", "is a folder"),
            ("new/", "is a folder"),
            ("no/x.png", "no folder"),
        ] {
            let error = check_path(&path(name)).unwrap_err().to_string();
            assert!(error.contains(part), "{name}: {error}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(beside(Path::new("a/v1.5.png"), "_frames"), Path::new("a/v1.5_frames.png"));
    }
}
