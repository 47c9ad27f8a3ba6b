//! Rotary position embedding.

use crate::backend::call::{has_dims, has_dtype, is_float};
use crate::backend::{FusedCall, Ran, common_device, operands, run_fused};
use crate::expr::Function;
use crate::gradcheck::{Case, Sample};
use crate::ops::norm::{NormBackward, NormForward, is_like, is_statistic, rms_norm, statistic};
use crate::ops::pointwise::run_pointwise;
use crate::ops::reduce::accumulator;
use crate::shape::Layout;
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{Device, Error, Result, Tensor};

/// Which elements of the last axis form a pair.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RopeLayout {
    /// `(2i, 2i + 1)`: Flux, Wan, Qwen, Hunyuan.
    Interleaved,
    /// `(i, i + d/2)`: LTX-2's "split".
    Split,
}

impl RopeLayout {
    /// The first and second elements of the pairs of a view's last axis, each half as wide.
    pub fn halves(self, layout: &Layout) -> [Layout; 2] {
        let [mut first, mut second] = [layout.clone(), layout.clone()];
        let axis = layout.dims.len() - 1;
        let (half, step) = (layout.dims[axis] / 2, layout.strides[axis]);
        [&mut first, &mut second].into_iter().for_each(|l| l.dims[axis] = half);
        match self {
            Self::Interleaved => {
                second.offset += step;
                [&mut first, &mut second].into_iter().for_each(|l| l.strides[axis] = 2 * step);
            }
            Self::Split => second.offset += half * step,
        }
        [first, second]
    }
}

impl RopeLayout {
    /// Rotates x by the angles into `out`, or back (the transpose, which is the gradient). The tables broadcast to x.
    fn rotate(self, [x, cos, sin]: [&Tensor; 3], back: bool, out: &Tensor) -> Result<()> {
        let [[x0, x1], [y0, y1], [c0, c1], [s0, s1]] =
            [x, out, cos, sin].map(|t| self.halves(t.layout()).map(|half| t.view(half)));
        let function = if back {
            Function::build(|[a, b, c0, c1, s0, s1]| [a * c0 + b * s1, b * c1 - a * s0])
        } else {
            Function::build(|[a, b, c0, c1, s0, s1]| [a * c0 - b * s0, b * c1 + a * s1])
        };
        run_pointwise(&function, &[&x0, &x1, &c0, &c1, &s0, &s1], &[], &[&y0, &y1])
    }
}

#[derive(Debug)]
struct Rope(RopeLayout);

impl Rope {
    fn rotate(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, back: bool) -> Result<Tensor> {
        let out = Tensor::empty_like(x, x.dims(), x.dtype())?;
        self.0.rotate([x, cos, sin], back, &out)?;
        Ok(out)
    }
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        cx.save("cos", &inputs[1]);
        cx.save("sin", &inputs[2]);
        Ok(vec![self.rotate(&inputs[0], &inputs[1], &inputs[2], false)?])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        if let Some(grad) = &grads[0] {
            out.set(0, self.rotate(grad, saved.get("cos")?, saved.get("sin")?, true)?);
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
    let [cos, sin] = [cos.constant("rope", "tables")?, sin.constant("rope", "tables")?];
    apply_one(Rope(layout), &[x, &cos, &sin])
}

/// `rope(rms_norm(x) weight)`, rounded to the dtype of x in between.
#[derive(Clone, Copy, Debug)]
pub struct NormRopeForward<'a> {
    /// `[B, L, H, d]`, floats; d is even.
    pub x: &'a Tensor,
    /// `[d]`, floats.
    pub weight: &'a Tensor,
    /// `[L, d]`, floats.
    pub cos: &'a Tensor,
    /// `[L, d]`, floats.
    pub sin: &'a Tensor,
    /// Added to the mean square.
    pub eps: f64,
    /// Which elements form a pair.
    pub layout: RopeLayout,
    /// Like x.
    pub y: &'a Tensor,
    /// The reciprocal root mean square of each row, `[B, L, H, 1]`, f32 (f64 for f64), row-major without gaps.
    pub rstd: &'a Tensor,
}

/// The gradients of x and the weight.
#[derive(Clone, Copy, Debug)]
pub struct NormRopeBackward<'a> {
    /// As forward.
    pub x: &'a Tensor,
    /// As forward.
    pub weight: &'a Tensor,
    /// As forward.
    pub cos: &'a Tensor,
    /// As forward.
    pub sin: &'a Tensor,
    /// As forward.
    pub layout: RopeLayout,
    /// What forward gave.
    pub rstd: &'a Tensor,
    /// The gradient of y, like x.
    pub grad: &'a Tensor,
    /// The gradient of x, like x.
    pub dx: &'a Tensor,
    /// The gradient of the weight, like the weight.
    pub dw: &'a Tensor,
}

/// What both directions have.
fn fits(op: &'static str, x: &Tensor, weight: &Tensor, tables: [&Tensor; 2], rstd: &Tensor) -> Result<()> {
    let &[_, len, _, width] = x.dims() else {
        return Err(Error::shape(op, "x [B, L, H, d]", x.dims()));
    };
    if width == 0 || !width.is_multiple_of(2) {
        return Err(Error::shape(op, "an even last axis", x.dims()));
    }
    has_dims(op, "a weight", weight, &[width])?;
    tables.iter().try_for_each(|table| has_dims(op, "cosines and sines", table, &[len, width]))?;
    [x, weight].into_iter().chain(tables).try_for_each(|t| is_float(op, "operands", t))?;
    is_statistic(op, rstd, x)
}

impl<'a> FusedCall<'a> for NormRopeForward<'a> {
    const NAME: &'static str = "norm and rope";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        operands([Some(self.x), Some(self.weight), Some(self.cos), Some(self.sin)])
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        operands([Some(self.y), Some(self.rstd)])
    }

    fn fits(&self) -> Result<()> {
        fits(Self::NAME, self.x, self.weight, [self.cos, self.sin], self.rstd)?;
        is_like(Self::NAME, "y", self.y, self.x)
    }
}

impl<'a> FusedCall<'a> for NormRopeBackward<'a> {
    const NAME: &'static str = "norm and rope backward";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        let Self { x, weight, cos, sin, rstd, grad, .. } = *self;
        operands([x, weight, cos, sin, rstd, grad].map(Some))
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        operands([Some(self.dx), Some(self.dw)])
    }

    fn fits(&self) -> Result<()> {
        fits(Self::NAME, self.x, self.weight, [self.cos, self.sin], self.rstd)?;
        is_like(Self::NAME, "grad", self.grad, self.x)?;
        is_like(Self::NAME, "dx", self.dx, self.x)?;
        has_dims(Self::NAME, "dw", self.dw, self.weight.dims())?;
        has_dtype(Self::NAME, "dw", self.dw, self.weight.dtype())
    }
}

/// A table `[L, d]` for the tokens of x `[B, L, H, d]`.
fn of_tokens(table: &Tensor) -> Result<Tensor> {
    let layout = table.layout();
    let (dims, strides) =
        ([&layout.dims[..1], &[1], &layout.dims[1..]], [&layout.strides[..1], &[0], &layout.strides[1..]]);
    Ok(table.view(Layout { dims: dims.concat().into(), strides: strides.concat().into(), offset: layout.offset }))
}

impl NormRopeForward<'_> {
    /// The composition: the norm, then the rotation.
    fn compose(&self) -> Result<()> {
        let Self { x, weight, cos, sin, eps, layout, y, rstd } = *self;
        let normed = Tensor::empty_like(x, x.dims(), x.dtype())?;
        NormForward { x, weight: Some(weight), bias: None, eps, y: &normed, mean: None, rstd }.run_or_compose()?;
        layout.rotate([&normed, &of_tokens(cos)?, &of_tokens(sin)?], false, y)
    }
}

impl NormRopeBackward<'_> {
    /// The composition, backwards: the rotation back, then the gradients of the norm.
    fn compose(&self) -> Result<()> {
        let Self { x, weight, cos, sin, layout, rstd, grad, dx, dw } = *self;
        let turned = Tensor::empty_like(grad, grad.dims(), grad.dtype())?;
        layout.rotate([grad, &of_tokens(cos)?, &of_tokens(sin)?], true, &turned)?;
        let norm = NormBackward { x, weight: Some(weight), mean: None, rstd, grad: &turned, dx };
        norm.run_or_compose()?;
        dw.copy_from(&norm.of_weight(dw.dtype())?)
    }
}

/// Inputs x, weight, cos and sin.
#[derive(Debug)]
struct NormRope {
    eps: f64,
    layout: RopeLayout,
}

impl Op for NormRope {
    fn name(&self) -> &'static str {
        "rms_norm_rope"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x, weight, cos, sin] = [0, 1, 2, 3].map(|i| &inputs[i]);
        let (y, rstd) = (Tensor::empty(x.dims(), x.dtype(), x.device())?, statistic(x)?);
        let norm = NormRopeForward { x, weight, cos, sin, eps: self.eps, layout: self.layout, y: &y, rstd: &rstd };
        if run_fused(norm)? == Ran::Declined {
            norm.compose()?;
        }
        let kept = [("x", x), ("rstd", &rstd), ("weight", weight), ("cos", cos), ("sin", sin)];
        kept.into_iter().for_each(|(name, tensor)| cx.save(name, tensor));
        Ok(vec![y])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let (x, rstd, weight) = (saved.get("x")?, saved.get("rstd")?, saved.get("weight")?);
        let (cos, sin) = (saved.get("cos")?, saved.get("sin")?);
        let dense = grad.layout().strides[3] == 1 || grad.dims()[3] == 1;
        let grad = if dense { grad } else { &grad.contiguous()? };
        let dx = Tensor::empty(x.dims(), x.dtype(), x.device())?;
        let dw = Tensor::empty(weight.dims(), weight.dtype(), x.device())?;
        let norm = NormRopeBackward { x, weight, cos, sin, layout: self.layout, rstd, grad, dx: &dx, dw: &dw };
        if run_fused(norm)? == Ran::Declined {
            norm.compose()?;
        }
        out.set(0, dx);
        out.set(1, dw);
        Ok(())
    }
}

/// A table `[L, d]` or `[B, L, d]` with an axis of heads for x `[B, L, H, d]`.
///
/// # Errors
/// When it has no rows.
pub fn of_heads(table: &Tensor) -> Result<Tensor> {
    table.unsqueeze(table.rank().saturating_sub(1))
}

/// [`rms_norm`] over the last axis, then [`rope`], of x `[B, L, H, d]`: weight `[d]`, cos and sin `[L, d]`, or `[B, L, d]` where
/// samples have positions of their own.
///
/// # Errors
/// As for both.
pub fn rms_norm_rope(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    cos: &Tensor,
    sin: &Tensor,
    layout: RopeLayout,
) -> Result<Tensor> {
    common_device("rms_norm_rope", &[x, weight, cos, sin])?;
    let (&[_, len, _, width], tables) = (x.dims(), [cos, sin]) else {
        return Err(Error::shape("rms_norm_rope", "x [B, L, H, d]", x.dims()));
    };
    let fits = width > 0 && width.is_multiple_of(2) && tables.iter().all(|t| t.dims() == [len, width]);
    if fits && weight.dims() == [width] {
        let [cos, sin] = [cos.constant("rope", "tables")?, sin.constant("rope", "tables")?];
        return apply_one(NormRope { eps, layout }, &[x, weight, &cos, &sin]);
    }
    let [cos, sin] = [of_heads(cos)?, of_heads(sin)?];
    rope(&rms_norm(x, Some(weight), eps)?, &cos, &sin, layout)
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
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
    },
    Case {
        name: "rms_norm_rope, interleaved and split",
        make: |draw| {
            let [b, len, heads, half] = [draw.size(1, 2), draw.size(1, 9), draw.size(1, 3), draw.size(1, 20)];
            let layout = if draw.size(0, 1) == 0 { RopeLayout::Interleaved } else { RopeLayout::Split };
            // Positions that all samples share, and such as are each one's own.
            let shared = draw.size(0, 1) == 0;
            let rows = if shared { vec![len] } else { vec![b, len] };
            let dims = [&rows[..], &[2 * half]].concat();
            let angles: Vec<f64> = (0..dims.iter().product()).map(|_| draw.number(-3.0, 3.0)).collect();
            let inputs = vec![draw.standard(&[b, len, heads, 2 * half])?, draw.standard(&[2 * half])?];
            Sample::new(inputs, move |xs| {
                let angles = Tensor::from_slice(&angles, &dims, &Device::cpu())?;
                // Tables are f32 in what is fused, f64 where f64 is checked.
                let angles = angles.to_dtype(accumulator(xs[0].dtype()))?.to_device(xs[0].device())?;
                rms_norm_rope(&xs[0], &xs[1], 0.1, &angles.cos()?, &angles.sin()?, layout)
            })
        },
    },
];
