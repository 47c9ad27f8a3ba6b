//! The layers of convolutional networks.

use std::ops::Range;

use super::{Init, Param, ParamBuilder};
use crate::ops::{self, ChannelScale, ConvAxis};
use crate::{Error, Result, Tensor};

/// Convolution in one to three dimensions; parameters `weight` `[out, in / groups, k..]` and maybe `bias` `[out]`.
#[derive(Clone, Debug)]
pub struct Conv {
    weight: Param,
    bias: Option<Param>,
    axes: Vec<ConvAxis>,
    groups: usize,
}

impl Conv {
    /// With a bias and without groups, uniform in +-1/sqrt(in k..), as PyTorch starts it. Each axis has a kernel and a walk.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, inputs: usize, outputs: usize, axes: &[(usize, ConvAxis)]) -> Result<Self> {
        Self::with_groups(params, inputs, outputs, axes, 1, true)
    }

    /// With or without a bias, in groups of channels that do not meet.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn with_groups(
        params: &ParamBuilder,
        inputs: usize,
        outputs: usize,
        axes: &[(usize, ConvAxis)],
        groups: usize,
        bias: bool,
    ) -> Result<Self> {
        let kernel: Vec<usize> = axes.iter().map(|(kernel, _)| *kernel).collect();
        let width = inputs / groups.max(1);
        let fan_in = kernel.iter().fold(width, |product, k| product.saturating_mul(*k));
        let init = Init::Uniform { bound: 1.0 / (fan_in as f64).sqrt() };
        let weight = params.get("weight", &[&[outputs, width], &kernel[..]].concat(), init)?;
        let bias = if bias { Some(params.get("bias", &[outputs], init)?) } else { None };
        Ok(Self { weight, bias, axes: axes.iter().map(|(_, axis)| *axis).collect(), groups })
    }

    /// x `[B, in, s..]` to `[B, out, s'..]`.
    ///
    /// # Errors
    /// When shape or dtype do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.walk(x, &self.axes)
    }

    /// The same with another walk along the axes: what is added at the ends may depend on what was seen before.
    ///
    /// # Errors
    /// When shape or dtype do not fit.
    pub fn walk(&self, x: &Tensor, axes: &[ConvAxis]) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(Param::value).transpose()?;
        ops::conv(x, &self.weight.value()?, bias.as_ref(), axes, self.groups)
    }

    /// Some places of the result on one axis (counted without samples and channels) of a walk along `axes`, for an x with `size`
    /// places there: `input` makes those places of x that they see.
    ///
    /// # Errors
    /// Those of `input`; when there is no such axis or place, what is added is no less than the kernel sees, or shape or dtype do not fit.
    pub fn part(
        &self,
        axes: &[ConvAxis],
        axis: usize,
        size: usize,
        places: Range<usize>,
        input: impl FnOnce(Range<usize>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let window = axes.get(axis).zip(self.kernel().get(axis));
        let window = window.and_then(|(walk, kernel)| walk.window(size, *kernel, places.clone()));
        let (seen, walk) = window.ok_or_else(|| {
            let expected =
                format!("places on one of the axes {axes:?} of {size} places, padded by less than the kernel");
            Error::argument("conv", expected, (axis, places))
        })?;
        let mut axes = axes.to_vec();
        axes[axis] = walk;
        self.walk(&input(seen)?, &axes)
    }

    /// The layer's own walk.
    pub fn axes(&self) -> &[ConvAxis] {
        &self.axes
    }

    /// Sizes of its kernel.
    pub fn kernel(&self) -> &[usize] {
        &self.weight.dims()[2..]
    }
}

/// Group normalisation of `[B, C, s..]`; parameters `weight` and `bias` `[C]`.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Param,
    bias: Param,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Of `channels` in `groups`.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, groups: usize, channels: usize, eps: f64) -> Result<Self> {
        let weight = params.get("weight", &[channels], Init::Ones)?;
        Ok(Self { weight, bias: params.get("bias", &[channels], Init::Zeros)?, groups, eps })
    }

    /// x `[B, C, s..]`, normalised.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, self.groups, &self.weight.value()?, &self.bias.value()?, self.eps)
    }

    /// A function that makes the same as [`Self::forward_silu`] of parts of x. Where x is recorded it takes all of x alone.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn silu_of<'a>(&'a self, x: &Tensor) -> Result<impl Fn(&Tensor) -> Result<Tensor> + use<'a>> {
        let (weight, bias) = (self.weight.value()?, self.bias.value()?);
        let scale = || ChannelScale::of(x, self.groups, &weight, &bias, self.eps, true);
        let scale = x.is_plain().then(scale).transpose()?;
        Ok(move |part: &Tensor| scale.as_ref().map_or_else(|| self.forward_silu(part), |scale| scale.apply(part)))
    }

    /// The SiLU of that, in one pass.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm_silu(x, self.groups, &self.weight.value()?, &self.bias.value()?, self.eps)
    }
}
