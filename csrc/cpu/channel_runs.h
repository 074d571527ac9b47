// The partition of the families whose parameters are one value for each channel, among threads and partial sums.
#pragma once

#include <algorithm>
#include <vector>

#include "partition.h"

namespace fastvae {

// The partition of a tensor of positions and channels. A run is a number of positions with the same parameters that lie behind each other
// in memory: in channels-last memory those of a sample, or of all samples where these share the parameters; in contiguous memory those of a
// sample. Long runs are cut into pieces, and each piece has a slot for its partial sums. An item, which is what one thread takes at a time,
// is one piece of a long run or several short runs. All of this depends on sizes alone, so that results do not depend on the number of
// threads.
struct ChannelRuns {
  int64_t count, positions, channels;            // runs of the tensor; positions of a run
  int64_t piece, pieces_per_run, runs_per_item;  // piece: positions of a piece, except the last of a run
  bool shared;                                   // whether all runs have the same parameters

  ChannelRuns(int64_t count, int64_t positions, int64_t channels, bool shared);

  int64_t items() const { return positions * channels == 0 ? 0 : ceil_div(count, runs_per_item) * pieces_per_run; }
  // Runs that share parameters have one slot for an item, other runs have slots of their own.
  int64_t slots() const { return shared ? items() : count * pieces_per_run; }
  int64_t piece_length(int64_t i) const { return i + 1 < pieces_per_run ? piece : positions - i * piece; }
};

// Elements of an item: about 10 us of work, and both inputs of the backward pass fit the L2 cache.
constexpr int64_t kRunItem = 49152;
// A piece has at least so many positions, so that its partial sums, two for each channel, are small beside what it reads.
constexpr int64_t kRunPositions = 128;

inline ChannelRuns::ChannelRuns(int64_t count, int64_t positions, int64_t channels, bool shared)
    : count(count), positions(positions), channels(channels), shared(shared) {
  int64_t elements = std::max<int64_t>(channels, 1);
  piece = ceil_div(std::max(kRunItem / elements, kRunPositions), kRunPositions) * kRunPositions;
  pieces_per_run = positions > piece ? ceil_div(positions, piece) : 1;
  runs_per_item = positions > 0 && positions < piece ? ceil_div(piece, positions) : 1;
}

// Two sums for each channel, (rows, channels) with a row for each run, or one where the runs share the parameters.
struct ChannelSums {
  std::vector<double> first, second;
};

// Adds the slots of each row, (slots, 2, channels), in their order.
inline ChannelSums add_slots(const ChannelRuns& runs, const std::vector<double>& slots) {
  int64_t channels = runs.channels, rows = runs.shared ? 1 : runs.count, slots_per_row = runs.shared ? runs.slots() : runs.pieces_per_run;
  ChannelSums sums{std::vector<double>(rows * channels), std::vector<double>(rows * channels)};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < slots_per_row; ++i) {
      const double* slot = slots.data() + (row * slots_per_row + i) * 2 * channels;
      for (int64_t c = 0; c < channels; ++c) sums.first[row * channels + c] += slot[c];
      for (int64_t c = 0; c < channels; ++c) sums.second[row * channels + c] += slot[channels + c];
    }
  return sums;
}

}  // namespace fastvae
