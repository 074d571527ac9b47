// The interface between the group norm operators (group_norm.cpp) and their kernels (simd/group_norm.cpp), which are compiled once per
// instruction set and know nothing of torch.
#pragma once

#include <algorithm>

#include "../common/group_norm_formulas.h"
#include "isa.h"
#include "partition.h"
#include "view.h"

namespace fastvae {

// The partition of a tensor. A run is a stretch of adjacent elements whose channels repeat every `channels` elements: a whole sample in
// channels-last memory, or one plane (one channel) in contiguous memory. Long runs are cut into pieces, and each piece has a slot for its
// partial sums. An item, which is what one thread takes at a time, is one piece of a long run or several short runs. All of this depends on
// sizes alone, so that results do not depend on the number of threads.
struct NormRuns {
  int64_t count, length, channels;               // runs of the tensor; elements and channels of a run
  int64_t piece, pieces_per_run, runs_per_item;  // piece: elements of a piece, except the last of a run

  NormRuns(int64_t count, int64_t length, int64_t channels);

  int64_t items() const { return length == 0 ? 0 : (count + runs_per_item - 1) / runs_per_item * pieces_per_run; }
  int64_t slots() const { return count * pieces_per_run; }
  int64_t piece_length(int64_t i) const { return i + 1 < pieces_per_run ? piece : length - i * piece; }
};

// A kernel reads a piece as rows of columns_of() columns, so that column i always belongs to channel i % channels and one loop serves every
// number of channels. The number of columns is a multiple of the channels. It is even, because the kernels load two bfloat16 at a time, and
// at least kMinColumns, so that the loop over a row is worth its start. It is a multiple of kVector, the elements of the widest vector
// register in bfloat16, unless that would make it larger than kMaxColumns, with which the five arrays of one float per column already take
// 40 KiB of L1 cache. Sums over the rows are in the arithmetic's type, sums over the columns in double.
constexpr int64_t kMinColumns = 64, kMaxColumns = 2048, kVector = 32;

inline int64_t columns_of(const NormRuns& runs) {
  int64_t whole = runs.channels;
  while (whole % kVector != 0) whole += runs.channels;
  if (whole > kMaxColumns) whole = runs.channels % 2 == 0 ? runs.channels : 2 * runs.channels;
  return whole * (whole < kMinColumns ? (kMinColumns + whole - 1) / whole : 1);
}

// Elements of a piece: about 10 us of work, and both inputs of the backward pass fit the L2 cache (256 KiB of float32).
constexpr int64_t kNormPiece = 32768;
// A piece has at least so many positions, so that its partial sums, two for each channel, are small beside what it reads.
constexpr int64_t kNormPositions = 128;

inline NormRuns::NormRuns(int64_t count, int64_t length, int64_t channels) : count(count), length(length), channels(channels) {
  // A piece consists of whole rows, a multiple of the four that a kernel handles at a time.
  int64_t rows = 4 * columns_of(*this), elements = std::max(kNormPiece, kNormPositions * channels);
  piece = rows * (rows < elements ? elements / rows : 1);
  pieces_per_run = length > piece ? ceil_div(length, piece) : 1;
  runs_per_item = length > 0 && length < kNormPiece ? ceil_div(kNormPiece, length) : 1;
}

// One value for each channel of each run, (count, channels).
struct NormChannelParameters {
  const double *centre, *scale, *offset;  // u = (x - centre) * scale + offset
  const double *slope, *intercept;        // see NormStatisticsGradient; only the backward kernel reads them
};

struct GroupNorm {
  NormRuns runs;
  DType dtype;  // the dtype of the next four tensors, all (count, length)
  NormActivation activation;
  const void *input, *grad_output;
  // `restored` is null, or where the backward pass writes the output of the forward pass; it may be the memory of grad_output.
  void *output, *grad_input, *restored;
  NormChannelParameters channel;
  int64_t groups;  // groups of a run, each of which has moments in every slot
  double* sums;    // the moments (slots, groups, 2), or the gradient sums (slots, 2, channels)
};

struct GroupNormKernels {
  // The size of the scratch buffer that each call of the next four kernels needs.
  int64_t (*scratch_bytes)(const NormRuns&);
  // Writes to `sums` the mean and the sum of squared deviations from it, for each group of each slot.
  void (*moments)(const GroupNorm&, int64_t begin_item, int64_t end_item, void* scratch);
  // Writes the output.
  void (*forward)(const GroupNorm&, int64_t begin_item, int64_t end_item, void* scratch);
  // Writes to `sums` the sums of du and of du * (x - centre), for each channel of each slot. For float32 and float64 it also writes du to
  // grad_input, from where the backward kernel reads it.
  void (*gradient_sums)(const GroupNorm&, int64_t begin_item, int64_t end_item, void* scratch);
  // Writes grad_input. The last of these two to compute the activation also writes `restored`.
  void (*backward)(const GroupNorm&, int64_t begin_item, int64_t end_item, void* scratch);
  // Convert weights, biases and their gradients.
  void (*to_double)(const View&, int64_t count, double* to);
  void (*from_double)(const double* from, int64_t count, const Output& to);
};

FASTVAE_DECLARE_KERNELS(GroupNormKernels, group_norm)

}  // namespace fastvae
