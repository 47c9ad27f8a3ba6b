//! A trained model, for sampling.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use flowtape_engine::Device;
use flowtape_engine::cpu::awake;
use flowtape_flowmatch::FlowMatchingPipeline;
use flowtape_models::peft::load_any;
use flowtape_models::{Condition, ModelKind, Transformer, create_pipeline};

use crate::data::Data;
use crate::generate::{Generator, Request, Samples, check_count};
use crate::recipe::SamplingConfig;
use crate::run::RunFolder;
use crate::state::ema_folder;
use crate::trainer::trained_model;
use crate::weights::check_used;
use crate::{Error, Result, builtin};

/// A trained model behind its adapter, for sampling.
pub struct Trained {
    model: Box<dyn Transformer>,
    pipeline: FlowMatchingPipeline,
    data: Data,
    /// The run's own settings.
    pub sampling: SamplingConfig,
    device: Device,
}

impl Trained {
    /// From a run folder's newest checkpoint, on the recipe's device or another: the average of the weights, where one was kept.
    ///
    /// # Errors
    /// When the device is not there, it is not a run folder or has no checkpoint.
    pub fn load(path: &Path, device: Option<&str>) -> Result<Self> {
        Self::of(path, device, |checkpoint| Ok(ema_folder(&checkpoint)?.unwrap_or(checkpoint)))
    }

    /// The same with the weights of the last step.
    ///
    /// # Errors
    /// As above.
    pub fn load_raw(path: &Path, device: Option<&str>) -> Result<Self> {
        Self::of(path, device, Ok)
    }

    fn of(path: &Path, device: Option<&str>, part: impl Fn(PathBuf) -> Result<PathBuf>) -> Result<Self> {
        let (run, recipe) = RunFolder::open(path)?;
        let device = flowtape_gpu::device(device.unwrap_or(&recipe.device))?;
        let model = trained_model(&recipe, &part(run.checkpoints().newest_whole()?)?, &device)?;
        let pipeline = create_pipeline(recipe.flow_matching)?;
        let data = builtin::data(&recipe.data, &device)?;
        Ok(Self { model, pipeline, data, sampling: recipe.sampling, device })
    }

    /// Folds adapters into the model, each with its factor: keys that are of no use are an error unless they are allowed.
    ///
    /// # Errors
    /// When a file can't be read or does not fit the model.
    pub fn add_adapters(&self, adapters: &[(PathBuf, f64)], allow_unused: bool) -> Result<()> {
        for (path, factor) in adapters {
            let (weights, unused) = load_any(path, self.model.params(), &self.model.class())?;
            check_used(path, &unused, weights.0.is_empty(), allow_unused)?;
            weights.merge_into(self.model.params(), *factor)?;
        }
        Ok(())
    }

    /// Sizes of a sample: `[C, H, W]` or `[C, F, H, W]`.
    ///
    /// # Errors
    /// When the data it was trained on has no samples.
    pub fn sample_dims(&self) -> Result<Vec<usize>> {
        self.data.sample_dims()
    }

    /// `n` samples of a prompt; videos may go on from a given first frame.
    ///
    /// # Errors
    /// When the prompt is not taken, `n` or a number of `sampling` is outside its range, or the model takes no first frame.
    pub fn sample(&self, prompt: &str, n: usize, seed: u64, first_frame: Option<&[f32]>) -> Result<Samples> {
        let refused = |path: &str, what: String| Error::Run { path: path.into(), what };
        check_count(n, &self.sample_dims()?).map_err(|what| refused("samples", what))?;
        self.sampling.check().map_err(|what| refused("sampling", what))?;
        let kind = ModelKind::of_adapter(self.pipeline.adapter().name())?;
        if first_frame.is_some() && (self.sample_dims()?.len() < 4 || !kind.takes(Condition::FirstFrame)) {
            let able = Condition::FirstFrame.adapters().join(", ");
            let what = format!("only videos of these adapters go on from a frame: {able}");
            return Err(refused("--first-frame", what));
        }
        let first_frames = first_frame.map(|frame| frame.repeat(n));
        let prompts = vec![prompt; n];
        let generator = Generator {
            model: &*self.model,
            adapter: self.pipeline.adapter(),
            data: &self.data,
            sampling: &self.sampling,
            device: &self.device,
        };
        let request = Request { prompts: &prompts, first_frames: first_frames.as_deref(), seed };
        let samples = awake(&self.device, || generator.generate(&request, &AtomicBool::new(false)))?;
        // Nobody asks it to stop.
        Ok(samples.unwrap_or(Samples { pixels: Vec::new(), dims: self.sample_dims()? }))
    }
}
