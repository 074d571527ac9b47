// The kernels of Snake, y = x + gain * sin(frequency * x)^2. Each reads its tensors once; blocks and threads read them as those of group
// norm do where groups are split.
//
// kernel                            grid                              reads                                       writes
// snake_forward_kernel              (tiles * splits * batch)          input, frequency, gain                      output
// snake_backward_kernel             (tiles * splits * batch)          input, grad_output, frequency, gain         grad_input, partial_sums
// snake_parameter_gradients_kernel  (groups, splits) of ColumnSums    partial_sums, gain                          grad_frequency, grad_gain
//
// Shapes and dtypes are beside the members of SnakeParams and SnakeParameterGradientParams.
#pragma once

#include "../common/snake_formulas.h"
#include "group_norm_device.cuh"

namespace fastvae {
namespace {

// All tensors of T are (batch, channels, positions) in the layout of the launch.
template <class T>
struct SnakeParams {
  GroupNormBlocks blocks;
  bool aligned;                   // every vector of input, output and the gradients is whole and aligned
  NormParameter frequency, gain;  // (channels,)
  const T *input, *grad_output;
  T *output, *grad_input;
  float* partial_sums;  // (batch, splits, 2, channels): the sums of the gradients of frequency and gain, see SnakeGradients
};

struct SnakeChannel {
  float frequency, gain;
};

// Loads the parameters of the channels of a thread.
template <class T, bool kChannelsLast>
__device__ __forceinline__ void load_channels(const SnakeParams<T>& p, const GroupNormVectors<kChannelsLast>& vectors,
                                              SnakeChannel (&to)[kThreadChannels<kChannelsLast>]) {
#pragma unroll
  for (int c = 0; c < kThreadChannels<kChannelsLast>; ++c) {
    to[c] = {};
    if (c >= vectors.channel_count) continue;
    to[c] = {value_of(p.frequency, vectors.first_channel + c), value_of(p.gain, vectors.first_channel + c)};
  }
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) snake_forward_kernel(const __grid_constant__ SnakeParams<T> p) {
  GroupNormBlock block(p.blocks);
  GroupNormVectors<kChannelsLast> vectors = thread_vectors<kChannelsLast>(p.blocks, block.sample, block.tile, block.split, threadIdx.x);
  SnakeChannel channels[kThreadChannels<kChannelsLast>];
  load_channels(p, vectors, channels);
  for (; vectors.positions_left > 0; vectors.skip(kRuns)) {
    ThreadValues<kRuns> values;
    load_vectors<kRuns>(p.input, vectors, p.aligned, values);
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      for (int k = 0; k < kVector; ++k) {
        const SnakeChannel& channel = channels[thread_channel<kChannelsLast>(k)];
        values[j][k] = snake(values[j][k], channel.frequency, channel.gain);
      }
    store_vectors<kRuns>(p.output, vectors, p.aligned, values);
  }
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) snake_backward_kernel(const __grid_constant__ SnakeParams<T> p) {
  constexpr int kCount = kThreadChannels<kChannelsLast>;
  GroupNormBlock block(p.blocks);
  const GroupNormVectors<kChannelsLast> start = thread_vectors<kChannelsLast>(p.blocks, block.sample, block.tile, block.split, threadIdx.x);
  SnakeChannel channels[kCount];
  load_channels(p, start, channels);
  float of_frequency[kCount] = {}, of_gain[kCount] = {};
  for (GroupNormVectors<kChannelsLast> vectors = start; vectors.positions_left > 0; vectors.skip(kRuns)) {
    ThreadValues<kRuns> inputs, gradients;
    load_vectors<kRuns>(p.input, vectors, p.aligned, inputs);
    load_vectors<kRuns>(p.grad_output, vectors, p.aligned, gradients);
    // Elements that do not exist are 0, and so are their gradients.
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      for (int k = 0; k < kVector; ++k) {
        int c = thread_channel<kChannelsLast>(k);
        SnakeGradients<float> of_element = snake_gradients(inputs[j][k], gradients[j][k], channels[c].frequency, channels[c].gain);
        gradients[j][k] = of_element.input;
        of_frequency[c] += of_element.frequency;
        of_gain[c] += of_element.gain;
      }
    store_vectors<kRuns>(p.grad_input, vectors, p.aligned, gradients);
  }
  store_channel_sums<kChannelsLast>(p.blocks, block, start, of_frequency, of_gain, p.partial_sums);
}

struct SnakeParameterGradientParams {
  const float* partial_sums;  // (batch, splits, 2, channels), a matrix of batch * splits rows and 2 * channels columns
  NormParameter gain;         // (channels,)
  int64_t channels;
  ColumnSums columns;
  Workspace workspace;
  Output grad_frequency, grad_gain;  // (channels,)
};

__global__ void __launch_bounds__(kThreads) snake_parameter_gradients_kernel(const __grid_constant__ SnakeParameterGradientParams p) {
  auto term = [&](int64_t i) { return p.partial_sums[i]; };
  auto finish = [&](int64_t column, double total) {
    if (column < p.channels)
      store_one(p.grad_frequency, column, 2.0 * static_cast<double>(value_of(p.gain, column)) * total);
    else
      store_one(p.grad_gain, column - p.channels, total);
  };
  sum_columns(p.columns, p.workspace, term, finish);
}

}  // namespace
}  // namespace fastvae
