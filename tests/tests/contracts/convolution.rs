//! The convolution's call: in one to three dimensions, with steps, gaps, groups and every padding.

use flowtape_engine::Device;
use flowtape_engine::backend::run_fused;
use flowtape_engine::ops::{ConvAxis, ConvForward, Padding};

use super::world::{ANY, OUTPUT, Odds, View, World, apart, near, number};

/// Where the value at a place of the padded axis comes from, by the definition of each padding.
fn source(axis: &ConvAxis, size: usize, at: i64) -> Option<usize> {
    let (at, last) = (at - axis.before as i64, size as i64 - 1);
    match axis.padding {
        Padding::Zeros => (0..=last).contains(&at).then_some(at as usize),
        Padding::Replicate => Some(at.clamp(0, last) as usize),
        Padding::Reflect => Some(if at < 0 {
            -at
        } else if at > last {
            2 * last - at
        } else {
            at
        } as usize),
    }
}

/// The number of an element by its place on each axis.
fn flat(at: &[usize], dims: &[usize]) -> usize {
    at.iter().zip(dims).fold(0, |flat, (at, dim)| flat * dim + at)
}

/// All places of some axes, the last one fastest.
fn places(dims: &[usize]) -> Vec<Vec<usize>> {
    let all = (0..dims.iter().product()).map(|mut index: usize| {
        let mut at = vec![0; dims.len()];
        for (at, dim) in at.iter_mut().zip(dims).rev() {
            *at = index % dim;
            index /= dim;
        }
        at
    });
    all.collect()
}

pub fn convolution(seed: u64, device: &Device) -> bool {
    let mut world = World::new(seed, device);
    let dtype = world.float();
    let rank = world.draw.size(1, 3);
    let groups = world.draw.size(1, 2);
    let (batch, width, outputs) = (world.draw.size(1, 2), world.draw.size(1, 2), world.draw.size(1, 2) * groups);
    let sizes: Vec<usize> = (0..rank).map(|_| world.draw.size(3, 4)).collect();
    let kernel: Vec<usize> = (0..rank).map(|_| world.draw.size(1, 2)).collect();
    let axes: Vec<ConvAxis> = (0..rank)
        .map(|_| ConvAxis {
            stride: if world.percent(1) { 0 } else { world.draw.size(1, 2) },
            dilation: world.draw.size(1, 2),
            before: world.draw.size(0, 2),
            after: world.draw.size(0, 2),
            padding: world.pick(&[Padding::Zeros, Padding::Replicate, Padding::Reflect]),
        })
        .collect();
    let result: Option<Vec<usize>> =
        axes.iter().zip(&sizes).zip(&kernel).map(|((axis, size), kernel)| axis.output(*size, *kernel)).collect();
    let dims = |lead: [usize; 2], rest: &[usize]| [&lead[..], rest].concat();
    let memories = [0; 3].map(|_| world.memory_of(dtype, number));
    let view = |world: &mut World<'_>, memory: usize, dims: &[usize], odds: Odds| {
        let dims = if world.percent(60) { world.perturbed(dims) } else { dims.to_vec() };
        world.view(memory, &dims, odds)
    };
    let x = view(&mut world, memories[0], &dims([batch, width * groups], &sizes), ANY);
    let weight = view(&mut world, memories[1], &dims([outputs, width], &kernel), ANY);
    let bias = world.percent(50).then(|| view(&mut world, memories[1], &[outputs], ANY));
    let own = if world.percent(97) { memories[2] } else { memories[0] };
    let y = view(&mut world, own, &dims([batch, outputs], result.as_deref().unwrap_or(&sizes)), OUTPUT);
    let reads: Vec<&View> = [&x, &weight].into_iter().chain(&bias).collect();
    let result = result_of(x.tensor.dims(), weight.tensor.dims(), &axes, groups);
    let fits = result.as_ref().is_some_and(|result| *result == y.tensor.dims())
        && bias.as_ref().is_none_or(|bias| bias.tensor.dims() == &weight.tensor.dims()[..1]);
    let legal = fits && world.on_one_device(reads.iter().copied().chain([&y])) && apart(&reads, &[&y], false);
    let before = world.values();
    let call = ConvForward {
        x: &x.tensor,
        weight: &weight.tensor,
        bias: bias.as_ref().map(|bias| &bias.tensor),
        axes: &axes,
        groups,
        y: &y.tensor,
    };
    let answer = run_fused(call);
    let mut results = Vec::new();
    if legal {
        let [values, weights] = [&x, &weight].map(|view| world.read(&before, view));
        let added = bias.as_ref().map(|bias| world.read(&before, bias));
        let (of_x, of_weight) = (x.tensor.dims(), weight.tensor.dims());
        let (outputs, width) = (of_weight[0], of_weight[1]);
        for at in places(y.tensor.dims()) {
            let group = at[1] / (outputs / groups);
            let mut sum = added.as_ref().map_or(0.0, |added| added[at[1]]);
            for tap in places(&of_weight[1..]) {
                let from = axes.iter().enumerate().map(|(i, axis)| {
                    source(axis, of_x[2 + i], (at[2 + i] * axis.stride + tap[1 + i] * axis.dilation) as i64)
                });
                let Some(from) = from.collect::<Option<Vec<usize>>>() else { continue };
                let place = [&[at[0], group * width + tap[0]], &from[..]].concat();
                sum += values[flat(&place, of_x)] * weights[flat(&[&[at[1]], &tap[..]].concat(), of_weight)];
            }
            results.push(sum);
        }
    }
    near(&world, "convolution", answer, legal, &before, &[(&y, results)])
}

/// Sizes of the result, or nothing where the operands do not fit.
fn result_of(x: &[usize], weight: &[usize], axes: &[ConvAxis], groups: usize) -> Option<Vec<usize>> {
    let (&[batch, channels, ref sizes @ ..], &[outputs, width, ref kernel @ ..]) = (x, weight) else { return None };
    let fits = sizes.len() == axes.len() && kernel.len() == axes.len() && width * groups == channels;
    let all = axes.iter().zip(sizes).zip(kernel).map(|((axis, size), kernel)| axis.output(*size, *kernel));
    let all = all.collect::<Option<Vec<usize>>>().filter(|_| fits && outputs.is_multiple_of(groups))?;
    Some([&[batch, outputs], &all[..]].concat())
}
