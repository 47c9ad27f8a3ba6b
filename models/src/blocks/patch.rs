//! Patches of latents as tokens, and back.

use flowtape_engine::nn::{Init, Param, ParamBuilder};
use flowtape_engine::ops::{patchify, patchify_conv};
use flowtape_engine::{Error, Result, Tensor};

/// A convolution whose stride is its kernel; parameters `weight` `[out, C, k..]` and `bias` `[out]`.
#[derive(Clone, Debug)]
pub struct PatchEmbed {
    weight: Param,
    bias: Param,
}

impl PatchEmbed {
    /// `channels` to `width`, uniform in +-1/sqrt(fan in), as PyTorch starts it.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, channels: usize, width: usize, patch: &[usize]) -> Result<Self> {
        let fan_in = channels * patch.iter().product::<usize>();
        let init = Init::Uniform { bound: 1.0 / (fan_in as f64).sqrt() };
        let weight = params.get("weight", &[&[width, channels], patch].concat(), init)?;
        Ok(Self { weight, bias: params.get("bias", &[width], init)? })
    }

    /// Latents `[B, C, s..]` to tokens `[B, L, width]`.
    ///
    /// # Errors
    /// When a side is no multiple of the patch.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        patchify_conv(latents, &self.weight.value()?, Some(&self.bias.value()?))
    }
}

/// Where a token's channels lie among the places of its patch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChannelOrder {
    /// `(places, channel)`: Wan, Z-Image.
    Fastest,
    /// `(channel, places)`: FLUX, Qwen-Image, HunyuanVideo.
    Slowest,
}

/// Latents `[B, C, s..]` to tokens `[B, L, C p..]`, the grid's last axis fastest: the inverse of [`unpatchify`].
///
/// # Errors
/// When a side is no multiple of the patch.
pub fn patchify_as(latents: &Tensor, patch: &[usize], order: ChannelOrder) -> Result<Tensor> {
    let tokens = patchify(latents, patch)?;
    let (batch, len, width) = (tokens.dim(0)?, tokens.dim(1)?, tokens.dim(2)?);
    match order {
        ChannelOrder::Slowest => Ok(tokens),
        ChannelOrder::Fastest => {
            let places = patch.iter().product::<usize>();
            let apart = tokens.reshape(&[batch, len, width / places, places])?;
            apart.transpose(2, 3)?.reshape(&[batch, len, width])
        }
    }
}

/// Tokens `[B, L, C p..]` of a grid to latents `[B, C, g p..]`.
///
/// # Errors
/// When the tokens are not those of such a grid and patch.
pub fn unpatchify(tokens: &Tensor, grid: &[usize], patch: &[usize], order: ChannelOrder) -> Result<Tensor> {
    let (n, places) = (grid.len(), patch.iter().product::<usize>());
    let &[batch, _, width] = tokens.dims() else {
        return Err(Error::shape("unpatchify", "tokens [B, L, C p..]", tokens.dims()));
    };
    let channels = width / places.max(1);
    // [B, g.., p.., C] or [B, g.., C, p..] -> [B, C, g0, p0, g1, p1, ..]
    let (channel, place) = match order {
        ChannelOrder::Fastest => (1 + 2 * n, 1 + n),
        ChannelOrder::Slowest => (1 + n, 2 + n),
    };
    let inner = match order {
        ChannelOrder::Fastest => [patch, &[channels]].concat(),
        ChannelOrder::Slowest => [&[channels], patch].concat(),
    };
    let axes: Vec<usize> = [0, channel].into_iter().chain((0..n).flat_map(|i| [1 + i, place + i])).collect();
    let sides = grid.iter().zip(patch).map(|(g, p)| g * p);
    let dims: Vec<usize> = [batch, channels].into_iter().chain(sides).collect();
    tokens.reshape(&[&[batch], grid, &inner[..]].concat())?.permute(&axes)?.reshape(&dims)
}
