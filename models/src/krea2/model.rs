//! diffusers' `Krea2Transformer2DModel`. Each norm's weight counts from 1.

use flowtape_engine::nn::{
    Activation, Blocks, Linear, ParamBuilder, Params, RmsNorm, TimestepEmbedding, TimestepProjection,
};
use flowtape_engine::ops::{modulate, pointwise};
use flowtape_engine::{Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::Krea2Config;
use crate::blocks::{
    QKV, QkNorm, QkvConfig, QkvHeads, RopeTables, ScaleShiftTable, SwiGlu, attend, gate, key_mask, time_proj,
};
use crate::config::config_json;
use crate::{Error, Transformer};

/// diffusers' names of the layers of a SwiGLU: gate, value and output.
const SWIGLU: [&str; 3] = ["gate", "up", "down"];
/// The path that a probe of the projection of time is asked with.
const TIME_PROJ: &str = "time_embed.time_proj";

/// The sizes of a block.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    dim: usize,
    heads: usize,
    kv_heads: usize,
    inner: usize,
    eps: f64,
}

/// Attention in which several heads share keys and values, and whose result passes a gate made of its input.
#[derive(Clone, Debug)]
struct GatedAttention {
    qkv: QkvHeads,
    to_gate: Linear,
    to_out: Linear,
}

impl GatedAttention {
    fn new(params: &ParamBuilder, Sizes { dim, heads, kv_heads, eps, .. }: Sizes) -> Result<Self> {
        let norm = QkNorm::PerHeadFromOne;
        let qkv = QkvConfig { bias: false, norm, eps, kv_heads, ..QkvConfig::joint(dim, heads) };
        let linear = |params: &ParamBuilder| Linear::new(params, dim, dim, false);
        Ok(Self {
            qkv: QkvHeads::new(params, QKV, qkv)?,
            to_gate: linear(&params.sub("to_gate"))?,
            to_out: linear(&params.sub("to_out").sub(0))?,
        })
    }

    /// x `[B, L, dim]`, rotated where there are tables; the mask is added to the scores.
    fn forward(&self, x: &Tensor, rope: Option<&RopeTables>, mask: Option<&Tensor>) -> Result<Tensor> {
        let attention = attend(self.qkv.forward(x, rope)?, mask)?;
        let gated = pointwise([&attention, &self.to_gate.forward(x)?], |[x, gate]| x * gate.sigmoid())?;
        self.to_out.forward(&gated)
    }
}

/// The layers of a block: before each of attention and the feed-forward layer a norm.
#[derive(Clone, Debug)]
struct Layers {
    norm1: RmsNorm,
    attn: GatedAttention,
    norm2: RmsNorm,
    ff: SwiGlu,
}

impl Layers {
    fn new(params: &ParamBuilder, sizes: Sizes) -> Result<Self> {
        let norm = |name| RmsNorm::from_one(&params.sub(name), sizes.dim, sizes.eps);
        Ok(Self {
            norm1: norm("norm1")?,
            attn: GatedAttention::new(&params.sub("attn"), sizes)?,
            norm2: norm("norm2")?,
            ff: SwiGlu::new(&params.sub("ff"), SWIGLU, sizes.dim, sizes.inner)?,
        })
    }

    /// As a block of the text: neither positions nor modulation.
    fn plain(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let x = x.add(&self.attn.forward(&self.norm1.forward(x)?, None, mask)?)?;
        x.add(&self.ff.forward(&self.norm2.forward(&x)?)?)
    }
}

/// A block of the joint sequence, modulated by a vector of all blocks and a table of its own.
#[derive(Clone, Debug)]
struct Block {
    scale_shift_table: ScaleShiftTable,
    layers: Layers,
}

impl Block {
    /// x `[B, L, dim]` and the modulation of all blocks `[B, 1, 6, dim]`: scale, shift and gate, twice.
    fn forward(&self, x: &Tensor, modulation: &Tensor, rope: &RopeTables, mask: Option<&Tensor>) -> Result<Tensor> {
        let Layers { norm1, attn, norm2, ff } = &self.layers;
        let m = self.scale_shift_table.forward(modulation)?;
        let h = modulate(&norm1.forward(x)?, &m[1], &m[0])?;
        let x = gate(x, &m[2], &attn.forward(&h, Some(rope), mask)?)?;
        let h = modulate(&norm2.forward(&x)?, &m[4], &m[3])?;
        gate(&x, &m[5], &ff.forward(&h)?)
    }
}

/// What makes one sequence of the states of several layers of a text model.
#[derive(Debug)]
struct TextFusion {
    layerwise_blocks: Blocks<Layers>,
    projector: Linear,
    refiner_blocks: Blocks<Layers>,
}

impl TextFusion {
    fn new(params: &ParamBuilder, config: &Krea2Config) -> Result<Self> {
        let sizes = Sizes {
            dim: config.text_hidden_dim,
            heads: config.text_num_attention_heads,
            kv_heads: config.text_num_key_value_heads,
            inner: config.text_intermediate_size,
            eps: config.norm_eps,
        };
        let blocks = |name, count| Blocks::new(&params.sub(name), count, |params, _| Layers::new(params, sizes));
        Ok(Self {
            layerwise_blocks: blocks("layerwise_blocks", config.num_layerwise_text_blocks)?,
            projector: Linear::new(&params.sub("projector"), config.num_text_layers, 1, false)?,
            refiner_blocks: blocks("refiner_blocks", config.num_refiner_text_blocks)?,
        })
    }

    /// States `[B, T, layers, D]` to `[B, T, D]`; the mask is added to the scores of tokens.
    fn forward(&self, states: &Tensor, mask: Option<Tensor>) -> Result<Tensor> {
        let dims = states.dims().to_vec();
        let [x] =
            self.layerwise_blocks.run([states.flatten(0, 1)?], [], |block, [x], []| Ok([block.plain(x, None)?]))?;
        let x = self.projector.forward(&x.reshape(&dims)?.transpose(2, 3)?)?.squeeze(3)?;
        let [x] = self.refiner_blocks.run([x], [], move |block, [x], []| Ok([block.plain(x, mask.as_ref())?]))?;
        Ok(x)
    }
}

/// Krea 2's transformer.
///
/// Inputs, with the reference's names: `hidden_states` `[B, L, in_channels]` (packed latents), `encoder_hidden_states`
/// `[B, T, num_text_layers, text_hidden_dim]`, `encoder_attention_mask` `[B, T]` (0 at padding) where there is one, `timestep`
/// `[B]` (0 to 1) and `position_ids` `[T + L, 3]` of the text and then the latents (best on the host, where they are read).
/// Result `[B, L, in_channels]`.
#[derive(Debug)]
pub struct Krea2Transformer2DModel {
    config: Krea2Config,
    params: Params,
    img_in: Linear,
    time_embed: TimestepEmbedding,
    time_mod_proj: Linear,
    text_fusion: TextFusion,
    txt_norm: RmsNorm,
    txt_in: TimestepEmbedding,
    transformer_blocks: Blocks<Block>,
    final_table: ScaleShiftTable,
    final_norm: RmsNorm,
    final_linear: Linear,
}

impl Krea2Transformer2DModel {
    /// A model with PyTorch's starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: Krea2Config, root: &ParamBuilder) -> Result<Self> {
        let (dim, eps, channels) = (config.inner_dim(), config.norm_eps, config.in_channels);
        let (txt_in, last) = (root.sub("txt_in"), root.sub("final_layer"));
        let two =
            |params: &ParamBuilder, inputs| TimestepEmbedding::with(params, inputs, dim, Activation::GeluTanh, true);
        let table = |params: &ParamBuilder, rows| ScaleShiftTable::new(params, "scale_shift_table", &[rows, dim], 0.0);
        let sizes = Sizes {
            dim,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            inner: config.intermediate_size,
            eps,
        };
        let block = |params: &ParamBuilder, _| {
            Ok::<_, flowtape_engine::Error>(Block {
                scale_shift_table: table(params, 6)?,
                layers: Layers::new(params, sizes)?,
            })
        };
        Ok(Self {
            img_in: Linear::new(&root.sub("img_in"), channels, dim, true)?,
            time_embed: two(&root.sub("time_embed"), config.timestep_embed_dim)?,
            time_mod_proj: Linear::new(&root.sub("time_mod_proj").zero_init(), dim, 6 * dim, true)?,
            text_fusion: TextFusion::new(&root.sub("text_fusion"), &config)?,
            txt_norm: RmsNorm::from_one(&txt_in.sub("norm"), config.text_hidden_dim, eps)?,
            txt_in: two(&txt_in, config.text_hidden_dim)?,
            transformer_blocks: Blocks::new(&root.sub("transformer_blocks"), config.num_layers, block)?,
            final_table: table(&last, 2)?,
            final_norm: RmsNorm::from_one(&last.sub("norm"), dim, eps)?,
            final_linear: Linear::new(&last.sub("linear").zero_init(), dim, channels, true)?,
            params: root.params(),
            config,
        })
    }
}

impl FlowModel for Krea2Transformer2DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let (latents, states) = (inputs.tensor("hidden_states")?, inputs.tensor("encoder_hidden_states")?);
        let Krea2Config { num_text_layers, text_hidden_dim, timestep_embed_dim, axes_dims_rope, rope_theta, .. } =
            &self.config;
        if states.rank() != 4 || states.dims()[2..] != [*num_text_layers, *text_hidden_dim] {
            let expected = "[B, T, num_text_layers, text_hidden_dim]";
            let got = format!("{:?}", states.dims());
            return Err(Error::Input { name: "encoder_hidden_states".into(), expected, got });
        }
        let (batch, dim) = (latents.dim(0)?, self.config.inner_dim());
        let times = inputs.tensor("timestep")?.mul_scalar(1000.0)?;
        let time = time_proj(TIME_PROJ, &times, &TimestepProjection::new(*timestep_embed_dim))?;
        let time = time.reshape(&[batch, 1, *timestep_embed_dim])?.to_dtype(latents.dtype())?;
        let temb = self.time_embed.forward(&time)?;
        let modulation = self.time_mod_proj.forward(&Activation::GeluTanh.forward(&temb)?)?;
        let modulation = modulation.reshape(&[batch, 1, 6, dim])?;

        let keys = inputs.optional("encoder_attention_mask").map(key_mask).transpose()?;
        let (text_len, image_len) = (states.dim(1)?, latents.dim(1)?);
        // No place of an image is padding: nothing is added to their scores.
        let mask = keys.as_ref().map(|mask| mask.pad(3, 0, image_len)).transpose()?;
        let text = self.text_fusion.forward(states, keys)?;
        let text = self.txt_in.forward(&self.txt_norm.forward(&text)?)?;
        let x = Tensor::cat(&[&text, &self.img_in.forward(latents)?], 1)?;
        let rope = RopeTables::of_ids(inputs, &["position_ids"], axes_dims_rope, *rope_theta)?;
        let [x] = self.transformer_blocks.run([x], [&modulation], move |block, [x], [modulation]| {
            Ok([block.forward(x, modulation, &rope, mask.as_ref())?])
        })?;
        let last = self.final_table.forward(&temb.unsqueeze(2)?)?;
        let image = modulate(&self.final_norm.forward(&x.narrow(1, text_len, image_len)?)?, &last[1], &last[0])?;
        Ok(self.final_linear.forward(&image)?.into())
    }
}

impl Transformer for Krea2Transformer2DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        for blocks in [&mut self.text_fusion.layerwise_blocks, &mut self.text_fusion.refiner_blocks] {
            blocks.set_checkpointing(on);
        }
        self.transformer_blocks.set_checkpointing(on);
    }
}
