//! Goldens of the adapters: packing and ids (`pipeline_math/packing`), prepared inputs (`pipeline_math/adapter_inputs`).

use std::collections::BTreeMap;
use std::path::Path;

use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::{Batch, DataType, FlowMatchingContext, Recorded as Draw, RecordedDraws, TaskType};
use flowtape_models::blocks::latent_image_ids;
use flowtape_models::blocks::{ChannelOrder, patchify, unpatchify};
use flowtape_models::hunyuan_video::condition_latents;
use flowtape_models::{MODELS, ModelKind, create_adapter, flux2};
use serde_json::{Map, Value, json};

use crate::Outcome;
use crate::golden::{Any, Golden, exact, relative, text};

fn same(case: String, got: &Tensor, want: &Tensor) -> Any<Outcome> {
    Ok(exact(case, got.dims() == want.dims() && got.to_vec::<f32>()? == want.to_vec::<f32>()?, "exact"))
}

/// Tokens of patches as latents of `dims` again.
fn unpacked(tokens: &Tensor, dims: &[usize], patch: &[usize]) -> Any<Tensor> {
    let grid: Vec<usize> = dims[2..].iter().zip(patch).map(|(side, p)| side / p).collect();
    Ok(unpatchify(tokens, &grid, patch, ChannelOrder::Slowest)?)
}

pub(crate) fn packing(dir: &Path, file: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, file)?;
    let mut families: Vec<String> =
        golden.names().iter().filter_map(|n| Some(n.split_once('.')?.0.to_owned())).collect();
    families.sort();
    families.dedup();
    for family in families {
        let tensor = |name: &str| golden.tensor(&format!("{family}.{name}"));
        if family == "flux2" {
            let (latents, ids) = (tensor("latents")?, tensor("txt_ids")?);
            let (batch, height, width) = (latents.dim(0)?, latents.dim(2)?, latents.dim(3)?);
            let packed = patchify(&latents, &[1, 1])?;
            for (name, got) in [
                ("unpacked", unpacked(&packed, latents.dims(), &[1, 1])?),
                ("packed", packed),
                ("img_ids", flux2::latent_ids(height, width, batch)?),
                ("txt_ids", flux2::text_ids(ids.dim(1)?, batch)?),
            ] {
                out.push(same(format!("{family}.{name}"), &got, &tensor(name)?)?);
            }
            continue;
        }
        if family == "hunyuan" {
            for task in [TaskType::T2V, TaskType::I2V] {
                let name = format!("condition_latents_{}", task.as_str());
                let got = condition_latents(&tensor("latents")?, task)?;
                out.push(same(format!("{family}.{name}"), &got, &tensor(&name)?)?);
            }
            continue;
        }
        if family == "ltx2" {
            let (video, audio) = (tensor("video")?, tensor("audio")?);
            for (name, latents, patch) in
                [("video", video, vec![1; 3]), ("audio", audio.clone(), vec![1, audio.dim(3)?])]
            {
                let tokens = patchify(&latents, &patch)?;
                out.push(same(format!("ltx2.{name}_tokens"), &tokens, &tensor(&format!("{name}_tokens"))?)?);
                out.push(same(format!("ltx2.{name}"), &unpacked(&tokens, latents.dims(), &patch)?, &latents)?);
            }
            continue;
        }
        // FLUX and Qwen-Image pack alike.
        if !["flux", "qwen", "qwen_edit"].contains(&&*family) {
            out.push(Outcome::not_built(family));
            continue;
        }
        let latents = tensor("latents")?;
        let packed = patchify(&latents, &[2, 2])?;
        out.push(same(format!("{family}.packed"), &packed, &tensor("packed")?)?);
        let back = unpacked(&packed, latents.dims(), &[2, 2])?;
        out.push(same(format!("{family}.unpacked"), &back, &tensor("unpacked")?)?);
        if golden.has(&format!("{family}.img_ids")) {
            let ids = latent_image_ids(latents.dim(2)?, latents.dim(3)?)?;
            out.push(same(format!("{family}.img_ids"), &ids, &tensor("img_ids")?)?);
        }
    }
    Ok(())
}

/// What one case asks of an adapter, which the file states in words only.
struct Asked {
    kwargs: Value,
    dropout: f64,
    task: TaskType,
    /// Names in the batch, and the tensors of the file that they hold.
    batch: Vec<(&'static str, Tensor)>,
}

fn asked(golden: &Golden, case: &Value, name: &str) -> Any<Asked> {
    let file = |key: &str| golden.tensor(key);
    let wanted = |key: &str| golden.tensor(&format!("{name}/{key}"));
    let has = |key: &str| golden.has(&format!("{name}/{key}"));
    let text_embeddings = file("text_embeddings")?;
    let mut asked = Asked { kwargs: json!({}), dropout: 0.0, task: TaskType::T2V, batch: Vec::new() };
    // A scale is read off the results.
    let scale = || -> Any<f64> { Ok(wanted("guidance")?.narrow(0, 0, 1)?.item()?) };
    let below = case["note"].as_str().and_then(|n| n.split("draw < ").nth(1)?.split(';').next()?.parse().ok());
    match name {
        "flux_dropout" | "flux2_dropout" => asked.dropout = below.unwrap_or(DROPOUT),
        // Python's `random` decided; our draw is the file's only one for a whole batch.
        "qwen_dropout_taken" => asked.dropout = 1.0,
        "qwen_guidance" => asked.kwargs = json!({"use_guidance_embeds": true, "guidance_scale": scale()?}),
        "flux2_without_guidance" => asked.kwargs = json!({"use_guidance_embeds": false}),
        "flux_clip_pooled_alias" => asked.kwargs = json!({"guidance_scale": scale()?}),
        "hunyuan_i2v" | "hunyuan_without_masks" => asked.task = TaskType::I2V,
        "hunyuan_no_condition" => asked.kwargs = json!({"use_condition_latents": false}),
        _ => {}
    }
    match name {
        "flux_dropout" => asked.batch.push(("pooled_prompt_embeds", file("pooled_prompt_embeds")?)),
        "flux_clip_pooled_alias" => asked.batch.push(("clip_pooled", file("pooled_prompt_embeds")?)),
        _ => {}
    }
    if name.starts_with("hunyuan") {
        let images = file("image_embeds")?;
        // The default shape shows where the file's own embeddings are not taken.
        if wanted("image_embeds")?.dims() != images.dims() {
            asked.kwargs["default_image_embed_shape"] = json!(&wanted("image_embeds")?.dims()[1..]);
        }
        if ["hunyuan_i2v", "hunyuan_t2v_ignores_image_embeds"].contains(&name) {
            asked.batch.push(("image_embeds", images));
        }
        let mask = file("text_mask")?;
        if name == "hunyuan_all_masked" {
            asked.batch.push(("text_mask", mask.mul_scalar(0.0)?));
        } else if has("encoder_attention_mask") {
            asked.batch.push(("text_mask", mask.clone()));
        }
        if has("encoder_hidden_states_2") {
            asked.batch.push(("text_embeddings_2", reversed(&text_embeddings, 1)?));
            asked.batch.push(("text_mask_2", reversed(&mask, 0)?));
        }
    }
    asked.batch.push(("text_embeddings", text_embeddings));
    Ok(asked)
}

fn reversed(x: &Tensor, axis: usize) -> Any<Tensor> {
    let index: Vec<u32> = (0..x.dim(axis)? as u32).rev().collect();
    Ok(x.index_select(axis, &Tensor::from_slice(&index, &[index.len()], &Device::cpu())?)?)
}

/// The guidance dropout of the cases that do not name theirs.
const DROPOUT: f64 = 0.3;

/// What the adapter of a case makes of the file's fixed batch.
fn prepare(golden: &Golden, case: &Value, name: &str, adapter: &str) -> Any<Vec<(String, Tensor)>> {
    let Asked { kwargs, dropout, task, batch: entries } = asked(golden, case, name)?;
    let adapter = create_adapter(adapter, kwargs.as_object().ok_or("an object")?)?;
    let size = golden.tensor(&format!("{name}/timestep")).or_else(|_| golden.tensor(&format!("{name}/timesteps")))?;
    let size = size.dim(0)?;
    let cut = |x: Tensor| -> Any<Tensor> { Ok(x.narrow(0, 0, size)?.contiguous()?) };
    let data_type = ModelKind::of_adapter(adapter.name())?.capabilities.data.clone();
    let noisy = cut(golden.tensor(if data_type == DataType::Video { "latents_5d" } else { "latents_4d" })?)?;
    let mut batch = Batch::new(noisy.mul_scalar(0.5)?, data_type.clone());
    for (key, tensor) in entries {
        let tensor = cut(tensor)?;
        // One sample is given without its batch axis.
        batch = batch.with(key, if size == 1 && key == "text_embeddings" { tensor.squeeze(0)? } else { tensor });
    }
    // linspace(0.1, 0.9, B)
    let sigma: Vec<f32> = (0..size).map(|i| 0.1 + 0.8 * i as f32 / (size.max(2) - 1) as f32).collect();
    let sigma = Tensor::from_vec(sigma, &[size], &Device::cpu())?;
    let cx = FlowMatchingContext {
        latents: batch.latents.clone(),
        timesteps: sigma.mul_scalar(1000.0)?,
        sigma,
        noisy_latents: noisy,
        task_type: task,
        data_type,
        device: Device::cpu(),
        dtype: DType::F32,
        cfg_dropout_prob: dropout,
        streams: BTreeMap::new(),
        batch: &batch,
    };
    let draw =
        if name.starts_with("qwen") { Draw::Decision(0.5) } else { Draw::Uniform(golden.values("dropout_draw")?) };
    let inputs = adapter.prepare_inputs(&cx, &mut RecordedDraws::new([draw]))?;
    let tensors = inputs.iter().map(|(name, _)| Some((name.to_owned(), inputs.optional(name)?.clone())));
    Ok(tensors.flatten().collect())
}

pub(crate) fn prepared(dir: &Path, file: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, file)?;
    for case in golden.list("cases")? {
        let name = text(case, "name")?;
        let Some(adapter) = adapter_of(name) else {
            out.push(Outcome::not_built(name));
            continue;
        };
        let inputs = prepare(&golden, case, name, adapter)?;
        let wanted = golden.under(&format!("{name}/"))?;
        let same_keys = wanted.keys().eq(inputs.iter().map(|(name, _)| name));
        out.push(exact(format!("{name} keys"), same_keys, format!("{} tensors", wanted.len())));
        for (key, got) in inputs {
            let want = wanted.get(&key).ok_or_else(|| format!("{name}: no golden {key}"))?;
            let bound = if key.starts_with("timestep") { 2f64.powi(-23) } else { 0.0 };
            let worst = relative(&got, want)?;
            out.push(Outcome::measured(format!("{name}/{key}"), worst, bound, ""));
        }
    }
    for case in golden.list("errors")? {
        let name = text(case, "name")?;
        let Some(adapter) = adapter_of(name) else {
            out.push(Outcome::not_built(format!("error {name}")));
            continue;
        };
        // What the file's message names, ours names too.
        let (rank, part) = match name {
            "ltx2_missing_audio" => (5, "audio_latents"),
            "qwen_edit_no_context" => (4, "context_latents"),
            _ => (5, "4-D"),
        };
        let message = refusal(adapter, rank)?;
        out.push(exact(format!("error {name}"), message.contains(part), message));
    }
    Ok(())
}

/// The adapter that a case's name begins with, where it is built.
fn adapter_of(case: &str) -> Option<&'static str> {
    let names = [("qwen_edit", "qwen_image_edit"), ("qwen", "qwen_image")];
    let known = names.iter().find(|(prefix, _)| case.starts_with(prefix)).map(|(_, name)| *name);
    let name = known.or_else(|| case.split('_').next())?;
    MODELS.iter().map(|m| m.adapter).find(|adapter| *adapter == name)
}

/// What an adapter says to a batch of plain latents of a rank and text.
fn refusal(adapter: &str, rank: usize) -> Any<String> {
    let device = Device::cpu();
    let latents = Tensor::zeros(&[1, 2, 2, 4, 4][..rank], DType::F32, &device)?;
    let text = Tensor::zeros(&[1, 3, 4], DType::F32, &device)?;
    let batch = Batch::new(latents.clone(), "video".into()).with("text_embeddings", text);
    let one = Tensor::zeros(&[1], DType::F32, &device)?;
    let cx = FlowMatchingContext {
        noisy_latents: latents.clone(),
        latents,
        timesteps: one.clone(),
        sigma: one,
        task_type: TaskType::T2V,
        data_type: "video".into(),
        device,
        dtype: DType::F32,
        cfg_dropout_prob: 0.0,
        streams: BTreeMap::new(),
        batch: &batch,
    };
    let adapter = create_adapter(adapter, &Map::new())?;
    let result = adapter
        .stream_latents(&batch)
        .map(drop)
        .and_then(|()| adapter.prepare_inputs(&cx, &mut RecordedDraws::default()).map(drop));
    Ok(result.err().map(|e| e.to_string()).unwrap_or_default())
}
