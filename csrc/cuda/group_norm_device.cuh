// The device code that the forward and backward kernels of group norm share: their parameters, the sums of the threads that share a channel
// or a group, and the coefficients of a channel. In names, "group" is a group of channels of one sample, and kChannelsLast chooses the
// memory layout.
#pragma once

#include "../common/group_norm_formulas.h"
#include "group_norm_partition.h"
#include "norm_device.cuh"
#include "reduce.cuh"

namespace fastvae {
namespace {

struct GroupNormGroups {
  int64_t count;     // groups of a sample
  Divider width;     // channels of a group
  int64_t elements;  // elements of a group

  // The index of a group in (batch, groups).
  __device__ __forceinline__ int64_t of(int64_t sample, int64_t channel) const { return sample * count + quotient(width, channel); }
};

struct GroupNormMoments {
  const double *mean, *rstd;  // (batch, groups); rstd is 1 / standard deviation
};

// The statistics of one group. `centre` is the mean rounded to float32, which is what the kernels subtract from x.
struct GroupNormStatistics {
  double mean, centre, rstd;

  __device__ __forceinline__ GroupNormStatistics(double mean, double rstd)
      : mean(mean), centre(static_cast<double>(static_cast<float>(mean))), rstd(rstd) {}
  __device__ __forceinline__ GroupNormStatistics(const GroupNormMoments& moments, int64_t group)
      : GroupNormStatistics(moments.mean[group], moments.rstd[group]) {}
};

// The parameters that do not depend on the storage type. A kernel reads or writes only those that its own comment names.
struct GroupNormProblem {
  GroupNormBlocks blocks;
  GroupNormGroups groups;
  NormActivation activation;
  bool aligned;                // every vector of input, output and the gradients is whole and aligned
  NormParameter weight, bias;  // (channels,)
  GroupNormMoments moments;    // what backward and the last step of forward read
  double eps;
  double *mean, *rstd;         // (batch, groups): where forward writes the moments
  double* partial_moments;     // (batch, splits, channels, 2): mean and sum of squared deviations from it
  float* partial_sums;         // (batch, splits, 2, channels): the sums of du, then those of du * (x - centre)
  float* statistics_gradient;  // (batch, groups, 2): slope and intercept, see NormStatisticsGradient
};

// All tensors here are (batch, channels, positions) in the layout of the launch.
template <class T>
struct GroupNormParams : GroupNormProblem {
  const T *input, *grad_output;
  T *output, *grad_input;
  int kept_vectors;  // vectors of a thread that a block which handles a whole group keeps in shared memory
};

// The part of the tensor that a block handles. blockIdx.x counts tiles first, then splits, then samples.
struct GroupNormBlock {
  int64_t sample, tile, split;

  __device__ __forceinline__ explicit GroupNormBlock(const GroupNormBlocks& b) {
    unsigned tiles = static_cast<unsigned>(b.tiles), splits = static_cast<unsigned>(b.splits), rest = blockIdx.x / tiles;
    tile = blockIdx.x - rest * tiles;
    split = rest % splits;
    sample = rest / splits;
  }
};

// The number of channels that the vectors of one thread cover.
template <bool kChannelsLast>
constexpr int kThreadChannels = kChannelsLast ? kVector : 1;

// The index, among the channels of the thread, of the channel that element k of a vector belongs to.
template <bool kChannelsLast>
__device__ __forceinline__ constexpr int thread_channel(int k) {
  return kChannelsLast ? k : 0;
}

// Sums over the threads of the block, kThreads or up to kMaxThreads, that read the same channel; each of them gets the sum.
template <bool kChannelsLast, int kMaxThreads = kThreads, class T>
__device__ __forceinline__ T channel_sum(T value, const GroupNormBlocks& b) {
  int threads = kMaxThreads == kThreads ? kThreads : b.threads;
  return kChannelsLast ? sum_across<kMaxThreads>(value, b.threads_per_line, threads)
                       : sum_across<kMaxThreads>(value, 1, b.threads_per_line);
}

// Adds two sums for each channel of the threads of the block, kMaxThreads at most, and stores them in `partial_sums`, (batch, splits, 2,
// channels). Every thread of the block has to call this.
template <bool kChannelsLast, int kMaxThreads = kThreads>
__device__ __forceinline__ void store_channel_sums(const GroupNormBlocks& b, const GroupNormBlock& block,
                                                   const GroupNormVectors<kChannelsLast>& vectors,
                                                   const float (&first)[kThreadChannels<kChannelsLast>],
                                                   const float (&second)[kThreadChannels<kChannelsLast>], float* partial_sums) {
  float* slot = partial_sums + (block.sample * b.splits + block.split) * 2 * b.channels + vectors.first_channel;
#pragma unroll
  for (int c = 0; c < kThreadChannels<kChannelsLast>; ++c) {
    float of_block = channel_sum<kChannelsLast, kMaxThreads>(first[c], b),
          second_of_block = channel_sum<kChannelsLast, kMaxThreads>(second[c], b);
    if (c >= vectors.channel_count || !writes_channel_sums<kChannelsLast>(b, threadIdx.x)) continue;
    slot[c] = of_block;
    slot[b.channels + c] = second_of_block;
  }
}

// Replaces each value by its sum over the threads of the block, of which there are kMaxNormThreads at most.
template <int kCount, class T>
__device__ __forceinline__ void group_sums(T (&values)[kCount]) {
  __shared__ T parts[kMaxNormThreads / kWarp][kCount];
  int warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    T value = warp_sum(values[i], kWarp);
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp][i] = value;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = parts[0][i];
  for (int warp = 1; warp < warps; ++warp)
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += parts[warp][i];
  // Without this barrier the next call could overwrite `parts` before a slower warp has read it.
  __syncthreads();
}

// Calls f(j, k, c) for element k of vector j and the index c of its channel among those of the thread.
template <int kCount, bool kChannelsLast, class F>
__device__ __forceinline__ void for_each_element(const GroupNormVectors<kChannelsLast>& vectors, F f) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    for (int k = 0; k < kVector; ++k)
      if (k < vectors.count(j)) f(j, k, thread_channel<kChannelsLast>(k));
}

// Calls f(first, vectors) for each step of kCount vectors of a thread whose vectors begin at `start`; `first` counts the vectors before the
// step.
template <int kCount, bool kChannelsLast, class F>
__device__ __forceinline__ void for_each_step(const GroupNormVectors<kChannelsLast>& start, F f) {
  int first = 0;
  for (GroupNormVectors<kChannelsLast> vectors = start; vectors.positions_left > 0; vectors.skip(kCount), first += kCount)
    f(first, vectors);
}

// u = (x - centre) * scale + offset for one channel of one sample.
struct ChannelAffine {
  float centre, scale, offset;
};

__device__ __forceinline__ ChannelAffine affine_at(const GroupNormProblem& p, const GroupNormStatistics& s, int64_t channel) {
  NormAffine affine = affine_of(s.mean, s.centre, s.rstd, value_of(p.weight, channel), value_of(p.bias, channel));
  return {static_cast<float>(affine.centre), static_cast<float>(affine.scale), static_cast<float>(affine.offset)};
}

// Reads the moments of the groups that the channels of a thread belong to, which may be several.
template <bool kChannelsLast>
__device__ __forceinline__ void load_affines(const GroupNormProblem& p, int64_t sample, const GroupNormVectors<kChannelsLast>& vectors,
                                             ChannelAffine (&to)[kThreadChannels<kChannelsLast>]) {
#pragma unroll
  for (int c = 0; c < kThreadChannels<kChannelsLast>; ++c) {
    to[c] = {};
    int64_t channel = vectors.first_channel + c;
    if (c < vectors.channel_count) to[c] = affine_at(p, GroupNormStatistics(p.moments, p.groups.of(sample, channel)), channel);
  }
}

// The same where all channels of the block belong to one group, whose statistics are `s`.
template <bool kChannelsLast>
__device__ __forceinline__ void load_group_affines(const GroupNormProblem& p, const GroupNormStatistics& s,
                                                   const GroupNormVectors<kChannelsLast>& vectors,
                                                   ChannelAffine (&to)[kThreadChannels<kChannelsLast>]) {
#pragma unroll
  for (int c = 0; c < kThreadChannels<kChannelsLast>; ++c) {
    to[c] = {};
    if (c < vectors.channel_count) to[c] = affine_at(p, s, vectors.first_channel + c);
    to[c].centre = static_cast<float>(s.centre);
  }
}

// The partial sums of one group, for a kernel whose block combines them; its grid is (batch * groups,). Partial sum i is that of channel
// i % width of the group in split i / width.
struct GroupPartials {
  int64_t sample, group, count;

  __device__ __forceinline__ explicit GroupPartials(const GroupNormProblem& p) {
    unsigned groups = static_cast<unsigned>(p.groups.count);
    sample = blockIdx.x / groups;
    group = blockIdx.x - sample * groups;
    count = p.blocks.splits * p.groups.width.divisor;
  }

  struct Index {
    int64_t split, channel;
  };

  __device__ __forceinline__ Index at(const GroupNormProblem& p, int64_t i) const {
    int64_t split = quotient(p.groups.width, i);
    return {split, group * p.groups.width.divisor + i - split * p.groups.width.divisor};
  }
};

}  // namespace
}  // namespace fastvae
