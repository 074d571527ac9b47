// The symmetric product a.T @ diag(w) @ a of a matrix whose rows are contiguous. It computes only the panels of columns up to that of the
// diagonal. The product of a library would compute all of it, in an order of additions that depends on the number of threads.
#pragma once

#include <cstring>

#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kProductRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kProductRows = 4;
#else
constexpr int kVectorBytes = 16, kProductRows = 4;
#endif
constexpr int kProductVectors = 2;

template <class T>
struct ProductVector {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kPanel = kProductVectors * kLanes;  // columns of a panel
};

// Computes out[i][j] += sum over d of a[d][i] * b[d][j] for a tile that fills the registers, where a and b are panels. The terms are summed
// first and then added to `out`, so that no sum has as many terms as the batch has samples.
template <class T>
FASTVAE_INLINE void add_product_tile(const T* a, const T* b, int64_t depth, T* out, int64_t stride) {
  using Vector = typename ProductVector<T>::Type;
  constexpr int lanes = ProductVector<T>::kLanes, panel = ProductVector<T>::kPanel;
  Vector sum[kProductRows][kProductVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector right[kProductVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kProductVectors; ++v) memcpy(&right[v], b + d * panel + v * lanes, sizeof(Vector));
#pragma GCC unroll 8
    for (int i = 0; i < kProductRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kProductVectors; ++v) sum[i][v] += a[d * panel + i] * right[v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kProductRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kProductVectors; ++v) {
      Vector total;
      memcpy(&total, out + i * stride + v * lanes, sizeof(Vector));
      total += sum[i][v];
      memcpy(out + i * stride + v * lanes, &total, sizeof(Vector));
    }
}

// Packs the rows of a, each times its weight, as panels (panel, row, column in panel). The last panel is filled up with zeros.
template <class T>
void pack_panels(const T* a, int64_t rows, int64_t columns, const T* weights, int64_t rows_per_weight, int64_t first, T* panels) {
  constexpr int64_t panel = ProductVector<T>::kPanel;
  for (int64_t d = 0; d < rows; ++d) {
    const T weight = weights ? weights[(first + d) / rows_per_weight] : T(1);
    for (int64_t begin = 0; begin < columns; begin += panel) {
      const T* from = a + d * columns + begin;
      T* to = panels + (begin * rows + d * panel);
      const int64_t count = columns - begin < panel ? columns - begin : panel;
      for (int64_t i = 0; i < count; ++i) to[i] = weight * from[i];
      for (int64_t i = count; i < panel; ++i) to[i] = 0;
    }
  }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
