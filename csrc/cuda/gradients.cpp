// Launches the kernels of gradients.cu.
#include "../gradients.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <stdexcept>
#include <string>
#include <variant>

#include "arguments.h"
#include "driver.h"

namespace udi {
namespace {

using AnyTable = std::variant<Table<kTableWords[0]>, Table<kTableWords[1]>, Table<kTableWords[2]>>;
constexpr int kMaxWords = kTableWords[2];

int element_size(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

// Parameters of one dtype, as many as a table holds.
struct Launch {
  DType dtype;
  Shape shape;
  AnyTable table;

  Launch(DType dtype, int k, int count, const Gradients& g, const size_t* chosen)
      : dtype(dtype), shape{k, count, 0, k <= kFewRows ? 16384 : 4096} {
    if (count * entry_words(k) > kTableWords[0]) table.emplace<1>();
    if (count * entry_words(k) > kTableWords[1]) table.emplace<2>();
    const int64_t elements = shape.chunk_bytes / element_size(dtype);
    int64_t* word = words();
    for (int n = 0; n < count; ++n) {
      const auto& parameter = g.parameters[chosen[n]];
      *word++ = shape.chunks;
      *word++ = parameter.size;
      *word++ = reinterpret_cast<int64_t>(parameter.out);
      for (int i = 0; i < k; ++i) *word++ = reinterpret_cast<int64_t>(g.data[chosen[n] * g.k + i]);
      shape.chunks += static_cast<int>((parameter.size + elements - 1) / elements);
    }
  }

  int64_t* words() {
    return std::visit([](auto& t) { return t.word; }, table);
  }
  const int64_t* words() const {
    return std::visit([](auto& t) { return t.word; }, table);
  }

  bool few() const { return shape.k <= kFewRows; }
  int rows() const { return std::max(shape.k, 3); }  // of the instance of gramian_few

  int tiles() const {
    const int groups = (shape.k + tile_edge(element_size(dtype)) - 1) / tile_edge(element_size(dtype));
    return groups * (groups + 1) / 2;
  }
  int gramian_threads() const { return few() ? few_threads(rows()) : kWarp * std::min(tiles(), kTileWarps); }
  int grid_y() const { return few() ? 1 : (tiles() + kTileWarps - 1) / kTileWarps; }

  // As many blocks as the device holds at once; each writes a partial sum of every pair.
  int grid_x(int device) const { return std::min(shape.chunks, std::max(1, gramian_kernel(device).blocks / grid_y())); }

  const Kernel& gramian_kernel(int device) const {
    return found(gramian_, few() ? "gramian_few" : "gramian_tiles", few() ? rows() : 0, gramian_threads(), device);
  }
  const Kernel& sum_kernel(int device) const { return found(sum_, "weighted_sum", 0, kSumThreads, device); }

 private:
  mutable std::atomic<const Kernel*> gramian_ = nullptr, sum_ = nullptr;

  const Kernel& found(std::atomic<const Kernel*>& known, const char* name, int rows, int threads, int device) const {
    if (const Kernel* k = known) return *k;
    static constexpr const char* kTypes[] = {"float", "double", "udi::BFloat16", "udi::Half"};
    const std::string argument = rows ? std::to_string(rows) + ", " : "";
    const Kernel& k = kernel(std::string("udi::") + name + "<" + kTypes[static_cast<int>(dtype)] + ", " + argument +
                                 std::to_string(kTableWords[table.index()]) + ">",
                             threads, device);
    known = &k;
    return k;
  }
};

class CUDAPlan final : public Plan {
 public:
  explicit CUDAPlan(const Gradients& g) : k_(g.k), device_(g.device) {
    if (entry_words(k_) > kMaxWords)
      throw std::runtime_error("udi_kernels: K is too large for the kernels' argument table");
    for (DType dtype : {DType::kFloat, DType::kDouble, DType::kBFloat16, DType::kHalf}) {
      std::vector<size_t> chosen;
      for (size_t p = 0; p < g.parameters.size(); ++p)
        if (g.parameters[p].dtype == dtype && g.parameters[p].size) chosen.push_back(p);
      for (size_t done = 0; done < chosen.size();) {
        const int count = std::min<int>(chosen.size() - done, kMaxWords / entry_words(k_));
        launches_.emplace_back(dtype, k_, count, g, &chosen[done]);
        done += count;
      }
    }
  }

  int64_t scratch() const override { return blocks() * k_ * k_ + 1; }

  void gramian(double* scratch, void* gram, bool wide) const override {
    const OnDevice on(device_);
    if (launches_.empty()) return on.zero(gram, k_ * k_ * (wide ? 2 : 1));
    Sums sums{};
    sums.partial = scratch;
    sums.blocks = static_cast<int>(blocks());
    sums.arrived = reinterpret_cast<unsigned*>(scratch + sums.blocks * int64_t{k_} * k_);
    sums.gram = gram;
    sums.wide = wide;
    for (const Launch& l : launches_) sums.last += l.grid_x(device_) * l.grid_y();
    --sums.last;
    on.zero(sums.arrived, 1);
    for (const Launch& l : launches_) {
      const int x = l.grid_x(device_);
      on.launch(l.gramian_kernel(device_), x, l.grid_y(), l.gramian_threads(), {l.words(), &l.shape, &sums});
      sums.first += x;
    }
  }

  void weighted_sum(const void* weights, bool wide) const override {
    const OnDevice on(device_);
    for (const Launch& l : launches_)
      on.launch(l.sum_kernel(device_), l.shape.chunks, 1, kSumThreads, {l.words(), &l.shape, &weights, &wide});
  }

 private:
  int k_, device_;
  std::deque<Launch> launches_;

  int64_t blocks() const {
    int64_t count = 0;
    for (const Launch& l : launches_) count += l.grid_x(device_);
    return count;
  }
};

}  // namespace

std::unique_ptr<const Plan> make_plan(Gradients gradients) { return std::make_unique<CUDAPlan>(gradients); }

}  // namespace udi
