//! Rotary position embedding.

use crate::backend::common_device;
use crate::expr::Function;
use crate::gradcheck::{Case, Sample};
use crate::ops::pointwise::run_pointwise;
use crate::tape::{Forward, InputGradients, Op, apply_one};
use crate::{Device, Error, Result, Tensor};

/// Which elements of the last axis form a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RopeLayout {
    /// `(2i, 2i + 1)`: Flux, Wan, Qwen, Hunyuan.
    Interleaved,
    /// `(i, i + d/2)`: LTX-2's "split".
    Split,
}

impl RopeLayout {
    /// The first and second elements of the pairs as plain views `[.., d/2]`.
    fn halves(self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let mut layout = x.layout().clone();
        let axis = layout.dims.len() - 1;
        let half = layout.dims[axis] / 2;
        let step = layout.strides[axis];
        layout.dims[axis] = half;
        let mut second = layout.clone();
        match self {
            Self::Interleaved => {
                second.offset += step;
                layout.strides[axis] = 2 * step;
                second.strides[axis] = 2 * step;
            }
            Self::Split => second.offset += half * step,
        }
        Ok((x.view(layout), x.view(second)))
    }
}

#[derive(Debug)]
struct Rope(RopeLayout);

impl Rope {
    /// Rotates by the angles, or back (the transpose, which is the gradient).
    fn rotate(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, back: bool) -> Result<Tensor> {
        let out = Tensor::empty_like(x, x.dims(), x.dtype())?;
        let ((x0, x1), (y0, y1)) = (self.0.halves(x)?, self.0.halves(&out)?);
        let ((c0, c1), (s0, s1)) = (self.0.halves(cos)?, self.0.halves(sin)?);
        let function = if back {
            Function::build(|[a, b, c0, c1, s0, s1]| [a * c0 + b * s1, b * c1 - a * s0])
        } else {
            Function::build(|[a, b, c0, c1, s0, s1]| [a * c0 - b * s0, b * c1 + a * s1])
        };
        run_pointwise(&function, &[&x0, &x1, &c0, &c1, &s0, &s1], &[], &[&y0, &y1])?;
        Ok(out)
    }
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        cx.save(&inputs[1]);
        cx.save(&inputs[2]);
        Ok(vec![self.rotate(&inputs[0], &inputs[1], &inputs[2], false)?])
    }

    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        if let Some(grad) = &grads[0] {
            out.set(0, self.rotate(grad, &saved[0], &saved[1], true)?);
        }
        Ok(())
    }
}

/// Rotates the pairs of the last axis: `x * cos + rotate(x) * sin`.
///
/// x `[.., L, D]`; cos and sin `[L, D]`, or anything that broadcasts to x with a full last axis (each angle stands
/// at both places of its pair). The tables are constants: they get no gradient.
///
/// # Errors
/// When the last axis is odd or the tables do not broadcast.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
    common_device("rope", &[x, cos, sin])?;
    let width = x.dims().last().copied().unwrap_or(0);
    let fits = width > 0
        && width.is_multiple_of(2)
        && [cos, sin].iter().all(|t| t.dims().last() == Some(&width) && t.layout().expand(x.dims()).is_ok());
    if !fits {
        let got = (x.dims(), cos.dims(), sin.dims());
        return Err(Error::shape("rope", "x [.., L, even D], cos and sin [L, D]", got));
    }
    apply_one(Rope(layout), &[x, &cos.detach(), &sin.detach()])
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[Case {
    name: "rope, interleaved and split",
    make: |draw| {
        let [heads, len, half] = [draw.size(1, 3), draw.size(1, 4), draw.size(1, 4)];
        let layout = if draw.size(0, 1) == 0 { RopeLayout::Interleaved } else { RopeLayout::Split };
        let angles: Vec<f64> = (0..len * 2 * half).map(|_| draw.number(-3.0, 3.0)).collect();
        Sample::new(vec![draw.standard(&[2, heads, len, 2 * half])?], move |xs| {
            let angles = Tensor::from_slice(&angles, &[len, 2 * half], &Device::cpu())?.to_dtype(xs[0].dtype())?;
            let angles = angles.to_device(xs[0].device())?;
            rope(&xs[0], &angles.cos()?, &angles.sin()?, layout)
        })
    },
}];
