//! Pipelines that edit pictures: how these are taken, and what becomes of them.

use std::path::Path;

use flowtape_data::media::{
    ConditionProcessor, EditAreas, Filter, Qwen2VLImageProcessor, ReadOptions, condition_image, read_picture, resize,
};
use flowtape_engine::{Device, Tensor};
use flowtape_models::pipeline::{ConditionImage, PipelineFolder, PromptEncoder, QwenImageEditPrompts};
use flowtape_models::vae;
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, exact, number, relative, text};
use crate::pipelines::generate;

/// The pictures that a run goes by, as its pipeline takes them.
pub(crate) fn conditions(dir: &Path, asked: &Value) -> Any<Vec<ConditionImage>> {
    let files = asked["images"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let pictures = files.map(|file| read_picture(&dir.join(file), &ReadOptions::like_nemo()));
    let pictures = pictures.collect::<Result<Vec<_>, _>>()?;
    if pictures.is_empty() {
        return Ok(Vec::new());
    }
    let folder = PipelineFolder::open(&dir.join("pipeline"))?;
    let size = [number(asked, "height")? as usize, number(asked, "width")? as usize];
    // Else the picture's own has to be found.
    let size = (asked["own_size"] != true).then_some(size);
    Ok(ConditionProcessor::load(&folder)?.process_all(&pictures, size, &Device::cpu())?)
}

/// A folder of editing: how its pictures are taken, its prompts among them, and its run.
pub(crate) fn check(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case = Golden::open(dir, name)?.json;
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?, Golden::tensors(dir, "outputs")?);
    let folder = PipelineFolder::open(&dir.join("pipeline"))?;
    let device = Device::cpu();
    let area = |key: &str| number(&case["narrowed_constants"], key).map(|area| area as usize);
    let areas = EditAreas { condition: area("CONDITION_IMAGE_SIZE")?, vae: area("VAE_IMAGE_SIZE")? };
    let processor = Qwen2VLImageProcessor::load(&folder.part("processor")?)?;
    let files: Vec<&str> = case["images"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let read = |file: &str| read_picture(&dir.join(file), &ReadOptions::like_nemo());
    let taken = |file: &&str| Ok(condition_image(&read(file)?, &processor, areas, &device)?);
    let images = files.iter().map(taken).collect::<Any<Vec<ConditionImage>>>()?;
    let patches: Vec<&Tensor> = images.iter().filter_map(|image| Some(&image.seen.as_ref()?.values)).collect();
    let worst = relative(&Tensor::cat(&patches, 0)?, &inputs.tensor("pixel_values")?)?;
    out.push(Outcome::measured("pixel_values", worst, 1e-6, format!("{} pictures", images.len())));
    let run = &case["run"];
    let encoder = QwenImageEditPrompts::load(&folder, &device)?;
    let tokens = encoder.tokens(text(run, "prompt")?, &images)?;
    let ids: Vec<u32> = inputs.values("input_ids")?.into_iter().map(|id| id as u32).collect();
    out.push(exact("input_ids", tokens == ids, format!("{} tokens", ids.len())));
    let encoded = encoder.encode_with_images(&[text(run, "prompt")?], &images, None)?;
    let states = encoded.first().and_then(|one| one.get("text_embeddings")).ok_or("no text_embeddings")?;
    for name in ["prompt_embeds", "nemo/prompt_embeddings"] {
        let want = outputs.tensor(name)?;
        let worst = relative(&states.reshape(want.dims())?, &want)?;
        out.push(Outcome::measured(
            name,
            worst,
            number(&case["tolerance"], "prompt tensors")?,
            format!("{:?}", want.dims()),
        ));
    }
    generate(dir, &case, "edit", run, &images, out)?;
    // NeMo takes other sizes.
    let vae = vae::load(&folder.part("vae")?, None, &device)?;
    let sizes = &case["nemo"]["metadata"]["preprocessed_pixel_shapes"];
    let contexts =
        files.iter().enumerate().map(|(i, file)| (format!("context_latent.{i}"), *file, &sizes["contexts"][i]));
    for (name, file, size) in contexts.chain([("target_latent".to_owned(), "target.png", &sizes["target"])]) {
        let [height, width]: [usize; 2] = serde_json::from_value(size.clone())?;
        let pixels = resize(&read(file)?, width, height, Filter::Lanczos).pixels(&device)?;
        let latents = vae.normalise(&vae.encode(&pixels.unsqueeze(1)?.unsqueeze(0)?)?.mean)?;
        let name = format!("nemo/{name}");
        let want = outputs.tensor(&name)?;
        let worst = relative(&latents.reshape(want.dims())?, &want)?;
        out.push(Outcome::measured(
            name,
            worst,
            number(&case["tolerance"], "nemo latents")?,
            format!("{:?}", want.dims()),
        ));
    }
    Ok(())
}
