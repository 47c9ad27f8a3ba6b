//! Autoencoders between pixels and latents, with diffusers' names, keys and `config.json`.
//!
//! | file | what it holds |
//! |---|---|
//! | `blocks` | the encoder and decoder of pictures |
//! | `video` | what the autoencoders of clips share |
//! | `pieces` | clips piece by piece, with what is remembered of the frames before |
//! | `rows` | what is made some rows at a time |
//! | `tiling` | pictures in tiles, and clips in parts, that are blended |
//! | `autoencoder_kl` | [`AutoencoderKL`]: FLUX.1, Z-Image |
//! | `autoencoder_kl_flux2` | [`AutoencoderKLFlux2`]: FLUX.2 |
//! | `hunyuan_video` | [`AutoencoderKLHunyuanVideo15`]: HunyuanVideo 1.5 |
//! | `ltx2_audio` | [`AutoencoderKLLTX2Audio`]: the sound of LTX-2 |
//! | `ltx2_video` | [`AutoencoderKLLTX2Video`]: the pictures of LTX-2 |
//! | `mel` | [`MelSpectrogram`]: from sound waves to what LTX-2's audio autoencoder takes |
//! | `vocoder` | [`Vocoder`]: from LTX-2's decoded spectrograms to sound waves |
//! | `wan` | [`AutoencoderKLWan`]: Wan 2.1 and 2.2, Qwen-Image |
//!
//! They are frozen when they are loaded: what they make is on no tape.

mod autoencoder_kl;
mod autoencoder_kl_flux2;
mod blocks;
mod hunyuan_video;
mod ltx2_audio;
mod ltx2_video;
mod mel;
mod pieces;
mod rows;
mod tiling;
mod video;
mod vocoder;
mod wan;

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use flowtape_engine::nn::{ParamBuilder, Params, Placement};
use flowtape_engine::ops::pointwise;
use flowtape_engine::{DType, Device, Tensor};
use serde_json::Value;

pub use self::autoencoder_kl::{AutoencoderKL, AutoencoderKLConfig};
pub use self::autoencoder_kl_flux2::{AutoencoderKLFlux2, AutoencoderKLFlux2Config};
pub use self::hunyuan_video::{AutoencoderKLHunyuanVideo15, AutoencoderKLHunyuanVideo15Config};
pub use self::ltx2_audio::{AutoencoderKLLTX2Audio, AutoencoderKLLTX2AudioConfig};
pub use self::ltx2_video::{AutoencoderKLLTX2Video, AutoencoderKLLTX2VideoConfig, Flags, PaddingMode, Scaling};
pub use self::mel::MelSpectrogram;
pub use self::tiling::{FrameTiling, TileSizes, Tiling};
pub use self::vocoder::{LTX2Vocoder, LTX2VocoderConfig, LTX2VocoderWithBWE, LTX2VocoderWithBWEConfig, Vocoder};
pub use self::wan::{AutoencoderKLQwenImageConfig, AutoencoderKLWan, AutoencoderKLWanConfig};
use crate::checkpoint::{CONFIG, open_weights, read_config};
use crate::config::{Config, read};
use crate::registry::ConfigReader;
use crate::{Error, Result};

/// An autoencoder with parameters of diffusers' names. Pixels are from -1 to 1.
pub trait Autoencoder: Debug + Send + Sync {
    /// All parameters.
    fn params(&self) -> &Params;
    /// The configuration, as `config.json` holds it.
    fn config(&self) -> Value;
    /// What the encoder makes of pixels `[B, C, H, W]` or `[B, C, F, H, W]`, or of sound (logarithms of a mel spectrogram,
    /// `[B, C, T, M]`).
    ///
    /// # Errors
    /// When the sizes do not fit.
    fn encode(&self, pixels: &Tensor) -> Result<Posterior>;
    /// Pixels of latents as the encoder makes them.
    ///
    /// # Errors
    /// When the sizes do not fit.
    fn decode(&self, latents: &Tensor) -> Result<Tensor>;
    /// Latents as transformers see them, of those that the encoder makes.
    ///
    /// # Errors
    /// When the sizes do not fit.
    fn normalise(&self, latents: &Tensor) -> Result<Tensor>;
    /// The other way.
    ///
    /// # Errors
    /// When the sizes do not fit.
    fn denormalise(&self, latents: &Tensor) -> Result<Tensor>;
    /// Whether pixels and latents have an axis of frames.
    fn has_frames(&self) -> bool {
        false
    }
    /// Sizes of normalised latents for pixels of these sizes, with or without the axis of samples.
    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize>;
    /// Whether what is larger than a tile is taken tile by tile. The results are near those without tiles, not the same.
    ///
    /// # Errors
    /// When a tile is smaller than a latent.
    fn set_tiling(&mut self, tiling: Option<Tiling>) -> Result<()>;
    /// Whether clips of more frames than a part are taken part by part. It has no effect where frames pass one after the other anyway, so
    /// that memory does not grow with them.
    ///
    /// # Errors
    /// When a part is no multiple of a latent's frames.
    fn set_frame_tiling(&mut self, tiling: Option<FrameTiling>) -> Result<()> {
        let _ = tiling;
        Ok(())
    }
    /// Whether a key of a checkpoint is of no use to the autoencoder and may be there.
    fn is_ignored_key(&self, key: &str) -> bool {
        let _ = key;
        false
    }
}

/// What an encoder says of latents: independent normal distributions.
#[derive(Clone, Debug)]
pub struct Posterior {
    /// What is most likely.
    pub mean: Tensor,
    /// The logarithm of the variance, from -30 to 20.
    pub logvar: Tensor,
}

impl Posterior {
    /// From moments `[B, 2 C, ..]`: means, then logarithms of variances.
    fn of(moments: &Tensor) -> Result<Self> {
        let parts = moments.chunk(2, 1)?;
        let logvar = pointwise([&parts[1]], |[v]| v.maximum(-30.0).minimum(20.0))?;
        Ok(Self { mean: parts[0].clone(), logvar })
    }

    /// `mean + exp(logvar / 2) noise`, with standard normal noise of the mean's dims.
    ///
    /// # Errors
    /// When the noise has other dims.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        if noise.dims() != self.mean.dims() {
            let expected = format!("{:?}", self.mean.dims());
            return Err(flowtape_engine::Error::shape("sample", expected, noise.dims()).into());
        }
        Ok(pointwise([&self.mean, &self.logvar, noise], |[m, v, n]| m + (v * 0.5).exp() * n)?)
    }
}

/// Checks that pixels have so many axes and channels, and whole latents.
fn check_pixels(pixels: &Tensor, rank: usize, channels: usize, ratio: usize) -> Result<()> {
    let dims = pixels.dims();
    let whole = |size: &usize| *size > 0 && size.is_multiple_of(ratio);
    if dims.len() == rank && dims[1] == channels && dims[rank - 2..].iter().all(whole) {
        return Ok(());
    }
    let frames = if rank == 5 { "F, " } else { "" };
    let expected = format!("pixels [B, {channels}, {frames}H, W] with sides that are multiples of {ratio}");
    Err(flowtape_engine::Error::shape("encode", expected, dims).into())
}

/// Makes an autoencoder from the object of `config.json`.
pub type NewAutoencoder = fn(&Value, &ParamBuilder) -> Result<Box<dyn Autoencoder>>;

/// An autoencoder and how it is made.
#[derive(Debug)]
pub struct AutoencoderKind {
    /// diffusers' class, as in `_class_name` of `config.json`.
    pub class: &'static str,
    /// How its configurations are read.
    pub config: ConfigReader,
    /// Makes it.
    pub new: NewAutoencoder,
}

/// All autoencoders.
pub const AUTOENCODERS: &[AutoencoderKind] = &[
    AutoencoderKind {
        class: AutoencoderKLConfig::CLASS,
        config: ConfigReader::of::<AutoencoderKLConfig>(),
        new: |config, params| Ok(Box::new(AutoencoderKL::new(read(config)?, params)?)),
    },
    AutoencoderKind {
        class: AutoencoderKLFlux2Config::CLASS,
        config: ConfigReader::of::<AutoencoderKLFlux2Config>(),
        new: |config, params| Ok(Box::new(AutoencoderKLFlux2::new(read(config)?, params)?)),
    },
    AutoencoderKind {
        class: AutoencoderKLHunyuanVideo15Config::CLASS,
        config: ConfigReader::of::<AutoencoderKLHunyuanVideo15Config>(),
        new: |config, params| Ok(Box::new(AutoencoderKLHunyuanVideo15::new(read(config)?, params)?)),
    },
    AutoencoderKind {
        class: AutoencoderKLLTX2AudioConfig::CLASS,
        config: ConfigReader::of::<AutoencoderKLLTX2AudioConfig>(),
        new: |config, params| Ok(Box::new(AutoencoderKLLTX2Audio::new(read(config)?, params)?)),
    },
    AutoencoderKind {
        class: AutoencoderKLLTX2VideoConfig::CLASS,
        config: ConfigReader::of::<AutoencoderKLLTX2VideoConfig>(),
        new: |config, params| Ok(Box::new(AutoencoderKLLTX2Video::new(read(config)?, params)?)),
    },
    AutoencoderKind {
        class: AutoencoderKLQwenImageConfig::CLASS,
        config: ConfigReader::of::<AutoencoderKLQwenImageConfig>(),
        new: |config, params| Ok(Box::new(AutoencoderKLWan::of_qwen_image(&read(config)?, params)?)),
    },
    AutoencoderKind {
        class: AutoencoderKLWanConfig::CLASS,
        config: ConfigReader::of::<AutoencoderKLWanConfig>(),
        new: |config, params| Ok(Box::new(AutoencoderKLWan::new(read(config)?, params)?)),
    },
];

impl AutoencoderKind {
    /// The autoencoder of one of diffusers' classes.
    ///
    /// # Errors
    /// When there is none, with the known ones.
    pub fn of_class(class: &str) -> Result<&'static Self> {
        AUTOENCODERS.iter().find(|kind| kind.class == class).ok_or_else(|| {
            let known: Vec<&str> = AUTOENCODERS.iter().map(|kind| kind.class).collect();
            Error::config("_class_name", format!("an autoencoder: {}", known.join(", ")), class)
        })
    }
}

/// The configuration of a folder's autoencoder, complete and checked.
///
/// # Errors
/// When it can't be read, its class is unknown, or a value does not fit.
pub fn load_config(folder: &Path) -> Result<Value> {
    read_config(&folder.join(CONFIG), |class| Ok(AutoencoderKind::of_class(class)?.config))
}

/// Loads an autoencoder from a folder of diffusers', in `dtype` or, where none is given, in that of its first weights. These are read when
/// they are first used: who only encodes has no decoder in memory.
///
/// # Errors
/// When a file can't be read, the class is unknown, or keys do not fit (one error names the class and counts them).
pub fn load(folder: &Path, dtype: Option<DType>, device: &Device) -> Result<Box<dyn Autoencoder>> {
    let config = load_config(folder)?;
    let class = config["_class_name"].as_str().unwrap_or_default();
    let weights = Arc::new(open_weights(folder)?);
    let stored = weights.names().find_map(|name| match weights.dtype_name(name)?.as_str() {
        "F32" => Some(DType::F32),
        "F16" => Some(DType::F16),
        "BF16" => Some(DType::BF16),
        _ => None,
    });
    let dtype = dtype.or(stored).unwrap_or(DType::F32);
    let params = ParamBuilder::with_plan(0, Placement::frozen(dtype), device).reading(weights.clone()).lazy();
    let model = (AutoencoderKind::of_class(class)?.new)(&config, &params)?;
    model
        .params()
        .check_keys(&weights, |name| model.is_ignored_key(name))
        .map_err(|error| Error::Model { model: class.to_owned(), source: Box::new(error) })?;
    Ok(model)
}
