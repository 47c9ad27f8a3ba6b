//! The nodes of a function and what they compute.

use std::hash::{BuildHasherDefault, Hasher as _};

use crate::cpu::math;

/// The index of a node in its function; operands come before what uses them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeId(pub u32);

/// One operation of a function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Node {
    /// The element of an input.
    Input(u32),
    /// A scalar that arrives at run time.
    Scalar(u32),
    /// A number, by its bits as f64.
    Constant(u64),
    /// A function of one value.
    Unary(Unary, NodeId),
    /// A function of two values.
    Binary(Binary, NodeId, NodeId),
    /// The third where the first is below the second, else the fourth.
    Select(NodeId, NodeId, NodeId, NodeId),
}

/// A function of one value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unary {
    /// `-x`.
    Neg,
    /// `|x|`.
    Abs,
    /// `e^x`.
    Exp,
    /// The natural logarithm.
    Log,
    /// The square root.
    Sqrt,
    /// `1 / sqrt(x)`.
    Rsqrt,
    /// `1 / x`.
    Recip,
    /// The sine.
    Sin,
    /// The cosine.
    Cos,
    /// The hyperbolic tangent.
    Tanh,
    /// The error function.
    Erf,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `x sigmoid(x)`.
    Silu,
    /// The derivative of [`Unary::Silu`].
    SiluGrad,
    /// GELU by its tanh form.
    GeluTanh,
    /// The derivative of [`Unary::GeluTanh`].
    GeluTanhGrad,
    /// The exact GELU.
    GeluErf,
    /// The derivative of [`Unary::GeluErf`].
    GeluErfGrad,
    /// `max(x, 0)`, NaN for NaN.
    Relu,
}

/// A function of two values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Binary {
    /// `a + b`.
    Add,
    /// `a - b`.
    Sub,
    /// `a b`.
    Mul,
    /// `a / b`.
    Div,
    /// The larger one; NaN if either is.
    Max,
    /// The smaller one; NaN if either is.
    Min,
}

impl Unary {
    /// The value in f64.
    pub fn evaluate(self, x: f64) -> f64 {
        math::unary_f64(self, x)
    }
}

impl Binary {
    /// The value in f64.
    pub fn evaluate(self, a: f64, b: f64) -> f64 {
        match self {
            Self::Add => a + b,
            Self::Sub => a - b,
            Self::Mul => a * b,
            Self::Div => a / b,
            Self::Max if a > b || a.is_nan() => a,
            Self::Min if a < b || a.is_nan() => a,
            Self::Max | Self::Min => b,
        }
    }
}

impl Node {
    pub(super) fn constant(value: f64) -> Self {
        // One zero, so that equal functions are equal.
        Self::Constant(if value == 0.0 { 0.0f64.to_bits() } else { value.to_bits() })
    }

    /// The number, if it is one.
    pub fn value(self) -> Option<f64> {
        match self {
            Self::Constant(bits) => Some(f64::from_bits(bits)),
            _ => None,
        }
    }

    /// The nodes it reads.
    pub fn operands(self) -> impl Iterator<Item = NodeId> {
        let (list, count) = match self {
            Self::Input(_) | Self::Scalar(_) | Self::Constant(_) => ([NodeId(0); 4], 0),
            Self::Unary(_, a) => ([a; 4], 1),
            Self::Binary(_, a, b) => ([a, b, b, b], 2),
            Self::Select(a, b, c, d) => ([a, b, c, d], 4),
        };
        list.into_iter().take(count)
    }

    /// The same operation on other nodes.
    pub(super) fn map(self, f: impl Fn(NodeId) -> NodeId) -> Self {
        match self {
            Self::Input(_) | Self::Scalar(_) | Self::Constant(_) => self,
            Self::Unary(op, a) => Self::Unary(op, f(a)),
            Self::Binary(op, a, b) => Self::Binary(op, f(a), f(b)),
            Self::Select(a, b, c, d) => Self::Select(f(a), f(b), f(c), f(d)),
        }
    }
}

/// A fast hash for small keys: the graphs are tiny and hashed at every operation.
pub(super) type Hasher = BuildHasherDefault<Fx>;

#[derive(Default)]
pub(super) struct Fx(u64);

impl Fx {
    fn mix(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl std::hash::Hasher for Fx {
    fn finish(&self) -> u64 {
        // The upper bits are the mixed ones; the table reads the lower.
        self.0 ^ (self.0 >> 32)
    }
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
    }
    fn write_u32(&mut self, value: u32) {
        self.mix(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        self.mix(value);
    }
    fn write_usize(&mut self, value: usize) {
        self.mix(value as u64);
    }
    fn write_isize(&mut self, value: isize) {
        self.mix(value as u64);
    }
}

/// The hash of anything, the same in every run.
pub(super) fn hash_of(value: &impl std::hash::Hash) -> u64 {
    let mut hasher = Fx::default();
    value.hash(&mut hasher);
    hasher.finish()
}
