//! AdamW whose moments are kept in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"), as
//! `bitsandbytes.optim.AdamW8bit` defines them: codes of a dynamic map and the greatest size of each block of 256 elements. The host
//! makes and reads the codes.

use std::sync::LazyLock;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::whole::adamw;
use super::{AdamW, Direction, Operands, Rule, Slot, Whole};
use crate::expr::Expr;
use crate::{DType, Result, Tensor};

/// Elements that share a scale.
const BLOCK: usize = 256;
/// Codes in a word of memory.
const PACKED: usize = 4;

/// AdamW with 8-bit moments and what stays the same during a run.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW8bit {
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Parameters of fewer elements keep their moments in f32.
    pub min_8bit_size: usize,
}

impl Default for AdamW8bit {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, min_8bit_size: 4096 }
    }
}

/// The values that codes stand for, ascending, from -1 (or 0) to 1: the further from 1, the more of a code's bits are its exponent.
fn dynamic_map(signed: bool) -> Vec<f32> {
    let mut values = vec![0.0, 1.0];
    for exponent in 0..7 {
        let means = 1usize << (exponent + usize::from(!signed));
        let scale = 10f32.powi(exponent as i32 - 6);
        let bound = |i: usize| 0.1 + 0.9 * i as f32 / means as f32;
        for mean in (0..means).map(|i| (bound(i) + bound(i + 1)) / 2.0) {
            values.push(scale * mean);
            if signed {
                values.push(-scale * mean);
            }
        }
    }
    values.sort_unstable_by(f32::total_cmp);
    values
}

/// A map and the middles between its values.
struct Codes {
    values: Vec<f32>,
    middles: Vec<f32>,
    signed: bool,
}

impl Codes {
    fn new(signed: bool) -> Self {
        let values = dynamic_map(signed);
        let middles = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        Self { values, middles, signed }
    }

    /// The code of the nearest value, of the same sign where the map has signs.
    fn code(&self, x: f32) -> u8 {
        let code = self.middles.partition_point(|middle| *middle < x);
        let other_sign = self.signed && self.values[code].is_sign_negative() != x.is_sign_negative();
        let code = if !other_sign {
            code
        } else if x > 0.0 {
            code + 1
        } else {
            code.saturating_sub(1)
        };
        code.min(self.values.len() - 1) as u8
    }

    /// Codes, four in a word, and scales.
    fn encode(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        let (values, device) = (x.to_vec::<f32>()?, x.device());
        let blocks: Vec<(f32, Vec<u8>)> = values
            .par_chunks(BLOCK)
            .map(|block| {
                let most = block.iter().fold(0f32, |most, x| most.max(x.abs()));
                let scaled = |x: &f32| if most > 0.0 { x / most } else { 0.0 };
                let mut codes: Vec<u8> = block.iter().map(|x| self.code(scaled(x))).collect();
                codes.resize(BLOCK, 0);
                (most, codes)
            })
            .collect();
        let scales: Vec<f32> = blocks.iter().map(|(most, _)| *most).collect();
        let words = blocks.iter().flat_map(|(_, codes)| codes.chunks_exact(PACKED));
        let words: Vec<u32> = words.map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect();
        let (n, of) = (words.len(), scales.len());
        Ok([Tensor::from_vec(words, &[n], device)?, Tensor::from_vec(scales, &[of], device)?])
    }

    fn decode(&self, codes: &Tensor, scales: &Tensor, like: &Tensor) -> Result<Tensor> {
        let (codes, scales) = (codes.to_vec::<u32>()?, scales.to_vec::<f32>()?);
        let mut values = vec![0f32; like.numel()];
        values.par_chunks_mut(BLOCK).enumerate().for_each(|(block, values)| {
            let words = &codes[block * BLOCK / PACKED..][..BLOCK / PACKED];
            let bytes = words.iter().flat_map(|word| word.to_le_bytes());
            values.iter_mut().zip(bytes).for_each(|(x, code)| *x = self.values[usize::from(code)] * scales[block]);
        });
        Tensor::from_vec(values, like.dims(), like.device())?.to_dtype(like.dtype())
    }
}

static SIGNED: LazyLock<Codes> = LazyLock::new(|| Codes::new(true));
static UNSIGNED: LazyLock<Codes> = LazyLock::new(|| Codes::new(false));

impl Rule for AdamW8bit {
    fn name(&self) -> &'static str {
        "AdamW8bit"
    }

    /// Decay comes behind the step, as in bitsandbytes.
    fn update<'a>(&self, x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
        let [kept] = x.scalars();
        vec![(x.parameter - x.gradient) * kept]
    }

    fn whole_slots(&self, dims: &[usize]) -> Vec<Slot> {
        let n: usize = dims.iter().product();
        if n < self.min_8bit_size {
            return ["exp_avg", "exp_avg_sq"].map(|name| Slot::wide(name, dims.to_vec())).into();
        }
        let blocks = n.div_ceil(BLOCK);
        let slot = |name, n, dtype| Slot { name, dims: vec![n], dtype: Some(dtype) };
        let [codes, scales] = [(blocks * BLOCK / PACKED, DType::U32), (blocks, DType::F32)];
        vec![
            slot("state1", codes.0, codes.1),
            slot("absmax1", scales.0, scales.1),
            slot("state2", codes.0, codes.1),
            slot("absmax2", scales.0, scales.1),
        ]
    }

    fn direction(&self, x: &Whole<'_>) -> Result<Direction> {
        let [state1, absmax1, state2, absmax2] = x.slots else { return adamw(x, self.betas, self.eps) };
        let moments = [SIGNED.decode(state1, absmax1, x.gradient)?, UNSIGNED.decode(state2, absmax2, x.gradient)?];
        let Direction { direction, slots } = adamw(&Whole { slots: &moments, ..*x }, self.betas, self.eps)?;
        let [first, second] = [SIGNED.encode(&slots[0])?, UNSIGNED.encode(&slots[1])?];
        Ok(Direction { direction, slots: [first, second].concat() })
    }

    fn check(&self) -> Result<()> {
        AdamW { betas: self.betas, eps: self.eps }.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::Rates;
    use crate::optim::optimizer::tests::follows_whole;

    #[test]
    fn the_maps_are_those_of_bitsandbytes() {
        // The first values of `create_dynamic_map(signed=True)` and `(signed=False)`, and their smallest ones.
        let (signed, unsigned) = (dynamic_map(true), dynamic_map(false));
        let close = |a: f32, b: f64| (f64::from(a) - b).abs() <= 1e-7 * b.abs();
        for (values, places) in [
            (&signed, &[(0, -0.992_968_75), (1, -0.978_906_25), (127, 0.0), (128, 5.5e-7), (255, 1.0)][..]),
            (&unsigned, &[(0, 0.0), (1, 3.25e-7), (2, 7.75e-7), (254, 0.996_484_375), (255, 1.0)]),
        ] {
            assert_eq!(values.len(), 256);
            assert!(values.windows(2).all(|pair| pair[0] < pair[1]));
            assert!(places.iter().all(|(at, value)| close(values[*at], *value)), "{values:?}");
        }
        // A negative number has no positive code, even where that is nearer.
        assert!(SIGNED.values[usize::from(SIGNED.code(-1e-9))] < 0.0 && SIGNED.code(0.0) == 127);
        assert_eq!(SIGNED.code(1e-9), 127);
    }

    /// The block-wise kernel of bitsandbytes, line by line, with the nearest code by looking at all.
    #[test]
    fn a_step_is_the_formula_and_goes_on_after_loading() -> Result<()> {
        let rule = AdamW8bit::default();
        let ((b1, b2), eps, n) = (rule.betas, rule.eps, 70 * 61);
        let stored = |values: &[f64], signed: bool| -> Vec<f64> {
            let map = dynamic_map(signed);
            let block = |block: &[f64]| {
                let most = block.iter().fold(0f32, |most, x| most.max((*x as f32).abs()));
                let code = |x: f64| {
                    let x = x as f32 / most;
                    let far = |code: &usize| (map[*code] - x).abs();
                    let mut code = (0..256).min_by(|a, b| far(a).total_cmp(&far(b))).unwrap();
                    if signed && map[code].is_sign_negative() != x.is_sign_negative() {
                        code = if x > 0.0 { code + 1 } else { code - 1 };
                    }
                    f64::from(map[code] * most)
                };
                block.iter().map(|x| code(*x)).collect::<Vec<_>>()
            };
            values.chunks(256).flat_map(block).collect()
        };
        let (mut m, mut v) = (vec![0f64; n], vec![0f64; n]);
        follows_whole(&rule, &[70, 61], |t, p, g, Rates { lr, weight_decay }| {
            m.iter_mut().zip(g).for_each(|(m, g)| *m = b1 * *m + (1.0 - b1) * g);
            v.iter_mut().zip(g).for_each(|(v, g)| *v = b2 * *v + (1.0 - b2) * g * g);
            let (correction1, correction2) = (1.0 - b1.powi(t), (1.0 - b2.powi(t)).sqrt());
            let step = |i: usize| {
                let moved = p[i] - lr * correction2 / correction1 * m[i] / (v[i].sqrt() + correction2 * eps);
                moved * (1.0 - lr * weight_decay)
            };
            let new = (0..n).map(step).collect();
            (m, v) = (stored(&m, true), stored(&v, false));
            new
        })
    }

    #[test]
    fn what_is_small_keeps_its_moments_whole() -> Result<()> {
        let rule = AdamW8bit::default();
        let ((b1, b2), eps) = (rule.betas, rule.eps);
        let (mut m, mut v) = ([0f64; 7], [0f64; 7]);
        follows_whole(&rule, &[7], |t, p, g, Rates { lr, weight_decay }| {
            let step = |i: usize| {
                m[i] = b1 * m[i] + (1.0 - b1) * g[i];
                v[i] = b2 * v[i] + (1.0 - b2) * g[i] * g[i];
                let (m_hat, v_hat) = (m[i] / (1.0 - b1.powi(t)), v[i] / (1.0 - b2.powi(t)));
                (p[i] - lr * m_hat / (v_hat.sqrt() + eps)) * (1.0 - lr * weight_decay)
            };
            (0..7).map(step).collect()
        })
    }
}
