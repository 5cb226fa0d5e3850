// What the ops and the plan share: gradients as addresses, and the work on them prepared once.
// cpu/gradients.cpp and cuda/gradients.cu implement Plan, each for the library it is linked into.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace udi {

enum class DType : int { kFloat, kDouble, kBFloat16, kHalf };

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
  explicit Plan(Gradients gradients);

  // Doubles of memory that gramian needs on the device, uninitialised; one call at a time may use them.
  int64_t scratch() const;

  // gram: (K, K) float, or double if wide.
  void gramian(double* scratch, void* gram, bool wide) const;

  // weights: K floats, or doubles if wide.
  void weighted_sum(const void* weights, bool wide) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace udi
