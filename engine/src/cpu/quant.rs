//! Panels of quantised matrices: codes to numbers of the dtype that products take, row by row.

use std::ops::Range;

use super::View;
use super::gemm::{Narrow, with_narrow};
use super::isa::{Isa, Work, dispatch};
use super::team::spread;
use crate::quant::{BLOCK, Format, GROUP, NF4, Parts};

/// About the elements that a task decodes: enough for a thread's while, few enough for all threads to have some.
const GRAIN: usize = 16 * 1024;

/// A quantised matrix.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    isa: Isa,
    format: Format,
    width: usize,
    codes: &'a [u8],
    blocks: &'a [i8],
    scales: &'a [f32],
}

/// `out`: rows and columns of a matrix from `start` on.
///
/// # Safety
/// As the call's contract has it: `words` are the matrix's parts, `out` lies inside of the matrix and is dense; its dtype is
/// not f64.
pub(super) unsafe fn dequantise(
    isa: Isa,
    format: Format,
    dims: [usize; 2],
    words: &View<'_>,
    start: [usize; 2],
    out: &View<'_>,
) {
    let parts = Parts::of(format, dims);
    let words = words.ptr.cast::<f32>().cast_const();
    // SAFETY: the caller's promise: that many words; any bits are numbers.
    let matrix = unsafe {
        Matrix {
            isa,
            format,
            width: dims[1],
            codes: std::slice::from_raw_parts(words.cast(), 4 * parts.codes),
            blocks: std::slice::from_raw_parts(words.add(parts.codes).cast(), 4 * parts.blocks),
            scales: std::slice::from_raw_parts(words.add(parts.codes + parts.blocks), parts.scales),
        }
    };
    let (rows, columns) = (out.dims[0], out.dims[1]);
    let high = (GRAIN / columns.max(1)).max(1);
    let out = *out;
    with_narrow!(out.dtype, T => spread(rows.div_ceil(high), |task| {
        let first = task * high;
        let rows = first..rows.min(first + high);
        // SAFETY: the caller's promise; tasks have rows of their own.
        let out = unsafe {
            let from = { &out }.ptr.cast::<T>().add(first * columns);
            std::slice::from_raw_parts_mut(from, rows.len() * columns)
        };
        dispatch(isa, Panel::<T> { matrix, first: start[0] + rows.start, columns: start[1]..start[1] + columns, out });
    }));
}

/// Some rows of a panel.
struct Panel<'a, T> {
    matrix: Matrix<'a>,
    /// Of the matrix.
    first: usize,
    columns: Range<usize>,
    out: &'a mut [T],
}

impl<T: Narrow> Work for Panel<'_, T> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { matrix, first, columns, out } = self;
        for (row, out) in out.chunks_exact_mut(columns.len().max(1)).enumerate() {
            let row = first + row;
            let from = row * matrix.width + columns.start;
            let codes = || matrix.codes[from..][..out.len()].iter();
            match matrix.format {
                Format::Int8 => {
                    let (scale, codes) = (matrix.scales[row], codes());
                    out.iter_mut().zip(codes).for_each(|(to, code)| *to = T::round(f32::from(*code as i8) * scale));
                }
                Format::Fp8 => {
                    let (scale, codes) = (matrix.scales[row], codes());
                    out.iter_mut().zip(codes).for_each(|(to, code)| *to = T::round(from_e4m3(*code) * scale));
                }
                Format::Nf4 => matrix.blocks_from(from, out),
            }
        }
    }
}

/// The number of a code of e4m3. Without tables and branches, so that loops over it become SIMD.
#[inline(always)]
fn from_e4m3(code: u8) -> f32 {
    let (sign, size) = (u32::from(code & 128) << 24, u32::from(code & 127));
    // 2^120 moves the exponent's bias, and makes subnormals normal.
    let value = f32::from_bits(size << 20) * f32::from_bits((120 + 127) << 23);
    let value = if size == 127 { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | sign)
}

impl Matrix<'_> {
    /// nf4 from an element on: the sixteen numbers of a block are rounded once, and looked up.
    #[inline(always)]
    fn blocks_from<T: Narrow>(&self, from: usize, out: &mut [T]) {
        let (mut at, mut rest) = (from, out);
        while !rest.is_empty() {
            let block = at / BLOCK;
            let (now, later) = rest.split_at_mut(rest.len().min((block + 1) * BLOCK - at));
            let scale = self.scales[0] + f32::from(self.blocks[block]) * self.scales[1 + block / GROUP];
            let table = Table(NF4.map(|number| T::round(number * scale)));
            // A row of odd length may begin within a byte.
            let (head, pairs) = now.split_at_mut(at % 2);
            head.iter_mut().for_each(|to| *to = table.0[usize::from(self.codes[at / 2] >> 4)]);
            table.look_up(self.isa, &self.codes[at.div_ceil(2)..], pairs);
            at += head.len() + pairs.len();
            rest = later;
        }
    }
}

/// The numbers of a block's codes.
struct Table<T>([T; 16]);

impl<T: Narrow> Table<T> {
    /// The numbers of codes, two to a byte, the first in the low half.
    #[inline(always)]
    fn look_up(&self, isa: Isa, codes: &[u8], out: &mut [T]) {
        let done = match isa {
            // SAFETY: the machine has what it is said to have; there are codes for all of `out`.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => unsafe { x86::avx512(&self.0, codes, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { x86::avx2(&self.0, codes, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Isa::Neon | Isa::NeonBf16 => unsafe { arm::neon(&self.0, codes, out) },
            _ => 0,
        };
        for (to, code) in out[done..].chunks_mut(2).zip(&codes[done / 2..]) {
            to[0] = self.0[usize::from(code & 15)];
            if let Some(second) = to.get_mut(1) {
                *second = self.0[usize::from(code >> 4)];
            }
        }
    }
}

/// Tables that lie in registers.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Looks up whole vectors of codes; how many that were.
    ///
    /// Safety: elements have two or four bytes, `codes` has half as many bytes as `out` has elements, rounded up, and the machine
    /// has the instructions.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn avx512<T>(table: &[T; 16], codes: &[u8], out: &mut [T]) -> usize {
        let step = 64 / size_of::<T>();
        let whole = out.len() / step * step;
        let (codes, to) = (codes.as_ptr(), out.as_mut_ptr());
        // SAFETY: the caller's promise; each step reads and writes what lies before `whole`.
        unsafe {
            if size_of::<T>() == 4 {
                let table = _mm512_loadu_ps(table.as_ptr().cast());
                for i in (0..whole).step_by(step) {
                    // A byte's two codes stand in the low bits of two lanes. What is above them does not count.
                    let bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(codes.add(i / 2).cast()));
                    let index = _mm512_or_si512(bytes, _mm512_slli_epi64::<28>(bytes));
                    _mm512_storeu_ps(to.add(i).cast(), _mm512_permutexvar_ps(index, table));
                }
            } else {
                // Twice, so that a fifth bit does not count.
                let table = _mm512_broadcast_i64x4(_mm256_loadu_si256(table.as_ptr().cast()));
                for i in (0..whole).step_by(step) {
                    let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(i / 2).cast()));
                    let index = _mm512_or_si512(bytes, _mm512_slli_epi32::<12>(bytes));
                    _mm512_storeu_si512(to.add(i).cast(), _mm512_permutexvar_epi16(index, table));
                }
            }
        }
        whole
    }

    /// The same.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub unsafe fn avx2<T>(table: &[T; 16], codes: &[u8], out: &mut [T]) -> usize {
        let whole = out.len() / 16 * 16;
        let (codes, to) = (codes.as_ptr(), out.as_mut_ptr());
        // SAFETY: the caller's promise; each step reads and writes what lies before `whole`.
        unsafe {
            let low_half = _mm_set1_epi8(15);
            let codes_at = |i: usize| {
                let bytes = _mm_loadl_epi64(codes.add(i / 2).cast());
                let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), low_half);
                _mm_unpacklo_epi8(_mm_and_si128(bytes, low_half), high)
            };
            if size_of::<T>() == 4 {
                let table = table.as_ptr().cast::<f32>();
                let (first, second) = (_mm256_loadu_ps(table), _mm256_loadu_ps(table.add(8)));
                let eight = |codes: __m128i| {
                    let index = _mm256_cvtepu8_epi32(codes);
                    let both = [first, second].map(|half| _mm256_permutevar8x32_ps(half, index));
                    _mm256_blendv_ps(both[0], both[1], _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
                };
                for i in (0..whole).step_by(16) {
                    let codes = codes_at(i);
                    _mm256_storeu_ps(to.add(i).cast(), eight(codes));
                    _mm256_storeu_ps(to.add(i + 8).cast(), eight(_mm_unpackhi_epi64(codes, codes)));
                }
            } else {
                // The low and the high bytes of the numbers.
                let (a, b) = (table.as_ptr().cast::<__m128i>(), _mm_set1_epi16(0xff));
                let (a, rest) = (_mm_loadu_si128(a), _mm_loadu_si128(a.add(1)));
                let low = _mm_packus_epi16(_mm_and_si128(a, b), _mm_and_si128(rest, b));
                let high = _mm_packus_epi16(_mm_srli_epi16::<8>(a), _mm_srli_epi16::<8>(rest));
                for i in (0..whole).step_by(16) {
                    let codes = codes_at(i);
                    let (low, high) = (_mm_shuffle_epi8(low, codes), _mm_shuffle_epi8(high, codes));
                    _mm_storeu_si128(to.add(i).cast(), _mm_unpacklo_epi8(low, high));
                    _mm_storeu_si128(to.add(i + 8).cast(), _mm_unpackhi_epi8(low, high));
                }
            }
        }
        whole
    }
}

/// The same: NEON looks up bytes, so a number's bytes have a table each.
#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    /// Looks up whole vectors of codes; how many that were.
    ///
    /// Safety: elements have two or four bytes, and `codes` has half as many bytes as `out` has elements, rounded up.
    #[inline]
    #[target_feature(enable = "neon")]
    pub unsafe fn neon<T>(table: &[T; 16], codes: &[u8], out: &mut [T]) -> usize {
        let whole = out.len() / 16 * 16;
        let (codes, table, to) = (codes.as_ptr(), table.as_ptr().cast(), out.as_mut_ptr());
        // SAFETY: the caller's promise; each step reads and writes what lies before `whole`.
        unsafe {
            let codes_at = |i: usize| {
                let bytes = vld1_u8(codes.add(i / 2));
                let (low, high) = (vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8::<4>(bytes));
                vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high))
            };
            if size_of::<T>() == 4 {
                let uint8x16x4_t(a, b, c, d) = vld4q_u8(table);
                for i in (0..whole).step_by(16) {
                    let codes = codes_at(i);
                    let [a, b, c, d] = [a, b, c, d].map(|bytes| vqtbl1q_u8(bytes, codes));
                    vst4q_u8(to.add(i).cast(), uint8x16x4_t(a, b, c, d));
                }
            } else {
                let uint8x16x2_t(a, b) = vld2q_u8(table);
                for i in (0..whole).step_by(16) {
                    let codes = codes_at(i);
                    let [a, b] = [a, b].map(|bytes| vqtbl1q_u8(bytes, codes));
                    vst2q_u8(to.add(i).cast(), uint8x16x2_t(a, b));
                }
            }
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Dequantise, FORMATS};
    use crate::{DType, Device, Philox, Result, Tensor};

    /// Panels of every instruction set are what the definition gives.
    #[test]
    fn each_instruction_set_decodes_by_the_definition() -> Result<()> {
        let cpu = Device::cpu();
        for (format, [rows, columns]) in FORMATS.into_iter().flat_map(|f| [[37, 151], [5, 64], [3, 1]].map(|d| (f, d)))
        {
            let parts = Parts::of(format, [rows, columns]);
            let words = Philox::new(7).bits(&[parts.words()], &cpu)?.to_vec::<u32>()?;
            // Any codes; scales are numbers of moderate size.
            let scales = Philox::new(8).uniform(&[parts.scales], &cpu)?.to_vec::<f32>()?;
            let mut words = words;
            words[parts.codes + parts.blocks..]
                .iter_mut()
                .zip(scales)
                .for_each(|(word, scale)| *word = scale.to_bits());
            let words = Tensor::from_slice(&words, &[parts.words()], &cpu)?;
            for (dtype, [row, column]) in [DType::F32, DType::BF16, DType::F16]
                .into_iter()
                .flat_map(|t| [[0, 0], [2, 0], [1, 33]].map(|s| (t, s)))
            {
                if column >= columns {
                    continue;
                }
                let out = || Tensor::empty(&[rows - row, columns - column], dtype, &cpu);
                let (got, expected) = (out()?, out()?);
                let (dims, start) = ([rows, columns], [row, column]);
                Dequantise { format, dims, words: &words, start, out: &expected }.compose()?;
                for isa in Isa::available() {
                    // SAFETY: as the call's contract has it.
                    unsafe {
                        dequantise(isa, format, dims, &crate::cpu::view(&words)?, start, &crate::cpu::view(&got)?)
                    };
                    let [got, expected] = [&got, &expected].map(|t| t.to_vec::<f32>());
                    for (got, expected) in got?.into_iter().zip(expected?) {
                        let same = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
                        assert!(same, "{isa:?} {format:?} {dtype}: {got} instead of {expected}");
                    }
                }
            }
        }
        Ok(())
    }
}
