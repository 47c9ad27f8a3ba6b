//! diffusers' `ChromaTransformer2DModel`.

use flowtape_engine::nn::{
    Blocks, LayerNorm, Linear, ParamBuilder, Params, RmsNorm, TimestepEmbedding, TimestepProjection, timestep_embedding,
};
use flowtape_engine::{Device, Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::ChromaConfig;
use crate::Transformer;
use crate::blocks::{
    DoubleStream, JointTokens, QkvConfig, RopeTables, SingleStream, StreamKind, equal_parts, gelu_feed_forward,
    key_mask, time_proj,
};
use crate::config::config_json;

const EPS: f64 = 1e-6;
/// diffusers' layer that projects time.
const TIME_PROJ: &str = "time_text_embed.time_proj";
/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;
/// Between the numbers of two rows.
const ROW: f32 = 1000.0;

/// What makes all vectors of the modulation: diffusers' `ChromaApproximator`.
#[derive(Clone, Debug)]
pub struct ChromaApproximator {
    in_proj: Linear,
    layers: Vec<(RmsNorm, TimestepEmbedding)>,
    out_proj: Linear,
}

impl ChromaApproximator {
    /// `layers` layers of width `hidden`, from `inputs` to `outputs`.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, inputs: usize, outputs: usize, hidden: usize, layers: usize) -> Result<Self> {
        let layer = |i: usize| {
            // PyTorch's epsilon where none is said.
            let norm = RmsNorm::new(&params.sub("norms").sub(i), hidden, f64::from(f32::EPSILON))?;
            Ok((norm, TimestepEmbedding::new(&params.sub("layers").sub(i), hidden, hidden)?))
        };
        Ok(Self {
            in_proj: Linear::new(&params.sub("in_proj"), inputs, hidden, true)?,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            out_proj: Linear::new(&params.sub("out_proj").zero_init(), hidden, outputs, true)?,
        })
    }

    /// x `[.., inputs]` to `[.., outputs]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.in_proj.forward(x)?;
        for (norm, layer) in &self.layers {
            x = x.add(&layer.forward(&norm.forward(&x)?)?)?;
        }
        self.out_proj.forward(&x)
    }
}

/// A block with the places of its vectors in the modulation: the first rows of each of its streams.
#[derive(Clone, Debug)]
struct Modulated<B, const N: usize> {
    block: B,
    rows: [usize; N],
}

/// `count` vectors of the modulation `[B, rows, dim]` from a row on, side by side: `[B, 1, count dim]`.
fn vectors(modulation: &Tensor, row: usize, count: usize) -> Result<Tensor> {
    modulation.narrow(1, row, count)?.flatten(1, 2)?.unsqueeze(1)
}

/// Chroma's transformer.
///
/// Inputs, with the reference's names: `hidden_states` `[B, L, in_channels]` (packed latents), `encoder_hidden_states`
/// `[B, T, joint_attention_dim]`, `timestep` `[B]` (0 to 1), `img_ids` `[L, 3]`, `txt_ids` `[T, 3]`, and maybe `attention_mask`
/// `[B, T + L]`, 0 where nothing attends to. Result `[B, L, out_channels]`.
#[derive(Debug)]
pub struct ChromaTransformer2DModel {
    config: ChromaConfig,
    params: Params,
    distilled_guidance_layer: ChromaApproximator,
    context_embedder: Linear,
    x_embedder: Linear,
    transformer_blocks: Blocks<Modulated<DoubleStream, 2>>,
    single_transformer_blocks: Blocks<Modulated<SingleStream, 1>>,
    norm_out: LayerNorm,
    proj_out: Linear,
}

impl ChromaTransformer2DModel {
    /// A model with PyTorch's starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: ChromaConfig, root: &ParamBuilder) -> Result<Self> {
        let (dim, heads) = (config.inner_dim(), config.num_attention_heads);
        // Single blocks come first among the rows, then the latents of all double blocks, then their texts.
        let latents = 3 * config.num_single_layers;
        let texts = latents + 6 * config.num_layers;
        let double = |params: &ParamBuilder, i| {
            let feed_forward = |kind: StreamKind| gelu_feed_forward(params, kind, dim, 4 * dim);
            let block = DoubleStream::new(params, QkvConfig::joint(dim, heads), feed_forward)?;
            Ok(Modulated { block, rows: [texts + 6 * i, latents + 6 * i] })
        };
        let single = |params: &ParamBuilder, i| {
            let block = SingleStream::new(params, dim, heads)?;
            Ok::<_, flowtape_engine::Error>(Modulated { block, rows: [3 * i] })
        };
        let outputs = config.patch_size.pow(2) * config.out_channels();
        Ok(Self {
            distilled_guidance_layer: ChromaApproximator::new(
                &root.sub("distilled_guidance_layer"),
                config.approximator_num_channels,
                dim,
                config.approximator_hidden_dim,
                config.approximator_layers,
            )?,
            context_embedder: Linear::new(&root.sub("context_embedder"), config.joint_attention_dim, dim, true)?,
            x_embedder: Linear::new(&root.sub("x_embedder"), config.in_channels, dim, true)?,
            transformer_blocks: Blocks::new(&root.sub("transformer_blocks"), config.num_layers, double)?,
            single_transformer_blocks: Blocks::new(
                &root.sub("single_transformer_blocks"),
                config.num_single_layers,
                single,
            )?,
            norm_out: LayerNorm::new(&root.sub("norm_out"), dim, EPS, false)?,
            proj_out: Linear::new(&root.sub("proj_out").zero_init(), dim, outputs, true)?,
            params: root.params(),
            config,
        })
    }

    /// What each row is made of beside the time, f32 `[rows, ..]`: a guidance of 0 and the row's number.
    ///
    /// Numbers reach 1000 times the rows: the table is made on the host, in f32's own roundings, wherever the model is.
    fn rows(&self, device: &Device) -> Result<Tensor> {
        let (host, rows, channels) =
            (Device::cpu(), self.config.modulation_rows(), self.config.approximator_num_channels);
        let numbers: Vec<f32> = (0..rows).map(|row| row as f32 * ROW).collect();
        let project = |numbers: &Tensor, channels| timestep_embedding(numbers, &TimestepProjection::new(channels));
        let numbers = project(&Tensor::from_vec(numbers, &[rows], &host)?, channels / 2)?;
        let guidance = project(&Tensor::from_vec(vec![0f32], &[1], &host)?, channels / 4)?;
        Tensor::cat(&[&guidance.expand(&[rows, channels / 4])?, &numbers], 1)?.to_device(device)
    }

    /// All vectors of the modulation `[B, rows, dim]`, in the dtype of the latents.
    fn modulation(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<Tensor> {
        let latents = inputs.tensor("hidden_states")?;
        let times = inputs.tensor("timestep")?.mul_scalar(1000.0)?;
        let (batch, rows, channels) =
            (times.numel(), self.config.modulation_rows(), self.config.approximator_num_channels);
        let time = time_proj(TIME_PROJ, &times, &TimestepProjection::new(channels / 4))?;
        let time = time.unsqueeze(1)?.expand(&[batch, rows, channels / 4])?;
        let own = self.rows(latents.device())?.unsqueeze(0)?.expand(&[batch, rows, channels / 4 * 3])?;
        let input = Tensor::cat(&[&time, &own], 2)?.to_dtype(latents.dtype())?;
        Ok(self.distilled_guidance_layer.forward(&input)?)
    }
}

impl FlowModel for ChromaTransformer2DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let image = self.x_embedder.forward(inputs.tensor("hidden_states")?)?;
        let text = self.context_embedder.forward(inputs.tensor("encoder_hidden_states")?)?;
        let modulation = self.modulation(inputs)?;
        let rope = RopeTables::of_ids(inputs, &["txt_ids", "img_ids"], &self.config.axes_dims_rope, THETA)?;
        let mask = inputs.optional("attention_mask").map(key_mask).transpose()?;
        let (joint, streams) = JointTokens::new(inputs, [text, image], &rope, mask)?;
        let [double, single] = [joint.clone(), joint.clone()];
        let [text, image] =
            self.transformer_blocks.run(streams, [&modulation], move |layer, streams, [modulation]| {
                let [of_text, of_image] =
                    [vectors(modulation, layer.rows[0], 6)?, vectors(modulation, layer.rows[1], 6)?];
                layer.block.forward(streams, [&of_text, &of_image], &double)
            })?;
        let x = Tensor::cat(&[&text, &image], 1)?;
        let [x] = self.single_transformer_blocks.run([x], [&modulation], move |layer, [x], [modulation]| {
            Ok([layer.block.forward(x, &vectors(modulation, layer.rows[0], 3)?, &single)?])
        })?;
        let [shift, scale] = equal_parts(&vectors(&modulation, self.config.modulation_rows() - 2, 2)?, 2)?;
        let image = self.norm_out.modulated(&joint.latents(&x)?, &shift, &scale)?;
        Ok(joint.gather(&self.proj_out.forward(&image)?)?.into())
    }
}

impl Transformer for ChromaTransformer2DModel {
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
