//! The loops of a program's steps: one kernel for each opcode and mix of blocks and single values.
#![expect(clippy::eq_op)] // `a != a` asks for NaN in loops that become SIMD

use super::isa::{FUSED, Isa};
use super::math::Real;
use crate::expr::{Binary, Opcode, Unary};

/// `target[i] = f(operands[i])` for so many elements. Operands past the opcode's count are not read.
///
/// Safety: the target holds that many elements, and so do the operands that are not single values; the target is none
/// of the operands; the machine has the instruction set that the kernel was asked for with.
pub(super) type Kernel<A> = unsafe fn(target: *mut A, operands: [*const A; 4], n: usize);

/// Number of operands.
pub(super) fn arity(opcode: Opcode) -> usize {
    match opcode {
        Opcode::Unary(_) => 1,
        Opcode::Binary(_) => 2,
        Opcode::MulAdd | Opcode::MulSub => 3,
        Opcode::Select => 4,
    }
}

/// The kernel of an opcode whose operand `k` is a single value where bit `k` of `single` is set; none for a rare mix.
pub(super) fn kernel<A: Real>(opcode: Opcode, single: u8, isa: Isa) -> Option<Kernel<A>> {
    Some(match opcode {
        Opcode::Unary(op) if single == 0 => match op {
            Unary::Neg => of::<A, Neg, 0>(isa),
            Unary::Exp => of::<A, Exp, 0>(isa),
            Unary::Log => of::<A, Log, 0>(isa),
            Unary::Sqrt => of::<A, Sqrt, 0>(isa),
            Unary::Rsqrt => of::<A, Rsqrt, 0>(isa),
            Unary::Recip => of::<A, Recip, 0>(isa),
            Unary::Abs => of::<A, Abs, 0>(isa),
            Unary::Sin => of::<A, Sin, 0>(isa),
            Unary::Cos => of::<A, Cos, 0>(isa),
            Unary::Tanh => of::<A, Tanh, 0>(isa),
            Unary::Erf => of::<A, Erf, 0>(isa),
            Unary::Sigmoid => of::<A, Sigmoid, 0>(isa),
            Unary::Gelu => of::<A, Gelu, 0>(isa),
            Unary::GeluSlope => of::<A, GeluSlope, 0>(isa),
        },
        Opcode::Binary(op) => match op {
            Binary::Add => binary::<A, Add>(single, isa)?,
            Binary::Sub => binary::<A, Sub>(single, isa)?,
            Binary::Mul => binary::<A, Mul>(single, isa)?,
            Binary::Div => binary::<A, Div>(single, isa)?,
            Binary::Max => binary::<A, Max>(single, isa)?,
            Binary::Min => binary::<A, Min>(single, isa)?,
            Binary::RoundBf16 => binary::<A, RoundBf16>(single, isa)?,
        },
        Opcode::MulAdd => ternary::<A, MulAdd>(single, isa)?,
        Opcode::MulSub => ternary::<A, MulSub>(single, isa)?,
        Opcode::Select if single == 0 => of::<A, Select, 0>(isa),
        Opcode::Unary(_) | Opcode::Select => return None,
    })
}

fn binary<A: Real, F: Apply<A>>(single: u8, isa: Isa) -> Option<Kernel<A>> {
    match single {
        0b00 => Some(of::<A, F, 0b00>(isa)),
        0b01 => Some(of::<A, F, 0b01>(isa)),
        0b10 => Some(of::<A, F, 0b10>(isa)),
        _ => None,
    }
}

fn ternary<A: Real, F: Apply<A>>(single: u8, isa: Isa) -> Option<Kernel<A>> {
    match single {
        0b000 => Some(of::<A, F, 0b000>(isa)),
        0b001 => Some(of::<A, F, 0b001>(isa)),
        0b010 => Some(of::<A, F, 0b010>(isa)),
        0b100 => Some(of::<A, F, 0b100>(isa)),
        0b101 => Some(of::<A, F, 0b101>(isa)),
        0b110 => Some(of::<A, F, 0b110>(isa)),
        _ => None,
    }
}

fn of<A: Real, F: Apply<A>, const SINGLE: u8>(isa: Isa) -> Kernel<A> {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        unsafe fn avx512<A: Real, F: Apply<A>, const SINGLE: u8>(target: *mut A, operands: [*const A; 4], n: usize) {
            // SAFETY: the caller's promise.
            unsafe { each::<A, F, true, SINGLE>(target, operands, n) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2<A: Real, F: Apply<A>, const SINGLE: u8>(target: *mut A, operands: [*const A; 4], n: usize) {
            // SAFETY: the caller's promise.
            unsafe { each::<A, F, true, SINGLE>(target, operands, n) }
        }
        match isa {
            Isa::Avx512 | Isa::Avx512Bf16 => return avx512::<A, F, SINGLE>,
            Isa::Avx2 => return avx2::<A, F, SINGLE>,
            Isa::Portable => {}
        }
    }
    let _ = isa;
    each::<A, F, FUSED, SINGLE>
}

#[inline(always)]
unsafe fn each<A: Real, F: Apply<A>, const FMA: bool, const SINGLE: u8>(
    target: *mut A,
    operands: [*const A; 4],
    n: usize,
) {
    let single = |k: usize| SINGLE & (1 << k) != 0;
    let mut values = [A::ZERO; 4];
    for (k, value) in values.iter_mut().enumerate() {
        if single(k) {
            // SAFETY: the caller's promise.
            *value = unsafe { operands[k].read() };
        }
    }
    for i in 0..n {
        let at = |k: usize| {
            if k >= F::ARITY || single(k) {
                return values[k];
            }
            // SAFETY: the caller's promise.
            unsafe { operands[k].add(i).read() }
        };
        let value = F::apply::<FMA>(at(0), at(1), at(2), at(3));
        // SAFETY: the caller's promise.
        unsafe { target.add(i).write(value) };
    }
}

/// A function of one element of each operand.
trait Apply<A> {
    const ARITY: usize;
    fn apply<const FMA: bool>(a: A, b: A, c: A, d: A) -> A;
}

macro_rules! functions {
    ($($name:ident $arity:literal |$a:ident $(, $x:ident)*| $f:expr;)*) => {$(
        struct $name;
        impl<A: Real> Apply<A> for $name {
            const ARITY: usize = $arity;
            #[inline(always)]
            fn apply<const FMA: bool>($a: A, b: A, c: A, d: A) -> A {
                functions!(@ [b c d] [$($x)*]);
                $f
            }
        }
    )*};
    (@ [$b:ident $c:ident $d:ident] []) => { let _ = ($b, $c, $d); };
    (@ [$b:ident $c:ident $d:ident] [$x:ident]) => { let ($x, _, _) = ($b, $c, $d); };
    (@ [$b:ident $c:ident $d:ident] [$x:ident $y:ident]) => { let ($x, $y, _) = ($b, $c, $d); };
    (@ [$b:ident $c:ident $d:ident] [$x:ident $y:ident $z:ident]) => { let ($x, $y, $z) = ($b, $c, $d); };
}
functions! {
    Neg 1 |a| a.neg();
    Exp 1 |a| a.exp::<FMA>();
    Log 1 |a| a.log::<FMA>();
    Sqrt 1 |a| a.sqrt();
    Rsqrt 1 |a| A::from_f64(1.0).div(a.sqrt());
    Recip 1 |a| A::from_f64(1.0).div(a);
    Abs 1 |a| a.abs();
    Sin 1 |a| a.sin::<FMA>();
    Cos 1 |a| a.cos::<FMA>();
    Tanh 1 |a| a.tanh::<FMA>();
    Erf 1 |a| a.erf::<FMA>();
    Sigmoid 1 |a| a.sigmoid::<FMA>();
    Gelu 1 |a| a.gelu::<FMA>();
    GeluSlope 1 |a| a.gelu_slope::<FMA>();
    Add 2 |a, b| a.add(b);
    Sub 2 |a, b| a.sub(b);
    Mul 2 |a, b| a.mul(b);
    Div 2 |a, b| a.div(b);
    // NaN wins, as in PyTorch.
    Max 2 |a, b| if a > b || a != a { a } else { b };
    Min 2 |a, b| if a < b || a != a { a } else { b };
    RoundBf16 2 |a, b| a.round_bf16(b);
    MulAdd 3 |a, b, c| a.mul_add::<FMA>(b, c);
    MulSub 3 |a, b, c| a.mul_add::<FMA>(b, c.neg());
    Select 4 |a, b, c, d| if a < b { c } else { d };
}
