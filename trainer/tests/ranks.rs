//! Several ranks train as one with as many micro-batches: the same bits, whatever is trained, also where their number changes.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use flowtape_engine::Device;
use flowtape_engine::comm::{Collective, Comm, Threads, Work};
use flowtape_engine::meta::Meta;
use flowtape_engine::safetensors::SafeTensors;
use flowtape_trainer::hooks::{Event, Hook, on_step};
use flowtape_trainer::plan::StepPlan;
use flowtape_trainer::run::RunFolder;
use flowtape_trainer::train::{Resume, Session, Summary, resume_among, train, train_among};
use flowtape_trainer::{Error, Recipe, Result, Trainer, builtin};

use crate::common::{files, small};

static NEVER: AtomicBool = AtomicBool::new(false);

const MORE: [&str; 4] = [
    "step_scheduler={local_batch_size: 4, global_batch_size: 16, max_steps: 5, ckpt_every_steps: 2}",
    "data.caption_dropout_prob=0.3",
    "ema={decay: 0.9}",
    "validation={num_samples: 5, every_steps: 2}",
];

/// What `work` comes to on each of so many ranks.
fn on_ranks<T: Send>(world: usize, work: impl Fn(&Arc<dyn Comm>) -> Result<T> + Sync) -> Vec<Result<T>> {
    Threads::run(world, &Device::cpu(), |comm| work(&comm))
}

fn trained(world: usize, recipe: &Recipe) -> Vec<Summary> {
    let all = on_ranks(world, |comm| train_among(comm, &Device::cpu(), recipe, Vec::new(), &NEVER));
    all.into_iter().map(|done| done.unwrap()).collect()
}

/// Whether the last checkpoints of two runs have the same bytes.
fn assert_same(a: &Path, b: &Path, what: &str) {
    let (a, b) = (files(a), files(b));
    assert!(a.len() >= 2 && a.iter().map(|(path, _)| path).eq(b.iter().map(|(path, _)| path)), "{what}");
    for ((path, a), (_, b)) in a.iter().zip(&b) {
        assert!(a == b, "{what}: {} differs", path.display());
    }
}

/// Trains with four micro-batches on one rank, and with one on each of four; and with two each.
fn same_on_all(name: &str, folder: &Path, recipe: impl Fn(&Path, usize) -> Recipe) {
    for world in [2, 4] {
        let [one, several] = ["one", "several"].map(|part| folder.join(format!("{name}_{world}_{part}")));
        let alone = train(&recipe(&one, world), Vec::new(), &NEVER).unwrap();
        let all = trained(world, &recipe(&several, world));
        assert_same(&one, &several, &format!("{name} on {world} ranks"));
        // All know the mean loss of all.
        assert!(all.iter().all(|rank| (rank.steps, rank.final_loss) == (alone.steps, alone.final_loss)), "{all:?}");
        let records = |run: &Path| RunFolder::open(run).unwrap().0.history(5);
        for (a, b) in records(&one).iter().zip(records(&several)) {
            let told =
                |r: &flowtape_trainer::StepRecord| (r.step, r.epoch, r.loss, r.grad_norm, r.lr, r.by_sigma.clone());
            assert_eq!(told(a), told(&b), "{name} on {world} ranks");
        }
    }
}

#[test]
fn ranks_have_the_bits_of_as_many_micro_batches_on_one() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in ["f32", "bf16", "mixed", "mixed_f16"] {
        for clip in ["clip_grad_norm=null", "clip_grad_norm={max_norm: 0.1}"] {
            let dtype_is = format!("dtype={dtype}");
            let recipe = |run: &Path, world: usize| {
                let batch = format!("step_scheduler.global_batch_size={}", 4 * world);
                small(run, &[&MORE[..], &[&dtype_is, clip, &batch]].concat())
            };
            same_on_all(&format!("{dtype}_{}", clip.len()), folder.path(), recipe);
        }
    }
}

/// Each rank updates some of the parameters, and keeps their weights alone, or all weights. Two blocks of each kind, so that some are sent
/// for while others are computed with.
#[test]
fn ranks_that_share_out_the_parameters_have_the_bits_of_one_too() {
    let folder = tempfile::tempdir().unwrap();
    for (i, settings) in [
        ["dtype=f32", "clip_grad_norm=null", "fsdp={}"],
        ["dtype=mixed", "clip_grad_norm={max_norm: 0.1}", "fsdp={}"],
        ["dtype=mixed", "performance.activation_checkpointing=true", "fsdp={}"],
        ["dtype=mixed_f16", "clip_grad_norm=null", "fsdp={}"],
        ["optimizer.name=muon", "clip_grad_norm=null", "fsdp={}"],
        ["dtype=f32", "clip_grad_norm=null", "fsdp={reshard_after_forward: false}"],
        ["dtype=mixed", "clip_grad_norm={max_norm: 0.1}", "fsdp={reshard_after_forward: false}"],
    ]
    .iter()
    .enumerate()
    {
        let recipe = |run: &Path, world: usize| {
            let batch = format!("step_scheduler.global_batch_size={}", 4 * world);
            let fsdp = if run.to_string_lossy().ends_with("several") { settings[2] } else { "fsdp=null" };
            let blocks = ["model.num_layers=2", "model.num_single_layers=2"];
            small(run, &[&MORE[..], &blocks, &settings[..2], &[&batch, fsdp]].concat())
        };
        same_on_all(&format!("{i}"), folder.path(), recipe);
        for world in [2, 4] {
            let picture =
                |part: &str| std::fs::read(folder.path().join(format!("{i}_{world}_{part}/samples/step_000005.png")));
            assert_eq!(picture("one").unwrap(), picture("several").unwrap(), "{settings:?} on {world} ranks");
        }
    }
    // Groups add up their own gradients first.
    let recipe = |run: &str, fsdp: &str| small(&folder.path().join(run), &[&MORE[..], &["dtype=mixed", fsdp]].concat());
    trained(4, &recipe("whole", "fsdp={dp_size: 4}"));
    trained(4, &recipe("groups", "fsdp={dp_size: 4, dp_replicate_size: 2}"));
    let (a, b) = (weights(&folder.path().join("whole")), weights(&folder.path().join("groups")));
    let apart = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(a.len() == b.len() && apart < 1e-3, "{apart}");
}

/// On devices without data, that count: what each rank takes is what the plan of the first says.
#[test]
fn what_a_rank_takes_is_what_is_planned() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = [
        "step_scheduler.global_batch_size=32",
        "dtype=mixed",
        "model.num_layers=4",
        "model.num_single_layers=4",
        "model.attention_head_dim=32",
        "model.axes_dims_rope=[8, 12, 12]",
    ];
    let data = |recipe: &Recipe| builtin::data(&recipe.data, &Device::cpu()).unwrap();
    let recipe_alone = |more: &[&str]| {
        let recipe = small(&folder.path().join("run"), &[&sizes[..], more].concat());
        StepPlan::of(&recipe, data(&recipe)).unwrap()
    };
    let (stage_2, stage_3) = ("fsdp={reshard_after_forward: false}", "fsdp={}");
    for more in [&[][..], &["performance.activation_checkpointing=true"], &["ema={decay: 0.9}", "clip_grad_norm=null"]]
    {
        let mut peaks = BTreeMap::new();
        for (fsdp, world) in ["fsdp=null", stage_2, stage_3].into_iter().flat_map(|f| [2, 4, 8].map(|n| (f, n))) {
            let recipe = small(&folder.path().join("run"), &[&sizes[..], more, &[fsdp]].concat());
            let plan = StepPlan::on_ranks(&recipe, data(&recipe), world).unwrap();
            let metas: Vec<Meta> = (0..world).map(|_| Meta::default()).collect();
            let comms = Threads::on(&metas.iter().map(Meta::device).collect::<Vec<_>>());
            std::thread::scope(|scope| {
                for comm in comms {
                    let recipe = &recipe;
                    scope.spawn(move || {
                        let device = comm.device();
                        let data = builtin::data(&recipe.data, &device).unwrap();
                        let mut trainer = Trainer::among(comm, &device, recipe, data).unwrap();
                        (0..2).for_each(|_| drop(trainer.step().unwrap()));
                    });
                }
            });
            let what = format!("{world} ranks, {fsdp} {more:?}");
            for (rank, meta) in metas.iter().enumerate() {
                let off = meta.peak() as f64 / plan.peak as f64 - 1.0;
                assert!(off.abs() < 0.1, "rank {rank} of {what}: {} against {}", meta.peak(), plan.peak);
            }
            let alone = recipe_alone(more);
            // A ring hands the sums of f32 gradients around, and the updated weights of bf16 where one rank has them: or those of blocks
            // forward and, but for the last one, backward, from one rank to the next.
            // Averages of f32 weights are kept by all ranks where the weights are.
            let (average, of) = (if more.contains(&"ema={decay: 0.9}") { 4.0 } else { 0.0 }, 1.0 - 1.0 / world as f64);
            // Blocks come for each micro-batch, of which three are planned.
            let batches = (8 / world).min(3) as f64;
            let [least, most] = match fsdp {
                "fsdp=null" => [8.0 * of; 2],
                fsdp if fsdp == stage_2 => [(4.0 + 2.0 + average) * of; 2],
                _ => [4.0 * of + 2.0 * of * batches, 4.0 * of + 2.0 * 2.0 * batches],
            };
            let sent = plan.sent as f64 / (alone.weights as f64 / (6.0 + average));
            assert!(sent > 0.95 * least && sent < 1.05 * most, "{sent} of {least} to {most}: {what}");
            let share = plan.optimizer as f64 / alone.optimizer as f64;
            let expected = if fsdp == "fsdp=null" { 1.0 } else { 1.0 / world as f64 };
            assert!((share / expected - 1.0).abs() < 0.2, "{share}: {what}");
            peaks.insert((fsdp, world), (plan.weights, plan.peak));
        }
        for world in [2, 4, 8] {
            let [(weights, peak), (less, least)] = [stage_2, stage_3].map(|fsdp| peaks[&(fsdp, world)]);
            assert!(less < weights && least < peak, "{world} ranks, {more:?}: {peaks:?}");
        }
    }
}

#[test]
fn adapters_have_the_bits_of_one_rank_too() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    train(&small(&base, &[]), Vec::new(), &NEVER).unwrap();
    let model = format!("model={{pretrained_model_name_or_path: {}}}", base.display());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/digits.yaml");
    for (i, [own, fsdp]) in [
        ["use_dora: false", "null"],
        ["use_dora: false", "{}"],
        ["use_dora: true", "{}"],
        ["quantize_base: int8", "{}"],
        ["quantize_base: nf4", "{}"],
    ]
    .into_iter()
    .enumerate()
    {
        let peft = format!("peft={{dim: 4, alpha: 8, dropout: 0.2, target_modules: ['*attn.*'], {own}}}");
        let lora = |run: &Path, world: usize| {
            let fsdp = if run.to_string_lossy().ends_with("several") { fsdp } else { "null" };
            let fsdp = format!("fsdp={fsdp}");
            let run = format!("run_dir={}", run.display());
            let batch = format!("step_scheduler.global_batch_size={}", 4 * world);
            let own = [
                &model,
                &run,
                &peft,
                &fsdp,
                "sampling.every_steps=0",
                "sampling.num_inference_steps=1",
                "sampling.guidance_scale=1",
                "report=null",
            ];
            let batch = &*batch;
            let all = own.iter().chain(&MORE).chain([&batch]);
            Recipe::load(&path, &all.map(|s| (*s).to_owned()).collect::<Vec<_>>()).unwrap()
        };
        same_on_all(&format!("lora_{i}"), folder.path(), lora);
    }
}

/// Ranks that share the tokens of each sample come to what one rank with the same samples comes to, up to roundings; so do groups of
/// them with other samples, whole or sharing out the parameters, with adapters and where blocks run again in backward.
#[test]
fn ranks_that_share_tokens_train_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/moving_digits_wan.yaml");
    let recipe = |run: &str, more: &[&str]| {
        let run = format!("run_dir={}", folder.path().join(run).display());
        let own = [
            "dtype=f32",
            "model.num_layers=2",
            "model.attention_head_dim=12",
            "model.ffn_dim=64",
            "data.video={frames: 3, height: 8, width: 12, stride: 2}",
            "step_scheduler={local_batch_size: 3, global_batch_size: 6, max_steps: 4, ckpt_every_steps: 0}",
            "validation={num_samples: 4, every_steps: 2}",
            "sampling.every_steps=0",
            "sampling.num_inference_steps=1",
            "sampling.guidance_scale=1",
            "report=null",
            &run,
        ];
        Recipe::load(&path, &own.iter().chain(more).map(|s| (*s).to_owned()).collect::<Vec<_>>()).unwrap()
    };
    let alone = train(&recipe("alone", &[]), Vec::new(), &NEVER).unwrap();
    let whole = weights(&folder.path().join("alone"));
    for (name, world, more) in [
        ("two", 2, &["fsdp={cp_size: 2, dp_size: 1, dp_replicate_size: 2}"][..]),
        ("four", 4, &["fsdp={cp_size: 4, dp_replicate_size: 4}"]),
        ("groups", 4, &["fsdp={cp_size: 2, dp_size: 2}", "performance.activation_checkpointing=true"]),
    ] {
        let all = trained(world, &recipe(name, more));
        let near = |a: f64, b: f64| (a - b).abs() < 1e-5 * (1.0 + b.abs());
        assert!(all.iter().all(|rank| rank.steps == 4 && near(rank.final_loss, alone.final_loss)), "{name}: {all:?}");
        let records = |run: &str| RunFolder::open(&folder.path().join(run)).unwrap().0.history(4);
        for (a, b) in records("alone").iter().zip(records(name)) {
            assert!(near(b.loss, a.loss) && (b.step, b.epoch) == (a.step, a.epoch), "{name}: {a:?} {b:?}");
            assert_eq!(a.by_sigma.counts, b.by_sigma.counts, "{name}");
        }
        // AdamW divides by the root of tiny squares, so roundings grow.
        let apart =
            weights(&folder.path().join(name)).iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(apart < 1e-3, "{name}: {apart}");
    }
    // On a device that only counts, a rank of four takes less than one that is alone with the samples.
    let planned = |more: &[&str], world| {
        let recipe = recipe("planned", more);
        StepPlan::on_ranks(&recipe, builtin::data(&recipe.data, &Device::cpu()).unwrap(), world).unwrap().peak
    };
    let long = "data.video={frames: 12, height: 8, width: 12, stride: 2}";
    let (one, four) = (
        planned(&[long, "step_scheduler.global_batch_size=3"], 1),
        planned(&[long, "step_scheduler.global_batch_size=3", "fsdp={cp_size: 4, dp_replicate_size: 4}"], 4),
    );
    assert!((four as f64) < 0.5 * one as f64, "{four} of {one}");
    // What can't be shared out is said.
    let refused = |more: &[&str], world: usize| {
        let all =
            on_ranks(world, |comm| train_among(comm, &Device::cpu(), &recipe("refused", more), Vec::new(), &NEVER));
        all.into_iter().map(|done| format!("{:?}", done.unwrap_err())).collect::<Vec<_>>().join("\n")
    };
    for (more, world, told) in [
        (&["fsdp={cp_size: 3}"][..], 4, "fsdp.cp_size: expected a divisor of the 4 ranks, got 3"),
        (&["fsdp={cp_size: 3}"], 3, "a number of heads that 3 ranks can share out, got 4"),
        (&["fsdp={cp_size: 2, dp_size: 4}"], 4, "fsdp.dp_size: expected the number of ranks, 4, by fsdp.cp_size (2)"),
    ] {
        let found = refused(more, world);
        assert!(found.contains(told), "{told}: {found}");
    }
}

/// All numbers of the weights of the last checkpoint.
fn weights(run: &Path) -> Vec<f64> {
    let file = SafeTensors::open(run.join("checkpoints/LATEST/diffusion_pytorch_model.safetensors")).unwrap();
    let values = |name: String| file.get(&name, &Device::cpu(), None).unwrap().to_vec::<f64>().unwrap();
    file.names().into_iter().flat_map(values).collect()
}

/// Each part of a run is stopped by the rank that comes last, after some steps, and the next one has other ranks. A step of
/// four ranks has the bits of four micro-batches on one; two ranks add up their own two first, so theirs are near (the same where
/// sums of halves in f32 round nothing).
#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let steps = "step_scheduler={local_batch_size: 4, global_batch_size: 16, max_steps: 18, ckpt_every_steps: 0}";
    let recipe = |run: &Path| {
        // Some of the runs share out the parameters.
        let fsdp = if run.ends_with("[1, 4, 1, 4]") || run.ends_with("[1, 2, 4, 1]") { "fsdp={}" } else { "fsdp=null" };
        // What is stopped has files of each rank.
        let consolidated = "checkpoint.save_consolidated=final";
        small(run, &[&MORE[1..], &["dtype=mixed", steps, fsdp, consolidated]].concat())
    };
    let whole = folder.path().join("whole");
    trained(4, &recipe(&whole));
    let open = |_: &str| Ok(Device::cpu());
    for worlds in [[1, 4, 1, 4], [1, 2, 4, 1], [4, 1, 4, 1]] {
        let run = folder.path().join(format!("{worlds:?}"));
        for (i, world) in worlds.into_iter().enumerate() {
            let (stop, until) = (AtomicBool::new(false), if i < 3 { 3 * (i as u64 + 1) } else { u64::MAX });
            let done = on_ranks(world, |comm| {
                let told = on_step(|record| stop.store(record.step + 1 >= until, Ordering::Relaxed));
                let hooks = if comm.rank() == 0 { vec![told] } else { Vec::new() };
                let asked = if comm.rank() + 1 == world { &stop } else { &NEVER };
                match i {
                    0 => train_among(comm, &Device::cpu(), &recipe(&run), hooks, asked),
                    _ => resume_among(comm, &open, &run, &Resume::default(), hooks, asked),
                }
            });
            let done: Vec<Summary> = done.into_iter().map(|done| done.unwrap()).collect();
            let steps = done[0].steps;
            assert!(done.iter().all(|d| d.steps == steps && d.interrupted == (i < 3)), "{worlds:?}: {done:?}");
            assert!(if i < 3 { (until - 1..=until + 4).contains(&steps) } else { steps == 18 }, "{steps} of {until}");
            let written = |rank: usize, of: usize| {
                let name = format!("optimizer-{:05}-of-{of:05}.safetensors", rank + 1);
                run.join("checkpoints/LATEST").join(name).exists()
            };
            let sharded = i < 3 && world > 1 && recipe(&run).fsdp.is_some();
            assert!((0..world).all(|rank| written(rank, world) == sharded), "{worlds:?}, {i}");
        }
        if worlds.contains(&2) {
            let apart = weights(&whole).iter().zip(weights(&run)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(apart < 1e-3, "{apart}");
        } else {
            assert_same(&whole, &run, &format!("{worlds:?} ranks"));
        }
    }
}

#[test]
fn a_rank_that_fails_stops_all_and_the_last_checkpoint_is_good() {
    struct Fails;
    impl Hook for Fails {
        fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
            match event {
                Event::Step(record) if record.step == 4 => {
                    Err(Error::Run { path: run.folder().path().into(), what: "the disk went up in smoke".into() })
                }
                _ => Ok(()),
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let recipe = small(&run, &MORE);
    let done = on_ranks(4, |comm| {
        let hooks: Vec<Box<dyn Hook>> = if comm.rank() == 0 { vec![Box::new(Fails)] } else { Vec::new() };
        train_among(comm, &Device::cpu(), &recipe, hooks, &NEVER)
    });
    for (rank, done) in done.into_iter().enumerate() {
        let error = done.unwrap_err().to_string();
        assert!(error.contains("up in smoke") && (rank == 0 || error.contains("rank 0")), "{error}");
    }
    let checkpoint = RunFolder::open(&run).unwrap().0.checkpoints().newest_whole().unwrap();
    assert!(checkpoint.ends_with("step_000002"), "{checkpoint:?}");
}

/// Of a rank that dies when it is to write its part of the second checkpoint: nothing of that counts, and the run goes on from the first.
#[test]
fn a_rank_that_dies_while_all_save_leaves_the_checkpoint_before() {
    #[derive(Debug)]
    struct Dies(Arc<dyn Comm>, Arc<AtomicUsize>);
    impl Comm for Dies {
        fn rank(&self) -> usize {
            self.0.rank()
        }
        fn world_size(&self) -> usize {
            self.0.world_size()
        }
        fn device(&self) -> Device {
            self.0.device()
        }
        fn start(&self, collective: Collective) -> flowtape_engine::Result<Box<dyn Work>> {
            self.0.start(collective)
        }
        fn barrier(&self) -> flowtape_engine::Result<()> {
            self.0.barrier()?;
            if self.rank() == 1 && self.1.load(Ordering::Relaxed) == 2 {
                self.abort("was killed");
            }
            self.check()
        }
        fn abort(&self, cause: &str) {
            self.0.abort(cause);
        }
        fn check(&self) -> flowtape_engine::Result<()> {
            self.0.check()
        }
        fn split(&self, color_of: &dyn Fn(usize) -> usize) -> flowtape_engine::Result<Arc<dyn Comm>> {
            self.0.split(color_of)
        }
    }

    let folder = tempfile::tempdir().unwrap();
    let [whole, run] = ["whole", "run"].map(|part| folder.path().join(part));
    let recipe = |run: &Path| small(run, &[&MORE[..], &["fsdp={}", "checkpoint.save_consolidated=false"]].concat());
    trained(4, &recipe(&whole));
    let saves = Arc::new(AtomicUsize::new(0));
    let done = on_ranks(4, |comm| {
        let count = |event: &Event<'_>, _: &mut Session<'_>| {
            if matches!(event, Event::Busy("saving a checkpoint")) {
                saves.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let comm: Arc<dyn Comm> = Arc::new(Dies(comm.clone(), saves.clone()));
        train_among(&comm, &Device::cpu(), &recipe(&run), vec![Box::new(count)], &NEVER)
    });
    for done in done {
        let error = done.unwrap_err().to_string();
        assert!(error.contains("rank 1") && error.contains("was killed"), "{error}");
    }
    let checkpoints = RunFolder::open(&run).unwrap().0.checkpoints();
    assert!(run.join("checkpoints/step_000004.partial").exists());
    assert!(checkpoints.newest_whole().unwrap().ends_with("step_000002"));
    let open = |_: &str| Ok(Device::cpu());
    let done = on_ranks(4, |comm| resume_among(comm, &open, &run, &Resume::default(), Vec::new(), &NEVER));
    assert!(done.into_iter().all(|done| done.unwrap().steps == 5));
    assert!(!run.join("checkpoints/step_000004.partial").exists());
    assert_same(&whole, &run, "a run that one of its ranks died in");
}

#[test]
fn what_ranks_can_not_share_out_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let recipe = small(&run, &["step_scheduler.global_batch_size=8"]);
    let done = on_ranks(4, |comm| train_among(comm, &Device::cpu(), &recipe, Vec::new(), &NEVER));
    for done in done {
        let error = done.unwrap_err().to_string();
        assert!(error.contains("expected a multiple of 16, the local_batch_size (4) on 4 ranks, got 8"), "{error}");
    }
    assert!(!run.exists());
    // What is left out means one batch of each.
    let recipe = small(&run, &["step_scheduler.global_batch_size=null", "step_scheduler.max_steps=1"]);
    trained(2, &recipe);
    assert_eq!(RunFolder::open(&run).unwrap().1.global_batch_size(), 8);
}
