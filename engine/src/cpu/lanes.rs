//! Sums and maxima over runs of numbers: sixteen side by side, so that loops become SIMD, then a tree.

/// Numbers that a loop takes at once: one or two vectors.
pub(super) const LANES: usize = 16;

/// The lanes as one number, in a fixed order.
#[inline(always)]
pub(super) fn fold<A: Copy>(mut lanes: [A; LANES], join: impl Fn(A, A) -> A) -> A {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of `f` over rows of one length, in a fixed order.
#[inline(always)]
pub(super) fn sum<const N: usize>(rows: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let n = rows[0].len();
    let whole = n - n % LANES;
    for start in (0..whole).step_by(LANES) {
        let blocks = rows.map(|r| &r[start..start + LANES]);
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane += f(blocks.map(|b| b[i]));
        }
    }
    let rest: f32 = (whole..n).map(|i| f(rows.map(|r| r[i]))).sum();
    // The compiler may not see both the loop and the tree: it would make a loop of pairs, as the tree's last steps are.
    fold(std::hint::black_box(lanes), |a, b| a + b) + rest
}
