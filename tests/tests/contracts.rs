//! Every method of every backend with random views, legal and illegal: expanded, permuted, cut out of the middle, on one
//! memory with others or on none. A legal call gives what a naive reference gives, and writes nothing beside its outputs; an
//! illegal one is an error, and writes nothing at all.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use flowtape_engine::backend::call::{
    Call, CopyTo, Gather, Group, MatMul, Pointwise, PointwiseEach, Reduction, ScatterAdd, Upload,
};
use flowtape_engine::backend::{Ran, run_fused};
use flowtape_engine::cpu::Cpu;
use flowtape_engine::expr::{Function, Program, Reduce};
use flowtape_engine::gradcheck::Draw;
use flowtape_engine::meta::Meta;
use flowtape_engine::ops::{
    AttentionBackward, AttentionForward, ModulatedNormBackward, NormBackward, NormForward, NormRopeBackward, RopeLayout,
};
use flowtape_engine::quant::{Dequantise, FORMATS, Parts};
use flowtape_engine::{DType, Device, Error, Gradients, Tape, Tensor, ops};
use flowtape_tests::devices::{gpus, is_slow};
use half::{bf16, f16};
use proptest::prelude::*;

#[path = "contracts/convolution.rs"]
mod convolution;

use convolution::convolution;

/// Elements of a memory: a few views of small sizes, which often meet.
const LEN: usize = 2048;

/// Numbers in one allocation, and a twin that says where each of them lies.
struct Memory {
    flat: Tensor,
    places: Tensor,
}

impl Memory {
    fn new(draw: &mut Draw, dtype: DType, device: &Device, values: impl Fn(&mut Draw) -> f64) -> Self {
        let values: Vec<f64> = (0..LEN).map(|_| values(draw)).collect();
        let flat = Tensor::from_slice(&values, &[LEN], &Device::cpu()).unwrap().to_dtype(dtype).unwrap();
        let places: Vec<u32> = (0..LEN as u32).collect();
        let places = Tensor::from_slice(&places, &[LEN], &Device::cpu()).unwrap();
        Self { flat: flat.to_device(device).unwrap(), places }
    }
}

/// Whole numbers that every dtype holds, as their sums and products of two.
fn small(draw: &mut Draw) -> f64 {
    draw.size(0, 8) as f64
}

/// A window on one of the memories, and where its elements lie, row-major.
struct View {
    tensor: Tensor,
    memory: usize,
    places: Vec<usize>,
}

impl View {
    fn repeats(&self) -> bool {
        let mut sorted = self.places.clone();
        sorted.sort_unstable();
        sorted.windows(2).any(|w| w[0] == w[1])
    }

    fn meets(&self, other: &Self) -> bool {
        self.memory == other.memory && self.places.iter().any(|place| other.places.contains(place))
    }

    fn is(&self, other: &Self) -> bool {
        self.memory == other.memory && self.places == other.places
    }

    fn is_dense(&self) -> bool {
        self.places.windows(2).all(|w| w[1] == w[0] + 1)
    }
}

/// How likely a view is something other than a plain tensor, in percent.
#[derive(Clone, Copy)]
struct Odds {
    expanded: usize,
    padded: usize,
    turned: usize,
}

const ANY: Odds = Odds { expanded: 10, padded: 30, turned: 40 };
const OUTPUT: Odds = Odds { expanded: 2, ..ANY };
const PLAIN: Odds = Odds { expanded: 1, padded: 3, turned: 5 };

struct World<'a> {
    draw: Draw,
    device: &'a Device,
    memories: Vec<Memory>,
}

impl<'a> World<'a> {
    fn new(seed: u64, device: &'a Device) -> Self {
        Self { draw: Draw::new(seed), device, memories: Vec::new() }
    }

    fn percent(&mut self, odds: usize) -> bool {
        self.draw.size(0, 99) < odds
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.draw.size(0, all.len() - 1)]
    }

    /// Another memory: mostly on the device, sometimes on another.
    fn memory(&mut self, dtype: DType) -> usize {
        self.memory_of(dtype, small)
    }

    fn memory_of(&mut self, dtype: DType, values: impl Fn(&mut Draw) -> f64) -> usize {
        let other = self.percent(1).then(|| Device::new(Cpu::default()));
        let device = other.as_ref().unwrap_or(self.device);
        let memory = Memory::new(&mut self.draw, dtype, device, values);
        self.memories.push(memory);
        self.memories.len() - 1
    }

    /// A float dtype that the device computes in.
    fn float(&mut self) -> DType {
        let all = [DType::F32, DType::BF16, DType::F16, DType::F64];
        let count = if self.device.backend().has_f64() { 4 } else { 3 };
        self.pick(&all[..count])
    }

    fn dims(&mut self, rank: usize) -> Vec<usize> {
        (0..rank).map(|_| if self.percent(2) { 0 } else { self.draw.size(1, 4) }).collect()
    }

    /// The dims, mostly; sometimes others.
    fn perturbed(&mut self, dims: &[usize]) -> Vec<usize> {
        let mut dims = dims.to_vec();
        if self.percent(3) {
            match self.draw.size(0, 2) {
                0 => dims.push(1),
                1 => drop(dims.pop()),
                _ => dims.iter_mut().for_each(|d| *d += 1),
            }
        }
        dims
    }

    /// A window of these dims on a memory.
    fn view(&mut self, memory: usize, dims: &[usize], odds: Odds) -> View {
        let rank = dims.len();
        let mut order: Vec<usize> = (0..rank).collect();
        if self.percent(odds.turned) && rank > 1 {
            let (a, b) = (self.draw.size(0, rank - 1), self.draw.size(0, rank - 1));
            order.swap(a, b);
        }
        let mut inverse = vec![0; rank];
        order.iter().enumerate().for_each(|(i, &axis)| inverse[axis] = i);
        let (mut before, mut stored) = (vec![0; rank], dims.to_vec());
        for axis in 0..rank {
            if self.percent(odds.expanded) && dims[axis] > 0 {
                stored[axis] = 1;
            } else if self.percent(odds.padded) {
                before[axis] = self.draw.size(0, 1);
                stored[axis] = dims[axis] + before[axis] + self.draw.size(0, 1);
            }
        }
        if stored.iter().product::<usize>() > LEN {
            (before, stored) = (vec![0; rank], dims.to_vec());
        }
        let total: usize = stored.iter().product();
        let offset = self.draw.size(0, LEN - total);
        let cut = |flat: &Tensor| {
            let lying: Vec<usize> = order.iter().map(|&axis| stored[axis]).collect();
            let mut view = flat.narrow(0, offset, total)?.reshape(&lying)?.permute(&inverse)?;
            for axis in 0..rank {
                if stored[axis] != 1 || dims[axis] == 1 {
                    view = view.narrow(axis, before[axis], dims[axis])?;
                }
            }
            view.expand(dims)
        };
        let Memory { flat, places } = &self.memories[memory];
        let (tensor, places) = (cut(flat).unwrap(), cut(places).unwrap().to_vec::<u32>().unwrap());
        View { tensor, memory, places: places.into_iter().map(|place| place as usize).collect() }
    }

    /// What all memories hold.
    fn values(&self) -> Vec<Vec<f64>> {
        self.memories.iter().map(|m| m.flat.to_vec::<f64>().unwrap()).collect()
    }

    fn read(&self, all: &[Vec<f64>], view: &View) -> Vec<f64> {
        view.places.iter().map(|&place| all[view.memory][place]).collect()
    }

    /// Writes numbers as the memory's dtype rounds them.
    fn write(&self, all: &mut [Vec<f64>], view: &View, values: impl IntoIterator<Item = f64>) {
        let dtype = self.memories[view.memory].flat.dtype();
        for (&place, value) in view.places.iter().zip(values) {
            all[view.memory][place] = rounded(dtype, value);
        }
    }

    fn on_one_device<'v>(&self, views: impl IntoIterator<Item = &'v View>) -> bool {
        let mut devices = views.into_iter().map(|v| v.tensor.device());
        let first = devices.next();
        devices.all(|d| first.is_some_and(|first| first.same(d)))
    }
}

fn rounded(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F64 => value,
        DType::F32 => f64::from(value as f32),
        DType::BF16 => bf16::from_f64(value).to_f64(),
        DType::F16 => f16::from_f64(value).to_f64(),
        DType::U32 => f64::from(value as u32),
    }
}

/// What is written meets nothing else that is written, and of what is read at most itself, where that is allowed.
fn apart(reads: &[&View], writes: &[&View], in_place: bool) -> bool {
    writes.iter().enumerate().all(|(i, w)| {
        !w.repeats()
            && writes[i + 1..].iter().all(|other| !w.meets(other))
            && reads.iter().all(|r| !w.meets(r) || (in_place && w.is(r)))
    })
}

fn refs(views: &[View]) -> Vec<&View> {
    views.iter().collect()
}

fn tensors(views: &[View]) -> Vec<&Tensor> {
    views.iter().map(|v| &v.tensor).collect()
}

/// Compares a call's answer with what is right: an error that changes nothing, or `after`.
fn check(
    world: &World<'_>,
    what: &str,
    answer: Result<(), Error>,
    legal: bool,
    before: Vec<Vec<f64>>,
    after: impl FnOnce(&mut Vec<Vec<f64>>),
) -> bool {
    let mut expected = before;
    match (answer, legal) {
        (Ok(()), true) => after(&mut expected),
        (Err(error), false) => assert!(!matches!(error, Error::DeviceFailed { .. }), "{what}: {error}"),
        (Ok(()), false) => panic!("{what}: what breaks the contract was done"),
        (Err(error), true) => panic!("{what}: {error}"),
    }
    for (memory, (got, expected)) in world.values().iter().zip(&expected).enumerate() {
        if let Some(place) = (0..LEN).find(|&i| got[i].to_bits() != expected[i].to_bits() && got[i] != expected[i]) {
            let dtype = world.memories[memory].flat.dtype();
            panic!("{what}: memory {memory} ({dtype}) at {place}: {} instead of {}", got[place], expected[place]);
        }
    }
    legal
}

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

/// A fused call writes its outputs and nothing else; what it writes is near the reference.
fn near(
    world: &World<'_>,
    what: &str,
    answer: Result<Ran, Error>,
    legal: bool,
    before: &[Vec<f64>],
    outputs: &[(&View, Vec<f64>)],
) -> bool {
    let after = world.values();
    let written = |memory: usize, place: usize| {
        outputs.iter().find_map(|(v, values)| {
            let at = v.places.iter().position(|&p| p == place).filter(|_| v.memory == memory)?;
            Some((values.get(at).copied().unwrap_or(f64::NAN), v.tensor.dtype()))
        })
    };
    let ran = match (answer, legal) {
        (Ok(ran), true) => ran == Ran::Done,
        (Err(_), false) => false,
        (Ok(_), false) => panic!("{what}: what breaks the contract was done"),
        (Err(error), true) => panic!("{what}: {error}"),
    };
    for (memory, (got, before)) in after.iter().zip(before).enumerate() {
        for place in 0..LEN {
            match written(memory, place).filter(|_| legal) {
                None => assert_eq!(got[place].to_bits(), before[place].to_bits(), "{what}: beside its outputs"),
                Some((expected, dtype)) if ran => {
                    let unit = if dtype == DType::F32 { 1e-5 } else { 2f64.powi(-6) };
                    let off = (got[place] - expected).abs();
                    assert!(off <= unit * (1.0 + expected.abs()), "{what}: {} instead of {expected}", got[place]);
                }
                Some(_) => {}
            }
        }
    }
    legal
}

fn number(draw: &mut Draw) -> f64 {
    draw.number(-2.0, 2.0)
}

fn norm(seed: u64, device: &Device) -> bool {
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

fn attention(seed: u64, device: &Device) -> bool {
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
fn fused_backward(seed: u64, device: &Device) -> bool {
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
fn dequantise(seed: u64, device: &Device) -> bool {
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

/// A call that has the right shapes or not: it is done or declined, or an error, and writes its outputs at most.
fn kept_to_itself(
    world: &World<'_>,
    what: &str,
    call: impl FnOnce() -> Result<Ran, Error>,
    fits: bool,
    reads: &[&View],
    writes: &[&View],
) -> bool {
    let legal = fits && apart(reads, writes, false) && world.on_one_device(reads.iter().chain(writes).copied());
    let before = world.values();
    let answer = call();
    assert_eq!(answer.is_ok(), legal, "{what}: {answer:?}");
    for (memory, (after, before)) in world.values().iter().zip(&before).enumerate() {
        for place in 0..LEN {
            let own = legal && writes.iter().any(|v| v.memory == memory && v.places.contains(&place));
            assert!(own || after[place].to_bits() == before[place].to_bits(), "{what}: beside its outputs");
            // Large probabilities may exceed f16.
            let finite = after[place].is_finite() || world.memories[memory].flat.dtype() == DType::F16;
            assert!(!own || !matches!(answer, Ok(Ran::Done)) || finite, "{what}: {}", after[place]);
        }
    }
    legal
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
