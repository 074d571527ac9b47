#include "tensor.h"

namespace fastvae {

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
