// The interface between the RMS norm operators (rms_norm.cpp) and their kernels (simd/rms_norm.cpp), which are compiled once per
// instruction set and know nothing of torch.
#pragma once

#include "../common/rms_norm_formulas.h"
#include "channel_runs.h"
#include "isa.h"
#include "view.h"

namespace fastvae {

struct RmsNorm {
  ChannelRuns runs;
  bool channels_last;
  DType dtype;  // the dtype of the next four tensors
  NormActivation activation;
  EpsMode eps_mode;
  double eps;
  const void *input, *grad_output;
  void *output, *grad_input;
  void* rrms;                   // one value for each position, in the type of the arithmetic
  const double *weight, *bias;  // (1 or runs, channels)
  double* sums;                 // (slots, 2, channels): the sums of du * n and of du
};

struct RmsNormKernels {
  // The size of the scratch buffer that each call of the next two kernels needs.
  int64_t (*scratch_bytes)(const RmsNorm&);
  // Writes the output and rrms.
  void (*forward)(const RmsNorm&, int64_t begin_item, int64_t end_item, void* scratch);
  // Reads rrms, writes grad_input, and adds to `sums`.
  void (*backward)(const RmsNorm&, int64_t begin_item, int64_t end_item, void* scratch);
  // Convert weights, biases and their gradients.
  void (*to_double)(const View&, int64_t count, double* to);
  void (*from_double)(const double* from, int64_t count, const Output& to);
};

FASTVAE_DECLARE_KERNELS(RmsNormKernels, rms_norm)

}  // namespace fastvae
