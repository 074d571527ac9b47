// Scratch memory of the codebook kernels, and rows as they read them.
#pragma once

#include <new>

#include "../codebook_kernels.h"
#include "tiles.h"
#include "vector.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// An uninitialised array, aligned to 64 bytes, the widest vector.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// The distance between rows of scratch memory.
FASTVAE_INLINE int64_t padded_dim(int64_t dim) { return ceil_div(dim, kRowAlignment) * kRowAlignment; }

// The sum of term(d) over the elements d of a padded row, whole vectors at a time: no loop for a remainder, and one order of additions.
template <class F>
FASTVAE_INLINE float sum_padded(int64_t stride, F term) {
  float lanes[kRowAlignment] = {};
  for (int64_t begin = 0; begin < stride; begin += kRowAlignment)
#pragma omp simd
    for (int64_t j = 0; j < kRowAlignment; ++j) lanes[j] += term(begin + j);
  float total = 0.0f;
  for (int j = 0; j < kRowAlignment; j += FloatVector::kLanes) total += FloatVector::sum(FloatVector::load(lanes + j));
  return total;
}

// The elements of a row as T: in place where they are of that dtype, otherwise converted into the buffer.
template <class T>
const T* load_row(const CodebookRows& rows, int64_t head, int64_t row, int64_t dim, T* buffer) {
  int64_t offset = rows.offset(head, row);
  if (rows.dtype == native_dtype<T>()) return static_cast<const T*>(rows.data) + offset;
  fastvae::convert(rows.data, rows.dtype, offset, dim, buffer);
  return buffer;
}

// Writes the elements of a row as double. Returns false where one is not finite.
bool row_to_double(const CodebookRows& rows, int64_t head, int64_t row, int64_t dim, double* to) {
  fastvae::convert(rows.data, rows.dtype, rows.offset(head, row), dim, to);
  uint64_t bits = 0;
#pragma omp simd reduction(| : bits)
  for (int64_t d = 0; d < dim; ++d) bits |= not_finite_bit(to[d]);
  return bits >> 63 == 0;
}

}  // namespace
}  // namespace FASTVAE_ISA
}  // namespace fastvae
