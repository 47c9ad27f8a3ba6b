//! The work that is measured: the training steps of `docs/BENCHMARKS.md`, on FLUX's model.

use std::sync::Arc;

use flowtape_data::{Media, MemorySource, Sample, Text, TextEmbeddings};
use flowtape_engine::{Device, Philox, Tensor};
use flowtape_trainer::Recipe;
use flowtape_trainer::builtin::WordTable;
use flowtape_trainer::data::Data;
use flowtape_trainer::recipe::Dtype;
use serde_json::{Value, json};

use crate::Result;

/// Sizes of a step: a batch of latents, packed 2 x 2 to tokens, and a model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Work {
    /// The name in reports.
    pub name: String,
    /// Samples of a batch.
    pub batch: usize,
    /// Height and width of the packed image, in tokens.
    pub image: (usize, usize),
    /// Text tokens.
    pub text: usize,
    /// Channels of an image token.
    pub channels: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Columns of the three position axes in the rotary tables.
    pub axes: [usize; 3],
    /// Double-stream blocks.
    pub double: usize,
    /// Single-stream blocks.
    pub single: usize,
    /// Width of the text embeddings.
    pub joint: usize,
    /// Width of the pooled text embedding.
    pub pooled: usize,
}

impl Work {
    /// FLUX's heads and channels over a square image.
    fn flux(name: &str, batch: usize, side: usize, text: usize, heads: usize, blocks: (usize, usize)) -> Self {
        Self {
            name: name.into(),
            batch,
            image: (side, side),
            text,
            channels: 64,
            heads,
            head_dim: 64,
            axes: [16, 24, 24],
            double: blocks.0,
            single: blocks.1,
            joint: heads * 64,
            pooled: 768,
        }
    }

    /// The smallest of FLUX's shape.
    pub fn s() -> Self {
        Self { pooled: 256, ..Self::flux("S", 16, 8, 16, 4, (4, 4)) }
    }

    /// The configurations that are compared with PyTorch: `s`, `m`, `l`, `xl` (FLUX.1's widths at 1024 pixels) and
    /// `digits`.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "s" => Some(Self::s()),
            "m" => Some(Self::flux("M", 2, 16, 64, 12, (6, 12))),
            "l" => Some(Self::flux("L", 1, 16, 64, 16, (6, 12))),
            "xl" => Some(Self {
                head_dim: 128,
                axes: [16, 56, 56],
                joint: 4096,
                ..Self::flux("XL", 1, 64, 512, 24, (4, 8))
            }),
            "digits" => Some(Self {
                name: name.into(),
                batch: 64,
                image: (4, 4),
                text: 2,
                channels: 4,
                heads: 4,
                head_dim: 32,
                axes: [8, 12, 12],
                double: 2,
                single: 2,
                joint: 32,
                pooled: 32,
            }),
            _ => None,
        }
    }

    /// Tokens of an image.
    pub fn image_tokens(&self) -> usize {
        self.image.0 * self.image.1
    }

    /// Floating-point operations of a step: three times those of the forward pass, which are two for each row, input and
    /// output of a linear layer, and `4 B H L^2 D` for each attention.
    pub fn flops(&self) -> f64 {
        let d = self.heads * self.head_dim;
        let (b, image, text) = (self.batch, self.image_tokens(), self.text);
        let (image_rows, text_rows, rows) = (b * image, b * text, b * (image + text));
        // rows x in x out of every linear layer.
        let embed = image_rows * self.channels * d + text_rows * self.joint * d;
        let time = b * (256 * d + d * d) + b * (self.pooled * d + d * d);
        let double = 2 * b * d * 6 * d + rows * (4 * d * d + 8 * d * d);
        let single = b * d * 3 * d + rows * (3 * d * d + 4 * d * d + 5 * d * d);
        let last = b * d * 2 * d + image_rows * d * self.channels;
        let linear = embed + time + self.double * double + self.single * single + last;
        let attention = 4 * b * d * (image + text).pow(2) * (self.double + self.single);
        3.0 * (2 * linear + attention) as f64
    }

    /// The model, as `config.json` holds it.
    pub fn config(&self) -> Value {
        json!({
            "_class_name": "FluxTransformer2DModel",
            "in_channels": self.channels,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.joint,
            "pooled_projection_dim": self.pooled,
            "guidance_embeds": false,
            "axes_dims_rope": self.axes,
        })
    }

    /// A recipe that trains it, on data of [`Work::data`]. Parameters are updated as soon as their gradients are final, or
    /// after the backward pass. With a rank, LoRA adapters of all linear layers are trained, and the rest is frozen.
    ///
    /// # Errors
    /// When the sizes do not fit.
    pub fn recipe(&self, dtype: Dtype, at_once: bool, lora: Option<usize>) -> Result<Recipe> {
        // A limit that is never reached keeps all gradients until the backward pass is through.
        let clip = if at_once { Value::Null } else { json!({ "max_norm": 1e30 }) };
        Recipe::from_json(json!({
            "name": "bench",
            "dtype": dtype,
            "data": { "builtin": "digits", "text_dim": self.joint, "shuffle": false },
            "model": self.config(),
            "flow_matching": {
                "adapter_type": "flux",
                "adapter_kwargs": { "use_guidance_embeds": false },
                "timestep_sampling": "uniform",
                "flow_shift": 1.0,
                "cfg_dropout_prob": 0.0,
                "use_loss_weighting": false,
            },
            "optimizer": { "lr": 1e-4, "weight_decay": 0.01 },
            "clip_grad_norm": clip,
            "peft": lora.map(|rank| json!({ "dim": rank, "alpha": rank, "match_all_linear": true })),
            "step_scheduler": { "local_batch_size": self.batch, "max_steps": 1_000_000 },
        }))
    }

    /// A batch of random latents and embeddings, the same in every step.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn data(&self) -> Result<Data> {
        let mut random = Philox::new(1);
        let (height, width) = self.image;
        let mut normal = |dims: &[usize]| -> Result<Tensor> {
            let mut values = vec![0.0; dims.iter().product()];
            random.fill_normal(&mut values);
            Ok(Tensor::from_vec(values, dims, &Device::cpu())?)
        };
        let mut sample = || -> Result<Sample> {
            let latents = normal(&[self.channels / 4, 2 * height, 2 * width])?;
            let text = TextEmbeddings::default()
                .with("text_embeddings", normal(&[self.text, self.joint])?)
                .with("pooled_prompt_embeds", normal(&[self.pooled])?);
            Ok(Sample::new(Media::Latents(latents), Text::Embeddings(text)))
        };
        let samples = (0..self.batch).map(|_| sample()).collect::<Result<_>>()?;
        Ok(Data::of_pixels(Arc::new(MemorySource::new(samples)?), WordTable::new(&[], self.joint)))
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::meta::Meta;
    use flowtape_trainer::Trainer;

    use super::*;

    #[test]
    fn operations_and_parameters_are_those_of_the_peer() {
        // What the peer's script counts with hooks.
        for (name, gflop) in [("s", 51.55), ("m", 524.75), ("l", 458.83)] {
            let counted = Work::named(name).unwrap().flops() / 1e9;
            assert!((counted - gflop).abs() < 0.005, "{name}: {counted}");
        }
        for (name, parameters) in [("s", 13_906_496), ("digits", 1_790_596)] {
            let work = Work::named(name).unwrap();
            let recipe = work.recipe(Dtype::F32, true, None).unwrap();
            let trainer = Trainer::with_data(&Meta::default().device(), &recipe, work.data().unwrap()).unwrap();
            assert_eq!(trainer.model().params().numel(), parameters, "{name}");
        }
    }
}
