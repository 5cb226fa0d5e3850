// Enough of CUDA C++ for csrc/cuda/gradients.cu to be compiled by g++ and run on the CPU.
//
// A block's threads are fibers that switch where threads meet: at __syncthreads and at shuffles. So a sanitizer sees
// every access as threads of a GPU make it. Beyond the sanitizers this notices threads that meet at different places,
// or wait where others never come. Shared memory is full of ones when a block starts. x86-64 only.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __grid_constant__ &
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_memory")))  // and -fsanitize-sections=shared_memory
#define UNSEEN __attribute__((noinline, no_sanitize("address"), no_sanitize("thread"), no_sanitize("undefined")))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

namespace on_cpu {

constexpr unsigned kLanes = 32, kMaxThreads = 1024, kSets = 4;
constexpr size_t kStack = 256 << 10;

// Where threads wait for each other. Two places to synchronise at, in turn: a thread may arrive at the next meeting
// before all have left this one.
struct Meeting {
  unsigned arrived = 0, generation = 0;
  int line = 0;
  char place[2];
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void *tsan = nullptr, *fake_stack = nullptr;
  const Meeting* at = nullptr;  // waits here until the generation is another
  unsigned generation = 0, thread = 0;
  bool running = false;

  bool ready() const { return running && !(at && at->generation == generation); }
};

struct Warp {
  Meeting meeting;
  alignas(16) char slot[2][kLanes][16];
};

// A grid at a time, a block at a time.
struct Machine {
  // Blocks use these in turn: to ThreadSanitizer who ran, or met others, in a block has seen all that happened there.
  Fiber fibers[kSets][kMaxThreads], *current = nullptr;
  Meeting meetings[kSets], *block = meetings;
  Warp warps[kMaxThreads / kLanes];
  unsigned threads = 0, alive = 0, order = 0;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  char launched, finished, fenced;  // places to synchronise at
  void *stack_pointer = nullptr, *fake_stack = nullptr, *tsan = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
};
extern Machine machine;

[[noreturn]] void fail(const char* what, int a = 0, int b = 0);
void launch(dim3 grid, dim3 block, void (*body)(const void*), const void* arguments);
void meet(Meeting& meeting, unsigned expected, int line);
void exchange(void* value, size_t size, unsigned partner, int line);

#if defined(__SANITIZE_THREAD__)
inline void acquire(char* place) { __tsan_acquire(place); }
inline void release(char* place) { __tsan_release(place); }
#else
inline void acquire(char*) {}
inline void release(char*) {}
#endif

}  // namespace on_cpu

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(int line = __builtin_LINE()) {
  on_cpu::Meeting& block = *on_cpu::machine.block;
  char* const place = &block.place[block.generation % 2];
  on_cpu::release(place);
  on_cpu::meet(block, on_cpu::machine.alive, line);
  on_cpu::acquire(place);
}

// What a thread saw before its fence is seen by all whose fence is later.
inline void __threadfence() {
  on_cpu::release(&on_cpu::machine.fenced);
  on_cpu::acquire(&on_cpu::machine.fenced);
}

inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bit, int line = __builtin_LINE()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  if (mask != ~0u) on_cpu::fail("only full masks are supported");
  on_cpu::exchange(&value, sizeof value, (threadIdx.x % on_cpu::kLanes) ^ bit, line);
  return value;
}

template <class T>
T __ldg(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) on_cpu::fail("unaligned load");
  return *at;
}

template <class T>
T __ldcg(const T* at) {
  return *at;
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}

inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }

namespace udi {
inline float widened(unsigned short half) { return __builtin_bit_cast(_Float16, half); }
inline unsigned short to_half(float x) { return __builtin_bit_cast(unsigned short, static_cast<_Float16>(x)); }
}  // namespace udi
