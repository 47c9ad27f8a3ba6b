//! Programs element by element, and copies: one thread takes one element, or two where halves are written in pairs.

use flowtape_engine::Result;
use flowtape_engine::expr::Program;
use flowtape_engine::space::{Space, memory_order};

use super::queue::{Gpu, Launch};
use super::view::{Access, View};
use super::wgsl::{self, SpaceParams, THREADS};

/// Elements of a launch: they are counted in u32.
const ELEMENTS: usize = 1 << 31;
/// Groups of a launch: each has its own piece of the text.
const GROUPS: usize = 8;

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

    /// Those inputs that are read.
    fn read<'a>(&self, inputs: &'a [View]) -> impl Iterator<Item = &'a View> {
        inputs.iter().enumerate().filter(|(i, _)| self.reads(*i)).map(|(_, view)| view)
    }

    fn id(&self) -> u64 {
        match self {
            Self::Program(program) => program.id() + 1,
            Self::Copy => 0,
        }
    }
}

/// The halves of all views along an axis: what does not fit a binding is done in parts.
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
    let mut views: Vec<View> = body.read(inputs).cloned().collect();
    let used = views.len();
    views.extend_from_slice(outputs);
    let too_large = views.iter().find(|v| !gpu.bounds.binding.fits(v));
    let too_large = too_large.or(Some(target).filter(|_| target.numel() > ELEMENTS));
    if let Some(axis) = too_large.and_then(View::longest_axis) {
        let all: Vec<View> = inputs.iter().chain(outputs).cloned().collect();
        return halves(&all, axis).iter().try_for_each(|half| {
            let (inputs, outputs) = half.split_at(inputs.len());
            run(gpu, body, inputs, scalars, outputs)
        });
    }
    let packed = gpu.packed(&views[..used], outputs)?;
    let views = packed.inputs.iter().chain(outputs).collect();
    launch(gpu, body, inputs.len(), scalars, &[Part::new(views, outputs.len())])
}

/// Inputs and outputs of one call.
pub(super) type Group = (Vec<View>, Vec<View>);

/// Runs a program on groups of operands, each of its own shape: as many of them in a launch as its bindings hold.
pub(super) fn run_each(gpu: &Gpu, program: &Program, groups: &[Group], scalars: &[f32]) -> Result<()> {
    let body = Body::Program(program);
    let parts: Vec<Part<'_>> = groups
        .iter()
        .map(|(inputs, outputs)| Part::new(body.read(inputs).chain(outputs).collect(), outputs.len()))
        .collect();
    let mut start = 0;
    while start < parts.len() {
        let fit = |end: &usize| {
            let together = &parts[start..*end];
            let views: Vec<&View> = together.iter().flat_map(|part| part.views.iter().copied()).collect();
            gpu.holds(&views) && together.iter().map(|part| part.space.len()).sum::<usize>() <= ELEMENTS
        };
        let end = (start + 1..=parts.len().min(start + GROUPS)).take_while(fit).last().unwrap_or(start + 1);
        let (inputs, outputs) = &groups[start];
        match end - start {
            1 => run(gpu, body, inputs, scalars, outputs)?,
            _ => launch(gpu, body, inputs.len(), scalars, &parts[start..end])?,
        }
        start = end;
    }
    Ok(())
}

/// The operands of one group as a kernel walks them.
struct Part<'a> {
    /// Inputs that are read, then outputs.
    views: Vec<&'a View>,
    outputs: usize,
    space: Space,
    /// Whether a thread takes two elements, which fill words of halves.
    paired: bool,
}

impl<'a> Part<'a> {
    fn new(views: Vec<&'a View>, outputs: usize) -> Self {
        let (target, first) = (views[views.len() - outputs], views.len() - outputs);
        let strides: Vec<&[usize]> = views.iter().map(|v| &v.strides[..]).collect();
        let space = Space::new(&target.dims, &strides, memory_order(&target.strides));
        let rank = space.dims.len();
        let in_pairs = |(v, strides): (&&View, &Vec<usize>)| {
            let outer = &strides[..rank.saturating_sub(1)];
            let fills_words = !v.is_half() || (v.offset.is_multiple_of(2) && outer.iter().all(|s| s % 2 == 0));
            // A pair is written side by side, in every dtype.
            strides.last() == Some(&1) && fills_words
        };
        let outs = &views[first..];
        let paired = outs.iter().any(|v| v.is_half())
            && space.dims.last().is_some_and(|d| d.is_multiple_of(2))
            && outs.iter().zip(&space.strides[first..]).all(in_pairs);
        Self { views, outputs, space, paired }
    }

    fn threads(&self) -> usize {
        self.space.len() / if self.paired { 2 } else { 1 }
    }

    /// Its operands.
    fn operands(&self) -> impl Iterator<Item = (&'a View, Access)> {
        let (first, written) = (self.views.len() - self.outputs, Access::pairs_if(self.paired));
        self.views.iter().enumerate().map(move |(o, v)| (*v, if o < first { Access::Read } else { written }))
    }
}

/// One kernel on all elements of all parts; `inputs` are those of the body, read or not. Parameters: the scalars, then for
/// each part its threads, the workgroup after its last, its space.
fn launch(gpu: &Gpu, body: Body<'_>, inputs: usize, scalars: &[f32], parts: &[Part<'_>]) -> Result<()> {
    let operands: Vec<(&View, Access)> = parts.iter().flat_map(Part::operands).collect();
    let mut params: Vec<u32> = scalars.iter().map(|s| s.to_bits()).collect();
    let mut shape = vec![body.id()];
    let mut workgroups = 0;
    for part in parts {
        workgroups += part.threads().div_ceil(THREADS);
        params.extend([part.threads() as u32, workgroups as u32]);
        params.extend(wgsl::space_values(&part.space));
        shape.push(2 * part.space.dims.len() as u64 + u64::from(part.paired));
    }
    let launch = Launch { name: "pointwise", shape, operands: &operands, params: &params, workgroups };
    gpu.launch(&launch, || source(body, inputs, operands.len(), parts))
}

/// The kernel's text: each part has the workgroups before its end.
fn source(body: Body<'_>, inputs: usize, operands: usize, parts: &[Part<'_>]) -> String {
    let (function, scalars) = match body {
        Body::Copy => (String::new(), 0),
        Body::Program(program) => (wgsl::function("f", program.lowered()), program.lowered().scalars),
    };
    let scalars: Vec<String> = (operands..operands + scalars).map(wgsl::float_param).collect();
    let (mut first, mut at) = (0, operands + scalars.len());
    let (mut main, mut start) = (String::new(), "0u".to_owned());
    for (p, part) in parts.iter().enumerate() {
        let (threads, end) = (wgsl::param(at), wgsl::param(at + 1));
        let before = if p > 0 { "  else " } else { "  " };
        let ours = if p + 1 < parts.len() { format!("if group < {end} ") } else { String::new() };
        main += &format!("{before}{ours}{{\n  let i = (group - {start}) * {THREADS}u + index;\n");
        main += &format!("  if i >= {threads} {{ return; }}\n");
        let space = SpaceParams { first: at + 2, rank: part.space.dims.len(), operands: part.views.len() };
        main += &element(body, inputs, &scalars, part, first, space);
        main += "  }\n";
        (first, at, start) = (first + part.views.len(), space.end(), end);
    }
    function + &wgsl::entry(&main)
}

/// Where element `i` lies for each operand of a part, the kernel's operands from `first` on; loads, the program, stores.
fn element(
    body: Body<'_>,
    inputs: usize,
    scalars: &[String],
    part: &Part<'_>,
    first: usize,
    space: SpaceParams,
) -> String {
    let width = if part.paired { 2 } else { 1 };
    let outputs = part.views.len() - part.outputs..part.views.len();
    let mut text = String::new();
    for o in 0..part.views.len() {
        text += &format!("  var o{o} = {};\n", wgsl::param(first + o));
    }
    text += &space.locate(&format!("(i * {width}u)"), "o");
    let step = |o: usize, e: usize| {
        if e == 0 { format!("o{o}") } else { format!("o{o} + {}", space.stride(o, space.rank - 1)) }
    };
    match body {
        Body::Copy => {
            (0..width).for_each(|e| text += &format!("  let r{e} = raw0({});\n", step(0, e)));
            text += if width == 2 { "  put2_1(o1, r0, r1);\n" } else { "  put1(o1, r0);\n" };
        }
        Body::Program(_) => {
            for e in 0..width {
                let mut read = 0..;
                let values = (0..inputs).map(|i| match body.reads(i).then(|| read.next()).flatten() {
                    Some(o) => format!("load{}({})", first + o, step(o, e)),
                    None => "0.0".into(),
                });
                let arguments: Vec<String> = values.chain(scalars.iter().cloned()).collect();
                text += &format!("  let r{e} = f({});\n", arguments.join(", "));
            }
            for (m, o) in outputs.enumerate() {
                let to = first + o;
                text += &match width {
                    2 => format!("  store2_{to}(o{o}, r0[{m}], r1[{m}]);\n"),
                    _ => format!("  store{to}(o{o}, r0[{m}]);\n"),
                };
            }
        }
    }
    text
}
