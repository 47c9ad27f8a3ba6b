//! One pointwise program over many groups of operands, each of its own size, in one launch: an update of all parameters.

use flowtape_engine::expr::{Lowered, Program};
use flowtape_engine::space::{Space, memory_order};
use flowtape_engine::{DType, Result};

use super::launch::Launch;
use super::memory::{Staging, scratch};
use super::pointwise::{At, check_dtypes, count_of, key_of, pointwise, width_of};
use super::ptx::{Arguments, BLOCK, Printer, Run};
use super::view::View;

/// Views of one call: inputs, then outputs.
pub(super) type Views = (Vec<View>, Vec<View>);

/// How operands lie where a group is one run of memory; what the kernel depends on.
#[derive(Clone, PartialEq, Eq)]
struct Lie {
    dtypes: Vec<DType>,
    runs: Vec<Run>,
    width: usize,
}

/// How a group lies, and how many times its width of elements there are; nothing where it is no such run.
fn lie((inputs, outputs): &Views) -> Option<(Lie, usize)> {
    let views: Vec<&View> = inputs.iter().chain(outputs).collect();
    let target = outputs.first()?;
    let strides: Vec<&[usize]> = views.iter().map(|v| &v.strides[..]).collect();
    let space = Space::new(&target.dims, &strides, memory_order(&target.strides));
    let (width, runs) = width_of(&views, &space.dims, &space.strides);
    let fits = space.dims.len() == 1 && width > 1 && !runs[inputs.len()..].contains(&Run::Same);
    fits.then(|| (Lie { dtypes: views.iter().map(|v| v.dtype).collect(), runs, width }, space.len() / width))
}

/// Bytes of a group's entry in the table: an address for each operand, its count, its first block.
fn entry(operands: usize) -> usize {
    8 * operands + 8
}

fn print(program: &Lowered, lie: &Lie, scalars: usize) -> String {
    let operands = lie.dtypes.len();
    let (entry, count_at, first_at) = (entry(operands), 8 * operands, 8 * operands + 4);
    let mut to = Printer::default();
    let (block, thread) = (to.r(), to.r());
    to.write(format_args!("mov.u32 {block}, %ctaid.x;\nmov.u32 {thread}, %tid.x;"));
    let (table, groups) = (to.field("u64", 0), to.field("u32", 8));
    // The last group whose first block is not after this one.
    let (low, high, gap, middle, first) = (to.r(), to.r(), to.r(), to.r(), to.r());
    let (done, below, at) = (to.p(), to.p(), to.d());
    to.write(format_args!(
        "mov.u32 {low}, 0;\nmov.u32 {high}, {groups};\nSEARCH:\nsub.u32 {gap}, {high}, {low};\n\
         setp.le.u32 {done}, {gap}, 1;\n@{done} bra FOUND;\nadd.u32 {middle}, {low}, {high};\n\
         shr.u32 {middle}, {middle}, 1;\nmad.wide.u32 {at}, {middle}, {entry}, {table};\n\
         ld.global.u32 {first}, [{at}+{first_at}];\nsetp.le.u32 {below}, {first}, {block};\n\
         selp.b32 {low}, {middle}, {low}, {below};\nselp.b32 {high}, {high}, {middle}, {below};\nbra SEARCH;\nFOUND:\n\
         mad.wide.u32 {at}, {low}, {entry}, {table};\nld.global.u32 {first}, [{at}+{first_at}];"
    ));
    let (count, index, past) = (to.r(), to.r(), to.p());
    to.write(format_args!(
        "ld.global.u32 {count}, [{at}+{count_at}];\nsub.u32 {block}, {block}, {first};\n\
         mad.lo.u32 {index}, {block}, {BLOCK}, {thread};\nsetp.ge.u32 {past}, {index}, {count};\n@{past} bra END;"
    ));
    let addresses: Vec<String> = (0..operands)
        .map(|i| {
            let address = to.d();
            to.write(format_args!("ld.global.u64 {address}, [{at}+{}];", 8 * i));
            if lie.runs[i] == Run::Same {
                return address;
            }
            let place = to.d();
            let bytes = lie.width * lie.dtypes[i].size();
            to.write(format_args!("mad.wide.u32 {place}, {index}, {bytes}, {address};"));
            place
        })
        .collect();
    let scalars: Vec<String> = (0..scalars).map(|i| to.field("f32", 12 + 4 * i)).collect();
    to.elements(program, &addresses, &lie.dtypes, &lie.runs, &scalars, lie.width);
    to.write(format_args!("END:\nret;"));
    to.finish(12 + 4 * scalars.len(), 0)
}

/// `outputs = program(inputs)` of each group. Groups that are no runs of memory are launched one by one.
pub(super) fn pointwise_each(
    at: At<'_>,
    staging: &Staging,
    program: &Program,
    groups: &[Views],
    scalars: &[f64],
) -> Result<()> {
    let mut together: Vec<(Lie, Vec<(&Views, usize)>)> = Vec::new();
    for group in groups {
        let views: Vec<&View> = group.0.iter().chain(&group.1).collect();
        check_dtypes(program, &views)?;
        match lie(group) {
            Some((lie, count)) => match together.iter_mut().find(|(l, _)| *l == lie) {
                Some((_, all)) => all.push((group, count)),
                None => together.push((lie, vec![(group, count)])),
            },
            None => pointwise(at, program, &group.0, scalars, &group.1)?,
        }
    }
    for (lie, groups) in &together {
        let (mut table, mut blocks) = (Arguments::default(), 0);
        for ((inputs, outputs), count) in groups {
            inputs.iter().chain(outputs).for_each(|v| table.u64(v.address));
            table.u32(count_of("pointwise", *count)?);
            table.u32(count_of("pointwise", blocks)?);
            blocks += count.div_ceil(BLOCK as usize);
        }
        let memory = scratch(at.pool, table.0.len())?;
        let mut arguments = Arguments::default();
        arguments.u64(*memory.block());
        arguments.u32(groups.len() as u32);
        scalars.iter().for_each(|&s| arguments.f32(s as f32));
        let views: Vec<&View> = groups[0].0.0.iter().chain(&groups[0].0.1).collect();
        let key = key_of(100, program, &views, &lie.runs, &[lie.width]);
        let launched = staging.upload(*memory.block(), &table.0).and_then(|()| {
            let kernel = at.gpu.printed(key, || print(program.lowered(), lie, scalars.len()))?;
            // SAFETY: the argument is laid out as the kernel was printed for; the table holds the groups' addresses, the
            // ops give outputs that nobody else uses, and the table's memory is reused in the order of the work alone.
            unsafe { at.gpu.launch(&kernel, Launch::blocks(blocks, BLOCK), &arguments.0[..]) }
        });
        launched.map_err(|failure| at.gpu.failed("pointwise", failure))?;
    }
    Ok(())
}
