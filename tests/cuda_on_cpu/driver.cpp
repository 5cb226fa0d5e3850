// libcuda.so.1 for the tests: what csrc/cuda/driver.cpp asks of it, with the kernels of gradients.cu in it, on the CPU.
// Its machine code is the name of a kernel. Device d has 1 + d % 3 multiprocessors of one block each.
#include <deque>
#include <string>
#include <vector>

#include "device.h"
#include "kernels.h"

namespace {

enum Error { kSuccess, kInvalidValue = 1, kInvalidContext = 201, kNotFound = 500 };

std::vector<int> contexts;  // device of each; handles are addresses of these numbers
int devices[] = {0, 1, 2, 3};
std::deque<std::string> modules;

}  // namespace

extern "C" {

int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  *text = error == kInvalidContext ? "invalid device context"
          : error == kNotFound     ? "named symbol not found"
                                   : "invalid";
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < 4 ? kSuccess : 101;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &devices[device];
  return kSuccess;
}

int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(*static_cast<int*>(context));
  return kSuccess;
}

int cuCtxPopCurrent_v2(void**) {
  if (contexts.empty()) return kInvalidContext;
  contexts.pop_back();
  return kSuccess;
}

int cuCtxGetDevice(int* device) {
  if (contexts.empty()) return kInvalidContext;
  *device = contexts.back();
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (attribute != 16) return kInvalidValue;
  *value = 1 + device % 3;
  return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  static int current = 0;
  std::swap(current, *mode);
  return kSuccess;
}

int cuModuleLoadData(void** module, const void* code) {
  *module = &modules.emplace_back(static_cast<const char*>(code));
  return contexts.empty() ? kInvalidContext : kSuccess;
}

int cuModuleGetFunction(void** function, void* module, const char* entry) {
  const std::string& name = *static_cast<std::string*>(module);
  if (name != entry) return kNotFound;
  for (const auto* table : {float_kernels, double_kernels, bfloat16_kernels, half_kernels})
    for (; table->name; ++table)
      if (name == table->name) return *function = const_cast<CpuKernel*>(table), kSuccess;
  return kNotFound;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
  *blocks = 1;
  return kSuccess;
}

int cuMemsetD32Async(size_t at, unsigned value, size_t count, void*) {
  if (contexts.empty() || at % 4) return kInvalidValue;
  for (size_t i = 0; i < count; ++i) reinterpret_cast<unsigned*>(at)[i] = value;
  return kSuccess;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void*, void** arguments, void** extra) {
  if (contexts.empty()) return kInvalidContext;
  if (shared || extra) return kInvalidValue;
  const auto& kernel = *static_cast<const CpuKernel*>(function);
  // The driver copies the arguments: what is read beyond them is found.
  std::vector<std::unique_ptr<char[]>> copies;
  std::vector<const void*> pointers;
  for (size_t size : kernel.sizes) {
    copies.emplace_back(new char[size]);
    std::memcpy(copies.back().get(), arguments[pointers.size()], size);
    pointers.push_back(copies.back().get());
  }
  on_cpu::launch({gx, gy, gz}, {bx, by, bz}, kernel.run, pointers.data());
  return kSuccess;
}

}  // extern "C"
