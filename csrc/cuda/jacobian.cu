// The contractive penalty and the epilogues of the Gram form on a GPU. Every sum is one over rows or over columns of a matrix, which the
// kernels read as it lies in memory.
#include "../common/jacobian.h"
#include "loss.h"

namespace fastvae {
namespace {

template <class T>
struct NormParams {
  const T* weight;
  bool vector;
  int64_t numel, chunk;
  LossSum rows;
  unsigned* ticket;
};

// The squared norms of the weight's rows.
template <class T>
__global__ void __launch_bounds__(kThreads) norms_kernel(const __grid_constant__ NormParams<T> p) {
  LossAccumulator rows(p.rows, p.chunk);
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.numel);
  for (int64_t base = begin; base < end; base += kStep) {
    rows.begin_step(base);
    Values weights;
    load_values(p.weight, base + vector_offset(threadIdx.x, 0), p.numel, p.vector, weights);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      for (int k = 0; k < kVector; ++k) weights[j][k] *= weights[j][k];
      rows.add(vector_offset(threadIdx.x, j), weights[j]);
    }
    rows.end_step();
  }
  rows.store_partial_sums();
  if (is_last_block(p.ticket, gridDim.x)) rows.finish_sums();
}

template <class T>
struct PenaltyParams {
  Activation activation;
  float alpha;
  const T* hidden;
  const float* norms;
  Divider units;
  bool vector;
  int64_t numel, chunk;
  T* elements;
  LossSum loss;
  unsigned* ticket;
};

// phi'(h_bj)^2 |W_j|^2, elementwise or reduced.
template <class T>
__global__ void __launch_bounds__(kThreads) penalty_kernel(const __grid_constant__ PenaltyParams<T> p) {
  LossAccumulator loss(p.loss, p.chunk);
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.numel);
  for (int64_t base = begin; base < end; base += kStep) {
    loss.begin_step(base);
    int64_t first = base + vector_offset(threadIdx.x, 0);
    Values values;
    load_values(p.hidden, first, p.numel, p.vector, values);
    with_activation(p.activation, [&](auto activation) {
#pragma unroll
      for (int j = 0; j < kRuns; ++j)
        for (int k = 0; k < kVector; ++k) values[j][k] = activation.at(values[j][k], p.alpha).square;
    });
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = first + j * kNoiseLanes, unit = remainder(p.units, element);
      int count = vector_count(p.numel - element);
      for (int k = 0; k < kVector; ++k) {
        values[j][k] = k < count ? values[j][k] * p.norms[unit] : 0.0f;
        unit = unit + 1 == p.units.divisor ? 0 : unit + 1;
      }
      if (p.elements) store(p.elements + element, count, count == kVector, values[j]);
      loss.add(vector_offset(threadIdx.x, j), values[j]);
    }
    loss.end_step();
  }
  if (!p.loss.wanted()) return;
  loss.store_partial_sums();
  if (is_last_block(p.ticket, gridDim.x)) loss.finish_sums();
}

template <class T>
struct SlopeParams {
  Activation activation;
  float alpha;
  const T* hidden;
  const float* norms;
  Divider units;
  // The gradients are multiplied with `scale` and with the incoming gradient: elementwise, or one a sample (stride 0: one for all).
  double scale;
  const T* grad_elements;
  const float* grad_samples;
  int64_t grad_stride;
  T* grad_hidden;
  float* factors;
  ColumnSums columns;
  Workspace workspace;
};

template <class T>
__device__ __forceinline__ float incoming_gradient(const SlopeParams<T>& p, int64_t element, int64_t sample) {
  if (p.grad_elements) return widen(p.grad_elements[element]);
  return p.grad_samples ? p.grad_samples[sample * p.grad_stride] : 1.0f;
}

// The gradient of the hidden values, and what the rows of the weight have to be multiplied with to be their gradients.
template <class T>
__global__ void __launch_bounds__(kThreads) slopes_kernel(const __grid_constant__ SlopeParams<T> p) {
  auto square = [&](int64_t element) {
    int64_t sample = quotient(p.units, element), unit = element - sample * p.units.divisor;
    float incoming = incoming_gradient(p, element, sample);
    SquaredSlope<float> slope;
    with_activation(p.activation, [&](auto activation) { slope = activation.at(widen(p.hidden[element]), p.alpha); });
    if (p.grad_hidden) p.grad_hidden[element] = narrow<T>(incoming * (p.norms[unit] * static_cast<float>(p.scale)) * slope.change);
    return incoming * slope.square;
  };
  auto finish = [&](int64_t unit, double total) {
    if (p.factors) p.factors[unit] = static_cast<float>(2.0 * p.scale * total);
  };
  sum_columns(p.columns, p.workspace, square, finish);
}

template <class T>
struct WeightGradientParams {
  const T* weight;
  const float* factors;
  Divider inputs;
  bool vector;
  int64_t numel, chunk;
  T* grad_weight;
};

// Each row of the weight times its factor.
template <class T>
__global__ void __launch_bounds__(kThreads) weight_gradient_kernel(const __grid_constant__ WeightGradientParams<T> p) {
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.numel);
  for (int64_t base = begin; base < end; base += kStep) {
    int64_t first = base + vector_offset(threadIdx.x, 0);
    Values values;
    load_values(p.weight, first, p.numel, p.vector, values);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = first + j * kNoiseLanes, unit = quotient(p.inputs, element), input = element - unit * p.inputs.divisor;
      int count = vector_count(p.numel - element);
      for (int k = 0; k < kVector; ++k) {
        if (k < count) values[j][k] *= p.factors[unit];
        bool ends = ++input == p.inputs.divisor;
        input = ends ? 0 : input;
        unit += ends;
      }
      store(p.grad_weight + element, count, count == kVector, values[j]);
    }
  }
}

// The scaled matrices of the Gram form: outer[b, r] left[(b,) r, k] inner[b, k].
struct Matrices {
  const float *left, *inner, *outer;
  Divider rows, columns, matrix;  // r, k and (r, k)
  int64_t numel;
  bool left_is_batched, vector;
};

// Where an element (b, r, k) lies in each of them.
struct Entry {
  int64_t row, left, inner;  // (b, r) is the row

  __device__ __forceinline__ Entry(const Matrices& m, int64_t element) {
    row = quotient(m.columns, element);
    int64_t column = element - row * m.columns.divisor;
    left = m.left_is_batched ? element : remainder(m.matrix, element);
    inner = quotient(m.rows, row) * m.columns.divisor + column;
  }
};

// Vectors of left and inner, whose elements are side by side within a row, and the outer factor of each element.
struct Factors {
  float left[kVector], inner[kVector], outer[kVector];

  __device__ __forceinline__ Factors(const Matrices& m, int64_t element, int count) {
    if (m.vector && count == kVector) {
      Entry entry(m, element);
      load(m.left + entry.left, count, true, left);
      load(m.inner + entry.inner, count, true, inner);
      for (int k = 0; k < kVector; ++k) outer[k] = m.outer[entry.row];
      return;
    }
    for (int k = 0; k < kVector; ++k) {
      left[k] = inner[k] = outer[k] = 0.0f;
      if (k >= count) continue;
      Entry entry(m, element + k);
      left[k] = m.left[entry.left];
      inner[k] = m.inner[entry.inner];
      outer[k] = m.outer[entry.row];
    }
  }
};

struct GramScaleParams {
  Matrices matrices;
  int64_t chunk;
  float* out;
};

__global__ void __launch_bounds__(kThreads) gram_scale_kernel(const __grid_constant__ GramScaleParams p) {
  int64_t numel = p.matrices.numel, begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, numel);
  for (int64_t base = begin; base < end; base += kStep) {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = base + vector_offset(threadIdx.x, j);
      int count = vector_count(numel - element);
      Factors factors(p.matrices, element, count);
      float values[kVector];
      for (int k = 0; k < kVector; ++k) values[k] = factors.outer[k] * factors.left[k] * factors.inner[k];
      store(p.out + element, count, count == kVector, values);
    }
  }
}

struct GramRowParams {
  Matrices matrices;
  const float* product;
  bool vector;  // of the product
  int64_t chunk;
  LossSum dots;
  unsigned* ticket;
  float* grad_left;  // where left has a batch dimension
};

// The dot products of the rows, and the gradient of a left matrix that is not shared.
__global__ void __launch_bounds__(kThreads) gram_rows_kernel(const __grid_constant__ GramRowParams p) {
  LossAccumulator dots(p.dots, p.chunk);
  int64_t numel = p.matrices.numel, begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, numel);
  for (int64_t base = begin; base < end; base += kStep) {
    dots.begin_step(base);
    int64_t first = base + vector_offset(threadIdx.x, 0);
    Values products;
    load_values(p.product, first, numel, p.vector, products);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = first + j * kNoiseLanes;
      int count = vector_count(numel - element);
      Factors factors(p.matrices, element, count);
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

struct GramColumnParams {
  Matrices matrices;
  const float* product;
  ColumnSums sums;
  Divider columns;  // of the sums
  Workspace workspace;
  float* grad;
};

// Sums over one of the three dimensions: over r the gradient of inner, over b that of a left matrix that all samples share.
template <bool kOverRows>
__global__ void __launch_bounds__(kThreads) gram_columns_kernel(const __grid_constant__ GramColumnParams p) {
  const Matrices& m = p.matrices;
  auto term = [&](int64_t index) {
    // The element (b, r, k) from its numbering (r, b, k) or (b, r, k).
    int64_t element = index;
    if (kOverRows) {
      int64_t row = quotient(p.columns, index), column = index - row * p.columns.divisor, sample = quotient(m.columns, column);
      element = (sample * m.rows.divisor + row) * m.columns.divisor + (column - sample * m.columns.divisor);
    }
    Entry entry(m, element);
    return m.outer[entry.row] * p.product[element] * (kOverRows ? m.left[entry.left] : m.inner[entry.inner]);
  };
  auto finish = [&](int64_t column, double total) { p.grad[column] = static_cast<float>(total); };
  sum_columns(p.sums, p.workspace, term, finish);
}

template <class T>
const T* data_of(const Tensor& tensor, Copies& copies) {
  return static_cast<const T*>(readable(tensor, copies).const_data_ptr());
}

Tensor empty_if(const Launch& launch, bool wanted, const Tensor& like) {
  return launch.empty(wanted ? shape_of(like) : std::vector<int64_t>{0}, like.scalar_type());
}

// What both passes know of a layer.
struct Layer {
  const Tensor &hidden, &weight;
  Activation activation;
  double alpha;

  int64_t samples() const { return hidden.size(0); }
  int64_t units() const { return hidden.size(1); }
};

void squared_norms(Launch& launch, const Layer& layer, const Tensor& norms) {
  if (layer.weight.numel() == 0) return launch.fill(norms, 0);
  dispatch(layer.weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    NormParams<T> p{};
    p.weight = data_of<T>(layer.weight, copies);
    p.vector = is_aligned(p.weight);
    p.numel = layer.weight.numel();
    LossPlan plan = plan_loss(launch, Reduction::sample, layer.weight, p.numel, norms);
    p.chunk = plan.chunks.elements;
    p.rows = plan.sum;
    p.ticket = plan.ticket;
    launch.run(norms_kernel<T>, plan.chunks.blocks, 1, kThreads, p);
  });
}

void penalties(Launch& launch, const Layer& layer, const Tensor& norms, Reduction reduction, const Tensor& penalty) {
  if (layer.hidden.numel() == 0) return launch.fill(penalty, 0);
  dispatch(layer.hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    PenaltyParams<T> p{};
    p.activation = layer.activation;
    p.alpha = static_cast<float>(layer.alpha);
    p.hidden = data_of<T>(layer.hidden, copies);
    p.norms = static_cast<const float*>(norms.const_data_ptr());
    p.units = divider(layer.units());
    p.vector = is_aligned(p.hidden);
    p.numel = layer.hidden.numel();
    if (reduction == Reduction::none) p.elements = static_cast<T*>(penalty.mutable_data_ptr());
    LossPlan plan = plan_loss(launch, reduction, layer.hidden, p.numel, penalty);
    p.chunk = plan.chunks.elements;
    p.loss = plan.sum;
    p.ticket = plan.ticket;
    launch.run(penalty_kernel<T>, plan.chunks.blocks, 1, kThreads, p);
  });
}

void scale_rows(const Launch& launch, const Tensor& weight, const Tensor& factors, const Tensor& grad_weight) {
  if (weight.numel() == 0) return;
  dispatch(weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    Chunks chunks = chunks_of(weight.numel(), kMaxBlocks);
    const T* data = data_of<T>(weight, copies);
    WeightGradientParams<T> p{data,
                              static_cast<const float*>(factors.const_data_ptr()),
                              divider(weight.size(1)),
                              is_aligned(data),
                              chunks.numel,
                              chunks.elements,
                              static_cast<T*>(grad_weight.mutable_data_ptr())};
    launch.run(weight_gradient_kernel<T>, chunks.blocks, 1, kThreads, p);
  });
}

using TwoTensors = std::tuple<Tensor, Tensor>;

// `scale` times the gradients, times the incoming gradient where there is one.
TwoTensors gradients(Launch& launch, const Layer& layer, const Tensor& norms, Reduction reduction, double scale, const Tensor* grad_output,
                     bool with_hidden, bool with_weight) {
  Tensor grad_hidden = empty_if(launch, with_hidden, layer.hidden), grad_weight = empty_if(launch, with_weight, layer.weight);
  if (layer.units() == 0 || !(with_hidden || with_weight)) return {grad_hidden, grad_weight};
  Tensor factors = launch.empty({with_weight ? layer.units() : 0}, ScalarType::Float);
  dispatch(layer.hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    copies.reserve(3);
    SlopeParams<T> p{};
    p.activation = layer.activation;
    p.alpha = static_cast<float>(layer.alpha);
    p.hidden = data_of<T>(layer.hidden, copies);
    p.norms = data_of<float>(norms, copies);
    p.units = divider(layer.units());
    p.scale = scale * reduction_scale(reduction, layer.samples(), layer.hidden.numel());
    if (grad_output && reduction == Reduction::none) {
      p.grad_elements = data_of<T>(*grad_output, copies);
    } else if (grad_output) {
      p.grad_samples = static_cast<const float*>(grad_output->const_data_ptr());
      p.grad_stride = reduction == Reduction::sample ? grad_output->stride(0) : 0;
    }
    if (with_hidden) p.grad_hidden = static_cast<T*>(grad_hidden.mutable_data_ptr());
    if (with_weight) p.factors = static_cast<float*>(factors.mutable_data_ptr());
    p.columns = column_sums_of(layer.samples(), layer.units(), 1);
    p.workspace = launch.workspace();
    launch.run(slopes_kernel<T>, p.columns.groups, p.columns.splits, kThreads, p);
  });
  if (with_weight) scale_rows(launch, layer.weight, factors, grad_weight);
  return {grad_hidden, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jacobian_forward(const Tensor& hidden, const Tensor& weight, int64_t activation, double alpha,
                                                            int64_t reduction_number, double grad_scale, bool with_grad_hidden,
                                                            bool with_grad_weight) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Layer layer{hidden, weight, static_cast<Activation>(activation), alpha};
  Launch launch(hidden);
  Tensor penalty = empty_reduced(launch, hidden, reduction), norms = launch.empty({weight.size(0)}, ScalarType::Float);
  squared_norms(launch, layer, norms);
  penalties(launch, layer, norms, reduction, penalty);
  auto [grad_hidden, grad_weight] = gradients(launch, layer, norms, reduction, grad_scale, nullptr, with_grad_hidden, with_grad_weight);
  return {penalty, norms, grad_hidden, grad_weight};
}

TwoTensors jacobian_backward(const Tensor& grad_output, const Tensor& hidden, const Tensor& weight, const Tensor& norms, int64_t activation,
                             double alpha, int64_t reduction, bool with_grad_hidden, bool with_grad_weight) {
  Layer layer{hidden, weight, static_cast<Activation>(activation), alpha};
  Launch launch(hidden);
  return gradients(launch, layer, norms, static_cast<Reduction>(reduction), 1.0, &grad_output, with_grad_hidden, with_grad_weight);
}

Matrices matrices_of(const Tensor& left, const Tensor& inner, const Tensor& outer, Copies& copies) {
  STD_TORCH_CHECK(left.scalar_type() == ScalarType::Float, "fastvae: the CUDA kernels of the Gram form take float32");
  int64_t rows = outer.size(1), columns = inner.size(1);
  Matrices m{data_of<float>(left, copies),
             data_of<float>(inner, copies),
             data_of<float>(outer, copies),
             divider(rows),
             divider(columns),
             divider(rows * columns),
             outer.numel() * columns,
             left.dim() == 3,
             false};
  m.vector = columns % kVector == 0 && is_aligned(m.left) && is_aligned(m.inner);
  return m;
}

Tensor jacobian_gram_scale(const Tensor& left, const Tensor& inner, const Tensor& outer) {
  Launch launch(left);
  Tensor scaled = launch.empty({outer.numel(), inner.size(1)}, ScalarType::Float);
  Copies copies;
  copies.reserve(3);
  GramScaleParams p{matrices_of(left, inner, outer, copies), 0, static_cast<float*>(scaled.mutable_data_ptr())};
  Chunks chunks = chunks_of(p.matrices.numel, kMaxBlocks);
  p.chunk = chunks.elements;
  if (chunks.blocks > 0) launch.run(gram_scale_kernel, chunks.blocks, 1, kThreads, p);
  return scaled;
}

// Sums over `count` of one dimension into the elements of `grad`.
template <bool kOverRows>
void sum_dimension(Launch& launch, const Matrices& m, const float* product, int64_t count, const Tensor& grad) {
  int64_t columns = grad.numel();
  GramColumnParams p{
      m, product, column_sums_of(count, columns, 1), divider(columns), launch.workspace(), static_cast<float*>(grad.mutable_data_ptr())};
  launch.run(gram_columns_kernel<kOverRows>, p.sums.groups, p.sums.splits, kThreads, p);
}

std::tuple<Tensor, Tensor, Tensor> jacobian_gram_reduce(const Tensor& left, const Tensor& inner, const Tensor& outer, const Tensor& product,
                                                        bool with_grad) {
  Launch launch(left);
  Tensor dots = launch.empty(shape_of(outer), ScalarType::Float);
  Tensor grad_inner = empty_if(launch, with_grad, inner), grad_left = empty_if(launch, with_grad, left);
  Copies copies;
  copies.reserve(4);
  Matrices m = matrices_of(left, inner, outer, copies);
  if (m.numel == 0) {
    for (const Tensor& tensor : {dots, grad_inner, grad_left}) launch.fill(tensor, 0);
    return {dots, grad_inner, grad_left};
  }
  const Tensor& rows = readable(product, copies);
  GramRowParams p{};
  p.matrices = m;
  p.product = static_cast<const float*>(rows.const_data_ptr());
  p.vector = is_aligned(p.product);
  LossPlan plan = plan_loss(launch, Reduction::sample, rows, m.numel, dots);
  p.chunk = plan.chunks.elements;
  p.dots = plan.sum;
  p.ticket = plan.ticket;
  if (with_grad && m.left_is_batched) p.grad_left = static_cast<float*>(grad_left.mutable_data_ptr());
  launch.run(gram_rows_kernel, plan.chunks.blocks, 1, kThreads, p);
  if (with_grad) {
    sum_dimension<true>(launch, m, p.product, m.rows.divisor, grad_inner);
    if (!m.left_is_batched) sum_dimension<false>(launch, m, p.product, outer.size(0), grad_left);
  }
  return {dots, grad_inner, grad_left};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("jacobian_forward.cuda", TORCH_BOX(&jacobian_forward));
  m.impl("jacobian_backward.cuda", TORCH_BOX(&jacobian_backward));
  m.impl("jacobian_gram_scale.cuda", TORCH_BOX(&jacobian_gram_scale));
  m.impl("jacobian_gram_reduce.cuda", TORCH_BOX(&jacobian_gram_reduce));
}

}  // namespace fastvae
