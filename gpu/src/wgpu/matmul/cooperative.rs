//! Products by cooperative matrices (tensor cores): a subgroup multiplies squares of 16 x 16 or 8 x 8 together.
//!
//! The hardware adds up a square's terms in an order of its own, so results differ from the tiles' by rounding. Which
//! products come here follows from adapter, dtypes and sizes, never from timing.

use ::wgpu::{CooperativeMatrixProperties, CooperativeScalarType as Scalar};
use flowtape_engine::DType;

use super::super::wgsl::{self, THREADS};
use super::text::Common;

/// Squares of a subgroup along each side.
const SQUARES: usize = 2;

/// What an adapter multiplies: squares of `size`, of f16 or of f32, added up in f32.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Cooperative {
    pub(crate) size: usize,
    /// Whether the factors are f16.
    pub(crate) half: bool,
    /// Threads of a subgroup.
    pub(crate) lanes: usize,
}

impl Cooperative {
    /// What of an adapter's offers there are kernels for. Subgroups must be of one size.
    pub(crate) fn of(offers: &[CooperativeMatrixProperties], lanes: (u32, u32), f16: bool) -> Vec<Self> {
        let fits = |p: &&CooperativeMatrixProperties| {
            let square = p.m_size == p.n_size && p.n_size == p.k_size && matches!(p.m_size, 8 | 16);
            let factors = p.ab_type == Scalar::F32 || (p.ab_type == Scalar::F16 && f16);
            square && factors && p.cr_type == Scalar::F32 && !p.saturating_accumulation
        };
        if lanes.0 != lanes.1 || !lanes.0.is_power_of_two() || lanes.0 as usize > THREADS {
            return Vec::new();
        }
        let make = |p: &CooperativeMatrixProperties| Self {
            size: p.m_size as usize,
            half: p.ab_type == Scalar::F16,
            lanes: lanes.0 as usize,
        };
        offers.iter().filter(fits).map(make).collect()
    }

    /// Whether it multiplies these without rounding the factors.
    pub(super) fn takes(self, a: DType, b: DType) -> bool {
        !self.half || (a, b) == (DType::F16, DType::F16)
    }

    /// Subgroups along the rows and the columns of a tile.
    fn grid(self) -> [usize; 2] {
        let all = THREADS / self.lanes;
        let rows = 1 << all.ilog2().div_ceil(2);
        [rows, all / rows]
    }

    /// Rows and columns of a workgroup's tile.
    pub(super) fn tile(self) -> [usize; 2] {
        self.grid().map(|n| n * SQUARES * self.size)
    }

    fn scalar(self) -> &'static str {
        if self.half { "f16" } else { "f32" }
    }

    /// Bytes of workgroup memory.
    pub(super) fn shared(self) -> usize {
        let factors: usize = self.tile().iter().map(|n| n * self.size).sum();
        factors * if self.half { 2 } else { 4 } + 4 * self.results()
    }

    /// Elements of the squares that are written at once, one a subgroup.
    fn results(self) -> usize {
        THREADS / self.lanes * self.size * self.size
    }

    /// What stands before everything else.
    pub(super) fn directives(self) -> &'static str {
        if self.half { "enable f16;\nenable wgpu_cooperative_matrix;\n" } else { "enable wgpu_cooperative_matrix;\n" }
    }

    /// The kernel's text after its declarations.
    pub(super) fn source(self, common: &Common) -> String {
        let Self { size, lanes, .. } = self;
        let ([height, width], [_, grid_cols]) = (self.tile(), self.grid());
        let [m, n, k] = common.sizes();
        let (scalar, side) = (self.scalar(), SQUARES * size);
        let matrix = |of: &str, role: char| format!("coop_mat{size}x{size}<{of}, {role}>");
        let mut main = common.start(height, width);
        main += &format!(
            "  let top = subgroup / {grid_cols}u * {side}u;
  let left_of = subgroup % {grid_cols}u * {side}u;
"
        );
        let squares = || (0..SQUARES).flat_map(|i| (0..SQUARES).map(move |j| (i, j)));
        squares().for_each(|(i, j)| main += &format!("  var c{i}_{j} = {}();\n", matrix("f32", 'C')));
        main += &format!("  for (var k0 = 0u; k0 < {k}; k0 += {size}u) {{\n");
        // Both factors row by row: left [rows, k], right [k, columns]. Threads follow the order in memory.
        let [a_along, b_along] = common.along_k;
        let place = |along: bool, fast: usize, slow: usize| {
            if along {
                format!("e / {fast}u; let y = e % {fast}u")
            } else {
                format!("e % {slow}u; let y = e / {slow}u")
            }
        };
        main += &format!(
            "    for (var e = index; e < {}u; e += {THREADS}u) {{ let x = {};
      var v = 0.0;
      if row0 + x < {m} && k0 + y < {k} {{ v = load0({}); }}
      left[x * {size}u + y] = {scalar}(v);
    }}
",
            height * size,
            place(a_along, size, height),
            common.at_a("(row0 + x)", "(k0 + y)"),
        );
        main += &format!(
            "    for (var e = index; e < {}u; e += {THREADS}u) {{ let x = {};
      var v = 0.0;
      if col0 + x < {n} && k0 + y < {k} {{ v = load1({}); }}
      right[y * {width}u + x] = {scalar}(v);
    }}
    workgroupBarrier();
",
            width * size,
            place(b_along, size, width),
            common.at_b("(k0 + y)", "(col0 + x)"),
        );
        for i in 0..SQUARES {
            let (a, b) = (matrix(scalar, 'A'), matrix(scalar, 'B'));
            main += &format!(
                "    let a{i} = coopLoadT<{a}>(&left[(top + {}u) * {size}u], {size}u);
    let b{i} = coopLoadT<{b}>(&right[left_of + {}u], {width}u);
",
                i * size,
                i * size
            );
        }
        squares().for_each(|(i, j)| main += &format!("    c{i}_{j} = coopMultiplyAdd(a{i}, b{j}, c{i}_{j});\n"));
        main += "    workgroupBarrier();\n  }\n";
        let first = format!("subgroup * {}u", size * size);
        for (i, j) in squares() {
            let result = |step: usize| format!("results[{first} + e * 2u + {step}u]");
            let col = format!("(col0 + left_of + {}u + e * 2u % {size}u)", j * size);
            let next = format!("({col} + 1u)");
            let row = format!("(row0 + top + {}u + e * 2u / {size}u)", i * size);
            main += &format!(
                "  coopStoreT(c{i}_{j}, &results[{first}], {size}u);
  workgroupBarrier();
  for (var e = lane; e < {}u; e += {lanes}u) {{
{}  }}
  workgroupBarrier();
",
                size * size / 2,
                common.write(&row, &[(col, result(0)), (next, result(1))])
            );
        }
        let builtins = ", @builtin(subgroup_invocation_id) lane: u32, @builtin(subgroup_id) subgroup: u32";
        let array = |name: &str, of: &str, len: usize| format!("var<workgroup> {name}: array<{of}, {len}>;\n");
        array("left", scalar, height * size)
            + &array("right", scalar, width * size)
            + &array("results", "f32", self.results())
            + &wgsl::entry_of(THREADS, builtins, &main)
    }
}
