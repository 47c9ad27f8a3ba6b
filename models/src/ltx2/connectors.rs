//! diffusers' `LTX2TextConnectors`: what makes the transformer's texts of all states of Gemma 3, one for the video and one for the
//! audio.

use std::path::Path;
use std::sync::Arc;

use flowtape_engine::nn::{Activation, FeedForward, Init, Linear, Param, ParamBuilder, Params, Placement, RmsNorm};
use flowtape_engine::ops::{pointwise, rms_norm};
use flowtape_engine::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::LTX2Config;
use super::block::Attention;
use super::config::StreamConfig;
use super::rope::{Axis, tables};
use crate::blocks::Tokens;
use crate::checkpoint::{CONFIG, open_weights, read_config};
use crate::config::{Config, check_layers, check_sizes, product, read, truth};
use crate::registry::ConfigReader;
use crate::text::compute_dtype;
use crate::{Error, Result};

/// Added to a mean of squares.
const EPS: f64 = 1e-6;
/// Factor of LTX-2.0's normalised states.
const SCALE: f64 = 8.0;

/// `config.json`, with diffusers' defaults. Fields of the audio's connector have `audio_` before the name.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LTX2TextConnectorsConfig {
    /// Width of the text model.
    pub caption_channels: usize,
    /// How many of its states there are.
    pub text_proj_in_factor: usize,
    /// Heads of the video's connector.
    pub video_connector_num_attention_heads: usize,
    /// Width of a head.
    pub video_connector_attention_head_dim: usize,
    /// Its layers.
    pub video_connector_num_layers: usize,
    /// Its registers, which stand in for padding.
    pub video_connector_num_learnable_registers: Option<usize>,
    /// Whether each head has a gate of its own.
    #[serde(deserialize_with = "truth")]
    pub video_gated_attn: bool,
    /// Heads of the audio's connector.
    pub audio_connector_num_attention_heads: usize,
    /// Width of a head.
    pub audio_connector_attention_head_dim: usize,
    /// Its layers.
    pub audio_connector_num_layers: usize,
    /// Its registers.
    pub audio_connector_num_learnable_registers: Option<usize>,
    /// Whether each head has a gate of its own.
    #[serde(deserialize_with = "truth")]
    pub audio_gated_attn: bool,
    /// Where the axis of positions ends.
    pub connector_rope_base_seq_len: usize,
    /// Base of the rotations.
    pub rope_theta: f64,
    /// Whether frequencies are made in f64.
    #[serde(deserialize_with = "truth")]
    pub rope_double_precision: bool,
    /// Without effect, as in the reference.
    #[serde(deserialize_with = "truth")]
    pub causal_temporal_positioning: bool,
    /// `split` or `interleaved`.
    pub rope_type: String,
    /// Whether each stream has a projection of its own (LTX-2.3).
    #[serde(deserialize_with = "truth")]
    pub per_modality_projections: bool,
    /// Width that the states are scaled for.
    pub video_hidden_dim: usize,
    /// The same of the audio.
    pub audio_hidden_dim: usize,
    /// Whether projections have biases.
    #[serde(deserialize_with = "truth")]
    pub proj_bias: bool,
}

impl Default for LTX2TextConnectorsConfig {
    fn default() -> Self {
        Self {
            caption_channels: 3840,
            text_proj_in_factor: 49,
            video_connector_num_attention_heads: 30,
            video_connector_attention_head_dim: 128,
            video_connector_num_layers: 2,
            video_connector_num_learnable_registers: Some(128),
            video_gated_attn: false,
            audio_connector_num_attention_heads: 30,
            audio_connector_attention_head_dim: 128,
            audio_connector_num_layers: 2,
            audio_connector_num_learnable_registers: Some(128),
            audio_gated_attn: false,
            connector_rope_base_seq_len: 4096,
            rope_theta: 10_000.0,
            rope_double_precision: true,
            causal_temporal_positioning: false,
            rope_type: "interleaved".into(),
            per_modality_projections: false,
            video_hidden_dim: 4096,
            audio_hidden_dim: 2048,
            proj_bias: false,
        }
    }
}

impl Config for LTX2TextConnectorsConfig {
    const CLASS: &'static str = "LTX2TextConnectors";

    fn check(&self) -> Result<()> {
        let [video, audio] = [self.stream(false), self.stream(true)];
        check_sizes([
            ("caption_channels times text_proj_in_factor", product(&[self.caption_channels, self.text_proj_in_factor])),
            ("video_connector_num_attention_heads times head_dim", video.dim()),
            ("audio_connector_num_attention_heads times head_dim", audio.dim()),
            ("connector_rope_base_seq_len", self.connector_rope_base_seq_len),
            ("video_hidden_dim", self.video_hidden_dim),
            ("audio_hidden_dim", self.audio_hidden_dim),
        ])?;
        check_layers(
            0,
            [
                ("video_connector_num_layers", self.video_connector_num_layers),
                ("audio_connector_num_layers", self.audio_connector_num_layers),
            ],
        )?;
        for (key, registers) in [
            ("video_connector_num_learnable_registers", self.video_connector_num_learnable_registers),
            ("audio_connector_num_learnable_registers", self.audio_connector_num_learnable_registers),
        ] {
            check_sizes([(key, registers.unwrap_or(1))])?;
        }
        if !["split", "interleaved"].contains(&&*self.rope_type) {
            return Err(Error::config("rope_type", "split or interleaved", &self.rope_type));
        }
        Ok(())
    }
}

impl LTX2TextConnectorsConfig {
    /// The sizes of a connector's attention, as a stream of the transformer has them.
    fn stream(&self, is_audio: bool) -> StreamConfig {
        let (heads, head_dim, gated) = match is_audio {
            true => (
                self.audio_connector_num_attention_heads,
                self.audio_connector_attention_head_dim,
                self.audio_gated_attn,
            ),
            false => (
                self.video_connector_num_attention_heads,
                self.video_connector_attention_head_dim,
                self.video_gated_attn,
            ),
        };
        let dim = product(&[heads, head_dim]);
        let (in_channels, out_channels, text_dim) = (dim, dim, dim);
        StreamConfig {
            is_audio,
            in_channels,
            out_channels,
            heads,
            head_dim,
            text_dim,
            gated,
            modulated: false,
            ff_bias: true,
        }
    }

    /// What the transformer's parts read of a configuration.
    fn shared(&self) -> LTX2Config {
        LTX2Config {
            attention_bias: true,
            attention_out_bias: true,
            rope_type: self.rope_type.clone(),
            rope_theta: self.rope_theta,
            rope_double_precision: self.rope_double_precision,
            ..LTX2Config::default()
        }
    }
}

/// A connector: a transformer over one text.
#[derive(Clone, Debug)]
struct Connector {
    config: StreamConfig,
    registers: Option<Param>,
    blocks: Vec<(Attention, FeedForward)>,
}

impl Connector {
    fn new(params: &ParamBuilder, config: &LTX2TextConnectorsConfig, is_audio: bool) -> Result<Self> {
        let own = config.stream(is_audio);
        let (layers, registers) = match is_audio {
            true => (config.audio_connector_num_layers, config.audio_connector_num_learnable_registers),
            false => (config.video_connector_num_layers, config.video_connector_num_learnable_registers),
        };
        let table = |rows| params.get("learnable_registers", &[rows, own.dim()], Init::Uniform { bound: 1.0 });
        let block = |i: usize| -> Result<(Attention, FeedForward)> {
            let block = params.sub("transformer_blocks").sub(i);
            let attention = Attention::new(&block.sub("attn1"), &config.shared(), &own, own.dim(), &own)?;
            let (dim, act) = (own.dim(), Activation::GeluTanh);
            Ok((attention, FeedForward::with_bias(&block.sub("ff"), dim, 4 * dim, act, true)?))
        };
        Ok(Self {
            config: own,
            registers: registers.map(table).transpose()?,
            blocks: (0..layers).map(block).collect::<Result<_>>()?,
        })
    }

    /// x `[B, T, dim]` with the places of its tokens, row by row. With registers the tokens come first and nothing is masked.
    fn forward(&self, x: &Tensor, tokens: &[Vec<usize>], config: &LTX2TextConnectorsConfig) -> Result<Tensor> {
        let (length, device) = (x.dim(1)?, x.device());
        let mut x = x.clone();
        if let Some(registers) = &self.registers {
            let registers = registers.value()?;
            let count = registers.dim(0)?;
            if !length.is_multiple_of(count) {
                let expected = format!("a multiple of the {count} registers of the connectors");
                return Err(Error::config("max_sequence_length", expected, length));
            }
            // Each row's tokens first, then the registers of the places that are left.
            let mut rows = Vec::with_capacity(tokens.len());
            for (row, places) in tokens.iter().enumerate() {
                let from = places.iter().map(|place| *place as u32);
                let rest = (places.len()..length).map(|place| (length + place % count) as u32);
                let index: Vec<u32> = from.chain(rest).collect();
                let both = Tensor::cat(&[&x.narrow(0, row, 1)?.squeeze(0)?, &registers], 0)?;
                rows.push(both.index_select(0, &Tensor::from_vec(index, &[length], device)?)?);
            }
            x = Tensor::stack(&rows.iter().collect::<Vec<_>>(), 0)?;
        }
        let mask = match &self.registers {
            Some(_) => None,
            None => Some(crate::blocks::key_mask(&mask_of(tokens, length, device)?)?),
        };
        let axis = Axis::of_places(length, config.connector_rope_base_seq_len);
        let (dim, heads) = (self.config.dim(), self.config.heads);
        let rope = tables(&config.shared(), &[axis], 1, dim, heads, device)?;
        let (norm, all) = (RmsNorm::plain(EPS), Tokens::whole());
        for (attention, feed_forward) in &self.blocks {
            let h = norm.forward(&x)?;
            x = x.add(&attention.forward([&h; 2], [&all; 2], Some([&rope; 2]), mask.as_ref())?)?;
            x = x.add(&feed_forward.forward(&norm.forward(&x)?)?)?;
        }
        Ok(norm.forward(&x)?)
    }
}

/// 1 at tokens `[B, T]`, f32.
fn mask_of(tokens: &[Vec<usize>], length: usize, device: &Device) -> Result<Tensor> {
    let row = |places: &Vec<usize>| (0..length).map(|i| f32::from(u8::from(places.contains(&i)))).collect::<Vec<f32>>();
    Ok(Tensor::from_vec(tokens.iter().flat_map(row).collect(), &[tokens.len(), length], device)?)
}

/// What the connectors make of a text.
#[derive(Clone, Debug)]
pub struct ConnectedText {
    /// `[B, T, D]`, for the video.
    pub text_embeddings: Tensor,
    /// `[B, T, E]`, for the audio.
    pub audio_text_embeddings: Tensor,
    /// `[B, T]`, f32: 1 where something stands.
    pub text_mask: Tensor,
}

/// Both connectors and what stands before them.
#[derive(Debug)]
pub struct LTX2TextConnectors {
    config: LTX2TextConnectorsConfig,
    params: Params,
    /// One for both streams, or one each.
    projections: Vec<Linear>,
    connectors: [Connector; 2],
}

impl LTX2TextConnectors {
    /// Connectors whose parameters are the builder's.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: LTX2TextConnectorsConfig, root: &ParamBuilder) -> Result<Self> {
        let width = config.caption_channels * config.text_proj_in_factor;
        let linear = |name: &str, out| Linear::new(&root.sub(name), width, out, config.proj_bias);
        let projections = match config.per_modality_projections {
            true => vec![
                linear("video_text_proj_in", config.video_hidden_dim)?,
                linear("audio_text_proj_in", config.audio_hidden_dim)?,
            ],
            false => vec![linear("text_proj_in", config.caption_channels)?],
        };
        let connector = |name: &str, is_audio| Connector::new(&root.sub(name), &config, is_audio);
        Ok(Self {
            projections,
            connectors: [connector("video_connector", false)?, connector("audio_connector", true)?],
            params: root.params(),
            config,
        })
    }

    /// Loads a diffusers folder, frozen. It computes in `dtype`, or in what its file suggests.
    ///
    /// # Errors
    /// When a file can't be read, or keys do not fit.
    pub fn load(folder: &Path, dtype: Option<DType>, device: &Device) -> Result<Self> {
        let config = read_config(&folder.join(CONFIG), |_| Ok(ConfigReader::of::<LTX2TextConnectorsConfig>()))?;
        let weights = Arc::new(open_weights(folder)?);
        let placement = Placement::frozen(dtype.unwrap_or_else(|| compute_dtype(&weights)));
        let params = ParamBuilder::with_plan(0, placement, device).reading(weights.clone());
        let model = Self::new(read(&config)?, &params)?;
        model
            .params
            .check_keys(&weights, |_| false)
            .map_err(|error| Error::Model { model: LTX2TextConnectorsConfig::CLASS.into(), source: Box::new(error) })?;
        Ok(model)
    }

    /// All states of the text model `[B, T, D]`, its embeddings first, and a mask `[B, T]` that is 0 at padding.
    ///
    /// # Errors
    /// When there are not as many states, or the length does not fit the registers.
    pub fn forward(&self, hidden_states: &[Tensor], attention_mask: &Tensor) -> Result<ConnectedText> {
        let config = &self.config;
        if hidden_states.len() != config.text_proj_in_factor {
            let got = hidden_states.len();
            return Err(Error::config(
                "text_proj_in_factor",
                format!("{got}, as the text model has states"),
                config.text_proj_in_factor,
            ));
        }
        let (length, device) = (attention_mask.dim(1)?, attention_mask.device().clone());
        let marks = attention_mask.to_dtype(DType::F32)?;
        let places = |row: &[f32]| (0..row.len()).filter(|i| row[*i] != 0.0).collect::<Vec<usize>>();
        let tokens: Vec<Vec<usize>> = marks.to_vec::<f32>()?.chunks(length.max(1)).map(places).collect();
        let keep = marks.unsqueeze(2)?;
        let packed = match config.per_modality_projections {
            true => Self::packed(hidden_states, |state| Ok(rms_norm(state, None, EPS)?))?,
            false => Self::packed(hidden_states, |state| self.ranged(state, &keep, &tokens))?,
        };
        let packed = packed.mul(&keep.to_dtype(packed.dtype())?)?;
        let dtype = self.params.iter().next().map_or(DType::F32, Param::dtype);
        let project = |i: usize, width: usize| -> Result<Tensor> {
            let scale =
                if config.per_modality_projections { width as f64 / config.caption_channels as f64 } else { 1.0 };
            let linear = self.projections.get(i).or(self.projections.first());
            let linear = linear.ok_or_else(|| Error::config("text_proj_in", "a projection", "none"))?;
            Ok(linear.forward(&packed.mul_scalar(scale.sqrt())?.to_dtype(dtype)?)?)
        };
        let [video, audio] = &self.connectors;
        Ok(ConnectedText {
            text_embeddings: video.forward(&project(0, config.video_hidden_dim)?, &tokens, config)?,
            audio_text_embeddings: audio.forward(&project(1, config.audio_hidden_dim)?, &tokens, config)?,
            text_mask: match video.registers {
                Some(_) => Tensor::ones(&[tokens.len(), length], DType::F32, &device)?,
                None => marks,
            },
        })
    }

    /// Normalised states side by side `[B, T, D L]`: the channel slow, the layer fast.
    fn packed(states: &[Tensor], normalise: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let states = states.iter().map(normalise).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&states.iter().collect::<Vec<_>>(), 3)?.flatten(2, 3)?)
    }

    /// LTX-2.0's norm of a state: minus the mean of a text's tokens, by the range of their values, times 8.
    fn ranged(&self, state: &Tensor, keep: &Tensor, tokens: &[Vec<usize>]) -> Result<Tensor> {
        let (values, width) = (state.to_vec::<f32>()?, state.dim(2)?);
        let rows = values.chunks(state.dim(1)? * width).zip(tokens);
        let numbers = rows.flat_map(|(row, places)| {
            let all = places.iter().flat_map(|place| &row[place * width..][..width]);
            let mean = all.clone().map(|v| f64::from(*v)).sum::<f64>() / ((places.len() * width) as f64 + EPS);
            let least = all.clone().copied().fold(f32::INFINITY, f32::min);
            let most = all.copied().fold(f32::NEG_INFINITY, f32::max);
            [mean as f32, (SCALE / (f64::from(most - least) + EPS)) as f32]
        });
        let numbers = Tensor::from_vec(numbers.collect::<Vec<f32>>(), &[tokens.len(), 1, 2], state.device())?;
        let (mean, scale) = (numbers.narrow(2, 0, 1)?, numbers.narrow(2, 1, 1)?);
        let state = state.to_dtype(DType::F32)?;
        Ok(pointwise([&state, &mean, &scale, keep], |[x, mean, scale, keep]| (x - mean) * scale * keep)?)
    }
}
