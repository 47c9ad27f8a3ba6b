//! Goldens of reading, resizing and cropping pictures: `image_preprocess`.

use std::path::Path;

use flowtape_data::SoundCodec;
use flowtape_data::media::{
    EditAreas, Filter, Interpolation, Picture, Qwen2VLImageProcessor, ReadOptions, ResizeMode, evenly, interpolate,
    normalised, read_picture, read_sound, resize, resize_and_crop, resize_and_crop_frame, resize_to, sides_of_area,
};
use flowtape_engine::{Device, Tensor};
use flowtape_models::pipeline::PipelineFolder;
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, exact, max, number, relative, text};

/// The bytes of a picture among the outputs.
fn picture(tensor: &Tensor) -> Any<Picture> {
    let &[height, width, 3] = tensor.dims() else { return Err("a picture is [H, W, 3]".into()) };
    Ok(Picture { width, height, rgb: tensor.to_vec::<f32>()?.into_iter().map(|value| value as u8).collect() })
}

/// The greatest difference of two pictures.
fn distance(got: &Picture, want: &Picture) -> f64 {
    if (got.width, got.height) != (want.width, want.height) {
        return f64::INFINITY;
    }
    got.rgb.iter().zip(&want.rgb).map(|(a, b)| f64::from(a.abs_diff(*b))).fold(0.0, max)
}

fn same(case: String, got: &Picture, want: &Picture, bound: f64) -> Outcome {
    Outcome::measured(case, distance(got, want), bound, format!("{} x {}", want.width, want.height))
}

fn pair(value: &Value) -> Any<[usize; 2]> {
    Ok(serde_json::from_value(value.clone())?)
}

/// All that `case.json` lists.
pub(crate) fn check(dir: &Path, _: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("case.json"))?)?;
    let outputs = Golden::tensors(dir, "outputs")?;
    let list = |key: &str| case[key].as_array().cloned().unwrap_or_default();
    for image in list("images") {
        let file = text(&image, "file")?.to_owned();
        let path = dir.join("files").join(&file);
        let mut read = read_picture(&path, &ReadOptions::like_nemo())?;
        let decoded = format!("{}/decoded", image["decoded_equals"].as_str().unwrap_or(&file));
        if outputs.has(&decoded) {
            let want = picture(&outputs.tensor(&decoded)?)?;
            // Decoders of JPEG differ by their rounding, and by how they fill in subsampled colours.
            let bound = match (image["lossless"].as_bool(), file.contains("420") || file.contains("progressive")) {
                (Some(true), _) => 0.0,
                (_, true) => 4.0,
                _ => 2.0,
            };
            out.push(same(format!("{file}/decoded"), &read, &want, bound));
            read = want;
        }
        let [width, height] = pair(&image["bucket_resolution"])?;
        let cropped = resize_and_crop(&read, width, height);
        let offset: [i64; 2] = serde_json::from_value(image["crop_offset_xy"].clone())?;
        out.push(exact(format!("{file}/crop_offset"), cropped.offset == offset, format!("{offset:?}")));
        let bucketed = format!("{file}/bucketed");
        if outputs.has(&bucketed) {
            out.push(same(bucketed.clone(), &cropped.picture, &picture(&outputs.tensor(&bucketed)?)?, 0.0));
        }
        let tensor = format!("{file}/tensor");
        if outputs.has(&tensor) {
            let want = outputs.tensor(&tensor)?;
            let got = cropped.picture.pixels(&Device::cpu())?.unsqueeze(0)?;
            let (a, b) = (got.to_vec::<f64>()?, want.to_vec::<f64>()?);
            let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, max);
            let worst = if got.dims() == want.dims() { worst } else { f64::INFINITY };
            out.push(Outcome::measured(tensor, worst, 1e-6, format!("{:?}", want.dims())));
        }
        let upright = format!("{file}/load_image");
        if outputs.has(&upright) {
            let read = read_picture(&path, &ReadOptions { orientation: true, ..ReadOptions::like_nemo() })?;
            out.push(same(upright.clone(), &read, &picture(&outputs.tensor(&upright)?)?, 2.0));
        }
    }
    let rgb = picture(&outputs.tensor("rgb.png/decoded")?)?;
    for target in list("targets_on_rgb_png") {
        let [width, height] = pair(&target["target"])?;
        let (name, source) = match target["name"].as_str() {
            Some(name) => (format!("{name}/output"), picture(&outputs.tensor(&format!("{name}/input"))?)?),
            None => (format!("target/{width}x{height}"), rgb.clone()),
        };
        let cropped = resize_and_crop(&source, width, height);
        let offset: [i64; 2] = serde_json::from_value(target["crop_offset_xy"].clone())?;
        out.push(exact(format!("{name}/crop_offset"), cropped.offset == offset, format!("{offset:?}")));
        out.push(same(name.clone(), &cropped.picture, &picture(&outputs.tensor(&name)?)?, 0.0));
    }
    for filter in list("filters_on_rgb_png") {
        let (name, width, height): (String, usize, usize) = serde_json::from_value(filter)?;
        let by = match &*name {
            "nearest" => Filter::Nearest,
            "box" => Filter::Box,
            "bilinear" => Filter::Bilinear,
            "bicubic" => Filter::Bicubic,
            "lanczos" => Filter::Lanczos,
            other => return Err(format!("the filter {other}").into()),
        };
        let case = format!("filter/{name}/{width}x{height}");
        out.push(same(case.clone(), &resize(&rgb, width, height, by), &picture(&outputs.tensor(&case)?)?, 0.0));
    }
    for edit in list("edit") {
        let (file, [width, height]) = (text(&edit, "file")?, pair(&edit["size"])?);
        let name = format!("edit/{file}/{}", edit["max_pixels"]);
        if outputs.has(&name) {
            let source = read_picture(&dir.join("files").join(file), &ReadOptions::like_nemo())?;
            let resized = resize(&source, width, height, Filter::Lanczos);
            out.push(same(name.clone(), &resized, &picture(&outputs.tensor(&name)?)?, 0.0));
        }
    }
    processors(dir, &case, &outputs, out)?;
    if outputs.has("postprocess/input") {
        let pixels = outputs.tensor("postprocess/input")?.squeeze(0)?;
        let want = picture(&outputs.tensor("postprocess/uint8")?)?;
        out.push(same("postprocess/uint8".into(), &Picture::from_pixels(&pixels)?, &want, 0.0));
    }
    films(&list("video"), &outputs, out)
}

/// Frames of films at other sizes, through OpenCV.
fn films(list: &[Value], outputs: &Golden, out: &mut Vec<Outcome>) -> Any<()> {
    if list.is_empty() {
        return Ok(());
    }
    let all = outputs.tensor("video/frames")?;
    let count = all.dim(0)?;
    let frames = (0..count).map(|i| picture(&all.narrow(0, i, 1)?.squeeze(0)?)).collect::<Any<Vec<_>>>()?;
    for film in list {
        let (key, [height, width]) = (text(film, "key")?, pair(&film["target_hw"])?);
        let by = match key.split('/').nth(1).unwrap_or_default().trim_end_matches("_stretch") {
            "nearest" => Interpolation::Nearest,
            "bilinear" => Interpolation::Linear,
            "bicubic" => Interpolation::Cubic,
            "area" => Interpolation::Area,
            "lanczos" => Interpolation::Lanczos4,
            other => return Err(format!("the interpolation {other}").into()),
        };
        let wanted: Vec<usize> = serde_json::from_value(film["indices"].clone())?;
        out.push(exact(format!("{key}/indices"), evenly(count, wanted.len()) == wanted, format!("{wanted:?}")));
        let want = outputs.tensor(key)?;
        let mut worst = 0.0;
        for (i, index) in wanted.into_iter().enumerate() {
            let got = match film["center_crop"].as_bool() {
                Some(true) => resize_and_crop_frame(&frames[index], width, height, by).picture,
                _ => interpolate(&frames[index], width, height, by),
            };
            worst = max(worst, distance(&got, &picture(&want.narrow(0, i, 1)?.squeeze(0)?)?));
        }
        let bound = if by == Interpolation::Nearest { 0.0 } else { 1.0 };
        out.push(Outcome::measured(key.to_owned(), worst, bound, format!("{:?}", want.dims())));
    }
    // What a film is before it is encoded, and its first frame.
    if outputs.has("video/load_video") {
        let want = outputs.tensor("video/load_video")?;
        let &[1, 3, taken, height, width] = want.dims() else {
            return Err("video/load_video is [1, 3, F, H, W]".into());
        };
        let fitted = |index: usize| resize_and_crop_frame(&frames[index], width, height, Interpolation::Linear).picture;
        let indices = evenly(count, taken);
        let pixels = indices.iter().map(|index| Ok(fitted(*index).pixels(&Device::cpu())?)).collect::<Any<Vec<_>>>()?;
        let got = Tensor::stack(&pixels.iter().collect::<Vec<_>>(), 1)?.to_vec::<f64>()?;
        let worst = got.iter().zip(want.to_vec::<f64>()?).map(|(a, b)| (a - b).abs()).fold(0.0, max);
        // One level of OpenCV's.
        out.push(Outcome::measured("video/load_video", worst, 2.0 / 255.0 + 1e-6, format!("{:?}", want.dims())));
        let first = picture(&outputs.tensor("video/first_frame")?)?;
        out.push(same("video/first_frame".into(), &fitted(0), &first, 1.0));
    }
    Ok(())
}

/// What vision encoders and editing pipelines make of pictures.
fn processors(dir: &Path, case: &Value, outputs: &Golden, out: &mut Vec<Outcome>) -> Any<()> {
    let rgb = picture(&outputs.tensor("rgb.png/decoded")?)?;
    let mut compare = |name: &str, got: &Tensor| -> Any<()> {
        let want = outputs.tensor(name)?;
        let (a, b) = (got.to_vec::<f64>()?, want.to_vec::<f64>()?);
        let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, max);
        let worst = if got.dims() == want.dims() { worst } else { f64::INFINITY };
        out.push(Outcome::measured(name, worst, 1e-6, format!("{:?}", want.dims())));
        Ok(())
    };
    if case["qwen2vl"].is_object() {
        let mut config = case["qwen2vl"].clone();
        for (ours, theirs) in [("image_mean", "mean"), ("image_std", "std")] {
            config[ours] = config[theirs].clone();
        }
        let processor = Qwen2VLImageProcessor::from_json(&config)?;
        let (mut patches, mut grids) = (Vec::new(), Vec::new());
        for file in case["qwen2vl"]["images"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            let source = read_picture(&dir.join("files").join(file), &ReadOptions::like_nemo())?;
            let (seen, grid) = processor.process(&source, &Device::cpu())?;
            patches.push(seen);
            grids.extend(grid.map(|count| count as f32));
        }
        compare("qwen2vl/pixel_values", &Tensor::cat(&patches.iter().collect::<Vec<_>>(), 0)?)?;
        compare("qwen2vl/image_grid_thw", &Tensor::from_slice(&grids, &[grids.len() / 3, 3], &Device::cpu())?)?;
    }
    if let Some(side) = case["siglip"]["size"].as_u64().map(|side| side as usize) {
        let three = |key: &str| serde_json::from_value(case["siglip"][key].clone());
        let resized = resize(&rgb, side, side, Filter::Bicubic);
        let got = normalised(&resized, three("mean")?, three("std")?, &Device::cpu())?;
        compare("siglip/pixel_values", &got.unsqueeze(0)?)?;
    }
    for mode in case["vae_image_processor"].as_array().into_iter().flatten() {
        let name = format!("vae_image_processor/{}", text(mode, "resize_mode")?);
        let sides = serde_json::from_value::<[usize; 2]>(serde_json::json!([mode["width"], mode["height"]]))?;
        let by = match text(mode, "resize_mode")? {
            "default" => ResizeMode::Default,
            "fill" => ResizeMode::Fill,
            "crop" => ResizeMode::Crop,
            other => return Err(format!("the resize_mode {other}").into()),
        };
        compare(&name, &resize_to(&rgb, sides[0], sides[1], by).pixels(&Device::cpu())?.unsqueeze(0)?)?;
    }
    for geometry in case["edit_geometry"].as_array().into_iter().flatten() {
        let ([width, height], want) = (pair(&geometry["image"])?, pair(&geometry["condition_size"])?);
        let got = sides_of_area(EditAreas::default().condition, width, height);
        out.push(exact(format!("edit_geometry/{width}x{height}"), got == want, format!("{got:?}")));
    }
    Ok(())
}

/// The sound of a film as it is encoded, by the autoencoder of the kept goldens.
pub(crate) fn sound(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case = Golden::open(dir, name)?.json;
    let pipeline = PipelineFolder::open(&dir.join("../../goldens/pipe_ltx2/pipeline"))?;
    let seconds = number(&case, "frames")? / pipeline.kind()?.generation.fps;
    let heard = read_sound(&dir.join(text(&case, "sound")?), seconds, SoundCodec::format(&pipeline)?, false)?;
    let got = SoundCodec::load(&pipeline, &Device::cpu())?.encode(&heard.ok_or("no sound")?)?;
    let want = Golden::tensors(dir, "outputs")?.tensor("audio_latents")?;
    let bound = number(&case["tolerance"], "audio_latents")?;
    out.push(Outcome::measured("audio_latents", relative(&got, &want)?, bound, format!("{:?}", want.dims())));
    Ok(())
}
