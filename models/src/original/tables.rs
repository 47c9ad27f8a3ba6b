//! The tables: a line for each layer whose name or order is another one than diffusers'.

use flowtape_engine::safetensors::Shards;
use serde_json::Value;

use super::configs::{chroma_config, flux_config, flux2_config, not_told, wan_config, z_image_config};

/// An original layer or tensor, and those of diffusers whose rows it holds, one after the other. `{}` is a block's number.
pub(super) type Line = (&'static str, &'static [&'static str]);

/// The layer of diffusers' the halves of whose rows are in another order: it has scale before shift.
pub(super) const SWAPPED: &[&str] = &["norm_out.linear"];

/// The tensor that is one row there, and a row for each of its parts in diffusers.
pub(super) const FLAT: &[&str] = &["transformer_blocks.{}.scale_shift_table"];

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

/// What the blocks of FLUX.1 and Chroma have beside their attention and their modulation.
const FLUX_BLOCKS: &[Line] = &[
    ("double_blocks.{}.img_mlp.0", &["transformer_blocks.{}.ff.net.0.proj"]),
    ("double_blocks.{}.img_mlp.2", &["transformer_blocks.{}.ff.net.2"]),
    ("double_blocks.{}.txt_mlp.0", &["transformer_blocks.{}.ff_context.net.0.proj"]),
    ("double_blocks.{}.txt_mlp.2", &["transformer_blocks.{}.ff_context.net.2"]),
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
];

/// Black Forest Labs' FLUX.1 (`model.py`), but for [`DOUBLE_ATTENTION`] and [`FLUX_BLOCKS`].
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
    ("single_blocks.{}.modulation.lin", &["single_transformer_blocks.{}.norm.linear"]),
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

/// Chroma (`lodestones/Chroma`), but for [`DOUBLE_ATTENTION`] and [`FLUX_BLOCKS`].
const CHROMA: &[Line] = &[
    ("img_in", &["x_embedder"]),
    ("txt_in", &["context_embedder"]),
    ("distilled_guidance_layer.layers.{}.in_layer", &["distilled_guidance_layer.layers.{}.linear_1"]),
    ("distilled_guidance_layer.layers.{}.out_layer", &["distilled_guidance_layer.layers.{}.linear_2"]),
    ("distilled_guidance_layer.norms.{}.scale", &["distilled_guidance_layer.norms.{}.weight"]),
    ("final_layer.linear", &["proj_out"]),
];

/// Black Forest Labs' FLUX.3. Attention and feed-forward are alike in all of its blocks.
const FLUX3: &[Line] = &[
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
    ("content_mode_blocks.image.{}.q_proj", &["mode_blocks.image.{}.attn.to_q"]),
    ("content_mode_blocks.image.{}.k_proj", &["mode_blocks.image.{}.attn.to_k"]),
    ("content_mode_blocks.image.{}.v_proj", &["mode_blocks.image.{}.attn.to_v"]),
    ("content_mode_blocks.image.{}.attn_out", &["mode_blocks.image.{}.attn.to_out.0"]),
    ("content_mode_blocks.image.{}.norm.query_norm.scale", &["mode_blocks.image.{}.attn.norm_q.weight"]),
    ("content_mode_blocks.image.{}.norm.key_norm.scale", &["mode_blocks.image.{}.attn.norm_k.weight"]),
    ("content_mode_blocks.image.{}.mlp_in", &["mode_blocks.image.{}.ff.linear_in"]),
    ("content_mode_blocks.image.{}.mlp_out", &["mode_blocks.image.{}.ff.linear_out"]),
    ("content_mode_blocks.image_cond.{}.q_proj", &["mode_blocks.image_cond.{}.attn.to_q"]),
    ("content_mode_blocks.image_cond.{}.k_proj", &["mode_blocks.image_cond.{}.attn.to_k"]),
    ("content_mode_blocks.image_cond.{}.v_proj", &["mode_blocks.image_cond.{}.attn.to_v"]),
    ("content_mode_blocks.image_cond.{}.attn_out", &["mode_blocks.image_cond.{}.attn.to_out.0"]),
    ("content_mode_blocks.image_cond.{}.norm.query_norm.scale", &["mode_blocks.image_cond.{}.attn.norm_q.weight"]),
    ("content_mode_blocks.image_cond.{}.norm.key_norm.scale", &["mode_blocks.image_cond.{}.attn.norm_k.weight"]),
    ("content_mode_blocks.image_cond.{}.mlp_in", &["mode_blocks.image_cond.{}.ff.linear_in"]),
    ("content_mode_blocks.image_cond.{}.mlp_out", &["mode_blocks.image_cond.{}.ff.linear_out"]),
    ("txt_mode_blocks.{}.q_proj", &["txt_mode_blocks.{}.attn.to_q"]),
    ("txt_mode_blocks.{}.k_proj", &["txt_mode_blocks.{}.attn.to_k"]),
    ("txt_mode_blocks.{}.v_proj", &["txt_mode_blocks.{}.attn.to_v"]),
    ("txt_mode_blocks.{}.attn_out", &["txt_mode_blocks.{}.attn.to_out.0"]),
    ("txt_mode_blocks.{}.norm.query_norm.scale", &["txt_mode_blocks.{}.attn.norm_q.weight"]),
    ("txt_mode_blocks.{}.norm.key_norm.scale", &["txt_mode_blocks.{}.attn.norm_k.weight"]),
    ("txt_mode_blocks.{}.mlp_in", &["txt_mode_blocks.{}.ff.linear_in"]),
    ("txt_mode_blocks.{}.mlp_out", &["txt_mode_blocks.{}.ff.linear_out"]),
    ("single_blocks.{}.q_proj", &["single_transformer_blocks.{}.attn.to_q"]),
    ("single_blocks.{}.k_proj", &["single_transformer_blocks.{}.attn.to_k"]),
    ("single_blocks.{}.v_proj", &["single_transformer_blocks.{}.attn.to_v"]),
    ("single_blocks.{}.attn_out", &["single_transformer_blocks.{}.attn.to_out.0"]),
    ("single_blocks.{}.norm.query_norm.scale", &["single_transformer_blocks.{}.attn.norm_q.weight"]),
    ("single_blocks.{}.norm.key_norm.scale", &["single_transformer_blocks.{}.attn.norm_k.weight"]),
    ("single_blocks.{}.mlp_in", &["single_transformer_blocks.{}.ff.linear_in"]),
    ("single_blocks.{}.mlp_out", &["single_transformer_blocks.{}.ff.linear_out"]),
];

/// Qwen-Image-2.1 as ComfyUI ships it; what is not here has diffusers' names.
const QWEN_IMAGE_21: &[Line] = &[(
    "transformer_blocks.{}.img_mlp.gate_up",
    &["transformer_blocks.{}.img_mlp.gate_layer", "transformer_blocks.{}.img_mlp.proj"],
)];

/// Lumina-Image 2.0 (`models/model.py`); its order of heads, and of a block's modulation, is diffusers'.
const LUMINA2: &[Line] = &[
    ("t_embedder.mlp.0", &["time_caption_embed.timestep_embedder.linear_1"]),
    ("t_embedder.mlp.2", &["time_caption_embed.timestep_embedder.linear_2"]),
    ("cap_embedder.0", &["time_caption_embed.caption_embedder.0"]),
    ("cap_embedder.1", &["time_caption_embed.caption_embedder.1"]),
    ("final_layer.adaLN_modulation.1", &["norm_out.linear_1"]),
    ("final_layer.linear", &["norm_out.linear_2"]),
    ("layers.{}.attention.qkv", &["layers.{}.attn.to_q", "layers.{}.attn.to_k", "layers.{}.attn.to_v"]),
    ("layers.{}.attention.out", &["layers.{}.attn.to_out.0"]),
    ("layers.{}.attention.q_norm", &["layers.{}.attn.norm_q"]),
    ("layers.{}.attention.k_norm", &["layers.{}.attn.norm_k"]),
    ("layers.{}.feed_forward.w1", &["layers.{}.feed_forward.linear_1"]),
    ("layers.{}.feed_forward.w2", &["layers.{}.feed_forward.linear_2"]),
    ("layers.{}.feed_forward.w3", &["layers.{}.feed_forward.linear_3"]),
    ("layers.{}.attention_norm2", &["layers.{}.norm2"]),
    ("layers.{}.attention_norm1", &["layers.{}.norm1.norm"]),
    ("layers.{}.adaLN_modulation.1", &["layers.{}.norm1.linear"]),
    (
        "noise_refiner.{}.attention.qkv",
        &["noise_refiner.{}.attn.to_q", "noise_refiner.{}.attn.to_k", "noise_refiner.{}.attn.to_v"],
    ),
    ("noise_refiner.{}.attention.out", &["noise_refiner.{}.attn.to_out.0"]),
    ("noise_refiner.{}.attention.q_norm", &["noise_refiner.{}.attn.norm_q"]),
    ("noise_refiner.{}.attention.k_norm", &["noise_refiner.{}.attn.norm_k"]),
    ("noise_refiner.{}.feed_forward.w1", &["noise_refiner.{}.feed_forward.linear_1"]),
    ("noise_refiner.{}.feed_forward.w2", &["noise_refiner.{}.feed_forward.linear_2"]),
    ("noise_refiner.{}.feed_forward.w3", &["noise_refiner.{}.feed_forward.linear_3"]),
    ("noise_refiner.{}.attention_norm2", &["noise_refiner.{}.norm2"]),
    ("noise_refiner.{}.attention_norm1", &["noise_refiner.{}.norm1.norm"]),
    ("noise_refiner.{}.adaLN_modulation.1", &["noise_refiner.{}.norm1.linear"]),
    (
        "context_refiner.{}.attention.qkv",
        &["context_refiner.{}.attn.to_q", "context_refiner.{}.attn.to_k", "context_refiner.{}.attn.to_v"],
    ),
    ("context_refiner.{}.attention.out", &["context_refiner.{}.attn.to_out.0"]),
    ("context_refiner.{}.attention.q_norm", &["context_refiner.{}.attn.norm_q"]),
    ("context_refiner.{}.attention.k_norm", &["context_refiner.{}.attn.norm_k"]),
    ("context_refiner.{}.feed_forward.w1", &["context_refiner.{}.feed_forward.linear_1"]),
    ("context_refiner.{}.feed_forward.w2", &["context_refiner.{}.feed_forward.linear_2"]),
    ("context_refiner.{}.feed_forward.w3", &["context_refiner.{}.feed_forward.linear_3"]),
    ("context_refiner.{}.attention_norm2", &["context_refiner.{}.norm2"]),
    ("context_refiner.{}.attention_norm1", &["context_refiner.{}.norm1"]),
];

/// Krea 2.
const KREA2: &[Line] = &[
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
    ("blocks.{}.attn.wq", &["transformer_blocks.{}.attn.to_q"]),
    ("blocks.{}.attn.wk", &["transformer_blocks.{}.attn.to_k"]),
    ("blocks.{}.attn.wv", &["transformer_blocks.{}.attn.to_v"]),
    ("blocks.{}.attn.wo", &["transformer_blocks.{}.attn.to_out.0"]),
    ("blocks.{}.attn.gate", &["transformer_blocks.{}.attn.to_gate"]),
    ("blocks.{}.attn.qknorm.qnorm.scale", &["transformer_blocks.{}.attn.norm_q.weight"]),
    ("blocks.{}.attn.qknorm.knorm.scale", &["transformer_blocks.{}.attn.norm_k.weight"]),
    ("blocks.{}.mlp.gate", &["transformer_blocks.{}.ff.gate"]),
    ("blocks.{}.mlp.up", &["transformer_blocks.{}.ff.up"]),
    ("blocks.{}.mlp.down", &["transformer_blocks.{}.ff.down"]),
    ("blocks.{}.prenorm.scale", &["transformer_blocks.{}.norm1.weight"]),
    ("blocks.{}.postnorm.scale", &["transformer_blocks.{}.norm2.weight"]),
    ("txtfusion.layerwise_blocks.{}.attn.wq", &["text_fusion.layerwise_blocks.{}.attn.to_q"]),
    ("txtfusion.layerwise_blocks.{}.attn.wk", &["text_fusion.layerwise_blocks.{}.attn.to_k"]),
    ("txtfusion.layerwise_blocks.{}.attn.wv", &["text_fusion.layerwise_blocks.{}.attn.to_v"]),
    ("txtfusion.layerwise_blocks.{}.attn.wo", &["text_fusion.layerwise_blocks.{}.attn.to_out.0"]),
    ("txtfusion.layerwise_blocks.{}.attn.gate", &["text_fusion.layerwise_blocks.{}.attn.to_gate"]),
    ("txtfusion.layerwise_blocks.{}.attn.qknorm.qnorm.scale", &["text_fusion.layerwise_blocks.{}.attn.norm_q.weight"]),
    ("txtfusion.layerwise_blocks.{}.attn.qknorm.knorm.scale", &["text_fusion.layerwise_blocks.{}.attn.norm_k.weight"]),
    ("txtfusion.layerwise_blocks.{}.mlp.gate", &["text_fusion.layerwise_blocks.{}.ff.gate"]),
    ("txtfusion.layerwise_blocks.{}.mlp.up", &["text_fusion.layerwise_blocks.{}.ff.up"]),
    ("txtfusion.layerwise_blocks.{}.mlp.down", &["text_fusion.layerwise_blocks.{}.ff.down"]),
    ("txtfusion.layerwise_blocks.{}.prenorm.scale", &["text_fusion.layerwise_blocks.{}.norm1.weight"]),
    ("txtfusion.layerwise_blocks.{}.postnorm.scale", &["text_fusion.layerwise_blocks.{}.norm2.weight"]),
    ("txtfusion.refiner_blocks.{}.attn.wq", &["text_fusion.refiner_blocks.{}.attn.to_q"]),
    ("txtfusion.refiner_blocks.{}.attn.wk", &["text_fusion.refiner_blocks.{}.attn.to_k"]),
    ("txtfusion.refiner_blocks.{}.attn.wv", &["text_fusion.refiner_blocks.{}.attn.to_v"]),
    ("txtfusion.refiner_blocks.{}.attn.wo", &["text_fusion.refiner_blocks.{}.attn.to_out.0"]),
    ("txtfusion.refiner_blocks.{}.attn.gate", &["text_fusion.refiner_blocks.{}.attn.to_gate"]),
    ("txtfusion.refiner_blocks.{}.attn.qknorm.qnorm.scale", &["text_fusion.refiner_blocks.{}.attn.norm_q.weight"]),
    ("txtfusion.refiner_blocks.{}.attn.qknorm.knorm.scale", &["text_fusion.refiner_blocks.{}.attn.norm_k.weight"]),
    ("txtfusion.refiner_blocks.{}.mlp.gate", &["text_fusion.refiner_blocks.{}.ff.gate"]),
    ("txtfusion.refiner_blocks.{}.mlp.up", &["text_fusion.refiner_blocks.{}.ff.up"]),
    ("txtfusion.refiner_blocks.{}.mlp.down", &["text_fusion.refiner_blocks.{}.ff.down"]),
    ("txtfusion.refiner_blocks.{}.prenorm.scale", &["text_fusion.refiner_blocks.{}.norm1.weight"]),
    ("txtfusion.refiner_blocks.{}.postnorm.scale", &["text_fusion.refiner_blocks.{}.norm2.weight"]),
];

/// HunyuanVideo-1.5 (`hyvideo`'s transformer).
const HUNYUAN_VIDEO_15: &[Line] = &[
    ("img_in.proj", &["x_embedder.proj"]),
    ("time_in.mlp.0", &["time_embed.timestep_embedder.linear_1"]),
    ("time_in.mlp.2", &["time_embed.timestep_embedder.linear_2"]),
    ("time_r_in.mlp.0", &["time_embed.timestep_embedder_r.linear_1"]),
    ("time_r_in.mlp.2", &["time_embed.timestep_embedder_r.linear_2"]),
    ("txt_in.t_embedder.mlp.0", &["context_embedder.time_text_embed.timestep_embedder.linear_1"]),
    ("txt_in.t_embedder.mlp.2", &["context_embedder.time_text_embed.timestep_embedder.linear_2"]),
    ("txt_in.c_embedder.linear_1", &["context_embedder.time_text_embed.text_embedder.linear_1"]),
    ("txt_in.c_embedder.linear_2", &["context_embedder.time_text_embed.text_embedder.linear_2"]),
    ("txt_in.input_embedder", &["context_embedder.proj_in"]),
    (
        "txt_in.individual_token_refiner.blocks.{}.self_attn_qkv",
        &[
            "context_embedder.token_refiner.refiner_blocks.{}.attn.to_q",
            "context_embedder.token_refiner.refiner_blocks.{}.attn.to_k",
            "context_embedder.token_refiner.refiner_blocks.{}.attn.to_v",
        ],
    ),
    (
        "txt_in.individual_token_refiner.blocks.{}.self_attn_proj",
        &["context_embedder.token_refiner.refiner_blocks.{}.attn.to_out.0"],
    ),
    ("txt_in.individual_token_refiner.blocks.{}.norm1", &["context_embedder.token_refiner.refiner_blocks.{}.norm1"]),
    ("txt_in.individual_token_refiner.blocks.{}.norm2", &["context_embedder.token_refiner.refiner_blocks.{}.norm2"]),
    (
        "txt_in.individual_token_refiner.blocks.{}.mlp.fc1",
        &["context_embedder.token_refiner.refiner_blocks.{}.ff.net.0.proj"],
    ),
    (
        "txt_in.individual_token_refiner.blocks.{}.mlp.fc2",
        &["context_embedder.token_refiner.refiner_blocks.{}.ff.net.2"],
    ),
    (
        "txt_in.individual_token_refiner.blocks.{}.adaLN_modulation.1",
        &["context_embedder.token_refiner.refiner_blocks.{}.norm_out.linear"],
    ),
    ("byt5_in.layernorm", &["context_embedder_2.norm"]),
    ("byt5_in.fc1", &["context_embedder_2.linear_1"]),
    ("byt5_in.fc2", &["context_embedder_2.linear_2"]),
    ("byt5_in.fc3", &["context_embedder_2.linear_3"]),
    ("vision_in.proj.0", &["image_embedder.norm_in"]),
    ("vision_in.proj.1", &["image_embedder.linear_1"]),
    ("vision_in.proj.3", &["image_embedder.linear_2"]),
    ("vision_in.proj.4", &["image_embedder.norm_out"]),
    ("cond_type_embedding", &["cond_type_embed"]),
    ("double_blocks.{}.img_mod.linear", &["transformer_blocks.{}.norm1.linear"]),
    ("double_blocks.{}.txt_mod.linear", &["transformer_blocks.{}.norm1_context.linear"]),
    ("double_blocks.{}.img_attn_q", &["transformer_blocks.{}.attn.to_q"]),
    ("double_blocks.{}.img_attn_k", &["transformer_blocks.{}.attn.to_k"]),
    ("double_blocks.{}.img_attn_v", &["transformer_blocks.{}.attn.to_v"]),
    ("double_blocks.{}.img_attn_q_norm", &["transformer_blocks.{}.attn.norm_q"]),
    ("double_blocks.{}.img_attn_k_norm", &["transformer_blocks.{}.attn.norm_k"]),
    ("double_blocks.{}.img_attn_proj", &["transformer_blocks.{}.attn.to_out.0"]),
    ("double_blocks.{}.txt_attn_q", &["transformer_blocks.{}.attn.add_q_proj"]),
    ("double_blocks.{}.txt_attn_k", &["transformer_blocks.{}.attn.add_k_proj"]),
    ("double_blocks.{}.txt_attn_v", &["transformer_blocks.{}.attn.add_v_proj"]),
    ("double_blocks.{}.txt_attn_q_norm", &["transformer_blocks.{}.attn.norm_added_q"]),
    ("double_blocks.{}.txt_attn_k_norm", &["transformer_blocks.{}.attn.norm_added_k"]),
    ("double_blocks.{}.txt_attn_proj", &["transformer_blocks.{}.attn.to_add_out"]),
    ("double_blocks.{}.img_mlp.fc1", &["transformer_blocks.{}.ff.net.0.proj"]),
    ("double_blocks.{}.img_mlp.fc2", &["transformer_blocks.{}.ff.net.2"]),
    ("double_blocks.{}.txt_mlp.fc1", &["transformer_blocks.{}.ff_context.net.0.proj"]),
    ("double_blocks.{}.txt_mlp.fc2", &["transformer_blocks.{}.ff_context.net.2"]),
    ("final_layer.adaLN_modulation.1", SWAPPED),
    ("final_layer.linear", &["proj_out"]),
];

/// LTX-2, and 2.3 and 2.5 with it (`ltx-core`); what is not here has diffusers' names.
const LTX2: &[Line] = &[
    ("patchify_proj", &["proj_in"]),
    ("audio_patchify_proj", &["audio_proj_in"]),
    ("adaln_single.emb.timestep_embedder.linear_1", &["time_embed.emb.timestep_embedder.linear_1"]),
    ("adaln_single.emb.timestep_embedder.linear_2", &["time_embed.emb.timestep_embedder.linear_2"]),
    ("adaln_single.linear", &["time_embed.linear"]),
    ("audio_adaln_single.emb.timestep_embedder.linear_1", &["audio_time_embed.emb.timestep_embedder.linear_1"]),
    ("audio_adaln_single.emb.timestep_embedder.linear_2", &["audio_time_embed.emb.timestep_embedder.linear_2"]),
    ("audio_adaln_single.linear", &["audio_time_embed.linear"]),
    ("prompt_adaln_single.emb.timestep_embedder.linear_1", &["prompt_adaln.emb.timestep_embedder.linear_1"]),
    ("prompt_adaln_single.emb.timestep_embedder.linear_2", &["prompt_adaln.emb.timestep_embedder.linear_2"]),
    ("prompt_adaln_single.linear", &["prompt_adaln.linear"]),
    (
        "audio_prompt_adaln_single.emb.timestep_embedder.linear_1",
        &["audio_prompt_adaln.emb.timestep_embedder.linear_1"],
    ),
    (
        "audio_prompt_adaln_single.emb.timestep_embedder.linear_2",
        &["audio_prompt_adaln.emb.timestep_embedder.linear_2"],
    ),
    ("audio_prompt_adaln_single.linear", &["audio_prompt_adaln.linear"]),
    (
        "av_ca_video_scale_shift_adaln_single.emb.timestep_embedder.linear_1",
        &["av_cross_attn_video_scale_shift.emb.timestep_embedder.linear_1"],
    ),
    (
        "av_ca_video_scale_shift_adaln_single.emb.timestep_embedder.linear_2",
        &["av_cross_attn_video_scale_shift.emb.timestep_embedder.linear_2"],
    ),
    ("av_ca_video_scale_shift_adaln_single.linear", &["av_cross_attn_video_scale_shift.linear"]),
    (
        "av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_1",
        &["av_cross_attn_video_a2v_gate.emb.timestep_embedder.linear_1"],
    ),
    (
        "av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_2",
        &["av_cross_attn_video_a2v_gate.emb.timestep_embedder.linear_2"],
    ),
    ("av_ca_a2v_gate_adaln_single.linear", &["av_cross_attn_video_a2v_gate.linear"]),
    (
        "av_ca_audio_scale_shift_adaln_single.emb.timestep_embedder.linear_1",
        &["av_cross_attn_audio_scale_shift.emb.timestep_embedder.linear_1"],
    ),
    (
        "av_ca_audio_scale_shift_adaln_single.emb.timestep_embedder.linear_2",
        &["av_cross_attn_audio_scale_shift.emb.timestep_embedder.linear_2"],
    ),
    ("av_ca_audio_scale_shift_adaln_single.linear", &["av_cross_attn_audio_scale_shift.linear"]),
    (
        "av_ca_v2a_gate_adaln_single.emb.timestep_embedder.linear_1",
        &["av_cross_attn_audio_v2a_gate.emb.timestep_embedder.linear_1"],
    ),
    (
        "av_ca_v2a_gate_adaln_single.emb.timestep_embedder.linear_2",
        &["av_cross_attn_audio_v2a_gate.emb.timestep_embedder.linear_2"],
    ),
    ("av_ca_v2a_gate_adaln_single.linear", &["av_cross_attn_audio_v2a_gate.linear"]),
    (
        "transformer_blocks.{}.scale_shift_table_a2v_ca_video",
        &["transformer_blocks.{}.video_a2v_cross_attn_scale_shift_table"],
    ),
    (
        "transformer_blocks.{}.scale_shift_table_a2v_ca_audio",
        &["transformer_blocks.{}.audio_a2v_cross_attn_scale_shift_table"],
    ),
    ("transformer_blocks.{}.attn1.q_norm", &["transformer_blocks.{}.attn1.norm_q"]),
    ("transformer_blocks.{}.attn1.k_norm", &["transformer_blocks.{}.attn1.norm_k"]),
    ("transformer_blocks.{}.attn2.q_norm", &["transformer_blocks.{}.attn2.norm_q"]),
    ("transformer_blocks.{}.attn2.k_norm", &["transformer_blocks.{}.attn2.norm_k"]),
    ("transformer_blocks.{}.audio_attn1.q_norm", &["transformer_blocks.{}.audio_attn1.norm_q"]),
    ("transformer_blocks.{}.audio_attn1.k_norm", &["transformer_blocks.{}.audio_attn1.norm_k"]),
    ("transformer_blocks.{}.audio_attn2.q_norm", &["transformer_blocks.{}.audio_attn2.norm_q"]),
    ("transformer_blocks.{}.audio_attn2.k_norm", &["transformer_blocks.{}.audio_attn2.norm_k"]),
    ("transformer_blocks.{}.audio_to_video_attn.q_norm", &["transformer_blocks.{}.audio_to_video_attn.norm_q"]),
    ("transformer_blocks.{}.audio_to_video_attn.k_norm", &["transformer_blocks.{}.audio_to_video_attn.norm_k"]),
    ("transformer_blocks.{}.video_to_audio_attn.q_norm", &["transformer_blocks.{}.video_to_audio_attn.norm_q"]),
    ("transformer_blocks.{}.video_to_audio_attn.k_norm", &["transformer_blocks.{}.video_to_audio_attn.norm_k"]),
];

/// A layout that is not diffusers'.
pub(super) struct Layout {
    pub class: &'static str,
    pub lines: &'static [&'static [Line]],
    /// Tensors that are together in no other one.
    pub signs: &'static [&'static str],
    /// The configuration of weights, as far as their sizes tell it.
    pub config: fn(&Shards) -> Option<Value>,
}

pub(super) const LAYOUTS: &[Layout] = &[
    Layout {
        class: "Flux2Transformer2DModel",
        lines: &[FLUX2, DOUBLE_ATTENTION],
        signs: &["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"],
        config: flux2_config,
    },
    Layout {
        class: "FluxTransformer2DModel",
        lines: &[FLUX, FLUX_BLOCKS, DOUBLE_ATTENTION],
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
    Layout {
        class: "ChromaTransformer2DModel",
        lines: &[CHROMA, FLUX_BLOCKS, DOUBLE_ATTENTION],
        signs: &["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"],
        config: chroma_config,
    },
    Layout {
        class: "Flux3Transformer2DModel",
        lines: &[FLUX3],
        signs: &["emb_in.image.weight", "content_mode_blocks.image.0.q_proj.weight"],
        config: not_told,
    },
    Layout {
        class: "QwenImage21Transformer2DModel",
        lines: &[QWEN_IMAGE_21],
        signs: &["transformer_blocks.0.img_mlp.gate_up.weight"],
        config: not_told,
    },
    Layout {
        class: "Lumina2Transformer2DModel",
        lines: &[LUMINA2],
        signs: &["layers.0.attention.qkv.weight", "cap_embedder.0.weight", "final_layer.linear.weight"],
        config: not_told,
    },
    Layout {
        class: "Krea2Transformer2DModel",
        lines: &[KREA2],
        signs: &["blocks.0.attn.wq.weight", "txtfusion.projector.weight"],
        config: not_told,
    },
    Layout {
        class: "HunyuanVideo15Transformer3DModel",
        lines: &[HUNYUAN_VIDEO_15],
        signs: &["double_blocks.0.img_attn_q.weight", "byt5_in.fc1.weight"],
        config: not_told,
    },
    Layout {
        class: "LTX2VideoTransformer3DModel",
        lines: &[LTX2],
        signs: &["patchify_proj.weight", "audio_patchify_proj.weight"],
        config: not_told,
    },
];
