#include "tensor.h"

#include <atomic>
#include <cstring>

namespace fastvae {

namespace {

std::atomic<bool> poison{false};

}  // namespace

void set_poison(bool on) { poison.store(on); }

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) { return empty_strided(shape, contiguous_strides(shape), dtype); }

Tensor empty_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
  Tensor tensor = allocate_strided(shape, strides, dtype, aoti_torch_device_type_cpu(), 0);
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
