//! Strided iteration spaces, as backends walk them.

/// An iteration space with the strides of each operand, as few axes as possible.
#[derive(Clone, Debug, Default)]
pub struct Space {
    /// Sizes of the axes, outermost first.
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

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there is no position.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
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
pub fn memory_order(strides: &[usize]) -> Vec<usize> {
    let mut axes: Vec<usize> = (0..strides.len()).collect();
    axes.sort_by_key(|&a| std::cmp::Reverse(strides[a]));
    axes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_what_all_operands_walk_as_one() {
        let space = Space::new(&[2, 1, 3, 4], &[&[12, 12, 4, 1], &[0, 0, 4, 1]], 0..4);
        assert_eq!((space.dims, space.strides), (vec![2, 12], vec![vec![12, 1], vec![0, 1]]));
    }
}
