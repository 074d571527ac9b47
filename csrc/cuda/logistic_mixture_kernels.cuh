// Mixtures of discretized logistics on a GPU. One launch can write the loss and its gradient.
//
// kernel                    grid                                 reads                          writes
// logistic_mixture_kernel   (columns, splits) of ColumnSums      input, target, grad_output     loss, grad_input
//
// Both passes launch it: forward with a loss to reduce, backward with grad_output. A thread handles one position at a time: adjacent
// threads read adjacent numbers of each parameter. The gradient needs the sum over all components first, so a second loop over the
// components computes their probabilities again, from parameters that are in the caches by then.
#pragma once

#include "../common/logistic_mixture_formulas.h"
#include "reduce.cuh"

namespace fastvae {
namespace {

// Pointers are nullptr where the tensor is absent or not requested.
template <class T>
struct LogisticMixtureParams {
  LogisticMixtureSizes sizes;
  const T* input;      // (batch, parameters, positions)
  const void* target;  // (batch, channels, positions) of target_dtype
  DType target_dtype;
  Divider positions;
  ColumnSums columns;  // a column has the positions whose losses one sum adds: a sample's, or all

  T* loss;          // (batch, positions), where the loss is not reduced
  Output loss_sum;  // (columns,), its sums times loss_scale
  float loss_scale;
  Workspace workspace;

  float scale;             // multiplies the gradient, and so does grad_output, which is one of the next two or absent
  const T* grad_elements;  // (batch, positions)
  const float* grad_rows;  // (batch,) with grad_stride, or a scalar with stride 0
  int64_t grad_stride;
  T* grad_input;  // (batch, parameters, positions)

  bool is_written;  // the forward pass wrote the gradient for a grad_output of `expected`: nothing is left to do where it is that
  float expected;
};

// The sum of terms factor * exp(exponent), as total * exp(largest).
struct ExponentialSum {
  float largest = -3.4028234e38f;  // finite, so that -inf may be added first
  float total = 0.0f;

  __device__ __forceinline__ void add(float exponent, float factor) {
    float raised = exponent > largest ? exponent : largest;
    total = fma(total, exp(largest - raised), factor * exp(exponent - raised));
    largest = raised;
  }
  __device__ __forceinline__ float logarithm() const { return largest + log(total); }
};

// The probability of a component times its weight, before the softmax's denominator, is exp(linear) * ratio.
struct MixtureComponent {
  float logit, linear, ratio;
};

// One position of a sample.
template <class T>
struct MixturePosition {
  const LogisticMixtureParams<T>& p;
  int64_t first_parameter, first_channel;  // offsets in input and target

  __device__ __forceinline__ MixturePosition(const LogisticMixtureParams<T>& p, int64_t sample, int64_t position) : p(p) {
    first_parameter = sample * p.sizes.parameters() * p.sizes.positions + position;
    first_channel = sample * p.sizes.channels * p.sizes.positions + position;
  }

  __device__ __forceinline__ int64_t offset(int64_t row) const { return first_parameter + row * p.sizes.positions; }
  __device__ __forceinline__ float parameter(int64_t row) const { return to_float(p.input[offset(row)]); }
  __device__ __forceinline__ Pixel<float> pixel(int64_t channel) const {
    return pixel_of(load_one(p.target, p.target_dtype, first_channel + channel * p.sizes.positions));
  }

  __device__ __forceinline__ LogisticBin<float> bin(int64_t m, int64_t channel) const {
    float mean = parameter(p.sizes.mean(m, channel));
    for (int64_t before = 0; before < channel; ++before)
      mean = fma(tanh_of(parameter(p.sizes.coefficient(m, channel, before))).value, pixel(before).value, mean);
    return logistic_bin(pixel(channel), mean, parameter(p.sizes.log_scale(m, channel)));
  }

  __device__ __forceinline__ MixtureComponent component(int64_t m) const {
    float logit = p.sizes.has_logits() ? parameter(m) : 0.0f, linear = logit, ratio = 1.0f;
    for (int64_t channel = 0; channel < p.sizes.channels; ++channel) {
      LogisticBin<float> one = bin(m, channel);
      linear += one.linear;
      ratio *= one.ratio;
      if (channel % kRatiosPerLog != kRatiosPerLog - 1) continue;
      linear += log(ratio);
      ratio = 1.0f;
    }
    return {logit, linear, ratio};
  }

  __device__ __forceinline__ void store_gradient(int64_t row, float value) const { p.grad_input[offset(row)] = from_float<T>(value); }
};

// grad_output of a position times the scale of the reduction.
template <class T>
__device__ __forceinline__ float scaled_grad_output(const LogisticMixtureParams<T>& p, int64_t element, int64_t sample) {
  if (p.grad_elements) return to_float(p.grad_elements[element]) * p.scale;
  return p.grad_rows ? p.grad_rows[sample * p.grad_stride] * p.scale : p.scale;
}

// Writes `factor` times the gradient of the loss of one position, given the logarithms of the sums over all components.
template <class T>
__device__ __forceinline__ void store_gradients(const MixturePosition<T>& at, float log_total, float log_logits_total, float factor) {
  const LogisticMixtureSizes& sizes = at.p.sizes;
  for (int64_t m = 0; m < sizes.mixtures; ++m) {
    MixtureComponent component = at.component(m);
    float share = -factor * exp(component.linear - log_total) * component.ratio;
    if (sizes.has_logits()) at.store_gradient(m, fma(factor, exp(component.logit - log_logits_total), share));
    for (int64_t channel = 0; channel < sizes.channels; ++channel) {
      LogisticBin<float> bin = at.bin(m, channel);
      float by_mean = share * bin.grad_mean;
      at.store_gradient(sizes.mean(m, channel), by_mean);
      at.store_gradient(sizes.log_scale(m, channel), share * bin.grad_log_scale);
      for (int64_t before = 0; before < channel; ++before) {
        int64_t row = sizes.coefficient(m, channel, before);
        at.store_gradient(row, by_mean * tanh_of(at.parameter(row)).derivative * at.pixel(before).value);
      }
    }
  }
}

// Writes what is requested of one position, and returns its loss.
template <class T>
__device__ __forceinline__ float handle_position(const LogisticMixtureParams<T>& p, int64_t element) {
  int64_t sample = quotient(p.positions, element);
  MixturePosition<T> at(p, sample, element - sample * p.sizes.positions);
  ExponentialSum sum, logits;
  for (int64_t m = 0; m < p.sizes.mixtures; ++m) {
    MixtureComponent component = at.component(m);
    sum.add(component.linear, component.ratio);
    logits.add(component.logit, 1.0f);
  }
  float log_total = sum.logarithm(), log_logits_total = logits.logarithm(), loss = log_logits_total - log_total;
  if (p.loss) p.loss[element] = from_float<T>(loss);
  if (p.grad_input) store_gradients(at, log_total, log_logits_total, scaled_grad_output(p, element, sample));
  return loss;
}

// At least four blocks run on a multiprocessor at a time, which leaves a thread 128 registers. Without that number nvcc 13.0 spills on
// sm_100 and sm_120, to make room for more blocks.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) logistic_mixture_kernel(const __grid_constant__ LogisticMixtureParams<T> p) {
  if (p.is_written && *p.grad_rows == p.expected) return;
  const ColumnSums& c = p.columns;
  int64_t begin = blockIdx.y * c.rows_per_split, end = min64(begin + c.rows_per_split, c.rows);
  float total = 0.0f;
  for (int64_t row = begin + threadIdx.x; row < end; row += kThreads) total += handle_position(p, column_element(c, row, blockIdx.x));
  if (!p.loss_sum.data) return;
  finish_columns(c, p.workspace, total, [&](int64_t column, double sum) { store_one(p.loss_sum, column, sum * p.loss_scale); });
}

}  // namespace
}  // namespace fastvae
