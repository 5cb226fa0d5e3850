// Dimension-decoupled unidirectional contrastive loss: InfoNCE of the student's rows against the teacher's.
//
// Over the chosen dimensions z_ij = <s_i, t_j>, for n students and m >= n teachers, the first n of them positives, and
// loss_i = log sum_j e^(z_ij/T) - z_ii/T. Tiles of z come from BLAS and are dropped once their exponentials, relative
// to the largest so far, are summed: no N x N matrix is kept. The student's gradient
//   d s_i = g_i/T (1 - p_ii) (n_i - t_i),  n_i = sum_{j != i} p_ij t_j / (1 - p_ii),
// depends on the incoming gradient by the factor g_i alone. So the forward pass keeps n_i - t_i, summed in the same
// tiles, and the backward pass is elementwise; computing the tiles again takes a third longer. The positive is separate
// from the negatives, so that loss and gradient are exact where p_ii is almost 1, too.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <limits>
#include <memory>

#include "launch.h"

namespace udi {
namespace {

// Columns and rows of a tile. Threads take blocks of so many rows, whatever the number of threads. There are at least
// two blocks: a single one is no parallel region, and BLAS would split it by the number of threads.
constexpr int64_t kTileColumns = 512, kMostRows = 128;
inline int64_t tile_rows(int64_t n) {
  return n <= 2 ? 1 : n <= 16 ? (n + 1) / 2 : n <= 128 ? 16 : n <= 512 ? 32 : kMostRows;
}

using namespace duc_stats;  // names of the statistics

// A matrix in memory that it does not own.
template <class S>
struct Matrix {
  S* data;
  int64_t rows, columns, stride;

  S* operator[](int64_t r) const { return data + r * stride; }
  Matrix slice(int64_t begin, int64_t end) const { return {data + begin * stride, end - begin, columns, stride}; }
  Tensor tensor(bool transposed = false) const {
    int64_t sizes[] = {rows, columns}, strides[] = {stride, 1};
    if (transposed) std::swap(sizes[0], sizes[1]), std::swap(strides[0], strides[1]);
    AtenTensorHandle handle;
    constexpr auto dtype = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        data, 2, sizes, strides, 0, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
};

template <class S>
struct Buffer : Matrix<S> {
  std::unique_ptr<S[]> memory;

  Buffer(int64_t rows, int64_t columns)
      : Matrix<S>{nullptr, rows, columns, (columns + kLanes - 1) / kLanes * kLanes},
        memory(std::make_unique_for_overwrite<S[]>(rows * this->stride + kLanes)) {
    auto address = reinterpret_cast<uintptr_t>(memory.get());
    this->data =
        reinterpret_cast<S*>((address + 63) / 64 * 64);  // BLAS may add up in another order at other alignments
  }
};

// out = a b^T
template <class S>
void product_with_rows(Matrix<S> out, Matrix<S> a, Matrix<S> b) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_mm_out(out.tensor().get(), a.tensor().get(), b.tensor(/*transposed=*/true).get()));
}

// out += a b, or out = a b for the first product
template <class S>
void add_product(Matrix<S> out, Matrix<S> a, Matrix<S> b, bool first) {
  Tensor o = out.tensor();
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(o.get(), o.get(), a.tensor().get(), b.tensor().get(), !first, 1));
}

std::vector<int64_t> chosen(const Tensor& dims) {
  const bool* flag = static_cast<const bool*>(dims.data_ptr());
  std::vector<int64_t> list;
  for (int64_t d = 0; d < dims.size(0); ++d)
    if (flag[d * dims.stride(0)]) list.push_back(d);
  return list;
}

template <class T>
void gather(Rows<T> from, int64_t row, const std::vector<int64_t>& dims, Matrix<compute_t<T>> to) {
  for (int64_t r = 0; r < to.rows; ++r) {
    const T* x = from[row + r];
    compute_t<T>* out = to[r];
    for (size_t k = 0; k < dims.size(); ++k) out[k] = compute_t<T>(x[dims[k]]);
  }
}

template <class S, class T>
void scatter(Matrix<S> from, const std::vector<int64_t>& dims, int64_t row, Rows<T> to, int64_t width) {
  for (int64_t r = 0; r < from.rows; ++r) {
    T* out = to[row + r];
    std::fill(out, out + width, T(0));
    for (size_t k = 0; k < dims.size(); ++k) out[dims[k]] = T(from[r][k]);
  }
}

// A row's tiles so far: the largest negative, and the sum of the negatives' exponentials relative to it.
template <class S>
struct Running {
  S top = -std::numeric_limits<S>::infinity(), own = 0;
  double others = 0;
};

// Replaces a row of a tile by its negatives' exponentials (0 for the positive, at `own` if that is in the tile), adds
// them up, and returns the factor that the earlier sums must be multiplied by.
template <class S>
S exponentials(S* z, int64_t columns, int64_t own, S inverse_temperature, Running<S>& row) {
  constexpr S none = -std::numeric_limits<S>::infinity();
  if (0 <= own && own < columns) row.own = z[own], z[own] = none;
  Vec<S> tops = splat(row.top);
  for_each_lanes(columns, [&](int64_t c, int n) { tops = max(load_some(z + c, n, none), tops); });
  S top = across(tops, max<Vec<S>>)[0];
  S factor = top == row.top ? S(1) : std::exp((row.top - top) * inverse_temperature);
  // A row without negatives has no largest one to subtract.
  Vec<S> sum{}, shift = splat(top == none ? S(0) : top);
  for_each_lanes(columns, [&](int64_t c, int n) {
    Vec<S> x = exp_negative(Vec<S>((load_some(z + c, n, none) - shift) * inverse_temperature));
    sum += x;
    store_some(z + c, x, n);
  });
  row.others = row.others * factor + udi::sum(sum);
  row.top = top;
  return factor;
}

// f(first row, rows) for all blocks of rows, in parallel.
template <class F>
void for_each_block(int64_t n, F f) {
  int64_t height = tile_rows(n);
  torch::stable::parallel_for(0, (n + height - 1) / height, 1, [&](int64_t begin, int64_t end) {
    f(begin * height, std::min(end * height, n), height);
  });
}

// Losses of all rows, their statistics and, if wanted, the directions n_i - t_i.
template <class T>
void forward(Rows<T> student, Rows<T> teacher, int64_t n, int64_t m, int64_t width, const std::vector<int64_t>& dims,
             compute_t<T> inverse_temperature, compute_t<T>* losses, compute_t<T>* stats,
             Rows<compute_t<T>> direction) {
  using S = compute_t<T>;
  const int64_t depth = dims.size();
  Buffer<S> all_t(m, depth);
  for_each_block(m,
                 [&](int64_t begin, int64_t end, int64_t) { gather(teacher, begin, dims, all_t.slice(begin, end)); });
  for_each_block(n, [&](int64_t first, int64_t last, int64_t height) {
    Buffer<S> s(height, depth), sums(direction ? height : 0, depth), room(height, std::min(m, kTileColumns));
    for (int64_t begin = first; begin < last; begin += height) {
      const int64_t rows = std::min(height, last - begin);
      Running<S> running[kMostRows];
      gather(student, begin, dims, s.slice(0, rows));
      for (int64_t c = 0; c < m; c += kTileColumns) {
        Matrix<S> t = all_t.slice(c, std::min(c + kTileColumns, m)), tile{room.data, rows, t.rows, room.stride};
        product_with_rows(tile, s.slice(0, rows), t);
        for (int64_t r = 0; r < rows; ++r) {
          S factor = exponentials(tile[r], t.rows, begin + r - c, inverse_temperature, running[r]);
          if (direction && c && factor != 1)
            for (int64_t k = 0; k < depth; ++k) sums[r][k] *= factor;
        }
        if (direction) add_product(sums.slice(0, rows), tile, t, c == 0);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const auto [top, own, others] = running[r];
        const double gap = (double(own) - top) * inverse_temperature;
        // The sum of all exponentials relative to the largest negative; infinite where the negatives are negligible.
        const double all = others + std::exp(gap);
        losses[begin + r] = S(gap >= 0 ? std::log1p(others * std::exp(-gap)) : std::log(all) - gap);
        stats[kMax * n + begin + r] = top;
        stats[kInvSum * n + begin + r] = S(1 / all);
        stats[kOthers * n + begin + r] = S(others / all);
        if (direction) {
          const S *mine = all_t[begin + r], share = S(others > 0 ? 1 / others : 0);
          for (int64_t k = 0; k < depth; ++k) sums[r][k] = share * sums[r][k] - mine[k];
        }
      }
      if (direction) scatter(sums.slice(0, rows), dims, begin, direction, width);
    }
  });
}

// d t_j = 1/T [sum_{i != j} g_i p_ij s_i - g_j (1 - p_jj) s_j], the last term for j < n, by tiles of z^T. `pull`: g_i/T
// by row.
template <class T>
void teacher_gradient(Rows<T> student, Rows<T> teacher, int64_t n, int64_t m, int64_t width,
                      const std::vector<int64_t>& dims, compute_t<T> inverse_temperature, const compute_t<T>* pull,
                      const compute_t<T>* stats, Rows<T> grad) {
  using S = compute_t<T>;
  const int64_t depth = dims.size();
  const S *tops = stats + kMax * n, *inverse_sums = stats + kInvSum * n, *others = stats + kOthers * n;
  Buffer<S> all_s(n, depth);
  for_each_block(n,
                 [&](int64_t begin, int64_t end, int64_t) { gather(student, begin, dims, all_s.slice(begin, end)); });
  for_each_block(m, [&](int64_t first, int64_t last, int64_t height) {
    Buffer<S> t(height, depth), sums(height, depth), room(height, std::min(n, kTileColumns));
    for (int64_t begin = first; begin < last; begin += height) {
      const int64_t rows = std::min(height, last - begin);
      gather(teacher, begin, dims, t.slice(0, rows));
      for (int64_t c = 0; c < n; c += kTileColumns) {
        Matrix<S> s = all_s.slice(c, std::min(c + kTileColumns, n)), tile{room.data, rows, s.rows, room.stride};
        product_with_rows(tile, t.slice(0, rows), s);
        for (int64_t r = 0; r < rows; ++r) {
          S* z = tile[r];
          for_each_lanes(s.rows, [&](int64_t i, int lanes) {
            auto some = [&](const S* from) { return load_some(from, lanes); };
            Vec<S> p = exp_negative(Vec<S>((some(z + i) - some(tops + c + i)) * inverse_temperature));
            p *= some(inverse_sums + c + i) * some(pull + c + i);
            store_some(z + i, p, lanes);
          });
          if (int64_t own = begin + r - c; 0 <= own && own < s.rows) z[own] = -pull[begin + r] * others[begin + r];
        }
        add_product(sums.slice(0, rows), tile, s, c == 0);
      }
      scatter(sums.slice(0, rows), dims, begin, grad, width);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> duc_loss_fwd(const Tensor& student, const Tensor& teacher, const Tensor& dims,
                                                double temperature, int64_t reduction, bool need_student) {
  const int64_t n = student.size(0), m = teacher.size(0), width = student.size(1);
  ScalarType dtype = compute_dtype(student);
  Tensor stats = empty({kStats, n}, dtype);
  Tensor direction = empty(need_student ? std::vector<int64_t>{n, width} : std::vector<int64_t>{0}, dtype);
  Tensor loss = empty(reduction == kNone ? std::vector<int64_t>{n} : std::vector<int64_t>{}, dtype);
  dispatch(student, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    std::vector<S> losses(n);
    forward<T>(Rows<T>(student), Rows<T>(teacher), n, m, width, chosen(dims), S(1 / temperature), losses.data(),
               static_cast<S*>(stats.data_ptr()), need_student ? Rows<S>(direction) : Rows<S>());
    S* out = static_cast<S*>(loss.data_ptr());
    double total = 0;
    for (int64_t r = 0; r < n; ++r) {
      if (reduction == kNone) out[r] = losses[r];
      total += losses[r];
    }
    if (reduction != kNone) *out = S(reduction == kMean ? total / n : total);
  });
  return {loss, stats, direction};
}

std::tuple<Tensor, Tensor> duc_loss_bwd(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                        const Tensor& dims, const Tensor& stats, const Tensor& direction,
                                        double temperature, int64_t reduction, bool need_student, bool need_teacher) {
  const int64_t n = student.size(0), m = teacher.size(0), width = student.size(1);
  Tensor grad_student = empty_grad(student, need_student), grad_teacher = empty_grad(teacher, need_teacher);
  dispatch(student, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = compute_t<T>;
    Factor<S> g(grad);
    const S scale = reduction == kMean ? S(1. / n) : S(1);
    if (Rows<T> to = need_student ? Rows<T>(grad_student) : Rows<T>()) {
      Rows<S> from(direction);
      const S* others = static_cast<const S*>(stats.data_ptr()) + kOthers * n;
      for_each_block(n, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t r = begin; r < end; ++r) {
          const S factor = g[r] * scale * S(1 / temperature) * others[r];
          for_each_lanes(width, [&](int64_t d, int lanes) {
            store_some(to[r] + d, Vec<T>(factor * load_some(from[r] + d, lanes)), lanes);
          });
        }
      });
    }
    if (n == 0) torch::stable::zero_(grad_teacher);
    if (Rows<T> to = need_teacher && n ? Rows<T>(grad_teacher) : Rows<T>()) {
      std::vector<S> pull(n);
      for (int64_t r = 0; r < n; ++r) pull[r] = g[r] * scale * S(1 / temperature);
      teacher_gradient<T>(Rows<T>(student), Rows<T>(teacher), n, m, width, chosen(dims), S(1 / temperature),
                          pull.data(), static_cast<const S*>(stats.data_ptr()), to);
    }
  });
  return {grad_student, grad_teacher};
}

STABLE_TORCH_LIBRARY_IMPL(udi_kernels, CPU, m) {
  m.impl("duc_loss_fwd", TORCH_BOX(&duc_loss_fwd));
  m.impl("duc_loss_bwd", TORCH_BOX(&duc_loss_bwd));
}

}  // namespace
}  // namespace udi
