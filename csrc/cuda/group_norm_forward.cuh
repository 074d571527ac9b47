// The forward kernels of group norm, output = act((input - mean) * rstd * weight + bias). A group that one block handles takes one kernel,
// which keeps the input in shared memory and reads it once; larger groups take three, which read it twice.
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
  for (int c = 0; c < kCount; ++c) shift[c] = channel_sum<kChannelsLast>(shift[c], p.blocks) / first_positions;

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
    double sum = channel_sum<kChannelsLast>(total[c], p.blocks), square = channel_sum<kChannelsLast>(squares[c], p.blocks);
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
  double shift = partials.count > 0 ? *moments_of(0) : 0.0;
  double total =
      sum_strided<double>(threadIdx.x, partials.count, kThreads, [&](int64_t i) { return size_of(i) * (moments_of(i)[0] - shift); });
  double mean_from_shift = block_sum(total) / elements;
  double squares = sum_strided<double>(threadIdx.x, partials.count, kThreads, [&](int64_t i) {
    double difference = (moments_of(i)[0] - shift) - mean_from_shift;
    return moments_of(i)[1] + size_of(i) * difference * difference;
  });
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

// Computes the moments and the output of one group, of whose elements each thread keeps the first p.kept_vectors vectors in shared memory.
// It reads the others again, from the L2 cache where that has not replaced them yet; the results are the same.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxNormThreads, kNormBlocks)
    group_norm_forward_group_kernel(const __grid_constant__ GroupNormParams<T> p) {
  FASTVAE_DYNAMIC_SHARED(memory);
  GroupNormBlock block(p.blocks);
  const GroupNormVectors<kChannelsLast> start = thread_vectors<kChannelsLast>(p.blocks, block.sample, block.tile, 0, threadIdx.x);
  ThreadSlots<T> slots(memory, p.kept_vectors);
  float size = static_cast<float>(p.groups.elements), total[1] = {};
  for_each_step<kGroupRuns>(start, [&](int first, const GroupNormVectors<kChannelsLast>& vectors) {
    Vector<T> stored[kGroupRuns];
    load_stored(p.input, vectors, p.aligned, stored);
    if (first < p.kept_vectors) slots.store(first, stored);
    ThreadValues<kGroupRuns> values;
    convert_vectors(stored, values);
    for_each_element<kGroupRuns>(vectors, [&](int j, int k, int) { total[0] += values[j][k]; });
  });
  group_sums(total);
  float centre = total[0] / size;
  auto reload = [&](int first, const GroupNormVectors<kChannelsLast>& vectors, ThreadValues<kGroupRuns>& values) {
    Vector<T> stored[kGroupRuns];
    if (first < p.kept_vectors)
      slots.load(first, stored);
    else
      load_stored(p.input, vectors, p.aligned, stored);
    convert_vectors(stored, values);
  };
  // The sums of the deviations from `centre` and of their squares. `centre` is the mean with the rounding error of a float32 sum, which the
  // mean of the deviations corrects; it is so small beside a deviation that subtracting its square from their mean cancels nothing.
  float sums[2] = {};
  for_each_step<kGroupRuns>(start, [&](int first, const GroupNormVectors<kChannelsLast>& vectors) {
    ThreadValues<kGroupRuns> values;
    reload(first, vectors, values);
    for_each_element<kGroupRuns>(vectors, [&](int j, int k, int) {
      float deviation = values[j][k] - centre;
      sums[0] += deviation;
      sums[1] = fma(deviation, deviation, sums[1]);
    });
  });
  group_sums(sums);
  double elements = static_cast<double>(p.groups.elements), correction = static_cast<double>(sums[0]) / elements;
  double variance = static_cast<double>(sums[1]) / elements - correction * correction;
  // Rounding can make the difference negative. The comparison keeps NaN.
  double mean = static_cast<double>(centre) + correction, rstd = 1.0 / ::sqrt((variance < 0.0 ? 0.0 : variance) + p.eps);
  if (threadIdx.x == 0) {
    p.mean[blockIdx.x] = mean;
    p.rstd[blockIdx.x] = rstd;
  }
  ChannelAffine affines[kThreadChannels<kChannelsLast>];
  load_group_affines(p, GroupNormStatistics(mean, rstd), start, affines);
  for_each_step<kGroupRuns>(start, [&](int first, const GroupNormVectors<kChannelsLast>& vectors) {
    ThreadValues<kGroupRuns> values;
    reload(first, vectors, values);
    normalise_values<kGroupRuns, kChannelsLast>(p.activation, affines, values);
    store_vectors<kGroupRuns>(p.output, vectors, p.aligned, values);
  });
}

}  // namespace
}  // namespace fastvae
