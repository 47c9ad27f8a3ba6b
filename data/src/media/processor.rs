//! Pictures as vision encoders and editing pipelines take them.

use std::path::Path;

use flowtape_engine::{Device, Error as EngineError, Tensor};
use flowtape_models::pipeline::ConditionImage;
use serde::Deserialize;
use serde_json::Value;

use super::{Filter, Picture, resize};
use crate::{Error, Result};

/// The file of an image processor's settings.
pub const PREPROCESSOR_CONFIG: &str = "preprocessor_config.json";

/// Sides of pictures to edit are multiples of this.
const SIDES: f64 = 32.0;

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
        let path = folder.join(PREPROCESSOR_CONFIG);
        let text = std::fs::read(&path).map_err(|source| EngineError::Io { path: path.clone(), source })?;
        let wrong = |error: serde_json::Error| EngineError::Format { path: path.clone(), what: error.to_string() };
        Self::from_json(&serde_json::from_slice(&text).map_err(wrong)?)
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

/// Width and height of about so many pixels in a picture's shape, in multiples of 32: diffusers' `calculate_dimensions`.
pub fn sides_of_area(area: usize, width: usize, height: usize) -> [usize; 2] {
    let ratio = width as f64 / height.max(1) as f64;
    let wide = (area as f64 * ratio).sqrt();
    [wide, wide / ratio].map(|side| ((side / SIDES).round_ties_even() * SIDES) as usize)
}

/// Pixels that an editing pipeline gives to a picture: for its text encoder, and for its autoencoder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EditAreas {
    /// For the text encoder.
    pub condition: usize,
    /// For the autoencoder.
    pub vae: usize,
}

impl Default for EditAreas {
    /// Those of `QwenImageEditPlusPipeline`.
    fn default() -> Self {
        Self { condition: 384 * 384, vae: 1024 * 1024 }
    }
}

/// A picture to edit, as `QwenImageEditPlusPipeline` takes it.
///
/// # Errors
/// When memory runs out.
pub fn condition_image(
    picture: &Picture,
    processor: &Qwen2VLImageProcessor,
    areas: EditAreas,
    device: &Device,
) -> Result<ConditionImage> {
    let at = |area| {
        let [width, height] = sides_of_area(area, picture.width, picture.height).map(|side| side.max(SIDES as usize));
        resize(picture, width, height, Filter::Lanczos)
    };
    let (patches, grid) = processor.process(&at(areas.condition), device)?;
    Ok(ConditionImage { pixels: at(areas.vae).pixels(device)?, patches, grid })
}
