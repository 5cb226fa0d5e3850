// The Python module of each library: how it was built, and what the libraries tell each other.
#include <pybind11/pybind11.h>

#include "gradients.h"
#if defined(USE_CUDA)
#include <stdexcept>
#include <utility>

#include "cuda/driver.h"

namespace {

// f(kernel, device) -> (code, entry); see compile in cuda/driver.h.
void use_compiler(const pybind11::function& f) {
  static pybind11::handle compiler;  // kept for ever: calls may come until the interpreter is gone
  compiler = f.inc_ref();
  udi::compile = [](const std::string& kernel, int device) {
    const pybind11::gil_scoped_acquire locked;
    try {
      auto [code, entry] = compiler(kernel, device).cast<std::pair<std::string, std::string>>();
      return udi::Image{std::move(code), std::move(entry)};
    } catch (const pybind11::error_already_set& e) {
      throw std::runtime_error(e.what());
    }
  };
}

}  // namespace
#endif

PYBIND11_MODULE(UDI_MODULE, m) {
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
  m.attr("make_plan") = reinterpret_cast<uintptr_t>(&udi::make_plan);
  // Names by number: what udi_kernels/_ops.py must agree with.
  pybind11::dict reductions;
  reductions["none"] = int(udi::kNone), reductions["sum"] = int(udi::kSum), reductions["mean"] = int(udi::kMean);
  m.attr("REDUCTIONS") = reductions;
#if defined(USE_CUDA)
  m.def("use_compiler", use_compiler);
#endif
}
