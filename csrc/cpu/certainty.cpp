// Certainty-weighted fusion of M heads' logits: with s_m the largest probability of head m in a row,
//   w = softmax(s/T) over the heads, out = sum_m w_m z_m.
// A class is impossible where a head's logit is -inf: its output is -inf whatever the weights, and nothing has a
// gradient through it.
//
// Backward, with g the row's gradient and a_m = <g, z_m>:
//   d z_m = w_m g + w_m (a_m - sum_k w_k a_k)/T s_m ([z_m is the largest] - p_m),  divided among equal largest logits.
#include <cmath>
#include <functional>
#include <limits>

#include "launch.h"

namespace udi {
namespace {

constexpr int64_t kGrain = 4096;  // fewer elements do not pay for a second thread

// (M, N, C), elements of a row adjacent.
template <class T>
struct Heads {
  T* data;
  int64_t m, n, c, head_stride, row_stride;

  explicit Heads(const Tensor& t)
      : data(static_cast<T*>(t.data_ptr())), m(t.size(0)), n(t.size(1)), c(t.size(2)), head_stride(t.stride(0)),
        row_stride(t.stride(1)) {
    STD_TORCH_CHECK(c <= 1 || t.stride(2) == 1, "udi_kernels: the elements of a row must be adjacent");
  }
  T* row(int64_t head, int64_t r) const { return data + head * head_stride + r * row_stride; }
};

// Largest logit, and its probability, in one row of one head.
template <class S>
struct Certainty {
  S top, probability;
};

template <class T>
Certainty<compute_t<T>> certainty(const T* z, int64_t classes) {
  using S = compute_t<T>;
  constexpr S none = -std::numeric_limits<S>::infinity();
  Vec<S> top = splat(none), sum{};
  for_each_lanes(classes, [&](int64_t c, int n) { top = max(load_some(z + c, n, none), top); });
  top = across(top, max<Vec<S>>);
  for_each_lanes(classes, [&](int64_t c, int n) { sum += exp_negative(Vec<S>(load_some(z + c, n, none) - top)); });
  return {top[0], 1 / udi::sum(sum)};
}

// The same of `height` rows from r on, with at most 16 classes: a row in each lane, and sums in the order of
// `udi::sum`.
template <class T>
void certainties_of_few(Heads<const T> z, int64_t head, int64_t r, int height, Certainty<compute_t<T>>* to) {
  using S = compute_t<T>;
  constexpr S none = -std::numeric_limits<S>::infinity();
  Vec<S> tile[kLanes], top = splat(none);
  for (int lane = 0; lane < kLanes; ++lane)
    tile[lane] = load_some(z.row(head, r + std::min(lane, height - 1)), z.c, none);
  transpose(tile);
  for (int c = 0; c < z.c; ++c) top = max(tile[c], top);
  for (int c = 0; c < kLanes; ++c) tile[c] = c < z.c ? exp_negative(Vec<S>(tile[c] - top)) : Vec<S>{};
  for (int half = kLanes / 2; half; half /= 2)
    for (int c = 0; c < half; ++c) tile[c] += tile[c + half];
  const Vec<S> probability = 1 / tile[0];
  for (int lane = 0; lane < height; ++lane) to[lane * z.m + head] = {top[lane], probability[lane]};
}

// The heads' weights in a row, from their certainties.
template <class S>
void weights(const Certainty<S>* certainties, int64_t heads, S inverse_temperature, S* weight) {
  S top = 0, sum = 0;
  for (int64_t m = 0; m < heads; ++m) top = std::max(top, certainties[m].probability);
  for (int64_t m = 0; m < heads; ++m)
    sum += weight[m] = std::exp((certainties[m].probability - top) * inverse_temperature);
  for (int64_t m = 0; m < heads; ++m) weight[m] /= sum;
}

// f(row, its certainties, its weights, room for as many) for all rows, in parallel.
template <class T, class F>
void for_each_row(Heads<const T> z, double temperature, F f) {
  using S = compute_t<T>;
  torch::stable::parallel_for(0, z.n, 1 + kGrain / (z.m * z.c), [&](int64_t begin, int64_t end) {
    std::vector<Certainty<S>> certainties(kLanes * z.m);
    std::vector<S> weight(z.m), pull(z.m);
    for (int64_t r = begin; r < end; r += kLanes) {
      const int height = std::min<int64_t>(kLanes, end - r);
      for (int64_t m = 0; m < z.m; ++m) {
        if (z.c <= kLanes)
          certainties_of_few(z, m, r, height, certainties.data());
        else
          for (int i = 0; i < height; ++i) certainties[i * z.m + m] = certainty(z.row(m, r + i), z.c);
      }
      for (int i = 0; i < height; ++i) {
        weights(&certainties[i * z.m], z.m, S(1 / temperature), weight.data());
        f(r + i, &certainties[i * z.m], weight.data(), pull.data());
      }
    }
  });
}

Tensor certainty_fusion_fwd(const Tensor& logits, double temperature) {
  Tensor out = empty({logits.size(1), logits.size(2)}, logits.scalar_type());
  if (logits.size(1) == 0) return out;
  dispatch(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    constexpr S none = -std::numeric_limits<S>::infinity();
    Heads<const T> z(logits);
    Rows<T> to(out);
    for_each_row(z, temperature, [&](int64_t r, const Certainty<S>*, const S* weight, S*) {
      for_each_lanes(z.c, [&](int64_t c, int n) {
        Vec<S> sum{};
        for (int64_t m = 0; m < z.m; ++m) {
          const Vec<S> x = load_some(z.row(m, r) + c, n, S(0)), w = splat(weight[m]);
          sum = x == none ? sum + (w + x) : sum + w * x;  // a weight of 0 too leaves -inf
        }
        store_some(to[r] + c, sum, n);
      });
    });
  });
  return out;
}

Tensor certainty_fusion_bwd(const Tensor& grad, const Tensor& logits, double temperature, bool need_logits) {
  if (!need_logits) return empty({0}, logits.scalar_type());
  Tensor out = empty({logits.size(0), logits.size(1), logits.size(2)}, logits.scalar_type());
  if (logits.size(1) == 0) return out;
  dispatch(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    constexpr S none = -std::numeric_limits<S>::infinity();
    Heads<const T> z(logits);
    Heads<T> to(out);
    Rows<const T> g(grad);
    for_each_row(z, temperature, [&](int64_t r, const Certainty<S>* certainties, const S* weight, S* pull) {
      const T* own = g[r];
      auto pulls = [&](S impossible) {  // counts logits of -inf as that
        S mean = 0;
        for (int64_t m = 0; m < z.m; ++m) {
          Vec<S> sum{};
          for_each_lanes(z.c, [&](int64_t c, int n) {
            const Vec<S> x = load_some(z.row(m, r) + c, n, S(0));
            sum += load_some(own + c, n, S(0)) * (x == none ? splat(impossible) : x);
          });
          mean += weight[m] * (pull[m] = udi::sum(sum));
        }
        return mean;
      };
      S mean = pulls(none);
      std::vector<T> possible;
      if (!std::isfinite(mean)) {  // an impossible class, or something worse
        possible.assign(own, own + z.c);
        for (int64_t m = 0; m < z.m; ++m)
          for (int64_t c = 0; c < z.c; ++c)
            if (S(z.row(m, r)[c]) == none) possible[c] = T(0);
        own = possible.data();
        mean = pulls(0);
      }
      for (int64_t m = 0; m < z.m; ++m) {
        const T* from = z.row(m, r);
        const S top = certainties[m].top, probability = certainties[m].probability;  // names that a lambda may capture
        Vec<S> largest{};
        for_each_lanes(
            z.c, [&](int64_t c, int n) { largest += load_some(from + c, n, none) == top ? splat(S(1)) : Vec<S>{}; });
        const S factor = weight[m] * (pull[m] - mean) * S(1 / temperature) * probability, share = 1 / udi::sum(largest);
        for_each_lanes(z.c, [&](int64_t c, int n) {
          Vec<S> x = load_some(from + c, n, none), p = exp_negative(Vec<S>(x - top)) * probability;
          p = (x == top ? splat(share) : Vec<S>{}) - p;
          store_some(to.row(m, r) + c, Vec<S>(weight[m] * load_some(own + c, n, S(0)) + factor * p), n);
        });
      }
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(udi_kernels, CPU, m) {
  m.impl("certainty_fusion_fwd", TORCH_BOX(&certainty_fusion_fwd));
  m.impl("certainty_fusion_bwd", TORCH_BOX(&certainty_fusion_bwd));
}

}  // namespace
}  // namespace udi
