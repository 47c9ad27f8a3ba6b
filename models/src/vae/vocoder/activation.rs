//! The activations of vocoders: leaky ReLU, and the periodic ones of BigVGAN (Lee et al. 2023) at a higher rate, so that nothing
//! above half of it folds back.

use flowtape_engine::nn::{Init, Param, ParamBuilder};
use flowtape_engine::ops::{ConvAxis, Padding, conv, pointwise};
use flowtape_engine::{DType, Device, Result as EngineResult, Tensor};

use crate::Result;

/// What keeps the reference's division from zero.
const EPS: f64 = 1e-9;

/// `x` above zero, `slope x` below.
pub(super) fn leaky(x: &Tensor, slope: f64) -> EngineResult<Tensor> {
    pointwise([x], |[x]| x.maximum(0.0) + x.minimum(0.0) * slope)
}

/// An activation of `[B, C, L]`.
#[derive(Clone, Debug)]
pub(super) enum Activation {
    Leaky(f64),
    Snake(Snake),
    Antialiased { snake: Snake, up: Upsample, down: Downsample },
}

/// `x + sin(x e^alpha)^2 / e^beta`, with numbers of each channel; alpha is beta where there is none.
#[derive(Clone, Debug)]
pub(super) struct Snake {
    alpha: Param,
    beta: Option<Param>,
}

/// How a periodic activation is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Periodic {
    pub with_beta: bool,
    /// How many times the rate, and taps of the filters, where it runs at a higher one.
    pub antialias: Option<(usize, usize)>,
}

impl Activation {
    pub fn periodic(params: &ParamBuilder, channels: usize, how: Periodic) -> Result<Self> {
        let Some((ratio, taps)) = how.antialias else { return Ok(Self::Snake(Snake::new(params, channels, how)?)) };
        let filter = |name: &str| params.sub(name).get("filter", &[1, 1, taps], Init::Zeros);
        let pad = taps / ratio - 1;
        let start = pad * ratio + (taps - ratio) / 2;
        Ok(Self::Antialiased {
            snake: Snake::new(&params.sub("act"), channels, how)?,
            up: Upsample { filter: filter("upsample")?, ratio, pad, start },
            down: Downsample { filter: filter("downsample")?, ratio, taps },
        })
    }

    pub fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        match self {
            Self::Leaky(slope) => leaky(x, *slope),
            Self::Snake(snake) => snake.forward(x),
            Self::Antialiased { snake, up, down } => {
                let filter = up.filter.value()?;
                down.forward(&snake.forward(&upsampled(x, &filter, up.ratio, up.pad, up.start)?)?)
            }
        }
    }
}

impl Snake {
    fn new(params: &ParamBuilder, channels: usize, how: Periodic) -> Result<Self> {
        let number = |name: &str| params.get(name, &[channels], Init::Zeros);
        Ok(Self { alpha: number("alpha")?, beta: how.with_beta.then(|| number("beta")).transpose()? })
    }

    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let column = |param: &Param| param.value()?.reshape(&[1, x.dim(1)?, 1]);
        let alpha = column(&self.alpha)?;
        let beta = self.beta.as_ref().map_or(Ok(alpha.clone()), column)?;
        pointwise([x, &alpha, &beta], |[x, a, b]| x + (x * a.exp()).sin().square() / (b.exp() + EPS))
    }
}

/// What makes a signal so many times as long.
#[derive(Clone, Debug)]
pub(super) struct Upsample {
    filter: Param,
    ratio: usize,
    /// Values that are repeated at both ends, and how much of the result is cut off before.
    pad: usize,
    start: usize,
}

/// What makes it shorter again.
#[derive(Clone, Debug)]
pub(super) struct Downsample {
    filter: Param,
    ratio: usize,
    taps: usize,
}

impl Downsample {
    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let (before, after) = (self.taps / 2 + self.taps % 2 - 1, self.taps / 2);
        let axis = ConvAxis { stride: self.ratio, before, after, padding: Padding::Replicate, ..ConvAxis::default() };
        by_channel(x, |x| conv(x, &self.filter.value()?, None, &[axis], 1))
    }
}

/// What a filter `[1, 1, K]` makes of each channel.
fn by_channel(x: &Tensor, filter: impl Fn(&Tensor) -> EngineResult<Tensor>) -> EngineResult<Tensor> {
    let (batch, channels, length) = (x.dim(0)?, x.dim(1)?, x.dim(2)?);
    let y = filter(&x.contiguous()?.reshape(&[batch * channels, 1, length])?)?;
    y.contiguous()?.reshape(&[batch, channels, y.dim(2)?])
}

/// A signal `[B, C, L]` at `ratio` times its rate: `[B, C, L ratio]`, from `start` on of what the filter makes of it with `pad`
/// values repeated at both ends.
pub(super) fn upsampled(x: &Tensor, filter: &Tensor, ratio: usize, pad: usize, start: usize) -> EngineResult<Tensor> {
    let length = x.dim(2)?;
    by_channel(x, |x| {
        let edge = |at: usize| x.narrow(2, at, 1)?.expand(&[x.dim(0)?, 1, pad]);
        let wide = Tensor::cat(&[&edge(0)?, x, &edge(length - 1)?], 2)?;
        let whole = transposed(&wide, filter, None, ratio, filter.dim(2)? - 1)?;
        whole.narrow(2, start, length * ratio)?.mul_scalar(ratio as f64)
    })
}

/// A transposed convolution along time with a weight `[in, out, K]`: zeros between the values, then a convolution with the kernel
/// backwards.
pub(super) fn transposed(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    factor: usize,
    added: usize,
) -> EngineResult<Tensor> {
    let (batch, channels, length, kernel) = (x.dim(0)?, x.dim(1)?, x.dim(2)?, weight.dim(2)?);
    let spread = x.unsqueeze(3)?.pad(3, 0, factor - 1)?.reshape(&[batch, channels, length * factor])?;
    let spread = spread.narrow(2, 0, (length.saturating_sub(1)) * factor + 1)?;
    let backwards: Vec<u32> = (0..kernel as u32).rev().collect();
    let backwards = Tensor::from_vec(backwards, &[kernel], x.device())?;
    let weight = weight.index_select(2, &backwards)?.transpose(0, 1)?.contiguous()?;
    conv(&spread, &weight, bias, &[ConvAxis::padded(added, added)], 1)
}

/// A windowed sinc (Hann) that makes a signal `ratio` times as long, with its padding and start for [`upsampled`], as torchaudio
/// resamples.
pub(super) fn hann_resampler(ratio: usize, device: &Device, dtype: DType) -> EngineResult<(Tensor, usize, usize)> {
    const ROLLOFF: f64 = 0.99;
    const ZEROS: f64 = 6.0;
    let width = (ZEROS / ROLLOFF).ceil();
    let taps = 2 * width as usize * ratio + 1;
    let pi = std::f64::consts::PI;
    let sinc = |t: f64| if t == 0.0 { 1.0 } else { (pi * t).sin() / (pi * t) };
    let tap = |i: usize| {
        let time = (i as f64 / ratio as f64 - width) * ROLLOFF;
        let window = (time.clamp(-ZEROS, ZEROS) * pi / ZEROS / 2.0).cos().powi(2);
        (sinc(time) * window * ROLLOFF / ratio as f64) as f32
    };
    let filter = Tensor::from_vec((0..taps).map(tap).collect::<Vec<f32>>(), &[1, 1, taps], device)?.to_dtype(dtype)?;
    Ok((filter, width as usize, 2 * width as usize * ratio))
}
