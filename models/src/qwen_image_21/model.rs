//! diffusers' `QwenImage21Transformer2DModel`. No layer has a bias.

use flowtape_engine::nn::{
    Activation, Blocks, FeedForward, LayerNorm, Linear, ParamBuilder, Params, RmsNorm, TimestepEmbedding,
    TimestepProjection,
};
use flowtape_engine::ops::{embedding, pointwise};
use flowtape_engine::{Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::QwenImage21Config;
use super::layout::Layout;
use crate::blocks::{
    CHANNELS, QKV, QkvConfig, QkvHeads, RopeTables, SwiGlu, attend, equal_parts, scaled, tanh_gate, time_proj,
};
use crate::config::{config_json, product};
use crate::{Error, Transformer};

/// The path that a probe of the projections of time is asked with: of all samples, and then of time 0. The reference calls the
/// model once per sample.
const TIME_PROJ: &str = "all.time_text_embed.time_proj";
/// Factor of the angles: times are 0 to 1.
const TIME_SCALE: f32 = 1000.0;

/// What all blocks share.
#[derive(Clone, Debug)]
struct Shared {
    /// Of the condition, and of the image to make.
    rope: [RopeTables; 2],
    /// Added to the scores of the condition with itself.
    causal: Tensor,
    /// Added to the scores of the image to make with all.
    rows: Option<Tensor>,
}

/// A block. The condition (text and images to edit) sees itself, the image to make sees both; they share all weights.
#[derive(Clone, Debug)]
struct Block {
    norm: LayerNorm,
    qkv: QkvHeads,
    to_out: Linear,
    img_mlp: SwiGlu,
}

impl Block {
    fn new(params: &ParamBuilder, config: &QwenImage21Config) -> Result<Self> {
        let (dim, attn) = (config.inner_dim(), params.sub("attn"));
        let qkv = QkvConfig { bias: false, eps: config.eps, ..QkvConfig::joint(dim, config.num_attention_heads) };
        Ok(Self {
            norm: LayerNorm::new(params, dim, config.eps, false)?,
            qkv: QkvHeads::new(&attn, QKV, qkv)?,
            to_out: Linear::new(&attn.sub("to_out").sub(0), dim, dim, false)?,
            img_mlp: SwiGlu::new(&params.sub("img_mlp"), ["gate_layer", "proj", "out"], dim, config.mlp_dim())?,
        })
    }

    /// What attention and then the feed-forward layer add to x `[B, L, dim]`, with scale and gate of both `[B, 1, dim]`.
    fn after_attention(
        &self,
        x: &Tensor,
        attention: &Tensor,
        [_, gate, scale, ff_gate]: &[Tensor; 4],
    ) -> Result<Tensor> {
        let x = tanh_gate(x, gate, &self.to_out.forward(attention)?)?;
        let h = scaled(&self.norm.forward(&x)?, scale)?;
        tanh_gate(&x, ff_gate, &self.img_mlp.forward(&h)?)
    }

    /// Condition `[B, rows, dim]` and image `[B, L, dim]`, with the modulation `[B + 1, 4 dim]` of each sample's time and, at last,
    /// of time 0, which is the condition's. Returns both.
    fn forward(&self, [condition, image]: [&Tensor; 2], modulation: &Tensor, shared: &Shared) -> Result<[Tensor; 2]> {
        let (batch, width) = (image.dim(0)?, modulation.dim(1)?);
        let zero = modulation.narrow(0, batch, 1)?.expand(&[batch, width])?;
        let vectors = |m: &Tensor| equal_parts::<4>(&m.unsqueeze(1)?, 2);
        let [of_condition, of_image] = [vectors(&zero)?, vectors(&modulation.narrow(0, 0, batch)?)?];
        let before = |x: &Tensor, scale: &Tensor, rope: &RopeTables| {
            self.qkv.forward(&scaled(&self.norm.forward(x)?, scale)?, Some(rope))
        };
        let [q, k, v] = before(image, &of_image[0], &shared.rope[1])?;
        let own = before(condition, &of_condition[0], &shared.rope[0])?;
        let all = [q, Tensor::cat(&[&own[1], &k], 2)?, Tensor::cat(&[&own[2], &v], 2)?];
        let seen_by_image = attend(all, shared.rows.as_ref())?;
        let seen_by_condition = attend(own, Some(&shared.causal))?;
        Ok([
            self.after_attention(condition, &seen_by_condition, &of_condition)?,
            self.after_attention(image, &seen_by_image, &of_image)?,
        ])
    }
}

/// Qwen-Image-2.1's transformer.
///
/// Inputs, with the reference's names: `hidden_states` `[B, L, in_channels]` (latents of the images to edit, then of the one to
/// make), `encoder_hidden_states` `[B, T, context_in_dim]`, `encoder_hidden_states_mask` `[B, T]` (0 at padding) where there is one,
/// `image_pad_mask` `[B, T]` (not 0 at the places of images to edit, one for four of their tokens) where there are such, both best
/// on the host, where they are read, `timestep` `[B]` (0 to 1) and `img_shapes`: for each sample the frames, rows and columns of its
/// images, alike in all samples, the one to make last. Result `[B, its tokens, out_channels]`.
///
/// The reference runs once for each sample and gives the whole sequence; here samples of all lengths run together, and what nobody
/// asks for is left out.
#[derive(Debug)]
pub struct QwenImage21Transformer2DModel {
    config: QwenImage21Config,
    params: Params,
    timestep_embedder: TimestepEmbedding,
    text_norm: RmsNorm,
    txt_in: FeedForward,
    img_in: Linear,
    modulation: Linear,
    transformer_blocks: Blocks<Block>,
    norm_out: LayerNorm,
    norm_out_scale: Linear,
    proj_out: Linear,
}

impl QwenImage21Transformer2DModel {
    /// A model with PyTorch's starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: QwenImage21Config, root: &ParamBuilder) -> Result<Self> {
        let (dim, text, txt_in) = (config.inner_dim(), config.context_in_dim, root.sub("txt_in"));
        let time = root.sub("time_text_embed").sub("timestep_embedder");
        let linear = |params: &ParamBuilder, inputs, outputs| Linear::new(params, inputs, outputs, false);
        let last = root.sub("norm_out");
        Ok(Self {
            timestep_embedder: TimestepEmbedding::with(&time, CHANNELS, dim, Activation::Silu, false)?,
            text_norm: RmsNorm::from_one(&txt_in.sub("text_norm"), text, config.eps)?,
            txt_in: FeedForward::from_parts(
                linear(&txt_in.sub("in_layer"), text, dim)?,
                Activation::GeluTanh,
                linear(&txt_in.sub("out_layer"), dim, dim)?,
            ),
            img_in: linear(&root.sub("img_in"), config.in_channels, dim)?,
            modulation: linear(&root.sub("modulation").sub(1).zero_init(), dim, 4 * dim)?,
            transformer_blocks: Blocks::new(&root.sub("transformer_blocks"), config.num_layers, |params, _| {
                Block::new(params, &config)
            })?,
            norm_out: LayerNorm::new(&last, dim, config.eps, false)?,
            norm_out_scale: linear(&last.sub("linear").zero_init(), dim, dim)?,
            proj_out: linear(&root.sub("proj_out").zero_init(), dim, config.out_channels)?,
            params: root.params(),
            config,
        })
    }

    /// Rows and columns of the images of a sample, with `tokens` tokens together: those to edit, and the one to make.
    fn images(&self, inputs: &ModelInputs, tokens: usize) -> flowtape_flowmatch::Result<(Vec<[usize; 2]>, [usize; 2])> {
        let shapes = inputs.shapes("img_shapes")?;
        let wrong = |expected| Error::Input { name: "img_shapes".into(), expected, got: format!("{shapes:?}") };
        let first = shapes.first().ok_or_else(|| wrong("the images of each sample"))?;
        if shapes.iter().any(|images| images != first) {
            return Err(wrong("images of the same shapes in all samples"));
        }
        let size = |image: &Vec<usize>| match image[..] {
            [1, height, width] if height % 2 == 0 && width % 2 == 0 => Ok([height, width]),
            _ => Err(wrong("one frame and even rows and columns of each image")),
        };
        let mut sizes = first.iter().map(size).collect::<flowtape_flowmatch::Result<Vec<_>>>()?;
        if sizes.iter().map(|size| product(size)).sum::<usize>() != tokens {
            return Err(wrong("as many places as `hidden_states` has tokens"));
        }
        let target = sizes.pop().ok_or_else(|| wrong("the image to make"))?;
        Ok((sizes, target))
    }
}

impl FlowModel for QwenImage21Transformer2DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let (latents, text) = (inputs.tensor("hidden_states")?, inputs.tensor("encoder_hidden_states")?);
        let (device, tokens) = (latents.device(), latents.dim(1)?);
        let (images, target) = self.images(inputs, tokens)?;
        let marks = ["encoder_hidden_states_mask", "image_pad_mask"].map(|name| inputs.optional(name));
        let layout = Layout::of(text, marks[0], marks[1], &images)?;
        let len = product(&target);
        let shared = Shared {
            rope: layout.rope(target, &self.config.axes_dims_rope, device)?,
            causal: layout.causal_mask(device)?,
            rows: layout.row_mask(len, device)?,
        };

        let times = inputs.tensor("timestep")?;
        let times = Tensor::cat(&[times, &times.narrow(0, 0, 1)?.mul_scalar(0.0)?], 0)?;
        let options = TimestepProjection { scale: TIME_SCALE, ..TimestepProjection::new(CHANNELS) };
        let temb =
            self.timestep_embedder.forward(&time_proj(TIME_PROJ, &times, &options)?.to_dtype(latents.dtype())?)?;
        let activated = pointwise([&temb], |[t]| t.silu())?;
        let modulation = self.modulation.forward(&activated)?;

        let parts = self.img_in.forward(latents)?.split(&[tokens - len, len], 1)?;
        let text = self.txt_in.forward(&self.text_norm.forward(text)?)?.flatten(0, 1)?;
        let rows = if images.is_empty() { text } else { Tensor::cat(&[&text, &parts[0].flatten(0, 1)?], 0)? };
        let condition = embedding(&rows, &layout.sources(device)?)?;
        let state = [condition, parts[1].clone()];
        let [_, image] = self.transformer_blocks.run(state, [&modulation], move |block, streams, [modulation]| {
            block.forward(streams, modulation, &shared)
        })?;
        let now = activated.narrow(0, 0, latents.dim(0)?)?;
        let scale = self.norm_out_scale.forward(&now)?.unsqueeze(1)?;
        Ok(self.proj_out.forward(&scaled(&self.norm_out.forward(&image)?, &scale)?)?.into())
    }
}

impl Transformer for QwenImage21Transformer2DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        self.transformer_blocks.set_checkpointing(on);
    }
}
