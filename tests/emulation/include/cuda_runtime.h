// This emulates as much of CUDA on the CPU as csrc/cuda/ uses; emulation.h says how.
#pragma once

#include <algorithm>
#include <cstring>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Thread-local variables lie in one range of addresses, which the machine fills with NaN before each block. The address sanitizer watches
// the bounds of ordinary ones alone.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

// The operators register themselves for CPU tensors, and these functions of torch are the emulation's.
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_create_device_guard emulated_create_device_guard
#define aoti_torch_delete_device_guard emulated_delete_device_guard
#define aoti_torch_empty_strided emulated_empty_strided
#define torch_call_dispatcher emulated_call_dispatcher
#include <torch/csrc/stable/library.h>
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)

#if defined(EMULATION_APPROXIMATE)
#define FASTVAE_APPROXIMATE(value, ulps) emulation::approximate(value, ulps)
#endif
#if defined(EMULATION_SMALL_GRIDS)
#define FASTVAE_GRID_LIMIT(blocks) ((blocks) / 512 + 1)
#endif

// The dynamic shared memory of a block.
#define FASTVAE_DYNAMIC_SHARED(name) unsigned char* name = emulation::dynamic_shared()

#define threadIdx (emulation::place.thread)
#define blockIdx (emulation::place.block)
#define blockDim (emulation::place.block_size)
#define gridDim (emulation::place.grid_size)

#define __syncthreads() emulation::block_barrier({__FILE__, __LINE__})
#define __syncwarp() emulation::warp_barrier({__FILE__, __LINE__})
#define __threadfence() emulation::fence({__FILE__, __LINE__})

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = emulation::exchange(mask, bits, static_cast<unsigned>(lane_mask));
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The mask of the lanes of the warp that have the same value as this one.
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  unsigned lanes = 0;
  for (unsigned other = 0; other < emulation::kWarpSize; ++other)
    if (__shfl_xor_sync(mask, value, static_cast<int>(other)) == value) lanes |= 1u << ((threadIdx.x ^ other) % emulation::kWarpSize);
  return lanes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// An access that only the functions below make: the build that watches memory knows it as an atomic one.
#define EMULATION_UNWATCHED __attribute__((no_sanitize_thread, noinline))

#define FASTVAE_COUNT(event, number) emulation::count(emulation::event, number)

template <class T>
EMULATION_UNWATCHED T atomicAdd(T* address, T value) {
  emulation::wide_additions += sizeof(T) == sizeof(int64_t);
  emulation::atomic_access(address, sizeof(T), __builtin_return_address(0));
  T before = *address;
  *address = before + value;
  return before;
}

template <class T>
EMULATION_UNWATCHED T atomicMin(T* address, T value) {
  emulation::atomic_access(address, sizeof(T), __builtin_return_address(0));
  T before = *address;
  *address = before < value ? before : value;
  return before;
}

template <class T>
EMULATION_UNWATCHED T atomicMax(T* address, T value) {
  emulation::atomic_access(address, sizeof(T), __builtin_return_address(0));
  T before = *address;
  *address = before > value ? before : value;
  return before;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };

inline const char* cudaGetErrorString(cudaError_t error) { return emulation::error_string(error); }

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaFuncAttributes {};

template <class Kernel>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  int capturing = 0;
  auto error = static_cast<cudaError_t>(emulation::is_capturing(stream, &capturing));
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return error;
}

inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t stream) {
  return static_cast<cudaError_t>(emulation::fill(stream, to, byte, count));
}

inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* all_bytes) {
  *free_bytes = 0;
  *all_bytes = 1;
  return cudaSuccess;
}

template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

// The emulated GPU has little shared memory, so that kernels which keep what fits into it keep a part of small tensors.
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 32768,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 24576,
  cudaDevAttrReservedSharedMemoryPerBlock = 1024,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  emulation::permit_shared(kernel, static_cast<size_t>(bytes));
  return cudaSuccess;
}

#if defined(__has_builtin) && __has_builtin(__builtin_clear_padding)
#define EMULATION_CLEAR_PADDING(object) __builtin_clear_padding(object)
#else
#define EMULATION_CLEAR_PADDING(object)
#endif

// A launch copies the parameters, which the host may write over while the kernel waits.
template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t stream) {
  static_assert(sizeof(Params) <= 4096, "a kernel takes 4 KiB of parameters at most");
  Params params = *static_cast<const Params*>(arguments[0]);
  // The bytes between the members may be those of an old pointer.
  EMULATION_CLEAR_PADDING(&params);
  emulation::Grid run{grid, block, shared_bytes, [kernel, params] { kernel(params); }};
  return static_cast<cudaError_t>(emulation::launch(stream, reinterpret_cast<const void*>(kernel), &params, sizeof params, run));
}
