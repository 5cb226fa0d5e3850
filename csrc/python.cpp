// The Python module of each library: how it was built, and what the libraries tell each other.
#include <pybind11/pybind11.h>

#include "gradients.h"

PYBIND11_MODULE(UDI_MODULE, m) {
  m.attr("compiler") = "g++ " __VERSION__;
  m.attr("make_plan") = reinterpret_cast<uintptr_t>(&udi::make_plan);
  // Names by number: what udi_kernels/_ops.py must agree with.
  pybind11::dict reductions;
  reductions["none"] = int(udi::kNone), reductions["sum"] = int(udi::kSum), reductions["mean"] = int(udi::kMean);
  m.attr("REDUCTIONS") = reductions;
}
