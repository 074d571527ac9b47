// The view of vectors that the codebook kernels of the CPU and of the GPU read. No torch here, because the CPU kernels know nothing of it.
#pragma once

#include "dtype.h"
#include "macros.h"

namespace fastvae {

// Vectors (heads, rows, dim) whose elements are contiguous, at any distance between heads and between rows.
struct CodebookRows {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t head_stride = 0, row_stride = 0;  // in elements

  explicit operator bool() const { return data != nullptr; }
  // The element with which the row begins.
  FASTVAE_MEMBER int64_t offset(int64_t head, int64_t row) const { return head * head_stride + row * row_stride; }
};

}  // namespace fastvae
