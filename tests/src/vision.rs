//! What sees pictures, against transformers'.

use std::path::Path;

#[cfg(feature = "trainer")]
use flowtape_data::media::{CLIPImageProcessor, ReadOptions, read_picture};
use flowtape_engine::{DType, Device, Tensor};
#[cfg(feature = "trainer")]
use flowtape_models::vision::CLIPVisionModel;
use flowtape_models::vision::{Positions, Qwen25VL, SiglipVisionModel, qwen25_vl::Grid};

use crate::Outcome;
use crate::golden::{Any, Golden, exact, number, relative, text};
use crate::text::BOUND;

/// States of SigLIP's patches.
pub(crate) fn siglip(dir: &Path, _: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?, Golden::tensors(dir, "outputs")?);
    let model = SiglipVisionModel::load(dir, None, &Device::cpu())?;
    let run = model.forward(&inputs.tensor("pixel_values")?)?;
    let states = run.hidden_states.into_iter().enumerate().map(|(i, state)| (format!("hidden_states.{i}"), state));
    for (name, got) in states.chain([("last_hidden_state".to_owned(), run.last_hidden_state)]) {
        let want = outputs.tensor(&name)?;
        out.push(Outcome::measured(name, relative(&got, &want)?, BOUND, format!("{:?}", want.dims())));
    }
    Ok(())
}

/// A picture as CLIP takes it, and what CLIP makes of it.
#[cfg(feature = "trainer")]
pub(crate) fn clip(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case = Golden::open(dir, name)?.json;
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?, Golden::tensors(dir, "outputs")?);
    let picture = read_picture(&dir.join(text(&case, "picture")?), &ReadOptions::like_nemo())?;
    let pixels = CLIPImageProcessor::load(dir)?.process(&picture, &Device::cpu())?.unsqueeze(0)?;
    let want = inputs.tensor("pixel_values")?;
    out.push(Outcome::measured("pixel_values", relative(&pixels, &want)?, 1e-6, format!("{:?}", want.dims())));
    for (i, state) in CLIPVisionModel::load(dir, None, &Device::cpu())?.forward(&want)?.iter().enumerate() {
        let name = format!("hidden_states.{i}");
        let want = outputs.tensor(&name)?;
        out.push(Outcome::measured(name, relative(state, &want)?, BOUND, format!("{:?}", want.dims())));
    }
    Ok(())
}

/// Qwen2.5-VL with pictures among the words.
pub(crate) fn qwen25_vl(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case = Golden::open(dir, name)?.json;
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?, Golden::tensors(dir, "outputs")?);
    let model = Qwen25VL::load(&dir.join(text(&case, "weights")?), None, &Device::cpu())?;
    let ids = inputs.tensor("input_ids")?.to_dtype(DType::U32)?.to_vec::<u32>()?;
    let sizes = inputs.values("image_grid_thw")?;
    let grids: Vec<Grid> =
        sizes.chunks_exact(3).map(|grid| [grid[0] as usize, grid[1] as usize, grid[2] as usize]).collect();
    let seen = model.visual().forward(&inputs.tensor("pixel_values")?, &grids)?;
    let mut compare = |name: &str, got: &Tensor| -> Any<()> {
        let want = outputs.tensor(name)?;
        out.push(Outcome::measured(name, relative(got, &want)?, BOUND, format!("{:?}", want.dims())));
        Ok(())
    };
    compare("visual.blocks_out", &seen.blocks_out)?;
    compare("visual.merged", &seen.merged)?;
    let edit = model.forward(&ids, &seen.merged, &grids, Positions::Plain)?.last_hidden_state;
    compare("edit.last_hidden", &edit)?;
    let dropped = number(&case, "dropped_prefix")? as usize;
    compare("edit.prompt_embeds", &edit.narrow(1, dropped, ids.len() - dropped)?)?;
    compare("mrope.last_hidden", &model.forward(&ids, &seen.merged, &grids, Positions::Multimodal)?.last_hidden_state)?;
    let positions = model.positions(&ids, &grids);
    let by_axis: Vec<f32> = (0..3).flat_map(|axis| positions.iter().map(move |at| at[axis])).collect();
    let same = by_axis == outputs.values("mrope.position_ids")?;
    out.push(exact("mrope.position_ids", same, format!("{} tokens", ids.len())));
    Ok(())
}
