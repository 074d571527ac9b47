// The interface between the Snake operators (snake.cpp) and their kernels (simd/snake.cpp), which are compiled once per instruction set and
// know nothing of torch.
#pragma once

#include "../common/snake_formulas.h"
#include "channel_runs.h"
#include "isa.h"
#include "view.h"

namespace fastvae {

struct Snake {
  ChannelRuns runs;
  bool channels_last;
  DType dtype;  // the dtype of the next four tensors
  const void *input, *grad_output;
  void *output, *grad_input;
  const double *frequency, *gain;  // (channels,)
  double* sums;                    // (slots, 2, channels): the sums of the gradients of frequency and gain, see SnakeGradients
};

struct SnakeKernels {
  // The size of the scratch buffer that each call of the next two kernels needs.
  int64_t (*scratch_bytes)(const ChannelRuns&);
  // Writes the output.
  void (*forward)(const Snake&, int64_t begin_item, int64_t end_item, void* scratch);
  // Writes grad_input and adds to `sums`.
  void (*backward)(const Snake&, int64_t begin_item, int64_t end_item, void* scratch);
  // Convert frequencies, gains and their gradients.
  void (*to_double)(const View&, int64_t count, double* to);
  void (*from_double)(const double* from, int64_t count, const Output& to);
};

FASTVAE_DECLARE_KERNELS(SnakeKernels, snake)

}  // namespace fastvae
