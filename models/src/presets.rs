//! Configurations of published checkpoints.

use serde_json::{Value, json};

use crate::{Error, Result};

/// A published checkpoint.
#[derive(Debug)]
pub struct Preset {
    /// Its name.
    pub name: &'static str,
    /// What it is called on the Hugging Face hub.
    pub hub: &'static [&'static str],
    /// What differs from the class's defaults, with `_class_name`: as in `config.json`.
    pub config: fn() -> Value,
    /// How many transformers of that configuration it has.
    pub transformers: usize,
    /// What training takes away from a checkpoint that was distilled, and what people do instead; none where training is what the
    /// checkpoint is for.
    pub caution: Option<&'static str>,
}

/// What most presets have in common.
const PRESET: Preset = Preset { name: "", hub: &[], config: || json!({}), transformers: 1, caution: None };

/// All of them. What `config` leaves out is diffusers' default.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "flux.1-dev",
        hub: &["black-forest-labs/FLUX.1-dev"],
        config: || json!({"_class_name": "FluxTransformer2DModel", "guidance_embeds": true}),
        ..PRESET
    },
    Preset {
        name: "flux.1-schnell",
        hub: &["black-forest-labs/FLUX.1-schnell"],
        config: || json!({"_class_name": "FluxTransformer2DModel"}),
        caution: Some(
            "FLUX.1-schnell is distilled to a few steps without guidance, which plain flow matching undoes: samples in few steps \
             turn soft. Train FLUX.1-dev, or keep an adapter that undoes the distillation (such as \
             ostris/FLUX.1-schnell-training-adapter) in the weights while training and leave it out when sampling",
        ),
        ..PRESET
    },
    Preset {
        name: "flux.2-dev",
        hub: &["black-forest-labs/FLUX.2-dev"],
        config: || json!({"_class_name": "Flux2Transformer2DModel"}),
        ..PRESET
    },
    Preset {
        name: "flux.2-klein-base-4b",
        hub: &["black-forest-labs/FLUX.2-klein-base-4B"],
        config: klein_4b,
        ..PRESET
    },
    Preset {
        name: "flux.2-klein-4b",
        hub: &["black-forest-labs/FLUX.2-klein-4B"],
        config: klein_4b,
        caution: Some(KLEIN),
        ..PRESET
    },
    Preset {
        name: "flux.2-klein-base-9b",
        hub: &["black-forest-labs/FLUX.2-klein-base-9B"],
        config: klein_9b,
        ..PRESET
    },
    Preset {
        name: "flux.2-klein-9b",
        hub: &["black-forest-labs/FLUX.2-klein-9B"],
        config: klein_9b,
        caution: Some(KLEIN),
        ..PRESET
    },
    Preset {
        name: "qwen-image",
        hub: &["Qwen/Qwen-Image"],
        config: || json!({"_class_name": "QwenImageTransformer2DModel"}),
        ..PRESET
    },
    Preset {
        name: "qwen-image-edit-2511",
        hub: &["Qwen/Qwen-Image-Edit-2511"],
        config: || json!({"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": true}),
        ..PRESET
    },
    Preset {
        name: "hunyuanvideo-1.5",
        hub: &["hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v"],
        config: || json!({"_class_name": "HunyuanVideo15Transformer3DModel"}),
        ..PRESET
    },
    Preset {
        name: "wan2.1-1.3b",
        hub: &["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"],
        config: || json!({"_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
        ..PRESET
    },
    Preset {
        name: "wan2.1-14b",
        hub: &["Wan-AI/Wan2.1-T2V-14B-Diffusers"],
        config: || json!({"_class_name": "WanTransformer3DModel"}),
        ..PRESET
    },
    // One for high noise, one for low noise.
    Preset {
        name: "wan2.2-a14b",
        hub: &["Wan-AI/Wan2.2-T2V-A14B-Diffusers"],
        config: || json!({"_class_name": "WanTransformer3DModel"}),
        transformers: 2,
        ..PRESET
    },
    Preset {
        name: "wan2.1-i2v-14b",
        hub: &["Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"],
        config: wan2_1_i2v,
        ..PRESET
    },
    Preset {
        name: "wan2.1-flf2v-14b",
        hub: &["Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"],
        config: || {
            let mut config = wan2_1_i2v();
            config["pos_embed_seq_len"] = 514.into();
            config
        },
        ..PRESET
    },
    Preset {
        name: "wan2.2-i2v-a14b",
        hub: &["Wan-AI/Wan2.2-I2V-A14B-Diffusers"],
        config: || json!({"_class_name": "WanTransformer3DModel", "in_channels": 36}),
        transformers: 2,
        ..PRESET
    },
    Preset {
        name: "wan2.2-ti2v-5b",
        hub: &["Wan-AI/Wan2.2-TI2V-5B-Diffusers"],
        config: || {
            json!({
                "_class_name": "WanTransformer3DModel", "in_channels": 48, "out_channels": 48, "num_attention_heads": 24,
                "ffn_dim": 14336, "num_layers": 30,
            })
        },
        ..PRESET
    },
    Preset { name: "ltx-2.3", hub: &["Lightricks/LTX-2.3"], config: ltx_2_3, ..PRESET },
    // The distilled model is in the pipeline's folder `transformer`, this one in `transformer_full`.
    Preset {
        name: "ltx-2.5",
        hub: &["Lightricks/LTX-2.5-Diffusers", "Lightricks/LTX-2.5"],
        config: ltx_2_5,
        caution: Some(LTX_2_5),
        ..PRESET
    },
    Preset { name: "z-image", hub: &["Tongyi-MAI/Z-Image"], config: z_image, ..PRESET },
    Preset {
        name: "z-image-turbo",
        hub: &["Tongyi-MAI/Z-Image-Turbo"],
        config: z_image,
        caution: Some(
            "Z-Image-Turbo is distilled to eight steps without guidance, which plain flow matching undoes: samples in few steps \
             turn soft. Train Z-Image, whose adapters Turbo takes, or keep an adapter that undoes the distillation (such as \
             ostris/zimage_turbo_training_adapter) in the weights while training and leave it out when sampling",
        ),
        ..PRESET
    },
    Preset {
        name: "chroma1",
        hub: &["lodestones/Chroma1-HD", "lodestones/Chroma1-Base"],
        config: || json!({"_class_name": "ChromaTransformer2DModel"}),
        ..PRESET
    },
    Preset {
        name: "chroma1-flash",
        hub: &["lodestones/Chroma1-Flash"],
        config: || json!({"_class_name": "ChromaTransformer2DModel"}),
        caution: Some(
            "Chroma1-Flash is distilled to a few steps without guidance, which plain flow matching undoes: samples in few steps turn \
             soft. Train Chroma1-HD or Chroma1-Base, whose adapters Flash takes",
        ),
        ..PRESET
    },
    Preset {
        name: "lumina-image-2.0",
        hub: &["Alpha-VLLM/Lumina-Image-2.0"],
        config: || json!({"_class_name": "Lumina2Transformer2DModel", "cap_feat_dim": 2304}),
        ..PRESET
    },
    Preset {
        name: "qwen-image-2.1",
        hub: &["Qwen/Qwen-Image-2.1"],
        config: || json!({"_class_name": "QwenImage21Transformer2DModel"}),
        ..PRESET
    },
    Preset {
        name: "flux.3-klein-base",
        hub: &["black-forest-labs/flux-3-image-klein-base"],
        config: || json!({"_class_name": "Flux3Transformer2DModel"}),
        ..PRESET
    },
    Preset {
        name: "krea-2-raw",
        hub: &["krea/Krea-2-Raw"],
        config: || json!({"_class_name": "Krea2Transformer2DModel"}),
        ..PRESET
    },
    Preset {
        name: "krea-2-turbo",
        hub: &["krea/Krea-2-Turbo"],
        config: || json!({"_class_name": "Krea2Transformer2DModel"}),
        caution: Some(
            "Krea 2 Turbo is distilled to a few steps without guidance, which plain flow matching undoes: samples in few steps turn \
             soft. Train Krea 2 Raw: its adapters are meant to be used on Turbo",
        ),
        ..PRESET
    },
];

/// Which of LTX-2.5's transformers to train.
const LTX_2_5: &str = "the folder `transformer` of LTX-2.5 in diffusers' layout holds the model that is distilled to few steps without \
                       guidance, which plain flow matching undoes: samples in few steps turn soft. Train the full model: say \
                       `model.subfolder: transformer_full`; the distilled one takes its adapters";

fn ltx_2_3() -> Value {
    json!({
        "_class_name": "LTX2VideoTransformer3DModel",
        "gated_attn": true,
        "cross_attn_mod": true,
        "audio_gated_attn": true,
        "audio_cross_attn_mod": true,
        "rope_type": "split",
        "use_prompt_embeddings": false,
        "perturbed_attn": true,
    })
}

fn ltx_2_5() -> Value {
    let mut config = ltx_2_3();
    config["ff_bias"] = false.into();
    config["use_keyframes_abs_pos_embedding"] = true.into();
    config
}

/// What training takes away from FLUX.2-klein.
const KLEIN: &str = "FLUX.2-klein is distilled to four steps without guidance, which plain flow matching undoes: samples in few steps \
                     turn soft. Train FLUX.2-klein-base of the same size, whose adapters the distilled model takes";

fn klein_4b() -> Value {
    json!({
        "_class_name": "Flux2Transformer2DModel", "guidance_embeds": false, "joint_attention_dim": 7680, "num_layers": 5,
        "num_single_layers": 20, "num_attention_heads": 24,
    })
}

fn klein_9b() -> Value {
    json!({
        "_class_name": "Flux2Transformer2DModel", "guidance_embeds": false, "joint_attention_dim": 12288, "num_layers": 8,
        "num_single_layers": 24, "num_attention_heads": 32,
    })
}

fn wan2_1_i2v() -> Value {
    json!({"_class_name": "WanTransformer3DModel", "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120})
}

fn z_image() -> Value {
    json!({"_class_name": "ZImageTransformer2DModel", "axes_lens": [1536, 512, 512]})
}

/// The preset of that name.
///
/// # Errors
/// When there is none: the error lists all.
pub fn preset(name: &str) -> Result<&'static Preset> {
    let names = || PRESETS.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
    let found = PRESETS.iter().find(|p| p.name == name);
    found.ok_or_else(|| Error::config("preset", format!("one of {}", names()), name))
}

/// The preset of a checkpoint: by its own name, by the hub's, or by the name that its folder or file has from there; capital
/// letters do not count.
pub fn of_checkpoint(name: &str) -> Option<&'static Preset> {
    let is = |other: &str| name.eq_ignore_ascii_case(other);
    let last =
        |path: &str| path.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or_default().to_lowercase();
    // `models--owner--name/snapshots/commit` in the hub's cache.
    let cached =
        |hub: &str| name.to_lowercase().contains(&format!("models--{}/", hub.replace('/', "--").to_lowercase()));
    let from = |hub: &&str| is(hub) || cached(hub) || last(hub) == last(name).trim_end_matches(".safetensors");
    PRESETS.iter().find(|preset| is(preset.name) || preset.hub.iter().any(from))
}

#[cfg(test)]
mod tests {
    use flowtape_engine::DType;
    use flowtape_engine::meta::Meta;
    use flowtape_engine::nn::ParamBuilder;

    use super::*;
    use crate::create_model;

    /// Elements and tensors that PyTorch counts for diffusers' classes on its meta device.
    const COUNTS: &[(&str, u64, usize)] = &[
        ("flux.1-dev", 11_901_408_320, 1160),
        ("flux.1-schnell", 11_891_178_560, 1156),
        ("flux.2-dev", 32_223_281_152, 331),
        ("flux.2-klein-base-4b", 3_875_544_576, 169),
        ("flux.2-klein-4b", 3_875_544_576, 169),
        ("flux.2-klein-base-9b", 9_078_581_248, 233),
        ("flux.2-klein-9b", 9_078_581_248, 233),
        ("qwen-image", 20_430_401_088, 1933),
        ("qwen-image-edit-2511", 20_430_401_088, 1933),
        ("hunyuanvideo-1.5", 8_326_608_160, 1801),
        ("wan2.1-1.3b", 1_418_996_800, 825),
        ("wan2.1-14b", 14_288_491_584, 1095),
        ("wan2.2-a14b", 14_288_491_584, 1095),
        ("wan2.1-i2v-14b", 16_394_878_784, 1303),
        ("wan2.1-flf2v-14b", 16_395_536_704, 1304),
        ("wan2.2-i2v-a14b", 14_288_901_184, 1095),
        ("wan2.2-ti2v-5b", 4_999_787_712, 825),
        ("ltx-2.3", 18_988_838_144, 4186),
        ("ltx-2.5", 18_987_859_200, 4091),
        ("chroma1", 8_899_983_424, 1023),
        ("chroma1-flash", 8_899_983_424, 1023),
        ("lumina-image-2.0", 2_609_769_152, 459),
        ("qwen-image-2.1", 7_115_124_736, 297),
        ("flux.3-klein-base", 5_538_458_368, 357),
        ("krea-2-raw", 12_820_073_036, 430),
        ("krea-2-turbo", 12_820_073_036, 430),
        ("z-image", 6_154_908_736, 521),
        ("z-image-turbo", 6_154_908_736, 521),
    ];

    #[test]
    fn published_models_have_the_parameters_that_pytorch_counts() {
        for (i, preset) in PRESETS.iter().enumerate() {
            assert!(PRESETS[..i].iter().all(|other| other.name != preset.name), "{} twice", preset.name);
            let params = ParamBuilder::new(0, DType::BF16, &Meta::default().device());
            let model = create_model(&(preset.config)(), &params).unwrap();
            let (name, numel, tensors) = COUNTS.iter().find(|c| c.0 == preset.name).expect(preset.name);
            assert_eq!((model.params().numel(), model.params().len()), (*numel, *tensors), "{name}");
        }
        assert!(preset("flux.1").unwrap_err().to_string().contains("flux.1-dev"));
    }

    #[test]
    fn checkpoints_are_known_by_the_names_that_they_are_kept_under() {
        let turbo = [
            "z-image-turbo",
            "Tongyi-MAI/Z-Image-Turbo",
            "/models/z-image-turbo/",
            "weights/Z-Image-Turbo.safetensors",
            "/home/me/.cache/huggingface/hub/models--Tongyi-MAI--Z-Image-Turbo/snapshots/abc",
        ];
        for name in turbo {
            assert_eq!(of_checkpoint(name).map(|preset| preset.name), Some("z-image-turbo"), "{name}");
        }
        assert!(of_checkpoint("lodestones/Chroma1-Flash").is_some_and(|preset| preset.caution.is_some()));
        assert!(of_checkpoint("lodestones/Chroma1-HD").is_some_and(|preset| preset.caution.is_none()));
        assert!(of_checkpoint("Tongyi-MAI/Z-Image").is_some_and(|preset| preset.caution.is_none()));
        assert!(of_checkpoint("runs/z_image_lora").is_none());
    }
}
