// The backward kernels of group norm. With xhat = (x - mean) * rstd and du = act'(u) * grad_output,
//   grad_weight = sum of du * xhat, grad_bias = sum of du (both over samples and positions),
//   grad_input  = du * weight * rstd + the part that flows through mean and rstd, see NormStatisticsGradient.
// A group that one block handles takes one kernel, which keeps input and du in shared memory and reads input and grad_output once; larger
// groups take three, which read them twice. The gradients of weight and bias come from the partial sums of either.
//
// kernel                                grid                      reads                                  writes
// group_norm_backward_group_kernel      (tiles * splits * batch)  input, grad_output, mean, rstd,        partial_sums, grad_input
//                                                                 weight, bias
// group_norm_gradient_sums_kernel       (tiles * splits * batch)  the same                               partial_sums
// group_norm_combine_gradients_kernel   (batch * groups)          partial_sums, mean, rstd, weight       statistics_gradient
// group_norm_backward_kernel            (tiles * splits * batch)  input, grad_output, mean, rstd,        grad_input
//                                                                 weight, bias, statistics_gradient
// group_norm_parameter_gradients_kernel (groups, splits) of       partial_sums, mean, rstd               grad_weight, grad_bias
//                                       ColumnSums
//
// Shapes and dtypes are beside the members of GroupNormProblem and GroupNormParameterGradientParams.
#pragma once

#include "group_norm_device.cuh"

namespace fastvae {
namespace {

// Replaces grad_output by du.
template <int kCount, bool kChannelsLast>
__device__ __forceinline__ void differentiate_values(NormActivation activation,
                                                     const ChannelAffine (&affines)[kThreadChannels<kChannelsLast>],
                                                     const ThreadValues<kCount>& inputs, ThreadValues<kCount>& gradients) {
  with_norm_activation(activation, [&](auto act) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      for (int k = 0; k < kVector; ++k) {
        const ChannelAffine& a = affines[thread_channel<kChannelsLast>(k)];
        gradients[j][k] = act.gradient(affine(inputs[j][k], a.centre, a.scale, a.offset), gradients[j][k]);
      }
  });
}

// The sums of du and of du * (x - centre) that one thread has for each of its channels.
template <bool kChannelsLast>
struct GradientSums {
  float du[kThreadChannels<kChannelsLast>] = {}, du_x[kThreadChannels<kChannelsLast>] = {};

  template <int kCount>
  __device__ __forceinline__ void add(const GroupNormVectors<kChannelsLast>& vectors,
                                      const ChannelAffine (&affines)[kThreadChannels<kChannelsLast>], const ThreadValues<kCount>& inputs,
                                      const ThreadValues<kCount>& gradients) {
    for_each_element<kCount>(vectors, [&](int j, int k, int c) {
      du[c] += gradients[j][k];
      du_x[c] = fma(gradients[j][k], inputs[j][k] - affines[c].centre, du_x[c]);
    });
  }

  // Adds the sums of the threads of the block, kMaxThreads at most, and stores them in `partial_sums`. Every thread of the block has to
  // call this.
  template <int kMaxThreads = kThreads>
  __device__ __forceinline__ void store(const GroupNormBlocks& b, const GroupNormBlock& block,
                                        const GroupNormVectors<kChannelsLast>& vectors, float* partial_sums) const {
    store_channel_sums<kChannelsLast, kMaxThreads>(b, block, vectors, du, du_x, partial_sums);
  }
};

// Sums du and du * (x - centre) for each channel of a tile over a split.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) group_norm_gradient_sums_kernel(const __grid_constant__ GroupNormParams<T> p) {
  GroupNormBlock block(p.blocks);
  const GroupNormVectors<kChannelsLast> start = thread_vectors<kChannelsLast>(p.blocks, block.sample, block.tile, block.split, threadIdx.x);
  ChannelAffine affines[kThreadChannels<kChannelsLast>];
  load_affines(p, block.sample, start, affines);
  GradientSums<kChannelsLast> sums;
  for (GroupNormVectors<kChannelsLast> vectors = start; vectors.positions_left > 0; vectors.skip(kRuns)) {
    ThreadValues<kRuns> inputs, gradients;
    load_vectors<kRuns>(p.input, vectors, p.aligned, inputs);
    load_vectors<kRuns>(p.grad_output, vectors, p.aligned, gradients);
    differentiate_values<kRuns, kChannelsLast>(p.activation, affines, inputs, gradients);
    sums.add(vectors, affines, inputs, gradients);
  }
  sums.store(p.blocks, block, start, p.partial_sums);
}

// The sums of weight * du and of weight * du * xhat.
struct WeightedGradientSums {
  double wdu = 0.0, wdu_xhat = 0.0;

  __device__ __forceinline__ void operator+=(const WeightedGradientSums& other) {
    wdu += other.wdu;
    wdu_xhat += other.wdu_xhat;
  }
};

// Adds the partial sums of a group, each times the weight of its channel, and stores the slope and intercept of the group; each block
// handles one group.
__global__ void __launch_bounds__(kThreads) group_norm_combine_gradients_kernel(const __grid_constant__ GroupNormProblem p) {
  GroupPartials partials(p);
  GroupNormStatistics s(p.moments, blockIdx.x);
  WeightedGradientSums sums = sum_strided<WeightedGradientSums>(threadIdx.x, partials.count, kThreads, [&](int64_t i) {
    auto index = partials.at(p, i);
    const float* slot = p.partial_sums + (partials.sample * p.blocks.splits + index.split) * 2 * p.blocks.channels + index.channel;
    double weight = value_of(p.weight, index.channel);
    return WeightedGradientSums{weight * slot[0], weight * sum_du_xhat_of(s.mean, s.centre, s.rstd, slot[0], slot[p.blocks.channels])};
  });
  double sum_wdu = block_sum(sums.wdu), sum_wdu_xhat = block_sum(sums.wdu_xhat);
  if (threadIdx.x != 0) return;
  NormStatisticsGradient gradient =
      statistics_gradient_of(s.mean, s.centre, s.rstd, sum_wdu, sum_wdu_xhat, static_cast<double>(p.groups.elements));
  p.statistics_gradient[2 * static_cast<int64_t>(blockIdx.x)] = static_cast<float>(gradient.slope);
  p.statistics_gradient[2 * static_cast<int64_t>(blockIdx.x) + 1] = static_cast<float>(gradient.intercept);
}

// A NormStatisticsGradient in the kernels' precision, for the group of one channel.
struct ChannelStatisticsGradient {
  float slope, intercept;
};

// Replaces du by grad_input.
template <int kCount, bool kChannelsLast>
__device__ __forceinline__ void propagate_values(const ChannelAffine (&affines)[kThreadChannels<kChannelsLast>],
                                                 const ChannelStatisticsGradient (&statistics)[kThreadChannels<kChannelsLast>],
                                                 const ThreadValues<kCount>& inputs, ThreadValues<kCount>& gradients) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    for (int k = 0; k < kVector; ++k) {
      int c = thread_channel<kChannelsLast>(k);
      gradients[j][k] = gradient_of_input(inputs[j][k], gradients[j][k], affines[c].centre, affines[c].scale, statistics[c].slope,
                                          statistics[c].intercept);
    }
}

// Computes grad_input of a tile and a split from input and grad_output, which it reads for the second time.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) group_norm_backward_kernel(const __grid_constant__ GroupNormParams<T> p) {
  GroupNormBlock block(p.blocks);
  GroupNormVectors<kChannelsLast> vectors = thread_vectors<kChannelsLast>(p.blocks, block.sample, block.tile, block.split, threadIdx.x);
  ChannelAffine affines[kThreadChannels<kChannelsLast>];
  load_affines(p, block.sample, vectors, affines);
  ChannelStatisticsGradient statistics[kThreadChannels<kChannelsLast>] = {};
#pragma unroll
  for (int c = 0; c < kThreadChannels<kChannelsLast>; ++c) {
    if (c >= vectors.channel_count) continue;
    const float* from = p.statistics_gradient + 2 * p.groups.of(block.sample, vectors.first_channel + c);
    statistics[c] = {from[0], from[1]};
  }
  for (; vectors.positions_left > 0; vectors.skip(kRuns)) {
    ThreadValues<kRuns> inputs, gradients;
    load_vectors<kRuns>(p.input, vectors, p.aligned, inputs);
    load_vectors<kRuns>(p.grad_output, vectors, p.aligned, gradients);
    differentiate_values<kRuns, kChannelsLast>(p.activation, affines, inputs, gradients);
    propagate_values<kRuns, kChannelsLast>(affines, statistics, inputs, gradients);
    store_vectors<kRuns>(p.grad_input, vectors, p.aligned, gradients);
  }
}

// The statistics' part of the gradient of the group that the block handles, from the sums of each thread. Every thread of the block has to
// call this.
template <bool kChannelsLast>
__device__ __forceinline__ ChannelStatisticsGradient statistics_gradient_of_group(const GroupNormProblem& p,
                                                                                  const GroupNormVectors<kChannelsLast>& vectors,
                                                                                  const GradientSums<kChannelsLast>& sums) {
  GroupNormStatistics s(p.moments, blockIdx.x);
  double weighted[2] = {};  // the sums of weight * du and of weight * du * xhat
#pragma unroll
  for (int c = 0; c < kThreadChannels<kChannelsLast>; ++c) {
    if (c >= vectors.channel_count) continue;
    double weight = value_of(p.weight, vectors.first_channel + c);
    weighted[0] += weight * sums.du[c];
    weighted[1] += weight * sum_du_xhat_of(s.mean, s.centre, s.rstd, sums.du[c], sums.du_x[c]);
  }
  group_sums(weighted);
  NormStatisticsGradient gradient =
      statistics_gradient_of(s.mean, s.centre, s.rstd, weighted[0], weighted[1], static_cast<double>(p.groups.elements));
  return {static_cast<float>(gradient.slope), static_cast<float>(gradient.intercept)};
}

// Computes grad_input and the partial sums of one group. Each thread keeps its first p.kept_vectors vectors of the input, and du in
// float32, in shared memory. It reads the others again, from the L2 cache where that has not replaced them yet; the results are the same.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxNormThreads, kNormBlocks)
    group_norm_backward_group_kernel(const __grid_constant__ GroupNormParams<T> p) {
  constexpr int kCount = kGroupGradientRuns<kChannelsLast>;
  FASTVAE_DYNAMIC_SHARED(memory);
  GroupNormBlock block(p.blocks);
  const GroupNormVectors<kChannelsLast> start = thread_vectors<kChannelsLast>(p.blocks, block.sample, block.tile, 0, threadIdx.x);
  ThreadSlots<T> input_slots(memory, p.kept_vectors);
  ThreadSlots<float> du_slots(input_slots.end(), p.kept_vectors);
  ChannelAffine affines[kThreadChannels<kChannelsLast>];
  load_group_affines(p, GroupNormStatistics(p.moments, blockIdx.x), start, affines);
  // Loads inputs, and replaces gradients by du.
  auto differentiate = [&](const GroupNormVectors<kChannelsLast>& vectors, Vector<T>(&stored)[kCount], ThreadValues<kCount>& inputs,
                           ThreadValues<kCount>& gradients) {
    load_stored(p.input, vectors, p.aligned, stored);
    load_vectors<kCount>(p.grad_output, vectors, p.aligned, gradients);
    convert_vectors(stored, inputs);
    differentiate_values<kCount, kChannelsLast>(p.activation, affines, inputs, gradients);
  };
  GradientSums<kChannelsLast> sums;
  for_each_step<kCount>(start, [&](int first, const GroupNormVectors<kChannelsLast>& vectors) {
    Vector<T> stored[kCount];
    ThreadValues<kCount> inputs, gradients;
    differentiate(vectors, stored, inputs, gradients);
    sums.add(vectors, affines, inputs, gradients);
    if (first >= p.kept_vectors) return;
    input_slots.store(first, stored);
    du_slots.store(first, gradients);
  });
  sums.template store<kMaxNormThreads>(p.blocks, block, start, p.partial_sums);
  ChannelStatisticsGradient gradient = statistics_gradient_of_group(p, start, sums);
  // All channels of the block belong to one group.
  ChannelStatisticsGradient statistics[kThreadChannels<kChannelsLast>];
#pragma unroll
  for (int c = 0; c < kThreadChannels<kChannelsLast>; ++c) statistics[c] = gradient;
  for_each_step<kCount>(start, [&](int first, const GroupNormVectors<kChannelsLast>& vectors) {
    Vector<T> stored[kCount];
    ThreadValues<kCount> inputs, gradients;
    if (first < p.kept_vectors) {
      input_slots.load(first, stored);
      du_slots.load(first, gradients);
      convert_vectors(stored, inputs);
    } else {
      differentiate(vectors, stored, inputs, gradients);
    }
    propagate_values<kCount, kChannelsLast>(affines, statistics, inputs, gradients);
    store_vectors<kCount>(p.grad_input, vectors, p.aligned, gradients);
  });
}

struct GroupNormParameterGradientParams {
  const float* partial_sums;  // (batch, splits, 2, channels), a matrix of batch * splits rows and 2 * channels columns
  GroupNormMoments moments;
  GroupNormGroups groups;
  int64_t channels;
  Divider splits, both_sums;  // splits of a sample; 2 * channels
  ColumnSums columns;
  Workspace workspace;
  Output grad_weight, grad_bias;  // (channels,); without data where not requested
};

// Sums the columns of `partial_sums`: those of du are the gradient of the bias; those of du * (x - centre), converted to du * xhat with the
// moments of each sample, are the gradient of the weight.
__global__ void __launch_bounds__(kThreads)
    group_norm_parameter_gradients_kernel(const __grid_constant__ GroupNormParameterGradientParams p) {
  auto term = [&](int64_t i) {
    int64_t row = quotient(p.both_sums, i), channel = i - row * p.both_sums.divisor - p.channels;
    if (channel < 0) return p.partial_sums[i];
    GroupNormStatistics s(p.moments, p.groups.of(quotient(p.splits, row), channel));
    return static_cast<float>(sum_du_xhat_of(s.mean, s.centre, s.rstd, p.partial_sums[i - p.channels], p.partial_sums[i]));
  };
  auto finish = [&](int64_t column, double total) {
    bool of_bias = column < p.channels;
    const Output& grad = of_bias ? p.grad_bias : p.grad_weight;
    if (grad.data) store_one(grad, of_bias ? column : column - p.channels, total);
  };
  sum_columns(p.columns, p.workspace, term, finish);
}

}  // namespace
}  // namespace fastvae
