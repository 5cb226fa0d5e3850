// CLUB upper bound of the mutual information, and the negative log-likelihood that fits its q.
//
// With w = e^-logvar, value_i = 1/2 sum_d w [Var(y) + (mean(y) - mu)^2 - (y - mu)^2]. The sums over rows of y, y^2, w,
// w mu and w y (2 mu - y) give mean and gradients in one pass. The value does not change when y and mu move together,
// so both are taken relative to a point inside the data: without that, cancellation eats the result.
#include <memory>

#include "launch.h"

namespace udi {
namespace {

constexpr int64_t kRowChunks = 16;  // partial sums of a column; fixed, so that threads do not change the result
constexpr int64_t kMinRows = 64;    // of a chunk
constexpr int64_t kColumns = 256;   // columns of a task: five accumulators each stay in the first-level cache
constexpr int64_t kGroup = 8;       // rows summed in one float before they join the double
constexpr double kScale = 256;      // w is summed over this: e^87 times some rows times mu overflows
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

// One row of the inputs, by value: a compiler that fears for `Inputs` at every store would read it anew after each.
template <class T>
struct Row {
  const T *mu, *logvar, *y;
  int64_t d;

  Row(const Inputs<T>& in, int64_t r) : mu(in.mu[r]), logvar(in.logvar[r]), y(in.y[r]), d(in.d) {}
};

template <class F>
void for_each_row(int64_t rows, int64_t columns, F f) {
  torch::stable::parallel_for(0, rows, 1 + kGrain / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r);
  });
}

// Sums over some rows of a block of columns, of y and mu relative to the shift.
template <class T>
struct Part {
  compute_t<T> shift[kColumns];
  double sums[kSums][kColumns];
};

// Turns sums over `rows` rows relative to a + delta into those relative to a.
inline void move(Doubles* sums, Doubles delta, double rows) {
  sums[kCross] += delta * (2 * sums[kSumWMu] + delta * sums[kSumW]);
  sums[kSumWMu] += delta * sums[kSumW];
  sums[kYY] += delta * (2 * sums[kY] + delta * rows);
  sums[kY] += delta * rows;
}

// to[0..16) += x, by halves: GCC 12 moves a vector wider than a register through memory.
template <class V>
inline void add(double* to, V x) {
  typedef double Half __attribute__((vector_size(kLanes * 4)));
  auto half = [&](double* at, auto x) {
    Half sum;
    std::memcpy(&sum, at, sizeof sum);
    sum += __builtin_convertvector(x, Half);
    std::memcpy(at, &sum, sizeof sum);
  };
  half(to, __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7));
  half(to + kLanes / 2, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
}

// The five sums over rows [r0, r1) of columns [c0, c1), each row times its factor in the sums over w. The shift is the
// median of three rows: inside the data whatever its order, and no outlier moves it.
template <class T>
void column_sums(const Inputs<T>& in, Factor<compute_t<T>> factor, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                 Part<T>& part) {
  for (int64_t group = r0; group < r1; group += kGroup) {
    const int64_t end = std::min(group + kGroup, r1), ahead = end + kGroup <= r1 ? kGroup : 0;
    for_each_lanes(c1 - c0, [&](int64_t c, int lanes) {
      if (group == r0) {
        Vec<T> a = load_some(in.y[r0] + c0 + c, lanes), b = load_some(in.y[(r0 + r1) / 2] + c0 + c, lanes);
        Vec<T> last = load_some(in.y[r1 - 1] + c0 + c, lanes), above = max(a, b);
        store(part.shift + c, max(a < b ? a : b, above < last ? above : last));
        for (auto& sum : part.sums) store(sum + c, Doubles{});
      }
      Vec<T> acc[kSums] = {}, shift = load(part.shift + c);
      for (int64_t r = group; r < end; ++r) {
        for (auto* rows : {&in.mu, &in.logvar, &in.y}) __builtin_prefetch((*rows)[r + ahead] + c0 + c, 0, 2);
        Vec<T> y = load_some(in.y[r] + c0 + c, lanes) - shift, mu = load_some(in.mu[r] + c0 + c, lanes) - shift;
        Vec<T> w = compute_t<T>(1. / kScale) * factor[r] * exp(-load_some(in.logvar[r] + c0 + c, lanes));
        acc[kY] += y;
        acc[kYY] += y * y;
        acc[kSumW] += w;
        acc[kSumWMu] += w * mu;
        acc[kCross] += w * y * (2 * mu - y);
      }
      for (int i = 0; i < kSums; ++i) add(part.sums[i] + c, acc[i]);
    });
  }
}

// finish(column, lanes, shift, sums) for every 16 columns, with their sums over all rows.
template <class T, class F>
void reduce_columns(const Inputs<T>& in, Factor<compute_t<T>> factor, F finish) {
  int64_t blocks = (in.d + kColumns - 1) / kColumns, chunk = std::max(kMinRows, (in.n + kRowChunks - 1) / kRowChunks);
  int64_t chunks = (in.n + chunk - 1) / chunk, size = 1 + chunk * std::min(in.d, kColumns);
  auto parts = std::make_unique_for_overwrite<Part<T>[]>(blocks * chunks);
  torch::stable::parallel_for(0, blocks * chunks, 1 + kGrain / size, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t c0 = task / chunks * kColumns, r0 = task % chunks * chunk;
      column_sums(in, factor, r0, std::min(r0 + chunk, in.n), c0, std::min(c0 + kColumns, in.d), parts[task]);
    }
  });
  for_each_lanes(in.d, [&](int64_t c, int lanes) {
    const Part<T>* part = &parts[c / kColumns * chunks];
    int64_t at = c % kColumns;
    Doubles total[kSums] = {}, shift = __builtin_convertvector(load(part->shift + at), Doubles);
    for (int64_t row = 0; row < in.n; row += chunk, ++part) {
      Doubles sums[kSums];
      for (int i = 0; i < kSums; ++i) sums[i] = (i < kSumW ? 1 : kScale) * load(part->sums[i] + at);
      move(sums, __builtin_convertvector(load(part->shift + at), Doubles) - shift, std::min(chunk, in.n - row));
      for (int i = 0; i < kSums; ++i) total[i] += sums[i];
    }
    finish(c, lanes, shift, total);
  });
}

// Writes the statistics, returns the sum of all values.
template <class T>
double statistics(const Inputs<T>& in, compute_t<T>* stats) {
  Doubles total{};
  double n = in.n;
  reduce_columns(in, {}, [&](int64_t c, int lanes, Doubles shift, Doubles* sums) {
    auto write = [&](Stat stat, Doubles x) {
      store_some(stats + stat * in.d + c, __builtin_convertvector(x, Vec<T>), lanes);
    };
    Doubles centre = __builtin_convertvector(__builtin_convertvector(shift + sums[kY] / n, Vec<T>), Doubles);
    move(sums, shift - centre, n);
    Doubles mean = sums[kY] / n, var = max(Doubles{}, sums[kYY] / n - mean * mean);  // in this order NaN passes
    total += 0.5 * ((var + mean * mean) * sums[kSumW] + sums[kCross] - 2 * mean * sums[kSumWMu]);
    write(kShift, centre);
    write(kMeanY, mean);
    write(kVarY, var);
    write(kMeanW, sums[kSumW] / n);
    write(kMeanWMu, sums[kSumWMu] / n);
  });
  return sum(total);
}

// y - shift, mu - shift, y - mean, w and w [Var + (mean - mu)^2 - (y - mu)^2] of 16 elements.
template <class T>
struct Element {
  Vec<T> y, mu, centred, w, value;

  Element(Row<T> row, const compute_t<T>* stats, int64_t c, int lanes) {
    auto stat = [&](Stat s) { return load_some(stats + s * row.d + c, lanes); };
    Vec<T> shift = stat(kShift), mean = stat(kMeanY);
    y = load_some(row.y + c, lanes) - shift;
    mu = load_some(row.mu + c, lanes) - shift;
    centred = y - mean;
    w = exp(-load_some(row.logvar + c, lanes));
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
      const Row<T> of(in, r);
      Vec<T> row{};
      for_each_lanes(in.d, [&](int64_t c, int lanes) {
        Vec<T> value = Element<T>(of, stat, c, lanes).value;
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
    const double n = in.n;
    std::vector<S> mean_w(in.d), mean_wmu(in.d);
    if (need_y && reduction == kNone) {
      reduce_columns(in, g, [&](int64_t c, int lanes, Doubles shift, Doubles* sums) {
        move(sums, shift - __builtin_convertvector(load_some(stat + c, lanes), Doubles), n);
        store_some(mean_w.data() + c, __builtin_convertvector(sums[kSumW] / n, Vec<T>), lanes);
        store_some(mean_wmu.data() + c, __builtin_convertvector(sums[kSumWMu] / n, Vec<T>), lanes);
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
      const Row<T> of(in, r);
      const S row = g[r] * scale, *mean = stat, *w = mean_w.data(), *wmu = mean_wmu.data();
      T *to_mu = out_mu[r], *to_logvar = out_logvar[r], *to_y = out_y[r];
      for_each_lanes(of.d, [&](int64_t c, int lanes) {
        Element<T> e(of, mean, c, lanes);
        if (to_y) {
          Vec<T> common = e.y * load_some(w + c, lanes) - load_some(wmu + c, lanes);
          store_some(to_y + c, Vec<T>(row * e.w * (e.mu - e.y) + common), lanes);
        }
        if (to_mu) store_some(to_mu + c, Vec<T>(row * e.w * e.centred), lanes);
        if (to_logvar) store_some(to_logvar + c, Vec<T>(S(-0.5) * row * e.value), lanes);
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
