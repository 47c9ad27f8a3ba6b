//! The fused calls but the convolution's: norms, attention, their gradients, and codes.

use flowtape_engine::backend::run_fused;
use flowtape_engine::gradcheck::Draw;
use flowtape_engine::ops::{
    AttentionBackward, AttentionForward, ModulatedNormBackward, NormBackward, NormForward, NormRopeBackward, RopeLayout,
};
use flowtape_engine::quant::{Dequantise, FORMATS, Parts};
use flowtape_engine::{DType, Device};

use super::world::*;

pub fn norm(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let dtype = world.float();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let width = world.draw.size(2, 9);
    let rank = world.draw.size(0, 2);
    let rows: Vec<usize> = (0..rank).map(|_| world.draw.size(1, 4)).collect();
    let dims = [&rows[..], &[width]].concat();
    let [from, to] = [world.memory_of(dtype, number), world.memory_of(dtype, number)];
    let statistics = world.memory_of(wide, number);
    let view = |world: &mut World<'_>, memory: usize, dims: &[usize], odds: Odds| {
        let dims = world.perturbed(dims);
        world.view(memory, &dims, odds)
    };
    let x = view(&mut world, from, &dims, ANY);
    let own = if world.percent(96) { to } else { from };
    let y = view(&mut world, own, &dims, OUTPUT);
    let [weight, bias] = [0, 1].map(|_| world.percent(50).then(|| view(&mut world, from, &[width], ANY)));
    let of_rows = [&rows[..], &[1]].concat();
    let mean = world.percent(50).then(|| view(&mut world, statistics, &of_rows, PLAIN));
    let rstd = view(&mut world, statistics, &of_rows, PLAIN);
    let reads: Vec<&View> = [&x].into_iter().chain(&weight).chain(&bias).collect();
    let writes: Vec<&View> = [&y, &rstd].into_iter().chain(&mean).collect();
    let own_rows = [&x.tensor.dims()[..x.tensor.rank().saturating_sub(1)], &[1]].concat();
    let legal = x.tensor.rank() > 0
        && y.tensor.dims() == x.tensor.dims()
        && reads[1..].iter().all(|v| v.tensor.dims() == &x.tensor.dims()[x.tensor.rank() - 1..])
        && writes[1..].iter().all(|v| v.tensor.dims() == own_rows && v.is_dense())
        && world.on_one_device(reads.iter().chain(&writes).copied())
        && apart(&reads, &writes, false);
    let before = world.values();
    let answer = run_fused(NormForward {
        x: &x.tensor,
        weight: weight.as_ref().map(|v| &v.tensor),
        bias: bias.as_ref().map(|v| &v.tensor),
        eps: 0.1,
        y: &y.tensor,
        mean: mean.as_ref().map(|v| &v.tensor),
        rstd: &rstd.tensor,
    });
    let width = x.tensor.dims().last().copied().unwrap_or(1);
    let (values, n) = (world.read(&before, &x), width as f64);
    let read = |v: &Option<View>| v.as_ref().map(|v| world.read(&before, v));
    let (scale, shift) = (read(&weight), read(&bias));
    let (mut means, mut rstds, mut normed) = (Vec::new(), Vec::new(), Vec::new());
    for row in values.chunks(width) {
        let m = if mean.is_some() { row.iter().sum::<f64>() / n } else { 0.0 };
        let s = 1.0 / (row.iter().map(|x| (x - m) * (x - m)).sum::<f64>() / n + 0.1).sqrt();
        means.push(m);
        rstds.push(s);
        normed.extend(row.iter().enumerate().map(|(i, x)| {
            let factor = scale.as_ref().filter(|_| legal).map_or(1.0, |w| w[i]);
            (x - m) * s * factor + shift.as_ref().filter(|_| legal).map_or(0.0, |b| b[i])
        }));
    }
    let mut outputs = vec![(&y, normed), (&rstd, rstds)];
    outputs.extend(mean.as_ref().map(|v| (v, means)));
    near(&world, "norm", answer, legal, &before, &outputs)
}

pub fn attention(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let dtype = world.float();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let mut size = |low, high| world.draw.size(low, high);
    let ([b, h], [lq, lk], [d, dv]) = ([size(1, 2), size(1, 2)], [size(1, 3), size(1, 3)], [size(1, 3), size(1, 3)]);
    let memories = [0; 4].map(|_| world.memory_of(dtype, number));
    let wides = [world.memory_of(wide, number), world.memory_of(wide, number)];
    let view = |world: &mut World<'_>, memory: usize, dims: &[usize], odds: Odds| {
        let dims = if world.percent(50) { world.perturbed(dims) } else { dims.to_vec() };
        world.view(memory, &dims, odds)
    };
    let q = view(&mut world, memories[0], &[b, h, lq, d], ANY);
    let k = view(&mut world, memories[1], &[b, h, lk, d], ANY);
    let v = view(&mut world, memories[2], &[b, h, lk, dv], ANY);
    let mask = world.percent(50).then(|| view(&mut world, wides[0], &[b, h, lq, lk], ANY));
    let own = if world.percent(97) { memories[3] } else { memories[0] };
    let o = view(&mut world, own, &[b, h, lq, dv], OUTPUT);
    let lse = view(&mut world, wides[1], &[b, h, lq], PLAIN);
    let reads: Vec<&View> = [&q, &k, &v].into_iter().chain(&mask).collect();
    let fits = match (q.tensor.dims(), v.tensor.dims()) {
        (&[b, h, lq, d], &[.., lk, dv]) => {
            k.tensor.dims() == [b, h, lk, d]
                && v.tensor.dims() == [b, h, lk, dv]
                && o.tensor.dims() == [b, h, lq, dv]
                && lse.tensor.dims() == [b, h, lq]
                && mask.as_ref().is_none_or(|m| m.tensor.dims() == [b, h, lq, lk])
        }
        _ => false,
    };
    let legal = fits
        && lse.is_dense()
        && world.on_one_device(reads.iter().copied().chain([&o, &lse]))
        && apart(&reads, &[&o, &lse], false);
    let before = world.values();
    let mask_tensor = mask.as_ref().map(|m| &m.tensor);
    let (scale, [of_q, of_k, of_v]) = (0.5, [&q.tensor, &k.tensor, &v.tensor]);
    let call = AttentionForward { q: of_q, k: of_k, v: of_v, mask: mask_tensor, scale, o: &o.tensor, lse: &lse.tensor };
    let answer = run_fused(call);
    let (mut results, mut sums) = (Vec::new(), Vec::new());
    if legal {
        let [q, k, v] = [&q, &k, &v].map(|view| world.read(&before, view));
        let mask = mask.as_ref().map(|m| world.read(&before, m));
        let [b, h, lq, lk] = [call.q.dims()[0], call.q.dims()[1], call.q.dims()[2], call.k.dims()[2]];
        let (d, dv) = (call.q.dims()[3], call.v.dims()[3]);
        for row in 0..b * h * lq {
            let head = row / lq;
            let score = |j: usize| {
                let dot: f64 = (0..d).map(|c| q[row * d + c] * k[(head * lk + j) * d + c]).sum();
                dot * scale + mask.as_ref().map_or(0.0, |m| m[row * lk + j])
            };
            let terms: Vec<f64> = (0..lk).map(|j| score(j).exp()).collect();
            let sum: f64 = terms.iter().sum();
            sums.push(sum.ln());
            results.extend((0..dv).map(|c| (0..lk).map(|j| terms[j] / sum * v[(head * lk + j) * dv + c]).sum::<f64>()));
        }
    }
    near(&world, "attention", answer, legal, &before, &[(&o, results), (&lse, sums)])
}

/// The gradients of attention and norms: what keeps the contract is done or declined and writes its outputs alone. Their
/// values are the gradient checks' business.
pub fn fused_backward(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let dtype = world.float();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let mut size = |low, high| world.draw.size(low, high);
    let ([b, l, h, d], lk) = ([size(1, 2), size(1, 4), size(1, 2), 2 * size(1, 3)], size(1, 3));
    let memories = [0; 8].map(|_| world.memory_of(dtype, number));
    let wides = [0; 4].map(|_| world.memory_of(wide, number));
    // One operand in three calls has other dims; one output in some lies where an input does.
    let wrong = world.draw.size(0, 40);
    let mut made = 0;
    let mut view = |world: &mut World<'_>, memory: usize, dims: &[usize], odds: Odds| {
        made += 1;
        let dims = if made == wrong { [dims, &[2]].concat() } else { dims.to_vec() };
        world.view(memory, &dims, odds)
    };
    let shared = if world.percent(10) { memories[0] } else { memories[5] };
    match world.draw.size(0, 3) {
        0 => {
            let x = view(&mut world, memories[0], &[b, l, d], ANY);
            let weight = view(&mut world, memories[1], &[d], ANY);
            let rstd = view(&mut world, wides[0], &[b, l, 1], PLAIN);
            let grad = view(&mut world, memories[2], &[b, l, d], ANY);
            let dx = view(&mut world, shared, &[b, l, d], OUTPUT);
            let legal = !(1..=5).contains(&wrong) && rstd.is_dense();
            let call = NormBackward {
                x: &x.tensor,
                weight: Some(&weight.tensor),
                mean: None,
                rstd: &rstd.tensor,
                grad: &grad.tensor,
                dx: &dx.tensor,
            };
            kept_to_itself(&world, "norm backward", || run_fused(call), legal, &[&x, &weight, &rstd, &grad], &[&dx])
        }
        1 => {
            let vectors = if world.percent(50) { [b, 1, d] } else { [b, l, d] };
            let x = view(&mut world, memories[0], &[b, l, d], ANY);
            let scale = view(&mut world, memories[1], &vectors, ANY);
            let [mean, rstd] = [wides[0], wides[1]].map(|m| view(&mut world, m, &[b, l, 1], PLAIN));
            let grad = view(&mut world, memories[2], &[b, l, d], ANY);
            let dx = view(&mut world, shared, &[b, l, d], OUTPUT);
            let [d_shift, d_scale] = [memories[6], memories[7]].map(|m| view(&mut world, m, &vectors, OUTPUT));
            let legal = !(1..=8).contains(&wrong) && mean.is_dense() && rstd.is_dense();
            let call = ModulatedNormBackward {
                x: &x.tensor,
                scale: &scale.tensor,
                mean: &mean.tensor,
                rstd: &rstd.tensor,
                grad: &grad.tensor,
                dx: &dx.tensor,
                d_shift: &d_shift.tensor,
                d_scale: &d_scale.tensor,
            };
            let (reads, writes) = ([&x, &scale, &mean, &rstd, &grad], [&dx, &d_shift, &d_scale]);
            kept_to_itself(&world, "modulated norm backward", || run_fused(call), legal, &reads, &writes)
        }
        2 => {
            let x = view(&mut world, memories[0], &[b, l, h, d], ANY);
            let weight = view(&mut world, memories[1], &[d], ANY);
            let [cos, sin] = [wides[0], wides[1]].map(|m| view(&mut world, m, &[l, d], ANY));
            let rstd = view(&mut world, wides[2], &[b, l, h, 1], PLAIN);
            let grad = view(&mut world, memories[2], &[b, l, h, d], ANY);
            let dx = view(&mut world, shared, &[b, l, h, d], OUTPUT);
            let dw = view(&mut world, memories[6], &[d], OUTPUT);
            let legal = !(1..=8).contains(&wrong) && rstd.is_dense();
            let call = NormRopeBackward {
                x: &x.tensor,
                weight: &weight.tensor,
                cos: &cos.tensor,
                sin: &sin.tensor,
                layout: if seed.is_multiple_of(2) { RopeLayout::Split } else { RopeLayout::Interleaved },
                rstd: &rstd.tensor,
                grad: &grad.tensor,
                dx: &dx.tensor,
                dw: &dw.tensor,
            };
            let reads = [&x, &weight, &cos, &sin, &rstd, &grad];
            kept_to_itself(&world, "norm and rope backward", || run_fused(call), legal, &reads, &[&dx, &dw])
        }
        _ => {
            let q = view(&mut world, memories[0], &[b, h, l, d], ANY);
            let [k, v] = [memories[1], memories[2]].map(|m| view(&mut world, m, &[b, h, lk, d], ANY));
            let [o, grad] = [memories[3], memories[4]].map(|m| view(&mut world, m, &[b, h, l, d], ANY));
            let lse = view(&mut world, wides[0], &[b, h, l], PLAIN);
            let mask = view(&mut world, wides[1], &[b, h, l, lk], ANY);
            let dq = view(&mut world, shared, &[b, h, l, d], OUTPUT);
            let [dk, dv] = [memories[6], memories[7]].map(|m| view(&mut world, m, &[b, h, lk, d], OUTPUT));
            let of_mask = [1, h, if world.percent(50) { 1 } else { l }, lk];
            let d_mask = view(&mut world, wides[2], &of_mask, OUTPUT);
            let wanted = world.percent(50);
            let legal = !(1..=10 + usize::from(wanted)).contains(&wrong) && lse.is_dense();
            let call = AttentionBackward {
                q: &q.tensor,
                k: &k.tensor,
                v: &v.tensor,
                mask: Some(&mask.tensor),
                scale: 0.5,
                o: &o.tensor,
                lse: &lse.tensor,
                grad: &grad.tensor,
                dq: &dq.tensor,
                dk: &dk.tensor,
                dv: &dv.tensor,
                d_mask: wanted.then_some(&d_mask.tensor),
            };
            let writes: Vec<&View> = [&dq, &dk, &dv].into_iter().chain(wanted.then_some(&d_mask)).collect();
            let reads = [&q, &k, &v, &o, &grad, &lse, &mask];
            kept_to_itself(&world, "attention backward", || run_fused(call), legal, &reads, &writes)
        }
    }
}

/// Panels inside of a matrix of any codes, and outside of it.
pub fn dequantise(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let (format, dtype) = (world.pick(&FORMATS), world.float());
    let dims = [world.draw.size(1, 9), world.draw.size(1, 40)];
    let size = [0, 1].map(|axis| world.draw.size(1, dims[axis]));
    // Mostly inside.
    let most = usize::from(world.percent(10));
    let start = [0, 1].map(|axis| world.draw.size(0, dims[axis] - size[axis] + most));
    // Words that are codes of numbers, and scales below one.
    let bits = |draw: &mut Draw| f64::from(0x3e00_0000 | draw.size(0, 0xff_ffff) as u32 & 0x3b_3b3b);
    let (codes, floats) = (world.memory_of(DType::U32, bits), world.memory_of(dtype, number));
    let given = world.perturbed(&[Parts::of(format, dims).words()]);
    let words = world.view(codes, &given, PLAIN);
    let given = world.perturbed(&size);
    let out = world.view(floats, &given, PLAIN);
    let legal = given.len() == 2
        && (0..2).all(|axis| start[axis] + given[axis] <= dims[axis])
        && words.tensor.dims() == [Parts::of(format, dims).words()]
        && words.is_dense()
        && out.is_dense();
    let call = Dequantise { format, dims, words: &words.tensor, start, out: &out.tensor };
    kept_to_itself(&world, "dequantise", || run_fused(call), legal, &[&words], &[&out])
}
