// The dtypes of tensors as kernels see them, and an output tensor whose dtype is known at run time.
#pragma once

#include <cstdint>

namespace fastvae {

enum class DType : uint8_t { float32, bfloat16, float16, float64, uint8, boolean };

// A contiguous output tensor. Where it has no data, the output is not requested.
struct Output {
  void* data = nullptr;
  DType dtype = DType::float32;

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace fastvae
