// What the group norm operators ask of their kernels.
#pragma once

#include <algorithm>

#include "../common/group_norm_formulas.h"
#include "isa.h"
#include "partition.h"
#include "view.h"

namespace fastvae {

// The tensor as runs of adjacent elements whose channels repeat: a sample with the channels last (channels side by side, `channels` of
// them), or one plane of a contiguous tensor (one channel). An item is a piece of a run or several whole runs, by sizes alone, so that
// results do not depend on the number of threads. Each piece has a slot for what it sums.
struct NormRuns {
  int64_t count, length, channels;
  int64_t piece, pieces_per_run, runs_per_item;

  NormRuns(int64_t count, int64_t length, int64_t channels);

  int64_t items() const { return length == 0 ? 0 : (count + runs_per_item - 1) / runs_per_item * pieces_per_run; }
  int64_t slots() const { return count * pieces_per_run; }
  int64_t piece_length(int64_t i) const { return i + 1 < pieces_per_run ? piece : length - i * piece; }
};

// Kernels work on rows of columns, a whole number of times the channels and even, since two bfloat16 make a word: enough that a loop over
// them pays, and where that does not make them too many a multiple of the widest vector. Sums over the rows are in T, those over columns in
// double.
constexpr int64_t kFewestColumns = 64, kMostColumns = 2048, kVector = 32;

inline int64_t columns_of(const NormRuns& runs) {
  int64_t whole = runs.channels;
  while (whole % kVector != 0) whole += runs.channels;
  if (whole > kMostColumns) whole = runs.channels % 2 == 0 ? runs.channels : 2 * runs.channels;
  return whole * (whole < kFewestColumns ? (kFewestColumns + whole - 1) / whole : 1);
}

constexpr int64_t kNormPiece = 32768;    // elements: some 10 us of work, and both of the backward pass's inputs in a second-level cache
constexpr int64_t kNormPositions = 128;  // of a piece at least, so that its sums of each channel are little beside it

inline NormRuns::NormRuns(int64_t count, int64_t length, int64_t channels) : count(count), length(length), channels(channels) {
  // Whole rows of columns, as many fours of rows as make a piece.
  int64_t rows = 4 * columns_of(*this), elements = std::max(kNormPiece, kNormPositions * channels);
  piece = rows * (rows < elements ? elements / rows : 1);
  pieces_per_run = length > piece ? ceil_div(length, piece) : 1;
  runs_per_item = length > 0 && length < kNormPiece ? ceil_div(kNormPiece, length) : 1;
}

// Of each channel of each run.
struct NormChannelParameters {
  const double *centre, *scale, *offset;  // u = (x - centre) * scale + offset
  const double *slope, *constant;         // of the backward pass
};

struct GroupNorm {
  NormRuns runs;
  DType dtype;  // of the tensors below
  NormActivation activation;
  const void *input, *grad_output;
  void *output, *grad_input;
  NormChannelParameters channel;
  int64_t groups;  // in a run: how many moments a slot has
  double* sums;    // (slots, groups, 2) moments, or (slots, channels, 2) gradient sums
};

struct GroupNormKernels {
  // Bytes that a call of the following needs as scratch.
  int64_t (*scratch_bytes)(const NormRuns&);
  // Of each slot and group the mean and the sum of squared deviations from it.
  void (*moments)(const GroupNorm&, int64_t begin_item, int64_t end_item, void* scratch);
  void (*forward)(const GroupNorm&, int64_t begin_item, int64_t end_item, void* scratch);
  // Of each slot and channel the sums of du and of du * (x - centre).
  void (*gradient_sums)(const GroupNorm&, int64_t begin_item, int64_t end_item, void* scratch);
  void (*backward)(const GroupNorm&, int64_t begin_item, int64_t end_item, void* scratch);
  void (*to_double)(const View&, int64_t count, double* to);
  void (*from_double)(const double* from, int64_t count, const Output& to);
};

FASTVAE_DECLARE_KERNELS(GroupNormKernels, group_norm)

}  // namespace fastvae
