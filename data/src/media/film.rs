//! Films: animated GIF, PNG and WebP.

use std::io::Cursor;
use std::path::Path;

use image::codecs::gif::GifDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{AnimationDecoder, Frame, ImageDecoder, ImageFormat, ImageReader};

use super::picture::{check_size, over};
use super::{Picture, ReadOptions, read_picture};
use crate::{Error, Result};

/// Most frames that are counted: an hour at 30 a second.
const MOST_FRAMES: usize = 108_000;

type Any<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Which of `count` frames are taken so that there are `frames`, evenly from the first to the last: NeMo's `linspace`, cut off.
pub fn evenly(count: usize, frames: usize) -> Vec<usize> {
    let gap = count.saturating_sub(1) as f64 / frames.saturating_sub(1).max(1) as f64;
    (0..frames).map(|i| (i as f64 * gap) as usize).collect()
}

/// Reads `frames` frames of a film, evenly from the first to the last. What does not move has one, which is repeated.
///
/// # Errors
/// When it can't be read, has no frames, or claims more pixels than memory should hold; the error names the file.
pub fn read_film(path: &Path, frames: usize, options: &ReadOptions) -> Result<Vec<Picture>> {
    let named = |source| Error::Sample { sample: path.display().to_string(), source };
    let bytes = std::fs::read(path).map_err(|error| named(error.into()))?;
    // Counted first: frames that are not taken are never held together.
    let Some(count) = walk(&bytes, &mut |_, _| Ok(())).map_err(named)? else {
        let still = read_picture(path, options)?;
        return Ok(vec![still; frames]);
    };
    if count == 0 {
        return Err(named("a film without frames".into()));
    }
    let wanted = evenly(count, frames);
    let mut taken = Vec::with_capacity(frames);
    let mut take = |index: usize, frame: &Frame| -> Any<()> {
        let times = wanted.iter().filter(|place| **place == index).count();
        if times > 0 {
            let (width, height) = frame.buffer().dimensions();
            let rgba = frame.buffer().as_raw();
            let rgb = match options.background {
                Some(background) => over(rgba, background),
                None => rgba.as_chunks::<4>().0.iter().flat_map(|p| [p[0], p[1], p[2]]).collect(),
            };
            let picture = Picture { width: width as usize, height: height as usize, rgb };
            taken.extend(std::iter::repeat_n(picture, times));
        }
        Ok(())
    };
    walk(&bytes, &mut take).map_err(named)?;
    Ok(taken)
}

/// Shows each frame of an animation, whole, and gives how many there are; nothing for what is none.
fn walk(bytes: &[u8], see: &mut dyn FnMut(usize, &Frame) -> Any<()>) -> Any<Option<usize>> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    let format = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?.format();
    let frames = match format {
        Some(ImageFormat::Gif) => {
            let decoder = GifDecoder::new(Cursor::new(bytes))?;
            check_size(decoder.dimensions())?;
            decoder.into_frames()
        }
        Some(ImageFormat::Png) => {
            let decoder = PngDecoder::new(Cursor::new(bytes))?;
            check_size(decoder.dimensions())?;
            if !decoder.is_apng()? {
                return Ok(None);
            }
            decoder.apng()?.into_frames()
        }
        Some(ImageFormat::WebP) => {
            let decoder = WebPDecoder::new(Cursor::new(bytes))?;
            check_size(decoder.dimensions())?;
            if !decoder.has_animation() {
                return Ok(None);
            }
            decoder.into_frames()
        }
        _ => return Ok(None),
    };
    let mut count = 0;
    for frame in frames {
        see(count, &frame?)?;
        count += 1;
        if count > MOST_FRAMES {
            return Err(format!("more than {MOST_FRAMES} frames").into());
        }
    }
    Ok(Some(count))
}
