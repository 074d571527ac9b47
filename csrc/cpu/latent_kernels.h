// The interface between the latent operators (latent.cpp) and their kernels (simd/latent.cpp), which are compiled once per instruction set
// and know nothing of torch.
#pragma once

#include "isa.h"
#include "partition.h"
#include "view.h"

namespace fastvae {

// The operands of both passes. Views of absent tensors have no data.
struct LatentInputs {
  View mu, logvar, prior_mu, prior_logvar;  // (numel,); without a prior the KL is against the standard normal
  View eps;                                 // (samples, numel): the caller's noise; without it the kernels draw noise from the key
  uint32_t key[2];                          // the low and the high word of the seed
  View active;                              // (numel,): 0 where free bits replace the KL; without it the KL of every element counts
  int64_t numel, samples;
  double clamp_min, clamp_max;  // the limits to which log variances are clamped
  bool is_double;               // the type of the arithmetic: double where all tensors are float64, float otherwise
};

// Outputs that are not requested have no data.
struct LatentForward : LatentInputs {
  Partition partition;
  Output z;      // (samples, numel)
  Output noise;  // (samples, numel)
  Output kl;     // (numel,), where it is not reduced
  double* sums;  // (slots of the partition,): the sums of the KL where it is reduced, otherwise nullptr
  double free_bits;
};

struct LatentBackward : LatentInputs {
  Partition partition;
  View grad_z;                                                    // (samples, numel)
  View grad_kl;                                                   // (numel,)
  double grad_kl_scale;                                           // multiplies grad_kl
  Output grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar;  // (numel,)
};

struct LatentKernels {
  void (*forward)(const LatentForward&, int64_t begin_item, int64_t end_item);
  void (*backward)(const LatentBackward&, int64_t begin_item, int64_t end_item);
  // Takes the inputs as a matrix with rows of `inner` elements. Writes to `sums` the KL of dimensions [dimension, dimension + count), each
  // summed over rows [begin_row, end_row). `count` is at most 512.
  void (*dimension_sums)(const LatentInputs&, int64_t inner, int64_t begin_row, int64_t end_row, int64_t dimension, int64_t count,
                         double* sums);
};

FASTVAE_DECLARE_KERNELS(LatentKernels, latent)

}  // namespace fastvae
