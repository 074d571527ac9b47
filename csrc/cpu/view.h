// The view of a tensor that the CPU kernels read. No torch here, because this header is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace fastvae {

// Element e of the tensor in row-major order is data[(e / inner % period) * outer_stride + (e % inner) * inner_stride]. This describes
// contiguous tensors, rows with a stride (a slice of the last dimension), and operands that are broadcast over a run of dimensions. Strides
// are in elements.
struct View {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t inner = 1, period = 1, outer_stride = 0, inner_stride = 1;

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace fastvae
