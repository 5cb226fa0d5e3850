// Divergence and cross-entropy of a chunk of rows; their gradient replaces the student's logits.
//
// The gradients of js_div.h's divergence are (1 - beta)/T (u - q sum u) with u = q log(q/m) in the input and its mirror
// image in the target (at beta = 0: 1/T, and u = q - p or p log(p/q)). The terms u and the probabilities wait in a
// buffer of one row until their sum is known, so a row is read from memory once and its gradient written once.
#include <memory>

#include "js_div.h"

namespace udi {
namespace {

// Cross-entropy at temperature 1 of a row with this maximum; fills `probabilities`.
template <class T>
Vec<T> cross_entropy(const T* x, int64_t size, Vec<T> peak, compute_t<T> at_label, compute_t<T>* probabilities) {
  auto [sum] = sums<1>(x, x, size, false, [&](Vec<T> a, Vec<T>, int64_t i, auto& sum) {
    Vec<T> e = exp_negative(a - peak);
    store(probabilities + i, e);
    sum[0] += e;
  });
  for_each_lanes(size, [&](int64_t i, int) { store(probabilities + i, load(probabilities + i) / sum); });
  return log(sum) - (at_label - peak);
}

// Losses of the rows, each soft times the divergence plus hard times the cross-entropy. With `need_grad` the rows of x
// become the gradients. What a factor of 0 multiplies is not read.
template <class T>
void rows_loss(Rows<T> x, Rows<T> y, int64_t rows, int64_t classes, Factor<compute_t<T>> soft,
               std::optional<Factor<compute_t<T>>> hard, const int64_t* labels, double beta, double temperature,
               bool need_grad, compute_t<T>* losses) {
  using S = compute_t<T>;
  using V = Vec<T>;
  const bool swapped = beta > 0.5;  // by symmetry
  const Constants<S> k(swapped ? 1 - beta : beta, temperature);
  const int64_t width = (classes + kLanes - 1) / kLanes * kLanes;
  const S share = (swapped && k.beta != 0 ? k.beta : k.beta == 0 ? S(1) : k.gamma) * k.inverse_temperature;
  torch::stable::parallel_for(0, rows, 1 + 4096 / classes, [&](int64_t begin, int64_t end) {
    std::unique_ptr<S[]> room(new S[3 * width]);
    S *terms = room.get(), *mass = terms + width, *chosen = mass + width;
    for (int64_t r = begin; r < end; ++r) {
      T* row = x[r];
      const S h = hard ? (*hard)[r] : S(0), s = soft[r];
      V peak{}, div{}, loss{};
      if (s != 0) {
        V stats[kStats];
        loss = swapped ? forward(y[r], row, classes, false, k, terms, stats,
                                 [&](int64_t i, V, V, V p, V u) { store(terms + i, u), store(mass + i, p); })
                       : forward(static_cast<const T*>(row), y[r], classes, false, k, terms, stats,
                                 [&](int64_t i, V q, V u, V, V) { store(terms + i, u), store(mass + i, q); });
        loss = s * (loss < 0 ? V{} : loss);  // rounding may be negative; NaN stays
        peak = stats[swapped ? kMaxP : kMaxQ], div = stats[swapped ? kDivP : kDivQ];
      } else if (h != 0) {
        peak = V{} - INFINITY;
        for_each(row, row, 0, classes, [&](V a, V, int64_t, int) { peak = max(a, peak); });
        peak = across(peak, max<V>);
      }
      if (h != 0) loss += h * cross_entropy(row, classes, peak, S(row[labels[r]]), chosen);
      losses[r] = loss[0];
      if (!need_grad) continue;
      const S scale = s * share;
      for_each_lanes(classes, [&](int64_t i, int n) {
        V grad{};
        if (s != 0) {
          V p = load(mass + i), u = load(terms + i);
          grad = scale * (p == 0 ? u : u - p * div);
        }
        if (h != 0) {
          grad += h * load(chosen + i);
          if (labels[r] >= i && labels[r] < i + n) grad[labels[r] - i] -= h;
        }
        store_some(row + i, grad, n);
      });
    }
  });
}

Tensor linear_js_div_rows(Tensor input, const Tensor& target, const Tensor& soft, std::optional<Tensor> hard,
                          std::optional<Tensor> labels, double beta, double temperature, bool need_grad) {
  const int64_t rows = input.size(0), classes = input.size(1);
  Tensor losses = empty({rows}, compute_dtype(input));
  dispatch(input, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    rows_loss(Rows<T>(input), Rows<T>(target), rows, classes, Factor<S>(soft),
              hard ? std::optional(Factor<S>(*hard)) : std::nullopt,
              labels ? static_cast<const int64_t*>(labels->data_ptr()) : nullptr, beta, temperature, need_grad,
              static_cast<S*>(losses.data_ptr()));
  });
  return losses;
}

STABLE_TORCH_LIBRARY_IMPL(udi_kernels, CPU, m) { m.impl("linear_js_div_rows", TORCH_BOX(&linear_js_div_rows)); }

}  // namespace
}  // namespace udi
