// The inner loop of the search: scores |c|^2 / 2 - x.c of a block of rows and all codes, less a bound of their error. Of the scores of a
// row only the two smallest in each vector lane are kept. Element is float, or int32_t for pairs of 16-bit integers, and Vector its vector.
// A step is one dimension, or one pair of dimensions.
#pragma once

#include <limits>

#include "../../common/integers.h"
#include "vector.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

// A tile of scores, rows x vectors of codes, fills the registers: 24 of 32, or 12 of 16.
#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTileVectors = 2;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif
constexpr int kLanes = FloatVector::kLanes;
constexpr int kPanelCodes = kTileVectors * kLanes;
constexpr int kBlockRows = 96;  // rows that are multiplied by a panel while it is in the L1 cache
static_assert(kBlockRows % kTileRows == 0, "a block is whole tiles");

// The scores of a row that are kept, for each lane: the smallest, the second smallest, and the panel of the smallest. They are minima over
// the panels; of the codes in one lane of one panel only the one with the smallest score counts.
template <class Vector, class Element>
struct LaneMinima {
  Element smallest[kLanes], second[kLanes], panel[kLanes];

  FASTVAE_INLINE void clear(LaneMinima& minima) {
    Vector::store(minima.smallest, Vector::broadcast(std::numeric_limits<Element>::max()));
    Vector::store(minima.second, Vector::broadcast(std::numeric_limits<Element>::max()));
    Vector::store(minima.panel, Vector::broadcast(0));
  }

  FASTVAE_INLINE void update(LaneMinima& minima, Vector score, Vector panel) {
    Vector smallest = Vector::load(minima.smallest);
    Vector::store(minima.second, Vector::min(Vector::load(minima.second), Vector::max(smallest, score)));
    Vector::store(minima.panel, Vector::where_less(score, smallest, panel, Vector::load(minima.panel)));
    Vector::store(minima.smallest, Vector::min(smallest, score));
  }
};

// Computes the tile of scores of rows x (step, row in tile) and a panel (step, code in panel), and updates the minima (row in tile).
// `number` is that of the panel. `initial` (code in panel) are the scores before the products are added.
template <class Vector, class Element>
FASTVAE_INLINE void score_tile(const Element* x, const Element* panel, int64_t steps, const Element* initial, Vector number,
                               LaneMinima<Vector, Element>* minima) {
  Vector score[kTileRows][kTileVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) score[row][v] = Vector::load(initial + v * kLanes);
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
    Vector best = score[row][0];
#pragma GCC unroll 4
    for (int v = 1; v < kTileVectors; ++v) best = Vector::min(best, score[row][v]);
    LaneMinima<Vector, Element>::update(minima[row], best, number);
  }
}

// Computes the minima (row,) of all rows of a block: x (tile, step, row in tile), panels (panel, step, code in panel), initial (code,).
template <class Vector, class Element>
static void score_block(const Element* x, int64_t tiles, const Element* panels, int64_t num_panels, int64_t steps, const Element* initial,
                        LaneMinima<Vector, Element>* minima) {
  for (int64_t row = 0; row < tiles * kTileRows; ++row) LaneMinima<Vector, Element>::clear(minima[row]);
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    Vector number = Vector::broadcast(static_cast<Element>(panel));
    for (int64_t tile = 0; tile < tiles; ++tile)
      score_tile(x + tile * steps * kTileRows, panels + panel * steps * kPanelCodes, steps, initial + panel * kPanelCodes, number,
                 minima + tile * kTileRows);
  }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
