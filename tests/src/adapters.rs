//! Goldens of the adapters: packing and ids (`pipeline_math/packing`), prepared inputs (`pipeline_math/adapter_inputs`).

use std::path::Path;

use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::{Batch, FlowMatchingContext, ModelAdapter, Recorded, RecordedDraws, TaskType};
use flowtape_models::flux::{FluxAdapter, latent_image_ids, pack_latents, unpack_latents};

use crate::Outcome;
use crate::golden::{Any, Golden, collect, exact, relative, text};

/// All cases of the adapters. `root` is the folder of the goldens.
pub fn cases(root: &Path) -> Vec<Outcome> {
    let dir = root.join("pipeline_math");
    let mut out = collect("pipeline_math/packing", |out| packing(&dir, out));
    out.extend(collect("pipeline_math/adapter_inputs", |out| prepared(&dir, out)));
    out
}

fn same(case: String, got: &Tensor, want: &Tensor) -> Any<Outcome> {
    Ok(exact(case, got.dims() == want.dims() && got.to_vec::<f32>()? == want.to_vec::<f32>()?, "exact"))
}

fn packing(dir: &Path, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, "packing")?;
    let mut families: Vec<String> =
        golden.names().iter().filter_map(|n| Some(n.split_once('.')?.0.to_owned())).collect();
    families.sort();
    families.dedup();
    for family in families {
        let tensor = |name: &str| golden.tensor(&format!("{family}.{name}"));
        // FLUX and Qwen-Image pack alike.
        if !["flux", "qwen", "qwen_edit"].contains(&&*family) {
            out.push(Outcome::unbuilt(family));
            continue;
        }
        let latents = tensor("latents")?;
        let packed = pack_latents(&latents)?;
        out.push(same(format!("{family}.packed"), &packed, &tensor("packed")?)?);
        out.push(same(format!("{family}.unpacked"), &unpack_latents(&packed, latents.dims())?, &tensor("unpacked")?)?);
        if golden.has(&format!("{family}.img_ids")) {
            let ids = latent_image_ids(latents.dim(2)?, latents.dim(3)?, &Device::cpu())?;
            out.push(same(format!("{family}.img_ids"), &ids, &tensor("img_ids")?)?);
        }
    }
    Ok(())
}

/// What `prepare_inputs` makes of the file's fixed batch, cut to `size` samples.
fn prepare(
    golden: &Golden,
    adapter: &FluxAdapter,
    dropout: f64,
    size: usize,
    pooled: Option<&str>,
) -> Any<Vec<(String, Tensor)>> {
    let cut = |name: &str| -> Any<Tensor> { Ok(golden.tensor(name)?.narrow(0, 0, size)?.contiguous()?) };
    let noisy = cut("latents_4d")?;
    let mut text = cut("text_embeddings")?;
    if size == 1 {
        text = text.squeeze(0)?;
    }
    let mut batch = Batch::new(noisy.mul_scalar(0.5)?, "image".into()).with("text_embeddings", text);
    if let Some(key) = pooled {
        batch = batch.with(key, cut("pooled_prompt_embeds")?);
    }
    // linspace(0.1, 0.9, B)
    let sigma: Vec<f32> = (0..size).map(|i| 0.1 + 0.8 * i as f32 / (size.max(2) - 1) as f32).collect();
    let sigma = Tensor::from_vec(sigma, &[size], &Device::cpu())?;
    let cx = FlowMatchingContext {
        latents: batch.latents.clone(),
        timesteps: sigma.mul_scalar(1000.0)?,
        sigma,
        noisy_latents: noisy,
        task_type: TaskType::T2V,
        data_type: "image".into(),
        device: Device::cpu(),
        dtype: DType::F32,
        cfg_dropout_prob: dropout,
        batch: &batch,
    };
    let mut draws = RecordedDraws::new([Recorded::Uniform(golden.values("dropout_draw")?)]);
    let inputs = adapter.prepare_inputs(&cx, &mut draws)?;
    let tensors = inputs.iter().map(|(name, _)| Some((name.to_owned(), inputs.optional(name)?.clone())));
    Ok(tensors.flatten().collect())
}

fn prepared(dir: &Path, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, "adapter_inputs")?;
    for case in golden.list("cases")? {
        let name = text(case, "name")?;
        // The file states the arguments in words only; sizes and the scale are read off the results.
        let size = || Ok::<_, Box<dyn std::error::Error>>(golden.tensor(&format!("{name}/hidden_states"))?.dim(0)?);
        let plain = FluxAdapter::default();
        let inputs = match name {
            "flux_dropout" => {
                let below = text(case, "note")?.split("draw < ").nth(1).and_then(|s| s.split(';').next());
                let probability = below.ok_or("a probability in the note")?.parse()?;
                prepare(&golden, &plain, probability, size()?, Some("pooled_prompt_embeds"))?
            }
            "flux_clip_pooled_alias" => {
                let scale = golden.tensor(&format!("{name}/guidance"))?.narrow(0, 0, 1)?.item()?;
                let adapter = FluxAdapter { guidance_scale: scale, ..plain };
                prepare(&golden, &adapter, 0.0, size()?, Some("clip_pooled"))?
            }
            "flux_without_pooled" => prepare(&golden, &plain, 0.0, size()?, None)?,
            _ => {
                out.push(Outcome::unbuilt(name));
                continue;
            }
        };
        let wanted = golden.under(&format!("{name}/"))?;
        let same_keys = wanted.keys().eq(inputs.iter().map(|(name, _)| name));
        out.push(exact(format!("{name} keys"), same_keys, format!("{} tensors", wanted.len())));
        for (key, got) in inputs {
            let want = wanted.get(&key).ok_or_else(|| format!("{name}: no golden {key}"))?;
            let bound = if key == "timestep" { 2f64.powi(-23) } else { 0.0 };
            let worst = relative(&got, want)?;
            out.push(Outcome { case: format!("{name}/{key}"), worst, bound, detail: String::new() });
        }
    }
    let latents = Tensor::zeros(&[1, 2, 2, 4, 4], DType::F32, &Device::cpu())?;
    let batch = Batch::new(latents.clone(), "video".into());
    let one = Tensor::zeros(&[1], DType::F32, &Device::cpu())?;
    let cx = FlowMatchingContext {
        noisy_latents: latents.clone(),
        latents,
        timesteps: one.clone(),
        sigma: one,
        task_type: TaskType::T2V,
        data_type: "video".into(),
        device: Device::cpu(),
        dtype: DType::F32,
        cfg_dropout_prob: 0.0,
        batch: &batch,
    };
    let result = FluxAdapter::default().prepare_inputs(&cx, &mut RecordedDraws::default());
    out.push(exact("error flux_5d", result.is_err_and(|e| e.to_string().contains("4-D")), "5-D latents are an error"));
    Ok(())
}
