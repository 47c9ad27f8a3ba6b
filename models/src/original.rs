//! Published models in the layouts of their authors, which ComfyUI ships: their names, and what diffusers makes of them.
//!
//! A table for each class says it once; files are read through it, and written by it. Qwen-Image's own names are diffusers'.

use std::collections::{BTreeMap, HashSet};

use flowtape_engine::meta::Meta;
use flowtape_engine::nn::{Param, ParamBuilder, Params};
use flowtape_engine::safetensors::{Rows, Shards};
use flowtape_engine::{DType, Tensor};
use serde_json::{Value, json};

use crate::{Error, Result, Transformer, checkpoint, create_model};

/// An original layer or tensor, and those of diffusers whose rows it holds, one after the other. `{}` is a block's number.
type Line = (&'static str, &'static [&'static str]);

/// The layer of diffusers' the halves of whose rows are in another order: it has scale before shift.
const SWAPPED: &[&str] = &["norm_out.linear"];

/// The attention of Black Forest Labs' blocks with two streams.
const DOUBLE_ATTENTION: &[Line] = &[
    (
        "double_blocks.{}.img_attn.qkv",
        &["transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_k", "transformer_blocks.{}.attn.to_v"],
    ),
    (
        "double_blocks.{}.txt_attn.qkv",
        &[
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ],
    ),
    ("double_blocks.{}.img_attn.norm.query_norm.scale", &["transformer_blocks.{}.attn.norm_q.weight"]),
    ("double_blocks.{}.img_attn.norm.key_norm.scale", &["transformer_blocks.{}.attn.norm_k.weight"]),
    ("double_blocks.{}.txt_attn.norm.query_norm.scale", &["transformer_blocks.{}.attn.norm_added_q.weight"]),
    ("double_blocks.{}.txt_attn.norm.key_norm.scale", &["transformer_blocks.{}.attn.norm_added_k.weight"]),
    ("double_blocks.{}.img_attn.proj", &["transformer_blocks.{}.attn.to_out.0"]),
    ("double_blocks.{}.txt_attn.proj", &["transformer_blocks.{}.attn.to_add_out"]),
];

/// Black Forest Labs' FLUX.1 (`model.py`), but for [`DOUBLE_ATTENTION`].
const FLUX: &[Line] = &[
    ("img_in", &["x_embedder"]),
    ("txt_in", &["context_embedder"]),
    ("time_in.in_layer", &["time_text_embed.timestep_embedder.linear_1"]),
    ("time_in.out_layer", &["time_text_embed.timestep_embedder.linear_2"]),
    ("vector_in.in_layer", &["time_text_embed.text_embedder.linear_1"]),
    ("vector_in.out_layer", &["time_text_embed.text_embedder.linear_2"]),
    ("guidance_in.in_layer", &["time_text_embed.guidance_embedder.linear_1"]),
    ("guidance_in.out_layer", &["time_text_embed.guidance_embedder.linear_2"]),
    ("double_blocks.{}.img_mod.lin", &["transformer_blocks.{}.norm1.linear"]),
    ("double_blocks.{}.txt_mod.lin", &["transformer_blocks.{}.norm1_context.linear"]),
    ("double_blocks.{}.img_mlp.0", &["transformer_blocks.{}.ff.net.0.proj"]),
    ("double_blocks.{}.img_mlp.2", &["transformer_blocks.{}.ff.net.2"]),
    ("double_blocks.{}.txt_mlp.0", &["transformer_blocks.{}.ff_context.net.0.proj"]),
    ("double_blocks.{}.txt_mlp.2", &["transformer_blocks.{}.ff_context.net.2"]),
    ("single_blocks.{}.modulation.lin", &["single_transformer_blocks.{}.norm.linear"]),
    (
        "single_blocks.{}.linear1",
        &[
            "single_transformer_blocks.{}.attn.to_q",
            "single_transformer_blocks.{}.attn.to_k",
            "single_transformer_blocks.{}.attn.to_v",
            "single_transformer_blocks.{}.proj_mlp",
        ],
    ),
    ("single_blocks.{}.norm.query_norm.scale", &["single_transformer_blocks.{}.attn.norm_q.weight"]),
    ("single_blocks.{}.norm.key_norm.scale", &["single_transformer_blocks.{}.attn.norm_k.weight"]),
    ("single_blocks.{}.linear2", &["single_transformer_blocks.{}.proj_out"]),
    ("final_layer.adaLN_modulation.1", SWAPPED),
    ("final_layer.linear", &["proj_out"]),
];

/// Black Forest Labs' FLUX.2 (`flux2`'s `model.py`), but for [`DOUBLE_ATTENTION`].
const FLUX2: &[Line] = &[
    ("img_in", &["x_embedder"]),
    ("txt_in", &["context_embedder"]),
    ("time_in.in_layer", &["time_guidance_embed.timestep_embedder.linear_1"]),
    ("time_in.out_layer", &["time_guidance_embed.timestep_embedder.linear_2"]),
    ("guidance_in.in_layer", &["time_guidance_embed.guidance_embedder.linear_1"]),
    ("guidance_in.out_layer", &["time_guidance_embed.guidance_embedder.linear_2"]),
    ("double_stream_modulation_img.lin", &["double_stream_modulation_img.linear"]),
    ("double_stream_modulation_txt.lin", &["double_stream_modulation_txt.linear"]),
    ("single_stream_modulation.lin", &["single_stream_modulation.linear"]),
    ("double_blocks.{}.img_mlp.0", &["transformer_blocks.{}.ff.linear_in"]),
    ("double_blocks.{}.img_mlp.2", &["transformer_blocks.{}.ff.linear_out"]),
    ("double_blocks.{}.txt_mlp.0", &["transformer_blocks.{}.ff_context.linear_in"]),
    ("double_blocks.{}.txt_mlp.2", &["transformer_blocks.{}.ff_context.linear_out"]),
    ("single_blocks.{}.linear1", &["single_transformer_blocks.{}.attn.to_qkv_mlp_proj"]),
    ("single_blocks.{}.linear2", &["single_transformer_blocks.{}.attn.to_out"]),
    ("single_blocks.{}.norm.query_norm.scale", &["single_transformer_blocks.{}.attn.norm_q.weight"]),
    ("single_blocks.{}.norm.key_norm.scale", &["single_transformer_blocks.{}.attn.norm_k.weight"]),
    ("final_layer.adaLN_modulation.1", SWAPPED),
    ("final_layer.linear", &["proj_out"]),
];

/// Z-Image; what is not here has diffusers' names.
const Z_IMAGE: &[Line] = &[
    ("x_embedder", &["all_x_embedder.2-1"]),
    ("final_layer.adaLN_modulation.1", &["all_final_layer.2-1.adaLN_modulation.1"]),
    ("final_layer.linear", &["all_final_layer.2-1.linear"]),
    ("layers.{}.attention.qkv", &["layers.{}.attention.to_q", "layers.{}.attention.to_k", "layers.{}.attention.to_v"]),
    ("layers.{}.attention.out", &["layers.{}.attention.to_out.0"]),
    ("layers.{}.attention.q_norm", &["layers.{}.attention.norm_q"]),
    ("layers.{}.attention.k_norm", &["layers.{}.attention.norm_k"]),
    (
        "noise_refiner.{}.attention.qkv",
        &["noise_refiner.{}.attention.to_q", "noise_refiner.{}.attention.to_k", "noise_refiner.{}.attention.to_v"],
    ),
    ("noise_refiner.{}.attention.out", &["noise_refiner.{}.attention.to_out.0"]),
    ("noise_refiner.{}.attention.q_norm", &["noise_refiner.{}.attention.norm_q"]),
    ("noise_refiner.{}.attention.k_norm", &["noise_refiner.{}.attention.norm_k"]),
    (
        "context_refiner.{}.attention.qkv",
        &[
            "context_refiner.{}.attention.to_q",
            "context_refiner.{}.attention.to_k",
            "context_refiner.{}.attention.to_v",
        ],
    ),
    ("context_refiner.{}.attention.out", &["context_refiner.{}.attention.to_out.0"]),
    ("context_refiner.{}.attention.q_norm", &["context_refiner.{}.attention.norm_q"]),
    ("context_refiner.{}.attention.k_norm", &["context_refiner.{}.attention.norm_k"]),
];

/// Wan (`wan/modules/model.py`). Its norms run in the order 1, 3, 2.
const WAN: &[Line] = &[
    ("patch_embedding", &["patch_embedding"]),
    ("time_embedding.0", &["condition_embedder.time_embedder.linear_1"]),
    ("time_embedding.2", &["condition_embedder.time_embedder.linear_2"]),
    ("text_embedding.0", &["condition_embedder.text_embedder.linear_1"]),
    ("text_embedding.2", &["condition_embedder.text_embedder.linear_2"]),
    ("time_projection.1", &["condition_embedder.time_proj"]),
    ("img_emb.proj.0", &["condition_embedder.image_embedder.norm1"]),
    ("img_emb.proj.1", &["condition_embedder.image_embedder.ff.net.0.proj"]),
    ("img_emb.proj.3", &["condition_embedder.image_embedder.ff.net.2"]),
    ("img_emb.proj.4", &["condition_embedder.image_embedder.norm2"]),
    ("img_emb.emb_pos", &["condition_embedder.image_embedder.pos_embed"]),
    ("blocks.{}.modulation", &["blocks.{}.scale_shift_table"]),
    ("blocks.{}.norm3", &["blocks.{}.norm2"]),
    ("blocks.{}.self_attn.q", &["blocks.{}.attn1.to_q"]),
    ("blocks.{}.self_attn.k", &["blocks.{}.attn1.to_k"]),
    ("blocks.{}.self_attn.v", &["blocks.{}.attn1.to_v"]),
    ("blocks.{}.self_attn.o", &["blocks.{}.attn1.to_out.0"]),
    ("blocks.{}.self_attn.norm_q", &["blocks.{}.attn1.norm_q"]),
    ("blocks.{}.self_attn.norm_k", &["blocks.{}.attn1.norm_k"]),
    ("blocks.{}.cross_attn.q", &["blocks.{}.attn2.to_q"]),
    ("blocks.{}.cross_attn.k", &["blocks.{}.attn2.to_k"]),
    ("blocks.{}.cross_attn.v", &["blocks.{}.attn2.to_v"]),
    ("blocks.{}.cross_attn.o", &["blocks.{}.attn2.to_out.0"]),
    ("blocks.{}.cross_attn.norm_q", &["blocks.{}.attn2.norm_q"]),
    ("blocks.{}.cross_attn.norm_k", &["blocks.{}.attn2.norm_k"]),
    ("blocks.{}.cross_attn.k_img", &["blocks.{}.attn2.add_k_proj"]),
    ("blocks.{}.cross_attn.v_img", &["blocks.{}.attn2.add_v_proj"]),
    ("blocks.{}.cross_attn.norm_k_img", &["blocks.{}.attn2.norm_added_k"]),
    ("blocks.{}.ffn.0", &["blocks.{}.ffn.net.0.proj"]),
    ("blocks.{}.ffn.2", &["blocks.{}.ffn.net.2"]),
    ("head.modulation", &["scale_shift_table"]),
    ("head.head", &["proj_out"]),
];

/// A layout that is not diffusers'.
struct Layout {
    class: &'static str,
    lines: &'static [&'static [Line]],
    /// Tensors that are together in no other one.
    signs: &'static [&'static str],
    /// The configuration of weights, as far as their sizes tell it.
    config: fn(&Shards) -> Option<Value>,
}

const LAYOUTS: &[Layout] = &[
    Layout {
        class: "Flux2Transformer2DModel",
        lines: &[FLUX2, DOUBLE_ATTENTION],
        signs: &["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"],
        config: flux2_config,
    },
    Layout {
        class: "FluxTransformer2DModel",
        lines: &[FLUX, DOUBLE_ATTENTION],
        signs: &["double_blocks.0.img_attn.qkv.weight", "img_in.weight", "vector_in.in_layer.weight"],
        config: flux_config,
    },
    Layout {
        class: "WanTransformer3DModel",
        lines: &[WAN],
        signs: &["blocks.0.self_attn.q.weight"],
        config: wan_config,
    },
    Layout {
        class: "ZImageTransformer2DModel",
        lines: &[Z_IMAGE],
        signs: &["layers.0.attention.qkv.weight", "x_pad_token"],
        config: z_image_config,
    },
];

/// An original tensor, and the parameters whose rows it holds.
struct Held {
    original: String,
    parameters: Vec<String>,
    swapped: bool,
}

impl Layout {
    fn of(weights: &Shards) -> Option<&'static Self> {
        LAYOUTS.iter().find(|layout| layout.signs.iter().all(|sign| weights.dims(sign).is_some()))
    }

    /// The lines with all numbers and endings that a model has; parameters that are in none have the same name.
    fn held(&self, params: &Params) -> Vec<Held> {
        let mut all = Vec::new();
        for (original, parts) in self.lines.iter().copied().flatten() {
            for n in 0.. {
                let fill = |name: &str| name.replace("{}", &n.to_string());
                let found: Vec<Held> = ["", ".weight", ".bias"]
                    .iter()
                    .map(|end| Held {
                        original: fill(original) + end,
                        parameters: parts.iter().map(|part| fill(part) + end).collect(),
                        swapped: *parts == SWAPPED,
                    })
                    .filter(|held| held.parameters.iter().all(|name| params.get(name).is_some()))
                    .collect();
                let more = !found.is_empty() && original.contains("{}");
                all.extend(found);
                if !more {
                    break;
                }
            }
        }
        let named: HashSet<&String> = all.iter().flat_map(|held: &Held| &held.parameters).collect();
        let alike = |name: &str| Held { original: name.into(), parameters: vec![name.into()], swapped: false };
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

/// The class whose authors' names are diffusers' own.
const SAME: &str = "QwenImageTransformer2DModel";

/// A model's tensors in the layout of its authors.
///
/// # Errors
/// When that layout is not known here, or the device fails.
pub fn tensors(model: &dyn Transformer) -> Result<Vec<(String, Tensor)>> {
    let class = model.config()["_class_name"].as_str().unwrap_or_default().to_owned();
    let params = &model.params().base();
    let kept = |name: &str| params.get(name).map(|param| param.kept()).transpose();
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
        all.push((held.original, whole));
    }
    Ok(all)
}

/// How many blocks have a tensor of that name.
fn blocks(weights: &Shards, name: &str) -> usize {
    (0..).take_while(|n| weights.dims(&name.replace("{}", &n.to_string())).is_some()).count()
}

fn flux_config(weights: &Shards) -> Option<Value> {
    let dims = |name| weights.dims(name).filter(|dims| !dims.is_empty());
    let head = dims("double_blocks.0.img_attn.norm.query_norm.scale")?[0];
    let [width, channels] = *dims("img_in.weight")? else { return None };
    // The axes of the rotary tables are in no tensor: only the published ones are known.
    (head == 128).then_some(())?;
    let outputs = dims("final_layer.linear.weight")?[0];
    Some(json!({
        "_class_name": "FluxTransformer2DModel",
        "in_channels": channels,
        "out_channels": (outputs != channels).then_some(outputs),
        "num_layers": blocks(weights, "double_blocks.{}.img_attn.qkv.weight"),
        "num_single_layers": blocks(weights, "single_blocks.{}.linear1.weight"),
        "attention_head_dim": head,
        "num_attention_heads": width / head,
        "joint_attention_dim": *dims("txt_in.weight")?.get(1)?,
        "pooled_projection_dim": *dims("vector_in.in_layer.weight")?.get(1)?,
        "guidance_embeds": dims("guidance_in.in_layer.weight").is_some(),
    }))
}

fn flux2_config(weights: &Shards) -> Option<Value> {
    let dims = |name| weights.dims(name).filter(|dims| !dims.is_empty());
    let head = dims("double_blocks.0.img_attn.norm.query_norm.scale")?[0];
    let [width, channels] = *dims("img_in.weight")? else { return None };
    // The axes of the rotary tables are in no tensor: only the published ones are known.
    (head == 128).then_some(())?;
    let outputs = dims("final_layer.linear.weight")?[0];
    Some(json!({
        "_class_name": "Flux2Transformer2DModel",
        "in_channels": channels,
        "out_channels": (outputs != channels).then_some(outputs),
        "num_layers": blocks(weights, "double_blocks.{}.img_attn.qkv.weight"),
        "num_single_layers": blocks(weights, "single_blocks.{}.linear1.weight"),
        "attention_head_dim": head,
        "num_attention_heads": width / head,
        "joint_attention_dim": *dims("txt_in.weight")?.get(1)?,
        "mlp_ratio": *dims("double_blocks.0.img_mlp.2.weight")?.get(1)? as f64 / width as f64,
        "guidance_embeds": dims("guidance_in.in_layer.weight").is_some(),
    }))
}

fn z_image_config(weights: &Shards) -> Option<Value> {
    let dims = |name| weights.dims(name).filter(|dims| !dims.is_empty());
    let head = dims("layers.0.attention.q_norm.weight")?[0];
    let [width, inputs] = *dims("x_embedder.weight")? else { return None };
    // The published models' axes and their lengths are in no tensor.
    (head == 128).then_some(())?;
    Some(json!({
        "_class_name": "ZImageTransformer2DModel",
        "in_channels": inputs / 4,
        "dim": width,
        "n_layers": blocks(weights, "layers.{}.attention.qkv.weight"),
        "n_refiner_layers": blocks(weights, "noise_refiner.{}.attention.qkv.weight"),
        "n_heads": width / head,
        "n_kv_heads": width / head,
        "cap_feat_dim": *dims("cap_embedder.1.weight")?.get(1)?,
        "axes_lens": [1536, 512, 512],
    }))
}

fn wan_config(weights: &Shards) -> Option<Value> {
    let dims = |name| weights.dims(name).filter(|dims| !dims.is_empty());
    let [width, channels, frames, height, side] = *dims("patch_embedding.weight")? else { return None };
    // Heads are 128 wide in all published models.
    (width % 128 == 0).then_some(())?;
    let mut config = json!({
        "_class_name": "WanTransformer3DModel",
        "patch_size": [frames, height, side],
        "num_attention_heads": width / 128,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": dims("head.head.weight")?[0] / (frames * height * side).max(1),
        "text_dim": *dims("text_embedding.0.weight")?.get(1)?,
        "freq_dim": *dims("time_embedding.0.weight")?.get(1)?,
        "ffn_dim": dims("blocks.0.ffn.0.weight")?[0],
        "num_layers": blocks(weights, "blocks.{}.self_attn.q.weight"),
        "cross_attn_norm": dims("blocks.0.norm3.weight").is_some(),
    });
    if let Some(image) = dims("img_emb.proj.1.weight") {
        config["image_dim"] = (*image.get(1)?).into();
        config["added_kv_proj_dim"] = width.into();
    }
    if let Some(positions) = dims("img_emb.emb_pos") {
        config["pos_embed_seq_len"] = (*positions.get(1)?).into();
    }
    Some(config)
}

/// Qwen-Image's names are the same everywhere.
fn qwen_config(weights: &Shards) -> Option<Value> {
    let dims = |name| weights.dims(name).filter(|dims| !dims.is_empty());
    dims("txt_norm.weight")?;
    let head = dims("transformer_blocks.0.attn.norm_q.weight")?[0];
    let [width, channels] = *dims("img_in.weight")? else { return None };
    (head == 128).then_some(())?;
    Some(json!({
        "_class_name": "QwenImageTransformer2DModel",
        "in_channels": channels,
        "out_channels": dims("proj_out.weight")?[0] / 4,
        "num_layers": blocks(weights, "transformer_blocks.{}.attn.to_q.weight"),
        "attention_head_dim": head,
        "num_attention_heads": width / head,
        "joint_attention_dim": *dims("txt_in.weight")?.get(1)?,
    }))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use flowtape_engine::Device;
    use flowtape_engine::safetensors::{SafeTensors, save};

    use super::*;
    use crate::checkpoint::load_weights;

    /// Small models with the widths of heads that the published ones have, so that their configurations can be told.
    fn models() -> Vec<Value> {
        vec![
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
            let tensors = tensors(&*model).unwrap();
            let elements: u64 = tensors.iter().map(|(_, tensor)| tensor.numel() as u64).sum();
            assert_eq!(elements, model.params().numel(), "{given}: every parameter, once");
            // As ComfyUI ships them, too.
            for prefix in ["", "model.diffusion_model."] {
                let mut named: Vec<(String, Tensor)> =
                    tensors.iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone())).collect();
                if !prefix.is_empty() {
                    // Beside other models.
                    named.push(("vae.decoder.conv_in.bias".into(), tensors[0].1.clone()));
                }
                save(&path, &named, &BTreeMap::new()).unwrap();
                let weights = open(&path);
                let told = config(&weights).unwrap();
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
        let given = &models()[1];
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
