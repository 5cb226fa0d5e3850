// The kernels of gradients.cu by name; kernels.cpp is compiled once for each element type.
#pragma once

#include <memory>
#include <vector>

struct CpuKernel {
  const char* name;
  void (*run)(const void* arguments);  // addresses of the kernel's
  std::vector<size_t> sizes;           // of the arguments
};

extern const CpuKernel float_kernels[], double_kernels[], bfloat16_kernels[], half_kernels[];
