// Where things lie: the kernels' index arithmetic. Plain C, so that a test compiles the same lines for the host.
#pragma once
#ifdef __CUDACC__
#define INDEX __device__ __forceinline__
#else
#define INDEX static inline
#endif

// Bytes from the start of a tile of 16-bit elements to a chunk of eight of them; rows have `cols`. The chunks of a row are
// exchanged so that those of one column in eight neighbouring rows lie in different banks.
INDEX int tile_offset(int cols, int row, int chunk) {
    const int chunks = cols / 8, rows_of_line = chunks < 8 ? 8 / chunks : 1, mix = chunks < 8 ? chunks : 8;
    return 16 * (row * chunks + (chunk ^ (row / rows_of_line % mix)));
}

// The row and the chunk of a tile whose address a lane gives to `ldmatrix.x4`, for the left operand of a product at
// (m, k), 16x16: rows of the tile are m; or k if flipped, with `.trans`.
INDEX int left_row(int flipped, int m, int k, int lane) { return flipped ? k + lane % 8 + lane / 16 * 8 : m + lane % 16; }
INDEX int left_chunk(int flipped, int m, int k, int lane) { return flipped ? m / 8 + lane / 8 % 2 : k / 8 + lane / 16; }

// The same of the right operand at (k, n), 16x16, of which registers 0 and 1 are the first eight columns: rows of the tile
// are k, with `.trans`; or n if flipped.
INDEX int right_row(int flipped, int k, int n, int lane) { return flipped ? n + lane % 8 + lane / 16 * 8 : k + lane % 16; }
INDEX int right_chunk(int flipped, int k, int n, int lane) { return flipped ? k / 8 + lane / 8 % 2 : n / 8 + lane / 16; }

// Row and column of result `r` (0 to 3) of a lane in a product of 16x8.
INDEX int result_row(int lane, int r) { return lane / 4 + r / 2 * 8; }
INDEX int result_col(int lane, int r) { return lane % 4 * 2 + r % 2; }

// Results of a warp on their way to memory: sixteen rows of floats in shared memory, this wide, so that the pairs that half a
// warp writes at once lie in different banks.
INDEX int slab_width(int cols) { return cols + 8; }

// The tile of a block in a grid of `rows` x `cols` tiles: eight rows of tiles together, column by column, so that neighbours
// share operands in the cache. The tile's number, row by row.
INDEX int tile_of_block(int rows, int cols, int block) {
    const int first = block / (8 * cols) * 8, height = rows - first < 8 ? rows - first : 8, within = block % (8 * cols);
    return (first + within % height) * cols + within / height;
}

// Floats of a row of attention's tiles in f32: four more, so that vectors of four in one column of eight rows, and of eight
// neighbours in one row, lie in different banks.
INDEX int float_width(int cols) { return cols + 4; }

// Floats of a row of its probabilities, `rows` of them: the rows of a warp's threads are one (16) or two (32) apart, and lie in
// different banks.
INDEX int weights_width(int rows) { return rows + (rows <= 16 ? 8 : 4); }

// Floats from the start of the sums that the 128 threads of a block keep of columns to the `j`th of a thread's `run` (2 or 8)
// numbers `i`: vectors of up to four floats, those of neighbouring threads side by side, in different banks.
INDEX int sum_slot(int run, int i, int thread, int j) {
    const int vector = run < 4 ? run : 4;
    return vector * ((run / vector * i + j / vector) * 128 + thread) + j % vector;
}

// The same to the sum of a column, of a group of `lanes` threads that take runs of columns in turn. Columns are in parts of
// `width`, whose sums are one behind the other.
INDEX int sum_place(int run, int lanes, int width, int group, int column) {
    const int chunks = (width + run * lanes - 1) / (run * lanes), c = column % width, at = c / run;
    return sum_slot(run, column / width * chunks + at / lanes, group * lanes + at % lanes, c % run);
}

// Floats from the start of 32 runs of 32 columns each, which one warp writes and another reads.
INDEX int run_place(int run, int column) { return 33 * run + column; }
