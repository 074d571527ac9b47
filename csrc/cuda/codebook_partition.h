// This file decides how the search for the nearest codes and the sort of rows by code are cut into blocks. Everything is arithmetic on
// sizes alone, so that tests need no GPU.
#pragma once

#include "partition.h"

namespace fastvae {

constexpr int kTileRows = 128, kTileCodes = 64;  // the tile of scores that a block keeps in registers: 64 for each thread
constexpr int kTileDepth = 8;                    // dimensions whose operands are in shared memory at a time
// Rows of up to kShortDim elements have a kernel in which a thread keeps kShortRows whole rows in registers.
constexpr int kShortDim = 16, kShortRows = 2;
constexpr int kShortCodes = 256;  // codes that are in shared memory at a time: 16 KiB at 16 dimensions

// About one wave of an H200, whose 132 multiprocessors each run four blocks of a screen at a time: registers and shared memory allow no
// more. Where the rows give fewer blocks, the codes of each tile are split among several.
constexpr int64_t kScreenBlocks = FASTVAE_GRID_LIMIT(512);
static_assert(kScreenBlocks <= kMaxColumnBlocks, "each tile of rows whose codes are split has a ticket counter");
// The recheck has four blocks for each of the 132 multiprocessors of an H200. Where there are few rows to decide, several blocks share
// the codes of a row. Each then reads kRecheckElements elements of the packed codes or more, which take about as long as its launch does,
// and keeps up to kSplitCandidates codes.
constexpr int64_t kRecheckBlocks = FASTVAE_GRID_LIMIT(528), kMaxRecheckSplits = 32, kRecheckElements = 16384;
constexpr int kSplitCandidates = 8;
static_assert(kRecheckBlocks / 2 <= kMaxColumnBlocks, "each row whose codes are split has a ticket counter");
constexpr int64_t kMeanCodes = 128;  // about so many codes, evenly spaced, give the mean

inline bool has_short_rows(int64_t dim) { return dim <= kShortDim; }

// The padded dim of the short kernel: 4, 8 or 16.
inline int short_dim(int64_t dim) { return dim <= 4 ? 4 : dim <= 8 ? 8 : kShortDim; }

// The layout of the packed codes of one head: (panel, padded dim, code in panel).
struct CodebookLayout {
  int64_t codes, dim, padded_codes, padded_dim;
  int panel_codes;  // codes of a panel
  uint32_t slots;   // entries of the hash table, a power of two that is at least twice the number of codes
};

inline CodebookLayout codebook_layout(int64_t codes, int64_t dim) {
  CodebookLayout layout{codes, dim, ceil_div(codes, kTileCodes) * kTileCodes, ceil_div(dim, kTileDepth) * kTileDepth, kTileCodes, 16};
  if (has_short_rows(dim)) {
    layout.padded_dim = short_dim(dim);
    layout.panel_codes = 1;
  }
  while (layout.slots < 2 * codes) layout.slots *= 2;
  return layout;
}

// The offset of element d of a code.
FASTVAE_INLINE int64_t code_element(const CodebookLayout& layout, int64_t code, int64_t d) {
  int64_t panel = code / layout.panel_codes;
  return (panel * layout.padded_dim + d) * layout.panel_codes + (code - panel * layout.panel_codes);
}

// The grid (tiles, splits) of a screen. Block (t, s) handles the rows of tile t, numbered over the heads, and the codes of split s.
struct CodebookScreenGrid {
  int64_t tile_rows, tiles_per_head, tiles;
  int64_t splits, codes_per_split;
};

inline CodebookScreenGrid screen_grid(int64_t heads, int64_t rows, const CodebookLayout& layout) {
  CodebookScreenGrid grid{};
  grid.tile_rows = has_short_rows(layout.dim) ? kThreads * kShortRows : kTileRows;
  grid.tiles_per_head = ceil_div(rows, grid.tile_rows);
  grid.tiles = heads * grid.tiles_per_head;
  int64_t code_tiles = layout.padded_codes / kTileCodes;
  int64_t tiles_per_split = ceil_div(code_tiles, max64(kScreenBlocks / grid.tiles, 1));
  grid.codes_per_split = tiles_per_split * kTileCodes;
  grid.splits = ceil_div(code_tiles, tiles_per_split);
  return grid;
}

// The number of blocks that may share the codes of a row in the recheck.
inline int64_t max_recheck_splits(const CodebookLayout& layout) {
  int64_t useful = layout.padded_codes * layout.padded_dim / kRecheckElements;
  return max64(min64(min64(useful, layout.padded_codes / kTileCodes), kMaxRecheckSplits), 1);
}

// The two smallest of a row's scores, each less the bound of its error, and the code of the smallest.
struct TwoSmallest {
  float smallest, second;
  int32_t code;
};

constexpr float kNoScore = 3.402823466e38f;  // FLT_MAX, above every score

FASTVAE_INLINE TwoSmallest no_scores() { return {kNoScore, kNoScore, 0}; }

FASTVAE_INLINE void insert_score(TwoSmallest& best, float score, int32_t code) {
  best.second = fminf(best.second, fmaxf(best.smallest, score));
  best.code = score < best.smallest ? code : best.code;
  best.smallest = fminf(best.smallest, score);
}

// The two codes with the smallest scores among those that are named, and a lower bound of all other scores.
struct NearestTwo {
  float smallest, second, rest;
  int32_t code, second_code;
};

// The code of a second smallest score is not known, so it counts among the rest.
FASTVAE_INLINE NearestTwo nearest_two(const TwoSmallest& scores) { return {scores.smallest, kNoScore, scores.second, scores.code, 0}; }

FASTVAE_INLINE void insert_code(NearestTwo& best, float score, int32_t code) {
  bool is_first = score < best.smallest, is_second = score < best.second;
  best.rest = fminf(best.rest, fmaxf(best.second, score));
  best.second_code = is_first ? best.code : is_second ? code : best.second_code;
  best.second = fminf(best.second, fmaxf(best.smallest, score));
  best.code = is_first ? code : best.code;
  best.smallest = fminf(best.smallest, score);
}

FASTVAE_INLINE void merge_nearest(NearestTwo& best, const NearestTwo& other) {
  insert_code(best, other.smallest, other.code);
  insert_code(best, other.second, other.second_code);
  best.rest = fminf(best.rest, other.rest);
}

// In the counting sort a warp handles a part of the rows of a head. Each part has a count for each code, so there are not more than
// kMaxSortParts, and none is so small that the counts outweigh the rows.
constexpr int64_t kMaxSortParts = FASTVAE_GRID_LIMIT(512);
constexpr int64_t kMinPartRows = 256;
constexpr int kOffsetCodes = 8;  // codes of a block that sums their counts over the parts

struct CodebookSortParts {
  int64_t rows_per_part, parts;  // parts of one head
};

inline CodebookSortParts sort_parts(int64_t rows) {
  int64_t rows_per_part = ceil_div(max64(ceil_div(rows, kMaxSortParts), kMinPartRows), kWarp) * kWarp;
  return {rows_per_part, ceil_div(rows, rows_per_part)};
}

// The sorted rows of a head are summed in pieces of kPieceRows. A code whose rows lie in one piece is summed there. A code that crosses
// pieces has a partial sum for each of them, in slot 0 of the piece if the piece begins with the code, otherwise in slot 1.
constexpr int64_t kPieceRows = 64;

// The number of threads that share a piece, a power of two: one for each dimension, or all of the block.
inline int piece_group(int64_t dim) {
  int group = 1;
  while (group < kThreads && group < dim) group *= 2;
  return group;
}

// Whether the sorted positions [start, end) lie in several pieces.
FASTVAE_INLINE bool crosses_pieces(int64_t start, int64_t end) { return start / kPieceRows != (end - 1) / kPieceRows; }

// The slot, numbered over the pieces, for a code whose rows begin at `start`.
FASTVAE_INLINE int64_t piece_slot(int64_t piece, int64_t start) { return 2 * piece + (start > piece * kPieceRows ? 1 : 0); }

}  // namespace fastvae
