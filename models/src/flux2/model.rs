//! diffusers' `Flux2Transformer2DModel`. No layer has a bias, and all blocks of a kind share one modulation.

use flowtape_engine::nn::{
    Activation, Blocks, FeedForward, LayerNorm, Linear, ParamBuilder, Params, RmsNorm, TimestepEmbedding,
    TimestepProjection,
};
use flowtape_engine::{Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::Flux2Config;
use crate::Transformer;
use crate::blocks::{
    AdaLayerNormContinuous, DoubleStream, JointTokens, Modulation, QkvConfig, RopeTables, StreamKind, gate,
    split_heads, time_proj,
};
use crate::config::config_json;

/// diffusers' layer that projects time and then guidance.
const TIME_PROJ: &str = "time_guidance_embed.time_proj";

/// A linear layer without bias.
fn linear(params: &ParamBuilder, inputs: usize, outputs: usize) -> Result<Linear> {
    Linear::new(params, inputs, outputs, false)
}

/// diffusers' `Flux2FeedForward`: `linear_in`, silu of the first half times the second, `linear_out`.
///
/// # Errors
/// When a parameter can't be made.
pub fn feed_forward(params: &ParamBuilder, dim: usize, inner: usize) -> Result<FeedForward> {
    let linear_in = linear(&params.sub("linear_in"), dim, 2 * inner)?;
    let linear_out = linear(&params.sub("linear_out"), inner, dim)?;
    Ok(FeedForward::from_parts(linear_in, Activation::SwigluGateFirst, linear_out))
}

/// A double block of a model of this configuration.
fn double_block(params: &ParamBuilder, config: &Flux2Config) -> Result<DoubleStream> {
    let dim = config.inner_dim();
    let qkv = QkvConfig { bias: false, eps: config.eps, ..QkvConfig::joint(dim, config.num_attention_heads) };
    DoubleStream::new(params, qkv, |kind| {
        let name = if kind == StreamKind::Text { "ff_context" } else { "ff" };
        feed_forward(&params.sub(name), dim, config.mlp_dim())
    })
}

/// A single block: text and image as one sequence; attention and feed-forward side by side share their projections (a
/// parallel block, as in ViT-22B).
#[derive(Clone, Debug)]
pub struct Flux2SingleTransformerBlock {
    norm: LayerNorm,
    to_qkv_mlp_proj: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    to_out: Linear,
    /// Queries, keys, values, and the feed-forward layer's gate and values.
    widths: [usize; 4],
    heads: usize,
}

impl Flux2SingleTransformerBlock {
    /// A block of a model of this configuration.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, config: &Flux2Config) -> Result<Self> {
        let (dim, mlp, attn) = (config.inner_dim(), config.mlp_dim(), params.sub("attn"));
        let head_norm = |name| RmsNorm::new(&attn.sub(name), config.attention_head_dim, config.eps);
        Ok(Self {
            norm: LayerNorm::new(params, dim, config.eps, false)?,
            to_qkv_mlp_proj: linear(&attn.sub("to_qkv_mlp_proj"), dim, 3 * dim + 2 * mlp)?,
            norm_q: head_norm("norm_q")?,
            norm_k: head_norm("norm_k")?,
            to_out: linear(&attn.sub("to_out"), dim + mlp, dim)?,
            widths: [dim, dim, dim, 2 * mlp],
            heads: config.num_attention_heads,
        })
    }

    /// x `[B, L, dim]`, text first, with its modulation `[B, 1, 3 dim]`: shift, scale and gate.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(&self, x: &Tensor, modulation: &Tensor, joint: &JointTokens) -> Result<Tensor> {
        let (m, rope) = (modulation.chunk(3, 2)?, joint.rope());
        let h = self.norm.modulated(x, &m[0], &m[1])?;
        let parts = self.to_qkv_mlp_proj.forward(&h)?.split(&self.widths, 2)?;
        let heads = |i: usize| split_heads(&parts[i], self.heads);
        let rotated = |norm: &RmsNorm, x| norm.rotated(&x, &rope.cos, &rope.sin, rope.layout);
        let (q, k) = (rotated(&self.norm_q, heads(0)?)?, rotated(&self.norm_k, heads(1)?)?);
        let attention = joint.attend([q.transpose(1, 2)?, k.transpose(1, 2)?, heads(2)?.transpose(1, 2)?])?;
        let mlp = Activation::SwigluGateFirst.forward(&parts[3])?;
        gate(x, &m[2], &self.to_out.forward(&Tensor::cat(&[&attention, &mlp], 2)?)?)
    }
}

/// The embedding of time, and of guidance where the model has one: diffusers' `Flux2TimestepGuidanceEmbeddings`.
#[derive(Clone, Debug)]
struct TimeGuidanceEmbed {
    timestep_embedder: TimestepEmbedding,
    guidance_embedder: Option<TimestepEmbedding>,
    projection: TimestepProjection,
}

impl TimeGuidanceEmbed {
    fn new(params: &ParamBuilder, config: &Flux2Config) -> Result<Self> {
        let channels = config.timestep_guidance_channels;
        let embedder =
            |name| TimestepEmbedding::with(&params.sub(name), channels, config.inner_dim(), Activation::Silu, false);
        Ok(Self {
            timestep_embedder: embedder("timestep_embedder")?,
            guidance_embedder: config.guidance_embeds.then(|| embedder("guidance_embedder")).transpose()?,
            projection: TimestepProjection::new(channels),
        })
    }

    /// `[B, dim]` in the dtype of the latents. A guidance is passed over where nothing embeds it, as in the reference.
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<Tensor> {
        let dtype = inputs.tensor("hidden_states")?.dtype();
        let embed = |embedder: &TimestepEmbedding, times: &Tensor| {
            let projection = time_proj(TIME_PROJ, &times.mul_scalar(1000.0)?, &self.projection)?;
            embedder.forward(&projection.to_dtype(dtype)?)
        };
        let time = embed(&self.timestep_embedder, inputs.tensor("timestep")?)?;
        Ok(match (&self.guidance_embedder, inputs.optional("guidance")) {
            (Some(embedder), Some(guidance)) => time.add(&embed(embedder, guidance)?)?,
            _ => time,
        })
    }
}

/// FLUX.2's transformer.
///
/// Inputs, with the reference's names: `hidden_states` `[B, L, in_channels]` (latents as tokens), `encoder_hidden_states`
/// `[B, T, joint_attention_dim]`, `timestep` `[B]` (0 to 1), `img_ids` `[L, 4]` or `[B, L, 4]` and `txt_ids` `[T, 4]` or
/// `[B, T, 4]` (alike in all samples; best on the host, where they are read), `guidance` `[B]` where there is one. Result
/// `[B, L, out_channels]`.
#[derive(Debug)]
pub struct Flux2Transformer2DModel {
    config: Flux2Config,
    params: Params,
    time_guidance_embed: TimeGuidanceEmbed,
    double_stream_modulation_img: Modulation,
    double_stream_modulation_txt: Modulation,
    single_stream_modulation: Modulation,
    x_embedder: Linear,
    context_embedder: Linear,
    transformer_blocks: Blocks<DoubleStream>,
    single_transformer_blocks: Blocks<Flux2SingleTransformerBlock>,
    norm_out: AdaLayerNormContinuous,
    proj_out: Linear,
}

impl Flux2Transformer2DModel {
    /// A model with PyTorch's starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: Flux2Config, root: &ParamBuilder) -> Result<Self> {
        let dim = config.inner_dim();
        let outputs = config.patch_size.pow(2) * config.out_channels();
        let modulation = |name, parts| Modulation::with(&root.sub(name).sub("linear"), dim, parts, false);
        let double = |params: &ParamBuilder, _| double_block(params, &config);
        let single = |params: &ParamBuilder, _| Flux2SingleTransformerBlock::new(params, &config);
        Ok(Self {
            time_guidance_embed: TimeGuidanceEmbed::new(&root.sub("time_guidance_embed"), &config)?,
            double_stream_modulation_img: modulation("double_stream_modulation_img", 6)?,
            double_stream_modulation_txt: modulation("double_stream_modulation_txt", 6)?,
            single_stream_modulation: modulation("single_stream_modulation", 3)?,
            x_embedder: linear(&root.sub("x_embedder"), config.in_channels, dim)?,
            context_embedder: linear(&root.sub("context_embedder"), config.joint_attention_dim, dim)?,
            transformer_blocks: Blocks::new(&root.sub("transformer_blocks"), config.num_layers, double)?,
            single_transformer_blocks: Blocks::new(
                &root.sub("single_transformer_blocks"),
                config.num_single_layers,
                single,
            )?,
            norm_out: AdaLayerNormContinuous::new(&root.sub("norm_out"), dim, config.eps, false)?,
            proj_out: linear(&root.sub("proj_out").zero_init(), dim, outputs)?,
            params: root.params(),
            config,
        })
    }
}

impl FlowModel for Flux2Transformer2DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let temb = self.time_guidance_embed.forward(inputs)?;
        let rope = RopeTables::of_ids(
            inputs,
            &["txt_ids", "img_ids"],
            &self.config.axes_dims_rope,
            self.config.rope_theta as f64,
        )?;
        let image = self.x_embedder.forward(inputs.tensor("hidden_states")?)?;
        let text = self.context_embedder.forward(inputs.tensor("encoder_hidden_states")?)?;
        let m_text = self.double_stream_modulation_txt.together(&temb)?;
        let m_image = self.double_stream_modulation_img.together(&temb)?;
        let (joint, streams) = JointTokens::new(inputs, [text, image], &rope, None)?;
        let [double, single] = [joint.clone(), joint.clone()];
        let [text, image] = self
            .transformer_blocks
            .run(streams, [&m_text, &m_image], move |block, streams, m| block.forward(streams, m, &double))?;
        let x = Tensor::cat(&[&text, &image], 1)?;
        let m = self.single_stream_modulation.together(&temb)?;
        let [x] = self
            .single_transformer_blocks
            .run([x], [&m], move |block, [x], [m]| Ok([block.forward(x, m, &single)?]))?;
        let image = self.norm_out.forward(&joint.latents(&x)?, &temb)?;
        Ok(joint.gather(&self.proj_out.forward(&image)?)?.into())
    }
}

impl Transformer for Flux2Transformer2DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    /// The embedder of a guidance without one, and the modulation of blocks where there are none.
    fn paths_without_gradient(&self, inputs: &ModelInputs) -> Vec<String> {
        let mut unread = Vec::new();
        if inputs.get("guidance").is_none() {
            unread.push("time_guidance_embed.guidance_embedder.".into());
        }
        if self.config.num_layers == 0 {
            unread.push("double_stream_modulation_".into());
        }
        if self.config.num_single_layers == 0 {
            unread.push("single_stream_modulation.".into());
        }
        unread
    }

    fn shares_tokens(&self) -> bool {
        true
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        self.transformer_blocks.set_checkpointing(on);
        self.single_transformer_blocks.set_checkpointing(on);
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::{DType, Device, Tape};
    use serde_json::json;

    use super::super::{latent_ids, text_ids};
    use super::*;
    use crate::testing::{normal, start_at_zero};

    fn model(guidance_embeds: bool, dtype: DType) -> Flux2Transformer2DModel {
        let config = json!({
            "in_channels": 6, "out_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 7, "timestep_guidance_channels": 10, "mlp_ratio": 2.5,
            "axes_dims_rope": [2, 2, 2, 2], "guidance_embeds": guidance_embeds,
        });
        let config = Flux2Config::from_json(&config).unwrap();
        Flux2Transformer2DModel::new(config, &ParamBuilder::new(3, dtype, &Device::cpu())).unwrap()
    }

    fn inputs(dtype: DType) -> ModelInputs {
        let times = |value| Tensor::full(&[2], value, DType::F32, &Device::cpu()).unwrap();
        ModelInputs::new()
            .with("hidden_states", normal(&[2, 6, 6]).to_dtype(dtype).unwrap())
            .with("encoder_hidden_states", normal(&[2, 3, 7]).to_dtype(dtype).unwrap())
            .with("timestep", times(0.25))
            .with("img_ids", latent_ids(2, 3, 2).unwrap())
            .with("txt_ids", text_ids(3, 2).unwrap())
            .with("guidance", times(3.5))
    }

    fn predict(model: &Flux2Transformer2DModel, inputs: &ModelInputs) -> Vec<f32> {
        let sample = model.forward(inputs).unwrap().sample;
        assert_eq!(sample.dims(), [2, 6, 4]);
        sample.to_vec().unwrap()
    }

    #[test]
    fn guidance_counts_where_it_is_embedded() {
        let (with, without) = (inputs(DType::F32), {
            let mut inputs = inputs(DType::F32);
            inputs.remove("guidance");
            inputs
        });
        let embeds = model(true, DType::F32);
        assert_ne!(predict(&embeds, &with), predict(&embeds, &without));
        let plain = model(false, DType::F32);
        assert_eq!(predict(&plain, &with), predict(&plain, &without));
        assert!(plain.params().iter().all(|p| !p.path().contains("guidance_embedder")));
    }

    #[test]
    fn what_the_inputs_do_not_reach_needs_no_gradient() {
        let mut plain = inputs(DType::F32);
        plain.remove("guidance");
        let check = |model: &Flux2Transformer2DModel, inputs: &ModelInputs| {
            let (tape, mut given) = (Tape::new(), inputs.clone());
            given.attach(&tape);
            let loss = model.forward(&given).unwrap().sample.square().unwrap().sum_all().unwrap();
            let gradients = tape.backward(&loss).unwrap();
            let without = model.parameters_without_gradient(inputs);
            model.params().check_gradients(&gradients, &without).unwrap();
            let reached = |name: &String| gradients.of(model.params().get(name).unwrap()).is_some();
            assert!(!without.iter().any(reached), "{without:?}");
            without.len()
        };
        let embeds = model(true, DType::F32);
        assert_eq!((check(&embeds, &inputs(DType::F32)), check(&embeds, &plain)), (0, 2));
        let of = |config: Flux2Config| {
            Flux2Transformer2DModel::new(config, &ParamBuilder::new(3, DType::F32, &Device::cpu())).unwrap()
        };
        let config = &embeds.config;
        assert_eq!(check(&of(Flux2Config { num_single_layers: 0, ..config.clone() }), &plain), 2 + 1);
        assert_eq!(check(&of(Flux2Config { num_layers: 0, ..config.clone() }), &plain), 2 + 2);
    }

    #[test]
    fn samples_may_share_their_positions() {
        let model = model(true, DType::F32);
        let shared = inputs(DType::F32)
            .with("img_ids", latent_ids(2, 3, 1).unwrap().squeeze(0).unwrap())
            .with("txt_ids", text_ids(3, 1).unwrap().squeeze(0).unwrap());
        assert_eq!(predict(&model, &shared), predict(&model, &inputs(DType::F32)));
        let error = model.forward(&shared.with("img_ids", normal(&[6, 3]))).unwrap_err().to_string();
        assert!(error.contains("img_ids") && error.contains("[6, 3] for 4 axes"), "{error}");
    }

    #[test]
    fn bf16_flows_through_and_is_near_f32() {
        let (wide, narrow) = (model(true, DType::F32), model(true, DType::BF16));
        let tape = Tape::new();
        let mut given = inputs(DType::BF16);
        given.attach(&tape);
        let sample = narrow.forward(&given).unwrap().sample;
        assert_eq!(sample.dtype(), DType::BF16);
        let (got, want) = (sample.to_vec::<f32>().unwrap(), predict(&wide, &inputs(DType::F32)));
        let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        // A bf16 number is off by 2^-9 of itself; some ten roundings lie one behind the other.
        let worst = got.iter().zip(&want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst < largest * 10.0 / 512.0, "{worst} of {largest}");
        let gradients = tape.backward(&sample.to_dtype(DType::F32).unwrap().square().unwrap().sum_all().unwrap());
        narrow.params().check_gradients(&gradients.unwrap(), &[]).unwrap();
    }

    #[test]
    fn from_a_zero_start_it_predicts_zero() {
        let model = model(true, DType::F32);
        let zero = model.params().iter().filter(|p| p.zero_init());
        let mut names: Vec<&str> = zero.map(|p| p.path()).collect();
        names.sort_unstable();
        let modulations = ["double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"];
        let mut expected: Vec<String> = modulations.map(|name| format!("{name}.linear.weight")).into();
        expected.extend(["norm_out.linear.weight".into(), "proj_out.weight".into()]);
        expected.sort_unstable();
        assert_eq!(names, expected);
        start_at_zero(model.params());
        assert!(predict(&model, &inputs(DType::F32)).iter().all(|v| *v == 0.0));
    }
}
