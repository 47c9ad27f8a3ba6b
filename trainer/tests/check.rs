//! What a recipe is said to take, beside what it takes.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use flowtape_data::{
    Error as DataError, Fingerprint, Media, MemorySource, Result as DataResult, Sample, SampleHeader, Source, Text,
    TextEmbeddings, TextEncoder,
};
use flowtape_engine::backend::{Backend, Buffer, Decorator};
use flowtape_engine::{DType, Device, Philox, Result as EngineResult, Tensor};
use flowtape_trainer::builtin::{self, WordTable};
use flowtape_trainer::check::{Check, Depth};
use flowtape_trainer::data::Data;
use flowtape_trainer::plan::StepPlan;
use flowtape_trainer::recipe::DataConfig;
use flowtape_trainer::{Recipe, Trainer};
use serde_json::json;

/// The CPU's memory is counted for the whole process: the tests take turns.
static TURN: Mutex<()> = Mutex::new(());

fn recipe(name: &str, settings: &[&str]) -> Recipe {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes").join(name);
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    Recipe::load(&path, &settings).unwrap_or_else(|error| panic!("{error}"))
}

/// The CPU, which remembers the most bytes that were in use.
#[derive(Debug)]
struct Watched {
    cpu: Device,
    peak: Arc<AtomicU64>,
}

impl Decorator for Watched {
    fn inner(&self) -> &dyn Backend {
        self.cpu.backend()
    }

    fn alloc(&self, bytes: usize) -> EngineResult<Box<dyn Buffer>> {
        let buffer = self.inner().alloc(bytes);
        self.peak.fetch_max(self.inner().memory().used, Ordering::Relaxed);
        buffer
    }
}

#[test]
fn a_steps_memory_is_what_it_takes() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let models = [
        ("digits.yaml", "step_scheduler.local_batch_size=32"),
        ("moving_digits_wan.yaml", "step_scheduler.local_batch_size=8"),
        ("moving_digits_hunyuan.yaml", "step_scheduler.local_batch_size=8"),
    ];
    let settings: [&[&str]; 3] = [
        &[],
        &["dtype=mixed", "performance.activation_checkpointing=true"],
        &["clip_grad_norm=null", "step_scheduler.global_batch_size=64"],
    ];
    for (name, batch) in models {
        for settings in settings {
            let recipe = recipe(name, &[&[batch], settings].concat());
            let plan = StepPlan::of(&recipe, builtin::data(&recipe.data, &Device::cpu()).unwrap()).unwrap();
            let peak = Arc::new(AtomicU64::new(0));
            let before = Device::cpu().backend().memory().used;
            let device = Device::new(Watched { cpu: Device::cpu(), peak: peak.clone() });
            let mut trainer = Trainer::on(&device, &recipe).unwrap();
            for _ in 0..2 {
                trainer.step().unwrap();
            }
            let took = peak.load(Ordering::Relaxed) - before;
            let ratio = plan.peak as f64 / took as f64;
            println!("{name} {settings:?}: planned {} took {took}: {ratio:.3}", plan.peak);
            assert!((ratio - 1.0).abs() < 0.1, "{name} {settings:?}: {plan:?}, took {took}");
            assert!(plan.weights > 0 && plan.optimizer > 0 && plan.activations > 0 && plan.flops > 0.0);
        }
    }
}

/// FLUX.1-dev on latents of 1024 x 1024.
fn twelve_billion() -> (Recipe, Data) {
    let recipe = Recipe::from_json(json!({
        "name": "flux",
        "dtype": "mixed",
        "data": { "builtin": "digits", "text_dim": 4096 },
        "model": { "pretrained_model_name_or_path": "flux.1-dev" },
        "flow_matching": { "adapter_type": "flux" },
        "optimizer": { "lr": 1e-5 },
        "step_scheduler": { "local_batch_size": 1, "max_steps": 10 },
    }))
    .unwrap();
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::cpu()).unwrap();
    let text = TextEmbeddings::default()
        .with("text_embeddings", zeros(&[512, 4096]))
        .with("pooled_prompt_embeds", zeros(&[768]));
    let sample = Sample::new(Media::Latents(zeros(&[16, 128, 128])), Text::Embeddings(text));
    let data = Data::of_pixels(Arc::new(MemorySource::new(vec![sample]).unwrap()), WordTable::new(&[], 4096));
    (recipe, data)
}

#[test]
fn a_model_of_12_billion_parameters_is_checked_at_once() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (recipe, data) = twelve_billion();
    let started = Instant::now();
    let check = Check::with_data(&recipe, &Device::cpu(), data, Depth::Handful).unwrap();
    println!("{:?}\n{check}", started.elapsed());
    // Blocks of memory come in eight sizes an octave. bf16 with f32 copies, and two moments in f32.
    let parameters = 11_901_408_320_u64;
    assert!(check.step.weights.abs_diff(6 * parameters) < parameters / 4, "{}", check.step.weights);
    assert!(check.step.optimizer.abs_diff(8 * parameters) < parameters / 4, "{}", check.step.optimizer);
    // The copies alone, and the moments; two of them while one is written.
    assert!(check.checkpoints.abs_diff(3 * 12 * parameters) < parameters / 2, "{}", check.checkpoints);
    // 57 blocks with 12 h^2 weights for each of 4,096 patches and 512 words, three products of each; attention has two products
    // forward and five backward.
    let (tokens, width) = (4608.0_f64, 3072.0_f64);
    let products = 3.0 * 2.0 * 57.0 * 12.0 * width.powi(2) * tokens;
    let attention = 7.0 * 2.0 * 57.0 * tokens.powi(2) * width;
    let ratio = check.step.flops / (products + attention);
    assert!((ratio - 1.0).abs() < 0.01, "{:e}", check.step.flops);
    if !check.fits() {
        let error = check.require().unwrap_err().to_string();
        assert!(error.contains("--set performance.activation_checkpointing=true"), "{error}");
        let least = check.alternatives.iter().map(|alternative| alternative.peak).min().unwrap();
        assert!(least < check.step.peak / 2, "{error}");
    }
    // Adapters beside it, whose frozen base may be held in fewer bits; what would take no less is not told.
    let (mut recipe, data) = twelve_billion();
    recipe.model =
        serde_json::from_value(json!({ "pretrained_model_name_or_path": "flux.1-dev", "mode": "pretrain" })).unwrap();
    recipe.peft = serde_json::from_value(json!({ "dim": 16, "alpha": 16, "target_modules": ["*attn.to_q"] })).unwrap();
    let adapted = Check::with_data(&recipe, &Device::cpu(), data, Depth::Handful).unwrap();
    assert!(adapted.step.optimizer < check.step.optimizer / 100);
    if !adapted.fits() {
        let told = &adapted.alternatives;
        assert!(told.iter().any(|a| a.settings == ["peft.quantize_base=nf4"]), "{told:?}");
        assert!(told.iter().all(|a| a.peak < adapted.step.peak), "{told:?}");
        let last = &told.last().unwrap().settings;
        let has = |setting: &str| last.iter().any(|other| other == setting);
        assert!(has("peft.quantize_base=nf4") && !has("peft.quantize_base=int8"), "{told:?}");
    }
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

/// A card of 24 GB.
#[derive(Debug)]
struct Card(Device);

impl Decorator for Card {
    fn inner(&self) -> &dyn Backend {
        self.0.backend()
    }

    fn is_host(&self) -> bool {
        false
    }

    fn capacity(&self) -> Option<u64> {
        Some(24_000_000_000)
    }
}

#[test]
fn weights_of_blocks_on_the_host_are_none_of_the_device() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let adapted = |blocks: usize| {
        let (mut recipe, data) = twelve_billion();
        recipe.model =
            serde_json::from_value(json!({ "pretrained_model_name_or_path": "flux.1-dev", "mode": "pretrain" }))
                .unwrap();
        recipe.peft = serde_json::from_value(json!({ "dim": 16, "target_modules": ["*attn.to_q"] })).unwrap();
        recipe.performance.activation_checkpointing = true;
        recipe.performance.blocks_to_swap = blocks;
        (recipe, data)
    };
    let check = |blocks: usize, device: &Device| {
        let (recipe, data) = adapted(blocks);
        Check::with_data(&recipe, device, data, Depth::Handful)
    };
    let card = Device::new(Card(Device::cpu()));
    let (none, half, all) = (check(0, &card).unwrap(), check(28, &card).unwrap(), check(57, &card).unwrap());
    // Two bytes of nearly all parameters; two blocks of half a GB at most are there.
    assert!(none.step.weights > 23_000_000_000 && !none.fits(), "{none}");
    assert!(half.step.peak < none.step.peak - 8_000_000_000, "{half}");
    assert!(all.step.weights < 1_000_000_000 && all.step.peak < 8_000_000_000 && all.fits(), "{all}");
    let told = none.alternatives.iter().find(|a| a.settings == ["performance.blocks_to_swap=57"]).unwrap();
    assert_eq!(told.peak, all.step.peak);
    let refused = |blocks: usize, device: &Device| check(blocks, device).unwrap_err().to_string();
    assert!(refused(58, &card).contains("performance.blocks_to_swap: expected at most the model's 57 blocks, got 58"));
    let told = refused(1, &Device::cpu());
    assert!(told.contains("performance.blocks_to_swap") && told.contains("choose a GPU"), "{told}");
    let (mut recipe, data) = adapted(1);
    recipe.peft = None;
    let told = Check::with_data(&recipe, &card, data, Depth::Handful).unwrap_err().to_string();
    assert!(told.contains("performance.blocks_to_swap: all weights are trained"), "{told}");
}

#[test]
fn what_an_optimiser_remembers_on_the_host_is_none_of_the_device() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let card = Device::new(Card(Device::cpu()));
    let check = |offload: bool, device: &Device| {
        let (mut recipe, data) = twelve_billion();
        recipe.performance.activation_checkpointing = true;
        recipe.performance.optimizer_cpu_offload = offload;
        Check::with_data(&recipe, device, data, Depth::Handful)
    };
    let (there, here) = (check(true, &card).unwrap().step, check(false, &card).unwrap());
    // Two moments in f32 of twelve billion parameters.
    assert!(there.optimizer < 1_000_000_000 && here.step.optimizer > 95_000_000_000, "{there:?}");
    assert!(there.peak < here.step.peak - 90_000_000_000, "{there:?}");
    assert!(there.checkpoint.abs_diff(here.step.checkpoint) < here.step.checkpoint / 20, "{there:?}");
    let told = here.alternatives.iter().find(|a| a.settings == ["performance.optimizer_cpu_offload=true"]).unwrap();
    assert_eq!(told.peak, there.peak);
    let refused = check(true, &Device::cpu()).unwrap_err().to_string();
    assert!(refused.contains("performance.optimizer_cpu_offload") && refused.contains("choose a GPU"), "{refused}");
}

/// Eight ranks that share out the updates, or the weights too.
#[test]
fn ranks_take_less_of_twelve_billion_the_more_they_share_out() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let of = |fsdp: serde_json::Value| {
        let (mut recipe, data) = twelve_billion();
        recipe.fsdp = serde_json::from_value(fsdp).unwrap();
        recipe.performance.activation_checkpointing = true;
        let plan = StepPlan::on_ranks(&recipe, data, 8).unwrap();
        println!("{plan:?}");
        plan
    };
    let [all, updates, weights] = [json!(null), json!({ "reshard_after_forward": false }), json!({})].map(of);
    let parameters = 11_901_408_320_u64;
    let near = |a: u64, b: u64| a.abs_diff(b) < parameters / 10;
    // bf16 with f32 copies, and two moments in f32.
    assert!(near(updates.weights, 2 * parameters + 4 * parameters / 8), "{updates:?}");
    assert!(near(weights.weights, 6 * parameters / 8), "{weights:?}");
    assert!(near(updates.optimizer, parameters) && near(weights.optimizer, parameters), "{weights:?}");
    assert!(updates.peak < all.peak / 2 && weights.peak < updates.peak - parameters, "{weights:?}");
}

/// Still pictures of ones and twos; those of some numbers can't be read, or have no caption.
struct Marred {
    len: usize,
    unreadable: Vec<usize>,
    without_caption: Vec<usize>,
}

impl Source for Marred {
    fn len(&self) -> usize {
        self.len
    }

    fn header(&self, _: usize) -> DataResult<SampleHeader> {
        Ok(SampleHeader { dims: vec![1, 8, 8] })
    }

    fn read(&self, index: usize, _: &mut Philox) -> DataResult<Sample> {
        if self.unreadable.contains(&index) {
            return Err(DataError::Open { name: self.name(index), what: "cut short".into() });
        }
        let caption = if self.without_caption.contains(&index) { " " } else { "a handwritten one" };
        let pixels = Tensor::full(&[1, 8, 8], index as f64, DType::F32, &Device::cpu())?;
        Ok(Sample::new(Media::Pixels(pixels), Text::Caption(caption.into())))
    }

    fn name(&self, index: usize) -> String {
        format!("pictures/{index}.png")
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(b"marred")
    }
}

/// Takes every caption for one.
struct AnyWords(WordTable);

impl TextEncoder for AnyWords {
    fn encode(&self, captions: &[Option<&str>], device: &Device) -> DataResult<TextEmbeddings> {
        self.0.encode(&vec![Some("a handwritten one"); captions.len()], device)
    }
}

#[test]
fn what_a_deep_check_leaves_out_is_told() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let recipe = recipe("digits.yaml", &["data.skip_bad=true", "validation={fraction: 0.25}"]);
    let text_dim = recipe.data.text_dim;
    let data = |unreadable: &[usize]| {
        let source = Marred { len: 100, unreadable: unreadable.to_vec(), without_caption: vec![7, 9] };
        Data::of_pixels(Arc::new(source), AnyWords(WordTable::new(&["a handwritten one"], text_dim)))
    };
    // The split reads what there is: the two that can't be read are no part of it.
    let unsplit = Recipe { validation: None, ..recipe.clone() };
    let check = Check::with_data(&unsplit, &Device::cpu(), data(&[3, 40]), Depth::All).unwrap();
    assert_eq!((check.read.samples, check.read.unreadable.len(), check.held_out), (100, 2, 0));
    assert!(check.read.unreadable[0].contains("pictures/3.png"), "{:?}", check.read);
    assert_eq!(check.read.without_caption, ["pictures/7.png", "pictures/9.png"]);
    let shown = check.to_string();
    assert!(shown.contains("2 of them without a caption:\npictures/7.png") && shown.contains("cut short"), "{shown}");
    let strict = Recipe { data: DataConfig { skip_bad: false, ..recipe.data.clone() }, ..unsplit };
    let error = Check::with_data(&strict, &Device::cpu(), data(&[3, 40]), Depth::All).unwrap_err().to_string();
    assert!(error.contains("2 samples can't be read") && error.contains("pictures/40.png"), "{error}");
    let split = Check::with_data(&recipe, &Device::cpu(), data(&[]), Depth::Handful).unwrap();
    assert_eq!(split.samples + split.held_out, 100);
    assert!((10..40).contains(&split.held_out) && split.read.samples == 8, "{split:?}");
}

#[test]
fn samples_that_do_not_fit_the_model_are_named() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (recipe, _) = twelve_billion();
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::cpu()).unwrap();
    let sample = |latents: &[usize], text: usize, pooled: usize| {
        let text = TextEmbeddings::default()
            .with("text_embeddings", zeros(&[8, text]))
            .with("pooled_prompt_embeds", zeros(&[pooled]));
        Sample::new(Media::Latents(zeros(latents)), Text::Embeddings(text))
    };
    let samples = vec![
        sample(&[16, 8, 8], 4096, 768),
        sample(&[4, 8, 8], 4096, 768),
        sample(&[16, 8, 7], 4096, 768),
        sample(&[16, 8, 8], 2048, 512),
        sample(&[16, 8, 8], 2048, 512),
    ];
    let data = Data::of_pixels(Arc::new(MemorySource::new(samples).unwrap()), WordTable::new(&[], 4096));
    let error = Check::with_data(&recipe, &Device::cpu(), data, Depth::All).unwrap_err().to_string();
    for part in [
        "sample 1: the channels of the sample (4) must equal model.in_channels / 4 (16)",
        "sample 2: the sides [8, 7]",
        "sample 3: the width of its text_embeddings (2048)",
        "sample 3: the width of its pooled_prompt_embeds (512)",
    ] {
        assert!(error.contains(part), "{part:?} in {error}");
    }
    assert!(!error.contains("sample 0") && !error.contains("sample 4"), "{error}");
}

#[test]
fn a_check_counts_samples_by_size() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let recipe = recipe("digits.yaml", &["data.drop_last=true", "step_scheduler.num_epochs=2"]);
    let check = Check::of(&recipe, &Device::cpu(), Depth::All).unwrap();
    let [bucket] = &check.buckets[..] else { panic!("{:?}", check.buckets) };
    assert_eq!((&bucket.dims[..], bucket.samples, bucket.batches, bucket.dropped), (&[1, 8, 8][..], 1797, 28, 5));
    assert_eq!(check.steps, 56);
    assert!(check.fits(), "{check}");
    let shown = check.to_string();
    assert!(shown.contains("1 x 8 x 8") && shown.contains("TFLOP a step"), "{shown}");
}
