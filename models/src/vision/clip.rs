//! transformers' `CLIPVisionModel` (Radford et al. 2021), without the head that pools.

use std::path::Path;

use flowtape_engine::nn::{self, Init, LayerNorm, Param, ParamBuilder, Params};
use flowtape_engine::ops::patchify_conv;
use flowtape_engine::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

use crate::config::{check_heads, check_layers, check_sizes, object, parse};
use crate::text::clip::{EncoderLayer, EncoderSizes};
use crate::text::{Table, activation, open};
use crate::{Error, Result};

/// The keys of `config.json` that matter, with transformers' defaults (CLIP B/32).
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(default)]
pub struct CLIPVisionConfig {
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

impl Default for CLIPVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
        }
    }
}

impl CLIPVisionConfig {
    /// Reads and checks the object of `config.json`; other keys are passed over.
    ///
    /// # Errors
    /// When a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        let own = value.get("vision_config").filter(|own| own.is_object()).unwrap_or(value);
        let config: Self = parse("vision encoder", "CLIPVisionModel", object(own)?)?;
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

/// CLIP's vision encoder: patches behind a token that stands for the whole picture.
#[derive(Debug)]
pub struct CLIPVisionModel {
    config: CLIPVisionConfig,
    params: Params,
    class_embedding: Param,
    patch_embedding: Param,
    position_embedding: Table,
    pre_layernorm: LayerNorm,
    layers: nn::Blocks<EncoderLayer>,
}

impl CLIPVisionModel {
    /// A model whose parameters are the builder's.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: CLIPVisionConfig, root: &ParamBuilder) -> Result<Self> {
        let (embeddings, layers) = (root.sub("embeddings"), root.sub("encoder").sub("layers"));
        let (width, patch, side) = (config.hidden_size, config.patch_size, config.image_size / config.patch_size);
        let sizes = EncoderSizes {
            width,
            heads: config.num_attention_heads,
            intermediate: config.intermediate_size,
            eps: config.layer_norm_eps,
            act: activation(&config.hidden_act)?,
        };
        let normal = Init::Normal { std: 0.02 };
        let kernel = [width, config.num_channels, patch, patch];
        Ok(Self {
            class_embedding: embeddings.get("class_embedding", &[width], normal)?,
            patch_embedding: embeddings.sub("patch_embedding").get("weight", &kernel, normal)?,
            position_embedding: Table::new(&embeddings.sub("position_embedding"), side * side + 1, width)?,
            // The published key is misspelt.
            pre_layernorm: LayerNorm::new(&root.sub("pre_layrnorm"), width, config.layer_norm_eps, true)?,
            layers: nn::Blocks::new(&layers, config.num_hidden_layers, |params, _| EncoderLayer::new(params, &sizes))?,
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
        let model = Self::new(CLIPVisionConfig::from_json(&config)?, &params)?;
        // Of the pooled output, and places that older files keep.
        let unused = |name: &str| {
            name.starts_with("post_layernorm")
                || name.starts_with("visual_projection")
                || name.ends_with("position_ids")
        };
        model
            .params
            .check_keys(&weights, unused)
            .map_err(|error| Error::Model { model: "CLIPVisionModel".into(), source: Box::new(error) })?;
        Ok(model)
    }

    /// States `[B, 1 + T, D]` of pictures `[B, C, S, S]`, normalised, with S the configuration's `image_size`: before the first layer
    /// and after each.
    ///
    /// # Errors
    /// When the pictures have another size.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<Vec<Tensor>> {
        let (side, channels) = (self.config.image_size, self.config.num_channels);
        let &[batch, ..] = pixel_values.dims() else {
            return Err(flowtape_engine::Error::shape("CLIPVisionModel", "pictures", pixel_values.dims()).into());
        };
        if pixel_values.dims() != [batch, channels, side, side] {
            let expected = format!("pictures [B, {channels}, {side}, {side}]");
            return Err(flowtape_engine::Error::shape("CLIPVisionModel", expected, pixel_values.dims()).into());
        }
        let weight = self.patch_embedding.value()?;
        let patches = patchify_conv(&pixel_values.to_dtype(weight.dtype())?, &weight, None)?;
        let class = self.class_embedding.value()?.reshape(&[1, 1, self.config.hidden_size])?;
        let class = class.expand(&[batch, 1, self.config.hidden_size])?;
        let x = Tensor::cat(&[&class, &patches], 1)?.add(&self.position_embedding.value()?)?;
        let mut states = vec![self.pre_layernorm.forward(&x)?];
        for layer in self.layers.iter() {
            let next = layer.forward(&states[states.len() - 1], None)?;
            states.push(next);
        }
        Ok(states)
    }
}
