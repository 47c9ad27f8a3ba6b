//! diffusers' `ZImageTransformer2DModel`.

use flowtape_engine::nn::{
    Activation, Blocks, FeedForward, Init, LayerNorm, Linear, Param, ParamBuilder, Params, RmsNorm, TimestepProjection,
};
use flowtape_engine::ops::{pointwise, pointwise_to};
use flowtape_engine::{Device, Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::ZImageConfig;
use super::config::PATCH;
use crate::blocks::{
    CHANNELS, Captions, ChannelOrder, QKV, QkNorm, QkvConfig, QkvHeads, RopePrecision, RopeTables, SandwichBlock,
    SandwichNorms, SwiGlu, grid_positions, patchify_as, scaled, time_proj, unpatchify,
};
use crate::config::config_json;
use crate::{Error, Transformer};

/// Caption and image are each padded to a multiple of so many tokens, with learned ones that are attended to.
const MULTIPLE: usize = 32;
/// Inner width of the embedding of the time.
const TIME_INNER: usize = 1024;
/// The norms of queries and keys have an epsilon of their own.
const QK_EPS: f64 = 1e-5;
/// The same of the norm before the output.
const FINAL_EPS: f64 = 1e-6;

/// A block of a model of this configuration, with or without modulation by the time.
fn block(params: &ParamBuilder, config: &ZImageConfig, modulated: bool) -> Result<SandwichBlock> {
    let (dim, heads, attention) = (config.dim, config.n_heads, params.sub("attention"));
    let norm = if config.qk_norm { QkNorm::PerHead } else { QkNorm::None };
    let qkv = QkvConfig { bias: false, norm, eps: QK_EPS, ..QkvConfig::joint(dim, heads) };
    let norm = |name: &str| RmsNorm::new(&params.sub(name), dim, config.norm_eps);
    let modulation = params.sub("adaLN_modulation").sub(0).zero_init();
    let modulation = || Linear::new(&modulation, config.time_dim(), 4 * dim, true);
    Ok(SandwichBlock {
        modulation: modulated.then(modulation).transpose()?,
        norms: SandwichNorms {
            attention: [norm("attention_norm1")?, norm("attention_norm2")?],
            feed_forward: [norm("ffn_norm1")?, norm("ffn_norm2")?],
        },
        qkv: QkvHeads::new(&attention, QKV, qkv)?,
        to_out: Linear::new(&attention.sub("to_out").sub(0), dim, dim, false)?,
        feed_forward: SwiGlu::new(&params.sub("feed_forward"), ["w1", "w3", "w2"], dim, config.mlp_dim())?,
    })
}

/// What stands at both ends for patches of one kind.
#[derive(Clone, Debug)]
struct Ends {
    x_embedder: Linear,
    norm_final: LayerNorm,
    scale: Linear,
    linear: Linear,
}

impl Ends {
    fn new(root: &ParamBuilder, config: &ZImageConfig, patch: (usize, usize)) -> Result<Self> {
        let (width, last) = (patch.0 * patch.0 * patch.1 * config.in_channels, root.sub("all_final_layer"));
        let last = last.sub(name(patch));
        let scale = last.sub("adaLN_modulation").sub(1).zero_init();
        Ok(Self {
            x_embedder: Linear::new(&root.sub("all_x_embedder").sub(name(patch)), width, config.dim, true)?,
            norm_final: LayerNorm::new(&last, config.dim, FINAL_EPS, false)?,
            scale: Linear::new(&scale, config.time_dim(), config.dim, true)?,
            linear: Linear::new(&last.sub("linear").zero_init(), config.dim, width, true)?,
        })
    }

    /// x `[B, L, dim]` and the embedding of the time `[B, time_dim]`.
    fn last(&self, x: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let scale = self.scale.forward(&pointwise([temb], |[t]| t.silu())?)?.unsqueeze(1)?;
        self.linear.forward(&scaled(&self.norm_final.forward(x)?, &scale)?)
    }
}

/// diffusers' name of a kind of patches.
fn name((side, frames): (usize, usize)) -> String {
    format!("{side}-{frames}")
}

/// Z-Image's transformer.
///
/// Inputs: `hidden_states` `[B, in_channels, F, H, W]`, `encoder_hidden_states` `[B, T, cap_feat_dim]`,
/// `encoder_attention_mask` `[B, T]` (0 at padding; best on the host, where it is read) where there is one, and `timestep` `[B]`
/// (0 for noise, 1 for data). Result like the latents: what leads to the data.
///
/// The reference takes a list of captions without padding; here they are brought to one length, and what is beyond a sample's
/// own is masked out.
#[derive(Debug)]
pub struct ZImageTransformer2DModel {
    config: ZImageConfig,
    params: Params,
    ends: Vec<Ends>,
    t_embedder: FeedForward,
    cap_embedder: (RmsNorm, Linear),
    x_pad_token: Param,
    cap_pad_token: Param,
    noise_refiner: Blocks<SandwichBlock>,
    context_refiner: Blocks<SandwichBlock>,
    layers: Blocks<SandwichBlock>,
}

impl ZImageTransformer2DModel {
    /// A model with PyTorch's starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: ZImageConfig, root: &ParamBuilder) -> Result<Self> {
        let (dim, mlp, caption) = (config.dim, root.sub("t_embedder").sub("mlp"), root.sub("cap_embedder"));
        let blocks =
            |name: &str, count, modulated| Blocks::new(&root.sub(name), count, |p, _| block(p, &config, modulated));
        Ok(Self {
            ends: config.patches().map(|patch| Ends::new(root, &config, patch)).collect::<Result<_>>()?,
            t_embedder: FeedForward::from_parts(
                Linear::new(&mlp.sub(0), CHANNELS, TIME_INNER, true)?,
                Activation::Silu,
                Linear::new(&mlp.sub(2), TIME_INNER, config.time_dim(), true)?,
            ),
            cap_embedder: (
                RmsNorm::new(&caption.sub(0), config.cap_feat_dim, config.norm_eps)?,
                Linear::new(&caption.sub(1), config.cap_feat_dim, dim, true)?,
            ),
            x_pad_token: root.get("x_pad_token", &[1, dim], Init::Zeros)?,
            cap_pad_token: root.get("cap_pad_token", &[1, dim], Init::Zeros)?,
            noise_refiner: blocks("noise_refiner", config.n_refiner_layers, true)?,
            context_refiner: blocks("context_refiner", config.n_refiner_layers, false)?,
            layers: blocks("layers", config.n_layers, true)?,
            params: root.params(),
            config,
        })
    }

    /// Tables of positions, each of `axes_lens`.
    fn rope(&self, positions: &[f32], device: &Device) -> crate::Result<RopeTables> {
        let ZImageConfig { axes_dims, axes_lens, rope_theta, .. } = &self.config;
        for (axis, end) in axes_lens.iter().enumerate() {
            let last = positions.iter().skip(axis).step_by(axes_lens.len()).fold(0.0, |m: f32, p| m.max(*p));
            if last as usize >= *end {
                let expected = format!("more than {last} on axis {axis}, the last position of this caption and image");
                return Err(Error::config("axes_lens", expected, axes_lens));
            }
        }
        Ok(RopeTables::new(positions, axes_dims, *rope_theta, RopePrecision::RoundedAngles, device)?)
    }

    /// Tables of an image of a grid `[F, H, W]` behind a caption of each of these lengths, with padding that stands at 0.
    fn image_rope(
        &self,
        grid: &[usize],
        padding: usize,
        lengths: &[usize],
        device: &Device,
    ) -> crate::Result<RopeTables> {
        let one = |length: &usize| {
            let mut positions = grid_positions(grid);
            positions.iter_mut().step_by(grid.len()).for_each(|frame| *frame += (length + 1) as f32);
            positions.resize(positions.len() + padding * grid.len(), 0.0);
            self.rope(&positions, device)
        };
        Ok(RopeTables::of_samples(&lengths.iter().map(one).collect::<crate::Result<Vec<_>>>()?)?)
    }
}

/// Tokens `[B, L, dim]` with a learned one `[1, dim]` where the marks `[B or 1, L, 1]` are 1. Where none is, its gradient is zero.
fn with_padding(x: &Tensor, token: &Param, marks: &Tensor) -> Result<Tensor> {
    pointwise_to(x.dtype(), [marks, x, &token.value()?], |[mark, x, token]| mark.select_lt(0.5, x, token))
}

impl FlowModel for ZImageTransformer2DModel {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let latents = inputs.tensor("hidden_states")?;
        let (dtype, device) = (latents.dtype(), latents.device());
        let patch = [PATCH.1, PATCH.0, PATCH.0];
        let &[_, _, frames, height, width] = latents.dims() else {
            let got = format!("{:?}", latents.dims());
            return Err(Error::adapter("ZImageTransformer2DModel", "latents [B, C, F, H, W]", got));
        };
        let grid = [frames / patch[0], height / patch[1], width / patch[2]];
        let ends = self.config.patches().position(|patch| patch == PATCH).and_then(|i| self.ends.get(i));
        let ends = ends.ok_or_else(|| Error::config("all_patch_size", "2", &self.config.all_patch_size))?;

        let times = inputs.tensor("timestep")?.mul_scalar(self.config.t_scale)?;
        let temb = time_proj("t_embedder.time_proj", &times, &TimestepProjection::new(CHANNELS))?;
        let temb = self.t_embedder.forward(&temb.to_dtype(dtype)?)?;

        let text = inputs.tensor("encoder_hidden_states")?;
        let captions = Captions::of(text, inputs.optional("encoder_attention_mask"), MULTIPLE)?;
        let caption_rope = {
            let positions: Vec<f32> = (0..captions.width()).flat_map(|i| [1.0 + i as f32, 0.0, 0.0]).collect();
            self.rope(&positions, device)?
        };
        let patches = patchify_as(latents, &patch, ChannelOrder::Fastest)?;
        let tokens = patches.dim(1)?;
        let padding = tokens.next_multiple_of(MULTIPLE) - tokens;
        let image_rope = self.image_rope(&grid, padding, captions.lengths(), device)?;

        let x = ends.x_embedder.forward(&patches)?.pad(1, 0, padding)?;
        let rows = tokens + padding;
        let marks = (0..rows).map(|i| if i < tokens { 0f32 } else { 1.0 }).collect();
        let x = with_padding(&x, &self.x_pad_token, &Tensor::from_vec(marks, &[1, rows, 1], device)?)?;
        let rope = image_rope.clone();
        let [x] = self
            .noise_refiner
            .run([x], [&temb], move |block, [x], [temb]| Ok([block.forward(x, Some(temb), &rope, None)?]))?;

        let (norm, linear) = &self.cap_embedder;
        let caption = linear.forward(&norm.forward(&captions.gather(text)?)?)?;
        let caption = with_padding(&caption, &self.cap_pad_token, &captions.padding(device)?)?;
        let mask = captions.mask(device)?;
        let (rope, keys) = (caption_rope.clone(), mask.clone());
        let [caption] = self
            .context_refiner
            .run([caption], [], move |block, [x], []| Ok([block.forward(x, None, &rope, keys.as_ref())?]))?;

        // No place of an image is masked: nothing is added to their scores.
        let mask = mask.map(|mask| mask.pad(3, rows, 0)).transpose()?;
        let rope = RopeTables::cat(&[image_rope.clone(), caption_rope])?;
        let joint = Tensor::cat(&[&x, &caption], 1)?;
        let [joint] = self.layers.run([joint], [&temb], move |block, [x], [temb]| {
            Ok([block.forward(x, Some(temb), &rope, mask.as_ref())?])
        })?;
        let image = joint.narrow(1, 0, tokens)?;
        Ok(unpatchify(&ends.last(&image, &temb)?, &grid, &patch, ChannelOrder::Fastest)?.into())
    }
}

impl Transformer for ZImageTransformer2DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    /// What stands at the ends for other patches.
    fn paths_without_gradient(&self, _: &ModelInputs) -> Vec<String> {
        let others = self.config.patches().filter(|patch| *patch != PATCH).map(name);
        let ends = others.flat_map(|name| ["all_x_embedder", "all_final_layer"].map(|end| format!("{end}.{name}.")));
        ends.collect()
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        for blocks in [&mut self.noise_refiner, &mut self.context_refiner, &mut self.layers] {
            blocks.set_checkpointing(on);
        }
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::{DType, Tape};
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{normal, start_at_zero};

    fn model(more: &Value) -> ZImageTransformer2DModel {
        let mut config = json!({
            "in_channels": 3, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 8,
            "axes_dims": [4, 4, 4], "axes_lens": [80, 8, 8],
        });
        config.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        let params = ParamBuilder::new(3, DType::F32, &Device::cpu());
        ZImageTransformer2DModel::new(ZImageConfig::from_json(&config).unwrap(), &params).unwrap()
    }

    fn inputs(latents: &Tensor, text: &Tensor, mask: Option<Tensor>) -> ModelInputs {
        let times = Tensor::full(&[latents.dim(0).unwrap()], 0.25, DType::F32, &Device::cpu()).unwrap();
        ModelInputs::new()
            .with("hidden_states", latents.clone())
            .with("encoder_hidden_states", text.clone())
            .with("timestep", times)
            .with_optional("encoder_attention_mask", mask)
    }

    fn predict(model: &ZImageTransformer2DModel, inputs: &ModelInputs) -> Vec<f32> {
        model.forward(inputs).unwrap().sample.to_vec().unwrap()
    }

    #[test]
    fn samples_are_as_if_each_were_alone_without_padding() {
        let model = model(&json!({}));
        let (latents, text) = (normal(&[2, 3, 1, 4, 6]), normal(&[2, 37, 8]));
        let lengths = [35, 7];
        let marks = (0..2 * 37).map(|i| u32::from(i % 37 < lengths[i / 37]));
        let mask = Tensor::from_vec(marks.collect(), &[2, 37], &Device::cpu()).unwrap();
        let together = predict(&model, &inputs(&latents, &text, Some(mask)));
        for (i, length) in lengths.into_iter().enumerate() {
            let sample = |x: &Tensor| x.narrow(0, i, 1).unwrap();
            let alone = predict(&model, &inputs(&sample(&latents), &sample(&text).narrow(1, 0, length).unwrap(), None));
            let worst = alone.iter().zip(&together[i * 72..]).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst < 1e-5, "sample {i}: {worst}");
        }
    }

    #[test]
    fn every_parameter_but_those_of_other_patches_has_a_gradient() {
        let model = model(&json!({"all_patch_size": [4, 2], "all_f_patch_size": [1, 1]}));
        // 32 tokens of each: no padding is needed.
        let tape = Tape::new();
        let mut given = inputs(&normal(&[2, 3, 1, 8, 16]), &normal(&[2, 32, 8]), None);
        given.attach(&tape);
        let loss = model.forward(&given).unwrap().sample.square().unwrap().sum_all().unwrap();
        let gradients = tape.backward(&loss).unwrap();
        let without = model.parameters_without_gradient(&given);
        assert_eq!(without.len(), 6, "{without:?}");
        model.params().check_gradients(&gradients, &without).unwrap();
        for name in ["x_pad_token", "cap_pad_token"] {
            let gradient = gradients.of(model.params().get(name).unwrap()).unwrap().to_vec::<f32>().unwrap();
            assert!(gradient.iter().all(|v| *v == 0.0), "{name}");
        }
    }

    #[test]
    fn from_a_zero_start_it_predicts_zero_and_long_captions_are_refused() {
        let model = model(&json!({}));
        start_at_zero(model.params());
        let latents = normal(&[2, 3, 1, 4, 6]);
        assert!(predict(&model, &inputs(&latents, &normal(&[2, 9, 8]), None)).iter().all(|v| *v == 0.0));
        let error = model.forward(&inputs(&latents, &normal(&[2, 81, 8]), None)).unwrap_err().to_string();
        assert!(error.contains("axes_lens") && error.contains("axis 0"), "{error}");
    }
}
