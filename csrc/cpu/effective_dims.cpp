// Which dimensions of labelled features are effective: where the nearest class mean, in that dimension alone, is the
// sample's own more often than on average over all dimensions.
//
// In one dimension the values nearest to a class mean are an interval, from the middle between it and the next smaller
// mean to the middle between it and the next larger. So a sample needs two comparisons, whatever the number of classes.
#include <limits>
#include <memory>
#include <numeric>

#include "launch.h"

namespace udi {
namespace {

constexpr int64_t kColumns = 64;  // of a task; one thread sums a column, so that threads change no result
constexpr double kNever = std::numeric_limits<double>::infinity();  // NaN and infinite values are nearest to no mean

// The intervals [low, high] of one column's classes; `order` is scratch. Of equal means, and in the middle between two,
// the lower class wins, as in argmin.
void intervals(const std::vector<double>& means, std::vector<int64_t>& order, double* low, double* high,
               int64_t stride) {
  order.clear();
  for (size_t k = 0; k < means.size(); ++k)
    if (std::isfinite(means[k]))
      order.push_back(k);  // absent classes have no mean
    else
      low[k * stride] = kNever, high[k * stride] = -kNever;
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return means[a] < means[b] || (means[a] == means[b] && a < b); });
  double begin = std::numeric_limits<double>::lowest();
  for (size_t i = 0, next; i < order.size(); i = next) {
    const int64_t k = order[i];
    for (next = i + 1; next < order.size() && means[order[next]] == means[k]; ++next)
      low[order[next] * stride] = kNever, high[order[next] * stride] = -kNever;
    low[k * stride] = begin;
    if (next == order.size()) {
      high[k * stride] = std::numeric_limits<double>::max();
    } else {
      const double middle = std::midpoint(means[k], means[order[next]]);
      const bool ours = k < order[next];
      high[k * stride] = ours ? middle : std::nextafter(middle, -kNever);
      begin = ours ? std::nextafter(middle, kNever) : middle;
    }
  }
}

// How many rows are nearest to their own class, for `columns` columns from `first`. Rows of a negative label are left
// out.
template <class T>
void count_hits(Rows<T> x, const int64_t* labels, int64_t n, int64_t classes, int64_t first, int64_t columns,
                int64_t* hits) {
  constexpr int64_t w = kColumns;
  auto sums = std::make_unique<double[]>(classes * w);  // of classes; then the lower ends of the intervals
  std::vector<double> high(classes * w), means(classes);
  std::vector<int64_t> counts(classes), order;
  for (int64_t r = 0; r < n; ++r) {
    if (labels[r] < 0) continue;
    ++counts[labels[r]];
    double* sum = &sums[labels[r] * w];
    const T* row = x[r] + first;
    for (int64_t c = 0; c < columns; ++c) sum[c] += double(compute_t<T>(row[c]));
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t k = 0; k < classes; ++k) means[k] = sums[k * w + c] / double(counts[k]);
    intervals(means, order, &sums[c], &high[c], w);
  }
  for (int64_t r = 0; r < n; ++r) {
    if (labels[r] < 0) continue;
    const double *low = &sums[labels[r] * w], *top = &high[labels[r] * w];
    const T* row = x[r] + first;
    for (int64_t c = 0; c < columns; ++c) {
      const double value = compute_t<T>(row[c]);
      hits[c] += (value >= low[c]) & (value <= top[c]);
    }
  }
}

Tensor effective_dims_fwd(const Tensor& features, const Tensor& labels, int64_t classes) {
  const int64_t n = features.size(0), d = features.size(1);
  Tensor effective = empty({d}, ScalarType::Bool);
  std::vector<int64_t> own(n), hits(d);
  for (int64_t r = 0; r < n; ++r) own[r] = static_cast<const int64_t*>(labels.data_ptr())[r * labels.stride(0)];
  dispatch(features, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    torch::stable::parallel_for(0, (d + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * kColumns; c < std::min(end * kColumns, d); c += kColumns)
        count_hits(Rows<T>(features), own.data(), n, classes, c, std::min(kColumns, d - c), &hits[c]);
    });
  });
  const int64_t total = std::reduce(hits.begin(), hits.end());
  bool* out = static_cast<bool*>(effective.data_ptr());
  for (int64_t c = 0; c < d; ++c) out[c] = hits[c] * d > total;
  return effective;
}

STABLE_TORCH_LIBRARY_IMPL(udi_kernels, CPU, m) { m.impl("effective_dims_fwd", TORCH_BOX(&effective_dims_fwd)); }

}  // namespace
}  // namespace udi
