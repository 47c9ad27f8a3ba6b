//! Training inside another program: samples from memory, a device of its choice, a record for each step, and a way to stop.
//!
//!     cargo run --release -p flowtape-trainer --example embed
//!
//! It learns to draw bars that lie or stand, and draws one of each.
#![allow(clippy::print_stdout)] // an example shows what it does

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flowtape_data::{Media, MemorySource, Sample, Text};
use flowtape_engine::{Device, Tensor};
use flowtape_trainer::builtin::WordTable;
use flowtape_trainer::data::Data;
use flowtape_trainer::generate::Request;
use flowtape_trainer::{Recipe, Result, Trainer};

const CAPTIONS: [&str; 2] = ["lying bar", "standing bar"];

/// A white bar on black, 8 x 8, and its caption.
fn sample(i: usize) -> Result<Sample> {
    let (standing, at) = (i % 2 == 1, i / 2 % 8);
    let white = |pixel: usize| if standing { pixel % 8 == at } else { pixel / 8 == at };
    let pixels = (0..64).map(|pixel| if white(pixel) { 1f32 } else { -1.0 }).collect();
    let pixels = Tensor::from_vec(pixels, &[1, 8, 8], &Device::cpu())?;
    Ok(Sample::new(Media::Pixels(pixels), Text::Caption(CAPTIONS[i % 2].into())))
}

/// Trains, tells of it, and draws.
pub fn main() -> Result<()> {
    let recipe = Recipe::from_json(serde_json::json!({
        "model": {
            "_class_name": "FluxTransformer2DModel", "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 16, "pooled_projection_dim": 16,
            "guidance_embeds": true, "axes_dims_rope": [4, 6, 6],
        },
        "flow_matching": { "adapter_type": "flux", "flow_shift": 1.0, "use_loss_weighting": false },
        "optimizer": { "lr": 3e-3 },
        "step_scheduler": { "local_batch_size": 16, "max_steps": 400 },
        "ema": { "sigma_rel": 0.1 },
    }))?;
    let samples = (0..16).map(sample).collect::<Result<_>>()?;
    let data = Data::of_pixels(Arc::new(MemorySource::new(samples)?), WordTable::new(&CAPTIONS, 16));
    let mut trainer = Trainer::with_data(&Device::cpu(), &recipe, data)?;
    // Another thread of the program may set it at any time.
    let stop = AtomicBool::new(false);
    while trainer.state().progress.step < recipe.step_scheduler.max_steps && !stop.load(Ordering::Relaxed) {
        let record = trainer.step()?;
        if record.step % 50 == 0 {
            println!("step {}: loss {:.3}, {:.0} samples/s", record.step, record.loss, record.samples_per_second);
        }
    }
    let request = Request { prompts: &CAPTIONS, first_frames: None, seed: 1 };
    let Some(drawn) = trainer.generate(&request, &stop)? else { return Ok(()) };
    for (caption, picture) in CAPTIONS.iter().zip(drawn.pixels.chunks(64)) {
        println!("\n{caption}");
        for row in picture.chunks(8) {
            println!("{}", row.iter().map(|v| if *v > 0.0 { '#' } else { '.' }).collect::<String>());
        }
    }
    Ok(())
}
