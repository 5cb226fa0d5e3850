// Tells the launch functions device and stream.
#include "../stable.h"
#include "stream.h"

namespace udi {

OnDevice::OnDevice(int device) {
  DeviceGuardHandle guard;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &guard));
  guard_ = guard;
  void* current;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  stream = static_cast<cudaStream_t>(current);
}

OnDevice::~OnDevice() { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_)); }

}  // namespace udi
