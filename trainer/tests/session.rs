//! What listens to a run, what stops it, and what it goes on with.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flowtape_data::{
    Error as DataError, Fingerprint, Media, MemorySource, Result as DataResult, Sample, SampleHeader, Source, Text,
};
use flowtape_engine::{Device, Philox, Tensor};
use flowtape_trainer::builtin::WordTable;
use flowtape_trainer::data::Data;
use flowtape_trainer::hooks::{Cause, Checkpoint, Event, Hook, on_step};
use flowtape_trainer::run::RunFolder;
use flowtape_trainer::train::{Resume, Session, resume, train};
use flowtape_trainer::{Error, Recipe, Result, Trainer};

use crate::common::small;

static NEVER: AtomicBool = AtomicBool::new(false);

/// Writes down what it hears.
fn listening(heard: &mut Vec<String>) -> Vec<Box<dyn Hook + '_>> {
    vec![Box::new(|event: &Event<'_>, run: &mut Session<'_>| -> Result<()> {
        let step = run.trainer().state().progress.step;
        heard.push(match event {
            Event::Begin(begin) => format!("begin {} of {} after {}", begin.from, begin.steps, begin.history.len()),
            Event::Step(record) => format!("step {}", record.step),
            Event::Preview(path) => format!("{} at {step}", path.file_name().unwrap().to_string_lossy()),
            Event::Saved(step) => format!("saved {step}"),
            Event::Stopped(cause) => format!("{cause:?}"),
            _ => return Ok(()),
        });
        Ok(())
    })]
}

fn bytes(run: &Path, file: &str) -> Vec<u8> {
    std::fs::read(run.join("checkpoints/LATEST").join(file)).unwrap()
}

fn assert_same_run(a: &Path, b: &Path) {
    for file in ["diffusion_pytorch_model.safetensors", "optimizer.safetensors"] {
        assert!(bytes(a, file) == bytes(b, file), "{file}");
    }
}

#[test]
fn events_come_in_order_and_tell_of_what_hooks_did() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let recipe = small(&run, &["sampling.every_steps=3"]);
    let mut heard = Vec::new();
    train(&recipe, listening(&mut heard), &NEVER).unwrap();
    let wanted = [
        "begin 0 of 5 after 0",
        "step 1",
        "step 2",
        "saved 2",
        "step 3",
        "step_000003.png at 3",
        "step 4",
        "saved 4",
        "step 5",
        "Finished",
        "saved 5",
        "step_000005.png at 5",
    ];
    assert_eq!(heard, wanted);
}

#[test]
fn a_stopped_run_goes_on_to_the_same_bits_whenever_it_was_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    // Micro-batches, and epochs of the source's order: the cursor counts what the step does not.
    let more = ["sampling.every_steps=3", "step_scheduler.global_batch_size=8", "data.shuffle=false"];
    train(&small(&whole, &more), Vec::new(), &NEVER).unwrap();
    for stop_at in [1, 3] {
        let run = folder.path().join(format!("run{stop_at}"));
        let stop = AtomicBool::new(false);
        let stopping = on_step(|record| stop.store(record.step == stop_at, Ordering::Relaxed));
        let summary = train(&small(&run, &more), vec![stopping], &stop).unwrap();
        assert_eq!((summary.steps, summary.interrupted), (stop_at, true));
        // No grid is sampled any more, also if it was due.
        assert!(!run.join("samples/step_000003.png").exists() && !run.join("report.json").exists());
        let mut heard = Vec::new();
        let summary = resume(&run, &Resume::default(), listening(&mut heard), &NEVER).unwrap();
        assert_eq!((summary.steps, summary.interrupted), (5, false));
        assert_eq!(heard[0], format!("begin {stop_at} of 5 after {stop_at}"));
        assert_same_run(&whole, &run);
    }
}

#[test]
fn a_run_that_is_stopped_while_it_samples_is_saved_and_samples_again_later() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let stop = AtomicBool::new(false);
    let stopping = |event: &Event<'_>, _: &mut Session<'_>| -> Result<()> {
        if matches!(event, Event::Busy("sampling for the report")) {
            stop.store(true, Ordering::Relaxed);
        }
        Ok(())
    };
    let recipe = small(&run, &["report.samples_per_class=1"]);
    let summary = train(&recipe, vec![Box::new(stopping)], &stop).unwrap();
    assert!(summary.interrupted && summary.steps == 5 && summary.figures.is_empty(), "{summary:?}");
    assert!(run.join("checkpoints/LATEST/state.json").exists() && !run.join("report.json").exists());
    let mut heard = Vec::new();
    let summary = resume(&run, &Resume::default(), listening(&mut heard), &NEVER).unwrap();
    assert!(summary.figures["accuracy"].is_number(), "{summary:?}");
    assert_eq!(heard[1..], [format!("{:?}", Cause::Finished), "step_000005.png at 5".into()]);
}

#[test]
fn by_products_that_are_lost_or_damaged_stop_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    train(&small(&whole, &[]), Vec::new(), &NEVER).unwrap();
    type Damage = fn(&Path);
    let damages: [(Damage, usize); 3] = [
        (|run| std::fs::remove_file(run.join("metrics.jsonl")).unwrap(), 2),
        (
            |run| {
                let path = run.join("metrics.jsonl");
                let text = std::fs::read_to_string(&path).unwrap();
                // One line is broken, and the last is cut.
                std::fs::write(&path, text.replacen("\"step\":2", "\"step\":two", 1) + "{\"step\"").unwrap();
            },
            4,
        ),
        (
            |run| {
                std::fs::remove_dir_all(run.join("samples")).unwrap();
                std::fs::create_dir(run.join("loss.svg")).unwrap();
            },
            5,
        ),
    ];
    for (i, (damage, lines)) in damages.into_iter().enumerate() {
        let run = folder.path().join(format!("run{i}"));
        let stop = AtomicBool::new(false);
        let stopping = on_step(|record| stop.store(record.step == 3, Ordering::Relaxed));
        train(&small(&run, &[]), vec![stopping], &stop).unwrap();
        let _ = std::fs::remove_file(run.join("loss.svg"));
        damage(&run);
        resume(&run, &Resume::default(), Vec::new(), &NEVER).unwrap();
        assert_same_run(&whole, &run);
        let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        assert_eq!(metrics.lines().count(), lines, "{metrics}");
        assert!(run.join("samples/step_000005.png").exists());
    }
}

#[test]
fn readers_do_not_change_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let runs: Vec<_> =
        ["0", "1", "7"].iter().map(|n| (folder.path().join(n), format!("data.num_workers={n}"))).collect();
    for (run, workers) in &runs {
        train(&small(run, &["data.caption_dropout_prob=0.5", workers]), Vec::new(), &NEVER).unwrap();
    }
    assert_same_run(&runs[0].0, &runs[1].0);
    assert_same_run(&runs[0].0, &runs[2].0);
}

/// A trainer of a program's own samples.
fn own(recipe: &Recipe, source: impl Source + 'static) -> Trainer {
    let text = WordTable::new(&["a one", "a two"], recipe.data.text_dim);
    Trainer::with_data(&Device::cpu(), recipe, Data::of_pixels(Arc::new(source), text)).unwrap()
}

#[test]
fn a_program_trains_on_samples_of_its_own() {
    let recipe = small(Path::new("unused"), &["data.drop_last=true"]);
    let sample = |i: u32| {
        let pixels = Tensor::full(&[1, 4, 4], f64::from(i) / 9.0, flowtape_engine::DType::F32, &Device::cpu()).unwrap();
        Sample::new(Media::Pixels(pixels), Text::Caption(if i.is_multiple_of(2) { "a two" } else { "a one" }.into()))
    };
    let mut trainer = own(&recipe, MemorySource::new((0..9).map(sample).collect()).unwrap());
    let steps: Vec<u64> = (0..5).map(|_| trainer.step().unwrap().step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5]);
    // Nine samples are two batches of four, and one is left out.
    let cursor = trainer.state().progress.cursor;
    assert_eq!((cursor.epoch, cursor.batch), (2, 1));
    let mut few = own(&recipe, MemorySource::new((0..3).map(sample).collect()).unwrap());
    assert!(few.step().unwrap_err().to_string().contains("drop_last"));
}

#[test]
fn a_program_keeps_a_run_of_its_own_samples_with_hooks_of_its_choice() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = small(&folder.path().join("run"), &[]);
    let run = |trainer: Trainer, run: RunFolder| {
        let session = Session::new(trainer, run, &NEVER).with(Box::new(Checkpoint::new(2)));
        session.run().unwrap()
    };
    let pixels = Tensor::zeros(&[1, 4, 4], flowtape_engine::DType::F32, &Device::cpu()).unwrap();
    let source = MemorySource::new(vec![Sample::new(Media::Pixels(pixels), Text::Caption("a one".into()))]).unwrap();
    let summary = run(own(&recipe, source.clone()), RunFolder::create(&recipe).unwrap());
    assert_eq!((summary.steps, summary.interrupted), (5, false));
    // It goes on where it is loaded.
    let (again, mut longer) = RunFolder::open(&summary.run_dir).unwrap();
    longer.step_scheduler.max_steps = 7;
    let mut trainer = own(&longer, source);
    trainer.load(&again.checkpoints().newest_whole().unwrap()).unwrap();
    assert_eq!((trainer.state().progress.step, run(trainer, again).steps), (5, 7));
}

/// Samples of which one is broken.
struct Broken;

impl Source for Broken {
    fn len(&self) -> usize {
        4
    }

    fn header(&self, _: usize) -> DataResult<SampleHeader> {
        Ok(SampleHeader { dims: vec![1, 4, 4] })
    }

    fn read(&self, index: usize, _: &mut Philox) -> DataResult<Sample> {
        if index == 2 {
            return Err(DataError::batch("header", "a picture", "a page"));
        }
        let pixels = Tensor::zeros(&[1, 4, 4], flowtape_engine::DType::F32, &Device::cpu())?;
        Ok(Sample::new(Media::Pixels(pixels), Text::Caption("a one".into())))
    }

    fn name(&self, index: usize) -> String {
        format!("folder/{index}.png")
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(b"broken")
    }
}

#[test]
fn an_unreadable_sample_is_named() {
    let error = own(&small(Path::new("unused"), &[]), Broken).step().unwrap_err();
    assert!(matches!(error, Error::Data(_)) && error.to_string().contains("folder/2.png"), "{error}");
}
