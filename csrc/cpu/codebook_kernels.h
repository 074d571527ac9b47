// The interface between the codebook operators (codebook.cpp) and their kernels (simd/codebook.cpp), which are compiled once per
// instruction set and know nothing of torch.
#pragma once

#include <vector>

#include "../common/codebook_formulas.h"
#include "../common/codebook_rows.h"
#include "../common/integers.h"
#include "isa.h"
#include "view.h"

namespace fastvae {

// The codes of one head as the search reads them: minus their mean, times a power of two, in panels of adjacent codes. Here `code` counts
// up to the number of codes of all panels. A code that is padding, or equal to an earlier one, is 0 with a half norm that is never the
// smallest.
struct PackedCodebook {
  int64_t panels = 0;              // each has codes_per_panel codes
  double scale = 1.0;              // the power of two; the largest norm is about 1 after it
  bool has_pairs = false;          // whether that norm is below kMaxCodeNorm, so that pairs of 16-bit integers can represent the codes
  double* mean = nullptr;          // (dim,); the numbers are float32 unless some input is float64
  float* rows = nullptr;           // (code, padded dim)
  float* panel_rows = nullptr;     // (panel, dim, code in panel), negated
  int32_t* panel_pairs = nullptr;  // (panel, (dim + 1) / 2, code in panel): the same times kPairScale, two 16-bit integers each
  float* half_norm = nullptr;      // (code,): |c|^2 / 2
  float* norm = nullptr;           // (code,): an upper bound of |c|
  float* residual = nullptr;       // (code,): an upper bound of the norm of the 16-bit rounding error, in units of 1 / kPairScale
};

// 16-bit integers represent [-1, 1) in steps of 1 / kPairScale. Scaled norms are below kMaxCodeNorm, so sums of products of pairs stay
// below 2^31.
constexpr float kPairScale = 32768.0f;
constexpr int64_t kMaxPairDim = 4096;  // up to this many dimensions the rounding of each element cannot take a norm above 1
constexpr int64_t kRowAlignment = 16;  // the padded dim is a multiple of it: 64 bytes, the widest vector

struct CodebookSearch {
  CodebookRows x, codebook;  // (heads, rows, dim) and (heads, codes, dim)
  int64_t heads, rows, codes, dim;
  bool is_double;                // the type of the arithmetic: double where x or codebook are float64, float otherwise
  bool with_pairs;               // whether codes are packed and screened as 16-bit integers too
  const PackedCodebook* packed;  // (heads,)
  int64_t* indices;              // (heads, rows)

  // The search computes these outputs of a row while the row is in the cache. Outputs that are not requested have no data.
  Output quantized;      // (heads, rows, dim)
  Output loss;           // (heads, rows, dim): loss_weight * (x - c)^2
  double* square_error;  // (heads, rows): |x - c|^2
  double loss_weight;
};

// Counts of the rows that a search decided, and of those for which an arithmetic was not precise enough.
struct CodebookSearchCounts {
  int64_t rows = 0;
  int64_t rechecked = 0;       // decided in float64, because float32 left several codes
  int64_t screened_again = 0;  // screened in float32, because 16-bit integers left too many codes
};

// Residual quantization. The heads of the search are the steps: each step searches its codebook for what the steps before have left of the
// rows. A block of rows goes through all steps while it is in the cache.
struct CodebookResidual {
  CodebookSearch search;  // x (1, rows, dim), codebook (steps, codes, dim); no outputs
  const uint8_t* mask;    // (rows,): 0 leaves a row out; null where no row is left out
  int64_t* indices;       // (rows, steps): -1 for a row that is left out
  Output quantized;       // (rows, dim): the sum of the codes, 0 for a row that is left out
  Output residuals;       // (steps, rows, dim): what each step searches for, 0 for a row that is left out; no data where not requested
  double* square_errors;  // (steps, blocks): the sum of |residual - code|^2 over the rows of a block
};

struct CodebookBackward {
  CodebookRows x, codebook, grad_quantized;
  int64_t heads, rows, codes, dim;
  bool is_double;
  const int64_t* indices;  // (heads, rows)
  View grad_loss;          // (heads * rows * dim,)
  double loss_factor;      // 2 * commitment_cost * the factor of the reduction
  bool rotation;           // whether grad_quantized flows through the rotation trick, not straight through
  Output grad_x;           // (heads, rows, dim)
};

struct CodebookResidualBackward {
  CodebookRows x, codebooks, grad_quantized;  // (1, rows, dim), (steps, codes, dim), (1, rows, dim)
  int64_t rows, steps, dim;
  bool is_double;
  const int64_t* indices;     // (rows, steps); negative for a row that is left out
  const double* grad_losses;  // (steps,); null where the losses have no gradient
  double loss_factor;         // grad_x += loss_factor * grad_losses[step] * (residual - code)
  Output grad_x;              // (rows, dim)
  Output residuals;           // (steps, rows, dim), as in CodebookResidual
};

// The sums over the rows of each code of one head. A row's term is x, or with a grad_loss grad_loss * (c - x). The rows are sorted by code,
// and a piece is kPieceRows adjacent sorted positions.
struct CodebookSums {
  CodebookRows x, codebook;
  int64_t head, rows, dim;
  bool is_double;
  const int64_t* order;   // (count,): the rows, sorted by code; rows of one code are in ascending order
  const int64_t* codes;   // (count,): the code at each position
  const int64_t* starts;  // (num_codes + 1,): the position of the first row of each code, and the end
  int64_t count;          // positions; rows with a negative index have none
  View grad_loss;         // (heads * rows * dim,)
  double factor;          // multiplies the sums
  Output sums;            // (heads, num_codes, dim)
  int64_t num_codes;
  double* partial;  // (pieces, 2, dim): partial sums of the first and the last code of a piece where other pieces have rows of them too
};

constexpr int64_t kPieceRows = 512;

struct CodebookKernels {
  int codes_per_panel, rows_per_block;
  bool has_pairs;  // whether the instruction set multiplies pairs of 16-bit integers
  // Converts values and writes them to elements [begin, begin + count).
  void (*from_double)(const Output& to, int64_t begin, int64_t count, const double* values);
  // Writes the elements of a row as double. Returns false where one is not finite.
  bool (*row_to_double)(const CodebookRows& rows, int64_t head, int64_t row, int64_t dim, double* to);
  // Writes the norms of codes minus their mean, and hashes of the codes. Returns false where an element is not finite.
  bool (*measure)(const CodebookSearch& search, int64_t head, int64_t begin_code, int64_t end_code, double* norms, uint64_t* hashes);
  // Packs the codes of some panels; `repeated` says which codes are equal to an earlier one.
  void (*pack)(const CodebookSearch& search, int64_t head, const std::vector<bool>& repeated, int64_t begin_panel, int64_t end_panel);
  // Searches blocks of rows_per_block rows, which do not cross heads.
  CodebookSearchCounts (*search)(const CodebookSearch& search, int64_t begin_block, int64_t end_block);
  // Quantizes blocks of rows_per_block rows in all steps.
  CodebookSearchCounts (*residual)(const CodebookResidual& residual, int64_t begin_block, int64_t end_block);
  // Writes grad_x of rows numbered over the heads.
  void (*backward)(const CodebookBackward& backward, int64_t begin_row, int64_t end_row);
  // Writes grad_x of rows, and what each step searched for.
  void (*residual_backward)(const CodebookResidualBackward& backward, int64_t begin_row, int64_t end_row);
  // Writes the sums of codes whose rows lie in one piece, and partial sums of the others.
  void (*sum_pieces)(const CodebookSums& sums, int64_t begin_piece, int64_t end_piece);
};

// The counts of all calls since the last reset.
CodebookSearchCounts codebook_statistics(bool reset);

FASTVAE_DECLARE_VNNI_KERNELS(CodebookKernels, codebook)

}  // namespace fastvae
