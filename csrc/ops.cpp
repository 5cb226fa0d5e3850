// The public ops of all devices: they check their arguments, record the losses in autograd's graph, and call kernels.
//
// They are in C++ because small calls are mostly overhead: forward and backward of js_div at 64 x 101 took 111 us with
// Python's autograd.Function and checks, and take 88. The price is ATen, whose headers take ten seconds to compile. So
// all ops are one translation unit, and everything else in this folder uses the stable ABI.
#include "ops/certainty.h"
#include "ops/club.h"
#include "ops/duc.h"
#include "ops/effective_dims.h"
#include "ops/gradients.h"
#include "ops/js_div.h"
#include "ops/js_div_topk.h"

namespace udi {
namespace {

void losses(torch::Library& m) {
  m.impl("js_div", js_div<JSDiv>);
  m.impl("js_div_inplace", js_div<InplaceJSDiv>);
  m.impl("skew_kl", skew_kl);
  m.impl("js_div_topk", js_div_topk);
  m.impl("club_mi", club_mi);
  m.impl("club_nll", club_nll);
  m.impl("duc_loss", duc_loss);
  m.impl("certainty_fusion", certainty_fusion);
}
TORCH_LIBRARY_IMPL(udi_kernels, CompositeImplicitAutograd, m) { losses(m); }
TORCH_LIBRARY_IMPL(udi_kernels, CompositeImplicitAutogradNestedTensor, m) { losses(m); }  // which their checks refuse

void gradients(torch::Library& m) {
  m.impl("gramian", gramian);
  m.impl("weighted_sum", weighted_sum);
  m.impl("weighted_sum_out", weighted_sum_out);
}

TORCH_LIBRARY_IMPL(udi_kernels, CompositeExplicitAutograd, m) {
  m.impl("effective_dims", effective_dims);
  gradients(m);
}

// They refuse nested tensors in words.
TORCH_LIBRARY_IMPL(udi_kernels, CompositeImplicitAutogradNestedTensor, m) { gradients(m); }

// The ops on gradients record nothing, even where `like` requires a gradient.
TORCH_LIBRARY_IMPL(udi_kernels, Autograd, m) {
  for (const char* name : {"gramian", "weighted_sum", "weighted_sum_out"})
    m.impl(name, torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_FRAGMENT(udi_kernels, m) {
  m.class_<GradientPlan>("GradientPlan")
      .def(torch::init<MaybeTensors, std::optional<int64_t>, std::optional<std::vector<Tensor>>>())
      .def_static("use_cuda", [](int64_t make) { make_cuda_plan = reinterpret_cast<MakePlan>(make); })
      .def("allocate", &GradientPlan::allocate)
      .def("gramian", &GradientPlan::gramian)
      .def("weighted_sum", &GradientPlan::weighted_sum);
}

}  // namespace
}  // namespace udi
