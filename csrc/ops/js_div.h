// js_div: its checks and its node in autograd's graph.
#pragma once

#include <cmath>
#include <tuple>

#include "checks.h"

namespace udi {
namespace {

using Weight = std::optional<Tensor>;

struct JSDiv : Function<JSDiv> {
  using Options = std::tuple<double, double, int64_t>;

  static const auto& fwd() {
    static const auto fwd =
        op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Weight&, double, double, int64_t)>(
            "udi_kernels::js_div_fwd");
    return fwd;
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const Weight& weight,
                        double beta, double temperature, int64_t reduction) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, stats] = fwd().call(input, target, weight, beta, temperature, reduction);
    ctx->save_for_backward({input, target, weight.value_or(Tensor()), stats});
    ctx->saved_data["options"] = Options(beta, temperature, reduction);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd =
        op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Weight&, const Tensor&, double,
                                      double, int64_t, bool, bool)>("udi_kernels::js_div_bwd");
    auto saved = ctx->get_saved_variables();
    Weight weight = saved[2].defined() ? Weight(saved[2]) : std::nullopt;
    auto [beta, temperature, reduction] = ctx->saved_data["options"].to<Options>();
    BackwardMode mode;
    auto [input, target] = bwd.call(grad[0], saved[0], saved[1], weight, saved[3], beta, temperature, reduction,
                                    ctx->needs_input_grad(0), ctx->needs_input_grad(1));
    return needed(ctx, 6, input, target);
  }
};

void check_weight(const Tensor& weight, const Tensor& input) {
  check_dense("js_div", "weight", weight);
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(floating(type) || c10::isIntegralType(type, true),
                   "js_div: weight must be float16, bfloat16, float32, float64, bool or an integer, got ",
                   python(type));
  TORCH_CHECK_VALUE(weight.device() == input.device(), "js_div: weight must be on ", input.device(),
                    " as input is, got ", weight.device());
  const auto rows = input.sym_sizes().slice(0, input.dim() - 1);
  TORCH_CHECK_VALUE(weight.sym_sizes() == rows, "js_div: weight must have shape ", python(rows), ", one per row, got ",
                    python(weight.sym_sizes()));
  TORCH_CHECK_VALUE(!weight.requires_grad() || !at::GradMode::is_enabled(),
                    "js_div: weight gets no gradient: pass weight.detach(), or weight the 'none' reduction");
}

Tensor js_div(const Tensor& input, const Tensor& target, const Weight& weight, double beta, double temperature,
              int64_t reduction) {
  const auto dtype = check_tensors("js_div", {{"input", input}, {"target", target}});
  check_same_shape("js_div", {"input", input}, {"target", target});
  TORCH_CHECK_VALUE(input.dim() && input.sym_size(-1) != 0,
                    "js_div: input needs a last dimension of at least one class, got ", python(input.sym_sizes()));
  TORCH_CHECK_VALUE(0 <= beta && beta <= 1, "js_div: beta must lie in [0, 1], got ", beta);
  TORCH_CHECK_VALUE(0 < temperature && temperature < INFINITY, "js_div: temperature must be positive and finite, got ",
                    temperature);
  if (weight) check_weight(*weight, input);
  if (!kernels_serve<JSDiv>(dtype, {{"input", input}, {"target", target}})) {
    static const auto reference = op<Tensor(const Tensor&, const Tensor&, const Weight&, double, double, int64_t)>(
        "udi_kernels::js_div_reference");
    return reference.call(input.to(dtype), target.to(dtype), weight, beta, temperature, reduction);
  }
  const bool recorded = records({{"input", input}, {"target", target}});
  const bool all_rows = reduction == kNone;
  Weight factor;
  if (weight) factor = keepable(weight->reshape(-1).to(dtype == at::kDouble ? at::kDouble : at::kFloat), recorded);
  Tensor loss = JSDiv::apply(matrix(input, dtype, recorded), matrix(target, dtype, recorded), factor, beta, temperature,
                             reduction);
  return all_rows && input.dim() != 2 ? loss.reshape_symint(input.sym_sizes().slice(0, input.dim() - 1)) : loss;
}

}  // namespace
}  // namespace udi
