//! The tables: a line for each layer whose name or order is another one than diffusers', and the places that have such lines.

mod images;
mod videos;

use flowtape_engine::safetensors::Shards;
use serde_json::Value;

use self::images::*;
use self::videos::*;
use super::configs::{chroma_config, flux_config, flux2_config, not_told, wan_config, z_image_config};

/// An original layer or tensor, and those of diffusers whose rows it holds, one after the other. `{}` is a block's number.
pub(in crate::original) type Line = (&'static str, &'static [&'static str]);

/// What stands before the names of lines: in the original, and in diffusers.
pub(in crate::original) type Place = (&'static str, &'static str);

/// Lines, and the places that have them all.
pub(in crate::original) type Table = (&'static [Place], &'static [Line]);

/// Lines whose names are whole.
const HERE: &[Place] = &[("", "")];

/// Black Forest Labs' blocks with two streams, which HunyuanVideo has, too.
const DOUBLE: &[Place] = &[("double_blocks.{}.", "transformer_blocks.{}.")];

/// Their blocks with one stream.
const SINGLE: &[Place] = &[("single_blocks.{}.", "single_transformer_blocks.{}.")];

/// The layer of diffusers' the halves of whose rows are in another order: it has scale before shift.
pub(in crate::original) const SWAPPED: &[&str] = &["norm_out.linear"];

/// The tensor that is one row there, and a row for each of its parts in diffusers.
pub(in crate::original) const FLAT: &[&str] = &["transformer_blocks.{}.scale_shift_table"];

/// A layout that is not diffusers'.
pub(in crate::original) struct Layout {
    pub class: &'static str,
    pub tables: &'static [&'static [Table]],
    /// Tensors that are together in no other one.
    pub signs: &'static [&'static str],
    /// The configuration of weights, as far as their sizes tell it.
    pub config: fn(&Shards) -> Option<Value>,
}

/// All of them. Of several for a class the first is written, and all are read.
pub(in crate::original) const LAYOUTS: &[Layout] = &[
    Layout {
        class: "Flux2Transformer2DModel",
        tables: &[FLUX2, DOUBLE_ATTENTION],
        signs: &["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"],
        config: flux2_config,
    },
    Layout {
        class: "FluxTransformer2DModel",
        tables: &[FLUX, FLUX_BLOCKS, DOUBLE_ATTENTION],
        signs: &["double_blocks.0.img_attn.qkv.weight", "img_in.weight", "vector_in.in_layer.weight"],
        config: flux_config,
    },
    Layout {
        class: "WanTransformer3DModel",
        tables: &[WAN],
        signs: &["blocks.0.self_attn.q.weight"],
        config: wan_config,
    },
    Layout {
        class: "ZImageTransformer2DModel",
        tables: &[Z_IMAGE],
        signs: &["layers.0.attention.qkv.weight", "x_pad_token"],
        config: z_image_config,
    },
    Layout {
        class: "ChromaTransformer2DModel",
        tables: &[CHROMA, FLUX_BLOCKS, DOUBLE_ATTENTION],
        signs: &["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"],
        config: chroma_config,
    },
    Layout {
        class: "Flux3Transformer2DModel",
        tables: &[FLUX3],
        signs: &["emb_in.image.weight", "content_mode_blocks.image.0.q_proj.weight"],
        config: not_told,
    },
    Layout {
        class: "QwenImage21Transformer2DModel",
        tables: &[QWEN_IMAGE_21],
        signs: &["transformer_blocks.0.img_mlp.gate_up.weight"],
        config: not_told,
    },
    Layout {
        class: "Lumina2Transformer2DModel",
        tables: &[LUMINA2],
        signs: &["layers.0.attention.qkv.weight", "cap_embedder.0.weight", "final_layer.linear.weight"],
        config: not_told,
    },
    Layout {
        class: "Krea2Transformer2DModel",
        tables: &[KREA2],
        signs: &["blocks.0.attn.wq.weight", "txtfusion.projector.weight"],
        config: not_told,
    },
    Layout {
        class: "HunyuanVideo15Transformer3DModel",
        tables: &[HUNYUAN_VIDEO_15, HUNYUAN_VIDEO_15_COMFYUI],
        signs: &["double_blocks.0.img_attn.qkv.weight", "byt5_in.fc1.weight"],
        config: not_told,
    },
    Layout {
        class: "HunyuanVideo15Transformer3DModel",
        tables: &[HUNYUAN_VIDEO_15, HUNYUAN_VIDEO_15_AUTHORS],
        signs: &["double_blocks.0.img_attn_q.weight", "byt5_in.fc1.weight"],
        config: not_told,
    },
    Layout {
        class: "LTX2VideoTransformer3DModel",
        tables: &[LTX2],
        signs: &["patchify_proj.weight", "audio_patchify_proj.weight"],
        config: not_told,
    },
];
