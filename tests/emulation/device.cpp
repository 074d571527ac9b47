// What torch's CUDA library gives the kernels, and the switch of the emulation.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

__attribute__((visibility("default"))) void set_capturing(int capturing) { emulation::capturing = capturing != 0; }
}
