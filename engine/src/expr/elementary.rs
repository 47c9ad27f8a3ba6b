//! Elementary functions of f32 in simple steps, within about two units of the last place.
#![expect(clippy::excessive_precision)] // coefficients as published

use std::f32::consts::{FRAC_2_PI, LOG2_E};

use super::coefficients::*;
use super::lower::{Builder, Value};
use super::{GELU_CUBIC, GELU_FACTOR, Unary};

const SIGN: i32 = i32::MIN;

impl Builder {
    /// A function of one number.
    pub(super) fn unary(&mut self, op: Unary, x: Value) -> Value {
        let one = |to: &mut Self| to.float(1.0);
        match op {
            Unary::Neg => self.neg(x),
            Unary::Abs => self.abs(x),
            Unary::Sqrt => self.sqrt(x),
            Unary::Rsqrt => {
                let (one, root) = (one(self), self.sqrt(x));
                self.div(one, root)
            }
            Unary::Recip => {
                let one = one(self);
                self.div(one, x)
            }
            Unary::Exp => self.exp(x),
            Unary::Log => self.log(x),
            Unary::Sin => self.sin_shifted(x, 0),
            Unary::Cos => self.sin_shifted(x, 1),
            Unary::Tanh => self.tanh(x),
            Unary::Erf => self.erf(x),
            Unary::Sigmoid => {
                let (one, minus) = (one(self), self.neg(x));
                let e = self.exp(minus);
                let sum = self.add(one, e);
                self.div(one, sum)
            }
            Unary::Gelu => {
                let u = self.gelu_argument(x, 1.0);
                let s = self.unary(Unary::Sigmoid, u);
                self.mul(x, s)
            }
            Unary::GeluSlope => {
                // The sigmoid's slope from e^-|2u|: s (1 - s) would cancel.
                let (u, line) = (self.gelu_argument(x, 1.0), self.gelu_argument(x, 3.0));
                let size = self.abs(u);
                let minus = self.neg(size);
                let (e, one, zero) = (self.exp(minus), one(self), self.float(0.0));
                let sum = self.add(one, e);
                let r = self.div(one, sum);
                let er = self.mul(e, r);
                let (bend, s) = (self.mul(er, r), self.select_lt(u, zero, er, r));
                self.mul_add(line, bend, s)
            }
        }
    }

    /// See [`super::Binary::RoundBf16`].
    pub(super) fn round_bf16(&mut self, x: Value, fraction: Value) -> Value {
        // A number in [1, 2) has the bits of its fraction behind a fixed exponent.
        let (one, low, high) = (self.float(1.0), self.int(0xffff), self.int(!0xffff));
        let shifted = self.add(one, fraction);
        let shifted = self.bits(shifted);
        let added = self.shift_right(shifted, 7);
        let added = self.and(added, low);
        let bits = self.bits(x);
        let sum = self.int_add(bits, added);
        let cut = self.and(sum, high);
        let rounded = self.bits_float(cut);
        let (size, infinity) = (self.abs(x), self.float(f32::INFINITY));
        self.select_lt(size, infinity, rounded, x)
    }

    /// `2u` of GELU's tanh form where `times` is 1, and `2u' x` where it is 3.
    fn gelu_argument(&mut self, x: Value, times: f64) -> Value {
        let [factor, cubic] = [GELU_FACTOR, times * GELU_FACTOR * GELU_CUBIC].map(|c| self.float(c as f32));
        let square = self.mul(x, x);
        let sum = self.mul_add(square, cubic, factor);
        self.mul(x, sum)
    }

    /// Horner's rule from `first` on, highest coefficient first.
    fn horner(&mut self, x: Value, first: Value, coefficients: &[f32]) -> Value {
        coefficients.iter().fold(first, |p, &c| {
            let c = self.float(c);
            self.mul_add(p, x, c)
        })
    }

    fn polynomial(&mut self, x: Value, coefficients: &[f32]) -> Value {
        let first = self.float(coefficients[0]);
        self.horner(x, first, &coefficients[1..])
    }

    /// `x + k * c`, with a constant.
    fn shifted(&mut self, k: Value, c: f32, x: Value) -> Value {
        let c = self.float(c);
        self.mul_add(k, c, x)
    }

    /// `2^k`, of a small integer.
    fn power(&mut self, k: Value) -> Value {
        let bias = self.int(127);
        let biased = self.int_add(k, bias);
        let bits = self.shift_left(biased, 23);
        self.bits_float(bits)
    }

    /// Cephes' polynomial; the power of two is applied in two steps, so that small results stay exact.
    fn exp(&mut self, x: Value) -> Value {
        let (low, high) = (self.float(EXP_RANGE[0]), self.float(EXP_RANGE[1]));
        let x = self.select_lt(x, low, low, x);
        let x = self.select_lt(high, x, high, x);
        let log2_e = self.float(LOG2_E);
        let turns = self.mul(x, log2_e);
        let n = self.round(turns);
        let r = self.shifted(n, -LN_2[0], x);
        let r = self.shifted(n, -LN_2[1], r);
        let p = self.polynomial(r, &EXP);
        let square = self.mul(r, r);
        let p = self.mul_add(p, square, r);
        let one = self.float(1.0);
        let p = self.add(p, one);
        let n = self.float_int(n);
        let half = self.shift_right(n, 1);
        let rest = self.int_sub(n, half);
        let (half, rest) = (self.power(half), self.power(rest));
        let p = self.mul(p, half);
        self.mul(p, rest)
    }

    /// Cephes' polynomial on [sqrt 1/2, sqrt 2).
    fn log(&mut self, x: Value) -> Value {
        let (zero, smallest) = (self.float(0.0), self.float(f32::MIN_POSITIVE));
        let raise = self.float(8_388_608.0);
        let raised = self.mul(x, raise);
        let normal = self.select_lt(x, smallest, raised, x);
        let bits = self.bits(normal);
        let root = self.int(ROOT_HALF);
        let from_root = self.int_sub(bits, root);
        let e = self.shift_right(from_root, 23);
        let scale = self.shift_left(e, 23);
        let mantissa = self.int_sub(bits, scale);
        let (mantissa, one) = (self.bits_float(mantissa), self.float(1.0));
        let f = self.sub(mantissa, one);
        let twenty_three = self.float(23.0);
        let lowered = self.select_lt(x, smallest, twenty_three, zero);
        let e = self.int_float(e);
        let e = self.sub(e, lowered);
        let z = self.mul(f, f);
        let p = self.polynomial(f, &LOG);
        let p = self.mul(p, f);
        let p = self.mul(p, z);
        let y = self.shifted(e, LN_2[1], p);
        let y = self.shifted(z, -0.5, y);
        let y = self.add(f, y);
        let y = self.shifted(e, LN_2[0], y);
        // -inf at zero, NaN below; infinity and NaN are their own logarithms.
        let (infinity, minus, nan) = (self.float(f32::INFINITY), self.float(f32::NEG_INFINITY), self.float(f32::NAN));
        let y = self.select_lt(zero, x, y, minus);
        let y = self.select_lt(x, zero, nan, y);
        self.select_lt(x, infinity, y, x)
    }

    /// sin (`quarters` 0) or cos (1). Pi/2 is taken off in four parts: products with the first three, of eight bits
    /// each, are exact for angles up to 100,000, with and without fused multiply-adds.
    fn sin_shifted(&mut self, x: Value, quarters: i32) -> Value {
        let inverse = self.float(FRAC_2_PI);
        let turns = self.mul(x, inverse);
        let n = self.round(turns);
        let mut r = x;
        for part in [1.570_312_5, 4.825_592_041_015_625e-4, 1.266_598_701_477_050_8e-6, 9.920_936_294_705_03e-10] {
            r = self.shifted(n, -part, r);
        }
        let (z, one) = (self.mul(r, r), self.float(1.0));
        let p = self.polynomial(z, &SINE);
        let p = self.mul(p, z);
        let sine = self.mul_add(p, r, r);
        let p = self.polynomial(z, &COSINE);
        let p = self.mul(p, z);
        let rest = self.shifted(z, -0.5, one);
        let cosine = self.mul_add(p, z, rest);
        let (n, shift) = (self.float_int(n), self.int(quarters));
        let n = self.int_add(n, shift);
        let (one, two, half) = (self.int(1), self.int(2), self.float(0.5));
        let odd = self.and(n, one);
        let odd = self.int_float(odd);
        let y = self.select_lt(odd, half, sine, cosine);
        let negative = self.and(n, two);
        let sign = self.shift_left(negative, 30);
        self.flipped(y, sign)
    }

    /// `y` with its sign bit exchanged where `sign` has one.
    fn flipped(&mut self, y: Value, sign: Value) -> Value {
        let bits = self.bits(y);
        let bits = self.xor(bits, sign);
        self.bits_float(bits)
    }

    /// `y`, which is not negative, with the sign of `x`.
    fn signed(&mut self, y: Value, x: Value) -> Value {
        let (bits, mask) = (self.bits(x), self.int(SIGN));
        let sign = self.and(bits, mask);
        self.flipped(y, sign)
    }

    /// A polynomial below 0.55, `1 - 2 / (e^2x + 1)` above.
    fn tanh(&mut self, x: Value) -> Value {
        let (t, s) = (self.abs(x), self.mul(x, x));
        let (one, two, bound) = (self.float(1.0), self.float(2.0), self.float(TANH_BOUND));
        let twice = self.add(t, t);
        let e = self.exp(twice);
        let e = self.add(e, one);
        let quotient = self.div(two, e);
        let big = self.sub(one, quotient);
        let p = self.polynomial(s, &TANH);
        let p = self.mul(p, s);
        let small = self.mul_add(p, t, t);
        let y = self.select_lt(t, bound, small, big);
        self.signed(y, x)
    }

    /// N. Juffa's two branches.
    fn erf(&mut self, x: Value) -> Value {
        let (t, s) = (self.abs(x), self.mul(x, x));
        let r = self.polynomial(t, &ERF_HIGH);
        let u = self.polynomial(t, &ERF_MIDDLE);
        let r = self.mul_add(r, s, u);
        let r = self.horner(t, r, &ERF_LOW);
        let minus = self.neg(t);
        let r = self.mul_add(r, t, minus);
        let e = self.exp(r);
        let one = self.float(1.0);
        let big = self.sub(one, e);
        let q = self.polynomial(s, &ERF);
        let small = self.mul_add(q, t, t);
        let bound = self.float(ERF_BOUND);
        let y = self.select_lt(t, bound, small, big);
        self.signed(y, x)
    }
}

#[cfg(test)]
mod tests {
    use super::super::lower::{Lowered, Step};
    use super::super::{Expr, Function, Program};
    use crate::ops::pointwise;
    use crate::{Device, Result, Tensor};

    /// Does the steps on the CPU; products and sums are rounded once or twice.
    fn run(lowered: &Lowered, x: f32, fma: bool) -> f32 {
        let mut values: Vec<u32> = Vec::new();
        for &step in &lowered.steps {
            let f = |v: u32| f32::from_bits(values[v as usize]);
            let i = |v: u32| values[v as usize] as i32;
            let value = match step {
                Step::Input(_) => x,
                Step::Scalar(_) => f32::NAN,
                Step::Const(bits) => f32::from_bits(bits),
                Step::Neg(a) => -f(a),
                Step::Abs(a) => f(a).abs(),
                Step::Sqrt(a) => f(a).sqrt(),
                Step::Round(a) => f(a).round_ties_even(),
                Step::Add(a, b) => f(a) + f(b),
                Step::Sub(a, b) => f(a) - f(b),
                Step::Mul(a, b) => f(a) * f(b),
                Step::Div(a, b) => f(a) / f(b),
                Step::Max(a, b) => f(a).max(f(b)),
                Step::Min(a, b) => f(a).min(f(b)),
                Step::MulAdd(a, b, c) if fma => f(a).mul_add(f(b), f(c)),
                Step::MulAdd(a, b, c) => f(a) * f(b) + f(c),
                Step::Select(a, b, c, d) => {
                    if f(a) < f(b) {
                        f(c)
                    } else {
                        f(d)
                    }
                }
                Step::Float(a) => f32::from_bits(i(a) as u32),
                Step::FromInt(a) => i(a) as f32,
                _ => f32::from_bits(match step {
                    Step::Bits(a) => f(a).to_bits() as i32,
                    Step::ToInt(a) => f(a) as i32,
                    Step::Int(n) => n,
                    Step::IntAdd(a, b) => i(a).wrapping_add(i(b)),
                    Step::IntSub(a, b) => i(a).wrapping_sub(i(b)),
                    Step::And(a, b) => i(a) & i(b),
                    Step::Xor(a, b) => i(a) ^ i(b),
                    Step::ShiftLeft(a, n) => i(a) << n,
                    Step::ShiftRight(a, n) => i(a) >> n,
                    _ => unreachable!("an f32 step"),
                } as u32),
            };
            values.push(value.to_bits());
        }
        f32::from_bits(values[lowered.outputs[0] as usize])
    }

    fn lowered(f: for<'a> fn(Expr<'a>) -> Expr<'a>) -> Lowered {
        Lowered::of(&Program::of(&Function::build(|[x]| [f(x)])))
    }

    type Case = (&'static str, for<'a> fn(Expr<'a>) -> Expr<'a>, f64, f64);

    /// What is checked, and between which bounds.
    const CASES: [Case; 10] = [
        ("exp", |x| x.exp(), -80.0, 88.0),
        ("log below 1", |x| x.log(), 1e-3, 0.9),
        ("log", |x| x.log(), 1.1, 1e6),
        ("sin", |x| x.sin(), -3.0, 3.0),
        ("cos", |x| x.cos(), -1.5, 1.5),
        ("tanh", |x| x.tanh(), -10.0, 10.0),
        ("erf", |x| x.erf(), -5.0, 5.0),
        ("sigmoid", |x| x.sigmoid(), -80.0, 80.0),
        ("rsqrt", |x| x.rsqrt(), 1e-3, 1e3),
        ("silu of a product", |x| (x * 0.5 - 1.0).silu(), -10.0, 10.0),
    ];

    #[test]
    fn functions_are_within_three_units_of_the_last_place() -> Result<()> {
        for (name, f, from, to) in CASES {
            let xs: Vec<f32> = (0..=100_000).map(|i| (from + (to - from) * f64::from(i) / 100_000.0) as f32).collect();
            let wide = Tensor::from_vec(xs.iter().map(|&x| f64::from(x)).collect(), &[xs.len()], &Device::cpu())?;
            let exact = pointwise([&wide], |[x]| f(x))?.to_vec::<f64>()?;
            let steps = lowered(f);
            for (&x, y) in xs.iter().zip(exact) {
                for fma in [true, false] {
                    // The inner difference of the last case cancels.
                    let size =
                        y.abs().max(f64::from(f32::MIN_POSITIVE)) + if name.starts_with("silu") { 1.0 } else { 0.0 };
                    let ulps = (f64::from(run(&steps, x, fma)) - y).abs() / (f64::from(f32::EPSILON) * size);
                    assert!(ulps < 3.0, "{name}({x}), fma {fma}: {ulps} units");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn large_angles_keep_their_digits() {
        let (sin, cos) = (lowered(|x| x.sin()), lowered(|x| x.cos()));
        for x in [1e3f32, 12345.678, 99_999.9, -54_321.0] {
            for fma in [true, false] {
                assert!((f64::from(run(&sin, x, fma)) - f64::from(x).sin()).abs() < 2e-7, "sin {x}");
                assert!((f64::from(run(&cos, x, fma)) - f64::from(x).cos()).abs() < 2e-7, "cos {x}");
            }
        }
    }

    #[test]
    fn special_values_follow_ieee() {
        let at = |f: for<'a> fn(Expr<'a>) -> Expr<'a>, x: f32| run(&lowered(f), x, true);
        let infinity = f32::INFINITY;
        assert_eq!((at(|x| x.exp(), -infinity), at(|x| x.exp(), infinity)), (0.0, infinity));
        assert_eq!((at(|x| x.log(), 0.0), at(|x| x.log(), infinity)), (-infinity, infinity));
        assert_eq!((at(|x| x.tanh(), infinity), at(|x| x.erf(), -infinity)), (1.0, -1.0));
        assert_eq!(at(|x| x.sigmoid(), -infinity), 0.0);
        assert!(at(|x| x.log(), -1.0).is_nan());
        for (name, f, ..) in CASES {
            assert!(at(f, f32::NAN).is_nan(), "{name}");
        }
        assert!((f64::from(at(|x| x.exp(), -100.0)) / (-100f64).exp() - 1.0).abs() < 0.05);
        assert!((f64::from(at(|x| x.log(), 1e-40)) - f64::from(1e-40f32).ln()).abs() < 1e-4);
    }

    #[test]
    fn steps_read_earlier_ones_and_stand_once() {
        let steps = lowered(|x| (x.tanh() + x.exp()).minimum(x.sin()).select_lt(x, x.erf(), 2.0)).steps;
        for (at, step) in steps.iter().enumerate() {
            assert!(step.operands().all(|v| (v as usize) < at), "{step:?} at {at}");
            assert!(!steps[..at].contains(step));
        }
    }
}
