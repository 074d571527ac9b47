// The device code that the kernels of group norm and RMS norm share: parameters whose dtype is known at run time, the vectors that a thread
// loads and stores, and the shared memory in which it keeps them.
//
// A type `Vectors` describes the vectors of one thread, which are `element_stride` elements apart: vector i begins at element
// + i * element_stride and has count(i) elements, 0 to kVector.
#pragma once

#include "memory.cuh"
#include "norm_partition.h"

namespace fastvae {

// The weight or the bias.
struct NormParameter {
  const void* data;  // one value for each channel, of dtype, or nullptr
  DType dtype;
  float default_value;  // stands for every element where data is nullptr
};

__device__ __forceinline__ float value_of(const NormParameter& parameter, int64_t index) {
  if (!parameter.data) return parameter.default_value;
  switch (parameter.dtype) {
    case DType::float32:
      return static_cast<const float*>(parameter.data)[index];
    case DType::bfloat16:
      return to_float(static_cast<const BFloat16*>(parameter.data)[index]);
    default:
      return to_float(static_cast<const Half*>(parameter.data)[index]);
  }
}

// The elements of `kCount` vectors of a thread, in registers.
template <int kCount>
using ThreadValues = float[kCount][kVector];

// Loads the next kCount vectors of a thread as they are stored, and 0 for elements that do not exist. All loads are issued before the first
// value is used, so that their latencies overlap. `aligned` says that each vector is whole and aligned.
template <int kCount, class T, class Vectors>
__device__ __forceinline__ void load_stored(const T* from, const Vectors& vectors, bool aligned, Vector<T> (&to)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) to[j] = {};
  if (aligned) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (vectors.count(j) > 0) to[j] = *reinterpret_cast<const Vector<T>*>(from + vectors.element + j * vectors.element_stride);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      for (int k = 0; k < kVector; ++k)
        if (k < vectors.count(j)) to[j].v[k] = from[vectors.element + j * vectors.element_stride + k];
  }
}

template <int kCount, class T>
__device__ __forceinline__ void convert_vectors(const Vector<T> (&from)[kCount], ThreadValues<kCount>& to) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    for (int k = 0; k < kVector; ++k) to[j][k] = to_float(from[j].v[k]);
}

// Loads the next kCount vectors of a thread as float32.
template <int kCount, class T, class Vectors>
__device__ __forceinline__ void load_vectors(const T* from, const Vectors& vectors, bool aligned, ThreadValues<kCount>& to) {
  Vector<T> stored[kCount];
  load_stored(from, vectors, aligned, stored);
  convert_vectors(stored, to);
}

template <int kCount, class T, class Vectors>
__device__ __forceinline__ void store_vectors(T* to, const Vectors& vectors, bool aligned, const ThreadValues<kCount>& from) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    int count = vectors.count(j);
    store(to + vectors.element + j * vectors.element_stride, count, aligned && count > 0, from[j]);
  }
}

// Slots for `count` vectors of each thread in the shared memory of the block. A thread reads no slot but its own, so that no barrier is
// needed; the slots of adjacent threads are adjacent, so that a warp accesses all banks.
template <class T>
class ThreadSlots {
 public:
  __device__ __forceinline__ ThreadSlots(unsigned char* memory, int count)
      : slots_(reinterpret_cast<Vector<T>*>(memory) + threadIdx.x), end_(memory + count * blockDim.x * sizeof(Vector<T>)) {}

  __device__ __forceinline__ unsigned char* end() const { return end_; }

  // Vector j of `from` goes into slot first + j.
  template <int kCount>
  __device__ __forceinline__ void store(int first, const Vector<T> (&from)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) slots_[(first + j) * blockDim.x] = from[j];
  }
  template <int kCount>
  __device__ __forceinline__ void load(int first, Vector<T> (&to)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = slots_[(first + j) * blockDim.x];
  }

  // The same for slots of float32.
  template <int kCount>
  __device__ __forceinline__ void store(int first, const ThreadValues<kCount>& from) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) slots_[(first + j) * blockDim.x] = {from[j][0], from[j][1], from[j][2], from[j][3]};
  }
  template <int kCount>
  __device__ __forceinline__ void load(int first, ThreadValues<kCount>& to) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Vector<T> vector = slots_[(first + j) * blockDim.x];
      for (int k = 0; k < kVector; ++k) to[j][k] = vector.v[k];
    }
  }

 private:
  Vector<T>* slots_;
  unsigned char* end_;
};

}  // namespace fastvae
