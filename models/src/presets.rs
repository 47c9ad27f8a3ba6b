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
}

/// All of them. What `config` leaves out is diffusers' default.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "flux.1-dev",
        hub: &["black-forest-labs/FLUX.1-dev"],
        config: || json!({"_class_name": "FluxTransformer2DModel", "guidance_embeds": true}),
        transformers: 1,
    },
    Preset {
        name: "flux.1-schnell",
        hub: &["black-forest-labs/FLUX.1-schnell"],
        config: || json!({"_class_name": "FluxTransformer2DModel"}),
        transformers: 1,
    },
    Preset {
        name: "flux.2-dev",
        hub: &["black-forest-labs/FLUX.2-dev"],
        config: || json!({"_class_name": "Flux2Transformer2DModel"}),
        transformers: 1,
    },
    Preset {
        name: "qwen-image",
        hub: &["Qwen/Qwen-Image"],
        config: || json!({"_class_name": "QwenImageTransformer2DModel"}),
        transformers: 1,
    },
    Preset {
        name: "qwen-image-edit-2511",
        hub: &["Qwen/Qwen-Image-Edit-2511"],
        config: || json!({"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": true}),
        transformers: 1,
    },
    Preset {
        name: "hunyuanvideo-1.5",
        hub: &["hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v"],
        config: || json!({"_class_name": "HunyuanVideo15Transformer3DModel"}),
        transformers: 1,
    },
    Preset {
        name: "wan2.1-1.3b",
        hub: &["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"],
        config: || json!({"_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
        transformers: 1,
    },
    Preset {
        name: "wan2.1-14b",
        hub: &["Wan-AI/Wan2.1-T2V-14B-Diffusers"],
        config: || json!({"_class_name": "WanTransformer3DModel"}),
        transformers: 1,
    },
    // One for high noise, one for low noise.
    Preset {
        name: "wan2.2-a14b",
        hub: &["Wan-AI/Wan2.2-T2V-A14B-Diffusers"],
        config: || json!({"_class_name": "WanTransformer3DModel"}),
        transformers: 2,
    },
    Preset {
        name: "ltx-2.3",
        hub: &["Lightricks/LTX-2.3"],
        config: || {
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
        },
        transformers: 1,
    },
    Preset {
        name: "chroma1",
        hub: &["lodestones/Chroma1-HD", "lodestones/Chroma1-Base"],
        config: || json!({"_class_name": "ChromaTransformer2DModel"}),
        transformers: 1,
    },
    Preset {
        name: "flux.3-klein-base",
        hub: &["black-forest-labs/flux-3-image-klein-base"],
        config: || json!({"_class_name": "Flux3Transformer2DModel"}),
        transformers: 1,
    },
    Preset {
        name: "krea-2-raw",
        hub: &["krea/Krea-2-Raw"],
        config: || json!({"_class_name": "Krea2Transformer2DModel"}),
        transformers: 1,
    },
    Preset {
        name: "krea-2-turbo",
        hub: &["krea/Krea-2-Turbo"],
        config: || json!({"_class_name": "Krea2Transformer2DModel"}),
        transformers: 1,
    },
];

/// The preset of that name.
///
/// # Errors
/// When there is none: the error lists all.
pub fn preset(name: &str) -> Result<&'static Preset> {
    let names = || PRESETS.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
    let found = PRESETS.iter().find(|p| p.name == name);
    found.ok_or_else(|| Error::config("preset", format!("one of {}", names()), name))
}

#[cfg(test)]
mod tests {
    use flowtape_engine::DType;
    use flowtape_engine::meta::Meta;
    use flowtape_engine::nn::ParamBuilder;

    use super::*;
    use crate::create_model;

    /// Elements and tensors that PyTorch counts for diffusers' classes on its meta device.
    const COUNTS: &[(&str, usize, usize)] = &[
        ("flux.1-dev", 11_901_408_320, 1160),
        ("flux.1-schnell", 11_891_178_560, 1156),
        ("flux.2-dev", 32_223_281_152, 331),
        ("qwen-image", 20_430_401_088, 1933),
        ("qwen-image-edit-2511", 20_430_401_088, 1933),
        ("hunyuanvideo-1.5", 8_326_608_160, 1801),
        ("wan2.1-1.3b", 1_418_996_800, 825),
        ("wan2.1-14b", 14_288_491_584, 1095),
        ("wan2.2-a14b", 14_288_491_584, 1095),
        ("ltx-2.3", 18_988_838_144, 4186),
        ("chroma1", 8_899_983_424, 1023),
        ("flux.3-klein-base", 5_538_458_368, 357),
        ("krea-2-raw", 12_820_073_036, 430),
        ("krea-2-turbo", 12_820_073_036, 430),
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
}
