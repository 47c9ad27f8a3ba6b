//! Goldens of adapters: `lora_flux/`. A model with LoRA, patterns of modules, one LoRA and one DoRA layer alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use flowtape_engine::nn::{
    AdapterKind, AdapterPlan, AdapterSpec, Linear, LoraInit, ModulePattern, ModuleSelection, ParamBuilder, Params,
    Parts, Placement,
};
use flowtape_engine::{DType, Device, Gradients, Tape, Tensor};
use flowtape_models::peft::{self, AdapterWeights};
use flowtape_models::{Transformer, checkpoint};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, Tolerance, exact, max, number, relative};
use crate::step::recorded;

/// What PEFT writes before each key.
const PEFT: &str = "base_model.model.";

/// The folder `lora_flux/`.
pub(crate) fn check(dir: &Path, _: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case: Value = serde_json::from_slice(&std::fs::read(dir.join("case.json"))?)?;
    // The case is of the model and the batch of that folder.
    let base = dir.join("../flux_step");
    let plain = checkpoint::load(&base, DType::F32, &Device::cpu())?;
    patterns(&case, plain.params().linears(), out)?;
    let spec =
        AdapterSpec::lora(number(&case, "dim")? as usize, number(&case, "alpha")?, Placement::trained(DType::F32));
    let patched = strings(&case["modules_patched"]);
    initial(dir, &base, &spec, &patched, out)?;
    trained(dir, &case, &base, &spec, &patched, out)?;
    unit(dir, number(&case, "scale")?, out)
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// A model of a folder, frozen, with an adapter beside each of some layers.
///
/// # Errors
/// When the folder can't be read.
pub fn adapted(folder: &Path, modules: &[String], spec: &AdapterSpec) -> Any<Box<dyn Transformer>> {
    let adapters = modules.iter().map(|module| (module.clone(), spec.clone())).collect();
    let plan = AdapterPlan { base: Placement::frozen(DType::F32), adapters };
    Ok(checkpoint::load_with(folder, ParamBuilder::with_plan(1, plan, &Device::cpu()))?)
}

fn patterns(case: &Value, linears: &[String], out: &mut Vec<Outcome>) -> Any<()> {
    let sorted = |names: &[String]| names.iter().cloned().collect::<BTreeSet<String>>();
    let wanted = strings(&case["linear_names"]);
    out.push(exact("linear layers", sorted(linears) == sorted(&wanted), format!("{}", wanted.len())));
    for (text, wanted) in case["pattern_matches_on_linear_names"].as_object().ok_or("patterns")? {
        let pattern = ModulePattern::new(text)?;
        let got: Vec<String> = linears.iter().filter(|module| pattern.matches(module)).cloned().collect();
        let wanted = strings(wanted);
        out.push(exact(
            format!("pattern {text}"),
            sorted(&got) == sorted(&wanted),
            format!("{} modules", wanted.len()),
        ));
    }
    let target_modules = strings(&case["target_modules"]);
    let chosen = ModuleSelection { target_modules, ..ModuleSelection::default() }.select(linears)?;
    let wanted = strings(&case["modules_patched"]);
    out.push(exact("modules patched", sorted(&chosen) == sorted(&wanted), format!("{}", wanted.len())));
    Ok(())
}

/// A new adapter: the golden's of the first block, and ours of all of them.
fn initial(dir: &Path, base: &Path, spec: &AdapterSpec, patched: &[String], out: &mut Vec<Outcome>) -> Any<()> {
    let model = adapted(base, patched, spec)?;
    let adapters = model.params().adapters();
    let (mut shapes, mut zero) = (true, true);
    for (name, want) in Golden::tensors(dir, "initial_adapter")?.under("")? {
        let got = adapters.get(&name).ok_or_else(|| format!("no parameter {name}"))?;
        shapes &= got.dims() == want.dims();
        if name.contains("lora_B") {
            zero &= relative(&got.value()?, &want)? == 0.0;
        }
    }
    out.push(exact("initial shapes", shapes, ""));
    out.push(exact("initial lora_B", zero, ""));
    for (init, name) in [(LoraInit::Xavier, "xavier"), (LoraInit::Uniform, "uniform")] {
        let model = adapted(base, patched, &AdapterSpec { init, ..spec.clone() })?;
        let (mut squares, mut count) = (0.0, 0);
        for a in model.params().adapters().iter().filter(|p| p.path().contains("lora_A")) {
            let std = match init {
                LoraInit::Xavier => (2.0 / (a.dim(0)? + a.dim(1)?) as f64).sqrt(),
                LoraInit::Uniform => 1.0 / (3.0 * a.dim(1)? as f64).sqrt(),
            };
            squares += a.value()?.to_vec::<f64>()?.iter().map(|v| (v / std).powi(2)).sum::<f64>();
            count += a.numel();
        }
        // Five standard errors of a normal variable's variance; a uniform one's is smaller.
        let bound = 5.0 * (2.0 / f64::from(count as u32)).sqrt();
        let off = (squares / f64::from(count as u32) - 1.0).abs();
        out.push(Outcome::measured(format!("{name} variance of lora_A"), off, bound, format!("{count} values")));
    }
    Ok(())
}

fn trained(
    dir: &Path,
    case: &Value,
    base: &Path,
    spec: &AdapterSpec,
    patched: &[String],
    out: &mut Vec<Outcome>,
) -> Any<()> {
    let (bound, grads_bound) = (number(&case["tolerance"], "outputs")?, number(&case["tolerance"], "grads")?);
    let outputs = Golden::tensors(dir, "outputs")?;
    let mut push = |name: String, got: &Tensor, want: &str| -> Any<()> {
        out.push(Outcome::measured(name, relative(got, &outputs.tensor(want)?)?, bound, ""));
        Ok(())
    };
    let model = adapted(base, patched, spec)?;
    let (without, _) = recorded(base, &*model)?;
    push("model_pred of a new adapter".into(), without.model_pred(), "model_pred_without_adapter")?;
    let adapters = model.params().adapters();
    for (name, value) in Golden::tensors(dir, "adapter_model")?.under(PEFT)? {
        adapters.get(&name).ok_or_else(|| format!("no parameter {name}"))?.copy_from(&value)?;
    }
    let (step, gradients) = recorded(base, &*model)?;
    let ours = [
        ("noisy_latents", &step.noisy_latents),
        ("target", &step.target),
        ("model_pred", step.model_pred()),
        ("average_weighted_loss", &step.loss),
    ];
    for (name, got) in ours {
        push(name.into(), got, name)?;
    }
    let (merged, worst) = merge(dir, base, patched, spec, &adapters)?;
    let (dense, _) = recorded(base, &*merged)?;
    push("model_pred_merged".into(), dense.model_pred(), "model_pred_merged")?;
    files(dir, &adapters, spec, patched, out)?;
    out.push(Outcome::measured("merged weights", worst, number(case, "merged_vs_adapter_relative_deviation")?, ""));
    out.push(exact("trainable parameters", adapters.numel() as f64 == number(case, "trainable_parameters")?, ""));
    let noisy = gradients.of(&step.noisy_latents).ok_or("no gradient of the noisy latents")?;
    let worst = relative(noisy, &outputs.tensor("grad_noisy_latents")?)?;
    out.push(Outcome::measured("grad noisy_latents", worst, grads_bound, ""));
    let (mut worst, mut at) = (0.0, String::new());
    let wanted = Golden::tensors(dir, "grads")?.under("")?;
    for (name, want) in &wanted {
        let got = adapters.get(name).and_then(|p| gradients.of(p)).ok_or_else(|| format!("no gradient of {name}"))?;
        let deviation = relative(got, want)?;
        if deviation >= worst {
            (worst, at) = (deviation, name.clone());
        }
    }
    let name = format!("grads of {} parameters", wanted.len());
    out.push(Outcome::measured(name, worst, grads_bound, format!("worst: {at}")));
    // The latents are the other leaf.
    out.push(exact("no other gradients", gradients.iter().count() == wanted.len() + 1, ""));
    Ok(())
}

/// The files as the reference writes them, and what reading them gives.
fn files(dir: &Path, adapters: &Params, spec: &AdapterSpec, patched: &[String], out: &mut Vec<Outcome>) -> Any<()> {
    let specs = patched.iter().map(|module| (module.clone(), spec.clone())).collect();
    let folder = tempfile::tempdir()?;
    peft::save(&AdapterWeights::of(adapters, &specs)?, folder.path())?;
    let config = |folder: &Path| -> Any<Value> {
        Ok(serde_json::from_slice(&std::fs::read(folder.join(peft::ADAPTER_CONFIG))?)?)
    };
    out.push(exact("adapter_config.json", config(folder.path())? == config(dir)?, ""));
    let tensors = |folder: &Path| -> Any<BTreeMap<String, Vec<f32>>> {
        let file = Golden::tensors(folder, "adapter_model")?.under("")?;
        file.into_iter().map(|(name, tensor)| Ok((name, tensor.to_vec::<f32>()?))).collect()
    };
    let (written, wanted) = (tensors(folder.path())?, tensors(dir)?);
    out.push(exact("adapter_model.safetensors", written == wanted, format!("{} tensors", wanted.len())));
    let read = peft::load(dir)?;
    let same = read.tensors().all(|(path, tensor)| {
        let own = adapters.get(&path).and_then(|p| p.kept().ok()?.to_bytes().ok());
        own.is_some_and(|own| tensor.to_bytes().ok() == Some(own))
    });
    let specs = read.specs().values().all(|own| (own.dim, own.alpha, own.kind) == (spec.dim, spec.alpha, spec.kind));
    let all = same && specs && read.tensors().count() == adapters.len();
    out.push(exact("read again", all, format!("{} tensors", adapters.len())));
    Ok(())
}

/// The model with its adapters folded in, and how far the golden's folded weights are.
fn merge(
    dir: &Path,
    base: &Path,
    patched: &[String],
    spec: &AdapterSpec,
    adapters: &Params,
) -> Any<(Box<dyn Transformer>, f64)> {
    let merged = checkpoint::load(base, DType::F32, &Device::cpu())?;
    let golden = Golden::tensors(dir, "merged_weights")?.under("")?;
    let (mut worst, mut met) = (0.0, 0);
    for module in patched {
        let weight = merged.params().get(&format!("{module}.weight")).ok_or("a weight")?;
        let value = spec.merged(&weight.kept()?, &parts(adapters, module)?)?;
        if let Some(want) = golden.get(weight.path()) {
            worst = max(worst, relative(&value, want)?);
            met += 1;
        }
        weight.copy_from(&value)?;
    }
    if met == golden.len() { Ok((merged, worst)) } else { Err("merged weights of other modules".into()) }
}

/// One layer of each kind, of the model's scale.
fn unit(dir: &Path, scale: f64, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::tensors(dir, "linear_lora_unit")?;
    let unit = |prefix: &str, kind, out: &mut Vec<Outcome>| -> Any<()> {
        let get = |name: &str| golden.tensor(&format!("{prefix}{name}"));
        let (a, b) = (get("lora_A")?, get("lora_B")?);
        let alpha = scale * a.dim(0)? as f64;
        let spec = AdapterSpec { kind, ..AdapterSpec::lora(a.dim(0)?, alpha, Placement::trained(DType::F32)) };
        let plan = AdapterPlan {
            base: Placement::frozen(DType::F32),
            adapters: BTreeMap::from([("layer".to_owned(), spec.clone())]),
        };
        let params = ParamBuilder::with_plan(1, plan, &Device::cpu());
        let layer = Linear::new(&params.sub("layer"), a.dim(1)?, b.dim(0)?, true)?;
        let params = params.params();
        let param = |name: &str| params.get(&format!("layer.{name}")).ok_or_else(|| format!("no parameter {name}"));
        let names = [("weight", "weight"), ("bias", "bias"), ("lora_A", "lora_A.weight"), ("lora_B", "lora_B.weight")];
        for (name, path) in names {
            param(path)?.copy_from(&get(name)?)?;
        }
        let mut trained = vec![("lora_A", "lora_A.weight"), ("lora_B", "lora_B.weight")];
        if kind == AdapterKind::Dora {
            param("lora_magnitude")?.copy_from(&get("magnitude")?)?;
            trained.push(("magnitude", "lora_magnitude"));
        }
        let tape = Tape::new();
        let x = tape.leaf(&get("x")?);
        let y = layer.forward(&x)?;
        let mut gradients = Gradients::default();
        tape.backward_with(&[(&y, &get("cotangent")?)], &mut gradients)?;
        let (value, grads) = (Tolerance { rtol: 1e-5, atol: 1e-6 }, Tolerance { rtol: 1e-4, atol: 1e-5 });
        out.push(value.tensor(format!("unit/{prefix}out"), &y, &get("out")?)?);
        let of_x = gradients.of(&x).ok_or("no gradient of x")?;
        out.push(grads.tensor(format!("unit/{prefix}grad.x"), of_x, &get("grad.x")?)?);
        for (name, path) in &trained {
            let got = gradients.of(param(path)?).ok_or_else(|| format!("no gradient of {path}"))?;
            out.push(grads.tensor(format!("unit/{prefix}grad.{name}"), got, &get(&format!("grad.{name}"))?)?);
        }
        let merged = spec.merged(&get("weight")?, &parts(&params.adapters(), "layer")?)?;
        let plain = flowtape_engine::ops::linear(&get("x")?, &merged, Some(&get("bias")?))?;
        out.push(value.tensor(format!("unit/{prefix}merged out"), &plain, &get("out")?)?);
        Ok(())
    };
    unit("", AdapterKind::Lora, out)?;
    unit("dora.", AdapterKind::Dora, out)
}

/// The tensors of the adapter of a layer.
fn parts(adapters: &Params, module: &str) -> Any<Parts> {
    let inside = |path: &str| Some(path.strip_prefix(module)?.strip_prefix('.')?.to_owned());
    let own = adapters.iter().filter_map(|param| Some((inside(param.path())?, param)));
    own.map(|(name, param)| Ok((name, param.kept()?))).collect()
}
