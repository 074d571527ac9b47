// Whether the kernels of this library run on a GPU: each is compiled for the same architectures, so one stands for all.
#include <cuda_runtime.h>

namespace fastvae {
namespace {

__global__ void refusal_kernel() {}

}  // namespace
}  // namespace fastvae

// Returns why no kernel runs on the current GPU (an architecture that the library was not built for, a driver older than its runtime), or
// nullptr. Nothing is launched.
extern "C" __attribute__((visibility("default"))) const char* fastvae_cuda_refusal() {
  cudaFuncAttributes attributes;
  cudaError_t status = cudaFuncGetAttributes(&attributes, fastvae::refusal_kernel);
  // Otherwise the error would be that of the next launch.
  cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
