// The element types that kernels read and write, and where they write.
#pragma once

#include <cstdint>

namespace fastvae {

enum class DType : uint8_t { float32, bfloat16, float16, float64, uint8, boolean };

// A contiguous output; without data, none is wanted.
struct Output {
  void* data = nullptr;
  DType dtype = DType::float32;

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace fastvae
