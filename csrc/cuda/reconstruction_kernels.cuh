// Reconstruction losses on a GPU. The forward kernel can write the loss and its gradient in one pass over input and target.
//
// kernel                               grid                             reads                               writes
// reconstruction_loss_kernel           (chunks of input)                input, target, weight, extra,       loss, grad_input, grad_target,
//                                                                       grad_output                         grad_logvar
// reconstruction_shared_logvar_kernel  (groups, splits) of ColumnSums   the same                            grad_logvar of shared values
// reconstruction_rescale_kernel        (chunks of the gradient)         a gradient, grad_output             the gradient, rescaled
//
// Both passes launch the loss kernel: forward with a loss to reduce, backward with grad_output. Shapes and dtypes are beside the members of
// ReconstructionParams.
#pragma once

#include "../common/reconstruction_formulas.h"
#include "reduce.cuh"

namespace fastvae {
namespace {

// A weight or a log variance that is broadcast to the shape of the input: element e has value number (e / inner) % period.
struct BroadcastOperand {
  const void* data = nullptr;  // (period,) in float32 or in the dtype of the input; nullptr where there is none
  bool is_float32 = true;
  bool full = true;     // there is a value for each element, so inner is 1 and period is the number of elements
  bool aligned = true;  // full, and the address is that of a whole vector
  Divider inner{1, 0, 0}, period{1, 0, 0};
};

FASTVAE_INLINE int64_t value_index(const BroadcastOperand& operand, int64_t element) {
  return remainder(operand.period, quotient(operand.inner, element));
}

// A row is one sample of the batch. Pointers are nullptr where the tensor is absent or not requested.
template <class T>
struct ReconstructionParams {
  const T* input;      // (rows, row)
  const void* target;  // (rows, row) of target_dtype
  DType target_dtype;
  bool aligned;  // the addresses of input and target are those of whole vectors
  BroadcastOperand weight;
  BroadcastOperand extra;  // pos_weight of BCE from logits, or the log variance of the Gaussian
  int64_t numel, chunk;    // elements of the input, and of one block

  T* loss;               // (rows, row), where the loss is not reduced
  LossSum loss_sum;      // into (rows,) or a scalar
  ScalarSum logvar_sum;  // the gradient of a log variance of one value
  unsigned* ticket;

  float scale;             // multiplies all gradients, and so does grad_output, which is one of the next two or absent
  const T* grad_elements;  // (rows, row)
  const float* grad_rows;  // (rows,) with grad_stride, or a scalar with stride 0
  int64_t grad_stride;
  Divider row;                      // elements of a row
  T* grad_input;                    // (rows, row)
  Output grad_target, grad_logvar;  // (rows, row); a log variance of fewer values has sums of its own

  bool is_written;  // the forward pass wrote the gradients for a grad_output of `expected`: nothing is left to do where it is that
  float expected;
};

template <class T>
__device__ __forceinline__ float operand_value(const BroadcastOperand& operand, int64_t index) {
  return operand.is_float32 ? static_cast<const float*>(operand.data)[index] : to_float(static_cast<const T*>(operand.data)[index]);
}

// Loads the values of the `count` elements of a vector, and 0 for those that do not exist.
template <class T>
__device__ __forceinline__ void load_operand(const BroadcastOperand& operand, int64_t first, int count, float (&to)[kVector]) {
  if (operand.full) {
    bool vectorized = operand.aligned && count == kVector;
    if (operand.is_float32)
      load(static_cast<const float*>(operand.data) + first, count, vectorized, to);
    else
      load(static_cast<const T*>(operand.data) + first, count, vectorized, to);
    return;
  }
  for (int k = 0; k < kVector; ++k) to[k] = k < count ? operand_value<T>(operand, value_index(operand, first + k)) : 0.0f;
}

__device__ __forceinline__ void load_target(const void* from, DType dtype, int64_t first, int64_t numel, bool aligned, Values& to) {
  switch (dtype) {
    case DType::float32:
      return load_values(static_cast<const float*>(from), first, numel, aligned, to);
    case DType::bfloat16:
      return load_values(static_cast<const BFloat16*>(from), first, numel, aligned, to);
    case DType::float16:
      return load_values(static_cast<const Half*>(from), first, numel, aligned, to);
    default:
      return load_values(static_cast<const uint8_t*>(from), first, numel, aligned, to);
  }
}

// Whether a likelihood reads the operand `extra`.
template <class Terms>
constexpr bool kReadsExtra = false;
template <>
constexpr bool kReadsExtra<WeightedBCEWithLogits> = true;
template <>
constexpr bool kReadsExtra<Gaussian> = true;

template <class Terms>
__device__ __forceinline__ LossTerms<float> terms_of(float x, float t, float extra) {
  if constexpr (kReadsExtra<Terms>)
    return Terms::terms(x, t, extra);
  else
    return Terms::terms(x, t);
}

// grad_output of an element times the scale of the reduction.
template <class T>
__device__ __forceinline__ float scaled_grad_output(const ReconstructionParams<T>& p, int64_t element) {
  if (p.grad_elements) return to_float(p.grad_elements[element]) * p.scale;
  if (!p.grad_rows) return p.scale;
  return p.grad_rows[p.grad_stride != 0 ? quotient(p.row, element) * p.grad_stride : 0] * p.scale;
}

// Whether the gradients are already those of grad_output. The device decides that, so that the host need not wait for grad_output.
template <class T>
__device__ __forceinline__ bool is_done(const ReconstructionParams<T>& p) {
  return p.is_written && *p.grad_rows == p.expected;
}

// Computes the losses and gradients of a chunk of elements with the formulas of `Terms`. At least 6 blocks run on a multiprocessor at a
// time, which bounds a thread to 80 registers.
template <class T, class Terms>
__global__ void __launch_bounds__(kThreads, 6) reconstruction_loss_kernel(const __grid_constant__ ReconstructionParams<T> p) {
  if (is_done(p)) return;
  LossAccumulator loss(p.loss_sum, p.chunk);
  float logvar_total = 0.0f;
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.numel);
  for (int64_t base = begin; base < end; base += kStep) {
    loss.begin_step(base);
    int64_t first = base + vector_offset(threadIdx.x, 0);
    Values inputs, targets;
    load_values(p.input, first, p.numel, p.aligned, inputs);
    load_target(p.target, p.target_dtype, first, p.numel, p.aligned, targets);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = first + j * kNoiseLanes;
      int count = vector_count(p.numel - element);
      bool vectorized = count == kVector;
      float extra[kVector] = {}, weight[kVector];
      if (kReadsExtra<Terms>) load_operand<T>(p.extra, element, count, extra);
      if (p.weight.data) load_operand<T>(p.weight, element, count, weight);
      float losses[kVector], input[kVector], target[kVector], logvar[kVector];
      for (int k = 0; k < kVector; ++k) {
        LossTerms<float> terms = terms_of<Terms>(inputs[j][k], targets[j][k], extra[k]);
        float factor = p.weight.data ? weight[k] : 1.0f;
        losses[k] = k < count ? terms.loss * factor : 0.0f;
        if (k < count && p.grad_input) factor *= scaled_grad_output(p, element + k);
        input[k] = terms.input * factor;
        target[k] = terms.target * factor;
        logvar[k] = k < count ? terms.logvar * factor : 0.0f;
      }
      if (p.loss) store(p.loss + element, count, vectorized, losses);
      loss.add(vector_offset(threadIdx.x, j), losses);
      if (p.grad_input) store(p.grad_input + element, count, vectorized, input);
      if (p.grad_target.data) store(p.grad_target, element, count, vectorized, target);
      if constexpr (kReadsExtra<Terms>) {
        if (p.grad_logvar.data) store(p.grad_logvar, element, count, vectorized, logvar);
        logvar_total += (logvar[0] + logvar[1]) + (logvar[2] + logvar[3]);
      }
    }
    loss.end_step();
  }
  bool sums_logvar = p.logvar_sum.out.data != nullptr;
  if (!p.loss_sum.wanted() && !sums_logvar) return;
  loss.store_partial_sums();
  if (sums_logvar) store_partial_sum(p.logvar_sum, logvar_total);
  if (!is_last_block(p.ticket, gridDim.x)) return;
  loss.finish_sums();
  if (sums_logvar) finish_sum(p.logvar_sum);
}

template <class T>
struct ReconstructionSharedLogvarParams : ReconstructionParams<T> {
  ColumnSums columns;
  Workspace workspace;
};

// Computes the gradient of a log variance whose values are shared, for example one a channel: each value gets the sum over its elements.
// This is a second pass over input and target.
template <class T>
__global__ void __launch_bounds__(kThreads)
    reconstruction_shared_logvar_kernel(const __grid_constant__ ReconstructionSharedLogvarParams<T> p) {
  if (is_done(p)) return;
  auto gradient = [&](int64_t element) {
    float logvar = operand_value<T>(p.extra, value_index(p.extra, element));
    LossTerms<float> terms = Gaussian::terms(to_float(p.input[element]), load_one(p.target, p.target_dtype, element), logvar);
    float factor = scaled_grad_output(p, element);
    if (p.weight.data) factor *= operand_value<T>(p.weight, p.weight.full ? element : value_index(p.weight, element));
    return terms.logvar * factor;
  };
  auto finish = [&](int64_t column, double total) { store_one(p.grad_logvar, column, total); };
  sum_columns(p.columns, p.workspace, gradient, finish);
}

template <class T>
struct ReconstructionRescaleParams {
  T* grad;                   // (numel,)
  const float* grad_output;  // scalar
  float expected;            // the grad_output that the forward pass multiplied the gradient by
  bool aligned;              // the address of the gradient is that of whole vectors
  Chunks chunks;
};

// Multiplies a gradient by grad_output / expected, in place. It returns at once where the two are equal, which the device decides, so that
// the host need not wait for grad_output.
template <class T>
__global__ void __launch_bounds__(kThreads) reconstruction_rescale_kernel(const __grid_constant__ ReconstructionRescaleParams<T> p) {
  float grad_output = *p.grad_output;
  if (grad_output == p.expected) return;
  float factor = grad_output / p.expected;
  int64_t begin = blockIdx.x * p.chunks.elements, end = min64(begin + p.chunks.elements, p.chunks.numel);
  for (int64_t base = begin; base < end; base += kStep) {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = base + vector_offset(threadIdx.x, j);
      int count = vector_count(end - element);
      bool vectorized = p.aligned && count == kVector;
      float values[kVector];
      load(p.grad + element, count, vectorized, values);
      for (int k = 0; k < kVector; ++k) values[k] *= factor;
      store(p.grad + element, count, vectorized, values);
    }
  }
}

}  // namespace
}  // namespace fastvae
