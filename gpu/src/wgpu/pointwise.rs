//! Programs element by element, and copies: one thread takes one element, or two where halves are written in pairs.

use flowtape_engine::Result;
use flowtape_engine::expr::Program;
use flowtape_engine::space::{Space, memory_order};

use super::queue::{Gpu, Launch};
use super::view::{Access, View};
use super::wgsl::{self, SpaceParams, THREADS};

/// Elements of a launch: they are counted in u32.
const ELEMENTS: usize = 1 << 31;

/// What is done with each element.
#[derive(Clone, Copy, Debug)]
pub(super) enum Body<'a> {
    /// `outputs = program(inputs)`.
    Program(&'a Program),
    /// One input's bits go to one output.
    Copy,
}

impl Body<'_> {
    fn reads(&self, input: usize) -> bool {
        match self {
            Self::Program(program) => wgsl::reads(program.lowered(), input),
            Self::Copy => true,
        }
    }

    fn id(&self) -> u64 {
        match self {
            Self::Program(program) => program.id() + 1,
            Self::Copy => 0,
        }
    }
}

/// The halves of all views along the axis that they reach farthest on: what does not fit a binding is done in parts.
pub(super) fn halves(views: &[View], axis: usize) -> [Vec<View>; 2] {
    let size = views.iter().map(|v| v.dims[axis]).max().unwrap_or(1);
    // Even, so that pairs stay together.
    let cut = (size / 2).next_multiple_of(2).min(size - 1);
    let part = |start, len| views.iter().map(|v| v.narrow(axis, start, len)).collect();
    [part(0, cut), part(cut, size - cut)]
}

/// Runs `body` over all elements of the outputs. All views have one shape.
pub(super) fn run(gpu: &Gpu, body: Body<'_>, inputs: &[View], scalars: &[f32], outputs: &[View]) -> Result<()> {
    let Some(target) = outputs.first() else { return Ok(()) };
    if target.numel() == 0 {
        return Ok(());
    }
    let used: Vec<usize> = (0..inputs.len()).filter(|&i| body.reads(i)).collect();
    let views: Vec<View> = used.iter().map(|&i| &inputs[i]).chain(outputs).cloned().collect();
    let too_large = views.iter().find(|v| !gpu.bounds.binding.fits(v));
    let too_large = too_large.or(Some(target).filter(|_| target.numel() > ELEMENTS));
    if let Some(axis) = too_large.and_then(View::longest_axis) {
        let all: Vec<View> = inputs.iter().chain(outputs).cloned().collect();
        return halves(&all, axis).iter().try_for_each(|half| {
            let (inputs, outputs) = half.split_at(inputs.len());
            run(gpu, body, inputs, scalars, outputs)
        });
    }
    let packed = gpu.packed(&views[..used.len()], outputs)?;
    let (ins, outs) = (&packed.inputs, outputs);
    let all: Vec<&View> = ins.iter().chain(outs).collect();
    let strides: Vec<&[usize]> = all.iter().map(|v| &v.strides[..]).collect();
    let space = Space::new(&target.dims, &strides, memory_order(&target.strides));
    let rank = space.dims.len();

    let in_pairs = |(v, strides): (&View, &Vec<usize>)| {
        let outer = &strides[..rank.saturating_sub(1)];
        !v.is_half() || (strides.last() == Some(&1) && v.offset.is_multiple_of(2) && outer.iter().all(|s| s % 2 == 0))
    };
    let paired = outs.iter().any(View::is_half)
        && space.dims.last().is_some_and(|d| d.is_multiple_of(2))
        && outs.iter().zip(&space.strides[ins.len()..]).all(in_pairs);
    let access = Access::pairs_if(paired);
    let operands: Vec<(&View, Access)> =
        ins.iter().map(|v| (v, Access::Read)).chain(outs.iter().map(|v| (v, access))).collect();

    let width = if paired { 2 } else { 1 };
    let threads = space.len() / width;
    let mut params = vec![threads as u32];
    params.extend(wgsl::space_values(&space));
    params.extend(scalars.iter().map(|s| s.to_bits()));
    let launch = Launch {
        name: "pointwise",
        shape: vec![body.id(), rank as u64, width as u64],
        operands: &operands,
        params: &params,
        workgroups: threads.div_ceil(THREADS),
    };
    gpu.launch(&launch, || source(body, &used, inputs.len(), outs.len(), rank, width))
}

/// The kernel's text: where the element lies for each operand, loads, the program, stores.
fn source(body: Body<'_>, used: &[usize], inputs: usize, outputs: usize, rank: usize, width: usize) -> String {
    let count = used.len() + outputs;
    let space = SpaceParams { first: count + 1, rank, operands: count };
    let mut main = format!("  let i = group * {THREADS}u + index;\n  if i >= {} {{ return; }}\n", wgsl::param(count));
    for o in 0..count {
        main += &format!("  var o{o} = {};\n", wgsl::param(o));
    }
    main += &space.locate(&format!("(i * {width}u)"), "o");
    let step =
        |o: usize, e: usize| if e == 0 { format!("o{o}") } else { format!("o{o} + {}", space.stride(o, rank - 1)) };
    let declared = match body {
        Body::Copy => {
            (0..width).for_each(|e| main += &format!("  let r{e} = raw0({});\n", step(0, e)));
            main += if width == 2 { "  put2_1(o1, r0, r1);\n" } else { "  put1(o1, r0);\n" };
            String::new()
        }
        Body::Program(program) => {
            let lowered = program.lowered();
            for e in 0..width {
                let values = (0..inputs).map(|i| match used.iter().position(|u| *u == i) {
                    Some(o) => format!("load{o}({})", step(o, e)),
                    None => "0.0".into(),
                });
                let scalars = (0..lowered.scalars).map(|s| wgsl::float_param(space.end() + s));
                let arguments: Vec<String> = values.chain(scalars).collect();
                main += &format!("  let r{e} = f({});\n", arguments.join(", "));
            }
            for m in 0..outputs {
                let o = used.len() + m;
                main += &match width {
                    2 => format!("  store2_{o}(o{o}, r0[{m}], r1[{m}]);\n"),
                    _ => format!("  store{o}(o{o}, r0[{m}]);\n"),
                };
            }
            wgsl::function("f", lowered)
        }
    };
    declared + &wgsl::entry(&main)
}
