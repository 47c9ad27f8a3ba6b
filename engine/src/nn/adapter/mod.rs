//! Adapters: what is trained beside a linear layer whose own weight stays as it is.
//!
//! A plan says which layers have one ([`AdapterPlan`]); [`ModuleSelection`] chooses them by patterns. Models do not change.

mod dropout;
mod loha;
mod lokr;
mod lora;
mod modules;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Init, Param, ParamBuilder, ParamPlan, Placement};
use crate::nn::layers::product;
use crate::ops::pointwise;
use crate::{DType, Error, Result, Tensor};

pub use dropout::{Dropout, DropoutMasks, DropoutPosition};
pub use modules::{ModulePattern, ModuleSelection};

/// What an adapter computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum AdapterKind {
    /// `W x + scale B A x` (Hu et al. 2021).
    Lora,
    /// The same, with each output's weights kept at a trained length (Liu et al. 2024).
    Dora,
    /// A change that is the product, element by element, of two of LoRA's.
    Loha,
    /// A change that is a Kronecker product.
    Lokr {
        /// The smaller factor of both sizes, or what it is near; where it is left out the two factors are near each other.
        factor: Option<usize>,
    },
}

/// How `A` starts; `B` starts at zero, so that a new adapter changes nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum LoraInit {
    /// Normal of variance `2 / (in + dim)`: PyTorch's `xavier_normal_`.
    #[default]
    Xavier,
    /// Uniform in `+-1 / sqrt(in)`: PyTorch's `kaiming_uniform_` with `a = sqrt(5)`, as peft starts it; NeMo calls it so.
    Uniform,
}

/// An adapter of one linear layer.
#[derive(Clone, Debug)]
pub struct AdapterSpec {
    /// What it computes.
    pub kind: AdapterKind,
    /// The rank.
    pub dim: usize,
    /// The product is scaled by `alpha / dim`.
    pub alpha: f64,
    /// How LoRA's `A` starts.
    pub init: LoraInit,
    /// How its parameters are held; they compute in the dtype of the layer.
    pub placement: Placement,
    /// What is dropped in training, if anything.
    pub dropout: Option<Dropout>,
}

impl AdapterSpec {
    /// A LoRA without dropout.
    pub fn lora(dim: usize, alpha: f64, placement: Placement) -> Self {
        Self { kind: AdapterKind::Lora, dim, alpha, init: LoraInit::default(), placement, dropout: None }
    }

    /// The factor of the product.
    pub fn scale(&self) -> f64 {
        self.alpha / self.dim as f64
    }

    /// `W + scale dW` in the dtype of `W`.
    fn changed(&self, weight: &Tensor, parts: &Parts) -> Result<Tensor> {
        let (delta, scale) = match self.kind {
            AdapterKind::Lora | AdapterKind::Dora => (lora::delta(parts)?, self.scale()),
            AdapterKind::Loha => (loha::delta(parts)?, self.scale()),
            AdapterKind::Lokr { .. } => (lokr::delta(parts)?, lokr::effective(parts, self.scale())),
        };
        if delta.dims() != weight.dims() {
            return Err(Error::shape("adapter", format!("a change of a weight {:?}", weight.dims()), delta.dims()));
        }
        pointwise([weight, &delta], |[w, d]| w + d * scale)
    }

    /// The weight with which a plain layer does what the layer does with its adapter; made in f32 or wider, then in the dtype
    /// of `weight`.
    ///
    /// # Errors
    /// When a part is missing or shapes do not fit.
    pub fn merged(&self, weight: &Tensor, parts: &Parts) -> Result<Tensor> {
        let wide = |t: &Tensor| t.to_dtype(DType::F32.promote(t.dtype()));
        let parts: Parts = parts.iter().map(|(name, t)| Ok((name.clone(), wide(t)?))).collect::<Result<_>>()?;
        let mut merged = self.changed(&wide(weight)?, &parts)?;
        if self.kind == AdapterKind::Dora {
            let relative = part(&parts, MAGNITUDE)?.div(&row_lengths(&merged)?)?;
            merged = merged.mul(&relative.unsqueeze(1)?)?;
        }
        merged.to_dtype(weight.dtype())
    }
}

/// A model held one way, with adapters beside some of its linear layers.
#[derive(Clone, Debug)]
pub struct AdapterPlan {
    /// How the model's own parameters are held.
    pub base: Placement,
    /// The adapters by their layers' paths.
    pub adapters: BTreeMap<String, AdapterSpec>,
}

impl ParamPlan for AdapterPlan {
    fn place(&self, _: &str, _: &[usize]) -> Placement {
        self.base
    }

    fn adapter(&self, module: &str) -> Option<AdapterSpec> {
        self.adapters.get(module).cloned()
    }
}

/// An adapter's tensors, by the names of its parameters.
pub type Parts = BTreeMap<String, Tensor>;

fn part<'p>(parts: &'p Parts, name: &str) -> Result<&'p Tensor> {
    parts.get(name).ok_or_else(|| Error::argument("adapter", format!("a tensor {name}"), parts.keys()))
}

/// DoRA's length of each output's weights, `[out]`.
const MAGNITUDE: &str = "lora_magnitude";

/// The adapter of a layer.
#[derive(Clone, Debug)]
pub(super) struct Adapter {
    spec: AdapterSpec,
    parts: Vec<(String, Param)>,
    /// The stream of its dropout.
    stream: u64,
}

impl Adapter {
    /// Beside a weight `[out, in]`: it changes nothing yet.
    pub fn new(spec: AdapterSpec, params: &ParamBuilder, weight: &Param) -> Result<Self> {
        let size = [weight.dim(0)?, weight.dim(1)?];
        let module = params.adapter(spec.placement);
        let mut made = match spec.kind {
            AdapterKind::Lora | AdapterKind::Dora => lora::make(&spec, &module, size)?,
            AdapterKind::Loha => loha::make(&spec, &module, size)?,
            AdapterKind::Lokr { factor } => lokr::make(&spec, &module, factor, size)?,
        };
        if spec.kind == AdapterKind::Dora {
            let magnitude = module.get(MAGNITUDE, &size[..1], Init::Ones)?;
            if weight.device().backend().has_data() {
                magnitude.copy_from(&row_lengths(&weight.value()?.detach())?)?;
            }
            made.push(magnitude);
        }
        let inside = |param: &Param| param.path().trim_start_matches(module.path()).trim_start_matches('.').to_owned();
        let parts = made.into_iter().map(|param| (inside(&param), param)).collect();
        Ok(Self { stream: module.stream("lora_dropout"), spec, parts })
    }

    fn dropped(&self, position: DropoutPosition, x: Tensor) -> Result<Tensor> {
        match &self.spec.dropout {
            Some(dropout) => dropout.at(position, x, self.stream),
            None => Ok(x),
        }
    }

    /// What the layer computes with it: x `[.., in]` to `[.., out]`. `W x + b + scale dW x`; with DoRA
    /// `m (W x + scale dW x) / |W + scale dW| + b`, where no gradient passes the lengths.
    pub fn forward(&self, x: &Tensor, weight: &Param, bias: Option<&Tensor>) -> Result<Tensor> {
        let value = |(name, param): &(String, Param)| Ok((name.clone(), param.value()?));
        let parts: Parts = self.parts.iter().map(value).collect::<Result<_>>()?;
        let read = self.dropped(DropoutPosition::Pre, x.clone())?;
        let scale = self.spec.scale();
        let added = match self.spec.kind {
            AdapterKind::Lora | AdapterKind::Dora => lora::apply(&read, &parts, scale)?,
            AdapterKind::Loha => loha::apply(&read, &parts, scale)?,
            AdapterKind::Lokr { .. } => lokr::apply(&read, &parts, scale)?,
        };
        let added = self.dropped(DropoutPosition::Post, added)?;
        if self.spec.kind != AdapterKind::Dora {
            return product(x, weight, bias)?.add(&added);
        }
        let plain = parts.iter().map(|(name, part)| (name.clone(), part.detach())).collect();
        let length = row_lengths(&self.spec.changed(&weight.value()?.detach(), &plain)?)?;
        let relative = part(&parts, MAGNITUDE)?.div(&length.on_tape_of(x))?;
        // Where what the adapter reads is dropped, the layer's own output changes by what is not.
        let base = product(&read, weight, None)?;
        let scaled = pointwise([&base, &added, &relative], |[base, added, m]| (base + added) * m)?;
        match (&self.spec.dropout, bias) {
            (Some(dropout), _) if dropout.position == DropoutPosition::Pre => {
                product(x, weight, bias)?.add(&scaled.sub(&base)?)
            }
            (_, Some(bias)) => scaled.add(bias),
            (_, None) => Ok(scaled),
        }
    }
}

/// The L2 norm of each row, `[out]`.
fn row_lengths(weight: &Tensor) -> Result<Tensor> {
    weight.square()?.sum(&[1], false)?.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::Meta;
    use crate::nn::{Linear, Params};
    use crate::ops::linear;
    use crate::{Device, Gradients, Philox, Tape};

    fn layer(spec: AdapterSpec, [inputs, outputs]: [usize; 2], device: &Device) -> Result<(Linear, Params)> {
        let adapters = BTreeMap::from([("layer".to_owned(), spec)]);
        let plan = AdapterPlan { base: Placement::frozen(DType::F32), adapters };
        let params = ParamBuilder::with_plan(1, plan, device);
        Ok((Linear::new(&params.sub("layer"), inputs, outputs, true)?, params.params()))
    }

    fn fill(params: &Params) -> Result<()> {
        let mut random = Philox::new(3);
        params.iter().try_for_each(|p| p.copy_from(&random.normal(p.dims(), p.device())?))
    }

    /// The adapter's values.
    fn parts(params: &Params) -> Result<Parts> {
        let value = |p: &Param| Ok((p.path().trim_start_matches("layer.").to_owned(), p.kept()?));
        params.adapters().iter().map(value).collect()
    }

    /// Forward and backward of each kind are those of a plain layer with the merged weight: the gradients of the adapter follow
    /// from that of the weight through the definition of the change alone.
    #[test]
    fn every_kind_is_the_layer_of_its_merged_weight() -> Result<()> {
        let cpu = Device::cpu();
        let kinds = [
            (AdapterKind::Lora, 2),
            (AdapterKind::Loha, 2),
            (AdapterKind::Lokr { factor: None }, 1),
            (AdapterKind::Lokr { factor: Some(2) }, 8),
            (AdapterKind::Lokr { factor: Some(2) }, 1),
        ];
        for (kind, dim) in kinds {
            let spec = AdapterSpec { kind, ..AdapterSpec::lora(dim, 3.0, Placement::trained(DType::F32)) };
            let (layer, params) = layer(spec.clone(), [8, 12], &cpu)?;
            let x = Philox::new(5).normal(&[2, 3, 8], &cpu)?;
            let (weight, bias) = (params.get("layer.weight").unwrap(), params.get("layer.bias").unwrap());
            let plain = |weight: &Tensor, x: &Tensor| linear(x, weight, Some(&bias.value()?.detach()));
            // A new one changes nothing.
            assert_eq!(layer.forward(&x)?.to_vec::<f32>()?, plain(&weight.kept()?, &x)?.to_vec::<f32>()?, "{kind:?}");
            fill(&params)?;
            let cotangent = Philox::new(6).normal(&[2, 3, 12], &cpu)?;
            let tape = Tape::new();
            let leaf = tape.leaf(&x);
            let y = layer.forward(&leaf)?;
            let mut gradients = Gradients::default();
            tape.backward_with(&[(&y, &cotangent)], &mut gradients)?;
            let reference = Tape::new();
            let leaves: Parts = parts(&params)?.into_iter().map(|(name, t)| (name, reference.leaf(&t))).collect();
            let x2 = reference.leaf(&x);
            let want = plain(&spec.merged(&weight.kept()?, &leaves)?, &x2)?;
            let mut wanted = Gradients::default();
            reference.backward_with(&[(&want, &cotangent)], &mut wanted)?;
            let close = |got: &Tensor, want: &Tensor, what: &str| -> Result<()> {
                let (got, want) = (got.to_vec::<f64>()?, want.to_vec::<f64>()?);
                let most = want.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
                let off = got.iter().zip(&want).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
                assert!(off <= 2e-5 * most, "{kind:?} {what}: {off} of {most}");
                Ok(())
            };
            close(&y, &want, "value")?;
            close(gradients.of(&leaf).unwrap(), wanted.of(&x2).unwrap(), "x")?;
            for (name, leaf) in &leaves {
                let param = params.get(&format!("layer.{name}")).unwrap();
                close(gradients.of(param).unwrap(), wanted.of(leaf).unwrap(), name)?;
            }
            assert_eq!(gradients.iter().count(), leaves.len() + 1, "{kind:?}");
        }
        Ok(())
    }

    /// LoHa and LoKr as LyCORIS defines them, element by element.
    #[test]
    fn changes_are_those_of_their_definitions() -> Result<()> {
        let cpu = Device::cpu();
        let at = |t: &[f64], width: usize, i: usize, j: usize| t[i * width + j];
        let loha = AdapterSpec { kind: AdapterKind::Loha, ..AdapterSpec::lora(2, 3.0, Placement::trained(DType::F32)) };
        let (_, params) = layer(loha.clone(), [6, 4], &cpu)?;
        fill(&params)?;
        let parts_of = |params: &Params| -> Result<BTreeMap<String, Vec<f64>>> {
            parts(params)?.into_iter().map(|(name, t)| Ok((name, t.to_vec::<f64>()?))).collect()
        };
        let w = parts_of(&params)?;
        let zero = Tensor::zeros(&[4, 6], DType::F32, &cpu)?;
        let got = loha.merged(&zero, &parts(&params)?)?.to_vec::<f64>()?;
        for (i, j) in (0..4).flat_map(|i| (0..6).map(move |j| (i, j))) {
            let product = |a: &str, b: &str| (0..2).map(|r| at(&w[a], 2, i, r) * at(&w[b], 6, r, j)).sum::<f64>();
            let want = 1.5 * product("hada_w1_a", "hada_w1_b") * product("hada_w2_a", "hada_w2_b");
            assert!((at(&got, 6, i, j) - want).abs() < 1e-5 * (1.0 + want.abs()));
        }
        let kind = AdapterKind::Lokr { factor: Some(2) };
        let lokr = AdapterSpec { kind, ..AdapterSpec::lora(1, 3.0, Placement::trained(DType::F32)) };
        let (_, params) = layer(lokr.clone(), [6, 4], &cpu)?;
        fill(&params)?;
        let w = parts_of(&params)?;
        let got = lokr.merged(&zero, &parts(&params)?)?.to_vec::<f64>()?;
        for (i, j) in (0..4).flat_map(|i| (0..6).map(move |j| (i, j))) {
            let want = 3.0 * at(&w["lokr_w1"], 2, i / 2, j / 3) * w["lokr_w2_a"][i % 2] * w["lokr_w2_b"][j % 3];
            assert!((at(&got, 6, i, j) - want).abs() < 1e-5 * (1.0 + want.abs()));
        }
        Ok(())
    }

    #[test]
    fn dropout_zeroes_its_share_where_it_stands() -> Result<()> {
        let (cpu, width, p) = (Device::cpu(), 24, 0.25);
        let x = Philox::new(5).normal(&[2, 50, width], &cpu)?;
        for position in [DropoutPosition::Pre, DropoutPosition::Post] {
            let masks = DropoutMasks::default();
            let dropout = Some(Dropout { probability: p, position, masks: masks.clone() });
            let spec = AdapterSpec::lora(width, 2.0 * width as f64, Placement::trained(DType::F32));
            let (layer, params) = layer(AdapterSpec { dropout, ..spec }, [width, width], &cpu)?;
            fill(&params)?;
            // What is dropped is seen whole: A is one, and B too where the input is dropped.
            let one: Vec<f32> = (0..width * width).map(|i| f32::from(i % (width + 1) == 0)).collect();
            let one = Tensor::from_vec(one, &[width, width], &cpu)?;
            for param in params.adapters().iter() {
                if position == DropoutPosition::Pre || param.path().contains("lora_A") {
                    param.copy_from(&one)?;
                }
            }
            let plain = layer.forward(&x)?.to_vec::<f64>()?;
            let zero = params.get("layer.lora_B.weight").map(|b| b.value()).transpose()?.unwrap();
            let kept = zero.to_bytes()?;
            params.get("layer.lora_B.weight").unwrap().copy_from(&zero.mul_scalar(0.0)?)?;
            let base = layer.forward(&x)?.to_vec::<f64>()?;
            params.get("layer.lora_B.weight").unwrap().copy_from(&Tensor::from_bytes(
                &kept,
                zero.dims(),
                DType::F32,
                &cpu,
            )?)?;
            masks.set(Some(Philox::new(9)));
            let dropped = layer.forward(&x)?.to_vec::<f64>()?;
            assert_eq!(layer.forward(&x)?.to_vec::<f64>()?, dropped);
            masks.set(Some(Philox::new(10)));
            assert_ne!(layer.forward(&x)?.to_vec::<f64>()?, dropped);
            let mut zeroed = 0;
            for ((plain, base), dropped) in plain.iter().zip(&base).zip(&dropped) {
                let (whole, left) = (plain - base, dropped - base);
                let gone = left.abs() < 1e-4;
                zeroed += usize::from(gone);
                assert!(gone || (left - whole / (1.0 - p)).abs() < 1e-3 * (1.0 + whole.abs()), "{left} of {whole}");
            }
            let share = zeroed as f64 / plain.len() as f64;
            // Five standard errors.
            assert!((share - p).abs() < 5.0 * (p * (1.0 - p) / plain.len() as f64).sqrt(), "{share}");
            masks.set(None);
            assert_eq!(layer.forward(&x)?.to_vec::<f64>()?, plain);
        }
        Ok(())
    }

    #[test]
    fn dora_is_the_layer_of_its_merged_weight_whatever_the_position_of_dropout() -> Result<()> {
        let cpu = Device::cpu();
        let x = Philox::new(5).normal(&[3, 6], &cpu)?;
        for position in [DropoutPosition::Pre, DropoutPosition::Post] {
            let dropout = Some(Dropout { probability: 0.5, position, masks: DropoutMasks::default() });
            let spec = AdapterSpec::lora(2, 3.0, Placement::trained(DType::F32));
            let spec = AdapterSpec { kind: AdapterKind::Dora, dropout, ..spec };
            let (layer, params) = layer(spec.clone(), [6, 5], &cpu)?;
            let of = |name: &str| params.get(&format!("layer.{name}")).unwrap().value();
            let lengths = row_lengths(&of("weight")?)?.to_vec::<f32>()?;
            assert_eq!(of("lora_magnitude")?.to_vec::<f32>()?, lengths);
            fill(&params)?;
            let merged = spec.merged(&of("weight")?.detach(), &parts(&params)?)?;
            let want = linear(&x, &merged, Some(&of("bias")?))?.to_vec::<f64>()?;
            for (got, want) in layer.forward(&x)?.to_vec::<f64>()?.iter().zip(&want) {
                assert!((got - want).abs() < 1e-5 * (1.0 + want.abs()), "{got} instead of {want}");
            }
        }
        Ok(())
    }

    #[test]
    fn an_adapter_keeps_its_input_and_what_lies_between() -> Result<()> {
        let meta = Meta::default();
        let (device, rows, width, dim) = (meta.device(), 1 << 9, 1 << 10, 1 << 4);
        let spec = AdapterSpec::lora(dim, 1.0, Placement::trained(DType::F32));
        let (layer, params) = layer(spec, [width, width], &device)?;
        let tape = Tape::new();
        let x = tape.leaf(&Tensor::zeros(&[rows, width], DType::F32, &device)?).mul_scalar(2.0)?;
        let before = meta.used();
        let y = layer.forward(&x)?;
        let bytes = 4 * rows;
        // The result and the product of A beside the input, which is there anyhow.
        assert_eq!(meta.used() - before, (bytes * width + bytes * dim) as u64);
        drop(x);
        let loss = y.sum_all()?;
        drop(y);
        let gradients = tape.backward(&loss)?;
        let trained = params.adapters();
        assert!(trained.iter().all(|p| gradients.of(p).is_some()) && gradients.iter().count() == trained.len() + 1);
        Ok(())
    }
}
