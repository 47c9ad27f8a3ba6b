//! NeMo's YAML of `generate`: prompts for a whole pipeline, perhaps with trained weights in it.

use std::path::{Path, PathBuf};

use flowtape_engine::{DType, Device};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::compose::{Options, Request, TileSizes, compose};
use crate::error::io;
use crate::recipe::read_yaml;
use crate::start::{pipeline_folder, trained_folder};
use crate::{Error, Result};

/// A file of `flowtape sample -c`, with NeMo's names.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerationFile {
    /// What generates.
    pub model: GenerationModel,
    /// What is generated.
    pub inference: Inference,
    /// Where it goes.
    pub output: GenerationOutput,
    /// Concerns clusters, and must be null.
    #[serde(default)]
    pub distributed: Option<()>,
    /// How latents are decoded.
    #[serde(default)]
    pub vae: VaeOptions,
    /// The first prompt's; each further one has the next.
    #[serde(default)]
    #[schemars(range(max = u64::MAX))]
    pub seed: u64,
}

/// What generates.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerationModel {
    /// A pipeline's folder, or its name in the hub's cache.
    pub pretrained_model_name_or_path: String,
    /// A trained transformer in place of the pipeline's: a folder of diffusers or a run.
    #[serde(default)]
    pub checkpoint: Option<PathBuf>,
    /// The same where there is much noise.
    #[serde(default)]
    pub checkpoint_high_noise: Option<PathBuf>,
    /// The same where there is little, for pipelines of two transformers.
    #[serde(default)]
    pub checkpoint_low_noise: Option<PathBuf>,
    /// An adapter to fold in.
    #[serde(default)]
    pub lora_weights: Option<PathBuf>,
    /// What its change is multiplied with.
    #[serde(default = "one")]
    pub lora_scale: f64,
}

fn one() -> f64 {
    1.0
}

/// What is generated. What is left out is the pipeline's own.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Inference {
    /// Steps of the solver.
    #[serde(default)]
    #[schemars(range(min = 1, max = 10_000))]
    pub num_inference_steps: Option<usize>,
    /// The scale of guidance.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1000))]
    pub guidance_scale: Option<f64>,
    /// Rows of pixels.
    #[schemars(range(min = 1, max = 16_384))]
    pub height: usize,
    /// Columns of pixels.
    #[schemars(range(min = 1, max = 16_384))]
    pub width: usize,
    /// What the transformer computes in.
    #[serde(default)]
    pub dtype: TorchDtype,
    /// The most prompts that are taken.
    #[serde(default)]
    pub max_samples: Option<usize>,
    /// One for each picture or film.
    pub prompts: Vec<String>,
    /// Arguments of diffusers' pipeline.
    #[serde(default)]
    pub pipeline_kwargs: PipelineKwargs,
}

/// PyTorch's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TorchDtype {
    /// `torch.bfloat16`.
    #[default]
    Bfloat16,
    /// `torch.float16`.
    Float16,
    /// `torch.float32`.
    Float32,
}

impl From<TorchDtype> for DType {
    fn from(dtype: TorchDtype) -> Self {
        match dtype {
            TorchDtype::Bfloat16 => Self::BF16,
            TorchDtype::Float16 => Self::F16,
            TorchDtype::Float32 => Self::F32,
        }
    }
}

/// Arguments of diffusers' pipelines.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PipelineKwargs {
    /// Frames of a film.
    #[schemars(range(min = 1, max = 16_384))]
    pub num_frames: Option<usize>,
    /// What it is led away from.
    pub negative_prompt: Option<String>,
    /// The scale of guidance of the second transformer.
    #[schemars(range(min = 0, max = 1000))]
    pub guidance_scale_2: Option<f64>,
    /// The scale of classifier-free guidance beside one that is told.
    #[schemars(range(min = 0, max = 1000))]
    pub true_cfg_scale: Option<f64>,
    /// Tokens that prompts are cut or padded to.
    #[schemars(range(min = 1, max = 16_384))]
    pub max_sequence_length: Option<usize>,
}

/// Where pictures go.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerationOutput {
    /// A folder, which is made: `sample_000.png` and so on.
    pub output_dir: PathBuf,
    /// Frames of a film in a second.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1000))]
    pub fps: Option<f64>,
}

/// How latents are decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VaeOptions {
    /// Without effect: pictures are decoded one by one.
    pub enable_slicing: bool,
    /// Whether large pictures are decoded in tiles.
    pub enable_tiling: bool,
    /// Without effect: each part is loaded when it is needed.
    pub enable_cpu_offload: bool,
}

impl GenerationFile {
    /// Reads a file and applies settings `a.b=value`.
    ///
    /// # Errors
    /// When it can't be read, or for everything that is wrong with it.
    pub fn load(path: &Path, settings: &[String]) -> Result<Self> {
        read_yaml(path, &std::fs::read(path).map_err(io(path))?, settings)
    }

    /// Generates, and gives the paths of what was written. `progress` is told of each step: its prompt and its number.
    ///
    /// # Errors
    /// When a part is missing or broken, what is asked for does not fit, or a file can't be written.
    pub fn run(&self, device: &Device, progress: &mut dyn FnMut(usize, usize)) -> Result<Vec<PathBuf>> {
        let (model, inference, kwargs) = (&self.model, &self.inference, &self.inference.pipeline_kwargs);
        let folder = pipeline_folder(&model.pretrained_model_name_or_path)?;
        let high = model.checkpoint_high_noise.as_ref().or(model.checkpoint.as_ref());
        let named = [("transformer", high), ("transformer_2", model.checkpoint_low_noise.as_ref())];
        let mut transformers = Vec::new();
        for (name, path) in named {
            if let Some(path) = path {
                transformers.push((name, trained_folder(path)?));
            }
        }
        let loras: Vec<(PathBuf, f64)> =
            model.lora_weights.iter().map(|path| (path.clone(), model.lora_scale)).collect();
        let out = &self.output.output_dir;
        std::fs::create_dir_all(out).map_err(io(out))?;
        let most = inference.max_samples.unwrap_or(usize::MAX);
        let mut written = Vec::new();
        for (i, prompt) in inference.prompts.iter().take(most).enumerate() {
            let request = Request {
                negative_prompt: kwargs.negative_prompt.as_deref(),
                size: Some([inference.height, inference.width]),
                frames: kwargs.num_frames,
                steps: inference.num_inference_steps,
                guidance_scale: inference.guidance_scale,
                guidance_scale_2: kwargs.guidance_scale_2,
                true_cfg_scale: kwargs.true_cfg_scale,
                max_sequence_length: kwargs.max_sequence_length,
                seed: self.seed.wrapping_add(i as u64),
                ..Request::new(prompt)
            };
            let options = Options {
                dtype: inference.dtype.into(),
                device,
                transformers: &transformers,
                loras: &loras,
                allow_unused: false,
                images: &[],
                tiles: TileSizes { side: self.vae.enable_tiling.then_some(TILE), frames: None },
                fps: self.output.fps,
                out: &out.join(format!("sample_{i:03}.png")),
            };
            written.extend(compose(&folder, &request, &options, &mut |step| progress(i, step))?);
        }
        if written.is_empty() {
            let what = "inference.prompts: expected at least one prompt";
            return Err(Error::Run { path: out.clone(), what: what.into() });
        }
        Ok(written)
    }
}

/// Sides of tiles in pixels.
pub const TILE: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_and_values_that_do_not_fit_are_told_with_their_places() {
        let text = b"model: {pretrained_model_name_or_path: x}\n\
                     inference: {height: 0, width: 64, promts: [a], prompts: [b]}\noutput: {output_dir: o}\n";
        let error = read_yaml::<GenerationFile>(Path::new("g.yaml"), text, &[]).unwrap_err().to_string();
        assert!(error.contains("promts") && error.contains("prompts") && error.contains("height"), "{error}");
        assert!(error.contains("g.yaml:2"), "{error}");
    }
}
