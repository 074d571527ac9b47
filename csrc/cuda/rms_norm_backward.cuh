// The backward kernels of RMS norm. With n = input * rrms and du = act'(n * weight + bias) * grad_output,
//   grad_weight = sum of du * n, grad_bias = sum of du (over positions, and over samples where the parameter is one of all samples),
//   grad_input  = (weight * du - n * projection) * rrms, where the projection is the mean over channels of weight * du * n.
// The first two kernels read input and grad_output once where they keep all of them; the last one adds their partial sums.
//
// kernel                              grid                     memory         reads                                      writes
// rms_norm_backward_line_kernel       (splits * batch)         channels-last  input, grad_output, rrms, weight, bias     partial_sums,
//                                                                                                                        grad_input
// rms_norm_backward_tile_kernel       (splits * batch)         contiguous     the same                                   the same
// rms_norm_parameter_gradients_kernel (groups, splits) of                     partial_sums                               grad_weight,
//                                     ColumnSums                                                                         grad_bias
//
// Shapes and dtypes are beside the members of RmsNormParams and RmsNormParameterGradientParams.
#pragma once

#include "rms_norm_device.cuh"

namespace fastvae {
namespace {

// Registers for four blocks of the line kernel on a multiprocessor, 128 of each thread: it keeps 16 elements of the input, of the gradient
// and of each of the two sums.
constexpr int kLineGradientBlocks = 4;

// The sums of du * n and of du that a thread of the line kernel has for each of its channels.
struct LineGradientSums {
  ThreadValues<kLineVectors> du_n = {}, du = {};

  // The block adds its sums in shared memory, (rows, 2, entries of LineParameters). A row has those of the threads that share a position,
  // or of a warp where several positions share one.
  FASTVAE_MEMBER static int rows(const RmsNormBlocks& b) { return kThreads / (b.threads_per_line < kWarp ? kWarp : b.threads_per_line); }
  FASTVAE_MEMBER static int64_t bytes(const RmsNormBlocks& b) { return rows(b) * LineParameters::bytes(b); }

  // Adds the sums of the threads of the block and stores them in `to`, (2, channels). Every thread of the block has to call this.
  __device__ __forceinline__ void finish(const RmsNormBlocks& b, const RmsNormVectors<true>& vectors, float* parts, float* to) {
    int entries = LineParameters::entries(b), line = b.threads_per_line;
    float* row = parts + threadIdx.x / (line < kWarp ? kWarp : line) * 2 * entries;
#pragma unroll
    for (int j = 0; j < kLineVectors; ++j) {
      for (int k = 0; k < kVector; ++k)
        for (int offset = line; offset < kWarp; offset *= 2) {
          du_n[j][k] += __shfl_xor_sync(0xffffffffu, du_n[j][k], offset);
          du[j][k] += __shfl_xor_sync(0xffffffffu, du[j][k], offset);
        }
      // The other threads of the warp have the same sums.
      if (line < kWarp && threadIdx.x % kWarp >= line) continue;
      int channel = static_cast<int>(vectors.channel + j * vectors.channel_stride);
      store(row + channel, kVector, true, du_n[j]);
      store(row + entries + channel, kVector, true, du[j]);
    }
    __syncthreads();
    int channels = static_cast<int>(b.channels);
    for (int i = threadIdx.x; i < 2 * channels; i += kThreads) {
      const float* part = parts + (i < channels ? i : entries + i - channels);
      float total = part[0];
      for (int r = 1; r < rows(b); ++r) total += part[r * 2 * entries];
      to[i] = total;
    }
  }
};

// Computes grad_input of the positions of a split and the partial sums of the split, with all channels of a position in the registers of
// the threads that share it.
template <class T>
__global__ void __launch_bounds__(kThreads, kLineGradientBlocks) rms_norm_backward_line_kernel(const __grid_constant__ RmsNormParams<T> p) {
  FASTVAE_DYNAMIC_SHARED(memory);
  RmsNormBlock block(p.blocks);
  LineParameters parameters(p, block.sample, memory);
  LineGradientSums sums;
  for_each_step<true>(p.blocks, block, [&](const RmsNormVectors<true>& vectors) {
    float rrms = vectors.positions_left > 0 ? p.stored_rrms[vectors.position] : 0.0f;
    Vector<T> inputs[kLineVectors], grad_outputs[kLineVectors];
    load_stored(p.input, vectors, p.aligned, inputs);
    load_stored(p.grad_output, vectors, p.aligned, grad_outputs);
    ThreadValues<kLineVectors> gradients = {};  // weight * du
    float projection = 0.0f;
    with_norm_activation(p.activation, [&](auto act) {
#pragma unroll
      for (int j = 0; j < kLineVectors; ++j) {
        if (j * vectors.channel_stride >= vectors.channels) break;
        int channel = vectors.channel + j * vectors.channel_stride;
        Vector<float> weight = parameters.weight(channel), bias = parameters.bias(channel);
        for (int k = 0; k < kVector; ++k) {
          float n = to_float(inputs[j].v[k]) * rrms;
          float du = act.gradient(fma(n, weight.v[k], bias.v[k]), to_float(grad_outputs[j].v[k]));
          sums.du_n[j][k] = fma(du, n, sums.du_n[j][k]);
          sums.du[j][k] += du;
          gradients[j][k] = weight.v[k] * du;
          projection = fma(gradients[j][k], n, projection);
        }
      }
    });
    projection = sum_across(projection, 1, p.blocks.threads_per_line) * p.inverse_channels;
    if (p.bound.is_constant(rrms)) projection = 0.0f;
#pragma unroll
    for (int j = 0; j < kLineVectors; ++j)
      for (int k = 0; k < kVector; ++k)
        gradients[j][k] = rms_gradient_of_input(to_float(inputs[j].v[k]), gradients[j][k], rrms, projection);
    store_vectors(p.grad_input, vectors, p.aligned, gradients);
  });
  if (!p.partial_sums) return;
  RmsNormVectors<true> vectors = rms_norm_vectors<true>(p.blocks, block.sample, block.split, threadIdx.x);
  float* parts = reinterpret_cast<float*>(memory + LineParameters::bytes(p.blocks));
  sums.finish(p.blocks, vectors, parts, block.partial_sums(p));
}

// Replaces grad_output by weight * du, and sums du * n and du over the positions of each vector.
template <int kCount, class T>
__device__ __forceinline__ void differentiate_tile(const RmsNormParams<T>& p, int64_t sample, const RmsNormVectors<false>& vectors,
                                                   const float (&rrms)[kVector], const ThreadValues<kCount>& inputs,
                                                   ThreadValues<kCount>& gradients, float (&du_n)[kCount], float (&sum_du)[kCount]) {
  float weight[kCount], bias[kCount];
  load_channels(p.weight, sample, vectors, weight);
  load_channels(p.bias, sample, vectors, bias);
  with_norm_activation(p.activation, [&](auto act) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      for (int k = 0; k < kVector; ++k) {
        float n = inputs[j][k] * rrms[k], du = act.gradient(fma(n, weight[j], bias[j]), gradients[j][k]);
        du_n[j] = fma(du, n, du_n[j]);
        sum_du[j] += du;
        gradients[j][k] = weight[j] * du;
      }
  });
}

// Adds the sums of the positions of kCount vectors over the threads that share a channel, and adds the total to `to`, the partial sums of
// the block, (2, channels). The same thread writes and reads the sums of a channel, step after step.
template <int kCount>
__device__ __forceinline__ void add_tile_sums(const RmsNormBlocks& b, const RmsNormVectors<false>& vectors, bool first_step,
                                              const float (&du_n)[kCount], const float (&du)[kCount], float* to) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    float sum_du_n = warp_sum(du_n[j], b.threads_per_line), sum_du = warp_sum(du[j], b.threads_per_line);
    if (threadIdx.x % b.threads_per_line != 0 || vectors.count(j) == 0) continue;
    float* slot = to + vectors.channel + j * vectors.channel_stride;
    slot[0] = first_step ? sum_du_n : slot[0] + sum_du_n;
    slot[b.channels] = first_step ? sum_du : slot[b.channels] + sum_du;
  }
}

// Computes grad_input of the positions of a split and the partial sums of the split. Each thread keeps the first p.kept_vectors vectors of
// a step in shared memory, those of weight * du as float32. It reads the others again, from the L2 cache where that has not replaced them
// yet; the results are the same.
template <class T>
__global__ void __launch_bounds__(kMaxNormThreads, kNormBlocks) rms_norm_backward_tile_kernel(const __grid_constant__ RmsNormParams<T> p) {
  constexpr int kCount = kTileShortRuns;
  FASTVAE_DYNAMIC_SHARED(memory);
  RmsNormBlock block(p.blocks);
  ThreadSlots<T> input_slots(memory, p.kept_vectors);
  ThreadSlots<float> gradient_slots(input_slots.end(), p.kept_vectors);
  bool first_step = true;
  for_each_step<false>(p.blocks, block, [&](const RmsNormVectors<false>& start) {
    float rrms[kVector], projection[kVector] = {};
    int count = start.position_count();
    load(p.stored_rrms + start.position, count, p.aligned && count > 0, rrms);
    // Loads inputs, and replaces gradients by weight * du.
    auto differentiate = [&](int first, const RmsNormVectors<false>& vectors, ThreadValues<kCount>& inputs, ThreadValues<kCount>& gradients,
                             float (&du_n)[kCount], float (&du)[kCount]) {
      Vector<T> stored[kCount];
      load_stored(p.input, vectors, p.aligned, stored);
      load_vectors(p.grad_output, vectors, p.aligned, gradients);
      if (first < p.kept_vectors) input_slots.store(first, stored);
      convert_vectors(stored, inputs);
      differentiate_tile(p, block.sample, vectors, rrms, inputs, gradients, du_n, du);
    };
    for_each_vectors<kCount>(p.blocks, start, [&](int first, const RmsNormVectors<false>& vectors) {
      ThreadValues<kCount> inputs, gradients;
      float du_n[kCount] = {}, du[kCount] = {};
      differentiate(first, vectors, inputs, gradients, du_n, du);
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        for (int k = 0; k < kVector; ++k) projection[k] = fma(gradients[j][k], inputs[j][k] * rrms[k], projection[k]);
      if (p.partial_sums) add_tile_sums(p.blocks, vectors, first_step, du_n, du, block.partial_sums(p));
      if (first < p.kept_vectors) gradient_slots.store(first, gradients);
    });
    position_sums(p.blocks, projection);
#pragma unroll
    for (int k = 0; k < kVector; ++k) projection[k] = p.bound.is_constant(rrms[k]) ? 0.0f : projection[k] * p.inverse_channels;
    for_each_vectors<kCount>(p.blocks, start, [&](int first, const RmsNormVectors<false>& vectors) {
      ThreadValues<kCount> inputs, gradients;
      if (first < p.kept_vectors) {
        Vector<T> stored[kCount];
        input_slots.load(first, stored);
        gradient_slots.load(first, gradients);
        convert_vectors(stored, inputs);
      } else {
        float unused_du_n[kCount] = {}, unused_du[kCount] = {};
        differentiate(first, vectors, inputs, gradients, unused_du_n, unused_du);
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        for (int k = 0; k < kVector; ++k) gradients[j][k] = rms_gradient_of_input(inputs[j][k], gradients[j][k], rrms[k], projection[k]);
      store_vectors(p.grad_input, vectors, p.aligned, gradients);
    });
    first_step = false;
  });
}

struct RmsNormParameterGradientParams {
  const float* partial_sums;  // (splits, batch, 2, channels), a matrix of whose columns each is the gradient of one element
  int64_t channels;
  Divider both_sums;  // 2 * channels, the columns of a sample
  ColumnSums columns;
  Workspace workspace;
  Output grad_weight, grad_bias;  // (channels,) or (batch, channels); without data where not requested
};

// Sums the columns of `partial_sums`. Of a parameter of all samples the matrix has splits * batch rows and 2 * channels columns; of one of
// each sample it has splits rows and batch * 2 * channels columns.
__global__ void __launch_bounds__(kThreads) rms_norm_parameter_gradients_kernel(const __grid_constant__ RmsNormParameterGradientParams p) {
  auto finish = [&](int64_t column, double total) {
    int64_t sample = quotient(p.both_sums, column), channel = column - sample * p.both_sums.divisor;
    bool of_weight = channel < p.channels;
    const Output& grad = of_weight ? p.grad_weight : p.grad_bias;
    if (grad.data) store_one(grad, sample * p.channels + channel - (of_weight ? 0 : p.channels), total);
  };
  sum_columns(p.columns, p.workspace, [&](int64_t i) { return p.partial_sums[i]; }, finish);
}

}  // namespace
}  // namespace fastvae
