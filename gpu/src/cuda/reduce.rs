//! Reductions: a block's threads share some results, and add their parts in a tree that depends on shapes alone.
//!
//! Along "rows" the innermost axis in memory is reduced, and neighbouring threads read neighbours of it; else they read
//! neighbouring results' elements. Long sums are cut into chunks whose results a second run adds.

use flowtape_engine::expr::{Function, Lowered, Program, Reduce};
use flowtape_engine::space::{Space, memory_order};
use flowtape_engine::{DType, Error, Result};

use super::launch::Launch;
use super::memory::scratch;
use super::pointwise::{At, check_dtypes, count_of, key_of, width_of};
use super::ptx::{Arguments, BLOCK, Printer, Run};
use super::view::View;

/// Blocks that fill a large device: sums are cut into chunks until there are about as many.
const BLOCKS: usize = 1024;
/// Elements that a thread adds before a sum is cut.
const SERIAL: usize = 8;
/// Threads of a block on neighbouring results where rows are not what is reduced.
const NEIGHBOURS: usize = 64;

/// Where the fields of the argument lie.
struct Fields {
    inputs: usize,
    outputs: usize,
    kept: usize,
    summed: usize,
    scalars: usize,
}

impl Fields {
    fn operands(&self) -> usize {
        self.inputs + self.outputs
    }

    fn kept_strides(&self, operand: usize) -> usize {
        8 * (self.operands() + operand * self.kept)
    }

    fn summed_strides(&self, input: usize) -> usize {
        8 * (self.operands() * (1 + self.kept) + input * self.summed)
    }

    /// What a chunk adds to the addresses of the outputs.
    fn chunk_strides(&self) -> usize {
        self.summed_strides(self.inputs)
    }

    fn kept_dims(&self) -> usize {
        self.chunk_strides() + 8 * self.outputs
    }

    fn summed_dims(&self) -> usize {
        self.kept_dims() + 4 * self.kept
    }

    /// Results, summed positions, positions of a chunk, the logarithm of the results of a block.
    fn counts(&self) -> usize {
        self.summed_dims() + 4 * self.summed
    }

    fn scalars(&self) -> usize {
        self.counts() + 16
    }

    fn bytes(&self) -> usize {
        self.scalars() + 4 * self.scalars
    }
}

/// What the text depends on.
struct Kind<'a> {
    program: &'a Lowered,
    reduce: Reduce,
    dtypes: &'a [DType],
    runs: &'a [Run],
    width: usize,
    rows: bool,
}

impl Kind<'_> {
    fn combine(&self) -> &'static str {
        match self.reduce {
            Reduce::Sum => "add.rn.f32",
            Reduce::Max => "max.NaN.f32",
        }
    }

    fn neutral(&self) -> &'static str {
        match self.reduce {
            Reduce::Sum => "0f00000000",
            Reduce::Max => "0fFF800000",
        }
    }

    fn print(&self, fields: &Fields) -> String {
        let Self { program, dtypes, runs, width, .. } = *self;
        let mut to = Printer::default();
        let (thread, block, chunk) = (to.r(), to.r(), to.r());
        to.write(format_args!("mov.u32 {thread}, %tid.x;\nmov.u32 {block}, %ctaid.x;\nmov.u32 {chunk}, %ctaid.y;"));
        let counts = fields.counts();
        let [results, positions, length, log] = [0, 4, 8, 12].map(|at| to.field("u32", counts + at));
        // `across` results in a block, `along` threads for each.
        let (across, log_along, along) = (to.r(), to.r(), to.r());
        to.write(format_args!(
            "mov.u32 {across}, 1;\nshl.b32 {across}, {across}, {log};\nsub.u32 {log_along}, 8, {log};"
        ));
        to.write(format_args!("mov.u32 {along}, 1;\nshl.b32 {along}, {along}, {log_along};"));
        let (mask, mine, lane) = (to.r(), to.r(), to.r());
        let (log_fast, fast, slow) = if self.rows { (&log_along, &lane, &mine) } else { (&log, &mine, &lane) };
        let size = if self.rows { &along } else { &across };
        to.write(format_args!("sub.u32 {mask}, {size}, 1;\nand.b32 {fast}, {thread}, {mask};"));
        to.write(format_args!("shr.u32 {slow}, {thread}, {log_fast};"));

        let result = to.r();
        to.write(format_args!("mad.lo.u32 {result}, {block}, {across}, {mine};"));
        let pointers: Vec<String> = (0..fields.inputs).map(|i| to.field("u64", 8 * i)).collect();
        let strides: Vec<usize> = (0..fields.inputs).map(|i| fields.kept_strides(i)).collect();
        let bases = to.locate(&result, fields.kept, fields.kept_dims(), &strides, &pointers);
        let scalars: Vec<String> = (0..fields.scalars).map(|i| to.field("f32", fields.scalars() + 4 * i)).collect();
        let constants = to.constants(program);
        let sums: Vec<String> = program.outputs.iter().map(|_| to.f()).collect();
        for sum in &sums {
            to.write(format_args!("mov.f32 {sum}, {};", self.neutral()));
        }

        let (position, end, done) = (to.r(), to.r(), to.p());
        to.write(format_args!("mad.lo.u32 {position}, {chunk}, {length}, {lane};"));
        to.write(format_args!("mad.lo.u32 {end}, {chunk}, {length}, {length};\nmin.u32 {end}, {end}, {positions};"));
        to.write(format_args!("setp.ge.u32 {done}, {result}, {results};\n@{done} bra SUMMED;"));
        to.write(format_args!("LOOP:\nsetp.ge.u32 {done}, {position}, {end};\n@{done} bra SUMMED;"));
        let strides: Vec<usize> = (0..fields.inputs).map(|i| fields.summed_strides(i)).collect();
        let addresses = to.locate(&position, fields.summed, fields.summed_dims(), &strides, &bases);
        let loaded: Vec<Vec<String>> =
            (0..fields.inputs).map(|i| to.load(&addresses[i], dtypes[i], runs[i], width)).collect();
        for element in 0..width {
            let inputs: Vec<String> = loaded.iter().map(|values| values[element].clone()).collect();
            let values = to.program(program, &constants, &inputs, &scalars);
            for (sum, value) in sums.iter().zip(&values) {
                to.write(format_args!("{} {sum}, {sum}, {value};", self.combine()));
            }
        }
        to.write(format_args!("add.u32 {position}, {position}, {along};\nbra LOOP;\nSUMMED:"));

        // Parts in shared memory, those of one result `across` apart.
        let (base, slot, own) = (to.r(), to.r(), to.r());
        to.write(format_args!("mov.u32 {base}, parts;\nmad.lo.u32 {slot}, {lane}, {across}, {mine};"));
        to.write(format_args!("mad.lo.u32 {slot}, {slot}, 4, {base};\nmad.lo.u32 {own}, {thread}, 4, {base};"));
        for (k, sum) in sums.iter().enumerate() {
            to.write(format_args!("st.shared.f32 [{slot}+{}], {sum};", 4 * BLOCK as usize * k));
        }
        let (step, other, idle) = (to.r(), to.r(), to.p());
        to.write(format_args!("mov.u32 {step}, {};\nTREE:\nbar.sync 0;", BLOCK / 2));
        to.write(format_args!("setp.lt.u32 {done}, {step}, {across};\n@{done} bra ADDED;"));
        to.write(format_args!("setp.ge.u32 {idle}, {thread}, {step};\n@{idle} bra NEXT;"));
        to.write(format_args!("mad.lo.u32 {other}, {step}, 4, {own};"));
        for k in 0..sums.len() {
            let (a, b, at) = (to.f(), to.f(), 4 * BLOCK as usize * k);
            to.write(format_args!("ld.shared.f32 {a}, [{own}+{at}];\nld.shared.f32 {b}, [{other}+{at}];"));
            to.write(format_args!("{} {a}, {a}, {b};\nst.shared.f32 [{own}+{at}], {a};", self.combine()));
        }
        to.write(format_args!("NEXT:\nshr.u32 {step}, {step}, 1;\nbra TREE;\nADDED:"));

        // The first `across` threads write a result each.
        to.write(format_args!("setp.ge.u32 {done}, {thread}, {across};\n@{done} bra END;"));
        let written = to.r();
        to.write(format_args!("mad.lo.u32 {written}, {block}, {across}, {thread};"));
        to.write(format_args!("setp.ge.u32 {done}, {written}, {results};\n@{done} bra END;"));
        let pointers: Vec<String> = (fields.inputs..fields.operands()).map(|i| to.field("u64", 8 * i)).collect();
        let strides: Vec<usize> = (fields.inputs..fields.operands()).map(|i| fields.kept_strides(i)).collect();
        let targets = to.locate(&written, fields.kept, fields.kept_dims(), &strides, &pointers);
        let wide = to.d();
        to.write(format_args!("cvt.u64.u32 {wide}, {chunk};"));
        for (k, target) in targets.iter().enumerate() {
            let stride = to.field("u64", fields.chunk_strides() + 8 * k);
            let (product, address, value) = (to.d(), to.d(), to.f());
            to.write(format_args!("mul.lo.u64 {product}, {wide}, {stride};\nadd.u64 {address}, {target}, {product};"));
            to.write(format_args!("ld.shared.f32 {value}, [{own}+{}];", 4 * BLOCK as usize * k));
            to.store(&address, dtypes[fields.inputs + k], &[value]);
        }
        to.write(format_args!("END:\nret;"));
        to.finish(fields.bytes(), 4 * BLOCK as usize * sums.len())
    }
}

/// Results of a reduction: the space of those, with the strides of inputs and outputs; that of what is reduced, with
/// the strides of inputs.
struct Spaces {
    kept: Space,
    summed: Space,
    rows: bool,
}

/// `outputs = reduce over the axes where an output has size 1 of program(inputs)`.
pub(super) fn reduce(
    at: At<'_>,
    program: &Program,
    reduce: Reduce,
    inputs: &[View],
    scalars: &[f64],
    outputs: &[View],
) -> Result<()> {
    check_dtypes(program, &inputs.iter().chain(outputs).collect::<Vec<_>>())?;
    let (Some(first), Some(target)) = (inputs.first(), outputs.first()) else { return Ok(()) };
    let reduced = |axis: usize| target.dims[axis] == 1 && first.dims[axis] != 1;
    let all: Vec<&[usize]> = inputs.iter().chain(outputs).map(|v| &v.strides[..]).collect();
    // The order in memory is that of the first input that varies most.
    let lead = inputs.iter().max_by_key(|v| v.strides.iter().filter(|s| **s > 0).count()).unwrap_or(first);
    let order = memory_order(&lead.strides);
    let inner = order.iter().rev().copied().find(|&a| first.dims[a] != 1);
    let kept = Space::new(&first.dims, &all, order.iter().copied().filter(|&a| !reduced(a)));
    let axes = order.iter().copied().filter(|&a| reduced(a));
    let summed = Space::new(&first.dims, &all[..inputs.len()], axes);
    let spaces = Spaces { kept, summed, rows: inner.is_none_or(reduced) };
    run(at, program, reduce, inputs, scalars, outputs, spaces)
}

fn run(
    at: At<'_>,
    program: &Program,
    reduce: Reduce,
    inputs: &[View],
    scalars: &[f64],
    outputs: &[View],
    Spaces { kept, summed, rows }: Spaces,
) -> Result<()> {
    let views: Vec<&View> = inputs.iter().collect();
    let (width, runs) =
        if rows { width_of(&views, &summed.dims, &summed.strides) } else { (1, vec![Run::Dense; inputs.len()]) };
    let (results, positions) = (kept.len(), summed.len() / width);
    if results == 0 {
        return Ok(());
    }
    // Powers of two: `along` threads add the parts of one result, `across` results share a block.
    let block = BLOCK as usize;
    let limit = if rows { 1 } else { NEIGHBOURS.min(results.next_power_of_two()) };
    let along = (block / limit).min(positions.next_power_of_two());
    let across = block / along;
    let blocks = results.div_ceil(across);
    let chunks = (BLOCKS / blocks).min(positions.div_ceil(along * SERIAL)).max(1);
    let length = positions.div_ceil(chunks).max(1);
    let chunks = positions.div_ceil(length).max(1);

    // Where there are several chunks, their results are f32, chunk by chunk.
    let parts = (chunks > 1).then(|| scratch(at.pool, 4 * outputs.len() * chunks * results)).transpose()?;
    let part = |k: usize| parts.as_ref().map(|p| *p.block() + (4 * k * chunks * results) as u64);
    let dtypes: Vec<DType> = inputs
        .iter()
        .map(|v| v.dtype)
        .chain(outputs.iter().map(|v| if chunks > 1 { DType::F32 } else { v.dtype }))
        .collect();
    let fields = Fields {
        inputs: inputs.len(),
        outputs: outputs.len(),
        kept: kept.dims.len(),
        summed: summed.dims.len(),
        scalars: scalars.len(),
    };
    let dense = View::dense(0, DType::F32, &kept.dims).strides;
    let mut arguments = Arguments::default();
    inputs.iter().for_each(|v| arguments.u64(v.address));
    (0..outputs.len()).for_each(|k| arguments.u64(part(k).unwrap_or(outputs[k].address)));
    for (operand, dtype) in dtypes.iter().enumerate() {
        let strides = if operand >= inputs.len() && chunks > 1 { &dense } else { &kept.strides[operand] };
        strides.iter().for_each(|s| arguments.u64((s * dtype.size()) as u64));
    }
    for (view, strides) in inputs.iter().zip(&summed.strides) {
        for (axis, &stride) in strides.iter().enumerate() {
            let elements = if axis + 1 == strides.len() { stride * width } else { stride };
            arguments.u64((elements * view.dtype.size()) as u64);
        }
    }
    (0..outputs.len()).for_each(|_| arguments.u64((4 * results) as u64));
    kept.dims.iter().for_each(|&d| arguments.u32(d as u32));
    for (axis, &size) in summed.dims.iter().enumerate() {
        arguments.u32((if axis + 1 == summed.dims.len() { size / width } else { size }) as u32);
    }
    for count in [results, positions, length, across.trailing_zeros() as usize] {
        arguments.u32(count_of("reduce", count)?);
    }
    scalars.iter().for_each(|&s| arguments.f32(s as f32));

    let kind = Kind { program: program.lowered(), reduce, dtypes: &dtypes, runs: &runs, width, rows };
    let rest = [fields.kept, fields.summed, width, usize::from(rows)];
    let number = 1 + reduce as u64;
    let mut key = key_of(number, program, &views, &runs, &rest);
    key.extend(dtypes[inputs.len()..].iter().map(|&d| d as u64));
    if u32::try_from(chunks).is_err() || 4 * block * outputs.len() > 48 << 10 {
        return Err(Error::argument("reduce", "at most 48 results at once", outputs.len()));
    }
    let launched = at.gpu.printed(key, || kind.print(&fields)).and_then(|kernel| {
        let launch = Launch { grid: [blocks as u32, chunks as u32, 1], block: BLOCK, shared: 0 };
        // SAFETY: the argument is laid out as the kernel was printed for; views of tensors lie in their memory, the
        // parts in the scratch, and the ops give outputs that nobody else uses.
        unsafe { at.gpu.launch(&kernel, launch, &arguments.0[..]) }
    });
    launched.map_err(|failure| at.gpu.failed("reduce", failure))?;
    if chunks == 1 {
        return Ok(());
    }
    let identity = Program::of(&Function::build(|[x]| [x]));
    for (k, output) in outputs.iter().enumerate() {
        let from = View { address: part(k).unwrap_or(0), ..View::dense(0, DType::F32, &kept.dims) };
        let strides = vec![dense.clone(), kept.strides[inputs.len() + k].clone()];
        let spaces = Spaces {
            kept: Space { dims: kept.dims.clone(), strides },
            summed: Space { dims: vec![chunks], strides: vec![vec![results]] },
            rows: false,
        };
        run(at, &identity, reduce, &[from], &[], std::slice::from_ref(output), spaces)?;
    }
    Ok(())
}
