// This file decides how a launch is cut into blocks and in which order partial sums are added. Everything is arithmetic on sizes alone, so
// that a result depends neither on the run nor on the model of the GPU. The functions run on the host too, so that tests need no GPU.
#pragma once

#include "../common/integers.h"
#include "../common/philox.h"

namespace fastvae {

constexpr int kWarp = 32;                   // threads of a warp
constexpr int kWarps = 4;                   // warps of a block
constexpr int kThreads = kWarps * kWarp;    // threads of a block
constexpr int kVector = 4;                  // elements of one vector access: 16 bytes of float32, the widest that a thread has
constexpr int kRuns = 4;                    // vectors that a thread handles in a step, one in each stream of a noise tile
constexpr int kStep = kWarps * kNoiseTile;  // elements that a block handles in a step, one noise tile for each warp

static_assert(kWarp * kVector == kNoiseLanes && kRuns * kNoiseLanes == kNoiseTile, "a warp reads one noise tile");

// Tests build with smaller limits, so that small tensors reach the loops over more work than the blocks of one grid take at a time.
#if !defined(FASTVAE_GRID_LIMIT)
#define FASTVAE_GRID_LIMIT(blocks) (blocks)
#endif

// About seven waves of an H200, whose 132 multiprocessors each run nine blocks of 128 threads with 56 registers at a time: the last wave,
// which leaves some of them idle, is then a small part of the run.
constexpr int64_t kMaxBlocks = FASTVAE_GRID_LIMIT(8192);
// One block adds the partial sums of all rows, so its work grows with the number of blocks before it.
constexpr int64_t kMaxRowBlocks = FASTVAE_GRID_LIMIT(2048);
// Blocks of a launch that sums columns: about eight of 128 threads for each of an H200's 132 multiprocessors. With kLoadsInFlight loads of
// four bytes a thread they have 32 KB a multiprocessor under way, what the memory delivers within its latency of about 0.8 us. This is also
// the number of ticket counters in a workspace.
constexpr int64_t kMaxColumnBlocks = FASTVAE_GRID_LIMIT(1024);
// Values that a thread of a sum loads before it adds the first.
constexpr int kLoadsInFlight = 8;
// The rescale kernel usually returns at once, because the incoming gradient is the expected one; a small grid makes that cheap.
constexpr int64_t kMaxRescaleBlocks = FASTVAE_GRID_LIMIT(1024);

// The number of elements in a vector that begins `rest` elements before the end: 0 to kVector.
FASTVAE_INLINE int vector_count(int64_t rest) { return static_cast<int>(max64(min64(rest, kVector), 0)); }

// The offset of a thread's vector number `run` from the beginning of the block's step.
FASTVAE_INLINE int vector_offset(int thread, int run) { return thread / kWarp * kNoiseTile + run * kNoiseLanes + thread % kWarp * kVector; }

// Divides numbers in [0, 2^63) by a divisor that the host knows, with one product and one shift (Granlund and Montgomery 1994). A GPU has
// no instruction for a 64-bit division and calls a subroutine instead.
struct Divider {
  int64_t divisor;
  uint64_t multiplier;  // 0 stands for a divisor of 1
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

// Block b handles the chunk of elements [b * elements, (b + 1) * elements), one step of kStep elements at a time.
struct Chunks {
  int64_t numel, elements, blocks;
};

inline Chunks chunks_of(int64_t numel, int64_t max_blocks) {
  int64_t steps = ceil_div(numel, kStep);
  int64_t steps_per_block = max64(ceil_div(steps, max_blocks), 1);
  return {numel, steps_per_block * kStep, ceil_div(steps, steps_per_block)};
}

// The partition of a sum over each row, where `numel` elements lie in rows of `length` and blocks handle chunks of `chunk` elements. A row
// that lies inside a chunk is summed by its block. A row that crosses chunks has a partial sum in the scratch buffer for each of them: the
// first chunk writes its tail slot, each later chunk its head slot.
struct RowSums {
  Divider length;
  int64_t numel;
  int64_t chunk;
};

FASTVAE_INLINE int64_t head_slot(int64_t block) { return 2 * block; }
FASTVAE_INLINE int64_t tail_slot(int64_t block) { return 2 * block + 1; }

// Writes to `row` the row that crosses the boundary before `block`, and returns whether it begins in the chunk just before. Then this block
// owns the row, which means that the partial sums of the row are added once, under this block's number.
FASTVAE_INLINE bool owns_crossing_row(const RowSums& rows, int64_t block, int64_t& row) {
  int64_t boundary = block * rows.chunk;
  if (boundary >= rows.numel) return false;
  row = quotient(rows.length, boundary);
  int64_t begin = row * rows.length.divisor;
  return begin < boundary && begin >= boundary - rows.chunk;
}

// The block whose chunk contains the last element of the row.
FASTVAE_INLINE int64_t last_block_of(const RowSums& rows, int64_t row) { return ((row + 1) * rows.length.divisor - 1) / rows.chunk; }

// The number of threads that sum one row of a step: the smallest power of two that leaves a thread kVector elements at most, or a warp. The
// threads of a warp that one short row does not need sum other rows.
inline int row_group(int64_t length) {
  int group = 1;
  while (group < kWarp && group * kVector < length) group *= 2;
  return group;
}

// The number of threads that add the partial sums of one crossing row. A row of more than eight chunks is worth a whole warp.
inline int crossing_group(const RowSums& rows) { return rows.length.divisor > 8 * rows.chunk ? kWarp : 1; }

// The partition of a sum over the rows of each column. Row i of column c is element ((i / inner) * columns + c) * inner + i % inner: with
// inner = 1 these are the columns of a matrix, otherwise the channels of an image of `inner` positions. The grid is (groups, splits): a
// block sums `width` adjacent columns over one of `splits` parts of the rows.
struct ColumnSums {
  int64_t rows, columns;
  Divider inner;
  int64_t rows_per_split;
  int splits, groups, width;
};

inline ColumnSums column_sums_of(int64_t rows, int64_t columns, int64_t inner) {
  ColumnSums c{rows, columns, divider(inner), rows, 1, 1, inner > 1 ? 1 : kWarp};
  c.groups = static_cast<int>(ceil_div(columns, c.width));
  // A thread sums at least one step of rows, so that the reduction over the block and the partial sums stay small beside the reading.
  int64_t useful = ceil_div(rows, kThreads / c.width * kLoadsInFlight);
  c.splits = static_cast<int>(max64(min64(useful, kMaxColumnBlocks / c.groups), 1));
  c.rows_per_split = ceil_div(rows, c.splits);
  return c;
}

// The partition of a sum over each of `columns` runs of `rows` adjacent elements, each of which costs so much that a thread handles one at
// a time: a split has one for each thread of its block at least.
inline ColumnSums position_sums_of(int64_t rows, int64_t columns) {
  ColumnSums c{rows, columns, divider(rows), rows, 1, static_cast<int>(columns), 1};
  int64_t most = max64(min64(ceil_div(rows, kThreads), kMaxColumnBlocks / columns), 1);
  c.rows_per_split = ceil_div(ceil_div(rows, most), kThreads) * kThreads;
  c.splits = static_cast<int>(ceil_div(rows, c.rows_per_split));
  return c;
}

// The element that is row `row` of column `column`.
FASTVAE_INLINE int64_t column_element(const ColumnSums& c, int64_t row, int64_t column) {
  int64_t outer = quotient(c.inner, row);
  return (outer * c.columns + column) * c.inner.divisor + (row - outer * c.inner.divisor);
}

constexpr int kMaxSampleWarps = 8;

// The number of warps that share the samples of one noise tile, a power of two.
inline int sample_warps(int64_t samples) {
  int warps = 1;
  while (warps < kMaxSampleWarps && warps < samples) warps *= 2;
  return warps;
}

// Blocks that sum over samples where a launch has fewer tiles, and the partial sums of each: two for every element of a noise tile.
constexpr int kMaxSampleBlocks = 32, kSampleSlots = 2 * kNoiseTile;

// The number of blocks that share the samples of one noise tile. Each has samples for all of its warps, but for the last.
inline int64_t sample_splits(int64_t tiles, int64_t samples) {
  return max64(min64(ceil_div(samples, kMaxSampleWarps), kMaxSampleBlocks / tiles), 1);
}

}  // namespace fastvae
