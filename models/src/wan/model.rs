//! diffusers' `WanTransformer3DModel`.

use flowtape_engine::nn::{
    Activation, Blocks, FeedForward, Init, LayerNorm, Linear, Param, ParamBuilder, Params, TimestepEmbedding,
    TimestepProjection,
};
use flowtape_engine::ops::pointwise;
use flowtape_engine::{DType, Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::WanConfig;
use crate::blocks::{
    ChannelOrder, PatchEmbed, QKV, QkNorm, QkvConfig, QkvHeads, RopeTables, ScaleShiftTable, Tokens, attend, gate,
    time_proj, unpatchify,
};
use crate::config::config_json;
use crate::{Error, Transformer};

/// Vectors for shift, scale and gate that start as PixArt's do.
fn scale_shift_table(params: &ParamBuilder, parts: usize, dim: usize) -> Result<ScaleShiftTable> {
    ScaleShiftTable::new(params, "scale_shift_table", &[1, parts, dim], (dim as f64).powf(-0.5))
}

/// Attention of the video to itself, or to text and maybe an image.
#[derive(Clone, Debug)]
pub struct WanAttention {
    qkv: QkvHeads,
    /// Keys and values of an image, and the norm of the keys.
    added: Option<QkvHeads>,
    to_out: Linear,
}

impl WanAttention {
    /// Attention of width `dim`; `added` is the width of image embeddings, where there are such.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, dim: usize, heads: usize, eps: f64, added: Option<usize>) -> Result<Self> {
        let config = QkvConfig { norm: QkNorm::AcrossHeads, eps, ..QkvConfig::joint(dim, heads) };
        let names = ["add_k_proj", "add_v_proj", "norm_added_k"];
        let added = added.map(|context_dim| QkvHeads::context_only(params, names, QkvConfig { context_dim, ..config }));
        Ok(Self {
            qkv: QkvHeads::new(params, QKV, config)?,
            added: added.transpose()?,
            to_out: Linear::new(&params.sub("to_out").sub(0), dim, dim, true)?,
        })
    }

    /// x `[B, L, dim]` attends to itself.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn self_attention(&self, x: &Tensor, tokens: &Tokens, rope: &RopeTables) -> Result<Tensor> {
        self.to_out.forward(&tokens.attend(self.qkv.forward(x, Some(rope))?, None)?)
    }

    /// x `[B, L, dim]` attends to a text `[B, T, dim]` and, by itself, to an image `[B, I, dim]`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn cross_attention(&self, x: &Tensor, text: &Tensor, image: Option<&Tensor>) -> Result<Tensor> {
        let queries = self.qkv.queries(x, None)?;
        let [keys, values] = self.qkv.keys_values(text, None)?;
        let mut result = attend([queries.clone(), keys, values], None)?;
        if let (Some(added), Some(image)) = (&self.added, image) {
            let [keys, values] = added.keys_values(image, None)?;
            result = result.add(&attend([queries, keys, values], None)?)?;
        }
        self.to_out.forward(&result)
    }
}

/// One block: self-attention and feed-forward modulated by time, cross-attention between them.
#[derive(Clone, Debug)]
pub struct WanTransformerBlock {
    scale_shift_table: ScaleShiftTable,
    norm: LayerNorm,
    attn1: WanAttention,
    norm2: Option<LayerNorm>,
    attn2: WanAttention,
    ffn: FeedForward,
}

impl WanTransformerBlock {
    /// A block of a model of this configuration.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, config: &WanConfig) -> Result<Self> {
        let (dim, heads, eps) = (config.inner_dim(), config.num_attention_heads, config.eps);
        let norm2 = || LayerNorm::new(&params.sub("norm2"), dim, eps, true);
        Ok(Self {
            scale_shift_table: scale_shift_table(params, 6, dim)?,
            norm: LayerNorm::new(params, dim, eps, false)?,
            attn1: WanAttention::new(&params.sub("attn1"), dim, heads, eps, None)?,
            norm2: config.cross_attn_norm.then(norm2).transpose()?,
            attn2: WanAttention::new(&params.sub("attn2"), dim, heads, eps, config.added_kv_proj_dim)?,
            ffn: FeedForward::new(&params.sub("ffn"), dim, config.ffn_dim(), Activation::GeluTanh)?,
        })
    }

    /// x `[B, L, dim]` with text `[B, T, dim]`, maybe an image `[B, I, dim]`, and the modulation of time
    /// `[B, 1 or L, 6, dim]`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        text: &Tensor,
        image: Option<&Tensor>,
        time: &Tensor,
        tokens: &Tokens,
        rope: &RopeTables,
    ) -> Result<Tensor> {
        let parts = self.scale_shift_table.forward(time)?;
        let h = self.norm.modulated(x, &parts[0], &parts[1])?;
        let x = gate(x, &parts[2], &self.attn1.self_attention(&h, tokens, rope)?)?;
        let h = self.norm2.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.forward(&x))?;
        let x = x.add(&self.attn2.cross_attention(&h, text, image)?)?;
        let h = self.norm.modulated(&x, &parts[3], &parts[4])?;
        gate(&x, &parts[5], &self.ffn.forward(&h)?)
    }
}

/// Image embeddings as a context: norm, feed-forward, norm, with learned positions where they have any.
#[derive(Clone, Debug)]
struct ImageEmbedding {
    pos_embed: Option<Param>,
    norm1: LayerNorm,
    ff: [Linear; 2],
    norm2: LayerNorm,
}

impl ImageEmbedding {
    const EPS: f64 = 1e-5;

    fn new(params: &ParamBuilder, inputs: usize, dim: usize, positions: Option<usize>) -> Result<Self> {
        let net = params.sub("ff").sub("net");
        Ok(Self {
            pos_embed: positions.map(|n| params.get("pos_embed", &[1, n, inputs], Init::Zeros)).transpose()?,
            norm1: LayerNorm::new(&params.sub("norm1"), inputs, Self::EPS, true)?,
            ff: [
                Linear::new(&net.sub(0).sub("proj"), inputs, inputs, true)?,
                Linear::new(&net.sub(2), inputs, dim, true)?,
            ],
            norm2: LayerNorm::new(&params.sub("norm2"), dim, Self::EPS, true)?,
        })
    }

    fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let mut x = image.clone();
        if let Some(positions) = &self.pos_embed {
            // First and last image of a video, one after the other on the axis of the batch or of the tokens, are one context:
            // the positions are those of both.
            let (images, len, width) = (x.dim(0)?, x.dim(1)?, x.dim(2)?);
            if len == positions.dim(1)? {
                x = x.reshape(&[2 * images, len / 2, width])?;
            }
            let (images, len) = (x.dim(0)?, x.dim(1)?);
            if images % 2 != 0 || positions.dim(1)? != 2 * len {
                let expected =
                    format!("pairs of images of {} tokens (half of pos_embed_seq_len)", positions.dim(1)? / 2);
                return Err(flowtape_engine::Error::shape("image_embedder", expected, x.dims()));
            }
            x = x.reshape(&[images / 2, 2 * len, width])?.add(&positions.value()?)?;
        }
        let hidden = Activation::Gelu.forward(&self.ff[0].forward(&self.norm1.forward(&x)?)?)?;
        self.norm2.forward(&self.ff[1].forward(&hidden)?)
    }
}

/// Wan's transformer.
///
/// Inputs, with the reference's names: `hidden_states` `[B, C, F, H, W]`, `timestep` `[B]` or one per token `[B, L]` (0 to
/// 1000), `encoder_hidden_states` `[B, T, text_dim]`, and `encoder_hidden_states_image` `[B, I, image_dim]` where the
/// model takes images. Result `[B, out_channels, F, H, W]`.
#[derive(Debug)]
pub struct WanTransformer3DModel {
    config: WanConfig,
    params: Params,
    patch_embedding: PatchEmbed,
    time_embedder: TimestepEmbedding,
    time_proj: Linear,
    text_embedder: TimestepEmbedding,
    image_embedder: Option<ImageEmbedding>,
    blocks: Blocks<WanTransformerBlock>,
    norm_out: LayerNorm,
    scale_shift_table: ScaleShiftTable,
    proj_out: Linear,
}

impl WanTransformer3DModel {
    /// A model with diffusers' starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: WanConfig, root: &ParamBuilder) -> Result<Self> {
        let dim = config.inner_dim();
        let outputs = config.out_channels() * config.patch_size.iter().product::<usize>();
        let condition = root.sub("condition_embedder");
        let image = |width| ImageEmbedding::new(&condition.sub("image_embedder"), width, dim, config.pos_embed_seq_len);
        let block = |params: &ParamBuilder, _| WanTransformerBlock::new(params, &config);
        let text = condition.sub("text_embedder");
        Ok(Self {
            patch_embedding: PatchEmbed::new(
                &root.sub("patch_embedding"),
                config.in_channels,
                dim,
                &config.patch_size,
            )?,
            time_embedder: TimestepEmbedding::new(&condition.sub("time_embedder"), config.freq_dim, dim)?,
            time_proj: Linear::new(&condition.sub("time_proj").zero_init(), dim, 6 * dim, true)?,
            text_embedder: TimestepEmbedding::with(&text, config.text_dim, dim, Activation::GeluTanh, true)?,
            image_embedder: config.image_dim.map(image).transpose()?,
            blocks: Blocks::new(&root.sub("blocks"), config.num_layers, block)?,
            norm_out: LayerNorm::new(root, dim, config.eps, false)?,
            scale_shift_table: scale_shift_table(root, 2, dim)?,
            proj_out: Linear::new(&root.sub("proj_out").zero_init(), dim, outputs, true)?,
            params: root.params(),
            config,
        })
    }

    /// The embedding of time `[B, 1 or L, dim]`.
    fn temb(&self, inputs: &ModelInputs, dtype: DType) -> flowtape_flowmatch::Result<Tensor> {
        let timestep = inputs.tensor("timestep")?;
        let (batch, len) = (timestep.dim(0)?, if timestep.rank() == 2 { timestep.dim(1)? } else { 1 });
        let options = TimestepProjection::new(self.config.freq_dim);
        let projection = time_proj("condition_embedder.timesteps_proj", &timestep.reshape(&[batch * len])?, &options)?;
        let temb = self.time_embedder.forward(&projection.to_dtype(dtype)?)?;
        Ok(temb.reshape(&[batch, len, self.config.inner_dim()])?)
    }
}

impl FlowModel for WanTransformer3DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let latents = inputs.tensor("hidden_states")?;
        if latents.rank() != 5 {
            let got = format!("{:?}", latents.dims());
            return Err(Error::adapter("WanTransformer3DModel", "latents [B, C, F, H, W]", got));
        }
        let patch = &self.config.patch_size;
        let grid: Vec<usize> = latents.dims()[2..].iter().zip(patch).map(|(size, p)| size / p).collect();
        let tokens = Tokens::of(inputs, &[grid.iter().product()])?;
        let rope = tokens.rope(&self.config.rope(&grid, latents.device())?)?;
        let x = tokens.part(&self.patch_embedding.forward(latents)?, 1)?;

        let temb = tokens.part(&self.temb(inputs, latents.dtype())?, 1)?;
        let (batch, len, dim) = (temb.dim(0)?, temb.dim(1)?, self.config.inner_dim());
        let time = self.time_proj.forward(&pointwise([&temb], |[t]| t.silu())?)?.reshape(&[batch, len, 6, dim])?;
        let text = self.text_embedder.forward(inputs.tensor("encoder_hidden_states")?)?;
        let image = self.image_embedder.as_ref().zip(inputs.optional("encoder_hidden_states_image"));
        let image = image.map(|(embedder, image)| embedder.forward(image)).transpose()?;
        let of_block = tokens.clone();
        let [x] = match &image {
            None => self.blocks.run([x], [&text, &time], move |block, [x], [text, time]| {
                Ok([block.forward(x, text, None, time, &of_block, &rope)?])
            }),
            Some(image) => self.blocks.run([x], [&text, image, &time], move |block, [x], [text, image, time]| {
                Ok([block.forward(x, text, Some(image), time, &of_block, &rope)?])
            }),
        }?;
        let parts = self.scale_shift_table.forward(&temb.unsqueeze(2)?)?;
        let x = self.proj_out.forward(&self.norm_out.modulated(&x, &parts[0], &parts[1])?)?;
        Ok(unpatchify(&tokens.gather(&x)?, &grid, patch, ChannelOrder::Fastest)?.into())
    }
}

impl Transformer for WanTransformer3DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    /// What makes something of an image without one.
    fn paths_without_gradient(&self, inputs: &ModelInputs) -> Vec<String> {
        let WanConfig { image_dim, added_kv_proj_dim, num_layers, .. } = &self.config;
        let reads = image_dim.and(*added_kv_proj_dim).is_some();
        if reads && inputs.get("encoder_hidden_states_image").is_some() {
            return Vec::new();
        }
        let layers = ["add_k_proj", "add_v_proj", "norm_added_k"];
        let added = (0..*num_layers).flat_map(|i| layers.map(|layer| format!("blocks.{i}.attn2.{layer}.")));
        ["condition_embedder.image_embedder.".into()].into_iter().chain(added).collect()
    }

    fn is_ignored_key(&self, key: &str) -> bool {
        key.contains("norm_added_q")
    }

    fn shares_tokens(&self) -> bool {
        true
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        self.blocks.set_checkpointing(on);
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::{Device, Tape};
    use serde_json::json;

    use super::*;
    use crate::testing::normal;

    #[test]
    fn what_reads_an_image_needs_a_gradient_where_there_is_one() {
        let check = |added: Option<usize>, image: bool| {
            let config = WanConfig::from_json(&json!({
                "in_channels": 2, "out_channels": 2, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2,
                "text_dim": 5, "ffn_dim": 8, "image_dim": 6, "added_kv_proj_dim": added,
            }));
            let params = ParamBuilder::new(3, DType::F32, &Device::cpu());
            let model = WanTransformer3DModel::new(config.unwrap(), &params).unwrap();
            let mut inputs = ModelInputs::new()
                .with("hidden_states", normal(&[2, 2, 1, 4, 4]))
                .with("timestep", Tensor::full(&[2], 300.0, DType::F32, &Device::cpu()).unwrap())
                .with("encoder_hidden_states", normal(&[2, 3, 5]))
                .with_optional("encoder_hidden_states_image", image.then(|| normal(&[2, 4, 6])));
            let tape = Tape::new();
            inputs.attach(&tape);
            let loss = model.forward(&inputs).unwrap().sample.square().unwrap().sum_all().unwrap();
            let gradients = tape.backward(&loss).unwrap();
            let without = model.parameters_without_gradient(&inputs);
            model.params().check_gradients(&gradients, &without).unwrap();
            let reached = |name: &String| gradients.of(model.params().get(name).unwrap()).is_some();
            assert!(!without.iter().any(reached), "{without:?}");
            without.len()
        };
        // Two norms and two products of the embedder; in each block two products and the norm of the keys.
        assert_eq!((check(Some(24), true), check(Some(24), false)), (0, 8 + 2 * 5));
        assert_eq!(check(None, true), 8);
    }
}
