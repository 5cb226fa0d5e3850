// Gradients as addresses, and the kernels prepared for them: what ops/gradients.h needs from a device.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "enums.h"

namespace udi {

// K gradients over P parameters. A parameter's gradients are dense, and their elements lie in the same order.
struct Gradients {
  struct Parameter {
    DType dtype;
    int64_t size;  // elements
    void* out;     // where weighted_sum writes; may be the address of one of the gradients
  };
  int64_t k = 0;
  int device = 0;
  std::vector<Parameter> parameters;
  std::vector<const void*> data;  // K per parameter; null is a zero gradient
};

class Plan {
 public:
  virtual ~Plan() = default;

  // How many doubles of device memory gramian needs, uninitialised; one call at a time may use them.
  virtual int64_t scratch() const = 0;

  // gram: (K, K) float, or double if wide.
  virtual void gramian(double* scratch, void* gram, bool wide) const = 0;

  // weights: K floats, or doubles if wide.
  virtual void weighted_sum(const void* weights, bool wide) const = 0;
};

// Each library makes plans for its own device.
std::unique_ptr<const Plan> make_plan(Gradients gradients);

}  // namespace udi
