// Between memory and arithmetic: storage types, vectors of them, and operands whose layout is known at run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/dtype.h"
#include "partition.h"

namespace fastvae {

// The 16-bit floating formats as they lie in memory.
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

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float widen(double x) { return static_cast<float>(x); }
// An 8-bit image in [0, 1].
__device__ __forceinline__ float widen(uint8_t x) { return static_cast<float>(x) * (1.0f / 255.0f); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Half narrow<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ double narrow<double>(float x) {
  return static_cast<double>(x);
}

template <class T>
struct alignas(kVector * sizeof(T)) Vector {
  T v[kVector];
};

// `count` <= kVector elements, together where `fast`, one by one elsewhere; those that there are not are 0.
template <class T>
__device__ __forceinline__ void load(const T* from, int count, bool fast, float (&to)[kVector]) {
  if (fast) {
    Vector<T> vector = *reinterpret_cast<const Vector<T>*>(from);
    for (int k = 0; k < kVector; ++k) to[k] = widen(vector.v[k]);
  } else {
    for (int k = 0; k < kVector; ++k) to[k] = k < count ? widen(from[k]) : 0.0f;
  }
}

// A thread's elements of a step, all loaded before the first is used; those that there are not are 0.
using Values = float[kRuns][kVector];

template <class From>
__device__ __forceinline__ void load_values(const From* from, int64_t first, int64_t numel, bool vector, Values& to) {
  if (vector && first + (kRuns - 1) * kNoiseLanes + kVector <= numel) {
    Vector<From> raw[kRuns];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) raw[j] = *reinterpret_cast<const Vector<From>*>(from + first + j * kNoiseLanes);
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      for (int k = 0; k < kVector; ++k) to[j][k] = widen(raw[j].v[k]);
  } else {
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      for (int k = 0; k < kVector; ++k) {
        int64_t element = first + j * kNoiseLanes + k;
        to[j][k] = element < numel ? widen(from[element]) : 0.0f;
      }
  }
}

template <class T>
__device__ __forceinline__ void store(T* to, int count, bool fast, const float (&from)[kVector]) {
  if (fast) {
    Vector<T> vector;
    for (int k = 0; k < kVector; ++k) vector.v[k] = narrow<T>(from[k]);
    *reinterpret_cast<Vector<T>*>(to) = vector;
  } else {
    for (int k = 0; k < kVector; ++k)
      if (k < count) to[k] = narrow<T>(from[k]);
  }
}

__device__ __forceinline__ void store(const Output& to, int64_t first, int count, bool fast, const float (&from)[kVector]) {
  switch (to.dtype) {
    case DType::float32:
      return store(static_cast<float*>(to.data) + first, count, fast, from);
    case DType::bfloat16:
      return store(static_cast<BFloat16*>(to.data) + first, count, fast, from);
    case DType::float16:
      return store(static_cast<Half*>(to.data) + first, count, fast, from);
    default:
      return store(static_cast<double*>(to.data) + first, count, false, from);
  }
}

__device__ __forceinline__ void store_one(const Output& to, int64_t index, double value) {
  switch (to.dtype) {
    case DType::float32:
      static_cast<float*>(to.data)[index] = static_cast<float>(value);
      return;
    case DType::bfloat16:
      static_cast<BFloat16*>(to.data)[index] = narrow<BFloat16>(static_cast<float>(value));
      return;
    case DType::float16:
      static_cast<Half*>(to.data)[index] = narrow<Half>(static_cast<float>(value));
      return;
    default:
      static_cast<double*>(to.data)[index] = value;
  }
}

}  // namespace fastvae
