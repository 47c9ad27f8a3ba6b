//! From films with sound in a folder to a model that is trained on both.
#![allow(clippy::unwrap_used)] // a test

use std::path::Path;

use flowtape_data::media::{Picture, write_film, write_wav};
use flowtape_engine::{Device, Philox};
use flowtape_trainer::{Recipe, Trainer};

#[test]
fn films_in_a_folder_train_a_model_of_films_with_sound() {
    let folder = tempfile::tempdir().unwrap();
    let films = folder.path().join("films");
    std::fs::create_dir(&films).unwrap();
    let frame = |level: usize| Picture { width: 48, height: 32, rgb: vec![(level * 20) as u8; 48 * 32 * 3] };
    for (i, name) in ["a", "b"].into_iter().enumerate() {
        let film: Vec<Picture> = (0..9).map(|level| frame(level + i)).collect();
        write_film(&films.join(name).with_extension("png"), &film, 24.0, &[]).unwrap();
        std::fs::write(films.join(name).with_extension("txt"), format!("film {name}")).unwrap();
        // At the rate of most films, so that it has to be brought to another.
        let sound = Philox::new(i as u64).normal(&[2, 24_000], &Device::cpu()).unwrap().mul_scalar(0.1).unwrap();
        write_wav(&films.join(name).with_extension("wav"), &sound, 48_000).unwrap();
    }
    let pipeline = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/pipe_ltx2/pipeline");
    let text = format!(
        "seed: 1\n\
         run_dir: {run}\n\
         data: {{folder: {{path: {films}, pipeline: {pipeline}, cache_dir: {cache}, frames: 9, max_pixels: 1536, quantization: 16}}}}\n\
         model: {{pretrained_model_name_or_path: {pipeline}}}\n\
         optimizer: {{lr: 1.0e-3}}\n\
         flow_matching: {{adapter_type: ltx2}}\n\
         step_scheduler: {{local_batch_size: 2, max_steps: 3}}\n",
        run = folder.path().join("run").display(),
        films = films.display(),
        pipeline = pipeline.display(),
        cache = folder.path().join("cache").display(),
    );
    let path = folder.path().join("recipe.yaml");
    std::fs::write(&path, text).unwrap();
    let recipe = Recipe::load(&path, &[]).unwrap();
    let mut trainer = Trainer::new(&recipe).unwrap();
    let before: Vec<f32> =
        trainer.model().params().get("audio_proj_in.weight").unwrap().value().unwrap().to_vec().unwrap();
    for _ in 0..3 {
        let record = trainer.step().unwrap();
        assert!(record.loss.is_finite() && record.loss > 0.0);
    }
    // The sound has trained its own part of the model.
    let after: Vec<f32> =
        trainer.model().params().get("audio_proj_in.weight").unwrap().value().unwrap().to_vec().unwrap();
    assert_ne!(before, after);
}
