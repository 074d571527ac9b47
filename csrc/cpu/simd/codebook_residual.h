// Residual quantization of blocks of rows: the search of codebook_search.h, step after step, and the gradient of x.
#pragma once

#include <algorithm>
#include <vector>

#include "codebook_search.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// Rows in the arithmetic's type T whose values are rounded to the dtype of x, as a loop over tensors of that dtype would leave them.
template <class T>
class ResidualRows {
 public:
  ResidualRows(DType dtype, int64_t dim) : dtype_(dtype), dim_(dim), code_(dim), rounded_(dim), storage_(dim) {}

  // The code of a row of a codebook, as it is.
  const T* code(const CodebookRows& codebooks, int64_t step, int64_t index) const {
    return load_row<T>(codebooks, step, index, dim_, code_);
  }

  // The code in the dtype of x.
  const T* rounded(const T* code) const { return rounds() ? round(code, rounded_) : code; }

  // Subtracts what rounded() gave.
  void subtract(const T* code, T* row) const {
#pragma omp simd
    for (int64_t d = 0; d < dim_; ++d) row[d] -= code[d];
    if (rounds()) round(row, row);
  }

 private:
  bool rounds() const { return dtype_ != native_dtype<T>(); }

  const T* round(const T* from, T* to) const {
    store(Output{storage_, dtype_}, 0, dim_, from);
    fastvae::convert(storage_, dtype_, 0, dim_, to);
    return to;
  }

  DType dtype_;
  int64_t dim_;
  Buffer<T> code_, rounded_;
  Buffer<double> storage_;  // room for a row in any dtype
};

// Quantizes blocks of rows in all steps, on one thread.
template <class T>
class ResidualQuantizer {
 public:
  explicit ResidualQuantizer(const CodebookResidual& residual)
      : r_(residual),
        dim_(residual.search.dim),
        steps_(residual.search.heads),
        blocks_(ceil_div(residual.search.rows, kBlockRows)),
        indices_(steps_ * kBlockRows),
        block_(kBlockRows * dim_),
        total_(kBlockRows * dim_),
        rows_(residual.search.x.dtype, dim_),
        search_(search_of_block()),
        searcher_(search_) {}

  void quantize(int64_t block) {
    int64_t first = block * kBlockRows, count = std::min<int64_t>(kBlockRows, r_.search.rows - first);
    for (int64_t i = 0; i < count; ++i) {
      T* row = block_ + i * dim_;
      if (is_left_out(first + i))
        std::fill(row, row + dim_, T(0));
      else
        fastvae::convert(r_.search.x.data, r_.search.x.dtype, r_.search.x.offset(0, first + i), dim_, row);
    }
    std::fill(static_cast<T*>(total_), total_ + count * dim_, T(0));
    for (int64_t step = 0; step < steps_; ++step) {
      if (r_.residuals) write(r_.residuals, (step * r_.search.rows + first) * dim_, count * dim_, static_cast<const T*>(block_));
      searcher_.search_block(step, 0, count);
      r_.square_errors[step * blocks_ + block] = take_codes(step, first, count);
    }
    write(r_.quantized, first * dim_, count * dim_, static_cast<const T*>(total_));
  }

  const CodebookSearchCounts& counts() const { return searcher_.counts; }

 private:
  // The search of one block, whose rows are those of block_ in all steps.
  CodebookSearch search_of_block() const {
    CodebookSearch search = r_.search;
    search.x = {block_, native_dtype<T>(), 0, dim_};
    search.rows = kBlockRows;
    search.indices = indices_;
    return search;
  }

  bool is_left_out(int64_t row) const { return r_.mask != nullptr && r_.mask[row] == 0; }

  // Moves the code of each row from what is left of it to the sum of its codes. Returns the sum of the squared errors.
  double take_codes(int64_t step, int64_t first, int64_t count) {
    double total_square = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      int64_t& index = r_.indices[(first + i) * steps_ + step];
      if (is_left_out(first + i)) {
        index = -1;
        continue;
      }
      index = indices_[step * kBlockRows + i];
      const T* code = rows_.code(r_.search.codebook, step, index);
      T *row = block_ + i * dim_, *total = total_ + i * dim_, square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < dim_; ++d) square += (row[d] - code[d]) * (row[d] - code[d]);
      total_square += square;
      code = rows_.rounded(code);
#pragma omp simd
      for (int64_t d = 0; d < dim_; ++d) total[d] += code[d];
      rows_.subtract(code, row);
    }
    return total_square;
  }

  const CodebookResidual& r_;
  int64_t dim_, steps_, blocks_;
  Buffer<int64_t> indices_;  // (steps, kBlockRows)
  Buffer<T> block_, total_;  // (kBlockRows, dim): what is left of the rows, and the sums of their codes
  ResidualRows<T> rows_;
  CodebookSearch search_;
  CodebookSearcher<T> searcher_;
};

template <class T>
CodebookSearchCounts residual_blocks(const CodebookResidual& r, int64_t begin, int64_t end) {
  ResidualQuantizer<T> quantizer(r);
  for (int64_t block = begin; block < end; ++block) quantizer.quantize(block);
  return quantizer.counts();
}

// Adds the terms of the losses to `out`, which has grad_quantized, and writes what each step searched for. `row` has the values of x;
// `pulls` (steps, dim) is scratch memory. The terms are added as autograd adds those of a chain of single quantizers, so that a
// checkpointed pass, which is such a chain, gives the same bits.
template <class T>
void add_loss_terms(const CodebookResidualBackward& b, int64_t i, const ResidualRows<T>& rows, T* row, T* pulls, T* out) {
  for (int64_t step = 0; step < b.steps; ++step) {
    if (b.residuals) write(b.residuals, (step * b.rows + i) * b.dim, b.dim, static_cast<const T*>(row));
    const T* code = rows.code(b.codebooks, step, b.indices[i * b.steps + step]);
    T factor = static_cast<T>(b.loss_factor) * static_cast<T>(b.grad_losses[step]), *pull = pulls + step * b.dim;
#pragma omp simd
    for (int64_t d = 0; d < b.dim; ++d) pull[d] = factor * (row[d] - code[d]);
    rows.subtract(rows.rounded(code), row);
  }
  for (int64_t d = 0; d < b.dim; ++d) {
    T later = 0;
    for (int64_t step = b.steps - 1; step > 0; --step) later += pulls[step * b.dim + d];
    out[d] = (out[d] + later) + pulls[d];
  }
}

template <class T>
void residual_backward_rows(const CodebookResidualBackward& b, int64_t begin, int64_t end) {
  ResidualRows<T> rows(b.x.dtype, b.dim);
  Buffer<T> row(b.dim), out(b.dim), zero(b.dim), pulls(b.steps * b.dim);
  std::fill(static_cast<T*>(zero), zero + b.dim, T(0));
  for (int64_t i = begin; i < end; ++i) {
    if (b.indices[i * b.steps] < 0) {
      write(b.grad_x, i * b.dim, b.dim, static_cast<const T*>(zero));
      for (int64_t step = 0; b.residuals && step < b.steps; ++step)
        write(b.residuals, (step * b.rows + i) * b.dim, b.dim, static_cast<const T*>(zero));
      continue;
    }
    fastvae::convert(b.x.data, b.x.dtype, b.x.offset(0, i), b.dim, static_cast<T*>(row));
    if (b.grad_quantized)
      fastvae::convert(b.grad_quantized.data, b.grad_quantized.dtype, b.grad_quantized.offset(0, i), b.dim, static_cast<T*>(out));
    else
      std::fill(static_cast<T*>(out), out + b.dim, T(0));
    if (b.grad_losses != nullptr) add_loss_terms<T>(b, i, rows, row, pulls, out);
    write(b.grad_x, i * b.dim, b.dim, static_cast<const T*>(out));
  }
}

}  // namespace
}  // namespace FASTVAE_ISA
}  // namespace fastvae
