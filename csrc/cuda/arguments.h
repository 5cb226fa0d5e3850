// What the kernels of gradients.cu and their launcher share: the kernels' arguments, and the division of the work.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC brings no headers
using int64_t = long long;
#else
#include <cstdint>
#endif

namespace udi {

constexpr int kWarp = 32;

// Up to so many rows, gramian_few multiplies all rows in one thread; for more, each warp of gramian_tiles takes a tile.
constexpr int kFewRows = 8;
constexpr int few_threads(int rows) { return rows <= 4 ? 256 : 128; }
constexpr int kTileWarps = 10;  // the tiles of 32 rows in one block; leaves 168 registers per thread
constexpr int tile_edge(int element_size) { return element_size == 8 ? 4 : 8; }  // rows on each side of a tile

constexpr int kSumThreads = 256;  // weighted_sum: one chunk per block

// Per parameter: number of its first chunk, elements, address of the output, addresses of K gradients. Arguments end
// at 32,764 bytes. Each launch copies its whole table, so shorter lists get shorter tables: 500 words hold ResNet-18's
// 62 tensors at K = 3, and 1,500 ResNet-50's 161.
template <int kWords>
struct Table {
  int64_t word[kWords];
};
constexpr int kTableWords[] = {500, 1500, 4080};
constexpr int entry_words(int k) { return 3 + k; }

struct Shape {
  int k, parameters, chunks, chunk_bytes;  // a chunk's bytes in each gradient
};

// Where the blocks of gramian's launches write their sums, and the last block writes the result.
struct Sums {
  double* partial;    // of pair (i, j), i <= j, and block b at [(i * k + j) * blocks + b]
  unsigned* arrived;  // how many blocks have written theirs; 0 at first
  void* gram;         // (k, k) float, or double if wide
  int first, blocks;  // number of this launch's first block; blocks of all launches that share in a pair
  unsigned last;      // blocks of all launches, less one
  bool wide;
};

}  // namespace udi
