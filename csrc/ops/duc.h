// duc_loss: its checks and its node in autograd's graph.
#pragma once

#include <tuple>

#include "checks.h"

namespace udi {
namespace {

struct DUCLoss : Function<DUCLoss> {
  static const auto& fwd() {
    static const auto fwd =
        op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double, int64_t, bool)>(
            "udi_kernels::duc_loss_fwd");
    return fwd;
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& student, const Tensor& teacher, const Tensor& dims,
                        double temperature, int64_t reduction, bool need_student) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, stats, direction] = fwd().call(student, teacher, dims, temperature, reduction, need_student);
    ctx->save_for_backward({student, teacher, dims, stats, direction});
    ctx->saved_data["options"] = std::tuple<double, int64_t>(temperature, reduction);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd =
        op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      const Tensor&, double, int64_t, bool, bool)>("udi_kernels::duc_loss_bwd");
    auto saved = ctx->get_saved_variables();
    auto [temperature, reduction] = ctx->saved_data["options"].to<std::tuple<double, int64_t>>();
    BackwardMode mode;
    auto [student, teacher] = bwd.call(grad[0], saved[0], saved[1], saved[2], saved[3], saved[4], temperature,
                                       reduction, ctx->needs_input_grad(0), ctx->needs_input_grad(1));
    return needed(ctx, 6, student, teacher);
  }
};

Tensor duc_loss(const Tensor& student, const Tensor& teacher, const Tensor& dims, double temperature,
                int64_t reduction) {
  auto dtype = check_tensors("duc_loss", {{"student", student}, {"teacher", teacher}});
  TORCH_CHECK_VALUE(student.dim() == 2, "duc_loss: student must have shape (N, D), got ", python(student.sym_sizes()));
  TORCH_CHECK_VALUE(
      teacher.dim() == 2 && teacher.sym_size(1) == student.sym_size(1) && teacher.sym_size(0) >= student.sym_size(0),
      "duc_loss: teacher must have shape (M, D) with M >= N rows of student's ", python(student.sym_sizes()), ", got ",
      python(teacher.sym_sizes()));
  check_dense("duc_loss", "dims", dims);
  TORCH_CHECK_TYPE(dims.scalar_type() == at::kBool, "duc_loss: dims must be torch.bool, got ",
                   python(dims.scalar_type()));
  TORCH_CHECK_VALUE(dims.dim() == 1 && dims.sym_size(0) == student.sym_size(1), "duc_loss: dims must have shape ",
                    python(student.sym_sizes().slice(1)), ", one per dimension, got ", python(dims.sym_sizes()));
  TORCH_CHECK_VALUE(dims.device() == student.device(), "duc_loss: dims must be on ", student.device(),
                    " as student is, got ", dims.device());
  check_temperature("duc_loss", temperature);
  if (!kernels_serve<DUCLoss>(dtype, {{"student", student}, {"teacher", teacher}})) {
    static const auto reference =
        op<Tensor(const Tensor&, const Tensor&, const Tensor&, double, int64_t)>("udi_kernels::duc_loss_reference");
    return reference.call(student.to(dtype), teacher.to(dtype), dims, temperature, reduction);
  }
  const bool recorded = records({{"student", student}, {"teacher", teacher}});
  return DUCLoss::apply(matrix(student, dtype, recorded), matrix(teacher, dtype, recorded), keepable(dims, recorded),
                        temperature, reduction, at::GradMode::is_enabled() && student.requires_grad());
}

}  // namespace
}  // namespace udi
