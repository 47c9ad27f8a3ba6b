//! Floats of eight bits, which are stored and never computed with.

use std::sync::LazyLock;

/// The greatest number of e4m3.
pub(crate) const E4M3_MAX: f32 = 448.0;

/// The values of e4m3's codes: four bits of exponent, three of mantissa, no infinity (`float8_e4m3fn` of PyTorch).
pub(crate) static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| {
    std::array::from_fn(|code| match code & 127 {
        127 => f32::NAN,
        _ => value(code as u8, 3),
    })
});

/// The values of e5m2's codes: five bits of exponent, two of mantissa (`float8_e5m2`).
pub(crate) static E5M2: LazyLock<[f32; 256]> = LazyLock::new(|| {
    std::array::from_fn(|code| match code & 127 {
        124 => value(code as u8 & 128, 2) + f32::INFINITY * if code < 128 { 1.0 } else { -1.0 },
        125.. => f32::NAN,
        _ => value(code as u8, 2),
    })
});

/// A finite number with `mantissa` bits of mantissa, the rest but the sign being exponent.
fn value(code: u8, mantissa: u32) -> f32 {
    let steps = f32::from(1u8 << mantissa);
    let bias = (1 << (6 - mantissa)) - 1;
    let (exponent, fraction) = (i32::from(code & 127) >> mantissa, f32::from(code & ((1 << mantissa) - 1)) / steps);
    let size = match exponent {
        0 => fraction * 2f32.powi(1 - bias),
        _ => (1.0 + fraction) * 2f32.powi(exponent - bias),
    };
    if code & 128 == 0 { size } else { -size }
}

/// The code of the nearest number of e4m3, of two that are as near the even one; what is greater than all becomes the greatest.
pub(crate) fn to_e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 128 } else { 0 };
    if x.is_nan() {
        return sign | 127;
    }
    let (positive, size) = (&E4M3[..127], x.abs().min(E4M3_MAX));
    let above = positive.partition_point(|value| *value < size);
    let code = match above.checked_sub(1) {
        None => above,
        Some(below) => {
            let (down, up) = (size - positive[below], positive[above] - size);
            if down < up || (down == up && below % 2 == 0) { below } else { above }
        }
    };
    sign | code as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tables of the OCP specification of these formats, and of PyTorch's `finfo`.
    #[test]
    fn codes_have_the_values_of_the_specification() {
        let e4m3 = [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 0.875 * 2f32.powi(-6)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x7e, 448.0),
        ];
        for (code, value) in e4m3 {
            assert_eq!((E4M3[code], E4M3[code | 128]), (value, -value));
        }
        let e5m2 = [
            (0x00, 0.0),
            (0x01, 2f32.powi(-16)),
            (0x04, 2f32.powi(-14)),
            (0x3c, 1.0),
            (0x7b, 57344.0),
            (0x7c, f32::INFINITY),
        ];
        for (code, value) in e5m2 {
            assert_eq!((E5M2[code], E5M2[code | 128]), (value, -value));
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan() && E5M2[0x7d].is_nan() && E5M2[0xff].is_nan());
    }

    #[test]
    fn numbers_go_to_the_nearest_code() {
        for code in 0..=255u8 {
            if !E4M3[usize::from(code)].is_nan() {
                assert_eq!(to_e4m3(E4M3[usize::from(code)]), code);
            }
        }
        // Halfway between 1 and 1.125, and between 1.125 and 1.25: the even mantissa.
        assert_eq!([1.0625, 1.1875].map(|x| E4M3[usize::from(to_e4m3(x))]), [1.0, 1.25]);
        assert_eq!([1.07, -1e9, f32::INFINITY].map(|x| E4M3[usize::from(to_e4m3(x))]), [1.125, -448.0, 448.0]);
        assert_eq!([to_e4m3(2f32.powi(-11)), to_e4m3(-0.0), to_e4m3(f32::NAN)], [0, 128, 127]);
    }
}
