//! transformers' `CLIPTextModel` (Radford et al. 2021).

use flowtape_engine::nn::{Activation, LayerNorm, Linear, ParamBuilder, Params};
use flowtape_engine::ops::embedding;
use flowtape_engine::{Tensor, nn};
use serde::Deserialize;
use serde_json::Value;

use super::{Table, TextModel, TextModelOutput, activation, causal_mask};
use crate::Result;
use crate::blocks::{QkNorm, QkvConfig, QkvHeads, attend, key_mask};
use crate::config::{check_heads, check_layers, check_sizes, object, parse};

/// The keys of `config.json` that matter, with transformers' defaults (CLIP B/32).
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(default)]
pub struct CLIPTextConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the model.
    pub hidden_size: usize,
    /// Width of a feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// The longest text.
    pub max_position_embeddings: usize,
    /// The function of a feed-forward layer.
    pub hidden_act: String,
    /// Added to a variance.
    pub layer_norm_eps: f64,
    /// The token at whose place the text is pooled; 2 stands for the greatest token of a text.
    pub eos_token_id: u32,
}

impl Default for CLIPTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

impl CLIPTextConfig {
    /// Reads and checks the object of `config.json`; other keys are passed over.
    ///
    /// # Errors
    /// When a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config: Self = parse("text encoder", "CLIPTextModel", object(value)?)?;
        check_sizes([
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("max_position_embeddings", config.max_position_embeddings),
        ])?;
        check_heads(("hidden_size", config.hidden_size), ("num_attention_heads", config.num_attention_heads))?;
        check_layers(1, [("num_hidden_layers", config.num_hidden_layers)])?;
        Ok(config)
    }
}

/// Sizes and options of an [`EncoderLayer`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct EncoderSizes {
    pub(crate) width: usize,
    pub(crate) heads: usize,
    pub(crate) intermediate: usize,
    pub(crate) eps: f64,
    pub(crate) act: Activation,
}

/// A layer of CLIP and SigLIP: attention, then a feed-forward layer, each normalised before.
#[derive(Clone, Debug)]
pub(crate) struct EncoderLayer {
    norm1: LayerNorm,
    qkv: QkvHeads,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    act: Activation,
    fc2: Linear,
}

impl EncoderLayer {
    pub(crate) fn new(params: &ParamBuilder, sizes: &EncoderSizes) -> Result<Self> {
        let EncoderSizes { width, heads, intermediate, eps, act } = *sizes;
        let qkv = QkvConfig { norm: QkNorm::None, ..QkvConfig::joint(width, heads) };
        let (attention, mlp) = (params.sub("self_attn"), params.sub("mlp"));
        Ok(Self {
            norm1: LayerNorm::new(&params.sub("layer_norm1"), width, eps, true)?,
            qkv: QkvHeads::new(&attention, ["q_proj", "k_proj", "v_proj", "", ""], qkv)?,
            out: Linear::new(&attention.sub("out_proj"), width, width, true)?,
            norm2: LayerNorm::new(&params.sub("layer_norm2"), width, eps, true)?,
            fc1: Linear::new(&mlp.sub("fc1"), width, intermediate, true)?,
            act,
            fc2: Linear::new(&mlp.sub("fc2"), intermediate, width, true)?,
        })
    }

    /// x `[B, T, width]`; a mask is added to the scores.
    pub(crate) fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> flowtape_engine::Result<Tensor> {
        let attended = attend(self.qkv.forward(&self.norm1.forward(x)?, None)?, mask)?;
        let x = x.add(&self.out.forward(&attended)?)?;
        let hidden = self.act.forward(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        x.add(&self.fc2.forward(&hidden)?)
    }
}

/// CLIP's text encoder. Its pooled output is the last state at the end-of-text token.
#[derive(Debug)]
pub struct CLIPTextModel {
    config: CLIPTextConfig,
    params: Params,
    token_embedding: Table,
    position_embedding: Table,
    layers: nn::Blocks<EncoderLayer>,
    final_layer_norm: LayerNorm,
}

impl CLIPTextModel {
    /// A model whose parameters are the builder's.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: CLIPTextConfig, root: &ParamBuilder) -> Result<Self> {
        let (embeddings, layers) = (root.sub("embeddings"), root.sub("encoder").sub("layers"));
        let width = config.hidden_size;
        let sizes = EncoderSizes {
            width,
            heads: config.num_attention_heads,
            intermediate: config.intermediate_size,
            eps: config.layer_norm_eps,
            act: activation(&config.hidden_act)?,
        };
        let table = |name: &str, rows: usize| Table::new(&embeddings.sub(name), rows, width);
        Ok(Self {
            token_embedding: table("token_embedding", config.vocab_size)?,
            position_embedding: table("position_embedding", config.max_position_embeddings)?,
            layers: nn::Blocks::new(&layers, config.num_hidden_layers, |params, _| EncoderLayer::new(params, &sizes))?,
            final_layer_norm: LayerNorm::new(&root.sub("final_layer_norm"), width, config.layer_norm_eps, true)?,
            params: root.params(),
            config,
        })
    }

    /// Where each text of ids `[B, T]` ends, as a row of `[B T]`.
    fn end_rows(&self, ids: &[u32], length: usize) -> Vec<u32> {
        let end = |text: &[u32]| match self.config.eos_token_id {
            // The published configuration of CLIP-L says 2, where its end-of-text token is the greatest.
            2 => text.iter().position(|id| Some(id) == text.iter().max()),
            eos => text.iter().position(|id| *id == eos),
        };
        let rows = ids.chunks(length.max(1)).enumerate();
        rows.map(|(row, text)| (row * length + end(text).unwrap_or(0)) as u32).collect()
    }
}

impl TextModel for CLIPTextModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<TextModelOutput> {
        let length = input_ids.dim(1)?;
        let device = input_ids.device();
        let positions = self.position_embedding.value()?.narrow(0, 0, length)?;
        let x = embedding(&self.token_embedding.value()?, input_ids)?.add(&positions)?;
        let causal = causal_mask(length, device)?;
        let mask = attention_mask.map(key_mask).transpose()?;
        let mask = mask.map_or(Ok(causal.clone()), |mask| causal.add(&mask))?;
        let mut hidden_states = vec![x];
        for layer in self.layers.iter() {
            let next = layer.forward(&hidden_states[hidden_states.len() - 1], Some(&mask))?;
            hidden_states.push(next);
        }
        let last = self.final_layer_norm.forward(&hidden_states[hidden_states.len() - 1])?;
        let rows = self.end_rows(&input_ids.to_vec::<u32>()?, length);
        let count = rows.len();
        let rows = Tensor::from_vec(rows, &[count], device)?;
        let pooled = last.flatten(0, 1)?.index_select(0, &rows)?;
        Ok(TextModelOutput { hidden_states, last_hidden_state: last, pooler_output: Some(pooled) })
    }
}
