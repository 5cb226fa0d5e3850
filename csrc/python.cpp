// The Python module of each library: its compiler, what the other library needs, and the shared constants.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "gradients.h"
#if defined(USE_CUDA)
#include <stdexcept>
#include <utility>

#include "cuda/driver.h"

namespace {

// f(kernel, device) -> (code, entry); see compile in cuda/driver.h.
void use_compiler(const pybind11::function& f) {
  static pybind11::handle compiler;  // never released: calls may come until the interpreter ends
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
  // Constants that Python and Triton repeat, by their names there; tests/kernels/test_ops.py compares them.
  using Constants = std::map<std::string, int64_t>;
  m.attr("REDUCTION") = Constants{{"NONE", udi::kNone}, {"SUM", udi::kSum}, {"MEAN", udi::kMean}};
  m.attr("JS_DIV") = Constants{{"MAX_Q", udi::js_div_stats::kMaxQ}, {"INV_Q", udi::js_div_stats::kInvQ},
                               {"MAX_P", udi::js_div_stats::kMaxP}, {"INV_P", udi::js_div_stats::kInvP},
                               {"DIV_Q", udi::js_div_stats::kDivQ}, {"DIV_P", udi::js_div_stats::kDivP},
                               {"SHARE", udi::js_div_stats::kShare}};
  m.attr("TAIL") = Constants{{"RENORMALIZE", udi::kRenormalize}, {"BUCKET", udi::kBucket}, {"ZERO", udi::kZero}};
  m.attr("JS_DIV_TOPK") =
      Constants{{"MAX", udi::js_div_topk_stats::kMax},        {"INV", udi::js_div_topk_stats::kInv},
                {"LOG_SUM", udi::js_div_topk_stats::kLogSum}, {"MEAN_U", udi::js_div_topk_stats::kMean},
                {"SLOPE", udi::js_div_topk_stats::kSlope},    {"SHARE", udi::js_div_topk_stats::kShare}};
  m.attr("CLUB") = Constants{{"SHIFT", udi::club_stats::kShift},
                             {"MEAN_Y", udi::club_stats::kMeanY},
                             {"VAR_Y", udi::club_stats::kVarY},
                             {"MEAN_W", udi::club_stats::kMeanW},
                             {"MEAN_WMU", udi::club_stats::kMeanWMu}};
  m.attr("DUC") = Constants{
      {"MAX", udi::duc_stats::kMax}, {"INV_SUM", udi::duc_stats::kInvSum}, {"OTHERS", udi::duc_stats::kOthers}};
  m.attr("SMALL_CLASS") = udi::club_stats::kSmallClass;
#if defined(USE_CUDA)
  m.def("use_compiler", use_compiler);
#endif
}
