//! What other programs call the layers of an adapter's file.
//!
//! A key is a layer and a part. Layers are written as paths with dots behind a prefix, or with underscores behind another one;
//! their names are diffusers' or those of the original model, some of whose layers hold several of diffusers'.

use std::collections::{HashMap, HashSet};

use flowtape_engine::nn::Params;

use crate::original::{self, Layer};

/// Prefixes of paths with dots.
const DOTTED: [&str; 5] = ["transformer.", "diffusion_model.", "base_model.model.", "unet.base_model.model.", ""];
/// Prefixes of paths with underscores: kohya's, OneTrainer's, SimpleTuner's.
const UNDERSCORED: [&str; 3] = ["lora_unet_", "lora_transformer_", "lycoris_"];

/// Ends of keys, and the names of our parameters.
const PARTS: [(&str, &str); 20] = [
    (".lora_A.weight", "lora_A.weight"),
    (".lora_B.weight", "lora_B.weight"),
    (".lora_A.default.weight", "lora_A.weight"),
    (".lora_B.default.weight", "lora_B.weight"),
    (".lora_down.weight", "lora_A.weight"),
    (".lora_up.weight", "lora_B.weight"),
    (".lora.down.weight", "lora_A.weight"),
    (".lora.up.weight", "lora_B.weight"),
    (".lora_magnitude_vector", "lora_magnitude"),
    (".dora_scale", "lora_magnitude"),
    (".hada_w1_a", "hada_w1_a"),
    (".hada_w1_b", "hada_w1_b"),
    (".hada_w2_a", "hada_w2_a"),
    (".hada_w2_b", "hada_w2_b"),
    (".lokr_w1", "lokr_w1"),
    (".lokr_w1_a", "lokr_w1_a"),
    (".lokr_w1_b", "lokr_w1_b"),
    (".lokr_w2", "lokr_w2"),
    (".lokr_w2_a", "lokr_w2_a"),
    (".lokr_w2_b", "lokr_w2_b"),
];
/// The end of a layer's alpha.
const ALPHA: &str = ".alpha";

/// What a key names beside its layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    /// A parameter of ours.
    Tensor(&'static str),
    /// One number.
    Alpha,
}

/// A key as the text of its layer and the part.
pub(super) fn split(key: &str) -> Option<(&str, Part)> {
    if let Some(layer) = key.strip_suffix(ALPHA) {
        return Some((layer, Part::Alpha));
    }
    PARTS.iter().find_map(|(end, name)| Some((key.strip_suffix(end)?, Part::Tensor(name))))
}

/// Rows of a layer of the original model that are a layer of diffusers'.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    /// diffusers' path.
    pub module: String,
    /// The first row, where the layer holds several.
    pub rows: Option<(usize, usize)>,
    /// Whether its two halves stand the other way round (scale and shift).
    pub swapped: bool,
}

/// The layers of a model by all their names.
pub(super) struct Names(HashMap<String, Vec<Piece>>);

impl Names {
    /// Of a model's linear layers: diffusers' names, and those of the layouts of its class.
    pub fn of(class: &str, params: &Params) -> Self {
        let mut names = HashMap::<String, Vec<Piece>>::new();
        for layer in original::linears(class, params) {
            let several = layer.modules.len() > 1;
            let mut start = 0;
            let pieces = layer.modules.into_iter().map(|module| {
                let count = rows(params, &module);
                let rows = several.then_some((start, count));
                start += count;
                Piece { module, rows, swapped: layer.swapped }
            });
            names.entry(layer.original).or_insert_with(|| pieces.collect());
        }
        let with_underscores = names.iter().map(|(name, pieces)| (name.replace('.', "_"), pieces.clone()));
        let all: Vec<_> = with_underscores.collect();
        names.extend(all);
        Self(names)
    }

    /// The layers that a key's text stands for.
    pub fn find(&self, text: &str) -> Option<&[Piece]> {
        let prefixes = DOTTED.iter().chain(&UNDERSCORED);
        prefixes.filter_map(|prefix| text.strip_prefix(prefix)).find_map(|name| self.0.get(name)).map(Vec::as_slice)
    }
}

/// Rows of a linear layer's weight.
pub(super) fn rows(params: &Params, module: &str) -> usize {
    params.get(&format!("{module}.weight")).and_then(|weight| weight.dims().first().copied()).unwrap_or(0)
}

/// How ComfyUI finds the layers of a class (`comfy/lora.py`, `model_lora_keys_unet`).
struct InComfyui {
    class: &'static str,
    /// What stands before diffusers' names, with underscores, where it knows those: they name rows of its own layers, too.
    diffusers: Option<&'static str>,
    /// How those of diffusers' names begin that it does not know.
    unknown: &'static [&'static str],
}

/// The classes whose adapters ComfyUI loads. It finds every layer of its own models, whose names are those of the original layout.
const COMFYUI: [InComfyui; 9] = [
    InComfyui { class: "FluxTransformer2DModel", diffusers: Some("lora_transformer_"), unknown: &[] },
    InComfyui {
        class: "Flux2Transformer2DModel",
        diffusers: Some("lora_transformer_"),
        unknown: &["time_guidance_embed.", "double_stream_modulation_", "single_stream_modulation."],
    },
    InComfyui {
        class: "ChromaTransformer2DModel",
        diffusers: Some("lora_transformer_"),
        unknown: &["distilled_guidance_layer."],
    },
    InComfyui { class: "ZImageTransformer2DModel", diffusers: Some("lycoris_"), unknown: &[] },
    InComfyui { class: "HunyuanVideo15Transformer3DModel", diffusers: None, unknown: &[] },
    InComfyui { class: "LTX2VideoTransformer3DModel", diffusers: None, unknown: &[] },
    InComfyui { class: "Lumina2Transformer2DModel", diffusers: None, unknown: &[] },
    InComfyui { class: "QwenImageTransformer2DModel", diffusers: None, unknown: &[] },
    InComfyui { class: "WanTransformer3DModel", diffusers: None, unknown: &[] },
];

/// What ComfyUI calls layers of diffusers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum ForComfyui {
    /// One by a name.
    One(String, String),
    /// Several that are rows of one of its own, or whose rows are in another order there.
    Fused(String, Layer),
}

/// The layers of a model as ComfyUI finds them, each of diffusers' once; none of a class that it does not know.
pub(super) fn comfyui(class: &str, params: &Params) -> Option<Vec<ForComfyui>> {
    let known = COMFYUI.iter().find(|known| known.class == class)?;
    let named = |prefix: &str, path: &str| format!("{prefix}{}", path.replace('.', "_"));
    let (mut all, mut done) = (Vec::new(), HashSet::new());
    for layer in original::linears(class, params) {
        if layer.modules.iter().any(|module| done.contains(module)) {
            continue;
        }
        done.extend(layer.modules.iter().cloned());
        let is_known = |module: &String| !known.unknown.iter().any(|start| module.starts_with(start));
        let own = named("lora_unet_", &layer.original);
        match (known.diffusers.filter(|_| layer.modules.iter().all(is_known)), &layer.modules[..]) {
            (Some(prefix), modules) => {
                all.extend(modules.iter().map(|module| ForComfyui::One(named(prefix, module), module.clone())));
            }
            (None, [module]) if !layer.swapped => all.push(ForComfyui::One(own, module.clone())),
            (None, _) => all.push(ForComfyui::Fused(own, layer)),
        }
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use flowtape_engine::DType;
    use flowtape_engine::meta::Meta;
    use flowtape_engine::nn::ParamBuilder;
    use serde_json::json;

    use super::*;
    use crate::create_model;

    #[test]
    fn names_of_other_programs_are_found() {
        let config = json!({
            "_class_name": "FluxTransformer2DModel", "in_channels": 4, "num_layers": 1, "num_single_layers": 2,
            "attention_head_dim": 4, "num_attention_heads": 1, "joint_attention_dim": 4, "pooled_projection_dim": 4,
            "axes_dims_rope": [0, 2, 2],
        });
        let model = create_model(&config, &ParamBuilder::new(0, DType::F32, &Meta::default().device())).unwrap();
        let names = Names::of("FluxTransformer2DModel", model.params());
        for text in ["lora_unet_single_blocks_1_linear1", "diffusion_model.single_blocks.1.linear1"] {
            let rows: Vec<_> = names.find(text).unwrap().iter().map(|piece| piece.rows.unwrap()).collect();
            assert_eq!(rows, [(0, 4), (4, 4), (8, 4), (12, 16)]);
        }
        for text in [
            "transformer.single_transformer_blocks.1.attn.to_k",
            "lora_transformer_single_transformer_blocks_1_attn_to_k",
            "lycoris_single_transformer_blocks_1_attn_to_k",
            "base_model.model.single_transformer_blocks.1.attn.to_k",
        ] {
            let found = names.find(text).unwrap();
            assert_eq!((found.len(), &*found[0].module), (1, "single_transformer_blocks.1.attn.to_k"));
        }
        assert!(names.find("lora_te1_text_model_encoder_layers_0_mlp_fc1").is_none());
        assert_eq!(split("a.b.lora_up.weight"), Some(("a.b", Part::Tensor("lora_B.weight"))));
        assert_eq!(split("a_b.alpha"), Some(("a_b", Part::Alpha)));
        assert_eq!(split("a.weight"), None);
    }
}
