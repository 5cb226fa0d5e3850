// Generalized Jensen-Shannon divergence of rows of logits, and skew KL; their arithmetic is in js_div.h.
#include "js_div.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "rows.h"

namespace udi {
namespace {

// Work is done in blocks of 16 lanes: a row of many classes is read 16 elements at a time; rows of few classes are
// packed, one row per lane, so that 6 classes do not leave 10 lanes idle.
constexpr int64_t kPackedClasses = 128;

// f(pair, x, y, put) for every 16 elements; put(to, v) stores there.
template <class T, class F>
inline void for_each_compared(const T* x, const T* y, int64_t size, Constants<compute_t<T>> k, const Vec<T>* stats,
                              F f) {
  using V = Vec<T>;
  V log_sums = log(stats[kInvQ] / stats[kInvP]);
  auto exponential = [&](auto below, V a, V b) { return exp_negative((below ? a : b) * k.inverse_temperature); };
  for_each(x, y, 0, size, [&](V a, V b, int64_t i, int n) {
    f(compare(a, b, stats, log_sums, k, exponential), a, b, [&](T* to, V v) { store_some(to + i, v, n); });
  });
}

// Those of KL(r||m), with a the weight of s in m, are r/T (D - sum r D) and a/T s (sum s u - u).
template <class T>
void backward_skew(const T* x, const T* y, int64_t size, Constants<compute_t<T>> k, const Vec<T>* stats, Vec<T> grad,
                   T* grad_x, T* grad_y) {
  using V = Vec<T>;
  const bool q = k.part == Part::kQ;
  T *own = q ? grad_x : grad_y, *others = q ? grad_y : grad_x;
  for_each_compared(x, y, size, k, stats, [&](const Pair<V>& c, V, V, auto put) {
    auto t = skew(c, k);
    V scale = grad * k.inverse_temperature;
    if (own) put(own, scale * t.r * (t.slope - stats[q ? kDivQ : kDivP]));
    if (others) put(others, scale * k.others() * t.s * (stats[q ? kDivP : kDivQ] - t.u));
  });
}

// d input = (1 - beta)/T q (log(q/m) - KL(q||m)), d target its mirror image; at beta = 0 they are (q - p)/T and
// p/T (log(p/q) - KL(p||q)). `grad` is dL/d(row) in every lane. Flattened, because GCC otherwise leaves calls in the
// loop, which then takes a fifth longer.
template <class T>
[[gnu::flatten]] void backward_both(const T* x, const T* y, int64_t size, Constants<compute_t<T>> k,
                                    const Vec<T>* stats, Vec<T> grad, T* grad_x, T* grad_y) {
  using V = Vec<T>;
  if (k.beta == 0) {  // less the rounding errors of the sums of these terms, so that those of the sums of e^z cancel
    for_each_compared(x, y, size, k, stats, [&](const Pair<V>& c, V a, V b, auto put) {
      V q = rounded(exp_negative((a - stats[kMaxQ]) * k.inverse_temperature) * stats[kInvQ]);
      V p = rounded(exp_negative((b - stats[kMaxP]) * k.inverse_temperature) * stats[kInvP]);
      V scale = grad * k.inverse_temperature;
      if (grad_x) put(grad_x, scale * (q - p - q * stats[kDivQ]));
      if (grad_y) put(grad_y, p == 0 ? V{} : V(scale * p * (log_ratio(c, a, stats, k) - stats[kDivP])));
    });
    return;
  }
  V scale_q = grad * (k.gamma * k.inverse_temperature), scale_p = grad * (k.beta * k.inverse_temperature);
  for_each_compared(x, y, size, k, stats, [&](const Pair<V>& c, V, V, auto put) {
    auto s = terms(c, k);
    auto q = [&](V base, V other) { return c.below ? base : other; };
    auto p = [&](V base, V other) { return c.below ? other : base; };
    if (grad_x) put(grad_x, scale_q * q(s.base, s.other) * (q(s.log_base, s.log_other) - stats[kDivQ]));
    if (grad_y) put(grad_y, scale_p * p(s.base, s.other) * (p(s.log_base, s.log_other) - stats[kDivP]));
  });
}

// Both sides' gradients, or one's. At beta = 0 skew KL is KL(p||q) too.
template <class T>
void backward(const T* x, const T* y, int64_t size, Constants<compute_t<T>> k, const Vec<T>* stats, Vec<T> grad,
              T* grad_x, T* grad_y) {
  const auto f = k.part == Part::kBoth || k.beta == 0 ? backward_both<T> : backward_skew<T>;
  f(x, y, size, k, stats, grad, grad_x, grad_y);
}

// Up to 16 rows, each in a lane; lanes without a row repeat the last.
struct Block {
  int64_t row[kLanes];
  int height;
};

// Where the rows of a block begin, and whether their elements of a class are adjacent.
template <class T>
struct Lanes {
  T* at[kLanes];
  bool adjacent = true;

  Lanes(Logits<T> logits, const Block& block) {
    for (int lane = 0; lane < kLanes; ++lane) at[lane] = logits[block.row[lane]];
    if (logits.step != 1)
      for (int lane = 0; lane < block.height; ++lane) adjacent = adjacent && at[lane] == at[0] + lane;
  }
};

// The element of class c in a lane's row goes to this lane of step c.
template <class T>
void pack(Logits<T> from, const Block& block, int64_t classes, compute_t<T>* to) {
  const Lanes<T> lanes(from, block);
  if (from.step != 1) {
    for (int64_t c = 0; c < classes; ++c) {
      T gathered[kLanes];
      const T* at = lanes.at[0] + c * from.step;
      if (!lanes.adjacent) {
        for (int lane = 0; lane < kLanes; ++lane) gathered[lane] = lanes.at[lane][c * from.step];
        at = gathered;
      }
      store(to + c * kLanes, load_some(at, lanes.adjacent ? block.height : kLanes));
    }
    return;
  }
  for (int64_t c = 0; c < classes; c += kLanes) {
    int width = std::min<int64_t>(kLanes, classes - c);
    Vec<T> tile[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) tile[lane] = load_some<T>(lanes.at[lane] + c, width);
    transpose(tile);
    for (int i = 0; i < width; ++i) store(to + (c + i) * kLanes, tile[i]);
  }
}

template <class T>
void unpack(const compute_t<T>* from, Logits<T> to, const Block& block, int64_t classes) {
  const Lanes<T> lanes(to, block);
  if (to.step != 1) {
    for (int64_t c = 0; c < classes; ++c) {
      Vec<T> v = load(from + c * kLanes);
      if (lanes.adjacent) {
        store_some(lanes.at[0] + c * to.step, v, block.height);
      } else {
        T scattered[kLanes];
        store(scattered, v);
        for (int lane = 0; lane < block.height; ++lane) lanes.at[lane][c * to.step] = scattered[lane];
      }
    }
    return;
  }
  for (int64_t c = 0; c < classes; c += kLanes) {
    int width = std::min<int64_t>(kLanes, classes - c);
    Vec<T> tile[kLanes];
    for (int i = 0; i < kLanes; ++i) tile[i] = load(from + (c + std::min(i, width - 1)) * kLanes);
    transpose(tile);
    for (int lane = 0; lane < block.height; ++lane) store_some<T>(lanes.at[lane] + c, tile[lane], width);
  }
}

// f(block, room for 4 rows) for all rows but the masked ones, in parallel.
template <class S, class F>
void for_each_block(int64_t rows, int64_t classes, bool packed, const std::optional<Mask>& mask, F f) {
  if (mask) rows = mask->kept.size();
  int64_t height = packed ? kLanes : 1;
  int64_t grain = 1 + 4096 / (height * classes);  // fewer elements do not pay for a second thread
  torch::stable::parallel_for(0, (rows + height - 1) / height, grain, [&](int64_t begin, int64_t end) {
    Vec<S> few[4 * kPackedClasses];  // uninitialised; malloc takes longer than a block of few classes
    std::unique_ptr<Vec<S>[]> many(
        height * classes > kLanes * kPackedClasses ? new Vec<S>[4 * (height * classes / kLanes + 1)] : nullptr);
    S* room = reinterpret_cast<S*>(many ? many.get() : few);
    for (int64_t b = begin; b < end; ++b) {
      Block block;
      block.height = std::min(height, rows - b * height);
      for (int lane = 0; lane < kLanes; ++lane) block.row[lane] = b * height + std::min(lane, block.height - 1);
      if (mask)
        for (int64_t& row : block.row) row = mask->kept[row];
      f(block, room);
    }
  });
}

// f(block, x, y, size, packed, room for the exponentials of both) for all rows but the masked ones, in parallel.
template <class T, class F>
void for_each_pair(Logits<T> x, Logits<T> y, int64_t rows, int64_t classes, const std::optional<Mask>& mask, F f) {
  using S = compute_t<T>;
  const bool packed = classes <= kPackedClasses || x.step != 1 || y.step != 1;
  for_each_block<S>(rows, classes, packed, mask, [&](const Block& block, S* room) {
    if (packed) {
      int64_t size = classes * kLanes;
      pack(x, block, classes, room);
      pack(y, block, classes, room + size);
      f(block, room, room + size, size, true, room + 2 * size);
    } else {
      f(block, x[block.row[0]], y[block.row[0]], classes, false, room);
    }
  });
}

// Results of masked rows stay as they are.
template <class T>
void forward_rows(Logits<T> x, Logits<T> y, int64_t rows, int64_t classes, const std::optional<Mask>& mask,
                  Constants<compute_t<T>> k, compute_t<T>* stats, compute_t<T>* loss) {
  for_each_pair(
      x, y, rows, classes, mask, [&](const Block& block, auto* a, auto* b, int64_t size, bool packed, auto* exps) {
        Vec<T> block_stats[kStats], block_loss = forward(a, b, size, packed, k, exps, block_stats);
        for (int lane = 0; lane < block.height; ++lane) {
          loss[block.row[lane]] = block_loss[lane] < 0 ? 0 : block_loss[lane];  // rounding may be negative; NaN stays
          for (int i = 0; i < kStats; ++i) stats[i * rows + block.row[lane]] = block_stats[i][lane];
        }
      });
}

template <class T>
void backward_rows(Logits<T> x, Logits<T> y, int64_t rows, int64_t classes, const std::optional<Mask>& mask,
                   Constants<compute_t<T>> k, const compute_t<T>* stats, Factor<compute_t<T>> grad,
                   Factor<compute_t<T>> weight, compute_t<T> scale, Logits<T> grad_x, Logits<T> grad_y) {
  using S = compute_t<T>;
  if (mask)
    torch::stable::parallel_for(0, mask->masked.size(), 1 + 4096 / classes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (Logits<T> to : {grad_x, grad_y})
          if (to && to.step == 1)
            std::memset(static_cast<void*>(to[mask->masked[i]]), 0, classes * sizeof(T));
          else if (to)
            for (int64_t c = 0; c < classes; ++c) to[mask->masked[i]][c * to.step] = T(0);
    });
  const bool packed = classes <= kPackedClasses || x.step != 1 || y.step != 1;
  for_each_block<S>(rows, classes, packed, mask, [&](const Block& block, S* room) {
    Vec<T> block_stats[kStats] = {}, g{};
    for (int lane = 0; lane < kLanes; ++lane) {
      int64_t r = block.row[lane];
      for (int i = 0; i < kStats; ++i) block_stats[i][lane] = stats[i * rows + r];
      g[lane] = grad[r] * weight[r] * scale;
    }
    if (packed) {
      S *a = room, *b = room + classes * kLanes;
      pack(x, block, classes, a);
      pack(y, block, classes, b);
      // The gradients overwrite their logits.
      backward(a, b, classes * kLanes, k, block_stats, g, grad_x ? a : nullptr, grad_y ? b : nullptr);
      if (grad_x) unpack(a, grad_x, block, classes);
      if (grad_y) unpack(b, grad_y, block, classes);
    } else {
      int64_t r = block.row[0];
      backward(x[r], y[r], classes, k, block_stats, g, grad_x ? grad_x[r] : nullptr, grad_y ? grad_y[r] : nullptr);
    }
  });
}

// A dense gradient, its dimensions in the order of the logits' strides, as `gradient_like` in _js_div.py makes it;
// empty where it is not needed.
Tensor empty_logits(const Tensor& like, bool needed) {
  if (!needed) return empty({0}, like.scalar_type());
  if (like.dim() == 2 && like.stride(1) == 1) return empty({like.size(0), like.size(1)}, like.scalar_type());
  std::vector<int64_t> order(like.dim()), sizes(like.dim()), strides(like.dim());
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](int64_t d) { return like.stride(d) ? like.stride(d) : std::numeric_limits<int64_t>::max(); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(a) > key(b); });
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = stride;
    stride *= std::max<int64_t>(sizes[order[i]] = like.size(order[i]), 1);
  }
  return empty(sizes, like.scalar_type(), strides);
}

Part mirrored(Part part) { return part == Part::kP ? Part::kQ : part == Part::kQ ? Part::kP : part; }

std::tuple<Tensor, Tensor> divergence_fwd(const Tensor& input, const Tensor& target,
                                          const std::optional<Tensor>& weight, double beta, double temperature,
                                          int64_t reduction, Part part) {
  if (beta > 0.5)  // by symmetry
    return divergence_fwd(target, input, weight, 1 - beta, temperature, reduction, mirrored(part));
  const auto size = shape(input);  // clang 14 lets no lambda capture a structured binding
  const int64_t rows = std::get<0>(size), classes = std::get<1>(size);
  ScalarType dtype = compute_dtype(input);
  const bool weighted_mean = weight && reduction == kMean;
  Tensor stats = empty({kStats + weighted_mean, rows}, dtype);
  Tensor loss = empty(reduction == kNone ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, dtype);
  dispatch(input, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    auto w = weight ? Factor<S>(*weight) : Factor<S>();
    auto mask = weight ? std::optional<Mask>(std::in_place, rows, w) : std::nullopt;
    S* kept = static_cast<S*>(stats.data_ptr());
    if (mask)
      for (int i = 0; i < kStats; ++i)
        for (int64_t r : mask->masked) kept[i * rows + r] = 0;
    std::vector<S> row_loss(rows);
    forward_rows(Logits<T>(input), Logits<T>(target), rows, classes, mask, Constants<S>(beta, temperature, part), kept,
                 row_loss.data());
    reduce(row_loss, w, mask, reduction, static_cast<S*>(loss.data_ptr()),
           weighted_mean ? kept + kShare * rows : nullptr);
  });
  return {loss, stats};
}

// Writes the gradients that are not null. They may be the logits themselves.
void write_gradients(const Tensor& grad, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                     const Tensor& stats, double beta, double temperature, int64_t reduction, const Tensor* grad_input,
                     const Tensor* grad_target, Part part) {
  if (beta > 0.5)
    return write_gradients(grad, target, input, weight, stats, 1 - beta, temperature, reduction, grad_target,
                           grad_input, mirrored(part));
  const auto size = shape(input);  // clang 14 lets no lambda capture a structured binding
  const int64_t rows = std::get<0>(size), classes = std::get<1>(size);
  dispatch(input, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    auto kept = static_cast<const S*>(stats.data_ptr());
    auto factor = !weight ? Factor<S>() : reduction == kMean ? Factor<S>(kept + kShare * rows, 1) : Factor<S>(*weight);
    auto mask = weight ? std::optional<Mask>(std::in_place, rows, Factor<S>(*weight)) : std::nullopt;
    backward_rows(Logits<T>(input), Logits<T>(target), rows, classes, mask, Constants<S>(beta, temperature, part), kept,
                  Factor<S>(grad), factor, S(reduction == kMean && !weight ? 1. / rows : 1.),
                  grad_input ? Logits<T>(*grad_input) : Logits<T>(),
                  grad_target ? Logits<T>(*grad_target) : Logits<T>());
  });
}

std::tuple<Tensor, Tensor> divergence_bwd(const Tensor& grad, const Tensor& input, const Tensor& target,
                                          const std::optional<Tensor>& weight, const Tensor& stats, double beta,
                                          double temperature, int64_t reduction, bool need_input, bool need_target,
                                          Part part) {
  Tensor grad_input = empty_logits(input, need_input), grad_target = empty_logits(target, need_target);
  write_gradients(grad, input, target, weight, stats, beta, temperature, reduction, need_input ? &grad_input : nullptr,
                  need_target ? &grad_target : nullptr, part);
  return {grad_input, grad_target};
}

std::tuple<Tensor, Tensor> js_div_fwd(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                                      double beta, double temperature, int64_t reduction) {
  return divergence_fwd(input, target, weight, beta, temperature, reduction, Part::kBoth);
}

std::tuple<Tensor, Tensor> js_div_bwd(const Tensor& grad, const Tensor& input, const Tensor& target,
                                      std::optional<Tensor> weight, const Tensor& stats, double beta,
                                      double temperature, int64_t reduction, bool need_input, bool need_target) {
  return divergence_bwd(grad, input, target, weight, stats, beta, temperature, reduction, need_input, need_target,
                        Part::kBoth);
}

// The input becomes its gradient; returns the target's.
Tensor js_div_bwd_inplace(const Tensor& grad, const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                          const Tensor& stats, double beta, double temperature, int64_t reduction, bool need_target) {
  Tensor grad_target = empty_logits(target, need_target);
  write_gradients(grad, input, target, weight, stats, beta, temperature, reduction, &input,
                  need_target ? &grad_target : nullptr, Part::kBoth);
  return grad_target;
}

// KL(p || alpha p + (1 - alpha) q); its reverse is the same with the sides exchanged.
std::tuple<Tensor, Tensor> skew_kl_fwd(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                                       double alpha, bool reverse, double temperature, int64_t reduction) {
  return divergence_fwd(reverse ? target : input, reverse ? input : target, weight, alpha, temperature, reduction,
                        Part::kP);
}

std::tuple<Tensor, Tensor> skew_kl_bwd(const Tensor& grad, const Tensor& input, const Tensor& target,
                                       std::optional<Tensor> weight, const Tensor& stats, double alpha, bool reverse,
                                       double temperature, int64_t reduction, bool need_input, bool need_target) {
  auto [grad_q, grad_p] =
      divergence_bwd(grad, reverse ? target : input, reverse ? input : target, weight, stats, alpha, temperature,
                     reduction, reverse ? need_target : need_input, reverse ? need_input : need_target, Part::kP);
  return reverse ? std::tuple(grad_p, grad_q) : std::tuple(grad_q, grad_p);
}

// Where processes have parts of the classes, a forward pass has these two steps, and an exchange after each. beta is at
// most 1/2.

// (n, R): what f(type, block, x, y, size, packed, room for the exponentials) returns for each row, 0 for masked ones.
template <size_t n, class F>
Tensor of_part(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight, F f) {
  const auto size = shape(input);
  const int64_t rows = std::get<0>(size), classes = std::get<1>(size);
  Tensor out = empty({n, rows}, compute_dtype(input));
  dispatch(input, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    auto mask = weight ? std::optional<Mask>(std::in_place, rows, Factor<S>(*weight)) : std::nullopt;
    S* to = static_cast<S*>(out.data_ptr());
    std::fill(to, to + n * rows, S(0));
    for_each_pair(Logits<T>(input), Logits<T>(target), rows, classes, mask, [&](const Block& block, auto... pair) {
      std::array<Vec<T>, n> results = f(type, block, pair...);
      for (int lane = 0; lane < block.height; ++lane)
        for (size_t i = 0; i < n; ++i) to[i * rows + block.row[lane]] = results[i][lane];
    });
  });
  return out;
}

// Maximum and sum of exponentials of the input, the same of the target. The maximum of nothing is the lowest number.
Tensor js_div_part_sums(const Tensor& input, const Tensor& target, std::optional<Tensor> weight, double temperature) {
  const auto sums = [=](auto* type, const Block&, auto* x, auto* y, int64_t size, bool packed, auto* exps) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Vec<T> stats[kStats];
    maxima(x, y, size, packed, splat(std::numeric_limits<S>::lowest()), stats);
    auto [q, p] = exponentials(x, y, size, packed, Constants<S>(0, temperature), stats, exps);
    return std::array<Vec<T>, 4>{stats[kMaxQ], q, stats[kMaxP], p};
  };
  return of_part<4>(input, target, weight, sums);
}

// The part of both divergences and of the loss, given the sums of all parts.
Tensor js_div_part_divergences(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                               const Tensor& sums, double beta, double temperature) {
  const int64_t rows = sums.size(1);
  const void* data = sums.data_ptr();
  const auto parts = [=](auto* type, const Block& block, auto* x, auto* y, int64_t size, bool packed, auto* exps) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Vec<T> stats[kStats];
    for (int i : {kMaxQ, kInvQ, kMaxP, kInvP})
      for (int lane = 0; lane < kLanes; ++lane)
        stats[i][lane] = static_cast<const S*>(data)[i * rows + block.row[lane]];
    stats[kInvQ] = 1 / stats[kInvQ], stats[kInvP] = 1 / stats[kInvP];
    const Constants<S> k(beta, temperature);
    exponentials(x, y, size, packed, k, stats, exps);
    Vec<T> loss = divergences(x, y, size, packed, k, exps, stats);
    return std::array<Vec<T>, 3>{stats[kDivQ], stats[kDivP], loss};
  };
  return of_part<3>(input, target, weight, parts);
}

STABLE_TORCH_LIBRARY_IMPL(udi_kernels, CPU, m) {
  m.impl("js_div_fwd", TORCH_BOX(&js_div_fwd));
  m.impl("js_div_bwd", TORCH_BOX(&js_div_bwd));
  m.impl("js_div_bwd_inplace", TORCH_BOX(&js_div_bwd_inplace));
  m.impl("skew_kl_fwd", TORCH_BOX(&skew_kl_fwd));
  m.impl("skew_kl_bwd", TORCH_BOX(&skew_kl_bwd));
  m.impl("js_div_part_sums", TORCH_BOX(&js_div_part_sums));
  m.impl("js_div_part_divergences", TORCH_BOX(&js_div_part_divergences));
}

}  // namespace
}  // namespace udi
