// Numbers that mean something on both sides of a border: between Python and C++, and between launchers and kernels.
#pragma once

#include <cstdint>

namespace udi {

// How the losses of the rows become one; REDUCTIONS in udi_kernels/_ops.py.
enum Reduction : int64_t { kNone, kSum, kMean };

enum class DType : int { kFloat, kDouble, kBFloat16, kHalf };

}  // namespace udi
