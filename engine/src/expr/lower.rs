//! Programs in steps that every machine has.
//!
//! The built-in exp, log, sin, cos and tanh of GPUs are too coarse, and erf is missing. So they are written once, in
//! `elementary.rs`, as range reductions and polynomials of simple steps, and a backend that prints kernels (PTX, WGSL)
//! prints simple steps alone: a [`Lowered`] program.

use std::collections::HashMap;

use super::{Binary, Opcode, Program};

/// The index of the step that gives a value.
pub type Value = u32;

/// A simple step. Values are f32, those of the steps from [`Step::Bits`] on are i32 unless it says otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Step {
    /// An input of the program.
    Input(u32),
    /// A scalar of the program.
    Scalar(u32),
    /// A constant by its bits; it may be infinite or NaN.
    Const(u32),
    /// `-a`
    Neg(Value),
    /// `|a|`
    Abs(Value),
    /// The square root.
    Sqrt(Value),
    /// The nearest integer, half to even; any choice of the even one will do.
    Round(Value),
    /// `a + b`
    Add(Value, Value),
    /// `a - b`
    Sub(Value, Value),
    /// `a * b`
    Mul(Value, Value),
    /// `a / b`
    Div(Value, Value),
    /// The larger; NaN wins.
    Max(Value, Value),
    /// The smaller; NaN wins.
    Min(Value, Value),
    /// `a * b + c`, rounded once where the machine can.
    MulAdd(Value, Value, Value),
    /// `if a < b { c } else { d }`; a comparison with NaN is false.
    Select(Value, Value, Value, Value),
    /// The f32 of these bits.
    Float(Value),
    /// The f32 of an integer.
    FromInt(Value),
    /// The bits of an f32.
    Bits(Value),
    /// The integer that an f32 holds (anything where it holds none).
    ToInt(Value),
    /// A constant.
    Int(i32),
    /// `a + b`, wrapping.
    IntAdd(Value, Value),
    /// `a - b`, wrapping.
    IntSub(Value, Value),
    /// `a & b`
    And(Value, Value),
    /// `a ^ b`
    Xor(Value, Value),
    /// `a << n`
    ShiftLeft(Value, u32),
    /// `a >> n`, with the sign.
    ShiftRight(Value, u32),
}

impl Step {
    /// The values that it reads.
    pub fn operands(self) -> impl Iterator<Item = Value> {
        let (ids, n) = match self {
            Self::Input(_) | Self::Scalar(_) | Self::Const(_) | Self::Int(_) => ([0; 4], 0),
            Self::Neg(a) | Self::Abs(a) | Self::Sqrt(a) | Self::Round(a) => ([a, 0, 0, 0], 1),
            Self::Float(a) | Self::FromInt(a) | Self::Bits(a) | Self::ToInt(a) => ([a, 0, 0, 0], 1),
            Self::ShiftLeft(a, _) | Self::ShiftRight(a, _) => ([a, 0, 0, 0], 1),
            Self::Add(a, b) | Self::Sub(a, b) | Self::Mul(a, b) | Self::Div(a, b) => ([a, b, 0, 0], 2),
            Self::Max(a, b) | Self::Min(a, b) => ([a, b, 0, 0], 2),
            Self::IntAdd(a, b) | Self::IntSub(a, b) | Self::And(a, b) | Self::Xor(a, b) => ([a, b, 0, 0], 2),
            Self::MulAdd(a, b, c) => ([a, b, c, 0], 3),
            Self::Select(a, b, c, d) => ([a, b, c, d], 4),
        };
        ids.into_iter().take(n)
    }

    /// Whether the value is an i32 rather than an f32.
    pub fn is_int(self) -> bool {
        matches!(
            self,
            Self::Bits(_)
                | Self::ToInt(_)
                | Self::Int(_)
                | Self::IntAdd(..)
                | Self::IntSub(..)
                | Self::And(..)
                | Self::Xor(..)
                | Self::ShiftLeft(..)
                | Self::ShiftRight(..)
        )
    }
}

/// A program in simple steps: step `i` gives value `i`, and reads earlier ones.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// Number of inputs.
    pub inputs: usize,
    /// Number of scalars.
    pub scalars: usize,
    /// The steps, each once.
    pub steps: Vec<Step>,
    /// The value (an f32) of each output.
    pub outputs: Vec<Value>,
}

impl Lowered {
    /// Lowers a program. See also [`Program::lowered`], which keeps the result.
    pub fn of(program: &Program) -> Self {
        let mut to = Builder::default();
        let mut slots = vec![0; program.slots()];
        let (inputs, scalars) = (program.inputs, program.scalars);
        for (slot, value) in slots.iter_mut().enumerate().take(program.first_register()) {
            *value = match slot {
                i if i < inputs => to.push(Step::Input(i as u32)),
                i if i < inputs + scalars => to.push(Step::Scalar((i - inputs) as u32)),
                i => to.float(program.constants[i - inputs - scalars] as f32),
            };
        }
        for step in &program.instructions {
            let [a, b, c, d] = step.operands.map(|slot| slots[slot]);
            slots[step.target] = match step.opcode {
                Opcode::Unary(op) => to.unary(op, a),
                Opcode::Binary(op) => match op {
                    Binary::Add => to.add(a, b),
                    Binary::Sub => to.sub(a, b),
                    Binary::Mul => to.mul(a, b),
                    Binary::Div => to.div(a, b),
                    Binary::Max => to.push(Step::Max(a, b)),
                    Binary::Min => to.push(Step::Min(a, b)),
                    Binary::RoundBf16 => to.round_bf16(a, b),
                },
                Opcode::MulAdd => to.mul_add(a, b, c),
                Opcode::MulSub => {
                    let minus = to.neg(c);
                    to.mul_add(a, b, minus)
                }
                Opcode::Select => to.select_lt(a, b, c, d),
            };
        }
        let outputs = program.outputs.iter().map(|&slot| slots[slot]).collect();
        Self { inputs, scalars, steps: to.steps, outputs }
    }
}

/// Writes steps down; equal ones are one.
#[derive(Debug, Default)]
pub(super) struct Builder {
    steps: Vec<Step>,
    known: HashMap<Step, Value>,
}

macro_rules! steps {
    ($($name:ident($($arg:ident: $t:ty),*) = $step:ident;)*) => {
        impl Builder {$(
            pub(super) fn $name(&mut self, $($arg: $t),*) -> Value {
                self.push(Step::$step($($arg),*))
            }
        )*}
    };
}
steps! {
    neg(a: Value) = Neg;
    abs(a: Value) = Abs;
    sqrt(a: Value) = Sqrt;
    round(a: Value) = Round;
    add(a: Value, b: Value) = Add;
    sub(a: Value, b: Value) = Sub;
    mul(a: Value, b: Value) = Mul;
    div(a: Value, b: Value) = Div;
    mul_add(a: Value, b: Value, c: Value) = MulAdd;
    select_lt(a: Value, b: Value, c: Value, d: Value) = Select;
    int(value: i32) = Int;
    bits(a: Value) = Bits;
    bits_float(a: Value) = Float;
    float_int(a: Value) = ToInt;
    int_float(a: Value) = FromInt;
    int_add(a: Value, b: Value) = IntAdd;
    int_sub(a: Value, b: Value) = IntSub;
    and(a: Value, b: Value) = And;
    xor(a: Value, b: Value) = Xor;
    shift_left(a: Value, by: u32) = ShiftLeft;
    shift_right(a: Value, by: u32) = ShiftRight;
}

impl Builder {
    fn push(&mut self, step: Step) -> Value {
        *self.known.entry(step).or_insert_with(|| {
            self.steps.push(step);
            (self.steps.len() - 1) as Value
        })
    }

    /// A constant.
    pub(super) fn float(&mut self, value: f32) -> Value {
        self.push(Step::Const(value.to_bits()))
    }
}
