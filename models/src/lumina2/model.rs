//! diffusers' `Lumina2Transformer2DModel`.

use flowtape_engine::nn::{
    Blocks, LayerNorm, Linear, ParamBuilder, Params, RmsNorm, TimestepEmbedding, TimestepProjection,
};
use flowtape_engine::ops::pointwise;
use flowtape_engine::{Device, Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::Lumina2Config;
use super::config::AXES;
use crate::blocks::{
    CHANNELS, Captions, ChannelOrder, QKV, QkvConfig, QkvHeads, RopePrecision, RopeTables, SandwichBlock,
    SandwichNorms, SwiGlu, grid_positions, patchify_as, scaled, time_proj, unpatchify,
};
use crate::config::config_json;
use crate::{Error, Transformer};

/// The norms of queries and keys have an epsilon of their own.
const QK_EPS: f64 = 1e-5;
/// The same of the norm before the output.
const FINAL_EPS: f64 = 1e-6;
/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

/// A block of a model of this configuration, with or without modulation by the time.
fn block(params: &ParamBuilder, config: &Lumina2Config, modulated: bool) -> Result<SandwichBlock> {
    let (dim, attn, first) = (config.hidden_size, params.sub("attn"), params.sub("norm1"));
    let qkv = QkvConfig {
        bias: false,
        eps: QK_EPS,
        kv_heads: config.kv_heads(),
        ..QkvConfig::joint(dim, config.num_attention_heads)
    };
    let norm = |params: &ParamBuilder| RmsNorm::new(params, dim, config.norm_eps);
    let modulation = || Linear::new(&first.sub("linear").zero_init(), config.time_dim(), 4 * dim, true);
    Ok(SandwichBlock {
        modulation: modulated.then(modulation).transpose()?,
        norms: SandwichNorms {
            attention: [norm(&if modulated { first.sub("norm") } else { first })?, norm(&params.sub("norm2"))?],
            feed_forward: [norm(&params.sub("ffn_norm1"))?, norm(&params.sub("ffn_norm2"))?],
        },
        qkv: QkvHeads::new(&attn, QKV, qkv)?,
        to_out: Linear::new(&attn.sub("to_out").sub(0), dim, dim, false)?,
        feed_forward: SwiGlu::new(
            &params.sub("feed_forward"),
            ["linear_1", "linear_3", "linear_2"],
            dim,
            config.mlp_dim(),
        )?,
    })
}

/// Lumina-Image 2.0's transformer.
///
/// Inputs, with the reference's names: `hidden_states` `[B, in_channels, H, W]`, `encoder_hidden_states` `[B, T, cap_feat_dim]`,
/// `encoder_attention_mask` `[B, T]` (0 at padding; best on the host, where it is read) where there is one, and `timestep` `[B]`
/// (0 for noise, 1 for data). Result like the latents: what leads to the data.
///
/// The reference puts the latents of each sample right behind its text; here they stand behind the longest one, and what is
/// between is masked out.
#[derive(Debug)]
pub struct Lumina2Transformer2DModel {
    config: Lumina2Config,
    params: Params,
    x_embedder: Linear,
    timestep_embedder: TimestepEmbedding,
    caption_embedder: (RmsNorm, Linear),
    noise_refiner: Blocks<SandwichBlock>,
    context_refiner: Blocks<SandwichBlock>,
    layers: Blocks<SandwichBlock>,
    norm_out: LayerNorm,
    linear_1: Linear,
    linear_2: Linear,
}

impl Lumina2Transformer2DModel {
    /// A model with PyTorch's starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: Lumina2Config, root: &ParamBuilder) -> Result<Self> {
        let (dim, area, last) = (config.hidden_size, config.patch_size.pow(2), root.sub("norm_out"));
        let embed = root.sub("time_caption_embed");
        let (time, caption) = (embed.sub("timestep_embedder"), embed.sub("caption_embedder"));
        let blocks =
            |name: &str, count, modulated| Blocks::new(&root.sub(name), count, |p, _| block(p, &config, modulated));
        Ok(Self {
            x_embedder: Linear::new(&root.sub("x_embedder"), area * config.in_channels, dim, true)?,
            timestep_embedder: TimestepEmbedding::new(&time, CHANNELS, config.time_dim())?,
            caption_embedder: (
                RmsNorm::new(&caption.sub(0), config.cap_feat_dim, config.norm_eps)?,
                Linear::new(&caption.sub(1), config.cap_feat_dim, dim, true)?,
            ),
            noise_refiner: blocks("noise_refiner", config.num_refiner_layers, true)?,
            context_refiner: blocks("context_refiner", config.num_refiner_layers, false)?,
            layers: blocks("layers", config.num_layers, true)?,
            norm_out: LayerNorm::new(&last, dim, FINAL_EPS, false)?,
            linear_1: Linear::new(&last.sub("linear_1").zero_init(), config.time_dim(), dim, true)?,
            linear_2: Linear::new(&last.sub("linear_2").zero_init(), dim, area * config.out_channels(), true)?,
            params: root.params(),
            config,
        })
    }

    /// Tables of positions, each of `axes_lens`.
    fn rope(&self, positions: &[f32], device: &Device) -> crate::Result<RopeTables> {
        for (axis, end) in self.config.axes_lens.iter().enumerate() {
            let last = positions.iter().skip(axis).step_by(AXES).fold(0.0, |m: f32, p| m.max(*p));
            if last as usize >= *end {
                let expected = format!("more than {last} on axis {axis}, the last position of this caption and image");
                return Err(Error::config("axes_lens", expected, &self.config.axes_lens));
            }
        }
        Ok(RopeTables::new(positions, &self.config.axes_dim_rope, THETA, RopePrecision::F64, device)?)
    }

    /// Tables of an image of a grid behind a caption of each of these lengths.
    fn image_rope(&self, grid: &[usize], lengths: &[usize], device: &Device) -> crate::Result<RopeTables> {
        let one = |length: &usize| {
            let mut positions = grid_positions(&[&[1], grid].concat());
            positions.iter_mut().step_by(AXES).for_each(|place| *place = *length as f32);
            self.rope(&positions, device)
        };
        Ok(RopeTables::of_samples(&lengths.iter().map(one).collect::<crate::Result<Vec<_>>>()?)?)
    }
}

impl FlowModel for Lumina2Transformer2DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let latents = inputs.tensor("hidden_states")?;
        let (device, patch) = (latents.device(), [self.config.patch_size; 2]);
        let &[_, _, height, width] = latents.dims() else {
            let got = format!("{:?}", latents.dims());
            return Err(Error::adapter("Lumina2Transformer2DModel", "latents [B, C, H, W]", got));
        };
        let grid = [height / patch[0], width / patch[1]];
        let times = inputs.tensor("timestep")?;
        let time = time_proj("time_caption_embed.time_proj", times, &TimestepProjection::new(CHANNELS))?;
        let temb = self.timestep_embedder.forward(&time.to_dtype(latents.dtype())?)?;
        let temb = pointwise([&temb], |[t]| t.silu())?;

        let text = inputs.tensor("encoder_hidden_states")?;
        let captions = Captions::of(text, inputs.optional("encoder_attention_mask"), 1)?;
        let positions: Vec<f32> = (0..captions.width()).flat_map(|i| [i as f32, 0.0, 0.0]).collect();
        let caption_rope = self.rope(&positions, device)?;
        let image_rope = self.image_rope(&grid, captions.lengths(), device)?;
        let (norm, linear) = &self.caption_embedder;
        let caption = linear.forward(&norm.forward(&captions.gather(text)?)?)?;
        let mask = captions.mask(device)?;
        let (rope, keys) = (caption_rope.clone(), mask.clone());
        let [caption] = self
            .context_refiner
            .run([caption], [], move |block, [x], []| Ok([block.forward(x, None, &rope, keys.as_ref())?]))?;

        let x = self.x_embedder.forward(&patchify_as(latents, &patch, ChannelOrder::Fastest)?)?;
        let rope = image_rope.clone();
        let [x] = self
            .noise_refiner
            .run([x], [&temb], move |block, [x], [temb]| Ok([block.forward(x, Some(temb), &rope, None)?]))?;

        let (text_len, image_len) = (caption.dim(1)?, x.dim(1)?);
        // No place of an image is masked: nothing is added to their scores.
        let mask = mask.map(|mask| mask.pad(3, 0, image_len)).transpose()?;
        let rope = RopeTables::cat(&[caption_rope, image_rope])?;
        let joint = Tensor::cat(&[&caption, &x], 1)?;
        let [joint] = self.layers.run([joint], [&temb], move |block, [x], [temb]| {
            Ok([block.forward(x, Some(temb), &rope, mask.as_ref())?])
        })?;
        let scale = self.linear_1.forward(&temb)?.unsqueeze(1)?;
        let image = self.norm_out.forward(&joint.narrow(1, text_len, image_len)?)?;
        let tokens = self.linear_2.forward(&scaled(&image, &scale)?)?;
        Ok(unpatchify(&tokens, &grid, &patch, ChannelOrder::Fastest)?.into())
    }
}

impl Transformer for Lumina2Transformer2DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        for blocks in [&mut self.noise_refiner, &mut self.context_refiner, &mut self.layers] {
            blocks.set_checkpointing(on);
        }
    }
}
