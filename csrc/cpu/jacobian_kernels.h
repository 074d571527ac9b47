// What the Jacobian operators ask of their kernels.
#pragma once

#include "../common/jacobian_formulas.h"
#include "isa.h"
#include "view.h"

namespace fastvae {

// Hidden units that one item of work takes: their columns of the hidden values, their rows of the weight. A multiple of every vector.
constexpr int64_t kUnits = 32;

// A matrix whose rows are contiguous.
struct JacobianRows {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

// sum_j phi'(h_bj)^2 |W_j|^2 and its gradients, one item for each block of kUnits units.
struct ContractivePenalty {
  Activation activation;
  double alpha;
  JacobianRows hidden, weight;
  int64_t batch, units, inputs;
  bool wide;  // double arithmetic, for float64 tensors

  void* squared_norms;  // (units,) in the accumulation dtype
  bool norms_known;     // else the item computes them

  // Wanted of the forward pass: elementwise, or summed by block, or by block and sample (blocks, batch).
  Output elements;
  double *sums, *sample_sums;

  // Wanted of either pass: grad_scale times the gradients, times the incoming gradient of the sample or the element where given.
  double grad_scale;
  const void* sample_weights;  // (batch,) in the accumulation dtype
  JacobianRows element_weights;
  Output grad_hidden, grad_weight;

  int64_t blocks() const { return (units + kUnits - 1) / kUnits; }
};

// The scaled matrices of the Gram form: outer[b, r] left[(b,) r, k] inner[b, k], all float or all double and contiguous.
struct ScaledMatrices {
  const void *left, *inner, *outer;
  int64_t batch, rows, columns;
  bool left_is_batched, wide;
};

// What the samples [begin, end) give once their scaled matrices are multiplied with the Gram matrix: squared norms, and the gradients of
// the norms' sum, where wanted, each norm times its weight where there are weights.
struct GramReduce {
  ScaledMatrices matrices;
  const void* weights;  // (batch,)
  const void* product;  // of the scaled matrices of these samples and the Gram matrix
  void *norms, *grad_inner, *grad_outer;
  void* grad_left;  // of these samples, or of a matrix that all share: added to where `adds`
  bool with_grad, adds;
};

// The gradient of the Gram matrix: scaled.T @ diag(weights) @ scaled, symmetric, of some rows of the scaled matrices of samples. It is
// computed by panels of columns, each down to the diagonal's.
struct GramProduct {
  const void* scaled;  // of so many rows, the first of which is row `first` of all samples'
  int64_t rows, columns, first;
  const void* weights;  // of samples
  int64_t rows_per_weight;
  bool wide;
  void *panels, *weighted;  // scratch for the rows as panels; the same where there are no weights
  void* out;                // added to: rows of whole panels

  int64_t padded(int64_t panel) const { return (columns + panel - 1) / panel * panel; }
};

struct JacobianKernels {
  void (*contractive_penalty)(const ContractivePenalty&, int64_t begin_block, int64_t end_block);
  void (*gram_scale)(const ScaledMatrices&, void* out, int64_t begin_sample, int64_t end_sample);
  void (*gram_reduce)(const GramReduce&, int64_t begin_sample, int64_t end_sample);
  int64_t (*gram_panel)(bool wide);  // columns of a panel
  void (*gram_pack)(const GramProduct&);
  void (*gram_multiply)(const GramProduct&, int64_t begin_panel, int64_t end_panel);
  // out[i] = values[i] + values[stride + i] + ..., so many parts, in their order
  void (*gram_add)(const void* values, int64_t stride, int64_t parts, int64_t count, bool wide, void* out);
};

FASTVAE_DECLARE_KERNELS(JacobianKernels, jacobian)

}  // namespace fastvae
