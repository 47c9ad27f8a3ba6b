//! The encoder and decoder of pictures that AutoencoderKL's family shares (Rombach et al. 2022), by diffusers' names.

use flowtape_engine::nn::{Conv, GroupNorm, Linear, ParamBuilder};
use flowtape_engine::ops::{ConvAxis, attention};
use flowtape_engine::{Result as EngineResult, Tensor};
use serde::{Deserialize, Serialize};

use super::rows::{conv_rows, norm_conv, over_rows, upsampled};
use crate::config::{check_layers, check_sizes};
use crate::{Error, Result};

/// Added to variances.
const EPS: f64 = 1e-6;

/// A convolution of odd kernel that keeps the size of a picture.
pub(super) fn conv2d(params: &ParamBuilder, inputs: usize, outputs: usize, kernel: usize) -> EngineResult<Conv> {
    Conv::new(params, inputs, outputs, &[(kernel, ConvAxis::same(kernel)); 2])
}

/// A picture `[B, C, H, W]` as tokens `[B, H W, C]`.
pub(super) fn tokens(x: &Tensor) -> EngineResult<Tensor> {
    x.permute(&[0, 2, 3, 1])?.flatten(1, 2)
}

/// Tokens as a picture of these dims.
pub(super) fn picture(tokens: &Tensor, dims: &[usize]) -> EngineResult<Tensor> {
    tokens.reshape(&[dims[0], dims[2], dims[3], tokens.dims()[2]])?.permute(&[0, 3, 1, 2])
}

/// Norm, SiLU and convolution, twice, beside a shortcut.
#[derive(Debug)]
struct ResnetBlock2D {
    norm1: GroupNorm,
    conv1: Conv,
    norm2: GroupNorm,
    conv2: Conv,
    conv_shortcut: Option<Conv>,
}

impl ResnetBlock2D {
    fn new(params: &ParamBuilder, inputs: usize, outputs: usize, groups: usize) -> EngineResult<Self> {
        let shortcut = || conv2d(&params.sub("conv_shortcut"), inputs, outputs, 1);
        Ok(Self {
            norm1: GroupNorm::new(&params.sub("norm1"), groups, inputs, EPS)?,
            conv1: conv2d(&params.sub("conv1"), inputs, outputs, 3)?,
            norm2: GroupNorm::new(&params.sub("norm2"), groups, outputs, EPS)?,
            conv2: conv2d(&params.sub("conv2"), outputs, outputs, 3)?,
            conv_shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }

    fn forward(&self, x: Tensor) -> EngineResult<Tensor> {
        let h = norm_conv(&self.norm1, &self.conv1, &x)?;
        let norm = self.norm2.silu_of(&h)?;
        over_rows(x, |x, rows| {
            let h = conv_rows(&self.conv2, &h, rows, &norm)?;
            match &self.conv_shortcut {
                Some(shortcut) => shortcut.forward(x)?.add(&h),
                None => x.add(&h),
            }
        })
    }
}

/// Attention over all places, with one head of all channels.
#[derive(Debug)]
struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    fn new(params: &ParamBuilder, channels: usize, groups: usize) -> EngineResult<Self> {
        let linear = |name: &str| Linear::new(&params.sub(name), channels, channels, true);
        Ok(Self {
            group_norm: GroupNorm::new(&params.sub("group_norm"), groups, channels, EPS)?,
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: linear("to_out.0")?,
        })
    }

    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let h = tokens(&self.group_norm.forward(x)?)?;
        let head = |linear: &Linear| linear.forward(&h)?.unsqueeze(1);
        let (q, k, v) = (head(&self.to_q)?, head(&self.to_k)?, head(&self.to_v)?);
        let h = attention(&q, &k, &v, None, None)?.squeeze(1)?;
        x.add(&picture(&self.to_out.forward(&h)?, x.dims())?)
    }
}

/// Residual blocks on both sides of attention.
#[derive(Debug)]
struct MidBlock {
    resnets: [ResnetBlock2D; 2],
    attention: Option<Attention>,
}

impl MidBlock {
    fn new(params: &ParamBuilder, channels: usize, groups: usize, with_attention: bool) -> EngineResult<Self> {
        let resnet = |i: usize| ResnetBlock2D::new(&params.sub("resnets").sub(i), channels, channels, groups);
        let attention = || Attention::new(&params.sub("attentions").sub(0), channels, groups);
        Ok(Self { resnets: [resnet(0)?, resnet(1)?], attention: with_attention.then(attention).transpose()? })
    }

    fn forward(&self, x: Tensor) -> EngineResult<Tensor> {
        let mut x = self.resnets[0].forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.resnets[1].forward(x)
    }
}

/// Residual blocks, then half or twice the size where it is not the last stage.
#[derive(Debug)]
struct Stage {
    resnets: Vec<ResnetBlock2D>,
    resample: Option<Conv>,
}

impl Stage {
    fn resnets(
        params: &ParamBuilder,
        inputs: usize,
        outputs: usize,
        count: usize,
        groups: usize,
    ) -> EngineResult<Vec<ResnetBlock2D>> {
        let resnet = |i: usize| {
            let inputs = if i == 0 { inputs } else { outputs };
            ResnetBlock2D::new(&params.sub("resnets").sub(i), inputs, outputs, groups)
        };
        (0..count).map(resnet).collect()
    }

    fn run(&self, mut x: Tensor) -> EngineResult<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(x)?;
        }
        Ok(x)
    }
}

/// What shapes an encoder and a decoder.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Shape {
    pub in_channels: usize,
    pub out_channels: usize,
    pub latent_channels: usize,
    pub layers_per_block: usize,
    pub groups: usize,
    pub mid_attention: bool,
}

impl Shape {
    /// Checks the sizes, with the channels of each stage.
    pub fn check(&self, key: &'static str, block_out_channels: &[usize]) -> Result<()> {
        check_sizes([
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_channels", self.latent_channels),
            ("norm_num_groups", self.groups),
        ])?;
        check_layers(1, [("layers_per_block", self.layers_per_block)])?;
        for channels in block_out_channels {
            check_sizes([(key, *channels)])?;
        }
        if block_out_channels.is_empty() || block_out_channels.iter().any(|c| c % self.groups != 0) {
            let expected = format!("multiples of norm_num_groups {}", self.groups);
            return Err(Error::config(key, expected, format!("{block_out_channels:?}")));
        }
        Ok(())
    }
}

/// Pixels to moments.
#[derive(Debug)]
pub(super) struct Encoder {
    conv_in: Conv,
    down_blocks: Vec<Stage>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv,
}

impl Encoder {
    pub fn new(params: &ParamBuilder, shape: &Shape, channels: &[usize]) -> EngineResult<Self> {
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let stage = |i: usize| -> EngineResult<Stage> {
            let params = params.sub("down_blocks").sub(i);
            let (inputs, outputs) = (channels[i.saturating_sub(1)], channels[i]);
            let resnets = Stage::resnets(&params, inputs, outputs, shape.layers_per_block, shape.groups)?;
            // One place is added at the right and at the bottom alone.
            let axis = ConvAxis::padded(0, 1).with_stride(2);
            let down = || Conv::new(&params.sub("downsamplers.0.conv"), outputs, outputs, &[(3, axis); 2]);
            Ok(Stage { resnets, resample: (i + 1 < channels.len()).then(down).transpose()? })
        };
        Ok(Self {
            conv_in: conv2d(&params.sub("conv_in"), shape.in_channels, first, 3)?,
            down_blocks: (0..channels.len()).map(stage).collect::<EngineResult<_>>()?,
            mid_block: MidBlock::new(&params.sub("mid_block"), last, shape.groups, shape.mid_attention)?,
            conv_norm_out: GroupNorm::new(&params.sub("conv_norm_out"), shape.groups, last, EPS)?,
            conv_out: conv2d(&params.sub("conv_out"), last, 2 * shape.latent_channels, 3)?,
        })
    }

    pub fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let mut x = self.conv_in.forward(x)?;
        for stage in &self.down_blocks {
            x = stage.run(x)?;
            if let Some(down) = &stage.resample {
                x = down.forward(&x)?;
            }
        }
        norm_conv(&self.conv_norm_out, &self.conv_out, &self.mid_block.forward(x)?)
    }
}

/// Latents to pixels.
#[derive(Debug)]
pub(super) struct Decoder {
    conv_in: Conv,
    mid_block: MidBlock,
    up_blocks: Vec<Stage>,
    conv_norm_out: GroupNorm,
    conv_out: Conv,
}

impl Decoder {
    pub fn new(params: &ParamBuilder, shape: &Shape, channels: &[usize]) -> EngineResult<Self> {
        let reversed: Vec<usize> = channels.iter().rev().copied().collect();
        let (first, last) = (reversed[0], channels[0]);
        let stage = |i: usize| -> EngineResult<Stage> {
            let params = params.sub("up_blocks").sub(i);
            let (inputs, outputs) = (reversed[i.saturating_sub(1)], reversed[i]);
            let resnets = Stage::resnets(&params, inputs, outputs, shape.layers_per_block + 1, shape.groups)?;
            let up = || conv2d(&params.sub("upsamplers.0.conv"), outputs, outputs, 3);
            Ok(Stage { resnets, resample: (i + 1 < reversed.len()).then(up).transpose()? })
        };
        Ok(Self {
            conv_in: conv2d(&params.sub("conv_in"), shape.latent_channels, first, 3)?,
            mid_block: MidBlock::new(&params.sub("mid_block"), first, shape.groups, shape.mid_attention)?,
            up_blocks: (0..reversed.len()).map(stage).collect::<EngineResult<_>>()?,
            conv_norm_out: GroupNorm::new(&params.sub("conv_norm_out"), shape.groups, last, EPS)?,
            conv_out: conv2d(&params.sub("conv_out"), last, shape.out_channels, 3)?,
        })
    }

    pub fn forward(&self, z: &Tensor) -> EngineResult<Tensor> {
        let mut x = self.mid_block.forward(self.conv_in.forward(z)?)?;
        for stage in &self.up_blocks {
            x = stage.run(x)?;
            if let Some(up) = &stage.resample {
                x = upsampled(up, &x)?;
            }
        }
        norm_conv(&self.conv_norm_out, &self.conv_out, &x)
    }
}
