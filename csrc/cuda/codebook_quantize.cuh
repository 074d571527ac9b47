// The outputs of a search beside the indices.
//
// kernel                    grid              reads                  writes
// codebook_distance_kernel  (blocks of rows)  x, codebook, indices   distance
// codebook_quantize_kernel  (chunks of x)     x, codebook, indices   quantized, loss or its sums
#pragma once

#include "codebook_device.cuh"

namespace fastvae {
namespace {

struct CodebookDistanceParams {
  CodebookView x, codebook;  // (heads, rows, dim) and (heads, codes, dim)
  Divider rows;
  int64_t count, dim;      // count: rows of all heads
  int width;               // threads that share a row
  const int64_t* indices;  // (heads, rows)
  float* distance;         // (heads, rows)
};

// Computes the squared distance of each row to its code in float32.
__global__ void __launch_bounds__(kThreads) codebook_distance_kernel(const __grid_constant__ CodebookDistanceParams p) {
  ThreadGroup group(p.width);
  int64_t number = static_cast<int64_t>(blockIdx.x) * group.count + group.number;
  float total = 0.0f;
  if (number < p.count) {
    int64_t head = quotient(p.rows, number), row = number - head * p.rows.divisor;
    int64_t x = p.x.offset(head, row), code = p.codebook.offset(head, p.indices[number]);
    for (int64_t d = group.member * kVector; d < p.dim; d += group.width * kVector) {
      int count = static_cast<int>(min64(p.dim - d, kVector));
      float a[kVector], b[kVector];
      load(p.x, x + d, count, p.x.aligned, a);
      load(p.codebook, code + d, count, p.codebook.aligned, b);
      for (int k = 0; k < kVector; ++k) total = fma(a[k] - b[k], a[k] - b[k], total);
    }
  }
  total = warp_sum(total, group.width);
  if (group.member == 0 && number < p.count) p.distance[number] = total;
}

template <class T>
struct CodebookQuantizeParams {
  const T* x;             // (heads, rows, dim)
  CodebookView view;      // the strides of x
  CodebookView codebook;  // (heads, codes, dim)
  Divider rows, dim;
  int64_t numel, chunk;    // elements of x, and of one block
  bool aligned;            // all vectors of x and of the codebook are aligned
  const int64_t* indices;  // (heads, rows)
  T* quantized;            // (heads, rows, dim)
  T* loss;                 // (heads, rows, dim), where the loss is not reduced, otherwise nullptr
  float weight;            // multiplies the elements of the loss
  LossSum loss_sum;        // into (batch,) or a scalar
  unsigned* ticket;
};

// The offsets of an element of x, numbered in row-major order, and of the same element of its code.
struct CodebookElement {
  int64_t x, code;

  template <class T>
  __device__ __forceinline__ CodebookElement(const CodebookQuantizeParams<T>& p, int64_t element) {
    int64_t number = quotient(p.dim, element), d = element - number * p.dim.divisor;
    int64_t head = quotient(p.rows, number), row = number - head * p.rows.divisor;
    x = p.view.offset(head, row) + d;
    code = p.codebook.offset(head, p.indices[number]) + d;
  }
};

// Loads `count` <= kVector elements of x and those of their codes, and fills up with 0.
template <class T>
__device__ __forceinline__ void load_with_codes(const CodebookQuantizeParams<T>& p, int64_t element, int count, float (&x)[kVector],
                                                float (&code)[kVector]) {
  if (p.aligned && count == kVector) {
    CodebookElement place(p, element);
    load(p.x + place.x, kVector, true, x);
    load(p.codebook, place.code, kVector, true, code);
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    x[k] = code[k] = 0.0f;
    if (k >= count) continue;
    CodebookElement place(p, element + k);
    x[k] = to_float(p.x[place.x]);
    code[k] = static_cast<float>(element_as_double(p.codebook, place.code));
  }
}

// Writes the codes of the indices, and the loss.
template <class T>
__global__ void __launch_bounds__(kThreads) codebook_quantize_kernel(const __grid_constant__ CodebookQuantizeParams<T> p) {
  LossAccumulator loss(p.loss_sum, p.chunk);
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.numel);
  for (int64_t base = begin; base < end; base += kStep) {
    loss.begin_step(base);
    float x[kRuns][kVector], code[kRuns][kVector];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = base + vector_offset(threadIdx.x, j);
      load_with_codes(p, element, static_cast<int>(max64(min64(p.numel - element, kVector), 0)), x[j], code[j]);
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int offset = vector_offset(threadIdx.x, j);
      int count = static_cast<int>(max64(min64(p.numel - base - offset, kVector), 0));
      store(p.quantized + base + offset, count, count == kVector, code[j]);
      float values[kVector];
      for (int k = 0; k < kVector; ++k) values[k] = p.weight * (x[j][k] - code[j][k]) * (x[j][k] - code[j][k]);
      if (p.loss) store(p.loss + base + offset, count, count == kVector, values);
      loss.add(offset, values);
    }
    loss.end_step();
  }
  if (!p.loss_sum.wanted()) return;
  loss.store_partial_sums();
  if (is_last_block(p.ticket, gridDim.x)) loss.finish_sums();
}

}  // namespace
}  // namespace fastvae
