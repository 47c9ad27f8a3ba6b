//! One picture, and how it is read from a file.

use std::path::Path;

use flowtape_engine::{Device, Tensor};

use super::decode;
use super::film::Any;
use crate::{Error, Result};

/// Most pixels that a file may claim: Pillow's bound for what may be a decompression bomb.
const MOST_PIXELS: u64 = 178_956_970;

/// Endings of the names of pictures.
const ENDINGS: [&str; 9] = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "jfif"];

/// A picture of 8 bits a channel: rows from the top, pixels as red, green, blue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Picture {
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height * width * 3` values.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// Black.
    pub fn new(width: usize, height: usize) -> Self {
        Self { width, height, rgb: vec![0; width * height * 3] }
    }

    /// Pixels `[3, H, W]` from -1 to 1, f32: `(x / 255 - 0.5) / 0.5`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn pixels(&self, device: &Device) -> Result<Tensor> {
        let scaled = |value: u8| (f32::from(value) / 255.0 - 0.5) / 0.5;
        let values = (0..3).flat_map(|channel| self.rgb[channel..].iter().step_by(3)).map(|value| scaled(*value));
        Ok(Tensor::from_vec(values.collect::<Vec<f32>>(), &[3, self.height, self.width], device)?)
    }

    /// From pixels `[3, H, W]`, clamped: `round(255 (x / 2 + 0.5))`, halves to even, as pipelines write pictures.
    ///
    /// # Errors
    /// When there are not three channels, or the device fails.
    pub fn from_pixels(pixels: &Tensor) -> Result<Self> {
        let &[3, height, width] = pixels.dims() else {
            return Err(Error::batch("pixels", "[3, H, W]", format!("{:?}", pixels.dims())));
        };
        let values = pixels.to_vec::<f32>()?;
        let plane = height * width;
        let level = |value: f32| ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        let rgb = (0..3 * plane).map(|i| level(values[i % 3 * plane + i / 3])).collect();
        Ok(Self { width, height, rgb })
    }
}

/// How files are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadOptions {
    /// Whether a picture is turned as its EXIF orientation says.
    pub orientation: bool,
    /// The colour behind what is transparent; none leaves out alpha without blending.
    pub background: Option<[u8; 3]>,
    /// Whether grey of 16 bits is cut off at 255 instead of scaled.
    pub clip_grey16: bool,
}

impl Default for ReadOptions {
    /// Upright, on white, all depths scaled.
    fn default() -> Self {
        Self { orientation: true, background: Some([255; 3]), clip_grey16: false }
    }
}

impl ReadOptions {
    /// As NeMo's preprocessing and Pillow's `convert("RGB")` read them.
    pub fn like_nemo() -> Self {
        Self { orientation: false, background: None, clip_grey16: true }
    }
}

/// Whether a file's name is that of a picture.
pub fn is_picture(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).map(str::to_ascii_lowercase);
    ending.is_some_and(|ending| ENDINGS.contains(&&*ending))
}

/// Reads a picture; of an animation its first frame. The format is that of the contents, whatever the name says.
///
/// # Errors
/// When it can't be read, is no picture, or claims more pixels than memory should hold; the error names the file.
pub fn read_picture(path: &Path, options: &ReadOptions) -> Result<Picture> {
    read(path, options).map_err(|source| Error::Sample { sample: path.display().to_string(), source })
}

fn read(path: &Path, options: &ReadOptions) -> Any<Picture> {
    let bytes = std::fs::read(path)?;
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    decode::picture(&bytes, options)
}

/// Checks that memory should hold so many pixels.
pub(super) fn check_size((width, height): (u32, u32)) -> Result<(), String> {
    match u64::from(width) * u64::from(height) {
        0..=MOST_PIXELS => Ok(()),
        _ => Err(format!("{width} x {height} pixels; at most {MOST_PIXELS} in all are read")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(name: &str, bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    fn error(name: &str, bytes: &[u8]) -> String {
        let (_folder, path) = written(name, bytes);
        let error = read_picture(&path, &ReadOptions::default()).unwrap_err();
        format!("{error}: {}", std::error::Error::source(&error).unwrap())
    }

    #[test]
    fn what_is_no_picture_is_named() {
        assert!(error("empty.png", b"").contains("empty.png") && error("empty.png", b"").contains("empty"));
        assert!(error("text.png", b"hello").contains("text.png"));
        // A whole header of 30,000 x 30,000 pixels.
        let mut png = Vec::new();
        let mut encoder = png::Encoder::new(&mut png, 30_000, 30_000);
        encoder.set_color(png::ColorType::Grayscale);
        let mut writer = encoder.write_header().unwrap();
        writer.write_chunk(png::chunk::IDAT, b"\x78\x01").unwrap();
        drop(writer);
        assert!(error("huge.png", &png).contains("30000 x 30000"), "{}", error("huge.png", &png));
    }

    #[test]
    fn alpha_lies_over_the_colour_that_was_chosen() {
        let mut png = Vec::new();
        let mut encoder = png::Encoder::new(&mut png, 3, 1);
        encoder.set_color(png::ColorType::Rgba);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&[10, 20, 30, 0, 10, 20, 30, 255, 100, 0, 200, 128]).unwrap();
        writer.finish().unwrap();
        let (_folder, path) = written("alpha.png", &png);
        let read = |background| read_picture(&path, &ReadOptions { background, ..ReadOptions::default() }).unwrap().rgb;
        assert_eq!(read(None), [10, 20, 30, 10, 20, 30, 100, 0, 200]);
        // 128/255 of the colour and the rest of the background.
        assert_eq!(read(Some([255, 0, 100])), [255, 0, 100, 10, 20, 30, 177, 0, 150]);
    }

    #[test]
    fn pixels_go_to_a_tensor_and_back() {
        let picture = Picture { width: 2, height: 3, rgb: (0..18).map(|i| i * 14).collect() };
        let pixels = picture.pixels(&Device::cpu()).unwrap();
        assert_eq!(pixels.dims(), [3, 3, 2]);
        assert_eq!(Picture::from_pixels(&pixels).unwrap(), picture);
    }
}
