// The moving averages of the codes.
//
// kernel                      grid                 reads                               writes
// codebook_ema_counts_kernel  (heads)              counts                              ema_count, inverse
// codebook_ema_codes_kernel   (blocks of elements) sums, inverse                       ema_sum, codebook
#pragma once

#include "../common/codebook_formulas.h"
#include "codebook_device.cuh"

namespace fastvae {
namespace {

struct CodebookEmaParams {
  float* codebook;        // (heads, codes, dim)
  float* ema_count;       // (heads, codes)
  float* ema_sum;         // (heads, codes, dim)
  const int64_t* counts;  // (heads, codes)
  CodebookView sums;      // (heads, codes, dim), contiguous
  int64_t codes, numel;
  Divider dim;
  double decay, eps;
  double* inverse;  // (heads, codes): the reciprocal of the smoothed count, or 0 where that is 0 and the code stays as it is
};

// One block updates the counts of a head.
__global__ void __launch_bounds__(kThreads) codebook_ema_counts_kernel(const __grid_constant__ CodebookEmaParams p) {
  int64_t first = blockIdx.x * p.codes, end = first + p.codes;
  double total = 0.0;
  struct Counts {
    float average;
    int64_t rows;
  };
  load_then_store(
      first + threadIdx.x, end, kThreads, [&](int64_t k) { return Counts{p.ema_count[k], p.counts[k]}; },
      [&](int64_t k, Counts counts) {
        float average = static_cast<float>(moving_average(counts.average, static_cast<double>(counts.rows), p.decay));
        p.ema_count[k] = average;
        total += average;
      });
  total = block_sum(total);
  load_then_store(
      first + threadIdx.x, end, kThreads, [&](int64_t k) { return p.ema_count[k]; },
      [&](int64_t k, float average) {
        double smoothed = smoothed_count(average, total, p.codes, p.eps);
        p.inverse[k] = smoothed > 0.0 ? 1.0 / smoothed : 0.0;
      });
}

// A thread updates one element of the sums and of the codes.
__global__ void __launch_bounds__(kThreads) codebook_ema_codes_kernel(const __grid_constant__ CodebookEmaParams p) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.numel) return;
  double inverse = p.inverse[quotient(p.dim, i)];
  float sum = static_cast<float>(moving_average(p.ema_sum[i], element_as_double(p.sums, i), p.decay));
  p.ema_sum[i] = sum;
  if (inverse > 0.0) p.codebook[i] = static_cast<float>(sum * inverse);
}

}  // namespace
}  // namespace fastvae
