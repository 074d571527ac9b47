// The forward kernels of group norm, output = act((input - mean) * rstd * weight + bias). A group that one block can keep in registers
// takes one kernel, which reads the input once; other groups take three, which read it twice.
//
// kernel                               grid                      reads                                   writes
// group_norm_forward_group_kernel      (tiles * splits * batch)  input, weight, bias                     mean, rstd, output
// group_norm_moments_kernel            (tiles * splits * batch)  input                                   partial_moments
// group_norm_combine_moments_kernel    (batch * groups)          partial_moments                         mean, rstd
// group_norm_forward_kernel            (tiles * splits * batch)  input, mean, rstd, weight, bias         output
//
// Shapes and dtypes are beside the members of GroupNormProblem.
#pragma once

#include "group_norm_device.cuh"

namespace fastvae {
namespace {

// Computes the mean and the sum of squared deviations of each channel in each split.
//
// The deviations are taken from a shift, the mean of the first step, because sums of x and x * x would cancel where the mean is large
// beside the standard deviation. The mean of a split of n steps differs from the shift by sqrt(n) standard deviations at most, so that
// subtracting the squares at the end costs log2(n) bits at most.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) group_norm_moments_kernel(const __grid_constant__ GroupNormParams<T> p) {
  constexpr int kCount = kThreadChannels<kChannelsLast>;
  GroupNormBlock block(p.blocks);
  GroupNormVectors<kChannelsLast> vectors = thread_vectors<kChannelsLast>(p.blocks, block.sample, block.tile, block.split, threadIdx.x);
  int threads_per_line = p.blocks.threads_per_line;
  int64_t positions = min64(p.blocks.split_positions, p.blocks.positions - block.split * p.blocks.split_positions);
  float first_positions = static_cast<float>(min64(positions, positions_per_step(threads_per_line, kChannelsLast)));
  ThreadValues<kRuns> values;
  float shift[kCount] = {}, total[kCount] = {}, squares[kCount] = {};
  load_vectors<kRuns>(p.input, vectors, p.aligned, values);
  for_each_element<kRuns>(vectors, [&](int j, int k, int c) { shift[c] += values[j][k]; });
#pragma unroll
  for (int c = 0; c < kCount; ++c) shift[c] = channel_sum<kChannelsLast>(shift[c], threads_per_line) / first_positions;

  int64_t first_channel = vectors.first_channel;
  int channel_count = vectors.channel_count;
  for (; vectors.positions_left > 0; vectors.skip(kRuns)) {
    load_vectors<kRuns>(p.input, vectors, p.aligned, values);
    for_each_element<kRuns>(vectors, [&](int j, int k, int c) {
      float difference = values[j][k] - shift[c];
      total[c] += difference;
      squares[c] = fma(difference, difference, squares[c]);
    });
  }
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    double sum = channel_sum<kChannelsLast>(total[c], threads_per_line), square = channel_sum<kChannelsLast>(squares[c], threads_per_line);
    if (c >= channel_count || !writes_channel_sums<kChannelsLast>(p.blocks, threadIdx.x)) continue;
    double mean_from_shift = sum / static_cast<double>(positions), squared_deviations = square - mean_from_shift * sum;
    double* slot = p.partial_moments + ((block.sample * p.blocks.splits + block.split) * p.blocks.channels + first_channel + c) * 2;
    slot[0] = shift[c] + mean_from_shift;
    // Rounding can make the difference negative. The comparison keeps NaN.
    slot[1] = squared_deviations < 0.0 ? 0.0 : squared_deviations;
  }
}

// Combines the moments of a group's partial sums in float64 (Chan, Golub and LeVeque 1983); each block handles one group. With no partial
// sums, the mean is 0 and rstd is 1 / sqrt(eps).
__global__ void __launch_bounds__(kThreads) group_norm_combine_moments_kernel(const __grid_constant__ GroupNormProblem p) {
  GroupPartials partials(p);
  auto moments_of = [&](int64_t i) {
    auto index = partials.at(p, i);
    return p.partial_moments + ((partials.sample * p.blocks.splits + index.split) * p.blocks.channels + index.channel) * 2;
  };
  auto size_of = [&](int64_t i) {
    int64_t begin = partials.at(p, i).split * p.blocks.split_positions;
    return static_cast<double>(min64(p.blocks.split_positions, p.blocks.positions - begin));
  };
  double elements = static_cast<double>(max64(p.groups.elements, 1));
  // Means are added relative to the first one, so that equal means leave no rounding error.
  double shift = partials.count > 0 ? *moments_of(0) : 0.0, total = 0.0, squares = 0.0;
  for (int64_t i = threadIdx.x; i < partials.count; i += kThreads) total += size_of(i) * (moments_of(i)[0] - shift);
  double mean_from_shift = block_sum(total) / elements;
  for (int64_t i = threadIdx.x; i < partials.count; i += kThreads) {
    double difference = (moments_of(i)[0] - shift) - mean_from_shift;
    squares += moments_of(i)[1] + size_of(i) * difference * difference;
  }
  squares = block_sum(squares);
  if (threadIdx.x != 0) return;
  p.mean[blockIdx.x] = shift + mean_from_shift;
  p.rstd[blockIdx.x] = 1.0 / ::sqrt(squares / elements + p.eps);
}

// Replaces inputs by outputs.
template <int kCount, bool kChannelsLast>
__device__ __forceinline__ void normalise_values(NormActivation activation, const ChannelAffine (&affines)[kThreadChannels<kChannelsLast>],
                                                 ThreadValues<kCount>& values) {
  with_norm_activation(activation, [&](auto act) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      for (int k = 0; k < kVector; ++k) {
        const ChannelAffine& a = affines[thread_channel<kChannelsLast>(k)];
        values[j][k] = act.value(affine(values[j][k], a.centre, a.scale, a.offset));
      }
  });
}

// Normalises the elements of a tile and a split with the moments of their groups.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) group_norm_forward_kernel(const __grid_constant__ GroupNormParams<T> p) {
  GroupNormBlock block(p.blocks);
  GroupNormVectors<kChannelsLast> vectors = thread_vectors<kChannelsLast>(p.blocks, block.sample, block.tile, block.split, threadIdx.x);
  ChannelAffine affines[kThreadChannels<kChannelsLast>];
  load_affines(p, block.sample, vectors, affines);
  for (; vectors.positions_left > 0; vectors.skip(kRuns)) {
    ThreadValues<kRuns> values;
    load_vectors<kRuns>(p.input, vectors, p.aligned, values);
    normalise_values<kRuns, kChannelsLast>(p.activation, affines, values);
    store_vectors<kRuns>(p.output, vectors, p.aligned, values);
  }
}

// Computes the moments and the output of one group, whose elements stay in the registers of the block.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) group_norm_forward_group_kernel(const __grid_constant__ GroupNormParams<T> p) {
  GroupNormBlock block(p.blocks);
  GroupNormVectors<kChannelsLast> vectors = thread_vectors<kChannelsLast>(p.blocks, block.sample, block.tile, 0, threadIdx.x);
  ThreadValues<kKeptVectors> values;
  load_vectors<kKeptVectors>(p.input, vectors, p.aligned, values);
  float size = static_cast<float>(p.groups.elements), total = 0.0f, rest = 0.0f, squares = 0.0f;
  for_each_element<kKeptVectors>(vectors, [&](int j, int k, int) { total += values[j][k]; });
  float centre = block_sum(total) / size;
  // `centre` is the mean with the rounding error of a float32 sum; the mean of the deviations from it corrects that.
  for_each_element<kKeptVectors>(vectors, [&](int j, int k, int) { rest += values[j][k] - centre; });
  rest = block_sum(rest) / size;
  for_each_element<kKeptVectors>(vectors, [&](int j, int k, int) {
    float deviation = (values[j][k] - centre) - rest;
    squares = fma(deviation, deviation, squares);
  });
  squares = block_sum(squares);
  double mean = static_cast<double>(centre) + static_cast<double>(rest);
  double rstd = 1.0 / ::sqrt(static_cast<double>(squares) / static_cast<double>(p.groups.elements) + p.eps);
  if (threadIdx.x == 0) {
    p.mean[blockIdx.x] = mean;
    p.rstd[blockIdx.x] = rstd;
  }
  GroupNormStatistics statistics(mean, rstd);
  ChannelAffine affines[kThreadChannels<kChannelsLast>] = {};
#pragma unroll
  for (int c = 0; c < kThreadChannels<kChannelsLast>; ++c)
    if (c < vectors.channel_count) affines[c] = affine_at(p, statistics, vectors.first_channel + c);
  normalise_values<kKeptVectors, kChannelsLast>(p.activation, affines, values);
  store_vectors<kKeptVectors>(p.output, vectors, p.aligned, values);
}

}  // namespace
}  // namespace fastvae
