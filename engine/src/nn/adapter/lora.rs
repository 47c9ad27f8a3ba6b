//! LoRA and DoRA, as NeMo's `LinearLoRA` computes them.

use super::{AdapterKind, AdapterSpec, Dropout, DropoutPosition, LoraInit};
use crate::nn::{Init, Param, ParamBuilder};
use crate::ops::{linear, pointwise};
use crate::{DType, Result, Tensor};

/// A product of two thin matrices beside a weight: parameters `lora_A.weight` `[dim, in]` and `lora_B.weight` `[out, dim]`;
/// with DoRA also `lora_magnitude` `[out]`.
#[derive(Clone, Debug)]
pub(in crate::nn) struct Lora {
    a: Param,
    b: Param,
    /// DoRA's length of each output's weights.
    magnitude: Option<Param>,
    scale: f64,
    dropout: Option<Dropout>,
    /// The stream of its dropout.
    stream: u64,
}

impl Lora {
    /// Beside a weight `[out, in]`: it changes nothing yet.
    pub fn new(spec: &AdapterSpec, params: &ParamBuilder, weight: &Param) -> Result<Self> {
        let (outputs, inputs) = (weight.dim(0)?, weight.dim(1)?);
        let params = params.adapter(spec.placement);
        let init = match spec.init {
            LoraInit::Xavier => Init::Normal { std: (2.0 / (inputs + spec.dim) as f64).sqrt() },
            LoraInit::Kaiming => Init::Uniform { bound: 1.0 / (inputs as f64).sqrt() },
        };
        let a = params.sub("lora_A").get("weight", &[spec.dim, inputs], init)?;
        let b = params.sub("lora_B").get("weight", &[outputs, spec.dim], Init::Zeros)?;
        let magnitude = match spec.kind {
            AdapterKind::Lora => None,
            AdapterKind::Dora => {
                let magnitude = params.get("lora_magnitude", &[outputs], Init::Ones)?;
                if weight.device().backend().has_data() {
                    magnitude.copy_from(&row_lengths(&weight.kept()?)?)?;
                }
                Some(magnitude)
            }
        };
        let stream = params.stream("lora_dropout");
        Ok(Self { a, b, magnitude, scale: spec.scale(), dropout: spec.dropout.clone(), stream })
    }

    fn dropped(&self, position: DropoutPosition, x: Tensor) -> Result<Tensor> {
        match &self.dropout {
            Some(dropout) => dropout.at(position, x, self.stream),
            None => Ok(x),
        }
    }

    /// `W x + b + scale B A x`; with DoRA `m (W x + scale B A x) / |W + scale B A| + b`, where no gradient passes the lengths.
    pub fn forward(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let read = self.dropped(DropoutPosition::Pre, x.clone())?;
        let low = linear(&read, &self.a.value()?, None)?.mul_scalar(self.scale)?;
        let added = self.dropped(DropoutPosition::Post, linear(&low, &self.b.value()?, None)?)?;
        let Some(magnitude) = &self.magnitude else {
            return linear(x, weight, bias)?.add(&added);
        };
        let update = self.b.value()?.detach().matmul(&self.a.value()?.detach())?;
        let scale = self.scale;
        let merged = pointwise([&weight.detach(), &update], |[w, d]| w + d * scale)?;
        let relative = magnitude.value()?.div(&row_lengths(&merged)?.on_tape_of(x))?;
        // Where what the adapter reads is dropped, the layer's own output changes by what is not.
        let base = linear(&read, weight, None)?;
        let scaled = pointwise([&base, &added, &relative], |[base, added, m]| (base + added) * m)?;
        match (&self.dropout, bias) {
            (Some(dropout), _) if dropout.position == DropoutPosition::Pre => {
                linear(x, weight, bias)?.add(&scaled.sub(&base)?)
            }
            (_, Some(bias)) => scaled.add(bias),
            (_, None) => Ok(scaled),
        }
    }
}

/// `W + scale B A`, with DoRA each row at its trained length; in f32 (f64 for f64) and then in the weight's dtype.
pub(super) fn merged(spec: &AdapterSpec, weight: &Tensor, part: impl Fn(&str) -> Result<Tensor>) -> Result<Tensor> {
    let wide = |t: Tensor| t.to_dtype(DType::F32.promote(t.dtype()));
    let (a, b) = (wide(part("lora_A.weight")?)?, wide(part("lora_B.weight")?)?);
    let scale = spec.scale();
    let sum = pointwise([&wide(weight.clone())?, &b.matmul(&a)?], |[w, d]| w + d * scale)?;
    let merged = match spec.kind {
        AdapterKind::Lora => sum,
        AdapterKind::Dora => {
            let relative = wide(part("lora_magnitude")?)?.div(&row_lengths(&sum)?)?;
            sum.mul(&relative.unsqueeze(1)?)?
        }
    };
    merged.to_dtype(weight.dtype())
}

/// The L2 norm of each row, `[out]`.
fn row_lengths(weight: &Tensor) -> Result<Tensor> {
    weight.square()?.sum(&[1], false)?.sqrt()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::meta::Meta;
    use crate::nn::{AdapterPlan, DropoutMasks, Linear, Params, Placement};
    use crate::{Device, Philox, Tape};

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
            let merged = spec.merged(&of("weight")?.detach(), |name| Ok(of(name)?.detach()))?;
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
        assert_eq!(meta.used() - before, bytes * width + bytes * dim);
        drop(x);
        let loss = y.sum_all()?;
        drop(y);
        let gradients = tape.backward(&loss)?;
        let trained = params.adapters();
        assert!(trained.iter().all(|p| gradients.of(p).is_some()) && gradients.iter().count() == trained.len() + 1);
        Ok(())
    }
}
