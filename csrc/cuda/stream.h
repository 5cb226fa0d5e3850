// What the CUDA kernels' launch functions need to know of torch.
#pragma once

#include <cuda_runtime.h>

namespace udi {

// While it lives, the device is current; stream is torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  cudaStream_t stream;

 private:
  void* guard_;
};

}  // namespace udi
