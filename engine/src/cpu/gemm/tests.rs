use super::*;
use crate::{Device, Philox, Result, Tensor};

/// The product in f64, element by element.
fn reference(a: &Tensor, b: &Tensor, bias: Option<&Tensor>, start: &[f64]) -> Result<Vec<f64>> {
    let (m, k, n) = (a.dims()[0], a.dims()[1], b.dims()[1]);
    let (a, b) = (a.to_vec::<f64>()?, b.to_vec::<f64>()?);
    let bias = bias.map(Tensor::to_vec::<f64>).transpose()?;
    let element = |i: usize, j: usize| {
        let sum: f64 = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
        sum + start[i * n + j] + bias.as_ref().map_or(0.0, |b| b[j])
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
fn every_layout_size_and_dtype_agrees_with_f64() -> Result<()> {
    let cpu = Device::cpu();
    let mut random = Philox::new(5);
    let sizes = [(1, 1, 1), (6, 16, 16), (7, 33, 17), (13, 700, 5), (150, 64, 40), (5, 321, 530), (1, 129, 64)];
    for (case, (m, k, n)) in sizes.into_iter().flat_map(|s| (0..9).map(move |i| (i, s))) {
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let a = matrix(&mut random, m, k, case, dtype)?;
            let b = matrix(&mut random, k, n, case / 3, dtype)?;
            let bias = if case % 2 == 0 { Some(matrix(&mut random, 1, n, 0, dtype)?.reshape(&[n])?) } else { None };
            let out = matrix(&mut random, m, n, case + case / 3, dtype)?;
            let accumulate = case % 4 < 2;
            let before = if accumulate { out.to_vec::<f64>()? } else { vec![0.0; m * n] };
            let expected = reference(&a, &b, bias.as_ref(), &before)?;
            cpu.backend().matmul(&a, &b, bias.as_ref(), accumulate, &out)?;
            let (unit, sums) = match dtype {
                DType::BF16 => (2f64.powi(-8), 2f64.powi(-23)),
                DType::F16 => (2f64.powi(-11), 2f64.powi(-23)),
                DType::F32 => (2f64.powi(-23), 2f64.powi(-23)),
                _ => (2f64.powi(-52), 2f64.powi(-52)),
            };
            // The result's rounding, and a random walk of the roundings of partial sums, which grow like a walk too.
            let walk = sums * (k as f64).sqrt() * (2.0 + (k as f64).sqrt() / 3.0);
            for (x, y) in out.to_vec::<f64>()?.into_iter().zip(expected) {
                let bound = unit * y.abs() + walk;
                assert!((x - y).abs() <= bound, "{m}x{k}x{n} case {case} {dtype}: {x} instead of {y}");
            }
        }
    }
    Ok(())
}

#[test]
fn instruction_sets_and_heights_give_one_chain_per_element() -> Result<()> {
    // Rows computed alone have the bits of rows computed together, by row and by column kernels.
    let cpu = Device::cpu();
    let mut random = Philox::new(9);
    for kind in 0..2 {
        let (a, b) = (matrix(&mut random, 13, 70, kind, DType::F32)?, matrix(&mut random, 70, 21, 0, DType::F32)?);
        let whole = Tensor::zeros(&[13, 21], DType::F32, &cpu)?;
        cpu.backend().matmul(&a, &b, None, false, &whole)?;
        for i in 0..13 {
            let row = Tensor::zeros(&[1, 21], DType::F32, &cpu)?;
            cpu.backend().matmul(&a.narrow(0, i, 1)?, &b, None, false, &row)?;
            assert_eq!(row.to_vec::<f32>()?, whole.narrow(0, i, 1)?.to_vec::<f32>()?);
        }
    }
    Ok(())
}

#[test]
fn portable_kernels_agree_with_the_machines() {
    let (m, k, n) = (5, 40, 19);
    let a: Vec<f32> = (0..m * k).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
    let b: Vec<f32> = (0..k * n).map(|i| (i % 13) as f32 / 8.0 - 0.7).collect();
    let result = |isa: Isa, by_rows: bool| {
        let mut c = vec![0f32; m * n];
        let matrix = |p: *const f32, rows: usize, cols: usize| Matrix {
            ptr: p.cast_mut().cast(),
            dtype: DType::F32,
            rows,
            cols,
        };
        let flipped: Vec<f32> = (0..m * k).map(|at| a[at % m * k + at / m]).collect();
        let a = if by_rows { matrix(a.as_ptr(), k, 1) } else { matrix(flipped.as_ptr(), 1, m) };
        let p = Product {
            a,
            b: matrix(b.as_ptr(), n, 1),
            bias: None,
            c: matrix(c.as_mut_ptr(), n, 1),
            k,
            accumulate: false,
        };
        // SAFETY: the matrices have these sizes; the sets below are those of the machine.
        unsafe { product(isa, kernels(isa), &p, m, n) };
        c
    };
    for set in [Isa::Portable, isa()] {
        for by_rows in [true, false] {
            for (x, y) in result(set, by_rows).into_iter().zip(result(Isa::Portable, true)) {
                assert!((x - y).abs() < 1e-5, "{set:?}: {x} instead of {y}");
            }
        }
    }
}
