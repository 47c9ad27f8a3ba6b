//! The encoder and decoder of LTX-2's pictures.

use flowtape_engine::nn::{Conv, LayerNorm, ParamBuilder};
use flowtape_engine::ops::{ConvAxis, Padding, rms_norm};
use flowtape_engine::{Result as EngineResult, Tensor};

use super::config::{AutoencoderKLLTX2VideoConfig, PaddingMode};
use crate::vae::rows::{conv_rows, in_rows, over_rows};
use crate::vae::video::{FIRST, LAST, Slow, channel_means, packed, patches, unpacked, unpatched};

/// Added to the mean of squares.
const EPS: f64 = 1e-8;

/// How the convolutions of a network walk.
#[derive(Clone, Copy, Debug)]
struct Walk {
    causal: bool,
    padding: PaddingMode,
}

impl Walk {
    fn conv(self, params: &ParamBuilder, inputs: usize, outputs: usize) -> EngineResult<Conv> {
        let time = if self.causal { ConvAxis::causal(3) } else { ConvAxis::same(3) };
        let side = (3, ConvAxis::same(3).with_padding(self.padding.into()));
        let time = (3, time.with_padding(Padding::Replicate));
        Conv::new(&params.sub("conv"), inputs, outputs, &[time, side, side])
    }
}

/// Each place's channels to a mean square of 1, then SiLU.
fn norm_silu(x: &Tensor) -> EngineResult<Tensor> {
    rms_norm(&x.permute(&LAST)?, None, EPS)?.permute(&FIRST)?.silu()
}

/// Norm, SiLU and convolution.
fn norm_conv(conv: &Conv, x: &Tensor) -> EngineResult<Tensor> {
    in_rows(x, 1, |rows| conv_rows(conv, x, rows, norm_silu))
}

/// Norm, SiLU and convolution, twice, beside a shortcut.
#[derive(Debug)]
struct ResnetBlock {
    conv1: Conv,
    conv2: Conv,
    shortcut: Option<(LayerNorm, Conv)>,
}

impl ResnetBlock {
    fn new(params: &ParamBuilder, inputs: usize, outputs: usize, eps: f64, walk: Walk) -> EngineResult<Self> {
        let shortcut = || {
            let norm = LayerNorm::new(&params.sub("norm3"), inputs, eps, true)?;
            let point = [(1, ConvAxis::default()); 3];
            Ok((norm, Conv::new(&params.sub("conv_shortcut"), inputs, outputs, &point)?))
        };
        Ok(Self {
            conv1: walk.conv(&params.sub("conv1"), inputs, outputs)?,
            conv2: walk.conv(&params.sub("conv2"), outputs, outputs)?,
            shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }

    fn forward(&self, x: Tensor) -> EngineResult<Tensor> {
        let h = norm_conv(&self.conv1, &x)?;
        over_rows(x, |x, rows| {
            let h = conv_rows(&self.conv2, &h, rows, norm_silu)?;
            match &self.shortcut {
                Some((norm, conv)) => conv.forward(&norm.forward(&x.permute(&LAST)?)?.permute(&FIRST)?)?.add(&h),
                None => x.add(&h),
            }
        })
    }
}

fn resnets(
    params: &ParamBuilder,
    channels: usize,
    count: usize,
    eps: f64,
    walk: Walk,
) -> EngineResult<Vec<ResnetBlock>> {
    let resnet = |i: usize| ResnetBlock::new(&params.sub("resnets").sub(i), channels, channels, eps, walk);
    (0..count).map(resnet).collect()
}

fn run(resnets: &[ResnetBlock], mut x: Tensor) -> EngineResult<Tensor> {
    for resnet in resnets {
        x = resnet.forward(x)?;
    }
    Ok(x)
}

/// Folds neighbours into channels, beside means of them.
#[derive(Debug)]
struct Downsampler {
    conv: Conv,
    outputs: usize,
    factors: [usize; 3],
}

impl Downsampler {
    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let mut x = x.clone();
        // The first frame fills up its block.
        if self.factors[0] > 1 {
            x = Tensor::cat(&[&x.narrow(2, 0, self.factors[0] - 1)?, &x], 2)?;
        }
        let means = channel_means(&packed(&x, self.factors, Slow::Channel)?, self.outputs)?;
        packed(&self.conv.forward(&x)?, self.factors, Slow::Channel)?.add(&means)
    }
}

/// Unfolds channels into neighbours, maybe beside repetitions of them.
#[derive(Debug)]
struct Upsampler {
    conv: Conv,
    factors: [usize; 3],
    /// How often all channels follow each other beside it.
    repeats: Option<usize>,
}

impl Upsampler {
    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let unfolded = |x: &Tensor| {
            let x = unpacked(x, self.factors, Slow::Channel)?;
            let skipped = self.factors[0] - 1;
            x.narrow(2, skipped, x.dims()[2] - skipped)
        };
        let h = unfolded(&self.conv.forward(x)?)?;
        let Some(repeats) = self.repeats else { return Ok(h) };
        let residual = unfolded(x)?;
        h.add(&Tensor::cat(&vec![&residual; repeats], 1)?)
    }
}

/// Pixels to moments.
#[derive(Debug)]
pub(super) struct Encoder {
    patch: usize,
    conv_in: Conv,
    down_blocks: Vec<(Vec<ResnetBlock>, Option<Downsampler>)>,
    mid_block: Vec<ResnetBlock>,
    conv_out: Conv,
    latents: usize,
}

impl Encoder {
    pub(super) fn new(params: &ParamBuilder, config: &AutoencoderKLLTX2VideoConfig) -> EngineResult<Self> {
        let walk = Walk { causal: config.encoder_causal, padding: config.encoder_spatial_padding_mode };
        let (eps, latents) = (config.resnet_norm_eps, config.latent_channels);
        let mut inputs = latents;
        let mut down_blocks = Vec::new();
        for (i, outputs) in config.block_out_channels.iter().copied().enumerate() {
            let params = params.sub("down_blocks").sub(i);
            let resnets = resnets(&params, inputs, config.layers_per_block[i], eps, walk)?;
            let down = || {
                let factors = config.downsample_type[i].factors();
                let folded = outputs / factors.iter().product::<usize>();
                let conv = walk.conv(&params.sub("downsamplers.0.conv"), inputs, folded)?;
                Ok(Downsampler { conv, outputs, factors })
            };
            let down = config.spatio_temporal_scaling.get(i).then(down).transpose()?;
            down_blocks.push((resnets, down));
            inputs = outputs;
        }
        let pixels = config.in_channels * config.patch_size * config.patch_size;
        let middle = config.layers_per_block[config.block_out_channels.len()];
        Ok(Self {
            patch: config.patch_size,
            conv_in: walk.conv(&params.sub("conv_in"), pixels, latents)?,
            down_blocks,
            mid_block: resnets(&params.sub("mid_block"), inputs, middle, eps, walk)?,
            conv_out: walk.conv(&params.sub("conv_out"), inputs, latents + 1)?,
            latents,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let mut x = self.conv_in.forward(&patches(x, self.patch)?)?;
        for (resnets, down) in &self.down_blocks {
            x = run(resnets, x)?;
            if let Some(down) = down {
                x = down.forward(&x)?;
            }
        }
        x = run(&self.mid_block, x)?;
        x = norm_conv(&self.conv_out, &x)?;
        // One logarithm of a variance is that of all channels.
        let logvar = x.narrow(1, self.latents, 1)?;
        Tensor::cat(&[&[&x][..], &vec![&logvar; self.latents - 1]].concat(), 1)
    }
}

#[derive(Debug)]
struct Up {
    conv_in: Option<ResnetBlock>,
    upsampler: Option<Upsampler>,
    resnets: Vec<ResnetBlock>,
}

/// Latents to pixels.
#[derive(Debug)]
pub(super) struct Decoder {
    patch: usize,
    conv_in: Conv,
    mid_block: Vec<ResnetBlock>,
    up_blocks: Vec<Up>,
    conv_out: Conv,
}

impl Decoder {
    pub(super) fn new(params: &ParamBuilder, config: &AutoencoderKLLTX2VideoConfig) -> EngineResult<Self> {
        let walk = Walk { causal: config.decoder_causal, padding: config.decoder_spatial_padding_mode };
        let (eps, stages) = (config.resnet_norm_eps, config.decoder_block_out_channels.len());
        // The configuration lists stages, but for `upsample_type`, the last one first.
        let reversed = |i: usize| stages - 1 - i;
        let first = config.decoder_block_out_channels[stages - 1];
        let mut channels = first;
        let mut up_blocks = Vec::new();
        for i in 0..stages {
            let params = params.sub("up_blocks").sub(i);
            let factor = config.upsample_factor[reversed(i)];
            let (inputs, outputs) = (channels / factor, config.decoder_block_out_channels[reversed(i)] / factor);
            let conv_in = || ResnetBlock::new(&params.sub("conv_in"), inputs, outputs, eps, walk);
            let up = || {
                let factors = config.upsample_type[i].factors();
                let (from, places) = (outputs * factor, factors.iter().product::<usize>());
                let conv = walk.conv(&params.sub("upsamplers.0.conv"), from, from * places / factor)?;
                let repeats = config.upsample_residual.get(reversed(i)).then_some(places / factor);
                Ok(Upsampler { conv, factors, repeats })
            };
            up_blocks.push(Up {
                conv_in: (inputs != outputs).then(conv_in).transpose()?,
                upsampler: config.decoder_spatio_temporal_scaling.get(reversed(i)).then(up).transpose()?,
                resnets: resnets(&params, outputs, config.decoder_layers_per_block[reversed(i)], eps, walk)?,
            });
            channels = outputs;
        }
        let pixels = config.out_channels * config.patch_size * config.patch_size;
        Ok(Self {
            patch: config.patch_size,
            conv_in: walk.conv(&params.sub("conv_in"), config.latent_channels, first)?,
            mid_block: resnets(&params.sub("mid_block"), first, config.decoder_layers_per_block[stages], eps, walk)?,
            up_blocks,
            conv_out: walk.conv(&params.sub("conv_out"), channels, pixels)?,
        })
    }

    pub(super) fn forward(&self, z: &Tensor) -> EngineResult<Tensor> {
        let mut x = run(&self.mid_block, self.conv_in.forward(z)?)?;
        for up in &self.up_blocks {
            if let Some(conv_in) = &up.conv_in {
                x = conv_in.forward(x)?;
            }
            if let Some(upsampler) = &up.upsampler {
                x = upsampler.forward(&x)?;
            }
            x = run(&up.resnets, x)?;
        }
        unpatched(&norm_conv(&self.conv_out, &x)?, self.patch)
    }
}
