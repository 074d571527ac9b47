// Packs the codes of a head for the search, see PackedCodebook.
#pragma once

#include <algorithm>

#include "codebook_rows.h"
#include "codebook_scores.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// Writes the norms of codes [begin, end) minus their mean, and hashes of the codes. Returns false where an element is not finite.
bool measure(const CodebookSearch& s, int64_t head, int64_t begin, int64_t end, double* norms, uint64_t* hashes) {
  Buffer<double> code(s.dim);
  const double* mean = s.packed[head].mean;
  bool finite = true;
  for (int64_t k = begin; k < end; ++k) {
    finite = row_to_double(s.codebook, head, k, s.dim, code) && finite;
    double square = 0.0;
    uint64_t hash = 0;
#pragma omp simd reduction(+ : square, hash)
    for (int64_t d = 0; d < s.dim; ++d) {
      double centred = code[d] - mean[d];
      square += centred * centred;
      hash += hash_of_element(code[d], d);
    }
    norms[k] = std::sqrt(square);
    hashes[k] = hash ^ (hash >> 31);
  }
  return finite;
}

#if defined(__AVX512VNNI__)
// Rounds code k to 16-bit integers and writes it, negated, to its column of the panel. `words` is scratch memory for a padded row.
void pack_pairs(const PackedCodebook& packed, const ScoreErrorBounds& errors, const float* code, int64_t k, int64_t dim, int16_t* words) {
  int64_t pairs = ceil_div(dim, 2);
  float square = sum_padded(padded_dim(dim), [&](int64_t d) {
    float value = code[d] * kPairScale, rounded = std::rint(value);
    words[d] = static_cast<int16_t>(-rounded);
    return (value - rounded) * (value - rounded);
  });
  int32_t* column = packed.panel_pairs + k / kPanelCodes * pairs * kPanelCodes + k % kPanelCodes;
  for (int64_t pair = 0; pair < pairs; ++pair) memcpy(column + pair * kPanelCodes, words + 2 * pair, sizeof(int32_t));
  // The second term bounds the rounding of the scaled code to float32.
  packed.residual[k] = norm_upper_bound(errors, square) + packed.norm[k] * kPairScale * 0x1p-23f;
}
#endif

// Packs the codes of panels [begin_panel, end_panel).
void pack(const CodebookSearch& s, int64_t head, const std::vector<bool>& repeated, int64_t begin_panel, int64_t end_panel) {
  const PackedCodebook& packed = s.packed[head];
  int64_t stride = padded_dim(s.dim);
  Buffer<double> code(s.dim);
  ScoreErrorBounds errors = score_error_bounds(s.dim);
#if defined(__AVX512VNNI__)
  Buffer<int16_t> words(stride);
#endif
  for (int64_t k = begin_panel * kPanelCodes; k < end_panel * kPanelCodes; ++k) {
    bool used = k < s.codes && !repeated[k];
    float* row = packed.rows + k * stride;
    std::fill(row, row + stride, 0.0f);
    double square = 0.0;
    if (used) {
      fastvae::convert(s.codebook.data, s.codebook.dtype, s.codebook.offset(head, k), s.dim, static_cast<double*>(code));
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < s.dim; ++d) {
        double value = (code[d] - packed.mean[d]) * packed.scale;
        row[d] = static_cast<float>(value);
        square += value * value;
      }
    }
    packed.half_norm[k] = used ? static_cast<float>(0.5 * square) : kNeverNearest;
    packed.norm[k] = used ? code_norm_upper_bound(errors, std::sqrt(square)) : 0.0f;
    float* column = packed.panel_rows + k / kPanelCodes * s.dim * kPanelCodes + k % kPanelCodes;
    for (int64_t d = 0; d < s.dim; ++d) column[d * kPanelCodes] = -row[d];
#if defined(__AVX512VNNI__)
    if (packed.has_pairs) pack_pairs(packed, errors, row, k, s.dim, words);
#endif
  }
}

}  // namespace
}  // namespace FASTVAE_ISA
}  // namespace fastvae
