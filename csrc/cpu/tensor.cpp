#include "tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>
#include <cstring>

namespace fastvae {

namespace {

std::atomic<bool> poison{false};

int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      STD_TORCH_CHECK(false, "fastvae: a dtype that no kernel gives");
  }
}

}  // namespace

void set_poison(bool on) { poison.store(on); }

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= shape[d] > 0 ? shape[d] : 1;
  }
  return empty_strided(shape, strides, dtype);
}

Tensor empty_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                         shim_dtype(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  // All bits set are a NaN in every floating dtype.
  if (poison.load(std::memory_order_relaxed)) memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());
  return tensor;
}

void finish_reduction(const std::vector<double>& slots, const Partition& partition, double scale, const Tensor& out) {
  void* data = out.mutable_data_ptr();
  bool wide = out.scalar_type() == ScalarType::Double;
  for (int64_t row = 0; row < partition.rows; ++row) {
    double total = 0.0;
    for (int64_t i = 0; i < partition.slots_per_row; ++i) total += slots[row * partition.slots_per_row + i];
    if (wide)
      static_cast<double*>(data)[row] = total * scale;
    else
      static_cast<float*>(data)[row] = static_cast<float>(total * scale);
  }
}

}  // namespace fastvae
