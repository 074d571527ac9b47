// What the latent operators ask of their kernels.
#pragma once

#include "isa.h"
#include "partition.h"
#include "view.h"

namespace fastvae {

struct LatentInputs {
  View mu, logvar, prior_mu, prior_logvar;  // no prior: the standard normal
  View eps;                                 // no eps: normals are drawn from the key
  uint32_t key[2];
  View active;  // which elements count in the KL; none: all do
  int64_t numel, samples;
  double clamp_min, clamp_max;
  bool wide;  // double arithmetic, for float64 tensors
};

struct LatentForward : LatentInputs {
  Partition partition;
  Output z;         // (samples, numel)
  Output kept_eps;  // the drawn noise, in the same shape
  Output kl;        // elementwise
  double* sums;     // of the KL, one a slot of the partition; nullptr: not wanted
  double free_bits;
};

struct LatentBackward : LatentInputs {
  Partition partition;
  View grad_z, grad_kl;
  double grad_kl_scale;
  Output grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar;
};

struct LatentKernels {
  void (*forward)(const LatentForward&, int64_t begin_item, int64_t end_item);
  void (*backward)(const LatentBackward&, int64_t begin_item, int64_t end_item);
  // Sums the KL of rows [begin_row, end_row) for dimensions [dimension, dimension + count), count <= 512, of rows of `inner`.
  void (*dimension_sums)(const LatentInputs&, int64_t inner, int64_t begin_row, int64_t end_row, int64_t dimension, int64_t count,
                         double* sums);
};

FASTVAE_DECLARE_KERNELS(LatentKernels, latent)

}  // namespace fastvae
