// The search's inner product: scores |c|^2 / 2 - x.c of a block of rows and all codes, less a bound of their error, of which the two
// smallest in each vector lane are kept.
#pragma once

#include <limits>

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

// What of a row's scores is kept, for each lane: the smallest, the second smallest, and the panel of the smallest. Of the codes that share
// a lane in one panel only the best counts.
template <class Vector, class Element>
struct LaneMinima {
  Element least[kLanes], second[kLanes], panel[kLanes];

  FASTVAE_INLINE void start(LaneMinima& minima) {
    Vector::store(minima.least, Vector::broadcast(std::numeric_limits<Element>::max()));
    Vector::store(minima.second, Vector::broadcast(std::numeric_limits<Element>::max()));
    Vector::store(minima.panel, Vector::broadcast(0));
  }

  FASTVAE_INLINE void update(LaneMinima& minima, Vector score, Vector panel) {
    Vector least = Vector::load(minima.least);
    Vector::store(minima.second, Vector::min(Vector::load(minima.second), Vector::max(least, score)));
    Vector::store(minima.panel, Vector::where_less(score, least, panel, Vector::load(minima.panel)));
    Vector::store(minima.least, Vector::min(least, score));
  }
};

// One tile: rows `x` (step, row) against the panel (step, code), added to `start`.
template <class Vector, class Element>
FASTVAE_INLINE void score_tile(const Element* x, const Element* panel, int64_t steps, const Element* start, Vector number,
                               LaneMinima<Vector, Element>* minima) {
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
    Vector best = score[row][0];
#pragma GCC unroll 4
    for (int v = 1; v < kTileVectors; ++v) best = Vector::min(best, score[row][v]);
    LaneMinima<Vector, Element>::update(minima[row], best, number);
  }
}

// All rows of a block against all codes: x (tile, step, row), panels (panel, step, code), start (code), minima (row).
template <class Vector, class Element>
static void score_block(const Element* x, int64_t tiles, const Element* panels, int64_t num_panels, int64_t steps, const Element* start,
                        LaneMinima<Vector, Element>* minima) {
  for (int64_t row = 0; row < tiles * kTileRows; ++row) LaneMinima<Vector, Element>::start(minima[row]);
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    Vector number = Vector::broadcast(static_cast<Element>(panel));
    for (int64_t tile = 0; tile < tiles; ++tile)
      score_tile(x + tile * steps * kTileRows, panels + panel * steps * kPanelCodes, steps, start + panel * kPanelCodes, number,
                 minima + tile * kTileRows);
  }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
