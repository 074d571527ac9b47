// Loads and stores: kernels compute in float32, whatever the tensors hold. A thread handles kVector adjacent elements with one access where
// their address is aligned to a whole vector, and element by element elsewhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/dtype.h"
#include "partition.h"

// Declares `name` as the dynamic shared memory of the block, bytes whose number the launch says. The emulation has its own definition.
#if !defined(FASTVAE_DYNAMIC_SHARED)
#define FASTVAE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace fastvae {

// Storage of the two 16-bit floating formats. They have no arithmetic of their own, so that nothing computes in them by accident.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
constexpr DType kDTypeOf = DType::float32;
template <>
constexpr DType kDTypeOf<BFloat16> = DType::bfloat16;
template <>
constexpr DType kDTypeOf<Half> = DType::float16;

// Converts storage to float32.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(double x) { return static_cast<float>(x); }
// A uint8 pixel stands for a value in [0, 1].
__device__ __forceinline__ float to_float(uint8_t x) { return static_cast<float>(x) * (1.0f / 255.0f); }

// Converts float32 to storage, rounded to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ double from_float<double>(float x) {
  return static_cast<double>(x);
}

// kVector elements that one instruction loads or stores; its address has to be a multiple of its size.
template <class T>
struct alignas(kVector * sizeof(T)) Vector {
  T v[kVector];
};

// Loads `count` <= kVector elements and fills up with 0. `vectorized` says that the vector is whole and aligned.
template <class T>
__device__ __forceinline__ void load(const T* from, int count, bool vectorized, float (&to)[kVector]) {
  if (vectorized) {
    Vector<T> vector = *reinterpret_cast<const Vector<T>*>(from);
    for (int k = 0; k < kVector; ++k) to[k] = to_float(vector.v[k]);
  } else {
    for (int k = 0; k < kVector; ++k) to[k] = k < count ? to_float(from[k]) : 0.0f;
  }
}

// The elements that a thread handles in a step: vector j begins at first + j * kNoiseLanes.
using Values = float[kRuns][kVector];

// Loads a thread's elements of a step, and 0 for those beyond `numel`. All loads are issued before the first value is used, so that their
// latencies overlap. `aligned` says that the address of the tensor is that of a whole vector.
template <class From>
__device__ __forceinline__ void load_values(const From* from, int64_t first, int64_t numel, bool aligned, Values& to) {
  if (aligned && first + (kRuns - 1) * kNoiseLanes + kVector <= numel) {
    Vector<From> raw[kRuns];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) raw[j] = *reinterpret_cast<const Vector<From>*>(from + first + j * kNoiseLanes);
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      for (int k = 0; k < kVector; ++k) to[j][k] = to_float(raw[j].v[k]);
  } else {
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      for (int k = 0; k < kVector; ++k) {
        int64_t element = first + j * kNoiseLanes + k;
        to[j][k] = element < numel ? to_float(from[element]) : 0.0f;
      }
  }
}

// Stores `count` <= kVector elements. `vectorized` says that the vector is whole and aligned.
template <class T>
__device__ __forceinline__ void store(T* to, int count, bool vectorized, const float (&from)[kVector]) {
  if (vectorized) {
    Vector<T> vector;
    for (int k = 0; k < kVector; ++k) vector.v[k] = from_float<T>(from[k]);
    *reinterpret_cast<Vector<T>*>(to) = vector;
  } else {
    for (int k = 0; k < kVector; ++k)
      if (k < count) to[k] = from_float<T>(from[k]);
  }
}

// The same for a tensor whose dtype is known at run time, from its element `first` on. A float64 tensor is stored element by element,
// because its vectors would need 32-byte accesses.
__device__ __forceinline__ void store(const Output& to, int64_t first, int count, bool vectorized, const float (&from)[kVector]) {
  switch (to.dtype) {
    case DType::float32:
      return store(static_cast<float*>(to.data) + first, count, vectorized, from);
    case DType::bfloat16:
      return store(static_cast<BFloat16*>(to.data) + first, count, vectorized, from);
    case DType::float16:
      return store(static_cast<Half*>(to.data) + first, count, vectorized, from);
    default:
      return store(static_cast<double*>(to.data) + first, count, false, from);
  }
}

// Loads one element of a tensor whose dtype is known at run time; a uint8 pixel stands for a value in [0, 1].
__device__ __forceinline__ float load_one(const void* from, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::float32:
      return static_cast<const float*>(from)[index];
    case DType::bfloat16:
      return to_float(static_cast<const BFloat16*>(from)[index]);
    case DType::float16:
      return to_float(static_cast<const Half*>(from)[index]);
    default:
      return to_float(static_cast<const uint8_t*>(from)[index]);
  }
}

// Stores one element of a tensor whose dtype is known at run time.
__device__ __forceinline__ void store_one(const Output& to, int64_t index, double value) {
  switch (to.dtype) {
    case DType::float32:
      static_cast<float*>(to.data)[index] = static_cast<float>(value);
      return;
    case DType::bfloat16:
      static_cast<BFloat16*>(to.data)[index] = from_float<BFloat16>(static_cast<float>(value));
      return;
    case DType::float16:
      static_cast<Half*>(to.data)[index] = from_float<Half>(static_cast<float>(value));
      return;
    default:
      static_cast<double*>(to.data)[index] = value;
  }
}

}  // namespace fastvae
