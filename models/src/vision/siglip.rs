//! transformers' `SiglipVisionModel` (Zhai et al. 2023), without the head that pools.

use std::path::Path;

use flowtape_engine::nn::{self, LayerNorm, Param, ParamBuilder, Params};
use flowtape_engine::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

use crate::blocks::PatchEmbed;
use crate::config::{check_heads, check_layers, check_sizes, object, parse};
use crate::text::clip::{EncoderLayer, EncoderSizes};
use crate::text::{Table, TextModelOutput, activation, open};
use crate::{Error, Result};

/// The keys of `config.json` that matter, with transformers' defaults.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(default)]
pub struct SiglipVisionConfig {
    /// Width of the model.
    pub hidden_size: usize,
    /// Width of a feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Channels of a picture.
    pub num_channels: usize,
    /// Sides of a picture in pixels.
    pub image_size: usize,
    /// Sides of a patch.
    pub patch_size: usize,
    /// The function of a feed-forward layer.
    pub hidden_act: String,
    /// Added to a variance.
    pub layer_norm_eps: f64,
}

impl Default for SiglipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 16,
            hidden_act: "gelu_pytorch_tanh".into(),
            layer_norm_eps: 1e-6,
        }
    }
}

impl SiglipVisionConfig {
    /// Reads and checks the object of `config.json`; other keys are passed over.
    ///
    /// # Errors
    /// When a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        let own = value.get("vision_config").filter(|own| own.is_object()).unwrap_or(value);
        let config: Self = parse("vision encoder", "SiglipVisionModel", object(own)?)?;
        check_sizes([
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_channels", config.num_channels),
            ("patch_size", config.patch_size),
            ("image_size / patch_size", config.image_size.checked_div(config.patch_size).unwrap_or(0)),
        ])?;
        check_heads(("hidden_size", config.hidden_size), ("num_attention_heads", config.num_attention_heads))?;
        check_layers(1, [("num_hidden_layers", config.num_hidden_layers)])?;
        Ok(config)
    }
}

/// SigLIP's vision encoder.
#[derive(Debug)]
pub struct SiglipVisionModel {
    config: SiglipVisionConfig,
    params: Params,
    patch_embedding: PatchEmbed,
    position_embedding: Table,
    layers: nn::Blocks<EncoderLayer>,
    post_layernorm: LayerNorm,
}

impl SiglipVisionModel {
    /// A model whose parameters are the builder's.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: SiglipVisionConfig, root: &ParamBuilder) -> Result<Self> {
        let (embeddings, layers) = (root.sub("embeddings"), root.sub("encoder").sub("layers"));
        let (width, patch, side) = (config.hidden_size, config.patch_size, config.image_size / config.patch_size);
        let sizes = EncoderSizes {
            width,
            heads: config.num_attention_heads,
            intermediate: config.intermediate_size,
            eps: config.layer_norm_eps,
            act: activation(&config.hidden_act)?,
        };
        let patches = embeddings.sub("patch_embedding");
        Ok(Self {
            patch_embedding: PatchEmbed::new(&patches, config.num_channels, width, &[patch; 2])?,
            position_embedding: Table::new(&embeddings.sub("position_embedding"), side * side, width)?,
            layers: nn::Blocks::new(&layers, config.num_hidden_layers, |params, _| EncoderLayer::new(params, &sizes))?,
            post_layernorm: LayerNorm::new(&root.sub("post_layernorm"), width, config.layer_norm_eps, true)?,
            params: root.params(),
            config,
        })
    }

    /// Loads a transformers folder, frozen. It computes in `dtype`, or in what its file suggests.
    ///
    /// # Errors
    /// When a file can't be read, or keys do not fit.
    pub fn load(folder: &Path, dtype: Option<DType>, device: &Device) -> Result<Self> {
        let (config, weights, params) = open(folder, "vision_model.", dtype, device)?;
        let model = Self::new(SiglipVisionConfig::from_json(&config)?, &params)?;
        model
            .params
            .check_keys(&weights, |name| name.starts_with("head."))
            .map_err(|error| Error::Model { model: "SiglipVisionModel".into(), source: Box::new(error) })?;
        Ok(model)
    }

    /// All parameters.
    pub fn params(&self) -> impl Iterator<Item = &Param> {
        self.params.iter()
    }

    /// States of the patches of pictures `[B, C, S, S]` from -1 to 1, with S the configuration's `image_size`: `[B, T, D]`.
    ///
    /// # Errors
    /// When the pictures have another size.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<TextModelOutput> {
        let side = self.config.image_size;
        if pixel_values.dims().get(2..) != Some(&[side; 2]) {
            let expected = format!("pictures [B, {}, {side}, {side}]", self.config.num_channels);
            return Err(flowtape_engine::Error::shape("SiglipVisionModel", expected, pixel_values.dims()).into());
        }
        let x = self.patch_embedding.forward(pixel_values)?.add(&self.position_embedding.value()?)?;
        let mut hidden_states = vec![x];
        for layer in self.layers.iter() {
            let next = layer.forward(&hidden_states[hidden_states.len() - 1], None)?;
            hidden_states.push(next);
        }
        let last = self.post_layernorm.forward(&hidden_states[hidden_states.len() - 1])?;
        Ok(TextModelOutput { hidden_states, last_hidden_state: last, pooler_output: None })
    }
}
