// The vectors that the codebook kernels read, and the threads that share one of them.
#pragma once

#include "../common/codebook_rows.h"
#include "reduce.cuh"

namespace fastvae {

// Vectors, and whether each consists of whole vector accesses at aligned addresses.
struct CodebookView : CodebookRows {
  bool aligned = false;
};

__device__ __forceinline__ double to_double(double x) { return x; }
template <class T>
__device__ __forceinline__ double to_double(T x) {
  return static_cast<double>(to_float(x));
}

// The element at an offset.
__device__ __forceinline__ double element_as_double(const CodebookView& rows, int64_t index) {
  switch (rows.dtype) {
    case DType::float32:
      return to_double(static_cast<const float*>(rows.data)[index]);
    case DType::bfloat16:
      return to_double(static_cast<const BFloat16*>(rows.data)[index]);
    case DType::float16:
      return to_double(static_cast<const Half*>(rows.data)[index]);
    default:
      return static_cast<const double*>(rows.data)[index];
  }
}

// Loads `count` <= kVector elements at an offset and fills up with 0. `vectorized` says that the vector is whole and aligned.
__device__ __forceinline__ void load(const CodebookView& rows, int64_t index, int count, bool vectorized, float (&to)[kVector]) {
  switch (rows.dtype) {
    case DType::float32:
      return load(static_cast<const float*>(rows.data) + index, count, vectorized, to);
    case DType::bfloat16:
      return load(static_cast<const BFloat16*>(rows.data) + index, count, vectorized, to);
    case DType::float16:
      return load(static_cast<const Half*>(rows.data) + index, count, vectorized, to);
    default:
      return load(static_cast<const double*>(rows.data) + index, count, vectorized, to);
  }
}

// The loads that a thread issues before it uses the first of them, so that their latencies overlap.
constexpr int kBatch = 8;

// Calls store(i, load(i)) for i = first, first + step, ... below end, in this order, a batch of loads before their stores: the compiler
// cannot move a load above a store that may be to the same address.
template <class Load, class Store>
__device__ __forceinline__ void load_then_store(int64_t first, int64_t end, int64_t step, Load load, Store store) {
  for (int64_t base = first; base < end; base += kBatch * step) {
    decltype(load(first)) values[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (base + k * step < end) values[k] = load(base + k * step);
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (base + k * step < end) store(base + k * step, values[k]);
  }
}

// `width` adjacent threads of a block that share a row, a power of two up to a warp.
struct ThreadGroup {
  int width;
  int member;  // this thread's number in its group
  int number;  // the group's number in the block
  int count;   // groups of a block

  __device__ __forceinline__ explicit ThreadGroup(int width)
      : width(width),
        member(static_cast<int>(threadIdx.x) % width),
        number(static_cast<int>(threadIdx.x) / width),
        count(kThreads / width) {}
};

}  // namespace fastvae
