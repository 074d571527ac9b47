// The Snake kernels, compiled once per instruction set. Each is one pass over its tensors.
//
// kernel           reads                                   writes
// forward          input, frequency, gain                  output
// backward         input, grad_output, frequency, gain     grad_input, two sums of each channel of each slot
//
// A row is a stretch of adjacent elements. In channels-last memory it holds the channels of a position, each with parameters and sums of
// its own; in contiguous memory it holds positions of one channel.
#include "../snake_kernels.h"
#include "channel_segments.h"
#include "words.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// The scratch buffer of one call: four arrays of one value for each channel.
template <class T>
struct Scratch {
  T *frequency, *gain, *frequency_sums, *gain_sums;

  Scratch(const Snake& p, void* memory) {
    int64_t channels = p.runs.channels;
    frequency = static_cast<T*>(memory);
    gain = frequency + channels;
    frequency_sums = gain + channels;
    gain_sums = frequency_sums + channels;
    for (int64_t c = 0; c < channels; ++c) frequency[c] = narrowed<T>(p.frequency[c]);
    for (int64_t c = 0; c < channels; ++c) gain[c] = narrowed<T>(p.gain[c]);
    clear_sums(channels);
  }

  void clear_sums(int64_t channels) { memset(frequency_sums, 0, static_cast<size_t>(2 * channels) * sizeof(T)); }
};

int64_t scratch_bytes(const ChannelRuns& runs) { return 4 * runs.channels * static_cast<int64_t>(sizeof(double)); }

// Adds the sums of the scratch buffer to those of a slot.
template <class T>
void flush_sums(const Snake& p, int64_t slot, Scratch<T>& scratch) {
  int64_t channels = p.runs.channels;
  double* to = p.sums + slot * 2 * channels;
  for (int64_t c = 0; c < channels; ++c) to[c] += scratch.frequency_sums[c];
  for (int64_t c = 0; c < channels; ++c) to[channels + c] += scratch.gain_sums[c];
  scratch.clear_sums(channels);
}

// In channels-last memory a block is rows of channels, each with parameters and sums of its own.
struct Rows {
  template <class S>
  static void activate(const typename S::Stored* __restrict x, typename S::Stored* __restrict y, int64_t, int64_t positions,
                       int64_t channels, const Scratch<typename S::T>& scratch) {
    using T = typename S::T;
    const T* __restrict frequency = scratch.frequency, * __restrict gain = scratch.gain;
    for (int64_t r = 0; r < positions; ++r, x += channels, y += channels)
      for_each_word<S>(channels, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
        T value[lanes.value];
        S::get(x + i, lanes, value);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) value[l] = snake(value[l], frequency[i + l], gain[i + l]);
        S::put(y + i, lanes, value);
      });
  }

  template <class S>
  static void differentiate(const typename S::Stored* __restrict x, const typename S::Stored* __restrict grad,
                            typename S::Stored* __restrict out, int64_t, int64_t positions, int64_t channels,
                            Scratch<typename S::T>& scratch) {
    using T = typename S::T;
    const T* __restrict frequency = scratch.frequency, * __restrict gain = scratch.gain;
    T* __restrict frequency_sums = scratch.frequency_sums, * __restrict gain_sums = scratch.gain_sums;
    for (int64_t r = 0; r < positions; ++r, x += channels, grad += channels, out += channels)
      for_each_word<S>(channels, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
        T value[lanes.value], gradient[lanes.value];
        S::get(x + i, lanes, value);
        S::get(grad + i, lanes, gradient);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) {
          SnakeGradients<T> gradients = snake_gradients(value[l], gradient[l], frequency[i + l], gain[i + l]);
          value[l] = gradients.input;
          frequency_sums[i + l] += gradients.frequency;
          gain_sums[i + l] += gradients.gain;
        }
        S::put(out + i, lanes, value);
      });
  }
};

// In contiguous memory a block is a piece of each channel's plane, with one frequency and one gain; the planes are `stride` elements apart.
struct Planes {
  template <class S>
  static void activate(const typename S::Stored* __restrict x, typename S::Stored* __restrict y, int64_t stride, int64_t positions,
                       int64_t channels, const Scratch<typename S::T>& scratch) {
    using T = typename S::T;
    for (int64_t c = 0; c < channels; ++c, x += stride, y += stride) {
      T frequency = scratch.frequency[c], gain = scratch.gain[c];
      for_each_word<S>(positions, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
        T value[lanes.value];
        S::get(x + i, lanes, value);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) value[l] = snake(value[l], frequency, gain);
        S::put(y + i, lanes, value);
      });
    }
  }

  template <class S>
  static void differentiate(const typename S::Stored* __restrict x, const typename S::Stored* __restrict grad,
                            typename S::Stored* __restrict out, int64_t stride, int64_t positions, int64_t channels,
                            Scratch<typename S::T>& scratch) {
    using T = typename S::T;
    int64_t words = positions / S::kLanes * S::kLanes;
    for (int64_t c = 0; c < channels; ++c, x += stride, grad += stride, out += stride) {
      T frequency = scratch.frequency[c], gain = scratch.gain[c], of_frequency = 0, of_gain = 0;
      auto add = [=](auto lanes, int64_t i, T& frequency_sum, T& gain_sum) __attribute__((always_inline)) {
        T value[lanes.value], gradient[lanes.value];
        S::get(x + i, lanes, value);
        S::get(grad + i, lanes, gradient);
#pragma GCC unroll 2
        for (int l = 0; l < lanes.value; ++l) {
          SnakeGradients<T> gradients = snake_gradients(value[l], gradient[l], frequency, gain);
          value[l] = gradients.input;
          frequency_sum += gradients.frequency;
          gain_sum += gradients.gain;
        }
        S::put(out + i, lanes, value);
      };
#pragma omp simd reduction(+ : of_frequency, of_gain)
      for (int64_t i = 0; i < words; i += S::kLanes) add(Number<S::kLanes>{}, i, of_frequency, of_gain);
      if (words < positions) add(Number<1>{}, words, of_frequency, of_gain);
      scratch.frequency_sums[c] += of_frequency;
      scratch.gain_sums[c] += of_gain;
    }
  }
};

// Calls f(element, positions) for blocks of a segment, whose terms float32 may add up.
template <class F>
FASTVAE_INLINE void for_each_block(const Snake& p, const Segment& segment, F f) {
  int64_t step = p.channels_last ? p.runs.channels : 1;
  for (int64_t begin = 0; begin < segment.positions; begin += kSumRun)
    f(segment.element + begin * step, min64(kSumRun, segment.positions - begin));
}

template <class S, class Layout>
void forward(const Snake& p, int64_t begin_item, int64_t end_item, void* memory) {
  using Stored = typename S::Stored;
  Scratch<typename S::T> scratch(p, memory);
  for_each_segment(p.runs, p.channels_last, begin_item, end_item, [&](const Segment& segment) {
    Layout::template activate<S>(static_cast<const Stored*>(p.input) + segment.element, static_cast<Stored*>(p.output) + segment.element,
                                 p.runs.positions, segment.positions, p.runs.channels, scratch);
  });
}

template <class S, class Layout>
void backward(const Snake& p, int64_t begin_item, int64_t end_item, void* memory) {
  using Stored = typename S::Stored;
  Scratch<typename S::T> scratch(p, memory);
  for_each_segment(p.runs, p.channels_last, begin_item, end_item, [&](const Segment& segment) {
    for_each_block(p, segment, [&](int64_t element, int64_t positions) {
      Layout::template differentiate<S>(static_cast<const Stored*>(p.input) + element, static_cast<const Stored*>(p.grad_output) + element,
                                        static_cast<Stored*>(p.grad_input) + element, p.runs.positions, positions, p.runs.channels,
                                        scratch);
      flush_sums(p, segment.slot, scratch);
    });
  });
}

// Calls f with the storage type and the layout.
template <class F>
void with_types(const Snake& p, F f) {
  record_run(Family::snake, kIsaName);
  with_storage_of(p.dtype, [&](auto storage) { p.channels_last ? f(storage, Rows{}) : f(storage, Planes{}); });
}

void run_forward(const Snake& p, int64_t begin, int64_t end, void* scratch) {
  with_types(p, [&](auto storage, auto layout) { forward<decltype(storage), decltype(layout)>(p, begin, end, scratch); });
}

void run_backward(const Snake& p, int64_t begin, int64_t end, void* scratch) {
  with_types(p, [&](auto storage, auto layout) { backward<decltype(storage), decltype(layout)>(p, begin, end, scratch); });
}

}  // namespace
}  // namespace FASTVAE_ISA

const SnakeKernels FASTVAE_CONCAT(snake_kernels_, FASTVAE_ISA) = {scratch_bytes, run_forward, run_backward, parameter_to_double,
                                                                  parameter_from_double};

}  // namespace fastvae
