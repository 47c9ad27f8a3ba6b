//! Rotary position embedding.

use crate::backend::{Fused, common_device, run_fused};
use crate::expr::Function;
use crate::gradcheck::{Case, Sample};
use crate::ops::norm::rms_norm;
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

#[derive(Debug)]
struct Rope(RopeLayout);

impl Rope {
    /// Rotates by the angles, or back (the transpose, which is the gradient).
    fn rotate(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, back: bool) -> Result<Tensor> {
        let out = Tensor::empty_like(x, x.dims(), x.dtype())?;
        let [[x0, x1], [y0, y1], [c0, c1], [s0, s1]] =
            [x, &out, cos, sin].map(|t| self.0.halves(t.layout()).map(|half| t.view(half)));
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

/// Inputs x, weight, cos and sin, of a backend that has a kernel for them.
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
        let x = &inputs[0];
        let y = Tensor::empty(x.dims(), x.dtype(), x.device())?;
        let rows = [&x.dims()[..3], &[1]].concat();
        let deviation = Tensor::empty(&rows, accumulator(x.dtype()), x.device())?;
        let fused = Fused::NormRopeForward { eps: self.eps, layout: self.layout };
        run_fused(&fused, &inputs.iter().collect::<Vec<_>>(), &[&y, &deviation])?;
        let kept = [("x", x), ("rstd", &deviation), ("weight", &inputs[1]), ("cos", &inputs[2]), ("sin", &inputs[3])];
        kept.into_iter().for_each(|(name, tensor)| cx.save(name, tensor));
        Ok(vec![y])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let (x, deviation, weight) = (saved.get("x")?, saved.get("rstd")?, saved.get("weight")?);
        let (cos, sin) = (saved.get("cos")?, saved.get("sin")?);
        let dense = grad.layout().strides[3] == 1 || grad.dims()[3] == 1;
        let grad = if dense { grad.clone() } else { grad.contiguous()? };
        let dx = Tensor::empty(x.dims(), x.dtype(), x.device())?;
        let dw = Tensor::empty(weight.dims(), weight.dtype(), x.device())?;
        let fused = Fused::NormRopeBackward { layout: self.layout };
        run_fused(&fused, &[x, &grad, deviation, weight, cos, sin], &[&dx, &dw])?;
        out.set(0, dx);
        out.set(1, dw);
        Ok(())
    }
}

/// [`rms_norm`] over the last axis, then [`rope`], of x `[B, L, H, d]`: weight `[d]`, cos and sin `[L, d]`.
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
    let device = common_device("rms_norm_rope", &[x, weight, cos, sin])?;
    let (&[_, len, _, width], tables) = (x.dims(), [cos, sin]) else {
        return Err(Error::shape("rms_norm_rope", "x [B, L, H, d]", x.dims()));
    };
    let fits = width > 0 && width.is_multiple_of(2) && tables.iter().all(|t| t.dims() == [len, width]);
    let fused = Fused::NormRopeForward { eps, layout };
    if fits && weight.dims() == [width] && device.backend().fuses(&fused, &[x, weight, cos, sin]) {
        let [cos, sin] = [cos.constant("rope", "tables")?, sin.constant("rope", "tables")?];
        return apply_one(NormRope { eps, layout }, &[x, weight, &cos, &sin]);
    }
    let [cos, sin] = [cos.unsqueeze(1)?, sin.unsqueeze(1)?];
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
            let angles: Vec<f64> = (0..len * 2 * half).map(|_| draw.number(-3.0, 3.0)).collect();
            let inputs = vec![draw.standard(&[b, len, heads, 2 * half])?, draw.standard(&[2 * half])?];
            Sample::new(inputs, move |xs| {
                let angles = Tensor::from_slice(&angles, &[len, 2 * half], &Device::cpu())?;
                // Tables are f32 in what is fused, f64 where f64 is checked.
                let angles = angles.to_dtype(accumulator(xs[0].dtype()))?.to_device(xs[0].device())?;
                rms_norm_rope(&xs[0], &xs[1], 0.1, &angles.cos()?, &angles.sin()?, layout)
            })
        },
    },
];
