// What the codebook operators ask of their kernels.
#pragma once

#include <vector>

#include "../common/codebook.h"
#include "isa.h"
#include "view.h"

namespace fastvae {

// (heads, rows, dim) with any distance between heads and rows; the elements of a row are contiguous.
struct CodebookRows {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t head_stride = 0, row_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  int64_t offset(int64_t head, int64_t row) const { return head * head_stride + row * row_stride; }
};

// One head's codes as the search reads them: the mean subtracted, times a power of two, in panels of some codes side by side. `code` below
// counts to the padded number of codes; a code that is padding or equal to an earlier one is 0 with a half norm that never wins.
struct PackedCodebook {
  int64_t panels = 0;              // of codes_per_panel each
  double scale = 1.0;              // a power of two; the largest norm is about 1 after it
  bool pairs = false;              // whether it is below kLargestNorm, so that 16-bit integers can hold the codes
  double* mean = nullptr;          // (dim); floats, unless some input is float64
  float* rows = nullptr;           // (code, padded dim)
  float* panel_rows = nullptr;     // (panel, dim, code in panel), negative
  int32_t* panel_pairs = nullptr;  // the same times kPairScale as pairs of 16-bit integers, (panel, (dim + 1) / 2, code in panel)
  float* half_norm = nullptr;      // |c|^2 / 2
  float* norm = nullptr;           // at least |c|
  float* residual = nullptr;       // at least the norm of what rounding to 16 bits took away, in units of 1 / kPairScale
};

// Norms of scaled codes are below kLargestNorm: sums of products of pairs then stay below 2^31.
constexpr float kPairScale = 32768.0f;
constexpr int64_t kLongestPairs = 4096;  // dimensions for which that holds with the rounding of each element
constexpr int64_t kRowAlignment = 16;    // of the padded dim

struct CodebookSearch {
  CodebookRows x, codebook;
  int64_t heads, rows, codes, dim;
  bool wide;                     // double arithmetic: x or codebook are float64
  bool pairs;                    // pack and screen 16-bit integers too
  const PackedCodebook* packed;  // one a head
  int64_t* indices;              // (heads, rows)

  // What else is wanted of a row while it is in the cache.
  Output quantized;  // (heads, rows, dim)
  Output loss;       // elementwise, times loss_weight
  double* errors;    // |x - c|^2, (heads, rows)
  double loss_weight;
};

// How the rows of a call were decided.
struct CodebookSearchCounts {
  int64_t rows = 0;
  int64_t rechecked = 0;       // in float64, because float32 could not tell
  int64_t screened_again = 0;  // in float32, because 16-bit integers left too many codes
};

struct CodebookBackward {
  CodebookRows x, codebook, grad_quantized;
  int64_t heads, rows, codes, dim;
  bool wide;
  const int64_t* indices;
  View grad_loss;      // elementwise
  double loss_factor;  // 2 commitment_cost times the factor of the reduction
  bool rotation;
  Output grad_x;
};

// Sums over the rows of each code of one head: of x, or where there is a grad_loss of factor * grad_loss * (c - x).
struct CodebookSegments {
  CodebookRows x, codebook;
  int64_t head, rows, dim;
  bool wide;
  const int64_t* order;   // rows: those of one code side by side, ascending
  const int64_t* codes;   // of each position in `order`
  const int64_t* starts;  // of each code in `order`, and the end
  int64_t count;          // positions
  View grad_loss;
  double factor;
  Output sums;  // (heads, codes, dim)
  int64_t num_codes;
  double* partial;  // (pieces, 2, dim): what a piece's first and last code, shared with its neighbours, sum to
};

constexpr int64_t kPieceRows = 512;

struct CodebookKernels {
  int codes_per_panel, rows_per_block;
  bool has_pairs;
  void (*write)(const Output& to, int64_t begin, int64_t count, const double* values);
  // Elements of a row as double; false where one is not finite.
  bool (*convert)(const CodebookRows& rows, int64_t head, int64_t row, int64_t dim, double* to);
  // Norms of the codes after the mean is subtracted and hashes of their values; false where a value is not finite.
  bool (*measure)(const CodebookSearch& search, int64_t head, int64_t begin_code, int64_t end_code, double* norms, uint64_t* hashes);
  void (*pack)(const CodebookSearch& search, int64_t head, const std::vector<bool>& skipped, int64_t begin_panel, int64_t end_panel);
  // Blocks of rows_per_block rows, which do not cross heads.
  CodebookSearchCounts (*search)(const CodebookSearch& search, int64_t begin_block, int64_t end_block);
  void (*backward)(const CodebookBackward& backward, int64_t begin_row, int64_t end_row);
  // Pieces of kPieceRows positions.
  void (*sum_segments)(const CodebookSegments& segments, int64_t begin_piece, int64_t end_piece);
};

// Of all calls since the last reset.
CodebookSearchCounts codebook_statistics(bool reset);

FASTVAE_DECLARE_VNNI_KERNELS(CodebookKernels, codebook)

}  // namespace fastvae
