//! What other programs call the layers of an adapter's file.
//!
//! A key is a layer and a part. Layers are written as paths with dots behind a prefix, or with underscores behind another one;
//! their names are diffusers' or those of the original model, some of whose layers hold several of diffusers'.

use std::collections::HashMap;

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

/// Wan's output projection; FLUX's has the same name with diffusers and another one with its authors.
const WAN_HEAD: &str = "head.head";

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
    /// Of a model's linear layers, `[out, in]` by path.
    pub fn of(linears: &[(String, [usize; 2])]) -> Self {
        let mut names = HashMap::<String, Vec<Piece>>::new();
        for (module, [outputs, _]) in linears {
            let whole = Piece { module: module.clone(), rows: None, swapped: false };
            names.insert(module.clone(), vec![whole.clone()]);
            if module == "proj_out" {
                names.insert(WAN_HEAD.into(), vec![whole]);
            }
            let Some((original, place)) = original(module) else { continue };
            let rows = (place != Place::Whole && place != Place::Swapped).then_some((0, *outputs));
            let piece = Piece { module: module.clone(), rows, swapped: place == Place::Swapped };
            names.entry(original).or_default().push(piece);
        }
        // Pieces stand in their order, one behind the other.
        for pieces in names.values_mut().filter(|pieces| pieces.len() > 1) {
            pieces.sort_by_key(|piece| original(&piece.module).map_or(0, |(_, place)| place as usize));
            let mut start = 0;
            for (from, count) in
                pieces.iter_mut().filter_map(|piece| piece.rows.as_mut()).map(|rows| (&mut rows.0, rows.1))
            {
                *from = start;
                start += count;
            }
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

/// Where a layer stands within the original's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Q,
    K,
    V,
    Mlp,
    Whole,
    Swapped,
}

/// The original model's layer that holds one of diffusers', for FLUX (black-forest-labs' `flux`) and Wan.
fn original(module: &str) -> Option<(String, Place)> {
    use Place::{K, Mlp, Q, Swapped, V, Whole};
    let basic = [
        ("x_embedder", "img_in", Whole),
        ("context_embedder", "txt_in", Whole),
        ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer", Whole),
        ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer", Whole),
        ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer", Whole),
        ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer", Whole),
        ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer", Whole),
        ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", Whole),
        ("norm_out.linear", "final_layer.adaLN_modulation.1", Swapped),
        ("proj_out", "final_layer.linear", Whole),
        // Wan.
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0", Whole),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2", Whole),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0", Whole),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2", Whole),
        ("condition_embedder.time_proj", "time_projection.1", Whole),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1", Whole),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3", Whole),
    ];
    if let Some((_, original, place)) = basic.iter().find(|(diffusers, ..)| *diffusers == module) {
        return Some(((*original).to_owned(), *place));
    }
    let double = [
        ("attn.to_q", "img_attn.qkv", Q),
        ("attn.to_k", "img_attn.qkv", K),
        ("attn.to_v", "img_attn.qkv", V),
        ("attn.add_q_proj", "txt_attn.qkv", Q),
        ("attn.add_k_proj", "txt_attn.qkv", K),
        ("attn.add_v_proj", "txt_attn.qkv", V),
        ("attn.to_out.0", "img_attn.proj", Whole),
        ("attn.to_add_out", "txt_attn.proj", Whole),
        ("norm1.linear", "img_mod.lin", Whole),
        ("norm1_context.linear", "txt_mod.lin", Whole),
        ("ff.net.0.proj", "img_mlp.0", Whole),
        ("ff.net.2", "img_mlp.2", Whole),
        ("ff_context.net.0.proj", "txt_mlp.0", Whole),
        ("ff_context.net.2", "txt_mlp.2", Whole),
        // FLUX.2.
        ("ff.linear_in", "img_mlp.0", Whole),
        ("ff.linear_out", "img_mlp.2", Whole),
        ("ff_context.linear_in", "txt_mlp.0", Whole),
        ("ff_context.linear_out", "txt_mlp.2", Whole),
    ];
    let single = [
        ("attn.to_q", "linear1", Q),
        ("attn.to_k", "linear1", K),
        ("attn.to_v", "linear1", V),
        ("proj_mlp", "linear1", Mlp),
        ("proj_out", "linear2", Whole),
        ("norm.linear", "modulation.lin", Whole),
        // FLUX.2.
        ("attn.to_qkv_mlp_proj", "linear1", Whole),
        ("attn.to_out", "linear2", Whole),
    ];
    let wan = [
        ("attn1.to_q", "self_attn.q", Whole),
        ("attn1.to_k", "self_attn.k", Whole),
        ("attn1.to_v", "self_attn.v", Whole),
        ("attn1.to_out.0", "self_attn.o", Whole),
        ("attn2.to_q", "cross_attn.q", Whole),
        ("attn2.to_k", "cross_attn.k", Whole),
        ("attn2.to_v", "cross_attn.v", Whole),
        ("attn2.to_out.0", "cross_attn.o", Whole),
        ("attn2.add_k_proj", "cross_attn.k_img", Whole),
        ("attn2.add_v_proj", "cross_attn.v_img", Whole),
        ("ffn.net.0.proj", "ffn.0", Whole),
        ("ffn.net.2", "ffn.2", Whole),
    ];
    let blocks: [(&str, &str, &[_]); 3] = [
        ("transformer_blocks.", "double_blocks.", &double),
        ("single_transformer_blocks.", "single_blocks.", &single),
        ("blocks.", "blocks.", &wan),
    ];
    blocks.iter().find_map(|(diffusers, prefix, layers)| {
        let (number, rest) = module.strip_prefix(diffusers)?.split_once('.')?;
        let (_, original, place) = layers.iter().find(|(layer, ..)| *layer == rest)?;
        Some((format!("{prefix}{number}.{original}"), *place))
    })
}

/// How ComfyUI finds a layer, if it does: it maps OneTrainer's names of FLUX's layers as diffusers has them, and kohya's of the
/// layers of its own models, which are the original ones; those of Qwen-Image, and of LTX's blocks, are diffusers'
/// (`comfy/lora.py`, `model_lora_keys_unet`).
pub(super) fn comfyui(class: &str, module: &str) -> Option<String> {
    let underscored = |prefix: &str, path: &str| Some(format!("{prefix}{}", path.replace('.', "_")));
    match class {
        // Its map of FLUX's layers is the one above.
        "FluxTransformer2DModel" | "Flux2Transformer2DModel" => {
            original(module).and_then(|_| underscored("lora_transformer_", module))
        }
        "WanTransformer3DModel" if module == "proj_out" => underscored("lora_unet_", WAN_HEAD),
        "WanTransformer3DModel" => underscored("lora_unet_", &original(module)?.0),
        "QwenImageTransformer2DModel" => underscored("lora_unet_", module),
        "LTX2VideoTransformer3DModel" if module.starts_with("transformer_blocks.") => underscored("lora_unet_", module),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_programs_are_found() {
        let linears = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"].map(|layer| {
            (format!("single_transformer_blocks.1.{layer}"), [if layer == "proj_mlp" { 8 } else { 2 }, 2])
        });
        let names = Names::of(&linears);
        for text in ["lora_unet_single_blocks_1_linear1", "diffusion_model.single_blocks.1.linear1"] {
            let rows: Vec<_> = names.find(text).unwrap().iter().map(|piece| piece.rows.unwrap()).collect();
            assert_eq!(rows, [(0, 2), (2, 2), (4, 2), (6, 8)]);
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
        let wan = comfyui("WanTransformer3DModel", "blocks.3.attn1.to_out.0");
        assert_eq!(wan.as_deref(), Some("lora_unet_blocks_3_self_attn_o"));
        assert_eq!(comfyui("HunyuanVideo15Transformer3DModel", "transformer_blocks.0.attn.to_q"), None);
    }
}
