// gramian, weighted_sum and GradientPlan: their checks, copies of gradients that are not dense or differ in layout,
// calls of kernels.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include "../gradients.h"
#include "checks.h"

namespace udi {
namespace {

using MaybeTensors = c10::List<std::optional<Tensor>>;
using MakePlan = std::unique_ptr<const Plan> (*)(Gradients);

MakePlan make_cuda_plan = nullptr;  // set once the CUDA library is loaded

// Null where no kernel serves and the reference does.
MakePlan plan_maker(const Tensor& like) {
  return like.is_cpu() ? make_plan : like.is_cuda() ? make_cuda_plan : nullptr;
}

// The memory layout of one gradient; of a stacked tensor, that of each of its slices.
struct Layout {
  at::IntArrayRef sizes, strides;
  int64_t size = 1;

  Layout(const Tensor& t, bool stacked) : sizes(t.sizes().slice(stacked)), strides(t.strides().slice(stacked)) {
    for (int64_t n : sizes) size *= n;
  }

  bool operator==(const Layout& other) const {
    if (sizes != other.sizes) return false;
    for (size_t d = 0; size && d < sizes.size(); ++d)
      if (sizes[d] != 1 && strides[d] != other.strides[d]) return false;
    return true;
  }

  // Whether the elements fill one block of memory: every stride is the product of the sizes of the inner dimensions.
  bool dense() const {
    if (size == 0) return true;
    int64_t step = 1;
    for (int64_t done = 1; done < size; done = step) {
      for (size_t d = 0; d < sizes.size(); ++d) {
        if (sizes[d] != 1 && strides[d] == step) {
          step *= sizes[d];
          break;
        }
      }
      if (step == done) return false;
    }
    return true;
  }
};

// Whether memory holds the elements themselves, without gaps.
bool dense(const Tensor& t, bool stacked) { return !t.is_neg() && Layout(t, stacked).dense(); }

// K gradients over P parameters as callers pass them: K*P tensors, list after list, or P stacked ones. A tensor for
// None is undefined.
struct Lists {
  const char* op;
  bool stacked;
  int64_t k, params;
  std::vector<Tensor> tensors;
  Tensor any;                // the first that is defined
  at::ScalarType sum_dtype;  // float64 if a gradient is

  Tensor& at(int64_t i, int64_t p) { return tensors[stacked ? p : i * params + p]; }
  const Tensor& at(int64_t i, int64_t p) const { return tensors[stacked ? p : i * params + p]; }
  int64_t rows() const { return stacked ? 1 : k; }

  // Any gradient of the parameter, or an undefined tensor.
  const Tensor& like(int64_t p) const {
    for (int64_t i = 0; i + 1 < rows(); ++i)
      if (at(i, p).defined()) return at(i, p);
    return at(rows() - 1, p);
  }

  std::string name(int64_t i, int64_t p) const {
    return (stacked ? "grads[" : "grads[" + std::to_string(i) + "][") + std::to_string(p) + "]";
  }
};

template <class Name>
void check_strided(const char* op, const Tensor& t, Name name) {
  TORCH_CHECK_VALUE(!t.is_nested(), op, ": ", name(), " must be dense, got a nested tensor; call .to_padded_tensor(0)");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, op, ": ", name(), " must be dense, got ", python(t.layout()),
                    "; call .to_dense()");
}

// Checks a tensor by itself. This runs for every tensor, so `name` is called for an error only.
template <class Name>
void admit(const char* op, const Tensor& t, const Tensor& like, Name name) {
  check_strided(op, t, name);
  TORCH_CHECK_TYPE(floating(t.scalar_type()), op, ": ", name(), " must be float16, bfloat16, float32 or float64, got ",
                   python(t.scalar_type()));
  TORCH_CHECK_VALUE(!t.requires_grad() || !at::GradMode::is_enabled(), op, ": ", name(),
                    " must not require grad (this op is not differentiable); detach it, or call under torch.no_grad()");
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name(), " must be on ", like.device(),
                    " as the others are, got ", t.device());
}

void check_layout(const char* op, const std::string& name, const Layout& got, const Layout& want,
                  const std::string& other) {
  TORCH_CHECK_VALUE(got == want, op, ": ", name, " must have strides ", python(c10::fromIntArrayRefSlow(want.strides)),
                    " as ", other, " has, got ", python(c10::fromIntArrayRefSlow(got.strides)),
                    "; call .contiguous() on both");
}

void check_like(const char* op, const std::string& name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes,
                const std::string& other) {
  TORCH_CHECK_VALUE(t.scalar_type() == dtype, op, ": ", name, " must have dtype ", python(dtype), " as ", other,
                    " has, got ", python(t.scalar_type()));
  TORCH_CHECK_VALUE(t.sizes() == sizes, op, ": ", name, " must have shape ", python(c10::fromIntArrayRefSlow(sizes)),
                    " as ", other, " has, got ", python(t.sym_sizes()));
}

// Checks the K gradients of a parameter, and copies those that are not dense or have another layout than the first
// dense one. `preferred` is a layout that comes first if a gradient has it.
void align(Lists& g, int64_t p, bool may_copy, const Tensor* preferred) {
  const auto is_preferred = [&](const Tensor& t) {
    return preferred && preferred->layout() == at::kStrided && Layout(t, false) == Layout(*preferred, false);
  };
  int64_t first = -1, chosen = -1;
  for (int64_t i = 0; i < g.k; ++i) {
    const Tensor& t = g.at(i, p);
    if (!t.defined()) continue;
    if (first < 0) first = i;
    check_like(g.op, g.name(i, p), t, g.at(first, p).scalar_type(), g.at(first, p).sizes(), g.name(first, p));
    if (!dense(t, false)) continue;
    if (chosen < 0 || (is_preferred(t) && !is_preferred(g.at(chosen, p)))) chosen = i;
    if (!may_copy) check_layout(g.op, g.name(i, p), {t, false}, {g.at(chosen, p), false}, g.name(chosen, p));
  }
  const Tensor like = chosen < 0 ? at::empty_like(g.at(first, p), at::MemoryFormat::Contiguous) : g.at(chosen, p);
  for (int64_t i = 0; i < g.k; ++i) {
    Tensor& t = g.at(i, p);
    if (!t.defined() || (dense(t, false) && Layout(t, false) == Layout(like, false))) continue;
    TORCH_CHECK_VALUE(may_copy, g.op, ": ", g.name(i, p), " must be dense, got shape ", python(t.sym_sizes()),
                      " with strides ", python(t.sym_strides()), t.is_neg() ? " and a pending negation" : "",
                      "; call .clone() and keep that");
    t = at::empty_like(like).copy_(t);
  }
}

// Checks gradients; afterwards those of a parameter are dense and have one layout. k: how many lists; none: stacked.
// preferred: see `align`; one per parameter.
Lists parse(const char* op, const MaybeTensors& grads, std::optional<int64_t> k, bool may_copy,
            at::TensorList preferred = {}) {
  Lists g{op, !k, k.value_or(0), 0, {}, {}, at::kFloat};
  g.tensors.reserve(grads.size());
  for (size_t n = 0; n < grads.size(); ++n) {
    std::optional<Tensor> t = grads.get(n);
    g.tensors.push_back(t ? std::move(*t) : Tensor());
  }
  const auto any = std::find_if(g.tensors.begin(), g.tensors.end(), [](auto& t) { return t.defined(); });
  TORCH_CHECK_VALUE(any != g.tensors.end(), op, ": grads must hold at least one tensor, got none");
  const std::string first = "grads[" + std::to_string(any - g.tensors.begin()) + "]";
  g.any = *any;
  if (g.stacked) {
    TORCH_CHECK_VALUE(any->dim() > 0, op, ": ", first, " must have shape (K, *shape), got ()");
    g.k = any->size(0);
    TORCH_CHECK_VALUE(g.k > 0, op, ": ", first, " must hold at least one gradient, got shape ",
                      python(any->sym_sizes()));
  }
  g.params = g.tensors.size() / (g.stacked ? 1 : g.k);
  for (int64_t p = 0; p < g.params; ++p) {
    const Tensor* like = nullptr;
    bool alike = true;
    for (int64_t i = 0; i < g.rows(); ++i) {
      const Tensor& t = g.at(i, p);
      if (!t.defined()) continue;
      admit(op, t, g.any, [&] { return g.name(i, p); });
      if (t.scalar_type() == at::kDouble) g.sum_dtype = at::kDouble;
      if (g.stacked) {
        TORCH_CHECK_VALUE(t.dim() > 0, op, ": ", g.name(i, p), " must have shape (K, *shape), got ()");
        TORCH_CHECK_VALUE(t.size(0) == g.k, op, ": ", g.name(i, p), " must have size K of the first dimension ", g.k,
                          " as ", first, " has, got ", t.size(0));
      }
      if (!like) {
        like = &t;
        alike = dense(t, g.stacked);
      } else {
        alike =
            alike && t.scalar_type() == like->scalar_type() && !t.is_neg() && Layout(t, false) == Layout(*like, false);
      }
    }
    if (alike) continue;
    if (!g.stacked) {
      align(g, p, may_copy, p < static_cast<int64_t>(preferred.size()) ? &preferred[p] : nullptr);
      continue;
    }
    Tensor& t = g.at(0, p);
    TORCH_CHECK_VALUE(may_copy, op, ": ", g.name(0, p), " must be dense, got shape ", python(t.sym_sizes()),
                      " with strides ", python(t.sym_strides()), t.is_neg() ? " and a pending negation" : "",
                      "; call .clone() and keep that");
    t = at::empty_like(t, at::MemoryFormat::Contiguous).copy_(t);
  }
  return g;
}

// One gradient of the parameter, not stacked.
Tensor single(const Lists& g, int64_t p) {
  const Tensor& t = g.like(p);
  return t.defined() && g.stacked ? t.select(0, 0) : t;
}

// P tensors to write to, laid out as the gradients are; undefined where all are None.
std::vector<Tensor> allocate(const Lists& g) {
  std::vector<Tensor> out(g.params);
  for (int64_t p = 0; p < g.params; ++p)
    if (Tensor t = single(g, p); t.defined()) out[p] = at::empty_like(t);
  return out;
}

void check_out(const Lists& g, const std::vector<Tensor>& out) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(out.size()) == g.params, g.op, ": out must have length ", g.params,
                    ", one per parameter, got ", out.size());
  for (int64_t p = 0; p < g.params; ++p) {
    const auto name = [&] { return "out[" + std::to_string(p) + "]"; };
    admit(g.op, out[p], g.any, name);
    const Tensor like = single(g, p);
    if (like.defined() && like.scalar_type() == out[p].scalar_type() && Layout(out[p], false) == Layout(like, false))
      continue;
    const std::string other = "parameter " + std::to_string(p) + "'s gradient";
    const Tensor& t = out[p];
    const Tensor want = like.defined() ? like : at::empty_like(t, at::MemoryFormat::Contiguous);
    check_like(g.op, name(), t, want.scalar_type(), want.sizes(), other);
    check_layout(g.op, name(), {t, false}, {want, false}, other);
  }
}

// The same, laid out as the parameters are.
std::vector<Tensor> allocate_like(const Lists& g, const std::vector<Tensor>& like) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(like.size()) == g.params, g.op, ": like must have length ", g.params,
                    ", one per parameter, got ", like.size());
  std::vector<Tensor> out(g.params);
  for (int64_t p = 0; p < g.params; ++p) {
    const Tensor t = single(g, p);
    if (!t.defined()) continue;
    const auto name = [&] { return "like[" + std::to_string(p) + "]"; };
    check_strided(g.op, like[p], name);
    TORCH_CHECK_VALUE(like[p].sizes() == t.sizes(), g.op, ": ", name(), " must have shape ", python(t.sym_sizes()),
                      " as parameter ", p, "'s gradient has, got ", python(like[p].sym_sizes()));
    out[p] = at::empty_like(like[p], t.options());
  }
  return out;
}

// Checks the weights, and returns them as kernels take them.
Tensor check_weights(const Lists& g, const Tensor& weights) {
  admit(g.op, weights, g.any, [] { return "weights"; });
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.size(0) == g.k, g.op, ": weights must have shape (", g.k, ",), got ",
                    python(weights.sym_sizes()));
  return weights.resolve_neg().to(g.sum_dtype).contiguous();
}

DType dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::kDouble;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      return DType::kFloat;
  }
}

Gradients addresses(const Lists& g, const std::vector<Tensor>* out) {
  Gradients all;
  all.k = g.k;
  all.device = std::max<int>(0, g.any.device().index());
  for (int64_t p = 0; p < g.params; ++p) {
    const Tensor* to = out ? &(*out)[p] : nullptr;
    const Tensor& like = to && to->defined() ? *to : g.like(p);
    if (!like.defined()) continue;
    const bool stacked = g.stacked && &like != to;
    all.parameters.push_back({dtype(like), Layout(like, stacked).size, to ? to->mutable_data_ptr() : nullptr});
    for (int64_t i = 0; i < g.k; ++i) {
      const Tensor& t = g.at(i, p);
      const int64_t offset = g.stacked && t.defined() ? i * t.stride(0) * static_cast<int64_t>(t.element_size()) : 0;
      all.data.push_back(t.defined() ? static_cast<const char*>(t.const_data_ptr()) + offset : nullptr);
    }
  }
  return all;
}

MaybeTensors maybe(const std::vector<Tensor>& tensors) {
  MaybeTensors list;
  for (const auto& t : tensors) list.push_back(t.defined() ? std::optional(t) : std::nullopt);
  return list;
}

// Addresses.
struct Range {
  const char *begin, *end;
};

// From the first byte that is written to the last.
Range span(const std::vector<Tensor>& out) {
  Range all{reinterpret_cast<const char*>(UINTPTR_MAX), nullptr};
  for (const Tensor& t : out) {
    if (!t.defined() || !t.numel()) continue;
    const auto* begin = static_cast<const char*>(t.const_data_ptr());
    all = {std::min(all.begin, begin), std::max(all.end, begin + t.nbytes())};
  }
  return all;
}

// Refuses an output that shares memory with another output, or with a gradient that it is not itself: kernels would
// read what they have written. Addresses decide, because storages may overlap too.
void check_overlap(const Lists& g, const std::vector<Tensor>& out) {
  if (!g.any.is_cpu() && !g.any.is_cuda()) return;  // the reference serves, which writes last
  struct Output : Range {
    int64_t p;
  };
  std::vector<Output> written;
  written.reserve(out.size());
  for (int64_t p = 0; p < g.params; ++p) {
    const auto* begin = static_cast<const char*>(out[p].const_data_ptr());
    if (out[p].numel()) written.push_back({{begin, begin + out[p].nbytes()}, p});
  }
  std::sort(written.begin(), written.end(), [](const Output& a, const Output& b) { return a.begin < b.begin; });
  for (size_t n = 1; n < written.size(); ++n)
    TORCH_CHECK_VALUE(written[n - 1].end <= written[n].begin, g.op, ": out[", written[n].p, "] must not overlap out[",
                      written[n - 1].p, "]; call .clone() on one of them");
  const char* const last = reinterpret_cast<const char*>(UINTPTR_MAX);
  Range gap{last, last};  // between two outputs; most gradients lie in that of the gradient before
  for (int64_t i = 0; i < g.k; ++i) {
    for (int64_t p = 0; p < g.params; ++p) {
      const Tensor& t = g.at(i, p);
      if (!t.defined() || !t.numel()) continue;
      const auto* begin = static_cast<const char*>(t.const_data_ptr());
      if (g.stacked) begin += i * t.stride(0) * static_cast<int64_t>(t.element_size());
      const char* end = begin + (g.stacked ? t.nbytes() / g.k : t.nbytes());
      if (gap.begin <= begin && end <= gap.end) continue;
      const auto met = std::upper_bound(written.begin(), written.end(), begin,
                                        [](const char* begin, const Output& to) { return begin < to.end; });
      gap = {met == written.begin() ? nullptr : (met - 1)->end, met == written.end() ? last : met->begin};
      if (end <= gap.end) continue;
      TORCH_CHECK_VALUE(met->p == p && met->begin == begin && met->end == end, g.op, ": out[", met->p,
                        "] must not overlap ", g.name(i, p),
                        ", unless it is the same gradient; call .clone() on one of them");
    }
  }
}

std::optional<int64_t> count(const Lists& g) { return g.stacked ? std::nullopt : std::optional(g.k); }

// plan: null where the reference serves. wide: the result is float64 in any case.
Tensor compute_gramian(const Lists& g, const Plan* plan, bool wide) {
  if (!plan) {
    static const auto reference =
        op<Tensor(const MaybeTensors&, std::optional<int64_t>, bool)>("udi_kernels::gramian_reference");
    return reference.call(maybe(g.tensors), count(g), wide);
  }
  const auto options = g.any.options();
  const bool is_double = wide || g.sum_dtype == at::kDouble;
  Tensor gram = at::empty({g.k, g.k}, options.dtype(is_double ? at::kDouble : at::kFloat));
  const Tensor scratch = at::empty({plan->scratch()}, options.dtype(at::kDouble));
  plan->gramian(scratch.mutable_data_ptr<double>(), gram.mutable_data_ptr(), is_double);
  return gram;
}

// A parameter without gradient has an undefined tensor in `out`, and no part in the plan.
void compute_weighted_sum(const Lists& g, const Plan* plan, const Tensor& weights, const std::vector<Tensor>& out) {
  if (plan) return plan->weighted_sum(weights.const_data_ptr(), weights.scalar_type() == at::kDouble);
  static const auto reference = op<std::vector<Tensor>(const MaybeTensors&, std::optional<int64_t>, const Tensor&)>(
      "udi_kernels::weighted_sum_reference");
  const auto sums = reference.call(maybe(g.tensors), count(g), weights);
  for (size_t p = 0; p < out.size(); ++p)
    if (out[p].defined()) sums[p].numel() == out[p].numel() ? out[p].copy_(sums[p]) : out[p].zero_();
}

// The weights, copied if they may lie in memory that is written: kernels read them meanwhile.
Tensor apart(const Tensor& weights, const Range& written) {
  const auto* begin = static_cast<const char*>(weights.const_data_ptr());
  return begin < written.end && written.begin < begin + weights.nbytes() ? weights.clone() : weights;
}

// So that autograd refuses a backward pass through what the tensors held.
void bump_versions(const std::vector<Tensor>& out) {
  for (const Tensor& t : out)
    if (t.defined()) t.unsafeGetTensorImpl()->bump_version();
}

std::unique_ptr<const Plan> plan_for(const Lists& g, const std::vector<Tensor>* out) {
  const MakePlan make = plan_maker(g.any);
  return make ? make(addresses(g, out)) : nullptr;
}

Tensor gramian(const MaybeTensors& grads, std::optional<int64_t> k, bool wide) {
  const Lists g = parse("gramian", grads, k, true);
  return compute_gramian(g, plan_for(g, nullptr).get(), wide);
}

// One tensor per parameter; where it has no gradient, one without elements. like: the parameters, or none.
std::vector<Tensor> weighted_sum(const MaybeTensors& grads, std::optional<int64_t> k, const Tensor& weights,
                                 const std::optional<std::vector<Tensor>>& like) {
  const Lists g = parse("weighted_sum", grads, k, true, like ? at::TensorList(*like) : at::TensorList());
  const Tensor factors = check_weights(g, weights);
  std::vector<Tensor> out = like ? allocate_like(g, *like) : allocate(g);
  std::vector<Tensor> sums = out;  // in the layout of the gradients
  for (int64_t p = 0; like && p < g.params; ++p)
    if (const Tensor t = single(g, p); t.defined() && !(Layout(t, false) == Layout(out[p], false)))
      sums[p] = at::empty_like(t);
  compute_weighted_sum(g, plan_for(g, &sums).get(), factors, sums);
  for (int64_t p = 0; p < g.params; ++p) {
    if (!out[p].defined())
      out[p] = at::empty({0}, g.any.options());
    else if (!out[p].is_same(sums[p]))
      out[p].copy_(sums[p]);
  }
  return out;
}

void weighted_sum_out(at::TensorList out, const MaybeTensors& grads, std::optional<int64_t> k, const Tensor& weights) {
  const Lists g = parse("weighted_sum", grads, k, true, out);
  const Tensor factors = check_weights(g, weights);
  const std::vector<Tensor> to = out.vec();
  check_out(g, to);
  check_overlap(g, to);
  bump_versions(to);
  compute_weighted_sum(g, plan_for(g, &to).get(), apart(factors, span(to)), to);
}

// A caller's buffer, and its memory, dtype and layout when the plan was made.
struct Buffer {
  Tensor tensor;
  const void* data;
  at::ScalarType dtype;
  at::DimVector sizes, strides;

  explicit Buffer(const Tensor& t)
      : tensor(t), data(t.const_data_ptr()), dtype(t.scalar_type()), sizes(t.sizes()), strides(t.strides()) {}

  bool stays() const {
    return tensor.scalar_type() == dtype && tensor.sizes() == sizes && tensor.strides() == strides &&
           (tensor.numel() == 0 || tensor.const_data_ptr() == data);
  }
};

struct GradientPlan : torch::CustomClassHolder {
  GradientPlan(const MaybeTensors& grads, std::optional<int64_t> k, std::optional<std::vector<Tensor>> out)
      : lists_(parse("GradientPlan", grads, k, false)) {
    if (out) {
      check_out(lists_, *out);
      check_overlap(lists_, *out);
      out_ = std::move(*out);
    }
    prepare();
  }

  // Where weighted_sum writes if the caller gave no `out`; tensors without elements stand for None.
  std::vector<Tensor> allocate() {
    out_ = udi::allocate(lists_);
    prepare();
    std::vector<Tensor> out = out_;
    for (auto& t : out)
      if (!t.defined()) t = at::empty({0}, lists_.any.options());
    return out;
  }

  Tensor gramian() const {
    check();
    return compute_gramian(lists_, plan_.get(), false);
  }

  void weighted_sum(const Tensor& weights) const {
    check();
    const Tensor factors = check_weights(lists_, weights);
    bump_versions(out_);
    compute_weighted_sum(lists_, plan_.get(), apart(factors, written_), out_);
  }

 private:
  Lists lists_;
  std::vector<Tensor> out_;
  std::vector<Buffer> buffers_;  // of the gradients that are not None, then of `out`
  std::unique_ptr<const Plan> plan_;
  Range written_;

  void prepare() {
    written_ = span(out_);
    plan_ = plan_for(lists_, out_.empty() ? nullptr : &out_);
    buffers_.clear();
    for (const auto* tensors : {&lists_.tensors, &out_})
      for (const Tensor& t : *tensors)
        if (t.defined()) buffers_.emplace_back(t);
  }

  void check() const {
    for (const Buffer& b : buffers_)
      if (C10_UNLIKELY(!b.stays())) moved(b);
  }

  void moved(const Buffer& b) const {
    const Tensor* t = &b.tensor;
    std::string name;
    for (size_t n = 0; n < lists_.tensors.size(); ++n)
      if (lists_.tensors[n].is_same(*t)) name = lists_.name(n / lists_.params, n % lists_.params);
    for (size_t p = 0; p < out_.size(); ++p)
      if (name.empty() && out_[p].is_same(*t)) name = "out[" + std::to_string(p) + "]";
    TORCH_CHECK(false, "GradientPlan: ", name, " must stay the ", python(b.dtype), " buffer of shape ",
                python(c10::fromIntArrayRefSlow(b.sizes)),
                " that the plan was made with, but its memory or layout has changed; write to it in place, or make a "
                "new plan");
  }
};

}  // namespace
}  // namespace udi
