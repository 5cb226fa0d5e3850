// The Python module of each library: the plan of its gradient ops, and how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "gradients.h"

namespace py = pybind11;
using udi::Gradients;
using udi::Plan;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

Plan make_plan(int64_t k, int device, const std::vector<int>& dtypes, const std::vector<int64_t>& sizes,
               const std::vector<uintptr_t>& data, const std::vector<uintptr_t>& out) {
  if (k < 1 || dtypes.size() != sizes.size() || data.size() != sizes.size() * k || out.size() != sizes.size())
    throw py::value_error("Plan: dtypes, sizes and out need P entries, data K*P");
  Gradients gradients;
  gradients.k = k;
  gradients.device = device;
  for (size_t p = 0; p < sizes.size(); ++p)
    gradients.parameters.push_back({static_cast<udi::DType>(dtypes[p]), sizes[p], pointer(out[p])});
  for (uintptr_t address : data) gradients.data.push_back(pointer(address));
  return Plan(std::move(gradients));
}

}  // namespace

PYBIND11_MODULE(UDI_MODULE, m) {
  m.attr("compiler") = "g++ " __VERSION__;
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<Plan>(m, "Plan")
      .def(py::init(&make_plan), py::arg("k"), py::arg("device"), py::arg("dtypes"), py::arg("sizes"), py::arg("data"),
           py::arg("out"))
      .def("scratch", &Plan::scratch)
      .def("gramian", [](const Plan& plan, uintptr_t scratch, uintptr_t gram, bool wide) {
            plan.gramian(static_cast<double*>(pointer(scratch)), pointer(gram), wide);
          }, unlocked)
      .def("weighted_sum", [](const Plan& plan, uintptr_t weights, bool wide) {
            plan.weighted_sum(pointer(weights), wide);
          }, unlocked);
}
