// The device code that the forward and backward kernels of RMS norm share: their parameters, and the weight and the bias as a thread needs
// them. n stands for x * rrms, the normalised input, u for n * weight + bias, and du for the gradient with respect to u.
//
// There are two kinds of kernels. A line kernel reads channels-last memory: the threads that share a position keep all of its channels in
// registers. A tile kernel reads contiguous memory: a block keeps all channels of some adjacent positions in shared memory.
#pragma once

#include "../common/rms_norm_formulas.h"
#include "norm_device.cuh"
#include "reduce.cuh"
#include "rms_norm_partition.h"

namespace fastvae {
namespace {

// The weight or the bias, (channels,) or (batch, channels).
struct RmsNormParameter {
  NormParameter values;
  int64_t sample_stride;  // from one sample's values to the next one's: 0 or `channels`
};

// All tensors of T are (batch, channels, positions) in the layout of the launch. A kernel reads or writes only those members that its own
// comment names.
template <class T>
struct RmsNormParams {
  RmsBound<float> bound;
  RmsNormBlocks blocks;
  float inverse_channels;  // 1 / channels
  NormActivation activation;
  bool aligned;  // every vector of input, output and the gradients is whole and aligned, and in contiguous memory of rrms too
  RmsNormParameter weight, bias;
  const T *input, *grad_output;
  T *output, *grad_input;
  float* rrms;               // (batch, positions): where forward writes it
  const float* stored_rrms;  // the same, as backward reads it
  float* partial_sums;       // (splits, batch, 2, channels): the sums of du * n, then those of du; nullptr where there is no parameter
  int kept_vectors;          // vectors of a thread that a tile kernel keeps in shared memory
};

// The part of the tensor that a block handles: a split of the positions of a sample. blockIdx.x counts splits first, then samples.
struct RmsNormBlock {
  int sample, split;

  __device__ __forceinline__ explicit RmsNormBlock(const RmsNormBlocks& b) {
    unsigned splits = static_cast<unsigned>(b.splits);
    sample = static_cast<int>(blockIdx.x / splits);
    split = static_cast<int>(blockIdx.x % splits);
  }

  // The partial sums of the block, (2, channels).
  template <class T>
  __device__ __forceinline__ float* partial_sums(const RmsNormParams<T>& p) const {
    return p.partial_sums + (split * p.blocks.batch + sample) * 2 * p.blocks.channels;
  }
};

// The weight and the bias of a sample as float32 in shared memory, for a line kernel.
class LineParameters {
 public:
  // The number of values of each, up to those of the last thread; values beyond the last channel are 0.
  FASTVAE_MEMBER static int entries(const RmsNormBlocks& b) { return b.threads_per_line * kLineVectors * kVector; }
  FASTVAE_MEMBER static int64_t bytes(const RmsNormBlocks& b) { return 2 * static_cast<int64_t>(sizeof(float)) * entries(b); }

  template <class T>
  __device__ __forceinline__ LineParameters(const RmsNormParams<T>& p, int64_t sample, unsigned char* memory)
      : weight_(reinterpret_cast<float*>(memory)), bias_(weight_ + entries(p.blocks)) {
    for (int channel = threadIdx.x; channel < entries(p.blocks); channel += kThreads) {
      bool exists = channel < p.blocks.channels;
      weight_[channel] = exists ? value_of(p.weight.values, sample * p.weight.sample_stride + channel) : 0.0f;
      bias_[channel] = exists ? value_of(p.bias.values, sample * p.bias.sample_stride + channel) : 0.0f;
    }
    __syncthreads();
  }

  // Those of the channels of a vector.
  __device__ __forceinline__ Vector<float> weight(int64_t channel) const {
    return *reinterpret_cast<const Vector<float>*>(weight_ + channel);
  }
  __device__ __forceinline__ Vector<float> bias(int64_t channel) const { return *reinterpret_cast<const Vector<float>*>(bias_ + channel); }

 private:
  float *weight_, *bias_;  // (entries,)
};

// Loads one value for each of the next kCount vectors of a thread of a tile kernel, and 0 for a vector without elements.
template <int kCount, class T>
__device__ __forceinline__ void load_channels(const T* from, const RmsNormVectors<false>& vectors, float (&to)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) to[j] = vectors.count(j) > 0 ? to_float(from[vectors.channel + j * vectors.channel_stride]) : 0.0f;
}

// The same for a parameter of a sample. The dtype is looked at once for all vectors.
template <int kCount>
__device__ __forceinline__ void load_channels(const RmsNormParameter& parameter, int64_t sample, const RmsNormVectors<false>& vectors,
                                              float (&to)[kCount]) {
  int64_t first = sample * parameter.sample_stride;
  if (!parameter.values.data) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = parameter.values.default_value;
    return;
  }
  switch (parameter.values.dtype) {
    case DType::float32:
      return load_channels(static_cast<const float*>(parameter.values.data) + first, vectors, to);
    case DType::bfloat16:
      return load_channels(static_cast<const BFloat16*>(parameter.values.data) + first, vectors, to);
    default:
      return load_channels(static_cast<const Half*>(parameter.values.data) + first, vectors, to);
  }
}

// Calls f(vectors) for each step of a block with the vectors of this thread. All threads take the same number of steps, so that f may
// contain barriers.
template <bool kChannelsLast, class F>
__device__ __forceinline__ void for_each_step(const RmsNormBlocks& b, const RmsNormBlock& block, F f) {
  RmsNormVectors<kChannelsLast> vectors = rms_norm_vectors<kChannelsLast>(b, block.sample, block.split, threadIdx.x);
  for (int left = b.positions_of(block.split); left > 0; left -= b.step_positions, vectors.next_step(b.step_positions)) f(vectors);
}

// Calls f(first, vectors) for every kCount vectors that a thread of a tile kernel has in a step; `first` counts those before. All threads
// make the same number of calls, so that f may contain shuffles.
template <int kCount, class F>
__device__ __forceinline__ void for_each_vectors(const RmsNormBlocks& b, RmsNormVectors<false> vectors, F f) {
  for (int first = 0; first < b.vectors; first += kCount, vectors.skip(kCount)) f(first, vectors);
}

// Replaces the values of a thread's positions by their sums over the threads of the block that have the same positions.
__device__ __forceinline__ void position_sums(const RmsNormBlocks& b, float (&values)[kVector]) {
  // A warp has b.threads_per_line entries. These are 16 at most where a block has 512 threads, and 32 where it has 128.
  __shared__ Vector<float> parts[kMaxNormThreads / 2];
  int line = b.threads_per_line, warps = b.threads / kWarp, member = static_cast<int>(threadIdx.x) % line;
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    for (int offset = line; offset < kWarp; offset *= 2) values[k] += __shfl_xor_sync(0xffffffffu, values[k], offset);
  if (threadIdx.x % kWarp < line) parts[threadIdx.x / kWarp * line + member] = {values[0], values[1], values[2], values[3]};
  __syncthreads();
  Vector<float> total = parts[member];
  for (int warp = 1; warp < warps; ++warp)
#pragma unroll
    for (int k = 0; k < kVector; ++k) total.v[k] += parts[warp * line + member].v[k];
#pragma unroll
  for (int k = 0; k < kVector; ++k) values[k] = total.v[k];
  // Without this barrier the next call could overwrite `parts` before a slower warp has read it.
  __syncthreads();
}

}  // namespace
}  // namespace fastvae
