// How kernels see tensors: no torch here, so that these headers can be compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace fastvae {

// Element e of the logical tensor, row-major, lies at data[(e / inner % period) * outer_stride + (e % inner) * inner_stride]. That covers
// contiguous tensors, rows with a stride (a slice of the last dimension), and operands that are broadcast over a run of dimensions.
struct View {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t inner = 1, period = 1, outer_stride = 0, inner_stride = 1;

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace fastvae
