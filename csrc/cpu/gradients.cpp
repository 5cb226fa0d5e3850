// gramian and weighted_sum on the CPU: one pass over the gradients, in chunks that threads share.
#include "../gradients.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../stable.h"
#include "vec.h"

namespace udi {
namespace {

constexpr int64_t kChunk = 8192;   // elements of one parameter that a thread takes at a time
constexpr int64_t kBlock = 1024;   // elements whose products are summed in the compute type before double takes over
constexpr int64_t kGrain = 32768;  // fewer elements of one gradient do not pay for another thread
constexpr int64_t kSlots = 256;    // partial Gram matrices: a constant, so that no result depends on the threads

// A register of this machine, and the rows of a tile whose accumulators fit in the register file.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kTile = 4;
#elif defined(__AVX__)
constexpr int kBytes = 32, kTile = 3;
#else
constexpr int kBytes = 16, kTile = 3;
#endif

template <class S>
struct PackOf;
template <>
struct PackOf<float> {
  typedef float type __attribute__((vector_size(kBytes)));
};
template <>
struct PackOf<double> {
  typedef double type __attribute__((vector_size(kBytes)));
};
template <class S>
using Pack = typename PackOf<S>::type;

template <class S>
double total(Pack<S> v) {
  S lanes[kBytes / sizeof(S)];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = kBytes / sizeof(S) / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Calls f with the constant N = n, where 1 <= n <= Max.
template <int Max, class F>
void constant(int n, F f) {
  if constexpr (Max > 0) n == Max ? f(std::integral_constant<int, Max>()) : constant<Max - 1>(n, f);
}

// gram[i, j] += sum_e a[i][e] b[j][e] for R rows a and C rows b; a diagonal tile has a = b and needs only i <= j.
template <int R, int C, bool kDiagonal, class S>
void tile(const S* const* a, const S* const* b, int64_t n, double* gram, int64_t stride) {
  constexpr int lanes = kBytes / sizeof(S);
  Pack<S> sums[R][C] = {}, x[R], y[C];
  for (int64_t e = 0; e < n; e += lanes) {
    // Unrolled, because sums that are indexed at run time stay in memory, which takes twice as long.
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) std::memcpy(&y[j], b[j] + e, kBytes);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      if constexpr (!kDiagonal) std::memcpy(&x[i], a[i] + e, kBytes);
#pragma GCC unroll 4
      for (int j = kDiagonal ? i : 0; j < C; ++j) sums[i][j] += (kDiagonal ? y[i] : x[i]) * y[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = kDiagonal ? i : 0; j < C; ++j) gram[i * stride + j] += total<S>(sums[i][j]);
}

// gram[i, j] += <rows[i], rows[j]> for all i <= j, in tiles; n is a multiple of kLanes.
template <class S>
void add_products(const S* const* rows, int64_t k, int64_t n, double* gram) {
  for (int64_t i = 0; i < k; i += kTile) {
    constant<kTile>(std::min<int64_t>(kTile, k - i),
                    [&](auto r) { tile<r, r, true>(rows + i, rows + i, n, gram + i * k + i, k); });
    for (int64_t j = i + kTile; j < k; j += kTile) {
      constant<kTile>(std::min<int64_t>(kTile, k - j),
                      [&](auto c) { tile<kTile, c, false>(rows + i, rows + j, n, gram + i * k + j, k); });
    }
  }
}

// n elements as S: in place where possible, else in `copy`, with zeros up to a full vector. They may be in another
// order than in memory, the same for all rows.
template <class S, class T>
const S* widened(const T* from, int64_t n, S* copy) {
  if constexpr (!std::is_same_v<S, compute_t<T>>) {
    for (int64_t e = 0; e < n; ++e) copy[e] = static_cast<float>(from[e]);
    std::fill(copy + n, copy + (n + kLanes - 1) / kLanes * kLanes, 0);
  } else {
    if constexpr (sizeof(T) > 2)
      if (n % kLanes == 0) return from;
    int64_t e = 0;
    if constexpr (std::is_same_v<T, BFloat16>) {
      for (; e + 2 * kLanes <= n; e += 2 * kLanes) {  // even elements, then odd ones: one instruction each
        Int pairs;
        std::memcpy(&pairs, from + e, sizeof pairs);
        store(copy + e, bits<Floats>(pairs << 16));
        store(copy + e + kLanes, bits<Floats>(pairs >> 16 << 16));
      }
    }
    for (; e + kLanes <= n; e += kLanes) store(copy + e, load(from + e));
    if (e < n) store(copy + e, load(from + e, n - e, 0));
  }
  return copy;
}

// gram += products of n <= kBlock elements from `begin` on, multiplied as S.
template <class S, class T>
void add_block(const void* const* data, int64_t k, int64_t begin, int64_t n, double* gram) {
  constexpr int64_t kStride = kBlock + kLanes;  // rows a power of two apart compete for the same cache lines
  static constexpr S zeros[kBlock] = {};
  thread_local std::vector<const S*> rows;
  thread_local std::vector<S> copies;
  rows.resize(k);
  copies.resize(k * kStride);
  for (int64_t i = 0; i < k; ++i)
    rows[i] = data[i] ? widened(static_cast<const T*>(data[i]) + begin, n, &copies[i * kStride]) : zeros;
  add_products(rows.data(), k, (n + kLanes - 1) / kLanes * kLanes, gram);
}

template <class T>
bool is_zero(const T* from, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  Bits any = 0;
  for (int64_t e = 0; e < n; ++e) {
    Bits bits;
    std::memcpy(&bits, from + e, sizeof bits);
    any |= static_cast<Bits>(bits << 1);  // without the sign
  }
  return !any;
}

// Whether float could hold the products that gave `gram`: every sum of squares is finite, which bounds all other sums,
// and large beside what may have underflowed, or its gradient is 0.
template <class T>
bool in_range(const void* const* data, int64_t k, int64_t begin, int64_t n, const double* gram) {
  for (int64_t i = 0; i < k; ++i) {
    const double squares = gram[i * k + i];
    if (squares >= 0x1p-80 && squares < 0x1p126) continue;
    if (data[i] && !(squares < 1 && is_zero(static_cast<const T*>(data[i]) + begin, n))) return false;
  }
  return true;
}

// gram += products of elements [begin, end) of a parameter's gradients: in the compute type, and in double for blocks
// whose products float cannot hold. sums: room for another (k, k).
template <class T>
void add_chunk(const void* const* data, int64_t k, int64_t begin, int64_t end, double* gram, double* sums) {
  for (; begin < end; begin += kBlock) {
    const int64_t n = std::min(kBlock, end - begin);
    if constexpr (std::is_same_v<T, double>) {
      add_block<double, T>(data, k, begin, n, gram);
    } else {
      std::fill_n(sums, k * k, 0.);
      add_block<float, T>(data, k, begin, n, sums);
      if (!in_range<T>(data, k, begin, n, sums)) {
        std::fill_n(sums, k * k, 0.);
        add_block<double, T>(data, k, begin, n, sums);
      }
      for (int64_t pair = 0; pair < k * k; ++pair) gram[pair] += sums[pair];
    }
  }
}

// to[e] = from[e] + sum_r weights[r] rows[r][e] over n elements, R rows at a time.
template <int R, class T, class To>
void accumulate(const compute_t<T>* from, const T* const* rows, const compute_t<T>* weights, To* to, int64_t n) {
  const auto at = [&](int64_t e, auto... rest) {
    auto sum = from ? load(from + e, rest...) : Vec<T>{};
    for (int r = 0; r < R; ++r) sum += weights[r] * load(rows[r] + e, rest...);
    return sum;
  };
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes) store(to + e, at(e));
  if (const int rest = n - e) store(to + e, at(e, rest, compute_t<T>(0)), rest);
}

// Elements [begin, end) of a parameter's weighted sum. Many rows are added kGroup at a time to a block that stays in
// cache, because processors prefetch few streams.
template <class T>
void combine_chunk(const void* const* data, int64_t k, int64_t begin, int64_t end, const double* weights, T* out) {
  using S = compute_t<T>;
  constexpr int kGroup = 4;
  thread_local std::vector<const T*> rows;
  thread_local std::vector<S> factors;
  S block[kBlock];
  rows.clear(), factors.clear();
  for (int64_t i = 0; i < k; ++i)
    if (data[i]) rows.push_back(static_cast<const T*>(data[i]) + begin), factors.push_back(weights[i]);
  const int count = rows.size();
  if (!count) std::memset(static_cast<void*>(out + begin), 0, (end - begin) * sizeof(T));
  for (; count && begin < end; begin += kBlock) {
    const int64_t n = std::min(kBlock, end - begin);
    const S* sum = nullptr;
    for (int r = 0; r < count; r += kGroup, sum = block) {
      constant<kGroup>(std::min(kGroup, count - r), [&](auto R) {
        if (r + kGroup < count)
          accumulate<R>(sum, &rows[r], &factors[r], block, n);
        else
          accumulate<R>(sum, &rows[r], &factors[r], out + begin, n);
      });
    }
    for (auto& row : rows) row += kBlock;
  }
}

template <class F>
void dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float());
    case DType::kDouble:
      return f(double());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kHalf:
      return f(Half());
  }
}

class CPUPlan final : public Plan, Gradients {
 public:
  explicit CPUPlan(Gradients gradients) : Gradients(std::move(gradients)), first_{0} {
    for (auto& p : parameters) {
      elements_ += p.size;
      first_.push_back(first_.back() + (p.size + kChunk - 1) / kChunk);
    }
    slots_ = std::min(chunks(), kSlots);
  }

  int64_t scratch() const override { return slots_ * k * k; }

  void gramian(double* scratch, void* gram, bool wide) const override {
    torch::stable::parallel_for(0, slots_, grain(slots_), [&](int64_t begin, int64_t end) {
      std::vector<double> block(k * k);
      for (int64_t slot = begin; slot < end; ++slot) {
        double* sums = scratch + slot * k * k;
        std::fill_n(sums, k * k, 0.);
        const int64_t first = slot * chunks() / slots_, last = (slot + 1) * chunks() / slots_;
        for_chunks(first, last, [&](auto& p, auto data, auto from, auto to) {
          dispatch(p.dtype, [&](auto type) { add_chunk<decltype(type)>(data, k, from, to, sums, block.data()); });
        });
      }
    });
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = i; j < k; ++j) {
        double sum = 0;
        for (int64_t slot = 0; slot < slots_; ++slot) sum += scratch[(slot * k + i) * k + j];
        for (int64_t at : {i * k + j, j * k + i})
          wide ? static_cast<double*>(gram)[at] = sum : static_cast<float*>(gram)[at] = sum;
      }
    }
  }

  void weighted_sum(const void* weights, bool wide) const override {
    std::vector<double> factors(k);
    for (int64_t i = 0; i < k; ++i)
      factors[i] = wide ? static_cast<const double*>(weights)[i] : static_cast<const float*>(weights)[i];
    torch::stable::parallel_for(0, chunks(), grain(chunks()), [&](int64_t begin, int64_t end) {
      for_chunks(begin, end, [&](auto& p, auto data, auto from, auto to) {
        dispatch(p.dtype, [&](auto type) {
          combine_chunk(data, k, from, to, factors.data(), static_cast<decltype(type)*>(p.out));
        });
      });
    });
  }

 private:
  std::vector<int64_t> first_;  // number of a parameter's first chunk; at the end, of all chunks
  int64_t slots_, elements_ = 0;

  int64_t chunks() const { return first_.back(); }

  // How many of `units` equal parts of the work pay for another thread.
  int64_t grain(int64_t units) const { return 1 + units * kGrain / (elements_ + 1); }

  // f(parameter, its addresses, begin, end) for chunks [from, to).
  template <class F>
  void for_chunks(int64_t from, int64_t to, F f) const {
    int64_t p = std::upper_bound(first_.begin(), first_.end(), from) - first_.begin() - 1;
    for (int64_t chunk = from; chunk < to; ++chunk) {
      while (chunk >= first_[p + 1]) ++p;
      const int64_t begin = (chunk - first_[p]) * kChunk;
      f(parameters[p], &data[p * k], begin, std::min(begin + kChunk, parameters[p].size));
    }
  }
};

}  // namespace

std::unique_ptr<const Plan> make_plan(Gradients gradients) { return std::make_unique<CPUPlan>(std::move(gradients)); }

}  // namespace udi
