//! Published models in the layouts of their authors, which ComfyUI ships: their names, and what diffusers makes of them.
//!
//! A table for each class says it once; files are read through it, and written by it. Qwen-Image's own names are diffusers'.

use std::collections::{BTreeMap, HashSet};

use flowtape_engine::meta::Meta;
use flowtape_engine::nn::{Param, ParamBuilder, Params};
use flowtape_engine::safetensors::{Rows, Shards};
use flowtape_engine::{DType, Tensor};
use serde_json::Value;

use self::configs::{ltx2_text, qwen_config};
use self::tables::{FLAT, LAYOUTS, Layout, SWAPPED, Table};
use crate::{Error, Result, Transformer, checkpoint, create_model};

mod configs;
mod tables;

/// An original tensor, and the parameters whose rows it holds.
struct Held {
    original: String,
    parameters: Vec<String>,
    swapped: bool,
    flat: bool,
}

impl Layout {
    fn of(weights: &Shards) -> Option<&'static Self> {
        LAYOUTS.iter().find(|layout| layout.signs.iter().all(|sign| weights.dims(sign).is_some()))
    }

    /// The lines with all numbers and endings that a model has; parameters that are in none have the same name.
    fn held(&self, params: &Params) -> Vec<Held> {
        let mut all = Vec::new();
        let placed =
            |(places, lines): &Table| places.iter().flat_map(|place| lines.iter().map(move |line| (place, line)));
        for ((theirs, ours), (original, parts)) in self.tables.iter().copied().flatten().flat_map(placed) {
            for n in 0.. {
                let fill = |place: &str, name: &str| format!("{place}{name}").replace("{}", &n.to_string());
                let found: Vec<Held> = ["", ".weight", ".bias"]
                    .iter()
                    .map(|end| Held {
                        original: fill(theirs, original) + end,
                        parameters: parts.iter().map(|part| fill(ours, part) + end).collect(),
                        swapped: *parts == SWAPPED,
                        flat: *parts == FLAT,
                    })
                    .filter(|held| held.parameters.iter().all(|name| params.get(name).is_some()))
                    .collect();
                let more = !found.is_empty() && [theirs, original].iter().any(|name| name.contains("{}"));
                all.extend(found);
                if !more {
                    break;
                }
            }
        }
        let named: HashSet<&String> = all.iter().flat_map(|held: &Held| &held.parameters).collect();
        let alike =
            |name: &str| Held { original: name.into(), parameters: vec![name.into()], swapped: false, flat: false };
        let rest = params.iter().map(Param::path).filter(|name| !named.contains(&(*name).to_owned()));
        let rest: Vec<Held> = rest.map(alike).collect();
        all.extend(rest);
        all
    }
}

/// Weights in an original layout under diffusers' names; others as they are.
///
/// # Errors
/// When the configuration does not fit, or a tensor is missing or of another size.
pub fn as_diffusers(weights: Shards, config: &Value) -> Result<Shards> {
    let Some(layout) = Layout::of(&weights) else { return Ok(weights) };
    let model = create_model(config, &ParamBuilder::new(0, DType::F32, &Meta::default().device()))?;
    let mut rows = BTreeMap::new();
    for held in layout.held(model.params()) {
        let mut start = 0;
        for name in held.parameters {
            let dims = model.params().get(&name).map_or(Vec::new(), |param| param.dims().to_vec());
            let count = dims.first().copied().unwrap_or(0);
            // What is missing is told with everything else, by the names of the class.
            if weights.dims(&held.original).is_some() {
                rows.insert(name, Rows { of: held.original.clone(), start, dims, swapped: held.swapped });
            }
            start += count;
        }
    }
    Ok(weights.with_rows(rows)?)
}

/// The configuration of weights in an original layout, or of diffusers' where their names alone tell it; none where their sizes
/// do not.
pub fn config(weights: &Shards) -> Option<Value> {
    Layout::of(weights).and_then(|layout| (layout.config)(weights)).or_else(|| qwen_config(weights))
}

/// A linear layer of an original layout, and those of diffusers whose rows it holds, one after the other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Layer {
    /// Its path there.
    pub original: String,
    /// diffusers' paths.
    pub modules: Vec<String>,
    /// Whether its two halves stand the other way round (scale and shift).
    pub swapped: bool,
}

/// A model's linear layers in the layouts of its class, the one that is written first, and by diffusers' own names.
pub(crate) fn linears(class: &str, params: &Params) -> Vec<Layer> {
    let modules: HashSet<&String> = params.linears().iter().collect();
    let of_weight = |name: &String| name.strip_suffix(".weight").map(str::to_owned);
    let layer = |held: Held| {
        let parts = held.parameters.iter().map(of_weight).collect::<Option<Vec<_>>>()?;
        let is_linear = parts.iter().all(|part| modules.contains(part));
        let original = of_weight(&held.original)?;
        is_linear.then_some(Layer { original, modules: parts, swapped: held.swapped })
    };
    let layouts = LAYOUTS.iter().filter(|layout| layout.class == class);
    let alike = params.linears().iter().map(|name| Layer {
        original: name.clone(),
        modules: vec![name.clone()],
        swapped: false,
    });
    layouts.flat_map(|layout| layout.held(params)).filter_map(layer).chain(alike).collect()
}

/// What stands in a file of that layout beside its tensors.
pub fn text(model: &dyn Transformer) -> BTreeMap<String, String> {
    let mut text = Params::text();
    if model.class() == "LTX2VideoTransformer3DModel" {
        text.insert("config".into(), ltx2_text(&model.config()).to_string());
    }
    text
}

/// The class whose authors' names are diffusers' own.
const SAME: &str = "QwenImageTransformer2DModel";

/// A model's tensors in the layout of its authors.
///
/// # Errors
/// When that layout is not known here, or the device fails.
pub fn tensors(model: &dyn Transformer) -> Result<Vec<(String, Tensor)>> {
    let class = model.class();
    let params = &model.params().base();
    let Some(layout) = LAYOUTS.iter().find(|layout| layout.class == class) else {
        if class != SAME {
            let known = LAYOUTS.iter().map(|layout| layout.class).chain([SAME]).collect::<Vec<_>>().join(", ");
            return Err(Error::config(
                "_class_name",
                format!("a class whose authors' layout is known ({known})"),
                class,
            ));
        }
        return checkpoint::tensors(model);
    };
    written(layout, params)
}

/// Tensors in a layout.
fn written(layout: &Layout, params: &Params) -> Result<Vec<(String, Tensor)>> {
    let kept = |name: &str| params.get(name).map(|param| param.kept()).transpose();
    let mut all = Vec::new();
    for held in layout.held(params) {
        let parts = held.parameters.iter().filter_map(|name| kept(name).transpose()).collect::<Result<Vec<_>, _>>()?;
        let whole = match &parts[..] {
            [one] => one.clone(),
            several => Tensor::cat(&several.iter().collect::<Vec<_>>(), 0)?,
        };
        let count = whole.dims().first().copied().unwrap_or(0);
        let halves =
            |half: usize| Ok::<_, crate::Error>([whole.narrow(0, half, count - half)?, whole.narrow(0, 0, half)?]);
        let whole = if held.swapped {
            let [second, first] = halves(count / 2)?;
            Tensor::cat(&[&second, &first], 0)?
        } else {
            whole
        };
        let whole = if held.flat { whole.reshape(&[whole.numel()])? } else { whole };
        all.push((held.original, whole));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use flowtape_engine::Device;
    use flowtape_engine::safetensors::{SafeTensors, save};
    use serde_json::json;

    use super::*;
    use crate::checkpoint::load_weights;

    /// Small models with the widths of heads that the published ones have, so that their configurations can be told.
    fn models() -> Vec<Value> {
        let mut all = told();
        all.extend(not_told());
        all
    }

    /// Those whose sizes do not tell it: goldens' models.
    fn not_told() -> Vec<Value> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
        let step = |name: &str| {
            let text = std::fs::read(folder.join(format!("{name}_step/config.json"))).unwrap();
            let mut config: Value = serde_json::from_slice(&text).unwrap();
            config.as_object_mut().unwrap().retain(|key, _| key == "_class_name" || !key.starts_with('_'));
            config
        };
        ["flux3", "qwen_image_21", "lumina2", "krea2", "hunyuan_t2v", "ltx2", "ltx25"].map(step).into()
    }

    fn told() -> Vec<Value> {
        vec![
            json!({
                "_class_name": "ChromaTransformer2DModel", "in_channels": 8, "num_layers": 2, "num_single_layers": 1,
                "attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 12,
                "approximator_num_channels": 16, "approximator_hidden_dim": 10, "approximator_layers": 2,
            }),
            json!({
                "_class_name": "FluxTransformer2DModel", "in_channels": 8, "num_layers": 2, "num_single_layers": 3,
                "attention_head_dim": 128, "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 6,
                "guidance_embeds": true,
            }),
            json!({
                "_class_name": "FluxTransformer2DModel", "in_channels": 8, "num_layers": 1, "num_single_layers": 1,
                "attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 12, "pooled_projection_dim": 6,
            }),
            json!({
                "_class_name": "WanTransformer3DModel", "in_channels": 4, "out_channels": 4, "num_layers": 2,
                "num_attention_heads": 1, "text_dim": 10, "freq_dim": 16, "ffn_dim": 24,
            }),
            json!({
                "_class_name": "WanTransformer3DModel", "in_channels": 6, "out_channels": 4, "num_layers": 1,
                "num_attention_heads": 1, "text_dim": 10, "freq_dim": 16, "ffn_dim": 24, "image_dim": 14,
                "added_kv_proj_dim": 128, "pos_embed_seq_len": 5,
            }),
            json!({
                "_class_name": "Flux2Transformer2DModel", "in_channels": 8, "num_layers": 2, "num_single_layers": 1,
                "attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 12, "guidance_embeds": false,
                "mlp_ratio": 2.0,
            }),
            json!({
                "_class_name": "ZImageTransformer2DModel", "in_channels": 3, "dim": 128, "n_heads": 1, "n_kv_heads": 1,
                "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 10, "axes_lens": [1536, 512, 512],
            }),
            json!({
                "_class_name": "QwenImageTransformer2DModel", "in_channels": 16, "out_channels": 4, "num_layers": 1,
                "attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 10,
            }),
        ]
    }

    fn open(path: &Path) -> Shards {
        Shards::from(SafeTensors::open(path).unwrap()).without_known_prefix()
    }

    #[test]
    fn models_come_back_from_their_authors_layouts_bit_by_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        for (i, given) in models().iter().enumerate() {
            let model = create_model(given, &ParamBuilder::new(i as u64, DType::F32, &Device::cpu())).unwrap();
            let others = LAYOUTS.iter().filter(|layout| layout.class == model.class()).skip(1);
            let others = others.map(|layout| written(layout, model.params()).unwrap());
            let all: Vec<_> = [tensors(&*model).unwrap()].into_iter().chain(others).collect();
            // As ComfyUI ships them, too.
            for (tensors, prefix) in all.iter().flat_map(|tensors| [(tensors, ""), (tensors, "model.diffusion_model.")])
            {
                let elements: u64 = tensors.iter().map(|(_, tensor)| tensor.numel() as u64).sum();
                assert_eq!(elements, model.params().numel(), "{given}: every parameter, once");
                let mut named: Vec<(String, Tensor)> =
                    tensors.iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone())).collect();
                if !prefix.is_empty() {
                    // Beside other models.
                    named.push(("vae.decoder.conv_in.bias".into(), tensors[0].1.clone()));
                }
                save(&path, &named, &BTreeMap::new()).unwrap();
                let weights = open(&path);
                // Where sizes do not tell it, it is given.
                let told = config(&weights);
                assert_eq!(told.is_none(), not_told().contains(given), "{given}");
                let told = told.unwrap_or_else(|| given.clone());
                let weights = Arc::new(as_diffusers(weights, &told).unwrap());
                let read = load_weights(weights, &told, ParamBuilder::new(99, DType::F32, &Device::cpu())).unwrap();
                assert_eq!(read.config(), model.config());
                for (a, b) in read.params().iter().zip(model.params().iter()) {
                    let values = |p: &flowtape_engine::nn::Param| p.value().unwrap().to_vec::<f32>().unwrap();
                    assert!(a.path() == b.path() && values(a) == values(b), "{}", a.path());
                }
            }
        }
    }

    #[test]
    fn the_rows_of_fused_tensors_are_in_their_authors_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let given = &told()[2];
        let model = create_model(given, &ParamBuilder::new(1, DType::F32, &Device::cpu())).unwrap();
        let tensors: BTreeMap<String, Tensor> = tensors(&*model).unwrap().into_iter().collect();
        let of = |name: &str| model.params().get(name).unwrap().value().unwrap().to_vec::<f32>().unwrap();
        let original = |name: &str| tensors[name].to_vec::<f32>().unwrap();
        let qkv = ["to_q", "to_k", "to_v"].map(|part| of(&format!("transformer_blocks.0.attn.{part}.weight"))).concat();
        assert_eq!(original("double_blocks.0.img_attn.qkv.weight"), qkv);
        // Shift comes first there, scale here.
        let both = of("norm_out.linear.bias");
        let (scale, shift) = both.split_at(128);
        assert_eq!(original("final_layer.adaLN_modulation.1.bias"), [shift, scale].concat());
        // What is missing or too small is an error, not other weights.
        let without: Vec<(String, Tensor)> = tensors.iter().skip(1).map(|(n, t)| (n.clone(), t.clone())).collect();
        save(&path, &without, &BTreeMap::new()).unwrap();
        let weights = Arc::new(as_diffusers(open(&path), given).unwrap());
        let Err(error) = load_weights(weights, given, ParamBuilder::new(0, DType::F32, &Device::cpu())) else {
            panic!("a tensor is missing")
        };
        assert!(error.to_string().contains("transformer_blocks.0.attn"), "{error}");
        let mut narrow = tensors.clone();
        let cut = narrow["single_blocks.0.linear1.weight"].narrow(0, 0, 10).unwrap();
        narrow.insert("single_blocks.0.linear1.weight".into(), cut);
        save(&path, &narrow.into_iter().collect::<Vec<_>>(), &BTreeMap::new()).unwrap();
        assert!(as_diffusers(open(&path), given).unwrap_err().to_string().contains("linear1"));
    }
}
