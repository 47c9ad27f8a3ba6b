//! Pictures as pipelines go by them.

use std::path::Path;

use flowtape_engine::Device;
use flowtape_models::pipeline::{ConditionImage, Pictures, PipelineFolder, SeenImage};

use super::processor::read_json;
use super::{
    CLIPImageProcessor, Filter, Picture, Qwen2VLImageProcessor, ResizeMode, SiglipImageProcessor, center_crop, resize,
    resize_to,
};
use crate::{Error, Result};

/// Sides of pictures to edit are multiples of this.
const SIDES: f64 = 32.0;
/// The least side of a reference image, and the most that one side is longer than the other: diffusers' `Flux2ImageProcessor`.
const LEAST_SIDE: usize = 64;
/// HunyuanVideo 1.5's `target_size` where its transformer does not say it, and the most that is looked for.
const TARGET_SIZE: usize = 640;
const MOST_TARGET: usize = 4096;
const MOST_RATIO: usize = 8;

/// Width and height of about so many pixels in a picture's shape, in multiples of 32: diffusers' `calculate_dimensions`.
pub fn sides_of_area(area: usize, width: usize, height: usize) -> [usize; 2] {
    let ratio = width as f64 / height.max(1) as f64;
    let wide = (area as f64 * ratio).sqrt();
    [wide, wide / ratio].map(|side| ((side / SIDES).round_ties_even() * SIDES) as usize)
}

/// Height and width nearest to a picture's shape among those of at most as many patches as a square of `target` pixels has, none four
/// times as long as wide: `calculate_default_height_width` of diffusers' `HunyuanVideo15ImageProcessor`.
pub fn sides_of_patches(target: usize, patch: usize, [height, width]: [usize; 2]) -> [usize; 2] {
    const MOST_RATIO: usize = 4;
    let ratio = |height: usize, width: usize| height as f64 / width.max(1) as f64;
    let wanted = ratio(height, width);
    let patches = ((target as f64 / patch as f64).powi(2)).round_ties_even() as usize;
    let (mut rows, mut columns) = (patches, 1);
    let mut nearest = ([patch; 2], f64::INFINITY);
    while rows > 0 {
        if rows.max(columns) <= MOST_RATIO * rows.min(columns) {
            // The reference rounds to five places, and takes none that is longer than the picture in its direction.
            let off = (ratio(rows, columns) * 1e5).round_ties_even() / 1e5 - wanted;
            let inside = if wanted >= 1.0 { off <= 0.0 } else { off >= 0.0 };
            if inside && off.abs() < nearest.1 {
                nearest = ([rows * patch, columns * patch], off.abs());
            }
        }
        if (columns + 1) * rows <= patches {
            columns += 1;
        } else {
            rows -= 1;
        }
    }
    nearest.0
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
    let (values, grid) = processor.process(&at(areas.condition), device)?;
    Ok(ConditionImage { pixels: at(areas.vae).pixels(device)?, seen: Some(SeenImage { values, grid }) })
}

/// How a pipeline's pictures are made ready.
#[derive(Clone, Debug)]
pub struct ConditionProcessor {
    way: Way,
    /// Pixels that a picture is given, unless a size is asked for.
    areas: EditAreas,
}

#[derive(Clone, Debug)]
enum Way {
    /// For a text encoder and an autoencoder.
    Seen(Qwen2VLImageProcessor),
    /// For an autoencoder alone; sides are multiples of this.
    References(usize),
    /// Frames of a film, perhaps for a model that sees them, too.
    Frames(Option<CLIPImageProcessor>),
    /// The first frame of a film, for a model that sees it as the film has it.
    FirstFrame {
        processor: SiglipImageProcessor,
        /// Pixels a side of a square film.
        target: usize,
        /// Sides are multiples of this.
        patch: usize,
    },
}

impl ConditionProcessor {
    /// Reads what a pipeline's folder says of it.
    ///
    /// # Errors
    /// When the pipeline takes no pictures, or a part is missing or broken.
    pub fn load(folder: &PipelineFolder) -> Result<Self> {
        let kind = folder.kind()?;
        let usual = EditAreas::default();
        let (way, areas) = match kind.pictures {
            None => {
                let what = format!("{} goes by words alone: leave the pictures out", folder.class());
                return Err(Error::Open { name: folder.path().display().to_string(), what });
            }
            Some(Pictures::Seen) => (Way::Seen(Qwen2VLImageProcessor::load(&folder.part("processor")?)?), usual),
            Some(Pictures::References) => (Way::References(token_side(&folder.part("vae")?)?), usual),
            Some(Pictures::Frames) => {
                let seen = folder.has("image_encoder").then(|| folder.part("image_processor")).transpose()?;
                let seen = seen.map(|part| CLIPImageProcessor::load(&part)).transpose()?;
                let vae = kind.generation.size.iter().product();
                (Way::Frames(seen), EditAreas { vae, ..usual })
            }
            Some(Pictures::FirstFrame) => {
                // The transformer's weights need not be there where data is encoded.
                let transformer = folder.has("transformer").then(|| folder.part("transformer")).transpose();
                let of = |part: &Path, key: &str| -> Result<Option<usize>> {
                    Ok(read_json(&part.join("config.json"))?[key].as_u64().map(|size| size as usize))
                };
                let target = transformer.ok().flatten().map(|part| of(&part, "target_size")).transpose()?.flatten();
                let patch = of(&folder.part("vae")?, "spatial_compression_ratio")?;
                let way = Way::FirstFrame {
                    processor: SiglipImageProcessor::load(&folder.part("feature_extractor")?)?,
                    target: target.unwrap_or(TARGET_SIZE).min(MOST_TARGET),
                    patch: patch.unwrap_or(16).max(1),
                };
                (way, usual)
            }
        };
        Ok(Self { way, areas })
    }

    /// With at most so many pixels for the autoencoder.
    #[must_use]
    pub fn with_most_pixels(mut self, pixels: usize) -> Self {
        self.areas.vae = self.areas.vae.min(pixels);
        self
    }

    /// A picture as the pipeline takes it. `size` are the height and width of a film; where none are asked for, those of the picture's
    /// shape with the pipeline's number of pixels.
    ///
    /// # Errors
    /// When the picture is too small or too long, or memory runs out.
    pub fn process(&self, picture: &Picture, size: Option<[usize; 2]>, device: &Device) -> Result<ConditionImage> {
        match &self.way {
            Way::Seen(processor) => condition_image(picture, processor, self.areas, device),
            Way::References(multiple) => {
                let fitted = self.reference(picture, *multiple)?;
                Ok(ConditionImage { pixels: fitted.pixels(device)?, seen: None })
            }
            Way::Frames(processor) => {
                let [height, width] = size.unwrap_or_else(|| {
                    let [width, height] = sides_of_area(self.areas.vae, picture.width, picture.height);
                    [height.max(SIDES as usize), width.max(SIDES as usize)]
                });
                let pixels = resize_to(picture, width, height, ResizeMode::Default).pixels(device)?;
                let seen = processor.as_ref().map(|processor| processor.process(picture, device)).transpose()?;
                Ok(ConditionImage { pixels, seen: seen.map(|values| SeenImage { values, grid: [1; 3] }) })
            }
            Way::FirstFrame { processor, target, patch } => {
                let sides = || sides_of_patches(*target, *patch, [picture.height, picture.width]);
                let [height, width] = size.unwrap_or_else(sides);
                let frame = resize_to(picture, width, height, ResizeMode::Crop);
                let values = processor.process(&frame, device)?;
                Ok(ConditionImage { pixels: frame.pixels(device)?, seen: Some(SeenImage { values, grid: [1; 3] }) })
            }
        }
    }

    /// All pictures of a request; those of a film have the first one's size where none is asked for.
    ///
    /// # Errors
    /// Those of [`Self::process`].
    pub fn process_all(
        &self,
        pictures: &[Picture],
        size: Option<[usize; 2]>,
        device: &Device,
    ) -> Result<Vec<ConditionImage>> {
        let mut all: Vec<ConditionImage> = Vec::with_capacity(pictures.len());
        for picture in pictures {
            let size = size.or_else(|| all.first()?.pixels.dims().last_chunk().copied());
            all.push(self.process(picture, size, device)?);
        }
        Ok(all)
    }

    /// As `Flux2KleinPipeline` takes a reference image: made smaller where it is too large, then cut to whole tokens.
    fn reference(&self, picture: &Picture, multiple: usize) -> Result<Picture> {
        let (width, height) = (picture.width, picture.height);
        let least = LEAST_SIDE.max(multiple);
        if width.min(height) < least || width.max(height) > MOST_RATIO * width.min(height) {
            let expected = format!("sides of at least {least} pixels, none above {MOST_RATIO} times the other");
            return Err(Error::batch("a reference image", expected, format!("{width} x {height}")));
        }
        let scale = (self.areas.vae as f64 / (width * height) as f64).sqrt();
        let smaller = (scale < 1.0).then(|| {
            let scaled = |side: usize| ((side as f64 * scale) as usize).max(multiple);
            resize(picture, scaled(width), scaled(height), Filter::Lanczos)
        });
        let picture = smaller.as_ref().unwrap_or(picture);
        let whole = |side: usize| side / multiple * multiple;
        Ok(center_crop(picture, whole(picture.width), whole(picture.height)))
    }
}

/// Sides in pixels of a token of 2 x 2 latents of an autoencoder of pictures.
fn token_side(vae: &Path) -> Result<usize> {
    let config = read_json(&vae.join("config.json"))?;
    let levels = config["block_out_channels"].as_array().map_or(4, Vec::len);
    Ok(2 << levels.saturating_sub(1).min(8))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What diffusers 0.42.1 says.
    #[test]
    fn the_sides_of_a_film_follow_from_the_shape_of_its_first_frame() {
        for (target, patch, size, sides) in [
            (640, 16, [480, 832], [480, 816]),
            (640, 16, [1080, 1920], [480, 848]),
            (960, 16, [1080, 1920], [720, 1280]),
            (640, 16, [1200, 800], [768, 512]),
            (640, 16, [500, 500], [640, 640]),
            (640, 16, [3000, 200], [1280, 320]),
            (640, 16, [200, 3000], [320, 1280]),
            (64, 8, [66, 100], [48, 72]),
            (100, 24, [333, 222], [96, 72]),
        ] {
            assert_eq!(sides_of_patches(target, patch, size), sides, "{target} {patch} {size:?}");
        }
    }

    #[test]
    fn reference_images_are_cut_to_whole_tokens_and_strange_ones_refused() {
        let processor =
            ConditionProcessor { way: Way::References(16), areas: EditAreas { condition: 1, vae: 100 * 100 } };
        let sizes = |width, height| {
            let made = processor.process(&Picture::new(width, height), None, &Device::cpu());
            made.map(|image| image.pixels.dims().to_vec())
        };
        // 99 x 101 has too few pixels to be made smaller; of 200 x 100 a half of the pixels is left, 141 x 70.
        assert_eq!(sizes(99, 101).unwrap(), [3, 96, 96]);
        assert_eq!(sizes(200, 100).unwrap(), [3, 64, 128]);
        for (width, height) in [(63, 100), (64, 513)] {
            let error = sizes(width, height).unwrap_err().to_string();
            assert!(error.contains(&format!("{width} x {height}")), "{error}");
        }
    }
}
