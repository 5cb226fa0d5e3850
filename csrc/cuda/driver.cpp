// The CUDA driver, found at run time: any g++ builds this, without a toolkit.
#include "driver.h"

#include <dlfcn.h>

#include <array>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "../stable.h"

namespace udi {

std::function<Image(const std::string&, int)> compile;

namespace {

// Types and numbers of cuda.h, fixed by its ABI.
using Handle = void*;                     // CUcontext, CUmodule, CUfunction, CUstream
using Address = size_t;                   // CUdeviceptr
constexpr int kMultiprocessorCount = 16;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kRelaxed = 2;               // CU_STREAM_CAPTURE_MODE_RELAXED

void* symbol(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  void* const found = library ? dlsym(library, name) : nullptr;
  if (!found) throw std::runtime_error(std::string("udi_kernels: no ") + name + " in the CUDA driver, libcuda.so.1");
  return found;
}

// A function of the driver; throws what it reports.
template <class... Args>
class Call {
 public:
  explicit Call(const char* name) : name_(name), call_(reinterpret_cast<int (*)(Args...)>(symbol(name))) {}

  void operator()(Args... args) const {
    if (const int error = call_(args...)) {
      const char* text = nullptr;
      reinterpret_cast<int (*)(int, const char**)>(symbol("cuGetErrorString"))(error, &text);
      throw std::runtime_error(std::string("udi_kernels: ") + name_ + ": " + (text ? text : "unknown error"));
    }
  }

 private:
  const char* name_;
  int (*call_)(Args...);
};

Handle primary_context(int device) {
  static std::mutex mutex;
  static std::vector<Handle> contexts;
  const std::lock_guard lock(mutex);
  if (static_cast<size_t>(device) >= contexts.size()) contexts.resize(device + 1);
  if (!contexts[device]) {
    int handle;
    Call<int*, int>("cuDeviceGet")(&handle, device);
    Call<Handle*, int>("cuDevicePrimaryCtxRetain")(&contexts[device], handle);
  }
  return contexts[device];
}

// On the current device.
Kernel load(const Image& image, int threads) {
  static const Call<Handle*, const void*> load_data("cuModuleLoadData");
  static const Call<Handle*, Handle, const char*> get_function("cuModuleGetFunction");
  static const Call<int*, Handle, int, size_t> occupancy("cuOccupancyMaxActiveBlocksPerMultiprocessor");
  static const Call<int*> current("cuCtxGetDevice");
  static const Call<int*, int, int> attribute("cuDeviceGetAttribute");
  static const Call<int*> exchange_mode("cuThreadExchangeStreamCaptureMode");
  Handle module, function;
  int mode = kRelaxed, blocks, device, multiprocessors;
  exchange_mode(&mode);  // loading allocates memory, which a capture forbids in the other modes
  load_data(&module, image.code.c_str());
  get_function(&function, module, image.entry.c_str());
  exchange_mode(&mode);
  occupancy(&blocks, function, threads, 0);
  current(&device);
  attribute(&multiprocessors, kMultiprocessorCount, device);
  return {function, blocks * multiprocessors};
}

}  // namespace

const Kernel& kernel(const std::string& name, int threads, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<std::string, int, int>, Kernel> kernels;
  const auto key = std::make_tuple(name, threads, device);
  {
    const std::lock_guard lock(mutex);
    if (const auto found = kernels.find(key); found != kernels.end()) return found->second;
  }
  const Image image = compile(name, device);  // outside of the lock: it may wait for Python's
  const OnDevice on(device);
  const std::lock_guard lock(mutex);
  if (const auto found = kernels.find(key); found != kernels.end()) return found->second;
  return kernels.emplace(key, load(image, threads)).first->second;
}

OnDevice::OnDevice(int device) {
  static const Call<Handle> push("cuCtxPushCurrent_v2");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
  push(primary_context(device));
}

OnDevice::~OnDevice() {
  static const auto pop = reinterpret_cast<int (*)(Handle*)>(symbol("cuCtxPopCurrent_v2"));
  Handle context;
  pop(&context);
}

void OnDevice::zero(void* words, size_t count) const {
  static const Call<Address, unsigned, size_t, Handle> memset("cuMemsetD32Async");
  memset(reinterpret_cast<Address>(words), 0, count, stream_);
}

void OnDevice::launch(const Kernel& kernel, unsigned x, unsigned y, int threads,
                      std::initializer_list<const void*> args) const {
  static const Call<Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                    void**>
      launch("cuLaunchKernel");
  launch(kernel.function, x, y, 1, threads, 1, 1, 0, stream_, const_cast<void**>(args.begin()), nullptr);
}

}  // namespace udi
