use super::*;
use crate::cpu::view;
use crate::{Device, Philox, Result, Tensor};

/// The product on one instruction set.
fn multiply_on(isa: Isa, a: &Tensor, b: &Tensor, bias: Option<&Tensor>, accumulate: bool, out: &Tensor) -> Result<()> {
    let bias = bias.map(view).transpose()?;
    // SAFETY: the set is one of the machine's; `out` is the test's own.
    unsafe { matmul(isa, &view(a)?, &view(b)?, bias.as_ref(), accumulate, &view(out)?) };
    Ok(())
}

/// The product in f64, element by element, and the root of the sum of the squares of what is rounded on the way: the terms
/// and the sums so far.
fn reference(a: &Tensor, b: &Tensor, bias: Option<&Tensor>, start: &[f64]) -> Result<Vec<(f64, f64)>> {
    let (m, k, n) = (a.dims()[0], a.dims()[1], b.dims()[1]);
    let (a, b) = (a.to_vec::<f64>()?, b.to_vec::<f64>()?);
    let bias = bias.map(Tensor::to_vec::<f64>).transpose()?;
    let element = |i: usize, j: usize| {
        let (mut sum, mut squares) = (0.0, 0.0);
        for l in 0..k {
            let term = a[i * k + l] * b[l * n + j];
            sum += term;
            squares += term * term + sum * sum;
        }
        for more in [start[i * n + j], bias.as_ref().map_or(0.0, |b| b[j])] {
            sum += more;
            squares += sum * sum;
        }
        (sum, squares.sqrt())
    };
    Ok((0..m * n).map(|at| element(at / n, at % n)).collect())
}

/// A matrix of numbers in [-1, 1): row-major, transposed, or every second column of a wider one.
fn matrix(random: &mut Philox, m: usize, n: usize, kind: usize, dtype: DType) -> Result<Tensor> {
    let mut make = |m: usize, n: usize| {
        random.uniform(&[m, n], &Device::cpu())?.mul_scalar(2.0)?.add_scalar(-1.0)?.to_dtype(dtype)
    };
    match kind % 3 {
        0 => make(m, n),
        1 => make(n, m)?.t(),
        _ => make(m, 2 * n)?.reshape(&[m, n, 2])?.narrow(2, 1, 1)?.reshape(&[m, n]),
    }
}

#[test]
fn every_layout_size_and_dtype_agrees_with_f64_on_every_instruction_set() -> Result<()> {
    let sizes =
        [(1, 1, 1), (6, 16, 16), (7, 33, 17), (13, 901, 5), (150, 64, 40), (5, 402, 530), (1, 129, 64), (50, 1024, 32)];
    // Streamed: few rows of a large B, and a short k.
    let streamed =
        [(1, 130, 1070), (2, 1100, 133), (3, 263, 515), (4, 70, 2000), (670, 1, 210), (77, 2, 1800), (1300, 3, 101)];
    for (case, (m, k, n)) in sizes.into_iter().chain(streamed).flat_map(|s| (0..9).map(move |i| (i, s))) {
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            // Each case draws from a stream of its own, so its numbers are the same whatever the machine has.
            let mut random = Philox::new(5).fork((case * 4000 + m * 3 + k * 5 + n) as u64).fork(dtype.size() as u64);
            let a = matrix(&mut random, m, k, case, dtype)?;
            let b = matrix(&mut random, k, n, case / 3, dtype)?;
            let bias = if case % 2 == 0 { Some(matrix(&mut random, 1, n, 0, dtype)?.reshape(&[n])?) } else { None };
            let start = matrix(&mut random, m, n, case + case / 3, dtype)?;
            let accumulate = case % 4 < 2;
            let before = if accumulate { start.to_vec::<f64>()? } else { vec![0.0; m * n] };
            let expected = reference(&a, &b, bias.as_ref(), &before)?;
            // Half a unit in the last place: of the result, and of sums.
            let (result, sums) = match dtype {
                DType::BF16 => (2f64.powi(-8), 2f64.powi(-24)),
                DType::F16 => (2f64.powi(-11), 2f64.powi(-24)),
                DType::F32 => (2f64.powi(-24), 2f64.powi(-24)),
                // Those of the reference too.
                _ => (2f64.powi(-53), 2f64.powi(-52)),
            };
            for isa in Isa::available() {
                // Its values do not count: all machines draw the same, however many instruction sets they have.
                let out = matrix(&mut Philox::new(0), m, n, case + case / 3, dtype)?;
                out.copy_from(&start)?;
                multiply_on(isa, &a, &b, bias.as_ref(), accumulate, &out)?;
                for (x, &(y, rounded)) in out.to_vec::<f64>()?.into_iter().zip(&expected) {
                    // The result's rounding, and eight standard deviations of those before, each within half a unit of
                    // what is rounded: millions of numbers are compared. Halves have a least unit.
                    let bound = result * (y.abs() + 2f64.powi(-14)) + 8.0 * sums / 3f64.sqrt() * rounded;
                    assert!((x - y).abs() <= bound, "{m}x{k}x{n} case {case} {dtype} {isa:?}: {x} instead of {y}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_element_has_the_same_bits_wherever_it_is_cut() -> Result<()> {
    // Rows computed alone have the bits of rows computed together, on every instruction set, for every layout of A.
    let cpu = Device::cpu();
    let mut random = Philox::new(9);
    for (isa, dtype) in Isa::available().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        for kind in 0..3 {
            let (a, b) = (matrix(&mut random, 13, 1000, kind, dtype)?, matrix(&mut random, 1000, 75, 0, dtype)?);
            let whole = Tensor::zeros(&[13, 75], DType::F32, &cpu)?;
            multiply_on(isa, &a, &b, None, false, &whole)?;
            for i in 0..13 {
                let row = Tensor::zeros(&[1, 75], DType::F32, &cpu)?;
                multiply_on(isa, &a.narrow(0, i, 1)?, &b, None, false, &row)?;
                assert_eq!(row.to_vec::<f32>()?, whole.narrow(0, i, 1)?.to_vec::<f32>()?, "{isa:?} {dtype} row {i}");
            }
        }
    }
    Ok(())
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    let cpu = Device::cpu();
    let mut random = Philox::new(10);
    for dtype in [DType::F32, DType::BF16] {
        for (m, k, n, kind) in [
            (100, 700, 300, 0),
            (31, 1600, 1030, 1),
            (600, 65, 33, 0),
            (2, 500, 2100, 0),
            (2, 500, 2100, 1),
            (901, 2, 160, 0),
        ] {
            let (a, b) = (matrix(&mut random, m, k, kind, dtype)?, matrix(&mut random, k, n, 1 - kind, dtype)?);
            let on = |threads: usize| -> Result<Vec<f32>> {
                let out = Tensor::zeros(&[m, n], dtype, &cpu)?;
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| crate::cpu::awake(&cpu, || multiply_on(crate::cpu::isa(), &a, &b, None, false, &out)))?;
                out.to_vec::<f32>()
            };
            let one = on(1)?;
            for threads in [2, 3, 7] {
                assert_eq!(one, on(threads)?, "{m}x{k}x{n} {dtype}, {threads} threads");
            }
        }
    }
    Ok(())
}

#[test]
fn tasks_are_as_many_as_threads_and_cover_the_output() {
    let set = kernels(Isa::Portable, false);
    for (m, n) in [(640, 3072), (1, 4096), (4096, 64), (64, 64), (3, 3)] {
        for threads in [1, 2, 3, 8, 16] {
            let (high, wide) = cut(set, 1, m, n, threads);
            let tasks = m.div_ceil(high) * n.div_ceil(wide);
            assert!(high > 0 && wide > 0 && tasks <= threads, "{m}x{n} {threads}: {tasks} tasks");
            assert!(m * n < 64 * 64 || 2 * tasks > threads, "{m}x{n} {threads}: {tasks} tasks");
        }
    }
}
