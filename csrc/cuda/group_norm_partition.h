// This file decides which elements of a (batch, channels, positions) tensor a block and a thread of the group norm kernels read, in either
// memory layout. Everything is arithmetic on sizes alone, so that tests need no GPU.
#pragma once

#include "partition.h"

namespace fastvae {

// Two waves of an H200, whose 132 multiprocessors each run eight blocks of 128 threads with 64 registers at a time. Tests build with fewer,
// so that blocks get long splits of small tensors.
#if !defined(FASTVAE_MAX_NORM_BLOCKS)
#define FASTVAE_MAX_NORM_BLOCKS 2048
#endif
constexpr int64_t kMaxNormBlocks = FASTVAE_MAX_NORM_BLOCKS;
// Vectors that a thread keeps in registers where a block reads its whole group once: 32 elements, twice that in the backward pass.
constexpr int kKeptVectors = 8;
// Memory delivers sectors of 32 bytes. In channels-last memory a block that reads fewer adjacent bytes would waste the rest of each sector.
constexpr int64_t kSectorBytes = 32;

// The partition of a launch. A block handles a tile of adjacent channels of one sample, over one split of the positions. `threads_per_line`
// adjacent threads, a power of two, read a line, which is what lies side by side in memory: positions of one channel in contiguous memory,
// and channels of one position in channels-last memory.
struct GroupNormBlocks {
  int64_t batch, channels, positions;
  int64_t tile_channels, tiles;     // channels of a tile, and tiles of a sample
  int64_t split_positions, splits;  // positions of a split, and splits of a sample
  int threads_per_line;
  bool on_chip;  // the tile is one group, and its block keeps all elements in registers

  int64_t count() const { return batch * tiles * splits; }
};

// The smallest power of two that is not below n.
FASTVAE_INLINE int next_power_of_two(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// The number of positions that a block reads in a step, kRuns vectors for each thread.
FASTVAE_INLINE int64_t positions_per_step(int threads_per_line, bool channels_last) {
  return static_cast<int64_t>(kRuns) * (channels_last ? kThreads / threads_per_line : threads_per_line * kVector);
}

// The partition for groups of any size, which reads every element twice. The positions of a sample are split among several blocks where its
// channels alone would not fill the GPU.
inline GroupNormBlocks split_group_norm_blocks(int64_t batch, int64_t channels, int64_t positions, bool channels_last, int64_t max_blocks) {
  GroupNormBlocks b{batch, channels, positions, 0, 0, 0, 0, 0, false};
  int64_t vectors = ceil_div(channels_last ? channels : positions, kVector);
  if (channels_last) {
    b.threads_per_line = next_power_of_two(min64(vectors, kWarp));
    b.tile_channels = static_cast<int64_t>(b.threads_per_line) * kVector;
  } else {
    // Channels with few positions share a warp. A channel with more positions than a warp reads in a step has a block of its own.
    int64_t threads = ceil_div(vectors, kRuns);
    b.threads_per_line = threads <= kWarp ? next_power_of_two(threads) : kThreads;
    b.tile_channels = kThreads / b.threads_per_line;
  }
  b.tiles = ceil_div(channels, b.tile_channels);
  int64_t step = positions_per_step(b.threads_per_line, channels_last);
  int64_t wanted = ceil_div(max_blocks, max64(batch * b.tiles, 1));
  int64_t splits = max64(min64(wanted, ceil_div(positions, step)), 1);
  b.split_positions = max64(ceil_div(ceil_div(positions, splits), step), 1) * step;
  b.splits = ceil_div(positions, b.split_positions);
  return b;
}

// The threads_per_line with which one block can keep a group of `width` channels in registers, or 0 where it cannot.
inline int on_chip_threads_per_line(int64_t width, int64_t positions, bool channels_last, int64_t itemsize) {
  if (width > (channels_last ? kWarp * kVector : kThreads)) return 0;
  if (channels_last && positions > 1 && width * itemsize < kSectorBytes) return 0;
  int64_t vectors = ceil_div(channels_last ? width : positions, kVector);
  int max_threads = channels_last ? kWarp : kThreads / next_power_of_two(width);
  int threads_per_line = next_power_of_two(min64(vectors, max_threads));
  return positions_per_step(threads_per_line, channels_last) / kRuns * kKeptVectors >= positions ? threads_per_line : 0;
}

// The partition for these sizes, none of which may be 0.
inline GroupNormBlocks group_norm_blocks(int64_t batch, int64_t channels, int64_t positions, int64_t groups, bool channels_last,
                                         int64_t itemsize, int64_t max_blocks = kMaxNormBlocks) {
  int64_t width = channels / groups;
  int threads_per_line = on_chip_threads_per_line(width, positions, channels_last, itemsize);
  if (threads_per_line == 0) return split_group_norm_blocks(batch, channels, positions, channels_last, max_blocks);
  return {batch, channels, positions, width, groups, positions, 1, threads_per_line, true};
}

// The vectors that one thread reads. Vector i begins at element + i * element_stride. In contiguous memory it holds positions of one
// channel; in channels-last memory it holds `channel_count` channels of one position.
template <bool kChannelsLast>
struct GroupNormVectors {
  int64_t element, element_stride;
  int64_t positions_left, position_stride;  // positions from the current vector to the end of the split; from one vector to the next
  int64_t first_channel;
  int channel_count;  // 0 where the thread has nothing to read

  // The number of elements in vector i, counted from the current one.
  FASTVAE_MEMBER int count(int i) const {
    int64_t left = positions_left - i * position_stride;
    return kChannelsLast ? (left > 0 ? channel_count : 0) : vector_count(left);
  }
  FASTVAE_MEMBER void skip(int vectors) {
    element += vectors * element_stride;
    positions_left -= vectors * position_stride;
  }
};

template <bool kChannelsLast>
FASTVAE_INLINE GroupNormVectors<kChannelsLast> thread_vectors(const GroupNormBlocks& b, int64_t sample, int64_t tile, int64_t split,
                                                              int thread) {
  int member = thread % b.threads_per_line, line = thread / b.threads_per_line;
  int64_t begin = split * b.split_positions, end = min64(begin + b.split_positions, b.positions);
  int64_t first_channel = tile * b.tile_channels, end_channel = min64(first_channel + b.tile_channels, b.channels);
  GroupNormVectors<kChannelsLast> vectors;
  int64_t position;
  if (kChannelsLast) {
    position = begin + line;
    vectors.first_channel = first_channel + member * kVector;
    vectors.channel_count = vector_count(end_channel - vectors.first_channel);
    vectors.element = (sample * b.positions + position) * b.channels + vectors.first_channel;
    vectors.position_stride = kThreads / b.threads_per_line;
    vectors.element_stride = vectors.position_stride * b.channels;
  } else {
    position = begin + member * kVector;
    vectors.first_channel = first_channel + line;
    vectors.channel_count = vectors.first_channel < end_channel ? 1 : 0;
    vectors.element = (sample * b.channels + vectors.first_channel) * b.positions + position;
    vectors.element_stride = vectors.position_stride = b.threads_per_line * kVector;
  }
  vectors.positions_left = vectors.channel_count > 0 ? end - position : 0;
  return vectors;
}

// Several threads read the same channels. This is true in the one that writes what they summed.
template <bool kChannelsLast>
FASTVAE_INLINE bool writes_channel_sums(const GroupNormBlocks& b, int thread) {
  return kChannelsLast ? thread < b.threads_per_line : thread % b.threads_per_line == 0;
}

}  // namespace fastvae
