//! Text encoders against transformers'.

use std::path::Path;

use flowtape_engine::{DType, Device, Tensor};
use flowtape_models::ltx2::LTX2TextConnectors;
use flowtape_models::text::{TextModel, TextModelOutput, load, stack_layers};

use crate::Outcome;
use crate::golden::{Any, Golden, relative, text};

/// The goldens' bound on states.
pub(crate) const BOUND: f64 = 2e-5;

/// The states of a text encoder, whatever its class.
pub(crate) fn states(dir: &Path, _: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?, Golden::tensors(dir, "outputs")?);
    let model = load(dir, None, &Device::cpu())?;
    let run = |prefix: &str, masked: bool| -> Any<TextModelOutput> {
        let ids = inputs.tensor(&format!("{prefix}input_ids"))?.to_dtype(DType::U32)?;
        let mask = masked.then(|| inputs.tensor(&format!("{prefix}attention_mask"))).transpose()?;
        Ok(model.forward(&ids, mask.as_ref())?)
    };
    // Which run an output is of: what stands before its name.
    let class = text(&Golden::open(dir, "case")?.json, "class")?.to_owned();
    let plain = run("", false)?;
    let masked = run("", true)?;
    let long = inputs.has("long.input_ids").then(|| run("long.", false)).transpose()?;
    for (name, want) in outputs.under("")? {
        let parts = name.split_once('.').filter(|(run, _)| *run != "hidden_states");
        let (run, what) = parts.unwrap_or(("", &name));
        let of = match run {
            "" | "nomask" => &plain,
            "mask" | "with_mask" => &masked,
            "long" => long.as_ref().ok_or("no long.input_ids")?,
            "nemo" | "pipeline" => {
                let got = derived(&class, what, [&plain, &masked], &inputs)?;
                out.push(compare(&name, got, &want)?);
                continue;
            }
            _ => return Err(format!("unknown run of {name}").into()),
        };
        out.push(compare(&name, state(of, what)?, &want)?);
    }
    Ok(())
}

/// The states of a text model with padding on either side, and what pipelines take of them.
pub(crate) fn decoder_states(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case = Golden::open(dir, name)?.json;
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?, Golden::tensors(dir, "outputs")?);
    let model = load(dir, None, &Device::cpu())?;
    let class = text(&case, "class")?;
    for side in ["right/", "left/", ""].into_iter().filter(|side| inputs.has(&format!("{side}input_ids"))) {
        let ids = inputs.tensor(&format!("{side}input_ids"))?.to_dtype(DType::U32)?;
        let mask = inputs.tensor(&format!("{side}attention_mask"))?;
        let run = model.forward(&ids, Some(&mask))?;
        for (name, want) in outputs.under(side)?.into_iter().filter(|(name, _)| !side.is_empty() || !name.contains('/'))
        {
            let title = format!("{side}{name}");
            let got = match &*name {
                "prompt_embeds" => {
                    let layers: Vec<usize> = case["layers"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .filter_map(|l| Some(l.as_u64()? as usize))
                        .collect();
                    Some(stack_layers(&run, &layers)?)
                }
                // LTX-2's: the channel slow, the layer fast.
                "packed" => {
                    let states: Vec<&Tensor> = run.hidden_states.iter().collect();
                    Some(Tensor::stack(&states, 3)?.flatten(2, 3)?)
                }
                // Another part makes it.
                _ if name.starts_with("ltx2") => continue,
                _ => state(&run, &name)?,
            };
            out.push(compare(&title, got, &want)?);
        }
    }
    if dir.join("connectors_ltx20").exists() || dir.join("connectors_ltx23").exists() {
        connectors(dir, &*model, &inputs, &outputs, out)?;
    }
    // What is made of the states by pipelines that are not built yet is said.
    for name in outputs
        .under("")?
        .into_keys()
        .filter(|name| ["qwen_image", "hunyuan15", "nemo", "left_"].iter().any(|p| name.starts_with(p)))
    {
        out.push(Outcome::skipped(name, format!("a pipeline's of {class}")));
    }
    Ok(())
}

/// What LTX-2's connectors make of all states.
fn connectors(dir: &Path, model: &dyn TextModel, inputs: &Golden, outputs: &Golden, out: &mut Vec<Outcome>) -> Any<()> {
    let mask = inputs.tensor("attention_mask")?;
    let run = model.forward(&inputs.tensor("input_ids")?.to_dtype(DType::U32)?, Some(&mask))?;
    for kind in ["ltx20", "ltx23"].into_iter().filter(|kind| dir.join(format!("connectors_{kind}")).exists()) {
        let folder = dir.join(format!("connectors_{kind}"));
        let text = LTX2TextConnectors::load(&folder, None, &Device::cpu())?.forward(&run.hidden_states, &mask)?;
        let all = [
            ("text_embeddings", text.text_embeddings),
            ("audio_text_embeddings", text.audio_text_embeddings),
            ("text_mask", text.text_mask),
        ];
        for (name, got) in all {
            let name = format!("{kind}.{name}");
            out.push(compare(&name, Some(got), &outputs.tensor(&name)?)?);
        }
    }
    Ok(())
}

pub(crate) fn compare(name: &str, got: Option<Tensor>, want: &Tensor) -> Any<Outcome> {
    Ok(match got {
        Some(got) => Outcome::measured(name, relative(&got, want)?, BOUND, format!("{:?}", want.dims())),
        None => Outcome::not_built(name),
    })
}

/// A quantity of a run by its name.
fn state(of: &TextModelOutput, what: &str) -> Any<Option<Tensor>> {
    Ok(match what {
        "last_hidden_state" => Some(of.last_hidden_state.clone()),
        "pooler_output" => of.pooler_output.clone(),
        _ => match what.strip_prefix("hidden_states.") {
            Some(number) => of.hidden_states.get(number.parse::<usize>()?).cloned(),
            None => None,
        },
    })
}

/// What pipelines and NeMo make of the states.
fn derived(class: &str, what: &str, [plain, masked]: [&TextModelOutput; 2], inputs: &Golden) -> Any<Option<Tensor>> {
    Ok(match (class, what) {
        (_, "clip_hidden") => plain.hidden_states.iter().nth_back(1).cloned(),
        (_, "pooled_prompt_embeds") => plain.pooler_output.clone(),
        ("T5EncoderModel", "prompt_embeds") => Some(plain.last_hidden_state.clone()),
        // Wan's: what stands after the text is zero.
        ("UMT5EncoderModel", "text_embeddings") => {
            let mask = inputs.tensor("attention_mask")?.unsqueeze(2)?;
            Some(masked.last_hidden_state.mul(&mask)?)
        }
        // HunyuanVideo's glyphs: one text at a time.
        ("T5EncoderModel", "glyph_embeds") => Some(masked.last_hidden_state.narrow(0, 0, 1)?),
        ("T5EncoderModel", "glyph_mask") => Some(inputs.tensor("attention_mask")?.narrow(0, 0, 1)?),
        _ => None,
    })
}
