// effective_dims: its checks; it has no gradient.
#pragma once

#include "checks.h"

namespace udi {
namespace {

struct EffectiveDims {
  using Signature = Tensor(const Tensor&, const Tensor&, int64_t);

  static const auto& fwd() {
    static const auto fwd = op<Signature>("udi_kernels::effective_dims_fwd");
    return fwd;
  }
};

// Labels as numbers of the classes that have a sample, in the same order; -1 for rows of none.
Tensor ranks(const Tensor& labels, int64_t num_classes) {
  auto [sorted, order] = labels.masked_fill(labels.lt(0).logical_or(labels.ge(num_classes)), -1).sort(true, 0, false);
  Tensor first = sorted.slice(0, 0, 1).ge(0), next = sorted.slice(0, 1).ne(sorted.slice(0, 0, -1));
  Tensor numbers = at::cat({first, next}).cumsum(0).sub(1);
  return at::empty_like(numbers).scatter_(0, order, numbers);
}

Tensor effective_dims(const Tensor& features, const Tensor& labels, int64_t num_classes) {
  check_tensors("effective_dims", {{"features", features}});
  TORCH_CHECK_VALUE(features.dim() == 2, "effective_dims: features must have shape (N, D), got ",
                    python(features.sym_sizes()));
  check_dense("effective_dims", "labels", labels);
  TORCH_CHECK_TYPE(integers(labels.scalar_type()), "effective_dims: labels must be of integers, got ",
                   python(labels.scalar_type()), "; pass labels.long()");
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.sym_size(0) == features.sym_size(0),
                    "effective_dims: labels must have shape ", python(features.sym_sizes().slice(0, 1)),
                    ", one per row, got ", python(labels.sym_sizes()));
  TORCH_CHECK_VALUE(labels.device() == features.device(), "effective_dims: labels must be on ", features.device(),
                    " as features is, got ", labels.device());
  TORCH_CHECK_VALUE(num_classes > 0, "effective_dims: num_classes must be positive, got ", num_classes);
  if (labels.is_cpu() && labels.numel() != 0) {
    const auto largest = labels.max().item<int64_t>();
    TORCH_CHECK_VALUE(largest < num_classes, "effective_dims: labels must be below num_classes (", num_classes,
                      "), got ", largest);
  }
  Tensor rows = matrix(features, features.scalar_type(), false), numbers = labels.to(at::kLong);
  // Classes without a sample change nothing, and there may be more of them than memory holds.
  if (num_classes > numbers.size(0)) {
    numbers = ranks(numbers, num_classes);
    num_classes = std::max<int64_t>(numbers.size(0), 1);
  }
  // As for float32: these kernels compute in float64, whatever the dtype.
  if (!kernels_serve<EffectiveDims>(at::kFloat, {{"features", features}})) {
    static const auto reference = op<EffectiveDims::Signature>("udi_kernels::effective_dims_reference");
    return reference.call(rows, numbers, num_classes);
  }
  return EffectiveDims::fwd().call(rows, numbers, num_classes);
}

}  // namespace
}  // namespace udi
