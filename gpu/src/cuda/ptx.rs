//! Prints programs as PTX (ISA 8.0, sm_80).
//!
//! A printed kernel has one parameter: a struct of pointers, byte strides, sizes and scalars, so that its text depends
//! on the program, the dtypes, the number of axes and the width of its accesses, never on sizes.

use std::fmt::Write;

use flowtape_engine::DType;
use flowtape_engine::expr::{Lowered, Step};

/// The name of every printed kernel.
pub(super) const ENTRY: &str = "kernel";
/// Threads of a block of a printed kernel.
pub(super) const BLOCK: u32 = 256;

/// The argument of a printed kernel, and where its fields lie.
#[derive(Clone, Debug, Default)]
pub(super) struct Arguments(pub Vec<u8>);

impl Arguments {
    pub fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    pub fn f32(&mut self, value: f32) {
        self.0.extend(value.to_le_bytes());
    }
}

/// How an operand lies along the innermost axis, where several elements are taken at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Run {
    /// Without gaps, from a multiple of 16 bytes on.
    Dense,
    /// One element for all.
    Same,
}

/// The text of a kernel under construction. Registers are `%f`, `%r`, `%d` (64 bits), `%h` (16 bits), `%g` (f64), `%p`.
#[derive(Debug, Default)]
pub(super) struct Printer {
    body: String,
    counts: [usize; 6],
}

macro_rules! line {
    ($to:expr, $($text:tt)*) => {
        let _ = writeln!($to.body, $($text)*); // a String takes all that is written to it
    };
}

const KINDS: [(&str, &str); 6] = [("f32", "f"), ("b32", "r"), ("b64", "d"), ("b16", "h"), ("f64", "g"), ("pred", "p")];

impl Printer {
    fn register(&mut self, kind: usize) -> String {
        self.counts[kind] += 1;
        format!("%{}{}", KINDS[kind].1, self.counts[kind] - 1)
    }

    pub fn f(&mut self) -> String {
        self.register(0)
    }

    pub fn r(&mut self) -> String {
        self.register(1)
    }

    pub fn d(&mut self) -> String {
        self.register(2)
    }

    pub fn p(&mut self) -> String {
        self.register(5)
    }

    /// Writes one instruction or label.
    pub fn write(&mut self, text: std::fmt::Arguments<'_>) {
        line!(self, "{text}");
    }

    /// Reads a field of the argument.
    pub fn field(&mut self, kind: &str, at: usize) -> String {
        let to = match kind {
            "u64" => self.d(),
            "f32" => self.f(),
            _ => self.r(),
        };
        line!(self, "ld.param.{kind} {to}, [args+{at}];");
        to
    }

    /// The kernel's text.
    pub fn finish(self, argument_bytes: usize, shared: usize) -> String {
        let mut text = format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry {ENTRY}(.param .align 8 .b8 args[{argument_bytes}])\n.maxntid {BLOCK}, 1, 1\n{{\n"
        );
        for ((kind, letter), count) in KINDS.iter().zip(self.counts) {
            if count > 0 {
                let _ = writeln!(text, ".reg .{kind} %{letter}<{count}>;");
            }
        }
        if shared > 0 {
            let _ = writeln!(text, ".shared .align 16 .b8 parts[{shared}];");
        }
        text + &self.body + "}\n"
    }

    /// Adds to each address (64 bits) what position `index` of the axes takes: sizes are 32-bit fields from `dims_at`
    /// on, byte strides 64-bit fields from `strides_at[operand]` on. The outermost axis needs no division.
    pub fn locate(
        &mut self,
        index: &str,
        rank: usize,
        dims_at: usize,
        strides_at: &[usize],
        addresses: &[String],
    ) -> Vec<String> {
        let mut addresses = addresses.to_vec();
        let mut rest = index.to_owned();
        for axis in (0..rank).rev() {
            let at = if axis == 0 {
                rest.clone()
            } else {
                let (size, quotient, product, at) =
                    (self.field("u32", dims_at + 4 * axis), self.r(), self.r(), self.r());
                line!(self, "div.u32 {quotient}, {rest}, {size};");
                line!(self, "mul.lo.u32 {product}, {quotient}, {size};");
                line!(self, "sub.u32 {at}, {rest}, {product};");
                rest = quotient;
                at
            };
            let wide = self.d();
            line!(self, "cvt.u64.u32 {wide}, {at};");
            for (address, strides) in addresses.iter_mut().zip(strides_at) {
                let (stride, product, sum) = (self.field("u64", strides + 8 * axis), self.d(), self.d());
                line!(self, "mul.lo.u64 {product}, {wide}, {stride};");
                line!(self, "add.u64 {sum}, {address}, {product};");
                *address = sum;
            }
        }
        addresses
    }

    /// Reads `width` elements as f32.
    pub fn load(&mut self, address: &str, dtype: DType, run: Run, width: usize) -> Vec<String> {
        if width == 1 || run == Run::Same {
            let value = self.load_one(address, dtype);
            return vec![value; width];
        }
        let mut values = Vec::with_capacity(width);
        for piece in 0..width * dtype.size() / 16 {
            let words: Vec<String> = (0..4).map(|_| self.r()).collect();
            line!(self, "ld.global.v4.b32 {{{}}}, [{address}+{}];", words.join(", "), 16 * piece);
            for word in words {
                match dtype {
                    DType::F32 => values.push(self.float(&word)),
                    DType::BF16 => {
                        let (low, high) = (self.r(), self.r());
                        line!(self, "shl.b32 {low}, {word}, 16;");
                        line!(self, "and.b32 {high}, {word}, 0xffff0000;");
                        values.extend([self.float(&low), self.float(&high)]);
                    }
                    DType::F16 => {
                        let (low, high) = (self.register(3), self.register(3));
                        line!(self, "mov.b32 {{{low}, {high}}}, {word};");
                        for half in [low, high] {
                            let value = self.f();
                            line!(self, "cvt.f32.f16 {value}, {half};");
                            values.push(value);
                        }
                    }
                    // Elements of 8 bytes are taken one by one.
                    DType::U32 | DType::F64 => {
                        let value = self.f();
                        line!(self, "cvt.rn.f32.u32 {value}, {word};");
                        values.push(value);
                    }
                }
            }
        }
        values
    }

    fn float(&mut self, bits: &str) -> String {
        let value = self.f();
        line!(self, "mov.b32 {value}, {bits};");
        value
    }

    fn load_one(&mut self, address: &str, dtype: DType) -> String {
        let value = self.f();
        match dtype {
            DType::F32 => {
                line!(self, "ld.global.f32 {value}, [{address}];");
            }
            DType::U32 => {
                let word = self.r();
                line!(self, "ld.global.u32 {word}, [{address}];");
                line!(self, "cvt.rn.f32.u32 {value}, {word};");
            }
            DType::BF16 => {
                let (word, wide) = (self.r(), self.r());
                line!(self, "ld.global.u16 {word}, [{address}];");
                line!(self, "shl.b32 {wide}, {word}, 16;");
                line!(self, "mov.b32 {value}, {wide};");
            }
            DType::F16 => {
                let half = self.register(3);
                line!(self, "ld.global.u16 {half}, [{address}];");
                line!(self, "cvt.f32.f16 {value}, {half};");
            }
            DType::F64 => {
                let double = self.register(4);
                line!(self, "ld.global.f64 {double}, [{address}];");
                line!(self, "cvt.rn.f32.f64 {value}, {double};");
            }
        }
        value
    }

    /// Writes f32 values as `dtype`, several at once in 16-byte pieces.
    pub fn store(&mut self, address: &str, dtype: DType, values: &[String]) {
        if let [value] = values {
            return self.store_one(address, dtype, value);
        }
        let mut words = Vec::new();
        match dtype {
            DType::BF16 | DType::F16 => {
                let kind = if dtype == DType::BF16 { "bf16x2" } else { "f16x2" };
                for pair in values.chunks_exact(2) {
                    let word = self.r();
                    line!(self, "cvt.rn.{kind}.f32 {word}, {}, {};", pair[1], pair[0]);
                    words.push(word);
                }
            }
            _ => {
                for value in values {
                    let word = self.r();
                    match dtype {
                        DType::U32 => {
                            line!(self, "cvt.rzi.u32.f32 {word}, {value};");
                        }
                        _ => {
                            line!(self, "mov.b32 {word}, {value};");
                        }
                    }
                    words.push(word);
                }
            }
        }
        for (piece, four) in words.chunks_exact(4).enumerate() {
            line!(self, "st.global.v4.b32 [{address}+{}], {{{}}};", 16 * piece, four.join(", "));
        }
    }

    fn store_one(&mut self, address: &str, dtype: DType, value: &str) {
        match dtype {
            DType::F32 => {
                line!(self, "st.global.f32 [{address}], {value};");
            }
            DType::U32 => {
                let word = self.r();
                line!(self, "cvt.rzi.u32.f32 {word}, {value};");
                line!(self, "st.global.u32 [{address}], {word};");
            }
            DType::BF16 | DType::F16 => {
                let (half, kind) = (self.register(3), dtype.name());
                line!(self, "cvt.rn.{kind}.f32 {half}, {value};");
                line!(self, "st.global.u16 [{address}], {half};");
            }
            DType::F64 => {
                let double = self.register(4);
                line!(self, "cvt.f64.f32 {double}, {value};");
                line!(self, "st.global.f64 [{address}], {double};");
            }
        }
    }

    /// Reads `width` elements of each input, runs a program on them and writes its results: operands are inputs, then
    /// outputs.
    pub fn elements(
        &mut self,
        program: &Lowered,
        addresses: &[String],
        dtypes: &[DType],
        runs: &[Run],
        scalars: &[String],
        width: usize,
    ) {
        let loaded: Vec<Vec<String>> =
            (0..program.inputs).map(|i| self.load(&addresses[i], dtypes[i], runs[i], width)).collect();
        let constants = self.constants(program);
        let mut results = vec![Vec::with_capacity(width); program.outputs.len()];
        for element in 0..width {
            let inputs: Vec<String> = loaded.iter().map(|values| values[element].clone()).collect();
            let outputs = self.program(program, &constants, &inputs, scalars);
            results.iter_mut().zip(outputs).for_each(|(all, one)| all.push(one));
        }
        for (i, values) in results.iter().enumerate() {
            self.store(&addresses[program.inputs + i], dtypes[program.inputs + i], values);
        }
    }

    /// Constants of a program, once for all elements: by step.
    pub fn constants(&mut self, program: &Lowered) -> Vec<Option<String>> {
        let constant = |step: &Step| match *step {
            Step::Const(bits) => {
                let value = self.f();
                line!(self, "mov.f32 {value}, 0f{bits:08X};");
                Some(value)
            }
            Step::Int(value) => Some(value.to_string()),
            _ => None,
        };
        program.steps.iter().map(constant).collect()
    }

    /// The steps of a program for one element; its outputs.
    pub fn program(
        &mut self,
        program: &Lowered,
        constants: &[Option<String>],
        inputs: &[String],
        scalars: &[String],
    ) -> Vec<String> {
        let mut values: Vec<String> = Vec::with_capacity(program.steps.len());
        for (step, constant) in program.steps.iter().zip(constants) {
            let value = match (*step, constant) {
                (_, Some(constant)) => constant.clone(),
                (Step::Input(i), _) => inputs[i as usize].clone(),
                (Step::Scalar(i), _) => scalars[i as usize].clone(),
                (step, _) => {
                    let to = if step.is_int() { self.r() } else { self.f() };
                    self.step(step, &to, &|v| &values[v as usize]);
                    to
                }
            };
            values.push(value);
        }
        program.outputs.iter().map(|&v| values[v as usize].clone()).collect()
    }

    fn step<'a>(&mut self, step: Step, to: &str, value: &dyn Fn(u32) -> &'a str) {
        // Rounding is written out, so that no product is fused with a sum behind the program's back.
        let (name, operands): (&str, &[u32]) = match &step {
            Step::Neg(a) => ("neg.f32", &[*a]),
            Step::Abs(a) => ("abs.f32", &[*a]),
            Step::Sqrt(a) => ("sqrt.rn.f32", &[*a]),
            Step::Round(a) => ("cvt.rni.f32.f32", &[*a]),
            Step::Add(a, b) => ("add.rn.f32", &[*a, *b]),
            Step::Sub(a, b) => ("sub.rn.f32", &[*a, *b]),
            Step::Mul(a, b) => ("mul.rn.f32", &[*a, *b]),
            Step::Div(a, b) => ("div.rn.f32", &[*a, *b]),
            Step::Max(a, b) => ("max.NaN.f32", &[*a, *b]),
            Step::Min(a, b) => ("min.NaN.f32", &[*a, *b]),
            Step::MulAdd(a, b, c) => ("fma.rn.f32", &[*a, *b, *c]),
            Step::Float(a) | Step::Bits(a) => ("mov.b32", &[*a]),
            Step::FromInt(a) => ("cvt.rn.f32.s32", &[*a]),
            Step::ToInt(a) => ("cvt.rzi.s32.f32", &[*a]),
            Step::IntAdd(a, b) => ("add.s32", &[*a, *b]),
            Step::IntSub(a, b) => ("sub.s32", &[*a, *b]),
            Step::And(a, b) => ("and.b32", &[*a, *b]),
            Step::Xor(a, b) => ("xor.b32", &[*a, *b]),
            Step::ShiftLeft(a, n) => {
                line!(self, "shl.b32 {to}, {}, {n};", value(*a));
                return;
            }
            Step::ShiftRight(a, n) => {
                line!(self, "shr.s32 {to}, {}, {n};", value(*a));
                return;
            }
            Step::Select(a, b, c, d) => {
                let less = self.p();
                line!(self, "setp.lt.f32 {less}, {}, {};", value(*a), value(*b));
                line!(self, "selp.f32 {to}, {}, {}, {less};", value(*c), value(*d));
                return;
            }
            // Leaves, which have a value of their own.
            Step::Input(_) | Step::Scalar(_) | Step::Const(_) | Step::Int(_) => return,
        };
        let operands: Vec<&str> = operands.iter().map(|&v| value(v)).collect();
        line!(self, "{name} {to}, {};", operands.join(", "));
    }
}
