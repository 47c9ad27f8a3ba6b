//! Tensors made part by part along an axis, so that what leads to them is never whole in memory. Nothing of it is recorded: what
//! is recorded ([`Tensor::is_plain`] tells) is made in one part.

use std::ops::Range;

use crate::{Error, Result, Tensor};

/// Parts of an axis: of `step` places each, the last one of fewer than two steps, so that none is much smaller than the others.
fn parts(size: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    let step = step.max(1);
    let count = (size / step).max(1);
    (0..count).map(move |i| i * step..if i + 1 == count { size } else { (i + 1) * step })
}

/// Puts each part into what `target` makes for the first one, before the next is made.
fn joined(
    axis: usize,
    [size, step]: [usize; 2],
    target: impl Fn(&Tensor) -> Result<Tensor>,
    mut make: impl FnMut(Range<usize>) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut whole = None;
    for range in parts(size, step) {
        let part = make(range.clone())?;
        if range.len() == size {
            return Ok(part);
        }
        let part = part.constant("in_parts", "parts")?;
        let out = match whole.take() {
            Some(out) => out,
            None => target(&part)?,
        };
        out.view(out.layout().narrow(axis, range.start, range.len())?).copy_from(&part)?;
        whole = Some(out);
    }
    whole.ok_or_else(|| Error::argument("in_parts", "at least one part", size))
}

/// New memory for parts like this one.
fn room(part: &Tensor, axis: usize, size: usize) -> Result<Tensor> {
    let mut dims = part.dims().to_vec();
    dims[part.axis("in_parts", axis)?] = size;
    Tensor::empty_in_order(part, &dims, part.dtype())
}

/// What `make` makes of the ranges of an axis of `size` places, side by side as by [`Tensor::cat`]. They are `step` places long, the
/// last one less than two steps; each part goes to its place before the next one is made. A single part is the result itself.
///
/// # Errors
/// Those of `make`, when parts differ in other axes, or when one of several needs a gradient.
pub fn in_parts(
    axis: usize,
    size: usize,
    step: usize,
    make: impl FnMut(Range<usize>) -> Result<Tensor>,
) -> Result<Tensor> {
    joined(axis, [size, step], |part| room(part, axis, size), make)
}

/// The same of the parts of x, in the memory of x where nobody else has it and they fit into it: they may be shorter on the other
/// axes, and are then a view of the first places there.
///
/// # Errors
/// As for [`in_parts`].
pub fn in_place_of(
    x: Tensor,
    axis: usize,
    step: usize,
    mut make: impl FnMut(&Tensor, Range<usize>) -> Result<Tensor>,
) -> Result<Tensor> {
    let size = x.dim(axis)?;
    // Views of x come and go later on.
    let own = x.is_plain() && x.is_sole_owner();
    let target = |part: &Tensor| {
        let inside = part.rank() == x.rank() && part.dims().iter().zip(x.dims()).all(|(part, x)| part <= x);
        if !own || !inside || part.dtype() != x.dtype() || !part.device().same(x.device()) {
            return room(part, axis, size);
        }
        let others = part.dims().iter().enumerate().filter(|(other, _)| *other != axis);
        let layout = others.into_iter().try_fold(x.layout().clone(), |layout, (i, len)| layout.narrow(i, 0, *len));
        Ok(x.view(layout?))
    };
    joined(axis, [size, step], target, |range| make(&x.narrow(axis, range.start, range.len())?, range))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Philox, Tape};

    fn drawn(dims: &[usize]) -> Result<Tensor> {
        Philox::new(5).normal(dims, &Device::cpu())
    }

    #[test]
    fn parts_side_by_side_are_the_whole() -> Result<()> {
        let x = drawn(&[2, 3, 7])?.permute(&[0, 2, 1])?;
        for step in [0, 1, 2, 3, 6, 7, 20] {
            let mut lengths = Vec::new();
            let y = in_parts(1, 7, step, |range| {
                lengths.push(range.len());
                x.narrow(1, range.start, range.len())?.square()
            })?;
            assert_eq!(y.to_vec::<f32>()?, x.square()?.to_vec::<f32>()?);
            let step = step.clamp(1, 7);
            assert!(lengths.iter().all(|length| (step..2 * step).contains(length)), "{step}: {lengths:?}");
        }
        Ok(())
    }

    #[test]
    fn memory_is_written_over_where_nobody_else_has_it() -> Result<()> {
        let negated = |x: Tensor| in_place_of(x, 1, 2, |x, _| x.narrow(2, 0, 2)?.neg());
        let want: Vec<f32> = drawn(&[2, 5, 3])?.narrow(2, 0, 2)?.neg()?.to_vec()?;
        let (own, other) = (drawn(&[2, 5, 3])?, drawn(&[2, 5, 3])?);
        let (shared, before) = (other.clone(), own.storage().version());
        let [in_place, apart] = [negated(own)?, negated(other)?];
        assert_eq!(in_place.to_vec::<f32>()?, want);
        assert_eq!(apart.to_vec::<f32>()?, want);
        // Two parts of it were written.
        assert!(in_place.storage().version() > before + 1 && in_place.layout().strides[1] == 3);
        assert_eq!(shared.to_vec::<f32>()?, drawn(&[2, 5, 3])?.to_vec::<f32>()?);
        Ok(())
    }

    #[test]
    fn no_gradient_is_lost_without_a_word() -> Result<()> {
        let x = Tape::new().leaf(&drawn(&[4, 2])?);
        let part = |range: Range<usize>| x.narrow(0, range.start, range.len())?.square();
        assert!(in_parts(0, 4, 2, part).is_err());
        assert!(in_parts(0, 4, 4, part)?.requires_grad());
        Ok(())
    }
}
