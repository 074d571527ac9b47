// The contractive penalty and the epilogues of the Gram form, one instruction set a compilation.
#include "../jacobian_kernels.h"

#include "symmetric_product.h"
#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

template <class T>
const T* native(const JacobianRows& rows, int64_t row, int64_t column) {
  return static_cast<const T*>(rows.data) + row * rows.stride + column;
}

// Elements [column, column + count) of a row, in place where they lie so in memory, else in the buffer.
template <class T>
const T* load_row(const JacobianRows& rows, int64_t row, int64_t column, int64_t count, T* buffer) {
  if (rows.dtype == native_dtype<T>()) return native<T>(rows, row, column);
  convert(rows.data, rows.dtype, row * rows.stride + column, count, buffer);
  return buffer;
}

// The units of one item, padded: every loop over units has a constant length.
struct Block {
  int64_t index, first, count;

  Block(const ContractivePenalty& p, int64_t index)
      : index(index), first(index * kUnits), count(p.units - first < kUnits ? p.units - first : kUnits) {}
};

template <class T>
struct Units {
  alignas(64) T values[kUnits] = {};

  const T* load(const JacobianRows& rows, int64_t row, const Block& block) {
    if (block.count == kUnits) return load_row(rows, row, block.first, kUnits, values);
    convert(rows.data, rows.dtype, row * rows.stride + block.first, block.count, values);
    return values;
  }
};

template <class T>
T* norms_of(const ContractivePenalty& p, const Block& block) {
  return static_cast<T*>(p.squared_norms) + block.first;
}

template <class T>
T sample_weight(const ContractivePenalty& p, int64_t sample) {
  return p.sample_weights ? static_cast<const T*>(p.sample_weights)[sample] : T(1);
}

// sum_b weight_b phi'(h_bj)^2 of each unit: runs of kRun samples in T, those in double.
template <class Act, class T>
void column_sums(const ContractivePenalty& p, const Block& block, double* sums) {
  constexpr int64_t kRun = 64;
  const T alpha = static_cast<T>(p.alpha);
  Units<T> hidden_buffer, weights_buffer;
  for (int64_t begin = 0; begin < p.batch; begin += kRun) {
    int64_t end = begin + kRun < p.batch ? begin + kRun : p.batch;
    alignas(64) T partial[kUnits] = {};
    for (int64_t b = begin; b < end; ++b) {
      const T* h = hidden_buffer.load(p.hidden, b, block);
      if (p.element_weights) {
        const T* weights = weights_buffer.load(p.element_weights, b, block);
#pragma omp simd
        for (int64_t u = 0; u < kUnits; ++u) partial[u] += weights[u] * Act::at(h[u], alpha).square;
      } else {
        T weight = sample_weight<T>(p, b);
#pragma omp simd
        for (int64_t u = 0; u < kUnits; ++u) partial[u] += weight * Act::at(h[u], alpha).square;
      }
    }
    for (int64_t u = 0; u < kUnits; ++u) sums[u] += static_cast<double>(partial[u]);
  }
}

// Four sums, so that an addition need not wait for the one before.
template <class T>
T sum_of_squares(const T* values, int64_t count) {
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  int64_t quarter = count / 4;
  const T *v1 = values + quarter, *v2 = values + 2 * quarter, *v3 = values + 3 * quarter;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < quarter; ++i) {
    s0 += values[i] * values[i];
    s1 += v1[i] * v1[i];
    s2 += v2[i] * v2[i];
    s3 += v3[i] * v3[i];
  }
  for (int64_t i = 4 * quarter; i < count; ++i) s0 += values[i] * values[i];
  return (s0 + s1) + (s2 + s3);
}

// The squared norms of the weight's rows where they are wanted, and the rows' gradients, a multiple of the rows, in the same pass.
template <class T>
void weight_rows(const ContractivePenalty& p, const Block& block, const double* columns) {
  T buffer[kTile], grad_buffer[kTile];
  T* norms = norms_of<T>(p, block);
  for (int64_t u = 0; u < block.count; ++u) {
    int64_t row = block.first + u;
    const T factor = static_cast<T>(2.0 * p.grad_scale * columns[u]);
    double norm = 0.0;
    for (int64_t begin = 0; begin < p.inputs; begin += kTile) {
      int64_t count = p.inputs - begin < kTile ? p.inputs - begin : kTile;
      const T* weights = load_row(p.weight, row, begin, count, buffer);
      if (!p.norms_known) norm += static_cast<double>(sum_of_squares(weights, count));
      if (p.grad_weight) {
        int64_t offset = row * p.inputs + begin;
        T* grad = destination(p.grad_weight, offset, grad_buffer);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) grad[i] = weights[i] * factor;
        store(p.grad_weight, offset, count, grad);
      }
    }
    if (!p.norms_known) norms[u] = static_cast<T>(norm);
  }
}

// The penalty of each element, or its sum over the block for each sample.
template <class Act, class T>
void penalties(const ContractivePenalty& p, const Block& block, const T* norms) {
  const T alpha = static_cast<T>(p.alpha);
  Units<T> hidden_buffer;
  alignas(64) T values[kUnits];
  for (int64_t b = 0; b < p.batch; ++b) {
    const T* h = hidden_buffer.load(p.hidden, b, block);
#pragma omp simd
    for (int64_t u = 0; u < kUnits; ++u) values[u] = norms[u] * Act::at(h[u], alpha).square;
    if (p.elements) write(p.elements, b * p.units + block.first, block.count, values);
    if (p.sample_sums) p.sample_sums[block.index * p.batch + b] = static_cast<double>(sum_run(values, block.count));
  }
}

template <class Act, class T>
void hidden_gradients(const ContractivePenalty& p, const Block& block, const T* norms) {
  const T alpha = static_cast<T>(p.alpha);
  Units<T> hidden_buffer, weights_buffer;
  alignas(64) T values[kUnits], scaled_norms[kUnits];
  for (int64_t u = 0; u < kUnits; ++u) scaled_norms[u] = norms[u] * static_cast<T>(p.grad_scale);
  for (int64_t b = 0; b < p.batch; ++b) {
    const T* h = hidden_buffer.load(p.hidden, b, block);
    T weight = sample_weight<T>(p, b);
    int64_t offset = b * p.units + block.first;
    T* out = block.count == kUnits ? destination(p.grad_hidden, offset, values) : values;
#pragma omp simd
    for (int64_t u = 0; u < kUnits; ++u) out[u] = weight * scaled_norms[u] * Act::at(h[u], alpha).change;
    if (p.element_weights) {
      const T* weights = weights_buffer.load(p.element_weights, b, block);
      for (int64_t u = 0; u < kUnits; ++u) out[u] *= weights[u];
    }
    if (out == values) write(p.grad_hidden, offset, block.count, values);
  }
}

template <class Act, class T>
void run_blocks(const ContractivePenalty& p, int64_t begin_block, int64_t end_block) {
  for (int64_t index = begin_block; index < end_block; ++index) {
    Block block(p, index);
    double columns[kUnits] = {};
    if (p.sums || p.grad_weight) column_sums<Act, T>(p, block, columns);
    if (!p.norms_known || p.grad_weight) weight_rows<T>(p, block, columns);
    alignas(64) T norms[kUnits] = {};
    memcpy(norms, norms_of<T>(p, block), static_cast<size_t>(block.count) * sizeof(T));
    if (p.sums)
      for (int64_t u = 0; u < block.count; ++u) p.sums[index] += columns[u] * static_cast<double>(norms[u]);
    if (p.elements || p.sample_sums) penalties<Act, T>(p, block, norms);
    if (p.grad_hidden) hidden_gradients<Act, T>(p, block, norms);
  }
}

template <class T>
void run_activation(const ContractivePenalty& p, int64_t begin_block, int64_t end_block) {
  with_activation(p.activation, [&](auto activation) { run_blocks<decltype(activation), T>(p, begin_block, end_block); });
}

void contractive_penalty(const ContractivePenalty& p, int64_t begin_block, int64_t end_block) {
  record_run(Family::jacobian, kIsaName);
  p.wide ? run_activation<double>(p, begin_block, end_block) : run_activation<float>(p, begin_block, end_block);
}

template <class T>
struct Matrices {
  const T *left, *inner, *outer;
  int64_t rows, columns, left_stride;

  explicit Matrices(const ScaledMatrices& m)
      : left(static_cast<const T*>(m.left)),
        inner(static_cast<const T*>(m.inner)),
        outer(static_cast<const T*>(m.outer)),
        rows(m.rows),
        columns(m.columns),
        left_stride(m.left_is_batched ? m.rows * m.columns : 0) {}
};

template <class T>
void scale_samples(const ScaledMatrices& matrices, T* out, int64_t begin, int64_t end) {
  const Matrices<T> m(matrices);
  for (int64_t b = begin; b < end; ++b) {
    const T* inner = m.inner + b * m.columns;
    for (int64_t r = 0; r < m.rows; ++r) {
      const T* left = m.left + b * m.left_stride + r * m.columns;
      const T outer = m.outer[b * m.rows + r];
      T* to = out + ((b - begin) * m.rows + r) * m.columns;
#pragma omp simd
      for (int64_t k = 0; k < m.columns; ++k) to[k] = outer * left[k] * inner[k];
    }
  }
}

void gram_scale(const ScaledMatrices& m, void* out, int64_t begin_sample, int64_t end_sample) {
  record_run(Family::jacobian, kIsaName);
  m.wide ? scale_samples(m, static_cast<double*>(out), begin_sample, end_sample)
         : scale_samples(m, static_cast<float*>(out), begin_sample, end_sample);
}

// Of one row: what left, inner and product give in all, and each its share of the gradients.
template <bool kWithGrad, class T>
FASTVAE_INLINE double reduce_row(const T* __restrict left, const T* __restrict inner, const T* __restrict product, T outer, int64_t columns,
                                 T* __restrict grad_inner, T* __restrict grad_left, bool adds) {
  double dot = 0.0;
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    const int64_t end = begin + kTile < columns ? begin + kTile : columns;
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < end; ++k) {
      part += left[k] * inner[k] * product[k];
      if (kWithGrad) {
        T weighted = outer * product[k];
        grad_inner[k] += left[k] * weighted;
        grad_left[k] = (adds ? grad_left[k] : T(0)) + inner[k] * weighted;
      }
    }
    dot += static_cast<double>(part);
  }
  return dot;
}

template <class T>
T* at(void* values, int64_t offset) {
  return values ? static_cast<T*>(values) + offset : nullptr;
}

template <bool kWithGrad, class T>
void reduce_samples(const GramReduce& p, int64_t begin, int64_t end) {
  const Matrices<T> m(p.matrices);
  const int64_t size = m.rows * m.columns;
  for (int64_t b = begin; b < end; ++b) {
    const T *left = m.left + b * m.left_stride, *inner = m.inner + b * m.columns, *outer = m.outer + b * m.rows;
    const T* product = static_cast<const T*>(p.product) + (b - begin) * size;
    T* grad_inner = at<T>(p.grad_inner, b * m.columns);
    T* grad_left = at<T>(p.grad_left, m.left_stride > 0 ? (b - begin) * size : 0);
    const T weight = p.weights ? static_cast<const T*>(p.weights)[b] : T(1);
    const bool adds = p.adds || (m.left_stride == 0 && b > begin);
    double norm = 0.0;
    if (kWithGrad) memset(grad_inner, 0, static_cast<size_t>(m.columns) * sizeof(T));
    for (int64_t r = 0; r < m.rows; ++r) {
      int64_t row = r * m.columns;
      double dot =
          reduce_row<kWithGrad>(left + row, inner, product + row, T(2) * weight * outer[r], m.columns, grad_inner, grad_left + row, adds);
      norm += static_cast<double>(outer[r]) * dot;
      if (kWithGrad) static_cast<T*>(p.grad_outer)[b * m.rows + r] = static_cast<T>(2.0 * static_cast<double>(weight) * dot);
    }
    static_cast<T*>(p.norms)[b] = static_cast<T>(norm);
  }
}

template <class T>
void reduce_samples(const GramReduce& p, int64_t begin, int64_t end) {
  p.with_grad ? reduce_samples<true, T>(p, begin, end) : reduce_samples<false, T>(p, begin, end);
}

void gram_reduce(const GramReduce& p, int64_t begin_sample, int64_t end_sample) {
  p.matrices.wide ? reduce_samples<double>(p, begin_sample, end_sample) : reduce_samples<float>(p, begin_sample, end_sample);
}

int64_t gram_panel(bool wide) { return wide ? ProductVector<double>::kPanel : ProductVector<float>::kPanel; }

template <class T>
void pack_rows(const GramProduct& p) {
  const T *scaled = static_cast<const T*>(p.scaled), *weights = static_cast<const T*>(p.weights);
  pack_panels<T>(scaled, p.rows, p.columns, nullptr, 1, 0, static_cast<T*>(p.panels));
  if (weights) pack_panels<T>(scaled, p.rows, p.columns, weights, p.rows_per_weight, p.first, static_cast<T*>(p.weighted));
}

void gram_pack(const GramProduct& p) { p.wide ? pack_rows<double>(p) : pack_rows<float>(p); }

template <class T>
void multiply_panels(const GramProduct& p, int64_t begin_panel, int64_t end_panel) {
  constexpr int64_t panel = ProductVector<T>::kPanel;
  const T *left = static_cast<const T*>(p.panels), *right = static_cast<const T*>(p.weighted);
  const int64_t stride = p.padded(panel), size = p.rows * panel, count = stride / panel;
  for (int64_t index = begin_panel; index < end_panel; ++index) {
    // A short panel and a long one in turn, so that threads with as many have as much to do.
    int64_t j = index % 2 == 0 ? index / 2 : count - 1 - index / 2;
    for (int64_t i = 0; i < (j + 1) * panel; i += kProductRows)
      add_product_tile<T>(left + i / panel * size + i % panel, right + j * size, p.rows, static_cast<T*>(p.out) + i * stride + j * panel,
                          stride);
  }
}

void gram_multiply(const GramProduct& p, int64_t begin_panel, int64_t end_panel) {
  p.wide ? multiply_panels<double>(p, begin_panel, end_panel) : multiply_panels<float>(p, begin_panel, end_panel);
}

template <class T>
void add_parts(const T* values, int64_t stride, int64_t parts, int64_t count, T* out) {
  memcpy(out, values, static_cast<size_t>(count) * sizeof(T));
  for (int64_t part = 1; part < parts; ++part) {
    const T* more = values + part * stride;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] += more[i];
  }
}

void gram_add(const void* values, int64_t stride, int64_t parts, int64_t count, bool wide, void* out) {
  wide ? add_parts(static_cast<const double*>(values), stride, parts, count, static_cast<double*>(out))
       : add_parts(static_cast<const float*>(values), stride, parts, count, static_cast<float*>(out));
}

}  // namespace
}  // namespace FASTVAE_ISA

const JacobianKernels FASTVAE_CONCAT(jacobian_kernels_, FASTVAE_ISA) = {contractive_penalty, gram_scale,    gram_reduce, gram_panel,
                                                                        gram_pack,           gram_multiply, gram_add};

}  // namespace fastvae
