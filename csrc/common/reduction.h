// The reductions of a loss.
#pragma once

#include <cstdint>

namespace fastvae {

// These are the numbers of REDUCTIONS in fastvae/ops/_results.py.
enum class Reduction : int64_t { none = 0, sample = 1, batchmean = 2, sum = 3, mean = 4 };

// The factor of the sum over all elements. An empty batch has the loss 0, not the NaN of 0 / 0.
inline double reduction_scale(Reduction reduction, int64_t batch, int64_t numel) {
  if (reduction == Reduction::mean) return 1.0 / static_cast<double>(numel > 0 ? numel : 1);
  if (reduction == Reduction::batchmean) return 1.0 / static_cast<double>(batch > 0 ? batch : 1);
  return 1.0;
}

}  // namespace fastvae
