// js_div_topk: its checks and its node in autograd's graph.
#pragma once

#include <tuple>

#include "js_div.h"

namespace udi {
namespace {

// The student's logits as kernels take them: (R, C), or (A, B, C), the classes adjacent. A copy is made where they are
// not, and of leading dimensions with more than two strides; it is not kept but made again in the backward pass.
Tensor student_rows(const Tensor& input) {
  const auto classes = input.sym_size(-1);
  if (input.sym_numel() == 0) {
    const c10::SymInt shape[] = {0, classes};
    return input.dim() == 2 ? input : input.reshape_symint(shape);
  }
  Tensor x = classes == 1 || input.sym_stride(-1) == 1 ? input : input.contiguous();
  auto shape = leading_sizes({x});
  if (!shape) {
    x = x.contiguous();
    shape = leading_sizes({x});
  }
  shape->push_back(classes);
  return x.dim() == int64_t(shape->size()) ? x : x.view_symint(*shape);
}

struct JSDivTopK : Function<JSDivTopK> {
  using Options = std::tuple<int64_t, double, double, int64_t>;

  static const auto& fwd() {
    static const auto fwd =
        op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Weight&, int64_t, double,
                                      double, int64_t)>("udi_kernels::js_div_topk_fwd");
    return fwd;
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& indices, const Tensor& logprobs,
                        const Weight& weight, int64_t tail, double beta, double temperature, int64_t reduction) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor x = student_rows(input);
    const auto pairs = [&](const Tensor& t, at::ScalarType dtype) {
      const c10::SymInt shape[] = {input.sym_numel() / input.sym_size(-1), t.sym_size(-1)};
      const Tensor rows = converted(t.dim() == 2 ? t : t.reshape_symint(shape), dtype);
      return rows.is_contiguous() ? rows : rows.contiguous();
    };
    const Tensor index = pairs(indices, at::kLong);
    const Tensor log_p = pairs(logprobs, x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    auto [loss, stats] =
        fwd().call(x, index, log_p, row_weights(weight.value_or(Tensor()), x), tail, beta, temperature, reduction);
    ctx->save_for_backward({input, index, log_p, weight.value_or(Tensor()), stats});
    ctx->saved_data["options"] = Options(tail, beta, temperature, reduction);
    return reduction == kNone && input.dim() != 2 ? loss.reshape_symint(input.sym_sizes().slice(0, input.dim() - 1))
                                                  : loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd =
        op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Weight&, const Tensor&, int64_t,
                  double, double, int64_t, bool)>("udi_kernels::js_div_topk_bwd");
    auto saved = ctx->get_saved_variables();
    auto [tail, beta, temperature, reduction] = ctx->saved_data["options"].to<Options>();
    BackwardMode mode;
    const Tensor x = student_rows(saved[0]);
    const Tensor rows = bwd.call(grad[0].dim() > 1 ? grad[0].reshape(-1) : grad[0], x, saved[1], saved[2],
                                 row_weights(saved[3], x), saved[4], tail, beta, temperature, reduction, true);
    return needed(ctx, 8, x.dim() == saved[0].dim() ? rows : rows.view_symint(saved[0].sym_sizes()));
  }
};

Tensor js_div_topk(const Tensor& input, const Tensor& indices, const Tensor& logprobs, const Weight& weight,
                   int64_t tail, double beta, double temperature, int64_t reduction) {
  const char* op_name = "js_div_topk";
  const auto dtype = check_tensors(op_name, {Named{"input", input}});
  check_tensors(op_name, {{"input", input}, {"logprobs", logprobs}});
  TORCH_CHECK_VALUE(input.dim() && input.sym_size(-1) != 0,
                    "js_div_topk: input needs a last dimension of at least one class, got ", python(input.sym_sizes()));
  check_dense(op_name, "indices", indices);
  TORCH_CHECK_TYPE(integers(indices.scalar_type()), "js_div_topk: indices must be integers, got ",
                   python(indices.scalar_type()));
  TORCH_CHECK_VALUE(indices.device() == input.device(), "js_div_topk: indices must be on ", input.device(),
                    " as input is, got ", indices.device());
  TORCH_CHECK_VALUE(indices.dim() == input.dim() && indices.sym_size(-1) != 0 &&
                        indices.sym_sizes().slice(0, input.dim() - 1) == input.sym_sizes().slice(0, input.dim() - 1),
                    "js_div_topk: indices must have shape (..., K) for an input of shape (..., C), got ",
                    python(indices.sym_sizes()), " and ", python(input.sym_sizes()));
  check_same_shape(op_name, {"indices", indices}, {"logprobs", logprobs});
  TORCH_CHECK_VALUE(!logprobs.requires_grad() || !at::GradMode::is_enabled(),
                    "js_div_topk: logprobs gets no gradient: pass logprobs.detach()");
  TORCH_CHECK_VALUE(0 <= beta && beta <= 1, "js_div_topk: beta must lie in [0, 1], got ", beta);
  TORCH_CHECK_VALUE(beta < 1 || tail == kBucket,
                    "js_div_topk: beta must be below 1 unless tail is 'bucket': the divergence would be infinite");
  check_temperature(op_name, temperature);
  if (weight) check_weight(op_name, *weight, {"input", input});
  if (!kernels_serve<JSDivTopK>(dtype, {Named{"input", input}})) {
    static const auto reference =
        op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Weight&, int64_t, double, double, int64_t)>(
            "udi_kernels::js_div_topk_reference");
    return reference.call(input, indices, logprobs, weight, tail, beta, temperature, reduction);
  }
  const bool recorded = records({Named{"input", input}});
  return JSDivTopK::apply(keepable(input, recorded), keepable(indices, recorded), keepable(logprobs, recorded),
                          weight ? Weight(keepable(*weight, recorded)) : weight, tail, beta, temperature, reduction);
}

}  // namespace
}  // namespace udi
