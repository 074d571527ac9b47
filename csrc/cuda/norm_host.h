// The host code that the operators of group norm and RMS norm share: tensors in either memory layout, parameters, and launches of kernels
// that keep vectors in shared memory.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>

#include "../common/layout.h"
#include "loss.h"
#include "norm_device.cuh"

namespace fastvae {

// An uninitialised tensor of the shape and dtype of `like`, contiguous or channels-last.
inline Tensor empty_in_layout(const Launch& launch, const Tensor& like, bool channels_last) {
  Sizes shape = shape_of(like);
  return launch.empty_strided(shape, strides_in_layout(shape, channels_last), like.scalar_type());
}

// The data of a tensor in this layout, which is that of a copy where the tensor has another one.
template <class T>
const T* data_in_layout(const Launch& launch, const Tensor& tensor, bool channels_last, Copies& copies) {
  if (is_in_layout(tensor, channels_last)) return static_cast<const T*>(tensor.const_data_ptr());
  copies.push_back(empty_in_layout(launch, tensor, channels_last));
  torch::stable::copy_(copies.back(), tensor);
  return static_cast<const T*>(copies.back().const_data_ptr());
}

inline NormParameter parameter_of(const OptionalTensor& tensor, float default_value, Copies& copies) {
  if (!tensor) return {nullptr, DType::float32, default_value};
  return {readable(*tensor, copies).const_data_ptr(), dtype_of(*tensor), default_value};
}

// The gradient of a parameter, empty where there is no parameter.
inline Tensor empty_gradient(const Launch& launch, const OptionalTensor& parameter, const Tensor& input) {
  return parameter ? launch.empty(shape_of(*parameter), parameter->scalar_type()) : launch.empty({0}, input.scalar_type());
}

// Beside the dynamic shared memory a block has up to 4 KB for its sums.
constexpr int kStaticSharedBytes = 4096;

inline int device_attribute(int32_t device, cudaDeviceAttr attribute) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "asking for an attribute of a device");
  return value;
}

// The dynamic shared memory with which kNormBlocks blocks of this kernel share a multiprocessor of this device. The first call asks the
// device and permits it to the kernel, which otherwise may take 48 KB.
inline int64_t permitted_shared_bytes(int32_t device, const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int32_t, const void*>, int64_t> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find({device, kernel});
  if (found != known.end()) return found->second;
  int of_block = device_attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  int of_blocks = device_attribute(device, cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kNormBlocks -
                  device_attribute(device, cudaDevAttrReservedSharedMemoryPerBlock);
  int bytes = std::min(of_block, of_blocks) - kStaticSharedBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "permitting shared memory to a kernel");
  return known[{device, kernel}] = bytes;
}

// Launches a kernel whose threads have `vectors` vectors each, in steps of `runs`, and keep p.kept_vectors of them in shared memory, which
// this sets. A vector takes `vector_bytes`.
template <class Params>
void launch_keeping_vectors(const Launch& launch, void (*kernel)(Params), int64_t blocks, int threads, int64_t vectors, int runs,
                            int64_t vector_bytes, Params& p) {
  int64_t max_bytes = permitted_shared_bytes(launch.device(), reinterpret_cast<const void*>(kernel));
  p.kept_vectors = kept_vectors(vectors, threads, runs, vector_bytes, max_bytes);
  launch.run(kernel, blocks, 1, threads, p, p.kept_vectors * threads * vector_bytes);
}

}  // namespace fastvae
