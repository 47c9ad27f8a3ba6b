//! Rules that mix the elements of a parameter: what they are given, and what they have in common.

use super::{Direction, Expr, Operands, Rates, Whole};
use crate::ops::pointwise::pointwise;
use crate::{Result, Tensor};

/// The scalars of [`descend`]: what decay leaves of a parameter.
pub(super) fn decay(Rates { lr, weight_decay }: Rates) -> Vec<f64> {
    vec![1.0 - lr * weight_decay]
}

/// The update by a direction that has its length already: `p (1 - lr wd) - direction`.
pub(super) fn descend<'a>(x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
    let [kept] = x.scalars();
    vec![x.parameter * kept - x.gradient]
}

/// The old value, with `share` of what it lacks of the new one: PyTorch's `lerp`.
pub(super) fn lerp(old: &Tensor, new: &Tensor, share: f64) -> Result<Tensor> {
    old.add(&new.sub(old)?.mul_scalar(share)?)
}

/// The root of the mean square of all elements, a tensor without axes.
pub(super) fn rms(x: &Tensor) -> Result<Tensor> {
    x.square()?.mean_all()?.sqrt()
}

/// `x`, made smaller where the root of its mean square is above `limit`.
pub(super) fn clipped(x: &Tensor, limit: f64) -> Result<Tensor> {
    let rms = rms(x)?;
    x.div(&pointwise([&rms], |[rms]| (rms * (1.0 / limit)).maximum(1.0))?)
}

/// Means over each row, `[.., n, 1]`, and over each column, `[.., 1, m]`, of the last two axes.
pub(super) fn rows_and_columns(x: &Tensor) -> Result<[Tensor; 2]> {
    let rank = x.rank();
    Ok([x.mean(&[rank - 1], true)?, x.mean(&[rank - 2], true)?])
}

/// Sizes of what [`rows_and_columns`] gives.
pub(super) fn factored_dims(dims: &[usize]) -> Option<[Vec<usize>; 2]> {
    let [before @ .., rows, columns] = dims else { return None };
    Some([[before, &[*rows, 1]].concat(), [before, &[1, *columns]].concat()])
}

/// AdamW's direction, for parameters that a rule for matrices leaves alone. The slots are the two moments.
pub(super) fn adamw(x: &Whole<'_>, (beta1, beta2): (f64, f64), eps: f64) -> Result<Direction> {
    let t = x.step as f64;
    let m = lerp(&x.slots[0], x.gradient, 1.0 - beta1)?;
    let v = lerp(&x.slots[1], &x.gradient.square()?, 1.0 - beta2)?;
    let (unbiased, root) = (1.0 - beta1.powf(t), (1.0 - beta2.powf(t)).sqrt());
    let denominator = v.sqrt()?.mul_scalar(1.0 / root)?.add_scalar(eps)?;
    Ok(Direction { direction: m.div(&denominator)?.mul_scalar(x.rates.lr / unbiased)?, slots: vec![m, v] })
}
