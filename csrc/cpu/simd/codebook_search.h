// The exact search for the nearest codes, a block of rows at a time. A screen computes the scores of all codes, in pairs of 16-bit integers
// where the processor multiplies them, otherwise in float32. It keeps few of them, see codebook_scores.h, and a bound of their rounding
// error leaves the candidates that can be the nearest, mostly one. Candidates are decided in float32 from the same packed codes, then in
// float64 from the inputs, and where that is too close, exactly.
#pragma once

#include <algorithm>
#include <limits>

#include "codebook_rows.h"
#include "codebook_scores.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

double squared_distance(const double* x, const double* code, int64_t dim) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < dim; ++d) total += (x[d] - code[d]) * (x[d] - code[d]);
  return total;
}

enum class RowKind : uint8_t {
  screened,
  not_finite,  // has the index 0
  too_large    // its scores could overflow float32, so it is decided in float64
};

// Searches blocks of rows on one thread; T is the type of the arithmetic on the inputs.
template <class T>
class CodebookSearcher {
 public:
  explicit CodebookSearcher(const CodebookSearch& search)
      : search_(search),
        stride_(padded_dim(search.dim)),
        codes_(search.packed[0].panels * kPanelCodes),
        rows_(kBlockRows * stride_),
        operand_(kBlockRows * search.dim),
        initial_(codes_),
        minima_(kBlockRows),
#if defined(__AVX512VNNI__)
        pair_operand_(search.with_pairs ? kBlockRows * ceil_div(search.dim, 2) : 0),
        pair_initial_(search.with_pairs ? codes_ : 0),
        pair_minima_(search.with_pairs ? kBlockRows : 0),
#endif
        x_(stride_),
        mean_(stride_),
        code_(search.dim),
        out_(search.dim),
        double_x_(search.dim),
        double_best_(search.dim),
        double_code_(search.dim),
        errors_(score_error_bounds(search.dim)) {
    std::fill(static_cast<T*>(x_), x_ + stride_, T(0));
    std::fill(static_cast<T*>(mean_), mean_ + stride_, T(0));
  }

  // Searches rows [begin, begin + count) of a head, count <= kBlockRows.
  void search_block(int64_t head, int64_t begin, int64_t count) {
    packed_ = &search_.packed[head];
    head_ = head;
    first_row_ = begin;
    counts.rows += count;
    max_norm_ = 0.0f;
    std::copy(packed_->mean, packed_->mean + search_.dim, static_cast<T*>(mean_));
    for (int64_t i = 0; i < count; ++i) prepare(i);
    int64_t tiles = ceil_div(count, kTileRows);
    std::fill(rows_ + count * stride_, rows_ + tiles * kTileRows * stride_, 0.0f);

    int64_t decided = 0;
#if defined(__AVX512VNNI__)
    if (packed_->has_pairs) {
      decided = screen_pairs(count, tiles);
      counts.screened_again += count - decided;
    }
#endif
    if (decided < count) screen_floats(decided, count, tiles);
    if (search_.quantized || search_.square_error)
      for (int64_t i = 0; i < count; ++i) write_outputs(i);
  }

  CodebookSearchCounts counts;

 private:
  // Writes row i of the block, minus the mean and scaled, an upper bound of its norm, and whether it can be screened. One that cannot is 0.
  void prepare(int64_t i) {
    const T* x = load_row<T>(search_.x, head_, first_row_ + i, search_.dim, x_);
    if (x != x_ && search_.dim != stride_) {
      T* copy = x_;
#pragma omp simd
      for (int64_t d = 0; d < search_.dim; ++d) copy[d] = x[d];
      x = copy;
    }
    float* row = rows_ + i * stride_;
    const T *mean = mean_, scale = static_cast<T>(packed_->scale);
    float square = sum_padded(stride_, [&](int64_t d) {
      row[d] = static_cast<float>((x[d] - mean[d]) * scale);
      return row[d] * row[d];
    });
    norm_[i] = norm_upper_bound(errors_, square);
    kind_[i] = RowKind::screened;
    if (!(norm_[i] < kMaxRowNorm)) {
      kind_[i] = row_to_double(search_.x, head_, first_row_ + i, search_.dim, double_x_) ? RowKind::too_large : RowKind::not_finite;
      std::fill(row, row + stride_, 0.0f);
      norm_[i] = 0.0f;
    }
    max_norm_ = norm_[i] > max_norm_ ? norm_[i] : max_norm_;
  }

  // An upper bound of the error of a score of code k in float32.
  float float_error(int64_t k, float row_norm) const {
    return score_error_bound(errors_, packed_->half_norm[k], packed_->norm[k], row_norm);
  }

  // Screens all rows in float32 and decides rows [decided, count).
  void screen_floats(int64_t decided, int64_t count, int64_t tiles) {
    float* operand = operand_;
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t d = 0; d < search_.dim; ++d)
        for (int64_t row = 0; row < kTileRows; ++row) *operand++ = rows_[(tile * kTileRows + row) * stride_ + d];
    for (int64_t k = 0; k < codes_; ++k) initial_[k] = is_searched(k) ? packed_->half_norm[k] - float_error(k, max_norm_) : kNeverNearest;
    auto* minima = static_cast<LaneMinima<FloatVector, float>*>(minima_);
    score_block(static_cast<const float*>(operand_), tiles, packed_->panel_rows, packed_->panels, search_.dim,
                static_cast<const float*>(initial_), minima);
    for (int64_t i = decided; i < count; ++i)
      decide(i, minima[i], [&](int64_t k) { return float_error(k, max_norm_); }, std::numeric_limits<int64_t>::max());
  }

#if defined(__AVX512VNNI__)
  // Screens all rows as 16-bit integers and decides them in turn. It returns the number of rows that it decided: it stops where so many
  // codes are left that a screen in float32 is cheaper than deciding between them.
  int64_t screen_pairs(int64_t count, int64_t tiles) {
    float scale = pair_scale(), residual = 0.0f, max_norm = max_norm_ * scale;
    int64_t pairs = ceil_div(search_.dim, 2);
    int32_t* operand = pair_operand_;
    for (int64_t i = 0; i < tiles * kTileRows; ++i) {
      const float* row = rows_ + i * stride_;
      float square = sum_padded(stride_, [&](int64_t d) {
        float value = row[d] * scale, rounded = std::rint(value);
        words_[d] = static_cast<int16_t>(rounded);
        return (value - rounded) * (value - rounded);
      });
      int32_t* to = operand + i / kTileRows * pairs * kTileRows + i % kTileRows;
      for (int64_t pair = 0; pair < pairs; ++pair) memcpy(to + pair * kTileRows, words_ + 2 * pair, sizeof(int32_t));
      residual = square > residual ? square : residual;
    }
    // The second term bounds the rounding of the scaled row to float32.
    residual = norm_upper_bound(errors_, residual) + 0x1p-22f * max_norm;
    max_norm += residual;

    float product_scale = scale * kPairScale, residual_scale = residual * kPairScale;
    const float *half_norm = packed_->half_norm, *norm = packed_->norm, *code_residual = packed_->residual;
    // |x.c - x'.c'| <= |x - x'| |c| + |x'| |c - c'| for the rounded x' and c'. The last two terms bound the rounding of the half norm and
    // the conversions to integers.
    auto error = [&](int64_t k) {
      return residual_scale * norm[k] + max_norm * code_residual[k] + 0x1p-20f * (product_scale * half_norm[k]) + 8.0f;
    };
    int32_t* initial = pair_initial_;
    // Norms of scaled codes are below kMaxCodeNorm, so the initial scores are below 2^30. kNeverNearest would overflow in these units.
    for (int64_t k = 0; k < codes_; ++k)
      initial[k] = half_norm[k] < kNeverNearest ? static_cast<int32_t>(product_scale * half_norm[k] - error(k)) : kNeverNearestPairs;
    LaneMinima<PairVector, int32_t>* minima = pair_minima_;
    score_block(static_cast<const int32_t*>(operand), tiles, packed_->panel_pairs, packed_->panels, pairs,
                static_cast<const int32_t*>(initial), minima);
    int64_t budget = count * (kCheapCandidates + codes_ / kCheapCandidates);
    for (int64_t i = 0; i < count; ++i) {
      budget -= decide(i, minima[i], error, budget);
      if (budget < 0) return i;
    }
    return count;
  }

  // The power of two by which rows are multiplied before they are rounded to integers. The longest row then uses the range of 16 bits, and
  // |c|^2 / 2 in the same units stays below 2^30.
  float pair_scale() const {
    if (max_norm_ <= 0.25f) return 2.0f * kPairScale;
    int exponent;
    std::frexp(max_norm_ / static_cast<float>(kMaxCodeNorm), &exponent);
    return std::ldexp(kPairScale, -exponent);
  }
#endif

  // Finds the nearest code of row i among the candidates, whose lower bound of the score is at most the upper bound of the smallest score.
  // Returns the number of candidates, or budget + 1 and decides nothing where there are more than `budget`.
  template <class Vector, class Element, class Error>
  int64_t decide(int64_t i, const LaneMinima<Vector, Element>& minima, const Error& error, int64_t budget) {
    int64_t& index = search_.indices[head_ * search_.rows + first_row_ + i];
    candidates_.clear();
    if (kind_[i] != RowKind::screened) {
      index = 0;
      if (kind_[i] == RowKind::too_large) {
        for (int64_t k = 0; k < search_.codes; ++k) add_candidate(k);
        index = decide_in_float64(i);
      }
      return 0;
    }
    Vector lane_minima = Vector::load(minima.smallest);
    Element smallest = Vector::smallest(lane_minima);
    int best_lane = __builtin_ctz(Vector::at_most(lane_minima, Vector::broadcast(smallest)));
    // The scores are lower bounds already: each is less by its error. Which of the codes at this place has the smallest is not known, so
    // the largest of their errors counts.
    float slack = 0.0f;
    for (int v = 0; v < kTileVectors; ++v) {
      int64_t k = code_at(minima.panel[best_lane], v, best_lane);
      float e = is_searched(k) ? error(k) : 0.0f;
      slack = e > slack ? e : slack;
    }
    Vector bound = Vector::broadcast(smallest + static_cast<Element>(2.0f * slack));
    // The lanes in which several panels have candidates, and those in which one has.
    uint32_t several = Vector::at_most(Vector::load(minima.second), bound), one = Vector::at_most(lane_minima, bound) & ~several;
    for (; one != 0; one &= one - 1) add_lane(minima.panel[__builtin_ctz(one)], __builtin_ctz(one));
    if (__builtin_expect(several != 0, 0)) {
      if (static_cast<int64_t>(candidates_.size()) + __builtin_popcount(several) * codes_ / kLanes > budget) return budget + 1;
      for (; several != 0; several &= several - 1)
        for (int64_t panel = 0; panel < packed_->panels; ++panel) add_lane(panel, __builtin_ctz(several));
    }
    index = decide_in_float32(i);
    return static_cast<int64_t>(candidates_.size());
  }

  // The code in vector v and a lane of a panel.
  template <class Element>
  static int64_t code_at(Element panel, int v, int lane) {
    return static_cast<int64_t>(panel) * kPanelCodes + v * kLanes + lane;
  }

  // Whether the code is neither padding nor equal to an earlier one.
  bool is_searched(int64_t k) const { return packed_->half_norm[k] < kNeverNearest; }

  void add_candidate(int64_t k) {
    if (is_searched(k)) candidates_.push_back(k);
  }

  // Adds the codes in a lane of a panel: the minima are over all vectors of the panel.
  template <class Element>
  void add_lane(Element panel, int lane) {
    for (int v = 0; v < kTileVectors; ++v) add_candidate(code_at(panel, v, lane));
  }

  // Decides row i between the candidates in float32, and in float64 where the error bounds leave several.
  int64_t decide_in_float32(int64_t i) {
    const float* row = rows_ + i * stride_;
    if (candidates_.size() > scores_.size()) scores_.resize(candidates_.size());
    float bound = std::numeric_limits<float>::infinity();
    for (size_t c = 0; c < candidates_.size(); ++c) {
      int64_t k = candidates_[c];
      const float* code = packed_->rows + k * stride_;
      float score = packed_->half_norm[k] - sum_padded(stride_, [&](int64_t d) { return row[d] * code[d]; });
      float e = float_error(k, norm_[i]);
      scores_[c] = score - e;
      bound = score + e < bound ? score + e : bound;
    }
    size_t count = 0;
    for (size_t c = 0; c < candidates_.size(); ++c) {
      candidates_[count] = candidates_[c];
      count += scores_[c] <= bound;
    }
    if (count == 1) return candidates_[0];
    candidates_.resize(count);
    return decide_in_float64(i);
  }

  // Decides row i between the candidates in float64, and exactly where the error bounds leave several.
  int64_t decide_in_float64(int64_t i) {
    ++counts.rechecked;
    fastvae::convert(search_.x.data, search_.x.dtype, search_.x.offset(head_, first_row_ + i), search_.dim,
                     static_cast<double*>(double_x_));
    double best = std::numeric_limits<double>::infinity();
    distances_.resize(candidates_.size());
    for (size_t c = 0; c < candidates_.size(); ++c) {
      distances_[c] = squared_distance(double_x_, code_as_double(candidates_[c], double_code_), search_.dim);
      best = distances_[c] < best ? distances_[c] : best;
    }
    double bound = tie_bound(best, search_.dim), distance = 0.0;
    int64_t nearest = -1;
    for (size_t c = 0; c < candidates_.size(); ++c) {
      if (!(distances_[c] <= bound)) continue;
      int64_t k = candidates_[c];
      int order = nearest < 0 ? -1
                              : compare_distances(double_x_, code_as_double(k, double_code_), code_as_double(nearest, double_best_),
                                                  search_.dim, exact_);
      if (order == kUndecided) order = distances_[c] < distance ? -1 : distances_[c] > distance;
      // On an exact tie the lowest index wins.
      if (order > 0 || (order == 0 && k > nearest)) continue;
      nearest = k;
      distance = distances_[c];
    }
    return nearest < 0 ? 0 : nearest;
  }

  const double* code_as_double(int64_t k, double* buffer) const {
    fastvae::convert(search_.codebook.data, search_.codebook.dtype, search_.codebook.offset(head_, k), search_.dim, buffer);
    return buffer;
  }

  // Writes what is requested of row i beside its index.
  void write_outputs(int64_t i) {
    int64_t row = head_ * search_.rows + first_row_ + i, begin = row * search_.dim;
    const T* x = load_row<T>(search_.x, head_, first_row_ + i, search_.dim, x_);
    const T* code = load_row<T>(search_.codebook, head_, search_.indices[row], search_.dim, code_);
    if (search_.quantized) write(search_.quantized, begin, search_.dim, code);
    if (search_.loss) {
      T weight = static_cast<T>(search_.loss_weight);
      for (int64_t d = 0; d < search_.dim; ++d) out_[d] = weight * (x[d] - code[d]) * (x[d] - code[d]);
      write(search_.loss, begin, search_.dim, static_cast<const T*>(out_));
    }
    if (!search_.square_error) return;
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < search_.dim; ++d) total += (x[d] - code[d]) * (x[d] - code[d]);
    search_.square_error[row] = total;
  }

  // Deciding between so many candidates, and a sixteenth of the codes, costs about as much as a screen of the row in float32.
  static constexpr int64_t kCheapCandidates = 16;
  // The initial score of codes that are never nearest. Their elements are 0, so nothing is added to it and it cannot overflow.
  static constexpr int32_t kNeverNearestPairs = std::numeric_limits<int32_t>::max();

  const CodebookSearch& search_;
  const PackedCodebook* packed_ = nullptr;
  int64_t head_ = 0, first_row_ = 0;
  int64_t stride_, codes_;  // the padded dim; the codes of all panels
  // rows_: (kBlockRows, stride_), minus the mean and scaled. operand_: (tile, dim, row in tile). initial_: (codes_,), scores without the
  // products, less their errors.
  Buffer<float> rows_, operand_, initial_;
  Buffer<LaneMinima<FloatVector, float>> minima_;
#if defined(__AVX512VNNI__)
  Buffer<int32_t> pair_operand_, pair_initial_;
  Buffer<LaneMinima<PairVector, int32_t>> pair_minima_;
  int16_t words_[kMaxPairDim];
#endif
  Buffer<T> x_, mean_, code_, out_;
  Buffer<double> double_x_, double_best_, double_code_;
  ScoreErrorBounds errors_;
  ExactSum exact_;
  float max_norm_ = 0.0f;
  float norm_[kBlockRows];
  RowKind kind_[kBlockRows];
  std::vector<int64_t> candidates_;
  std::vector<float> scores_;
  std::vector<double> distances_;
};

}  // namespace
}  // namespace FASTVAE_ISA
}  // namespace fastvae
