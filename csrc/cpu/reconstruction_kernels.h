// The interface between the reconstruction operators (reconstruction.cpp) and their kernels (simd/reconstruction.cpp), which are compiled
// once per instruction set and know nothing of torch.
#pragma once

#include "../common/reconstruction_formulas.h"
#include "isa.h"
#include "partition.h"
#include "view.h"

namespace fastvae {

// A loss over the elements of `input`, to whose shape all views are broadcast. Outputs that are not requested are nullptr.
struct Reconstruction {
  Likelihood likelihood;
  View input, target, weight;
  View extra;  // pos_weight of BCE from logits, or the log variance of the Gaussian
  Partition partition;
  bool is_double;  // the arithmetic is double, for float64 tensors, otherwise float

  // The forward pass requests one of these.
  Output loss;   // the loss of each element
  double* sums;  // (slots,): the loss is added to the slots of the partition

  // All gradients are multiplied by grad_scale and, where there is one, by the grad_output of their element.
  View grad_output;
  double grad_scale;
  Output grad_input, grad_target, grad_logvar;
  double* grad_logvar_sums;  // (items, values): the gradient of a log variance whose values are shared, added up for each item
};

struct ReconstructionKernels {
  // Computes what is requested for the elements of some items of the partition.
  void (*run)(const Reconstruction&, int64_t begin_item, int64_t end_item);
  // to[i] = from[i] * factor for the elements [begin, end). `to` and `from` may be one tensor.
  void (*scale)(const View& from, const Output& to, double factor, bool is_double, int64_t begin, int64_t end);
};

FASTVAE_DECLARE_KERNELS(ReconstructionKernels, reconstruction)

}  // namespace fastvae
