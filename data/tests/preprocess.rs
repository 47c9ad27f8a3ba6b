//! A folder of the project's own pictures through its pipeline, into a cache.
#![allow(clippy::unwrap_used, clippy::panic)] // a test

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use flowtape_data::media::{FolderOptions, Picture, list_pictures, write_film};
use flowtape_data::preprocess::{PictureOptions, Preprocess, Preprocessed, Progress};
use flowtape_data::{CacheSource, LatentCodec, Media, Sample, Source, Text, VaeCodec};
use flowtape_engine::safetensors::SafeTensors;
use flowtape_engine::{Device, Philox, Tensor};
use flowtape_models::pipeline::PipelineFolder;
use flowtape_models::vae::TileSizes;

fn emoji() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("emoji")
}

/// The lines of the metadata for these files.
fn metadata(names: &[&str]) -> String {
    let all = std::fs::read_to_string(emoji().join("pictures/food/metadata.jsonl")).unwrap();
    let named = |line: &&str| names.iter().any(|name| line.contains(&format!("\"{name}\"")));
    all.lines().filter(named).map(|line| format!("{line}\n")).collect()
}

/// A folder with some of the emoji.
fn pictures(names: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in names {
        std::fs::copy(emoji().join("pictures/food").join(name), folder.path().join(name)).unwrap();
    }
    std::fs::write(folder.path().join("metadata.jsonl"), metadata(names)).unwrap();
    folder
}

fn run(folder: &Path, cache: &Path, workers: usize, max_pixels: usize) -> flowtape_data::Result<Preprocessed> {
    let pipeline = PipelineFolder::open(&emoji().join("pipeline"))?;
    let pictures = PictureOptions { max_pixels, ..PictureOptions::default() };
    let preprocess = Preprocess { pictures, workers, ..Preprocess::new(pipeline) };
    let items = list_pictures(folder, &FolderOptions::default())?;
    let mut last = Progress::default();
    let done = preprocess.run(&items, cache, &Device::cpu(), &AtomicBool::new(false), &mut |at| last = at)?;
    assert_eq!(last, Progress { done: items.len(), total: items.len() });
    Ok(done)
}

#[test]
fn what_is_cached_is_skipped_and_what_changed_is_encoded() {
    let folder = pictures(&["apple.png", "avocado.png", "bacon.png"]);
    let cache = tempfile::tempdir().unwrap();
    let first = run(folder.path(), cache.path(), 2, 4096).unwrap();
    assert_eq!((first.keys.len(), first.encoded, first.failed.len()), (3, 3, 0));
    let source = CacheSource::open(cache.path()).unwrap().select(&first.keys).unwrap();
    assert_eq!(source.header(0).unwrap().dims, [3, 64, 64]);
    assert!(source.caption(0).unwrap().is_some_and(|caption| caption.contains("red apple")));
    let sample = source.read(0, &mut Philox::new(0)).unwrap();
    let (Media::Latents(latents), Text::Embeddings(text)) = (&sample.media, &sample.text) else { panic!("encoded") };
    assert_eq!(latents.dims(), [16, 8, 8]);
    assert_eq!(
        (text.tensors["text_embeddings"].dims(), text.tensors["pooled_prompt_embeds"].dims()),
        (&[32, 128][..], &[96][..])
    );
    // What the autoencoder makes of the latents is near the picture: 26 dB over all of them, says their description.
    let pipeline = PipelineFolder::open(&emoji().join("pipeline")).unwrap();
    let decoded = VaeCodec::load(&pipeline, &Device::cpu()).unwrap().decode(&latents.unsqueeze(0).unwrap()).unwrap();
    let picture = flowtape_data::media::read_picture(&folder.path().join("apple.png"), &Default::default()).unwrap();
    let wanted = picture.pixels(&Device::cpu()).unwrap().to_vec::<f32>().unwrap();
    let error: f32 = decoded.to_vec::<f32>().unwrap().iter().zip(&wanted).map(|(a, b)| (a - b).powi(2)).sum();
    let decibel = 10.0 * (4.0 * wanted.len() as f64 / f64::from(error)).log10();
    assert!(decibel > 18.0, "{decibel} dB");

    // Again, with other threads: nothing to do, and the order is the folder's.
    let again = run(folder.path(), cache.path(), 1, 4096).unwrap();
    assert_eq!((again.keys, again.encoded), (first.keys.clone(), 0));
    // Another caption is another sample; a picture that is gone is not trained on.
    let lines = metadata(&["apple.png", "avocado.png"]).replace("red apple", "crimson apple");
    std::fs::write(folder.path().join("metadata.jsonl"), lines).unwrap();
    std::fs::remove_file(folder.path().join("bacon.png")).unwrap();
    let changed = run(folder.path(), cache.path(), 3, 4096).unwrap();
    assert_eq!((changed.keys.len(), changed.encoded), (2, 1));
    assert!(changed.keys[0] != first.keys[0] && changed.keys[1] == first.keys[1]);
}

#[test]
fn a_damaged_picture_is_named_and_other_settings_are_refused() {
    let folder = pictures(&["apple.png", "avocado.png", "bacon.png"]);
    std::fs::write(folder.path().join("bacon.png"), "no picture").unwrap();
    let cache = tempfile::tempdir().unwrap();
    let done = run(folder.path(), cache.path(), 2, 4096).unwrap();
    assert_eq!((done.keys.len(), done.failed.len()), (2, 1));
    assert!(done.failed[0].to_string().contains("bacon.png"), "{}", done.failed[0]);
    let error = run(folder.path(), cache.path(), 2, 16384).unwrap_err().to_string();
    assert!(error.contains("name another folder"), "{error}");
}

#[test]
fn tiles_are_encoded_by_themselves_in_a_cache_of_their_own() {
    let folder = pictures(&["apple.png"]);
    let items = list_pictures(folder.path(), &FolderOptions::default()).unwrap();
    let encoded = |cache: &Path, side: Option<usize>| {
        let pictures = PictureOptions { max_pixels: 4096, ..PictureOptions::default() };
        let whole = Preprocess::new(PipelineFolder::open(&emoji().join("pipeline")).unwrap());
        let preprocess = Preprocess { pictures, tiles: TileSizes { side, frames: None }, ..whole };
        preprocess.run(&items, cache, &Device::cpu(), &AtomicBool::new(false), &mut |_| {})?;
        match CacheSource::open(cache)?.read(0, &mut Philox::new(0))?.media {
            Media::Latents(latents) => Ok::<_, flowtape_data::Error>(latents),
            _ => panic!("encoded"),
        }
    };
    let caches = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let whole = encoded(caches[0].path(), None).unwrap();
    let tiled = encoded(caches[1].path(), Some(whole.dims()[1] * 8 / 2)).unwrap();
    assert_eq!(tiled.dims(), whole.dims());
    let (tiled, whole) = (tiled.to_vec::<f32>().unwrap(), whole.to_vec::<f32>().unwrap());
    let off: f32 = tiled.iter().zip(&whole).map(|(a, b)| (a - b).powi(2)).sum();
    let size: f32 = whole.iter().map(|a| a.powi(2)).sum();
    // Group norms see a tile alone.
    assert!(off > 0.0 && off < 0.3 * size, "{off} of {size}");
    let error = encoded(caches[0].path(), Some(64)).unwrap_err().to_string();
    assert!(error.contains("name another folder"), "{error}");
    let cache = tempfile::tempdir().unwrap();
    let error = encoded(cache.path(), Some(4)).unwrap_err().to_string();
    assert!(error.contains("at least 8 pixels"), "{error}");
}

#[test]
fn what_is_made_of_pictures_beside_a_sample_tells_caches_apart() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/own_goldens/pipe_hunyuan15_i2v/pipeline");
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&golden, folder.path());
    let header = || Preprocess::new(PipelineFolder::open(folder.path()).unwrap()).header().unwrap();
    let before = header();
    assert_eq!(before, header());
    let path = folder.path().join("feature_extractor/preprocessor_config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["image_mean"] = serde_json::json!([0.25, 0.5, 0.5]);
    std::fs::write(&path, config.to_string()).unwrap();
    let after = header();
    assert!(after.fingerprint != before.fingerprint && after.weights == before.weights);
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy_folder(&path, &target),
            false => drop(std::fs::copy(&path, &target).unwrap()),
        }
    }
}

/// Films through Wan's autoencoder, and pictures through Qwen-Image's, which is one of films.
#[test]
fn films_and_pictures_go_through_autoencoders_of_films() {
    let folder = tempfile::tempdir().unwrap();
    let frame = |level: usize| Picture { width: 40, height: 30, rgb: vec![(level * 20) as u8; 40 * 30 * 3] };
    for (name, frames) in [("a.png", 9), ("b.png", 5), ("still.png", 1)] {
        let film: Vec<Picture> = (0..frames).map(frame).collect();
        write_film(&folder.path().join(name), &film, 8.0, &[]).unwrap();
        std::fs::write(folder.path().join(name).with_extension("txt"), format!("film {name}")).unwrap();
    }
    std::fs::write(folder.path().join("c.gif"), b"GIF89a").unwrap();
    std::fs::write(folder.path().join("c.txt"), "broken").unwrap();
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    let items = list_pictures(folder.path(), &FolderOptions::default()).unwrap();
    for (pipeline, frames, pixels, latents) in [
        ("pipe_wan", Some(5), &[3, 5, 32, 48][..], &[4, 2, 4, 6][..]),
        ("pipe_qwen_image", None, &[3, 32, 48], &[4, 4, 6]),
    ] {
        let cache = tempfile::tempdir().unwrap();
        let preprocess = Preprocess {
            pictures: PictureOptions { quantization: 16, max_pixels: 32 * 48, ..PictureOptions::default() },
            frames,
            ..Preprocess::new(PipelineFolder::open(&goldens.join(pipeline).join("pipeline")).unwrap())
        };
        let stop = AtomicBool::new(false);
        let done = preprocess.run(&items, cache.path(), &Device::cpu(), &stop, &mut |_| {}).unwrap();
        assert_eq!((done.encoded, done.failed.len()), (3, 1));
        assert!(done.failed[0].to_string().contains("c.gif"), "{}", done.failed[0]);
        let source = CacheSource::open(cache.path()).unwrap();
        for index in 0..source.len() {
            assert_eq!(source.header(index).unwrap().dims, pixels);
            let Media::Latents(got) = source.read(index, &mut Philox::new(0)).unwrap().media else { panic!("encoded") };
            assert_eq!(got.dims(), latents);
        }
    }
}

/// What the real diffusers made of the same files.
fn own_golden(name: &str) -> (PathBuf, SafeTensors) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/own_goldens").join(name);
    let outputs = SafeTensors::open(folder.join("outputs.safetensors")).unwrap();
    (folder, outputs)
}

fn assert_near(got: &Tensor, want: &Tensor, bound: f64) {
    let (got, want) = (got.to_vec::<f64>().unwrap(), want.to_vec::<f64>().unwrap());
    assert_eq!(got.len(), want.len());
    let greatest = want.iter().fold(0f64, |most, value| most.max(value.abs()));
    let worst = got.iter().zip(&want).fold(0f64, |worst, (a, b)| worst.max((a - b).abs()));
    assert!(worst <= bound * greatest, "{worst} of {greatest}");
}

#[test]
fn reference_images_are_encoded_beside_what_was_made_of_them() {
    let (golden, outputs) = own_golden("pipe_flux2_klein_edit");
    let folder = tempfile::tempdir().unwrap();
    for name in ["first.png", "last.png"] {
        std::fs::copy(golden.join(name), folder.path().join(name)).unwrap();
    }
    std::fs::copy(golden.join("first.png"), folder.path().join("made.png")).unwrap();
    let line = r#"{"file_name": "made.png", "text": "a fox", "references": ["first.png", "last.png"]}"#;
    std::fs::write(folder.path().join("metadata.jsonl"), line).unwrap();
    let items = list_pictures(folder.path(), &FolderOptions::default()).unwrap();
    let preprocess = Preprocess {
        pictures: PictureOptions { quantization: 16, max_pixels: 112 * 96, ..PictureOptions::default() },
        ..Preprocess::new(PipelineFolder::open(&golden.join("pipeline")).unwrap())
    };
    let cache = tempfile::tempdir().unwrap();
    let run =
        || preprocess.run(&items, cache.path(), &Device::cpu(), &AtomicBool::new(false), &mut |_| {}).unwrap().encoded;
    // Encoded once.
    assert_eq!((run(), run()), (1, 0));
    let sample = CacheSource::open(cache.path()).unwrap().read(0, &mut Philox::new(0)).unwrap();
    assert_eq!(sample.tensors.len(), 2);
    for (name, tensor) in &sample.tensors {
        assert_near(tensor, &outputs.get(name, &Device::cpu(), None).unwrap(), 2e-5);
    }
    // Another reference is another sample.
    std::fs::copy(golden.join("first.png"), folder.path().join("last.png")).unwrap();
    assert_eq!(run(), 1);
    let refused = Preprocess { last_frame: true, ..preprocess };
    let error = refused.run(&items, cache.path(), &Device::cpu(), &AtomicBool::new(false), &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("--last-frame"), "{error}");
}

/// The sample that a pipeline makes of the golden's five frames, of the golden's size.
fn film_sample(golden: &Path, size: [usize; 2], last_frame: bool) -> Sample {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("film")).unwrap();
    for frame in 0..5 {
        let name = format!("film/{frame}.png");
        std::fs::copy(golden.join(&name), folder.path().join(&name)).unwrap();
    }
    std::fs::write(folder.path().join("film.txt"), "a film").unwrap();
    let items = list_pictures(folder.path(), &FolderOptions::default()).unwrap();
    let preprocess = Preprocess {
        pictures: PictureOptions { quantization: 8, max_pixels: size[0] * size[1], ..PictureOptions::default() },
        frames: Some(5),
        last_frame,
        ..Preprocess::new(PipelineFolder::open(&golden.join("pipeline")).unwrap())
    };
    let cache = tempfile::tempdir().unwrap();
    let done = preprocess.run(&items, cache.path(), &Device::cpu(), &AtomicBool::new(false), &mut |_| {}).unwrap();
    assert_eq!((done.encoded, done.failed.len()), (1, 0));
    let source = CacheSource::open(cache.path()).unwrap();
    assert_eq!(source.header(0).unwrap().dims, [3, 5, size[0], size[1]]);
    source.read(0, &mut Philox::new(0)).unwrap()
}

#[test]
fn the_first_and_the_last_frame_of_a_film_are_given_beside_it() {
    let (golden, outputs) = own_golden("pipe_wan_flf2v");
    let sample = film_sample(&golden, [32, 48], true);
    // The embeddings are kept in bf16.
    for (name, bound) in [("condition_latents", 2e-5), ("image_embeds", 1.0 / 256.0)] {
        let want = outputs.get(&format!("film/{name}"), &Device::cpu(), None).unwrap();
        assert_near(&sample.tensors[name], &want, bound);
    }
}

#[test]
fn a_vision_encoder_sees_the_first_frame_as_the_film_has_it() {
    let (golden, outputs) = own_golden("pipe_hunyuan15_i2v");
    let case: serde_json::Value = serde_json::from_slice(&std::fs::read(golden.join("case.json")).unwrap()).unwrap();
    let side = |name: &str| case["runs"]["first"][name].as_u64().unwrap() as usize;
    let sample = film_sample(&golden, [side("height"), side("width")], false);
    // Its latents are the film's own: those of the first frame alone.
    assert_eq!(sample.tensors.keys().collect::<Vec<_>>(), ["image_embeds"]);
    let want = outputs.get("film/image_embeds", &Device::cpu(), None).unwrap();
    assert_near(&sample.tensors["image_embeds"], &want, 1.0 / 256.0);
}

#[test]
fn films_are_encoded_with_their_sound() {
    let (golden, outputs) = own_golden("ltx2_sound");
    let pipeline = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/pipe_ltx2/pipeline");
    let folder = tempfile::tempdir().unwrap();
    let frame = |level: usize| Picture { width: 40, height: 30, rgb: vec![(level * 20) as u8; 40 * 30 * 3] };
    let film: Vec<Picture> = (0..9).map(frame).collect();
    for name in ["loud", "silent"] {
        write_film(&folder.path().join(name).with_extension("png"), &film, 24.0, &[]).unwrap();
        std::fs::write(folder.path().join(name).with_extension("txt"), name).unwrap();
    }
    std::fs::copy(golden.join("film.wav"), folder.path().join("loud.wav")).unwrap();
    let items = list_pictures(folder.path(), &FolderOptions::default()).unwrap();
    let preprocess = |frames, silence| Preprocess {
        pictures: PictureOptions { quantization: 16, max_pixels: 32 * 48, ..PictureOptions::default() },
        frames,
        silence,
        ..Preprocess::new(PipelineFolder::open(&pipeline).unwrap())
    };
    let cache = tempfile::tempdir().unwrap();
    let run = |frames, silence| {
        preprocess(frames, silence).run(&items, cache.path(), &Device::cpu(), &AtomicBool::new(false), &mut |_| {})
    };
    assert!(run(None, false).unwrap_err().to_string().contains("--frames"));
    let done = run(Some(9), false).unwrap();
    assert_eq!((done.encoded, done.failed.len()), (1, 1));
    let error = format!("{:?}", done.failed[0]);
    assert!(error.contains("silent.png") && error.contains("--silence"), "{error}");
    // With silence the other one is there as well.
    let done = run(Some(9), true).unwrap();
    assert_eq!((done.encoded, done.failed.len(), done.keys.len()), (1, 0, 2));
    let source = CacheSource::open(cache.path()).unwrap();
    let heard = |index| source.read(index, &mut Philox::new(0)).unwrap().tensors["audio_latents"].clone();
    let want = outputs.get("audio_latents", &Device::cpu(), None).unwrap();
    assert_eq!(heard(0).dims(), want.dims());
    assert_near(&heard(0), &want, 2e-5);
    assert!(heard(1).dims() == want.dims() && heard(1).to_vec::<f32>().unwrap() != heard(0).to_vec::<f32>().unwrap());
    // Another sound is another sample.
    std::fs::copy(golden.join("film.wav"), folder.path().join("silent.wav")).unwrap();
    let done = run(Some(9), true).unwrap();
    assert_eq!((done.encoded, done.failed.len()), (1, 0));
}
