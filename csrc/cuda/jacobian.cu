// The contractive penalty of a layer h = phi(x @ W.T + b) and its gradients on a GPU. The penalty of sample b and unit j is
// phi'(h_bj)^2 |W_j|^2, where the derivative phi' is computed from the hidden value h_bj.
//
// kernel                           grid                             reads                            writes
// jacobian_row_norms_kernel        (chunks of weight)               weight                           norms
// jacobian_penalty_kernel          (chunks of hidden)               hidden, norms                    the penalty
// jacobian_units_kernel            (groups, splits) of ColumnSums   hidden, norms, grad_output       grad_hidden, factors
// jacobian_weight_gradient_kernel  (chunks of weight)               weight, factors                  grad_weight
//
// Shapes and dtypes are beside the members of each kernel's parameters.
#include "../common/jacobian_formulas.h"
#include "loss.h"

namespace fastvae {
namespace {

template <class T>
struct JacobianRowNormsParams {
  const T* weight;       // (units, inputs)
  bool aligned;          // the address of weight is that of a whole vector
  int64_t numel, chunk;  // elements of weight, and of one block
  LossSum rows;          // into norms, (units,)
  unsigned* ticket;
};

// Sums the squares of each row of the weight, which are the elements of the LossAccumulator here. Each block handles one chunk of elements,
// wherever rows begin and end.
template <class T>
__global__ void __launch_bounds__(kThreads) jacobian_row_norms_kernel(const __grid_constant__ JacobianRowNormsParams<T> p) {
  LossAccumulator rows(p.rows, p.chunk);
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.numel);
  for (int64_t base = begin; base < end; base += kStep) {
    rows.begin_step(base);
    Values weights;
    load_values(p.weight, base + vector_offset(threadIdx.x, 0), p.numel, p.aligned, weights);
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
struct JacobianPenaltyParams {
  Activation activation;
  float alpha;
  const T* hidden;     // (batch, units)
  const float* norms;  // (units,)
  Divider units;
  bool aligned;          // the address of hidden is that of a whole vector
  int64_t numel, chunk;  // elements of hidden, and of one block
  T* elements;           // (batch, units), or nullptr where the penalty is reduced
  LossSum loss;          // into (batch,) or a scalar
  unsigned* ticket;
};

// Computes phi'(h_bj)^2 |W_j|^2, elementwise or reduced; each block handles one chunk of elements of hidden.
template <class T>
__global__ void __launch_bounds__(kThreads) jacobian_penalty_kernel(const __grid_constant__ JacobianPenaltyParams<T> p) {
  LossAccumulator loss(p.loss, p.chunk);
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.numel);
  for (int64_t base = begin; base < end; base += kStep) {
    loss.begin_step(base);
    int64_t first = base + vector_offset(threadIdx.x, 0);
    Values values;
    load_values(p.hidden, first, p.numel, p.aligned, values);
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
struct JacobianUnitsParams {
  Activation activation;
  float alpha;
  const T* hidden;     // (batch, units)
  const float* norms;  // (units,)
  Divider units;
  double scale;               // multiplies all gradients, and so does grad_output, which is one of the next two or absent
  const T* grad_elements;     // (batch, units)
  const float* grad_samples;  // (batch,) with grad_stride, or a scalar with stride 0
  int64_t grad_stride;
  T* grad_hidden;  // (batch, units), or nullptr where not requested
  float* factors;  // (units,), or nullptr where not requested: grad_weight[j] = factors[j] * weight[j]
  ColumnSums columns;
  Workspace workspace;
};

template <class T>
__device__ __forceinline__ float grad_output_at(const JacobianUnitsParams<T>& p, int64_t element, int64_t sample) {
  if (p.grad_elements) return to_float(p.grad_elements[element]);
  return p.grad_samples ? p.grad_samples[sample * p.grad_stride] : 1.0f;
}

// Computes grad_hidden elementwise, and for each unit the factor of its row of the weight: 2 * scale * the sum over the samples of
// grad_output * phi'(h)^2. Each block handles some columns of hidden and one split of the samples.
template <class T>
__global__ void __launch_bounds__(kThreads) jacobian_units_kernel(const __grid_constant__ JacobianUnitsParams<T> p) {
  auto weighted_square = [&](int64_t element) {
    int64_t sample = quotient(p.units, element), unit = element - sample * p.units.divisor;
    float grad_output = grad_output_at(p, element, sample);
    SquaredSlope<float> slope;
    with_activation(p.activation, [&](auto activation) { slope = activation.at(to_float(p.hidden[element]), p.alpha); });
    if (p.grad_hidden) p.grad_hidden[element] = from_float<T>(grad_output * (p.norms[unit] * static_cast<float>(p.scale)) * slope.change);
    return grad_output * slope.square;
  };
  auto finish = [&](int64_t unit, double total) {
    if (p.factors) p.factors[unit] = static_cast<float>(2.0 * p.scale * total);
  };
  sum_columns(p.columns, p.workspace, weighted_square, finish);
}

template <class T>
struct JacobianWeightGradientParams {
  const T* weight;       // (units, inputs)
  const float* factors;  // (units,)
  Divider inputs;
  bool aligned;          // the address of weight is that of a whole vector
  int64_t numel, chunk;  // elements of weight, and of one block
  T* grad_weight;        // (units, inputs)
};

// Multiplies each row of the weight by its factor; each block handles one chunk of elements.
template <class T>
__global__ void __launch_bounds__(kThreads) jacobian_weight_gradient_kernel(const __grid_constant__ JacobianWeightGradientParams<T> p) {
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.numel);
  for (int64_t base = begin; base < end; base += kStep) {
    int64_t first = base + vector_offset(threadIdx.x, 0);
    Values values;
    load_values(p.weight, first, p.numel, p.aligned, values);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = first + j * kNoiseLanes, unit = quotient(p.inputs, element), input = element - unit * p.inputs.divisor;
      int count = vector_count(p.numel - element);
      for (int k = 0; k < kVector; ++k) {
        if (k < count) values[j][k] *= p.factors[unit];
        bool row_ends = ++input == p.inputs.divisor;
        input = row_ends ? 0 : input;
        unit += row_ends;
      }
      store(p.grad_weight + element, count, count == kVector, values[j]);
    }
  }
}

// The layer whose Jacobian is penalised: hidden = phi(input @ weight.T + bias), of shapes (batch, units) and (units, inputs).
struct JacobianLayer {
  const Tensor &hidden, &weight;
  Activation activation;
  double alpha;

  int64_t samples() const { return hidden.size(0); }
  int64_t units() const { return hidden.size(1); }
};

void launch_row_norms(Launch& launch, const JacobianLayer& layer, const Tensor& norms) {
  if (layer.weight.numel() == 0) return launch.fill(norms, 0);
  dispatch(layer.weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    JacobianRowNormsParams<T> p{};
    p.weight = data_of<T>(layer.weight, copies);
    p.aligned = is_aligned(p.weight);
    p.numel = layer.weight.numel();
    LossPlan plan = plan_loss(launch, Reduction::sample, layer.weight, p.numel, norms);
    p.chunk = plan.chunks.elements;
    p.rows = plan.sum;
    p.ticket = plan.ticket;
    launch.run(jacobian_row_norms_kernel<T>, plan.chunks.blocks, 1, kThreads, p);
  });
}

void launch_penalty(Launch& launch, const JacobianLayer& layer, const Tensor& norms, Reduction reduction, const Tensor& penalty) {
  if (layer.hidden.numel() == 0) return launch.fill(penalty, 0);
  dispatch(layer.hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    JacobianPenaltyParams<T> p{};
    p.activation = layer.activation;
    p.alpha = static_cast<float>(layer.alpha);
    p.hidden = data_of<T>(layer.hidden, copies);
    p.norms = static_cast<const float*>(norms.const_data_ptr());
    p.units = divider(layer.units());
    p.aligned = is_aligned(p.hidden);
    p.numel = layer.hidden.numel();
    if (reduction == Reduction::none) p.elements = static_cast<T*>(penalty.mutable_data_ptr());
    LossPlan plan = plan_loss(launch, reduction, layer.hidden, p.numel, penalty);
    p.chunk = plan.chunks.elements;
    p.loss = plan.sum;
    p.ticket = plan.ticket;
    launch.run(jacobian_penalty_kernel<T>, plan.chunks.blocks, 1, kThreads, p);
  });
}

void launch_weight_gradient(const Launch& launch, const Tensor& weight, const Tensor& factors, const Tensor& grad_weight) {
  if (weight.numel() == 0) return;
  dispatch(weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    Chunks chunks = chunks_of(weight.numel(), kMaxBlocks);
    const T* data = data_of<T>(weight, copies);
    JacobianWeightGradientParams<T> p{data,
                                      static_cast<const float*>(factors.const_data_ptr()),
                                      divider(weight.size(1)),
                                      is_aligned(data),
                                      chunks.numel,
                                      chunks.elements,
                                      static_cast<T*>(grad_weight.mutable_data_ptr())};
    launch.run(jacobian_weight_gradient_kernel<T>, chunks.blocks, 1, kThreads, p);
  });
}

using TwoTensors = std::tuple<Tensor, Tensor>;

// Returns grad_hidden and grad_weight, empty where not requested: `scale` times the derivative of the reduced penalty, times grad_output
// where it is not nullptr.
TwoTensors gradients(Launch& launch, const JacobianLayer& layer, const Tensor& norms, Reduction reduction, double scale,
                     const Tensor* grad_output, bool with_hidden, bool with_weight) {
  Tensor grad_hidden = launch.empty_if(with_hidden, layer.hidden), grad_weight = launch.empty_if(with_weight, layer.weight);
  if (layer.units() == 0 || !(with_hidden || with_weight)) return {grad_hidden, grad_weight};
  Tensor factors = launch.empty({with_weight ? layer.units() : 0}, ScalarType::Float);
  dispatch(layer.hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    copies.reserve(3);
    JacobianUnitsParams<T> p{};
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
    launch.run(jacobian_units_kernel<T>, p.columns.groups, p.columns.splits, kThreads, p);
  });
  if (with_weight) launch_weight_gradient(launch, layer.weight, factors, grad_weight);
  return {grad_hidden, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jacobian_forward(const Tensor& hidden, const Tensor& weight, int64_t activation, double alpha,
                                                            int64_t reduction_number, double grad_scale, bool with_grad_hidden,
                                                            bool with_grad_weight) {
  auto reduction = static_cast<Reduction>(reduction_number);
  JacobianLayer layer{hidden, weight, static_cast<Activation>(activation), alpha};
  Launch launch(hidden);
  Tensor penalty = launch.empty_reduced(hidden, reduction), norms = launch.empty({weight.size(0)}, ScalarType::Float);
  launch_row_norms(launch, layer, norms);
  launch_penalty(launch, layer, norms, reduction, penalty);
  auto [grad_hidden, grad_weight] = gradients(launch, layer, norms, reduction, grad_scale, nullptr, with_grad_hidden, with_grad_weight);
  return {penalty, norms, grad_hidden, grad_weight};
}

TwoTensors jacobian_backward(const Tensor& grad_output, const Tensor& hidden, const Tensor& weight, const Tensor& norms, int64_t activation,
                             double alpha, int64_t reduction, bool with_grad_hidden, bool with_grad_weight) {
  JacobianLayer layer{hidden, weight, static_cast<Activation>(activation), alpha};
  Launch launch(hidden);
  return gradients(launch, layer, norms, static_cast<Reduction>(reduction), 1.0, &grad_output, with_grad_hidden, with_grad_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("jacobian_forward.cuda", TORCH_BOX(&jacobian_forward));
  m.impl("jacobian_backward.cuda", TORCH_BOX(&jacobian_backward));
}

}  // namespace fastvae
