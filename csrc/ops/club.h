// club_mi and club_nll: their checks and their nodes in autograd's graph.
#pragma once

#include <array>
#include <tuple>

#include "checks.h"

namespace udi {
namespace {

using MaybeTensor = std::optional<Tensor>;

struct ClubMI : Function<ClubMI> {
  static const auto& fwd() {
    static const auto fwd =
        op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, int64_t)>(
            "udi_kernels::club_mi_fwd");
    return fwd;
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const Tensor& y,
                        const MaybeTensor& classes, int64_t reduction) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, stats] = fwd().call(mu, logvar, y, classes, reduction);
    ctx->save_for_backward({mu, logvar, y, classes.value_or(Tensor()), stats});
    ctx->saved_data["reduction"] = reduction;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd =
        op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                              const MaybeTensor&, const Tensor&, int64_t, bool, bool, bool)>(
            "udi_kernels::club_mi_bwd");
    auto saved = ctx->get_saved_variables();
    MaybeTensor classes = saved[3].defined() ? MaybeTensor(saved[3]) : std::nullopt;
    BackwardMode mode;
    auto [mu, logvar, y] =
        bwd.call(grad[0], saved[0], saved[1], saved[2], classes, saved[4], ctx->saved_data["reduction"].toInt(),
                 ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2));
    return needed(ctx, 5, mu, logvar, y);
  }
};

struct ClubNLL : Function<ClubNLL> {
  static const auto& fwd() {
    static const auto fwd =
        op<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&)>("udi_kernels::club_nll_fwd");
    return fwd;
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const Tensor& y,
                        const MaybeTensor& weight) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({mu, logvar, y, weight.value_or(Tensor())});
    return fwd().call(mu, logvar, y, weight);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd =
        op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                              const MaybeTensor&, bool, bool, bool)>("udi_kernels::club_nll_bwd");
    auto saved = ctx->get_saved_variables();
    MaybeTensor weight = saved[3].defined() ? MaybeTensor(saved[3]) : std::nullopt;
    BackwardMode mode;
    auto [mu, logvar, y] = bwd.call(grad[0], saved[0], saved[1], saved[2], weight, ctx->needs_input_grad(0),
                                    ctx->needs_input_grad(1), ctx->needs_input_grad(2));
    return needed(ctx, 4, mu, logvar, y);
  }
};

// Returns their common dtype.
at::ScalarType check_gaussian(const char* op, const Tensor& mu, const Tensor& logvar, const Tensor& y) {
  const auto dtype = check_tensors(op, {{"mu", mu}, {"logvar", logvar}, {"y", y}});
  TORCH_CHECK_VALUE(mu.dim() == 2, op, ": mu must have shape (N, D), got ", python(mu.sym_sizes()));
  check_same_shape(op, {"mu", mu}, {"logvar", logvar});
  check_same_shape(op, {"mu", mu}, {"y", y});
  return dtype;
}

void check_given(const Tensor& given, const Tensor& mu) {
  check_dense("club_mi", "given", given);
  TORCH_CHECK_TYPE(integers(given.scalar_type()), "club_mi: given must be of integers, got ",
                   python(given.scalar_type()), "; pass given.long()");
  TORCH_CHECK_VALUE(given.sym_sizes() == mu.sym_sizes().slice(0, 1), "club_mi: given must have shape ",
                    python(mu.sym_sizes().slice(0, 1)), ", one class per row of mu, got ", python(given.sym_sizes()));
  TORCH_CHECK_VALUE(given.device() == mu.device(), "club_mi: given must be on ", mu.device(), " as mu is, got ",
                    given.device(), "; pass given.to(mu.device)");
}

Tensor club_mi(const Tensor& mu, const Tensor& logvar, const Tensor& y, const MaybeTensor& given, int64_t reduction) {
  const auto dtype = check_gaussian("club_mi", mu, logvar, y);
  if (given) check_given(*given, mu);
  if (!kernels_serve<ClubMI>(dtype, {{"mu", mu}, {"logvar", logvar}, {"y", y}})) {
    static const auto reference = op<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, int64_t)>(
        "udi_kernels::club_mi_reference");
    return reference.call(mu.to(dtype), logvar.to(dtype), y.to(dtype), given, reduction);
  }
  MaybeTensor classes;
  if (given) {
    static const auto club_classes = op<Tensor(const Tensor&)>("udi_kernels::club_classes");
    classes = club_classes.call(given->to(at::kLong));
  }
  const bool recorded = records({{"mu", mu}, {"logvar", logvar}, {"y", y}});
  if (classes) classes = keepable(*classes, recorded);
  return ClubMI::apply(matrix(mu, dtype, recorded), matrix(logvar, dtype, recorded), matrix(y, dtype, recorded),
                       classes, reduction);
}

Tensor club_nll(const Tensor& mu, const Tensor& logvar, const Tensor& y, const MaybeTensor& weight) {
  const auto dtype = check_gaussian("club_nll", mu, logvar, y);
  if (weight) check_weight("club_nll", *weight, {"mu", mu});
  if (!kernels_serve<ClubNLL>(dtype, {{"mu", mu}, {"logvar", logvar}, {"y", y}})) {
    static const auto reference =
        op<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&)>("udi_kernels::club_nll_reference");
    return reference.call(mu.to(dtype), logvar.to(dtype), y.to(dtype), weight);
  }
  const bool recorded = records({{"mu", mu}, {"logvar", logvar}, {"y", y}});
  MaybeTensor shares;
  if (weight) {  // in float64, whose sums do not overflow; all 0 if the weights are
    Tensor wide = weight->to(at::kDouble);
    shares = wide.div(wide.sum()).masked_fill(wide.eq(0), 0).to(dtype == at::kDouble ? at::kDouble : at::kFloat);
    shares = keepable(*shares, recorded);
  }
  return ClubNLL::apply(matrix(mu, dtype, recorded), matrix(logvar, dtype, recorded), matrix(y, dtype, recorded),
                        shares);
}

}  // namespace
}  // namespace udi
