//! diffusers' `HunyuanVideo15Transformer3DModel`.

use flowtape_engine::nn::{LayerNorm, Linear, ParamBuilder, Params};
use flowtape_engine::{Error, Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::context::{Context, TimeEmbedding, key_mask};
use super::{CLASS, HunyuanVideo15Config};
use crate::Transformer;
use crate::blocks::{
    ChannelOrder, Modulation, PatchEmbed, RopeTables, Stream, StreamKind, attend, modulate, run_block, unpatchify,
};
use crate::registry::config_json;

/// Epsilon of the norm before the output projection.
const EPS: f64 = 1e-6;

/// A double block: latents and context have weights of their own and attend to each other.
#[derive(Clone, Debug)]
pub struct HunyuanVideo15TransformerBlock {
    latents: Stream,
    context: Stream,
}

impl HunyuanVideo15TransformerBlock {
    /// A block of width `dim`, its feed-forward layers `inner` wide.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, dim: usize, heads: usize, inner: usize) -> Result<Self> {
        let stream = |kind| Stream::new(params, kind, dim, heads, inner);
        Ok(Self { latents: stream(StreamKind::Latents)?, context: stream(StreamKind::Context)? })
    }

    /// Latents `[B, L, dim]` and context `[B, T, dim]`, with the embedding `temb` `[B, dim]`; returns both. The latents
    /// alone have positions; `mask` is added to the scores and broadcasts to `[B, H, L + T, L + T]`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(
        &self,
        latents: &Tensor,
        context: &Tensor,
        temb: &Tensor,
        rope: &RopeTables,
        mask: &Tensor,
    ) -> Result<[Tensor; 2]> {
        let m_latents = self.latents.before_attention(latents, temb)?;
        let m_context = self.context.before_attention(context, temb)?;
        let [q, k, v] = &m_latents.qkv;
        let rotated = [&rope.apply(q)?, &rope.apply(k)?, v];
        let join = |i: usize| Tensor::cat(&[rotated[i], &m_context.qkv[i]], 2);
        let joint = attend([join(0)?, join(1)?, join(2)?], None, Some(mask))?;
        let parts = joint.split(&[latents.dim(1)?, context.dim(1)?], 1)?;
        Ok([
            self.latents.after_attention(latents, &parts[0], &m_latents)?,
            self.context.after_attention(context, &parts[1], &m_context)?,
        ])
    }
}

/// HunyuanVideo-1.5's transformer.
///
/// Inputs, with the reference's names: `hidden_states` `[B, in_channels, F, H, W]` (noisy latents and condition latents),
/// `timestep` `[B]` (0 to 1000), `encoder_hidden_states` `[B, T, text_embed_dim]`, `encoder_attention_mask` `[B, T]`,
/// `encoder_hidden_states_2` `[B, T2, text_embed_2_dim]`, `encoder_attention_mask_2` `[B, T2]`, `image_embeds`
/// `[B, N, image_embed_dim]` (all zero: text to video), and `timestep_r` `[B]` where a MeanFlow model has it. Masks are 0 at
/// padding. Result `[B, out_channels, F, H, W]`.
#[derive(Debug)]
pub struct HunyuanVideo15Transformer3DModel {
    config: HunyuanVideo15Config,
    params: Params,
    x_embedder: PatchEmbed,
    context: Context,
    time_embed: TimeEmbedding,
    transformer_blocks: Vec<HunyuanVideo15TransformerBlock>,
    norm_out: (Modulation, LayerNorm),
    proj_out: Linear,
    gradient_checkpointing: bool,
}

impl HunyuanVideo15Transformer3DModel {
    /// A model with PyTorch's starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(mut config: HunyuanVideo15Config, root: &ParamBuilder) -> Result<Self> {
        if let Some(&[width, _]) = root.stored_dims("context_embedder_2.linear_1.weight") {
            config.byt5_hidden_dim = width;
        }
        let (dim, heads, inner) = (config.inner_dim(), config.num_attention_heads, config.mlp_dim());
        let (patch, blocks) = (config.patch(), root.sub("transformer_blocks"));
        let outputs = patch.iter().product::<usize>() * config.out_channels.unwrap_or(config.in_channels);
        let block = |i| HunyuanVideo15TransformerBlock::new(&blocks.sub(i), dim, heads, inner);
        Ok(Self {
            x_embedder: PatchEmbed::new(&root.sub("x_embedder").sub("proj"), config.in_channels, dim, &patch)?,
            context: Context::new(root, &config)?,
            time_embed: TimeEmbedding::new(&root.sub("time_embed"), dim, config.use_meanflow)?,
            transformer_blocks: (0..config.num_layers).map(block).collect::<Result<_>>()?,
            norm_out: (
                Modulation::new(&root.sub("norm_out").sub("linear"), dim, 2)?,
                LayerNorm::new(root, dim, EPS, false)?,
            ),
            proj_out: Linear::new(&root.sub("proj_out"), dim, outputs, true)?,
            params: root.params(),
            gradient_checkpointing: false,
            config,
        })
    }

    /// Patches along frames, rows and columns.
    fn grid(&self, latents: &Tensor) -> Result<[usize; 3]> {
        let [pt, ph, pw] = self.config.patch();
        match *latents.dims() {
            [_, _, f, h, w] => Ok([f / pt, h / ph, w / pw]),
            _ => Err(Error::shape("hunyuan_video", "latents [B, C, F, H, W]", latents.dims())),
        }
    }
}

impl FlowModel for HunyuanVideo15Transformer3DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let latents = inputs.tensor("hidden_states")?;
        let grid = self.grid(latents)?;
        let rope = self.config.rope(grid, latents.device())?;
        let temb = self.time_embed.forward(inputs, latents.dtype())?;
        let mut x = self.x_embedder.forward(latents)?;
        let [mut context, mask] = self.context.forward(inputs)?;
        // No latent is padding: nothing is added to their scores.
        let mask = key_mask(&mask)?.pad(3, x.dim(1)?, 0)?;
        for block in &self.transformer_blocks {
            let (block, rope, mask) = (block.clone(), rope.clone(), mask.clone());
            let run = move |[x, context, temb]: [&Tensor; 3]| block.forward(x, context, temb, &rope, &mask);
            [x, context] = run_block(self.gradient_checkpointing, [&x, &context, &temb], run)?;
        }
        let (modulation, norm) = &self.norm_out;
        // Here, unlike in the blocks, the scale comes first.
        let parts = modulation.forward(&temb)?;
        let x = self.proj_out.forward(&modulate(&norm.forward(&x)?, &parts[1], &parts[0])?)?;
        Ok(unpatchify(&x, &grid, &self.config.patch(), ChannelOrder::Slowest)?.into())
    }
}

impl Transformer for HunyuanVideo15Transformer3DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(CLASS, &self.config)
    }

    /// What the last block makes of the context, which nothing reads, and the embedder of a second time, which the adapter
    /// does not give.
    fn parameters_without_gradient(&self) -> Vec<String> {
        let last = format!("transformer_blocks.{}.", self.config.num_layers - 1);
        let unread = |name: &&str| {
            let part = name.strip_prefix(&last).unwrap_or_default();
            part.starts_with("attn.to_add_out.")
                || part.starts_with("ff_context.")
                || name.starts_with("time_embed.timestep_embedder_r.")
        };
        self.params.iter().map(|(name, _)| name).filter(unread).map(String::from).collect()
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        self.gradient_checkpointing = on;
    }

    fn zero_init_parameters(&self) -> Vec<String> {
        let zero = |name: &&str| {
            name.contains(".norm1.linear.")
                || name.contains(".norm1_context.")
                || name.contains(".norm_out.linear.")
                || name.starts_with("norm_out.")
                || name.starts_with("proj_out.")
        };
        self.params.iter().map(|(name, _)| name).filter(zero).map(String::from).collect()
    }
}
