#include "tensor.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace fastvae {

namespace {

std::atomic<bool> poison{false};

}  // namespace

void set_poison(bool on) { poison.store(on); }

void raise_failed_allocation(int64_t bytes) { throw std::runtime_error("fastvae: allocating " + std::to_string(bytes) + " bytes failed"); }

Tensor Cpu::empty_strided(const Sizes& shape, const Sizes& strides, ScalarType dtype) const {
  Tensor tensor = allocate_strided(shape, strides, dtype, aoti_torch_device_type_cpu(), 0);
  // With all bits set, a number is NaN in every floating dtype.
  if (poison.load(std::memory_order_relaxed)) set_bytes(tensor, 0xff);
  return tensor;
}

void finish_reduction(const std::vector<double>& slots, const Partition& partition, double scale, const Tensor& out) {
  void* data = out.mutable_data_ptr();
  bool is_double = out.scalar_type() == ScalarType::Double;
  for (int64_t row = 0; row < partition.rows; ++row) {
    double total = 0.0;
    for (int64_t i = 0; i < partition.slots_per_row; ++i) total += slots[row * partition.slots_per_row + i];
    if (is_double)
      static_cast<double*>(data)[row] = total * scale;
    else
      static_cast<float*>(data)[row] = static_cast<float>(total * scale);
  }
}

}  // namespace fastvae
