// What a launch needs from the CUDA driver and from torch.
#pragma once

#include <functional>
#include <initializer_list>
#include <string>

namespace udi {

// A kernel as machine code or PTX, and its name in it.
struct Image {
  std::string code, entry;
};

// Compiles a kernel of gradients.cu, such as "udi::weighted_sum<float, 500>", for a device; Python sets it.
extern std::function<Image(const std::string& name, int device)> compile;

// A kernel on a device.
struct Kernel {
  void* function;
  int blocks;  // that the device holds at once
};

// A kernel, compiled and loaded at the first call. threads: per block.
const Kernel& kernel(const std::string& name, int threads, int device);

// Makes the device current for the calling thread while it lives; work goes to torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

  void zero(void* words, size_t count) const;  // of 4 bytes
  void launch(const Kernel& kernel, unsigned x, unsigned y, int threads, std::initializer_list<const void*> args) const;

 private:
  void* stream_;
};

}  // namespace udi
