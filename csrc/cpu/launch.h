// What the CPU launchers share.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../enums.h"
#include "../stable.h"
#include "vec.h"

namespace udi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a null pointer of the tensor's element type.
template <class F>
auto dispatch(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "udi_kernels: not a floating-point dtype");
  }
}

inline ScalarType compute_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls the C function, because torch::stable::new_empty goes through the dispatcher, a microsecond per tensor.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const std::vector<int64_t>& strides) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return empty(sizes, dtype, strides);
}

// A gradient, or an empty tensor where it is not needed.
inline Tensor empty_grad(const Tensor& like, bool needed) {
  return empty(needed ? std::vector<int64_t>{like.size(0), like.size(1)} : std::vector<int64_t>{0}, like.scalar_type());
}

// Rows of a matrix, each of adjacent elements; the row stride is arbitrary, and rows may overlap.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  Rows() = default;
  explicit Rows(const Tensor& t) : data(static_cast<T*>(t.data_ptr())), stride(t.stride(0)) {
    if (t.numel() == 0) data = nullptr;
    STD_TORCH_CHECK(!data || t.size(1) <= 1 || t.stride(1) == 1, "udi_kernels: the elements of a row must be adjacent");
  }
  T* operator[](int64_t r) const { return data + r * stride; }
  explicit operator bool() const { return data; }
};

// A factor per row: a vector of any stride, a scalar that all rows share, or nothing (1).
template <class S>
struct Factor {
  const S* data = nullptr;
  int64_t stride = 0;

  Factor() = default;
  Factor(const S* data, int64_t stride) : data(data), stride(stride) {}
  explicit Factor(const Tensor& t) : data(static_cast<const S*>(t.data_ptr())), stride(t.dim() ? t.stride(0) : 0) {
    STD_TORCH_CHECK((t.scalar_type() == ScalarType::Double) == (sizeof(S) == 8) && t.element_size() == sizeof(S),
                    "udi_kernels: grad and weight must be float32, or float64 for float64 inputs");
  }
  S operator[](int64_t r) const { return data ? data[r * stride] : S(1); }
};

}  // namespace udi
