/* matmul.h: the tile of the matrix product, by which front and kernels cut the work. Internal. */
#ifndef WANE_MATMUL_H
#define WANE_MATMUL_H
enum { WANE_MATMUL_TILE_M = 96, WANE_MATMUL_TILE_N = 256 };
#endif
