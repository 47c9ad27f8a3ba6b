//! Steps that are not finite: what is said of them, kept, and run again.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use flowtape_data::{Fingerprint, Media, Result as DataResult, Sample, SampleHeader, Source};
use flowtape_engine::{DType, Device, Philox, Tensor};
use flowtape_trainer::data::Data;
use flowtape_trainer::hooks::Checkpoint;
use flowtape_trainer::replay::replay;
use flowtape_trainer::run::RunFolder;
use flowtape_trainer::train::Session;
use flowtape_trainer::{Error, Recipe, Trainer, builtin};

use crate::common::small;

static NEVER: AtomicBool = AtomicBool::new(false);

/// Samples of which one has a pixel that is NaN.
struct WithNan {
    source: Arc<dyn Source>,
    at: usize,
}

impl Source for WithNan {
    fn len(&self) -> usize {
        self.source.len().min(20)
    }

    fn header(&self, index: usize) -> DataResult<SampleHeader> {
        self.source.header(index)
    }

    fn read(&self, index: usize, random: &mut Philox) -> DataResult<Sample> {
        let mut sample = self.source.read(index, random)?;
        if index == self.at {
            let tensor = sample.media.tensor();
            let mut values = tensor.to_vec::<f32>()?;
            values[5] = f32::NAN;
            sample.media = Media::Pixels(Tensor::from_vec(values, tensor.dims(), &Device::cpu())?);
        }
        Ok(sample)
    }

    fn name(&self, index: usize) -> String {
        format!("pictures/{index}.png")
    }

    fn fingerprint(&self) -> Fingerprint {
        self.source.fingerprint()
    }
}

fn trainer(recipe: &Recipe, nan_at: usize) -> Trainer {
    let data = builtin::data(&recipe.data, &Device::cpu()).unwrap();
    let source = Arc::new(WithNan { source: data.source.clone(), at: nan_at });
    Trainer::with_data(&Device::cpu(), recipe, Data { source, ..data }).unwrap()
}

fn run(recipe: &Recipe, trainer: Trainer) -> flowtape_trainer::Result<flowtape_trainer::train::Summary> {
    let folder = RunFolder::create(recipe).unwrap();
    Session::new(trainer, folder, &NEVER).with(Box::new(Checkpoint::new(1))).run()
}

/// The bundle that an error tells of.
fn bundle_of(error: &Error, run: &Path) -> std::path::PathBuf {
    let Error::Diverged { step, .. } = error else { panic!("{error}") };
    let bundle = run.join(format!("replay/step_{step:06}"));
    let text = error.to_string();
    assert!(text.contains(&format!("flowtape replay {}", bundle.display())), "{text}");
    assert!(!run.join(format!("replay/step_{step:06}.partial")).exists());
    bundle
}

#[test]
fn a_sample_of_nan_is_named_with_its_timestep_and_found_again() {
    let folder = tempfile::tempdir().unwrap();
    // In the source's order, and two micro-batches a step: sample 13 is in the second half of the second step.
    for (at, step) in [(13, 2), (2, 1)] {
        let path = folder.path().join(format!("run{at}"));
        let recipe = small(&path, &["data.shuffle=false", "step_scheduler.global_batch_size=8", "ema.decay=0.9"]);
        let error = run(&recipe, trainer(&recipe, at)).unwrap_err();
        let text = error.to_string();
        let named = format!("step {step}: sample {at} (pictures/{at}.png) at timestep ");
        assert!(text.contains(&named) && text.contains("whose media is not finite"), "{text}");
        let bundle = bundle_of(&error, &path);
        let found = replay(&bundle, None).unwrap();
        assert_eq!(found.finding, found.before);
        let finding = found.finding;
        assert_eq!((finding.step, finding.samples.len(), finding.samples[0].index), (step, 1, at));
        assert!((0.0..=1000.0).contains(&finding.samples[0].timestep) && finding.samples[0].loss.is_none());
        assert!(finding.weight.is_none() && finding.gradient.is_some() && finding.op.is_some(), "{finding}");
        // The weights of before are good, and what was saved stays.
        assert_eq!(RunFolder::open(&path).unwrap().0.checkpoints().any().unwrap(), step > 1);
    }
}

#[test]
fn a_weight_of_nan_is_named_and_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let recipe = small(&path, &[]);
    let trainer = trainer(&recipe, usize::MAX);
    let name = "transformer_blocks.0.attn.to_q.weight";
    let weight = trainer.model().params().get(name).unwrap().clone();
    let mut values = weight.kept().unwrap().to_vec::<f32>().unwrap();
    values[7] = f32::NAN;
    weight.copy_from(&Tensor::from_vec(values, weight.dims(), &Device::cpu()).unwrap()).unwrap();
    let error = run(&recipe, trainer).unwrap_err();
    assert!(error.to_string().contains(&format!("the weight {name} is not finite")), "{error}");
    let found = replay(&bundle_of(&error, &path), Some("cpu")).unwrap();
    assert_eq!(found.finding, found.before);
    assert_eq!(found.finding.weight.as_deref(), Some(name));
    assert!(found.finding.op.as_ref().is_some_and(|op| op.contains("matmul")), "{}", found.finding);
    // Something else is no bundle.
    assert!(replay(&path, None).unwrap_err().to_string().contains("finding.json"));
}

#[test]
fn steps_that_are_not_finite_are_left_out_where_that_is_asked_for() {
    for more in [&[][..], &["clip_grad_norm=null"], &["step_scheduler.global_batch_size=8", "dtype=mixed"]] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let more = [&["data.shuffle=false", "non_finite=skip"], more].concat();
        let recipe = small(&path, &more);
        let mut trainer = trainer(&recipe, 2);
        let before: Vec<Vec<u8>> = bytes(&trainer);
        let record = trainer.step().unwrap();
        assert!(!record.grad_norm.is_finite() && record.skipped_steps == Some(1), "{record:?}");
        assert!(bytes(&trainer) == before, "the step changed something");
        let record = trainer.step().unwrap();
        assert!(record.grad_norm.is_finite() && record.skipped_steps == Some(1), "{record:?}");
        assert!(bytes(&trainer) != before);
        let finite =
            |p: &flowtape_engine::nn::Param| p.kept().unwrap().to_dtype(DType::F32).unwrap().is_finite().unwrap();
        assert!(trainer.model().params().iter().all(finite));
        // The count goes on with a checkpoint.
        let saved = folder.path().join("saved");
        std::fs::create_dir(&saved).unwrap();
        trainer.save(&saved).unwrap();
        let mut again = self::trainer(&recipe, 2);
        again.load(&saved).unwrap();
        assert_eq!(again.state().progress.skipped_steps, 1);
    }
}

fn bytes(trainer: &Trainer) -> Vec<Vec<u8>> {
    trainer.model().params().iter().map(|p| p.kept().unwrap().to_bytes().unwrap()).collect()
}

#[test]
fn a_bundle_that_cannot_be_written_leaves_the_error_and_nothing_half() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let recipe = small(&path, &["data.shuffle=false"]);
    let trainer = trainer(&recipe, 2);
    let run = RunFolder::create(&recipe).unwrap();
    std::fs::write(path.join("replay"), "a file").unwrap();
    let error = Session::new(trainer, run, &NEVER).run().unwrap_err();
    assert!(matches!(error, Error::Diverged { step: 1, found: None, .. }), "{error}");
    assert_eq!(std::fs::read_to_string(path.join("replay")).unwrap(), "a file");
}
