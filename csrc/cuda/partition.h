// How a launch is cut into blocks and how sums are put together from their parts: arithmetic on sizes alone, so that a result depends
// neither on the run nor on the model of the GPU, and plain functions, so that it is tested without one.
#pragma once

#include <cstdint>

#include "../common/philox.h"

namespace fastvae {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kVector = 4;                  // adjacent elements that a thread reads at once: 16 bytes of float32
constexpr int kRuns = 4;                    // such vectors of a thread: one in each stream of a noise tile
constexpr int kStep = kWarps * kNoiseTile;  // elements that a block handles at once, a noise tile for each warp

static_assert(kWarp * kVector == kNoiseLanes && kRuns * kNoiseLanes == kNoiseTile, "a warp reads one noise tile");

// Seven times what an H200 runs at once: the last, partly filled wave of blocks costs little.
constexpr int64_t kMaxBlocks = 8192;
// Sums of rows are finished by one block, whose work grows with the blocks before it.
constexpr int64_t kMaxRowBlocks = 2048;
// Blocks that put sums of columns together.
constexpr int64_t kMaxColumnBlocks = 512;
// Few: most often there is nothing to rescale.
constexpr int64_t kMaxRescaleBlocks = 1024;

FASTVAE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTVAE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTVAE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// How many elements a vector has, of the `rest` that are left.
FASTVAE_INLINE int vector_count(int64_t rest) { return static_cast<int>(max64(min64(rest, kVector), 0)); }

// The element that a thread's vector begins with, counted from the block's step.
FASTVAE_INLINE int vector_offset(int thread, int run) { return thread / kWarp * kNoiseTile + run * kNoiseLanes + thread % kWarp * kVector; }

// Division of numbers below 2^63 by one that the host knows: a product and a shift (Granlund and Montgomery 1994). GPUs divide in a
// subroutine.
struct Divider {
  int64_t divisor;
  uint64_t multiplier;  // 0: the divisor is 1
  int shift;
};

inline Divider divider(int64_t divisor) {
  if (divisor <= 1) return {1, 0, 0};
  int bits = 64 - __builtin_clzll(static_cast<uint64_t>(divisor - 1));
  unsigned __int128 power = static_cast<unsigned __int128>(1) << (63 + bits);
  return {divisor, static_cast<uint64_t>(power / static_cast<uint64_t>(divisor)) + 1, bits - 1};
}

FASTVAE_INLINE int64_t quotient(const Divider& d, int64_t n) {
#if defined(__CUDA_ARCH__)
  uint64_t high = __umul64hi(static_cast<uint64_t>(n), d.multiplier);
#else
  uint64_t high = static_cast<uint64_t>((static_cast<unsigned __int128>(n) * d.multiplier) >> 64);
#endif
  return d.multiplier == 0 ? n : static_cast<int64_t>(high >> d.shift);
}

FASTVAE_INLINE int64_t remainder(const Divider& d, int64_t n) { return n - quotient(d, n) * d.divisor; }

// Block b takes elements [b * elements, (b + 1) * elements), a step at a time.
struct Chunks {
  int64_t numel, elements, blocks;
};

inline Chunks chunks_of(int64_t numel, int64_t max_blocks) {
  int64_t steps = ceil_div(numel, kStep);
  int64_t steps_per_block = max64(ceil_div(steps, max_blocks), 1);
  return {numel, steps_per_block * kStep, ceil_div(steps, steps_per_block)};
}

// Sums of rows, `numel` elements in rows of `length.divisor`, over chunks. A row inside a chunk is summed there. Of a row that crosses
// chunks each leaves its part in a slot: the first chunk in its tail slot, the others in their head slots.
struct RowSums {
  Divider length;
  int64_t numel;
  int64_t chunk;  // elements of one
};

FASTVAE_INLINE int64_t head_slot(int64_t block) { return 2 * block; }
FASTVAE_INLINE int64_t tail_slot(int64_t block) { return 2 * block + 1; }

// Whether the row that crosses into `block` began in the block before: this one is then who puts the row together. `row` becomes that row.
FASTVAE_INLINE bool owns_crossing_row(const RowSums& rows, int64_t block, int64_t& row) {
  int64_t boundary = block * rows.chunk;
  if (boundary >= rows.numel) return false;
  row = quotient(rows.length, boundary);
  int64_t begin = row * rows.length.divisor;
  return begin < boundary && begin >= boundary - rows.chunk;
}

// The block in which a row ends.
FASTVAE_INLINE int64_t last_block_of(const RowSums& rows, int64_t row) { return ((row + 1) * rows.length.divisor - 1) / rows.chunk; }

// Threads that sum a row of a step: a few elements each, so that short rows do not leave a warp idle.
inline int row_group(int64_t length) {
  int group = 1;
  while (group < kWarp && group * kVector < length) group *= 2;
  return group;
}

// Threads that put a crossing row together.
inline int crossing_group(const RowSums& rows) { return rows.length.divisor > 8 * rows.chunk ? kWarp : 1; }

// Sums over the rows of each column. Row i of column c is element ((i / inner) * columns + c) * inner + i % inner: with inner 1 the columns
// of a matrix, else the channels of an image. A block takes `width` columns and one of `splits` parts of the rows.
struct ColumnSums {
  int64_t rows, columns;
  Divider inner;
  int64_t rows_per_split;
  int splits, groups, width;
};

inline ColumnSums column_sums_of(int64_t rows, int64_t columns, int64_t inner) {
  ColumnSums c{rows, columns, divider(inner), rows, 1, 1, inner > 1 ? 1 : kWarp};
  c.groups = static_cast<int>(ceil_div(columns, c.width));
  // At least 8 rows a thread.
  int64_t useful = ceil_div(rows, kThreads / c.width * 8);
  c.splits = static_cast<int>(max64(min64(useful, kMaxColumnBlocks / c.groups), 1));
  c.rows_per_split = ceil_div(rows, c.splits);
  return c;
}

FASTVAE_INLINE int64_t column_element(const ColumnSums& c, int64_t row, int64_t column) {
  int64_t outer = quotient(c.inner, row);
  return (outer * c.columns + column) * c.inner.divisor + (row - outer * c.inner.divisor);
}

// Warps that share the samples of one noise tile.
inline int sample_warps(int64_t samples) {
  int warps = 1;
  while (warps < 8 && warps < samples) warps *= 2;
  return warps;
}

}  // namespace fastvae
