// gramian and weighted_sum on the GPU: one pass over the gradients, whose addresses are kernel arguments.
//
// A launch works on parameters of one dtype, as many as its table holds, cut into chunks. A block takes a range of
// chunks: it finds the parameter of its first chunk by bisection and goes on from there.
//
// Device code only, with no header but its own: NVRTC compiles each kernel when a call first needs it.
#include "arguments.h"
#include "types.cuh"

namespace udi {

constexpr unsigned kAllLanes = ~0u;

// One parameter in a table.
struct Entry {
  const int64_t* word;
  int64_t first() const { return word[0]; }
  int64_t size() const { return word[1]; }
  int64_t out() const { return word[2]; }
  int64_t row(int i) const { return word[3 + i]; }
};

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

// 16 bytes of elements.
template <class T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
  int4 raw;

  compute_t<T> operator[](int lane) const {
    T lanes[kSize];
    memcpy(lanes, &raw, sizeof raw);
    return static_cast<compute_t<T>>(lanes[lane]);
  }
};

// The elements of a chunk: the first and last few one by one, those between as `vectors` aligned vectors, or all one
// by one where the rows differ in alignment.
struct Chunk {
  int64_t begin;  // within the parameter
  int head, vectors, singles;

  template <class T>
  int single(int s) const {
    return s < head ? s : s + vectors * Vector<T>::kSize;
  }
};

template <class T>
Chunk cut(const Entry& entry, const Shape& shape, int number, bool with_out) {
  constexpr int64_t kMask = 15;
  const int64_t any = with_out ? entry.out() : 0;
  int64_t address = any, differences = 0;
  for (int i = 0; i < shape.k; ++i) {
    const int64_t row = entry.row(i);
    if (!row) continue;
    if (!address) address = row;
    differences |= row ^ address;
  }
  const int64_t elements = shape.chunk_bytes / sizeof(T), begin = (number - entry.first()) * elements;
  const int n = static_cast<int>(min(elements, entry.size() - begin));
  const int lead = static_cast<int>((-address & kMask) / sizeof(T));
  const int head = (differences & kMask) ? n : min(n, lead);
  const int vectors = (n - head) / Vector<T>::kSize;
  return {begin, head, vectors, n - vectors * Vector<T>::kSize};
}

// f(entry, chunk) for a block's share of the chunks, in order.
template <class T, class TableT, class F>
void for_chunks(const TableT& table, const Shape& shape, int from, int to, bool with_out, F f) {
  const auto entry = [&](int p) { return Entry{table.word + p * entry_words(shape.k)}; };
  int p = 0;
  for (int end = shape.parameters; end - p > 1;) {
    const int middle = (p + end) / 2;
    (entry(middle).first() <= from ? p : end) = middle;
  }
  for (int number = from; number < to; ++number) {
    while (p + 1 < shape.parameters && entry(p + 1).first() <= number) ++p;
    f(entry(p), cut<T>(entry(p), shape, number, with_out));
  }
}

inline void block_share(const Shape& shape, int& from, int& to) {
  from = static_cast<int>(static_cast<int64_t>(shape.chunks) * blockIdx.x / gridDim.x);
  to = static_cast<int>(static_cast<int64_t>(shape.chunks) * (blockIdx.x + 1) / gridDim.x);
}

inline double& partial(const Sums& sums, int k, int i, int j, int block) {
  return sums.partial[static_cast<int64_t>(i * k + j) * sums.blocks + block];
}

// The last block that comes here adds up the partial sums of all blocks, always in the same order; one warp per pair
// (i, j), gram[i, j] = gram[j, i].
inline void finish(const Sums& sums, int k) {
  __shared__ int last;  // not bool, which is a store of one byte
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for the whole block: the barrier orders its stores before this
    last = atomicAdd(sums.arrived, 1u) == sums.last;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  int i = 0, j = threadIdx.x / kWarp;
  for (;; j += warps) {
    while (i < k && j >= k) j += ++i - k;  // row i of the triangle has k - i pairs
    if (i == k) return;
    double sum = 0;
#pragma unroll 8
    for (int b = lane; b < sums.blocks; b += kWarp) sum += __ldcg(&partial(sums, k, i, j, b));
    for (int bit = kWarp / 2; bit; bit /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    if (lane > (i < j)) continue;
    const int at = lane ? j * k + i : i * k + j;
    sums.wide ? static_cast<double*>(sums.gram)[at] = sum
              : static_cast<float*>(sums.gram)[at] = static_cast<float>(sum);
  }
}

template <int N, class S>
void flush(double (&sums)[N], S (&products)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sums[n] += products[n];
    products[n] = 0;
  }
}

// partial[i, j] = sum_e row_i[e] row_j[e] for up to K rows: each thread sums all pairs over its elements, in the
// compute type within a chunk and in double beyond.
template <class T, int K, int kWords>
__global__ void __launch_bounds__(few_threads(K), K <= 3   ? 4
                                                  : K == 4 ? 2
                                                  : K == 5 ? 5
                                                  : K == 6 ? 4
                                                           : 3)
    gramian_few(const Table<kWords> __grid_constant__ table, const Shape shape, const Sums out) {
  using S = compute_t<T>;
  constexpr int kPairs = K * (K + 1) / 2, kThreads = few_threads(K), kBatch = K <= 4 ? 2 : 1;
  double sums[kPairs] = {};
  S products[kPairs] = {};
  int from, to;
  block_share(shape, from, to);
  for_chunks<T>(table, shape, from, to, false, [&](Entry entry, Chunk chunk) {
    const T* rows[K];
#pragma unroll
    for (int i = 0; i < K; ++i)
      rows[i] = i < shape.k && entry.row(i) ? reinterpret_cast<const T*>(entry.row(i)) + chunk.begin : nullptr;
    const auto multiply = [&](auto element) {
#pragma unroll
      for (int i = 0, pair = 0; i < K; ++i)
#pragma unroll
        for (int j = i; j < K; ++j, ++pair) products[pair] += element(i) * element(j);
    };
    for (int v = threadIdx.x; v < chunk.vectors; v += kBatch * kThreads) {
      Vector<T> x[kBatch][K];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const auto* at = reinterpret_cast<const int4*>(rows[i] + chunk.head) + v + b * kThreads;
          x[b][i].raw = rows[i] && v + b * kThreads < chunk.vectors ? __ldg(at) : int4{};
        }
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
#pragma unroll
        for (int lane = 0; lane < Vector<T>::kSize; ++lane) multiply([&](int i) { return x[b][i][lane]; });
    }
    for (int s = threadIdx.x; s < chunk.singles; s += kThreads) {
      S x[K];
#pragma unroll
      for (int i = 0; i < K; ++i) x[i] = rows[i] ? static_cast<S>(rows[i][chunk.single<T>(s)]) : S(0);
      multiply([&](int i) { return x[i]; });
    }
    if constexpr (sizeof(S) < sizeof(double)) flush(sums, products);
  });
  if constexpr (sizeof(S) == sizeof(double)) flush(sums, products);

  __shared__ double of_warp[kThreads / kWarp][kPairs];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    for (int bit = kWarp / 2; bit; bit /= 2) sums[pair] += __shfl_xor_sync(kAllLanes, sums[pair], bit);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp][pair] = sums[pair];
  }
  __syncthreads();
  const int i = threadIdx.x / K, j = threadIdx.x % K;
  if (i <= j && j < shape.k) {
    double sum = 0;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += of_warp[warp][i * K - i * (i - 1) / 2 + j - i];
    partial(out, shape.k, i, j, out.first + blockIdx.x) = sum;
  }
  finish(out, shape.k);
}

// Sums of N values over the lanes of a warp: value n ends in lane n * 32 / N, the first of several in value[0]. Each
// step halves the values a lane is in charge of: 62 shuffles for 64 values, where one by one takes 320.
template <int N, int kBit = kWarp / 2, class S>
void sum_over_lanes(S* value) {
  if constexpr (N > 1) {
    const bool upper = threadIdx.x & kBit;
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      const S sent = __shfl_xor_sync(kAllLanes, upper ? value[n] : value[n + N / 2], kBit);
      value[n] = (upper ? value[n + N / 2] : value[n]) + sent;
    }
  } else {
    value[0] += __shfl_xor_sync(kAllLanes, value[0], kBit);
  }
  if constexpr (kBit > 1) sum_over_lanes<(N + 1) / 2, kBit / 2>(value);
}

// The same for any number of rows: each warp sums a tile of E x E pairs. The warps of a block read the same chunk at
// the same time, so that all but the first find the row in L1.
template <class T, int kWords>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1)
    gramian_tiles(const Table<kWords> __grid_constant__ table, const Shape shape, const Sums out) {
  using S = compute_t<T>;
  constexpr int E = tile_edge(sizeof(T));
  constexpr int kOwn = (E * E + kWarp - 1) / kWarp, kSharers = kWarp * kOwn / (E * E);  // pairs per lane, the reverse
  const int lane = threadIdx.x % kWarp, groups = (shape.k + E - 1) / E;
  int top = 0, left = (blockIdx.y * blockDim.x + threadIdx.x) / kWarp;  // the tile's rows and columns, in groups
  while (top < groups && left >= groups - top) left -= groups - top++;
  left += top;
  double sums[kOwn] = {};
  int from, to;
  block_share(shape, from, to);
  for_chunks<T>(table, shape, from, to, false, [&](Entry entry, Chunk chunk) {
    __syncthreads();
    if (top == groups) return;
    const auto row = [&](int i) {
      return i < shape.k && entry.row(i) ? reinterpret_cast<const T*>(entry.row(i)) + chunk.begin : nullptr;
    };
    S products[E * E] = {};
    for (int v = lane; v < chunk.vectors; v += kWarp) {
      const auto vector = [&](int i) {
        const T* at = row(i);
        return Vector<T>{at ? __ldg(reinterpret_cast<const int4*>(at + chunk.head) + v) : int4{}};
      };
      Vector<T> x[E], y[E];
#pragma unroll
      for (int i = 0; i < E; ++i) {
        x[i] = vector(top * E + i);
        y[i] = vector(left * E + i);
      }
#pragma unroll
      for (int l = 0; l < Vector<T>::kSize; ++l)
#pragma unroll
        for (int i = 0; i < E; ++i)
#pragma unroll
          for (int j = 0; j < E; ++j) products[i * E + j] += x[i][l] * y[j][l];
    }
    for (int s = lane; s < chunk.singles; s += kWarp) {
      const auto single = [&](int i) {
        const T* at = row(i);
        return at ? static_cast<S>(at[chunk.single<T>(s)]) : S(0);
      };
      S y[E];
#pragma unroll
      for (int j = 0; j < E; ++j) y[j] = single(left * E + j);
#pragma unroll
      for (int i = 0; i < E; ++i) {
        const S x = single(top * E + i);
#pragma unroll
        for (int j = 0; j < E; ++j) products[i * E + j] += x * y[j];
      }
    }
    sum_over_lanes<E * E>(products);
#pragma unroll
    for (int n = 0; n < kOwn; ++n) sums[n] += products[n];
  });
  if (top < groups && lane % kSharers == 0) {
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int value = lane / kSharers * kOwn + n, i = top * E + value / E, j = left * E + value % E;
      if (i <= j && j < shape.k) partial(out, shape.k, i, j, out.first + blockIdx.x) = sums[n];
    }
  }
  finish(out, shape.k);
}

// out[e] = sum_k weights[k] row_k[e], one chunk per block. Rows are loaded four at a time, for enough loads in flight.
// No __ldg: out may be one of the rows.
template <class T, int kWords>
__global__ void __launch_bounds__(kSumThreads)
    weighted_sum(const Table<kWords> __grid_constant__ table, const Shape shape, const void* weights, bool wide) {
  using S = compute_t<T>;
  constexpr int kBatch = 4;
  for_chunks<T>(table, shape, blockIdx.x, blockIdx.x + 1, true, [&](Entry entry, Chunk chunk) {
    const T* row[kBatch];
    S weight[kBatch];
    const auto take = [&](int first) {
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        const int i = first + r;
        row[r] = i < shape.k && entry.row(i) ? reinterpret_cast<const T*>(entry.row(i)) + chunk.begin : nullptr;
        weight[r] = !row[r] ? S(0)
                    : wide  ? static_cast<S>(static_cast<const double*>(weights)[i])
                            : static_cast<S>(static_cast<const float*>(weights)[i]);
      }
    };
    // add(weight, load(row)) for all rows; the first four stay in registers if there are no more.
    const auto for_rows = [&](auto zero, auto load, auto add) {
      for (int first = 0; first < shape.k; first += kBatch) {
        if (shape.k > kBatch) take(first);
        decltype(zero) x[kBatch];
#pragma unroll
        for (int r = 0; r < kBatch; ++r) x[r] = row[r] ? load(row[r]) : zero;
#pragma unroll
        for (int r = 0; r < kBatch; ++r) add(weight[r], x[r]);
      }
    };
    take(0);
    T* const out = reinterpret_cast<T*>(entry.out()) + chunk.begin;
    for (int v = threadIdx.x; v < chunk.vectors; v += kSumThreads) {
      S sum[Vector<T>::kSize] = {};
      for_rows(
          Vector<T>{}, [&](const T* at) { return Vector<T>{reinterpret_cast<const int4*>(at + chunk.head)[v]}; },
          [&](S weight, Vector<T> x) {
#pragma unroll
            for (int l = 0; l < Vector<T>::kSize; ++l) sum[l] += weight * x[l];
          });
      T lanes[Vector<T>::kSize];
#pragma unroll
      for (int l = 0; l < Vector<T>::kSize; ++l) lanes[l] = static_cast<T>(sum[l]);
      int4 raw;  // a memcpy to an address of unknown alignment stores byte by byte
      memcpy(&raw, lanes, sizeof raw);
      reinterpret_cast<int4*>(out + chunk.head)[v] = raw;
    }
    for (int s = threadIdx.x; s < chunk.singles; s += kSumThreads) {
      const int e = chunk.single<T>(s);
      S sum = 0;
      for_rows(S(0), [&](const T* at) { return static_cast<S>(at[e]); }, [&](S weight, S x) { sum += weight * x; });
      out[e] = static_cast<T>(sum);
    }
  });
}

}  // namespace udi
