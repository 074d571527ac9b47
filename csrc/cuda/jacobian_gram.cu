// The elementwise work and the sums around the matrix product of the Gram form on a GPU. The Jacobian of sample b is S_b @ W
// with S_b[r, k] = outer[b, r] * left[(b,) r, k] * inner[b, k], so with gram = W @ W.T its squared norm is sum(S_b * (S_b @ gram)). torch
// computes the matrix product S_b @ gram, these kernels everything else. The results are those of fastvae/reference/jacobian.py: the norm
// is the sum over r of outer * dots, and the gradients lack a factor of 2, which the caller applies.
//
// kernel                        grid                             reads                         writes
// jacobian_gram_scale_kernel    (chunks of the elements)         left, inner, outer            the scaled matrices S
// jacobian_gram_rows_kernel     (chunks of the elements)         left, inner, outer, product   dots, grad_left of each sample
// jacobian_gram_columns_kernel  (groups, splits) of ColumnSums   left, inner, outer, product   grad_inner, or grad_left of all samples
//
// Everything is float32. Shapes are beside the members of each kernel's parameters; rows are r, columns are k.
#include "loss.h"

namespace fastvae {
namespace {

// The factors of the scaled matrices outer[b, r] * left[(b,) r, k] * inner[b, k].
struct GramMatrices {
  const float* left;              // (batch, rows, columns), or (rows, columns) where all samples share it
  const float *inner, *outer;     // (batch, columns) and (batch, rows)
  Divider rows, columns, matrix;  // the sizes; matrix is rows * columns
  int64_t numel;                  // batch * rows * columns
  bool left_is_batched;
  bool aligned;  // every vector of left and inner is aligned and lies in one row
};

// The indices of the factors of an element (b, r, k) of the scaled matrices.
struct GramIndex {
  int64_t row, left, inner;  // `row` is that of (b, r), the index into outer

  __device__ __forceinline__ GramIndex(const GramMatrices& m, int64_t element) {
    row = quotient(m.columns, element);
    int64_t column = element - row * m.columns.divisor;
    left = m.left_is_batched ? element : remainder(m.matrix, element);
    inner = quotient(m.rows, row) * m.columns.divisor + column;
  }
};

// The factors of one vector of elements, 0 for elements that do not exist.
struct GramFactors {
  float left[kVector], inner[kVector], outer[kVector];

  __device__ __forceinline__ GramFactors(const GramMatrices& m, int64_t element, int count) {
    if (m.aligned && count == kVector) {
      GramIndex index(m, element);
      load(m.left + index.left, count, true, left);
      load(m.inner + index.inner, count, true, inner);
      for (int k = 0; k < kVector; ++k) outer[k] = m.outer[index.row];
      return;
    }
    for (int k = 0; k < kVector; ++k) {
      left[k] = inner[k] = outer[k] = 0.0f;
      if (k >= count) continue;
      GramIndex index(m, element + k);
      left[k] = m.left[index.left];
      inner[k] = m.inner[index.inner];
      outer[k] = m.outer[index.row];
    }
  }
};

struct JacobianGramScaleParams {
  GramMatrices matrices;
  int64_t chunk;  // elements of one block
  float* scaled;  // (batch, rows, columns)
};

// Writes the scaled matrices; each block handles one chunk of elements.
__global__ void __launch_bounds__(kThreads) jacobian_gram_scale_kernel(const __grid_constant__ JacobianGramScaleParams p) {
  int64_t numel = p.matrices.numel, begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, numel);
  for (int64_t base = begin; base < end; base += kStep) {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = base + vector_offset(threadIdx.x, j);
      int count = vector_count(numel - element);
      GramFactors factors(p.matrices, element, count);
      float values[kVector];
      for (int k = 0; k < kVector; ++k) values[k] = factors.outer[k] * factors.left[k] * factors.inner[k];
      store(p.scaled + element, count, count == kVector, values);
    }
  }
}

struct JacobianGramRowsParams {
  GramMatrices matrices;
  const float* product;  // (batch, rows, columns)
  bool product_is_aligned;
  int64_t chunk;  // elements of one block
  LossSum dots;   // into (batch, rows)
  unsigned* ticket;
  float* grad_left;  // (batch, rows, columns), or nullptr where not requested or where all samples share left
};

// Computes dots[b, r] = sum over k of product * left * inner and, where every sample has a left matrix, its gradient
// product * outer * inner. Each block handles one chunk of elements.
__global__ void __launch_bounds__(kThreads) jacobian_gram_rows_kernel(const __grid_constant__ JacobianGramRowsParams p) {
  LossAccumulator dots(p.dots, p.chunk);
  int64_t numel = p.matrices.numel, begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, numel);
  for (int64_t base = begin; base < end; base += kStep) {
    dots.begin_step(base);
    int64_t first = base + vector_offset(threadIdx.x, 0);
    Values products;
    load_values(p.product, first, numel, p.product_is_aligned, products);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = first + j * kNoiseLanes;
      int count = vector_count(numel - element);
      GramFactors factors(p.matrices, element, count);
      float grad_left[kVector];
      for (int k = 0; k < kVector; ++k) {
        grad_left[k] = factors.inner[k] * (factors.outer[k] * products[j][k]);
        products[j][k] *= factors.left[k] * factors.inner[k];
      }
      if (p.grad_left) store(p.grad_left + element, count, count == kVector, grad_left);
      dots.add(vector_offset(threadIdx.x, j), products[j]);
    }
    dots.end_step();
  }
  dots.store_partial_sums();
  if (is_last_block(p.ticket, gridDim.x)) dots.finish_sums();
}

struct JacobianGramColumnsParams {
  GramMatrices matrices;
  const float* product;  // (batch, rows, columns)
  ColumnSums sums;
  Divider columns;  // the number of columns of `sums`, which is the number of elements of grad
  Workspace workspace;
  float* grad;  // grad_inner (batch, columns) or grad_left (rows, columns)
};

// Sums over the rows r, which gives grad_inner[b, k] = sum of outer * product * left, or over the samples b, which gives the gradient of a
// left matrix that all samples share, grad_left[r, k] = sum of outer * product * inner.
template <bool kOverRows>
__global__ void __launch_bounds__(kThreads) jacobian_gram_columns_kernel(const __grid_constant__ JacobianGramColumnsParams p) {
  const GramMatrices& m = p.matrices;
  auto term = [&](int64_t i) {
    // sum_columns() numbers the elements with the summed dimension first. That is (b, r, k) as in memory for a sum over b, and (r, b, k)
    // for a sum over r.
    int64_t element = i;
    if (kOverRows) {
      int64_t row = quotient(p.columns, i), column = i - row * p.columns.divisor, sample = quotient(m.columns, column);
      element = (sample * m.rows.divisor + row) * m.columns.divisor + (column - sample * m.columns.divisor);
    }
    GramIndex index(m, element);
    return m.outer[index.row] * p.product[element] * (kOverRows ? m.left[index.left] : m.inner[index.inner]);
  };
  auto finish = [&](int64_t column, double total) { p.grad[column] = static_cast<float>(total); };
  sum_columns(p.sums, p.workspace, term, finish);
}

GramMatrices matrices_of(const Tensor& left, const Tensor& inner, const Tensor& outer, Copies& copies) {
  STD_TORCH_CHECK(left.scalar_type() == ScalarType::Float, "fastvae: the CUDA kernels of the Gram form take float32");
  int64_t rows = outer.size(1), columns = inner.size(1);
  GramMatrices m{data_of<float>(left, copies),
                 data_of<float>(inner, copies),
                 data_of<float>(outer, copies),
                 divider(rows),
                 divider(columns),
                 divider(rows * columns),
                 outer.numel() * columns,
                 left.dim() == 3,
                 false};
  m.aligned = columns % kVector == 0 && is_aligned(m.left) && is_aligned(m.inner);
  return m;
}

Tensor jacobian_gram_scale(const Tensor& left, const Tensor& inner, const Tensor& outer) {
  Launch launch(left);
  Tensor scaled = launch.empty({outer.numel(), inner.size(1)}, ScalarType::Float);
  Copies copies;
  copies.reserve(3);
  JacobianGramScaleParams p{matrices_of(left, inner, outer, copies), 0, static_cast<float*>(scaled.mutable_data_ptr())};
  Chunks chunks = chunks_of(p.matrices.numel, kMaxBlocks);
  p.chunk = chunks.elements;
  if (chunks.blocks > 0) launch.run(jacobian_gram_scale_kernel, chunks.blocks, 1, kThreads, p);
  return scaled;
}

// Sums over the rows or over the samples, `count` of them, into `grad`.
template <bool kOverRows>
void launch_gram_columns(Launch& launch, const GramMatrices& m, const float* product, int64_t count, const Tensor& grad) {
  int64_t columns = grad.numel();
  JacobianGramColumnsParams p{
      m, product, column_sums_of(count, columns, 1), divider(columns), launch.workspace(), static_cast<float*>(grad.mutable_data_ptr())};
  launch.run(jacobian_gram_columns_kernel<kOverRows>, p.sums.groups, p.sums.splits, kThreads, p);
}

std::tuple<Tensor, Tensor, Tensor> jacobian_gram_reduce(const Tensor& left, const Tensor& inner, const Tensor& outer, const Tensor& product,
                                                        bool with_grad) {
  Launch launch(left);
  Tensor dots = launch.empty(shape_of(outer), ScalarType::Float);
  Tensor grad_inner = launch.empty_if(with_grad, inner), grad_left = launch.empty_if(with_grad, left);
  Copies copies;
  copies.reserve(4);
  GramMatrices m = matrices_of(left, inner, outer, copies);
  if (m.numel == 0) {
    for (const Tensor& tensor : {dots, grad_inner, grad_left}) launch.fill(tensor, 0);
    return {dots, grad_inner, grad_left};
  }
  const Tensor& dense_product = readable(product, copies);
  JacobianGramRowsParams p{};
  p.matrices = m;
  p.product = static_cast<const float*>(dense_product.const_data_ptr());
  p.product_is_aligned = is_aligned(p.product);
  LossPlan plan = plan_loss(launch, Reduction::sample, dense_product, m.numel, dots);
  p.chunk = plan.chunks.elements;
  p.dots = plan.sum;
  p.ticket = plan.ticket;
  if (with_grad && m.left_is_batched) p.grad_left = static_cast<float*>(grad_left.mutable_data_ptr());
  launch.run(jacobian_gram_rows_kernel, plan.chunks.blocks, 1, kThreads, p);
  if (with_grad) {
    launch_gram_columns<true>(launch, m, p.product, m.rows.divisor, grad_inner);
    if (!m.left_is_batched) launch_gram_columns<false>(launch, m, p.product, outer.size(0), grad_left);
  }
  return {dots, grad_inner, grad_left};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("jacobian_gram_scale.cuda", TORCH_BOX(&jacobian_gram_scale));
  m.impl("jacobian_gram_reduce.cuda", TORCH_BOX(&jacobian_gram_reduce));
}

}  // namespace fastvae
