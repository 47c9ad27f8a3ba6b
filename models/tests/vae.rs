//! The published autoencoders: their parameters as PyTorch counts them, and the memory that a picture takes, where nothing is
//! computed: on a device without data tensors have sizes alone. Small ones make the same bits some rows at a time as all at once.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use flowtape_engine::meta::Meta;
use flowtape_engine::nn::{ParamBuilder, Placement};
use flowtape_engine::{DType, Device, Philox, Tape, Tensor};
use flowtape_models::vae::{Autoencoder, AutoencoderKind, FrameTiling, Tiling};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;

fn make(config: &Value, device: &Device) -> Box<dyn Autoencoder> {
    make_in(DType::F32, config, device)
}

fn make_in(dtype: DType, config: &Value, device: &Device) -> Box<dyn Autoencoder> {
    let params = ParamBuilder::with_plan(0, Placement::frozen(dtype), device).lazy();
    let kind = AutoencoderKind::of_class(config["_class_name"].as_str().unwrap()).unwrap();
    (kind.new)(&kind.config.complete(config).unwrap(), &params).unwrap()
}

fn flux() -> Value {
    json!({
        "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4],
        "latent_channels": 16, "use_quant_conv": false, "use_post_quant_conv": false,
        "scaling_factor": 0.3611, "shift_factor": 0.1159,
    })
}

/// Configuration, parameters and tensors; statistics of latents in a weight file are buffers, which PyTorch does not count.
fn published() -> Vec<(&'static str, Value, usize, usize, usize)> {
    let ltx = |more: Value| {
        let mut config = json!({"_class_name": "AutoencoderKLLTX2Video", "decoder_causal": false});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let ltx_23 = json!({
        "block_out_channels": [256, 512, 1024, 1024], "decoder_block_out_channels": [256, 512, 512, 1024],
        "layers_per_block": [4, 6, 4, 2, 2], "decoder_layers_per_block": [4, 6, 4, 2, 2],
        "decoder_spatio_temporal_scaling": [true, true, true, true], "decoder_inject_noise": [false, false, false, false, false],
        "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
        "upsample_residual": [false, false, false, false], "upsample_factor": [2, 2, 1, 2],
        "decoder_spatial_padding_mode": "zeros",
    });
    let wan_22 = json!({
        "_class_name": "AutoencoderKLWan", "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": true,
        "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
        "latents_mean": vec![0.0; 48], "latents_std": vec![1.0; 48],
    });
    vec![
        ("FLUX.1", flux(), 83_819_683, 244, 0),
        ("FLUX.2", json!({"_class_name": "AutoencoderKLFlux2"}), 84_046_115, 248, 2),
        ("Wan 2.1", json!({"_class_name": "AutoencoderKLWan"}), 126_892_531, 194, 0),
        ("Wan 2.2", wan_22, 704_688_668, 196, 0),
        ("Qwen-Image", json!({"_class_name": "AutoencoderKLQwenImage"}), 126_892_531, 194, 0),
        ("HunyuanVideo 1.5", json!({"_class_name": "AutoencoderKLHunyuanVideo15"}), 1_260_634_115, 218, 0),
        ("LTX-2's sound", json!({"_class_name": "AutoencoderKLLTX2Audio"}), 53_248_146, 100, 2),
        ("LTX-2.0", ltx(json!({})), 1_222_479_601, 182, 2),
        ("LTX-2.3", ltx(ltx_23), 726_105_969, 168, 2),
    ]
}

#[test]
fn published_autoencoders_have_the_parameters_that_pytorch_counts() {
    for (name, config, parameters, tensors, buffers) in published() {
        let model = make(&config, &Meta::default().device());
        let counted = model.params().iter().filter(|param| !is_buffer(param.path()));
        let (count, size) = counted.fold((0, 0), |(count, size), param| (count + 1, size + param.numel()));
        assert_eq!((size, count, model.params().len()), (parameters, tensors, tensors + buffers), "{name}");
    }
}

fn is_buffer(path: &str) -> bool {
    ["bn.running_mean", "bn.running_var", "latents_mean", "latents_std"].contains(&path)
}

/// Bytes of the weights that are no part of an autoencoder's other half.
fn weights_without(half: &str, config: &Value) -> u64 {
    let model = make(config, &Meta::default().device());
    let own = model.params().iter().filter(|param| !param.path().starts_with(half));
    own.map(|param| 4 * param.numel() as u64).sum()
}

#[test]
fn who_encodes_has_no_decoder_in_memory_and_who_decodes_no_encoder() {
    type Run = fn(&dyn Autoencoder, &Tensor) -> Tensor;
    let encode: Run = |model, x| model.encode(x).unwrap().mean;
    let decode: Run = |model, z| model.decode(&model.denormalise(z).unwrap()).unwrap();
    // LTX-2's films begin with more frames than are of use here.
    for (name, config, ..) in published().into_iter().filter(|known| !known.0.starts_with("LTX-2.")) {
        let pixels = match name {
            "FLUX.1" | "FLUX.2" => &[1, 3, 64, 64][..],
            "LTX-2's sound" => &[1, 2, 64, 64],
            _ => &[1, 3, 9, 64, 64],
        };
        for (other, run) in [("decoder", encode), ("encoder", decode)] {
            let meta = Meta::default();
            let device = meta.device();
            let model = make(&config, &device);
            assert_eq!(meta.used(), 0, "{name}");
            let dims = if other == "decoder" { pixels.to_vec() } else { model.latent_dims(pixels) };
            run(&*model, &Tensor::zeros(&dims, DType::F32, &device).unwrap());
            // Blocks of memory are at most an eighth larger than what is in them.
            let (used, weights) = (meta.used(), weights_without(other, &config));
            assert!(used >= weights - weights / 8 && used <= weights + weights / 8, "{name}: {used} of {weights}");
        }
    }
}

/// Bytes that decoding and encoding a picture take at most, weights included.
fn peaks(side: usize, tiling: Option<Tiling>) -> [u64; 2] {
    let peak = |run: &dyn Fn(&dyn Autoencoder, &Device)| {
        let meta = Meta::default();
        let device = meta.device();
        let mut model = make(&flux(), &device);
        model.set_tiling(tiling).unwrap();
        // The first time brings the weights.
        (0..2).for_each(|_| run(&*model, &device));
        meta.peak()
    };
    [
        peak(&|model, device| {
            let latents = Tensor::zeros(&[1, 16, side / 8, side / 8], DType::F32, device).unwrap();
            assert_eq!(model.decode(&latents).unwrap().dims(), [1, 3, side, side]);
        }),
        peak(&|model, device| {
            let pixels = Tensor::zeros(&[1, 3, side, side], DType::F32, device).unwrap();
            assert_eq!(model.encode(&pixels).unwrap().mean.dims(), [1, 16, side / 8, side / 8]);
        }),
    ]
}

#[test]
fn what_stands_between_convolutions_is_never_whole_in_memory() {
    let weights = ["encoder", "decoder"].map(|other| weights_without(other, &flux()));
    for side in [1024, 2048] {
        // The encoder's first stage, and half of what comes to the decoder's last one.
        let whole = (side * side * 128 * 4) as u64;
        let [decoding, encoding] = peaks(side, None);
        let [decoding, encoding] =
            [decoding - weights[0], encoding - weights[1]].map(|peak| peak as f64 / whole as f64);
        // x and what becomes of it, and parts of a few rows.
        assert!((2.0..2.3).contains(&encoding) && (3.0..3.3).contains(&decoding), "{encoding} and {decoding}");
    }
}

#[test]
fn rows_by_rows_the_same_bits_are_made_as_all_at_once() {
    let wan = |more: Value| {
        let mut config = json!({
            "_class_name": "AutoencoderKLWan", "base_dim": 16, "dim_mult": [1, 1, 2], "num_res_blocks": 1, "z_dim": 16,
            "temperal_downsample": [false, true], "scale_factor_spatial": 4, "latents_mean": vec![0.0; 16], "latents_std": vec![1.0; 16],
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let kl = json!({
        "_class_name": "AutoencoderKL", "block_out_channels": [16, 32], "down_block_types": vec!["DownEncoderBlock2D"; 2],
        "up_block_types": vec!["UpDecoderBlock2D"; 2], "norm_num_groups": 8, "mid_block_add_attention": false,
    });
    let wan_22 = json!({
        "is_residual": true, "dim_mult": [1, 1, 1], "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 8,
    });
    let hunyuan = json!({
        "_class_name": "AutoencoderKLHunyuanVideo15", "block_out_channels": [16, 16, 32], "latent_channels": 16,
        "layers_per_block": 1, "spatial_compression_ratio": 4, "temporal_compression_ratio": 2,
    });
    let ltx = json!({
        "_class_name": "AutoencoderKLLTX2Video", "block_out_channels": [16, 32], "decoder_block_out_channels": [16, 32],
        "down_block_types": vec!["LTX2VideoDownBlock3D"; 2], "layers_per_block": [1, 1, 1], "decoder_layers_per_block": [1, 1, 1],
        "spatio_temporal_scaling": [true, true], "decoder_spatio_temporal_scaling": [true, true], "decoder_inject_noise": false,
        "downsample_type": ["spatial", "temporal"], "upsample_type": ["temporal", "spatial"], "upsample_residual": [true, true],
        "upsample_factor": [1, 2], "latent_channels": 16, "patch_size": 2, "decoder_causal": false,
        "spatial_compression_ratio": 4, "temporal_compression_ratio": 2,
    });
    // Each stage of full size is more than a part.
    for (config, dtype, pixels) in [
        (&kl, DType::F32, &[1, 3, 192, 196][..]),
        (&kl, DType::BF16, &[1, 3, 192, 196]),
        (&wan(json!({})), DType::F32, &[1, 3, 5, 100, 96]),
        (&wan(wan_22), DType::F32, &[1, 3, 5, 200, 192]),
        (&hunyuan, DType::BF16, &[1, 3, 5, 132, 128]),
        (&ltx, DType::F32, &[1, 3, 5, 204, 192]),
    ] {
        let cpu = Device::cpu();
        let model = make_in(dtype, config, &cpu);
        let drawn = |dims: &[usize]| Philox::new(3).normal(dims, &cpu).unwrap().to_dtype(dtype).unwrap();
        let (x, z) = (drawn(pixels), drawn(&model.latent_dims(pixels)));
        let encoded = |x: &Tensor| model.encode(x).unwrap().mean.to_vec::<f32>().unwrap();
        let decoded = |z: &Tensor| model.decode(z).unwrap().to_vec::<f32>().unwrap();
        // What a tape carries is made all at once.
        let whole = |x: &Tensor| Tape::new().attach(x);
        assert!(encoded(&x) == encoded(&whole(&x)), "{} in {dtype}", config["_class_name"]);
        assert!(decoded(&z) == decoded(&whole(&z)), "{} in {dtype}", config["_class_name"]);
    }
}

#[test]
fn tiles_bound_the_memory_of_a_large_picture() {
    let small = peaks(1024, Some(Tiling::square(512)));
    assert!(small.iter().all(|peak| *peak < 3 * GIB), "{small:?}");
    // Four times the picture takes little more: the picture itself.
    let large = peaks(2048, Some(Tiling::square(512)));
    for (small, large) in small.into_iter().zip(large) {
        assert!(large < small + GIB / 4, "{small} and {large}");
    }
    let [whole, _] = peaks(1024, None);
    assert!(whole > small[0], "{whole}");
}

/// Bytes that decoding and encoding a film of 256 x 256 pixels take at most, weights included.
fn film_peaks(config: &Value, frames: usize, tiling: Option<FrameTiling>) -> [u64; 2] {
    let peak = |run: &dyn Fn(&dyn Autoencoder, &Device)| {
        let meta = Meta::default();
        let device = meta.device();
        let mut model = make(config, &device);
        model.set_frame_tiling(tiling).unwrap();
        (0..2).for_each(|_| run(&*model, &device));
        meta.peak()
    };
    let pixels = [1, 3, frames, 256, 256];
    [
        peak(&|model, device| {
            let latents = Tensor::zeros(&model.latent_dims(&pixels), DType::F32, device).unwrap();
            assert_eq!(model.decode(&latents).unwrap().dims(), pixels);
        }),
        peak(&|model, device| {
            let film = Tensor::zeros(&pixels, DType::F32, device).unwrap();
            assert_eq!(model.encode(&film).unwrap().mean.dims(), model.latent_dims(&pixels));
        }),
    ]
}

#[test]
fn a_long_film_takes_little_more_memory_than_a_short_one() {
    let published = published();
    let config = |name: &str| {
        let mut config = published.iter().find(|known| known.0 == name).unwrap().1.clone();
        if name.starts_with("LTX") {
            config["temporal_compression_ratio"] = json!(8);
            config["spatial_compression_ratio"] = json!(32);
        }
        config
    };
    let parts = FrameTiling::of(16);
    for (name, tiling) in [("Wan 2.1", None), ("HunyuanVideo 1.5", None), ("LTX-2.3", Some(parts))] {
        let (short, long) = (film_peaks(&config(name), 33, tiling), film_peaks(&config(name), 129, tiling));
        for (short, long) in short.into_iter().zip(long) {
            // The pixels of 96 frames, which are 75 MB, in pieces and side by side.
            assert!(long < short + GIB / 4, "{name}: {short} and {long}");
        }
    }
    let [whole, _] = film_peaks(&config("LTX-2.3"), 129, None);
    let [in_parts, _] = film_peaks(&config("LTX-2.3"), 129, Some(parts));
    assert!(whole > in_parts + GIB / 2, "{whole} and {in_parts}");
    let odd = make(&config("LTX-2.3"), &Meta::default().device()).set_frame_tiling(Some(FrameTiling::of(20)));
    assert!(odd.unwrap_err().to_string().contains("8 frames"));
}

#[test]
fn what_does_not_fit_is_said() {
    let device = Meta::default().device();
    let mut model = make(&flux(), &device);
    let encode =
        |dims: &[usize]| model.encode(&Tensor::zeros(dims, DType::F32, &device).unwrap()).unwrap_err().to_string();
    for dims in [&[1, 3, 60, 64][..], &[1, 4, 64, 64], &[3, 64, 64], &[1, 3, 0, 64]] {
        let message = encode(dims);
        assert!(message.contains("[B, 3, H, W]") && message.contains("multiples of 8"), "{message}");
    }
    let tiling = model.set_tiling(Some(Tiling::square(4))).unwrap_err().to_string();
    assert!(tiling.contains("at least 8 pixels"), "{tiling}");
    // The widths before the last stage fold, since it packs neighbours; the last one packs none.
    let wan = json!({"_class_name": "AutoencoderKLWan", "is_residual": true});
    for (config, key, value) in [
        (flux(), "down_block_types", json!(["AttnDownEncoderBlock2D"])),
        (flux(), "norm_num_groups", json!(3)),
        (flux(), "act_fn", json!("relu")),
        (wan, "dim_mult", json!([1, 2, 4, 8])),
    ] {
        let mut config = config;
        config[key] = value;
        let kind = AutoencoderKind::of_class(config["_class_name"].as_str().unwrap()).unwrap();
        let message = kind.config.complete(&config).unwrap_err().to_string();
        assert!(message.contains(key) || message.contains("block_out_channels"), "{message}");
    }
    assert!(AutoencoderKind::of_class("VQModel").unwrap_err().to_string().contains("AutoencoderKLWan"));
}
