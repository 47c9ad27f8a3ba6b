//! How a strided iteration space is cut into blocks.

pub(super) use crate::space::{Space, memory_order};

/// Elements of a block: a few KB, so that a chain of operations stays in the first cache.
pub(super) const BLOCK: usize = 1024;

impl Space {
    /// Takes the innermost axis off: its size and strides (1 and zeros when there is none).
    pub(super) fn pop(&mut self) -> (usize, Vec<usize>) {
        match self.dims.pop() {
            Some(size) => (size, self.strides.iter_mut().map(|s| s.pop().unwrap_or(0)).collect()),
            None => (1, vec![0; self.strides.len()]),
        }
    }

    /// Takes off the axis that makes the largest block together with one of `width`: the innermost of the best.
    pub(super) fn pop_rows(&mut self, width: usize) -> (usize, Vec<usize>) {
        let rows = |axis: usize| self.dims[axis].min(BLOCK / width);
        match (0..self.dims.len()).max_by_key(|&axis| rows(axis)) {
            Some(axis) => (self.dims.remove(axis), self.strides.iter_mut().map(|s| s.remove(axis)).collect()),
            None => (1, vec![0; self.strides.len()]),
        }
    }
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
