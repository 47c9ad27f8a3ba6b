//! What the binary reads and writes: weights of every kind, folders, pictures, and who may read them.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use common::{RECIPE, SMALL, failure, flowtape, stdout, train};

mod common;

#[test]
fn all_pictures_that_cannot_be_read_are_named_and_films_are_refused_where_there_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    for name in ["one", "two"] {
        std::fs::write(folder.path().join(name).with_extension("png"), "no picture").unwrap();
        std::fs::write(folder.path().join(name).with_extension("txt"), name).unwrap();
    }
    let preprocess = |more: &[&str]| {
        let pipeline = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/emoji/pipeline");
        let paths = [folder.path(), cache.as_path()].map(|path| path.to_str().unwrap());
        let arguments = ["preprocess", paths[0], "--model", pipeline, "--out", paths[1], "--max-pixels", "4096"];
        failure(&flowtape(&[&arguments[..], more].concat()))
    };
    let error = preprocess(&["--frames", "5"]);
    assert!(error.contains("FluxPipeline makes pictures, not films") && !cache.exists(), "{error}");
    let error = preprocess(&[]);
    assert!(["one", "two"].iter().all(|name| error.contains(&format!("{name}.png can't be read"))), "{error}");
}

#[test]
fn a_folder_without_an_adapter_is_told_what_has_one() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens/flux_step");
    let error = failure(&flowtape(&["merge", golden, "--lora", golden, "--out", "never"]));
    assert!(error.contains("no adapter in this folder") && error.contains("RUN/checkpoints/LATEST"), "{error}");
}

#[test]
fn inspect_counts_presets_configurations_folders_files_and_runs() {
    let json =
        |target: &str| -> Value { serde_json::from_str(&stdout(&flowtape(&["inspect", target, "--json"]))).unwrap() };
    let preset = json("flux.1-dev");
    assert_eq!((preset["parameters"].as_u64(), preset["tensors"].as_u64()), (Some(11_901_408_320), Some(1160)));
    assert_eq!(preset["bytes"]["bf16"].as_u64(), Some(2 * 11_901_408_320));
    assert!(stdout(&flowtape(&["inspect", "flux.1-dev"])).contains("11,901,408,320 in 1160 tensors"));

    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens/flux_step");
    let folder = json(golden);
    assert_eq!(folder["class"], "FluxTransformer2DModel");
    assert_eq!(folder["bytes"]["f32"].as_u64().unwrap(), 4 * folder["parameters"].as_u64().unwrap());
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        let found = json(&format!("{golden}/{file}"));
        assert_eq!((&found["parameters"], &found["tensors"]), (&folder["parameters"], &folder["tensors"]), "{file}");
    }

    let scratch = tempfile::tempdir().unwrap();
    // What is stored is counted, not what the configuration promises.
    let other = scratch.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::copy(format!("{golden}/config.json"), other.join("config.json")).unwrap();
    let counts = |found: &Value| (found["parameters"].as_u64().unwrap(), found["notes"][0].to_string());
    let file = |name: &str| other.join(name);
    let (described, note) = counts(&json(other.to_str().unwrap()));
    assert!(
        described == folder["parameters"].as_u64().unwrap() && note.contains("counted is what config.json describes")
    );
    std::fs::write(file("diffusion_pytorch_model.bin"), "PK").unwrap();
    assert!(counts(&json(other.to_str().unwrap())).1.contains("there are diffusion_pytorch_model.bin"));
    std::fs::remove_file(file("diffusion_pytorch_model.bin")).unwrap();
    let stored = |path: &Path| empty_tensors(path, (0..3).map(|i| format!("transformer_blocks.{i}.x")));
    stored(&file("diffusion_pytorch_model.fp16.safetensors"));
    let found = json(other.to_str().unwrap());
    assert_eq!((found["tensors"].as_u64(), found["class"].as_str()), (Some(3), Some("FluxTransformer2DModel")));
    assert!(counts(&found).1.contains("diffusion_pytorch_model.fp16.safetensors"), "{found}");
    stored(&file("diffusion_pytorch_model.safetensors"));
    let shown = stdout(&flowtape(&["inspect", other.to_str().unwrap()]));
    assert!(shown.contains("0 in 3 tensors") && shown.contains("config.json describes"), "{shown}");

    let run = scratch.path().join("run");
    stdout(&train(&run, &[]));
    assert!(json(run.to_str().unwrap())["parameters"].as_u64().unwrap() > 1000);

    assert!(failure(&flowtape(&["inspect", "flux.1"])).contains("flux.1-dev"));
    let broken = scratch.path().join("config.json");
    std::fs::write(&broken, r#"{"_class_name": "FluxTransformer2DModel", "num_layers": "three"}"#).unwrap();
    assert!(failure(&flowtape(&["inspect", broken.to_str().unwrap()])).contains("num_layers"));
    std::fs::write(&broken, r#"{"_class_name": "FluxTransformer2DModel", "num_layer": 3}"#).unwrap();
    let unknown = flowtape(&["inspect", broken.to_str().unwrap()]);
    stdout(&unknown);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("`num_layer` is unknown"), "{unknown:?}");
}

/// Weights, checkpoints, pictures and folders: all have the rights that the umask leaves.
#[cfg(unix)]
#[test]
fn everything_that_is_written_follows_the_umask() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut arguments =
        vec!["train".to_owned(), RECIPE.to_owned(), "--set".into(), format!("run_dir={}", run.display())];
    SMALL.iter().for_each(|setting| arguments.extend(["--set".to_owned(), (*setting).to_owned()]));
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 026; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_flowtape")]).args(arguments);
    stdout(&shell.output().unwrap());
    let mut folders = vec![run];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, if path.is_dir() { 0o751 } else { 0o640 }, "{} {mode:o}", path.display());
            seen += 1;
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    assert!(seen > 8, "{seen} files");
}

/// A safetensors file of empty tensors of these names.
fn empty_tensors(path: &Path, names: impl Iterator<Item = String>) {
    let entry = |name| format!("{}:{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}", Value::String(name));
    let header = format!("{{{}}}", names.map(entry).collect::<Vec<_>>().join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.into_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn weights_of_every_kind_are_inspected() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let inspect = || flowtape(&["inspect", path.to_str().unwrap()]);
    // Names from a stranger do not reach the terminal raw.
    empty_tensors(&path, ["a\u{1b}[2J.weight", "b.weight"].into_iter().map(String::from));
    let shown = stdout(&inspect());
    assert!(shown.contains("a\\u{1b}[2J") && !shown.contains('\u{1b}'), "{shown}");
    // What wraps a model names all its keys.
    empty_tensors(&path, ["_orig_mod.a.weight", "_orig_mod.b.weight"].into_iter().map(String::from));
    let output = inspect();
    let (shown, said) = (stdout(&output), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(shown.contains("\na ") && !shown.contains("_orig_mod") && said.contains("`_orig_mod.`"), "{shown}{said}");
    // As many tensors as a header may have, in layers and side by side; a scan of all for each would take minutes.
    let names = (0..100_000).flat_map(|i| [format!("blocks.{i}.weight"), format!("t{i}.weight")]);
    empty_tensors(&path, names);
    let started = std::time::Instant::now();
    let shown = stdout(&inspect());
    assert!(shown.contains("in 200000 tensors") && shown.contains("100000"), "{}", &shown[..400]);
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    // Neither a file nor a preset is one thing; what can't be looked at is another, and its reason is said once.
    assert!(failure(&flowtape(&["inspect", "flux.9"])).contains("neither a file or folder nor one of the presets"));
    #[cfg(unix)]
    {
        let link = folder.path().join("loop");
        std::os::unix::fs::symlink(&link, &link).unwrap();
        let message = failure(&flowtape(&["inspect", link.to_str().unwrap()]));
        assert!(message.matches("os error").count() == 1 && message.contains("loop: "), "{message}");
    }
}

/// The texts of a PNG by keyword, its sides, and how many frames it has.
fn png_of(path: &Path) -> (std::collections::BTreeMap<String, String>, [u32; 2], u32) {
    let reader = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(path).unwrap())).read_info().unwrap();
    let info = reader.info();
    let texts = info.utf8_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap())).collect();
    (texts, [info.width, info.height], info.animation_control().map_or(1, |control| control.num_frames))
}

#[test]
fn a_pipeline_is_sampled_and_its_files_say_how() {
    let folder = tempfile::tempdir().unwrap();
    let goldens = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens");
    let (flux, wan) = (format!("{goldens}/pipe_flux/pipeline"), format!("{goldens}/pipe_wan/pipeline"));
    let out = |name: &str| folder.path().join(name).display().to_string();
    let common =
        ["--prompt", "a red fox", "--steps", "2", "--dtype", "f32", "--max-sequence-length", "16", "--seed", "5"];
    let sample = |from: &str, more: &[&str], name: &str| {
        flowtape(&[&["sample", from, "--out", &out(name)], &common[..], more].concat())
    };
    // Two pictures, each with the numbers that made it; one alone is the same as the first of two.
    let more = ["--size", "64x48", "--sampler", "heun", "--shift", "2", "--negative", "blurry", "--true-cfg", "1.5"];
    let written = stdout(&sample(&flux, &[&more[..], &["--n", "2", "--guidance", "4"]].concat(), "fox.png"));
    assert_eq!(written.lines().collect::<Vec<_>>(), [out("fox_0.png"), out("fox_1.png")]);
    let (texts, sides, frames) = png_of(Path::new(&out("fox_1.png")));
    assert_eq!((sides, frames), ([64, 48], 1));
    let weights = Path::new(&flux).join("transformer/diffusion_pytorch_model.safetensors");
    let expected = Command::new("sha256sum").arg(&weights).output().unwrap();
    let hash = String::from_utf8_lossy(&expected.stdout).split_whitespace().next().unwrap().to_owned();
    for (keyword, text) in [
        ("prompt", "a red fox"),
        ("negative_prompt", "blurry"),
        ("seed", "5"),
        ("picture", "1"),
        ("sampler", "heun"),
        ("steps", "2"),
        ("shift", "2"),
        ("guidance_scale", "4"),
        ("true_cfg_scale", "1.5"),
        ("weights", &format!("{hash}  diffusion_pytorch_model.safetensors")),
    ] {
        assert_eq!(texts.get(keyword).map(String::as_str), Some(text), "{keyword}");
    }
    stdout(&sample(&flux, &[&more[..], &["--guidance", "4"]].concat(), "one.png"));
    let pixels = |name: &str| {
        let file = std::io::BufReader::new(std::fs::File::open(out(name)).unwrap());
        let mut reader = png::Decoder::new(file).read_info().unwrap();
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut rgb).unwrap();
        rgb
    };
    assert!(pixels("one.png") == pixels("fox_0.png") && pixels("one.png") != pixels("fox_1.png"));
    // A film, as its scheduler samples it.
    stdout(&sample(&wan, &["--size", "48x32", "--frames", "5"], "film.png"));
    let (texts, sides, frames) = png_of(Path::new(&out("film.png")));
    assert_eq!((sides, frames, &*texts["sampler"], &*texts["shift"]), ([48, 32], 5, "unipc", "3"));

    // A film with sound, led in all ways; and a picture that is edited.
    let ltx2 = format!("{goldens}/pipe_ltx2/pipeline");
    let more =
        ["--size", "64x32", "--frames", "9", "--stg", "1", "--stg-blocks", "1", "--modality", "2", "--rescale", "0.7"];
    let written = stdout(&sample(&ltx2, &more, "loud.png"));
    assert_eq!(written.lines().collect::<Vec<_>>(), [out("loud.png"), out("loud.wav")]);
    assert!(std::fs::read(out("loud.wav")).unwrap().starts_with(b"RIFF"));
    let edit = format!("{goldens}/pipe_qwen_image_edit");
    let picture = format!("{edit}/context0.png");
    let more = ["--image", &picture, "--size", "64x48", "--negative", " "];
    stdout(&sample(&format!("{edit}/pipeline"), &more, "edited.png"));
    assert_eq!(png_of(Path::new(&out("edited.png"))).1, [64, 48]);

    // NeMo's YAML, with another folder's weights in place of the pipeline's.
    let yaml = folder.path().join("generate.yaml");
    let text = format!(
        "model:\n  pretrained_model_name_or_path: {wan}\n  checkpoint: {wan}/transformer\n  lora_weights: null\n\
         inference:\n  num_inference_steps: 2\n  guidance_scale: 5.0\n  height: 32\n  width: 48\n  dtype: float32\n  max_samples: 1\n  \
         prompts: [a fox, a dog]\n  pipeline_kwargs: {{num_frames: 5, negative_prompt: blurry, max_sequence_length: 16}}\n\
         output:\n  output_dir: {}\n  fps: 8\nvae: {{enable_tiling: true, enable_slicing: true}}\nseed: 42\n",
        out("generated")
    );
    std::fs::write(&yaml, text).unwrap();
    let yaml = yaml.display().to_string();
    let written = stdout(&flowtape(&["sample", "-c", &yaml, "--set", "inference.num_inference_steps=1"]));
    assert_eq!(written.trim(), out("generated/sample_000.png"));
    let (texts, sides, frames) = png_of(Path::new(written.trim()));
    assert_eq!((sides, frames, &*texts["steps"], &*texts["seed"]), ([48, 32], 5, "1", "42"));
    let message = failure(&flowtape(&["sample", "-c", &yaml, "--set", "inference.heigth=64"]));
    assert!(message.contains("heigth") && message.contains("height"), "{message}");

    // Wrong input is named, and nothing is written.
    let message = failure(&sample(&format!("{edit}/pipeline"), &["--size", "64x48"], "wrong.png"));
    assert!(message.contains("at least one picture to edit"), "{message}");
    for (more, part) in [
        (&["--image", &picture, "--size", "64x48"][..], "leave the pictures out"),
        (&["--size", "60x48"], "multiples of 16 pixels"),
        (&["--size", "60"], "such as 1024x768"),
        (&["--sampler", "ddim"], "euler, heun, dpm++2m, unipc"),
        (&["--lora", "/no/such/adapter.safetensors", "--size", "64x48"], "/no/such/adapter.safetensors"),
        (&["--raw", "--size", "64x48"], "--raw"),
    ] {
        let message = failure(&sample(&flux, more, "wrong.png"));
        assert!(message.contains(part), "{message}");
    }
    let broken = folder.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::copy(format!("{flux}/model_index.json"), broken.join("model_index.json")).unwrap();
    let message = failure(&sample(&broken.display().to_string(), &["--size", "64x48"], "wrong.png"));
    assert!(message.contains("broken") && message.contains("it is not there"), "{message}");
    assert!(!Path::new(&out("wrong.png")).exists());
}
