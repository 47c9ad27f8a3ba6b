//! Recipes as people write them: the cases from the field, and those that come with the project.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use flowtape_trainer::Recipe;
use flowtape_trainer::train::train;

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "yaml"));
    files.sort();
    files
}

#[test]
fn cases_from_the_field_train_or_are_refused_as_they_should() {
    // The table of the cases' README: what is refused, with what its message says.
    let refused: &[(&str, &[&str])] = &[
        (
            "02-timestep-typo__r",
            &[":22:", "flow_matching.timestep_sampling", "uniform, logit_normal, mode, lognorm, mix, beta"],
        ),
        ("03-encodings__latin1", &[":1:9: ", "not UTF-8"]),
        ("04-merge-keys__bomb", &["anchors"]),
        ("05-duplicates__model", &["`num_layers`", "lines 9 and 10"]),
        ("07-set-missing__noopt", &["optimizer: missing"]),
    ];
    let settings: &[(&str, &str)] = &[("07-set-missing__noopt", "optimizer.lr=1e-3")];
    let cases = files("tests/cases/recipes");
    assert!(cases.len() >= 10, "{cases:?}");
    for path in cases {
        let name = path.file_stem().unwrap().to_str().unwrap();
        if let Some((_, parts)) = refused.iter().find(|(case, _)| *case == name) {
            let started = Instant::now();
            let error = Recipe::load(&path, &[]).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
            assert!(started.elapsed().as_millis() < 1000, "{name} took {:?}", started.elapsed());
            assert!(error.len() < 1000, "{error}");
        }
        let set = settings.iter().find(|(case, _)| *case == name).map(|(_, set)| (*set).to_owned());
        if set.is_some() || refused.iter().all(|(case, _)| *case != name) {
            let folder = tempfile::tempdir().unwrap();
            let run_dir = format!("run_dir={}", folder.path().join("run").display());
            let recipe = Recipe::load(&path, &[set, Some(run_dir)].into_iter().flatten().collect::<Vec<_>>());
            let recipe = recipe.unwrap_or_else(|error| panic!("{error}"));
            let summary = train(&recipe, Vec::new(), &AtomicBool::new(false)).unwrap();
            assert_eq!(summary.steps, 3, "{name}");
        }
    }
}

#[test]
fn recipes_of_the_project_are_taken() {
    let recipes = files("recipes");
    assert!(recipes.len() >= 3);
    for path in recipes {
        Recipe::load(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
    }
}
