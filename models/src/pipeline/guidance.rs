//! How predictions are led away from others.

use flowtape_engine::ops::pointwise;
use flowtape_engine::{DType, Error as EngineError, Tensor};

use crate::Result;

/// How a film with sound is led; of pairs the first is the film's, the second the sound's. The defaults are those of `LTX2Pipeline`.
#[derive(Clone, PartialEq, Debug)]
pub struct SoundGuidance {
    /// The scale of classifier-free guidance of the sound.
    pub audio_guidance_scale: f64,
    /// Scales of spatio-temporal guidance, away from a run in which tokens of some blocks see themselves alone; 0 is none.
    pub stg_scale: [f64; 2],
    /// Those blocks.
    pub stg_blocks: Vec<u32>,
    /// Scales of guidance away from a run in which film and sound do not see each other; 1 is none.
    pub modality_scale: [f64; 2],
    /// How far guided predictions get back the standard deviation of the conditional one (Lin et al. 2024): 0 is not at all.
    pub guidance_rescale: [f64; 2],
}

impl Default for SoundGuidance {
    fn default() -> Self {
        Self {
            audio_guidance_scale: 7.0,
            stg_scale: [1.0; 2],
            stg_blocks: vec![28],
            modality_scale: [3.0; 2],
            guidance_rescale: [0.7; 2],
        }
    }
}

/// A guided velocity whose prediction of the data `x - σ v` gets back, as far as `rescale` says, the standard deviation of the
/// conditional one: sample by sample.
pub(super) fn rescaled(guided: &Tensor, conditional: &Tensor, x: &Tensor, sigma: f64, rescale: f64) -> Result<Tensor> {
    if rescale == 0.0 {
        return Ok(guided.clone());
    }
    let x = x.to_dtype(DType::F32)?;
    let data = |v: &Tensor| x.sub(&v.to_dtype(DType::F32)?.mul_scalar(sigma)?);
    let (guided_data, conditional_data) = (data(guided)?, data(conditional)?);
    let deviations = |x: &Tensor| -> Result<Vec<f64>> {
        let values = x.to_vec::<f64>()?;
        let rows = values.chunks((values.len() / x.dim(0)?.max(1)).max(1));
        Ok(rows.map(standard_deviation).collect())
    };
    let pairs = deviations(&conditional_data)?.into_iter().zip(deviations(&guided_data)?);
    let factors: Vec<f32> = pairs.map(|(to, from)| (rescale * to / from + 1.0 - rescale) as f32).collect();
    let dims: Vec<usize> = std::iter::once(factors.len()).chain(vec![1; x.rank() - 1]).collect();
    let factors = Tensor::from_vec(factors, &dims, x.device())?;
    let velocity = pointwise([&x, &guided_data, &factors], |[x, data, factor]| (x - data * factor) * (1.0 / sigma))?;
    Ok(velocity.to_dtype(guided.dtype())?)
}

/// As PyTorch's `std`, of a sample.
fn standard_deviation(values: &[f64]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0)).sqrt()
}

/// Which lengths a guided prediction gets back from the conditional one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeepsNorm {
    /// None.
    No,
    /// Of the channels of each token, which is 2 x 2 latents (Qwen-Image).
    OfToken,
    /// Of each row of each channel (Lumina-Image 2.0).
    OfRow,
}

/// `x |y| / |x|`, of latents `[B, C, H, W]`; x where no lengths stay.
pub(super) fn with_norm_of(x: &Tensor, y: &Tensor, which: KeepsNorm) -> Result<Tensor> {
    if which == KeepsNorm::No {
        return Ok(x.clone());
    }
    let &[batch, channels, height, width] = x.dims() else {
        return Err(EngineError::shape("guidance", "latents [B, C, H, W]", x.dims()).into());
    };
    let (cells, axes): (&[usize], &[usize]) = match which {
        KeepsNorm::OfToken => (&[batch, channels, height / 2, 2, width / 2, 2], &[1, 3, 5]),
        KeepsNorm::No | KeepsNorm::OfRow => (&[batch, channels, height, width], &[3]),
    };
    let (x, y) = (x.to_dtype(DType::F32)?.reshape(cells)?, y.to_dtype(DType::F32)?.reshape(cells)?);
    let squares = |x: &Tensor| x.square()?.sum(axes, true);
    let scaled = pointwise([&x, &squares(&y)?, &squares(&x)?], |[x, of_y, of_x]| x * (of_y / of_x).sqrt())?;
    Ok(scaled.reshape(&[batch, channels, height, width])?)
}
