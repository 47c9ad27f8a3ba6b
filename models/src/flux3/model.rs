//! diffusers' `Flux3Transformer2DModel`: image, reference images and text each have blocks of their own, and then share some.
//! No layer has a bias.

use flowtape_engine::nn::{
    Activation, Blocks, FeedForward, LayerNorm, Linear, ParamBuilder, Params, TimestepEmbedding, TimestepProjection,
};
use flowtape_engine::{Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::Flux3Config;
use crate::blocks::{
    AdaLayerNormContinuous, Modulation, QKV, QkvConfig, QkvHeads, RopeTables, attend, equal_parts, gate, time_proj,
};
use crate::config::config_json;
use crate::flux2::feed_forward;
use crate::{Error, Transformer};

/// diffusers' layer that projects times.
const TIME_PROJ: &str = "time_proj";
/// The name of the references' mode.
const IMAGE_COND: &str = "image_cond";

/// A block: attention and a feed-forward layer side by side, each with matrices of its own.
#[derive(Clone, Debug)]
pub struct Flux3Block {
    norm: LayerNorm,
    qkv: QkvHeads,
    to_out: Linear,
    feed_forward: FeedForward,
}

impl Flux3Block {
    /// A block of a model of this configuration.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, config: &Flux3Config) -> Result<Self> {
        let (dim, attn) = (config.inner_dim(), params.sub("attn"));
        let qkv = QkvConfig { bias: false, eps: config.eps, ..QkvConfig::joint(dim, config.num_attention_heads) };
        Ok(Self {
            norm: LayerNorm::new(params, dim, config.eps, false)?,
            qkv: QkvHeads::new(&attn, QKV, qkv)?,
            to_out: Linear::new(&attn.sub("to_out").sub(0), dim, dim, false)?,
            feed_forward: feed_forward(&params.sub("ff"), dim, config.mlp_dim())?,
        })
    }

    /// x `[B, L, dim]` with its modulation `[B, 1, 3 dim]`, or one per token: shift, scale and gate.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(&self, x: &Tensor, modulation: &Tensor, rope: &RopeTables) -> Result<Tensor> {
        let [shift, scale, of_gate] = equal_parts(modulation, 2)?;
        let h = self.norm.modulated(x, &shift, &scale)?;
        let attention = self.to_out.forward(&attend(self.qkv.forward(&h, Some(rope))?, None)?)?;
        gate(x, &of_gate, &attention.add(&self.feed_forward.forward(&h)?)?)
    }
}

/// What a mode has for itself: its embedder, its blocks, and how it is modulated in them and in those of all.
#[derive(Debug)]
struct Mode {
    embedder: Linear,
    early: Modulation,
    blocks: Blocks<Flux3Block>,
    single: Modulation,
}

impl Mode {
    fn new(
        root: &ParamBuilder,
        name: &str,
        [embedder, blocks]: [ParamBuilder; 2],
        inputs: usize,
        config: &Flux3Config,
    ) -> Result<Self> {
        let dim = config.inner_dim();
        let modulation = |stage| Modulation::with(&root.sub(stage).sub(name).sub("linear"), dim, 3, false);
        Ok(Self {
            embedder: Linear::new(&embedder, inputs, dim, false)?,
            early: modulation("early_stream_modulations")?,
            blocks: Blocks::new(&blocks, config.num_layers, |params, _| Flux3Block::new(params, config))?,
            single: modulation("single_stream_modulations")?,
        })
    }

    /// Tokens `[B, L, inputs]` after the mode's own blocks, and their modulation `[B, L, 3 dim]` in those of all.
    fn forward(&self, tokens: &Tensor, temb: &Tensor, rope: RopeTables) -> Result<[Tensor; 2]> {
        let modulation = self.early.together(temb)?;
        let [x] =
            self.blocks.run([self.embedder.forward(tokens)?], [&modulation], move |block, [x], [modulation]| {
                Ok([block.forward(x, modulation, &rope)?])
            })?;
        let single = self.single.together(temb)?;
        let (batch, len, width) = (x.dim(0)?, x.dim(1)?, single.dim(2)?);
        Ok([x, single.expand(&[batch, len, width])?])
    }
}

/// FLUX.3's transformer.
///
/// Inputs, with the reference's names: `hidden_states` `[B, L, in_channels]` (latents as tokens), `encoder_hidden_states`
/// `[B, T, joint_attention_dim]`, `timestep` `[B]` (0 to 1), `img_ids` `[L, 4]`, `txt_ids` `[T, 4]`, and where there are references
/// `image_cond_hidden_states` `[B, R, cond_in_channels]` with `image_cond_ids` `[R, 4]`. Text and references have time 0. A model
/// with a flow map needs `target_timestep` `[B]`. Result `[B, L, in_channels]`.
#[derive(Debug)]
pub struct Flux3Transformer2DModel {
    config: Flux3Config,
    params: Params,
    timestep_embedder: TimestepEmbedding,
    target_timestep_embedder: Option<TimestepEmbedding>,
    image: Mode,
    image_cond: Mode,
    text: Mode,
    single_transformer_blocks: Blocks<Flux3Block>,
    norm_out: AdaLayerNormContinuous,
    proj_out: Linear,
}

impl Flux3Transformer2DModel {
    /// A model with PyTorch's starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: Flux3Config, root: &ParamBuilder) -> Result<Self> {
        let dim = config.inner_dim();
        let embedder =
            |name| TimestepEmbedding::with(&root.sub(name), config.timestep_channels, dim, Activation::Silu, false);
        let image = |name, inputs| {
            let own = [root.sub("x_embedders").sub(name), root.sub("mode_blocks").sub(name)];
            Mode::new(root, name, own, inputs, &config)
        };
        let text = [root.sub("context_embedder"), root.sub("txt_mode_blocks")];
        let single = |params: &ParamBuilder, _| Flux3Block::new(params, &config);
        Ok(Self {
            timestep_embedder: embedder("timestep_embedder")?,
            target_timestep_embedder: config.flow_map.then(|| embedder("target_timestep_embedder")).transpose()?,
            image: image("image", config.in_channels)?,
            image_cond: image(IMAGE_COND, config.cond_in_channels)?,
            text: Mode::new(root, "txt", text, config.joint_attention_dim, &config)?,
            single_transformer_blocks: Blocks::new(
                &root.sub("single_transformer_blocks"),
                config.num_single_layers,
                single,
            )?,
            norm_out: AdaLayerNormContinuous::new(&root.sub("norm_out"), dim, config.eps, false)?,
            proj_out: Linear::new(&root.sub("proj_out").zero_init(), dim, config.in_channels, false)?,
            params: root.params(),
            config,
        })
    }

    /// The embeddings `[B, dim]` of the image's time, and of time 0, in the dtype of the latents.
    fn times(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<[Tensor; 2]> {
        let (now, dtype) = (inputs.tensor("timestep")?, inputs.tensor("hidden_states")?.dtype());
        let embed = |embedder: &TimestepEmbedding, times: &Tensor| -> Result<Tensor> {
            let options = TimestepProjection::new(self.config.timestep_channels);
            embedder.forward(&time_proj(TIME_PROJ, &times.mul_scalar(1000.0)?, &options)?.to_dtype(dtype)?)
        };
        let times = [embed(&self.timestep_embedder, now)?, embed(&self.timestep_embedder, &now.mul_scalar(0.0)?)?];
        let target = inputs.optional("target_timestep");
        let target = match (&self.target_timestep_embedder, target) {
            (Some(embedder), Some(target)) => embed(embedder, target)?,
            (None, None) => return Ok(times),
            (embedder, target) => {
                let expected =
                    if embedder.is_some() { "times [B], as flow_map is true" } else { "none: flow_map is false" };
                let got = target.map_or("none".to_owned(), |target| format!("{:?}", target.dims()));
                return Err(Error::Input { name: "target_timestep".into(), expected, got });
            }
        };
        let [now, zero] = times;
        Ok([now.add(&target)?, zero.add(&target)?])
    }
}

impl FlowModel for Flux3Transformer2DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let [now, zero] = self.times(inputs)?;
        let (image, text) = (inputs.tensor("hidden_states")?, inputs.tensor("encoder_hidden_states")?);
        let references = inputs.optional("image_cond_hidden_states");
        let mut ids = vec!["txt_ids", "img_ids"];
        ids.extend(references.map(|_| "image_cond_ids"));
        let (axes, theta) = (&self.config.axes_dims_rope, self.config.rope_theta as f64);
        let rope = RopeTables::of_ids(inputs, &ids, axes, theta)?;
        let (text_len, image_len) = (text.dim(1)?, image.dim(1)?);
        let mut parts = vec![
            self.text.forward(text, &zero, rope.narrow(0, text_len)?)?,
            self.image.forward(image, &now, rope.narrow(text_len, image_len)?)?,
        ];
        if let Some(references) = references {
            let rope = rope.narrow(text_len + image_len, references.dim(1)?)?;
            parts.push(self.image_cond.forward(references, &zero, rope)?);
        }
        let together = |which: usize| Tensor::cat(&parts.iter().map(|part| &part[which]).collect::<Vec<_>>(), 1);
        let (x, modulation) = (together(0)?, together(1)?);
        let [x] = self
            .single_transformer_blocks
            .run([x], [&modulation], move |block, [x], [modulation]| Ok([block.forward(x, modulation, &rope)?]))?;
        let image = x.narrow(1, text_len, image_len)?;
        Ok(self.proj_out.forward(&self.norm_out.forward(&image, &now)?)?.into())
    }
}

impl Transformer for Flux3Transformer2DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    /// All that references have for themselves where there are none, and the modulation of a mode's blocks without blocks.
    fn paths_without_gradient(&self, inputs: &ModelInputs) -> Vec<String> {
        let mut unread = Vec::new();
        if inputs.get("image_cond_hidden_states").is_none() {
            let stages = ["early_stream_modulations", "single_stream_modulations", "x_embedders", "mode_blocks"];
            unread.extend(stages.map(|stage| format!("{stage}.{IMAGE_COND}.")));
        }
        if self.config.num_layers == 0 {
            unread.push("early_stream_modulations.".into());
        }
        unread
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        for mode in [&mut self.image, &mut self.image_cond, &mut self.text] {
            mode.blocks.set_checkpointing(on);
        }
        self.single_transformer_blocks.set_checkpointing(on);
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::DType;
    use flowtape_engine::meta::Meta;

    use super::*;

    #[test]
    fn the_distilled_model_has_a_second_time() {
        let config = Flux3Config { flow_map: true, ..Flux3Config::default() };
        let params = ParamBuilder::new(0, DType::BF16, &Meta::default().device());
        let model = Flux3Transformer2DModel::new(config, &params).unwrap();
        // What PyTorch counts for the published one.
        assert_eq!((model.params().numel(), model.params().len()), (5_548_681_984, 359));
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::BF16, params.device()).unwrap();
        let inputs = ModelInputs::new().with("timestep", zeros(&[1])).with("hidden_states", zeros(&[1, 4, 128]));
        let error = model.forward(&inputs).unwrap_err().to_string();
        assert!(error.contains("target_timestep") && error.contains("flow_map"), "{error}");
    }
}
