//! From a prompt to pictures with the parts of a pipeline's folder.

use std::collections::BTreeMap;
use std::path::PathBuf;

use flowtape_engine::nn::{ParamBuilder, Placement};
use flowtape_engine::{DType, Device, Error as EngineError, Philox, Tensor};
use flowtape_flowmatch::solver::OnStep;
use flowtape_flowmatch::{Batch, DataType, EulerStep, Input, ModelAdapter, Sampling, Scheduler, TaskType};

use super::guidance::{rescaled, with_norm_of};
use super::pictures::{Pictures, given_frames, reference_latents};
use super::{Asked, ConditionImage, Generated, Generation, PipelineFolder, PromptEncoder, Request, Settings, Waveform};
use crate::checkpoint::{CONFIG, load_config};
use crate::ltx2::{ISOLATE_MODALITIES, PERTURBED_BLOCKS};
use crate::presets::of_checkpoint;
use crate::vae::{self, Autoencoder, TileSizes, Vocoder};
use crate::{Condition, Error, ModelKind, Result, Transformer, checkpoint};

/// What is done to each transformer that is loaded.
pub type OnLoad<'a> = dyn Fn(&dyn Transformer) -> Result<()> + 'a;

/// A pipeline ready to generate. Parts are loaded when they are needed, and go when they were used: the text encoders are gone
/// before the transformer comes.
pub struct Generator<'a> {
    folder: &'a PipelineFolder,
    how: &'static Generation,
    scheduler: Scheduler,
    device: Device,
    dtype: DType,
    /// What is done to each transformer that is loaded, such as adapters that are folded in.
    on_load: Option<&'a OnLoad<'a>>,
    transformer: Option<&'a dyn Transformer>,
    prompts: Option<&'a dyn PromptEncoder>,
    folders: BTreeMap<&'static str, PathBuf>,
    tiles: TileSizes,
}

impl<'a> Generator<'a> {
    /// From a folder. The transformer computes in `dtype`, the autoencoder in f32.
    ///
    /// # Errors
    /// When its class is unknown, or its scheduler can't be read.
    pub fn new(folder: &'a PipelineFolder, dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self {
            how: &folder.kind()?.generation,
            scheduler: Scheduler::load(&folder.part("scheduler")?)?,
            folder,
            device: device.clone(),
            dtype,
            on_load: None,
            transformer: None,
            prompts: None,
            folders: BTreeMap::new(),
            tiles: TileSizes::default(),
        })
    }

    /// With something that is done to each transformer when it was loaded.
    #[must_use]
    pub fn on_load(mut self, what: &'a OnLoad<'a>) -> Self {
        self.on_load = Some(what);
        self
    }

    /// With a transformer that is there already, such as a run's, in place of the folder's.
    #[must_use]
    pub fn with_transformer(mut self, model: &'a dyn Transformer) -> Self {
        self.transformer = Some(model);
        self
    }

    /// With something that encodes prompts already, in place of the folder's text encoders.
    #[must_use]
    pub fn with_prompts(mut self, prompts: &'a dyn PromptEncoder) -> Self {
        self.prompts = Some(prompts);
        self
    }

    /// With another folder in place of a transformer's part.
    #[must_use]
    pub fn with_folder(mut self, part: &'static str, folder: PathBuf) -> Self {
        self.folders.insert(part, folder);
        self
    }

    /// With an autoencoder that takes pictures in tiles and clips in parts.
    #[must_use]
    pub fn with_tiles(mut self, tiles: TileSizes) -> Self {
        self.tiles = tiles;
        self
    }

    /// Where a transformer lies.
    ///
    /// # Errors
    /// When the pipeline does not list it, or it is not there.
    pub fn transformer_folder(&self, name: &str) -> Result<PathBuf> {
        self.folders.get(name).map_or_else(|| self.folder.part(name), |folder| Ok(folder.clone()))
    }

    fn load_transformer(&self, name: &str) -> Result<Loaded<'a>> {
        let lent = self.transformer.filter(|_| name == TRANSFORMER).map(Loaded::Lent);
        let model = match lent {
            Some(model) => model,
            None => {
                let params = ParamBuilder::with_plan(0, Placement::frozen(self.dtype), &self.device);
                Loaded::Own(checkpoint::load_with(&self.transformer_folder(name)?, params)?)
            }
        };
        if let Some(on_load) = self.on_load {
            on_load(model.get())?;
        }
        Ok(model)
    }

    /// Generates. `on_step` sees the latents after each step.
    ///
    /// # Errors
    /// When a part is missing or broken, or what is asked for does not fit.
    pub fn generate(&self, request: &Request<'_>, on_step: &mut OnStep<'_>) -> Result<Generated> {
        let config = match self.transformer {
            Some(model) => model.config(),
            None => load_config(&self.transformer_folder(TRANSFORMER)?.join(CONFIG))?,
        };
        let asked = Asked {
            folder: self.folder,
            config: &config,
            guidance_scale: request.guidance_scale.unwrap_or(self.how.guidance_scale),
            images: request.images.len(),
        };
        let kind = ModelKind::of_adapter((self.how.adapter)(&asked))?;
        check_images(kind, self.folder.kind()?.pictures, request.images.len())?;
        let kwargs = (self.how.kwargs)(&asked).as_object().cloned().unwrap_or_default();
        let adapter = (kind.new_adapter)(&kwargs)?;
        let patch = (kind.requirements)(&config, &kwargs)?.patch;
        let mut autoencoder = vae::load(&self.folder.part("vae")?, Some(DType::F32), &self.device)?;
        self.tiles.apply(&mut *autoencoder)?;
        let noise = self.noise(&*autoencoder, request, &patch, &kind.capabilities.data)?;
        let settings = self.settings(request, &noise, &patch)?;
        let sound = match kind.takes(Condition::Audio) {
            true => Some(self.sound(request)?),
            false => None,
        };
        let mut batches =
            self.conditioning(request, &noise, &kind.capabilities.data, settings.negative_prompt.as_deref())?;
        batches.tells_end = config["use_meanflow"].as_bool().unwrap_or(false);
        if !request.images.is_empty() {
            self.show(kind, &*autoencoder, request, &mut batches)?;
        }
        let mut streams = vec![noise];
        if let Some((_, audio)) = &sound {
            for batch in [Some(&mut batches.positive), batches.negative.as_mut()].into_iter().flatten() {
                // Its sizes count.
                batch.tensors.insert("audio_latents".into(), audio.clone());
            }
            streams.push(audio.clone());
        }
        let latents = self.denoise(&*adapter, &batches, (request, &settings), &streams, on_step)?;
        let mut film = latents[0].clone();
        if self.how.keeps_first_frame && batches.task_type == TaskType::I2V {
            let rest = film.narrow(2, 1, film.dim(2)? - 1)?;
            film = Tensor::cat(&[&batches.positive.latents.narrow(2, 0, 1)?.to_dtype(rest.dtype())?, &rest], 2)?;
        }
        let pixels = self.decode(&*autoencoder, &film)?;
        let audio = match (&sound, latents.get(1)) {
            (Some((autoencoder, _)), Some(latents)) => Some(self.sound_waves(&**autoencoder, latents)?),
            _ => None,
        };
        Ok(Generated { pixels, audio, fps: self.how.fps, settings })
    }

    /// The autoencoder of the sound, and its latents to begin with: as long as the film.
    fn sound(&self, request: &Request<'_>) -> Result<(Box<dyn Autoencoder>, Tensor)> {
        let autoencoder = vae::load(&self.folder.part("audio_vae")?, Some(DType::F32), &self.device)?;
        let config = autoencoder.config();
        let number = |key: &str| config[key].as_u64().unwrap_or(0) as usize;
        // Steps of time, of which each latent has some; bands likewise.
        let bands = number("mel_bins").max(1);
        let probe = autoencoder.latent_dims(&[2, PROBE, bands]);
        let (each, per_band) = (PROBE as f64 / probe[1] as f64, probe[2]);
        let seconds = request.frames.unwrap_or(self.how.frames) as f64 / self.how.fps;
        let rate = number("sample_rate") as f64 / number("mel_hop_length").max(1) as f64 / each;
        let length = (seconds * rate).round_ties_even().max(1.0) as usize;
        let dims = [request.n, probe[0], length, per_band];
        let noise = match &request.audio_noise {
            Some(noise) if noise.dims() != dims => {
                return Err(EngineError::shape("audio_noise", format!("{dims:?}"), noise.dims()).into());
            }
            Some(noise) => noise.to_device(&self.device)?.to_dtype(self.dtype)?,
            // Other numbers than those of the film.
            None => drawn(!request.seed, &dims, &self.device, self.dtype)?,
        };
        Ok((autoencoder, noise))
    }

    fn sound_waves(&self, autoencoder: &dyn Autoencoder, latents: &Tensor) -> Result<Waveform> {
        let log_mel = autoencoder.decode(&autoencoder.denormalise(&latents.to_dtype(DType::F32)?)?)?;
        let vocoder = Vocoder::load(&self.folder.part("vocoder")?, DType::F32, &self.device)?;
        Ok(Waveform { samples: vocoder.forward(&log_mel)?, sampling_rate: vocoder.sampling_rate() })
    }

    /// Latents to begin with.
    fn noise(
        &self,
        autoencoder: &dyn Autoencoder,
        request: &Request<'_>,
        patch: &[usize],
        data: &DataType,
    ) -> Result<Tensor> {
        let edited = self.folder.kind()?.pictures.and_then(|pictures| pictures.size(request.images));
        let [height, width] = request.size.or(edited).unwrap_or(self.how.size);
        let film = *data == DataType::Video;
        let frames = if film { request.frames.unwrap_or(self.how.frames) } else { 1 };
        let dims = latent_dims(autoencoder, request.n, frames, [height, width]);
        let dims = if film { dims } else { [&dims[..2], &dims[dims.len() - 2..]].concat() };
        // How many pixels a token's side has.
        let probe = latent_dims(autoencoder, 1, 1, [PROBE; 2]);
        let ratio = probe.last().map_or(1, |side| PROBE / side.max(&1));
        let step = ratio * patch.last().unwrap_or(&1);
        let whole = |side: usize| side > 0 && side.is_multiple_of(step);
        if !whole(height) || !whole(width) {
            let expected = format!("sides that are multiples of {step} pixels");
            return Err(Error::config("size", expected, format!("{width} x {height}")));
        }
        if request.n == 0 || frames == 0 {
            return Err(Error::config("n", "at least one picture of at least one frame", (request.n, frames)));
        }
        match &request.noise {
            Some(noise) if noise.dims() != dims => {
                Err(EngineError::shape("noise", format!("{dims:?}"), noise.dims()).into())
            }
            Some(noise) => Ok(noise.to_device(&self.device)?.to_dtype(self.dtype)?),
            None => drawn(request.seed, &dims, &self.device, self.dtype),
        }
    }

    fn settings(&self, request: &Request<'_>, noise: &Tensor, patch: &[usize]) -> Result<Settings> {
        let how = self.how;
        let steps = request.steps.unwrap_or(how.steps);
        let mut scheduler =
            request.shift.map_or(Ok(self.scheduler.clone()), |shift| self.scheduler.with_shift(shift))?;
        scheduler.solver = request.sampler.unwrap_or(scheduler.solver);
        let tokens = noise.dims()[2..].iter().product::<usize>() / patch.iter().product::<usize>().max(1);
        let config = scheduler.config();
        let distilled = how.distilled_mu.filter(|_| self.folder.flag("is_distilled"));
        let mu = config.use_dynamic_shifting.then(|| distilled.unwrap_or_else(|| (how.mu)(tokens, steps, config)));
        let schedule = if how.own_levels { scheduler.own(steps, mu)? } else { scheduler.even(steps, mu)? };
        let scale = request.guidance_scale.map_or_else(|| self.default_guidance(), |scale| Ok((how.cfg)(scale)))?;
        let cfg = request.true_cfg_scale.unwrap_or(if how.told { 1.0 } else { scale });
        let negative = request.negative_prompt.or(how.negative_prompt).filter(|_| cfg != 1.0);
        Ok(Settings {
            steps,
            guidance_scale: how.told.then_some(scale),
            true_cfg_scale: negative.map(|_| cfg),
            negative_prompt: negative.map(String::from),
            sampler: scheduler.solver,
            shift: (!config.use_dynamic_shifting).then_some(config.shift),
            schedule,
        })
    }

    /// The scale where none is asked for: 1 for a model that is distilled, that of the folder's guider, or the class's.
    fn default_guidance(&self) -> Result<f64> {
        let known = of_checkpoint(&self.folder.path().to_string_lossy());
        if self.folder.flag("is_distilled") || known.is_some_and(|preset| preset.caution.is_some()) {
            return Ok(1.0);
        }
        Ok((self.how.cfg)(self.folder.guider()?["guidance_scale"].as_f64().unwrap_or(self.how.guidance_scale)))
    }

    /// What the model is told of the prompt and, where there is one, of what it is led away from.
    fn conditioning(
        &self,
        request: &Request<'_>,
        noise: &Tensor,
        data: &DataType,
        negative: Option<&str>,
    ) -> Result<Conditioning> {
        let own;
        let encoder = match self.prompts {
            Some(lent) => lent,
            None => {
                own = self.folder.prompts(&self.device)?;
                &*own
            }
        };
        let seen: Vec<ConditionImage> = request.images.iter().filter(|image| image.seen.is_some()).cloned().collect();
        let length = request.max_sequence_length;
        let batch = |prompt: &str, negative: bool| -> Result<Batch> {
            let mut batch = Batch::new(noise.clone(), data.clone());
            let encoded = match negative && seen.is_empty() {
                true => vec![encoder.encode_negative(prompt, length)?],
                false => encoder.encode_with_images(&[prompt], &seen, length)?,
            };
            for (name, tensor) in encoded.into_iter().flatten() {
                let all = [&[request.n], tensor.dims()].concat();
                batch = batch.with(name, tensor.detach().unsqueeze(0)?.expand(&all)?);
            }
            Ok(batch)
        };
        let negative = negative.map(|negative| batch(negative, true)).transpose()?;
        Ok(Conditioning {
            positive: batch(request.prompt, false)?,
            negative,
            task_type: TaskType::T2V,
            tells_end: false,
        })
    }

    /// Gives what the model is told its latents of the pictures, as often as films or pictures are made of them.
    fn show(
        &self,
        kind: &ModelKind,
        autoencoder: &dyn Autoencoder,
        request: &Request<'_>,
        batches: &mut Conditioning,
    ) -> Result<()> {
        let (images, device) = (request.images, &self.device);
        let latent_frames = batches.positive.latents.dims()[2];
        let for_each = |latents: Tensor| -> Result<Tensor> {
            let all = [&[request.n], &latents.dims()[1..]].concat();
            Ok(latents.expand(&all)?.to_dtype(self.dtype)?)
        };
        let mut add = |add: &dyn Fn(&mut Batch)| {
            [Some(&mut batches.positive), batches.negative.as_mut()].into_iter().flatten().for_each(add);
        };
        if kind.takes(Condition::GivenFrames) {
            let frames = whole_frames(autoencoder, request.frames.unwrap_or(self.how.frames));
            let latents = for_each(given_frames(autoencoder, images, frames, device)?)?;
            add(&|batch| drop(batch.tensors.insert("condition_latents".into(), latents.clone())));
        } else if kind.takes(Condition::FirstFrame) {
            if images.len() > 1 {
                return Err(Error::config("image", "the first frame of the film alone", images.len()));
            }
            // The frames after it are noise, and not looked at here.
            let first = for_each(given_frames(autoencoder, images, 1, device)?)?;
            let latents = first.pad(2, 0, latent_frames - 1)?;
            add(&|batch| batch.latents = latents.clone());
            batches.task_type = TaskType::I2V;
        } else {
            let context = reference_latents(autoencoder, images, device)?;
            let context = context.into_iter().map(for_each).collect::<Result<Vec<_>>>()?;
            add(&|batch| drop(batch.lists.insert("context_latents".into(), context.clone())));
        }
        Ok(())
    }

    fn denoise(
        &self,
        adapter: &dyn ModelAdapter,
        batches: &Conditioning,
        (request, settings): (&Request<'_>, &Settings),
        noise: &[Tensor],
        on_step: &mut OnStep<'_>,
    ) -> Result<Vec<Tensor>> {
        let (sound, with_sound) = (&request.with_sound, noise.len() > 1);
        let boundary = self.folder.number("boundary_ratio").map(|ratio| ratio * self.timesteps());
        let mut loaded: Option<(&str, Loaded<'_>)> = None;
        let mut velocity = |x: &[Tensor], step: EulerStep| {
            // The second transformer takes over where little noise is left.
            let name = match boundary {
                Some(boundary) if f64::from(step.timestep) < boundary => TRANSFORMER_2,
                _ => TRANSFORMER,
            };
            if loaded.as_ref().is_none_or(|(known, _)| *known != name) {
                loaded = None;
                loaded = Some((name, self.load_transformer(name)?));
            }
            let Some((_, model)) = &loaded else { return Err(Error::config("transformer", "one", name)) };
            let sampling =
                |batch| Sampling { adapter, model: model.get(), batch, task_type: batches.task_type, guidance: None };
            // Where the step ends, on the scale of times.
            let end = f64::from(step.next_sigma) * self.timesteps();
            let end = Tensor::full(&[x[0].dim(0)?], end, DType::F32, &self.device)?;
            let told: Vec<(&str, Input)> = batches.tells_end.then(|| ("timestep_r", end.into())).into_iter().collect();
            let predict =
                |batch, more: &[(&str, Input)]| sampling(batch).predict(batch, x, step, &[&told, more].concat());
            let conditional = predict(&batches.positive, &[])?;
            let film = settings.true_cfg_scale.unwrap_or(1.0);
            let film = request.guidance_scale_2.filter(|_| name == TRANSFORMER_2).unwrap_or(film);
            // Each prediction that is led away from, and how far: in the film and in its sound.
            let mut others = Vec::new();
            if let Some(negative) = &batches.negative {
                others.push((predict(negative, &[])?, [film - 1.0, sound.audio_guidance_scale - 1.0]));
            }
            let away = |scales: [f64; 2]| with_sound && scales != [0.0; 2];
            if away(sound.stg_scale) && !sound.stg_blocks.is_empty() {
                let blocks = Tensor::from_slice(&sound.stg_blocks, &[sound.stg_blocks.len()], &Device::cpu())?;
                let perturbed = predict(&batches.positive, &[(PERTURBED_BLOCKS, blocks.into())])?;
                others.push((perturbed, sound.stg_scale));
            }
            let scales = sound.modality_scale.map(|scale| scale - 1.0);
            if away(scales) {
                others.push((predict(&batches.positive, &[(ISOLATE_MODALITIES, 1.0.into())])?, scales));
            }
            let mut guided = conditional.clone();
            for (other, scales) in &others {
                for (i, (guided, scale)) in guided.iter_mut().zip(scales).enumerate() {
                    *guided = guided.add(&conditional[i].sub(&other[i])?.mul_scalar(*scale)?)?;
                }
            }
            if !others.is_empty() {
                guided[0] = with_norm_of(&guided[0], &conditional[0], self.how.keeps_norm)?;
            }
            if with_sound && !others.is_empty() {
                for (i, (guided, rescale)) in guided.iter_mut().zip(sound.guidance_rescale).enumerate() {
                    *guided = rescaled(guided, &conditional[i], &x[i], f64::from(step.sigma), rescale)?;
                }
            }
            Ok(guided)
        };
        settings.sampler.integrate(noise, &settings.schedule, &mut velocity, on_step)
    }

    fn timesteps(&self) -> f64 {
        self.scheduler.config().num_train_timesteps as f64
    }

    fn decode(&self, autoencoder: &dyn Autoencoder, latents: &Tensor) -> Result<Tensor> {
        let latents = latents.to_dtype(DType::F32)?;
        // Pictures of an autoencoder of films are films of one frame.
        let one_frame = latents.rank() == 4 && autoencoder.has_frames();
        let latents = if one_frame { latents.unsqueeze(2)? } else { latents };
        let pixels = autoencoder.decode(&autoencoder.denormalise(&latents)?)?;
        Ok(if one_frame { pixels.narrow(2, 0, 1)?.squeeze(2)? } else { pixels })
    }
}

/// A transformer of one's own or somebody else's.
enum Loaded<'a> {
    Own(Box<dyn Transformer>),
    Lent(&'a dyn Transformer),
}

impl Loaded<'_> {
    fn get(&self) -> &dyn Transformer {
        match self {
            Self::Own(model) => &**model,
            Self::Lent(model) => *model,
        }
    }
}

/// Of a prompt, and of what it is led away from.
struct Conditioning {
    positive: Batch,
    negative: Option<Batch>,
    /// Whether a first frame is given among the latents.
    task_type: TaskType,
    /// Whether the model is told where each step ends (mean flows).
    tells_end: bool,
}

/// Whether a pipeline and its model have a use for so many pictures.
fn check_images(kind: &ModelKind, pictures: Option<Pictures>, images: usize) -> Result<()> {
    let any = [Condition::GivenFrames, Condition::FirstFrame, Condition::ReferenceImages];
    if images > 0 && !(pictures.is_some() && any.into_iter().any(|condition| kind.takes(condition))) {
        let expected = format!("none: the transformer of the adapter {} goes by words alone", kind.adapter);
        return Err(Error::config("image", expected, images));
    }
    if images == 0 && kind.takes(Condition::GivenFrames) {
        return Err(Error::config("image", "the first frame of the film, or the first and the last", "none"));
    }
    if images == 0 && pictures == Some(Pictures::FirstFrame) {
        return Err(Error::config("image", "the first frame of the film", "none"));
    }
    Ok(())
}

/// The fewest frames of a film with as many latent frames: those beyond are not seen.
fn whole_frames(autoencoder: &dyn Autoencoder, frames: usize) -> usize {
    let latent = |frames| latent_dims(autoencoder, 1, frames, [PROBE; 2])[2];
    (1..=frames).rev().take_while(|fewer| latent(*fewer) == latent(frames)).last().unwrap_or(frames)
}

/// Parts of a pipeline.
const TRANSFORMER: &str = "transformer";
const TRANSFORMER_2: &str = "transformer_2";
/// A side in pixels that every autoencoder halves without rest.
const PROBE: usize = 1024;

/// Sizes of latents, with the axis of frames where the autoencoder is one of films.
fn latent_dims(autoencoder: &dyn Autoencoder, n: usize, frames: usize, [height, width]: [usize; 2]) -> Vec<usize> {
    match autoencoder.has_frames() {
        true => autoencoder.latent_dims(&[n, 3, frames, height, width]),
        false => autoencoder.latent_dims(&[n, 3, height, width]),
    }
}

/// Standard normal numbers, a stream for each picture: it stays the same, however many there are.
fn drawn(seed: u64, dims: &[usize], device: &Device, dtype: DType) -> Result<Tensor> {
    let one = |i: usize| Philox::new(seed).fork(i as u64).normal(&dims[1..], device);
    let all = (0..dims[0]).map(one).collect::<flowtape_engine::Result<Vec<_>>>()?;
    Ok(Tensor::stack(&all.iter().collect::<Vec<_>>(), 0)?.to_dtype(dtype)?)
}
