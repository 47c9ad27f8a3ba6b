// The kernels' index arithmetic as a library of the host.
#include "../src/cuda/kernels/layout.h"

int host_tile_offset(int cols, int row, int chunk) { return tile_offset(cols, row, chunk); }
int host_left_row(int flipped, int m, int k, int lane) { return left_row(flipped, m, k, lane); }
int host_left_chunk(int flipped, int m, int k, int lane) { return left_chunk(flipped, m, k, lane); }
int host_right_row(int flipped, int k, int n, int lane) { return right_row(flipped, k, n, lane); }
int host_right_chunk(int flipped, int k, int n, int lane) { return right_chunk(flipped, k, n, lane); }
int host_result_row(int lane, int r) { return result_row(lane, r); }
int host_result_col(int lane, int r) { return result_col(lane, r); }
int host_slab_width(int cols) { return slab_width(cols); }
int host_tile_of_block(int rows, int cols, int block) { return tile_of_block(rows, cols, block); }
int host_float_width(int cols) { return float_width(cols); }
int host_weights_width(int rows) { return weights_width(rows); }
int host_sum_slot(int run, int i, int thread, int j) { return sum_slot(run, i, thread, j); }
int host_sum_place(int run, int lanes, int width, int group, int column) { return sum_place(run, lanes, width, group, column); }
int host_run_place(int run, int column) { return run_place(run, column); }
