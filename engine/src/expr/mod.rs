//! Pointwise functions as data.
//!
//! A closure on [`Expr`] builds a [`Function`]; its gradient is another `Function`, derived symbolically; a
//! [`Program`] is what a backend evaluates in blocks or prints as a kernel.

pub(crate) mod coefficients;
mod elementary;
mod function;
mod gradient;
mod lower;
mod program;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::{Add, Div, Mul, Neg, Sub};

pub use function::Function;
pub use lower::{Lowered, Step, Value};
pub use program::{Instruction, Opcode, Program};

/// How a reduction combines elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reduce {
    /// The sum.
    Sum,
    /// The largest; NaN wins.
    Max,
}

/// A function of one number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unary {
    /// `-x`
    Neg,
    /// `e^x`
    Exp,
    /// The natural logarithm.
    Log,
    /// The square root.
    Sqrt,
    /// `1 / sqrt(x)`
    Rsqrt,
    /// `1 / x`
    Recip,
    /// `|x|`
    Abs,
    /// The sine of radians.
    Sin,
    /// The cosine of radians.
    Cos,
    /// The hyperbolic tangent.
    Tanh,
    /// The error function.
    Erf,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// GELU by its tanh form: `x sigmoid(2u)`, `2u = x (c + c 0.044715 x^2)` with `c = 2 sqrt(2 / pi)`.
    Gelu,
    /// The derivative of [`Unary::Gelu`].
    GeluSlope,
}

/// The factor of x in GELU's tanh form: `2 sqrt(2 / pi)`.
pub(crate) const GELU_FACTOR: f64 = 2.0 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
/// The factor of `x^2` beside it.
pub(crate) const GELU_CUBIC: f64 = 0.044715;

/// A function of two numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Binary {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`
    Div,
    /// The larger.
    Max,
    /// The smaller.
    Min,
    /// `a` rounded to bf16: the first 16 bits of the fraction `b`, in [0, 1), are added to the bits that bf16 has not, and those are
    /// cut off. What is not finite stays.
    RoundBf16,
}

/// The index of a node in its graph.
pub(crate) type Id = u32;

/// A node of a function. Its operands stand before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Node {
    Input(u32),
    Scalar(u32),
    /// A constant by its bits, so that nodes compare and hash.
    Const(u64),
    Unary(Unary, Id),
    Binary(Binary, Id, Id),
    /// `if a < b { c } else { d }`
    Select(Id, Id, Id, Id),
}

impl Node {
    pub(crate) fn operands(&self) -> impl Iterator<Item = Id> + use<> {
        let (ids, n) = match *self {
            Self::Input(_) | Self::Scalar(_) | Self::Const(_) => ([0; 4], 0),
            Self::Unary(_, a) => ([a, 0, 0, 0], 1),
            Self::Binary(_, a, b) => ([a, b, 0, 0], 2),
            Self::Select(a, b, c, d) => ([a, b, c, d], 4),
        };
        ids.into_iter().take(n)
    }

    pub(crate) fn map(self, f: impl Fn(Id) -> Id) -> Self {
        match self {
            Self::Unary(op, a) => Self::Unary(op, f(a)),
            Self::Binary(op, a, b) => Self::Binary(op, f(a), f(b)),
            Self::Select(a, b, c, d) => Self::Select(f(a), f(b), f(c), f(d)),
            leaf => leaf,
        }
    }
}

/// Nodes under construction: equal ones are one, constants are folded.
#[derive(Debug, Default)]
pub(crate) struct Graph(RefCell<(Vec<Node>, HashMap<Node, Id>)>);

impl Graph {
    pub(crate) fn push(&self, node: Node) -> Expr<'_> {
        let node = self.folded(node);
        let node = match node {
            Ok(node) => node,
            Err(id) => return Expr { graph: self, id },
        };
        let (nodes, ids) = &mut *self.0.borrow_mut();
        let id = *ids.entry(node).or_insert_with(|| {
            nodes.push(node);
            (nodes.len() - 1) as Id
        });
        Expr { graph: self, id }
    }

    pub(crate) fn constant(&self, value: f64) -> Expr<'_> {
        self.push(Node::Const(value.to_bits()))
    }

    pub(crate) fn into_nodes(self) -> Vec<Node> {
        self.0.into_inner().0
    }

    fn value(&self, id: Id) -> Option<f64> {
        match self.0.borrow().0[id as usize] {
            Node::Const(bits) => Some(f64::from_bits(bits)),
            _ => None,
        }
    }

    /// A simpler node, or the node that it already is. Nothing here changes NaN or infinity: `x * 0` stays.
    fn folded(&self, node: Node) -> Result<Node, Id> {
        let constant = |v: f64| Ok(Node::Const(v.to_bits()));
        match node {
            Node::Unary(Unary::Neg, a) => {
                if let Node::Unary(Unary::Neg, inner) = self.0.borrow().0[a as usize] {
                    return Err(inner);
                }
                self.value(a).map_or(Ok(node), |v| constant(-v))
            }
            Node::Binary(op, a, b) => match (op, self.value(a), self.value(b)) {
                (Binary::Add, Some(x), Some(y)) => constant(x + y),
                (Binary::Sub, Some(x), Some(y)) => constant(x - y),
                (Binary::Mul, Some(x), Some(y)) => constant(x * y),
                (Binary::Div, Some(x), Some(y)) => constant(x / y),
                (Binary::Add, Some(0.0), _) | (Binary::Mul, Some(1.0), _) => Err(b),
                (Binary::Add | Binary::Sub, _, Some(0.0)) | (Binary::Mul | Binary::Div, _, Some(1.0)) => Err(a),
                // Commutative: one order, so that equal nodes are one.
                (Binary::Add | Binary::Mul, ..) if a > b => Ok(Node::Binary(op, b, a)),
                _ => Ok(node),
            },
            Node::Select(_, _, c, d) if c == d => Err(c),
            _ => Ok(node),
        }
    }
}

/// A number of a pointwise function under construction.
#[derive(Clone, Copy, Debug)]
pub struct Expr<'a> {
    graph: &'a Graph,
    id: Id,
}

/// What may stand beside an [`Expr`]: another, or a constant.
pub trait Operand<'a> {
    /// As a node of the graph of `other`.
    fn beside(self, other: Expr<'a>) -> Expr<'a>;
}

impl<'a> Operand<'a> for Expr<'a> {
    fn beside(self, _: Expr<'a>) -> Expr<'a> {
        self
    }
}

impl<'a> Operand<'a> for f64 {
    fn beside(self, other: Expr<'a>) -> Expr<'a> {
        other.graph.constant(self)
    }
}

impl<'a> Expr<'a> {
    pub(crate) fn id(self) -> Id {
        self.id
    }

    fn unary(self, op: Unary) -> Self {
        self.graph.push(Node::Unary(op, self.id))
    }

    fn binary(self, op: Binary, other: impl Operand<'a>) -> Self {
        self.graph.push(Node::Binary(op, self.id, other.beside(self).id))
    }

    /// `if self < bound { then } else { otherwise }`. The comparison has no gradient; NaN gives `otherwise`.
    pub fn select_lt(self, bound: impl Operand<'a>, then: impl Operand<'a>, otherwise: impl Operand<'a>) -> Self {
        let [b, c, d] = [bound.beside(self), then.beside(self), otherwise.beside(self)];
        self.graph.push(Node::Select(self.id, b.id, c.id, d.id))
    }

    /// The larger of both; where equal, each gets half the gradient.
    pub fn maximum(self, other: impl Operand<'a>) -> Self {
        self.binary(Binary::Max, other)
    }

    /// The smaller of both; where equal, each gets half the gradient.
    pub fn minimum(self, other: impl Operand<'a>) -> Self {
        self.binary(Binary::Min, other)
    }

    /// Rounded to a number of bf16: away from zero if the part of its distance to the next number is at least `1 - fraction`, else
    /// towards zero. So 1/2 rounds to the nearest one, and a fraction by chance, uniform in [0, 1), rounds to `self` on average. The
    /// gradient is that of no rounding.
    pub fn round_bf16(self, fraction: impl Operand<'a>) -> Self {
        self.binary(Binary::RoundBf16, fraction)
    }

    /// `x * x`.
    pub fn square(self) -> Self {
        self * self
    }

    /// `max(x, 0)`, with gradient 0 at 0; NaN stays NaN.
    pub fn relu(self) -> Self {
        // What is neither above 0 nor below 1 is NaN.
        self.graph.constant(0.0).select_lt(self, self, self.select_lt(1.0, 0.0, self))
    }

    /// `x * sigmoid(x)`.
    pub fn silu(self) -> Self {
        self * self.sigmoid()
    }

    /// The exact GELU, `x (1 + erf(x / sqrt 2)) / 2`.
    pub fn gelu_erf(self) -> Self {
        self * 0.5 * ((self * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0)
    }
}

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident $op:ident;)*) => {
        impl Expr<'_> {$(
            $(#[$doc])*
            pub fn $name(self) -> Self {
                self.unary(Unary::$op)
            }
        )*}
    };
}
unary! {
    /// `e^x`.
    exp Exp;
    /// The natural logarithm.
    log Log;
    /// The square root.
    sqrt Sqrt;
    /// `1 / sqrt(x)`.
    rsqrt Rsqrt;
    /// `1 / x`.
    recip Recip;
    /// The absolute value, with gradient 0 at 0.
    abs Abs;
    /// The sine of radians.
    sin Sin;
    /// The cosine of radians.
    cos Cos;
    /// The hyperbolic tangent.
    tanh Tanh;
    /// The error function.
    erf Erf;
    /// `1 / (1 + e^-x)`.
    sigmoid Sigmoid;
    /// GELU by its tanh form: `x (1 + tanh u) / 2 = x sigmoid(2u)`, `u = sqrt(2/pi) (x + 0.044715 x^3)`.
    gelu_tanh Gelu;
    /// The derivative of [`Expr::gelu_tanh`].
    gelu_tanh_slope GeluSlope;
}

impl Neg for Expr<'_> {
    type Output = Self;
    fn neg(self) -> Self {
        self.unary(Unary::Neg)
    }
}

macro_rules! operators {
    ($($Trait:ident $method:ident;)*) => {$(
        impl<'a, T: Operand<'a>> $Trait<T> for Expr<'a> {
            type Output = Self;
            fn $method(self, other: T) -> Self {
                self.binary(Binary::$Trait, other)
            }
        }
        impl<'a> $Trait<Expr<'a>> for f64 {
            type Output = Expr<'a>;
            fn $method(self, other: Expr<'a>) -> Expr<'a> {
                self.beside(other).binary(Binary::$Trait, other)
            }
        }
    )*};
}
operators! {
    Add add;
    Sub sub;
    Mul mul;
    Div div;
}
