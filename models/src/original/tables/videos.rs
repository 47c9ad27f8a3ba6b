//! Models of films.

use super::{DOUBLE, HERE, Place, SWAPPED, Table};

/// Wan (`wan/modules/model.py`). Its norms run in the order 1, 3, 2.
pub(super) const WAN: &[Table] = &[
    (
        HERE,
        &[
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
            ("head.modulation", &["scale_shift_table"]),
            ("head.head", &["proj_out"]),
        ],
    ),
    (
        &[("blocks.{}.self_attn.", "blocks.{}.attn1."), ("blocks.{}.cross_attn.", "blocks.{}.attn2.")],
        &[
            ("q", &["to_q"]),
            ("k", &["to_k"]),
            ("v", &["to_v"]),
            ("o", &["to_out.0"]),
            ("norm_q", &["norm_q"]),
            ("norm_k", &["norm_k"]),
        ],
    ),
    (
        &[("blocks.{}.", "blocks.{}.")],
        &[
            ("modulation", &["scale_shift_table"]),
            ("norm3", &["norm2"]),
            ("cross_attn.k_img", &["attn2.add_k_proj"]),
            ("cross_attn.v_img", &["attn2.add_v_proj"]),
            ("cross_attn.norm_k_img", &["attn2.norm_added_k"]),
            ("ffn.0", &["ffn.net.0.proj"]),
            ("ffn.2", &["ffn.net.2"]),
        ],
    ),
];

/// The blocks of HunyuanVideo-1.5 that refine a text.
const REFINER: &[Place] =
    &[("txt_in.individual_token_refiner.blocks.{}.", "context_embedder.token_refiner.refiner_blocks.{}.")];

/// What HunyuanVideo-1.5 has in both of its layouts.
pub(super) const HUNYUAN_VIDEO_15: &[Table] = &[(
    HERE,
    &[
        ("img_in.proj", &["x_embedder.proj"]),
        (
            "txt_in.individual_token_refiner.blocks.{}.norm1",
            &["context_embedder.token_refiner.refiner_blocks.{}.norm1"],
        ),
        (
            "txt_in.individual_token_refiner.blocks.{}.norm2",
            &["context_embedder.token_refiner.refiner_blocks.{}.norm2"],
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
        ("final_layer.adaLN_modulation.1", SWAPPED),
        ("final_layer.linear", &["proj_out"]),
    ],
)];

/// The rest of it as its authors call it (`hyvideo`'s transformer).
pub(super) const HUNYUAN_VIDEO_15_AUTHORS: &[Table] = &[
    (
        HERE,
        &[
            ("txt_in.c_embedder.linear_1", &["context_embedder.time_text_embed.text_embedder.linear_1"]),
            ("txt_in.c_embedder.linear_2", &["context_embedder.time_text_embed.text_embedder.linear_2"]),
            ("txt_in.input_embedder", &["context_embedder.proj_in"]),
        ],
    ),
    (
        &[
            ("time_in.", "time_embed.timestep_embedder."),
            ("time_r_in.", "time_embed.timestep_embedder_r."),
            ("txt_in.t_embedder.", "context_embedder.time_text_embed.timestep_embedder."),
        ],
        &[("mlp.0", &["linear_1"]), ("mlp.2", &["linear_2"])],
    ),
    (
        REFINER,
        &[
            ("self_attn_qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
            ("self_attn_proj", &["attn.to_out.0"]),
            ("mlp.fc1", &["ff.net.0.proj"]),
            ("mlp.fc2", &["ff.net.2"]),
            ("adaLN_modulation.1", &["norm_out.linear"]),
        ],
    ),
    (
        DOUBLE,
        &[
            ("img_mod.linear", &["norm1.linear"]),
            ("txt_mod.linear", &["norm1_context.linear"]),
            ("img_attn_q", &["attn.to_q"]),
            ("img_attn_k", &["attn.to_k"]),
            ("img_attn_v", &["attn.to_v"]),
            ("img_attn_q_norm", &["attn.norm_q"]),
            ("img_attn_k_norm", &["attn.norm_k"]),
            ("img_attn_proj", &["attn.to_out.0"]),
            ("txt_attn_q", &["attn.add_q_proj"]),
            ("txt_attn_k", &["attn.add_k_proj"]),
            ("txt_attn_v", &["attn.add_v_proj"]),
            ("txt_attn_q_norm", &["attn.norm_added_q"]),
            ("txt_attn_k_norm", &["attn.norm_added_k"]),
            ("txt_attn_proj", &["attn.to_add_out"]),
            ("img_mlp.fc1", &["ff.net.0.proj"]),
            ("img_mlp.fc2", &["ff.net.2"]),
            ("txt_mlp.fc1", &["ff_context.net.0.proj"]),
            ("txt_mlp.fc2", &["ff_context.net.2"]),
        ],
    ),
];

/// The rest of it in ComfyUI, which takes the three projections of an attention for one tensor and knows no other names.
pub(super) const HUNYUAN_VIDEO_15_COMFYUI: &[Table] = &[
    (HERE, &[("txt_in.input_embedder", &["context_embedder.proj_in"])]),
    (
        &[
            ("time_in.", "time_embed.timestep_embedder."),
            ("time_r_in.", "time_embed.timestep_embedder_r."),
            ("txt_in.t_embedder.", "context_embedder.time_text_embed.timestep_embedder."),
            ("txt_in.c_embedder.", "context_embedder.time_text_embed.text_embedder."),
        ],
        &[("in_layer", &["linear_1"]), ("out_layer", &["linear_2"])],
    ),
    (
        REFINER,
        &[
            ("self_attn.qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
            ("self_attn.proj", &["attn.to_out.0"]),
            ("mlp.0", &["ff.net.0.proj"]),
            ("mlp.2", &["ff.net.2"]),
            ("adaLN_modulation.1", &["norm_out.linear"]),
        ],
    ),
    (
        DOUBLE,
        &[
            ("img_attn.qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
            ("txt_attn.qkv", &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
            ("img_mod.lin", &["norm1.linear"]),
            ("txt_mod.lin", &["norm1_context.linear"]),
            ("img_attn.norm.query_norm", &["attn.norm_q"]),
            ("img_attn.norm.key_norm", &["attn.norm_k"]),
            ("img_attn.proj", &["attn.to_out.0"]),
            ("txt_attn.norm.query_norm", &["attn.norm_added_q"]),
            ("txt_attn.norm.key_norm", &["attn.norm_added_k"]),
            ("txt_attn.proj", &["attn.to_add_out"]),
            ("img_mlp.0", &["ff.net.0.proj"]),
            ("img_mlp.2", &["ff.net.2"]),
            ("txt_mlp.0", &["ff_context.net.0.proj"]),
            ("txt_mlp.2", &["ff_context.net.2"]),
        ],
    ),
];

/// LTX-2, and 2.3 and 2.5 with it (`ltx-core`); what is not here has diffusers' names.
pub(super) const LTX2: &[Table] = &[
    (
        HERE,
        &[
            ("patchify_proj", &["proj_in"]),
            ("audio_patchify_proj", &["audio_proj_in"]),
            (
                "transformer_blocks.{}.scale_shift_table_a2v_ca_video",
                &["transformer_blocks.{}.video_a2v_cross_attn_scale_shift_table"],
            ),
            (
                "transformer_blocks.{}.scale_shift_table_a2v_ca_audio",
                &["transformer_blocks.{}.audio_a2v_cross_attn_scale_shift_table"],
            ),
        ],
    ),
    (
        &[
            ("adaln_single.", "time_embed."),
            ("audio_adaln_single.", "audio_time_embed."),
            ("prompt_adaln_single.", "prompt_adaln."),
            ("audio_prompt_adaln_single.", "audio_prompt_adaln."),
            ("av_ca_video_scale_shift_adaln_single.", "av_cross_attn_video_scale_shift."),
            ("av_ca_a2v_gate_adaln_single.", "av_cross_attn_video_a2v_gate."),
            ("av_ca_audio_scale_shift_adaln_single.", "av_cross_attn_audio_scale_shift."),
            ("av_ca_v2a_gate_adaln_single.", "av_cross_attn_audio_v2a_gate."),
        ],
        &[
            ("emb.timestep_embedder.linear_1", &["emb.timestep_embedder.linear_1"]),
            ("emb.timestep_embedder.linear_2", &["emb.timestep_embedder.linear_2"]),
            ("linear", &["linear"]),
        ],
    ),
    (
        &[
            ("transformer_blocks.{}.attn1.", "transformer_blocks.{}.attn1."),
            ("transformer_blocks.{}.attn2.", "transformer_blocks.{}.attn2."),
            ("transformer_blocks.{}.audio_attn1.", "transformer_blocks.{}.audio_attn1."),
            ("transformer_blocks.{}.audio_attn2.", "transformer_blocks.{}.audio_attn2."),
            ("transformer_blocks.{}.audio_to_video_attn.", "transformer_blocks.{}.audio_to_video_attn."),
            ("transformer_blocks.{}.video_to_audio_attn.", "transformer_blocks.{}.video_to_audio_attn."),
        ],
        &[("q_norm", &["norm_q"]), ("k_norm", &["norm_k"])],
    ),
];
