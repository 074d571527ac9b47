// This file decides which elements of a (batch, channels, positions) tensor a block and a thread of the group norm kernels read, in either
// memory layout. Everything is arithmetic on sizes alone, so that tests need no GPU.
#pragma once

#include "norm_partition.h"

namespace fastvae {

// Tests build with smaller limits, so that small tensors lie on both sides of each.
#if !defined(FASTVAE_MAX_NORM_BLOCKS)
#define FASTVAE_MAX_NORM_BLOCKS 2048
#endif
#if !defined(FASTVAE_NORM_GROUP_BYTES)
#define FASTVAE_NORM_GROUP_BYTES 65536
#endif
#if !defined(FASTVAE_MANY_NORM_GROUPS)
#define FASTVAE_MANY_NORM_GROUPS 256
#endif

struct GroupNormLimits {
  // Blocks of a launch that splits groups: two waves of an H200, whose 132 multiprocessors each run eight blocks of 128 threads with 64
  // registers at a time.
  int64_t max_blocks = FASTVAE_MAX_NORM_BLOCKS;
  // Bytes of a group that one block handles. By count that takes no longer than the three launches for larger groups: a block reads or
  // writes about 40 KB in a microsecond, and a launch takes about two.
  int64_t group_bytes = FASTVAE_NORM_GROUP_BYTES;
  // With so many groups, two blocks for each of about 128 multiprocessors, one block handles a group of twice as many bytes.
  int64_t many_groups = FASTVAE_MANY_NORM_GROUPS;
};

// Vectors of each operand that a thread loads in a step where a block handles a whole group. The backward pass has two operands, and in
// channels-last memory the coefficients of four channels in registers.
constexpr int kGroupRuns = kRuns;
template <bool kChannelsLast>
constexpr int kGroupGradientRuns = kChannelsLast ? 1 : 2;

// The partition of a launch. A block handles a tile of adjacent channels of one sample, over one split of the positions. `threads_per_line`
// adjacent threads, a power of two, read a line, which is what lies side by side in memory: positions of one channel in contiguous memory,
// and channels of one position in channels-last memory.
struct GroupNormBlocks {
  int64_t batch, channels, positions;
  int64_t tile_channels, tiles;     // channels of a tile, and tiles of a sample
  int64_t split_positions, splits;  // positions of a split, and splits of a sample
  int threads, threads_per_line;    // threads of a block, and those of them that share a line
  bool whole_groups;                // the tile is one group, and there is one split

  int64_t count() const { return batch * tiles * splits; }
};

// The number of positions from one vector of a thread to the next.
FASTVAE_INLINE int64_t position_stride_of(int threads, int threads_per_line, bool channels_last) {
  return channels_last ? threads / threads_per_line : threads_per_line * kVector;
}

// The number of positions that a block of kThreads threads reads in a step, kRuns vectors for each thread.
FASTVAE_INLINE int64_t positions_per_step(int threads_per_line, bool channels_last) {
  return static_cast<int64_t>(kRuns) * position_stride_of(kThreads, threads_per_line, channels_last);
}

// The partition for groups of any size, which reads every element twice. The positions of a sample are split among several blocks where its
// channels alone would not fill the GPU.
inline GroupNormBlocks split_group_norm_blocks(int64_t batch, int64_t channels, int64_t positions, bool channels_last, int64_t max_blocks) {
  GroupNormBlocks b{batch, channels, positions, 0, 0, 0, 0, kThreads, 0, false};
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

// Whether one block handles a group of `width` channels. Its threads read whole lines: they are as many as its channels, or in
// channels-last memory as the vectors that a warp reads side by side.
inline bool is_whole_group(int64_t width, int64_t positions, int64_t all_groups, bool channels_last, int64_t itemsize,
                           const GroupNormLimits& limits) {
  if (width > (channels_last ? kWarp * kVector : kMaxNormThreads)) return false;
  if (channels_last && positions > 1 && width * itemsize < kSectorBytes) return false;
  int64_t max_bytes = all_groups >= limits.many_groups ? 2 * limits.group_bytes : limits.group_bytes;
  return width * positions * itemsize <= max_bytes;
}

// The partition for these sizes, none of which may be 0.
inline GroupNormBlocks group_norm_blocks(int64_t batch, int64_t channels, int64_t positions, int64_t groups, bool channels_last,
                                         int64_t itemsize, const GroupNormLimits& limits = {}) {
  int64_t width = channels / groups;
  if (!is_whole_group(width, positions, batch * groups, channels_last, itemsize, limits))
    return split_group_norm_blocks(batch, channels, positions, channels_last, limits.max_blocks);
  int threads = kThreads;
  while (threads < kMaxNormThreads && (width * positions > threads * kNormThreadElements || (!channels_last && width > threads)))
    threads *= 2;
  int64_t vectors = ceil_div(channels_last ? width : positions, kVector);
  int max_threads = channels_last ? kWarp : threads / next_power_of_two(width);
  return {batch, channels, positions, width, groups, positions, 1, threads, next_power_of_two(min64(vectors, max_threads)), true};
}

// The number of vectors that a thread reads where a block handles a whole group.
inline int64_t vectors_of_group_thread(const GroupNormBlocks& b, bool channels_last) {
  return ceil_div(b.positions, position_stride_of(b.threads, b.threads_per_line, channels_last));
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
  vectors.position_stride = position_stride_of(b.threads, b.threads_per_line, kChannelsLast);
  if (kChannelsLast) {
    position = begin + line;
    vectors.first_channel = first_channel + member * kVector;
    vectors.channel_count = vector_count(end_channel - vectors.first_channel);
    vectors.element = (sample * b.positions + position) * b.channels + vectors.first_channel;
    vectors.element_stride = vectors.position_stride * b.channels;
  } else {
    position = begin + member * kVector;
    vectors.first_channel = first_channel + line;
    vectors.channel_count = vectors.first_channel < end_channel ? 1 : 0;
    vectors.element = (sample * b.channels + vectors.first_channel) * b.positions + position;
    vectors.element_stride = vectors.position_stride;
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
