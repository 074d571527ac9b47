// The gradients of vector quantization with respect to x.
//
// kernel                             grid              reads                                                writes
// codebook_quantize_backward_kernel  (blocks of rows)  x, codebook, indices, grad_quantized, grad_loss      grad_x
#pragma once

#include "../common/codebook_formulas.h"
#include "codebook_device.cuh"

namespace fastvae {

// grad_loss: one value for each element, for each sample, or for all. At most one pointer is set; without a grad_loss both are nullptr.
template <class T>
struct CodebookLossGradient {
  const T* elements = nullptr;     // (heads, rows, dim)
  const float* samples = nullptr;  // (batch,) with `stride`, or a scalar with stride 0
  int64_t stride = 0;
  Divider sample_rows{1, 0, 0};

  __device__ __forceinline__ explicit operator bool() const { return elements != nullptr || samples != nullptr; }
};

// grad_loss of a row, numbered over the heads, where it is not elementwise.
template <class T>
__device__ __forceinline__ float weight_of_row(const CodebookLossGradient<T>& gradient, int64_t row) {
  return gradient.samples ? gradient.samples[quotient(gradient.sample_rows, row) * gradient.stride] : 0.0f;
}

template <class T>
struct CodebookBackwardParams {
  const T* x;                   // (heads, rows, dim)
  CodebookView view;            // the strides of x
  CodebookView codebook;        // (heads, codes, dim)
  CodebookView grad_quantized;  // (heads, rows, dim), or no data
  const int64_t* indices;       // (heads, rows)
  CodebookLossGradient<T> gradient;
  float factor;  // multiplies grad_loss
  Divider rows;
  int64_t count, dim;              // count: rows of all heads
  int width;                       // threads that share a row
  bool aligned, gradient_aligned;  // all vectors of grad_x, and of an elementwise grad_loss, are aligned
  T* grad_x;                       // (heads, rows, dim)
};

// The operands of one row. The functions load kVector of its elements from d on.
template <class T>
struct CodebookRowOperands {
  const CodebookBackwardParams<T>& p;
  int64_t x_from, code_from, grad_from;

  __device__ __forceinline__ CodebookRowOperands(const CodebookBackwardParams<T>& p, int64_t number) : p(p) {
    int64_t head = quotient(p.rows, number), row = number - head * p.rows.divisor;
    x_from = p.view.offset(head, row);
    code_from = p.codebook.offset(head, p.indices[number]);
    grad_from = p.grad_quantized.offset(head, row);
  }

  __device__ __forceinline__ int count(int64_t d) const { return static_cast<int>(min64(p.dim - d, kVector)); }
  __device__ __forceinline__ void load_x(int64_t d, float (&to)[kVector]) const { load(p.x + x_from + d, count(d), p.view.aligned, to); }
  __device__ __forceinline__ void load_code(int64_t d, float (&to)[kVector]) const {
    load(p.codebook, code_from + d, count(d), p.codebook.aligned, to);
  }
  __device__ __forceinline__ void load_grad(int64_t d, float (&to)[kVector]) const {
    load(p.grad_quantized, grad_from + d, count(d), p.grad_quantized.aligned, to);
  }
};

// Computes the rotation of a row, see CodebookRotation. A group of threads shares the row; each gets the result.
template <class T>
__device__ __forceinline__ CodebookRotation<float> rotation_of(const CodebookRowOperands<T>& row, const ThreadGroup& group, bool exists) {
  const CodebookBackwardParams<T>& p = row.p;
  float x[kVector], code[kVector], grad[kVector], x_square = 0.0f, code_square = 0.0f;
  int64_t first = exists ? group.member * kVector : p.dim, step = group.width * kVector;
  for (int64_t d = first; d < p.dim; d += step) {
    row.load_x(d, x);
    row.load_code(d, code);
    for (int k = 0; k < kVector; ++k) {
      x_square = fma(x[k], x[k], x_square);
      code_square = fma(code[k], code[k], code_square);
    }
  }
  CodebookRotation<float> rotation = rotation_between(sqrt(warp_sum(x_square, group.width)), sqrt(warp_sum(code_square, group.width)));
  float square = 0.0f, h_dot_grad = 0.0f, code_dot_grad = 0.0f;
  for (int64_t d = first; d < p.dim; d += step) {
    row.load_x(d, x);
    row.load_code(d, code);
    row.load_grad(d, grad);
    for (int k = 0; k < kVector; ++k) {
      float h = halfway(rotation, x[k], code[k]);
      square = fma(h, h, square);
      h_dot_grad = fma(h, grad[k], h_dot_grad);
      code_dot_grad = fma(code[k], grad[k], code_dot_grad);
    }
  }
  square = warp_sum(square, group.width);
  h_dot_grad = warp_sum(h_dot_grad, group.width);
  set_gradient(rotation, sqrt(square), h_dot_grad, warp_sum(code_dot_grad, group.width));
  return rotation;
}

// Writes grad_x: grad_quantized, straight through or through the rotation trick, plus factor * grad_loss * (x - c).
template <class T, bool kRotation>
__global__ void __launch_bounds__(kThreads) codebook_quantize_backward_kernel(const __grid_constant__ CodebookBackwardParams<T> p) {
  ThreadGroup group(p.width);
  int64_t number = static_cast<int64_t>(blockIdx.x) * group.count + group.number;
  bool exists = number < p.count;
  CodebookRowOperands<T> row(p, exists ? number : 0);
  CodebookRotation<float> rotation{};
  if (kRotation) rotation = rotation_of(row, group, exists);
  if (!exists) return;
  float weight = weight_of_row(p.gradient, number);
  for (int64_t d = group.member * kVector; d < p.dim; d += group.width * kVector) {
    float x[kVector], code[kVector], out[kVector] = {}, weights[kVector] = {weight, weight, weight, weight};
    int64_t element = number * p.dim + d;
    row.load_x(d, x);
    row.load_code(d, code);
    if (p.grad_quantized.data) row.load_grad(d, out);
    if (p.gradient.elements) load(p.gradient.elements + element, row.count(d), p.gradient_aligned, weights);
    for (int k = 0; k < kVector; ++k) {
      if (kRotation) out[k] = rotate_back(rotation, out[k], halfway(rotation, x[k], code[k]), x[k]);
      if (p.gradient) out[k] = fma(p.factor * weights[k], x[k] - code[k], out[k]);
    }
    store(p.grad_x + element, row.count(d), p.aligned, out);
  }
}

}  // namespace fastvae
