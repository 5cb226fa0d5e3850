// Rows of logits, masks, and how the losses of rows become one.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "launch.h"

namespace udi {
namespace {

// Logits (R, C), or (A, B, C) with row a B + b at [a, b]; of any strides.
template <class T>
struct Logits {
  T* data = nullptr;
  int64_t inner = 0, outer_stride = 0, stride = 0, step = 1;  // inner: B; step: from class to class

  Logits() = default;
  explicit Logits(const Tensor& t) : data(static_cast<T*>(t.data_ptr())), stride(t.stride(t.dim() - 2)) {
    if (t.size(t.dim() - 1) > 1) step = t.stride(t.dim() - 1);
    if (t.dim() == 3) inner = t.size(1), outer_stride = t.stride(0);
    if (t.numel() == 0) data = nullptr;
  }
  T* operator[](int64_t r) const {
    return inner ? data + r / inner * outer_stride + r % inner * stride : data + r * stride;
  }
  explicit operator bool() const { return data; }
};

std::pair<int64_t, int64_t> shape(const Tensor& logits) {
  int64_t classes = logits.size(logits.dim() - 1);
  return {logits.dim() == 3 ? logits.size(0) * logits.size(1) : logits.size(0), classes};
}

// The rows whose weight is 0, and the others.
struct Mask {
  std::vector<int64_t> masked, kept;

  template <class S>
  Mask(int64_t rows, Factor<S> weight) {
    for (int64_t r = 0; r < rows; ++r) (weight[r] == 0 ? masked : kept).push_back(r);
  }
};

// The result of the op, from the losses of the rows. For a weighted mean, also each row's weight over their sum.
template <class S>
void reduce(const std::vector<S>& losses, Factor<S> weight, const std::optional<Mask>& mask, int64_t reduction, S* out,
            S* shares) {
  const int64_t rows = losses.size();
  double total = 0, mass = shares ? 0 : rows;
  for (int64_t r = 0; r < rows; ++r) {
    double row = double(weight[r]) * losses[r];
    if (reduction == kNone) out[r] = S(row);
    total += row;
    if (shares) mass += weight[r];
  }
  if (rows && mask && mask->kept.empty()) mass = 1;  // so that the mean is 0
  if (reduction != kNone) *out = S(reduction == kMean ? total / mass : total);
  if (shares)
    for (int64_t r = 0; r < rows; ++r) shares[r] = weight[r] == 0 ? 0 : S(weight[r] / mass);
}

}  // namespace
}  // namespace udi
