// The interface between the Jacobian operators (jacobian.cpp) and their kernels (simd/jacobian.cpp), which are compiled once per
// instruction set and know nothing of torch. T is the type of the arithmetic: double where all tensors are float64, float otherwise.
#pragma once

#include "../common/jacobian_formulas.h"
#include "isa.h"
#include "view.h"

namespace fastvae {

// The number of hidden units of a block, which is what one thread takes at a time. It is a multiple of the lanes of every vector register,
// so that loops over a block have a constant length and no remainder. A unit is a column of the hidden values and a row of the weight.
constexpr int64_t kBlockUnits = 32;

// A matrix whose rows are contiguous; `stride` is the number of elements from one row to the next.
struct JacobianRows {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

// The contractive penalty phi'(h_bj)^2 |W_j|^2 and its gradients, for each sample b and unit j. Outputs that are not requested are nullptr.
struct ContractivePenalty {
  Activation activation;
  double alpha;
  JacobianRows hidden, weight;  // (batch, units) and (units, inputs)
  int64_t batch, units, inputs;
  bool is_double;

  void* squared_norms;  // (units,) of T: read where norms_known, written otherwise
  bool norms_known;

  // The forward pass requests one of these. `sums` begins at 0, because the kernel adds to it.
  Output elements;      // (batch, units)
  double* sums;         // (blocks,)
  double* sample_sums;  // (blocks, batch)

  // The gradients are multiplied by grad_scale and, where one of the two is set, by the grad_output of the sample or of the element.
  double grad_scale;
  const void* sample_grad_output;    // (batch,) of T
  JacobianRows element_grad_output;  // (batch, units)
  Output grad_hidden, grad_weight;   // (batch, units) and (units, inputs)

  int64_t blocks() const { return (units + kBlockUnits - 1) / kBlockUnits; }
};

// The factors of the scaled matrices S_b[r, k] = outer[b, r] * left[(b,) r, k] * inner[b, k] of the Gram form, all contiguous and of T.
struct ScaledMatrices {
  const void* left;           // (batch, rows, columns), or (rows, columns) where all samples share it
  const void *inner, *outer;  // (batch, columns) and (batch, rows)
  int64_t batch, rows, columns;
  bool left_is_batched, is_double;
};

// The squared norm of each sample, sum(S_b * (S_b @ gram)), and the gradients of the sum of the norms, each norm times its weight. All
// pointers are to T. A call handles the samples [begin, end): `product` and a batched grad_left begin at sample `begin`, the other tensors
// at sample 0.
struct GramReduce {
  ScaledMatrices matrices;
  const void* weights;                    // (batch,), or nullptr
  const void* product;                    // (end - begin, rows, columns): S_b @ gram
  void *norms, *grad_inner, *grad_outer;  // (batch,), (batch, columns), (batch, rows)
  void* grad_left;                        // (end - begin, rows, columns), or (rows, columns) where all samples share left
  bool with_grad, adds;                   // adds: a shared grad_left is added to what is there
};

// The gradient of the Gram matrix, scaled.T @ diag(weights) @ scaled, for some rows of the scaled matrices. It is symmetric, so only the
// panels of columns up to that of the diagonal are computed, see symmetric_product.h. All pointers are to T.
struct GramProduct {
  const void* scaled;  // (rows, columns)
  int64_t rows, columns;
  int64_t first_row;    // the number of the first row among those of all samples, from which its weight follows
  const void* weights;  // (batch,), or nullptr
  int64_t rows_per_weight;
  bool is_double;
  void *panels, *weighted;  // scratch buffers of the packed rows, plain and weighted; one buffer where there are no weights
  void* out;                // (padded, padded), which the product is added to

  // The number of columns, rounded up to whole panels.
  int64_t padded(int64_t panel) const { return (columns + panel - 1) / panel * panel; }
};

struct JacobianKernels {
  void (*contractive_penalty)(const ContractivePenalty&, int64_t begin_block, int64_t end_block);
  // Writes the scaled matrices of the samples to `out`, (end_sample - begin_sample, rows, columns).
  void (*gram_scale)(const ScaledMatrices&, void* out, int64_t begin_sample, int64_t end_sample);
  void (*gram_reduce)(const GramReduce&, int64_t begin_sample, int64_t end_sample);
  // The number of columns of a panel.
  int64_t (*gram_panel)(bool is_double);
  // Packs the rows as panels.
  void (*gram_pack)(const GramProduct&);
  // Multiplies packed panels and adds the products to `out`.
  void (*gram_multiply)(const GramProduct&, int64_t begin_panel, int64_t end_panel);
  // Adds parts in their order: out[i] = values[i] + values[stride + i] + values[2 * stride + i] + ...
  void (*gram_add)(const void* values, int64_t stride, int64_t parts, int64_t count, bool is_double, void* out);
};

FASTVAE_DECLARE_KERNELS(JacobianKernels, jacobian)

}  // namespace fastvae
