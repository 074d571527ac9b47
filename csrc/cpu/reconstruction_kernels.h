// What the reconstruction operators ask of their kernels.
#pragma once

#include "isa.h"
#include "partition.h"
#include "view.h"

namespace fastvae {

enum class Likelihood : int64_t { bce_with_logits = 0, bce = 1, mse = 2, gaussian = 3 };

struct Reconstruction {
  Likelihood likelihood;
  View input, target, weight, extra;  // extra: the weight of positives or the log variance
  Partition partition;
  bool wide;  // double arithmetic, for float64 tensors

  // Wanted of the forward pass.
  Output loss;   // elementwise
  double* sums;  // of the loss, one a slot of the partition

  // Wanted of either pass; each gradient is multiplied with grad_scale and, where given, the incoming gradient of its element.
  View grad_output;
  double grad_scale;
  Output grad_input, grad_target, grad_logvar;
  double* grad_logvar_sums;  // (items, period) where a log variance is shared
};

struct ReconstructionKernels {
  void (*run)(const Reconstruction&, int64_t begin_item, int64_t end_item);
  // to[i] = from[i] * factor for elements [begin, end); in place where the two are one tensor.
  void (*scale)(const View& from, const Output& to, double factor, bool wide, int64_t begin, int64_t end);
};

FASTVAE_DECLARE_KERNELS(ReconstructionKernels, reconstruction)

}  // namespace fastvae
