// The RMS norm kernels, compiled once per instruction set. Each reads its tensors from memory once: it takes a block of positions that fits
// the cache, computes what each position needs of all its channels, and then the results of the block.
//
// kernel           reads                                        writes
// forward          input, weight, bias                          output, rrms
// backward         input, grad_output, rrms, weight, bias       grad_input, sums of du * n and of du of each channel of each slot
//
// The memory layout decides which elements are adjacent, and so what a vector holds. In channels-last memory (Rows) it holds channels of a
// position; sums over channels are sums within vectors, and parameters are loaded with the elements. In contiguous memory (Planes) it holds
// positions of a channel; sums over channels are an array of one value for each position, and parameters are numbers.
#include <algorithm>

#include "../rms_norm_kernels.h"
#include "channel_segments.h"
#include "words.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// Positions of a block. In channels-last memory its float32 elements take 32 KB of the L1 cache. In contiguous memory the stretch of a
// plane that belongs to a block has to be long enough for the processor to fetch ahead, so that a block is as large as the L2 cache allows.
constexpr int64_t kMinPositions = 16, kMaxPositions = 512, kRowElements = 8192, kPlaneElements = 49152;

int64_t block_positions(const RmsNorm& p) {
  int64_t channels = max64(p.runs.channels, 1);
  int64_t positions = (p.channels_last ? kRowElements : kPlaneElements) / channels / kMinPositions * kMinPositions;
  return std::clamp(positions, kMinPositions, p.channels_last ? kSumRun : kMaxPositions);
}

// The scratch buffer of one call: an array of the block's elements, four of one value for each channel, and two of one value for each
// position.
template <class T>
struct Scratch {
  T *elements, *weight, *bias, *weight_sums, *bias_sums, *rrms, *sums;

  Scratch(const RmsNorm& p, void* memory) {
    elements = static_cast<T*>(memory);
    weight = elements + block_positions(p) * p.runs.channels;
    bias = weight + p.runs.channels;
    weight_sums = bias + p.runs.channels;
    bias_sums = weight_sums + p.runs.channels;
    rrms = bias_sums + p.runs.channels;
    sums = rrms + kMaxPositions;
  }
};

int64_t scratch_bytes(const RmsNorm& p) {
  int64_t values = (block_positions(p) + 4) * p.runs.channels + 2 * kMaxPositions;
  return values * static_cast<int64_t>(sizeof(double));
}

template <class T>
void clear(T* values, int64_t count) {
  memset(values, 0, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
void load_parameters(const RmsNorm& p, int64_t run, Scratch<T>& scratch) {
  int64_t channels = p.runs.channels, from = p.runs.shared ? 0 : run * channels;
  for (int64_t c = 0; c < channels; ++c) scratch.weight[c] = narrowed<T>(p.weight[from + c]);
  for (int64_t c = 0; c < channels; ++c) scratch.bias[c] = narrowed<T>(p.bias[from + c]);
}

// Adds the sums of a block to those of its slot.
template <class T>
void flush_sums(const RmsNorm& p, int64_t slot, Scratch<T>& scratch) {
  int64_t channels = p.runs.channels;
  double* to = p.sums + slot * 2 * channels;
  for (int64_t c = 0; c < channels; ++c) to[c] += scratch.weight_sums[c];
  for (int64_t c = 0; c < channels; ++c) to[channels + c] += scratch.bias_sums[c];
  clear(scratch.weight_sums, 2 * channels);
}

// Adds f(lanes, i, to) over the words of a row. The pieces of the sum are so short that float32 may add them up.
template <class S, class F>
FASTVAE_INLINE typename S::T sum_words(int64_t count, F f) {
  using T = typename S::T;
  int64_t words = count / S::kLanes * S::kLanes;
  double total = sum_pieces(words, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; i += S::kLanes) sum += f(Number<S::kLanes>{}, i);
    return sum;
  });
  if (words < count) total += static_cast<double>(f(Number<1>{}, words));
  return static_cast<T>(total);
}

// In channels-last memory a block is rows of channels.
struct Rows {
  template <class S>
  static void square_sums(const typename S::Stored* x, int64_t, int64_t positions, int64_t channels, typename S::T* sums) {
    using T = typename S::T;
    for (int64_t r = 0; r < positions; ++r, x += channels)
      sums[r] = sum_words<S>(channels, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
        T value[lanes.value], sum = 0;
        S::get(x + i, lanes, value);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) sum = fma(value[l], value[l], sum);
        return sum;
      });
  }

  template <class S, class A>
  static void normalise(const typename S::Stored* __restrict x, typename S::Stored* __restrict y, int64_t, int64_t positions,
                        int64_t channels, const Scratch<typename S::T>& scratch) {
    using T = typename S::T;
    const T* __restrict weight = scratch.weight, * __restrict bias = scratch.bias;
    for (int64_t r = 0; r < positions; ++r, x += channels, y += channels) {
      T rrms = scratch.rrms[r];
      for_each_word<S>(channels, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
        T value[lanes.value];
        S::get(x + i, lanes, value);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) value[l] = A::value(fma(value[l] * rrms, weight[i + l], bias[i + l]));
        S::put(y + i, lanes, value);
      });
    }
  }

  // Leaves weight * du in scratch.elements, and the sums of weight * du * n in scratch.sums.
  template <class S, class A>
  static void differentiate(const typename S::Stored* __restrict x, const typename S::Stored* __restrict grad, int64_t, int64_t positions,
                            int64_t channels, Scratch<typename S::T>& scratch) {
    using T = typename S::T;
    const T* __restrict weight = scratch.weight, * __restrict bias = scratch.bias;
    T* __restrict weight_sums = scratch.weight_sums, * __restrict bias_sums = scratch.bias_sums, * __restrict to = scratch.elements;
    for (int64_t r = 0; r < positions; ++r, x += channels, grad += channels, to += channels) {
      T rrms = scratch.rrms[r];
      scratch.sums[r] = sum_words<S>(channels, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
        T value[lanes.value], gradient[lanes.value], sum = 0;
        S::get(x + i, lanes, value);
        S::get(grad + i, lanes, gradient);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) {
          T n = value[l] * rrms, du = A::gradient(fma(n, weight[i + l], bias[i + l]), gradient[l]), product = du * n;
          weight_sums[i + l] += product;
          bias_sums[i + l] += du;
          to[i + l] = weight[i + l] * du;
          sum = fma(weight[i + l], product, sum);
        }
        return sum;
      });
    }
  }

  template <class S>
  static void propagate(const typename S::Stored* __restrict x, typename S::Stored* __restrict out, int64_t, int64_t positions,
                        int64_t channels, const Scratch<typename S::T>& scratch) {
    using T = typename S::T;
    const T* __restrict weighted = scratch.elements;
    for (int64_t r = 0; r < positions; ++r, x += channels, out += channels, weighted += channels) {
      T rrms = scratch.rrms[r], projection = scratch.sums[r];
      for_each_word<S>(channels, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
        T value[lanes.value];
        S::get(x + i, lanes, value);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) value[l] = rms_gradient_of_input(value[l], weighted[i + l], rrms, projection);
        S::put(out + i, lanes, value);
      });
    }
  }
};

// In contiguous memory a block is a piece of each channel's plane; the planes are `stride` elements apart.
struct Planes {
  template <class S>
  static void square_sums(const typename S::Stored* x, int64_t stride, int64_t positions, int64_t channels,
                          typename S::T* __restrict sums) {
    using T = typename S::T;
    clear(sums, positions);
    for (int64_t c = 0; c < channels; ++c, x += stride)
      for_each_word<S>(positions, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
        T value[lanes.value];
        S::get(x + i, lanes, value);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) sums[i + l] = fma(value[l], value[l], sums[i + l]);
      });
  }

  template <class S, class A>
  static void normalise(const typename S::Stored* __restrict x, typename S::Stored* __restrict y, int64_t stride, int64_t positions,
                        int64_t channels, const Scratch<typename S::T>& scratch) {
    using T = typename S::T;
    const T* __restrict rrms = scratch.rrms;
    for (int64_t c = 0; c < channels; ++c, x += stride, y += stride) {
      T weight = scratch.weight[c], bias = scratch.bias[c];
      for_each_word<S>(positions, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
        T value[lanes.value];
        S::get(x + i, lanes, value);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) value[l] = A::value(fma(value[l] * rrms[i + l], weight, bias));
        S::put(y + i, lanes, value);
      });
    }
  }

  template <class S, class A>
  static void differentiate(const typename S::Stored* __restrict x, const typename S::Stored* __restrict grad, int64_t stride,
                            int64_t positions, int64_t channels, Scratch<typename S::T>& scratch) {
    using T = typename S::T;
    const T* __restrict rrms = scratch.rrms;
    T* __restrict to = scratch.elements, * __restrict sums = scratch.sums;
    clear(sums, positions);
    for (int64_t c = 0; c < channels; ++c, x += stride, grad += stride, to += positions) {
      T weight = scratch.weight[c], bias = scratch.bias[c], of_weight = 0, of_bias = 0;
      auto add = [=](auto lanes, int64_t i, T& weight_sum, T& bias_sum) __attribute__((always_inline)) {
        T value[lanes.value], gradient[lanes.value];
        S::get(x + i, lanes, value);
        S::get(grad + i, lanes, gradient);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) {
          T n = value[l] * rrms[i + l], du = A::gradient(fma(n, weight, bias), gradient[l]), product = du * n;
          weight_sum += product;
          bias_sum += du;
          to[i + l] = weight * du;
          sums[i + l] = fma(weight, product, sums[i + l]);
        }
      };
      int64_t words = positions / S::kLanes * S::kLanes;
      // Sums of pieces are added to the others, so that float32 adds up few numbers at a time.
      for (int64_t begin = 0; begin < words; begin += kSumRun) {
        T weight_sum = 0, bias_sum = 0;
        int64_t end = min64(begin + kSumRun, words);
#pragma omp simd reduction(+ : weight_sum, bias_sum)
        for (int64_t i = begin; i < end; i += S::kLanes) add(Number<S::kLanes>{}, i, weight_sum, bias_sum);
        of_weight += weight_sum;
        of_bias += bias_sum;
      }
      if (words < positions) add(Number<1>{}, words, of_weight, of_bias);
      scratch.weight_sums[c] += of_weight;
      scratch.bias_sums[c] += of_bias;
    }
  }

  template <class S>
  static void propagate(const typename S::Stored* __restrict x, typename S::Stored* __restrict out, int64_t stride, int64_t positions,
                        int64_t channels, const Scratch<typename S::T>& scratch) {
    using T = typename S::T;
    const T* __restrict weighted = scratch.elements, * __restrict rrms = scratch.rrms, * __restrict projection = scratch.sums;
    for (int64_t c = 0; c < channels; ++c, x += stride, out += stride, weighted += positions)
      for_each_word<S>(positions, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
        T value[lanes.value];
        S::get(x + i, lanes, value);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) value[l] = rms_gradient_of_input(value[l], weighted[i + l], rrms[i + l], projection[i + l]);
        S::put(out + i, lanes, value);
      });
  }
};

// Calls f(element, position, positions) for the blocks of a segment.
template <class F>
FASTVAE_INLINE void for_each_block(const RmsNorm& p, const Segment& segment, F f) {
  int64_t step = p.channels_last ? p.runs.channels : 1, most = block_positions(p);
  for (int64_t begin = 0; begin < segment.positions; begin += most)
    f(segment.element + begin * step, segment.position + begin, min64(most, segment.positions - begin));
}

template <class T>
void write_rrms(const RmsBound<T>& bound, const T* __restrict square_sums, int64_t positions, int64_t channels, T* __restrict rrms) {
  T count = static_cast<T>(channels);
#pragma omp simd
  for (int64_t i = 0; i < positions; ++i) rrms[i] = bound.rrms(square_sums[i] / count);
}

// Makes projections of the sums of weight * du * n.
template <class T>
void divide_sums(const RmsBound<T>& bound, const T* __restrict rrms, int64_t positions, int64_t channels, T* __restrict sums) {
  T count = static_cast<T>(channels);
#pragma omp simd
  for (int64_t i = 0; i < positions; ++i) sums[i] = bound.is_constant(rrms[i]) ? T(0) : sums[i] / count;
}

template <class S, class A, class Layout>
void forward(const RmsNorm& p, int64_t begin_item, int64_t end_item, void* memory) {
  using T = typename S::T;
  using Stored = typename S::Stored;
  Scratch<T> scratch(p, memory);
  int64_t channels = p.runs.channels, stride = p.runs.positions, loaded_run = -1;
  RmsBound<T> bound(p.eps_mode, p.eps, channels);
  for_each_segment(p.runs, p.channels_last, begin_item, end_item, [&](const Segment& segment) {
    if (loaded_run < 0 || !p.runs.shared) load_parameters(p, segment.run, scratch);
    loaded_run = segment.run;
    for_each_block(p, segment, [&](int64_t element, int64_t position, int64_t positions) {
      const auto* x = static_cast<const Stored*>(p.input) + element;
      Layout::template square_sums<S>(x, stride, positions, channels, scratch.sums);
      write_rrms(bound, scratch.sums, positions, channels, scratch.rrms);
      memcpy(static_cast<T*>(p.rrms) + position, scratch.rrms, static_cast<size_t>(positions) * sizeof(T));
      Layout::template normalise<S, A>(x, static_cast<Stored*>(p.output) + element, stride, positions, channels, scratch);
    });
  });
}

template <class S, class A, class Layout>
void backward(const RmsNorm& p, int64_t begin_item, int64_t end_item, void* memory) {
  using T = typename S::T;
  using Stored = typename S::Stored;
  Scratch<T> scratch(p, memory);
  int64_t channels = p.runs.channels, stride = p.runs.positions, loaded_run = -1;
  RmsBound<T> bound(p.eps_mode, p.eps, channels);
  clear(scratch.weight_sums, 2 * channels);
  for_each_segment(p.runs, p.channels_last, begin_item, end_item, [&](const Segment& segment) {
    if (loaded_run < 0 || !p.runs.shared) load_parameters(p, segment.run, scratch);
    loaded_run = segment.run;
    for_each_block(p, segment, [&](int64_t element, int64_t position, int64_t positions) {
      const auto* x = static_cast<const Stored*>(p.input) + element;
      memcpy(scratch.rrms, static_cast<const T*>(p.rrms) + position, static_cast<size_t>(positions) * sizeof(T));
      Layout::template differentiate<S, A>(x, static_cast<const Stored*>(p.grad_output) + element, stride, positions, channels, scratch);
      flush_sums(p, segment.slot, scratch);
      divide_sums(bound, scratch.rrms, positions, channels, scratch.sums);
      Layout::template propagate<S>(x, static_cast<Stored*>(p.grad_input) + element, stride, positions, channels, scratch);
    });
  });
}

// Calls f with the storage type, the activation and the layout.
template <class Accuracy, class S, class F>
void with_activation_and_layout(const RmsNorm& p, S storage, F f) {
  with_norm_activation<Accuracy>(
      p.activation, [&](auto activation) { p.channels_last ? f(storage, activation, Rows{}) : f(storage, activation, Planes{}); });
}

void run_forward(const RmsNorm& p, int64_t begin, int64_t end, void* scratch) {
  record_run(Family::rms_norm, kIsaName);
  with_storage_of(p.dtype, [&](auto storage) {
    using Accuracy = typename decltype(storage)::Accuracy;
    with_activation_and_layout<Accuracy>(
        p, storage, [&](auto s, auto a, auto l) { forward<decltype(s), decltype(a), decltype(l)>(p, begin, end, scratch); });
  });
}

// The activation is accurate whatever the storage type, because sums are among the results.
void run_backward(const RmsNorm& p, int64_t begin, int64_t end, void* scratch) {
  record_run(Family::rms_norm, kIsaName);
  with_storage_of(p.dtype, [&](auto storage) {
    with_activation_and_layout<Accurate>(
        p, storage, [&](auto s, auto a, auto l) { backward<decltype(s), decltype(a), decltype(l)>(p, begin, end, scratch); });
  });
}

}  // namespace
}  // namespace FASTVAE_ISA

const RmsNormKernels FASTVAE_CONCAT(rms_norm_kernels_, FASTVAE_ISA) = {scratch_bytes, run_forward, run_backward, parameter_to_double,
                                                                       parameter_from_double};

}  // namespace fastvae
