// The forward kernels of RMS norm, output = act(input * rrms * weight + bias) with rrms = 1 / RMS of the channels of each position. Each
// reads the input once where it keeps all of it.
//
// kernel                        grid               memory         reads                writes
// rms_norm_forward_line_kernel  (splits * batch)   channels-last  input, weight, bias  output, rrms
// rms_norm_forward_tile_kernel  (splits * batch)   contiguous     input, weight, bias  output, rrms
//
// Shapes and dtypes are beside the members of RmsNormParams.
#pragma once

#include "rms_norm_device.cuh"

namespace fastvae {
namespace {

// Blocks of a multiprocessor whose threads have 64 registers. Without this bound ptxas takes 48 on sm_90, and spills one.
constexpr int kLineOutputBlocks = kNormBlocks * kMaxNormThreads / kThreads;

// Computes rrms and output of the positions of a split, with all channels of a position in the registers of the threads that share it.
template <class T>
__global__ void __launch_bounds__(kThreads, kLineOutputBlocks) rms_norm_forward_line_kernel(const __grid_constant__ RmsNormParams<T> p) {
  FASTVAE_DYNAMIC_SHARED(memory);
  RmsNormBlock block(p.blocks);
  LineParameters parameters(p, block.sample, memory);
  for_each_step<true>(p.blocks, block, [&](const RmsNormVectors<true>& vectors) {
    ThreadValues<kLineVectors> values;
    load_vectors(p.input, vectors, p.aligned, values);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kLineVectors; ++j)
      for (int k = 0; k < kVector; ++k) squares = fma(values[j][k], values[j][k], squares);
    float rrms = p.bound.rrms(sum_across(squares, 1, p.blocks.threads_per_line) * p.inverse_channels);
    if (vectors.channel == 0 && vectors.positions_left > 0) p.rrms[vectors.position] = rrms;
    with_norm_activation(p.activation, [&](auto act) {
#pragma unroll
      for (int j = 0; j < kLineVectors; ++j) {
        if (j * vectors.channel_stride >= vectors.channels) break;
        int channel = vectors.channel + j * vectors.channel_stride;
        Vector<float> weight = parameters.weight(channel), bias = parameters.bias(channel);
        for (int k = 0; k < kVector; ++k) values[j][k] = act.value(fma(values[j][k] * rrms, weight.v[k], bias.v[k]));
      }
    });
    store_vectors(p.output, vectors, p.aligned, values);
  });
}

// Computes rrms and output of the positions of a split. Each thread keeps the first p.kept_vectors vectors of a step in shared memory. It
// reads the others again, from the L2 cache where that has not replaced them yet; the results are the same.
template <class T>
__global__ void __launch_bounds__(kMaxNormThreads, kNormBlocks) rms_norm_forward_tile_kernel(const __grid_constant__ RmsNormParams<T> p) {
  FASTVAE_DYNAMIC_SHARED(memory);
  RmsNormBlock block(p.blocks);
  ThreadSlots<T> slots(memory, p.kept_vectors);
  for_each_step<false>(p.blocks, block, [&](const RmsNormVectors<false>& start) {
    float rrms[kVector] = {};  // the sum of squares first
    for_each_vectors<kTileRuns>(p.blocks, start, [&](int first, const RmsNormVectors<false>& vectors) {
      Vector<T> stored[kTileRuns];
      load_stored(p.input, vectors, p.aligned, stored);
      if (first < p.kept_vectors) slots.store(first, stored);
      ThreadValues<kTileRuns> values;
      convert_vectors(stored, values);
#pragma unroll
      for (int j = 0; j < kTileRuns; ++j)
        for (int k = 0; k < kVector; ++k) rrms[k] = fma(values[j][k], values[j][k], rrms[k]);
    });
    position_sums(p.blocks, rrms);
#pragma unroll
    for (int k = 0; k < kVector; ++k) rrms[k] = p.bound.rrms(rrms[k] * p.inverse_channels);
    int count = start.position_count();
    if (start.channel == 0) store(p.rrms + start.position, count, p.aligned && count > 0, rrms);
    for_each_vectors<kTileShortRuns>(p.blocks, start, [&](int first, const RmsNormVectors<false>& vectors) {
      Vector<T> stored[kTileShortRuns];
      if (first < p.kept_vectors)
        slots.load(first, stored);
      else
        load_stored(p.input, vectors, p.aligned, stored);
      float weight[kTileShortRuns], bias[kTileShortRuns];
      load_channels(p.weight, block.sample, vectors, weight);
      load_channels(p.bias, block.sample, vectors, bias);
      ThreadValues<kTileShortRuns> values;
      convert_vectors(stored, values);
      with_norm_activation(p.activation, [&](auto act) {
#pragma unroll
        for (int j = 0; j < kTileShortRuns; ++j)
          for (int k = 0; k < kVector; ++k) values[j][k] = act.value(fma(values[j][k] * rrms[k], weight[j], bias[j]));
      });
      store_vectors(p.output, vectors, p.aligned, values);
    });
  });
}

}  // namespace
}  // namespace fastvae
