// How group normalisation is cut into blocks, and which elements a thread reads, in both memory layouts: arithmetic on sizes alone.
#pragma once

#include "partition.h"

namespace fastvae {

// Two waves of an H200 at 64 registers a thread. Tests take fewer: blocks then handle long pieces of small tensors.
#if !defined(FASTVAE_MAX_NORM_BLOCKS)
#define FASTVAE_MAX_NORM_BLOCKS 2048
#endif
constexpr int64_t kMaxNormBlocks = FASTVAE_MAX_NORM_BLOCKS;
// Vectors of a group that a thread holds where the group fits on chip.
constexpr int kHeldRuns = 8;
// With the channels last, a group on chip fills the 32 bytes that memory delivers at least.
constexpr int64_t kSectorBytes = 32;

// A block takes `tile` adjacent channels of a sample and a piece of their positions. `team` adjacent threads, a power of two, read along
// memory: the positions of one channel or, with the channels last, the channels of one position.
struct NormBlocks {
  int64_t batch, channels, positions;
  int64_t tile, tiles;
  int64_t piece, splits;
  int team;
  bool on_chip;  // the tile is a group of which the block holds all elements

  int64_t count() const { return batch * tiles * splits; }
};

// The least power of two that is not below n, for small n.
FASTVAE_INLINE int power_of_two(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Positions that a block with this team reads at once, kRuns vectors a thread.
FASTVAE_INLINE int64_t positions_at_once(int team, bool channels_last) {
  return static_cast<int64_t>(kRuns) * (channels_last ? kThreads / team : team * kVector);
}

// For groups of any size: several blocks share a sample's channels where there are few of them.
inline NormBlocks blocks_in_pieces(int64_t batch, int64_t channels, int64_t positions, bool channels_last, int64_t max_blocks) {
  NormBlocks b{batch, channels, positions, 0, 0, 0, 0, 0, false};
  int64_t vectors = ceil_div(channels_last ? channels : positions, kVector);
  if (channels_last) {
    b.team = power_of_two(min64(vectors, kWarp));
    b.tile = static_cast<int64_t>(b.team) * kVector;
  } else {
    // Short planes share a warp; a longer one has a block of its own.
    int64_t threads = ceil_div(vectors, kRuns);
    b.team = threads <= kWarp ? power_of_two(threads) : kThreads;
    b.tile = kThreads / b.team;
  }
  b.tiles = ceil_div(channels, b.tile);
  int64_t step = positions_at_once(b.team, channels_last);
  int64_t wanted = ceil_div(max_blocks, max64(batch * b.tiles, 1));
  int64_t splits = max64(min64(wanted, ceil_div(positions, step)), 1);
  b.piece = max64(ceil_div(ceil_div(positions, splits), step), 1) * step;
  b.splits = ceil_div(positions, b.piece);
  return b;
}

// The team with which a block holds a group of `width` channels; 0 where it cannot.
inline int team_on_chip(int64_t width, int64_t positions, bool channels_last, int64_t itemsize) {
  if (width > (channels_last ? kWarp * kVector : kThreads)) return 0;
  if (channels_last && positions > 1 && width * itemsize < kSectorBytes) return 0;
  int64_t vectors = ceil_div(channels_last ? width : positions, kVector);
  int most_threads = channels_last ? kWarp : kThreads / power_of_two(width);
  int team = power_of_two(min64(vectors, most_threads));
  return positions_at_once(team, channels_last) / kRuns * kHeldRuns >= positions ? team : 0;
}

// No dimension is 0.
inline NormBlocks blocks_of(int64_t batch, int64_t channels, int64_t positions, int64_t groups, bool channels_last, int64_t itemsize,
                            int64_t max_blocks = kMaxNormBlocks) {
  int64_t width = channels / groups;
  int team = team_on_chip(width, positions, channels_last, itemsize);
  if (team == 0) return blocks_in_pieces(batch, channels, positions, channels_last, max_blocks);
  return {batch, channels, positions, width, groups, positions, 1, team, true};
}

// A thread's way through its block. Vector number i begins at element + i * stride; it lies in one channel, or has `channels` of them.
template <bool kLast>
struct Walk {
  int64_t element, stride;
  int64_t rest, advance;  // positions to the end of the piece, and from a vector to the next
  int64_t channel;
  int channels;  // 0: the thread has none

  FASTVAE_MEMBER int count(int i) const {
    int64_t positions = rest - i * advance;
    return kLast ? (positions > 0 ? channels : 0) : vector_count(positions);
  }
  FASTVAE_MEMBER void skip(int vectors) {
    element += vectors * stride;
    rest -= vectors * advance;
  }
};

template <bool kLast>
FASTVAE_INLINE Walk<kLast> walk_of(const NormBlocks& b, int64_t sample, int64_t tile, int64_t split, int thread) {
  int member = thread % b.team, line = thread / b.team;
  int64_t begin = split * b.piece, end = min64(begin + b.piece, b.positions);
  int64_t first = tile * b.tile, stop = min64(first + b.tile, b.channels);
  Walk<kLast> walk;
  int64_t position;
  if (kLast) {
    position = begin + line;
    walk.channel = first + member * kVector;
    walk.channels = vector_count(stop - walk.channel);
    walk.element = (sample * b.positions + position) * b.channels + walk.channel;
    walk.advance = kThreads / b.team;
    walk.stride = walk.advance * b.channels;
  } else {
    position = begin + member * kVector;
    walk.channel = first + line;
    walk.channels = walk.channel < stop ? 1 : 0;
    walk.element = (sample * b.channels + walk.channel) * b.positions + position;
    walk.stride = walk.advance = b.team * kVector;
  }
  walk.rest = walk.channels > 0 ? end - position : 0;
  return walk;
}

// Whether the thread is the one that writes what it and others summed for its channels.
template <bool kLast>
FASTVAE_INLINE bool leads(const NormBlocks& b, int thread) {
  return kLast ? thread < b.team : thread % b.team == 0;
}

}  // namespace fastvae
