//! diffusers' pipelines: a folder with `model_index.json` and a part in each of its folders, loaded as a whole or by part.
//!
//! | file | what it holds |
//! |---|---|
//! | `generate`, `request` | [`Generator`]: from a prompt to pictures and films; what is asked of it |
//! | `guidance` | how predictions are led away from others |
//! | `chroma`, `flux`, `hunyuan_video`, `krea2`, `language`, `ltx2`, `qwen_image_edit`, `wan` | what prompts become in each family |
//! | `part` | a text encoder with its tokenizer |
//! | `pictures` | pictures that a pipeline goes by |

mod chroma;
mod flux;
pub mod generate;
mod guidance;
mod hunyuan_video;
mod known_prompts;
mod krea2;
mod language;
mod ltx2;
mod part;
mod pictures;
mod qwen_image_edit;
mod request;
mod wan;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flowtape_engine::files::exists;
use flowtape_engine::{DType, Device, Error as EngineError, Tensor};
use flowtape_flowmatch::sampler::{calculate_shift, compute_empirical_mu};
use serde_json::{Value, json};

use crate::text::{TextModel, Tokenizer, load};
use crate::{Error, Result};

pub use chroma::ChromaPrompts;
pub use flux::FluxPrompts;
pub use generate::Generator;
pub use guidance::{KeepsNorm, SoundGuidance};
pub use hunyuan_video::{HunyuanPrompts, glyph_text};
pub use known_prompts::KnownPrompts;
pub use krea2::Krea2Prompts;
pub use language::{FLUX2, FLUX2_KLEIN, LUMINA2, LanguagePrompts, QWEN_IMAGE, States, Template, Z_IMAGE};
pub use ltx2::LTX2Prompts;
pub use pictures::{ConditionImage, Pictures, SeenImage, given_frames, reference_latents};
pub use qwen_image_edit::QwenImageEditPrompts;
pub use request::{Asked, Generated, Generation, Request, Settings, Waveform};
pub use wan::{WanPrompts, clean_prompt};

/// The file that lists a pipeline's parts.
pub const MODEL_INDEX: &str = "model_index.json";

/// A pipeline's folder. Opening it loads nothing.
#[derive(Clone, Debug)]
pub struct PipelineFolder {
    path: PathBuf,
    class: String,
    /// The file's object.
    index: Value,
    /// The class of each part that is there.
    parts: BTreeMap<String, String>,
}

/// Prompts to what a pipeline's transformer is told: tensors by the names that adapters read, for each prompt without an axis of
/// samples, since texts may differ in length.
pub trait PromptEncoder: Send + Sync {
    /// Embeddings of each prompt. Texts are cut or padded to `max_sequence_length` tokens, or to the pipeline's own length.
    ///
    /// # Errors
    /// When a model fails.
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>>;

    /// The same of what a picture is led away from, which some pipelines write down otherwise.
    ///
    /// # Errors
    /// When a model fails.
    fn encode_negative(&self, prompt: &str, max_sequence_length: Option<usize>) -> Result<Encoded> {
        Ok(self.encode(&[prompt], max_sequence_length)?.into_iter().next().unwrap_or_default())
    }

    /// The same of prompts that speak of pictures, which come first; where the text encoder sees none, with [`Self::image_embeds`].
    ///
    /// # Errors
    /// As above, and when the pipeline takes no pictures or lacks one.
    fn encode_with_images(
        &self,
        prompts: &[&str],
        images: &[ConditionImage],
        max_sequence_length: Option<usize>,
    ) -> Result<Vec<Encoded>> {
        let embeds = if images.is_empty() { None } else { Some(self.image_embeds(images)?) };
        let mut all = self.encode(prompts, max_sequence_length)?;
        if let Some(embeds) = embeds {
            all.iter_mut().for_each(|one| drop(one.insert("image_embeds", embeds.clone())));
        }
        Ok(all)
    }

    /// What a vision encoder makes of given frames: `[N, E]`.
    ///
    /// # Errors
    /// When the pipeline takes no pictures or lacks one, or the model fails.
    fn image_embeds(&self, images: &[ConditionImage]) -> Result<Tensor> {
        Err(Error::config("image", "none: this pipeline makes pictures of words alone", images.len()))
    }
}

/// The tensors of one prompt by name.
pub type Encoded = BTreeMap<&'static str, Tensor>;

/// Makes the encoder of prompts from a pipeline's folder, on a device.
pub type NewPromptEncoder = fn(&PipelineFolder, &Device) -> Result<Box<dyn PromptEncoder>>;

/// A pipeline that can be loaded.
#[derive(Debug)]
pub struct PipelineKind {
    /// diffusers' class, as in `_class_name` of `model_index.json`.
    pub class: &'static str,
    /// Its parts that make embeddings of prompts.
    pub prompt_parts: &'static [&'static str],
    /// Loads them.
    pub prompts: NewPromptEncoder,
    /// What it makes of pictures, where it takes any.
    pub pictures: Option<Pictures>,
    /// How pictures are made of them.
    pub generation: Generation,
}

/// All pipelines.
pub const PIPELINES: &[PipelineKind] = &[
    PipelineKind {
        class: "FluxPipeline",
        prompt_parts: TWO_MODELS,
        prompts: |folder, device| Ok(Box::new(FluxPrompts::load(folder, device)?)),
        pictures: None,
        generation: Generation {
            adapter: |_| "flux",
            kwargs: tell_guidance,
            steps: 28,
            guidance_scale: 3.5,
            told: true,
            mu: |tokens, _, config| calculate_shift(tokens, config),
            ..PICTURE
        },
    },
    PipelineKind {
        class: "Flux2Pipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(LanguagePrompts::load(folder, FLUX2, device)?)),
        pictures: Some(Pictures::References),
        generation: Generation {
            adapter: flux2_adapter,
            kwargs: tell_guidance,
            guidance_scale: 4.0,
            told: true,
            ..PICTURE
        },
    },
    PipelineKind {
        class: "Flux2KleinPipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(LanguagePrompts::load(folder, FLUX2_KLEIN, device)?)),
        pictures: Some(Pictures::References),
        generation: Generation {
            adapter: flux2_adapter,
            kwargs: |_| json!({"use_guidance_embeds": false}),
            guidance_scale: 4.0,
            negative_prompt: Some(""),
            ..PICTURE
        },
    },
    PipelineKind {
        class: "ChromaPipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(ChromaPrompts::load(folder, device)?)),
        pictures: None,
        generation: Generation {
            adapter: |_| "chroma",
            steps: 35,
            guidance_scale: 5.0,
            negative_prompt: Some(""),
            mu: |tokens, _, config| calculate_shift(tokens, config),
            ..PICTURE
        },
    },
    PipelineKind {
        class: "QwenImagePipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(LanguagePrompts::load(folder, QWEN_IMAGE, device)?)),
        pictures: None,
        generation: Generation {
            adapter: |_| "qwen_image",
            guidance_scale: 4.0,
            keeps_norm: KeepsNorm::OfToken,
            mu: |tokens, _, config| calculate_shift(tokens, config),
            ..PICTURE
        },
    },
    PipelineKind {
        class: "QwenImageEditPlusPipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(QwenImageEditPrompts::load(folder, device)?)),
        pictures: Some(Pictures::Seen),
        generation: Generation {
            adapter: |_| "qwen_image_edit",
            steps: 40,
            guidance_scale: 4.0,
            keeps_norm: KeepsNorm::OfToken,
            mu: |tokens, _, config| calculate_shift(tokens, config),
            ..PICTURE
        },
    },
    PipelineKind {
        class: "WanPipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(WanPrompts::load(folder, device)?)),
        pictures: Some(Pictures::Frames),
        generation: Generation { adapter: |asked| wan_adapter(asked, "simple"), ..WAN },
    },
    PipelineKind {
        class: "WanImageToVideoPipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(WanPrompts::load(folder, device)?)),
        pictures: Some(Pictures::Frames),
        generation: Generation {
            adapter: |asked| wan_adapter(asked, "wan_i2v"),
            kwargs: |asked| match wan_adapter(asked, "wan_i2v") {
                "wan_i2v" => json!({"last_image": asked.images > 1}),
                _ => json!({}),
            },
            ..WAN
        },
    },
    PipelineKind {
        class: "HunyuanVideo15Pipeline",
        prompt_parts: TWO_MODELS,
        prompts: |folder, device| Ok(Box::new(HunyuanPrompts::load(folder, device)?)),
        pictures: None,
        generation: HUNYUAN,
    },
    PipelineKind {
        class: "HunyuanVideo15ImageToVideoPipeline",
        prompt_parts: TWO_MODELS,
        prompts: |folder, device| Ok(Box::new(HunyuanPrompts::load(folder, device)?)),
        pictures: Some(Pictures::FirstFrame),
        generation: HUNYUAN,
    },
    PipelineKind {
        class: "LTX2Pipeline",
        prompt_parts: &["tokenizer", "text_encoder", "connectors"],
        prompts: |folder, device| Ok(Box::new(LTX2Prompts::load(folder, device)?)),
        pictures: None,
        generation: Generation {
            adapter: |_| "ltx2",
            size: [512, 768],
            frames: 121,
            steps: 30,
            guidance_scale: 3.0,
            negative_prompt: Some(""),
            mu: |tokens, _, config| calculate_shift(tokens, config),
            ..PICTURE
        },
    },
    PipelineKind {
        class: "ZImagePipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(LanguagePrompts::load(folder, Z_IMAGE, device)?)),
        pictures: None,
        generation: Generation {
            adapter: |_| "z_image",
            guidance_scale: 5.0,
            cfg: |scale| scale + 1.0,
            negative_prompt: Some(""),
            mu: |tokens, _, config| calculate_shift(tokens, config),
            ..PICTURE
        },
    },
    PipelineKind {
        class: "Krea2Pipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(Krea2Prompts::load(folder, device)?)),
        pictures: None,
        generation: Generation {
            adapter: |_| "krea2",
            steps: 28,
            guidance_scale: 4.5,
            cfg: |scale| scale + 1.0,
            negative_prompt: Some(""),
            mu: |tokens, _, config| calculate_shift(tokens, config),
            distilled_mu: Some(1.15),
            ..PICTURE
        },
    },
    PipelineKind {
        class: "Lumina2Pipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(LanguagePrompts::load(folder, LUMINA2, device)?)),
        pictures: None,
        generation: Generation {
            adapter: |_| "lumina2",
            steps: 30,
            guidance_scale: 4.0,
            negative_prompt: Some(""),
            keeps_norm: KeepsNorm::OfRow,
            mu: |tokens, _, config| calculate_shift(tokens, config),
            ..PICTURE
        },
    },
];

const ONE_MODEL: &[&str] = &["tokenizer", "text_encoder"];
const TWO_MODELS: &[&str] = &["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"];

/// diffusers' `vision_num_semantic_tokens`: tokens of a first frame's embedding.
const SEMANTIC_TOKENS: usize = 729;

/// The arguments of an adapter that tells its model a scale of guidance, where the model embeds one.
fn tell_guidance(asked: &Asked<'_>) -> Value {
    let embeds = asked.config["guidance_embeds"].as_bool().unwrap_or(false);
    json!({"guidance_scale": asked.guidance_scale, "use_guidance_embeds": embeds})
}

/// FLUX.2's, with reference images or without.
fn flux2_adapter(asked: &Asked<'_>) -> &'static str {
    if asked.images > 0 { "flux2_edit" } else { "flux2" }
}

/// Of a folder of TI2V the one in which each token has a time, whatever the pipeline's class.
fn wan_adapter(asked: &Asked<'_>, other: &'static str) -> &'static str {
    if asked.folder.flag("expand_timesteps") { "wan_ti2v" } else { other }
}

/// What Wan's pipelines have in common.
const WAN: Generation = Generation {
    size: [480, 832],
    frames: 81,
    fps: 16.0,
    guidance_scale: 5.0,
    negative_prompt: Some(""),
    own_levels: true,
    keeps_first_frame: true,
    ..PICTURE
};

/// What HunyuanVideo 1.5's pipelines have in common.
const HUNYUAN: Generation = Generation {
    adapter: |_| "hunyuan",
    kwargs: |asked| json!({"default_image_embed_shape": [SEMANTIC_TOKENS, asked.config["image_embed_dim"]]}),
    size: [480, 832],
    frames: 121,
    guidance_scale: 6.0,
    negative_prompt: Some(""),
    ..PICTURE
};

/// What most pipelines of pictures have in common.
const PICTURE: Generation = Generation {
    adapter: |_| "",
    kwargs: |_| json!({}),
    size: [1024; 2],
    frames: 1,
    fps: 24.0,
    steps: 50,
    guidance_scale: 1.0,
    told: false,
    cfg: |scale| scale,
    negative_prompt: None,
    keeps_norm: KeepsNorm::No,
    distilled_mu: None,
    mu: |tokens, steps, _| compute_empirical_mu(tokens, steps),
    own_levels: false,
    keeps_first_frame: false,
};

impl PipelineFolder {
    /// Reads which parts a folder has.
    ///
    /// # Errors
    /// When it has no `model_index.json`, or that is not one.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(MODEL_INDEX);
        let wrong = |what: &str| Error::from(EngineError::Format { path: path.clone(), what: what.into() });
        if !exists(&path)? {
            return Err(wrong("not there: name the folder of a whole diffusers pipeline, not that of one part"));
        }
        let text = std::fs::read(&path).map_err(|source| EngineError::Io { path: path.clone(), source })?;
        let index: Value = serde_json::from_slice(&text).map_err(|e| wrong(&e.to_string()))?;
        let class = index["_class_name"].as_str().ok_or_else(|| wrong("no _class_name"))?.to_owned();
        let listed = index.as_object().into_iter().flatten();
        // A part is [library, class]; one that is left out is [null, null].
        let part = |(name, value): (&String, &Value)| Some((name.clone(), value.get(1)?.as_str()?.to_owned()));
        let parts = listed.filter(|(name, _)| !name.starts_with('_')).filter_map(part).collect();
        Ok(Self { path: folder.into(), class, parts, index })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// diffusers' class of the pipeline.
    pub fn class(&self) -> &str {
        &self.class
    }

    /// What we know of its class.
    ///
    /// # Errors
    /// When the class is unknown: the error lists all.
    pub fn kind(&self) -> Result<&'static PipelineKind> {
        let known = PIPELINES.iter().find(|kind| kind.class == self.class);
        known.ok_or_else(|| {
            let names: Vec<_> = PIPELINES.iter().map(|kind| kind.class).collect();
            let what = format!("_class_name: expected one of {}, got {}", names.join(", "), self.class);
            EngineError::Format { path: self.path.join(MODEL_INDEX), what }.into()
        })
    }

    /// Whether a part is there, such as an `image_encoder` that only some pipelines of a class have.
    pub fn has(&self, part: &str) -> bool {
        self.parts.contains_key(part)
    }

    /// The folder of a part, such as `vae`.
    ///
    /// # Errors
    /// When the pipeline does not list it, or it is not there.
    pub fn part(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        if !self.parts.contains_key(name) {
            let parts = self.parts.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let what = format!("{} lists no {name}, but {parts}", self.class);
            return Err(EngineError::Format { path: self.path.join(MODEL_INDEX), what }.into());
        }
        if !exists(&path)? {
            let what = format!("{MODEL_INDEX} lists it, but it is not there: fetch the whole pipeline");
            return Err(EngineError::Format { path, what }.into());
        }
        Ok(path)
    }

    /// A switch of `model_index.json`, such as `is_distilled`; off where it is not there.
    pub fn flag(&self, name: &str) -> bool {
        self.index[name].as_bool().unwrap_or(false)
    }

    /// A number of `model_index.json`, such as `boundary_ratio`, where there is one.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.index[name].as_f64()
    }

    /// A list of whole numbers of `model_index.json`, such as `text_encoder_select_layers`, where there is one.
    pub fn whole_numbers(&self, name: &str) -> Option<Vec<usize>> {
        let numbers = self.index[name].as_array()?.iter();
        numbers.map(|number| number.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
    }

    /// The configuration of the part `guider`; null where the pipeline has none.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn guider(&self) -> Result<Value> {
        if !self.parts.contains_key("guider") {
            return Ok(Value::Null);
        }
        let path = self.part("guider")?.join("guider_config.json");
        let text = std::fs::read(&path).map_err(|source| EngineError::Io { path: path.clone(), source })?;
        Ok(serde_json::from_slice(&text).map_err(|e| EngineError::Format { path, what: e.to_string() })?)
    }

    /// A tokenizer among the parts.
    ///
    /// # Errors
    /// When it is missing or broken.
    pub fn tokenizer(&self, name: &str) -> Result<Tokenizer> {
        Tokenizer::open(&self.part(name)?)
    }

    /// A text encoder among the parts; it computes in `dtype`, or in what its weights suggest.
    ///
    /// # Errors
    /// When it is missing or broken.
    pub fn text_encoder(&self, name: &str, dtype: Option<DType>, device: &Device) -> Result<Box<dyn TextModel>> {
        load(&self.part(name)?, dtype, device)
    }

    /// What makes embeddings of prompts; of the parts those alone are loaded that it needs.
    ///
    /// # Errors
    /// When the class is unknown, or a part is missing or broken.
    pub fn prompts(&self, device: &Device) -> Result<Box<dyn PromptEncoder>> {
        (self.kind()?.prompts)(self, device)
    }
}
