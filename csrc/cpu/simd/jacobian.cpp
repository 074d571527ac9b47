// The Jacobian kernels, compiled once per instruction set. The structs in ../jacobian_kernels.h have the shapes. destination(), store() and
// write(), which convert results to the dtype of an output, are in storage.h.
//
// kernel                 reads                                     writes
// contractive_penalty    hidden, weight, squared norms where       penalties, their sums, squared norms, grad_hidden, grad_weight
//                        known, grad_output or nothing
// gram_scale             left, inner, outer                        the scaled matrices of some samples
// gram_reduce            left, inner, outer, weights, product      norms, grad_left, grad_inner, grad_outer
// gram_panel                                                       returns the number of columns of a panel
// gram_pack              scaled matrices, weights                  their rows as panels, plain and times their weights
// gram_multiply          plain and weighted panels                 adds the upper panels of their symmetric product to `out`
// gram_add               parts of sums                             their sum
#include "../jacobian_kernels.h"
#include "symmetric_product.h"
#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// Returns a pointer into rows whose dtype is that of the arithmetic.
template <class T>
const T* native(const JacobianRows& rows, int64_t row, int64_t column) {
  return static_cast<const T*>(rows.data) + row * rows.stride + column;
}

// Returns elements [column, column + count) of a row as T: in place where the dtype is that of T, otherwise converted into the buffer.
template <class T>
const T* load_row(const JacobianRows& rows, int64_t row, int64_t column, int64_t count, T* buffer) {
  if (rows.dtype == native_dtype<T>()) return native<T>(rows, row, column);
  convert(rows.data, rows.dtype, row * rows.stride + column, count, buffer);
  return buffer;
}

// This is a block of `count` hidden units, which are columns of the hidden values and rows of the weight. Vectorized loops over units
// handle kBlockUnits of them; in the last block some do not exist, and their results are never stored.
struct UnitBlock {
  int64_t index, first, count;

  UnitBlock(const ContractivePenalty& p, int64_t index)
      : index(index), first(index * kBlockUnits), count(p.units - first < kBlockUnits ? p.units - first : kBlockUnits) {}
};

// This is a buffer for one value of each unit of a block. It has 0 for units that do not exist.
template <class T>
struct UnitValues {
  alignas(64) T values[kBlockUnits] = {};

  const T* load(const JacobianRows& rows, int64_t row, const UnitBlock& block) {
    if (block.count == kBlockUnits) return load_row(rows, row, block.first, kBlockUnits, values);
    convert(rows.data, rows.dtype, row * rows.stride + block.first, block.count, values);
    return values;
  }
};

template <class T>
T* squared_norms_of(const ContractivePenalty& p, const UnitBlock& block) {
  return static_cast<T*>(p.squared_norms) + block.first;
}

// Returns the grad_output of a sample, or 1 where grad_scale contains it or the elements have their own.
template <class T>
T sample_grad_output(const ContractivePenalty& p, int64_t sample) {
  return p.sample_grad_output ? static_cast<const T*>(p.sample_grad_output)[sample] : T(1);
}

// Adds to `unit_sums` the sum over the samples b of grad_output_bj * phi'(h_bj)^2, for each unit j of the block. Partial sums of
// kPartialSamples samples are computed in T, and added in double. Act::at() returns a SquaredSlope, whose `square` is phi'(h)^2.
template <class Act, class T>
void column_sums(const ContractivePenalty& p, const UnitBlock& block, double* unit_sums) {
  constexpr int64_t kPartialSamples = 64;
  const T alpha = static_cast<T>(p.alpha);
  UnitValues<T> hidden_buffer, grad_buffer;
  for (int64_t begin = 0; begin < p.batch; begin += kPartialSamples) {
    int64_t end = begin + kPartialSamples < p.batch ? begin + kPartialSamples : p.batch;
    alignas(64) T partial[kBlockUnits] = {};
    for (int64_t b = begin; b < end; ++b) {
      const T* h = hidden_buffer.load(p.hidden, b, block);
      if (p.element_grad_output) {
        const T* grad_output = grad_buffer.load(p.element_grad_output, b, block);
#pragma omp simd
        for (int64_t u = 0; u < kBlockUnits; ++u) partial[u] += grad_output[u] * Act::at(h[u], alpha).square;
      } else {
        T grad_output = sample_grad_output<T>(p, b);
#pragma omp simd
        for (int64_t u = 0; u < kBlockUnits; ++u) partial[u] += grad_output * Act::at(h[u], alpha).square;
      }
    }
    for (int64_t u = 0; u < kBlockUnits; ++u) unit_sums[u] += static_cast<double>(partial[u]);
  }
}

// Sums the squares in four independent sums, so that an addition need not wait for the one before.
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

// Reads the rows of the weight once, for their squared norms, where those are not known, and for their gradients, where those are
// requested: the gradient of row j is row j times 2 * grad_scale * unit_sums[j], where unit_sums is what column_sums() computed.
template <class T>
void weight_rows(const ContractivePenalty& p, const UnitBlock& block, const double* unit_sums) {
  T buffer[kTile], grad_buffer[kTile];
  T* squared_norms = squared_norms_of<T>(p, block);
  for (int64_t u = 0; u < block.count; ++u) {
    int64_t row = block.first + u;
    const T factor = static_cast<T>(2.0 * p.grad_scale * unit_sums[u]);
    double squared_norm = 0.0;
    for (int64_t begin = 0; begin < p.inputs; begin += kTile) {
      int64_t count = p.inputs - begin < kTile ? p.inputs - begin : kTile;
      const T* values = load_row(p.weight, row, begin, count, buffer);
      if (!p.norms_known) squared_norm += static_cast<double>(sum_of_squares(values, count));
      if (p.grad_weight) {
        int64_t offset = row * p.inputs + begin;
        T* grad = destination(p.grad_weight, offset, grad_buffer);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) grad[i] = values[i] * factor;
        store(p.grad_weight, offset, count, grad);
      }
    }
    if (!p.norms_known) squared_norms[u] = static_cast<T>(squared_norm);
  }
}

// Writes the penalty of each element where `elements` are requested, and its sum over the units of the block for each sample where
// `sample_sums` are.
template <class Act, class T>
void penalties(const ContractivePenalty& p, const UnitBlock& block, const T* squared_norms) {
  const T alpha = static_cast<T>(p.alpha);
  UnitValues<T> hidden_buffer;
  alignas(64) T values[kBlockUnits];
  for (int64_t b = 0; b < p.batch; ++b) {
    const T* h = hidden_buffer.load(p.hidden, b, block);
#pragma omp simd
    for (int64_t u = 0; u < kBlockUnits; ++u) values[u] = squared_norms[u] * Act::at(h[u], alpha).square;
    if (p.elements) write(p.elements, b * p.units + block.first, block.count, values);
    if (p.sample_sums) p.sample_sums[block.index * p.batch + b] = sum_run(values, block.count);
  }
}

// Writes grad_hidden. `change` of a SquaredSlope is the derivative of phi'(h)^2 with respect to h. Only one of the samples and the elements
// can have a grad_output of its own, so that it is multiplied in once.
template <class Act, class T>
void hidden_gradients(const ContractivePenalty& p, const UnitBlock& block, const T* squared_norms) {
  const T alpha = static_cast<T>(p.alpha);
  UnitValues<T> hidden_buffer, grad_buffer;
  alignas(64) T values[kBlockUnits], scaled_norms[kBlockUnits];
  for (int64_t u = 0; u < kBlockUnits; ++u) scaled_norms[u] = squared_norms[u] * static_cast<T>(p.grad_scale);
  for (int64_t b = 0; b < p.batch; ++b) {
    const T* h = hidden_buffer.load(p.hidden, b, block);
    T grad_output = sample_grad_output<T>(p, b);
    int64_t offset = b * p.units + block.first;
    // The loops write kBlockUnits values, for which the output has no room in a smaller block.
    T* out = block.count == kBlockUnits ? destination(p.grad_hidden, offset, values) : values;
#pragma omp simd
    for (int64_t u = 0; u < kBlockUnits; ++u) out[u] = grad_output * scaled_norms[u] * Act::at(h[u], alpha).change;
    if (p.element_grad_output) {
      const T* factors = grad_buffer.load(p.element_grad_output, b, block);
      for (int64_t u = 0; u < kBlockUnits; ++u) out[u] *= factors[u];
    }
    if (out == values) write(p.grad_hidden, offset, block.count, values);
  }
}

// Computes what is requested for some blocks of units.
template <class Act, class T>
void run_blocks(const ContractivePenalty& p, int64_t begin_block, int64_t end_block) {
  for (int64_t index = begin_block; index < end_block; ++index) {
    UnitBlock block(p, index);
    double unit_sums[kBlockUnits] = {};
    if (p.sums || p.grad_weight) column_sums<Act, T>(p, block, unit_sums);
    if (!p.norms_known || p.grad_weight) weight_rows<T>(p, block, unit_sums);
    // weight_rows() has written the squared norms that were not known. The copy has 0 for units that do not exist.
    alignas(64) T squared_norms[kBlockUnits] = {};
    memcpy(squared_norms, squared_norms_of<T>(p, block), static_cast<size_t>(block.count) * sizeof(T));
    if (p.sums)
      for (int64_t u = 0; u < block.count; ++u) p.sums[index] += unit_sums[u] * static_cast<double>(squared_norms[u]);
    if (p.elements || p.sample_sums) penalties<Act, T>(p, block, squared_norms);
    if (p.grad_hidden) hidden_gradients<Act, T>(p, block, squared_norms);
  }
}

template <class T>
void run_activation(const ContractivePenalty& p, int64_t begin_block, int64_t end_block) {
  with_activation(p.activation, [&](auto activation) { run_blocks<decltype(activation), T>(p, begin_block, end_block); });
}

void contractive_penalty(const ContractivePenalty& p, int64_t begin_block, int64_t end_block) {
  record_run(Family::jacobian, kIsaName);
  p.is_double ? run_activation<double>(p, begin_block, end_block) : run_activation<float>(p, begin_block, end_block);
}

// These are ScaledMatrices with typed pointers. left_stride is the distance between the `left` of adjacent samples, 0 where all share it.
template <class T>
struct GramMatrices {
  const T *left, *inner, *outer;
  int64_t rows, columns, left_stride;

  explicit GramMatrices(const ScaledMatrices& m)
      : left(static_cast<const T*>(m.left)),
        inner(static_cast<const T*>(m.inner)),
        outer(static_cast<const T*>(m.outer)),
        rows(m.rows),
        columns(m.columns),
        left_stride(m.left_is_batched ? m.rows * m.columns : 0) {}
};

// Writes the scaled matrices of samples [begin, end), the first of them to the beginning of `out`.
template <class T>
void scale_samples(const ScaledMatrices& matrices, T* out, int64_t begin, int64_t end) {
  const GramMatrices<T> m(matrices);
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

// The Gram form begins with this kernel, so the others do not record the run again.
void gram_scale(const ScaledMatrices& m, void* out, int64_t begin_sample, int64_t end_sample) {
  record_run(Family::jacobian, kIsaName);
  m.is_double ? scale_samples(m, static_cast<double*>(out), begin_sample, end_sample)
              : scale_samples(m, static_cast<float*>(out), begin_sample, end_sample);
}

// Handles one row of one sample. It returns the sum over k of left * inner * product. With kWithGrad it adds the row's part to grad_inner,
// and writes the row of grad_left, or adds to it where `adds`. `factor` is 2 * weight * outer of the row, so that factor * product is the
// gradient with respect to left * inner. Partial sums of kTile columns are computed in T, and added in double.
template <bool kWithGrad, class T>
FASTVAE_INLINE double reduce_row(const T* __restrict left, const T* __restrict inner, const T* __restrict product, T factor,
                                 int64_t columns, T* __restrict grad_inner, T* __restrict grad_left, bool adds) {
  double dot = 0.0;
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    const int64_t end = begin + kTile < columns ? begin + kTile : columns;
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < end; ++k) {
      part += left[k] * inner[k] * product[k];
      if (kWithGrad) {
        T grad = factor * product[k];
        grad_inner[k] += left[k] * grad;
        grad_left[k] = (adds ? grad_left[k] : T(0)) + inner[k] * grad;
      }
    }
    dot += static_cast<double>(part);
  }
  return dot;
}

// Returns a typed pointer to an element, or nullptr where there is no tensor.
template <class T>
T* at(void* values, int64_t offset) {
  return values ? static_cast<T*>(values) + offset : nullptr;
}

// Computes the squared norms of samples [begin, end) and the gradients of these. `product` and a batched grad_left begin at sample `begin`,
// see GramReduce. The Gram matrix is symmetric, so the gradient of sum(S * (S @ gram)) with respect to S is 2 * S @ gram.
template <bool kWithGrad, class T>
void reduce_samples(const GramReduce& p, int64_t begin, int64_t end) {
  const GramMatrices<T> m(p.matrices);
  const int64_t size = m.rows * m.columns;
  for (int64_t b = begin; b < end; ++b) {
    const T *left = m.left + b * m.left_stride, *inner = m.inner + b * m.columns, *outer = m.outer + b * m.rows;
    const T* product = static_cast<const T*>(p.product) + (b - begin) * size;
    T* grad_inner = at<T>(p.grad_inner, b * m.columns);
    T* grad_left = at<T>(p.grad_left, m.left_stride > 0 ? (b - begin) * size : 0);
    const T sample_weight = p.weights ? static_cast<const T*>(p.weights)[b] : T(1);
    const bool adds = p.adds || (m.left_stride == 0 && b > begin);
    double sample_norm = 0.0;
    if (kWithGrad) memset(grad_inner, 0, static_cast<size_t>(m.columns) * sizeof(T));
    for (int64_t r = 0; r < m.rows; ++r) {
      int64_t offset = r * m.columns;
      const T factor = T(2) * sample_weight * outer[r];
      double dot = reduce_row<kWithGrad>(left + offset, inner, product + offset, factor, m.columns, grad_inner, grad_left + offset, adds);
      sample_norm += static_cast<double>(outer[r]) * dot;
      if (kWithGrad) static_cast<T*>(p.grad_outer)[b * m.rows + r] = static_cast<T>(2.0 * static_cast<double>(sample_weight) * dot);
    }
    static_cast<T*>(p.norms)[b] = static_cast<T>(sample_norm);
  }
}

template <class T>
void reduce_samples(const GramReduce& p, int64_t begin, int64_t end) {
  p.with_grad ? reduce_samples<true, T>(p, begin, end) : reduce_samples<false, T>(p, begin, end);
}

void gram_reduce(const GramReduce& p, int64_t begin_sample, int64_t end_sample) {
  p.matrices.is_double ? reduce_samples<double>(p, begin_sample, end_sample) : reduce_samples<float>(p, begin_sample, end_sample);
}

int64_t gram_panel(bool is_double) { return is_double ? ProductVector<double>::kPanel : ProductVector<float>::kPanel; }

// Packs the rows of the scaled matrices as panels, and a second time, times their weights, where there are any.
template <class T>
void pack_rows(const GramProduct& p) {
  const T *scaled = static_cast<const T*>(p.scaled), *weights = static_cast<const T*>(p.weights);
  pack_panels<T>(scaled, p.rows, p.columns, /*weights=*/nullptr, /*rows_per_weight=*/1, /*first=*/0, static_cast<T*>(p.panels));
  if (weights) pack_panels<T>(scaled, p.rows, p.columns, weights, p.rows_per_weight, p.first_row, static_cast<T*>(p.weighted));
}

void gram_pack(const GramProduct& p) { p.is_double ? pack_rows<double>(p) : pack_rows<float>(p); }

// Adds the products of plain panels 0 to j and weighted panel j to `out`, for some panels j. Without weights both are one buffer.
template <class T>
void multiply_panels(const GramProduct& p, int64_t begin_panel, int64_t end_panel) {
  constexpr int64_t panel = ProductVector<T>::kPanel;
  const T *plain = static_cast<const T*>(p.panels), *weighted = static_cast<const T*>(p.weighted);
  const int64_t stride = p.padded(panel), size = p.rows * panel, count = stride / panel;
  for (int64_t index = begin_panel; index < end_panel; ++index) {
    // Panel j has (j + 1) * panel / kProductRows tiles. Panels are taken from both ends in turn, so that threads with equally many panels
    // have equally much work.
    int64_t j = index % 2 == 0 ? index / 2 : count - 1 - index / 2;
    for (int64_t i = 0; i < (j + 1) * panel; i += kProductRows)
      add_product_tile<T>(plain + i / panel * size + i % panel, weighted + j * size, p.rows,
                          static_cast<T*>(p.out) + i * stride + j * panel, stride);
  }
}

void gram_multiply(const GramProduct& p, int64_t begin_panel, int64_t end_panel) {
  p.is_double ? multiply_panels<double>(p, begin_panel, end_panel) : multiply_panels<float>(p, begin_panel, end_panel);
}

// Adds parts that are `stride` elements apart, in their order.
template <class T>
void add_parts(const T* values, int64_t stride, int64_t parts, int64_t count, T* out) {
  memcpy(out, values, static_cast<size_t>(count) * sizeof(T));
  for (int64_t part = 1; part < parts; ++part) {
    const T* more = values + part * stride;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] += more[i];
  }
}

void gram_add(const void* values, int64_t stride, int64_t parts, int64_t count, bool is_double, void* out) {
  is_double ? add_parts(static_cast<const double*>(values), stride, parts, count, static_cast<double*>(out))
            : add_parts(static_cast<const float*>(values), stride, parts, count, static_cast<float*>(out));
}

}  // namespace
}  // namespace FASTVAE_ISA

const JacobianKernels FASTVAE_CONCAT(jacobian_kernels_, FASTVAE_ISA) = {contractive_penalty, gram_scale,    gram_reduce, gram_panel,
                                                                        gram_pack,           gram_multiply, gram_add};

}  // namespace fastvae
