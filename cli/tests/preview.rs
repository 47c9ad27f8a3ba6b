//! Sample grids of a run are what its checkpoint gives later.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::io::BufReader;
use std::path::Path;

use common::{RECIPES, flowtape, stdout, train};

mod common;

/// Pixels between the pictures of a grid.
const GAP: usize = 4;

/// A PNG's bytes for each pixel, and its sides: width and height.
struct Png {
    bytes: Vec<u8>,
    width: usize,
    height: usize,
}

impl Png {
    fn open(path: &Path) -> Self {
        let file = BufReader::new(std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
        let mut reader = png::Decoder::new(file).read_info().unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut bytes).unwrap();
        Self { bytes, width: info.width as usize, height: info.height as usize }
    }

    fn pixel(&self, x: usize, y: usize) -> &[u8] {
        let channels = self.bytes.len() / self.width / self.height;
        &self.bytes[(y * self.width + x) * channels..][..channels]
    }

    /// A picture of a grid of those of `side` pixels, each of which is shown as a square of `zoom` x `zoom`.
    fn cell(&self, index: usize, columns: usize, side: usize, zoom: usize) -> Vec<Vec<u8>> {
        let cell = side * zoom + GAP;
        let (left, top) = (GAP + index % columns * cell, GAP + index / columns * cell);
        let places = (0..side).flat_map(|y| (0..side).map(move |x| (left + x * zoom, top + y * zoom)));
        places.map(|(x, y)| self.pixel(x, y).to_vec()).collect()
    }
}

#[test]
fn a_grid_of_digits_is_what_sample_makes_of_the_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (run, out) = (folder.path().join("run"), folder.path().join("ones.png"));
    let settings = ["step_scheduler.max_steps=4", "step_scheduler.ckpt_every_steps=0", "ema.decay=0.5"];
    let arguments: Vec<&str> = settings.iter().flat_map(|setting| ["--set", *setting]).collect();
    stdout(&train(&run, &arguments));
    let environment = std::fs::read_to_string(run.join("environment.json")).unwrap();
    let environment: serde_json::Value = serde_json::from_str(&environment).unwrap();
    assert_eq!(environment["prompts"].as_array().unwrap().len(), 10);
    let seed = environment["samples_seed"].to_string();
    let prompt = ["--prompt", "a handwritten zero", "--n", "10", "--seed", &seed];
    stdout(&flowtape(&[&["sample", run.to_str().unwrap(), "--out", out.to_str().unwrap()], &prompt[..]].concat()));
    let (grid, later) = (Png::open(&run.join("samples/step_000004.png")), Png::open(&out));
    // Ten columns in the run's grid, four in that of ten samples.
    for i in 0..10 {
        assert!(grid.cell(i, 10, 8, 6) == later.cell(i, 4, 8, 6), "picture {i}");
    }
    assert!(grid.cell(0, 10, 8, 6) != grid.cell(1, 10, 8, 6));
}

#[test]
fn a_grid_of_a_pipeline_is_what_sample_makes_of_it_later() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let root = format!("{RECIPES}/..");
    let prompts = ["an emoji of pizza, food", "an emoji of a red apple, food fruit"];
    let settings = [
        format!("run_dir={}", run.display()),
        format!("data.folder.path={root}/data/emoji/pictures"),
        format!("data.folder.pipeline={root}/data/emoji/pipeline"),
        format!("data.folder.cache_dir={}", folder.path().join("cache").display()),
        "data.folder.include=[food]".into(),
        "model.num_layers=1".into(),
        "model.num_single_layers=1".into(),
        "step_scheduler.local_batch_size=2".into(),
        "step_scheduler.max_steps=2".into(),
        "lr_scheduler.lr_warmup_steps=0".into(),
        "sampling.pipeline=true".into(),
        "sampling.num_inference_steps=3".into(),
        "sampling.guidance_scale=null".into(),
        format!("sampling.prompts=[\"{}\", \"{}\"]", prompts[0], prompts[1]),
        "report=null".into(),
    ];
    let recipe = format!("{RECIPES}/emoji.yaml");
    let mut arguments = vec!["train", &*recipe];
    settings.iter().for_each(|setting| arguments.extend(["--set", setting]));
    stdout(&flowtape(&arguments));
    let grid = Png::open(&run.join("samples/step_000002.png"));
    for (i, prompt) in prompts.iter().enumerate() {
        let sample = |more: &[&str], name: &str| {
            let out = folder.path().join(name);
            let arguments = ["sample", run.to_str().unwrap(), "--prompt", prompt, "--seed", "1"];
            stdout(&flowtape(&[&arguments[..], more, &["--out", out.to_str().unwrap()]].concat()));
            Png::open(&out)
        };
        let whole = |png: &Png| -> Vec<Vec<u8>> {
            (0..64).flat_map(|y| (0..64).map(move |x| (x, y))).map(|(x, y)| png.pixel(x, y).to_vec()).collect()
        };
        let shown = grid.cell(i, 2, 64, 2);
        // Without a word of it, it is the size that was trained on.
        for more in [&[][..], &["--size", "64x64"]] {
            assert!(shown == whole(&sample(more, "same.png")), "{prompt}");
        }
        // The scheduler's shift is what makes them so.
        assert!(shown != whole(&sample(&["--shift", "1"], "other.png")), "{prompt}");
    }
}
