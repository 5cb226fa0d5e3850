// gramian and weighted_sum of csrc/cuda against long double: sizes around vectors and chunks, all alignments, None,
// out in place of a row, more parameters than a table holds. `check quick` takes few values of K, `check least` fewer,
// and float and double alone.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/driver.h"
#include "gradients.h"

using namespace udi;

namespace {

const std::vector<DType> kTypes = {DType::kFloat, DType::kDouble, DType::kBFloat16, DType::kHalf};
int cases = 0, failures = 0;
std::mt19937 bits(0);

struct BFloat16 {
  uint16_t high;
  BFloat16(float x) {
    uint32_t all;
    std::memcpy(&all, &x, 4);
    high = (all + 0x7fff + (all >> 16 & 1)) >> 16;
    if (x != x) high = 0x7fc0;
  }
  operator float() const {
    const uint32_t all = uint32_t{high} << 16;
    float x;
    std::memcpy(&x, &all, 4);
    return x;
  }
};

template <class F>
auto with_type(DType type, F f) {
  switch (type) {
    case DType::kFloat:
      return f(float());
    case DType::kDouble:
      return f(double());
    case DType::kBFloat16:
      return f(BFloat16(0));
    default:
      return f(_Float16());
  }
}

int64_t size_of(DType type) {
  return with_type(type, [](auto zero) { return sizeof zero; });
}

// Of a result of this type, relative.
double rounding(DType type) {
  return type == DType::kFloat ? 0x1p-24 : type == DType::kDouble ? 0x1p-53 : type == DType::kHalf ? 0x1p-11 : 0x1p-8;
}

// `before` elements of NaN, then n of data, in memory that ends with them, so that AddressSanitizer sees what reads on.
struct Row {
  DType type;
  int64_t before, n;
  char* memory;

  Row(DType type, int64_t before, int64_t n) : type(type), before(before), n(n) {
    memory = static_cast<char*>(std::malloc((before + n) * size_of(type)));
    with_type(type, [&](auto zero) {
      using T = decltype(zero);
      T* const t = reinterpret_cast<T*>(memory);
      for (int64_t e = 0; e < before + n; ++e) t[e] = e < before ? T(NAN) : T(float(bits() * 0x1p-31 - 1));
    });
  }
  Row(Row&& other) : type(other.type), before(other.before), n(other.n), memory(other.memory) {
    other.memory = nullptr;
  }
  ~Row() { std::free(memory); }

  void* data() const { return memory + before * size_of(type); }
  double operator[](int64_t e) const {
    return with_type(type, [&](auto zero) { return double(reinterpret_cast<decltype(zero)*>(memory)[e]); });
  }
  double at(int64_t e) const { return (*this)[before + e]; }
};

struct Param {
  DType type;
  int64_t n;
  int before = 0, step = 0, out_before = 0;  // row i starts before + i * step elements into its memory
  int alias = -1;                            // out is this row
  unsigned none = 0;                         // rows of these bits are None
};

void expect(bool good, const char* what, int k, const Param& p, double got, double want) {
  if (good || ++failures > 20) return;
  std::printf("FAILED %s: K=%d type=%d n=%lld before=%d step=%d out=%d alias=%d none=%x: %.9g, not %.9g\n", what, k,
              int(p.type), static_cast<long long>(p.n), p.before, p.step, p.out_before, p.alias, p.none, got, want);
}

void run(int k, const std::vector<Param>& params) {
  Gradients g;
  g.k = k;
  g.device = cases++ % 3;
  std::vector<std::vector<Row>> rows;
  std::vector<Row> outs;
  bool wide = false;
  for (const Param& p : params) {
    auto& mine = rows.emplace_back();
    for (int i = 0; i < k; ++i) {
      mine.emplace_back(p.type, p.before + i * p.step, p.n);
      g.data.push_back(p.none >> i % 31 & 1 ? nullptr : mine[i].data());
    }
    outs.emplace_back(p.type, p.out_before, p.n);
    g.parameters.push_back({p.type, p.n, p.alias < 0 ? outs.back().data() : mine[p.alias].data()});
    wide |= p.type == DType::kDouble;
  }
  const auto plan = make_plan(g);
  const auto value = [&](size_t p, int i, int64_t e) { return g.data[p * k + i] ? rows[p][i].at(e) : 0; };

  // Twice, with the threads and blocks in another order: not a bit may change.
  std::vector<double> gram, again;
  for (auto* result : {&gram, &again}) {
    std::vector<double> scratch(plan->scratch());
    std::memset(scratch.data(), 0xff, scratch.size() * sizeof(double));  // NaN, and a counter that is not 0
    result->assign(k * k, NAN);
    std::vector<float> narrow(k * k, NAN);
    plan->gramian(scratch.data(), wide ? static_cast<void*>(result->data()) : narrow.data(), wide);
    if (!wide) result->assign(narrow.begin(), narrow.end());
  }
  expect(!std::memcmp(gram.data(), again.data(), k * k * sizeof(double)), "repeat", k, params[0], again[0], gram[0]);
  for (int i = 0; i < k; ++i)
    for (int j = 0; j < k; ++j) {
      long double want = 0, size = 0;
      bool narrow = false;
      for (size_t p = 0; p < params.size(); ++p)
        for (int64_t e = 0; e < params[p].n; ++e) {
          const long double term = static_cast<long double>(value(p, i, e)) * value(p, j, e);
          want += term, size += std::abs(term), narrow |= params[p].type != DType::kDouble;
        }
      const double bound = size * (narrow ? 3e-7 : 1e-14);
      expect(std::abs(static_cast<double>(gram[i * k + j] - want)) <= bound, "gramian", k, params[0], gram[i * k + j],
             want);
    }

  // What is expected first: out may be a row.
  std::vector<double> weights(k);
  for (double& w : weights) w = float(bits() * 0x1p-30 - 2);
  const std::vector<float> narrow(weights.begin(), weights.end());
  std::vector<std::vector<double>> want, bound;
  for (size_t p = 0; p < params.size(); ++p) {
    want.emplace_back(params[p].n), bound.emplace_back(params[p].n);
    for (int64_t e = 0; e < params[p].n; ++e) {
      double size = 0;
      for (int i = 0; i < k; ++i)
        want[p][e] += weights[i] * value(p, i, e), size += std::abs(weights[i] * value(p, i, e));
      bound[p][e] = 1.01 * rounding(params[p].type) * std::abs(want[p][e]) +
                    2 * k * rounding(params[p].type == DType::kDouble ? DType::kDouble : DType::kFloat) * size +
                    (params[p].type == DType::kHalf ? 0x1p-25 : 0);
    }
  }
  plan->weighted_sum(wide ? static_cast<const void*>(weights.data()) : narrow.data(), wide);
  for (size_t p = 0; p < params.size(); ++p) {
    const Row& out = params[p].alias < 0 ? outs[p] : rows[p][params[p].alias];
    for (int64_t e = 0; e < params[p].n; ++e)
      expect(std::abs(out.at(e) - want[p][e]) <= bound[p][e], "weighted_sum", k, params[p], out.at(e), want[p][e]);
    for (int64_t e = 0; e < out.before; ++e)
      expect(std::isnan(out[e]), "what lies before out", k, params[p], out[e], NAN);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string level = argc > 1 ? argv[1] : "all";
  const std::vector<DType> types(kTypes.begin(), kTypes.begin() + (level == "least" ? 2 : 4));
  const std::vector<int> ks = level == "least"   ? std::vector{3, 5, 9}
                              : level == "quick" ? std::vector{1, 3, 4, 6, 9, 17}
                                                 : std::vector{1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32, 41};
  const auto began = std::chrono::steady_clock::now();
  compile = [](const std::string& name, int) { return Image{name, name}; };
  for (int k : ks)
    for (DType type : types) {
      const int64_t vector = 16 / size_of(type), chunk = (k <= 8 ? 16384 : 4096) / size_of(type);
      const int last = k - 1;
      std::vector<Param> params;
      for (int64_t n : {int64_t{0}, int64_t{1}, vector - 1, vector, vector + 1, int64_t{127}, 2 * chunk + 1})
        params.push_back({type, n});
      run(k, params);
      params.clear();  // all off by the same, as slices of flat buffers
      for (int before : {1, static_cast<int>(vector) - 1})
        for (int64_t n : {int64_t{1}, vector, int64_t{130}, chunk + 3}) params.push_back({type, n, before, 0, before});
      run(k, params);
      // Each off by something else; out alone; out in place of a row; None.
      run(k, {{type, chunk + 3, 0, 1}, {type, 127, 1, 1, 2}, {type, 127, 0, 0, 1}, {type, 1, 0, 1}});
      run(k, {{type, chunk / 2 + 5, 0, 0, 0, 0}, {type, chunk / 2 + 5, 1, 0, 0, last}});
      run(k, {{type, 131, 0, 0, 0, -1, 1}, {type, 131, 0, 0, 0, -1, 2}, {type, 131, 0, 0, 0, -1, ~0u}});
    }
  // Tables that are just full, or not quite, or more than full; all types at once; nothing at all.
  for (int k : {3, 9}) {
    for (int words : {500, 1500, 4080})
      for (int more : {0, 1}) run(k, std::vector<Param>(words / (3 + k) + more, {DType::kFloat, 3}));
    std::vector<Param> params;
    for (int p = 0; p < 2 * 4080 / (3 + k) + 7; ++p) params.push_back({DType::kFloat, p % 5 ? p % 37 : 0});
    for (int p = 0; p < 20; ++p) params.push_back({types[p % types.size()], 100 + p});
    run(k, params);
    run(k, {{DType::kFloat, 0}});
  }
  run(17, {{DType::kDouble, 300}, {DType::kDouble, 2000}});  // the last block of tiles has warps without one
  if (level == "all")
    for (DType type : kTypes)
      for (int k : {3, 8, 17}) run(k, {{type, 16385}, {type, 300001, 1}, {type, 16384}});
  std::printf("%d cases, %d failures, %.1f s\n", cases, failures,
              std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  return failures != 0;
}
