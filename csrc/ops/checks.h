// What the ops share: checks, and the way from a caller's tensors to a kernel's.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "../enums.h"

namespace udi {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Looks up an op; callers keep it in a static.
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Named {
  const char* name;
  const Tensor& tensor;
};

// Values as Python prints them.
std::string python(c10::SymIntArrayRef numbers) {
  std::ostringstream out;
  const char* comma = "";
  out << '(';
  for (const auto& n : numbers) out << std::exchange(comma, ", ") << n;
  out << (numbers.size() == 1 ? ",)" : ")");
  return out.str();
}
std::string python(at::ScalarType dtype) { return c10::str("torch.", c10::getDtypeNames(dtype).first); }

std::string python(at::Layout layout) {
  switch (layout) {
    case at::kSparse:
      return "torch.sparse_coo";
    case at::kSparseCsr:
      return "torch.sparse_csr";
    case at::kSparseCsc:
      return "torch.sparse_csc";
    case at::kSparseBsr:
      return "torch.sparse_bsr";
    case at::kSparseBsc:
      return "torch.sparse_bsc";
    case at::kMkldnn:
      return "torch._mkldnn";
    default:
      return c10::str("layout ", layout);
  }
}

bool floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

void check_dense(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(!t.is_nested(), op, ": ", name, " must be dense, got a nested tensor; call .to_padded_tensor()");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, op, ": ", name, " must be dense, got ", python(t.layout()),
                    "; call .to_dense()");
}

// Checks that tensors are dense, floating-point and on one device. Returns their common dtype by torch's own rules;
// autocast mixes dtypes.
at::ScalarType check_tensors(const char* op, std::initializer_list<Named> tensors) {
  const auto& [first, like] = *tensors.begin();
  auto dtype = like.scalar_type();
  for (const auto& [name, t] : tensors) {
    check_dense(op, name, t);
    TORCH_CHECK_TYPE(floating(t.scalar_type()), op, ": ", name, " must be float16, bfloat16, float32 or float64, got ",
                     python(t.scalar_type()));
    TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " must be on ", like.device(), " as ", first,
                      " is, got ", t.device());
    if (t.scalar_type() != dtype) dtype = at::promote_types(dtype, t.scalar_type());
  }
  return dtype;
}

void check_same_shape(const char* op, const Named& like, const Named& t) {
  TORCH_CHECK_VALUE(t.tensor.sym_sizes() == like.tensor.sym_sizes(), op, ": ", t.name, " must have ", like.name,
                    "'s shape ", python(like.tensor.sym_sizes()), ", got ", python(t.tensor.sym_sizes()));
}

bool integers(at::ScalarType type) { return c10::isIntegralType(type, false) && !c10::isBarebonesUnsignedType(type); }
// Kernels multiply by 1/T, which must be a normal number in float32.
void check_temperature(const char* op, double temperature) {
  TORCH_CHECK_VALUE(1e-37 <= temperature && temperature <= 1e37, op, ": temperature must lie in [1e-37, 1e37], got ",
                    temperature);
}

// A factor of each row of `rows`, whose last dimension is one row's.
void check_weight(const char* op, const Tensor& weight, const Named& rows) {
  check_dense(op, "weight", weight);
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(floating(type) || integers(type) || type == at::kBool, op,
                   ": weight must be float16, bfloat16, float32, float64, bool or an integer, got ", python(type));
  const auto& [name, like] = rows;
  TORCH_CHECK_VALUE(weight.device() == like.device(), op, ": weight must be on ", like.device(), " as ", name,
                    " is, got ", weight.device());
  const auto shape = like.sym_sizes().slice(0, like.dim() - 1);
  TORCH_CHECK_VALUE(weight.sym_sizes() == shape, op, ": weight must have shape ", python(shape), ", one per row of ",
                    name, ", got ", python(weight.sym_sizes()));
  TORCH_CHECK_VALUE(!weight.requires_grad() || !at::GradMode::is_enabled(), op,
                    ": weight gets no gradient: pass weight.detach()");
}

// Whether kernels serve; elsewhere the reference does. C++ nodes support neither function transforms (torch.func) nor
// forward-mode AD. Triton computes in float32, so the reference serves float64 on a GPU, and all other devices.
template <class Node>
bool kernels_serve(at::ScalarType dtype, std::initializer_list<Named> tensors) {
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return false;
  for (const auto& [name, t] : tensors)
    if (t._fw_grad(0).defined()) return false;
  const Tensor& like = tensors.begin()->tensor;
  if (like.is_cpu()) return true;
  static const bool triton = Node::fwd().hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return like.is_cuda() && triton && dtype != at::kDouble;
}

// Whether autograd will record.
bool records(std::initializer_list<Named> tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](auto& named) { return named.tensor.requires_grad(); });
}

// Tensors made under torch.inference_mode() cannot be kept for the backward pass; copies can.
Tensor keepable(const Tensor& t, bool recorded) { return recorded && t.is_inference() ? t.clone() : t; }

// The tensor as a matrix of this dtype, the elements of a row adjacent.
Tensor matrix(const Tensor& t, at::ScalarType dtype, bool recorded) {
  Tensor m = t.dim() == 2 ? t : t.reshape_symint({-1, t.sym_size(-1)});
  if (m.scalar_type() != dtype) m = m.to(dtype);
  return keepable(m.sym_size(1) == 1 || m.sym_stride(1) == 1 ? m : m.contiguous(), recorded);
}

// Under create_graph autograd records the backward op, whose derivative is in Python; else nothing is recorded.
struct BackwardMode {
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
  BackwardMode() {
    if (!at::GradMode::is_enabled()) below_autograd.emplace();
  }
};

// The gradients of all arguments, undefined where not needed; kernels return those empty.
template <class... Grads>
variable_list needed(const AutogradContext* ctx, size_t arguments, const Grads&... grads) {
  variable_list list{grads...};
  for (size_t i = 0; i < list.size(); ++i)
    if (!ctx->needs_input_grad(i)) list[i] = Tensor();
  list.resize(arguments);
  return list;
}

}  // namespace
}  // namespace udi
