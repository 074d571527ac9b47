// The interface between the RMS norm operators (rms_norm.cpp) and their kernels (simd/rms_norm.cpp), which are compiled once per
// instruction set and know nothing of torch.
#pragma once

#include <algorithm>

#include "../common/rms_norm_formulas.h"
#include "isa.h"
#include "partition.h"
#include "view.h"

namespace fastvae {

// The partition of a tensor. A run is a number of positions with the same weight and bias that lie behind each other in memory: in
// channels-last memory those of a sample, or of all samples where these share the parameters; in contiguous memory those of a sample. Long
// runs are cut into pieces, and each piece has a slot for its partial sums. An item, which is what one thread takes at a time, is one piece
// of a long run or several short runs. All of this depends on sizes alone, so that results do not depend on the number of threads.
struct RmsRuns {
  int64_t count, positions, channels;            // runs of the tensor; positions of a run
  int64_t piece, pieces_per_run, runs_per_item;  // piece: positions of a piece, except the last of a run
  bool shared;                                   // whether all runs have the same weight and bias

  RmsRuns(int64_t count, int64_t positions, int64_t channels, bool shared);

  int64_t items() const { return positions * channels == 0 ? 0 : ceil_div(count, runs_per_item) * pieces_per_run; }
  // Runs that share parameters have one slot for an item, other runs have slots of their own.
  int64_t slots() const { return shared ? items() : count * pieces_per_run; }
  int64_t piece_length(int64_t i) const { return i + 1 < pieces_per_run ? piece : positions - i * piece; }
};

// Elements of an item: about 10 us of work, and both inputs of the backward pass fit the L2 cache.
constexpr int64_t kRmsItem = 32768;
// A piece has at least so many positions, so that its partial sums, two for each channel, are small beside what it reads.
constexpr int64_t kRmsPositions = 128;

inline RmsRuns::RmsRuns(int64_t count, int64_t positions, int64_t channels, bool shared)
    : count(count), positions(positions), channels(channels), shared(shared) {
  int64_t elements = std::max<int64_t>(channels, 1);
  piece = ceil_div(std::max(kRmsItem / elements, kRmsPositions), kRmsPositions) * kRmsPositions;
  pieces_per_run = positions > piece ? ceil_div(positions, piece) : 1;
  runs_per_item = positions > 0 && positions < piece ? ceil_div(piece, positions) : 1;
}

struct RmsNorm {
  RmsRuns runs;
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
  int64_t (*scratch_bytes)(const RmsRuns&);
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
