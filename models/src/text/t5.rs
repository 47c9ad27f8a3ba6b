//! transformers' `T5EncoderModel` (v1.1: Raffel et al. 2020, Shazeer 2020) and `UMT5EncoderModel` (Chung et al. 2023). byT5 is
//! the former.

use flowtape_engine::nn::{Activation, Init, Linear, ParamBuilder, Params, RmsNorm};
use flowtape_engine::ops::{attention, embedding, relative_position_bias};
use flowtape_engine::{DType, Tensor, nn};
use serde::Deserialize;
use serde_json::Value;

use super::{Table, TextModel, TextModelOutput};
use crate::blocks::{QkNorm, QkvConfig, QkvHeads, key_mask};
use crate::config::{check_layers, check_sizes, object, parse, product};
use crate::{Error, Result};

/// The keys of `config.json` that matter, with transformers' defaults.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the model.
    pub d_model: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// Width of a feed-forward layer.
    pub d_ff: usize,
    /// Number of layers.
    pub num_layers: usize,
    /// Number of heads.
    pub num_heads: usize,
    /// Buckets of distances.
    pub relative_attention_num_buckets: usize,
    /// From here on distances share a bucket.
    pub relative_attention_max_distance: usize,
    /// Added to a mean square.
    pub layer_norm_epsilon: f64,
    /// The feed-forward layer: `gated-gelu` alone.
    pub feed_forward_proj: String,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "gated-gelu".into(),
        }
    }
}

impl T5Config {
    /// Reads and checks the object of `config.json`; other keys are passed over.
    ///
    /// # Errors
    /// When a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config: Self = parse("text encoder", "T5EncoderModel", object(value)?)?;
        check_sizes([
            ("vocab_size", config.vocab_size),
            ("d_model", config.d_model),
            ("num_heads times d_kv", product(&[config.num_heads, config.d_kv])),
            ("d_ff", config.d_ff),
            ("relative_attention_num_buckets", config.relative_attention_num_buckets),
        ])?;
        check_layers(1, [("num_layers", config.num_layers)])?;
        if config.feed_forward_proj != "gated-gelu" {
            let expected = "gated-gelu, that of T5 v1.1";
            return Err(Error::config("feed_forward_proj", expected, &config.feed_forward_proj));
        }
        Ok(config)
    }
}

/// A layer: attention, then a gated feed-forward layer, each normalised before.
#[derive(Clone, Debug)]
struct Block {
    norm: RmsNorm,
    qkv: QkvHeads,
    /// In T5 the first layer's is every layer's.
    relative_attention_bias: Option<Table>,
    out: Linear,
    feed_forward_norm: RmsNorm,
    gate: Linear,
    value: Linear,
    feed_forward_out: Linear,
}

impl Block {
    fn new(params: &ParamBuilder, config: &T5Config, own_bias: bool) -> Result<Self> {
        let (dim, inner, eps) = (config.d_model, config.num_heads * config.d_kv, config.layer_norm_epsilon);
        let qkv = QkvConfig {
            query_dim: dim,
            context_dim: dim,
            heads: config.num_heads,
            kv_heads: config.num_heads,
            head_dim: config.d_kv,
            bias: false,
            norm: QkNorm::None,
            eps,
        };
        let (first, second) = (params.sub("layer").sub(0), params.sub("layer").sub(1));
        let (attention, dense) = (first.sub("SelfAttention"), second.sub("DenseReluDense"));
        let bias = || {
            let rows = config.relative_attention_num_buckets;
            Table::new(&attention.sub("relative_attention_bias"), rows, config.num_heads)
        };
        Ok(Self {
            norm: RmsNorm::new(&first.sub("layer_norm"), dim, eps)?,
            qkv: QkvHeads::new(&attention, ["q", "k", "v", "", ""], qkv)?,
            relative_attention_bias: own_bias.then(bias).transpose()?,
            out: Linear::new(&attention.sub("o"), inner, dim, false)?,
            feed_forward_norm: RmsNorm::new(&second.sub("layer_norm"), dim, eps)?,
            gate: Linear::new(&dense.sub("wi_0"), dim, config.d_ff, false)?,
            value: Linear::new(&dense.sub("wi_1"), dim, config.d_ff, false)?,
            feed_forward_out: Linear::new(&dense.sub("wo"), config.d_ff, dim, false)?,
        })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor) -> flowtape_engine::Result<Tensor> {
        let [q, k, v] = self.qkv.forward(&self.norm.forward(x)?, None)?;
        // The scores are not scaled: T5's initial values do that.
        let attended = attention(&q, &k, &v, Some(bias), Some(1.0))?.transpose(1, 2)?.flatten(2, 3)?;
        let x = x.add(&self.out.forward(&attended)?)?;
        let h = self.feed_forward_norm.forward(&x)?;
        let gated = Activation::GeluTanh.forward(&self.gate.forward(&h)?)?.mul(&self.value.forward(&h)?)?;
        x.add(&self.feed_forward_out.forward(&gated)?)
    }
}

/// T5's encoder.
#[derive(Debug)]
pub struct T5EncoderModel {
    config: T5Config,
    params: Params,
    shared: Table,
    blocks: nn::Blocks<Block>,
    final_layer_norm: RmsNorm,
}

impl T5EncoderModel {
    /// A model whose parameters are the builder's. With `bias_per_layer` it is UMT5's: each layer has a table of distances,
    /// where T5's have one together.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: T5Config, bias_per_layer: bool, root: &ParamBuilder) -> Result<Self> {
        let encoder = root.sub("encoder");
        let block = |params: &ParamBuilder, i| Block::new(params, &config, bias_per_layer || i == 0);
        Ok(Self {
            shared: Table::with_init(
                &root.sub("shared"),
                config.vocab_size,
                config.d_model,
                Init::Normal { std: 1.0 },
            )?,
            blocks: nn::Blocks::new(&encoder.sub("block"), config.num_layers, block)?,
            final_layer_norm: RmsNorm::new(
                &encoder.sub("final_layer_norm"),
                config.d_model,
                config.layer_norm_epsilon,
            )?,
            params: root.params(),
            config,
        })
    }
}

impl TextModel for T5EncoderModel {
    fn params(&self) -> &Params {
        &self.params
    }

    /// Files may hold the embedding a second time.
    fn is_ignored_key(&self, key: &str) -> bool {
        key == "encoder.embed_tokens.weight"
    }

    fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<TextModelOutput> {
        let length = input_ids.dim(1)?;
        let mask = attention_mask.map(key_mask).transpose()?;
        let mut hidden_states = vec![embedding(&self.shared.value()?, input_ids)?];
        let mut bias = None;
        for block in self.blocks.iter() {
            if let Some(table) = &block.relative_attention_bias {
                let distance = self.config.relative_attention_max_distance;
                // As attention adds it: each layer would widen it again.
                let table = table.value()?;
                let table = table.to_dtype(DType::F32.promote(table.dtype()))?;
                let own = relative_position_bias(&table, length, length, distance)?;
                bias = Some(mask.as_ref().map_or(Ok(own.clone()), |mask| own.add(mask))?);
            }
            // The first block has one.
            let Some(bias) = &bias else { continue };
            let next = block.forward(&hidden_states[hidden_states.len() - 1], bias)?;
            hidden_states.push(next);
        }
        let last = self.final_layer_norm.forward(&hidden_states[hidden_states.len() - 1])?;
        hidden_states.pop();
        hidden_states.push(last.clone());
        Ok(TextModelOutput { hidden_states, last_hidden_state: last, pooler_output: None })
    }
}
