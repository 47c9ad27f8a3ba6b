//! diffusers' `QwenImageTransformer2DModel`.

use flowtape_engine::nn::{
    Activation, Blocks, FeedForward, Init, Linear, Param, ParamBuilder, Params, RmsNorm, TimestepEmbedding,
    TimestepProjection,
};
use flowtape_engine::ops::{embedding, pointwise};
use flowtape_engine::{DType, Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::QwenImageConfig;
use crate::blocks::{
    AdaLayerNormContinuous, CHANNELS, DoubleStream, JointTokens, Modulation, QkvConfig, StreamKind, key_mask, time_proj,
};
use crate::config::config_json;
use crate::{Error, Transformer};

const EPS: f64 = 1e-6;
/// Factor of the angles: times are 0 to 1.
const TIME_SCALE: f32 = 1000.0;

/// What all blocks share.
#[derive(Clone, Debug)]
struct Shared {
    joint: JointTokens,
    /// f32 `[1, L, 1]`: 1 at the tokens of reference images, where they have a time of their own.
    is_reference: Option<Tensor>,
}

/// A double block, each stream modulated through a layer of its own.
#[derive(Clone, Debug)]
pub struct QwenImageTransformerBlock {
    txt_mod: Modulation,
    img_mod: Modulation,
    streams: DoubleStream,
}

impl QwenImageTransformerBlock {
    /// A block of a model of this configuration.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, config: &QwenImageConfig) -> Result<Self> {
        let dim = config.inner_dim();
        let modulation = |name| Modulation::new(&params.sub(name).sub(1), dim, 6);
        let feed_forward = |kind| {
            let name = if kind == StreamKind::Text { "txt_mlp" } else { "img_mlp" };
            FeedForward::new(&params.sub(name), dim, 4 * dim, Activation::GeluTanh)
        };
        let qkv = QkvConfig { eps: EPS, ..QkvConfig::joint(dim, config.num_attention_heads) };
        Ok(Self {
            txt_mod: modulation("txt_mod")?,
            img_mod: modulation("img_mod")?,
            streams: DoubleStream::new(params, qkv, feed_forward)?,
        })
    }

    /// Text `[B, T, dim]` and image `[B, L, dim]`, with the embedding `temb` `[B, dim]`, or `[2 B, dim]` where references
    /// have a time of their own, which comes second. Returns text and image.
    fn forward(&self, [text, image]: [&Tensor; 2], temb: &Tensor, shared: &Shared) -> Result<[Tensor; 2]> {
        let batch = image.dim(0)?;
        let (now, m_image) = (temb.narrow(0, 0, batch)?, self.img_mod.together(temb)?);
        let m_image = match &shared.is_reference {
            None => m_image,
            Some(is_reference) => {
                let times = m_image.split(&[batch, batch], 0)?;
                let is_reference = is_reference.to_dtype(m_image.dtype())?;
                pointwise([&is_reference, &times[0], &times[1]], |[r, now, zero]| r.select_lt(0.5, now, zero))?
            }
        };
        let modulation = [&self.txt_mod.together(&now)?, &m_image];
        self.streams.forward([text, image], modulation, &shared.joint)
    }
}

/// The embedding of the time, and of a flag in layered models: diffusers' `QwenTimestepProjEmbeddings`.
#[derive(Clone, Debug)]
struct TimeEmbedding {
    timestep_embedder: TimestepEmbedding,
    addition_t_embedding: Option<Param>,
}

impl TimeEmbedding {
    fn new(params: &ParamBuilder, dim: usize, additional: bool) -> Result<Self> {
        let table = params.sub("addition_t_embedding");
        let table = || table.get("weight", &[2, dim], Init::Normal { std: 1.0 });
        Ok(Self {
            timestep_embedder: TimestepEmbedding::new(&params.sub("timestep_embedder"), CHANNELS, dim)?,
            addition_t_embedding: additional.then(table).transpose()?,
        })
    }

    /// `[N, dim]` of times `[N]`, in `dtype`.
    fn forward(&self, inputs: &ModelInputs, times: &Tensor, dtype: DType) -> flowtape_flowmatch::Result<Tensor> {
        let options = TimestepProjection { scale: TIME_SCALE, ..TimestepProjection::new(CHANNELS) };
        let projection = time_proj("time_text_embed.time_proj", times, &options)?;
        let time = self.timestep_embedder.forward(&projection.to_dtype(dtype)?)?;
        Ok(match &self.addition_t_embedding {
            Some(table) => {
                let flags = inputs.tensor("additional_t_cond")?.detach().to_dtype(DType::U32)?;
                time.add(&embedding(&table.value()?.on_tape_of(&time), &flags)?)?
            }
            None => time,
        })
    }
}

/// Qwen-Image's transformer.
///
/// Inputs, with the reference's names: `hidden_states` `[B, L, in_channels]` (packed latents of the images, the one to
/// generate first), `encoder_hidden_states` `[B, T, joint_attention_dim]`, `encoder_hidden_states_mask` `[B, T]` (0 at
/// padding) where there is one, `timestep` `[B]` (0 to 1), `img_shapes`: for each sample the frames, rows and columns of its
/// images, alike in all samples, and `additional_t_cond` `[B]` (0 or 1) where the model embeds it. Result
/// `[B, L, patch_size^2 out_channels]`.
#[derive(Debug)]
pub struct QwenImageTransformer2DModel {
    config: QwenImageConfig,
    params: Params,
    time_text_embed: TimeEmbedding,
    txt_norm: RmsNorm,
    txt_in: Linear,
    img_in: Linear,
    transformer_blocks: Blocks<QwenImageTransformerBlock>,
    norm_out: AdaLayerNormContinuous,
    proj_out: Linear,
}

impl QwenImageTransformer2DModel {
    /// A model with PyTorch's starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: QwenImageConfig, root: &ParamBuilder) -> Result<Self> {
        let (dim, text) = (config.inner_dim(), config.joint_attention_dim);
        let outputs = config.patch_size.pow(2) * config.out_channels();
        let block = |params: &ParamBuilder, _| QwenImageTransformerBlock::new(params, &config);
        let additional = config.use_additional_t_cond;
        Ok(Self {
            time_text_embed: TimeEmbedding::new(&root.sub("time_text_embed"), dim, additional)?,
            txt_norm: RmsNorm::new(&root.sub("txt_norm"), text, EPS)?,
            txt_in: Linear::new(&root.sub("txt_in"), text, dim, true)?,
            img_in: Linear::new(&root.sub("img_in"), config.in_channels, dim, true)?,
            transformer_blocks: Blocks::new(&root.sub("transformer_blocks"), config.num_layers, block)?,
            norm_out: AdaLayerNormContinuous::new(&root.sub("norm_out"), dim, EPS, true)?,
            proj_out: Linear::new(&root.sub("proj_out").zero_init(), dim, outputs, true)?,
            params: root.params(),
            config,
        })
    }

    /// The shapes of the images of a sample, with `tokens` tokens together.
    fn images<'a>(&self, inputs: &'a ModelInputs, tokens: usize) -> flowtape_flowmatch::Result<&'a [Vec<usize>]> {
        let shapes = inputs.shapes("img_shapes")?;
        let wrong = |expected| Error::Input { name: "img_shapes".into(), expected, got: format!("{shapes:?}") };
        let first = shapes.first().ok_or_else(|| wrong("the images of each sample"))?;
        if shapes.iter().any(|images| images != first) {
            return Err(wrong("images of the same shapes in all samples"));
        }
        if first.iter().any(|image| image.len() != 3) {
            return Err(wrong("frames, rows and columns of each image"));
        }
        if first.iter().map(|image| image.iter().product::<usize>()).sum::<usize>() != tokens {
            return Err(wrong("as many places as `hidden_states` has tokens"));
        }
        Ok(first)
    }

    /// Positions, masks and which tokens belong to reference images; and what this rank has of text and image `[B, L, dim]`.
    fn shared(
        &self,
        inputs: &ModelInputs,
        [text, image]: [Tensor; 2],
    ) -> flowtape_flowmatch::Result<(Shared, [Tensor; 2])> {
        let (tokens, device) = (image.dim(1)?, image.device());
        let images = self.images(inputs, tokens)?;
        // No place of an image is padding: nothing is added to their scores.
        let mask = inputs.optional("encoder_hidden_states_mask");
        let mask = mask.map(|mask| key_mask(mask)?.pad(3, 0, tokens)).transpose()?;
        let target: usize = images.first().map_or(0, |image| image.iter().product());
        let is_reference = || {
            let marks: Vec<f32> = (0..tokens).map(|i| if i < target { 0.0 } else { 1.0 }).collect();
            Tensor::from_vec(marks, &[1, tokens, 1], device)
        };
        let marks = self.config.zero_cond_t.then(is_reference).transpose()?;
        let rope = self.config.rope(text.dim(1)?, images, device)?;
        let (joint, streams) = JointTokens::new(inputs, [text, image], &rope, mask)?;
        let is_reference = marks.map(|marks| joint.part_of_latents(&marks, 1)).transpose()?;
        Ok((Shared { joint, is_reference }, streams))
    }
}

impl FlowModel for QwenImageTransformer2DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        if inputs.get("guidance").is_some() {
            let (name, expected) = ("guidance".into(), "none: QwenImageTransformer2DModel embeds no guidance");
            return Err(Error::Input { name, expected, got: "one (use_guidance_embeds of the adapter)".into() });
        }
        let latents = inputs.tensor("hidden_states")?;
        let mut times = inputs.tensor("timestep")?.clone();
        if self.config.zero_cond_t {
            times = Tensor::cat(&[&times, &times.mul_scalar(0.0)?], 0)?;
        }
        let temb = self.time_text_embed.forward(inputs, &times, latents.dtype())?;
        let image = self.img_in.forward(latents)?;
        let text = self.txt_in.forward(&self.txt_norm.forward(inputs.tensor("encoder_hidden_states")?)?)?;
        let (shared, streams) = self.shared(inputs, [text, image])?;
        let joint = shared.joint.clone();
        let [_, image] = self
            .transformer_blocks
            .run(streams, [&temb], move |block, streams, [temb]| block.forward(streams, temb, &shared))?;
        let now = temb.narrow(0, 0, latents.dim(0)?)?;
        let predicted = self.proj_out.forward(&self.norm_out.forward(&image, &now)?)?;
        Ok(joint.gather(&predicted)?.into())
    }
}

impl Transformer for QwenImageTransformer2DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    /// What the last block makes of the text, which nothing reads.
    fn paths_without_gradient(&self, _: &ModelInputs) -> Vec<String> {
        let last = self.config.num_layers - 1;
        ["attn.to_add_out", "txt_mlp"].map(|layer| format!("transformer_blocks.{last}.{layer}.")).into()
    }

    fn shares_tokens(&self) -> bool {
        true
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        self.transformer_blocks.set_checkpointing(on);
    }
}
