// The arithmetic of the generalized Jensen-Shannon divergence of two rows of logits, and of skew KL, one of its halves
// alone.
//
// With z = (x - max)/T for both rows, q = e^zq / sum_q and p = e^zp / sum_p, let d = log(p/q) = zp - zq -
// log(sum_p/sum_q) and beta at most 1/2; otherwise the rows are swapped. Where (1 - beta) q is the larger part of m,
// base = q, w = d and c = beta; elsewhere base = p, w = -d and c = 1 - beta. m/base = (1 - c) + c e^w is a sum in which
// nothing cancels; near 1, 1 + c expm1(w) has more digits. Its logarithm L gives log(base/m) = -L, and w - L for the
// other of q and p, which is base e^w: finite for all finite logits, exactly 0 for equal rows, accurate for any beta,
// and for nearly equal rows, where the divergence is of second order in d. Large logits lose no digits, because the
// maximum and the logarithm of the sum are never added.
//
// Skew KL is KL(r || m), r being p or q and s the other one. With v = m/r - 1, its terms are r (v - log(1 + v)), of
// second order in v. Its gradients need u = (r - m)/m, a multiple of e^w - 1 over m/base, and the slope D = log(r/m) -
// c u, where c is r's weight in m.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <limits>

#include "launch.h"

namespace udi {
namespace {

constexpr int64_t kChunk = 256;  // elements, 16 a lane, summed in the compute type before they join a double

using namespace js_div_stats;  // names of the statistics

// The whole divergence, or KL(q || m) or KL(p || m) alone.
enum class Part { kBoth, kQ, kP };

template <class S>
struct Constants {
  S gamma, beta, edge, inverse_temperature;  // gamma = 1 - beta; beta p < gamma q where d < edge
  bool even;                                 // 1 + c expm1(w) is never small, so that little cancels in it
  Part part;

  Constants(double b, double temperature, Part part = Part::kBoth)
      : gamma(1 - b), beta(b), edge(0), inverse_temperature(1 / temperature), even(b > 0.25), part(part) {
    if (even) beta = 1 - gamma;  // exact, so that they add up to 1
    if (b > 0) beta = std::max(beta, std::numeric_limits<S>::min()), edge = std::log(gamma / beta);
  }

  // Of KL(r || m): the weight in m of r, and of s.
  S own() const { return part == Part::kQ ? gamma : beta; }
  S others() const { return part == Part::kQ ? beta : gamma; }
};

// f(x, y, offset, lanes) for every 16 elements of two rows; what lies beyond the end reads as probability 0.
template <class T, class F>
inline void for_each(const T* x, const T* y, int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(load(x + i), load(y + i), i, kLanes);
  if (int rest = end - i) f(load(x + i, rest, -INFINITY), load(y + i, rest, -INFINITY), i, rest);
}

// Sums n terms, which f(x, y, offset, sums) adds, over a row: each lane its own (packed) or all lanes together.
template <int n, class T, class F>
inline std::array<Vec<T>, n> sums(const T* x, const T* y, int64_t size, bool packed, F f) {
  std::array<Doubles, n> total{};
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    std::array<Vec<T>, n> chunk{};
    for_each(x, y, begin, std::min(begin + kChunk, size), [&](auto a, auto b, int64_t i, int) { f(a, b, i, chunk); });
    for (int i = 0; i < n; ++i) total[i] += __builtin_convertvector(chunk[i], Doubles);
  }
  std::array<Vec<T>, n> result;
  for (int i = 0; i < n; ++i)
    result[i] = __builtin_convertvector(packed ? total[i] : across(total[i], std::plus<Doubles>()), Vec<T>);
  return result;
}

// d = log(p/q), the base, w, the ratio e^w of the other one to it, and ratio - 1.
template <class V>
struct Pair {
  V d, base, w, ratio, ratio_m1;
  decltype(V{} < V{}) below;  // d < edge: the base is q; NaN is not
};

// log_sums: log(sum_p / sum_q). exponential(below, x, y) is e^zq where below and e^zp elsewhere, of x = T zq, y = T zp.
template <class V, class S, class F>
inline Pair<V> compare(V x, V y, const V* stats, V log_sums, Constants<S> k, F exponential) {
  Pair<V> c;
  x -= stats[kMaxQ], y -= stats[kMaxP];
  // The clamps take infinities out of the differences; NaN stays.
  c.d = (y - max(splat<S>(std::numeric_limits<S>::lowest()), x)) * k.inverse_temperature - log_sums;
  c.below = c.d < k.edge;
  c.w = max(splat<S>(sizeof(S) == 4 ? -87 : -708), c.below ? c.d : -c.d);  // beyond it the other one is negligible
  c.base = exponential(c.below, x, y) * (c.below ? stats[kInvQ] : stats[kInvP]);
  exp_expm1(c.w, c.ratio, c.ratio_m1);
  return c;
}

template <class V>
struct Terms {
  V base, other, log_base, log_other;  // the logarithms over m
};

template <class V, class S>
inline Terms<V> terms(const Pair<V>& c, Constants<S> k) {
  V share = c.below ? splat(k.beta) : splat(k.gamma), m_m1 = share * c.ratio_m1, L;
  if (k.even)
    L = log1p(m_m1);
  else
    L = log((c.below ? splat(k.gamma) : splat(k.beta)) + share * c.ratio, m_m1);
  return {c.base, c.base * c.ratio, -L, c.w - L};
}

// v - log(1 + v) for |v| <= 1/3, with the relative accuracy of a small v: with t = v/(2 + v), log(1 + v) = 2 artanh t.
template <class V>
inline V log1p_rest(V v) {
  constexpr int kTerms = sizeof(v[0]) == 4 ? 5 : 11;
  V t = v / (2 + v), t2 = t * t, series{};
  for (int i = kTerms; i > 0; --i) series = series * t2 + 1 / decltype(v[0] + 0)(2 * i + 1);
  return t * (v - 2 * t2 * series);
}

// Of KL(r || m): both sides, u, the term and the slope D.
template <class V>
struct Skew {
  V r, s, u, term, slope;
};

template <class V, class S>
inline Skew<V> skew(const Pair<V>& c, Constants<S> k) {
  const auto t = terms(c, k);
  const auto base = k.part == Part::kQ ? c.below : ~c.below;        // where r is the base
  const V excess = k.others() * (base ? -c.ratio_m1 : c.ratio_m1);  // (r - m)/base
  const V m = (c.below ? splat(k.gamma) : splat(k.beta)) + (c.below ? splat(k.beta) : splat(k.gamma)) * c.ratio;
  const V r = base ? t.base : t.other, log_r = base ? t.log_base : t.log_other, u = excess / m;
  const V v = -excess / (base ? splat(S(1)) : c.ratio), h = log1p_rest(v);
  const auto near = max(v, -v) < S(1) / 3;  // elsewhere little cancels
  return {r, base ? t.other : t.base, u, near ? r * h : r * log_r - t.base * excess,
          near ? h + (k.others() + v) * u : log_r - k.own() * u};
}

// Keeps the compiler from contracting a probability with a later subtraction, so that equal ones give exactly 0.
template <class V>
inline V rounded(V probability) {
  return max(V{}, probability);
}

// At beta = 0, log(p/q): +inf where only q is 0, whose logit was clamped.
template <class V, class S>
inline V log_ratio(const Pair<V>& c, V x, const V* stats, Constants<S> k) {
  return x - stats[kMaxQ] == -INFINITY ? splat<S>(INFINITY) : c.d;
}

// The maxima, no less than `least`.
template <class T>
void maxima(const T* x, const T* y, int64_t size, bool packed, Vec<T> least, Vec<T>* stats) {
  Vec<T> max_q = least, max_p = least;
  for_each(x, y, 0, size, [&](Vec<T> a, Vec<T> b, int64_t, int) {
    max_q = max(a, max_q);
    max_p = max(b, max_p);
  });
  if (!packed) max_q = across(max_q, max<Vec<T>>), max_p = across(max_p, max<Vec<T>>);
  stats[kMaxQ] = max_q, stats[kMaxP] = max_p;
}

// Fills `exps` with both rows' exponentials, each of `size` rounded up to whole vectors, and returns their sums.
template <class T>
std::array<Vec<T>, 2> exponentials(const T* x, const T* y, int64_t size, bool packed, Constants<compute_t<T>> k,
                                   const Vec<T>* stats, compute_t<T>* exps) {
  using V = Vec<T>;
  const V max_q = stats[kMaxQ], max_p = stats[kMaxP];
  compute_t<T>*exps_q = exps, *exps_p = exps + (size + kLanes - 1) / kLanes * kLanes;
  return sums<2>(x, y, size, packed, [&](V a, V b, int64_t i, auto& sum) {
    V q = exp_negative((a - max_q) * k.inverse_temperature), p = exp_negative((b - max_p) * k.inverse_temperature);
    store(exps_q + i, q);
    store(exps_p + i, p);
    sum[0] += q;
    sum[1] += p;
  });
}

struct Nothing {
  template <class... A>
  void operator()(A...) const {}
};

// The divergences, into `stats`, and the loss, given maxima and inverse sums. keep(offset, q, terms of KL(q||m), p,
// terms of KL(p||m)) gets what the gradients of the whole divergence are made of, after the last use of the
// exponentials there; at beta = 0 the terms are those of the statistics.
template <class T, class F = Nothing>
Vec<T> divergences(const T* x, const T* y, int64_t size, bool packed, Constants<compute_t<T>> k,
                   const compute_t<T>* exps, Vec<T>* stats, F keep = {}) {
  using V = Vec<T>;
  const compute_t<T>*exps_q = exps, *exps_p = exps + (size + kLanes - 1) / kLanes * kLanes;
  V log_sums = log(stats[kInvQ] / stats[kInvP]);
  const auto compared = [&](V a, V b, int64_t i) {
    auto exponential = [&](auto below, V, V) { return below ? load(exps_q + i) : load(exps_p + i); };
    return compare(a, b, stats, log_sums, k, exponential);
  };
  if (k.beta == 0) {  // KL(p||q), of terms p d + q - p, which are never negative
    auto [total, div, rest] = sums<3>(x, y, size, packed, [&](V a, V b, int64_t i, auto& sum) {
      auto c = compared(a, b, i);
      V q = rounded(load(exps_q + i) * stats[kInvQ]), p = rounded(load(exps_p + i) * stats[kInvP]);
      V d = log_ratio(c, a, stats, k);
      V term = c.base * (c.below ? c.ratio * c.w - c.ratio_m1 : d + c.ratio_m1);
      V div_q = q - p, div_p = p == 0 ? V{} : p * d;
      sum[0] += c.base == 0 ? V{} : term;
      sum[1] += div_p;
      sum[2] += div_q;
      keep(i, q, div_q, p, div_p);
    });
    stats[kDivQ] = rest, stats[kDivP] = div;
    return total;
  }
  if (k.part != Part::kBoth) {
    auto [own, others, loss] = sums<3>(x, y, size, packed, [&](V a, V b, int64_t i, auto& sum) {
      auto t = skew(compared(a, b, i), k);
      sum[0] += t.r * t.slope;
      sum[1] += t.s * t.u;
      sum[2] += t.term;
    });
    stats[k.part == Part::kQ ? kDivQ : kDivP] = own, stats[k.part == Part::kQ ? kDivP : kDivQ] = others;
    return loss;
  }
  // The loss is not computed from the two divergences, whose terms are of first order in d; its own are of second.
  auto [div_q, div_p, loss] = sums<3>(x, y, size, packed, [&](V a, V b, int64_t i, auto& sum) {
    auto c = compared(a, b, i);
    auto t = terms(c, k);
    V base = t.base * t.log_base, other = t.other * t.log_other;
    V q = c.below ? base : other, p = c.below ? other : base;
    sum[0] += q;
    sum[1] += p;
    sum[2] += k.beta * p + k.gamma * q;
    keep(i, c.below ? t.base : t.other, q, c.below ? t.other : t.base, p);
  });
  stats[kDivQ] = div_q, stats[kDivP] = div_p;
  return loss;
}

// Fills `stats`, returns the loss: in each lane that of its own row (packed), or the same in all. `exps`: room for both
// rows' exponentials.
template <class T, class F = Nothing>
Vec<T> forward(const T* x, const T* y, int64_t size, bool packed, Constants<compute_t<T>> k, compute_t<T>* exps,
               Vec<T>* stats, F keep = {}) {
  maxima(x, y, size, packed, Vec<T>{} - INFINITY, stats);
  auto [sum_q, sum_p] = exponentials(x, y, size, packed, k, stats, exps);
  stats[kInvQ] = 1 / sum_q, stats[kInvP] = 1 / sum_p;
  return divergences(x, y, size, packed, k, exps, stats, keep);
}

}  // namespace
}  // namespace udi
