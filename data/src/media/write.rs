//! Pictures to files, with what made them.

use std::io::BufWriter;
use std::path::Path;

use flowtape_engine::files::write_whole;

use super::Picture;
use crate::{Error, Result};

/// Pixels between the pictures of a grid.
const GAP: usize = 4;

/// Writes a picture as PNG, whole or not at all, with texts by keyword, such as `prompt` and `seed`.
///
/// # Errors
/// When the file can't be written, or a keyword is none of PNG's (1 to 79 letters of Latin-1).
pub fn write_png(path: &Path, picture: &Picture, texts: &[(&str, String)]) -> Result<()> {
    write_film(path, std::slice::from_ref(picture), 1.0, texts)
}

/// Writes pictures of one size as an animated PNG with so many frames a second, which plays again and again; one is a still
/// picture.
///
/// # Errors
/// As above, and when there is no frame or the sizes differ.
pub fn write_film(path: &Path, frames: &[Picture], fps: f64, texts: &[(&str, String)]) -> Result<()> {
    let failed = |what: String| Error::Open { name: path.display().to_string(), what };
    let Some(first) = frames.first().filter(|first| frames.iter().all(|frame| frame.rgb.len() == first.rgb.len()))
    else {
        return Err(failed("expected frames of one size".into()));
    };
    write_whole(path, |partial| {
        let file = std::fs::File::create(partial).map_err(|error| failed(error.to_string()))?;
        let sides = [first.width, first.height].map(|side| u32::try_from(side).unwrap_or(u32::MAX));
        let mut encoder = png::Encoder::new(BufWriter::new(file), sides[0], sides[1]);
        encoder.set_color(png::ColorType::Rgb);
        let encoded = |result: std::result::Result<(), png::EncodingError>| result.map_err(|e| failed(e.to_string()));
        if frames.len() > 1 {
            encoded(encoder.set_animated(u32::try_from(frames.len()).unwrap_or(u32::MAX), 0))?;
            // Hundredths of a frame a second: 23.98 is exact enough.
            encoded(encoder.set_frame_delay(100, (fps * 100.0).round().clamp(1.0, f64::from(u16::MAX)) as u16))?;
        }
        for (keyword, text) in texts {
            encoded(encoder.add_itxt_chunk((*keyword).to_owned(), text.clone()))?;
        }
        let mut writer = encoder.write_header().map_err(|error| failed(error.to_string()))?;
        for frame in frames {
            encoded(writer.write_image_data(&frame.rgb))?;
        }
        encoded(writer.finish())
    })
}

/// The texts of a PNG, by keyword.
///
/// # Errors
/// When it can't be read.
pub fn read_png_texts(path: &Path) -> Result<Vec<(String, String)>> {
    let failed = |what: String| Error::Open { name: path.display().to_string(), what };
    let file = std::fs::File::open(path).map_err(|error| failed(error.to_string()))?;
    let reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().map_err(|e| failed(e.to_string()))?;
    let text = |chunk: &png::text_metadata::ITXtChunk| Ok((chunk.keyword.clone(), chunk.get_text()?));
    let texts = reader.info().utf8_text.iter().map(text).collect::<std::result::Result<_, png::DecodingError>>();
    texts.map_err(|error| failed(error.to_string()))
}

/// Pictures side by side, so many in a row, on dark grey. Each takes the place of the largest.
pub fn grid(pictures: &[Picture], columns: usize) -> Picture {
    let columns = columns.clamp(1, pictures.len().max(1));
    let largest = |side: fn(&Picture) -> usize| pictures.iter().map(side).max().unwrap_or(0) + GAP;
    let (wide, high) = (largest(|p| p.width), largest(|p| p.height));
    let rows = pictures.len().div_ceil(columns);
    let mut out = Picture::new(columns * wide + GAP, rows * high + GAP);
    out.rgb.fill(40);
    for (i, picture) in pictures.iter().enumerate() {
        let (top, left) = (GAP + i / columns * high, GAP + i % columns * wide);
        for (y, row) in picture.rgb.chunks(picture.width.max(1) * 3).enumerate() {
            out.rgb[((top + y) * out.width + left) * 3..][..row.len()].copy_from_slice(row);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::{ReadOptions, read_picture};

    #[test]
    fn a_picture_and_its_texts_are_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let picture = Picture { width: 2, height: 1, rgb: vec![1, 2, 3, 250, 0, 9] };
        let texts = [("prompt", "a café in 東京".to_owned()), ("seed", "7".to_owned())];
        write_png(&path, &picture, &texts).unwrap();
        assert_eq!(read_picture(&path, &ReadOptions::default()).unwrap(), picture);
        let read = read_png_texts(&path).unwrap();
        let read: Vec<(&str, &str)> = read.iter().map(|(keyword, text)| (&**keyword, &**text)).collect();
        assert_eq!(read, [("prompt", "a café in 東京"), ("seed", "7")]);
        let error = write_png(&folder.path().join("b.png"), &picture, &[("", String::new())]).unwrap_err().to_string();
        assert!(error.contains("b.png") && !folder.path().join("b.png").exists(), "{error}");
        assert!(write_png(&folder.path().join("no/c.png"), &picture, &[]).is_err());
    }

    #[test]
    fn a_grid_has_each_picture_at_its_place() {
        let picture = |level: u8| Picture { width: 2, height: 3, rgb: vec![level; 18] };
        let grid = grid(&[picture(1), picture(2), picture(3)], 2);
        assert_eq!((grid.width, grid.height), (2 * (2 + GAP) + GAP, 2 * (3 + GAP) + GAP));
        let at = |y: usize, x: usize| grid.rgb[(y * grid.width + x) * 3];
        assert_eq!((at(GAP, GAP), at(GAP, 2 * GAP + 2), at(2 * GAP + 3, GAP), at(0, 0)), (1, 2, 3, 40));
    }
}
