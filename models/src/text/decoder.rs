//! The text models of transformers that pipelines take hidden states of: Qwen2.5-VL's, Qwen3, Qwen3-VL's, Mistral 3's, Gemma 2 and
//! Gemma 3's. They are one architecture with options.

use flowtape_engine::nn::{Activation, Linear, ParamBuilder, Params, RmsNorm};
use flowtape_engine::ops::{RopeLayout, attention, embedding, pointwise_to};
use flowtape_engine::platform::math::{powf, sin_cos};
use flowtape_engine::{DType, Device, Result as EngineResult, Tensor, nn};
use serde::Deserialize;
use serde_json::Value;

use super::{Table, TextModel, TextModelOutput, activation, causal_mask};
use crate::blocks::{RopeTables, key_mask, shared_heads, split_heads};
use crate::config::{check_layers, check_sizes, object, parse, product};
use crate::{Error, Result};

/// What tells the models apart.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Family {
    /// transformers' class.
    pub class: &'static str,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether queries and keys are normalised, head by head.
    pub qk_norm: bool,
    /// Gemma's ways: norms whose weights count from 1, around each half of a layer, and embeddings times the root of their
    /// width.
    pub gemma: bool,
    /// Of so many layers one attends to the whole text, where a configuration does not say which.
    pub full_every: Option<usize>,
    /// Scores stay below it where a configuration does not say so: `attn_logit_softcapping`.
    pub softcap: Option<f64>,
}

/// What most have in common.
pub(crate) const PLAIN: Family =
    Family { class: "", qkv_bias: false, qk_norm: false, gemma: false, full_every: None, softcap: None };

/// Rotations of a kind of layer.
#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(default)]
struct Rope {
    rope_theta: f64,
    /// Positions are divided by it.
    factor: f64,
}

impl Default for Rope {
    fn default() -> Self {
        Self { rope_theta: 10_000.0, factor: 1.0 }
    }
}

/// The keys of `config.json` that matter, in transformers 4's layout or 5's.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct DecoderConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    #[serde(alias = "hidden_activation")]
    hidden_act: String,
    query_pre_attn_scalar: Option<f64>,
    attn_logit_softcapping: Option<f64>,
    sliding_window: Option<usize>,
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    rope_theta: f64,
    rope_local_base_freq: f64,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
}

impl Default for DecoderConfig {
    fn default() -> Self {
        Self {
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: None,
            rms_norm_eps: 1e-6,
            hidden_act: "silu".into(),
            query_pre_attn_scalar: None,
            attn_logit_softcapping: None,
            sliding_window: None,
            sliding_window_pattern: None,
            layer_types: None,
            rope_theta: 10_000.0,
            rope_local_base_freq: 10_000.0,
            rope_scaling: None,
            rope_parameters: None,
        }
    }
}

impl DecoderConfig {
    /// Reads and checks the object of `config.json`, whose text model may be in `text_config`; other keys are passed over.
    ///
    /// # Errors
    /// When a value does not fit.
    pub fn from_json(value: &Value, family: Family) -> Result<Self> {
        let text = value.get("text_config").filter(|text| text.is_object()).unwrap_or(value);
        let mut config: Self = parse("text encoder", family.class, object(text)?)?;
        if text.get("attn_logit_softcapping").is_none() {
            config.attn_logit_softcapping = family.softcap;
        }
        check_sizes([
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_attention_heads times head_dim", product(&[config.num_attention_heads, config.head_dim()])),
        ])?;
        check_layers(1, [("num_hidden_layers", config.num_hidden_layers)])?;
        if config.num_attention_heads.checked_rem(config.num_key_value_heads) != Some(0) {
            let expected = format!("a divisor of num_attention_heads, {}", config.num_attention_heads);
            return Err(Error::config("num_key_value_heads", expected, config.num_key_value_heads));
        }
        if !config.head_dim().is_multiple_of(2) {
            return Err(Error::config("head_dim", "an even number", config.head_dim()));
        }
        Ok(config)
    }

    /// Which of a token's three positions a pair turns by: `mrope_section` shares them out, where there is one.
    fn axis(&self, pair: usize) -> usize {
        let scaling = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let sections = scaling.and_then(|scaling| scaling["mrope_section"].as_array());
        let lengths = sections.into_iter().flatten().map(|length| length.as_u64().unwrap_or(0) as usize);
        let ends = lengths.scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        ends.filter(|end| *end <= pair).count().min(2)
    }

    fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Whether a layer attends to the newest tokens alone.
    fn slides(&self, family: Family, layer: usize) -> bool {
        match (&self.layer_types, self.sliding_window_pattern) {
            (Some(types), _) => types.get(layer).is_some_and(|kind| kind == "sliding_attention"),
            (None, Some(pattern)) => !(layer + 1).is_multiple_of(pattern.max(1)),
            (None, None) => family.full_every.is_some_and(|every| !(layer + 1).is_multiple_of(every)),
        }
    }

    /// The rotations of full and of sliding layers.
    fn ropes(&self) -> Result<[Rope; 2]> {
        let read = |value: &Value| parse::<Rope>("rope_parameters", "a rotary embedding", object(value)?);
        let local = Rope { rope_theta: self.rope_local_base_freq, factor: 1.0 };
        match &self.rope_parameters {
            Some(all) if all.get("full_attention").is_some() => {
                Ok([read(&all["full_attention"])?, all.get("sliding_attention").map_or(Ok(local), read)?])
            }
            Some(one) => Ok([read(one)?; 2]),
            None => {
                let scaling = self.rope_scaling.as_ref();
                let linear = scaling.filter(|s| s["rope_type"] == "linear").and_then(|s| s["factor"].as_f64());
                Ok([Rope { rope_theta: self.rope_theta, factor: linear.unwrap_or(1.0) }, local])
            }
        }
    }
}

/// A norm, whose weight counts from 1 in Gemma's models.
fn rms(params: &ParamBuilder, width: usize, family: Family, eps: f64) -> EngineResult<RmsNorm> {
    if family.gemma { RmsNorm::from_one(params, width, eps) } else { RmsNorm::new(params, width, eps) }
}

/// A layer: attention, in which several heads share keys and values, then a gated feed-forward layer.
#[derive(Clone, Debug)]
struct Layer {
    input_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Of queries and keys.
    qk_norm: Option<[RmsNorm; 2]>,
    out: Linear,
    /// Gemma's, on what attention and feed-forward add.
    added_norms: Option<[RmsNorm; 2]>,
    feed_forward_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    act: Activation,
    down: Linear,
    heads: usize,
    kv_heads: usize,
    scale: f64,
    softcap: Option<f64>,
    slides: bool,
}

impl Layer {
    fn new(params: &ParamBuilder, config: &DecoderConfig, family: Family, number: usize) -> Result<Self> {
        let (width, head, eps) = (config.hidden_size, config.head_dim(), config.rms_norm_eps);
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (attention, mlp) = (params.sub("self_attn"), params.sub("mlp"));
        let norm = |name: &str| rms(&params.sub(name), width, family, eps);
        let head_norm = |name: &str| rms(&attention.sub(name), head, family, eps);
        let project =
            |name: &str, heads: usize| Linear::new(&attention.sub(name), width, heads * head, family.qkv_bias);
        let dense = |name: &str, from: usize, to: usize| Linear::new(&mlp.sub(name), from, to, false);
        let feed_forward_norm = if family.gemma { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            query: project("q_proj", heads)?,
            key: project("k_proj", kv_heads)?,
            value: project("v_proj", kv_heads)?,
            qk_norm: if family.qk_norm { Some([head_norm("q_norm")?, head_norm("k_norm")?]) } else { None },
            out: Linear::new(&attention.sub("o_proj"), heads * head, width, false)?,
            added_norms: if family.gemma {
                Some([norm("post_attention_layernorm")?, norm("post_feedforward_layernorm")?])
            } else {
                None
            },
            feed_forward_norm: norm(feed_forward_norm)?,
            gate: dense("gate_proj", width, config.intermediate_size)?,
            up: dense("up_proj", width, config.intermediate_size)?,
            act: activation(&config.hidden_act)?,
            down: dense("down_proj", config.intermediate_size, width)?,
            heads,
            kv_heads,
            scale: config.query_pre_attn_scalar.unwrap_or(head as f64).powf(-0.5),
            softcap: config.attn_logit_softcapping,
            slides: config.slides(family, number),
        })
    }

    fn attend(&self, x: &Tensor, rope: &RopeTables, mask: &Tensor) -> EngineResult<Tensor> {
        let heads = |projection: &Linear, count: usize, norm: Option<&RmsNorm>| -> EngineResult<Tensor> {
            let heads = split_heads(&projection.forward(x)?, count)?;
            norm.map_or(Ok(heads.clone()), |norm| norm.forward(&heads))?.transpose(1, 2)
        };
        let norms = self.qk_norm.as_ref();
        let q = rope.apply(&heads(&self.query, self.heads, norms.map(|n| &n[0]))?)?;
        let k = rope.apply(&heads(&self.key, self.kv_heads, norms.map(|n| &n[1]))?)?;
        let v = heads(&self.value, self.kv_heads, None)?;
        let (k, v) = (shared_heads(&k, self.heads)?, shared_heads(&v, self.heads)?);
        let attended = match self.softcap {
            None => attention(&q, &k, &v, Some(mask), Some(self.scale))?,
            Some(cap) => capped_attention([&q, &k, &v], mask, self.scale, cap)?,
        };
        self.out.forward(&attended.transpose(1, 2)?.flatten(2, 3)?)
    }

    fn forward(&self, x: &Tensor, rope: &RopeTables, mask: &Tensor) -> EngineResult<Tensor> {
        let add = |x: &Tensor, y: Tensor, which: usize| match &self.added_norms {
            Some(norms) => x.add(&norms[which].forward(&y)?),
            None => x.add(&y),
        };
        let x = add(x, self.attend(&self.input_norm.forward(x)?, rope, mask)?, 0)?;
        let h = self.feed_forward_norm.forward(&x)?;
        let gated = self.act.forward(&self.gate.forward(&h)?)?.mul(&self.up.forward(&h)?)?;
        add(&x, self.down.forward(&gated)?, 1)
    }
}

/// Attention whose scores stay between -cap and cap before the mask is added. They are whole in memory: texts are short.
fn capped_attention([q, k, v]: [&Tensor; 3], mask: &Tensor, scale: f64, cap: f64) -> EngineResult<Tensor> {
    let scores = q.matmul(&k.transpose(2, 3)?)?;
    let capped = pointwise_to(DType::F32, [&scores, mask], |[s, m]| (s * (scale / cap)).tanh() * cap + m)?;
    capped.softmax(3)?.to_dtype(v.dtype())?.matmul(v)
}

/// The text model. Positions are 0 to T - 1, whatever the mask; the last of the hidden states has gone through the final norm.
#[derive(Debug)]
pub struct DecoderModel {
    config: DecoderConfig,
    family: Family,
    params: Params,
    /// What stands before the text model's keys in the file.
    prefix: String,
    ropes: [Rope; 2],
    embed_tokens: Table,
    layers: nn::Blocks<Layer>,
    norm: RmsNorm,
}

impl DecoderModel {
    /// A model whose parameters are the builder's, wherever in the file the text model's stand.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: DecoderConfig, family: Family, root: &ParamBuilder) -> Result<Self> {
        // Published files, files that transformers 5 writes, and text models alone.
        let places = ["model", "language_model.model", "model.language_model", "language_model"];
        let found = places.into_iter().find(|p| root.sub(p).sub("embed_tokens").stored_dims("weight").is_some());
        let bare = root.sub("embed_tokens").stored_dims("weight").is_some();
        let place = if bare { None } else { Some(found.unwrap_or(places[0])) };
        let params = place.map_or(root.clone(), |place| root.sub(place));
        let layers = params.sub("layers");
        Ok(Self {
            embed_tokens: Table::new(&params.sub("embed_tokens"), config.vocab_size, config.hidden_size)?,
            layers: nn::Blocks::new(&layers, config.num_hidden_layers, |p, i| Layer::new(p, &config, family, i))?,
            norm: rms(&params.sub("norm"), config.hidden_size, family, config.rms_norm_eps)?,
            ropes: config.ropes()?,
            params: root.params(),
            prefix: place.map_or(String::new(), |place| format!("{place}.")),
            config,
            family,
        })
    }

    /// Cosines and sines `[T, head_dim]`; the pairs are an element of the first half and one of the second. In f32, as the
    /// reference has them. Each pair turns by one of a token's three positions.
    fn tables(&self, rope: Rope, positions: &[[f32; 3]], device: &Device) -> EngineResult<RopeTables> {
        let dim = self.config.head_dim();
        let frequency = |i: usize| 1.0 / powf(rope.rope_theta as f32, (2 * i) as f32 / dim as f32) / rope.factor as f32;
        let frequencies: Vec<(usize, f32)> = (0..dim / 2).map(|i| (self.config.axis(i), frequency(i))).collect();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for _ in 0..2 {
                for (axis, frequency) in &frequencies {
                    let (s, c) = sin_cos(position[*axis] * frequency);
                    cos.push(c);
                    sin.push(s);
                }
            }
        }
        let table = |values| Tensor::from_vec(values, &[positions.len(), dim], device);
        Ok(RopeTables { cos: table(cos)?, sin: table(sin)?, layout: RopeLayout::Split })
    }

    /// Embeddings `[B, T, D]` of tokens u32 `[B, T]`, before any layer.
    ///
    /// # Errors
    /// When a token is unknown.
    pub fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        Ok(embedding(&self.embed_tokens.value()?, input_ids)?)
    }

    /// States of embeddings `[B, T, D]`, which the first of the states is, at these positions: of words, three alike.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn run(
        &self,
        embedded: Tensor,
        attention_mask: Option<&Tensor>,
        positions: &[[f32; 3]],
    ) -> Result<TextModelOutput> {
        let (length, device) = (embedded.dim(1)?, embedded.device().clone());
        let causal = causal_mask(length, &device)?;
        let padding = attention_mask.map(key_mask).transpose()?;
        let full = padding.map_or(Ok(causal.clone()), |padding| causal.add(&padding))?;
        let sliding = match self.config.sliding_window {
            Some(window) => full.add(&window_mask(length, window, &device)?)?,
            None => full.clone(),
        };
        let [full_rope, sliding_rope] =
            [self.tables(self.ropes[0], positions, &device)?, self.tables(self.ropes[1], positions, &device)?];
        let mut hidden_states = vec![embedded];
        for layer in self.layers.iter() {
            let (rope, mask) = if layer.slides { (&sliding_rope, &sliding) } else { (&full_rope, &full) };
            let next = layer.forward(&hidden_states[hidden_states.len() - 1], rope, mask)?;
            hidden_states.push(next);
        }
        let last = self.norm.forward(&hidden_states[hidden_states.len() - 1])?;
        hidden_states.pop();
        hidden_states.push(last.clone());
        Ok(TextModelOutput { hidden_states, last_hidden_state: last, pooler_output: None })
    }
}

/// What is added to scores so that tokens at least `window` away are not attended to: f32 `[1, 1, T, T]`.
fn window_mask(length: usize, window: usize, device: &Device) -> EngineResult<Tensor> {
    let far = |i: usize| if i % length + window <= i / length { f32::NEG_INFINITY } else { 0.0 };
    Tensor::from_vec((0..length * length).map(far).collect::<Vec<f32>>(), &[1, 1, length, length], device)
}

impl TextModel for DecoderModel {
    fn params(&self) -> &Params {
        &self.params
    }

    /// The parts that see pictures or predict tokens.
    fn is_ignored_key(&self, key: &str) -> bool {
        !key.starts_with(&self.prefix)
    }

    fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<TextModelOutput> {
        let mut x = self.embed(input_ids)?;
        if self.family.gemma {
            // The root in the dtype of the weights.
            let root = Tensor::full(&[1], (self.config.hidden_size as f64).sqrt(), x.dtype(), x.device())?;
            x = x.mul(&root)?;
        }
        let positions: Vec<[f32; 3]> = (0..input_ids.dim(1)?).map(|i| [i as f32; 3]).collect();
        self.run(x, attention_mask, &positions)
    }
}

/// States of some layers side by side `[B, T, n D]`, layer by layer: what FLUX.2's pipelines take.
///
/// # Errors
/// When there are not as many states.
pub fn stack_layers(output: &TextModelOutput, layers: &[usize]) -> Result<Tensor> {
    let states: Option<Vec<&Tensor>> = layers.iter().map(|layer| output.hidden_states.get(*layer)).collect();
    let lacking = || Error::config("text_encoder", format!("layers {layers:?}"), output.hidden_states.len());
    Ok(Tensor::cat(&states.ok_or_else(lacking)?, 2)?)
}
