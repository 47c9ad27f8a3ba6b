//! What is asked of a pipeline, how it goes about it, and what comes of it.

use flowtape_engine::Tensor;
use flowtape_flowmatch::{EulerConfig, EulerSchedule, Solver};
use serde_json::Value;

use super::{ConditionImage, KeepsNorm, PipelineFolder, SoundGuidance};

/// What is asked for. What is left out is the pipeline's own.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// What is shown.
    pub prompt: &'a str,
    /// What it is led away from.
    pub negative_prompt: Option<&'a str>,
    /// Pictures to edit, or the first frame of a film, or its first and last; where no size is asked for, one of them has it.
    pub images: &'a [ConditionImage],
    /// Height and width in pixels.
    pub size: Option<[usize; 2]>,
    /// Frames of a film.
    pub frames: Option<usize>,
    /// Steps of the solver.
    pub steps: Option<usize>,
    /// The scale of guidance: told to the model where it is distilled, else that of [`Self::true_cfg_scale`].
    pub guidance_scale: Option<f64>,
    /// The scale of guidance of a second transformer; that of the first where none is given.
    pub guidance_scale_2: Option<f64>,
    /// The scale of classifier-free guidance, for which the model runs a second time; 1 is none.
    pub true_cfg_scale: Option<f64>,
    /// A static shift of the noise levels instead of the scheduler's.
    pub shift: Option<f64>,
    /// How steps are taken.
    pub sampler: Option<Solver>,
    /// Tokens that a text is cut or padded to.
    pub max_sequence_length: Option<usize>,
    /// The same seed gives the same pictures.
    pub seed: u64,
    /// How many.
    pub n: usize,
    /// Latents to begin with instead of drawn ones: `[n, C, h, w]` or `[n, C, F, h, w]`.
    pub noise: Option<Tensor>,
    /// The same of the sound: `[n, C, L, M]`.
    pub audio_noise: Option<Tensor>,
    /// Guidance of films with sound.
    pub with_sound: SoundGuidance,
}

impl<'a> Request<'a> {
    /// One picture of a prompt.
    pub fn new(prompt: &'a str) -> Self {
        Self {
            prompt,
            negative_prompt: None,
            images: &[],
            size: None,
            frames: None,
            steps: None,
            guidance_scale: None,
            guidance_scale_2: None,
            true_cfg_scale: None,
            shift: None,
            sampler: None,
            max_sequence_length: None,
            seed: 0,
            n: 1,
            noise: None,
            audio_noise: None,
            with_sound: SoundGuidance::default(),
        }
    }
}

/// How a pipeline goes from noise to latents: diffusers' choices as data.
#[derive(Debug)]
pub struct Generation {
    /// The adapter's name in [`crate::MODELS`].
    pub adapter: fn(&Asked<'_>) -> &'static str,
    /// Its arguments.
    pub kwargs: fn(&Asked<'_>) -> Value,
    /// Height and width in pixels.
    pub size: [usize; 2],
    /// Frames of a film; 1 for pictures.
    pub frames: usize,
    /// Frames of a film in a second.
    pub fps: f64,
    /// Steps.
    pub steps: usize,
    /// The scale of guidance.
    pub guidance_scale: f64,
    /// Whether the model is told that scale, or runs twice for it.
    pub told: bool,
    /// The scale of classifier-free guidance that this scale means: Z-Image counts from 0, which is none.
    pub cfg: fn(f64) -> f64,
    /// What it is led away from where nothing else is asked for; without one there is no second run then.
    pub negative_prompt: Option<&'static str>,
    /// Which lengths a guided prediction gets back from the conditional one.
    pub keeps_norm: KeepsNorm,
    /// μ of a dynamic shift, from the tokens, the steps and the scheduler.
    pub mu: fn(usize, usize, &EulerConfig) -> f64,
    /// μ of a model whose pipeline says that it is distilled, if another.
    pub distilled_mu: Option<f64>,
    /// Whether noise levels are spaced as the scheduler does it by itself, not from 1 to 1 / n.
    pub own_levels: bool,
    /// Whether a first frame that is given stands in the film as it is, where the model has it among its latents.
    pub keeps_first_frame: bool,
}

/// What an adapter and its arguments depend on.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The pipeline.
    pub folder: &'a PipelineFolder,
    /// The transformer's configuration.
    pub config: &'a Value,
    /// The scale of guidance.
    pub guidance_scale: f64,
    /// Pictures that it goes by.
    pub images: usize,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Pixels `[n, 3, H, W]` or `[n, 3, F, H, W]` from about -1 to 1, f32.
    pub pixels: Tensor,
    /// The sound, where there is some.
    pub audio: Option<Waveform>,
    /// Frames of a film in a second.
    pub fps: f64,
    /// What was asked for, complete: for the metadata of a picture.
    pub settings: Settings,
}

/// Sound.
#[derive(Clone, Debug)]
pub struct Waveform {
    /// `[n, channels, samples]` from -1 to 1, f32.
    pub samples: Tensor,
    /// Samples a second.
    pub sampling_rate: usize,
}

/// The choices that led to a picture.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Steps.
    pub steps: usize,
    /// The scale that the model was told.
    pub guidance_scale: Option<f64>,
    /// The scale of classifier-free guidance, where the model ran twice.
    pub true_cfg_scale: Option<f64>,
    /// What it was led away from.
    pub negative_prompt: Option<String>,
    /// The solver.
    pub sampler: Solver,
    /// The static shift, where there is one.
    pub shift: Option<f64>,
    /// The noise levels.
    pub schedule: EulerSchedule,
}
