//! The trainer's functions.

use std::ffi::c_char;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use flowtape_engine::files::write_whole;
use flowtape_engine::{DType, Device};
use flowtape_trainer::generate::Request;
use flowtape_trainer::recipe::SamplingConfig;
use flowtape_trainer::{Recipe, StepRecord};

use crate::FLOWTAPE_ABI_VERSION;
use crate::call::{Failure, FlowtapeStatus, array, call, put, reference, text};
use crate::tensor::{FlowtapeBytes, FlowtapeTensor, batch};

/// A model in training. Its functions may be called from any thread; one that works waits for another that does, but for
/// `flowtape_trainer_cancel`, which returns at once.
pub struct FlowtapeTrainer {
    trainer: Mutex<flowtape_trainer::Trainer>,
    cancelled: AtomicBool,
}

/// What a step came to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct FlowtapeMetrics {
    /// Optimiser steps done.
    pub step: u64,
    /// The epoch, where the recipe's own data is trained on.
    pub epoch: u64,
    /// The mean loss of its samples.
    pub loss: f64,
    /// The learning rate.
    pub lr: f64,
    /// The norm of all gradients together.
    pub grad_norm: f64,
    /// Seconds that it took.
    pub step_time: f64,
    /// Samples a second.
    pub samples_per_second: f64,
    /// Memory of tensors behind it, in 2^30 bytes.
    pub memory_gb: f64,
}

/// What is saved or loaded.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowtapeContent {
    /// Everything: a run that is loaded goes on as if it had never stopped.
    Checkpoint = 0,
    /// The weights that are sampled with, as the safetensors file that diffusers opens.
    Weights = 1,
}

impl FlowtapeContent {
    /// What a caller's number stands for.
    fn of(number: u32) -> Result<Self, Failure> {
        [Self::Checkpoint, Self::Weights].into_iter().find(|content| *content as u32 == number).ok_or_else(|| {
            Failure::Error(format!("content: expected 0 (a checkpoint) or 1 (the weights), got {number}"))
        })
    }
}

impl FlowtapeTrainer {
    fn lock(&self) -> MutexGuard<'_, flowtape_trainer::Trainer> {
        // A step that panicked left weights that are those of before it or after it.
        self.trainer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An end where it was asked for; the next call goes on.
    fn look_at_cancel(&self) -> Result<(), Failure> {
        if self.cancelled.swap(false, Ordering::Relaxed) { Err(Failure::Cancelled) } else { Ok(()) }
    }

    fn bytes(&self, content: u32) -> Result<Vec<u8>, Failure> {
        Ok(match FlowtapeContent::of(content)? {
            FlowtapeContent::Checkpoint => self.lock().to_bytes()?,
            FlowtapeContent::Weights => self.lock().weights_to_bytes()?,
        })
    }

    fn load(&self, content: u32, bytes: Vec<u8>) -> Result<(), Failure> {
        match FlowtapeContent::of(content)? {
            FlowtapeContent::Checkpoint => self.lock().load_from_bytes(bytes)?,
            FlowtapeContent::Weights => self.lock().load_weights_from_bytes(bytes)?,
        }
        Ok(())
    }
}

impl FlowtapeMetrics {
    fn of(record: &StepRecord) -> Self {
        let StepRecord { step, epoch, loss, lr, grad_norm, step_time, samples_per_second, .. } = *record;
        Self { step, epoch, loss, lr, grad_norm, step_time, samples_per_second, memory_gb: record.memory.allocated }
    }
}

/// Hands a trainer to a caller whose header is of this version.
///
/// # Safety
/// As for [`put`].
unsafe fn hand_over(
    abi_version: u32,
    out: *mut *mut FlowtapeTrainer,
    make: impl FnOnce() -> Result<flowtape_trainer::Trainer, Failure>,
) -> FlowtapeStatus {
    call(|| {
        if abi_version != FLOWTAPE_ABI_VERSION {
            return Err(Failure::Error(format!(
                "the header is of ABI version {abi_version}, the library of version {FLOWTAPE_ABI_VERSION}: take both of one release"
            )));
        }
        // SAFETY: the caller's. It is null where nothing comes of it.
        unsafe { put(out, "out", std::ptr::null_mut())? };
        let trainer = FlowtapeTrainer { trainer: Mutex::new(make()?), cancelled: AtomicBool::new(false) };
        // SAFETY: the caller's.
        unsafe { put(out, "out", Box::into_raw(Box::new(trainer))) }
    })
}

/// A trainer of a recipe (the text of its YAML, or JSON) on the data that it names. `abi_version` is `FLOWTAPE_ABI_VERSION`. What `out`
/// points to becomes the trainer, to be freed by `flowtape_trainer_free`, or null.
///
/// # Safety
/// `recipe` is null or a text; `out` is null or points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_new(
    abi_version: u32,
    recipe: *const c_char,
    out: *mut *mut FlowtapeTrainer,
) -> FlowtapeStatus {
    let make = || {
        // SAFETY: the caller's.
        let text = unsafe { text(recipe, "recipe")? };
        Ok(flowtape_trainer::Trainer::new(&Recipe::from_yaml(Path::new("recipe"), text.as_bytes(), &[])?)?)
    };
    // SAFETY: the caller's.
    unsafe { hand_over(abi_version, out, make) }
}

/// The same on batches that the caller has: each step is given one. The recipe needs no `data`.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_without_data(
    abi_version: u32,
    recipe: *const c_char,
    out: *mut *mut FlowtapeTrainer,
) -> FlowtapeStatus {
    let make = || {
        // SAFETY: the caller's.
        let recipe = Recipe::for_own_data(unsafe { text(recipe, "recipe")? })?;
        Ok(flowtape_trainer::Trainer::without_data(&Device::cpu(), &recipe)?)
    };
    // SAFETY: the caller's.
    unsafe { hand_over(abi_version, out, make) }
}

/// The same of a model's configuration alone (the text of diffusers' `config.json`): AdamW with a constant learning rate.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_of_model(
    abi_version: u32,
    config: *const c_char,
    lr: f64,
    out: *mut *mut FlowtapeTrainer,
) -> FlowtapeStatus {
    let make = || {
        // SAFETY: the caller's.
        let config = serde_json::from_str(unsafe { text(config, "config")? });
        let config = config.map_err(|error| Failure::Error(format!("config: expected JSON: {error}")))?;
        Ok(flowtape_trainer::Trainer::without_data(&Device::cpu(), &Recipe::of_model(config, lr)?)?)
    };
    // SAFETY: the caller's.
    unsafe { hand_over(abi_version, out, make) }
}

/// Frees a trainer; null is none.
///
/// # Safety
/// It was not freed, and no other thread uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_free(trainer: *mut FlowtapeTrainer) {
    if !trainer.is_null() {
        call(|| {
            // SAFETY: made by `hand_over`, as the caller promises.
            drop(unsafe { Box::from_raw(trainer) });
            Ok(())
        });
    }
}

/// Takes `steps` steps on the recipe's data. `metrics` (may be null) become the last one's. Cancelled, it ends after the step that is
/// under way.
///
/// # Safety
/// `trainer` is null or a trainer; `metrics` is null or points to metrics.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_step(
    trainer: *const FlowtapeTrainer,
    steps: u64,
    metrics: *mut FlowtapeMetrics,
) -> FlowtapeStatus {
    call(|| {
        // SAFETY: the caller's.
        let trainer = unsafe { reference(trainer, "trainer")? };
        for _ in 0..steps {
            trainer.look_at_cancel()?;
            let record = trainer.lock().step()?;
            if !metrics.is_null() {
                // SAFETY: the caller's.
                unsafe { put(metrics, "metrics", FlowtapeMetrics::of(&record))? };
            }
        }
        Ok(())
    })
}

/// Takes a step on a batch: `count` tensors, of which one is `latents` and the others are what the model's adapter reads.
///
/// # Safety
/// `trainer` is null or a trainer, `metrics` is null or points to metrics, and the tensors are what they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_step_on(
    trainer: *const FlowtapeTrainer,
    tensors: *const FlowtapeTensor,
    count: usize,
    metrics: *mut FlowtapeMetrics,
) -> FlowtapeStatus {
    call(|| {
        // SAFETY: the caller's.
        let (trainer, batch) = unsafe { (reference(trainer, "trainer")?, batch(tensors, count, "batch")?) };
        trainer.look_at_cancel()?;
        let record = trainer.lock().step_on(&[batch])?;
        if !metrics.is_null() {
            // SAFETY: the caller's.
            unsafe { put(metrics, "metrics", FlowtapeMetrics::of(&record))? };
        }
        Ok(())
    })
}

/// How samples are made from now on: in how many steps, and how far away from what is not asked for (1: no guidance).
///
/// # Safety
/// `trainer` is null or a trainer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_set_sampling(
    trainer: *const FlowtapeTrainer,
    num_inference_steps: usize,
    guidance_scale: f64,
) -> FlowtapeStatus {
    call(|| {
        // SAFETY: the caller's.
        let mut trainer = unsafe { reference(trainer, "trainer")? }.lock();
        let sampling = SamplingConfig {
            num_inference_steps: Some(num_inference_steps),
            guidance_scale: Some(guidance_scale),
            ..trainer.recipe().sampling.clone()
        };
        Ok(trainer.set_sampling(sampling)?)
    })
}

/// Puts numbers where the caller has room for just as many.
///
/// # Safety
/// The pointer is null or points to memory of `len` numbers.
unsafe fn put_all(values: &[f32], out: *mut f32, len: usize) -> Result<(), Failure> {
    if values.len() != len {
        let needed = values.len();
        return Err(Failure::Error(format!("out: expected room for {needed} numbers, got {len}")));
    }
    if out.is_null() {
        return Err(Failure::Error("out: expected a pointer, got null".into()));
    }
    // SAFETY: the caller's; they lie apart, since these are ours.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), out.cast::<u8>(), size_of_val(values)) };
    Ok(())
}

/// One sample for each of `count` prompts, of a trainer on its recipe's data: pixels from about -1 to 1, `[count, C, H, W]` or
/// `[count, C, F, H, W]`, `len` numbers in all. The same seed gives the same samples. Cancelled, it ends between batches.
///
/// # Safety
/// `trainer` is null or a trainer, `prompts` is null or points to `count` texts, `out` is null or points to `len` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_generate(
    trainer: *const FlowtapeTrainer,
    prompts: *const *const c_char,
    count: usize,
    seed: u64,
    out: *mut f32,
    len: usize,
) -> FlowtapeStatus {
    call(|| {
        // SAFETY: the caller's.
        let (trainer, prompts) = unsafe { (reference(trainer, "trainer")?, array(prompts, count, "prompts")?) };
        // SAFETY: the caller's.
        let prompts =
            prompts.iter().map(|prompt| unsafe { text(*prompt, "a prompt") }).collect::<Result<Vec<_>, _>>()?;
        trainer.look_at_cancel()?;
        let inner = trainer.lock();
        flowtape_trainer::generate::check_count(count, &inner.sample_dims()?)?;
        let request = Request { prompts: &prompts, first_frames: None, seed };
        let samples = inner.generate(&request, &trainer.cancelled)?;
        let Some(samples) = samples else { return trainer.look_at_cancel() };
        // SAFETY: the caller's.
        unsafe { put_all(&samples.pixels, out, len) }
    })
}

/// Latents of conditions that the caller has, in the sizes of their tensor `latents`, `len` numbers in all. With guidance (see
/// `flowtape_trainer_set_sampling`) it is away from `negative`, if that is given: another set of conditions, or null and 0.
///
/// # Safety
/// `trainer` is null or a trainer, the tensors are what they say, `out` is null or points to `len` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_sample(
    trainer: *const FlowtapeTrainer,
    conditions: *const FlowtapeTensor,
    count: usize,
    negative: *const FlowtapeTensor,
    negative_count: usize,
    seed: u64,
    out: *mut f32,
    len: usize,
) -> FlowtapeStatus {
    call(|| {
        // SAFETY: the caller's.
        let (trainer, conditions) =
            unsafe { (reference(trainer, "trainer")?, batch(conditions, count, "conditions")?) };
        let negative = match negative_count {
            0 => None,
            // SAFETY: the caller's.
            count => Some(unsafe { batch(negative, count, "negative")? }),
        };
        trainer.look_at_cancel()?;
        let latents = trainer.lock().sample(&conditions, negative.as_ref(), seed)?;
        // SAFETY: the caller's.
        unsafe { put_all(&latents.to_dtype(DType::F32)?.to_vec()?, out, len) }
    })
}

/// Writes a checkpoint or the weights (`content` is a `FlowtapeContent`) to a file, which is whole or not there.
///
/// # Safety
/// `trainer` is null or a trainer, `path` is null or a text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_save(
    trainer: *const FlowtapeTrainer,
    content: u32,
    path: *const c_char,
) -> FlowtapeStatus {
    call(|| {
        // SAFETY: the caller's.
        let (trainer, path) = unsafe { (reference(trainer, "trainer")?, Path::new(text(path, "path")?)) };
        let bytes = trainer.bytes(content)?;
        let io = |source| flowtape_engine::Error::Io { path: path.into(), source };
        Ok(write_whole(path, |partial| std::fs::write(partial, bytes).map_err(io))?)
    })
}

/// Reads what `flowtape_trainer_save` wrote; weights may come from diffusers, too.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_load(
    trainer: *const FlowtapeTrainer,
    content: u32,
    path: *const c_char,
) -> FlowtapeStatus {
    call(|| {
        // SAFETY: the caller's.
        let (trainer, path) = unsafe { (reference(trainer, "trainer")?, text(path, "path")?) };
        let bytes = std::fs::read(path).map_err(|error| Failure::Error(format!("{path}: {error}")))?;
        trainer.load(content, bytes)
    })
}

/// The same to memory. `out` is to be freed by `flowtape_bytes_free`.
///
/// # Safety
/// `trainer` is null or a trainer, `out` is null or points to bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_save_to_memory(
    trainer: *const FlowtapeTrainer,
    content: u32,
    out: *mut FlowtapeBytes,
) -> FlowtapeStatus {
    call(|| {
        // SAFETY: the caller's.
        unsafe { put(out, "out", FlowtapeBytes { data: std::ptr::null_mut(), len: 0 })? };
        // SAFETY: the caller's.
        let bytes = unsafe { reference(trainer, "trainer")? }.bytes(content)?;
        // SAFETY: the caller's.
        unsafe { put(out, "out", bytes.into()) }
    })
}

/// The same from memory.
///
/// # Safety
/// `trainer` is null or a trainer, `data` is null or points to `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_load_from_memory(
    trainer: *const FlowtapeTrainer,
    content: u32,
    data: *const u8,
    len: usize,
) -> FlowtapeStatus {
    call(|| {
        // SAFETY: the caller's.
        let (trainer, bytes) = unsafe { (reference(trainer, "trainer")?, array(data, len, "data")?) };
        trainer.load(content, bytes.to_vec())
    })
}

/// Asks the call that works on a trainer, or the next one, to end early with `FLOWTAPE_STATUS_CANCELLED`. From any thread; it returns
/// at once.
///
/// # Safety
/// `trainer` is null or a trainer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_trainer_cancel(trainer: *const FlowtapeTrainer) -> FlowtapeStatus {
    call(|| {
        // SAFETY: the caller's.
        unsafe { reference(trainer, "trainer")? }.cancelled.store(true, Ordering::Relaxed);
        Ok(())
    })
}
