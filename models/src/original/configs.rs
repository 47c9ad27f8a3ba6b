//! Configurations of weights in their authors' layouts, as far as sizes tell them.

use flowtape_engine::safetensors::Shards;
use serde_json::{Value, json};

/// How many blocks have a tensor of that name.
fn blocks(weights: &Shards, name: &str) -> usize {
    (0..).take_while(|n| weights.dims(&name.replace("{}", &n.to_string())).is_some()).count()
}

/// What models of Black Forest Labs' kin have in common, of a class; its own keys follow from its sizes.
fn of_flux_kin(
    weights: &Shards,
    class: &str,
    own: impl FnOnce(&dyn Fn(&str) -> Option<Vec<usize>>) -> Option<Value>,
) -> Option<Value> {
    let dims = |name: &str| weights.dims(name).filter(|dims| !dims.is_empty()).map(<[usize]>::to_vec);
    let head = dims("double_blocks.0.img_attn.norm.query_norm.scale")?[0];
    let [width, channels] = dims("img_in.weight")?[..] else { return None };
    // The axes of the rotary tables are in no tensor: only the published ones are known.
    (head == 128).then_some(())?;
    let outputs = dims("final_layer.linear.weight")?[0];
    let mut config = json!({
        "_class_name": class,
        "in_channels": channels,
        "out_channels": (outputs != channels).then_some(outputs),
        "num_layers": blocks(weights, "double_blocks.{}.img_attn.qkv.weight"),
        "num_single_layers": blocks(weights, "single_blocks.{}.linear1.weight"),
        "attention_head_dim": head,
        "num_attention_heads": width / head,
        "joint_attention_dim": *dims("txt_in.weight")?.get(1)?,
    });
    config.as_object_mut()?.extend(own(&dims)?.as_object().cloned()?);
    Some(config)
}

pub(super) fn flux_config(weights: &Shards) -> Option<Value> {
    of_flux_kin(weights, "FluxTransformer2DModel", |dims| {
        Some(json!({
            "pooled_projection_dim": *dims("vector_in.in_layer.weight")?.get(1)?,
            "guidance_embeds": dims("guidance_in.in_layer.weight").is_some(),
        }))
    })
}

pub(super) fn chroma_config(weights: &Shards) -> Option<Value> {
    of_flux_kin(weights, "ChromaTransformer2DModel", |dims| {
        let [hidden, inputs] = dims("distilled_guidance_layer.in_proj.weight")?[..] else { return None };
        Some(json!({
            "approximator_num_channels": inputs,
            "approximator_hidden_dim": hidden,
            "approximator_layers": blocks(weights, "distilled_guidance_layer.layers.{}.in_layer.weight"),
        }))
    })
}

pub(super) fn flux2_config(weights: &Shards) -> Option<Value> {
    of_flux_kin(weights, "Flux2Transformer2DModel", |dims| {
        let width = dims("img_in.weight")?[0];
        Some(json!({
            "mlp_ratio": *dims("double_blocks.0.img_mlp.2.weight")?.get(1)? as f64 / width as f64,
            "guidance_embeds": dims("guidance_in.in_layer.weight").is_some(),
        }))
    })
}

pub(super) fn z_image_config(weights: &Shards) -> Option<Value> {
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

pub(super) fn wan_config(weights: &Shards) -> Option<Value> {
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
pub(super) fn qwen_config(weights: &Shards) -> Option<Value> {
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

/// What LTX-2's own files say of themselves, under `config`: programs take from there what sizes do not tell, by the names of
/// `ltx-core`. `config` is diffusers'.
pub(super) fn ltx2_text(config: &Value) -> Value {
    let is = |key: &str| config[key] == true;
    json!({ "transformer": {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "num_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "attention_head_dim": config["attention_head_dim"],
        "cross_attention_dim": config["cross_attention_dim"],
        "audio_in_channels": config["audio_in_channels"],
        "audio_out_channels": config["audio_out_channels"],
        "audio_num_attention_heads": config["audio_num_attention_heads"],
        "audio_attention_head_dim": config["audio_attention_head_dim"],
        "audio_cross_attention_dim": config["audio_cross_attention_dim"],
        "caption_channels": config["caption_channels"],
        "caption_proj_before_connector": !is("use_prompt_embeddings"),
        "caption_projection_first_linear": is("use_prompt_embeddings"),
        "cross_attention_adaln": is("cross_attn_mod"),
        "apply_gated_attention": is("gated_attn"),
        "norm_eps": config["norm_eps"],
        "norm_elementwise_affine": config["norm_elementwise_affine"],
        "positional_embedding_theta": config["rope_theta"],
        "positional_embedding_max_pos": [config["pos_embed_max_pos"], config["base_height"], config["base_width"]],
        "audio_positional_embedding_max_pos": [config["audio_pos_embed_max_pos"]],
        "rope_type": config["rope_type"],
        "frequencies_precision": if is("rope_double_precision") { "float64" } else { "float32" },
        "causal_temporal_positioning": config["causal_offset"] == 1,
        "use_middle_indices_grid": true,
        "timestep_scale_multiplier": config["timestep_scale_multiplier"],
        "av_ca_timestep_scale_multiplier": config["cross_attn_timestep_scale_multiplier"],
    }})
}

/// Where sizes do not tell it: the configuration is to be given.
pub(super) fn not_told(_: &Shards) -> Option<Value> {
    None
}
