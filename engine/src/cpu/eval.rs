//! Evaluates programs on blocks: each instruction is one SIMD loop over a block that stays in cache.
#![expect(clippy::eq_op)] // `a != a` asks for NaN in loops that become SIMD

use half::{bf16, f16};

use super::View;
use super::blocks::BLOCK;
use super::gemm::Narrow;
use super::gemm::scratch::Scratch;
use super::isa::Isa;
use super::lanes::{LANES, fold};
use super::math::Real;
use super::opcode_loops::{Kernel, arity, kernel};
use crate::DType;
use crate::expr::{Program, Reduce};

/// An element as it lies in memory.
pub(super) trait Stored: Copy {
    fn to_f32(self) -> f32;
    fn to_f64(self) -> f64;
    fn of_f32(v: f32) -> Self;
    fn of_f64(v: f64) -> Self;
}

macro_rules! stored {
    ($($t:ty: $to32:expr, $to64:expr, $of32:expr, $of64:expr;)*) => {$(
        impl Stored for $t {
            #[inline(always)]
            fn to_f32(self) -> f32 { ($to32)(self) }
            #[inline(always)]
            fn to_f64(self) -> f64 { ($to64)(self) }
            #[inline(always)]
            fn of_f32(v: f32) -> Self { ($of32)(v) }
            #[inline(always)]
            fn of_f64(v: f64) -> Self { ($of64)(v) }
        }
    )*};
}
stored! {
    f32: |x| x, |x| x as f64, |v| v, |v| v as f32;
    f64: |x| x as f32, |x| x, |v| v as f64, |v| v;
    u32: |x| x as f32, |x| x as f64, |v| v as u32, |v| v as u32;
    bf16: Narrow::widen, |x: bf16| x.widen() as f64, Narrow::round, |v| Narrow::round(v as f32);
    f16: f16::to_f32, f16::to_f64, f16::from_f32, f16::from_f64;
}

/// How an arithmetic type reads and writes memory.
pub(super) trait Arithmetic: Real {
    fn load<S: Stored>(s: S) -> Self;
    fn store<S: Stored>(self) -> S;
    /// Whether memory of `dtype` is an array of this type.
    fn is(dtype: DType) -> bool;
}

impl Arithmetic for f32 {
    #[inline(always)]
    fn load<S: Stored>(s: S) -> Self {
        s.to_f32()
    }
    #[inline(always)]
    fn store<S: Stored>(self) -> S {
        S::of_f32(self)
    }
    #[inline(always)]
    fn is(dtype: DType) -> bool {
        dtype == DType::F32
    }
}

impl Arithmetic for f64 {
    #[inline(always)]
    fn load<S: Stored>(s: S) -> Self {
        s.to_f64()
    }
    #[inline(always)]
    fn store<S: Stored>(self) -> S {
        S::of_f64(self)
    }
    #[inline(always)]
    fn is(dtype: DType) -> bool {
        dtype == DType::F64
    }
}

/// One operand of a block: `rows x cols` elements from `ptr`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Window {
    pub ptr: *mut u8,
    pub dtype: DType,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl Window {
    /// The window of a view at an offset in elements.
    pub fn new(view: &View<'_>, offset: usize, row_stride: usize, col_stride: usize) -> Self {
        Self { ptr: view.ptr.wrapping_add(offset * view.dtype.size()), dtype: view.dtype, row_stride, col_stride }
    }

    /// Whether the block is one run of memory.
    fn is_run(&self, rows: usize, cols: usize) -> bool {
        (self.col_stride == 1 || cols == 1) && (rows == 1 || self.row_stride == cols)
    }
}

/// Where the results of a block go.
pub(super) enum Sink<'a> {
    /// To memory.
    Store(&'a [Window]),
    /// Each row into one number: `acc[output * rows + row]`.
    Rows(Reduce, &'a mut [f64]),
    /// Each column into one number: `acc[output * cols + col]`.
    Cols(Reduce, &'a mut [f64]),
}

/// Elements from the block of one slot to that of the next: not a power of two, where all would fall on the same lines of
/// the cache.
const STRIDE: usize = BLOCK + 16;

/// A step made ready: operands and target are places in [`Evaluator::places`].
struct Step<A> {
    kernel: Kernel<A>,
    operands: [usize; 4],
    target: usize,
}

/// The block of a place in the scratch.
fn block<A>(scratch: &Scratch, place: usize) -> *mut A {
    scratch.ptr().cast::<A>().wrapping_add(place * STRIDE)
}

/// A program made ready for one thread: what depends on scalars and constants alone is computed once.
pub(super) struct Evaluator<'a, A> {
    program: &'a Program,
    isa: Isa,
    steps: Vec<Step<A>>,
    /// Where things lie: the block of each slot (in scratch, or in an input or output in place), then single values,
    /// then blocks full of a single value.
    places: Vec<*mut A>,
    /// The places of the outputs.
    outputs: Vec<usize>,
    /// Memory of the single values and the blocks.
    values: Box<[A]>,
    scratch: Scratch,
    /// What the scratch of each input holds: broadcast operands are loaded once.
    held: Vec<Option<(Window, usize, usize)>>,
}

impl<'a, A: Arithmetic> Evaluator<'a, A> {
    pub fn new(program: &'a Program, scalars: &[f64], isa: Isa) -> Self {
        let slots = program.slots();
        // Each uniform and each step that has but single values gives one.
        let uniforms = scalars.iter().chain(&program.constants).map(|&value| A::from_f64(value));
        let mut values: Box<[A]> = uniforms.chain(program.instructions.iter().map(|_| A::ZERO)).collect();
        let base = values.as_mut_ptr();
        let mut places = vec![std::ptr::null_mut(); slots];
        places.extend((0..values.len()).map(|i| base.wrapping_add(i)));
        // The place of what each slot holds while the steps go by.
        let mut now: Vec<usize> = (0..slots).collect();
        for (i, slot) in (program.first_uniform()..program.first_register()).enumerate() {
            now[slot] = slots + i;
        }
        let is_single = |place: usize| place >= slots;
        let first_result = slots + program.first_register() - program.first_uniform();
        let (mut steps, mut full) = (Vec::with_capacity(program.instructions.len()), Vec::new());
        for (at, instruction) in program.instructions.iter().enumerate() {
            let (opcode, count) = (instruction.opcode, arity(instruction.opcode));
            let mut operands = instruction.operands.map(|slot| now[slot]);
            let single = (0..count).filter(|&k| is_single(operands[k])).fold(0u8, |bits, k| bits | 1 << k);
            let all = single.count_ones() as usize == count;
            let kernel = kernel(opcode, if all { 0 } else { single }, isa).or_else(|| {
                for operand in operands[..count].iter_mut().filter(|place| is_single(**place)) {
                    let block = full.iter().position(|value| value == operand).unwrap_or_else(|| {
                        full.push(*operand);
                        full.len() - 1
                    });
                    *operand = places.len() + block;
                }
                kernel(opcode, 0, isa)
            });
            let Some(kernel) = kernel else { continue };
            now[instruction.target] = if all { first_result + at } else { instruction.target };
            if all {
                // SAFETY: single values, each written before it is read.
                unsafe { kernel(places[first_result + at], operands.map(|place| places[place].cast_const()), 1) };
            } else {
                steps.push(Step { kernel, operands, target: instruction.target });
            }
        }
        let outputs = program.outputs.iter().map(|&slot| now[slot]).collect();
        let words = size_of::<A>() / size_of::<f32>();
        let scratch = Scratch::take((slots + full.len() + 1) * STRIDE * words);
        for (slot, place) in places[..slots].iter_mut().enumerate() {
            *place = block(&scratch, slot);
        }
        for (i, value) in full.into_iter().enumerate() {
            let own = block::<A>(&scratch, slots + 1 + i);
            // SAFETY: a block of the scratch, and a single value.
            unsafe { std::slice::from_raw_parts_mut(own, BLOCK).fill(places[value].read()) };
            places.push(own);
        }
        Self { program, isa, steps, places, outputs, values, scratch, held: vec![None; program.inputs] }
    }

    /// Runs the program on one block of at most [`BLOCK`] elements.
    ///
    /// # Safety
    /// The windows lie in memory of their dtypes, and nobody else writes there meanwhile. A stored window may be one
    /// of the inputs' exactly, else it overlaps none.
    pub unsafe fn run(&mut self, inputs: &[Window], rows: usize, cols: usize, sink: Sink<'_>) {
        // SAFETY: `isa` is never above what the machine has; the rest is the caller's promise.
        unsafe {
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 => self.run_avx512(inputs, rows, cols, sink),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => self.run_avx2(inputs, rows, cols, sink),
                _ => self.block(inputs, rows, cols, sink),
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    unsafe fn run_avx512(&mut self, inputs: &[Window], rows: usize, cols: usize, sink: Sink<'_>) {
        // SAFETY: the caller's promise.
        unsafe { self.block(inputs, rows, cols, sink) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2(&mut self, inputs: &[Window], rows: usize, cols: usize, sink: Sink<'_>) {
        // SAFETY: the caller's promise.
        unsafe { self.block(inputs, rows, cols, sink) }
    }

    /// Lets a register that becomes an output lie in the output itself, where that is a plain run that no input shares.
    #[inline(always)]
    fn aim(&mut self, windows: &[Window], inputs: &[Window], rows: usize, cols: usize) {
        let registers = self.program.first_register()..self.program.slots();
        for (k, (&place, window)) in self.outputs.iter().zip(windows).enumerate() {
            if !registers.contains(&place) || self.outputs[..k].contains(&place) {
                continue;
            }
            let plain = A::is(window.dtype) && window.is_run(rows, cols);
            let shared = inputs.iter().any(|input| std::ptr::eq(input.ptr, window.ptr));
            self.places[place] = if plain && !shared { window.ptr.cast() } else { block(&self.scratch, place) };
        }
    }

    /// Whether an input is a result as it is, and lies where another result is stored before it.
    #[inline(always)]
    fn is_overwritten(&self, input: usize, window: &Window, sink: &Sink<'_>) -> bool {
        match sink {
            Sink::Store(windows) if windows.len() > 1 => {
                self.outputs.contains(&input) && windows.iter().any(|w| std::ptr::eq(w.ptr, window.ptr))
            }
            _ => false,
        }
    }

    #[inline(always)]
    unsafe fn block(&mut self, inputs: &[Window], rows: usize, cols: usize, sink: Sink<'_>) {
        let n = rows * cols;
        debug_assert!(n <= BLOCK);
        for (i, window) in inputs.iter().enumerate() {
            if A::is(window.dtype) && window.is_run(rows, cols) && !self.is_overwritten(i, window, &sink) {
                self.places[i] = window.ptr.cast();
                continue;
            }
            let own = block(&self.scratch, i);
            self.places[i] = own;
            if self.held[i].is_some_and(|(w, r, c)| w == *window && r >= rows && c == cols) {
                continue;
            }
            // SAFETY: the window is readable; `own` has room for a block.
            unsafe { load(window, rows, cols, std::slice::from_raw_parts_mut(own, n)) };
            self.held[i] = Some((*window, rows, cols));
        }
        if let Sink::Store(windows) = &sink {
            self.aim(windows, inputs, rows, cols);
        }
        for step in &self.steps {
            let operands = step.operands.map(|place| self.places[place].cast_const());
            // SAFETY: blocks hold `n` elements, and the target is a register that the step does not read.
            unsafe { (step.kernel)(self.places[step.target], operands, n) };
        }
        let slots = self.program.slots();
        let singles = slots..slots + self.values.len();
        let blocks = self.outputs.iter().map(|&place| {
            let from = self.places[place];
            if !singles.contains(&place) {
                // SAFETY: results lie in registers, or are inputs read in place.
                return unsafe { std::slice::from_raw_parts(from.cast_const(), n) };
            }
            // SAFETY: the block past the slots' is for results that are one value, one at a time.
            unsafe {
                let spare = std::slice::from_raw_parts_mut(block::<A>(&self.scratch, slots), n);
                spare.fill(from.read());
                spare
            }
        });
        match sink {
            Sink::Store(windows) => {
                for (values, window) in blocks.zip(windows) {
                    if !std::ptr::eq(values.as_ptr().cast(), window.ptr) {
                        // SAFETY: the window is writable.
                        unsafe { store(window, rows, cols, values) };
                    }
                }
            }
            Sink::Rows(kind, acc) => {
                for (values, acc) in blocks.zip(acc.chunks_exact_mut(rows)) {
                    for (row, acc) in values.chunks_exact(cols).zip(acc) {
                        *acc = combine(kind, *acc, fold_run(kind, row));
                    }
                }
            }
            Sink::Cols(kind, acc) => {
                for (values, acc) in blocks.zip(acc.chunks_exact_mut(cols)) {
                    fold_rows(kind, values, acc);
                }
            }
        }
    }
}

/// The neutral element of a reduction.
pub(super) fn neutral(kind: Reduce) -> f64 {
    match kind {
        Reduce::Sum => 0.0,
        Reduce::Max => f64::NEG_INFINITY,
    }
}

/// Combines two partial results.
#[inline(always)]
pub(super) fn combine(kind: Reduce, a: f64, b: f64) -> f64 {
    match kind {
        Reduce::Sum => a + b,
        Reduce::Max => {
            if a > b || a.is_nan() {
                a
            } else {
                b
            }
        }
    }
}

/// The same in the arithmetic of a program.
#[inline(always)]
fn join<A: Real>(kind: Reduce, a: A, b: A) -> A {
    match kind {
        Reduce::Sum => a.add(b),
        Reduce::Max => {
            if a > b || a != a {
                a
            } else {
                b
            }
        }
    }
}

/// Rows into one, `acc.len()` columns: down a block in the program's own arithmetic, since a block is few rows.
#[inline(always)]
fn fold_rows<A: Real>(kind: Reduce, values: &[A], acc: &mut [f64]) {
    let cols = acc.len();
    let (whole, rest) = acc.as_chunks_mut::<LANES>();
    for (at, acc) in whole.iter_mut().enumerate() {
        let mut lanes = [A::from_f64(neutral(kind)); LANES];
        for row in values.chunks_exact(cols) {
            let row = &row[at * LANES..][..LANES];
            lanes.iter_mut().zip(row).for_each(|(a, &x)| *a = join(kind, *a, x));
        }
        acc.iter_mut().zip(lanes).for_each(|(a, x)| *a = combine(kind, *a, x.to_f64()));
    }
    let from = whole.len() * LANES;
    for row in values.chunks_exact(cols) {
        rest.iter_mut().zip(&row[from..]).for_each(|(a, x)| *a = combine(kind, *a, x.to_f64()));
    }
}

/// A run into one number. At most [`BLOCK`] elements, so f32 lanes lose little.
#[inline(always)]
fn fold_run<A: Real>(kind: Reduce, values: &[A]) -> f64 {
    let join = |a, b| join(kind, a, b);
    let mut lanes = [A::from_f64(neutral(kind)); LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = join(*lane, x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = join(*lane, x);
    }
    fold(lanes, join).to_f64()
}

#[inline(always)]
unsafe fn load<A: Arithmetic>(window: &Window, rows: usize, cols: usize, out: &mut [A]) {
    // SAFETY: the caller's promise: the window is readable as its dtype.
    unsafe {
        match window.dtype {
            DType::F32 => load_as::<A, f32>(window, rows, cols, out),
            DType::BF16 => load_as::<A, bf16>(window, rows, cols, out),
            DType::F16 => load_as::<A, f16>(window, rows, cols, out),
            DType::F64 => load_as::<A, f64>(window, rows, cols, out),
            DType::U32 => load_as::<A, u32>(window, rows, cols, out),
        }
    }
}

#[inline(always)]
unsafe fn load_as<A: Arithmetic, S: Stored>(window: &Window, rows: usize, cols: usize, out: &mut [A]) {
    let from = window.ptr.cast::<S>().cast_const();
    if window.row_stride == 0 && window.col_stride == 0 {
        // SAFETY: the one element is readable.
        out.fill(A::load(unsafe { from.read() }));
        return;
    }
    for (row, out) in out.chunks_exact_mut(cols).enumerate().take(rows) {
        // SAFETY: all elements of the window are readable.
        unsafe {
            let from = from.add(row * window.row_stride);
            match window.col_stride {
                0 => out.fill(A::load(from.read())),
                1 => out.iter_mut().enumerate().for_each(|(i, o)| *o = A::load(from.add(i).read())),
                2 => out.iter_mut().enumerate().for_each(|(i, o)| *o = A::load(from.add(2 * i).read())),
                step => out.iter_mut().enumerate().for_each(|(i, o)| *o = A::load(from.add(step * i).read())),
            }
        }
    }
}

#[inline(always)]
unsafe fn store<A: Arithmetic>(window: &Window, rows: usize, cols: usize, values: &[A]) {
    // SAFETY: the caller's promise: the window is writable as its dtype.
    unsafe {
        match window.dtype {
            DType::F32 => store_as::<A, f32>(window, rows, cols, values),
            DType::BF16 => store_as::<A, bf16>(window, rows, cols, values),
            DType::F16 => store_as::<A, f16>(window, rows, cols, values),
            DType::F64 => store_as::<A, f64>(window, rows, cols, values),
            DType::U32 => store_as::<A, u32>(window, rows, cols, values),
        }
    }
}

#[inline(always)]
unsafe fn store_as<A: Arithmetic, S: Stored>(window: &Window, rows: usize, cols: usize, values: &[A]) {
    let to = window.ptr.cast::<S>();
    for (row, values) in values.chunks_exact(cols).enumerate().take(rows) {
        // SAFETY: all elements of the window are writable.
        unsafe {
            let to = to.add(row * window.row_stride);
            match window.col_stride {
                1 => values.iter().enumerate().for_each(|(i, v)| to.add(i).write(v.store())),
                2 => values.iter().enumerate().for_each(|(i, v)| to.add(2 * i).write(v.store())),
                step => values.iter().enumerate().for_each(|(i, v)| to.add(step * i).write(v.store())),
            }
        }
    }
}
