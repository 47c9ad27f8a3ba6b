//! The index arithmetic of `kernels/layout.h`, compiled for the host: what lies where in tiles, that accesses of a warp meet in
//! no bank of shared memory, and that the operands of `mma.m16n8k16` are where NVIDIA's documentation has them.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // the helpers of tests may panic

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use libloading::Library;
use proptest::prelude::*;

/// The library; the folder that it was built in is gone as soon as it is loaded.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("layout.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/layout.c");
        let mut cc = Command::new("cc");
        let built = cc.args(["-std=c99", "-Wall", "-Werror", "-shared", "-fPIC", "-o"]).arg(&to).arg(source).status();
        assert!(built.unwrap().success());
        // SAFETY: a library of pure functions, without initialisers.
        unsafe { Library::new(&to).unwrap() }
    })
}

macro_rules! functions {
    ($($name:ident($($arg:ident),*);)*) => {
        $(fn $name($($arg: i32),*) -> i32 {
            type Function = unsafe extern "C" fn($(functions!(@int $arg)),*) -> i32;
            // SAFETY: the library has a function of this name and signature, without side effects.
            unsafe { library().get::<Function>(concat!("host_", stringify!($name)).as_bytes()).unwrap()($($arg),*) }
        })*
    };
    (@int $arg:ident) => { i32 };
}

functions! {
    tile_offset(cols, row, chunk);
    left_row(flipped, m, k, lane);
    left_chunk(flipped, m, k, lane);
    right_row(flipped, k, n, lane);
    right_chunk(flipped, k, n, lane);
    result_row(lane, r);
    result_col(lane, r);
    slab_width(cols);
    tile_of_block(rows, cols, block);
    float_width(cols);
    weights_width(rows);
    sum_slot(run, i, thread, j);
    sum_place(run, lanes, width, group, column);
    run_place(run, column);
}

/// Widths of tiles: 32 elements of k in a product's step, its 64 or 128 rows or columns, and head dims.
const COLS: [i32; 4] = [32, 64, 128, 256];

/// Whether the accesses of threads that are served at once, of `words` words of four bytes each, are in different banks.
fn is_free_of_conflicts(addresses: impl IntoIterator<Item = i32>, words: i32) -> bool {
    let banks: Vec<i32> = addresses.into_iter().flat_map(|a| (0..words).map(move |w| (a / 4 + w) % 32)).collect();
    banks.len() <= 32 && banks.iter().collect::<BTreeSet<_>>().len() == banks.len()
}

#[test]
fn chunks_of_a_tile_have_each_a_place_of_their_own() {
    for cols in COLS {
        for rows in [16, 64, 128] {
            let places = (0..rows).flat_map(|row| (0..cols / 8).map(move |chunk| tile_offset(cols, row, chunk)));
            let expected: BTreeSet<i32> = (0..rows * cols / 8).map(|i| 16 * i).collect();
            assert_eq!(places.collect::<BTreeSet<_>>(), expected, "{cols} {rows}");
        }
    }
}

/// Element of a tile that `ldmatrix` gives to a lane: register, first or second half. Matrix `i` has the rows whose addresses
/// lanes 8 i to 8 i + 7 give; lane l gets elements 2 (l % 4) and the next of row l / 4; of column l / 4 with `.trans`.
fn loaded(lane: i32, register: i32, half: i32, trans: bool, row_chunk: impl Fn(i32) -> (i32, i32)) -> (i32, i32) {
    let (major, minor) = (lane / 4, lane % 4 * 2 + half);
    let (matrix_row, matrix_col) = if trans { (minor, major) } else { (major, minor) };
    let (row, chunk) = row_chunk(8 * register + matrix_row);
    (row, 8 * chunk + matrix_col)
}

proptest! {
    #[test]
    fn operands_are_where_the_instruction_takes_them(a in 0..8i32, b in 0..8i32, lane in 0..32i32, register in 0..4i32, half in 0..2i32) {
        let (a, b) = (16 * a, 16 * b);
        let (group, within) = (lane / 4, lane % 4);
        for flipped in [0, 1] {
            // The left operand of 16 x 16: registers are the quarters of rows 0 and 8, then those of columns 8 on.
            let (m, k) = (a + group + register % 2 * 8, b + within * 2 + half + register / 2 * 8);
            let at = loaded(lane, register, half, flipped == 1, |l| (left_row(flipped, a, b, l), left_chunk(flipped, a, b, l)));
            prop_assert_eq!(at, if flipped == 1 { (k, m) } else { (m, k) });
            // Two right operands of 16 x 8: two registers each, of k 0 and 8 on.
            let (k, n) = (a + within * 2 + half + register % 2 * 8, b + group + register / 2 * 8);
            let at = loaded(lane, register, half, flipped == 0, |l| (right_row(flipped, a, b, l), right_chunk(flipped, a, b, l)));
            prop_assert_eq!(at, if flipped == 1 { (n, k) } else { (k, n) });
        }
        // The result of 16 x 8.
        let r = register;
        prop_assert_eq!((result_row(lane, r), result_col(lane, r)), (group + r / 2 * 8, within * 2 + r % 2));
    }

    /// `ldmatrix` reads eight rows of 16 bytes at once; so does a copy write eight chunks.
    #[test]
    fn tiles_are_read_and_written_without_conflicts(cols in 0..4usize, a in 0..4i32, b in 0..2i32, i in 0..64i32) {
        let cols = COLS[cols];
        let (a, b) = (16 * a, 16 * b);
        for flipped in [0, 1] {
            for matrix in 0..4 {
                let lanes = || 8 * matrix..8 * matrix + 8;
                // The row axis comes first where it is not flipped, and the other way round.
                let (m, k) = if flipped == 1 { (b, a) } else { (a, b) };
                let left = lanes().map(|l| tile_offset(cols, left_row(flipped, m, k, l), left_chunk(flipped, m, k, l)));
                prop_assert!(is_free_of_conflicts(left, 4));
                let (k, n) = if flipped == 1 { (b, a) } else { (a, b) };
                let right = lanes().map(|l| tile_offset(cols, right_row(flipped, k, n, l), right_chunk(flipped, k, n, l)));
                prop_assert!(is_free_of_conflicts(right, 4));
            }
        }
        let chunks = cols / 8;
        let written = (8 * i..8 * i + 8).map(|i| tile_offset(cols, i / chunks, i % chunks));
        prop_assert!(is_free_of_conflicts(written, 4));
    }

    /// Each sum of a block has a place of its own, where the thread that takes the column keeps it.
    #[test]
    fn sums_of_columns_are_found_where_threads_keep_them(width in 1..400i32, parts in 1..3i32, wide in any::<bool>(), row in any::<bool>()) {
        let (run, lanes) = (if wide { 8 } else { 2 }, if row { 128 } else { 8 });
        let chunks = (width + run * lanes - 1) / (run * lanes);
        let mut places = BTreeSet::new();
        for thread in 0..128 {
            for part in 0..parts {
                for chunk in 0..chunks {
                    for j in 0..run {
                        let place = sum_slot(run, part * chunks + chunk, thread, j);
                        prop_assert!(places.insert(place) && place < 128 * run * parts * chunks);
                        let column = run * (chunk * lanes + thread % lanes) + j;
                        if column < width {
                            prop_assert_eq!(place, sum_place(run, lanes, width, thread / lanes, part * width + column));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_have_each_a_tile_of_their_own(rows in 1..70i32, cols in 1..40i32) {
        let tiles: BTreeSet<i32> = (0..rows * cols).map(|block| tile_of_block(rows, cols, block)).collect();
        prop_assert!(tiles.into_iter().eq(0..rows * cols));
    }
}

#[test]
fn results_pass_through_shared_memory_without_conflicts() {
    // Pairs of floats: half a warp at once.
    for cols in [32, 64, 128, 256] {
        let width = slab_width(cols);
        for half in 0..2 {
            let pairs = (16 * half..16 * half + 16).map(|lane| 4 * (result_row(lane, 0) * width + result_col(lane, 0)));
            assert!(is_free_of_conflicts(pairs, 2), "{cols}");
        }
        // All of a slab has room, in rows that begin at multiples of 16 bytes.
        assert!(width >= cols && width % 4 == 0);
    }
}

#[test]
fn attention_in_f32_reads_and_writes_without_conflicts() {
    for depth in COLS {
        let width = float_width(depth);
        // Four floats: a quarter of a warp at once, which is one column of eight rows, or eight neighbours in a row.
        for col in (0..depth).step_by(4) {
            assert!(is_free_of_conflicts((0..8).map(|lane| 4 * (lane * width + col)), 4));
        }
        assert!(is_free_of_conflicts((0..8).map(|lane| 4 * 4 * lane), 4) && width % 4 == 0);
        // Probabilities: four threads' rows, eight columns each.
        let (rows, mine) = if depth <= 128 { (32, 2) } else { (16, 1) };
        let written = (0..32).map(|lane| 4 * (lane / 8 * mine * weights_width(rows) + lane % 8));
        assert!(is_free_of_conflicts(written, 1), "{depth}");
    }
}

#[test]
fn sums_of_columns_are_kept_and_folded_without_conflicts() {
    // Vectors of four floats by a quarter of a warp, of two by half of it.
    for (run, threads) in [(8, 8), (2, 16)] {
        for first in (0..128).step_by(threads) {
            for j in (0..run).step_by(if run == 8 { 4 } else { 2 }) {
                let vectors = (first..first + threads as i32).map(|thread| 4 * sum_slot(run, 3, thread, j));
                assert!(vectors.clone().all(|place| place % (4 * run.min(4)) == 0));
                assert!(is_free_of_conflicts(vectors, run.min(4)), "{run} {first} {j}");
            }
        }
    }
    // A warp writes a run of 32 columns, and reads a column of 32 runs.
    for i in 0..32 {
        assert!(is_free_of_conflicts((0..32).map(|lane| 4 * run_place(i, lane)), 1));
        assert!(is_free_of_conflicts((0..32).map(|lane| 4 * run_place(lane, i)), 1));
    }
}
