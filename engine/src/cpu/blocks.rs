//! How a strided iteration space is cut into blocks.

/// Elements of a block: a few KB, so that a chain of operations stays in the first cache.
pub(super) const BLOCK: usize = 512;

/// An iteration space with the strides of each operand, as few axes as possible.
#[derive(Clone, Debug, Default)]
pub(super) struct Space {
    pub dims: Vec<usize>,
    /// `strides[operand][axis]`, in elements.
    pub strides: Vec<Vec<usize>>,
}

impl Space {
    /// The axes `axes` of a space, without those of size 1, neighbours merged where every operand walks them as one.
    pub fn new(dims: &[usize], operands: &[&[usize]], axes: impl IntoIterator<Item = usize>) -> Self {
        let mut space = Self { dims: Vec::new(), strides: vec![Vec::new(); operands.len()] };
        for axis in axes.into_iter().filter(|&a| dims[a] != 1) {
            let size = dims[axis];
            let merges = !space.dims.is_empty()
                && space.strides.iter().zip(operands).all(|(s, o)| s.last() == Some(&(o[axis] * size)));
            if merges {
                if let Some(last) = space.dims.last_mut() {
                    *last *= size;
                }
                for (strides, operand) in space.strides.iter_mut().zip(operands) {
                    strides.pop();
                    strides.push(operand[axis]);
                }
            } else {
                space.dims.push(size);
                space.strides.iter_mut().zip(operands).for_each(|(s, o)| s.push(o[axis]));
            }
        }
        space
    }

    /// Takes the innermost axis off: its size and strides (1 and zeros when there is none).
    pub fn pop(&mut self) -> (usize, Vec<usize>) {
        match self.dims.pop() {
            Some(size) => (size, self.strides.iter_mut().map(|s| s.pop().unwrap_or(0)).collect()),
            None => (1, vec![0; self.strides.len()]),
        }
    }

    /// Takes off the axis that makes the largest block together with one of `width`: the innermost of the best.
    pub fn pop_rows(&mut self, width: usize) -> (usize, Vec<usize>) {
        let rows = |axis: usize| self.dims[axis].min(BLOCK / width);
        match (0..self.dims.len()).max_by_key(|&axis| rows(axis)) {
            Some(axis) => (self.dims.remove(axis), self.strides.iter_mut().map(|s| s.remove(axis)).collect()),
            None => (1, vec![0; self.strides.len()]),
        }
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Adds to `offsets` where position `index` (row-major) lies for each operand.
    pub fn locate(&self, mut index: usize, offsets: &mut [usize]) {
        for axis in (0..self.dims.len()).rev() {
            let at = index % self.dims[axis];
            index /= self.dims[axis];
            for (offset, strides) in offsets.iter_mut().zip(&self.strides) {
                *offset += at * strides[axis];
            }
        }
    }
}

/// Axes from the largest stride to the smallest: the order in which memory is walked.
pub(super) fn memory_order(strides: &[usize]) -> Vec<usize> {
    let mut axes: Vec<usize> = (0..strides.len()).collect();
    axes.sort_by_key(|&a| std::cmp::Reverse(strides[a]));
    axes
}

/// An axis cut into pieces of nearly one length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    size: usize,
    piece: usize,
}

impl Cut {
    /// Pieces of at most `limit` elements, a multiple of `unit` where there are several.
    pub fn new(size: usize, limit: usize, unit: usize) -> Self {
        let pieces = size.div_ceil(limit.max(1)).max(1);
        let piece = if pieces == 1 { size } else { size.div_ceil(pieces).next_multiple_of(unit).min(limit) };
        Self { size, piece: piece.max(1) }
    }

    /// Number of pieces.
    pub fn pieces(&self) -> usize {
        self.size.div_ceil(self.piece)
    }

    /// Start and length of a piece.
    pub fn piece(&self, index: usize) -> (usize, usize) {
        let start = index * self.piece;
        (start, self.piece.min(self.size - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_what_all_operands_walk_as_one() {
        let space = Space::new(&[2, 1, 3, 4], &[&[12, 12, 4, 1], &[0, 0, 4, 1]], 0..4);
        assert_eq!((space.dims, space.strides), (vec![2, 12], vec![vec![12, 1], vec![0, 1]]));
    }

    #[test]
    fn cuts_cover_the_axis_once() {
        for (size, limit, unit) in [(1, 512, 16), (513, 512, 16), (1000, 512, 16), (7, 3, 1), (1024, 512, 16)] {
            let cut = Cut::new(size, limit, unit);
            let mut next = 0;
            for i in 0..cut.pieces() {
                let (start, len) = cut.piece(i);
                assert!(start == next && len > 0 && len <= limit);
                next += len;
            }
            assert_eq!(next, size);
        }
    }
}
