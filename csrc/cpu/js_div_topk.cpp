// Generalized Jensen-Shannon divergence of rows of logits from the top K probabilities of a teacher.
//
// It is js_div.h's divergence over K + 1 classes: the last is what the K leave out, with the sum of the student's other
// probabilities and what the tail gives the teacher there, 0 or 1 - P. Where the teacher has 0, log(q/m) does not
// depend on q, so the sum of these classes' terms is the term of their sum. The others' exponentials are added up
// without the K, so that a small sum keeps its digits.
//
// As there, the gradient in the student's logits is share/T (u - q sum u). Outside of the K, u/q is that of the last
// class: the gradient is one factor times the exponentials, and the K places are written over.
#include <atomic>
#include <memory>
#include <vector>

#include "js_div.h"
#include "rows.h"

namespace udi {
namespace {

namespace stat = js_div_topk_stats;

// Numbers of a call; by symmetry beta is at most 1/2.
template <class S>
struct Call {
  Constants<S> k;
  Tail tail;
  bool swapped;
  S share;  // of the gradient

  Call(int64_t tail, double beta, double temperature)
      : k(beta > 0.5 ? 1 - beta : beta, temperature), tail(Tail(tail)), swapped(beta > 0.5),
        share((k.beta == 0 ? S(1)
               : swapped   ? k.beta
                           : k.gamma) *
              k.inverse_temperature) {}
};

// Of a class: what it adds to the divergence, u, and the student's probability.
template <class V>
struct Summand {
  V loss, u, q;
};

template <class V, class S>
inline Summand<V> summand(V log_student, V log_teacher, const Call<S>& call) {
  const Constants<S>& k = call.k;
  const V log_q = call.swapped ? log_teacher : log_student, log_p = call.swapped ? log_student : log_teacher;
  Pair<V> c;
  c.d = log_p - max(splat(std::numeric_limits<S>::lowest()), log_q);  // -inf of both gives -inf; NaN stays
  c.below = c.d < k.edge;
  c.w = max(splat<S>(sizeof(S) == 4 ? -87 : -708), c.below ? c.d : -c.d);  // beyond it the other one is negligible
  c.base = exp(c.below ? log_q : log_p);
  exp_expm1(c.w, c.ratio, c.ratio_m1);
  if (k.beta == 0) {  // KL(p||q), of terms p d + q - p, which are never negative
    const V q = rounded(V(exp(log_q))), p = rounded(V(exp(log_p)));
    const V d = log_q == -INFINITY ? splat<S>(INFINITY) : c.d;
    const V term = c.base * (c.below ? c.ratio * c.w - c.ratio_m1 : d + c.ratio_m1);
    const V u = call.swapped ? (p == 0 ? V{} : p * d) : q - p;
    return {c.base == 0 ? V{} : term, u, call.swapped ? p : q};
  }
  const auto t = terms(c, k);
  const V base = t.base * t.log_base, other = t.other * t.log_other;
  const V q = c.below ? base : other, p = c.below ? other : base;
  const auto student = call.swapped ? ~c.below : c.below;  // where it is the base
  return {k.beta * p + k.gamma * q, call.swapped ? p : q, student ? t.base : t.other};
}

// A row's K classes and the last one, as logarithms of probabilities.
template <class S>
struct Support {
  std::vector<S> log_q, log_p;

  explicit Support(int64_t size) : log_q(size), log_p(size) {}

  // The teacher's side, less `log_sum`; padding is -inf.
  void teacher(const int64_t* index, const S* logprobs, S log_sum) {
    for (size_t i = 0; i + 1 < log_p.size(); ++i) log_p[i] = index[i] < 0 ? S(-INFINITY) : logprobs[i] - log_sum;
  }
};

// The logarithm of the sum of the probabilities.
template <class S>
double log_sum(const int64_t* index, const S* logprobs, int64_t size) {
  double peak = -INFINITY, sum = 0;
  for (int64_t i = 0; i < size; ++i)
    if (index[i] >= 0) peak = logprobs[i] > peak || logprobs[i] != logprobs[i] ? logprobs[i] : peak;
  for (int64_t i = 0; i < size; ++i)
    if (index[i] >= 0 && logprobs[i] != -INFINITY) sum += std::exp(logprobs[i] - peak);
  return sum == 0 ? -INFINITY : peak + std::log(sum);
}

// What is wrong with the indices of some row.
enum class Fault { kNone, kOutOfRange, kTwice };

// Fills the statistics and returns the loss. `exps`: room for the row.
template <class T>
compute_t<T> forward_row(const T* x, int64_t classes, const int64_t* index, const compute_t<T>* logprobs,
                         const Call<compute_t<T>>& call, Support<compute_t<T>>& support, compute_t<T>* exps,
                         compute_t<T>* stats, int64_t stride, std::atomic<Fault>& fault) {
  using S = compute_t<T>;
  using V = Vec<T>;
  const int64_t size = support.log_q.size() - 1;
  V peak = V{} - INFINITY;
  for_each(x, x, 0, classes, [&](V a, V, int64_t, int) { peak = max(a, peak); });
  peak = across(peak, max<V>);
  for_each(x, x, 0, classes,
           [&](V a, V, int64_t i, int) { store(exps + i, exp_negative((a - peak) * call.k.inverse_temperature)); });
  double chosen = 0;
  int64_t left = classes;
  for (int64_t i = 0; i < size; ++i) {
    support.log_q[i] = -INFINITY;
    if (index[i] == -1) continue;
    if (index[i] < -1 || index[i] >= classes) {
      fault = Fault::kOutOfRange;
      return 0;
    }
    S& e = exps[index[i]];
    if (e < 0) {
      fault = Fault::kTwice;
      return 0;
    }
    chosen += e, --left;
    e = -1;  // seen
    support.log_q[i] = (S(x[index[i]]) - peak[0]) * call.k.inverse_temperature;
  }
  for (int64_t i = 0; i < size; ++i)
    if (index[i] >= 0) exps[index[i]] = 0;
  const int64_t whole = (classes + kLanes - 1) / kLanes * kLanes;  // beyond the end they are 0
  const auto [sum] = sums<1>(exps, exps, whole, false, [](V a, V, int64_t, auto& sum) { sum[0] += a; });
  const double others = sum[0], total = others + chosen;
  for (int64_t i = 0; i < size; ++i) support.log_q[i] -= S(std::log(total));
  support.log_q[size] = S(std::log(others) - std::log(total));

  const double log_mass = call.tail == kZero ? 0 : log_sum(index, logprobs, size);
  const S divided = call.tail == kRenormalize ? S(log_mass) : S(0);
  support.teacher(index, logprobs, divided);
  const double bucket = left && call.tail == kBucket ? std::max(0., -std::expm1(log_mass)) : 0;
  support.log_p[size] = S(std::log(bucket)) + 0 * divided;  // NaN without mass to divide by

  auto [loss, mean] =
      sums<2>(support.log_q.data(), support.log_p.data(), size + 1, false, [&](V log_q, V log_p, int64_t, auto& sum) {
        const auto t = summand(log_q, log_p, call);
        sum[0] += t.loss;
        sum[1] += t.u;
      });
  const auto last = summand(splat(support.log_q[size]), splat(support.log_p[size]), call);
  stats[stat::kMax * stride] = peak[0];
  stats[stat::kInv * stride] = S(1 / total);
  stats[stat::kLogSum * stride] = divided;
  stats[stat::kMean * stride] = mean[0];
  stats[stat::kSlope * stride] = last.q[0] == 0 ? S(0) : last.u[0] / last.q[0] - mean[0];
  return loss[0] < 0 ? 0 : loss[0];  // rounding may be negative; NaN stays
}

// `grad`: dL/d(row).
template <class T>
void backward_row(const T* x, int64_t classes, const int64_t* index, const compute_t<T>* logprobs,
                  const Call<compute_t<T>>& call, Support<compute_t<T>>& support, const compute_t<T>* stats,
                  int64_t stride, compute_t<T> grad, T* to) {
  using S = compute_t<T>;
  using V = Vec<T>;
  const int64_t size = support.log_q.size() - 1;
  const S peak = stats[stat::kMax * stride], inverse = stats[stat::kInv * stride], mean = stats[stat::kMean * stride];
  const S factor = grad * call.share * inverse * stats[stat::kSlope * stride];
  for_each(x, x, 0, classes, [&](V a, V, int64_t i, int n) {
    store_some(to + i, V(factor * exp_negative((a - peak) * call.k.inverse_temperature)), n);
  });
  for (int64_t i = 0; i < size; ++i)
    support.log_q[i] =
        index[i] < 0 ? S(-INFINITY) : (S(x[index[i]]) - peak) * call.k.inverse_temperature + std::log(inverse);
  support.teacher(index, logprobs, stats[stat::kLogSum * stride]);
  for_each(support.log_q.data(), support.log_p.data(), 0, size, [&](V log_q, V log_p, int64_t i, int n) {
    const auto t = summand(log_q, log_p, call);
    const V g = grad * call.share * (t.u - t.q * mean);
    for (int lane = 0; lane < n; ++lane)
      if (index[i + lane] >= 0) to[index[i + lane]] = T(g[lane]);
  });
}

// f(row, the row's support, room for its exponentials) for all rows but the masked ones, in parallel.
template <class S, class F>
void for_each_row(int64_t rows, int64_t classes, int64_t size, const std::optional<Mask>& mask, F f) {
  if (mask) rows = mask->kept.size();
  torch::stable::parallel_for(0, rows, 1 + 4096 / classes, [&](int64_t begin, int64_t end) {
    std::unique_ptr<S[]> exps(new S[classes + kLanes]);
    Support<S> support(size + 1);
    for (int64_t i = begin; i < end; ++i) f(mask ? mask->kept[i] : i, support, exps.get());
  });
}

std::tuple<Tensor, Tensor> js_div_topk_fwd(const Tensor& input, const Tensor& indices, const Tensor& logprobs,
                                           std::optional<Tensor> weight, int64_t tail, double beta, double temperature,
                                           int64_t reduction) {
  const auto sizes = shape(input);  // clang 14 lets no lambda capture a structured binding
  const int64_t rows = std::get<0>(sizes), classes = std::get<1>(sizes), size = indices.size(1);
  const ScalarType dtype = compute_dtype(input);
  const bool weighted_mean = weight && reduction == kMean;
  Tensor stats = empty({stat::kStats + weighted_mean, rows}, dtype);
  Tensor loss = empty(reduction == kNone ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, dtype);
  std::atomic<Fault> fault = Fault::kNone;
  dispatch(input, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    const auto w = weight ? Factor<S>(*weight) : Factor<S>();
    const auto mask = weight ? std::optional<Mask>(std::in_place, rows, w) : std::nullopt;
    const Call<S> call(tail, beta, temperature);
    const Logits<T> x(input);
    const int64_t* index = static_cast<const int64_t*>(indices.data_ptr());
    const S* log_p = static_cast<const S*>(logprobs.data_ptr());
    S* kept = static_cast<S*>(stats.data_ptr());
    std::fill(kept, kept + stat::kStats * rows, S(0));
    std::vector<S> losses(rows);
    for_each_row<S>(rows, classes, size, mask, [&](int64_t r, Support<S>& support, S* exps) {
      losses[r] =
          forward_row(x[r], classes, index + r * size, log_p + r * size, call, support, exps, kept + r, rows, fault);
    });
    reduce(losses, w, mask, reduction, static_cast<S*>(loss.data_ptr()),
           weighted_mean ? kept + stat::kShare * rows : nullptr);
  });
  STD_TORCH_CHECK(fault != Fault::kOutOfRange, "js_div_topk: indices must lie in [0, ", classes,
                  "), or be -1 for padding");
  STD_TORCH_CHECK(fault != Fault::kTwice, "js_div_topk: indices of a row must be different");
  return {loss, stats};
}

Tensor js_div_topk_bwd(const Tensor& grad, const Tensor& input, const Tensor& indices, const Tensor& logprobs,
                       std::optional<Tensor> weight, const Tensor& stats, int64_t tail, double beta, double temperature,
                       int64_t reduction, bool need_input) {
  const auto sizes = shape(input);
  const int64_t rows = std::get<0>(sizes), classes = std::get<1>(sizes), size = indices.size(1);
  if (!need_input) return empty({0}, input.scalar_type());
  std::vector<int64_t> like;
  for (int64_t d = 0; d < input.dim(); ++d) like.push_back(input.size(d));
  Tensor out = empty(like, input.scalar_type());
  dispatch(input, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    const S* kept = static_cast<const S*>(stats.data_ptr());
    const Factor<S> g(grad), w = !weight              ? Factor<S>()
                                 : reduction == kMean ? Factor<S>(kept + stat::kShare * rows, 1)
                                                      : Factor<S>(*weight);
    const auto mask = weight ? std::optional<Mask>(std::in_place, rows, Factor<S>(*weight)) : std::nullopt;
    const Call<S> call(tail, beta, temperature);
    const S scale = reduction == kMean && !weight ? 1. / rows : 1.;
    const Logits<T> x(input);
    const int64_t* index = static_cast<const int64_t*>(indices.data_ptr());
    const S* log_p = static_cast<const S*>(logprobs.data_ptr());
    T* to = static_cast<T*>(out.data_ptr());
    if (mask)
      for (int64_t r : mask->masked) std::memset(static_cast<void*>(to + r * classes), 0, classes * sizeof(T));
    for_each_row<S>(rows, classes, size, mask, [&](int64_t r, Support<S>& support, S*) {
      backward_row(x[r], classes, index + r * size, log_p + r * size, call, support, kept + r, rows,
                   g[r] * w[r] * scale, to + r * classes);
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(udi_kernels, CPU, m) {
  m.impl("js_div_topk_fwd", TORCH_BOX(&js_div_topk_fwd));
  m.impl("js_div_topk_bwd", TORCH_BOX(&js_div_topk_bwd));
}

}  // namespace
}  // namespace udi
