// Kernels for vector quantization, compiled for each instruction set.
//
// kernel          computes
// measure, pack   the packed codes of a head (codebook_pack.h)
// search          the indices of the nearest codes of blocks of rows, and what is requested of those rows (codebook_search.h)
// residual        the indices of all steps of residual quantization, and what is requested, of blocks of rows (codebook_residual.h)
// backward        grad_x of some rows
// residual_...    grad_x of some rows of residual quantization (codebook_residual.h)
// sum_pieces      sums over the rows of each code, and partial sums, of some pieces of the sorted rows
#include <algorithm>

#include "../codebook_kernels.h"
#include "codebook_pack.h"
#include "codebook_residual.h"
#include "codebook_search.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

template <class T>
CodebookSearchCounts search_blocks(const CodebookSearch& s, int64_t begin, int64_t end) {
  CodebookSearcher<T> searcher(s);
  int64_t blocks = ceil_div(s.rows, kBlockRows);
  for (int64_t block = begin; block < end; ++block) {
    int64_t first = block % blocks * kBlockRows;
    searcher.search_block(block / blocks, first, std::min<int64_t>(kBlockRows, s.rows - first));
  }
  return searcher.counts;
}

CodebookSearchCounts search(const CodebookSearch& s, int64_t begin, int64_t end) {
  record_run(Family::codebook, kIsaName);
  return s.is_double ? search_blocks<double>(s, begin, end) : search_blocks<float>(s, begin, end);
}

CodebookSearchCounts residual(const CodebookResidual& r, int64_t begin, int64_t end) {
  record_run(Family::codebook, kIsaName);
  return r.search.is_double ? residual_blocks<double>(r, begin, end) : residual_blocks<float>(r, begin, end);
}

void residual_backward(const CodebookResidualBackward& b, int64_t begin, int64_t end) {
  b.is_double ? residual_backward_rows<double>(b, begin, end) : residual_backward_rows<float>(b, begin, end);
}

template <class T>
T dot(const T* a, const T* b, int64_t dim) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < dim; ++d) total += a[d] * b[d];
  return total;
}

// Replaces grad_output by grad_x of the rotation trick, see CodebookRotation. `h` is scratch memory.
template <class T>
void rotate_back(const T* x, const T* code, int64_t dim, T* h, T* gradient) {
  CodebookRotation<T> rotation = rotation_between(std::sqrt(dot(x, x, dim)), std::sqrt(dot(code, code, dim)));
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) h[d] = halfway(rotation, x[d], code[d]);
  set_gradient(rotation, std::sqrt(dot(h, h, dim)), dot<T>(h, gradient, dim), dot<T>(code, gradient, dim));
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) gradient[d] = rotate_back(rotation, gradient[d], h[d], x[d]);
}

template <class T>
void backward_rows(const CodebookBackward& b, int64_t begin, int64_t end) {
  Buffer<T> x_buffer(b.dim), code_buffer(b.dim), weight_buffer(b.dim), h(b.dim), grad_buffer(b.dim), out(b.dim);
  for (int64_t row = begin; row < end; ++row) {
    int64_t head = row / b.rows;
    const T* x = load_row<T>(b.x, head, row % b.rows, b.dim, x_buffer);
    const T* code = load_row<T>(b.codebook, head, b.indices[row], b.dim, code_buffer);
    if (b.grad_quantized) {
      const T* grad = load_row<T>(b.grad_quantized, head, row % b.rows, b.dim, grad_buffer);
      std::copy(grad, grad + b.dim, static_cast<T*>(out));
      if (b.rotation) rotate_back(x, code, b.dim, static_cast<T*>(h), static_cast<T*>(out));
    } else {
      std::fill(static_cast<T*>(out), out + b.dim, T(0));
    }
    if (b.grad_loss) {
      T factor = static_cast<T>(b.loss_factor);
      const T* weight = load<T>(b.grad_loss, row * b.dim, b.dim, weight_buffer);
      for (int64_t d = 0; d < b.dim; ++d) out[d] += factor * weight[d] * (x[d] - code[d]);
    }
    write(b.grad_x, row * b.dim, b.dim, static_cast<const T*>(out));
  }
}

void backward(const CodebookBackward& b, int64_t begin, int64_t end) {
  b.is_double ? backward_rows<double>(b, begin, end) : backward_rows<float>(b, begin, end);
}

// Adds the term of a row to the sum of its code.
template <class T>
void add_row(const CodebookSums& s, int64_t row, const T* code, T* x_buffer, T* weight_buffer, double* total) {
  const T* x = load_row<T>(s.x, s.head, row, s.dim, x_buffer);
  if (!s.grad_loss) {
    for (int64_t d = 0; d < s.dim; ++d) total[d] += x[d];
    return;
  }
  const T* weight = load<T>(s.grad_loss, (s.head * s.rows + row) * s.dim, s.dim, weight_buffer);
  for (int64_t d = 0; d < s.dim; ++d) total[d] += static_cast<double>(weight[d]) * (static_cast<double>(code[d]) - x[d]);
}

template <class T>
void sum_pieces_in(const CodebookSums& s, int64_t begin_piece, int64_t end_piece) {
  Buffer<T> x_buffer(s.dim), weight_buffer(s.dim), code_buffer(s.dim);
  Buffer<double> total(s.dim);
  for (int64_t piece = begin_piece; piece < end_piece; ++piece) {
    int64_t begin = piece * kPieceRows, end = std::min(begin + kPieceRows, s.count);
    for (int64_t i = begin; i < end;) {
      int64_t k = s.codes[i], run_end = std::min(s.starts[k + 1], end);
      const T* code = s.grad_loss ? load_row<T>(s.codebook, s.head, k, s.dim, code_buffer) : nullptr;
      std::fill(static_cast<double*>(total), total + s.dim, 0.0);
      bool first = i == begin, crosses = s.starts[k] < begin || s.starts[k + 1] > end;  // whether other pieces have rows of the code too
      for (; i < run_end; ++i) add_row<T>(s, s.order[i], code, x_buffer, weight_buffer, total);
      for (int64_t d = 0; d < s.dim; ++d) total[d] *= s.factor;
      if (crosses)
        std::copy(static_cast<double*>(total), total + s.dim, s.partial + (2 * piece + !first) * s.dim);
      else
        write(s.sums, (s.head * s.num_codes + k) * s.dim, s.dim, static_cast<const double*>(total));
    }
  }
}

void sum_pieces(const CodebookSums& s, int64_t begin_piece, int64_t end_piece) {
  s.is_double ? sum_pieces_in<double>(s, begin_piece, end_piece) : sum_pieces_in<float>(s, begin_piece, end_piece);
}

void write_from_double(const Output& to, int64_t begin, int64_t count, const double* values) { write(to, begin, count, values); }

#if defined(__AVX512VNNI__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace
}  // namespace FASTVAE_ISA

const CodebookKernels FASTVAE_CONCAT(codebook_kernels_, FASTVAE_ISA) = {
    kPanelCodes, kBlockRows, kHasPairs, write_from_double, row_to_double,     measure,
    pack,        search,     residual,  backward,          residual_backward, sum_pieces};

}  // namespace fastvae
