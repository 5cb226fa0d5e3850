// CLUB upper bound of the mutual information, and the negative log-likelihood that fits its q.
//
// With w = e^-logvar, value_i = 1/2 sum_d w [Var(y) + (mean(y) - mu)^2 - (y - mu)^2]. The sums over rows of y, y^2, w,
// w mu and w y (2 mu - y) give mean and gradients in one pass. The value does not change when y and mu move together,
// so both are taken relative to a point inside the data: without that, cancellation eats the result.
#include "ops.h"

namespace udi {
namespace {

constexpr int64_t kRowChunks = 16;  // partial sums of a column; fixed, so that threads do not change the result
constexpr int64_t kMinRows = 64;    // of a chunk
constexpr int64_t kColumns = 256;   // columns of a task: five accumulators each stay in the first-level cache
constexpr int64_t kGroup = 8;       // rows summed in one float before they join the double
constexpr int64_t kGrain = 16384;   // below this many elements a second thread does not pay

// Rows of `stats`, all but the first relative to it: sums over rows, divided by N in the end.
enum Stat { kShift, kMeanY, kVarY, kMeanW, kMeanWMu, kStats };
enum Sum { kY, kYY, kSumW, kSumWMu, kCross, kSums };

template <class T>
struct Inputs {
  Rows<T> mu, logvar, y;
  int64_t n, d;

  Inputs(const Tensor& mu, const Tensor& logvar, const Tensor& y)
      : mu(mu), logvar(logvar), y(y), n(mu.size(0)), d(mu.size(1)) {}
};

template <class T>
inline Vec<T> load_some(const T* from, int n) {
  return n == kLanes ? load(from) : load(from, n, compute_t<T>(0));
}

template <class T>
inline void store_some(T* to, Vec<T> v, int n) {
  n == kLanes ? store(to, v) : store(to, v, n);
}

// f(offset, lanes) for every 16 of n elements.
template <class F>
inline void for_each_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, int(n - i));
}

template <class F>
void for_each_row(int64_t rows, int64_t columns, F f) {
  torch::stable::parallel_for(0, rows, 1 + kGrain / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r);
  });
}

// The mean of up to 32 rows spread over y: near the middle of the data whatever its order and its outliers.
template <class T>
void find_shift(const Inputs<T>& in, compute_t<T>* shift) {
  int64_t rows = std::min<int64_t>(in.n, 32);
  for_each_lanes(in.d, [&](int64_t c, int lanes) {
    Vec<T> total{};
    for (int64_t i = 0; i < rows; ++i) total += load_some(in.y[i * in.n / rows] + c, lanes);
    store_some(shift + c, Vec<T>(total / compute_t<T>(rows)), lanes);
  });
}

// The five sums over rows [r0, r1) of columns [c0, c1), each row times its factor in the sums over w.
template <class T>
void column_sums(const Inputs<T>& in, Factor<compute_t<T>> factor, const compute_t<T>* shift, int64_t r0, int64_t r1,
                 int64_t c0, int64_t c1, double (*sums)[kColumns]) {
  for (int64_t group = r0; group < r1; group += kGroup) {
    for_each_lanes(c1 - c0, [&](int64_t c, int lanes) {
      Vec<T> acc[kSums] = {}, s = load_some(shift + c0 + c, lanes);
      for (int64_t r = group; r < std::min(group + kGroup, r1); ++r) {
        Vec<T> y = load_some(in.y[r] + c0 + c, lanes) - s, mu = load_some(in.mu[r] + c0 + c, lanes) - s;
        Vec<T> w = factor[r] * exp(-load_some(in.logvar[r] + c0 + c, lanes));
        acc[kY] += y;
        acc[kYY] += y * y;
        acc[kSumW] += w;
        acc[kSumWMu] += w * mu;
        acc[kCross] += w * y * (2 * mu - y);
      }
      for (int i = 0; i < kSums; ++i) store(sums[i] + c, load(sums[i] + c) + __builtin_convertvector(acc[i], Doubles));
    });
  }
}

// finish(c0, c1, sums) for every block of columns, with its sums over all rows.
template <class T, class F>
void reduce_columns(const Inputs<T>& in, Factor<compute_t<T>> factor, const compute_t<T>* shift, F finish) {
  using Block = double[kSums][kColumns];
  int64_t blocks = (in.d + kColumns - 1) / kColumns, chunk = std::max(kMinRows, (in.n + kRowChunks - 1) / kRowChunks);
  int64_t chunks = (in.n + chunk - 1) / chunk, size = 1 + chunk * std::min(in.d, kColumns);
  std::vector<double> scratch(blocks * chunks * kSums * kColumns);
  auto* parts = reinterpret_cast<Block*>(scratch.data());
  torch::stable::parallel_for(0, blocks * chunks, 1 + kGrain / size, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t c0 = task / chunks * kColumns, r0 = task % chunks * chunk;
      column_sums(in, factor, shift, r0, std::min(r0 + chunk, in.n), c0, std::min(c0 + kColumns, in.d), parts[task]);
    }
  });
  for (int64_t block = 0; block < blocks; ++block) {
    auto& sums = parts[block * chunks];
    for (int64_t k = 1; k < chunks; ++k)
      for (int s = 0; s < kSums; ++s)
        for (int64_t c = 0; c < kColumns; ++c) sums[s][c] += parts[block * chunks + k][s][c];
    finish(block * kColumns, std::min((block + 1) * kColumns, in.d), sums);
  }
}

// Writes the statistics, returns the sum of all values.
template <class T>
double statistics(const Inputs<T>& in, compute_t<T>* stats) {
  double total = 0, n = in.n;
  find_shift(in, stats);
  reduce_columns(in, {}, stats, [&](int64_t c0, int64_t c1, auto& sums) {
    for (int64_t c = c0; c < c1; ++c) {
      auto s = [&](Sum which) { return sums[which][c - c0]; };
      double mean = s(kY) / n, var = std::max(s(kYY) / n - mean * mean, 0.);
      total += 0.5 * ((var + mean * mean) * s(kSumW) + s(kCross) - 2 * mean * s(kSumWMu));
      stats[kMeanY * in.d + c] = mean;
      stats[kVarY * in.d + c] = var;
      stats[kMeanW * in.d + c] = s(kSumW) / n;
      stats[kMeanWMu * in.d + c] = s(kSumWMu) / n;
    }
  });
  return total;
}

// y - shift, mu - shift, y - mean, w and w [Var + (mean - mu)^2 - (y - mu)^2] of 16 elements.
template <class T>
struct Element {
  Vec<T> y, mu, centred, w, value;

  Element(const Inputs<T>& in, const compute_t<T>* stats, int64_t row, int64_t c, int lanes) {
    auto stat = [&](Stat s) { return load_some(stats + s * in.d + c, lanes); };
    Vec<T> shift = stat(kShift), mean = stat(kMeanY);
    y = load_some(in.y[row] + c, lanes) - shift;
    mu = load_some(in.mu[row] + c, lanes) - shift;
    centred = y - mean;
    w = exp(-load_some(in.logvar[row] + c, lanes));
    value = w * (stat(kVarY) + centred * (2 * (mu - mean) - centred));
  }
};

std::tuple<Tensor, Tensor> club_mi_fwd(const Tensor& mu, const Tensor& logvar, const Tensor& y, int64_t reduction) {
  ScalarType dtype = compute_dtype(mu);
  Tensor stats = empty({kStats, mu.size(1)}, dtype);
  Tensor loss = empty(reduction == kNone ? std::vector<int64_t>{mu.size(0)} : std::vector<int64_t>{}, dtype);
  dispatch(mu, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Inputs<T> in(mu, logvar, y);
    S* stat = static_cast<S*>(stats.data_ptr());
    S* out = static_cast<S*>(loss.data_ptr());
    double total = in.n ? statistics(in, stat) : 0.;
    if (reduction != kNone) {
      *out = S(reduction == kMean ? total / in.n : total);
      return;
    }
    for_each_row(in.n, in.d, [&](int64_t r) {
      Vec<T> row{};
      for_each_lanes(in.d, [&](int64_t c, int lanes) {
        Vec<T> value = Element<T>(in, stat, r, c, lanes).value;
        for (int i = lanes; i < kLanes; ++i) value[i] = 0;
        row += value;
      });
      out[r] = S(0.5) * sum(row);
    });
  });
  return {loss, stats};
}

// With g the gradient of each row's value and means over all rows i:
//   d y = g w (mu - y) + y mean(g w) - mean(g w mu),  d mu = g w (y - mean(y)),  d logvar = -g value.
std::tuple<Tensor, Tensor, Tensor> club_mi_bwd(const Tensor& grad, const Tensor& mu, const Tensor& logvar,
                                               const Tensor& y, const Tensor& stats, int64_t reduction, bool need_mu,
                                               bool need_logvar, bool need_y) {
  Tensor grad_mu = empty_grad(mu, need_mu), grad_logvar = empty_grad(logvar, need_logvar);
  Tensor grad_y = empty_grad(y, need_y);
  dispatch(mu, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Inputs<T> in(mu, logvar, y);
    if (in.n == 0) return;
    if (in.n == 1) {  // no negative but the positive: 0 by definition, where the formula would leave rounding errors
      for (Tensor* g : {&grad_mu, &grad_logvar, &grad_y}) torch::stable::zero_(*g);
      return;
    }
    const S* stat = static_cast<const S*>(stats.data_ptr());
    Factor<S> g(grad);
    S scale = reduction == kMean ? S(1. / in.n) : S(1);
    std::vector<S> mean_w(in.d), mean_wmu(in.d);
    if (need_y && reduction == kNone) {
      reduce_columns(in, g, stat, [&](int64_t c0, int64_t c1, auto& sums) {
        for (int64_t c = c0; c < c1; ++c) {
          mean_w[c] = sums[kSumW][c - c0] / in.n;
          mean_wmu[c] = sums[kSumWMu][c - c0] / in.n;
        }
      });
    } else if (need_y) {
      for (int64_t c = 0; c < in.d; ++c) {
        mean_w[c] = g[0] * scale * stat[kMeanW * in.d + c];
        mean_wmu[c] = g[0] * scale * stat[kMeanWMu * in.d + c];
      }
    }
    Rows<T> out_mu = need_mu ? Rows<T>(grad_mu) : Rows<T>(), out_y = need_y ? Rows<T>(grad_y) : Rows<T>();
    Rows<T> out_logvar = need_logvar ? Rows<T>(grad_logvar) : Rows<T>();
    for_each_row(in.n, in.d, [&](int64_t r) {
      S row = g[r] * scale;
      for_each_lanes(in.d, [&](int64_t c, int lanes) {
        Element<T> e(in, stat, r, c, lanes);
        if (out_y) {
          Vec<T> w = load_some(mean_w.data() + c, lanes), wmu = load_some(mean_wmu.data() + c, lanes);
          store_some(out_y[r] + c, Vec<T>(row * e.w * (e.mu - e.y) + (e.y * w - wmu)), lanes);
        }
        if (out_mu) store_some(out_mu[r] + c, Vec<T>(row * e.w * e.centred), lanes);
        if (out_logvar) store_some(out_logvar[r] + c, Vec<T>(S(-0.5) * row * e.value), lanes);
      });
    });
  });
  return {grad_mu, grad_logvar, grad_y};
}

Tensor club_nll_fwd(const Tensor& mu, const Tensor& logvar, const Tensor& y) {
  Tensor loss = empty({}, compute_dtype(mu));
  dispatch(mu, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Inputs<T> in(mu, logvar, y);
    std::vector<S> rows(in.n);
    for_each_row(in.n, in.d, [&](int64_t r) {
      Vec<T> row{};
      for_each_lanes(in.d, [&](int64_t c, int lanes) {  // lanes beyond the end hold 0
        Vec<T> error = load_some(in.y[r] + c, lanes) - load_some(in.mu[r] + c, lanes);
        Vec<T> lv = load_some(in.logvar[r] + c, lanes);
        row += error * error * exp(-lv) + lv;
      });
      rows[r] = sum(row);
    });
    double total = 0;
    for (S row : rows) total += row;
    *static_cast<S*>(loss.data_ptr()) = S(total / in.n);
  });
  return loss;
}

// d y = 2 w (y - mu)/N = -d mu,  d logvar = (1 - w (y - mu)^2)/N.
std::tuple<Tensor, Tensor, Tensor> club_nll_bwd(const Tensor& grad, const Tensor& mu, const Tensor& logvar,
                                                const Tensor& y, bool need_mu, bool need_logvar, bool need_y) {
  Tensor grad_mu = empty_grad(mu, need_mu), grad_logvar = empty_grad(logvar, need_logvar);
  Tensor grad_y = empty_grad(y, need_y);
  dispatch(mu, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Inputs<T> in(mu, logvar, y);
    S g = Factor<S>(grad)[0] / in.n;
    Rows<T> out_mu = need_mu ? Rows<T>(grad_mu) : Rows<T>(), out_y = need_y ? Rows<T>(grad_y) : Rows<T>();
    Rows<T> out_logvar = need_logvar ? Rows<T>(grad_logvar) : Rows<T>();
    for_each_row(in.n, in.d, [&](int64_t r) {
      for_each_lanes(in.d, [&](int64_t c, int lanes) {
        Vec<T> error = load_some(in.y[r] + c, lanes) - load_some(in.mu[r] + c, lanes);
        Vec<T> weighted = error * exp(-load_some(in.logvar[r] + c, lanes));
        if (out_mu) store_some(out_mu[r] + c, Vec<T>(-2 * g * weighted), lanes);
        if (out_logvar) store_some(out_logvar[r] + c, Vec<T>(g * (1 - error * weighted)), lanes);
        if (out_y) store_some(out_y[r] + c, Vec<T>(2 * g * weighted), lanes);
      });
    });
  });
  return {grad_mu, grad_logvar, grad_y};
}

STABLE_TORCH_LIBRARY_IMPL(udi_kernels, CPU, m) {
  m.impl("club_mi_fwd", TORCH_BOX(&club_mi_fwd));
  m.impl("club_mi_bwd", TORCH_BOX(&club_mi_bwd));
  m.impl("club_nll_fwd", TORCH_BOX(&club_nll_fwd));
  m.impl("club_nll_bwd", TORCH_BOX(&club_nll_bwd));
}

}  // namespace
}  // namespace udi
