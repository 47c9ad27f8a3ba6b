//! Packing: copies of strided matrices as words, f32 or pairs of bf16, in the order in which the kernels read them.

use crate::cpu::isa::Isa;
use half::{bf16, f16};

/// An element type that widens to f32.
pub(crate) trait Narrow: Copy + Send + Sync + 'static {
    fn widen(self) -> f32;
    fn round(x: f32) -> Self;
    /// Eight of them as a vector. Safety: `p` is valid for eight; the caller has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(p: *const Self) -> std::arch::x86_64::__m256;
}

impl Narrow for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn round(x: f32) -> Self {
        x
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(p: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(p) }
    }
}

impl Narrow for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// To nearest, ties to even; without branches, so that loops over it become SIMD.
    #[inline(always)]
    fn round(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let nan = (bits >> 16) | 0x40;
        Self::from_bits(if x.is_nan() { nan } else { rounded } as u16)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(p: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise.
        unsafe {
            let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))
        }
    }
}

impl Narrow for f16 {
    /// Exact; without branches, so that loops over it become SIMD.
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = (bits & 0x7fff) << 13;
        // 2^112 moves the exponent's bias, and makes subnormals normal.
        let finite = (f32::from_bits(magnitude) * f32::from_bits((112 + 127) << 23)).to_bits();
        let special = magnitude | 0x7f80_0000;
        let value = if magnitude >= 31 << 23 { special } else { finite };
        f32::from_bits(value | ((bits & 0x8000) << 16))
    }
    #[inline(always)]
    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(p: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
}

/// Runs `$body` with `$t` as the Rust type of a dtype of at most 32 bits; nothing for the other dtypes.
macro_rules! with_narrow {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            crate::dtype::DType::F32 => {
                type $t = f32;
                $body
            }
            crate::dtype::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            crate::dtype::DType::F16 => {
                type $t = half::f16;
                $body
            }
            crate::dtype::DType::F64 | crate::dtype::DType::U32 => {}
        }
    };
}
pub(crate) use with_narrow;

/// A window `[k, n]` to pack; element (k, j) is at `ptr + k * ks + j * ns`.
#[derive(Clone, Copy)]
pub(crate) struct Source<T> {
    pub ptr: *const T,
    pub ks: usize,
    pub ns: usize,
    pub k: usize,
    pub n: usize,
}

/// Panels `[n / width][k][width]`, the last one filled up with zeros.
///
/// Safety: the source is valid, `out` for `k * n.next_multiple_of(width)` floats, and the machine has `isa`.
pub(crate) unsafe fn panels<T: Narrow>(isa: Isa, width: usize, s: &Source<T>, out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match (isa, width) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16, _) => panels_avx2(width, s, out),
            (_, 8) => panels_of::<T, 8, false>(s, out),
            _ => panels_of::<T, 4, false>(s, out),
        }
    }
}

/// Rows of a `[rows, k]` window as dense f32 rows, `ld` apart.
///
/// Safety: `src` is valid at `r * rs + i * ks`, `out` for the rows, and the machine has `isa`.
pub(crate) unsafe fn rows<T: Narrow>(isa: Isa, s: &Source<T>, out: *mut f32, ld: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => rows_avx2(s, out, ld),
            _ => rows_of(s, out, ld),
        }
    }
}

#[inline(always)]
unsafe fn rows_of<T: Narrow>(s: &Source<T>, out: *mut f32, ld: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        for j in 0..s.n {
            let (src, out) = (s.ptr.add(j * s.ns), out.add(j * ld));
            if s.ks == 1 {
                for k in 0..s.k {
                    *out.add(k) = (*src.add(k)).widen();
                }
            } else {
                for k in 0..s.k {
                    *out.add(k) = (*src.add(k * s.ks)).widen();
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_avx2<T: Narrow>(s: &Source<T>, out: *mut f32, ld: usize) {
    // SAFETY: the caller's promise.
    unsafe { rows_of(s, out, ld) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn panels_avx2<T: Narrow>(width: usize, s: &Source<T>, out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match width {
            6 => panels_of::<T, 6, false>(s, out),
            12 => panels_of::<T, 12, false>(s, out),
            16 => panels_of::<T, 16, true>(s, out),
            _ => panels_of::<T, 32, true>(s, out),
        }
    }
}

/// Rows of k in a block: few enough that all of a block's panels are written in runs, many enough for the TLB.
const K_RUN: usize = 8;

/// Asks for rows that are packed next: each is too short a run for the machine to see it coming.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch<T>(s: &Source<T>, from: usize, to: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for k in from..to {
        for j in (0..s.n).step_by(64 / size_of::<T>()) {
            // SAFETY: a hint; no address is invalid.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(s.ptr.wrapping_add(k * s.ks + j).cast()) };
        }
    }
}

#[inline(always)]
unsafe fn widen_row<T: Narrow>(from: *const T, n: usize, to: *mut f32) {
    for i in 0..n {
        // SAFETY: the caller's promise: both hold n elements.
        unsafe { *to.add(i) = (*from.add(i)).widen() };
    }
}

#[inline(always)]
unsafe fn panels_of<T: Narrow, const W: usize, const AVX2: bool>(s: &Source<T>, out: *mut f32) {
    // SAFETY: the caller's promise; panels start at multiples of W, and `live` columns of them exist.
    unsafe {
        if s.ns != 1 {
            // Panel by panel: few enough rows of memory at a time for the machine to see where each goes.
            for j in (0..s.n).step_by(W) {
                transposed_panel::<T, W, AVX2>(s, j, out.add(j * s.k));
            }
            return;
        }
        for k0 in (0..s.k).step_by(K_RUN) {
            let k1 = (k0 + K_RUN).min(s.k);
            #[cfg(target_arch = "x86_64")]
            prefetch(s, k1, (k1 + K_RUN).min(s.k));
            for j in (0..s.n).step_by(W) {
                let live = W.min(s.n - j);
                let (out, src) = (out.add(j * s.k), s.ptr.add(j));
                // In whole vectors where the row is long enough: what spills over is the next k's, written after.
                let vectors = W.next_multiple_of(8);
                let spilling = if j + vectors <= s.n { k0..k1 - 1 } else { k0..k0 };
                for k in spilling.clone() {
                    widen_row::<T>(src.add(k * s.ks), vectors, out.add(k * W));
                }
                for k in spilling.end..k1 {
                    widen_row::<T>(src.add(k * s.ks), live, out.add(k * W));
                    std::slice::from_raw_parts_mut(out.add(k * W + live), W - live).fill(0.0);
                }
            }
        }
    }
}

/// The panel of columns `j..j + W`, whose neighbours in memory are not neighbours in the panel.
#[inline(always)]
unsafe fn transposed_panel<T: Narrow, const W: usize, const AVX2: bool>(s: &Source<T>, j: usize, out: *mut f32) {
    let live = W.min(s.n - j);
    // SAFETY: the caller's promise.
    unsafe {
        let src = s.ptr.add(j * s.ns);
        // In squares, the rest by single copies.
        let side = if AVX2 { 8 } else { 4 };
        let (from_k, from_column) = if s.ks == 1 { (s.k / side * side, live / side * side) } else { (0, 0) };
        for k in (0..from_k).step_by(side) {
            for i in (0..from_column).step_by(side) {
                let (src, out) = (src.add(i * s.ns + k), out.add(k * W + i));
                #[cfg(target_arch = "x86_64")]
                if AVX2 {
                    transpose8(src, s.ns, out, W);
                    continue;
                }
                transpose4(src, s.ns, out, W);
            }
        }
        for k in 0..s.k {
            for i in if k < from_k { from_column } else { 0 }..W {
                *out.add(k * W + i) = if i < live { (*src.add(k * s.ks + i * s.ns)).widen() } else { 0.0 };
            }
        }
    }
}

/// Panels `[n / width][words][width]` of pairs along k, an odd last one and the last panel filled up with zeros.
///
/// Safety: the source is valid, `out` for `k / 2 * n.next_multiple_of(width)` words, rounded up, and the machine has an
/// instruction set of pairs.
pub(crate) unsafe fn pair_panels(width: usize, s: &Source<bf16>, out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if s.ns == 1 {
            return pair_panels_avx512(width, s, out.cast());
        }
        if s.ks == 1 && s.k.is_multiple_of(2) && s.ns.is_multiple_of(2) && matches!(width, 8 | 32) {
            // Pairs lie side by side: they move as f32 would.
            let words = Source::<f32> { ptr: s.ptr.cast(), ks: 1, ns: s.ns / 2, k: s.k / 2, n: s.n };
            for j in (0..s.n).step_by(width) {
                #[cfg(target_arch = "x86_64")]
                word_panel(&words, j, out.add(j * words.k));
                #[cfg(not(target_arch = "x86_64"))]
                transposed_panel::<f32, 8, false>(&words, j, out.add(j * words.k));
            }
        } else if s.ns == 1 {
            pair_rows_as_panels(width, s, out.cast());
        } else {
            let (words, out) = (s.k.div_ceil(2), out.cast::<u32>());
            let bits = |k: usize, j: usize| {
                if k < s.k && j < s.n { u32::from((*s.ptr.add(k * s.ks + j * s.ns)).to_bits()) } else { 0 }
            };
            for j in 0..s.n.next_multiple_of(width) {
                let out = out.add(j / width * width * words + j % width);
                for k in 0..words {
                    *out.add(k * width) = bits(2 * k, j) | bits(2 * k + 1, j) << 16;
                }
            }
        }
    }
}

/// The same where each k is a run of memory: two of them side by side, in loops that become SIMD.
unsafe fn pair_rows_as_panels(width: usize, s: &Source<bf16>, out: *mut u32) {
    let words = s.k.div_ceil(2);
    for j in (0..s.n).step_by(width) {
        let live = width.min(s.n - j);
        for k in 0..words {
            // SAFETY: the caller's promise: these rows hold `live` elements from j on, and a panel's rows are `width` words.
            unsafe {
                let row = |k: usize| std::slice::from_raw_parts(s.ptr.add(k * s.ks + j), live);
                let to = std::slice::from_raw_parts_mut(out.add(j * words + k * width), width);
                let (to, rest) = to.split_at_mut(live);
                rest.fill(0);
                let low = |x: bf16| u32::from(x.to_bits());
                if 2 * k + 1 < s.k {
                    let pairs = row(2 * k).iter().zip(row(2 * k + 1));
                    to.iter_mut().zip(pairs).for_each(|(to, (a, b))| *to = low(*a) | low(*b) << 16);
                } else {
                    to.iter_mut().zip(row(2 * k)).for_each(|(to, a)| *to = low(*a));
                }
            }
        }
    }
}

/// Rows of a `[rows, k]` window as rows of pairs, `ld` words apart, an odd last one filled up with zero.
///
/// Safety: the source's rows are dense and valid, `out` is for the rows.
pub(crate) unsafe fn pair_rows(s: &Source<bf16>, out: *mut f32, ld: usize) {
    for j in 0..s.n {
        // SAFETY: the caller's promise.
        unsafe {
            let to = out.add(j * ld).cast::<bf16>();
            std::ptr::copy_nonoverlapping(s.ptr.add(j * s.ns), to, s.k);
            if !s.k.is_multiple_of(2) {
                to.add(s.k).write(bf16::ZERO);
            }
        }
    }
}

/// Rounds `n` floats to nearest, ties to even; subnormal ones become zero, as in the products of pairs.
///
/// Safety: both rows hold `n`, and the machine has the instruction.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn round_row(from: *const f32, to: *mut bf16, n: usize) {
    use std::arch::x86_64::*;
    let whole = n - n % 16;
    // SAFETY: the caller's promise; the last vector's mask has the elements that exist.
    unsafe {
        for j in (0..whole).step_by(16) {
            let narrow = _mm512_cvtneps_pbh(_mm512_loadu_ps(from.add(j)));
            to.add(j).cast::<__m256bh>().write_unaligned(narrow);
        }
        let mask = ((1u32 << (n - whole)) - 1) as u16;
        let narrow = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from.wrapping_add(whole)));
        let bits = std::mem::transmute::<__m256bh, __m256i>(narrow);
        _mm256_mask_storeu_epi16(to.wrapping_add(whole).cast(), mask, bits);
    }
}

/// A panel of words that are pairs in memory too.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn word_panel(s: &Source<f32>, j: usize, out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { transposed_panel::<f32, 32, true>(s, j, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pair_panels_avx512(width: usize, s: &Source<bf16>, out: *mut u32) {
    use std::arch::x86_64::*;
    let words = s.k.div_ceil(2);
    let low16 = |n: usize| ((1u32 << n.min(16)) - 1) as u16;
    for k0 in (0..words).step_by(K_RUN) {
        let k1 = (k0 + K_RUN).min(words);
        prefetch(s, 2 * k1, (2 * (k1 + K_RUN)).min(s.k));
        for j in (0..s.n).step_by(width) {
            let live = width.min(s.n - j);
            for k in k0..k1 {
                for v in (0..width).step_by(16) {
                    let mask = low16(live.saturating_sub(v));
                    // SAFETY: the caller's promise; only live columns of rows that exist are read, and what is written
                    // past the panel's width is the next k's, written after, or masked out.
                    unsafe {
                        let first = s.ptr.wrapping_add(2 * k * s.ks + j + v).cast::<i16>();
                        let low = _mm256_maskz_loadu_epi16(mask, first);
                        let high = if 2 * k + 1 < s.k {
                            _mm256_maskz_loadu_epi16(mask, first.wrapping_add(s.ks))
                        } else {
                            _mm256_setzero_si256()
                        };
                        let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
                        let pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low), high);
                        let to = out.add(j * words + k * width + v).cast::<i32>();
                        if v + 16 <= width || k + 1 < k1 {
                            _mm512_storeu_si512(to.cast(), pairs);
                        } else {
                            _mm512_mask_storeu_epi32(to, low16(width - v), pairs);
                        }
                    }
                }
            }
        }
    }
}

/// `out[i][j] = src[j][i]` for 4 x 4 elements; rows are `ld` and `ldo` apart.
#[inline(always)]
unsafe fn transpose4<T: Narrow>(src: *const T, ld: usize, out: *mut f32, ldo: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        // Whole rows, so that the compiler makes vectors of them.
        let rows: [[T; 4]; 4] = std::array::from_fn(|j| src.add(j * ld).cast::<[T; 4]>().read_unaligned());
        let rows = rows.map(|row| row.map(T::widen));
        for i in 0..4 {
            out.add(i * ldo).cast::<[f32; 4]>().write_unaligned(rows.map(|row| row[i]));
        }
    }
}

/// `out[i][j] = src[j][i]` for 8 x 8 elements; rows are `ld` and `ldo` apart.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose8<T: Narrow>(src: *const T, ld: usize, out: *mut f32, ldo: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller's promise; inlined into functions with AVX2.
    unsafe {
        let mut r = [_mm256_setzero_ps(); 8];
        for (i, r) in r.iter_mut().enumerate() {
            *r = T::load8(src.add(i * ld));
        }
        let mut t = r;
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for h in 0..2 {
            let t = &t[4 * h..4 * h + 4];
            r[4 * h] = _mm256_shuffle_ps::<0x44>(t[0], t[2]);
            r[4 * h + 1] = _mm256_shuffle_ps::<0xee>(t[0], t[2]);
            r[4 * h + 2] = _mm256_shuffle_ps::<0x44>(t[1], t[3]);
            r[4 * h + 3] = _mm256_shuffle_ps::<0xee>(t[1], t[3]);
        }
        for i in 0..4 {
            _mm256_storeu_ps(out.add(i * ldo), _mm256_permute2f128_ps::<0x20>(r[i], r[4 + i]));
            _mm256_storeu_ps(out.add((4 + i) * ldo), _mm256_permute2f128_ps::<0x31>(r[i], r[4 + i]));
        }
    }
}
