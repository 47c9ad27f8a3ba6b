//! diffusers' `HunyuanVideo15Transformer3DModel`.

use flowtape_engine::nn::{Blocks, Linear, ParamBuilder, Params};
use flowtape_engine::{Error, Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::HunyuanVideo15Config;
use super::context::{Context, TimeEmbedding};
use crate::Transformer;
use crate::blocks::{
    AdaLayerNormContinuous, ChannelOrder, JointTokens, JointTransformerBlock, PatchEmbed, key_mask, unpatchify,
};
use crate::config::config_json;

/// Epsilon of the norm before the output projection.
const EPS: f64 = 1e-6;

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
    /// With the context in place of a text.
    transformer_blocks: Blocks<JointTransformerBlock>,
    norm_out: AdaLayerNormContinuous,
    proj_out: Linear,
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
        let (dim, qkv, inner) = (config.inner_dim(), config.qkv(), config.mlp_dim());
        let (patch, blocks) = (config.patch(), root.sub("transformer_blocks"));
        let outputs = patch.iter().product::<usize>() * config.out_channels();
        let block = |params: &ParamBuilder, _| JointTransformerBlock::new(params, qkv, inner);
        Ok(Self {
            x_embedder: PatchEmbed::new(&root.sub("x_embedder").sub("proj"), config.in_channels, dim, &patch)?,
            context: Context::new(root, &config)?,
            time_embed: TimeEmbedding::new(&root.sub("time_embed"), dim, config.use_meanflow)?,
            transformer_blocks: Blocks::new(&blocks, config.num_layers, block)?,
            norm_out: AdaLayerNormContinuous::new(&root.sub("norm_out"), dim, EPS, true)?,
            proj_out: Linear::new(&root.sub("proj_out").zero_init(), dim, outputs, true)?,
            params: root.params(),
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
        let temb = self.time_embed.forward(inputs, latents.dtype())?;
        let x = self.x_embedder.forward(latents)?;
        let [context, mask] = self.context.forward(inputs)?;
        // No latent is padding: nothing is added to their scores.
        let mask = key_mask(&mask)?.pad(3, 0, x.dim(1)?)?;
        let rope = self.config.rope(context.dim(1)?, grid, latents.device())?;
        let (joint, streams) = JointTokens::new(inputs, [context, x], &rope, Some(mask))?;
        let of_blocks = joint.clone();
        let [_, x] = self
            .transformer_blocks
            .run(streams, [&temb], move |block, streams, [temb]| block.forward(streams, temb, &of_blocks))?;
        let x = joint.gather(&self.proj_out.forward(&self.norm_out.forward(&x, &temb)?)?)?;
        Ok(unpatchify(&x, &grid, &self.config.patch(), ChannelOrder::Slowest)?.into())
    }
}

impl Transformer for HunyuanVideo15Transformer3DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    /// What the last block makes of the context, which nothing reads, and the embedder of a second time without one.
    fn paths_without_gradient(&self, inputs: &ModelInputs) -> Vec<String> {
        let last = self.config.num_layers - 1;
        let read_by_none = ["attn.to_add_out", "ff_context"].map(|layer| format!("transformer_blocks.{last}.{layer}."));
        let mut unread = read_by_none.to_vec();
        if inputs.get("timestep_r").is_none() {
            unread.push("time_embed.timestep_embedder_r.".into());
        }
        unread
    }

    fn shares_tokens(&self) -> bool {
        true
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        self.transformer_blocks.set_checkpointing(on);
    }
}
