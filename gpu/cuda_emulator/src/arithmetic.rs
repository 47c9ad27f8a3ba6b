//! What instructions compute.

use half::{bf16, f16};

use crate::machine::{Lanes, Trap};
use crate::parse::{Arithmetic, Compare, Rounding, Type};

pub(crate) fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

pub(crate) fn masked(value: u64, bits: u32) -> u64 {
    if bits == 64 { value } else { value & ((1 << bits) - 1) }
}

pub(crate) fn signed(value: u64, bits: u32) -> i64 {
    (value << (64 - bits)) as i64 >> (64 - bits)
}

fn each(a: &Lanes, b: &Lanes, of: impl Fn(u64, u64) -> u64) -> Lanes {
    std::array::from_fn(|lane| of(a[lane], b[lane]))
}

fn each_f32(a: &Lanes, b: &Lanes, of: impl Fn(f32, f32) -> f32) -> Lanes {
    each(a, b, |a, b| of(f(a), f(b)).to_bits().into())
}

/// `a * b + c` of f32, rounded once.
pub(crate) fn fused(a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
    fn plain(a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
        std::array::from_fn(|lane| f(a[lane]).mul_add(f(b[lane]), f(c[lane])).to_bits().into())
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn wide(a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
            std::array::from_fn(|lane| f(a[lane]).mul_add(f(b[lane]), f(c[lane])).to_bits().into())
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features are there.
            return unsafe { wide(a, b, c) };
        }
    }
    plain(a, b, c)
}

/// On the active lanes; what the others get means nothing.
pub(crate) fn arithmetic_of_lanes(
    op: Arithmetic,
    kind: Type,
    a: &Lanes,
    b: &Lanes,
    active: u32,
) -> Result<Lanes, Trap> {
    use Arithmetic as A;
    // The usual ones all at once.
    let bits = kind.bits();
    match (kind, op) {
        (Type::F(32), A::Add) => return Ok(each_f32(a, b, |a, b| a + b)),
        (Type::F(32), A::Sub) => return Ok(each_f32(a, b, |a, b| a - b)),
        (Type::F(32), A::Mul) => return Ok(each_f32(a, b, |a, b| a * b)),
        (Type::U(_) | Type::S(_) | Type::B(_), A::Add) => {
            return Ok(each(a, b, |a, b| masked(a.wrapping_add(b), bits)));
        }
        (Type::U(_) | Type::S(_) | Type::B(_), A::Sub) => {
            return Ok(each(a, b, |a, b| masked(a.wrapping_sub(b), bits)));
        }
        (Type::U(_) | Type::S(_) | Type::B(_), A::Mul) => {
            return Ok(each(a, b, |a, b| masked(a.wrapping_mul(b), bits)));
        }
        (Type::U(32), A::MulWide) => return Ok(each(a, b, |a, b| masked(a, 32) * masked(b, 32))),
        (Type::S(32), A::MulWide) => return Ok(each(a, b, |a, b| (i64::from(a as i32) * i64::from(b as i32)) as u64)),
        (Type::B(_), A::And) => return Ok(each(a, b, |a, b| masked(a & b, bits))),
        (Type::B(_), A::Or) => return Ok(each(a, b, |a, b| masked(a | b, bits))),
        (Type::B(_), A::Xor) => return Ok(each(a, b, |a, b| masked(a ^ b, bits))),
        _ => {}
    }
    let mut out = [0; 32];
    for lane in lanes(active) {
        out[lane] = arithmetic(op, kind, a[lane], b[lane])?;
    }
    Ok(out)
}

/// The lanes of a mask.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 == 1)
}

fn arithmetic(op: Arithmetic, kind: Type, a: u64, b: u64) -> Result<u64, Trap> {
    use Arithmetic as A;
    if kind == Type::F(32) {
        let (a, b) = (f(a), f(b));
        let nan = a.is_nan() || b.is_nan();
        let value = match op {
            A::Add => a + b,
            A::Sub => a - b,
            A::Mul => a * b,
            A::Div => a / b,
            A::MinNan | A::MaxNan if nan => f32::NAN,
            A::Min | A::MinNan => a.min(b),
            A::Max | A::MaxNan => a.max(b),
            A::Neg => -a,
            A::Abs => a.abs(),
            A::Sqrt => a.sqrt(),
            A::Rcp => 1.0 / a,
            A::Exp2 => f64::from(a).exp2() as f32,
            A::Log2 => f64::from(a).log2() as f32,
            _ => return Err(format!("{op:?} of {kind:?}")),
        };
        return Ok(value.to_bits().into());
    }
    let bits = kind.bits();
    let is_signed = matches!(kind, Type::S(_));
    let (a, b) = (masked(a, bits), if matches!(op, A::Shl | A::Shr) { b & 0xffff_ffff } else { masked(b, bits) });
    let wide = |v: u64| if is_signed { i128::from(signed(v, bits)) } else { i128::from(v) };
    let value = match op {
        A::Div if !is_signed && b != 0 => a / b,
        A::Rem if !is_signed && b != 0 => a % b,
        A::Add => a.wrapping_add(b),
        A::Sub => a.wrapping_sub(b),
        A::Mul => a.wrapping_mul(b),
        A::MulHigh => ((wide(a) * wide(b)) >> bits) as u64,
        A::MulWide => return Ok(masked((wide(a) * wide(b)) as u64, 2 * bits)),
        A::Div | A::Rem if b == 0 => return Err("a division by zero".into()),
        A::Div => (wide(a) / wide(b)) as u64,
        A::Rem => (wide(a) % wide(b)) as u64,
        A::Min => wide(a).min(wide(b)) as u64,
        A::Max => wide(a).max(wide(b)) as u64,
        A::And => a & b,
        A::Or => a | b,
        A::Xor => a ^ b,
        A::Shl if b >= u64::from(bits) => 0,
        A::Shl => a << b,
        A::Shr if is_signed => (signed(a, bits) >> b.min(63)) as u64,
        A::Shr if b >= u64::from(bits) => 0,
        A::Shr => a >> b,
        A::Not => !a,
        A::Neg => a.wrapping_neg(),
        _ => return Err(format!("{op:?} of {kind:?}")),
    };
    Ok(masked(value, bits))
}

pub(crate) fn compared(compare: Compare, kind: Type, a: u64, b: u64) -> Result<bool, Trap> {
    let order = match kind {
        Type::F(32) => f(a).partial_cmp(&f(b)),
        Type::S(bits) => Some(signed(a, bits).cmp(&signed(b, bits))),
        Type::U(bits) | Type::B(bits) => Some(masked(a, bits).cmp(&masked(b, bits))),
        _ => return Err(format!("a comparison of {kind:?}")),
    };
    let Some(order) = order else { return Ok(matches!(compare, Compare::Unordered(_))) };
    let compare = if let Compare::Unordered(inner) = compare { *inner } else { compare };
    Ok(match compare {
        Compare::Eq => order.is_eq(),
        Compare::Ne => order.is_ne(),
        Compare::Lt => order.is_lt(),
        Compare::Le => order.is_le(),
        Compare::Gt => order.is_gt(),
        Compare::Ge => order.is_ge(),
        Compare::Unordered(_) => return Err("a nested comparison".into()),
    })
}

pub(crate) fn convert(to: Type, from: Type, rounding: Option<Rounding>, values: &[u64]) -> Result<u64, Trap> {
    let refuse = || Err(format!("a conversion from {from:?} to {to:?} by {rounding:?}"));
    let narrow_bf16 = |v: f32| u64::from(bf16::from_f32(v).to_bits());
    let narrow_f16 = |v: f32| u64::from(f16::from_f32(v).to_bits());
    if let (Type::Bf16x2 | Type::F16x2, Type::F(32), &[high, low]) = (to, from, values) {
        let narrow = |v: u64| if to == Type::Bf16x2 { narrow_bf16(f(v)) } else { narrow_f16(f(v)) };
        return Ok(narrow(high) << 16 | narrow(low));
    }
    let &[value] = values else { return refuse() };
    Ok(match (to, from, rounding) {
        (Type::Bf16, Type::F(32), Some(Rounding::Nearest)) => narrow_bf16(f(value)),
        (Type::F(16), Type::F(32), Some(Rounding::Nearest)) => narrow_f16(f(value)),
        (Type::F(32), Type::F(16), None) => f16::from_bits(value as u16).to_f32().to_bits().into(),
        (Type::F(32), Type::F(64), Some(Rounding::Nearest)) => (f64::from_bits(value) as f32).to_bits().into(),
        (Type::F(64), Type::F(32), None) => f64::from(f(value)).to_bits(),
        (Type::F(32), Type::F(32), Some(Rounding::NearestInteger)) => f(value).round_ties_even().to_bits().into(),
        (Type::F(32), Type::F(32), Some(Rounding::ZeroInteger)) => f(value).trunc().to_bits().into(),
        (Type::F(32), Type::S(from), Some(Rounding::Nearest)) => (signed(value, from) as f32).to_bits().into(),
        (Type::F(32), Type::U(32), Some(Rounding::Nearest)) => (value as u32 as f32).to_bits().into(),
        (Type::S(32), Type::F(32), Some(Rounding::ZeroInteger)) => u64::from(f(value) as i32 as u32),
        (Type::U(32), Type::F(32), Some(Rounding::ZeroInteger)) => u64::from(f(value) as u32),
        (Type::S(to) | Type::U(to), Type::S(from), None) => masked(signed(value, from) as u64, to),
        (Type::S(to) | Type::U(to), Type::U(from), None) => masked(masked(value, from), to),
        _ => return refuse(),
    })
}
