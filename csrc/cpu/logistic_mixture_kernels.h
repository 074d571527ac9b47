// The interface between the logistic mixture operators (logistic_mixture.cpp) and their kernels (simd/logistic_mixture.cpp), which are
// compiled once per instruction set and know nothing of torch.
#pragma once

#include "../common/logistic_mixture_formulas.h"
#include "isa.h"
#include "partition.h"
#include "view.h"

namespace fastvae {

// Positions that a kernel handles at a time.
constexpr int64_t kMixtureTile = 256;

// A loss of one value for each position of a batch of images. Outputs that are not requested have no data.
struct LogisticMixture {
  LogisticMixtureSizes sizes;
  const void* input;   // (batch, parameters, positions)
  const void* target;  // (batch, channels, positions)
  DType dtype, target_dtype;
  Partition partition;  // of the positions

  // The forward pass requests one of these.
  Output loss;   // (batch, positions)
  double* sums;  // (slots,): the loss is added to the slots of the partition

  // The gradient is multiplied by grad_scale and, where there is one, by the grad_output of its position.
  View grad_output;
  double grad_scale;
  Output grad_input;  // (batch, parameters, positions)

  bool is_double() const { return dtype == DType::float64; }
  // The numbers of scratch memory that a thread needs: the gradients of a tile, two rows for each component and two for each channel.
  int64_t scratch_numbers() const { return (sizes.parameters() + 2 * sizes.mixtures + 2 * sizes.channels) * kMixtureTile; }
};

struct LogisticMixtureKernels {
  // Computes what is requested for the positions of some items of the partition. `scratch` has scratch_numbers() floats or doubles.
  void (*run)(const LogisticMixture&, void* scratch, int64_t begin_item, int64_t end_item);
};

FASTVAE_DECLARE_KERNELS(LogisticMixtureKernels, logistic_mixture)

}  // namespace fastvae
