// CLUB upper bound of the mutual information, and the negative log-likelihood that fits its q.
//
// With w = e^-logvar, value_i = 1/2 sum_d w [Var(y) + (mean(y) - mu)^2 - (y - mu)^2]. The sums over rows of y, y^2, w,
// w mu and w y (2 mu - y) give mean and gradients in one pass. The value does not change when y and mu move together,
// so both are taken relative to a point inside the data: otherwise cancellation destroys the result.
//
// With classes, this holds for the rows of each class, times n/(n - 1).
#include <memory>
#include <numeric>
#include <optional>
#include <unordered_map>

#include "launch.h"

namespace udi {
namespace {

constexpr int64_t kRowChunks = 16;  // partial sums of a column; fixed, so that threads do not change the result
constexpr int64_t kMinRows = 64;    // of a chunk
constexpr int64_t kColumns = 256;   // columns of a task: five accumulators each stay in the first-level cache
constexpr int64_t kGroup = 8;       // rows summed in one float before they join the double
constexpr double kScale = 256;      // w is summed over this: e^88 times some rows times mu overflows
constexpr int64_t kGrain = 16384;   // fewer elements do not pay for a second thread

using namespace club_stats;  // names of the statistics
enum Sum { kY, kYY, kSumW, kSumWMu, kCross, kSums };

// w = e^-logvar, at most e^88 or e^680: an infinite w would make NaN of a residual of 0.
inline Floats weight_of(Floats logvar) { return exp(-logvar, 88.f); }
inline Doubles weight_of(Doubles logvar) { return exp(-logvar > 680. ? splat(680.) : -logvar); }  // NaN passes

// One row of the inputs, by value: the compiler reloads `Inputs` after every store, which might alias it.
template <class T>
struct Row {
  const T *mu, *logvar, *y;
};

template <class T>
struct Inputs {
  Rows<T> mu, logvar, y;
  int64_t n, d;
  const int64_t* order;  // of the rows; as they are if null

  Inputs(const Tensor& mu, const Tensor& logvar, const Tensor& y, const int64_t* order = nullptr)
      : mu(mu), logvar(logvar), y(y), n(mu.size(0)), d(mu.size(1)), order(order) {}
  int64_t row(int64_t i) const { return order ? order[i] : i; }
  Row<T> at(int64_t r) const { return {mu[r], logvar[r], y[r]}; }

  // `count` rows from place `begin` of the order on, then the next `count`, for prefetching.
  void rows(int64_t begin, int64_t count, Row<T>* to) const {
    for (int64_t i = 0; i < 2 * count; ++i) to[i] = at(row(std::min(begin + i, n - 1)));
  }
};

// The rows by class, those without a class first: `club_classes` as the kernels use it. Without classes all rows are in
// one, and a row is among its own negatives.
struct Classes {
  const int64_t *order = nullptr, *index = nullptr, *begin = nullptr;
  int64_t n, count = 1;  // rows, classes
  double divisor;        // of a mean over rows
  bool any_few = false, any_more = true, any_alone = false;

  Classes(const std::optional<Tensor>& classes, int64_t n) : n(n), divisor(n) {
    if (!classes) return;
    order = static_cast<const int64_t*>(classes->data_ptr());
    index = order + n + 1;
    begin = index + n + 1;
    divisor = std::max<int64_t>(order[n], 1);
    count = index[n];
    any_more = false, any_alone = order[n] < n;
    for (int64_t k = 0; k < count; ++k) (alone(k) ? any_alone : few(k) ? any_few : any_more) = true;
  }
  int64_t of(int64_t r) const { return order ? index[r] : 0; }
  int64_t size(int64_t k) const { return order ? begin[k + 1] - begin[k] : n; }
  bool few(int64_t k) const { return order && size(k) <= kSmallClass; }
  bool alone(int64_t k) const { return k < 0 || (order && size(k) == 1); }
  double factor(int64_t k) const { return order ? double(size(k)) / double(size(k) - 1) : 1; }
  int64_t slot(int64_t k) const {
    return order ? begin[k] / kSmallClass : 0;
  }  // of the statistics of a class of many rows
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
        auto y = [&](int64_t i) { return load_some(in.y[in.row(i)] + c0 + c, lanes); };
        Vec<T> a = y(r0), b = y((r0 + r1) / 2), last = y(r1 - 1), above = max(a, b);
        store(part.shift + c, max(a < b ? a : b, above < last ? above : last));
        for (auto& sum : part.sums) store(sum + c, Doubles{});
      }
      Vec<T> acc[kSums] = {}, shift = load(part.shift + c);
      for (int64_t i = group; i < end; ++i) {
        const int64_t r = in.row(i), next = in.row(i + ahead);
        for (auto* rows : {&in.mu, &in.logvar, &in.y}) __builtin_prefetch((*rows)[next] + c0 + c, 0, 2);
        Vec<T> y = load_some(in.y[r] + c0 + c, lanes) - shift, mu = load_some(in.mu[r] + c0 + c, lanes) - shift;
        Vec<T> w = compute_t<T>(1. / kScale) * factor[r] * weight_of(load_some(in.logvar[r] + c0 + c, lanes));
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

// finish(class, column, lanes, shift, sums) for every 16 columns of each class of more than few rows, with their sums
// over its rows. Returns the sum of what it returns, times the classes' factors.
template <class T, class F>
double reduce_columns(const Inputs<T>& in, const Classes& classes, Factor<compute_t<T>> factor, F finish) {
  auto read = [](const Part<T>& part, int64_t at, Doubles* sums) {
    for (int i = 0; i < kSums; ++i) sums[i] = (i < kSumW ? 1 : kScale) * load(part.sums[i] + at);
    return __builtin_convertvector(load(part.shift + at), Doubles);
  };
  const int64_t blocks = (in.d + kColumns - 1) / kColumns;
  if (!classes.any_more) return 0;
  // A task is one block of columns of a class, so that threads share large classes.
  if (classes.order) {
    const int64_t count = classes.count, size = 1 + in.n * std::min(in.d, kColumns) / std::max<int64_t>(count, 1);
    std::vector<double> values(blocks * count);
    torch::stable::parallel_for(0, blocks * count, 1 + kGrain / size, [&](int64_t begin, int64_t end) {
      Part<T> part;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t k = task % count, c0 = task / count * kColumns, c1 = std::min(c0 + kColumns, in.d);
        if (classes.few(k)) continue;
        column_sums(in, factor, classes.begin[k], classes.begin[k + 1], c0, c1, part);
        Doubles total{};
        for_each_lanes(c1 - c0, [&](int64_t c, int lanes) {
          Doubles sums[kSums], shift = read(part, c, sums);
          total += finish(k, c0 + c, lanes, shift, sums);
        });
        values[task] = classes.factor(k) * sum(total);
      }
    });
    return std::reduce(values.begin(), values.end());
  }
  const int64_t chunk = std::max(kMinRows, (in.n + kRowChunks - 1) / kRowChunks);
  const int64_t chunks = (in.n + chunk - 1) / chunk, size = 1 + chunk * std::min(in.d, kColumns);
  auto parts = std::make_unique_for_overwrite<Part<T>[]>(blocks * chunks);
  torch::stable::parallel_for(0, blocks * chunks, 1 + kGrain / size, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t c0 = task / chunks * kColumns, r0 = task % chunks * chunk;
      column_sums(in, factor, r0, std::min(r0 + chunk, in.n), c0, std::min(c0 + kColumns, in.d), parts[task]);
    }
  });
  Doubles value{};
  for_each_lanes(in.d, [&](int64_t c, int lanes) {
    const Part<T>* part = &parts[c / kColumns * chunks];
    int64_t at = c % kColumns;
    Doubles total[kSums] = {}, shift = __builtin_convertvector(load(part->shift + at), Doubles);
    for (int64_t row = 0; row < in.n; row += chunk, ++part) {
      Doubles sums[kSums], own = read(*part, at, sums);
      move(sums, own - shift, std::min(chunk, in.n - row));
      for (int i = 0; i < kSums; ++i) total[i] += sums[i];
    }
    value += finish(0, c, lanes, shift, total);
  });
  return sum(value);
}

// Writes the statistics, returns the sum of all values.
template <class T>
double statistics(const Inputs<T>& in, const Classes& classes, compute_t<T>* stats) {
  return reduce_columns(in, classes, {}, [&](int64_t k, int64_t c, int lanes, Doubles shift, Doubles* sums) {
    const double n = classes.size(k);
    compute_t<T>* to = stats + classes.slot(k) * kStats * in.d + c;
    auto write = [&](Stat stat, Doubles x) { store_some(to + stat * in.d, __builtin_convertvector(x, Vec<T>), lanes); };
    Doubles centre = __builtin_convertvector(__builtin_convertvector(shift + sums[kY] / n, Vec<T>), Doubles);
    move(sums, shift - centre, n);
    Doubles mean = sums[kY] / n, var = max(Doubles{}, sums[kYY] / n - mean * mean);  // in this order NaN passes
    write(kShift, centre);
    write(kMeanY, mean);
    write(kVarY, var);
    write(kMeanW, sums[kSumW] / n);
    write(kMeanWMu, sums[kSumWMu] / n);
    return 0.5 * ((var + mean * mean) * sums[kSumW] + sums[kCross] - 2 * mean * sums[kSumWMu]);
  });
}

// y - shift, mu - shift, y - mean, w and w [Var + (mean - mu)^2 - (y - mu)^2] of 16 elements.
template <class T>
struct Element {
  Vec<T> y, mu, centred, w, value;

  Element(Row<T> row, const compute_t<T>* stats, int64_t d, int64_t c, int lanes) {
    auto stat = [&](Stat s) { return load_some(stats + s * d + c, lanes); };
    Vec<T> shift = stat(kShift), mean = stat(kMeanY);
    y = load_some(row.y + c, lanes) - shift;
    mu = load_some(row.mu + c, lanes) - shift;
    centred = y - mean;
    w = weight_of(load_some(row.logvar + c, lanes));
    value = w * (stat(kVarY) + centred * (2 * (mu - mean) - centred));
  }
};

// Sixteen columns of a class of few rows, relative to the mean of y: all that value and gradients need, kept out of
// memory. The statistics of small classes would be as large as the inputs.
template <class T>
struct Few {
  Vec<T> y[kSmallClass], mu[kSmallClass], w[kSmallClass], var{};

  // Inlined, so that the exponential's constants are loaded once.
  [[gnu::always_inline]] Few(const Row<T>* own, const Row<T>* next, int64_t rows, int64_t c, int lanes) {
    const compute_t<T> share = compute_t<T>(1) / rows;
    Vec<T> first = load_some(own->y + c, lanes), sum{};
    for (int64_t i = 1; i < rows; ++i) sum += load_some(own[i].y + c, lanes) - first;
    const Vec<T> shift = first + share * sum, mean = (first - shift) + share * sum;  // the mean in two parts
    for (int64_t i = 0; i < rows; ++i) {
      for (const T* of : {next[i].mu, next[i].logvar, next[i].y}) __builtin_prefetch(of + c, 0, 2);
      y[i] = load_some(own[i].y + c, lanes) - shift - mean;
      var += y[i] * y[i];
      mu[i] = load_some(own[i].mu + c, lanes) - shift - mean;
      w[i] = weight_of(load_some(own[i].logvar + c, lanes));
    }
    var *= share;
  }
  Vec<T> value(int64_t i) const { return w[i] * (var + y[i] * (2 * mu[i] - y[i])); }
};

// f(class, its first place in the order, its number of rows) for every class of few rows that has negatives.
template <class F>
void for_each_few(const Classes& classes, int64_t d, F f) {
  if (!classes.any_few) return;
  const int64_t grain = 1 + kGrain / (classes.n * d / std::max<int64_t>(classes.count, 1) + 1);
  torch::stable::parallel_for(0, classes.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      if (classes.few(k) && !classes.alone(k)) f(k, classes.begin[k], classes.size(k));
  });
}

std::tuple<Tensor, Tensor> club_mi_fwd(const Tensor& mu, const Tensor& logvar, const Tensor& y,
                                       std::optional<Tensor> class_tensor, int64_t reduction) {
  const int64_t n = mu.size(0), d = mu.size(1);
  const Classes classes(class_tensor, n);
  ScalarType dtype = compute_dtype(mu);
  const auto each = std::vector<int64_t>{n / kSmallClass, kStats, d}, all = std::vector<int64_t>{kStats, d};
  Tensor stats = empty(classes.order ? each : all, dtype);
  Tensor loss = empty(reduction == kNone ? std::vector<int64_t>{n} : std::vector<int64_t>{}, dtype);
  dispatch(mu, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Inputs<T> in(mu, logvar, y, classes.order);
    S* stat = static_cast<S*>(stats.data_ptr());
    S* out = static_cast<S*>(loss.data_ptr());
    double total = n ? statistics(in, classes, stat) : 0.;
    std::vector<double> values(classes.count);
    for_each_few(classes, d, [&](int64_t k, int64_t begin, int64_t rows) {
      Row<T> own[2 * kSmallClass];
      in.rows(begin, rows, own);
      Vec<T> sums[kSmallClass] = {};
      for_each_lanes(d, [&](int64_t c, int lanes) {  // lanes beyond the end hold 0
        Few<T> few(own, own + rows, rows, c, lanes);
        for (int64_t i = 0; i < rows; ++i) sums[i] += few.value(i);
      });
      for (int64_t i = 0; i < rows; ++i) {
        const double value = 0.5 * classes.factor(k) * sum(sums[i]);
        if (reduction == kNone) out[in.row(begin + i)] = S(value);
        values[k] += value;
      }
    });
    if (reduction != kNone) {
      total += std::reduce(values.begin(), values.end());
      *out = S(reduction == kMean ? total / classes.divisor : total);
      return;
    }
    for_each_row(classes.any_more || classes.any_alone ? n : 0, d, [&](int64_t r) {
      const int64_t k = classes.of(r);
      if (classes.alone(k)) out[r] = 0;
      if (classes.alone(k) || classes.few(k)) return;
      const Row<T> of = in.at(r);
      const S* own = stat + classes.slot(k) * kStats * d;
      Vec<T> row{};
      for_each_lanes(d, [&](int64_t c, int lanes) {
        Vec<T> value = Element<T>(of, own, d, c, lanes).value;
        for (int i = lanes; i < kLanes; ++i) value[i] = 0;
        row += value;
      });
      out[r] = S(0.5 * classes.factor(k)) * sum(row);
    });
  });
  return {loss, stats};
}

// With g the gradient of each row's value, times its class's factor, and means over all rows i of the class:
//   d y = g w (mu - y) + y mean(g w) - mean(g w mu),  d mu = g w (y - mean(y)),  d logvar = -g value.
std::tuple<Tensor, Tensor, Tensor> club_mi_bwd(const Tensor& grad, const Tensor& mu, const Tensor& logvar,
                                               const Tensor& y, std::optional<Tensor> class_tensor, const Tensor& stats,
                                               int64_t reduction, bool need_mu, bool need_logvar, bool need_y) {
  Tensor grad_mu = empty_grad(mu, need_mu), grad_logvar = empty_grad(logvar, need_logvar);
  Tensor grad_y = empty_grad(y, need_y);
  const int64_t n = mu.size(0), d = mu.size(1);
  const Classes classes(class_tensor, n);
  dispatch(mu, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Inputs<T> in(mu, logvar, y, classes.order);
    if (n == 0) return;
    if (n == 1) {  // its only negative is itself: 0 by definition, where the formula leaves rounding errors
      for (Tensor* g : {&grad_mu, &grad_logvar, &grad_y}) torch::stable::zero_(*g);
      return;
    }
    Factor<S> g(grad);
    const double scale = reduction == kMean ? 1. / classes.divisor : 1.;
    Rows<T> out_mu = need_mu ? Rows<T>(grad_mu) : Rows<T>(), out_y = need_y ? Rows<T>(grad_y) : Rows<T>();
    Rows<T> out_logvar = need_logvar ? Rows<T>(grad_logvar) : Rows<T>();
    for_each_few(classes, d, [&](int64_t k, int64_t begin, int64_t rows) {
      const S share = S(1) / rows;
      Row<T> own[2 * kSmallClass];
      in.rows(begin, rows, own);
      S weight[kSmallClass];
      T *to_mu[kSmallClass], *to_logvar[kSmallClass], *to_y[kSmallClass];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t r = in.row(begin + i);
        weight[i] = S(g[r] * scale * classes.factor(k));
        to_mu[i] = out_mu[r], to_logvar[i] = out_logvar[r], to_y[i] = out_y[r];
      }
      for_each_lanes(d, [&](int64_t c, int lanes) {
        Few<T> few(own, own + rows, rows, c, lanes);
        Vec<T> mean_w{}, mean_wmu{};
        for (int64_t i = 0; i < rows; ++i) {
          if (need_logvar) store_some(to_logvar[i] + c, Vec<T>(S(-0.5) * weight[i] * few.value(i)), lanes);
          few.w[i] *= weight[i];
          mean_w += share * few.w[i];
          mean_wmu += share * few.w[i] * few.mu[i];
          if (need_mu) store_some(to_mu[i] + c, Vec<T>(few.w[i] * few.y[i]), lanes);
        }
        for (int64_t i = 0; i < (need_y ? rows : 0); ++i) {
          Vec<T> dy = few.w[i] * (few.mu[i] - few.y[i]) + (few.y[i] * mean_w - mean_wmu);
          store_some(to_y[i] + c, dy, lanes);
        }
      });
    });
    const S* stat = static_cast<const S*>(stats.data_ptr());
    // mean(w) and mean(w mu) of a class; with one gradient for all rows they need only that and the factor.
    const S* means = stat + kMeanW * d;
    int64_t between = kStats * d;
    std::unique_ptr<S[]> weighted;
    if (need_y && reduction == kNone) {
      weighted = std::make_unique_for_overwrite<S[]>(2 * d * (classes.order ? n / kSmallClass : 1));
      means = weighted.get(), between = 2 * d;
      reduce_columns(in, classes, g, [&](int64_t k, int64_t c, int lanes, Doubles shift, Doubles* sums) {
        const double size = classes.size(k), share = classes.factor(k) / size;
        const Vec<T> centre = load_some(stat + classes.slot(k) * kStats * d + c, lanes);
        move(sums, shift - __builtin_convertvector(centre, Doubles), size);
        S* to = &weighted[classes.slot(k) * between + c];
        store_some(to, __builtin_convertvector(sums[kSumW] * share, Vec<T>), lanes);
        store_some(to + d, __builtin_convertvector(sums[kSumWMu] * share, Vec<T>), lanes);
        return Doubles{};
      });
    }
    // In the order of memory: class by class it takes twice as long.
    for_each_row(classes.any_more || classes.any_alone ? n : 0, d, [&](int64_t r) {
      const int64_t k = classes.of(r);
      T *to_mu = out_mu[r], *to_logvar = out_logvar[r], *to_y = out_y[r];
      if (classes.alone(k))
        for (T* to : {to_mu, to_logvar, to_y})
          if (to) std::fill_n(to, d, T(0));
      if (classes.alone(k) || classes.few(k)) return;
      const Row<T> of = in.at(r);
      const S row = S(g[r] * scale * classes.factor(k)), all = weighted ? S(1) : row;
      const S *own = stat + classes.slot(k) * kStats * d, *w = means + classes.slot(k) * between, *wmu = w + d;
      for_each_lanes(d, [&](int64_t c, int lanes) {
        Element<T> e(of, own, d, c, lanes);
        if (to_y) {
          Vec<T> common = e.y * load_some(w + c, lanes) - load_some(wmu + c, lanes);
          store_some(to_y + c, Vec<T>(row * e.w * (e.mu - e.y) + all * common), lanes);
        }
        if (to_mu) store_some(to_mu + c, Vec<T>(row * e.w * e.centred), lanes);
        if (to_logvar) store_some(to_logvar + c, Vec<T>(S(-0.5) * row * e.value), lanes);
      });
    });
  });
  return {grad_mu, grad_logvar, grad_y};
}

// Classes are numbered in the order of their first rows. Rows without a class come first, then class by class.
Tensor club_classes(const Tensor& given) {
  const int64_t n = given.size(0), *ids = static_cast<const int64_t*>(given.data_ptr()), stride = given.stride(0);
  Tensor classes = empty({3, n + 1}, ScalarType::Long);
  int64_t *order = static_cast<int64_t*>(classes.data_ptr()), *index = order + n + 1, *begin = index + n + 1;
  std::unordered_map<int64_t, int64_t> numbers;
  std::vector<int64_t> next{0};  // of the rows in none, and of each class: how many, then where the next one goes
  for (int64_t r = 0; r < n; ++r) {
    const int64_t id = ids[r * stride];
    index[r] = id < 0 ? -1 : numbers.try_emplace(id, numbers.size()).first->second;
    if (index[r] == int64_t(next.size()) - 1) next.push_back(0);
    ++next[index[r] + 1];
  }
  order[n] = n - next[0];
  index[n] = numbers.size();
  std::exclusive_scan(next.begin(), next.end(), next.begin(), int64_t(0));
  std::fill(std::copy(next.begin() + 1, next.end(), begin), begin + n + 1, n);
  for (int64_t r = 0; r < n; ++r) order[next[index[r] + 1]++] = r;
  return classes;
}

// `weight`: factors of the rows, whose sum is 1, or all 0. Rows of factor 0 are not read.
Tensor club_nll_fwd(const Tensor& mu, const Tensor& logvar, const Tensor& y, std::optional<Tensor> weight) {
  Tensor loss = empty({}, compute_dtype(mu));
  dispatch(mu, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Inputs<T> in(mu, logvar, y);
    const Factor<S> factor = weight ? Factor<S>(*weight) : Factor<S>();
    std::vector<S> rows(in.n);
    for_each_row(in.n, in.d, [&](int64_t r) {
      if (factor[r] == 0) return;
      Vec<T> row{};
      for_each_lanes(in.d, [&](int64_t c, int lanes) {  // lanes beyond the end hold 0
        Vec<T> error = load_some(in.y[r] + c, lanes) - load_some(in.mu[r] + c, lanes);
        Vec<T> lv = load_some(in.logvar[r] + c, lanes);
        row += error * error * weight_of(lv) + lv;
      });
      rows[r] = factor[r] * sum(row);
    });
    double total = 0;
    for (S row : rows) total += row;
    *static_cast<S*>(loss.data_ptr()) = S(total / (weight && in.n ? 1 : in.n));
  });
  return loss;
}

// d y = 2 w (y - mu)/N = -d mu,  d logvar = (1 - w (y - mu)^2)/N.
std::tuple<Tensor, Tensor, Tensor> club_nll_bwd(const Tensor& grad, const Tensor& mu, const Tensor& logvar,
                                                const Tensor& y, std::optional<Tensor> weight, bool need_mu,
                                                bool need_logvar, bool need_y) {
  Tensor grad_mu = empty_grad(mu, need_mu), grad_logvar = empty_grad(logvar, need_logvar);
  Tensor grad_y = empty_grad(y, need_y);
  dispatch(mu, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Inputs<T> in(mu, logvar, y);
    const Factor<S> factor = weight ? Factor<S>(*weight) : Factor<S>();
    const S all = Factor<S>(grad)[0] / (weight ? 1 : in.n);
    Rows<T> out_mu = need_mu ? Rows<T>(grad_mu) : Rows<T>(), out_y = need_y ? Rows<T>(grad_y) : Rows<T>();
    Rows<T> out_logvar = need_logvar ? Rows<T>(grad_logvar) : Rows<T>();
    for_each_row(in.n, in.d, [&](int64_t r) {
      const S g = all * factor[r];
      if (factor[r] == 0) {
        for (T* to : {out_mu[r], out_logvar[r], out_y[r]})
          if (to) std::fill_n(to, in.d, T(0));
        return;
      }
      for_each_lanes(in.d, [&](int64_t c, int lanes) {
        Vec<T> error = load_some(in.y[r] + c, lanes) - load_some(in.mu[r] + c, lanes);
        Vec<T> weighted = error * weight_of(load_some(in.logvar[r] + c, lanes));
        if (out_mu) store_some(out_mu[r] + c, Vec<T>(-2 * g * weighted), lanes);
        if (out_logvar) store_some(out_logvar[r] + c, Vec<T>(g * (1 - error * weighted)), lanes);
        if (out_y) store_some(out_y[r] + c, Vec<T>(2 * g * weighted), lanes);
      });
    });
  });
  return {grad_mu, grad_logvar, grad_y};
}

STABLE_TORCH_LIBRARY_IMPL(udi_kernels, CPU, m) {
  m.impl("club_classes", TORCH_BOX(&club_classes));
  m.impl("club_mi_fwd", TORCH_BOX(&club_mi_fwd));
  m.impl("club_mi_bwd", TORCH_BOX(&club_mi_bwd));
  m.impl("club_nll_fwd", TORCH_BOX(&club_nll_fwd));
  m.impl("club_nll_bwd", TORCH_BOX(&club_nll_bwd));
}

}  // namespace
}  // namespace udi
