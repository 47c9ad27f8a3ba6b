//! Random numbers: Philox4x32-10, counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").
//!
//! The whole state is a seed and a counter, so a run goes on where it stopped, and each number depends on its place
//! alone: the same seed gives the same bits with any number of threads.

use rayon::prelude::*;

use crate::backend::call::{Call, Upload, has_dtype, is_dense};
use crate::backend::{Distribution, FusedCall, Ran, operands, run_fused};
use crate::platform::math::{ln, sin_cos};
use crate::{DType, Device, Element, Result, Tensor};

/// Numbers of one parallel piece: a multiple of a block's four.
const PIECE: usize = 1024;

/// A generator. Each block of four numbers is a function of (seed, counter).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Philox {
    seed: u64,
    counter: u64,
    /// The rest of the current block.
    block: [u32; 4],
    used: usize,
}

/// Random numbers from a fresh block on.
#[derive(Clone, Copy, Debug)]
pub struct RandomFill<'a> {
    /// What is drawn.
    pub distribution: Distribution,
    /// The generator's key.
    pub seed: u64,
    /// Its next block.
    pub counter: u64,
    /// Row-major without gaps: u32 for bits, else f32.
    pub out: &'a Tensor,
}

impl<'a> FusedCall<'a> for RandomFill<'a> {
    const NAME: &'static str = "random numbers";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        [None; 8]
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        operands([Some(self.out)])
    }

    fn fits(&self) -> Result<()> {
        let dtype = if self.distribution == Distribution::Bits { DType::U32 } else { DType::F32 };
        has_dtype(Self::NAME, "numbers", self.out, dtype)?;
        is_dense(Self::NAME, "numbers", self.out)
    }
}

/// Four numbers from a counter and a key.
#[inline(always)]
fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut k, mut l]) = (counter, key);
    for _ in 0..10 {
        let p = u64::from(a) * 0xd251_1f53;
        let q = u64::from(c) * 0xcd9e_8d57;
        [a, b, c, d] = [(q >> 32) as u32 ^ b ^ k, q as u32, (p >> 32) as u32 ^ d ^ l, p as u32];
        k = k.wrapping_add(0x9e37_79b9);
        l = l.wrapping_add(0xbb67_ae85);
    }
    [a, b, c, d]
}

fn block(seed: u64, counter: u64) -> [u32; 4] {
    philox([counter as u32, (counter >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32])
}

/// A uniform number in [0, 1) of 24 bits.
fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / 16_777_216.0)
}

impl Philox {
    /// A generator at counter 0.
    pub fn new(seed: u64) -> Self {
        Self::from_state(seed, 0)
    }

    /// A generator that goes on from [`Philox::state`].
    pub fn from_state(seed: u64, counter: u64) -> Self {
        Self { seed, counter, block: [0; 4], used: 4 }
    }

    /// Seed and counter. Numbers left over in the current block are dropped when a run goes on from here.
    pub fn state(&self) -> (u64, u64) {
        (self.seed, self.counter)
    }

    /// A generator of its own for `stream`: its numbers do not depend on how many this one has given.
    pub fn fork(&self, stream: u64) -> Self {
        let [a, b, ..] =
            philox([stream as u32, (stream >> 32) as u32, 1, 0], [self.seed as u32, (self.seed >> 32) as u32]);
        Self::new(u64::from(a) | u64::from(b) << 32)
    }

    /// 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = block(self.seed, self.counter);
            self.counter += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// A uniform number in [0, 1) of 53 bits.
    pub fn next_f64(&mut self) -> f64 {
        let (high, low) = (u64::from(self.next_u32()), u64::from(self.next_u32()));
        ((high << 32 | low) >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// Fills with uniform numbers in [0, 1), from a fresh block on.
    pub fn fill_uniform(&mut self, out: &mut [f32]) {
        self.fill(out, |bits| bits.map(unit));
    }

    /// Fills with standard normal numbers (Box and Muller), from a fresh block on.
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        self.fill(out, |[a, b, c, d]| {
            let [x, y] = box_muller(a, b);
            let [z, w] = box_muller(c, d);
            [x, y, z, w]
        });
    }

    fn fill<T: Copy + Send>(&mut self, out: &mut [T], of: impl Fn([u32; 4]) -> [T; 4] + Sync) {
        let (seed, start) = (self.seed, self.counter);
        let piece = |(index, piece): (usize, &mut [T])| {
            let first = start + (index * PIECE / 4) as u64;
            for (i, four) in piece.chunks_mut(4).enumerate() {
                let values = of(block(seed, first + i as u64));
                four.copy_from_slice(&values[..four.len()]);
            }
        };
        if out.len() <= PIECE {
            out.chunks_mut(PIECE).enumerate().for_each(piece);
        } else {
            out.par_chunks_mut(PIECE).enumerate().for_each(piece);
        }
        self.advance(out.len());
    }

    /// Random bits, u32.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn bits(&mut self, dims: &[usize], device: &Device) -> Result<Tensor> {
        self.tensor(Distribution::Bits, DType::U32, dims, device, |random, out| random.fill(out, |bits| bits))
    }

    /// Uniform numbers in [0, 1), f32.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn uniform(&mut self, dims: &[usize], device: &Device) -> Result<Tensor> {
        self.tensor(Distribution::Uniform, DType::F32, dims, device, Self::fill_uniform)
    }

    /// Standard normal numbers, f32. Other devices than the CPU may round them differently.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn normal(&mut self, dims: &[usize], device: &Device) -> Result<Tensor> {
        self.tensor(Distribution::Normal, DType::F32, dims, device, Self::fill_normal)
    }

    /// Made on the device where it has a kernel for that, else on the host by `fill`.
    fn tensor<T: Element + Default>(
        &mut self,
        distribution: Distribution,
        dtype: DType,
        dims: &[usize],
        device: &Device,
        fill: impl FnOnce(&mut Self, &mut [T]),
    ) -> Result<Tensor> {
        let out = Tensor::empty(dims, dtype, device)?;
        let fill_there = RandomFill { distribution, seed: self.seed, counter: self.counter, out: &out };
        if run_fused(fill_there)? == Ran::Done {
            self.advance(out.numel());
        } else {
            let mut values = vec![T::default(); out.numel()];
            fill(self, &mut values);
            Upload { bytes: bytemuck::cast_slice(&values), target: &out }.run()?;
        }
        Ok(out)
    }

    /// Goes on behind `count` numbers of fresh blocks.
    fn advance(&mut self, count: usize) {
        self.counter += count.div_ceil(4) as u64;
        self.used = 4;
    }
}

/// Two normal numbers; the first uniform is moved off zero by half a step, so that its logarithm is finite.
fn box_muller(a: u32, b: u32) -> [f32; 2] {
    let radius = (-2.0 * ln(unit(a) + 0.5 / 16_777_216.0)).sqrt();
    let (sine, cosine) = sin_cos(std::f32::consts::TAU * unit(b));
    [radius * cosine, radius * sine]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox(counter, key), expected);
        }
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let n = 400_000;
        let mut values = vec![0f32; n];
        let mut random = Philox::new(7);
        let moment = |values: &[f32], k: i32| values.iter().map(|v| f64::from(*v).powi(k)).sum::<f64>() / n as f64;
        random.fill_uniform(&mut values);
        assert!((moment(&values, 1) - 0.5).abs() < 0.003 && (moment(&values, 2) - 1.0 / 3.0).abs() < 0.003);
        assert!(values.iter().all(|v| (0.0..1.0).contains(v)));
        random.fill_normal(&mut values);
        // Five standard errors of the first four moments.
        for (k, expected, error) in [(1, 0.0, 1.0), (2, 1.0, 1.42), (3, 0.0, 3.9), (4, 3.0, 9.8)] {
            assert!((moment(&values, k) - expected).abs() < 5.0 * error / (n as f64).sqrt(), "moment {k}");
        }
    }

    #[test]
    fn a_number_depends_on_its_place_alone() {
        let mut whole = vec![0f32; 40_000];
        Philox::new(3).fill_normal(&mut whole);
        let (mut parts, mut random) = (vec![0f32; 40_000], Philox::new(3));
        let (first, second) = parts.split_at_mut(20_004);
        random.fill_normal(first);
        let (seed, counter) = random.state();
        Philox::from_state(seed, counter).fill_normal(second);
        assert_eq!(whole, parts);
        assert_ne!(Philox::new(3).fork(1).next_u32(), Philox::new(3).fork(2).next_u32());
    }
}
