//! The sum of a tensor's squares: one pass over memory. The norm of all gradients takes it of each.

use super::gemm::{Narrow, with_narrow};
use super::isa::{Isa, Work, dispatch};
use super::{View, team};
use crate::DType;

/// Elements whose squares are one chain of sums for each lane.
const BLOCK: usize = 16 * 1024;
/// Sums side by side: enough to hide how long an addition takes.
const LANES: usize = 32;

/// Writes the sum of all squares. It is in f64, where the square of a narrower number is exact, so all instruction sets give the same
/// bits. `false`, and nothing is done, where elements are kept, the input has gaps or is f64.
///
/// # Safety
/// The views lie in memory that nobody else uses meanwhile, and do not overlap.
pub(super) unsafe fn square_sum(isa: Isa, input: &View<'_>, output: &View<'_>) -> bool {
    let total = output.dims.iter().all(|size| *size == 1);
    if !total || !input.is_contiguous() || !matches!(input.dtype, DType::F32 | DType::BF16 | DType::F16) {
        return false;
    }
    let n: usize = input.dims.iter().product();
    let block = |at: usize| {
        let mut sum = 0.0;
        let len = BLOCK.min(n - at * BLOCK);
        with_narrow!(input.dtype, T => {
            // SAFETY: the caller's promise; the block lies in the input.
            let values = unsafe { std::slice::from_raw_parts(input.ptr.cast::<T>().add(at * BLOCK).cast_const(), len) };
            dispatch(isa, Squares { values, sum: &mut sum });
        });
        sum
    };
    let sums = match n.div_ceil(BLOCK) {
        1 => vec![block(0)],
        blocks => team::collect(blocks, block),
    };
    // SAFETY: the caller's promise.
    unsafe { super::pointwise::write(output, 0, sums.into_iter().sum()) };
    true
}

struct Squares<'a, T> {
    values: &'a [T],
    sum: &'a mut f64,
}

impl<T: Narrow> Work for Squares<'_, T> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let square = |x: T| f64::from(x.widen()) * f64::from(x.widen());
        let mut lanes = [0f64; LANES];
        let (whole, rest) = self.values.as_chunks::<LANES>();
        for values in whole {
            // By index: of zipped iterators the compiler makes no vectors where T is f32.
            for (i, lane) in lanes.iter_mut().enumerate() {
                *lane += square(values[i]);
            }
        }
        lanes.iter_mut().zip(rest).for_each(|(lane, x)| *lane += square(*x));
        *self.sum = lanes.iter().sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::view;
    use crate::{Device, Philox, Result, Tensor};

    #[test]
    fn it_is_that_of_the_elements_one_by_one() -> Result<()> {
        let cpu = Device::cpu();
        for n in [1, 31, 32, 100, BLOCK, BLOCK + 1, 3 * BLOCK + 77] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let x = Philox::new(7).normal(&[n], &cpu)?.to_dtype(dtype)?;
                let want: f64 = x.to_vec::<f64>()?.iter().map(|x| x * x).sum();
                let sums = Isa::available().map(|isa| {
                    let sum = Tensor::zeros(&[1], DType::F64, &cpu)?;
                    // SAFETY: the set is one of the machine's; the target is the test's own.
                    assert!(unsafe { square_sum(isa, &view(&x)?, &view(&sum)?) });
                    sum.item()
                });
                for sum in sums {
                    let sum = sum?;
                    assert!((sum - want).abs() <= 1e-13 * want, "{n} {dtype:?}: {sum} instead of {want}");
                }
            }
        }
        Ok(())
    }
}
