// How the search for the nearest codes and the sort of rows by code are cut: arithmetic on sizes alone, tested without a GPU.
#pragma once

#include "partition.h"

namespace fastvae {

constexpr int kTileRows = 128, kTileCodes = 64;  // scores that a block holds at once
constexpr int kTileDepth = 8;                    // dimensions that lie in shared memory at once
constexpr int kShortRows = 2;                    // rows of a thread, each held whole where it has at most kShortDim elements
constexpr int kShortDim = 16;
constexpr int kShortCodes = 256;  // that lie in shared memory at once

// Blocks of one wave of a search; where rows do not give as many, the codes are shared out too.
constexpr int64_t kScreenBlocks = 512;
static_assert(kScreenBlocks <= kMaxColumnBlocks, "each tile of rows whose codes are shared out has a ticket");
constexpr int64_t kRecheckBlocks = 528;
constexpr int64_t kMeanCodes = 128;

inline bool has_short_rows(int64_t dim) { return dim <= kShortDim; }

// Of the short kernel: 4, 8 or 16.
inline int short_dim(int64_t dim) { return dim <= 4 ? 4 : dim <= 8 ? 8 : kShortDim; }

// One head's codes in memory: panels of codes side by side, (panel, padded dim, code in panel).
struct CodeLayout {
  int64_t codes, dim, padded_codes, padded_dim;
  int panel_codes;
  uint32_t slots;  // of the hash table, a power of two
};

inline CodeLayout code_layout(int64_t codes, int64_t dim) {
  CodeLayout layout{codes, dim, ceil_div(codes, kTileCodes) * kTileCodes, ceil_div(dim, kTileDepth) * kTileDepth, kTileCodes, 16};
  if (has_short_rows(dim)) {
    layout.padded_dim = short_dim(dim);
    layout.panel_codes = 1;
  }
  while (layout.slots < 2 * codes) layout.slots *= 2;
  return layout;
}

FASTVAE_INLINE int64_t code_element(const CodeLayout& layout, int64_t code, int64_t d) {
  int64_t panel = code / layout.panel_codes;
  return (panel * layout.padded_dim + d) * layout.panel_codes + (code - panel * layout.panel_codes);
}

// Block (t, s) takes the rows of tile t, which counts over the heads, and the codes of split s.
struct ScreenGrid {
  int64_t tile_rows, tiles_per_head, tiles;
  int64_t splits, codes_per_split;
};

inline ScreenGrid screen_grid(int64_t heads, int64_t rows, const CodeLayout& layout) {
  ScreenGrid grid{};
  grid.tile_rows = has_short_rows(layout.dim) ? kThreads * kShortRows : kTileRows;
  grid.tiles_per_head = ceil_div(rows, grid.tile_rows);
  grid.tiles = heads * grid.tiles_per_head;
  int64_t code_tiles = layout.padded_codes / kTileCodes;
  int64_t tiles_per_split = ceil_div(code_tiles, max64(kScreenBlocks / grid.tiles, 1));
  grid.codes_per_split = tiles_per_split * kTileCodes;
  grid.splits = ceil_div(code_tiles, tiles_per_split);
  return grid;
}

// A row's two smallest scores, each less the bound of its error, and the code of the smallest.
struct Best {
  float least, second;
  int32_t code;
};

// With FLT_MAX for none.
FASTVAE_INLINE Best no_best() { return {3.402823466e38f, 3.402823466e38f, 0}; }

FASTVAE_INLINE void keep_best(Best& best, float score, int32_t code) {
  best.second = fminf(best.second, fmaxf(best.least, score));
  best.code = score < best.least ? code : best.code;
  best.least = fminf(best.least, score);
}

FASTVAE_INLINE void merge_best(Best& best, const Best& other) {
  best.second = fminf(fminf(best.second, other.second), fmaxf(best.least, other.least));
  best.code = other.least < best.least ? other.code : best.code;
  best.least = fminf(best.least, other.least);
}

// Whether the code is the nearest for certain: `error` bounds that of its score.
FASTVAE_INLINE bool is_separated(const Best& best, float error) { return best.second > best.least + 2.0f * error; }

// Counting sort: a warp takes a part of a head's rows.
constexpr int64_t kMostParts = 512;
constexpr int64_t kLeastPartRows = 256;

struct SortParts {
  int64_t rows_per_part, parts;  // of one head
};

inline SortParts sort_parts(int64_t rows) {
  int64_t rows_per_part = ceil_div(max64(ceil_div(rows, kMostParts), kLeastPartRows), kWarp) * kWarp;
  return {rows_per_part, ceil_div(rows, rows_per_part)};
}

// The sorted rows are summed in pieces of kPieceRows. A code whose rows lie in one piece is summed there; of a code that crosses pieces
// each leaves its part in a slot: slot 0 if the piece begins with the code, else 1.
constexpr int64_t kPieceRows = 64;

// Threads that share a piece, one a dimension.
inline int piece_group(int64_t dim) {
  int group = 1;
  while (group < kThreads && group < dim) group *= 2;
  return group;
}

FASTVAE_INLINE bool crosses_pieces(int64_t start, int64_t end) { return start / kPieceRows != (end - 1) / kPieceRows; }

FASTVAE_INLINE int64_t piece_slot(int64_t piece, int64_t start) { return 2 * piece + (start > piece * kPieceRows ? 1 : 0); }

}  // namespace fastvae
