// This file decides which elements of a (batch, channels, positions) tensor a block and a thread of the RMS norm kernels read, in either
// memory layout. Everything is arithmetic on sizes alone, so that tests need no GPU.
#pragma once

#include "norm_partition.h"

namespace fastvae {

// Tests build with smaller limits, so that small tensors lie on both sides of each.
#if !defined(FASTVAE_MAX_RMS_NORM_BLOCKS)
#define FASTVAE_MAX_RMS_NORM_BLOCKS 8192
#endif
#if !defined(FASTVAE_MIN_RMS_NORM_BLOCKS)
#define FASTVAE_MIN_RMS_NORM_BLOCKS 512
#endif
#if !defined(FASTVAE_RMS_NORM_TILE_BYTES)
#define FASTVAE_RMS_NORM_TILE_BYTES 98304
#endif

struct RmsNormLimits {
  // With so many blocks an H200, whose 132 multiprocessors each run two to ten at a time, works in six waves at least: the last one, which
  // leaves some multiprocessors idle, is then a small part of the run.
  int64_t max_blocks = FASTVAE_MAX_RMS_NORM_BLOCKS;
  // Blocks become longer only where there are so many of them, about four for each multiprocessor.
  int64_t min_blocks = FASTVAE_MIN_RMS_NORM_BLOCKS;
  // Bytes that a block of the tile kernels keeps of a step. Two blocks of 96 KB share a multiprocessor of an H200, which has 228 KB.
  int64_t tile_bytes = FASTVAE_RMS_NORM_TILE_BYTES;
};

// Vectors that a thread of the line kernels keeps in registers, and the channels for which a block has threads then.
constexpr int kLineVectors = kRuns;
constexpr int64_t kMaxLineChannels = static_cast<int64_t>(kThreads) * kLineVectors * kVector;
// Vectors of each operand that a thread of the tile kernels loads in a step. The backward pass has two operands.
constexpr int kTileRuns = kRuns, kTileShortRuns = 2;
// Bytes of one channel that a tile reads side by side where it is narrow enough to be kept: a line of the L2 cache.
constexpr int64_t kTileLineBytes = 128;
// Positions of a block that has to read the weight and the bias too. With 16 these add an eighth to what it reads, out of the L2 cache.
constexpr int64_t kForwardPositions = 16;
// Positions of a block of the backward pass, which writes two float32 partial sums for each channel, and another kernel reads them: 16
// bytes beside the 6 bytes of each position in bfloat16, a twenty-fourth.
constexpr int64_t kBackwardPositions = 64;

// The partition of a launch. A block handles a split of the positions of one sample, `step_positions` at a time, with all their channels.
// `threads_per_line` adjacent threads, a power of two, read a line, which is what lies side by side in memory: positions of one channel in
// contiguous memory, and channels of one position in channels-last memory.
struct RmsNormBlocks {
  int64_t batch, channels, positions;
  int64_t split_positions, splits;  // positions of a split, and splits of a sample
  int step_positions;
  int threads, threads_per_line;  // threads of a block, and those of them that share a line
  int vectors;                    // vectors that a thread reads in a step
  int channel_stride;             // channels from one vector to the next
  int64_t element_stride;         // elements, likewise

  int64_t count() const { return batch * splits; }
  // The number of positions of a split.
  FASTVAE_MEMBER int positions_of(int split) const { return static_cast<int>(min64(split_positions, positions - split * split_positions)); }
};

// Splits the positions of each sample among blocks, whole steps for each.
inline void split_positions(RmsNormBlocks& b, bool backward, const RmsNormLimits& limits) {
  int64_t steps = ceil_div(b.positions, b.step_positions);
  int64_t long_blocks = ceil_div(b.batch * b.positions, backward ? kBackwardPositions : kForwardPositions);
  int64_t blocks = min64(max64(long_blocks, limits.min_blocks), limits.max_blocks);
  int64_t splits = min64(ceil_div(blocks, b.batch), steps);
  b.split_positions = ceil_div(steps, splits) * b.step_positions;
  b.splits = ceil_div(b.positions, b.split_positions);
}

// The partition for channels-last memory of up to kMaxLineChannels channels. As few threads as can share a position, so that each has
// several loads under way.
inline RmsNormBlocks line_blocks(int64_t batch, int64_t channels, int64_t positions, bool backward, const RmsNormLimits& limits) {
  RmsNormBlocks b{};
  b.batch = batch;
  b.channels = channels;
  b.positions = positions;
  b.threads = kThreads;
  b.threads_per_line = next_power_of_two(ceil_div(channels, kLineVectors * kVector));
  b.step_positions = kThreads / b.threads_per_line;
  b.vectors = kLineVectors;
  b.channel_stride = b.threads_per_line * kVector;
  b.element_stride = b.channel_stride;
  split_positions(b, backward, limits);
  return b;
}

// The vectors of a line of a tile. It is as long as a line of the L2 cache, or shorter where there are many channels, down to a sector.
inline int64_t tile_line_vectors(int64_t channels, int64_t itemsize, bool backward, const RmsNormLimits& limits) {
  // The backward pass keeps the gradient too, as float32.
  int64_t kept_bytes = itemsize + (backward ? static_cast<int64_t>(sizeof(float)) : 0), line_bytes = kTileLineBytes;
  while (line_bytes > kSectorBytes && channels * (line_bytes / itemsize) * kept_bytes > limits.tile_bytes) line_bytes /= 2;
  // Lines of few channels are longer, so that each thread has a channel.
  return max64(line_bytes / (itemsize * kVector), min64(kThreads / next_power_of_two(channels), kWarp));
}

// The partition for contiguous memory.
inline RmsNormBlocks tile_blocks(int64_t batch, int64_t channels, int64_t positions, int64_t itemsize, bool backward,
                                 const RmsNormLimits& limits) {
  RmsNormBlocks b{};
  b.batch = batch;
  b.channels = channels;
  b.positions = positions;
  b.threads_per_line = next_power_of_two(min64(tile_line_vectors(channels, itemsize, backward, limits), ceil_div(positions, kVector)));
  b.step_positions = b.threads_per_line * kVector;
  b.threads = kThreads;
  while (b.threads < kMaxNormThreads && channels * b.step_positions > b.threads * kNormThreadElements) b.threads *= 2;
  b.channel_stride = b.threads / b.threads_per_line;
  b.vectors = static_cast<int>(ceil_div(channels, b.channel_stride));
  b.element_stride = b.channel_stride * positions;
  split_positions(b, backward, limits);
  return b;
}

// Whether the line kernels serve channels-last memory.
inline bool has_line_kernel(int64_t channels) { return channels <= kMaxLineChannels; }

// The partition for these sizes, none of which may be 0.
inline RmsNormBlocks rms_norm_blocks(int64_t batch, int64_t channels, int64_t positions, bool channels_last, int64_t itemsize,
                                     bool backward, const RmsNormLimits& limits = {}) {
  return channels_last ? line_blocks(batch, channels, positions, backward, limits)
                       : tile_blocks(batch, channels, positions, itemsize, backward, limits);
}

// The vectors of one thread in a step. Vector i begins at element + i * element_stride. In contiguous memory it holds positions of channel
// `channel + i * channel_stride`; in channels-last memory it holds channels of one position, from that channel on.
template <bool kChannelsLast>
struct RmsNormVectors {
  int64_t element, element_stride;
  int64_t position;    // the thread's first position of the step, in (batch, positions)
  int positions_left;  // from there to the end of the split
  int channel, channel_stride, channels;

  // The number of positions that the thread has in the step.
  FASTVAE_MEMBER int position_count() const { return kChannelsLast ? (positions_left > 0 ? 1 : 0) : vector_count(positions_left); }
  // The number of elements in vector i, counted from the current one.
  FASTVAE_MEMBER int count(int i) const {
    int channels_left = channels - channel - i * channel_stride;
    if (kChannelsLast) return positions_left > 0 ? vector_count(channels_left) : 0;
    return channels_left > 0 ? position_count() : 0;
  }
  FASTVAE_MEMBER void skip(int vectors) {
    element += vectors * element_stride;
    channel += vectors * channel_stride;
  }
  FASTVAE_MEMBER void next_step(int positions) {
    element += kChannelsLast ? static_cast<int64_t>(positions) * channels : positions;
    position += positions;
    positions_left -= positions;
  }
};

// The vectors of a thread in the first step of its block.
template <bool kChannelsLast>
FASTVAE_INLINE RmsNormVectors<kChannelsLast> rms_norm_vectors(const RmsNormBlocks& b, int sample, int split, int thread) {
  int member = thread % b.threads_per_line, line = thread / b.threads_per_line, offset = kChannelsLast ? line : member * kVector;
  int64_t position = split * b.split_positions + offset;
  RmsNormVectors<kChannelsLast> vectors;
  vectors.position = sample * b.positions + position;
  vectors.positions_left = b.positions_of(split) - offset;
  vectors.channels = static_cast<int>(b.channels);
  vectors.channel_stride = b.channel_stride;
  vectors.element_stride = b.element_stride;
  if (kChannelsLast) {
    vectors.channel = member * kVector;
    vectors.element = vectors.position * b.channels + vectors.channel;
  } else {
    vectors.channel = line;
    vectors.element = (sample * b.channels + line) * b.positions + position;
  }
  return vectors;
}

}  // namespace fastvae
