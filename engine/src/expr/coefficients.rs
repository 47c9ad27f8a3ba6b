//! The numbers of the elementary functions in f32, highest power first: one table for the CPU's loops and for the steps that
//! kernels are printed from.
#![expect(clippy::excessive_precision)] // as published

/// ln 2 in two parts, the first exact in products with small integers.
pub(crate) const LN_2: [f32; 2] = [0.693_359_375, -2.121_944_4e-4];
/// Where e^x is zero below, and infinite above.
pub(crate) const EXP_RANGE: [f32; 2] = [-104.0, 89.0];
/// `(e^x - 1 - x) / x^2` on half an octave around 0 (Cephes).
pub(crate) const EXP: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_1e-1];
/// `(2^x - 1) / x` on [-1/2, 1/2] (Cephes).
pub(crate) const EXP2: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_5e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1];
/// `(ln(1 + x) - x + x^2 / 2) / x^3` with 1 + x on [sqrt 1/2, sqrt 2) (Cephes).
pub(crate) const LOG: [f32; 9] = [
    7.037_683_6e-2,
    -1.151_461e-1,
    1.167_699_9e-1,
    -1.242_014_1e-1,
    1.424_932_3e-1,
    -1.666_805_8e-1,
    2.000_071_5e-1,
    -2.499_999_4e-1,
    3.333_333_1e-1,
];
/// The bits of sqrt 1/2.
pub(crate) const ROOT_HALF: i32 = 0x3f35_04f3;
/// `(sin x - x) / x^3` over x^2 on [-pi/4, pi/4] (Cephes).
pub(crate) const SINE: [f32; 3] = [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1];
/// `(cos x - 1 + x^2 / 2) / x^4` over x^2 on [-pi/4, pi/4] (Cephes).
pub(crate) const COSINE: [f32; 3] = [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2];
/// `(tanh x - x) / x^3` over x^2, up to [`TANH_BOUND`].
pub(crate) const TANH: [f32; 4] = [1.573_944_1e-2, -5.230_259_9e-2, 1.331_529_8e-1, -3.333_276_8e-1];
/// Where tanh goes over to `1 - 2 / (e^2x + 1)`.
pub(crate) const TANH_BOUND: f32 = 0.55;
/// `(erf x - x) / x` over x^2, up to [`ERF_BOUND`] (N. Juffa).
pub(crate) const ERF: [f32; 6] =
    [-5.967_617e-4, 4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_3e-1, -3.761_253_6e-1, 1.283_791_7e-1];
/// Where erf goes over to `1 - e^(p x - x)`.
pub(crate) const ERF_BOUND: f32 = 0.927_734_4;
/// The two highest powers of that p, to be multiplied with x^2.
pub(crate) const ERF_HIGH: [f32; 2] = [-1.728_534_7e-5, 3.831_971_3e-4];
/// The next two, to be added.
pub(crate) const ERF_MIDDLE: [f32; 2] = [-3.883_964_4e-3, 2.425_462_2e-2];
/// The rest.
pub(crate) const ERF_LOW: [f32; 3] = [-1.067_778_8e-1, -6.348_466_9e-1, -1.287_175_1e-1];
