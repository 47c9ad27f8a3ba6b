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
use flowtape_trainer::generate::Samples;
use flowtape_trainer::hooks::{Cause, Checkpoint, Event, Hook, on_step};
use flowtape_trainer::picture::save_samples;
use flowtape_trainer::run::RunFolder;
use flowtape_trainer::state::TrainProgress;
use flowtape_trainer::train::{Resume, Session, resume, train};
use flowtape_trainer::validation::Validated;
use flowtape_trainer::{Error, Recipe, Result, Trained, Trainer};
use serde_json::Value;

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
    // A checkpoint is told of when it is on the disk, which another thread sees to.
    let saved: Vec<&str> = heard.iter().filter_map(|what| what.strip_prefix("saved ")).collect();
    assert_eq!(saved, ["2", "4", "5"]);
    for step in saved {
        let at = |what: String| heard.iter().position(|heard| *heard == what).unwrap();
        assert!(at(format!("step {step}")) < at(format!("saved {step}")), "{heard:?}");
    }
    let wanted = [
        "begin 0 of 5 after 0",
        "step 1",
        "step 2",
        "step 3",
        "step_000003.png at 3",
        "step 4",
        "step 5",
        "Finished",
        "step_000005.png at 5",
    ];
    assert_eq!(heard.iter().filter(|what| !what.starts_with("saved")).collect::<Vec<_>>(), wanted);
    assert_eq!(heard[heard.len() - 2..], ["saved 5", "step_000005.png at 5"]);
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

fn lines(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn metrics_fit_together_and_a_resumed_run_writes_those_of_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    // Two batches in a step; with one class there are several epochs.
    let more = [
        "step_scheduler.max_steps=30",
        "step_scheduler.ckpt_every_steps=7",
        "step_scheduler.global_batch_size=8",
        "data.classes=[7]",
    ];
    let (whole_recipe, parts_recipe) = (small(&whole, &more), small(&parts, &more));
    train(&whole_recipe, Vec::new(), &NEVER).unwrap();
    let failing = |event: &Event<'_>, run: &mut Session<'_>| match event {
        Event::Step(record) if record.step == 12 => {
            Err(Error::Run { path: run.folder().path().into(), what: "as if it had been killed".into() })
        }
        _ => Ok(()),
    };
    train(&parts_recipe, vec![Box::new(failing)], &NEVER).unwrap_err();
    assert_eq!(lines(&parts).len(), 12);
    resume(&parts, &Resume::default(), Vec::new(), &NEVER).unwrap();
    let (whole, parts) = (lines(&whole), lines(&parts));
    let keys = [
        "step",
        "epoch",
        "train_loss",
        "train_avg_loss",
        "grad_norm",
        "grad_norm_by_group",
        "sigma_counts",
        "sigma_losses",
    ];
    for (a, b) in whole.iter().zip(&parts) {
        keys.iter().for_each(|key| assert_eq!(a[key], b[key], "{key} of {a}"));
    }
    assert_eq!((whole.len(), parts.len()), (30, 30));
    let number = |line: &Value, key: &str| line[key].as_f64().unwrap();
    let (mut epoch, mut losses) = (0, Vec::new());
    for line in &whole {
        // Steps are as large as an epoch's end leaves batches for.
        let counts: Vec<f64> = line["sigma_counts"].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect();
        let samples: f64 = counts.iter().sum();
        assert!([4.0, 8.0].contains(&samples), "{line}");
        let of_bins = line["sigma_losses"].as_array().unwrap().iter().zip(&counts);
        let mean = of_bins.map(|(loss, count)| loss.as_f64().unwrap_or(0.0) * count).sum::<f64>() / samples;
        assert!((mean / number(line, "train_loss") - 1.0).abs() < 1e-5, "{line}");
        if line["epoch"].as_u64().unwrap() != epoch {
            (epoch, losses) = (line["epoch"].as_u64().unwrap(), Vec::new());
        }
        losses.push(number(line, "train_loss"));
        let average = losses.iter().sum::<f64>() / losses.len() as f64;
        assert!((average / number(line, "train_avg_loss") - 1.0).abs() < 1e-12, "{line}");
        let groups = line.get("grad_norm_by_group").and_then(Value::as_object);
        assert_eq!(groups.is_some(), number(line, "step") % 10.0 == 0.0);
        if let Some(groups) = groups {
            let squares: f64 = groups.values().map(|norm| norm.as_f64().unwrap().powi(2)).sum();
            assert!(
                (squares.sqrt() / number(line, "grad_norm") - 1.0).abs() < 1e-9
                    && groups.contains_key("transformer_blocks")
            );
        }
        let rate = samples / number(line, "step_time");
        assert!((rate / number(line, "samples_per_sec") - 1.0).abs() < 1e-9, "{line}");
        assert!(number(line, "max_memory_allocated_gb") >= number(line, "memory_allocated_gb"));
    }
    assert!(epoch > 0);
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
    assert!(summary.interrupted && summary.steps == 5, "{summary:?}");
    assert!(!summary.figures.contains_key("accuracy"), "{summary:?}");
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

/// So many samples of 4 x 4 pixels.
fn pixels(n: u32) -> MemorySource {
    let sample = |i: u32| {
        let pixels = Philox::new(u64::from(i)).normal(&[1, 4, 4], &Device::cpu()).unwrap();
        Sample::new(Media::Pixels(pixels), Text::Caption(if i.is_multiple_of(2) { "a two" } else { "a one" }.into()))
    };
    MemorySource::new((0..n).map(sample).collect()).unwrap()
}

fn kept(trainer: &Trainer) -> Vec<Vec<u8>> {
    trainer.model().params().iter().map(|p| p.kept().unwrap().to_bytes().unwrap()).collect()
}

#[test]
fn an_epochs_last_group_is_a_step_of_its_own_size() {
    let recipe = |global: &str| {
        small(Path::new("unused"), &["data.drop_last=true", &format!("step_scheduler.global_batch_size={global}")])
    };
    // Three batches of four in an epoch.
    let mut trainer = own(&recipe("8"), pixels(13));
    let cursors: Vec<(u64, u64)> = (0..4)
        .map(|_| {
            trainer.step().unwrap();
            let cursor = trainer.state().progress.cursor;
            (cursor.epoch, cursor.batch)
        })
        .collect();
    assert_eq!(cursors, [(0, 2), (0, 3), (1, 2), (1, 3)]);
    // An epoch of one batch: a group of one, divided by one.
    let run = |global: &str| {
        let mut trainer = own(&recipe(global), pixels(5));
        let losses: Vec<f64> = (0..3).map(|_| trainer.step().unwrap().loss).collect();
        (losses, kept(&trainer))
    };
    assert!(run("4") == run("12"));
}

#[test]
fn every_optimiser_goes_on_to_the_same_bits_with_all_that_a_run_may_keep() {
    let folder = tempfile::tempdir().unwrap();
    for rule in flowtape_engine::optim::RULES {
        let optimizer = format!("optimizer={{name: {}, lr: 0.001}}", rule.name);
        let more = [
            optimizer.as_str(),
            "step_scheduler.global_batch_size=8",
            "data.caption_dropout_prob=0.3",
            "ema.sigma_rel=0.2",
            "lr_scheduler={lr_decay_style: WSD, wsd_decay_steps: 3, lr_warmup_steps: 1, wd_incr_style: cosine, end_wd: 0.2}",
            "validation={num_samples: 6, every_steps: 2}",
        ];
        let [whole, parts] = ["whole", "parts"].map(|part| folder.path().join(format!("{part}_{}", rule.name)));
        train(&small(&whole, &more), Vec::new(), &NEVER).unwrap();
        let stop = AtomicBool::new(false);
        let stopping = on_step(|record| stop.store(record.step == 3, Ordering::Relaxed));
        train(&small(&parts, &more), vec![stopping], &stop).unwrap();
        resume(&parts, &Resume::default(), Vec::new(), &NEVER).unwrap();
        assert_same_run(&whole, &parts);
        assert!(
            bytes(&whole, "ema/diffusion_pytorch_model.safetensors")
                == bytes(&parts, "ema/diffusion_pytorch_model.safetensors")
        );
        let validations = |run: &Path| std::fs::read_to_string(run.join("validation.jsonl")).unwrap();
        assert_eq!(validations(&whole), validations(&parts), "{}", rule.name);
    }
}

#[test]
fn the_average_is_saved_as_a_model_and_sampled_with() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let more = ["step_scheduler.ckpt_every_steps=1", "checkpoint.max_recent_checkpoints=9", "ema.sigma_rel=0.28"];
    train(&small(&run, &more), Vec::new(), &NEVER).unwrap();
    // From the checkpoints of all steps: the share of what was before is (1 - 1 / t)^(gamma + 1), and 0.28 is a gamma of 0.169.
    let gamma = 0.169_344_f64;
    let width = ((gamma + 1.0) / ((gamma + 2.0).powi(2) * (gamma + 3.0))).sqrt();
    assert!((width - 0.28).abs() < 1e-5, "{width}");
    let load = |at: &Path| {
        let model = flowtape_models::checkpoint::load(at, flowtape_engine::DType::F32, &Device::cpu()).unwrap();
        model.params().iter().flat_map(|p| p.kept().unwrap().to_vec::<f64>().unwrap()).collect::<Vec<f64>>()
    };
    let mut average: Vec<f64> = Vec::new();
    for step in 1..=5 {
        let weights = load(&run.join(format!("checkpoints/step_00000{step}")));
        let before = (1.0 - 1.0 / f64::from(step)).powf(gamma + 1.0);
        let old = if step == 1 { weights.clone() } else { average };
        average = old.iter().zip(&weights).map(|(old, new)| before * old + (1.0 - before) * new).collect();
    }
    let saved = load(&run.join("checkpoints/LATEST/ema"));
    assert!(average.iter().zip(&saved).all(|(a, b)| (a - b).abs() < 1e-5), "the average is another");
    let sample = |trained: Trained| trained.sample("a handwritten one", 1, 1, None).unwrap().pixels;
    let (with, without) = (Trained::load(&run, None).unwrap(), Trained::load_raw(&run, None).unwrap());
    assert!(sample(with) != sample(without));
}

#[test]
fn validation_looks_at_the_same_thing_each_time_and_keeps_the_best() {
    // No sample is in both parts; a validation changes nothing, and does not depend on the size of batches.
    let with = |local: &str, held: &str| {
        let settings = [
            "ema.decay=0.5",
            &format!("step_scheduler.local_batch_size={local}"),
            &format!("validation.num_samples={held}"),
        ];
        own(&small(Path::new("unused"), &settings), pixels(40))
    };
    let (mut a, mut b) = (with("4", "20"), with("7", "20"));
    let validate = |trainer: &mut Trainer| trainer.validate(&NEVER).unwrap().unwrap();
    let (first, again, other) = (validate(&mut a), validate(&mut a), validate(&mut b));
    assert_eq!(first, again);
    assert!((first.raw.loss - other.raw.loss).abs() < 1e-5 * first.raw.loss, "{first:?} {other:?}");
    // Each part of the timesteps has its share of the samples, and the whole is their mean; there is no other average yet.
    let bins: Vec<f64> = first.raw.bins.iter().map(|bin| bin.unwrap()).collect();
    assert!((bins.iter().sum::<f64>() / 10.0 - first.raw.loss).abs() < 1e-9 && first.ema == Some(first.raw.clone()));
    a.step().unwrap();
    assert!(validate(&mut a).ema != first.ema);
    let too_many = small(Path::new("unused"), &["validation.num_samples=40"]);
    let text = WordTable::new(&["a one", "a two"], too_many.data.text_dim);
    let refused = Trainer::with_data(&Device::cpu(), &too_many, Data::of_pixels(Arc::new(pixels(40)), text));
    assert!(refused.err().unwrap().to_string().contains("fewer than the 40 samples"));

    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let more =
        ["validation={num_samples: 8, every_steps: 1}", "checkpoint.max_recent_checkpoints=1", "optimizer.lr=0.3"];
    let mut heard = Vec::new();
    train(&small(&run, &more), listening(&mut heard), &NEVER).unwrap();
    let text = std::fs::read_to_string(run.join("validation.jsonl")).unwrap();
    let lines: Vec<Validated> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().map(|line| line.step).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    let best = lines.iter().min_by(|a, b| a.loss().total_cmp(&b.loss())).unwrap();
    let marked = TrainProgress::read(&run.join("checkpoints/BEST")).unwrap();
    assert_eq!((marked.step, marked.validation_loss), (best.step, Some(best.loss())));
}

#[test]
fn that_nothing_is_learned_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let noticed = |name: &str, more: &[&str]| {
        let run = folder.path().join(name);
        let mut heard = Vec::new();
        let hook = |event: &Event<'_>, _: &mut Session<'_>| -> Result<()> {
            if let Event::Noticed(what) = event {
                heard.push((*what).to_owned());
            }
            Ok(())
        };
        let more = [&["step_scheduler.max_steps=200", "step_scheduler.ckpt_every_steps=0"], more].concat();
        train(&small(&run, &more), vec![Box::new(hook)], &NEVER).unwrap();
        heard
    };
    // Everything is held; then a part of it.
    let held = noticed("held", &["optimizer.groups=[{pattern: '*', lr_mult: 0, wd_mult: 0}]"]);
    assert!(held.iter().any(|what| what.contains("step 100: no weight moved")), "{held:?}");
    assert!(held.iter().any(|what| what.contains("the loss does not move")), "{held:?}");
    let part = noticed("part", &["optimizer.groups=[{pattern: 'x_embedder.*', lr_mult: 0, wd_mult: 0}]"]);
    assert!(part.iter().any(|what| what.contains("weights of x_embedder did not move")), "{part:?}");
    let jumping = noticed("jumping", &["optimizer.lr=0.5", "lr_scheduler=null"]);
    assert!(jumping.iter().any(|what| what.contains("learning rate may be too large")), "{jumping:?}");
    assert!(noticed("well", &["optimizer.lr=2e-3"]).is_empty());
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

/// The first sample can't be read.
struct FirstIsBroken(MemorySource);

impl Source for FirstIsBroken {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn header(&self, index: usize) -> DataResult<SampleHeader> {
        self.0.header(index)
    }

    fn read(&self, index: usize, random: &mut Philox) -> DataResult<Sample> {
        match index {
            0 => Err(DataError::Open { name: "0.png".into(), what: "cut short".into() }),
            _ => self.0.read(index, random),
        }
    }

    fn fingerprint(&self) -> Fingerprint {
        self.0.fingerprint()
    }
}

#[test]
fn what_was_left_out_stands_in_the_summary() {
    let folder = tempfile::tempdir().unwrap();
    let settings = [
        "data.skip_bad=true",
        "data.drop_last=true",
        "data.num_workers=0",
        "step_scheduler.local_batch_size=4",
        "step_scheduler.max_steps=4",
        "step_scheduler.save_checkpoint_every_epoch=true",
        "step_scheduler.ckpt_every_steps=0",
        "checkpoint.max_recent_checkpoints=9",
    ];
    let run = folder.path().join("run");
    let recipe = small(&run, &settings);
    // Two epochs of two batches of four, from nine samples.
    let trainer = own(&recipe, FirstIsBroken(pixels(9)));
    let run = RunFolder::create(trainer.recipe()).unwrap();
    let checkpoint = Checkpoint::new(0).at_epoch_ends(true);
    let mut heard = Vec::new();
    let session = Session::new(trainer, run.clone(), &NEVER).with(Box::new(checkpoint));
    let session = listening(&mut heard).into_iter().fold(session, Session::with);
    let summary = session.run().unwrap();
    assert_eq!(heard.iter().filter(|line| line.starts_with("saved")).collect::<Vec<_>>(), ["saved 2", "saved 4"]);
    assert_eq!(summary.left_out.dropped_each_epoch, 1);
    assert!((1..=2).contains(&summary.left_out.unreadable), "{:?}", summary.left_out);
    let report = run.report().unwrap().unwrap();
    assert_eq!(report.left_out, summary.left_out);
}

#[test]
fn films_in_colour_play_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("films.png");
    // Two films of two frames of 1 x 2 pixels: each number tells its film, channel, frame and column.
    let level = |film: usize, channel: usize, frame: usize, x: usize| (film * 12 + channel * 4 + frame * 2 + x) as f32;
    let mut pixels = Vec::new();
    for film in 0..2 {
        for channel in 0..3 {
            (0..4).for_each(|i| pixels.push(level(film, channel, i / 2, i % 2) / 127.5 - 1.0));
        }
    }
    let samples = Samples { pixels, dims: vec![3, 2, 1, 2] };
    save_samples(&samples, 2, |_| path.clone()).unwrap();
    let file = std::io::BufReader::new(std::fs::File::open(&path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    assert_eq!(reader.info().animation_control().unwrap().num_frames, 2);
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    for frame in 0..2 {
        let width = reader.next_frame(&mut rgb).unwrap().width as usize;
        // A pixel is 6 x 6, and there are 4 around each picture.
        for (film, x) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let at = 3 * (5 * width + 4 + film * (2 * 6 + 4) + x * 6);
            let expected: Vec<u8> = (0..3).map(|channel| level(film, channel, frame, x) as u8).collect();
            assert_eq!(rgb[at..at + 3], expected, "frame {frame}, film {film}, column {x}");
        }
    }
}
