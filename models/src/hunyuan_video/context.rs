//! What HunyuanVideo is conditioned on: two texts, an image and the time, brought to the width of the model.

use flowtape_engine::nn::{
    Activation, Blocks, FeedForward, Init, LayerNorm, Linear, Param, ParamBuilder, TimestepEmbedding,
    TimestepProjection,
};
use flowtape_engine::ops::pointwise;
use flowtape_engine::{DType, Result, Tensor};
use flowtape_flowmatch::ModelInputs;

use super::HunyuanVideo15Config;
use crate::blocks::{
    CHANNELS, CombinedTimestepTextProjEmbeddings, Modulation, QKV, QkNorm, QkvConfig, QkvHeads, TOKEN, attend, gate,
    key_mask, time_proj,
};

/// Epsilon of PyTorch's LayerNorm, which the projections keep.
const EPS: f64 = 1e-5;
/// The same of the refiner.
const REFINER_EPS: f64 = 1e-6;
/// Width inside the refiner's feed-forward layers, over the width of the model.
const REFINER_MLP_RATIO: usize = 4;
/// The embedding of the time, and of a second one in MeanFlow models.
#[derive(Clone, Debug)]
pub(super) struct TimeEmbedding {
    timestep_embedder: TimestepEmbedding,
    timestep_embedder_r: Option<TimestepEmbedding>,
}

impl TimeEmbedding {
    pub(super) fn new(params: &ParamBuilder, dim: usize, meanflow: bool) -> Result<Self> {
        let embedder = |name| TimestepEmbedding::new(&params.sub(name), CHANNELS, dim);
        Ok(Self {
            timestep_embedder: embedder("timestep_embedder")?,
            timestep_embedder_r: if meanflow { Some(embedder("timestep_embedder_r")?) } else { None },
        })
    }

    /// `[B, dim]` in `dtype` from `timestep` `[B]`, and `timestep_r` `[B]` where it is given.
    pub(super) fn forward(&self, inputs: &ModelInputs, dtype: DType) -> flowtape_flowmatch::Result<Tensor> {
        let project = |module: &str, times: &Tensor| {
            time_proj(module, times, &TimestepProjection::new(CHANNELS))?.to_dtype(dtype)
        };
        let time = self.timestep_embedder.forward(&project("time_embed.time_proj", inputs.tensor("timestep")?)?)?;
        match (inputs.optional("timestep_r"), &self.timestep_embedder_r) {
            (None, _) => Ok(time),
            (Some(r), Some(embedder)) => Ok(time.add(&embedder.forward(&project("time_embed.time_proj_r", r)?)?)?),
            (Some(_), None) => Err(flowtape_engine::Error::argument(
                "timestep_r",
                "no second time (use_meanflow of the model is false)",
                "one",
            )
            .into()),
        }
    }
}

/// Refines the first text by self-attention under the time and the mean of its tokens.
#[derive(Clone, Debug)]
pub(super) struct TokenRefiner {
    time_text_embed: CombinedTimestepTextProjEmbeddings,
    proj_in: Linear,
    blocks: Blocks<RefinerBlock>,
}

#[derive(Clone, Debug)]
struct RefinerBlock {
    norm1: LayerNorm,
    qkv: QkvHeads,
    to_out: Linear,
    norm2: LayerNorm,
    ff: FeedForward,
    gates: Modulation,
}

impl RefinerBlock {
    fn new(params: &ParamBuilder, dim: usize, heads: usize) -> Result<Self> {
        let (attn, norm) = (params.sub("attn"), |name| LayerNorm::new(&params.sub(name), dim, REFINER_EPS, true));
        let qkv = QkvConfig { norm: QkNorm::None, ..QkvConfig::joint(dim, heads) };
        Ok(Self {
            norm1: norm("norm1")?,
            qkv: QkvHeads::new(&attn, QKV, qkv)?,
            to_out: Linear::new(&attn.sub("to_out").sub(0), dim, dim, true)?,
            norm2: norm("norm2")?,
            ff: FeedForward::new(&params.sub("ff"), dim, REFINER_MLP_RATIO * dim, Activation::Silu)?,
            gates: Modulation::new(&params.sub("norm_out").sub("linear"), dim, 2)?,
        })
    }

    fn forward(&self, x: &Tensor, temb: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let gates = self.gates.forward(temb)?;
        let attention = attend(self.qkv.forward(&self.norm1.forward(x)?, None)?, Some(mask))?;
        let x = gate(x, &gates[0], &self.to_out.forward(&attention)?)?;
        gate(&x, &gates[1], &self.ff.forward(&self.norm2.forward(&x)?)?)
    }
}

impl TokenRefiner {
    pub(super) fn new(params: &ParamBuilder, config: &HunyuanVideo15Config) -> Result<Self> {
        let (dim, text) = (config.inner_dim(), config.text_embed_dim);
        let blocks = params.sub("token_refiner").sub("refiner_blocks");
        let block = |params: &ParamBuilder, _| RefinerBlock::new(params, dim, config.num_attention_heads);
        Ok(Self {
            time_text_embed: CombinedTimestepTextProjEmbeddings::new(&params.sub("time_text_embed"), dim, text, false)?,
            proj_in: Linear::new(&params.sub("proj_in"), text, dim, true)?,
            blocks: Blocks::new(&blocks, config.num_refiner_layers, block)?,
        })
    }

    /// `[B, T, dim]` of a text `[B, T, text_embed_dim]`, its mask `[B, T]` and the projection of the time `[B, 256]`.
    pub(super) fn forward(&self, text: &Tensor, mask: &Tensor, time: &Tensor) -> Result<Tensor> {
        let marks = mask.detach().to_dtype(DType::F32)?.unsqueeze(2)?;
        let sum = text.to_dtype(DType::F32)?.mul(&marks)?.sum(&[1], false)?;
        // Where there is no token at all, the mean is zero; the reference gives NaN.
        let mean = pointwise([&sum, &marks.sum(&[1], false)?], |[sum, n]| sum / n.select_lt(TOKEN, 1.0, n))?;
        let temb = self.time_text_embed.forward(time, None, &mean.to_dtype(text.dtype())?)?;
        let mask = key_mask(mask)?;
        let x = self.proj_in.forward(text)?;
        let [x] = self.blocks.run([x], [&temb], move |block, [x], [temb]| Ok([block.forward(x, temb, &mask)?]))?;
        Ok(x)
    }
}

/// Brings the second text, byT5's, to the width of the model.
#[derive(Clone, Debug)]
pub(super) struct ByT5TextProjection {
    norm: LayerNorm,
    linears: [Linear; 3],
}

impl ByT5TextProjection {
    pub(super) fn new(params: &ParamBuilder, inputs: usize, hidden: usize, outputs: usize) -> Result<Self> {
        let linear = |name, inputs, outputs| Linear::new(&params.sub(name), inputs, outputs, true);
        Ok(Self {
            norm: LayerNorm::new(&params.sub("norm"), inputs, EPS, true)?,
            linears: [
                linear("linear_1", inputs, hidden)?,
                linear("linear_2", hidden, hidden)?,
                linear("linear_3", hidden, outputs)?,
            ],
        })
    }

    pub(super) fn forward(&self, text: &Tensor) -> Result<Tensor> {
        let [first, second, third] = &self.linears;
        let x = Activation::Gelu.forward(&first.forward(&self.norm.forward(text)?)?)?;
        third.forward(&Activation::Gelu.forward(&second.forward(&x)?)?)
    }
}

/// Brings image embeddings to the width of the model.
#[derive(Clone, Debug)]
pub(super) struct ImageProjection {
    norm_in: LayerNorm,
    linear_1: Linear,
    linear_2: Linear,
    norm_out: LayerNorm,
}

impl ImageProjection {
    pub(super) fn new(params: &ParamBuilder, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            norm_in: LayerNorm::new(&params.sub("norm_in"), inputs, EPS, true)?,
            linear_1: Linear::new(&params.sub("linear_1"), inputs, inputs, true)?,
            linear_2: Linear::new(&params.sub("linear_2"), inputs, outputs, true)?,
            norm_out: LayerNorm::new(&params.sub("norm_out"), outputs, EPS, true)?,
        })
    }

    pub(super) fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let x = Activation::Gelu.forward(&self.linear_1.forward(&self.norm_in.forward(image)?)?)?;
        self.norm_out.forward(&self.linear_2.forward(&x)?)
    }
}

/// Everything that the latents attend to besides themselves, as one sequence.
#[derive(Clone, Debug)]
pub(super) struct Context {
    text: TokenRefiner,
    text_2: ByT5TextProjection,
    image: ImageProjection,
    /// What tells text, second text and image apart: `[3, dim]`.
    cond_type_embed: Param,
}

impl Context {
    pub(super) fn new(root: &ParamBuilder, config: &HunyuanVideo15Config) -> Result<Self> {
        let dim = config.inner_dim();
        let (text_2, hidden) = (config.text_embed_2_dim, config.byt5_hidden_dim);
        Ok(Self {
            text: TokenRefiner::new(&root.sub("context_embedder"), config)?,
            text_2: ByT5TextProjection::new(&root.sub("context_embedder_2"), text_2, hidden, dim)?,
            image: ImageProjection::new(&root.sub("image_embedder"), config.image_embed_dim, dim)?,
            cond_type_embed: root.sub("cond_type_embed").get("weight", &[3, dim], Init::Normal { std: 1.0 })?,
        })
    }

    /// The tokens `[B, N + T2 + T, dim]` of image, second and first text, and their mask, f32 of the first two axes.
    ///
    /// The reference moves tokens before padding, sample by sample, for kernels that take lengths in place of a mask.
    /// The context has no positions and its padding is masked out, so order changes nothing, and none needs to be known.
    pub(super) fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<[Tensor; 2]> {
        let (text, text_2) = (inputs.tensor("encoder_hidden_states")?, inputs.tensor("encoder_hidden_states_2")?);
        let (mask, mask_2) = (inputs.tensor("encoder_attention_mask")?, inputs.tensor("encoder_attention_mask_2")?);
        let (embeds, times) = (inputs.tensor("image_embeds")?, inputs.tensor("timestep")?);
        let module = "context_embedder.time_text_embed.time_proj";
        let time = time_proj(module, times, &TimestepProjection::new(CHANNELS))?;

        // Text to video is told from image embeddings that are zero in all samples. One number on the device says so.
        let largest = embeds.detach().to_dtype(DType::F32)?.abs()?.max(&[0, 1, 2], true)?;
        let given = pointwise([&largest], |[x]| x.select_lt(TOKEN, 0.0, 1.0))?;
        let image = self.image.forward(embeds)?;
        // Zeroed, not left out: the projection then has a gradient of zero, as in the reference.
        let image = image.mul(&given.to_dtype(image.dtype())?)?;
        let mask_3 = given.squeeze(2)?.broadcast_to(&embeds.dims()[..2])?;

        let typed = |x: &Tensor, kind: usize| x.add(&self.cond_type_embed.value()?.narrow(0, kind, 1)?);
        let text = typed(&self.text.forward(text, mask, &time)?, 0)?;
        let text_2 = typed(&self.text_2.forward(text_2)?, 1)?;
        let f32 = |mask: &Tensor| mask.detach().to_dtype(DType::F32);
        let mask = Tensor::cat(&[&mask_3, &f32(mask_2)?, &f32(mask)?], 1)?;
        Ok([Tensor::cat(&[&typed(&image, 2)?, &text_2, &text], 1)?, mask])
    }
}
