//! Native flow-matching transformers, with diffusers' names and checkpoints, and the adapters that train them.
//!
//! | module | what it holds |
//! |---|---|
//! | [`blocks`] | what the models share: modulation, joint attention, embeddings, rotary tables |
//! | [`chroma`] | [`chroma::ChromaTransformer2DModel`] and [`chroma::ChromaAdapter`] |
//! | [`flux`] | [`flux::FluxTransformer2DModel`] and [`flux::FluxAdapter`] |
//! | [`hunyuan_video`] | [`hunyuan_video::HunyuanVideo15Transformer3DModel`] and [`hunyuan_video::HunyuanAdapter`] |
//! | [`lumina2`] | [`lumina2::Lumina2Transformer2DModel`] and [`lumina2::Lumina2Adapter`] |
//! | [`qwen_image_21`] | [`qwen_image_21::QwenImage21Transformer2DModel`] and [`qwen_image_21::QwenImage21Adapter`] |
//! | [`ltx2`] | [`ltx2::LTX2VideoTransformer3DModel`] and [`ltx2::LTX2Adapter`] |
//! | [`wan`] | [`wan::WanTransformer3DModel`], [`wan::SimpleAdapter`], [`wan::WanI2VAdapter`] and [`wan::WanTI2VAdapter`] |
//! | [`flux2`] | [`flux2::Flux2Transformer2DModel`], [`flux2::Flux2Adapter`] and [`flux2::Flux2EditAdapter`] |
//! | [`flux3`] | [`flux3::Flux3Transformer2DModel`] and [`flux3::Flux3Adapter`] |
//! | [`krea2`] | [`krea2::Krea2Transformer2DModel`] and [`krea2::Krea2Adapter`] |
//! | [`qwen_image`] | [`qwen_image::QwenImageTransformer2DModel`], [`qwen_image::QwenImageAdapter`] and [`qwen_image::QwenImageEditAdapter`] |
//! | [`z_image`] | [`z_image::ZImageTransformer2DModel`] and [`z_image::ZImageAdapter`] |
//! | [`pipeline`] | diffusers' pipelines: a folder and its parts, loaded together or one by one |
//! | [`text`] | text encoders and tokenizers |
//! | [`vision`] | what sees pictures for text encoders and transformers |
//! | [`vae`] | autoencoders between pixels and latents: [`vae::Autoencoder`], [`vae::AUTOENCODERS`] |
//! | [`checkpoint`] | diffusers' folders: `config.json` + `diffusion_pytorch_model.safetensors`, or shards of it |
//! | [`original`] | the layouts of the models' authors, read and written |
//! | [`peft`] | adapters outside a model: LoRA's weights by layer, and their files |
//! | [`presets`], [`summary`] | configurations of published checkpoints; what a model is made of |
//! | [`requirements`] | what a model asks of a batch, and what contradicts it |
//! | [`registry`] | [`MODELS`]: every model by name, [`create_adapter`], [`create_model`], [`create_pipeline`] |

pub mod blocks;
pub mod checkpoint;
pub mod chroma;
mod config;
pub mod flux;
pub mod flux2;
pub mod flux3;
pub mod hunyuan_video;
pub mod krea2;
pub mod ltx2;
pub mod lumina2;
pub mod original;
pub mod peft;
pub mod pipeline;
pub mod presets;
pub mod qwen_image;
pub mod qwen_image_21;
pub mod registry;
pub mod requirements;
pub mod summary;
#[cfg(test)]
mod testing;
pub mod text;
pub mod vae;
pub mod vision;
pub mod wan;
pub mod z_image;

use flowtape_engine::nn::{Param, Params};
use flowtape_flowmatch::{FlowModel, ModelInputs};

pub use flowtape_flowmatch::{Error, Result};
pub use registry::{
    Capabilities, Condition, GuidanceKind, MODELS, ModelKind, create_adapter, create_model, create_pipeline,
};

/// A transformer with parameters of diffusers' names.
pub trait Transformer: FlowModel {
    /// All parameters.
    fn params(&self) -> &Params;
    /// The configuration, as `config.json` holds it.
    fn config(&self) -> serde_json::Value;
    /// Its class of diffusers.
    fn class(&self) -> String {
        self.config()["_class_name"].as_str().unwrap_or_default().to_owned()
    }
    /// Where the parameters begin that the loss does not reach from these inputs: what makes something of an input that is
    /// missing, or that nothing reads.
    fn paths_without_gradient(&self, inputs: &ModelInputs) -> Vec<String> {
        let _ = inputs;
        Vec::new()
    }
    /// The names of all parameters under [`Self::paths_without_gradient`].
    fn parameters_without_gradient(&self, inputs: &ModelInputs) -> Vec<String> {
        let paths = self.paths_without_gradient(inputs);
        let names = self.params().iter().map(Param::path);
        names.filter(|name| paths.iter().any(|path| name.starts_with(path))).map(String::from).collect()
    }
    /// Whether a key of a checkpoint is of no use to the model and may be there: published files have some.
    fn is_ignored_key(&self, key: &str) -> bool {
        let _ = key;
        false
    }
    /// Whether ranks may share the tokens of each sample ([`ModelInputs::TOKEN_RANKS`]): context parallelism.
    fn shares_tokens(&self) -> bool {
        false
    }
    /// Whether each block keeps its inputs alone and runs again in backward: less memory for a second forward. The
    /// gradients are the same, bit for bit.
    fn set_gradient_checkpointing(&mut self, on: bool);
}
