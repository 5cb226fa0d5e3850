// The kernels for one element type: compiled with -DTYPE=float -DTABLE=float_kernels and so on.
#include "device.h"

#include KERNELS  // gradients.cu, or a copy with a fault in it

#include <utility>

#include "kernels.h"

namespace {

using namespace udi;

constexpr int kMost = kTableWords[2];

// Calls the kernel, which takes the largest table, with one that may be shorter.
template <auto kKernel, class... Args>
CpuKernel entry(const char* name, size_t words, void (*)(const Table<kMost>&, Args...)) {
  return {name,
          [](const void* arguments) {
            const auto* const* a = static_cast<const void* const*>(arguments);
            [&]<size_t... I>(std::index_sequence<I...>) {
              kKernel(*static_cast<const Table<kMost>*>(a[0]), *static_cast<const Args*>(a[1 + I])...);
            }(std::index_sequence_for<Args...>());
          },
          {words * sizeof(int64_t), sizeof(Args)...}};
}

#define TEXT_OF(...) #__VA_ARGS__
#define TEXT(...) TEXT_OF(__VA_ARGS__)
#define NAMED(name, words, ...)                                                                \
  entry<&name<__VA_ARGS__, kMost>>("udi::" #name "<" TEXT(__VA_ARGS__) ", " #words ">", words, \
                                   &name<__VA_ARGS__, kMost>)
#define FEW(k, words) NAMED(gramian_few, words, TYPE, k)
#if defined(LEAST)  // those of `check least`
#define ALL_FEW(words) FEW(3, words), FEW(5, words)
#else
#define ALL_FEW(words) FEW(3, words), FEW(4, words), FEW(5, words), FEW(6, words), FEW(7, words), FEW(8, words)
#endif
#define ALL(words) ALL_FEW(words), NAMED(gramian_tiles, words, TYPE), NAMED(weighted_sum, words, TYPE)

}  // namespace

extern const CpuKernel TABLE[] = {ALL(500), ALL(1500), ALL(4080), {}};
