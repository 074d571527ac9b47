// The search's inner product: scores |c|^2 / 2 - x.c of a block of rows and all codes, less a bound of their error, never stored but for the
// smallest of each group of codes in each vector lane.
#pragma once

#include "../codebook.h"
#include "vector.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

// The tile of scores that fills the registers: rows x vectors of codes.
#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTileVectors = 2;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif
constexpr int kLanes = FloatVector::kLanes;
constexpr int kPanelCodes = kTileVectors * kLanes;
constexpr int kBlockRows = 96;
static_assert(kBlockRows % kTileRows == 0, "a block is whole tiles");

// What of a row's scores is kept: for (group, lane) the smallest over the group's panels and the vectors of a tile.
constexpr int kGroups = 64;

struct Groups {
  int64_t count, panels;  // groups, and panels in each (fewer in the last)

  explicit Groups(int64_t all_panels) : panels((all_panels + kGroups - 1) / kGroups) { count = (all_panels + panels - 1) / panels; }
};

// One tile: rows `x` (step, row) against the panel (step, code), added to `start`; into `smallest` (row, lane).
template <class Vector, class Element>
FASTVAE_INLINE void score_tile(const Element* x, const Element* panel, int64_t steps, const Element* start, bool first, Element* smallest) {
  Vector score[kTileRows][kTileVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) score[row][v] = Vector::load(start + v * kLanes);
  for (int64_t step = 0; step < steps; ++step) {
    Vector codes[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) codes[v] = Vector::load(panel + step * kPanelCodes + v * kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; ++row) {
      Vector value = Vector::broadcast(x[step * kTileRows + row]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) score[row][v] = Vector::multiply_add(value, codes[v], score[row][v]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row) {
    Vector least = score[row][0];
#pragma GCC unroll 4
    for (int v = 1; v < kTileVectors; ++v) least = Vector::min(least, score[row][v]);
    if (!first) least = Vector::min(least, Vector::load(smallest + row * kLanes));
    Vector::store(smallest + row * kLanes, least);
  }
}

// All rows of a block, `tiles` of kTileRows: x (tile, step, row), smallest (tile, group, row in tile, lane).
template <class Vector, class Element>
static void score_block(const Element* x, int64_t tiles, const Element* panels, int64_t num_panels, int64_t steps, const Element* start,
                        Element* smallest) {
  Groups groups(num_panels);
  constexpr int64_t kTileMinima = kTileRows * kLanes;
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    int64_t group = panel / groups.panels;
    bool first = panel == group * groups.panels;
    const Element *codes = panels + panel * steps * kPanelCodes, *panel_start = start + panel * kPanelCodes;
    for (int64_t tile = 0; tile < tiles; ++tile)
      score_tile<Vector>(x + tile * steps * kTileRows, codes, steps, panel_start, first,
                         smallest + (tile * groups.count + group) * kTileMinima);
  }
}

// The smallest scores of one row of a block.
template <class Vector, class Element>
struct RowMinima {
  const Element* data;
  int64_t groups;

  RowMinima(const Element* smallest, int64_t groups, int64_t row)
      : data(smallest + (row / kTileRows * groups * kTileRows + row % kTileRows) * kLanes), groups(groups) {}

  const Element* group(int64_t g) const { return data + g * kTileRows * kLanes; }

  Element least() const {
    Vector least = Vector::load(group(0));
    for (int64_t g = 1; g < groups; ++g) least = Vector::min(least, Vector::load(group(g)));
    Element lanes[kLanes];
    Vector::store(lanes, least);
    Element value = lanes[0];
    for (int lane = 1; lane < kLanes; ++lane) value = lanes[lane] < value ? lanes[lane] : value;
    return value;
  }

  // Calls f(group, lane) where the score is at most `bound`, until f returns false.
  template <class F>
  FASTVAE_INLINE void for_each_at_most(const RowMinima& minima, Element bound, F f) {
    Vector limit = Vector::broadcast(bound);
    for (int64_t g = 0; g < minima.groups; ++g)
      for (uint32_t mask = Vector::at_most(Vector::load(minima.group(g)), limit); mask != 0; mask &= mask - 1)
        if (!f(g, __builtin_ctz(mask))) return;
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
