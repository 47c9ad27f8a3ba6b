//! The work that is measured: the training steps of `docs/BENCHMARKS.md`, on FLUX's model.

use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::{DType, Device, Philox, Tape, Tensor, ops};
use flowtape_flowmatch::{FlowModel, ModelInputs};
use flowtape_models::flux::{FluxConfig, FluxTransformer2DModel};
use serde_json::json;

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

    /// The model, its parameters made by `params`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn model(&self, params: &ParamBuilder) -> Result<FluxTransformer2DModel> {
        let config = FluxConfig::from_json(&json!({
            "in_channels": self.channels,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.joint,
            "pooled_projection_dim": self.pooled,
            "guidance_embeds": false,
            "axes_dims_rope": self.axes,
        }))?;
        Ok(FluxTransformer2DModel::new(config, params)?)
    }
}

/// A batch, and what is drawn for each step.
#[derive(Debug)]
pub struct Batch {
    work: Work,
    dtype: DType,
    random: Philox,
    /// Packed latents `[B, L, channels]`, f32.
    x1: Tensor,
    text: Tensor,
    pooled: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
}

impl Batch {
    /// Random latents and text.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(work: &Work, dtype: DType, device: &Device) -> Result<Self> {
        let mut random = Philox::new(1);
        let (height, width) = work.image;
        let mut normal = |dims: &[usize]| random.normal(dims, device);
        let x1 = normal(&[work.batch, work.image_tokens(), work.channels])?;
        let text = normal(&[work.batch, work.text, work.joint])?.to_dtype(dtype)?;
        let pooled = normal(&[work.batch, work.pooled])?.to_dtype(dtype)?;
        let ids = (0..height * width).flat_map(|i| [0.0, (i / width) as f32, (i % width) as f32]).collect();
        Ok(Self {
            x1,
            text,
            pooled,
            image_ids: Tensor::from_vec(ids, &[height * width, 3], device)?,
            text_ids: Tensor::zeros(&[work.text, 3], DType::F32, device)?,
            work: work.clone(),
            dtype,
            random,
        })
    }

    /// The loss of one step: noise, times, `x_t`, the model and the mean squared error.
    ///
    /// # Errors
    /// When the model fails.
    pub fn loss(&mut self, model: &dyn FlowModel, tape: &Tape) -> Result<Tensor> {
        let device = self.x1.device().clone();
        let x0 = self.random.normal(self.x1.dims(), &device)?;
        let t = self.random.uniform(&[self.work.batch], &device)?;
        let spread = t.reshape(&[self.work.batch, 1, 1])?;
        let x_t = ops::pointwise([&self.x1, &x0, &spread], |[x1, x0, t]| (1.0 - t) * x1 + t * x0)?;
        let mut inputs = ModelInputs::new()
            .with("hidden_states", x_t.to_dtype(self.dtype)?)
            .with("encoder_hidden_states", self.text.clone())
            .with("pooled_projections", self.pooled.clone())
            .with("timestep", t.to_dtype(self.dtype)?)
            .with("img_ids", self.image_ids.clone())
            .with("txt_ids", self.text_ids.clone());
        inputs.attach(tape);
        let v = model.forward(&inputs)?.sample;
        Ok(ops::pointwise::pointwise_to(DType::F32, [&v, &self.x1, &x0], |[v, x1, x0]| (v - (x0 - x1)).square())?
            .mean_all()?)
    }
}

#[cfg(test)]
mod tests {
    use flowtape_models::Transformer;

    use super::*;

    #[test]
    fn operations_and_parameters_are_those_of_the_peer() {
        // What the peer's script counts with hooks.
        for (name, gflop) in [("s", 51.55), ("m", 524.75), ("l", 458.83)] {
            let counted = Work::named(name).unwrap().flops() / 1e9;
            assert!((counted - gflop).abs() < 0.005, "{name}: {counted}");
        }
        for (name, parameters) in [("s", 13_906_496), ("digits", 1_790_596)] {
            let params = ParamBuilder::new(0, DType::F32, &Device::cpu());
            let model = Work::named(name).unwrap().model(&params).unwrap();
            assert_eq!(model.params().numel(), parameters, "{name}");
        }
    }
}
