//! Models of pictures.

use super::{DOUBLE, FLAT, HERE, SINGLE, SWAPPED, Table};

/// The attention of Black Forest Labs' blocks with two streams.
pub(super) const DOUBLE_ATTENTION: &[Table] = &[(
    DOUBLE,
    &[
        ("img_attn.qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("txt_attn.qkv", &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
        ("img_attn.norm.query_norm.scale", &["attn.norm_q.weight"]),
        ("img_attn.norm.key_norm.scale", &["attn.norm_k.weight"]),
        ("txt_attn.norm.query_norm.scale", &["attn.norm_added_q.weight"]),
        ("txt_attn.norm.key_norm.scale", &["attn.norm_added_k.weight"]),
        ("img_attn.proj", &["attn.to_out.0"]),
        ("txt_attn.proj", &["attn.to_add_out"]),
    ],
)];

/// What the blocks of FLUX.1 and Chroma have beside their attention and their modulation.
pub(super) const FLUX_BLOCKS: &[Table] = &[
    (
        DOUBLE,
        &[
            ("img_mlp.0", &["ff.net.0.proj"]),
            ("img_mlp.2", &["ff.net.2"]),
            ("txt_mlp.0", &["ff_context.net.0.proj"]),
            ("txt_mlp.2", &["ff_context.net.2"]),
        ],
    ),
    (
        SINGLE,
        &[
            ("linear1", &["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
            ("norm.query_norm.scale", &["attn.norm_q.weight"]),
            ("norm.key_norm.scale", &["attn.norm_k.weight"]),
            ("linear2", &["proj_out"]),
        ],
    ),
];

/// Black Forest Labs' FLUX.1 (`model.py`), but for [`DOUBLE_ATTENTION`] and [`FLUX_BLOCKS`].
pub(super) const FLUX: &[Table] = &[
    (
        HERE,
        &[
            ("img_in", &["x_embedder"]),
            ("txt_in", &["context_embedder"]),
            ("final_layer.adaLN_modulation.1", SWAPPED),
            ("final_layer.linear", &["proj_out"]),
        ],
    ),
    (
        &[
            ("time_in.", "time_text_embed.timestep_embedder."),
            ("vector_in.", "time_text_embed.text_embedder."),
            ("guidance_in.", "time_text_embed.guidance_embedder."),
        ],
        &[("in_layer", &["linear_1"]), ("out_layer", &["linear_2"])],
    ),
    (DOUBLE, &[("img_mod.lin", &["norm1.linear"]), ("txt_mod.lin", &["norm1_context.linear"])]),
    (SINGLE, &[("modulation.lin", &["norm.linear"])]),
];

/// Black Forest Labs' FLUX.2 (`flux2`'s `model.py`), but for [`DOUBLE_ATTENTION`].
pub(super) const FLUX2: &[Table] = &[
    (
        HERE,
        &[
            ("img_in", &["x_embedder"]),
            ("txt_in", &["context_embedder"]),
            ("double_stream_modulation_img.lin", &["double_stream_modulation_img.linear"]),
            ("double_stream_modulation_txt.lin", &["double_stream_modulation_txt.linear"]),
            ("single_stream_modulation.lin", &["single_stream_modulation.linear"]),
            ("final_layer.adaLN_modulation.1", SWAPPED),
            ("final_layer.linear", &["proj_out"]),
        ],
    ),
    (
        &[
            ("time_in.", "time_guidance_embed.timestep_embedder."),
            ("guidance_in.", "time_guidance_embed.guidance_embedder."),
        ],
        &[("in_layer", &["linear_1"]), ("out_layer", &["linear_2"])],
    ),
    (
        DOUBLE,
        &[
            ("img_mlp.0", &["ff.linear_in"]),
            ("img_mlp.2", &["ff.linear_out"]),
            ("txt_mlp.0", &["ff_context.linear_in"]),
            ("txt_mlp.2", &["ff_context.linear_out"]),
        ],
    ),
    (
        SINGLE,
        &[
            ("linear1", &["attn.to_qkv_mlp_proj"]),
            ("linear2", &["attn.to_out"]),
            ("norm.query_norm.scale", &["attn.norm_q.weight"]),
            ("norm.key_norm.scale", &["attn.norm_k.weight"]),
        ],
    ),
];

/// Z-Image; what is not here has diffusers' names.
pub(super) const Z_IMAGE: &[Table] = &[
    (
        HERE,
        &[
            ("x_embedder", &["all_x_embedder.2-1"]),
            ("final_layer.adaLN_modulation.1", &["all_final_layer.2-1.adaLN_modulation.1"]),
            ("final_layer.linear", &["all_final_layer.2-1.linear"]),
        ],
    ),
    (
        &[
            ("layers.{}.", "layers.{}."),
            ("noise_refiner.{}.", "noise_refiner.{}."),
            ("context_refiner.{}.", "context_refiner.{}."),
        ],
        &[
            ("attention.qkv", &["attention.to_q", "attention.to_k", "attention.to_v"]),
            ("attention.out", &["attention.to_out.0"]),
            ("attention.q_norm", &["attention.norm_q"]),
            ("attention.k_norm", &["attention.norm_k"]),
        ],
    ),
];

/// Chroma (`lodestones/Chroma`), but for [`DOUBLE_ATTENTION`] and [`FLUX_BLOCKS`].
pub(super) const CHROMA: &[Table] = &[(
    HERE,
    &[
        ("img_in", &["x_embedder"]),
        ("txt_in", &["context_embedder"]),
        ("distilled_guidance_layer.layers.{}.in_layer", &["distilled_guidance_layer.layers.{}.linear_1"]),
        ("distilled_guidance_layer.layers.{}.out_layer", &["distilled_guidance_layer.layers.{}.linear_2"]),
        ("distilled_guidance_layer.norms.{}.scale", &["distilled_guidance_layer.norms.{}.weight"]),
        ("final_layer.linear", &["proj_out"]),
    ],
)];

/// Black Forest Labs' FLUX.3. Attention and feed-forward are alike in all of its blocks.
pub(super) const FLUX3: &[Table] = &[
    (
        HERE,
        &[
            ("emb_in.image", &["x_embedders.image"]),
            ("emb_in.image_cond", &["x_embedders.image_cond"]),
            ("txt_in", &["context_embedder"]),
            ("time_in.in_layer", &["timestep_embedder.linear_1"]),
            ("time_in.out_layer", &["timestep_embedder.linear_2"]),
            ("final_layer.image.linear", &["proj_out"]),
            ("final_layer.image.adaLN_modulation.1", SWAPPED),
            ("early_stream_modulations.image.lin", &["early_stream_modulations.image.linear"]),
            ("early_stream_modulations.image_cond.lin", &["early_stream_modulations.image_cond.linear"]),
            ("early_stream_modulations.txt.lin", &["early_stream_modulations.txt.linear"]),
            ("single_stream_modulations.image.lin", &["single_stream_modulations.image.linear"]),
            ("single_stream_modulations.image_cond.lin", &["single_stream_modulations.image_cond.linear"]),
            ("single_stream_modulations.txt.lin", &["single_stream_modulations.txt.linear"]),
        ],
    ),
    (
        &[
            ("content_mode_blocks.image.{}.", "mode_blocks.image.{}."),
            ("content_mode_blocks.image_cond.{}.", "mode_blocks.image_cond.{}."),
            ("txt_mode_blocks.{}.", "txt_mode_blocks.{}."),
            ("single_blocks.{}.", "single_transformer_blocks.{}."),
        ],
        &[
            ("q_proj", &["attn.to_q"]),
            ("k_proj", &["attn.to_k"]),
            ("v_proj", &["attn.to_v"]),
            ("attn_out", &["attn.to_out.0"]),
            ("norm.query_norm.scale", &["attn.norm_q.weight"]),
            ("norm.key_norm.scale", &["attn.norm_k.weight"]),
            ("mlp_in", &["ff.linear_in"]),
            ("mlp_out", &["ff.linear_out"]),
        ],
    ),
];

/// Qwen-Image-2.1 as ComfyUI ships it; what is not here has diffusers' names.
pub(super) const QWEN_IMAGE_21: &[Table] = &[(
    HERE,
    &[(
        "transformer_blocks.{}.img_mlp.gate_up",
        &["transformer_blocks.{}.img_mlp.gate_layer", "transformer_blocks.{}.img_mlp.proj"],
    )],
)];

/// Lumina-Image 2.0 (`models/model.py`); its order of heads, and of a block's modulation, is diffusers'.
pub(super) const LUMINA2: &[Table] = &[
    (
        HERE,
        &[
            ("t_embedder.mlp.0", &["time_caption_embed.timestep_embedder.linear_1"]),
            ("t_embedder.mlp.2", &["time_caption_embed.timestep_embedder.linear_2"]),
            ("cap_embedder.0", &["time_caption_embed.caption_embedder.0"]),
            ("cap_embedder.1", &["time_caption_embed.caption_embedder.1"]),
            ("final_layer.adaLN_modulation.1", &["norm_out.linear_1"]),
            ("final_layer.linear", &["norm_out.linear_2"]),
            ("context_refiner.{}.attention_norm1", &["context_refiner.{}.norm1"]),
        ],
    ),
    (
        &[
            ("layers.{}.", "layers.{}."),
            ("noise_refiner.{}.", "noise_refiner.{}."),
            ("context_refiner.{}.", "context_refiner.{}."),
        ],
        &[
            ("attention.qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
            ("attention.out", &["attn.to_out.0"]),
            ("attention.q_norm", &["attn.norm_q"]),
            ("attention.k_norm", &["attn.norm_k"]),
            ("feed_forward.w1", &["feed_forward.linear_1"]),
            ("feed_forward.w2", &["feed_forward.linear_2"]),
            ("feed_forward.w3", &["feed_forward.linear_3"]),
            ("attention_norm2", &["norm2"]),
        ],
    ),
    (
        &[("layers.{}.", "layers.{}."), ("noise_refiner.{}.", "noise_refiner.{}.")],
        &[("attention_norm1", &["norm1.norm"]), ("adaLN_modulation.1", &["norm1.linear"])],
    ),
];

/// Krea 2.
pub(super) const KREA2: &[Table] = &[
    (
        HERE,
        &[
            ("first", &["img_in"]),
            ("tmlp.0", &["time_embed.linear_1"]),
            ("tmlp.2", &["time_embed.linear_2"]),
            ("tproj.1", &["time_mod_proj"]),
            ("txtmlp.0.scale", &["txt_in.norm.weight"]),
            ("txtmlp.1", &["txt_in.linear_1"]),
            ("txtmlp.3", &["txt_in.linear_2"]),
            ("txtfusion.projector", &["text_fusion.projector"]),
            ("last.linear", &["final_layer.linear"]),
            ("last.norm.scale", &["final_layer.norm.weight"]),
            ("last.modulation.lin", &["final_layer.scale_shift_table"]),
            ("blocks.{}.mod.lin", FLAT),
        ],
    ),
    (
        &[
            ("blocks.{}.", "transformer_blocks.{}."),
            ("txtfusion.layerwise_blocks.{}.", "text_fusion.layerwise_blocks.{}."),
            ("txtfusion.refiner_blocks.{}.", "text_fusion.refiner_blocks.{}."),
        ],
        &[
            ("attn.wq", &["attn.to_q"]),
            ("attn.wk", &["attn.to_k"]),
            ("attn.wv", &["attn.to_v"]),
            ("attn.wo", &["attn.to_out.0"]),
            ("attn.gate", &["attn.to_gate"]),
            ("attn.qknorm.qnorm.scale", &["attn.norm_q.weight"]),
            ("attn.qknorm.knorm.scale", &["attn.norm_k.weight"]),
            ("mlp.gate", &["ff.gate"]),
            ("mlp.up", &["ff.up"]),
            ("mlp.down", &["ff.down"]),
            ("prenorm.scale", &["norm1.weight"]),
            ("postnorm.scale", &["norm2.weight"]),
        ],
    ),
];
