//! Pictures as vision encoders take them.

use std::path::Path;

use flowtape_engine::{Device, Error as EngineError, Tensor};
use serde::Deserialize;
use serde_json::Value;

use super::{Filter, Picture, center_crop, resize};
use crate::{Error, Result};

/// The file of an image processor's settings.
pub const PREPROCESSOR_CONFIG: &str = "preprocessor_config.json";

/// transformers' `Qwen2VLImageProcessor`: `preprocessor_config.json`.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(default)]
pub struct Qwen2VLImageProcessor {
    /// Sides of a patch in pixels.
    pub patch_size: usize,
    /// Frames of a patch: a picture is repeated.
    pub temporal_patch_size: usize,
    /// Sides of a token in patches.
    pub merge_size: usize,
    /// The fewest pixels of a picture.
    pub min_pixels: usize,
    /// The most.
    pub max_pixels: usize,
    /// Means of red, green and blue.
    pub image_mean: [f32; 3],
    /// Their standard deviations.
    pub image_std: [f32; 3],
}

impl Default for Qwen2VLImageProcessor {
    fn default() -> Self {
        Self {
            patch_size: 14,
            temporal_patch_size: 2,
            merge_size: 2,
            min_pixels: 56 * 56,
            max_pixels: 28 * 28 * 1280,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

impl Qwen2VLImageProcessor {
    /// From the object of `preprocessor_config.json`; other keys are passed over. `size` may hold the bounds, too.
    ///
    /// # Errors
    /// When a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        let wrong = |what: String| Error::Open { name: PREPROCESSOR_CONFIG.into(), what };
        let mut processor = Self::deserialize(value).map_err(|error| wrong(error.to_string()))?;
        let bound = |edge: &str| value["size"][edge].as_u64().map(|pixels| pixels as usize);
        if value.get("min_pixels").is_none_or(Value::is_null) {
            processor.min_pixels = bound("shortest_edge").unwrap_or(processor.min_pixels);
        }
        if value.get("max_pixels").is_none_or(Value::is_null) {
            processor.max_pixels = bound("longest_edge").unwrap_or(processor.max_pixels);
        }
        let sizes = [processor.patch_size, processor.temporal_patch_size, processor.merge_size, processor.min_pixels];
        if sizes.contains(&0) || processor.max_pixels < processor.min_pixels {
            return Err(wrong("expected sizes above 0, and max_pixels not below min_pixels".into()));
        }
        Ok(processor)
    }

    /// Reads the file of a folder.
    ///
    /// # Errors
    /// When it can't be read, or a value does not fit.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::from_json(&read_json(&folder.join(PREPROCESSOR_CONFIG))?)
    }

    /// Height and width of whole tokens, with the number of pixels in its bounds and the shape kept as it can be.
    pub fn smart_resize(&self, height: usize, width: usize) -> [usize; 2] {
        let factor = (self.patch_size * self.merge_size) as f64;
        let sides = [height, width].map(|side| side as f64);
        let pixels = sides[0] * sides[1];
        let rounded = sides.map(|side| (side / factor).round_ties_even() * factor);
        let area = rounded[0] * rounded[1];
        let scaled = if area > self.max_pixels as f64 {
            let beta = (pixels / self.max_pixels as f64).sqrt();
            sides.map(|side| ((side / beta / factor).floor() * factor).max(factor))
        } else if area < self.min_pixels as f64 {
            let beta = (self.min_pixels as f64 / pixels).sqrt();
            sides.map(|side| (side * beta / factor).ceil() * factor)
        } else {
            rounded
        };
        scaled.map(|side| side as usize)
    }

    /// Flattened patches `[N, C T P P]`, those of a token side by side, and how many patches there are along frames, rows and columns.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn process(&self, picture: &Picture, device: &Device) -> Result<(Tensor, [usize; 3])> {
        let [height, width] = self.smart_resize(picture.height, picture.width);
        let resized = resize(picture, width, height, Filter::Bicubic);
        let (patch, merge) = (self.patch_size, self.merge_size);
        let grid = [1, height / patch, width / patch];
        let pixels = normalised(&resized, self.image_mean, self.image_std, device)?;
        // [C, h, m, p, w, m, p] to [h, w, m, m, C, p, p], then a copy for each frame.
        let cells = [3, grid[1] / merge, merge, patch, grid[2] / merge, merge, patch];
        let patches = pixels.reshape(&cells)?.permute(&[1, 4, 2, 5, 0, 3, 6])?.reshape(&[
            grid[1] * grid[2],
            3,
            1,
            patch * patch,
        ])?;
        let frames = patches.expand(&[grid[1] * grid[2], 3, self.temporal_patch_size, patch * patch])?;
        Ok((frames.contiguous()?.flatten(1, 3)?, grid))
    }
}

/// A file's value.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|source| EngineError::Io { path: path.into(), source })?;
    Ok(serde_json::from_slice(&text)
        .map_err(|error| EngineError::Format { path: path.into(), what: error.to_string() })?)
}

/// Pixels `[3, H, W]`, f32: of 0 to 1, minus the mean, by the standard deviation, channel by channel.
///
/// # Errors
/// When memory runs out.
pub fn normalised(picture: &Picture, mean: [f32; 3], std: [f32; 3], device: &Device) -> Result<Tensor> {
    let value = |channel: usize, value: u8| (f32::from(value) / 255.0 - mean[channel]) / std[channel];
    let plane = |channel: usize| picture.rgb[channel..].iter().step_by(3).map(move |v| value(channel, *v));
    let values: Vec<f32> = (0..3).flat_map(plane).collect();
    Ok(Tensor::from_vec(values, &[3, picture.height, picture.width], device)?)
}

/// transformers' `SiglipImageProcessor`: a picture at one size, whatever its shape.
#[derive(Clone, PartialEq, Debug)]
pub struct SiglipImageProcessor {
    /// Height and width in pixels.
    pub size: [usize; 2],
    /// How it is resized.
    pub resample: Filter,
    /// Means of red, green and blue.
    pub image_mean: [f32; 3],
    /// Their standard deviations.
    pub image_std: [f32; 3],
}

impl SiglipImageProcessor {
    /// From the object of `preprocessor_config.json`; other keys are passed over.
    ///
    /// # Errors
    /// When a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        let wrong = |what: String| Error::Open { name: PREPROCESSOR_CONFIG.into(), what };
        let side = |edge: &str| value["size"][edge].as_u64().map_or(224, |side| side as usize);
        let numbers = |key: &str| match &value[key] {
            Value::Null => Ok([0.5; 3]),
            given => <[f32; 3]>::deserialize(given).map_err(|error| wrong(format!("{key}: {error}"))),
        };
        let processor = Self {
            size: [side("height"), side("width")],
            // Pillow's numbers.
            resample: match &value["resample"] {
                Value::Null => Filter::Bicubic,
                number => match number.as_u64() {
                    Some(1) => Filter::Lanczos,
                    Some(2) => Filter::Bilinear,
                    Some(3) => Filter::Bicubic,
                    _ => return Err(wrong(format!("resample: expected 1, 2 or 3, got {number}"))),
                },
            },
            image_mean: numbers("image_mean")?,
            image_std: numbers("image_std")?,
        };
        if processor.size.contains(&0) {
            return Err(wrong("expected a size above 0".into()));
        }
        Ok(processor)
    }

    /// Reads the file of a folder.
    ///
    /// # Errors
    /// When it can't be read, or a value does not fit.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::from_json(&read_json(&folder.join(PREPROCESSOR_CONFIG))?)
    }

    /// Pixels `[3, H, W]`, normalised.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn process(&self, picture: &Picture, device: &Device) -> Result<Tensor> {
        let [height, width] = self.size;
        normalised(&resize(picture, width, height, self.resample), self.image_mean, self.image_std, device)
    }
}

/// transformers' `CLIPImageProcessor`: the shorter side becomes a length, and the middle is cut out.
#[derive(Clone, PartialEq, Debug)]
pub struct CLIPImageProcessor {
    /// The shorter side in pixels.
    pub shortest_edge: usize,
    /// Sides of what is cut out.
    pub crop_size: usize,
    /// Means of red, green and blue.
    pub image_mean: [f32; 3],
    /// Their standard deviations.
    pub image_std: [f32; 3],
}

impl CLIPImageProcessor {
    /// From the object of `preprocessor_config.json`, where sizes are numbers or objects; other keys are passed over.
    ///
    /// # Errors
    /// When a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        let wrong = |what: &str| Error::Open { name: PREPROCESSOR_CONFIG.into(), what: what.into() };
        let size = |key: &str, edge: &str| {
            let sides = [&value[key], &value[key][edge]].into_iter().find_map(Value::as_u64);
            sides.map_or(224, |side| side as usize)
        };
        let usual = Qwen2VLImageProcessor::default();
        let numbers = |key: &str, usual: [f32; 3]| match &value[key] {
            Value::Null => Ok(usual),
            given => <[f32; 3]>::deserialize(given).map_err(|error| wrong(&format!("{key}: {error}"))),
        };
        let processor = Self {
            shortest_edge: size("size", "shortest_edge"),
            crop_size: size("crop_size", "height"),
            image_mean: numbers("image_mean", usual.image_mean)?,
            image_std: numbers("image_std", usual.image_std)?,
        };
        if processor.crop_size == 0 || processor.crop_size > processor.shortest_edge {
            return Err(wrong("expected a crop_size above 0 and not above the shortest edge"));
        }
        Ok(processor)
    }

    /// Reads the file of a folder.
    ///
    /// # Errors
    /// When it can't be read, or a value does not fit.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::from_json(&read_json(&folder.join(PREPROCESSOR_CONFIG))?)
    }

    /// Pixels `[3, S, S]`, normalised, with S the `crop_size`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn process(&self, picture: &Picture, device: &Device) -> Result<Tensor> {
        let (short, long) = (picture.width.min(picture.height).max(1), picture.width.max(picture.height));
        let longest = self.shortest_edge * long / short;
        let (width, height) = match picture.width <= picture.height {
            true => (self.shortest_edge, longest),
            false => (longest, self.shortest_edge),
        };
        let resized = resize(picture, width, height, Filter::Bicubic);
        normalised(&center_crop(&resized, self.crop_size, self.crop_size), self.image_mean, self.image_std, device)
    }
}
