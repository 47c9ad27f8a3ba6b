//! diffusers' `FluxTransformer2DModel`.

use flowtape_engine::nn::{Blocks, Linear, ParamBuilder, Params, TimestepProjection};
use flowtape_engine::{Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::FluxConfig;
use crate::Transformer;
use crate::blocks::{
    AdaLayerNormContinuous, CHANNELS, CombinedTimestepTextProjEmbeddings, JointTokens, JointTransformerBlock,
    Modulation, QkvConfig, RopeTables, SingleStream, time_proj,
};
use crate::config::config_json;

const EPS: f64 = 1e-6;
/// diffusers' layer that projects time and then guidance.
const TIME_PROJ: &str = "time_text_embed.time_proj";
/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

/// A single block, modulated by an embedding through a layer of its own.
#[derive(Clone, Debug)]
pub struct FluxSingleTransformerBlock {
    modulation: Modulation,
    stream: SingleStream,
}

impl FluxSingleTransformerBlock {
    /// A block of width `dim`.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, dim: usize, heads: usize) -> Result<Self> {
        let modulation = Modulation::new(&params.sub("norm").sub("linear"), dim, 3)?;
        Ok(Self { modulation, stream: SingleStream::new(params, dim, heads)? })
    }

    /// x `[B, L, dim]`, text first, with the embedding `temb` `[B, dim]`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(&self, x: &Tensor, temb: &Tensor, joint: &JointTokens) -> Result<Tensor> {
        self.stream.forward(x, &self.modulation.together(temb)?, joint)
    }
}

/// FLUX.1's transformer.
///
/// Inputs, with the reference's names: `hidden_states` `[B, L, in_channels]` (packed latents), `encoder_hidden_states`
/// `[B, T, joint_attention_dim]`, `pooled_projections` `[B, pooled_projection_dim]`, `timestep` `[B]` (0 to 1),
/// `img_ids` `[L, 3]`, `txt_ids` `[T, 3]` or `[B, T, 3]`, `guidance` `[B]` where the model embeds one (else it is passed
/// over). Result
/// `[B, L, out_channels]`.
#[derive(Debug)]
pub struct FluxTransformer2DModel {
    config: FluxConfig,
    params: Params,
    time_text_embed: CombinedTimestepTextProjEmbeddings,
    context_embedder: Linear,
    x_embedder: Linear,
    transformer_blocks: Blocks<JointTransformerBlock>,
    single_transformer_blocks: Blocks<FluxSingleTransformerBlock>,
    norm_out: AdaLayerNormContinuous,
    proj_out: Linear,
}

impl FluxTransformer2DModel {
    /// A model with PyTorch's starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: FluxConfig, root: &ParamBuilder) -> Result<Self> {
        let (dim, heads) = (config.inner_dim(), config.num_attention_heads);
        let outputs = config.patch_size.pow(2) * config.out_channels();
        let double =
            |params: &ParamBuilder, _| JointTransformerBlock::new(params, QkvConfig::joint(dim, heads), 4 * dim);
        let single = |params: &ParamBuilder, _| FluxSingleTransformerBlock::new(params, dim, heads);
        Ok(Self {
            time_text_embed: CombinedTimestepTextProjEmbeddings::new(
                &root.sub("time_text_embed"),
                dim,
                config.pooled_projection_dim,
                config.guidance_embeds,
            )?,
            context_embedder: Linear::new(&root.sub("context_embedder"), config.joint_attention_dim, dim, true)?,
            x_embedder: Linear::new(&root.sub("x_embedder"), config.in_channels, dim, true)?,
            transformer_blocks: Blocks::new(&root.sub("transformer_blocks"), config.num_layers, double)?,
            single_transformer_blocks: Blocks::new(
                &root.sub("single_transformer_blocks"),
                config.num_single_layers,
                single,
            )?,
            norm_out: AdaLayerNormContinuous::new(&root.sub("norm_out"), dim, EPS, true)?,
            proj_out: Linear::new(&root.sub("proj_out").zero_init(), dim, outputs, true)?,
            params: root.params(),
            config,
        })
    }

    /// The embedding of time, guidance and pooled text.
    fn temb(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<Tensor> {
        let project = |times: &Tensor| {
            let times = times.mul_scalar(1000.0)?;
            time_proj(TIME_PROJ, &times, &TimestepProjection::new(CHANNELS))
        };
        let time = project(inputs.tensor("timestep")?)?;
        // The model's own configuration decides: FLUX.1-schnell has no use for a guidance.
        let guidance = inputs.optional("guidance").filter(|_| self.config.guidance_embeds);
        let guidance = guidance.map(project).transpose()?;
        Ok(self.time_text_embed.forward(&time, guidance.as_ref(), inputs.tensor("pooled_projections")?)?)
    }
}

impl FlowModel for FluxTransformer2DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let image = self.x_embedder.forward(inputs.tensor("hidden_states")?)?;
        let text = self.context_embedder.forward(inputs.tensor("encoder_hidden_states")?)?;
        let (temb, rope) = (
            self.temb(inputs)?,
            RopeTables::of_ids(inputs, &["txt_ids", "img_ids"], &self.config.axes_dims_rope, THETA)?,
        );
        let (joint, streams) = JointTokens::new(inputs, [text, image], &rope, None)?;
        let [double, single] = [joint.clone(), joint.clone()];
        let [text, image] = self
            .transformer_blocks
            .run(streams, [&temb], move |block, streams, [temb]| block.forward(streams, temb, &double))?;
        let x = Tensor::cat(&[&text, &image], 1)?;
        let [x] = self
            .single_transformer_blocks
            .run([x], [&temb], move |block, [x], [temb]| Ok([block.forward(x, temb, &single)?]))?;
        let image = self.norm_out.forward(&joint.latents(&x)?, &temb)?;
        Ok(joint.gather(&self.proj_out.forward(&image)?)?.into())
    }
}

impl Transformer for FluxTransformer2DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    fn shares_tokens(&self) -> bool {
        true
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        self.transformer_blocks.set_checkpointing(on);
        self.single_transformer_blocks.set_checkpointing(on);
    }
}
