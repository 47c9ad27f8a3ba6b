//! Wan's encoder and decoder.

use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::{Result as EngineResult, Tensor};

use super::config::AutoencoderKLWanConfig;
use super::layers::{AvgDown, Downsample, DupUp, MidBlock, Upsample, causal};
use crate::vae::pieces::{CausalConv, Memory, ResidualBlock};
use crate::vae::video::RmsNorm;

/// A step of the encoder.
#[derive(Debug)]
enum Down {
    Resnet(ResidualBlock),
    Sample(Downsample),
    /// A whole stage of Wan 2.2.
    Stage {
        resnets: Vec<ResidualBlock>,
        downsampler: Option<Downsample>,
        shortcut: AvgDown,
    },
}

impl Down {
    fn forward(&self, mut x: Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        match self {
            Self::Resnet(resnet) => resnet.forward(x, memory),
            Self::Sample(down) => down.forward(&x, memory),
            Self::Stage { resnets, downsampler, shortcut } => {
                let short = shortcut.forward(&x)?;
                for resnet in resnets {
                    x = resnet.forward(x, memory)?;
                }
                if let Some(down) = downsampler {
                    x = down.forward(&x, memory)?;
                }
                x.add(&short)
            }
        }
    }
}

/// Pixels to moments, piece by piece.
#[derive(Debug)]
pub(super) struct Encoder {
    conv_in: CausalConv,
    down_blocks: Vec<Down>,
    mid_block: MidBlock,
    norm_out: RmsNorm,
    conv_out: CausalConv,
}

impl Encoder {
    pub(super) fn new(params: &ParamBuilder, config: &AutoencoderKLWanConfig) -> EngineResult<Self> {
        let dims: Vec<usize> = [1].iter().chain(&config.dim_mult).map(|mult| mult * config.base_dim).collect();
        let blocks = params.sub("down_blocks");
        let mut down_blocks = Vec::new();
        for (i, pair) in dims.windows(2).enumerate() {
            let (inputs, outputs) = (pair[0], pair[1]);
            let in_time = config.temperal_downsample.get(i).copied();
            let resnet = |params: &ParamBuilder, j: usize| {
                ResidualBlock::new(params, if j == 0 { inputs } else { outputs }, outputs, causal)
            };
            if config.is_residual {
                let params = blocks.sub(i);
                let resnets = (0..config.num_res_blocks).map(|j| resnet(&params.sub("resnets").sub(j), j));
                let down = in_time.map(|in_time| Downsample::new(&params.sub("downsampler"), outputs, in_time));
                let factors = [1 + usize::from(in_time == Some(true)), 1 + usize::from(in_time.is_some())];
                down_blocks.push(Down::Stage {
                    resnets: resnets.collect::<EngineResult<_>>()?,
                    downsampler: down.transpose()?,
                    shortcut: AvgDown { outputs, factors },
                });
                continue;
            }
            for j in 0..config.num_res_blocks {
                down_blocks.push(Down::Resnet(resnet(&blocks.sub(down_blocks.len()), j)?));
            }
            if let Some(in_time) = in_time {
                down_blocks.push(Down::Sample(Downsample::new(&blocks.sub(down_blocks.len()), outputs, in_time)?));
            }
        }
        let last = dims[dims.len() - 1];
        Ok(Self {
            conv_in: causal(&params.sub("conv_in"), config.in_channels, dims[0])?,
            down_blocks,
            mid_block: MidBlock::new(&params.sub("mid_block"), last)?,
            norm_out: RmsNorm::new(&params.sub("norm_out"), last, 3)?,
            conv_out: causal(&params.sub("conv_out"), last, 2 * config.z_dim)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        memory.next_piece();
        let mut x = self.conv_in.forward(x, memory)?;
        for block in &self.down_blocks {
            x = block.forward(x, memory)?;
        }
        x = self.mid_block.forward(x, memory)?;
        self.conv_out.of(&x, |x| self.norm_out.silu(x), memory)
    }
}

/// A stage of the decoder.
#[derive(Debug)]
struct Up {
    resnets: Vec<ResidualBlock>,
    upsample: Option<Upsample>,
    shortcut: Option<DupUp>,
}

/// Latents to pixels, piece by piece.
#[derive(Debug)]
pub(super) struct Decoder {
    conv_in: CausalConv,
    mid_block: MidBlock,
    up_blocks: Vec<Up>,
    norm_out: RmsNorm,
    conv_out: CausalConv,
}

impl Decoder {
    pub(super) fn new(params: &ParamBuilder, config: &AutoencoderKLWanConfig) -> EngineResult<Self> {
        let reversed: Vec<usize> = config.dim_mult.iter().rev().map(|mult| mult * config.decoder_dim()).collect();
        let in_time: Vec<bool> = config.temperal_downsample.iter().rev().copied().collect();
        let stage = |i: usize| -> EngineResult<Up> {
            let params = params.sub("up_blocks").sub(i);
            let (before, outputs) = (reversed[i.saturating_sub(1)], reversed[i]);
            // Upsampling halves the channels, but for that of Wan 2.2.
            let inputs = if i > 0 && !config.is_residual { before / 2 } else { before };
            let resnet = |j: usize| {
                let inputs = if j == 0 { inputs } else { outputs };
                ResidualBlock::new(&params.sub("resnets").sub(j), inputs, outputs, causal)
            };
            let resnets = (0..=config.num_res_blocks).map(resnet).collect::<EngineResult<_>>()?;
            let in_time = in_time.get(i).copied();
            let (name, to) = if config.is_residual { ("upsampler", outputs) } else { ("upsamplers.0", outputs / 2) };
            let upsample = in_time.map(|in_time| Upsample::new(&params.sub(name), outputs, to, in_time)).transpose()?;
            let shortcut = in_time.filter(|_| config.is_residual);
            let shortcut = shortcut.map(|in_time| DupUp { outputs, factors: [1 + usize::from(in_time), 2] });
            Ok(Up { resnets, upsample, shortcut })
        };
        let (first, last) = (reversed[0], reversed[reversed.len() - 1]);
        Ok(Self {
            conv_in: causal(&params.sub("conv_in"), config.z_dim, first)?,
            mid_block: MidBlock::new(&params.sub("mid_block"), first)?,
            up_blocks: (0..reversed.len()).map(stage).collect::<EngineResult<_>>()?,
            norm_out: RmsNorm::new(&params.sub("norm_out"), last, 3)?,
            conv_out: causal(&params.sub("conv_out"), last, config.out_channels)?,
        })
    }

    pub(super) fn forward(&self, z: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        memory.next_piece();
        let mut x = self.mid_block.forward(self.conv_in.forward(z, memory)?, memory)?;
        for Up { resnets, upsample, shortcut } in &self.up_blocks {
            let short = shortcut.as_ref().map(|shortcut| shortcut.forward(&x, memory.is_first())).transpose()?;
            for resnet in resnets {
                x = resnet.forward(x, memory)?;
            }
            if let Some(upsample) = upsample {
                x = upsample.forward(&x, memory)?;
            }
            if let Some(short) = short {
                x = x.add(&short)?;
            }
        }
        self.conv_out.of(&x, |x| self.norm_out.silu(x), memory)
    }
}
