// certainty_fusion: its checks and its node in autograd's graph.
#pragma once

#include "checks.h"

namespace udi {
namespace {

struct CertaintyFusion : Function<CertaintyFusion> {
  static const auto& fwd() {
    static const auto fwd = op<Tensor(const Tensor&, double)>("udi_kernels::certainty_fusion_fwd");
    return fwd;
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& logits, double temperature) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({logits});
    ctx->saved_data["temperature"] = temperature;
    return fwd().call(logits, temperature);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd = op<Tensor(const Tensor&, const Tensor&, double, bool)>("udi_kernels::certainty_fusion_bwd");
    auto saved = ctx->get_saved_variables();
    BackwardMode mode;
    Tensor rows = matrix(grad[0], saved[0].scalar_type(), false);
    return {bwd.call(rows, saved[0], ctx->saved_data["temperature"].toDouble(), true), Tensor()};
  }
};

Tensor certainty_fusion(const Tensor& logits, double temperature) {
  check_tensors("certainty_fusion", {{"logits", logits}});
  TORCH_CHECK_VALUE(logits.dim() == 3 && logits.sym_size(0) != 0 && logits.sym_size(2) != 0,
                    "certainty_fusion: logits must have shape (M, N, C) with at least one head and class, got ",
                    python(logits.sym_sizes()));
  check_temperature("certainty_fusion", temperature);
  if (!kernels_serve<CertaintyFusion>(logits.scalar_type(), {{"logits", logits}})) {
    static const auto reference = op<Tensor(const Tensor&, double)>("udi_kernels::certainty_fusion_reference");
    return reference.call(logits, temperature);
  }
  Tensor rows = logits.sym_size(2) == 1 || logits.sym_stride(2) == 1 ? logits : logits.contiguous();
  if (records({{"logits", logits}})) return CertaintyFusion::apply(keepable(rows, true), temperature);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return CertaintyFusion::fwd().call(rows, temperature);
}

}  // namespace
}  // namespace udi
