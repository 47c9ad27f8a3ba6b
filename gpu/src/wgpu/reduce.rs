//! Reductions with a program as prologue. The tree depends on shapes and strides alone: a workgroup's lanes stride over
//! a chunk of the reduced positions, their results are joined in halves; the results of several chunks are reduced again.

use std::sync::Arc;

use flowtape_engine::Result;
use flowtape_engine::expr::{Function, Program, Reduce};
use flowtape_engine::space::{Space, memory_order};

use super::pointwise::{self, Body, halves};
use super::queue::{Gpu, Launch};
use super::view::{Access, View};
use super::wgsl::{self, SpaceParams, THREADS, combined, neutral};

/// Terms of a lane below which another chunk is not worth it.
const TERMS: usize = 16;
/// Workgroups that keep a device busy.
const WORKGROUPS: usize = 1024;

/// `outputs = kind of program(inputs)` over the axes where the outputs have size 1.
pub(super) fn run(
    gpu: &Gpu,
    program: &Program,
    kind: Reduce,
    inputs: &[View],
    scalars: &[f32],
    outputs: &[View],
) -> Result<()> {
    let (Some(first), Some(target)) = (inputs.first(), outputs.first()) else { return Ok(()) };
    let dims = &first.dims;
    let reduced = |axis: usize| target.dims[axis] == 1 && dims[axis] != 1;
    let used: Vec<usize> = (0..inputs.len()).filter(|&i| wgsl::reads(program.lowered(), i)).collect();
    if let Some(large) = used.iter().map(|&i| &inputs[i]).find(|v| !gpu.bounds.binding.fits(v))
        && let Some(axis) = large.longest_axis()
    {
        return in_parts(gpu, program, kind, (inputs, scalars, outputs), axis, reduced(axis));
    }
    let used_views: Vec<View> = used.iter().map(|&i| inputs[i].clone()).collect();
    let packed = gpu.packed(&used_views, outputs)?;
    let ins = &packed.inputs;

    let strides: Vec<&[usize]> = ins.iter().chain(outputs).map(|v| &v.strides[..]).collect();
    let order = memory_order(&first.strides);
    let kept = Space::new(dims, &strides, order.iter().copied().filter(|&a| !reduced(a)));
    let summed = Space::new(dims, &strides[..ins.len()], order.iter().copied().filter(|&a| reduced(a)));
    let inner = order.into_iter().rev().find(|&a| dims[a] != 1);
    let (n_kept, n_summed) = (kept.len(), summed.len());
    // Neighbouring threads read neighbouring elements, of one result or of several.
    let along = inner.is_none_or(reduced);
    let lanes = if along {
        n_summed.next_power_of_two().clamp(8, THREADS)
    } else {
        THREADS / n_kept.next_power_of_two().min(32)
    };
    let tiles = n_kept.div_ceil(THREADS / lanes);
    let chunks = (n_summed / (lanes * TERMS)).clamp(1, (WORKGROUPS / tiles).max(1));
    let chunk = n_summed.div_ceil(chunks);

    // Partial results, `[outputs, kept, chunks]`.
    let scratch = if chunks > 1 { Some(gpu.scratch(&[outputs.len(), n_kept, chunks])?) } else { None };
    let partial = |m: usize| {
        let (_, all) = scratch.as_ref()?;
        let dims = [&kept.dims[..], &[chunks]].concat();
        let mut view = View::plain(&all.block, all.dtype, &dims);
        view.offset = m * n_kept * chunks;
        Some(view)
    };
    let partials: Vec<View> = (0..outputs.len()).filter_map(partial).collect();
    let targets = if partials.is_empty() { outputs } else { &partials };
    let operands: Vec<(&View, Access)> =
        ins.iter().map(|v| (v, Access::Read)).chain(targets.iter().map(|v| (v, Access::Write))).collect();

    let mut space = kept.clone();
    if chunks > 1 {
        for (m, view) in partials.iter().enumerate() {
            space.strides[ins.len() + m] = view.strides[..kept.dims.len()].to_vec();
        }
    }
    let mut params = [n_kept, n_summed, chunk, chunks, tiles].map(|n| n as u32).to_vec();
    params.extend(wgsl::space_values(&space));
    params.extend(wgsl::space_values(&summed));
    params.extend(scalars.iter().map(|s| s.to_bits()));
    let text = Text {
        kind,
        used,
        inputs: inputs.len(),
        outputs: outputs.len(),
        along,
        lanes,
        kept: kept.dims.len(),
        summed: summed.dims.len(),
    };
    let launch = Launch {
        name: "reduce",
        shape: vec![
            program.id(),
            u64::from(kind == Reduce::Max),
            u64::from(along),
            lanes as u64,
            text.kept as u64,
            text.summed as u64,
        ],
        operands: &operands,
        params: &params,
        workgroups: tiles * chunks,
    };
    gpu.launch(&launch, || text.source(program))?;
    for (m, view) in partials.iter().enumerate() {
        let mut dims = kept.dims.clone();
        dims.push(1);
        let strides = [&kept.strides[ins.len() + m][..], &[0]].concat();
        let output = View { dims: dims.into(), strides: strides.into(), ..outputs[m].clone() };
        run(gpu, &identity(), kind, std::slice::from_ref(view), &[], &[output])?;
    }
    Ok(())
}

fn identity() -> Arc<Program> {
    Program::of(&Function::build(|[x]| [x]))
}

/// Halves along an axis: of the results, or of the terms, whose results are then joined.
fn in_parts(
    gpu: &Gpu,
    program: &Program,
    kind: Reduce,
    (inputs, scalars, outputs): (&[View], &[f32], &[View]),
    axis: usize,
    reduced: bool,
) -> Result<()> {
    let all: Vec<View> = inputs.iter().chain(outputs).cloned().collect();
    let [first, second] = halves(&all, axis);
    let (a, b) = (first.split_at(inputs.len()), second.split_at(inputs.len()));
    if !reduced {
        run(gpu, program, kind, a.0, scalars, a.1)?;
        return run(gpu, program, kind, b.0, scalars, b.1);
    }
    let join = Program::of(&match kind {
        Reduce::Sum => Function::build(|[a, b]| [a + b]),
        Reduce::Max => Function::build(|[a, b]| [a.maximum(b)]),
    });
    let part = |inputs: &[View]| {
        let scratch = outputs.iter().map(|o| gpu.scratch(&o.dims)).collect::<Result<Vec<_>>>()?;
        let views: Vec<View> = scratch.iter().map(|(_, v)| v.clone()).collect();
        run(gpu, program, kind, inputs, scalars, &views)?;
        Ok((scratch, views))
    };
    let ((_keep_a, a), (_keep_b, b)) = (part(a.0)?, part(b.0)?);
    for ((output, a), b) in outputs.iter().zip(a).zip(b) {
        pointwise::run(gpu, Body::Program(&join), &[a, b], &[], std::slice::from_ref(output))?;
    }
    Ok(())
}

/// What the kernel's text depends on.
struct Text {
    kind: Reduce,
    used: Vec<usize>,
    inputs: usize,
    outputs: usize,
    along: bool,
    lanes: usize,
    kept: usize,
    summed: usize,
}

impl Text {
    fn source(&self, program: &Program) -> String {
        let Self { kind, ref used, inputs, outputs, along, lanes, .. } = *self;
        let (lowered, n_in, count) = (program.lowered(), used.len(), used.len() + outputs);
        let kept = SpaceParams { first: count + 5, rank: self.kept, operands: count };
        let summed = SpaceParams { first: kept.end(), rank: self.summed, operands: n_in };
        let [n_kept, n_summed, chunk, chunks, tiles] = std::array::from_fn(|i| wgsl::param(count + i));
        let per_group = THREADS / lanes;
        // Where lanes are neighbours, a lane's partner is the next thread; else the next row of results.
        let (lane, result, step) =
            if along { ("index % L", "index / L", 1) } else { ("index / K", "index % K", per_group) };
        let mut main = format!(
            "  if group >= {tiles} * {chunks} {{ return; }}
  let lane = {lane};
  let chunk = group / {tiles};
  let k = (group % {tiles}) * K + {result};
"
        );
        for o in 0..count {
            main += &format!("  var o{o} = {};\n", wgsl::param(o));
        }
        main += &kept.locate("k", "o");
        for m in 0..outputs {
            main += &format!("  var a{m} = {};\n", neutral(kind));
        }
        main += &format!(
            "  let end = min({n_summed}, (chunk + 1u) * {chunk});
  if k < {n_kept} {{ for (var s = chunk * {chunk} + lane; s < end; s += L) {{\n"
        );
        for o in 0..n_in {
            main += &format!("  var p{o} = o{o};\n");
        }
        main += &summed.locate("s", "p");
        let values = (0..inputs).map(|i| match used.iter().position(|u| *u == i) {
            Some(o) => format!("load{o}(p{o})"),
            None => "0.0".into(),
        });
        let scalars = (0..lowered.scalars).map(|s| wgsl::float_param(summed.end() + s));
        let arguments: Vec<String> = values.chain(scalars).collect();
        main += &format!("  let r = f({});\n", arguments.join(", "));
        for m in 0..outputs {
            main += &format!("  a{m} = {};\n", combined(kind, &format!("a{m}"), &format!("r[{m}]")));
        }
        main += "  } }\n";
        for m in 0..outputs {
            main += &format!("  part{m}[index] = a{m};\n");
        }
        main += "  workgroupBarrier();\n";
        main += "  for (var half = L / 2u; half > 0u; half /= 2u) {\n    if lane < half {\n";
        for m in 0..outputs {
            let joined = combined(kind, &format!("part{m}[index]"), &format!("part{m}[index + half * {step}u]"));
            main += &format!("      part{m}[index] = {joined};\n");
        }
        main += &format!("    }}\n    workgroupBarrier();\n  }}\n  if lane == 0u && k < {n_kept} {{\n");
        for m in 0..outputs {
            let o = n_in + m;
            main += &format!("    store{o}(o{o} + select(0u, chunk, {chunks} > 1u), part{m}[index]);\n");
        }
        main += "  }\n";
        let shared: String =
            (0..outputs).map(|m| format!("var<workgroup> part{m}: array<f32, {THREADS}>;\n")).collect();
        let sizes = format!("const L = {lanes}u;\nconst K = {per_group}u;\n");
        sizes + &shared + &wgsl::function("f", lowered) + &wgsl::entry(&main)
    }
}
