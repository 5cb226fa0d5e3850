// The losses as differentiable ops, for all devices: arguments in the form that kernels take, and the graph's nodes.
//
// In C++ because calls of few rows are mostly overhead: forward and backward of 64 x 101 took 111 us with Python's
// autograd.Function and checks, and take 88. The price: this is the one file that is not on the stable ABI.
#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace udi {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Weight = std::optional<Tensor>;

enum Reduction : int64_t { kNone, kSum, kMean };  // as in ops.h, which does not go with ATen's headers

// The op of this name, looked up once by each that keeps it.
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The public function says in better words what does not fit, or has the reference serve it.
void expect(bool fits) { TORCH_CHECK(fits, "udi_kernels: the arguments do not fit the kernels"); }

bool floating(const Tensor& t) {
  auto type = t.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

bool same_shape_and_device(const Tensor& a, const Tensor& b) {
  return floating(a) && floating(b) && a.device() == b.device() && a.sym_sizes() == b.sym_sizes();
}

// Autocast mixes dtypes. Triton kernels compute in float32, so they do not serve float64.
at::ScalarType common_dtype(const Tensor& a, at::ScalarType b) {
  auto dtype = at::promote_types(a.scalar_type(), b);
  expect(dtype != at::kDouble || !a.is_cuda());
  return dtype;
}

// A matrix of this dtype whose rows have their elements side by side.
Tensor matrix(const Tensor& t, at::ScalarType dtype) {
  Tensor m = t.dim() == 2 ? t : t.reshape_symint({-1, t.sym_size(-1)});
  if (m.scalar_type() != dtype) m = m.to(dtype);
  return m.sym_size(1) == 1 || m.sym_stride(1) == 1 ? m : m.contiguous();
}

// For create_graph the backward ops have an autograd of their own, in Python; else there is nothing to record.
struct BackwardMode {
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
  BackwardMode() {
    if (!at::GradMode::is_enabled()) below_autograd.emplace();
  }
};

// The gradients that are needed; the kernels leave the others empty.
template <class... Grads>
variable_list needed(const AutogradContext* ctx, size_t arguments, const Grads&... grads) {
  variable_list list{grads...};
  for (size_t i = 0; i < list.size(); ++i)
    if (!ctx->needs_input_grad(i)) list[i] = Tensor();
  list.resize(arguments);
  return list;
}

struct JSDiv : Function<JSDiv> {
  using Options = std::tuple<double, double, int64_t>;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const Weight& weight,
                        double beta, double temperature, int64_t reduction) {
    static const auto fwd =
        op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Weight&, double, double, int64_t)>(
            "udi_kernels::js_div_fwd");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, stats] = fwd.call(input, target, weight, beta, temperature, reduction);
    ctx->save_for_backward({input, target, weight.value_or(Tensor()), stats});
    ctx->saved_data["options"] = Options(beta, temperature, reduction);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd = op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Weight&,
                                                          const Tensor&, double, double, int64_t, bool, bool)>(
        "udi_kernels::js_div_bwd");
    BackwardMode mode;
    auto saved = ctx->get_saved_variables();
    Weight weight = saved[2].defined() ? Weight(saved[2]) : std::nullopt;
    auto [beta, temperature, reduction] = ctx->saved_data["options"].to<Options>();
    auto [input, target] = bwd.call(grad[0], saved[0], saved[1], weight, saved[3], beta, temperature, reduction,
                                    ctx->needs_input_grad(0), ctx->needs_input_grad(1));
    return needed(ctx, 6, input, target);
  }
};

Tensor js_div(const Tensor& input, const Tensor& target, const Weight& weight, double beta, double temperature,
              int64_t reduction) {
  expect(same_shape_and_device(input, target) && input.dim() && input.sym_size(-1) != 0);
  expect(0 < beta && beta < 1 && 0 < temperature && temperature < INFINITY);
  auto dtype = common_dtype(input, target.scalar_type());
  auto leading = input.sym_sizes().slice(0, input.dim() - 1);
  Weight factor;
  if (weight) {
    expect(floating(*weight) && weight->device() == input.device() && weight->sym_sizes() == leading);
    expect(!weight->requires_grad() || !at::GradMode::is_enabled());
    factor = weight->reshape(-1).to(dtype == at::kDouble ? at::kDouble : at::kFloat);
    if (reduction == kMean) {
      factor = factor->div(factor->sum());
      reduction = kSum;
    }
  }
  Tensor loss = JSDiv::apply(matrix(input, dtype), matrix(target, dtype), factor, beta, temperature, reduction);
  return reduction == kNone && input.dim() != 2 ? loss.reshape_symint(leading) : loss;
}

struct ClubMI : Function<ClubMI> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const Tensor& y,
                        int64_t reduction) {
    static const auto fwd = op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t)>(
        "udi_kernels::club_mi_fwd");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, stats] = fwd.call(mu, logvar, y, reduction);
    ctx->save_for_backward({mu, logvar, y, stats});
    ctx->saved_data["reduction"] = reduction;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd =
        op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                              const Tensor&, int64_t, bool, bool, bool)>("udi_kernels::club_mi_bwd");
    BackwardMode mode;
    auto saved = ctx->get_saved_variables();
    auto [mu, logvar, y] =
        bwd.call(grad[0], saved[0], saved[1], saved[2], saved[3], ctx->saved_data["reduction"].toInt(),
                 ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2));
    return needed(ctx, 4, mu, logvar, y);
  }
};

struct ClubNLL : Function<ClubNLL> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const Tensor& y) {
    static const auto fwd = op<Tensor(const Tensor&, const Tensor&, const Tensor&)>("udi_kernels::club_nll_fwd");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({mu, logvar, y});
    return fwd.call(mu, logvar, y);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const auto bwd = op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                  const Tensor&, bool, bool, bool)>(
        "udi_kernels::club_nll_bwd");
    BackwardMode mode;
    auto saved = ctx->get_saved_variables();
    auto [mu, logvar, y] = bwd.call(grad[0], saved[0], saved[1], saved[2], ctx->needs_input_grad(0),
                                    ctx->needs_input_grad(1), ctx->needs_input_grad(2));
    return needed(ctx, 3, mu, logvar, y);
  }
};

std::array<Tensor, 3> gaussian(const Tensor& mu, const Tensor& logvar, const Tensor& y) {
  expect(mu.dim() == 2 && same_shape_and_device(mu, logvar) && same_shape_and_device(mu, y));
  auto dtype = common_dtype(mu, common_dtype(logvar, y.scalar_type()));
  return {matrix(mu, dtype), matrix(logvar, dtype), matrix(y, dtype)};
}

Tensor club_mi(const Tensor& mu, const Tensor& logvar, const Tensor& y, int64_t reduction) {
  auto [m, l, x] = gaussian(mu, logvar, y);
  return ClubMI::apply(m, l, x, reduction);
}

Tensor club_nll(const Tensor& mu, const Tensor& logvar, const Tensor& y) {
  auto [m, l, x] = gaussian(mu, logvar, y);
  return ClubNLL::apply(m, l, x);
}

TORCH_LIBRARY_IMPL(udi_kernels, CompositeImplicitAutograd, m) {
  m.impl("js_div", js_div);
  m.impl("club_mi", club_mi);
  m.impl("club_nll", club_nll);
}

}  // namespace
}  // namespace udi
