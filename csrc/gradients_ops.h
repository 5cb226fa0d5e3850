// The launchers of gramian and weighted_sum, the same for CPU and CUDA: check, collect the addresses, launch.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "gradients.h"
#include "stable.h"

namespace udi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<std::optional<Tensor>>;

DType dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    default: STD_TORCH_CHECK(false, "udi_kernels: gradients must be float16, bfloat16, float32 or float64");
  }
}

// How the elements of one gradient lie in memory; of a stacked tensor, those of each of its slices.
struct Layout {
  const int64_t *sizes, *strides;
  int64_t dim, size = 1;

  Layout(const Tensor& t, bool stacked) : sizes(t.sizes().data()), strides(t.strides().data()), dim(t.dim()) {
    if (stacked) ++sizes, ++strides, --dim;
    for (int64_t d = 0; d < dim; ++d) size *= sizes[d];
  }

  bool operator==(const Layout& other) const {
    if (dim != other.dim) return false;
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] != other.sizes[d]) return false;
      if (sizes[d] != 1 && size != 0 && strides[d] != other.strides[d]) return false;
    }
    return true;
  }

  // Whether the elements fill one block of memory: every stride is the product of the sizes of the inner dimensions.
  bool dense() const {
    if (size == 0) return true;
    int64_t step = 1;
    for (int64_t done = 1; done < size; done = step) {
      for (int64_t d = 0; d < dim; ++d) {
        if (sizes[d] != 1 && strides[d] == step) {
          step *= sizes[d];
          break;
        }
      }
      if (step == done) return false;
    }
    return true;
  }
};

// The addresses in grads, and in out if given. One parameter's tensors must lie alike, or addresses mean nothing.
Gradients collect(const TensorList& grads, int64_t k, bool stacked, const std::vector<Tensor>* out) {
  STD_TORCH_CHECK(k > 0 && (stacked || grads.size() % k == 0), "udi_kernels: grads must hold K*P tensors");
  const size_t params = stacked ? grads.size() : grads.size() / k;
  STD_TORCH_CHECK(!out || out->size() == params, "udi_kernels: out must hold P tensors");
  Gradients all;
  all.k = k;
  all.parameters.resize(params);
  all.data.resize(params * k);
  const Tensor* any = nullptr;
  for (size_t p = 0; p < params; ++p) {
    auto& parameter = all.parameters[p];
    std::optional<Layout> layout;
    const auto admit = [&](const Tensor& t, bool stacked) {
      if (!any) any = &t, all.device = t.get_device_index();
      const Layout its(t, stacked);
      if (!layout) {
        STD_TORCH_CHECK(its.dense(), "udi_kernels: gradients must be dense");
        layout = its;
        parameter = {dtype(t), its.size, nullptr};
      }
      STD_TORCH_CHECK(its == *layout && dtype(t) == parameter.dtype && t.get_device_index() == all.device,
                      "udi_kernels: tensors of a parameter must agree in shape, strides, dtype and device");
    };
    const void** const data = &all.data[p * k];
    for (int64_t i = 0; i < k; ++i) {
      const auto& t = grads[stacked ? p : i * params + p];
      if (!t) continue;
      if (stacked) STD_TORCH_CHECK(t->dim() > 0 && t->size(0) == k, "udi_kernels: stacked gradients need size K first");
      if (!stacked || i == 0) admit(*t, stacked);
      const int64_t offset = stacked ? i * t->stride(0) * static_cast<int64_t>(t->element_size()) : 0;
      data[i] = static_cast<const char*>(t->data_ptr()) + offset;
    }
    if (out) {
      admit((*out)[p], false);
      parameter.out = (*out)[p].data_ptr();
    }
  }
  STD_TORCH_CHECK(any, "udi_kernels: at least one gradient must be a tensor");
  return all;
}

bool wide(const Gradients& g) {
  return std::any_of(g.parameters.begin(), g.parameters.end(), [](auto& p) { return p.dtype == DType::kDouble; });
}

Tensor gramian(TensorList grads, int64_t k, bool stacked) {
  Gradients all = collect(grads, k, stacked, nullptr);
  const bool is_wide = wide(all);
  const Plan plan(std::move(all));
  const Tensor& like = **std::find_if(grads.begin(), grads.end(), [](auto& g) { return g.has_value(); });
  const std::vector<int64_t> shape{k, k}, doubles{plan.scratch()};
  Tensor gram = torch::stable::new_empty(like, shape, is_wide ? ScalarType::Double : ScalarType::Float);
  const Tensor scratch = torch::stable::new_empty(like, doubles, ScalarType::Double);
  plan.gramian(static_cast<double*>(scratch.data_ptr()), gram.data_ptr(), is_wide);
  return gram;
}

void weighted_sum(std::vector<Tensor> out, TensorList grads, Tensor weights, bool stacked) {
  if (out.empty()) return;
  const bool is_wide = weights.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK((is_wide || weights.scalar_type() == ScalarType::Float) && weights.is_contiguous(),
                  "udi_kernels: weights must be contiguous and float32 or float64");
  Gradients all = collect(grads, weights.numel(), stacked, &out);
  STD_TORCH_CHECK(weights.get_device_index() == all.device, "udi_kernels: weights must be on the gradients' device");
  Plan(std::move(all)).weighted_sum(weights.data_ptr(), is_wide);
}

}  // namespace
}  // namespace udi

#define UDI_GRADIENT_OPS(KEY)                           \
  STABLE_TORCH_LIBRARY_IMPL(udi_kernels, KEY, m) {      \
    m.impl("gramian", TORCH_BOX(&udi::gramian));        \
    m.impl("weighted_sum", TORCH_BOX(&udi::weighted_sum)); \
  }
