//! Pointwise programs: one printed kernel for each program, dtypes, number of axes and width of accesses.

use flowtape_engine::expr::{Lowered, Program};
use flowtape_engine::pool::Pool;
use flowtape_engine::space::{Space, memory_order};
use flowtape_engine::{DType, Error, Result};

use super::gpu::Gpu;
use super::launch::{Key, Launch};
use super::memory::CudaRaw;
use super::ptx::{Arguments, BLOCK, Printer, Run};
use super::view::View;

/// A device with its pool, as the kernels' launchers take it.
#[derive(Clone, Copy, Debug)]
pub(super) struct At<'a> {
    pub gpu: &'a Gpu,
    pub pool: &'a Pool<CudaRaw>,
}

/// How many elements of the innermost axis are taken at once, and how each operand lies along it: as many as fill 16
/// bytes of the smallest dtype where all operands are without gaps and aligned, or stay the same; else one.
pub(super) fn width_of(views: &[&View], dims: &[usize], strides: &[Vec<usize>]) -> (usize, Vec<Run>) {
    let single = || (1, vec![Run::Dense; views.len()]);
    let (Some(&inner), Some(size)) = (dims.last(), views.iter().map(|v| v.dtype.size()).min()) else { return single() };
    let width = 16 / size;
    if !inner.is_multiple_of(width) || views.iter().any(|v| v.dtype == DType::F64) {
        return single();
    }
    let run = |(view, strides): (&&View, &Vec<usize>)| match strides.split_last() {
        Some((0, _)) => Some(Run::Same),
        Some((1, outer)) => {
            let fits =
                view.address.is_multiple_of(16) && outer.iter().all(|s| (s * view.dtype.size()).is_multiple_of(16));
            fits.then_some(Run::Dense)
        }
        _ => None,
    };
    match views.iter().zip(strides).map(run).collect::<Option<Vec<_>>>() {
        Some(runs) => (width, runs),
        None => single(),
    }
}

/// What the text of a printed kernel depends on besides its shape.
pub(super) fn key_of(kind: u64, program: &Program, views: &[&View], runs: &[Run], rest: &[usize]) -> Key {
    let operands = views.iter().zip(runs).map(|(v, r)| v.dtype as u64 * 2 + u64::from(*r == Run::Same));
    [kind, program.id()].into_iter().chain(rest.iter().map(|&n| n as u64)).chain(operands).collect()
}

/// An f64 operand is converted; arithmetic in f64 is the CPU's.
pub(super) fn check_dtypes(program: &Program, views: &[&View]) -> Result<()> {
    let converts = program.instructions.is_empty();
    match views.iter().find(|v| v.dtype == DType::F64 && !converts) {
        Some(view) => Err(super::view::wrong_dtype("pointwise", view.dtype)),
        None => Ok(()),
    }
}

/// A count of positions as the kernels have it.
pub(super) fn count_of(op: &'static str, n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::argument(op, "fewer than 2^32 elements", n))
}

/// Where the fields of the argument lie: pointers, strides by operand, sizes, the count, scalars.
struct Fields {
    operands: usize,
    rank: usize,
    scalars: usize,
}

impl Fields {
    fn strides(&self, operand: usize) -> usize {
        8 * (self.operands + operand * self.rank)
    }

    fn dims(&self) -> usize {
        8 * self.operands * (1 + self.rank)
    }

    fn count(&self) -> usize {
        self.dims() + 4 * self.rank
    }

    fn scalars(&self) -> usize {
        self.count() + 4
    }

    fn bytes(&self) -> usize {
        self.scalars() + 4 * self.scalars
    }
}

fn print(program: &Lowered, dtypes: &[DType], runs: &[Run], fields: &Fields, width: usize) -> String {
    let mut to = Printer::default();
    let (block, thread, index, past) = (to.r(), to.r(), to.r(), to.p());
    to.write(format_args!("mov.u32 {block}, %ctaid.x;\nmov.u32 {thread}, %tid.x;"));
    to.write(format_args!("mad.lo.u32 {index}, {block}, {BLOCK}, {thread};"));
    let count = to.field("u32", fields.count());
    to.write(format_args!("setp.ge.u32 {past}, {index}, {count};\n@{past} bra END;"));
    let pointers: Vec<String> = (0..fields.operands).map(|i| to.field("u64", 8 * i)).collect();
    let strides: Vec<usize> = (0..fields.operands).map(|i| fields.strides(i)).collect();
    let addresses = to.locate(&index, fields.rank, fields.dims(), &strides, &pointers);
    let scalars: Vec<String> = (0..fields.scalars).map(|i| to.field("f32", fields.scalars() + 4 * i)).collect();
    to.elements(program, &addresses, dtypes, runs, &scalars, width);
    to.write(format_args!("END:\nret;"));
    to.finish(fields.bytes(), 0)
}

/// The kernel of a program on views of one shape: its key, its text when asked for, its argument and its blocks.
fn plan<R>(
    program: &Program,
    inputs: &[View],
    scalars: &[f64],
    outputs: &[View],
    with: impl FnOnce(Key, &dyn Fn() -> String, &Arguments, usize) -> R,
) -> Result<Option<R>> {
    let views: Vec<&View> = inputs.iter().chain(outputs).collect();
    check_dtypes(program, &views)?;
    let Some(target) = outputs.first() else { return Ok(None) };
    let strides: Vec<&[usize]> = views.iter().map(|v| &v.strides[..]).collect();
    let space = Space::new(&target.dims, &strides, memory_order(&target.strides));
    let (width, mut runs) = width_of(&views, &space.dims, &space.strides);
    // A result that stays the same along an axis can't be: outputs have an element for each position.
    let shared = runs[inputs.len()..].contains(&Run::Same);
    let width = if shared { 1 } else { width };
    if width == 1 {
        runs.fill(Run::Dense);
    }
    let count = count_of("pointwise", space.len() / width)?;
    if count == 0 {
        return Ok(None);
    }
    let rank = space.dims.len();
    let mut arguments = Arguments::default();
    views.iter().for_each(|v| arguments.u64(v.address));
    for (view, strides) in views.iter().zip(&space.strides) {
        for (axis, &stride) in strides.iter().enumerate() {
            let elements = if axis + 1 == rank { stride * width } else { stride };
            arguments.u64((elements * view.dtype.size()) as u64);
        }
    }
    for (axis, &size) in space.dims.iter().enumerate() {
        arguments.u32((if axis + 1 == rank { size / width } else { size }) as u32);
    }
    arguments.u32(count);
    scalars.iter().for_each(|&s| arguments.f32(s as f32));
    let key = key_of(0, program, &views, &runs, &[rank, width]);
    let dtypes: Vec<DType> = views.iter().map(|v| v.dtype).collect();
    let fields = Fields { operands: views.len(), rank, scalars: scalars.len() };
    let text = || print(program.lowered(), &dtypes, &runs, &fields, width);
    Ok(Some(with(key, &text, &arguments, (count as usize).div_ceil(BLOCK as usize))))
}

/// `outputs = program(inputs)`.
pub(super) fn pointwise(
    at: At<'_>,
    program: &Program,
    inputs: &[View],
    scalars: &[f64],
    outputs: &[View],
) -> Result<()> {
    let launched = plan(program, inputs, scalars, outputs, |key, text, arguments, blocks| {
        let kernel = at.gpu.printed(key, text)?;
        // SAFETY: the argument is laid out as the kernel was printed for, and the call is checked.
        unsafe { at.gpu.launch(&kernel, Launch::blocks(blocks, BLOCK), &arguments.0[..]) }
    })?;
    match launched {
        Some(Err(failure)) => Err(at.gpu.failed("pointwise", failure)),
        Some(Ok(())) | None => Ok(()),
    }
}
