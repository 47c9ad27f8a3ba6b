//! Autoencoders and a text encoder of published shapes with random weights, as preprocessing and previews run them.

use std::time::Instant;

use flowtape_engine::nn::{ParamBuilder, Placement};
use flowtape_engine::{DType, Device, Philox, Tensor};
use flowtape_models::text::{T5Config, T5EncoderModel, TextModel};
use flowtape_models::vae::{Autoencoder, AutoencoderKind, Tiling};
use serde::Serialize;
use serde_json::{Value, json};

use crate::Result;
use crate::step::process;

/// What is measured.
#[derive(Clone, Debug)]
pub struct EncoderOptions {
    /// Where.
    pub device: Device,
    /// Of weights and activations.
    pub dtype: DType,
    /// Only what has this in its name or sizes.
    pub only: Option<String>,
    /// How often each is run; the fastest counts.
    pub rounds: usize,
    /// Side of tiles in pixels, where pictures are cut into such.
    pub tile: Option<usize>,
}

/// What a run takes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct EncoderMeasurement {
    /// Which autoencoder, and which way.
    pub name: String,
    /// Sizes of the pixels.
    pub shape: String,
    /// Of weights and activations.
    pub dtype: &'static str,
    /// Threads of the CPU.
    pub threads: usize,
    /// Seconds of the fastest run.
    pub s_min: f64,
    /// MiB of tensors at most, weights included.
    pub tensors_mb: u64,
    /// MiB of the process at most; of all that ran before, too.
    pub process_mb: u64,
}

/// Layers of T5-XXL that are measured, and tokens.
const T5_LAYERS: usize = 4;
const T5_TOKENS: usize = 512;

/// Side of what is run before, in pixels.
const SMALL: usize = 64;

/// Name, configuration, and the pixels of a sample.
fn works() -> Vec<(&'static str, Value, Vec<usize>)> {
    let flux = json!({
        "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4],
        "latent_channels": 16, "use_quant_conv": false, "use_post_quant_conv": false,
    });
    vec![
        ("flux.1", flux.clone(), vec![1, 3, 512, 512]),
        ("flux.1", flux, vec![1, 3, 1024, 1024]),
        ("wan2.1", json!({"_class_name": "AutoencoderKLWan"}), vec![1, 3, 17, 256, 256]),
    ]
}

/// Measures all; `report` gets each as soon as it is measured.
///
/// # Errors
/// When the device fails or memory runs out.
pub fn encoders(options: &EncoderOptions, mut report: impl FnMut(&EncoderMeasurement)) -> Result<()> {
    for (name, config, pixels) in works() {
        let shape = pixels.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        let wanted =
            |way: &str| options.only.as_deref().is_none_or(|only| format!("{name} {way} {shape}").contains(only));
        if !wanted("encode") && !wanted("decode") {
            continue;
        }
        let placement = Placement::frozen(options.dtype);
        let params = ParamBuilder::with_plan(0, placement, &options.device).lazy();
        let kind = AutoencoderKind::of_class(config["_class_name"].as_str().unwrap_or_default())?;
        let mut model = (kind.new)(&kind.config.complete(&config)?, &params)?;
        model.set_tiling(options.tile.map(Tiling::square))?;
        let normal = |dims: &[usize]| -> Result<Tensor> {
            Ok(Philox::new(1).normal(dims, &options.device)?.to_dtype(options.dtype)?)
        };
        let runs: [(&str, Run); 2] =
            [("encode", |model, x| Ok(model.encode(x)?.mean)), ("decode", |model, z| Ok(model.decode(z)?))];
        for (way, run) in runs.into_iter().filter(|(way, _)| wanted(way)) {
            let input = |dims: &[usize]| normal(&if way == "encode" { dims.to_vec() } else { model.latent_dims(dims) });
            // Weights come with their first use.
            run(&*model, &input(&[&pixels[..pixels.len() - 2], &[SMALL; 2]].concat())?)?;
            let input = input(&pixels)?;
            report(&measured(options, format!("{name} {way}"), shape.clone(), || run(&*model, &input))?);
        }
    }
    let (name, shape) = ("t5-xxl encode".to_owned(), format!("{T5_LAYERS}x{T5_TOKENS}"));
    if options.only.as_deref().is_none_or(|only| format!("{name} {shape}").contains(only)) {
        let config =
            T5Config { d_model: 4096, d_ff: 10_240, num_heads: 64, num_layers: T5_LAYERS, ..T5Config::default() };
        let params = ParamBuilder::with_plan(0, Placement::frozen(options.dtype), &options.device);
        let model = T5EncoderModel::new(config, false, &params)?;
        let run = |tokens: usize| -> Result<Tensor> {
            let tokens = Tensor::from_vec((0..tokens as u32).collect(), &[1, tokens], &options.device)?;
            Ok(model.forward(&tokens, None)?.last_hidden_state)
        };
        run(T5_TOKENS / 32)?;
        report(&measured(options, name, shape, || run(T5_TOKENS))?);
    }
    Ok(())
}

/// The fastest of some runs.
fn measured(
    options: &EncoderOptions,
    name: String,
    shape: String,
    run: impl Fn() -> Result<Tensor>,
) -> Result<EncoderMeasurement> {
    let mut fastest = f64::INFINITY;
    for _ in 0..options.rounds.max(1) {
        let start = Instant::now();
        let output = run()?;
        // One value is read, so that all of it was computed.
        output.flatten(1, output.rank() - 1)?.narrow(1, 0, 1)?.to_vec::<f32>()?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    Ok(EncoderMeasurement {
        name,
        shape,
        dtype: options.dtype.name(),
        threads: rayon::current_num_threads(),
        s_min: fastest,
        tensors_mb: options.device.backend().memory().peak >> 20,
        process_mb: process::peak_memory() >> 20,
    })
}

/// One way through an autoencoder.
type Run = fn(&dyn Autoencoder, &Tensor) -> Result<Tensor>;
