//! Pictures that a pipeline goes by beside the prompt.

use flowtape_engine::{Device, Tensor};

use crate::vae::Autoencoder;
use crate::vision::qwen25_vl::Grid;
use crate::{Condition, Error, Result};

/// The part that sees given frames.
pub(super) const IMAGE_ENCODER: &str = "image_encoder";

/// What a pipeline makes of pictures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pictures {
    /// It edits them, and its text encoder sees them among the words (Qwen-Image-Edit).
    Seen,
    /// It edits them, each in its own size (FLUX.2).
    References,
    /// They are the first frame of a film, or the first and the last (Wan).
    Frames,
    /// One is the first frame of a film, which there is none without; a vision encoder sees it as the film has it (HunyuanVideo 1.5).
    FirstFrame,
}

/// A picture that a pipeline goes by.
#[derive(Clone, Debug)]
pub struct ConditionImage {
    /// `[3, H, W]` from -1 to 1, for the autoencoder.
    pub pixels: Tensor,
    /// For a model that sees pictures, where the pipeline has one.
    pub seen: Option<SeenImage>,
}

/// A picture as a model takes it that sees pictures.
#[derive(Clone, Debug)]
pub struct SeenImage {
    /// Flattened patches `[N, C T P P]`, or pixels `[C, S, S]` for a model of one size.
    pub values: Tensor,
    /// How many patches there are along frames, rows and columns; of pixels `[1, 1, 1]`.
    pub grid: Grid,
}

impl Pictures {
    /// As what a model takes them. A model for which a first frame is no more than one of its own latent frames does without.
    pub fn condition(self) -> Condition {
        match self {
            Self::Seen | Self::References => Condition::ReferenceImages,
            Self::Frames => Condition::GivenFrames,
            Self::FirstFrame => Condition::FirstFrame,
        }
    }

    /// Height and width of what is made where none are asked for.
    pub(super) fn size(self, images: &[ConditionImage]) -> Option<[usize; 2]> {
        let image = if self == Self::Seen { images.last() } else { images.first() };
        image?.pixels.dims().last_chunk().copied()
    }
}

/// Normalised latents `[1, C, h, w]` of each picture, of what is most likely for it.
///
/// # Errors
/// When sizes do not fit, or memory runs out.
pub fn reference_latents(vae: &dyn Autoencoder, images: &[ConditionImage], device: &Device) -> Result<Vec<Tensor>> {
    let one = |image: &ConditionImage| -> Result<Tensor> {
        let pixels = image.pixels.to_device(device)?.unsqueeze(0)?;
        let pixels = if vae.has_frames() { pixels.unsqueeze(2)? } else { pixels };
        let latents = vae.normalise(&vae.encode(&pixels)?.mean)?;
        Ok(if vae.has_frames() { latents.squeeze(2)? } else { latents })
    };
    images.iter().map(one).collect()
}

/// Normalised latents `[1, C, f, h, w]` of a film of so many frames of which the first, or the first and the last, is there; the
/// others are mid grey.
///
/// # Errors
/// When there are no pictures, more than two or too many for the frames, sizes do not fit, or memory runs out.
pub fn given_frames(
    vae: &dyn Autoencoder,
    images: &[ConditionImage],
    frames: usize,
    device: &Device,
) -> Result<Tensor> {
    let expected = "the first frame of the film, or the first and the last";
    let (first, last) = match images {
        [first] => (first, None),
        [first, last] if frames > 1 => (first, Some(last)),
        _ => return Err(Error::config("image", expected, format!("{} of {frames} frames", images.len()))),
    };
    let frame = |image: &ConditionImage| image.pixels.to_device(device)?.unsqueeze(1);
    let mut film = vec![frame(first)?];
    let between = frames - images.len();
    if between > 0 {
        let mut dims = film[0].dims().to_vec();
        dims[1] = between;
        film.push(Tensor::zeros(&dims, film[0].dtype(), device)?);
    }
    film.extend(last.map(frame).transpose()?);
    let film = Tensor::cat(&film.iter().collect::<Vec<_>>(), 1)?.unsqueeze(0)?;
    vae.normalise(&vae.encode(&film)?.mean)
}
