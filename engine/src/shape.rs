//! Layouts: sizes, strides and the arithmetic of views.

use smallvec::{SmallVec, smallvec};

use crate::{Error, Result};

/// A number for each axis. Those of up to six axes lie in the value itself: a step makes thousands of views.
pub type Axes = SmallVec<[usize; 6]>;

/// How a view walks its storage. Strides and offset count elements; stride 0 repeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Sizes of the axes.
    pub dims: Axes,
    /// Elements between neighbours of each axis.
    pub strides: Axes,
    /// Index of the first element.
    pub offset: usize,
}

impl Layout {
    /// Row-major without gaps.
    pub fn contiguous(dims: &[usize]) -> Self {
        let mut strides: Axes = smallvec![0; dims.len()];
        let mut step = 1usize;
        for (stride, dim) in strides.iter_mut().zip(dims).rev() {
            *stride = step;
            step = step.saturating_mul(*dim);
        }
        Self { dims: dims.into(), strides, offset: 0 }
    }

    /// Number of elements of the view.
    pub fn numel(&self) -> usize {
        self.dims.iter().fold(1, |n, &d| n.saturating_mul(d))
    }

    /// Whether the elements lie row-major without gaps.
    pub fn is_contiguous(&self) -> bool {
        is_contiguous(&self.dims, &self.strides)
    }

    /// The axes in another order.
    pub fn permute(&self, axes: &[usize]) -> Result<Self> {
        let mut seen: SmallVec<[bool; 6]> = smallvec![false; self.dims.len()];
        let fits = axes.len() == self.dims.len()
            && axes.iter().all(|&a| a < seen.len() && !std::mem::replace(&mut seen[a], true));
        if !fits {
            return Err(Error::argument("permute", format!("each of {} axes once", self.dims.len()), axes));
        }
        Ok(Self {
            dims: axes.iter().map(|&a| self.dims[a]).collect(),
            strides: axes.iter().map(|&a| self.strides[a]).collect(),
            offset: self.offset,
        })
    }

    /// `len` elements of one axis from `start`.
    pub fn narrow(&self, axis: usize, start: usize, len: usize) -> Result<Self> {
        let size = *self
            .dims
            .get(axis)
            .ok_or_else(|| Error::argument("narrow", format!("an axis below {}", self.dims.len()), axis))?;
        if start.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::argument("narrow", format!("a range within 0..{size}"), (start, len)));
        }
        let mut out = self.clone();
        out.dims[axis] = len;
        out.offset += start * self.strides[axis];
        Ok(out)
    }

    /// Repeats axes of size 1, and adds leading axes, to reach `dims`.
    pub fn expand(&self, dims: &[usize]) -> Result<Self> {
        let wrong = || Error::shape("expand", format!("sizes that broadcast to {dims:?}"), &self.dims);
        let lead = dims.len().checked_sub(self.dims.len()).ok_or_else(wrong)?;
        numel("expand", dims)?;
        let mut strides: Axes = smallvec![0; dims.len()];
        for (axis, (&from, &stride)) in self.dims.iter().zip(&self.strides).enumerate() {
            match dims[lead + axis] {
                to if to == from => strides[lead + axis] = stride,
                _ if from == 1 => {}
                _ => return Err(wrong()),
            }
        }
        Ok(Self { dims: dims.into(), strides, offset: self.offset })
    }

    /// Where the elements lie, row-major.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        (0..self.numel()).map(|mut index| {
            let mut at = self.offset;
            for (size, stride) in self.dims.iter().zip(&self.strides).rev() {
                at += index % size * stride;
                index /= size;
            }
            at
        })
    }

    /// The same elements in row-major order under other sizes, or `None` when that needs a copy.
    pub fn reshape(&self, dims: &[usize]) -> Option<Self> {
        if self.is_contiguous() {
            return Some(Self { offset: self.offset, ..Self::contiguous(dims) });
        }
        // Walk both shapes from the left in groups of equal products; a group must be one run.
        let old: Vec<(usize, usize)> =
            self.dims.iter().zip(&self.strides).filter(|(d, _)| **d != 1).map(|(&d, &s)| (d, s)).collect();
        let mut strides: Axes = smallvec![0; dims.len()];
        let (mut i, mut j) = (0, 0);
        while j < dims.len() {
            if dims[j] == 1 {
                j += 1;
                continue;
            }
            let (i0, j0) = (i, j);
            let (mut from, mut to) = (old.get(i)?.0, dims[j]);
            i += 1;
            j += 1;
            while from != to {
                if from < to {
                    from *= old.get(i)?.0;
                    i += 1;
                } else {
                    to = to.saturating_mul(*dims.get(j)?);
                    j += 1;
                }
            }
            if old[i0..i].windows(2).any(|w| w[0].1 != w[1].1 * w[1].0) {
                return None;
            }
            let mut step = old[i - 1].1;
            for axis in (j0..j).rev() {
                strides[axis] = step;
                step *= dims[axis];
            }
        }
        Some(Self { dims: dims.into(), strides, offset: self.offset })
    }
}

/// Whether elements lie row-major without gaps.
pub(crate) fn is_contiguous(dims: &[usize], strides: &[usize]) -> bool {
    let mut step = 1usize;
    for (&dim, &stride) in dims.iter().zip(strides).rev() {
        if dim != 1 && stride != step {
            return false;
        }
        step = step.saturating_mul(dim);
    }
    true
}

/// Number of elements of sizes that a tensor may have: their product without zeros fits the address space, so no walk over
/// them leaves the numbers.
///
/// # Errors
/// When it does not.
pub fn numel(op: &'static str, dims: &[usize]) -> Result<usize> {
    let most = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
    match most.filter(|&n| isize::try_from(n).is_ok()) {
        Some(most) => Ok(if dims.contains(&0) { 0 } else { most }),
        None => Err(Error::shape(op, "sizes whose product fits the address space", dims)),
    }
}

/// The shape that all of `shapes` broadcast to (NumPy's rule).
pub fn broadcast(op: &'static str, shapes: &[&[usize]]) -> Result<Vec<usize>> {
    let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut out = vec![1; rank];
    for shape in shapes {
        for (to, &from) in out[rank - shape.len()..].iter_mut().zip(*shape) {
            if *to == 1 {
                *to = from;
            } else if from != 1 && from != *to {
                return Err(Error::shape(op, "shapes that broadcast together", shapes));
            }
        }
    }
    Ok(out)
}
