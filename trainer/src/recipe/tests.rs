//! What recipes are taken, and what is said of those that are not.

use serde_json::Value;

use super::*;

const DIGITS: &str = include_str!("../../../recipes/digits.yaml");

fn parse(text: &str, settings: &[&str]) -> Result<Recipe, String> {
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    let lines = |problems: Vec<Problem>| problems.iter().map(|p| p.line(&"f")).collect::<Vec<_>>().join("\n");
    Recipe::parse(text, &settings, "stem").map(|(recipe, _)| recipe).map_err(lines)
}

#[test]
fn settings_reach_every_level_and_supply_what_is_missing() {
    let set = ["optimizer.lr=5e-6", "run_dir=/tmp/x", "model.num_layers=1", "step_scheduler.max_steps=1_000"];
    let recipe = parse(DIGITS, &set).unwrap();
    assert_eq!(recipe.optimizer.lr, 5e-6);
    assert_eq!(recipe.run_dir.as_deref(), Some(Path::new("/tmp/x")));
    assert_eq!((recipe.model["num_layers"].as_u64(), recipe.step_scheduler.max_steps), (Some(1), 1000));
    let without = DIGITS.replace("  max_steps: 1000\n", "").replace("name: digits", "# no name");
    let missing = parse(&without, &[]).unwrap_err();
    assert_eq!(missing, "f:41:1: step_scheduler.max_steps: missing: Optimiser steps (or num_epochs)");
    let recipe = parse(&without, &["step_scheduler.max_steps='7'"]).unwrap();
    assert_eq!((recipe.step_scheduler.max_steps, &recipe.name[..]), (7, "stem"));
}

#[test]
fn a_recipe_chooses_any_rule() {
    let set = ["optimizer={name: sgd, lr: 0.1, momentum: 0.9, groups: [{pattern: '*.bias', wd_mult: 0}]}"];
    let recipe = parse(DIGITS, &set).unwrap();
    let text = recipe.to_yaml();
    assert!(text.contains("name: sgd") && text.contains("momentum: 0.9") && text.contains("nesterov: false"), "{text}");
    assert_eq!(parse(&text, &[]).unwrap(), recipe.resolved());
    assert_eq!(recipe.optimizer.groups.len(), 1);
}

#[test]
fn the_resolved_recipe_is_the_same_recipe_with_the_values_that_are_used() {
    let awkward = [
        "name='1e3'",
        "run_dir='null'",
        "optimizer.lr=0.1000000000000000055511151231257827",
        "flow_matching.sigma_max=0.9999999999999999",
        "seed=18446744073709551615",
        "model._diffusers_version='0.30'",
        "model._name_or_path='yes'",
        "model._note='a: [b] # c'",
    ];
    for set in [&[][..], &awkward] {
        let recipe = parse(DIGITS, set).unwrap();
        let text = recipe.to_yaml();
        assert_eq!(parse(&text, &[]).unwrap_or_else(|e| panic!("{e}\n{text}")), recipe.resolved(), "{text}");
        assert_eq!(Recipe::from_json(serde_json::to_value(&recipe).unwrap()).unwrap(), recipe);
        assert_eq!(Recipe::from_json(recipe.to_json()).unwrap().to_yaml(), text);
    }
    let recipe = parse(DIGITS, &[]).unwrap();
    let lr = recipe.resolved().lr_scheduler.unwrap();
    assert_eq!((lr.lr_warmup_steps, lr.lr_decay_steps, lr.min_lr), (Some(100), Some(1000), Some(1e-5)));
    assert_eq!(recipe.resolved().step_scheduler.global_batch_size, Some(64));
    // Made longer, it keeps its schedule.
    let longer = parse(&recipe.to_yaml(), &["step_scheduler.max_steps=5000"]).unwrap();
    assert_eq!(longer.schedule().unwrap(), recipe.schedule().unwrap());
}

#[test]
fn values_are_taken_as_people_write_them() {
    let same = |text: &str| assert_eq!(parse(text, &[]).unwrap(), parse(DIGITS, &[]).unwrap(), "{text}");
    same(&DIGITS.replace("lr: 1.0e-3", "lr: \"1e-3\""));
    same(&DIGITS.replace("lr: 1.0e-3", "lr: .001"));
    same(&DIGITS.replace("max_steps: 1000", "max_steps: 1_000"));
    same(&DIGITS.replace("max_steps: 1000", "max_steps: 1e3"));
    same(&DIGITS.replace("max_steps: 1000", "max_steps: '1000'"));
    same(&DIGITS.replace("use_loss_weighting: false", "use_loss_weighting: no"));
    same(&DIGITS.replace("seed: 1", "seed: 1\nrun_dir: none"));
    same(&DIGITS.replace("seed: 1", "seed: 1\nloss_scale:"));
    same(&DIGITS.replace("seed: 1", "seed: 1\ncheckpoint: {save_consolidated: True}"));
    same(&DIGITS.replace("seed: 1", "seed: 1\ncheckpoint: {save_consolidated: null}"));
    same(&DIGITS.replace("seed: 1", "seed: 1\ncheckpoint: {save_consolidated: \"true\"}"));
    same(&DIGITS.replace('\n', "\r\n"));
}

#[test]
fn all_problems_are_told_at_once_with_their_places() {
    let text = DIGITS
        .replace("  lr:", "  lrr:")
        .replace("text_dim: 32", "text_dim: wide")
        .replace("every_steps: 250", "every_steps: -1")
        .replace("seed: 1", "seed: 1\nsed: 2");
    let error = parse(&text, &["data.shuffle=maybe"]).unwrap_err();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(
        lines,
        [
            "f:5:1: sed: unknown key; did you mean `seed`?",
            "f:9:13: data.text_dim: expected a whole number from 1 to 1048576, got \"wide\"",
            "--set data.shuffle=maybe: data.shuffle: expected true or false, got \"maybe\"",
            "f:33:3: optimizer.lrr: unknown key; did you mean `lr`?",
            "f:48:16: sampling.every_steps: expected a whole number from 0 to 9007199254740992, got \"-1\"",
        ]
    );
    // Those inside of a model and an adapter, which only their own classes know.
    let text = DIGITS
        .replace("num_layers: 2", "num_layer: 2\n  num_layers: two")
        .replace("guidance_scale: 1.0", "guidance: 1.0")
        .replace("flow_shift: 1.0", "flow_shift: 0");
    let error = parse(&text, &["sampling.image_to_video=true"]).unwrap_err();
    for part in [
        "f:28:15: flow_matching.flow_shift: expected a positive number, got 0.0",
        "--set sampling.image_to_video=true: sampling.image_to_video: expected a source of videos",
    ] {
        assert!(error.contains(part), "{error}");
    }
    let error = parse(&text, &["flow_matching.flow_shift=1"]).unwrap_err();
    assert_eq!(
        error,
        "f:26:15: flow_matching.adapter_kwargs.guidance: no key of this adapter; did you mean `guidance_scale`?\n\
         f:13:14: model.num_layer: no key of FluxTransformer2DModel; did you mean `num_layers`?\n\
         f:14:15: model.num_layers: expected a whole number of at least 0, got \"two\""
    );
}

#[test]
fn errors_say_what_is_expected() {
    for (set, part) in [
        ("optimizer.lr", "--set optimizer.lr: expected key=value"),
        ("=1", "expected a key before ="),
        ("optimizer.lr=fast", "optimizer.lr: expected a number above 0, got \"fast\""),
        ("optimizer.lr.x=1", "`x` is inside a value, not a section"),
        ("optimizer.lr=-1", "optimizer.lr: expected a number above 0"),
        ("optimizer.momentum=0.9", "optimizer.momentum: unknown key; there is"),
        ("optimizer.name=adan", "optimizer.name: expected one of adamw, adam, sgd, lion, adafactor, came, muon"),
        ("ema={decay: 1.0}", "ema: expected either decay"),
        ("ema={decay: 0.9, sigma_rel: 0.1}", "ema: expected either decay"),
        ("validation={num_samples: 0}", "validation.num_samples: expected"),
        ("validation={every_steps: 1}", "validation: expected one of num_samples, fraction and list, got 0"),
        (
            "validation={num_samples: 1, fraction: 0.1}",
            "validation: expected one of num_samples, fraction and list, got 2",
        ),
        ("validation={fraction: 1}", "validation.fraction: expected a number above 0, below 1, got \"1\""),
        ("data.repeats=0", "data.repeats: expected"),
        ("data.caches=[{path: x}]", "data: expected one of builtin, folder, cache_dir and caches, got 2"),
        ("checkpoint.max_recent_checkpoints=0", "checkpoint.max_recent_checkpoints: expected"),
        (
            "checkpoint.save_consolidated=last",
            "checkpoint.save_consolidated: expected one of true, every, final, false",
        ),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected a list of 2, got a list"),
        ("optimizer.betas=[0.9, 1]", "betas"),
        ("optimizer=", "expected a value"),
        ("optimizer=null", "optimizer: expected"),
        ("data=[1", "data: not YAML"),
        ("lr_scheduler.lr_warmup_steps=1001", "lr_scheduler: "),
        ("step_scheduler.local_batch_size=0", "step_scheduler.local_batch_size: expected a whole number from 1"),
        ("step_scheduler.global_batch_size=100", "step_scheduler.global_batch_size: expected a multiple of"),
        ("flow_matching.flow_shift=0", "flow_matching.flow_shift"),
        ("flow_matching.flow_shit=1", "flow_matching.flow_shit: unknown key; did you mean `flow_shift`"),
        (
            "flow_matching.adapter_type=flex",
            "flow_matching.adapter_type: expected one of simple, wan_i2v, wan_ti2v, flux",
        ),
        ("sampelr.x=1", "did you mean `sampling`"),
        ("data.source=moving_digits", "data.video"),
        ("data.builtin=moving_digits", "data.video"),
        ("data.video={frames: 2, height: 9, width: 9}", "did you mean moving_digits"),
        ("data.caption_dropout_prob=2", "data.caption_dropout_prob: expected a number from 0 to 1"),
        ("init=zero", "adaln_zero"),
        ("data.text_dim=31", "data.text_dim (31) must equal model.joint_attention_dim (32)"),
        ("model.in_channels=8", "the channels of data.builtin (1) must equal model.in_channels / 4 (2)"),
        ("model.num_layers=100000000", "model.num_layers: expected at least 0 and at most 1024"),
        ("model.num_layers=010", "model.num_layers: expected a number without leading zeros"),
        ("model.num_layers=99999999999999999999", "model.num_layers: expected a whole number from"),
        (
            "flow_matching.adapter_type=simple",
            "model._class_name (FluxTransformer2DModel) must be WanTransformer3DModel",
        ),
        (
            "flow_matching.timestep_sampling=sigmoid",
            "flow_matching.timestep_sampling: expected one of uniform, logit_normal",
        ),
        ("name=../../x", "name: expected letters"),
        ("name=a/b", "name: expected letters"),
        ("name=.x", "name: expected letters"),
    ] {
        let Err(error) = parse(DIGITS, &[set]) else { panic!("{set} was taken") };
        assert!(error.contains(part), "{set}: {error}");
        // The names of Rust's types are nobody's business.
        assert!(["usize", "u64", "f64", "f32"].iter().all(|name| !error.contains(name)), "{set}: {error}");
    }
    for text in ["", "# nothing", "a list", "[1]", "3"] {
        let error = parse(text, &[]).unwrap_err();
        assert!(error.contains("recipe: expected a section of keys and values"), "{text}: {error}");
    }
}

/// All numbers of a schema by their path, and whether they are whole.
fn numbers(schema: &Value, path: &str, found: &mut Vec<(String, bool)>) {
    let kinds = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        kind => kind.as_str().into_iter().collect::<Vec<_>>(),
    };
    if let Some(kind) = kinds.iter().find(|kind| ["integer", "number"].contains(*kind)) {
        found.push((path.to_owned(), *kind == "integer"));
    }
    for (key, property) in schema["properties"].as_object().into_iter().flatten() {
        numbers(property, &if path.is_empty() { key.clone() } else { format!("{path}.{key}") }, found);
    }
    for alternative in ["anyOf", "oneOf"].into_iter().filter_map(|key| schema[key].as_array()).flatten() {
        numbers(alternative, path, found);
    }
}

#[test]
fn absurd_numbers_are_refused_or_mean_nothing_absurd() {
    let mut all = Vec::new();
    numbers(schema(), "", &mut all);
    assert!(all.len() > 40, "{all:?}");
    for (path, whole) in all {
        for absurd in ["9223372036854775808", "1e300", "-9223372036854775809", ".nan", ".inf", "1e999", "-1e12"] {
            let started = std::time::Instant::now();
            match parse(DIGITS, &[&format!("{path}={absurd}")]) {
                // Rates that contradict each other are told of their section.
                Err(error) => assert!(error.contains(path.split('.').next().unwrap()), "{path}={absurd}: {error}"),
                Ok(_) => assert!(path == "seed" || !whole, "{path}={absurd} was taken"),
            }
            assert!(started.elapsed().as_secs() < 2, "{path}={absurd}");
        }
    }
}

#[test]
fn damaged_recipes_are_errors_and_nothing_else() {
    // A byte changed, cut or doubled, at every place.
    for (i, _) in DIGITS.char_indices() {
        for changed in [
            DIGITS[..i].to_owned(),
            format!("{}{}", &DIGITS[..i], &DIGITS[i + 1..]),
            format!("{}:{}", &DIGITS[..i], &DIGITS[i..]),
            format!("{}\t{}", &DIGITS[..i], &DIGITS[i..]),
            format!("{}[{}", &DIGITS[..i], &DIGITS[i..]),
            format!("{}\"{}", &DIGITS[..i], &DIGITS[i..]),
        ] {
            let _ = parse(&changed, &[]);
        }
    }
}
