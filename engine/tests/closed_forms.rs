//! Ops against formulas written out as loops in f64.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the helpers of tests may panic

use flowtape_engine::gradcheck::Draw;
use flowtape_engine::platform::math;
use flowtape_engine::{DType, Device, Result, Tape, Tensor, ops};

fn close(what: &str, a: &[f64], b: &[f64], bound: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!((x - y).abs() <= bound * (1.0 + y.abs()), "{what}[{i}]: {x} against {y}");
    }
}

/// The gradients of `<y, g>` with respect to `inputs`, and y.
fn run(inputs: &[&Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>, g: &Tensor) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
    let tape = Tape::new();
    let leaves: Vec<Tensor> = inputs.iter().map(|t| tape.leaf(t)).collect();
    let y = f(&leaves)?;
    let mut gradients = flowtape_engine::Gradients::default();
    tape.backward_with(&[(&y, g)], &mut gradients)?;
    let all = leaves.iter().map(|t| gradients.of(t).unwrap().to_vec()).collect::<Result<_>>()?;
    Ok((y.to_vec()?, all))
}

#[test]
fn linear_gradients_are_products() -> Result<()> {
    let mut draw = Draw::new(1);
    let (m, k, n) = (5, 7, 6);
    let (x, w) = (draw.standard(&[m, k])?, draw.standard(&[n, k])?);
    let (b, g) = (draw.standard(&[n])?, draw.standard(&[m, n])?);
    let (y, d) = run(&[&x, &w, &b], |t| ops::linear(&t[0], &t[1], Some(&t[2])), &g)?;
    let [xv, wv, bv, gv] = [x.to_vec::<f64>()?, w.to_vec::<f64>()?, b.to_vec::<f64>()?, g.to_vec::<f64>()?];
    let table = |rows: usize, cols: usize, f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        (0..rows * cols).map(|i| f(i / cols, i % cols)).collect()
    };
    close("y", &y, &table(m, n, &|i, j| bv[j] + (0..k).map(|l| xv[i * k + l] * wv[j * k + l]).sum::<f64>()), 1e-12);
    close("dx", &d[0], &table(m, k, &|i, l| (0..n).map(|j| gv[i * n + j] * wv[j * k + l]).sum()), 1e-12);
    close("dw", &d[1], &table(n, k, &|j, l| (0..m).map(|i| gv[i * n + j] * xv[i * k + l]).sum()), 1e-12);
    close("db", &d[2], &table(1, n, &|_, j| (0..m).map(|i| gv[i * n + j]).sum()), 1e-12);
    Ok(())
}

#[test]
fn softmax_cross_entropy_gradient_is_p_minus_target() -> Result<()> {
    let mut draw = Draw::new(2);
    let x = draw.standard(&[4, 6])?;
    let target =
        Tensor::from_vec((0..24).map(|i| f64::from(u8::from(i % 6 == i / 6))).collect(), &[4, 6], &Device::cpu())?;
    let one = Tensor::ones(&[], DType::F64, &Device::cpu())?;
    let loss = |t: &[Tensor]| t[0].softmax(1)?.log()?.mul(&target)?.sum_all()?.neg();
    let (_, d) = run(&[&x], loss, &one)?;
    let (xv, tv) = (x.to_vec::<f64>()?, target.to_vec::<f64>()?);
    let expected: Vec<f64> = (0..24)
        .map(|i| {
            let row = &xv[i / 6 * 6..i / 6 * 6 + 6];
            xv[i].exp() / row.iter().map(|v| v.exp()).sum::<f64>() - tv[i]
        })
        .collect();
    close("dx", &d[0], &expected, 1e-12);
    Ok(())
}

#[test]
fn norm_gradients_match_their_formulas() -> Result<()> {
    let mut draw = Draw::new(3);
    let (rows, n, eps) = (5, 8, 1e-5);
    let (x, w, b, g) =
        (draw.standard(&[rows, n])?, draw.standard(&[n])?, draw.standard(&[n])?, draw.standard(&[rows, n])?);
    let [xv, wv, gv] = [x.to_vec::<f64>()?, w.to_vec::<f64>()?, g.to_vec::<f64>()?];
    for centred in [true, false] {
        let (_, d) = if centred {
            run(&[&x, &w, &b], |t| ops::layer_norm(&t[0], Some(&t[1]), Some(&t[2]), eps), &g)?
        } else {
            run(&[&x, &w], |t| ops::rms_norm(&t[0], Some(&t[1]), eps), &g)?
        };
        let (mut dx, mut dw) = (vec![0.0; rows * n], vec![0.0; n]);
        for r in 0..rows {
            let row = &xv[r * n..(r + 1) * n];
            let mean = if centred { row.iter().sum::<f64>() / n as f64 } else { 0.0 };
            let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
            let s = 1.0 / (var + eps).sqrt();
            let hat: Vec<f64> = row.iter().map(|v| (v - mean) * s).collect();
            let gw: Vec<f64> = (0..n).map(|i| gv[r * n + i] * wv[i]).collect();
            let a = if centred { gw.iter().sum::<f64>() / n as f64 } else { 0.0 };
            let c = gw.iter().zip(&hat).map(|(p, q)| p * q).sum::<f64>() / n as f64;
            for i in 0..n {
                dx[r * n + i] = s * (gw[i] - a - hat[i] * c);
                dw[i] += gv[r * n + i] * hat[i];
            }
        }
        close("dx", &d[0], &dx, 1e-10);
        close("dw", &d[1], &dw, 1e-10);
    }
    Ok(())
}

#[test]
fn attention_matches_the_whole_score_matrix() -> Result<()> {
    let mut draw = Draw::new(4);
    // Keys past one block of the composition, ragged; a row without keys.
    let (b, h, lq, lk, d) = (2, 2, 5, 131, 4);
    let (q, k) = (draw.standard(&[b, h, lq, d])?, draw.standard(&[b, h, lk, d])?);
    let (v, g) = (draw.standard(&[b, h, lk, d])?, draw.standard(&[b, h, lq, d])?);
    let keep: Vec<u32> = (0..lq * lk).map(|i| if i / lk == 2 { 0 } else { draw.size(0, 1) as u32 }).collect();
    let mask = Tensor::from_slice(&keep, &[lq, lk], &Device::cpu())?;
    let scale = 1.0 / (d as f64).sqrt();
    let [qv, kv, vv, gv] = [q.to_vec::<f64>()?, k.to_vec::<f64>()?, v.to_vec::<f64>()?, g.to_vec::<f64>()?];
    let mut o = vec![0.0; qv.len()];
    let (mut dq, mut dk, mut dv) = (vec![0.0; qv.len()], vec![0.0; kv.len()], vec![0.0; vv.len()]);
    for bh in 0..b * h {
        for i in 0..lq {
            let at = (bh * lq + i) * d;
            let key = |j: usize| (bh * lk + j) * d;
            let dot = |j: usize| (0..d).map(|c| qv[at + c] * kv[key(j) + c]).sum::<f64>() * scale;
            let mut p: Vec<f64> = (0..lk).map(|j| if keep[i * lk + j] == 0 { 0.0 } else { dot(j).exp() }).collect();
            let sum: f64 = p.iter().sum();
            p.iter_mut().for_each(|x| *x = if sum == 0.0 { 0.0 } else { *x / sum });
            let dp: Vec<f64> = (0..lk).map(|j| (0..d).map(|c| gv[at + c] * vv[key(j) + c]).sum()).collect();
            let mean: f64 = p.iter().zip(&dp).map(|(a, b)| a * b).sum();
            for j in 0..lk {
                let ds = p[j] * (dp[j] - mean) * scale;
                for c in 0..d {
                    o[at + c] += p[j] * vv[key(j) + c];
                    dq[at + c] += ds * kv[key(j) + c];
                    dk[key(j) + c] += ds * qv[at + c];
                    dv[key(j) + c] += p[j] * gv[at + c];
                }
            }
        }
    }
    for (dtype, bound) in [(DType::F64, 1e-11), (DType::F32, 2e-5)] {
        let [q, k, v, g] = [q.to_dtype(dtype)?, k.to_dtype(dtype)?, v.to_dtype(dtype)?, g.to_dtype(dtype)?];
        let (y, grads) = run(&[&q, &k, &v], |t| ops::attention(&t[0], &t[1], &t[2], Some(&mask), None), &g)?;
        close("o", &y, &o, bound);
        close("dq", &grads[0], &dq, bound);
        close("dk", &grads[1], &dk, bound);
        close("dv", &grads[2], &dv, bound);
        assert!(y[2 * d..3 * d].iter().all(|x| *x == 0.0), "a fully masked row gives zeros");
    }
    Ok(())
}

#[test]
fn threads_do_not_change_the_bits() -> Result<()> {
    let mut draw = Draw::new(5);
    let device = Device::cpu();
    let big: Vec<f32> = (0..300 * 260).map(|_| draw.number(-1.0, 1.0) as f32 * 1.001).collect();
    let x = Tensor::from_vec(big, &[300, 260], &device)?;
    let run = |threads: usize| -> Result<Vec<u32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let y = x.matmul(&x.t()?)?.gelu()?;
            let parts = [y.sum(&[0], false)?, y.sum(&[1], false)?, y.square()?.sum_all()?.reshape(&[1])?];
            let heads = x.narrow(0, 0, 256)?.reshape(&[4, 64, 4, 65])?.transpose(1, 2)?;
            let attended = ops::attention(&heads, &heads, &heads, None, None)?.flatten(0, 3)?;
            let values = Tensor::cat(&[&parts[0], &parts[1], &parts[2], &attended], 0)?.to_vec::<f32>()?;
            Ok(values.into_iter().map(f32::to_bits).collect())
        })
    };
    let one = run(1)?;
    assert!(run(2)? == one && run(7)? == one);
    Ok(())
}

/// Floats do not hold them all.
#[test]
fn integers_are_copied_to_their_last_bit() -> Result<()> {
    let cpu = Device::cpu();
    let values = [(1 << 24) + 1, u32::MAX, 0, 0x0001_0203];
    let source = Tensor::from_slice(&values, &[2, 2], &cpu)?;
    let target = Tensor::zeros(&[2, 2], DType::U32, &cpu)?;
    target.t()?.copy_from(&source)?;
    assert_eq!(target.to_vec::<u32>()?, [values[0], values[2], values[1], values[3]]);
    Ok(())
}

/// Where the f32 functions of C's libraries give two answers; the right ones by mpmath.
#[test]
fn elementary_functions_have_the_nearest_bits() {
    for (x, sin, cos) in [
        (0x3ce2_0836, 0x3ce2_00de, 0x3f7f_e70e),
        (0x3cf8_5de9, 0x3cf8_542b, 0x3f7f_e1e2),
        (0x3d5b_8921, 0x3d5b_6e39, 0x3f7f_a1e4),
        (0x3d66_014d, 0x3d65_e25c, 0x3f7f_98b4),
    ] {
        let (s, c) = math::sin_cos(f32::from_bits(x));
        assert_eq!((s.to_bits(), c.to_bits()), (sin, cos), "{x:x}");
    }
    for (x, exp) in [(0xc080_f1dc, 0x3c91_ad39), (0xc04a_a0a3, 0x3d2c_ba15), (0xbf80_f1dc, 0x3eba_f81b)] {
        assert_eq!(math::exp(f32::from_bits(x)).to_bits(), exp, "{x:x}");
    }
    for (x, ln) in [(0.75, 0xbe93_4b11_u32), (2.625, 0x3f77_0f8b), (6.625, 0x3ff2_0763), (7.0, 0x3ff9_1395)] {
        assert_eq!(math::ln(x).to_bits(), ln, "{x}");
    }
    for (y, power) in [(0.625, 0x439e_1d27_u32), (0.03125, 0x3faa_b0d5), (0.734375, 0x4458_7db7)] {
        assert_eq!(math::powf(10_000.0, y).to_bits(), power, "{y}");
    }
}
