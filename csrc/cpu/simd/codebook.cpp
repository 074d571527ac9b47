// Vector quantization, one instruction set a compilation: the exact search for the nearest code, and what follows from it.
#include "../codebook.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>

#include "../../common/codebook.h"
#include "codebook_screen.h"
#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

int64_t padded(int64_t dim) { return (dim + kRowAlignment - 1) / kRowAlignment * kRowAlignment; }

template <class T>
const T* load_row(const CodebookRows& rows, int64_t head, int64_t row, int64_t dim, T* buffer) {
  int64_t offset = rows.offset(head, row);
  if (rows.dtype == native_dtype<T>()) return static_cast<const T*>(rows.data) + offset;
  fastvae::convert(rows.data, rows.dtype, offset, dim, buffer);
  return buffer;
}

bool convert_row(const CodebookRows& rows, int64_t head, int64_t row, int64_t dim, double* to) {
  fastvae::convert(rows.data, rows.dtype, rows.offset(head, row), dim, to);
  uint64_t bits = 0;
#pragma omp simd reduction(| : bits)
  for (int64_t d = 0; d < dim; ++d) bits |= not_finite_bit(to[d]);
  return bits >> 63 == 0;
}

bool measure(const CodebookSearch& s, int64_t head, int64_t begin, int64_t end, double* norms, uint64_t* hashes) {
  Buffer<double> code(s.dim);
  const double* mean = s.packed[head].mean;
  bool finite = true;
  for (int64_t k = begin; k < end; ++k) {
    finite = convert_row(s.codebook, head, k, s.dim, code) && finite;
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
void pack_pairs(const PackedCodebook& packed, const float* code, int64_t k, int64_t dim) {
  int64_t pairs = (dim + 1) / 2;
  int32_t* column = packed.panel_pairs + k / kPanelCodes * pairs * kPanelCodes + k % kPanelCodes;
  double square = 0.0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    int32_t words[2] = {0, 0};
    for (int64_t i = 0; i < 2 && 2 * pair + i < dim; ++i) {
      float value = code[2 * pair + i] * kPairScale;
      words[i] = static_cast<int32_t>(std::rint(value));
      double rest = static_cast<double>(value) - words[i];
      square += rest * rest;
    }
    column[pair * kPanelCodes] =
        static_cast<int32_t>((static_cast<uint32_t>(-words[0]) & 0xffffu) | (static_cast<uint32_t>(-words[1]) << 16));
  }
  // The code itself was rounded to float before.
  packed.residual[k] = static_cast<float>(std::sqrt(square) * (1.0 + 1e-6) + packed.norm[k] * kPairScale * 0x1p-23);
}
#endif

void pack(const CodebookSearch& s, int64_t head, const std::vector<bool>& skipped, int64_t begin_panel, int64_t end_panel) {
  const PackedCodebook& packed = s.packed[head];
  int64_t stride = padded(s.dim);
  Buffer<double> code(s.dim);
  for (int64_t k = begin_panel * kPanelCodes; k < end_panel * kPanelCodes; ++k) {
    bool used = k < s.codes && !skipped[k];
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
    packed.norm[k] = used ? static_cast<float>(std::sqrt(square) * (1.0 + 1e-6)) : 0.0f;
    float* column = packed.panel_rows + k / kPanelCodes * s.dim * kPanelCodes + k % kPanelCodes;
    for (int64_t d = 0; d < s.dim; ++d) column[d * kPanelCodes] = -row[d];
#if defined(__AVX512VNNI__)
    if (packed.pairs) pack_pairs(packed, row, k, s.dim);
#endif
  }
}

double squared_distance(const double* x, const double* code, int64_t dim) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < dim; ++d) total += (x[d] - code[d]) * (x[d] - code[d]);
  return total;
}

enum class Row : uint8_t { usual, not_finite, too_large };

// Sums and other loops over padded rows, whole vectors at a time.
template <class F>
FASTVAE_INLINE float sum_padded(int64_t stride, F term) {
  float lanes[kRowAlignment] = {};
  for (int64_t begin = 0; begin < stride; begin += kRowAlignment)
#pragma omp simd
    for (int64_t j = 0; j < kRowAlignment; ++j) lanes[j] += term(begin + j);
  float total = 0.0f;
  for (int j = 0; j < kRowAlignment; j += kLanes) total += FloatVector::sum(FloatVector::load(lanes + j));
  return total;
}

// One thread's share of a search.
template <class T>
class Searcher {
 public:
  explicit Searcher(const CodebookSearch& search)
      : s_(search),
        stride_(padded(search.dim)),
        codes_(search.packed[0].panels * kPanelCodes),
        rows_(kBlockRows * stride_),
        steps_(kBlockRows * search.dim),
        start_(codes_),
        minima_(kBlockRows),
#if defined(__AVX512VNNI__)
        pair_steps_(search.pairs ? kBlockRows * (search.dim + 1) / 2 : 0),
        pair_start_(search.pairs ? codes_ : 0),
        pair_minima_(search.pairs ? kBlockRows : 0),
#endif
        x_(stride_),
        mean_(stride_),
        code_(search.dim),
        out_(search.dim),
        wide_x_(search.dim),
        wide_best_(search.dim),
        wide_code_(search.dim),
        errors_(score_errors(search.dim)) {
    std::fill(static_cast<T*>(x_), x_ + stride_, T(0));
    std::fill(static_cast<T*>(mean_), mean_ + stride_, T(0));
  }

  void block(int64_t head, int64_t begin, int64_t count) {
    packed_ = &s_.packed[head];
    head_ = head;
    first_row_ = begin;
    counts.rows += count;
    largest_norm_ = 0.0f;
    std::copy(packed_->mean, packed_->mean + s_.dim, static_cast<T*>(mean_));
    for (int64_t i = 0; i < count; ++i) prepare(i);
    int64_t tiles = (count + kTileRows - 1) / kTileRows;
    std::fill(rows_ + count * stride_, rows_ + tiles * kTileRows * stride_, 0.0f);

    int64_t done = 0;
#if defined(__AVX512VNNI__)
    if (packed_->pairs) {
      done = screen_pairs(count, tiles);
      counts.screened_again += count - done;
    }
#endif
    if (done < count) screen_floats(done, count, tiles);
    if (s_.quantized || s_.errors)
      for (int64_t i = 0; i < count; ++i) finish(i);
  }

  CodebookSearchCounts counts;

 private:
  // Row i of the block, centred and scaled, its norm, and whether it can be screened at all.
  void prepare(int64_t i) {
    const T* x = load_row<T>(s_.x, head_, first_row_ + i, s_.dim, x_);
    if (x != x_ && s_.dim != stride_) {
      T* copy = x_;
#pragma omp simd
      for (int64_t d = 0; d < s_.dim; ++d) copy[d] = x[d];
      x = copy;
    }
    float* row = rows_ + i * stride_;
    const T *mean = mean_, scale = static_cast<T>(packed_->scale);
    float square = sum_padded(stride_, [&](int64_t d) {
      row[d] = static_cast<float>((x[d] - mean[d]) * scale);
      return row[d] * row[d];
    });
    norm_[i] = norm_at_least(errors_, square);
    kind_[i] = Row::usual;
    if (!(norm_[i] < kLargestRow)) {
      kind_[i] = convert_row(s_.x, head_, first_row_ + i, s_.dim, wide_x_) ? Row::too_large : Row::not_finite;
      std::fill(row, row + stride_, 0.0f);
      norm_[i] = 0.0f;
    }
    largest_norm_ = norm_[i] > largest_norm_ ? norm_[i] : largest_norm_;
  }

  // At least the error of a score in float arithmetic.
  float float_error(int64_t k, float row_norm) const { return score_error(errors_, packed_->half_norm[k], packed_->norm[k], row_norm); }

  void screen_floats(int64_t done, int64_t count, int64_t tiles) {
    float* steps = steps_;
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t d = 0; d < s_.dim; ++d)
        for (int64_t row = 0; row < kTileRows; ++row) *steps++ = rows_[(tile * kTileRows + row) * stride_ + d];
    for (int64_t k = 0; k < codes_; ++k) start_[k] = is_searched(k) ? packed_->half_norm[k] - float_error(k, largest_norm_) : kNeverNearest;
    auto* minima = static_cast<LaneMinima<FloatVector, float>*>(minima_);
    score_block(static_cast<const float*>(steps_), tiles, packed_->panel_rows, packed_->panels, s_.dim, static_cast<const float*>(start_),
                minima);
    for (int64_t i = done; i < count; ++i)
      decide(i, minima[i], [&](int64_t k) { return float_error(k, largest_norm_); }, std::numeric_limits<int64_t>::max());
  }

#if defined(__AVX512VNNI__)
  // CodebookRows and codes as 16-bit integers. Returns how many rows were decided before too many codes were left.
  int64_t screen_pairs(int64_t count, int64_t tiles) {
    float scale = pair_scale(), residual = 0.0f, largest = largest_norm_ * scale;
    int64_t pairs = (s_.dim + 1) / 2;
    int32_t* steps = pair_steps_;
    for (int64_t i = 0; i < tiles * kTileRows; ++i) {
      const float* row = rows_ + i * stride_;
      float square = sum_padded(stride_, [&](int64_t d) {
        float value = row[d] * scale, rounded = std::rint(value);
        words_[d] = static_cast<int16_t>(rounded);
        return (value - rounded) * (value - rounded);
      });
      int32_t* to = steps + i / kTileRows * pairs * kTileRows + i % kTileRows;
      for (int64_t pair = 0; pair < pairs; ++pair) memcpy(to + pair * kTileRows, words_ + 2 * pair, sizeof(int32_t));
      residual = square > residual ? square : residual;
    }
    // A row itself was rounded to float before.
    residual = norm_at_least(errors_, residual) + 0x1p-22f * largest;
    largest += residual;

    float product_scale = scale * kPairScale, residual_scale = residual * kPairScale;
    const float *half_norm = packed_->half_norm, *norm = packed_->norm, *code_residual = packed_->residual;
    auto error = [&](int64_t k) {
      return residual_scale * norm[k] + largest * code_residual[k] + 0x1p-20f * (product_scale * half_norm[k]) + 8.0f;
    };
    int32_t* start = pair_start_;
    // Norms of scaled codes are below kLargestNorm, so that their starts are below 2^30. The half norm of padding is not converted: it
    // overflows in these units.
    for (int64_t k = 0; k < codes_; ++k)
      start[k] = half_norm[k] < kNeverNearest ? static_cast<int32_t>(product_scale * half_norm[k] - error(k)) : kNeverStart;
    LaneMinima<PairVector, int32_t>* minima = pair_minima_;
    score_block(static_cast<const int32_t*>(steps), tiles, packed_->panel_pairs, packed_->panels, pairs, static_cast<const int32_t*>(start),
                minima);
    int64_t budget = count * (kFewCodes + codes_ / kFewCodes);
    for (int64_t i = 0; i < count; ++i) {
      budget -= decide(i, minima[i], error, budget);
      if (budget < 0) return i;
    }
    return count;
  }

  // A power of two that brings the longest row near to the integers' range, and keeps |c|^2 / 2 in the same units below 2^30.
  float pair_scale() const {
    if (largest_norm_ <= 0.25f) return 2.0f * kPairScale;
    int exponent;
    std::frexp(largest_norm_ / static_cast<float>(kLargestNorm), &exponent);
    return std::ldexp(kPairScale, -exponent);
  }
#endif

  // Finds the nearest code of row i among those whose score, less its error, is at most the smallest score and its error. Returns how many
  // they were; gives up above `budget`.
  template <class Vector, class Element, class Error>
  int64_t decide(int64_t i, const LaneMinima<Vector, Element>& minima, const Error& error, int64_t budget) {
    int64_t& index = s_.indices[head_ * s_.rows + first_row_ + i];
    candidates_.clear();
    if (kind_[i] != Row::usual) {
      index = 0;
      if (kind_[i] == Row::too_large) {
        for (int64_t k = 0; k < s_.codes; ++k) add_candidate(k);
        index = decide_in_float64(i);
      }
      return 0;
    }
    Vector all_least = Vector::load(minima.least);
    Element least = Vector::smallest(all_least);
    int best_lane = __builtin_ctz(Vector::at_most(all_least, Vector::broadcast(least)));
    float slack = 0.0f;
    for (int v = 0; v < kTileVectors; ++v) {
      int64_t k = code_at(minima.panel[best_lane], v, best_lane);
      float e = is_searched(k) ? error(k) : 0.0f;
      slack = e > slack ? e : slack;
    }
    Vector bound = Vector::broadcast(least + static_cast<Element>(2.0f * slack));
    uint32_t several = Vector::at_most(Vector::load(minima.second), bound), one = Vector::at_most(all_least, bound) & ~several;
    for (; one != 0; one &= one - 1) add_lane(minima.panel[__builtin_ctz(one)], __builtin_ctz(one));
    if (__builtin_expect(several != 0, 0)) {
      if (static_cast<int64_t>(candidates_.size()) + __builtin_popcount(several) * codes_ / kLanes > budget) return budget + 1;
      for (; several != 0; several &= several - 1)
        for (int64_t panel = 0; panel < packed_->panels; ++panel) add_lane(panel, __builtin_ctz(several));
    }
    index = decide_in_float32(i);
    return static_cast<int64_t>(candidates_.size());
  }

  template <class Element>
  static int64_t code_at(Element panel, int v, int lane) {
    return static_cast<int64_t>(panel) * kPanelCodes + v * kLanes + lane;
  }

  // Not padding, nor equal to an earlier code.
  bool is_searched(int64_t k) const { return packed_->half_norm[k] < kNeverNearest; }

  void add_candidate(int64_t k) {
    if (is_searched(k)) candidates_.push_back(k);
  }

  template <class Element>
  void add_lane(Element panel, int lane) {
    for (int v = 0; v < kTileVectors; ++v) add_candidate(code_at(panel, v, lane));
  }

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
    size_t kept = 0;
    for (size_t c = 0; c < candidates_.size(); ++c) {
      candidates_[kept] = candidates_[c];
      kept += scores_[c] <= bound;
    }
    if (kept == 1) return candidates_[0];
    candidates_.resize(kept);
    return decide_in_float64(i);
  }

  int64_t decide_in_float64(int64_t i) {
    ++counts.rechecked;
    fastvae::convert(s_.x.data, s_.x.dtype, s_.x.offset(head_, first_row_ + i), s_.dim, static_cast<double*>(wide_x_));
    double best = std::numeric_limits<double>::infinity();
    distances_.resize(candidates_.size());
    for (size_t c = 0; c < candidates_.size(); ++c) {
      distances_[c] = squared_distance(wide_x_, wide_row(candidates_[c], wide_code_), s_.dim);
      best = distances_[c] < best ? distances_[c] : best;
    }
    double bound = near_tie(best, s_.dim), distance = 0.0;
    int64_t nearest = -1;
    for (size_t c = 0; c < candidates_.size(); ++c) {
      if (!(distances_[c] <= bound)) continue;
      int64_t k = candidates_[c];
      int order = nearest < 0 ? -1 : compare_distances(wide_x_, wide_row(k, wide_code_), wide_row(nearest, wide_best_), s_.dim, exact_);
      if (order == kNoOrder) order = distances_[c] < distance ? -1 : distances_[c] > distance;
      // On an exact tie the lowest index.
      if (order > 0 || (order == 0 && k > nearest)) continue;
      nearest = k;
      distance = distances_[c];
    }
    return nearest < 0 ? 0 : nearest;
  }

  const double* wide_row(int64_t k, double* buffer) const {
    fastvae::convert(s_.codebook.data, s_.codebook.dtype, s_.codebook.offset(head_, k), s_.dim, buffer);
    return buffer;
  }

  // Copies the code of row i and measures its distance.
  void finish(int64_t i) {
    int64_t row = head_ * s_.rows + first_row_ + i, begin = row * s_.dim;
    const T* x = load_row<T>(s_.x, head_, first_row_ + i, s_.dim, x_);
    const T* code = load_row<T>(s_.codebook, head_, s_.indices[row], s_.dim, code_);
    if (s_.quantized) write(s_.quantized, begin, s_.dim, code);
    if (s_.loss) {
      T weight = static_cast<T>(s_.loss_weight);
      for (int64_t d = 0; d < s_.dim; ++d) out_[d] = weight * (x[d] - code[d]) * (x[d] - code[d]);
      write(s_.loss, begin, s_.dim, static_cast<const T*>(out_));
    }
    if (!s_.errors) return;
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < s_.dim; ++d) total += (x[d] - code[d]) * (x[d] - code[d]);
    s_.errors[row] = total;
  }

  static constexpr int64_t kFewCodes = 16;  // see screen_pairs: rechecking more costs as much as a screen in float
  static constexpr int32_t kNeverStart = std::numeric_limits<int32_t>::max();  // products of padding, which is 0, add nothing to it

  const CodebookSearch& s_;
  const PackedCodebook* packed_ = nullptr;
  int64_t head_ = 0, first_row_ = 0;
  int64_t stride_, codes_;
  Buffer<float> rows_, steps_, start_;
  Buffer<LaneMinima<FloatVector, float>> minima_;
#if defined(__AVX512VNNI__)
  Buffer<int32_t> pair_steps_, pair_start_;
  Buffer<LaneMinima<PairVector, int32_t>> pair_minima_;
  int16_t words_[kLongestPairs];
#endif
  Buffer<T> x_, mean_, code_, out_;
  Buffer<double> wide_x_, wide_best_, wide_code_;
  ScoreErrors errors_;
  ExactSum exact_;
  float largest_norm_ = 0.0f;
  float norm_[kBlockRows];
  Row kind_[kBlockRows];
  std::vector<int64_t> candidates_;
  std::vector<float> scores_;
  std::vector<double> distances_;
};

template <class T>
CodebookSearchCounts search_blocks(const CodebookSearch& s, int64_t begin, int64_t end) {
  Searcher<T> searcher(s);
  int64_t blocks = (s.rows + kBlockRows - 1) / kBlockRows;
  for (int64_t block = begin; block < end; ++block) {
    int64_t first = block % blocks * kBlockRows;
    searcher.block(block / blocks, first, std::min<int64_t>(kBlockRows, s.rows - first));
  }
  return searcher.counts;
}

CodebookSearchCounts search(const CodebookSearch& s, int64_t begin, int64_t end) {
  record_run(Family::codebook, kIsaName);
  return s.wide ? search_blocks<double>(s, begin, end) : search_blocks<float>(s, begin, end);
}

template <class T>
T dot(const T* a, const T* b, int64_t dim) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < dim; ++d) total += a[d] * b[d];
  return total;
}

// gradient <- its image under the transpose of the rotation and scaling that take x to the code; `between` is a buffer.
template <class T>
void rotate_back(const T* x, const T* code, int64_t dim, T* between, T* gradient) {
  Rotation<T> rotation = rotation_between(std::sqrt(dot(x, x, dim)), std::sqrt(dot(code, code, dim)));
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) between[d] = halfway(rotation, x[d], code[d]);
  project(rotation, std::sqrt(dot(between, between, dim)), dot<T>(between, gradient, dim), dot<T>(code, gradient, dim));
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) gradient[d] = rotate_back(rotation, gradient[d], between[d], x[d]);
}

template <class T>
void backward_rows(const CodebookBackward& b, int64_t begin, int64_t end) {
  Buffer<T> x_buffer(b.dim), code_buffer(b.dim), grad_buffer(b.dim), between(b.dim), incoming_buffer(b.dim), out(b.dim);
  for (int64_t row = begin; row < end; ++row) {
    int64_t head = row / b.rows;
    const T* x = load_row<T>(b.x, head, row % b.rows, b.dim, x_buffer);
    const T* code = load_row<T>(b.codebook, head, b.indices[row], b.dim, code_buffer);
    if (b.grad_quantized) {
      const T* incoming = load_row<T>(b.grad_quantized, head, row % b.rows, b.dim, incoming_buffer);
      std::copy(incoming, incoming + b.dim, static_cast<T*>(out));
      if (b.rotation) rotate_back(x, code, b.dim, static_cast<T*>(between), static_cast<T*>(out));
    } else {
      std::fill(static_cast<T*>(out), out + b.dim, T(0));
    }
    if (b.grad_loss) {
      T factor = static_cast<T>(b.loss_factor);
      const T* weight = load<T>(b.grad_loss, row * b.dim, b.dim, grad_buffer);
      for (int64_t d = 0; d < b.dim; ++d) out[d] += factor * weight[d] * (x[d] - code[d]);
    }
    write(b.grad_x, row * b.dim, b.dim, static_cast<const T*>(out));
  }
}

void backward(const CodebookBackward& b, int64_t begin, int64_t end) {
  b.wide ? backward_rows<double>(b, begin, end) : backward_rows<float>(b, begin, end);
}

template <class T>
void add_row(const CodebookSegments& s, int64_t row, const T* code, T* buffer, T* weights, double* total) {
  const T* x = load_row<T>(s.x, s.head, row, s.dim, buffer);
  if (!s.grad_loss) {
    for (int64_t d = 0; d < s.dim; ++d) total[d] += x[d];
    return;
  }
  const T* weight = load<T>(s.grad_loss, (s.head * s.rows + row) * s.dim, s.dim, weights);
  for (int64_t d = 0; d < s.dim; ++d) total[d] += static_cast<double>(weight[d]) * (static_cast<double>(code[d]) - x[d]);
}

template <class T>
void sum_pieces(const CodebookSegments& s, int64_t begin_piece, int64_t end_piece) {
  Buffer<T> buffer(s.dim), weights(s.dim), code_buffer(s.dim);
  Buffer<double> total(s.dim);
  for (int64_t piece = begin_piece; piece < end_piece; ++piece) {
    int64_t begin = piece * kPieceRows, end = std::min(begin + kPieceRows, s.count);
    for (int64_t i = begin; i < end;) {
      int64_t k = s.codes[i], run_end = std::min(s.starts[k + 1], end);
      const T* code = s.grad_loss ? load_row<T>(s.codebook, s.head, k, s.dim, code_buffer) : nullptr;
      std::fill(static_cast<double*>(total), total + s.dim, 0.0);
      bool first = i == begin, shared = s.starts[k] < begin || s.starts[k + 1] > end;
      for (; i < run_end; ++i) add_row<T>(s, s.order[i], code, buffer, weights, total);
      for (int64_t d = 0; d < s.dim; ++d) total[d] *= s.factor;
      if (shared)
        std::copy(static_cast<double*>(total), total + s.dim, s.partial + (2 * piece + !first) * s.dim);
      else
        write(s.sums, (s.head * s.num_codes + k) * s.dim, s.dim, static_cast<const double*>(total));
    }
  }
}

void sum_segments(const CodebookSegments& s, int64_t begin_piece, int64_t end_piece) {
  s.wide ? sum_pieces<double>(s, begin_piece, end_piece) : sum_pieces<float>(s, begin_piece, end_piece);
}

void write_doubles(const Output& to, int64_t begin, int64_t count, const double* values) { write(to, begin, count, values); }

#if defined(__AVX512VNNI__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace
}  // namespace FASTVAE_ISA

const CodebookKernels FASTVAE_CONCAT(codebook_kernels_, FASTVAE_ISA) = {kPanelCodes, kBlockRows, kHasPairs, write_doubles, convert_row,
                                                                        measure,     pack,       search,    backward,      sum_segments};

}  // namespace fastvae
