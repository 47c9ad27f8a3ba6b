//! Every method of every backend with random views, legal and illegal: expanded, permuted, cut out of the middle, on one
//! memory with others or on none. A legal call gives what a naive reference gives, and writes nothing beside its outputs; an
//! illegal one is an error, and writes nothing at all.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use flowtape_engine::backend::call::{
    Call, CopyTo, Gather, Group, MatMul, Pointwise, PointwiseEach, Reduction, ScatterAdd, Upload,
};
use flowtape_engine::expr::{Function, Program, Reduce};
use flowtape_engine::gradcheck::Draw;
use flowtape_engine::meta::Meta;
use flowtape_engine::{DType, Device, Error, Gradients, Tape, Tensor, ops};
use flowtape_tests::devices::{gpus, is_slow};
use proptest::prelude::*;

use convolution::convolution;
use fused::{attention, dequantise, fused_backward, norm};
use world::*;

#[path = "contracts/convolution.rs"]
mod convolution;
#[path = "contracts/fused.rs"]
mod fused;
#[path = "contracts/world.rs"]
mod world;

/// A program and the same on numbers.
type Known = (Function, fn(&[f64]) -> Vec<f64>);

fn programs() -> Vec<Known> {
    vec![
        (Function::build(|[a]| [a * 2.0 + 1.0]), |x| vec![x[0] * 2.0 + 1.0]),
        (Function::build(|[a]| [a]), |x| vec![x[0]]),
        (Function::build(|[a, b]| [a + b]), |x| vec![x[0] + x[1]]),
        (Function::build(|[a, b]| [a - b, a * b]), |x| vec![x[0] - x[1], x[0] * x[1]]),
        (Function::build(|[a, b]| [b, a]), |x| vec![x[1], x[0]]),
        (Function::build(|[a, b, c]| [a + c, b, a * b]), |x| vec![x[0] + x[2], x[1], x[0] * x[1]]),
    ]
}

fn copy(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let (dtype, rank) = (world.float(), world.draw.size(0, 4));
    let memories = [world.memory(dtype), world.memory(dtype)];
    let other = world.percent(3).then(|| world.memory(DType::U32));
    let dims = world.dims(rank);
    let from = other.unwrap_or(world.draw.size(0, 1));
    let source = world.view(from, &dims, ANY);
    let (to, dims) = (world.pick(&memories), world.perturbed(&dims));
    let target = world.view(to, &dims, OUTPUT);
    let legal = source.tensor.dims() == target.tensor.dims()
        && source.tensor.dtype() == target.tensor.dtype()
        && world.on_one_device([&source, &target])
        && apart(&[&source], &[&target], false);
    let before = world.values();
    let answer = CopyTo { source: &source.tensor, target: &target.tensor }.run();
    check(&world, "copy", answer, legal, before, |all| {
        let values = world.read(all, &source);
        world.write(all, &target, values);
    })
}

/// The tensors' own method: whatever its source shares with it, the target holds what the source held.
fn copy_from(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let (dtype, rank) = (world.float(), world.draw.size(0, 4));
    let memory = world.memory(dtype);
    let dims = world.dims(rank);
    let (source, target) = (world.view(memory, &dims, ANY), world.view(memory, &dims, ANY));
    let legal = !target.repeats();
    let before = world.values();
    check(&world, "copy_from", target.tensor.copy_from(&source.tensor), legal, before, |all| {
        let values = world.read(all, &source);
        world.write(all, &target, values);
    })
}

/// Inputs and outputs for a program, and whether they keep the contract among themselves.
fn operands(world: &mut World<'_>, known: &Known, memories: &[usize], dims: &[usize]) -> (Vec<View>, Vec<View>, bool) {
    let inputs: Vec<View> = (0..known.0.inputs())
        .map(|_| {
            let (memory, dims) = (world.pick(memories), world.perturbed(dims));
            world.view(memory, &dims, ANY)
        })
        .collect();
    let outputs: Vec<View> = (0..known.0.outputs())
        .map(|_| {
            let own = world.draw.size(0, inputs.len() - 1);
            if world.percent(40) {
                let View { tensor, memory, places } = &inputs[own];
                return View { tensor: tensor.clone(), memory: *memory, places: places.clone() };
            }
            let (memory, dims) = (world.pick(memories), world.perturbed(dims));
            world.view(memory, &dims, OUTPUT)
        })
        .collect();
    let all = || inputs.iter().chain(&outputs);
    let dims = outputs[0].tensor.dims();
    let legal = all().all(|v| v.tensor.dims() == dims)
        && world.on_one_device(all())
        && apart(&refs(&inputs), &refs(&outputs), true);
    (inputs, outputs, legal)
}

fn apply(world: &World<'_>, known: &Known, inputs: &[View], outputs: &[View], all: &mut [Vec<f64>]) {
    let values: Vec<Vec<f64>> = inputs.iter().map(|v| world.read(all, v)).collect();
    let results: Vec<Vec<f64>> =
        (0..outputs[0].places.len()).map(|i| known.1(&values.iter().map(|v| v[i]).collect::<Vec<_>>())).collect();
    for (k, output) in outputs.iter().enumerate() {
        world.write(all, output, results.iter().map(|r| r[k]));
    }
}

fn pointwise(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let all = programs();
    let known = &all[world.draw.size(0, all.len() - 1)];
    let memories: Vec<usize> = (0..world.draw.size(1, 3))
        .map(|_| {
            let dtype = world.float();
            world.memory(dtype)
        })
        .collect();
    let rank = world.draw.size(0, 4);
    let dims = world.dims(rank);
    let (inputs, outputs, legal) = operands(&mut world, known, &memories, &dims);
    let (program, before) = (Program::of(&known.0), world.values());
    let answer =
        Pointwise { program: &program, inputs: &tensors(&inputs), scalars: &[], outputs: &tensors(&outputs) }.run();
    check(&world, "pointwise", answer, legal, before, |all| apply(&world, known, &inputs, &outputs, all))
}

fn pointwise_each(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let all = programs();
    let known = &all[world.draw.size(0, all.len() - 1)];
    let dtypes = [world.float(), world.float()];
    let memories: Vec<usize> = (0..6).map(|i| world.memory(dtypes[i % 2])).collect();
    let groups: Vec<(Vec<View>, Vec<View>, bool)> = (0..world.draw.size(1, 3))
        .map(|i| {
            let rank = world.draw.size(1, 2);
            let dims = world.dims(rank);
            // Each mostly on memories of its own.
            let own = if world.percent(90) { memories[2 * i..][..2].to_vec() } else { memories.clone() };
            operands(&mut world, known, &own, &dims)
        })
        .collect();
    let mut legal = groups.iter().all(|(.., legal)| *legal)
        && world.on_one_device(groups.iter().flat_map(|(i, o, _)| i.iter().chain(o)));
    for (g, (_, written, _)) in groups.iter().enumerate() {
        for (_, (inputs, outputs, _)) in groups.iter().enumerate().filter(|(other, _)| *other != g) {
            legal &= written.iter().all(|w| inputs.iter().chain(outputs).all(|v| !w.meets(v)));
        }
    }
    let (program, before) = (Program::of(&known.0), world.values());
    let calls: Vec<Group<'_>> = groups.iter().map(|(i, o, _)| (tensors(i), tensors(o))).collect();
    let answer = PointwiseEach { program: &program, groups: &calls, scalars: &[] }.run();
    check(&world, "pointwise_each", answer, legal, before, |all| {
        groups.iter().for_each(|(inputs, outputs, _)| apply(&world, known, inputs, outputs, all));
    })
}

fn reduce(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let all = programs();
    let known = &all[world.draw.size(0, all.len() - 1)];
    let kind = world.pick(&[Reduce::Sum, Reduce::Max]);
    let memories: Vec<usize> = (0..3)
        .map(|_| {
            let dtype = world.float();
            world.memory(dtype)
        })
        .collect();
    let rank = world.draw.size(0, 4);
    let dims = world.dims(rank);
    let kept: Vec<usize> = dims.iter().map(|&d| if world.percent(50) { 1 } else { d }).collect();
    let inputs: Vec<View> = (0..known.0.inputs())
        .map(|_| {
            let (memory, dims) = (world.pick(&memories[..2]), world.perturbed(&dims));
            world.view(memory, &dims, ANY)
        })
        .collect();
    let outputs: Vec<View> = (0..known.0.outputs())
        .map(|_| {
            let memory = if world.percent(90) { memories[2] } else { memories[0] };
            let dims = world.perturbed(&kept);
            world.view(memory, &dims, OUTPUT)
        })
        .collect();
    let (from, to) = (inputs[0].tensor.dims().to_vec(), outputs[0].tensor.dims().to_vec());
    let legal = inputs.iter().all(|v| v.tensor.dims() == from)
        && outputs.iter().all(|v| v.tensor.dims() == to)
        && from.len() == to.len()
        && from.iter().zip(&to).all(|(from, to)| from == to || *to == 1)
        && (to.contains(&0) || !from.contains(&0))
        && world.on_one_device(inputs.iter().chain(&outputs))
        && apart(&refs(&inputs), &refs(&outputs), false);
    let (program, before) = (Program::of(&known.0), world.values());
    let (ins, outs) = (tensors(&inputs), tensors(&outputs));
    let answer = Reduction { program: &program, kind, inputs: &ins, scalars: &[], outputs: &outs }.run();
    check(&world, "reduce", answer, legal, before, |all| {
        let values: Vec<Vec<f64>> = inputs.iter().map(|v| world.read(all, v)).collect();
        for (k, output) in outputs.iter().enumerate() {
            let mut sums = vec![if kind == Reduce::Sum { 0.0 } else { f64::NEG_INFINITY }; output.places.len()];
            for i in 0..inputs[0].places.len() {
                let value = known.1(&values.iter().map(|v| v[i]).collect::<Vec<_>>())[k];
                // Where position `i` of the inputs belongs.
                let (mut rest, mut at, mut step) = (i, 0, 1);
                for (from, to) in from.iter().zip(&to).rev() {
                    at += if *to == 1 { 0 } else { rest % from * step };
                    rest /= from;
                    step *= to;
                }
                sums[at] = if kind == Reduce::Sum { sums[at] + value } else { sums[at].max(value) };
            }
            world.write(all, output, sums);
        }
    })
}

fn matmul(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let dtype = world.float();
    let rank = world.draw.size(0, 2);
    let batch = world.dims(rank);
    let size = |world: &mut World<'_>| if world.percent(2) { 0 } else { world.draw.size(1, 5) };
    let [m, k, n] = [size(&mut world), size(&mut world), size(&mut world)];
    let to = if world.percent(20) { DType::F32 } else { dtype };
    let factors = [world.memory(dtype), world.memory(dtype)];
    let other = [DType::U32, DType::F32][world.draw.size(0, 1)];
    let wrong = world.memory(other);
    let result = world.memory(to);
    let factor = |world: &mut World<'_>, dims: &[usize], memory: usize, odds: Odds| {
        let memory = if world.percent(2) { wrong } else { memory };
        let dims = world.perturbed(&[&batch[..], dims].concat());
        world.view(memory, &dims, odds)
    };
    let (a, b) = (factor(&mut world, &[m, k], factors[0], ANY), factor(&mut world, &[k, n], factors[1], ANY));
    let bias = world.percent(40).then(|| {
        let dims = world.perturbed(&[n]);
        world.view(factors[0], &dims, ANY)
    });
    let own = if world.percent(95) { result } else { factors[1] };
    let out = factor(&mut world, &[m, n], own, OUTPUT);
    let accumulate = world.percent(40);
    let reads: Vec<&View> = [&a, &b].into_iter().chain(&bias).collect();
    let fits = |a: &[usize], b: &[usize], out: &[usize]| match (a, b, out) {
        ([a @ .., m, k], [b @ .., k2, n], [out @ .., m2, n2]) => {
            a == b && a == out && k == k2 && m == m2 && n == n2 && bias.as_ref().is_none_or(|v| v.tensor.dims() == [*n])
        }
        _ => false,
    };
    let (from, result) = (a.tensor.dtype(), out.tensor.dtype());
    let legal = fits(a.tensor.dims(), b.tensor.dims(), out.tensor.dims())
        && from.is_float()
        && reads.iter().all(|v| v.tensor.dtype() == from)
        && (result == from || (from.size() == 2 && result == DType::F32))
        && world.on_one_device(reads.iter().copied().chain([&out]))
        && apart(&reads, &[&out], false);
    let before = world.values();
    let call =
        MatMul { a: &a.tensor, b: &b.tensor, bias: bias.as_ref().map(|v| &v.tensor), accumulate, out: &out.tensor };
    check(&world, "matmul", call.run(), legal, before, |all| {
        let [a, b, mut c] = [&a, &b, &out].map(|v| world.read(all, v));
        let bias = bias.as_ref().map(|v| world.read(all, v));
        let [m, n] = out.tensor.dims()[out.tensor.rank() - 2..] else { unreachable!() };
        let k = call.a.dims()[out.tensor.rank() - 1];
        for (at, c) in c.iter_mut().enumerate() {
            let (batch, i, j) = (at / (m * n), at / n % m, at % n);
            let sum: f64 = (0..k).map(|l| a[(batch * m + i) * k + l] * b[(batch * k + l) * n + j]).sum();
            *c = sum + bias.as_ref().map_or(0.0, |b| b[j]) + if accumulate { *c } else { 0.0 };
        }
        world.write(all, &out, c);
    })
}

/// Rows by index, and back.
fn rows(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let (dtype, rank) = (world.float(), world.draw.size(0, 2));
    let (table, taken, index) = (world.memory(dtype), world.memory(dtype), world.memory_of(DType::U32, |_| 0.0));
    let [rows, count] = [world.draw.size(9, 12), world.draw.size(1, 6)];
    let width: Vec<usize> = (0..rank).map(|_| world.draw.size(1, 3)).collect();
    let view = |world: &mut World<'_>, memory: usize, lead: usize, width: &[usize]| {
        let memory = if world.percent(2) { index } else { memory };
        let dims = world.perturbed(&[&[lead][..], width].concat());
        world.view(memory, &dims, PLAIN)
    };
    let whole = view(&mut world, table, rows, &width);
    let own = if world.percent(97) { taken } else { table };
    let part = view(&mut world, own, count, &width);
    let at = view(&mut world, index, count, &[]);
    // Rows that exist; some several times.
    let places: Vec<u32> = at.places.iter().map(|place| (place * 7 % 9) as u32).collect();
    if at.tensor.dtype() == DType::U32 && !at.repeats() && at.tensor.device().same(world.device) {
        let values = Tensor::from_slice(&places, at.tensor.dims(), world.device).unwrap();
        at.tensor.copy_from(&values).unwrap();
    }
    let fits = |whole: &View, part: &View| {
        let (t, p) = (whole.tensor.dims(), part.tensor.dims());
        at.tensor.dtype() == DType::U32
            && at.tensor.rank() == 1
            && !t.is_empty()
            && t.len() == p.len()
            && t[1..] == p[1..]
            && p[0] == at.tensor.dims()[0]
            && whole.tensor.dtype() == part.tensor.dtype()
            && [whole, part, &at].iter().all(|v| v.is_dense())
            && world.on_one_device([whole, part, &at])
    };
    let row = |values: &[f64], i: usize, width: usize| values[i * width..][..width].to_vec();
    let numbers = |all: &[Vec<f64>]| world.read(all, &at);
    let width: usize = whole.tensor.dims().iter().skip(1).product();

    let before = world.values();
    let legal = fits(&whole, &part) && apart(&[&whole, &at], &[&part], false);
    let answer = Gather { table: &whole.tensor, index: &at.tensor, out: &part.tensor }.run();
    check(&world, "gather", answer, legal, before, |all| {
        let table = world.read(all, &whole);
        let taken: Vec<f64> = numbers(all).iter().flat_map(|&i| row(&table, i as usize, width)).collect();
        world.write(all, &part, taken);
    });

    let before = world.values();
    let legal = fits(&whole, &part) && whole.tensor.dtype().is_float() && apart(&[&part, &at], &[&whole], false);
    let answer = ScatterAdd { rows: &part.tensor, index: &at.tensor, out: &whole.tensor }.run();
    check(&world, "scatter_add", answer, legal, before, |all| {
        let (mut sums, added) = (world.read(all, &whole), world.read(all, &part));
        for (i, to) in numbers(all).into_iter().enumerate() {
            for col in 0..width {
                sums[to as usize * width + col] += added[i * width + col];
            }
        }
        world.write(all, &whole, sums);
    })
}

/// Bytes to memory and back, too many of them, and those of another device.
fn bytes(seed: u64, device: &Device) {
    let (mut draw, backend) = (Draw::new(seed), device.backend());
    let size = draw.size(1, 3000);
    let data: Vec<u8> = (0..size).map(|_| draw.size(0, 255) as u8).collect();
    let (size, data) = (4 * size, data.repeat(4));
    // What the host keeps of small tensors must not outlive a write.
    let target = Tensor::from_bytes(&vec![0; size], &[size / 4], DType::U32, device).unwrap();
    Upload { bytes: &data, target: &target }.run().unwrap();
    assert_eq!(target.to_bytes().unwrap(), data);
    let buffer = target.storage().buffer();
    let start = draw.size(0, size);
    let part = start..draw.size(start, size);
    assert_eq!(backend.download(buffer, part.clone()).unwrap(), data[part.clone()]);
    assert_eq!(backend.read_later(buffer, part.clone()).unwrap().wait().unwrap(), data[part]);
    // Memory comes in classes of sizes.
    let beyond = 2 * size + 4096;
    let wrong = [vec![1; beyond], vec![1; size - 1]];
    assert!(wrong.iter().all(|bytes| Upload { bytes, target: &target }.run().is_err()));
    let part = target.narrow(0, 0, size / 4 - 1).unwrap();
    assert!(Upload { bytes: &data[..size - 4], target: &part }.run().is_err());
    assert!(backend.download(buffer, 0..beyond).is_err() && backend.read_later(buffer, beyond - 1..beyond).is_err());
    let meta = Meta::default().device();
    let foreign = meta.backend().alloc(size).unwrap();
    let errors =
        [backend.download(&*foreign, 0..size).unwrap_err(), backend.read_later(&*foreign, 0..size).unwrap_err()];
    assert!(errors.iter().all(|e| matches!(e, Error::Device { .. })), "{errors:?}");
    assert_eq!(target.to_bytes().unwrap(), data);
}

/// A method with operands of a seed on a device; whether they kept the contract.
type Drive = fn(u64, &Device) -> bool;

const METHODS: [(&str, Drive); 12] = [
    ("copy", copy),
    ("copy_from", copy_from),
    ("pointwise", pointwise),
    ("pointwise_each", pointwise_each),
    ("reduce", reduce),
    ("matmul", matmul),
    ("rows", rows),
    ("norm", norm),
    ("attention", attention),
    ("convolution", convolution),
    ("dequantise", dequantise),
    ("fused backward", fused_backward),
];

fn drive(seed: u64, device: &Device) {
    bytes(seed, device);
    METHODS.iter().for_each(|(_, method)| {
        method(seed, device);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_cpu_keeps_its_contracts(seed in any::<u64>()) {
        drive(seed, &Device::cpu());
    }
}

/// As many calls as a device's compiler has time for.
#[test]
fn gpus_keep_their_contracts() {
    for device in gpus() {
        (0..if is_slow(device) { 15 } else { 60 }).for_each(|seed| drive(seed, device));
    }
}

/// A good part of the calls keeps the contract, and a good part does not.
#[test]
fn both_kinds_of_calls_are_driven() {
    for (name, method) in METHODS {
        let legal = (0..200).filter(|&seed| method(seed, &Device::cpu())).count();
        assert!((40..=190).contains(&legal), "{name}: {legal} of 200 calls are legal");
    }
}

/// As in PyTorch: NaN is no number that a comparison could take away.
#[test]
fn nan_goes_through() {
    let values = [f32::NAN, -1.0, -0.0, 0.0, 0.5, 2.0, f32::INFINITY, f32::NEG_INFINITY];
    for device in [Device::cpu()].iter().chain(gpus()) {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let x = Tensor::from_slice(&values, &[8], device).unwrap().to_dtype(dtype).unwrap();
            let y = x.narrow(0, 1, 1).unwrap();
            let read = |t: Tensor| t.to_vec::<f32>().unwrap();
            let tape = Tape::new();
            let leaf = tape.leaf(&x);
            let relu = leaf.relu().unwrap();
            let ones = Tensor::ones(&[8], dtype, device).unwrap();
            let mut gradients = Gradients::default();
            tape.backward_with(&[(&relu, &ones)], &mut gradients).unwrap();
            let relu = read(relu);
            assert!(relu[0].is_nan() && relu[1..] == [0.0, 0.0, 0.0, 0.5, 2.0, f32::INFINITY, 0.0], "{relu:?}");
            let slope = read(gradients.of(&leaf).unwrap().clone());
            assert_eq!(slope, [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]);
            for (i, result) in [x.maximum(&y), y.maximum(&x), x.minimum(&y), y.minimum(&x)].into_iter().enumerate() {
                let result = read(result.unwrap());
                assert!(result[0].is_nan() && result[1..].iter().all(|v| !v.is_nan()), "{i}: {result:?}");
            }
            for f in
                [Tensor::exp, Tensor::tanh, Tensor::sigmoid, Tensor::silu, Tensor::gelu, Tensor::gelu_erf, Tensor::sqrt]
            {
                assert!(read(f(&x).unwrap())[0].is_nan());
            }
            let rows = Tensor::cat(&[&x.narrow(0, 0, 4).unwrap(), &ones.narrow(0, 0, 4).unwrap()], 0).unwrap();
            let rows = rows.reshape(&[2, 4]).unwrap();
            for reduced in [rows.sum(&[1], false), rows.max(&[1], false)] {
                let reduced = read(reduced.unwrap());
                assert!(reduced[0].is_nan() && !reduced[1].is_nan(), "{reduced:?}");
            }
            for whole in [rows.softmax(1), ops::layer_norm(&rows, None, None, 1e-5), ops::rms_norm(&rows, None, 1e-5)] {
                let whole = read(whole.unwrap());
                assert!(whole[..4].iter().all(|v| v.is_nan()) && whole[4..].iter().all(|v| !v.is_nan()), "{whole:?}");
            }
            let q = rows.reshape(&[1, 1, 2, 4]).unwrap();
            let k = Tensor::ones(&[1, 1, 3, 4], dtype, device).unwrap();
            let attended = read(ops::attention(&q, &k, &k, None, None).unwrap());
            assert!(attended[..4].iter().all(|v| v.is_nan()) && attended[4..] == [1.0; 4], "{attended:?}");
        }
    }
}
