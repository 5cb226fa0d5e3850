// gramian and weighted_sum on the GPU: one pass over the gradients, whose addresses travel as kernel arguments.
//
// A launch works on parameters of one dtype, as many as its table holds, cut into chunks. A block takes a range of
// chunks: it finds the parameter of the first by bisection and walks on from there.
#include "../gradients.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <variant>

#include "stream.h"

namespace udi {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr int kFewRows = 8;      // up to here a thread multiplies all rows, beyond a warp a tile of them
constexpr int kTileWarps = 10;   // those of 32 rows in one block; leaves 168 registers a thread
constexpr int kBlocksPerSM = 4;  // of gramian; each block leaves one partial sum of every pair

// Per parameter: number of its first chunk, elements, address of the output, addresses of K gradients. Arguments end
// at 4 KB before CUDA 12.1, at 32,764 bytes since. All of a table is copied at each launch, so short lists (ResNet-18's
// 62 tensors at K = 3 take 3 KB) get a short one.
template <int kWords>
struct Table {
  static constexpr int kCapacity = kWords;
  int64_t word[kWords];
};
using ShortTable = Table<500>;
#if CUDART_VERSION >= 12010
using LongTable = Table<4080>;
#else
using LongTable = Table<499>;
#endif

__host__ __device__ constexpr int entry_words(int k) { return 3 + k; }

struct Shape {
  int k, parameters, chunks, chunk_bytes;  // a chunk's bytes in each gradient
};

// One parameter in a table.
struct Entry {
  const int64_t* word;
  __device__ int64_t first() const { return word[0]; }
  __device__ int64_t size() const { return word[1]; }
  __device__ int64_t out() const { return word[2]; }
  __device__ int64_t row(int i) const { return word[3 + i]; }
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

  __device__ compute_t<T> operator[](int lane) const {
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
  __device__ int single(int s) const { return s < head ? s : s + vectors * Vector<T>::kSize; }
};

template <class T>
__device__ Chunk cut(const Entry& entry, const Shape& shape, int number, bool with_out) {
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
__device__ void for_chunks(const TableT& table, const Shape& shape, int from, int to, bool with_out, F f) {
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

// Where the blocks leave their sums: element (i, j), i <= j, of block b of all launches together.
struct Partials {
  double* data;
  int k, first, count;  // first: number of this launch's block 0; count: blocks of all launches
  __device__ double& at(int i, int j, int block) const {
    return data[(static_cast<int64_t>(i) * k + j) * count + first + block];
  }
};

__device__ void block_share(const Shape& shape, int& from, int& to) {
  from = static_cast<int>(static_cast<int64_t>(shape.chunks) * blockIdx.x / gridDim.x);
  to = static_cast<int>(static_cast<int64_t>(shape.chunks) * (blockIdx.x + 1) / gridDim.x);
}

template <int N, class S>
__device__ void flush(double (&sums)[N], S (&products)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sums[n] += products[n];
    products[n] = 0;
  }
}

template <int K>
constexpr int kFewThreads = K <= 4 ? 256 : 128;

// partial[i, j] = sum_e row_i[e] row_j[e] for up to K rows: each thread sums all pairs over its elements, in the
// compute type within a chunk and in double beyond.
template <class T, int K, class TableT>
__global__ void __launch_bounds__(kFewThreads<K>, K <= 3 ? 4 : K == 4 ? 2 : 3)
    gramian_few(const __grid_constant__ TableT table, const Shape shape, const Partials partials) {
  using S = compute_t<T>;
  constexpr int kPairs = K * (K + 1) / 2, kThreads = kFewThreads<K>, kBatch = K <= 4 ? 2 : 1;
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
  if (i > j || j >= shape.k) return;
  double sum = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += of_warp[warp][i * K - i * (i - 1) / 2 + j - i];
  partials.at(i, j, blockIdx.x) = sum;
}

// Sums of N values over the lanes of a warp: value n ends in lane n * 32 / N, the first of several in value[0]. Each
// step halves the values a lane is in charge of: 62 shuffles for 64 values, where one by one takes 320.
template <int N, int kBit = kWarp / 2, class S>
__device__ void sum_over_lanes(S* value) {
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

template <class T>
constexpr int kEdge = sizeof(T) == 8 ? 4 : 8;  // rows of a tile's two sides

// The same for any number of rows: each warp sums a tile of kEdge x kEdge pairs. The warps of a block read the same
// chunk at the same time, so that all but the first find a row in L1.
template <class T, class TableT>
__global__ void __launch_bounds__(kTileWarps * kWarp, 1)
    gramian_tiles(const __grid_constant__ TableT table, const Shape shape, const Partials partials) {
  using S = compute_t<T>;
  constexpr int E = kEdge<T>, kOwn = (E * E + kWarp - 1) / kWarp;
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
  if (top == groups) return;
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    const int value = lane * E * E / kWarp + n, i = top * E + value / E, j = left * E + value % E;
    if (i <= j && j < shape.k) partials.at(i, j, blockIdx.x) = sums[n];
  }
}

// gram[i, j] = gram[j, i] = sum of all blocks' partials, always in the same order. A block for each pair.
__global__ void __launch_bounds__(kThreads) gramian_finish(const Partials partials, void* gram, bool wide) {
  const int i = blockIdx.y, j = blockIdx.x;
  if (i > j) return;
  double sum = 0;
  for (int b = threadIdx.x; b < partials.count; b += kThreads) sum += partials.at(i, j, b);
  for (int bit = kWarp / 2; bit; bit /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
  __shared__ double of_warp[kThreads / kWarp];
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  sum = 0;
  for (double part : of_warp) sum += part;
  for (int at : {i * partials.k + j, j * partials.k + i})
    wide ? static_cast<double*>(gram)[at] = sum : static_cast<float*>(gram)[at] = static_cast<float>(sum);
}

// out[e] = sum_k weights[k] row_k[e], a chunk a block. Rows are loaded four at a time, to have loads enough in flight.
// No __ldg: out may be one of the rows.
template <class T, class TableT>
__global__ void __launch_bounds__(kThreads)
    weighted_sum(const __grid_constant__ TableT table, const Shape shape, const void* weights, bool wide) {
  using S = compute_t<T>;
  constexpr int kBatch = 4;
  for_chunks<T>(table, shape, blockIdx.x, blockIdx.x + 1, true, [&](Entry entry, Chunk chunk) {
    // add(weight, load(row)) for all rows.
    const auto for_rows = [&](auto zero, auto load, auto add) {
      for (int first = 0; first < shape.k; first += kBatch) {
        decltype(zero) x[kBatch];
        S weight[kBatch];
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
          const int i = first + r;
          const auto* row = i < shape.k ? reinterpret_cast<const T*>(entry.row(i)) : nullptr;
          x[r] = row ? load(row + chunk.begin) : zero;
          weight[r] = !row   ? S(0)
                      : wide ? static_cast<S>(static_cast<const double*>(weights)[i])
                             : static_cast<S>(static_cast<const float*>(weights)[i]);
        }
#pragma unroll
        for (int r = 0; r < kBatch; ++r) add(weight[r], x[r]);
      }
    };
    T* const out = reinterpret_cast<T*>(entry.out()) + chunk.begin;
    for (int v = threadIdx.x; v < chunk.vectors; v += kThreads) {
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
      memcpy(&reinterpret_cast<int4*>(out + chunk.head)[v], lanes, sizeof lanes);
    }
    for (int s = threadIdx.x; s < chunk.singles; s += kThreads) {
      const int e = chunk.single<T>(s);
      S sum = 0;
      for_rows(S(0), [&](const T* at) { return static_cast<S>(at[e]); }, [&](S weight, S x) { sum += weight * x; });
      out[e] = static_cast<T>(sum);
    }
  });
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("udi_kernels: launching a kernel failed: ") + cudaGetErrorString(error));
}

struct Launch {
  DType dtype;
  Shape shape;
  int blocks;  // of gramian
  std::variant<ShortTable, LongTable> table;

  // f(null pointer of the element type, table)
  template <class F>
  void dispatch(F f) const {
    std::visit([&](const auto& t) {
      switch (dtype) {
        case DType::kFloat: return f(static_cast<float*>(nullptr), t);
        case DType::kDouble: return f(static_cast<double*>(nullptr), t);
        case DType::kBFloat16: return f(static_cast<__nv_bfloat16*>(nullptr), t);
        case DType::kHalf: return f(static_cast<__half*>(nullptr), t);
      }
    }, table);
  }
};

int multiprocessors(int device) {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    throw std::runtime_error("udi_kernels: cannot query the CUDA device");
  return count;
}

int element_size(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

struct CUDAPlan final : Plan {
  int k, device, blocks = 0;  // blocks of gramian in all launches
  std::vector<Launch> launches;

  int64_t scratch() const override;
  void gramian(double* scratch, void* gram, bool wide) const override;
  void weighted_sum(const void* weights, bool wide) const override;

  explicit CUDAPlan(const Gradients& g) : k(g.k), device(g.device) {
    if (entry_words(k) > LongTable::kCapacity)
      throw std::runtime_error("udi_kernels: K is too large for the kernels' argument table");
    const int max_blocks = kBlocksPerSM * multiprocessors(device);
    for (DType dtype : {DType::kFloat, DType::kDouble, DType::kBFloat16, DType::kHalf}) {
      std::vector<int> chosen;
      for (size_t p = 0; p < g.parameters.size(); ++p)
        if (g.parameters[p].dtype == dtype && g.parameters[p].size) chosen.push_back(p);
      constexpr int kLong = LongTable::kCapacity, kShort = ShortTable::kCapacity;
      for (size_t done = 0; done < chosen.size();) {
        const int count = std::min<int>(chosen.size() - done, kLong / entry_words(k));
        Launch& launch = launches.emplace_back(Launch{dtype, {k, count, 0, k <= kFewRows ? 16384 : 4096}, 0, {}});
        if (count * entry_words(k) > kShort) launch.table.emplace<LongTable>();
        std::visit([&](auto& table) { fill(launch.shape, table.word, g, &chosen[done]); }, launch.table);
        launch.blocks = std::min(launch.shape.chunks, max_blocks);
        blocks += launch.blocks;
        done += count;
      }
    }
  }

  static void fill(Shape& shape, int64_t* word, const Gradients& g, const int* chosen) {
    for (int n = 0; n < shape.parameters; ++n) {
      const auto& parameter = g.parameters[chosen[n]];
      *word++ = shape.chunks;
      *word++ = parameter.size;
      *word++ = reinterpret_cast<int64_t>(parameter.out);
      for (int64_t i = 0; i < g.k; ++i) *word++ = reinterpret_cast<int64_t>(g.data[chosen[n] * g.k + i]);
      const int64_t elements = shape.chunk_bytes / element_size(parameter.dtype);
      shape.chunks += static_cast<int>((parameter.size + elements - 1) / elements);
    }
  }
};

int64_t CUDAPlan::scratch() const { return static_cast<int64_t>(blocks) * k * k; }

void CUDAPlan::gramian(double* scratch, void* gram, bool wide) const {
  const OnDevice on(device);
  Partials partials{scratch, k, 0, blocks};
  for (const Launch& launch : launches) {
    launch.dispatch([&](auto* type, const auto& table) {
      using T = std::remove_pointer_t<decltype(type)>;
      using TableT = std::remove_cvref_t<decltype(table)>;
      const auto few = [&](auto kernel, int threads) {
        kernel<<<launch.blocks, threads, 0, on.stream>>>(table, launch.shape, partials);
      };
      if (k <= 3) return few(gramian_few<T, 3, TableT>, kFewThreads<3>);
      if (k == 4) return few(gramian_few<T, 4, TableT>, kFewThreads<4>);
      if (k <= kFewRows) return few(gramian_few<T, kFewRows, TableT>, kFewThreads<kFewRows>);
      const int groups = (k + kEdge<T> - 1) / kEdge<T>, tiles = groups * (groups + 1) / 2;
      const int warps = std::min(tiles, kTileWarps);
      const dim3 grid(launch.blocks, (tiles + warps - 1) / warps);
      gramian_tiles<T, TableT><<<grid, warps * kWarp, 0, on.stream>>>(table, launch.shape, partials);
    });
    check_launch();
    partials.first += launch.blocks;
  }
  partials.first = 0;
  gramian_finish<<<dim3(k, k), kThreads, 0, on.stream>>>(partials, gram, wide);
  check_launch();
}

void CUDAPlan::weighted_sum(const void* weights, bool wide) const {
  const OnDevice on(device);
  for (const Launch& launch : launches) {
    launch.dispatch([&](auto* type, const auto& table) {
      using T = std::remove_pointer_t<decltype(type)>;
      udi::weighted_sum<T><<<launch.shape.chunks, kThreads, 0, on.stream>>>(table, launch.shape, weights, wide);
    });
    check_launch();
  }
}

}  // namespace

std::unique_ptr<const Plan> make_plan(Gradients gradients) { return std::make_unique<CUDAPlan>(gradients); }

}  // namespace udi
