// js_div and skew_kl: their checks and their node in autograd's graph.
#pragma once

#include <cmath>
#include <tuple>

#include "checks.h"

namespace udi {
namespace {

using Weight = std::optional<Tensor>;

// The leading sizes as kernels take them: one if all rows have one stride in each of the tensors, else two. None if two
// are not enough.
std::optional<std::vector<c10::SymInt>> leading_sizes(at::ArrayRef<Tensor> tensors) {
  const Tensor& like = tensors.front();
  std::vector<c10::SymInt> sizes;  // inner one first
  int64_t inner = -1;              // the dimension whose stride the last of these has
  for (int64_t d = like.dim() - 2; d >= 0; --d) {
    if (like.sym_size(d) == 1) continue;
    const bool joins = inner >= 0 && std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& t) {
                         return t.sym_stride(d) == sizes.back() * t.sym_stride(inner);
                       });
    if (joins) {
      sizes.back() = sizes.back() * like.sym_size(d);
    } else {
      sizes.push_back(like.sym_size(d));
      inner = d;
    }
  }
  if (sizes.empty()) sizes.push_back(1);
  if (sizes.size() > 2) return std::nullopt;
  return std::vector<c10::SymInt>(sizes.rbegin(), sizes.rend());
}

// Below autograd an op must not return its argument, so `to` and `reshape` are called only where they change something.
Tensor converted(Tensor t, at::ScalarType dtype) { return t.scalar_type() == dtype ? std::move(t) : t.to(dtype); }

// The logits as kernels take them: of one dtype, (R, C) or (A, B, C), of any strides. A copy is made only of mixed
// dtypes, and of leading dimensions with more than two strides; it is not kept but made again in the backward pass.
std::tuple<Tensor, Tensor> logit_rows(Tensor input, Tensor target) {
  if (input.dim() == 2 && input.scalar_type() == target.scalar_type()) return {std::move(input), std::move(target)};
  const auto dtype = at::promote_types(input.scalar_type(), target.scalar_type());
  input = converted(input, dtype), target = converted(target, dtype);
  if (input.dim() == 2) return {input, target};
  const auto classes = input.sym_size(-1);
  if (input.sym_numel() == 0) {
    const c10::SymInt shape[] = {0, classes};
    return {input.reshape_symint(shape), target.reshape_symint(shape)};
  }
  auto shape = leading_sizes({input, target});
  if (!shape) {
    target = target.contiguous();
    shape = leading_sizes({input, target});
  }
  if (!shape) {
    input = input.contiguous();
    shape = leading_sizes({input, target});
  }
  shape->push_back(classes);
  return {input.view_symint(*shape), target.view_symint(*shape)};
}

// A factor of each row.
Weight row_weights(const Tensor& weight, const Tensor& rows) {
  if (!weight.defined()) return std::nullopt;
  return converted(weight.dim() == 1 ? weight : weight.reshape(-1),
                   rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

constexpr char kJSDiv[] = "js_div", kSkewKL[] = "skew_kl";

// The node of the op of that name. Options: its numbers, of which the reduction is the last.
template <const char* op_name, class... Options>
struct RowDivergence : Function<RowDivergence<op_name, Options...>> {
  static constexpr const char *name = op_name, *suffix = "";  // of the reference

  static const auto& fwd() {
    static const auto fwd = op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Weight&, Options...)>(
        c10::str("udi_kernels::", name, "_fwd").c_str());
    return fwd;
  }

  // The result, and what the backward kernel needs.
  static std::tuple<Tensor, Tensor> compute(const Tensor& input, const Tensor& target, const Weight& weight,
                                            Options... options) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [x, y] = logit_rows(input, target);
    auto [loss, stats] = fwd().call(x, y, row_weights(weight.value_or(Tensor()), x), options...);
    if (std::get<sizeof...(Options) - 1>(std::tie(options...)) == kNone && input.dim() != 2)
      loss = loss.reshape_symint(input.sym_sizes().slice(0, input.dim() - 1));
    return {loss, stats};
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const Weight& weight,
                        Options... options) {
    auto [loss, stats] = compute(input, target, weight, options...);
    ctx->save_for_backward({input, target, weight.value_or(Tensor()), stats});
    ctx->saved_data["options"] = std::tuple<Options...>(options...);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd =
        op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Weight&, const Tensor&,
                                      Options..., bool, bool)>(c10::str("udi_kernels::", name, "_bwd").c_str());
    auto saved = ctx->get_saved_variables();
    const bool need_x = ctx->needs_input_grad(0), need_y = ctx->needs_input_grad(1);  // 0.1 us each
    BackwardMode mode;
    auto [x, y] = logit_rows(saved[0], saved[1]);
    const Tensor rows = grad[0].dim() > 1 ? grad[0].reshape(-1) : grad[0];
    auto [dx, dy] = std::apply(
        [&, &x = x, &y = y](auto... options) {
          return bwd.call(rows, x, y, row_weights(saved[2], x), saved[3], options..., need_x, need_y);
        },
        ctx->saved_data["options"].template to<std::tuple<Options...>>());
    variable_list grads(3 + sizeof...(Options));
    if (need_x) grads[0] = shaped(std::move(dx), saved[0]);
    if (need_y) grads[1] = shaped(std::move(dy), saved[1]);
    return grads;
  }

  static Tensor shaped(Tensor rows, const Tensor& logits) {
    rows = converted(std::move(rows), logits.scalar_type());
    return logits.dim() == 2 ? std::move(rows) : rows.view_symint(logits.sym_sizes());
  }
};

using JSDiv = RowDivergence<kJSDiv, double, double, int64_t>;
using SkewKL = RowDivergence<kSkewKL, double, bool, double, int64_t>;

// js_div whose backward pass writes the input's gradient over the input; _js_div.py refuses inputs that others may
// read.
struct InplaceJSDiv : Function<InplaceJSDiv> {
  static constexpr const char *name = kJSDiv, *suffix = "_inplace";

  static const auto& fwd() { return JSDiv::fwd(); }

  static auto compute(const Tensor& input, const Tensor& target, const Weight& weight, double beta, double temperature,
                      int64_t reduction) {
    return JSDiv::compute(input, target, weight, beta, temperature, reduction);
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const Weight& weight,
                        double beta, double temperature, int64_t reduction) {
    TORCH_CHECK_VALUE(input.dim() == 2 || input.sym_numel() == 0 || leading_sizes({input}),
                      "js_div: inplace_backward needs an input whose leading dimensions have at most two strides, got ",
                      python(input.sym_strides()));
    return JSDiv::forward(ctx, input, target, weight, beta, temperature, reduction);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd = op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Weight&, const Tensor&, double,
                                      double, int64_t, bool)>("udi_kernels::js_div_bwd_inplace");
    TORCH_CHECK(!ctx->saved_data.count("written"),
                "js_div: inplace_backward allows one backward pass, which has written the gradient over input");
    TORCH_CHECK(!at::GradMode::is_enabled(), "js_div: inplace_backward has no second derivative (create_graph=True)");
    if (!ctx->needs_input_grad(0)) return JSDiv::backward(ctx, grad);
    BackwardMode mode;
    const auto saved = ctx->get_saved_variables();
    const auto [x, y] = logit_rows(saved[0], saved[1]);
    Tensor rows = grad[0].dim() > 1 ? grad[0].reshape(-1) : grad[0];
    if (rows.is_alias_of(x)) rows = rows.clone();
    const auto [beta, temperature, reduction] = ctx->saved_data["options"].to<std::tuple<double, double, int64_t>>();
    const bool need_y = ctx->needs_input_grad(1);
    const Tensor dy = bwd.call(rows, x, y, row_weights(saved[2], x), saved[3], beta, temperature, reduction, need_y);
    saved[0].unsafeGetTensorImpl()->bump_version();
    ctx->saved_data["written"] = true;
    variable_list grads(6);
    grads[0] = saved[0].detach();
    if (need_y) grads[1] = JSDiv::shaped(dy, saved[1]);
    return grads;
  }
};

// Checks the tensors and calls what serves: kernels, or the reference.
template <class Node, class... Options>
Tensor row_divergence(const Tensor& input, const Tensor& target, const Weight& weight, Options... options) {
  const char* name = Node::name;
  const auto dtype = check_tensors(name, {{"input", input}, {"target", target}});
  check_same_shape(name, {"input", input}, {"target", target});
  TORCH_CHECK_VALUE(input.dim() && input.sym_size(-1) != 0, name,
                    ": input needs a last dimension of at least one class, got ", python(input.sym_sizes()));
  if (weight) check_weight(name, *weight, {"input", input});
  if (!kernels_serve<Node>(dtype, {{"input", input}, {"target", target}})) {
    static const auto reference = op<Tensor(const Tensor&, const Tensor&, const Weight&, Options...)>(
        c10::str("udi_kernels::", name, Node::suffix, "_reference").c_str());
    return reference.call(input.to(dtype), target.to(dtype), weight, options...);
  }
  if (!records({{"input", input}, {"target", target}}))
    return std::get<0>(Node::compute(input, target, weight, options...));
  return Node::apply(keepable(input, true), keepable(target, true), weight ? Weight(keepable(*weight, true)) : weight,
                     options...);
}

template <class Node>
Tensor js_div(const Tensor& input, const Tensor& target, const Weight& weight, double beta, double temperature,
              int64_t reduction) {
  TORCH_CHECK_VALUE(0 <= beta && beta <= 1, "js_div: beta must lie in [0, 1], got ", beta);
  check_temperature("js_div", temperature);
  return row_divergence<Node>(input, target, weight, beta, temperature, reduction);
}

// At alpha = 1 the divergence is 0. Kernels need a normal number in float32.
Tensor skew_kl(const Tensor& input, const Tensor& target, const Weight& weight, double alpha, bool reverse,
               double temperature, int64_t reduction) {
  TORCH_CHECK_VALUE(alpha == 0 || (1e-37 <= alpha && alpha < 1), "skew_kl: alpha must be 0 or lie in [1e-37, 1), got ",
                    alpha);
  check_temperature("skew_kl", temperature);
  return row_divergence<SkewKL>(input, target, weight, alpha, reverse, temperature, reduction);
}

}  // namespace
}  // namespace udi
