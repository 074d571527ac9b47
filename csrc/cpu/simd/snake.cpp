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

template <class S>
void forward(const Snake& p, int64_t begin_item, int64_t end_item, void* memory) {
  using T = typename S::T;
  using Stored = typename S::Stored;
  Scratch<T> scratch(p, memory);
  const T* __restrict frequency = scratch.frequency, * __restrict gain = scratch.gain;
  int64_t channels = p.runs.channels, stride = p.runs.positions;
  for_each_segment(p.runs, p.channels_last, begin_item, end_item, [&](const Segment& segment) {
    const auto* __restrict x = static_cast<const Stored*>(p.input) + segment.element;
    auto* __restrict y = static_cast<Stored*>(p.output) + segment.element;
    auto write = [=](auto lanes, int64_t i, const T* a, const T* b, int64_t step) __attribute__((always_inline)) {
      T value[lanes.value];
      S::get(x + i, lanes, value);
#pragma GCC unroll 2
      for (int l = 0; l < lanes.value; ++l) value[l] = snake(value[l], a[l * step], b[l * step]);
      S::put(y + i, lanes, value);
    };
    if (p.channels_last)
      for (int64_t row = 0; row < segment.positions * channels; row += channels)
        for_each_word<S>(channels,
                         [=](auto lanes, int64_t i) __attribute__((always_inline)) { write(lanes, row + i, frequency + i, gain + i, 1); });
    else
      for (int64_t c = 0; c < channels; ++c)
        for_each_word<S>(segment.positions, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
          write(lanes, c * stride + i, frequency + c, gain + c, 0);
        });
  });
}

// Adds the sums of the scratch buffer to those of a slot.
template <class T>
void flush_sums(const Snake& p, int64_t slot, Scratch<T>& scratch) {
  int64_t channels = p.runs.channels;
  double* to = p.sums + slot * 2 * channels;
  for (int64_t c = 0; c < channels; ++c) to[c] += scratch.frequency_sums[c];
  for (int64_t c = 0; c < channels; ++c) to[channels + c] += scratch.gain_sums[c];
  scratch.clear_sums(channels);
}

// Writes the gradients of a word, and adds to two sums for each of its elements, or to the same two.
template <class S, class Lanes>
FASTVAE_INLINE void differentiate(const typename S::Stored* x, const typename S::Stored* grad, typename S::Stored* out, Lanes lanes,
                                  const typename S::T* frequency, const typename S::T* gain, int64_t step, typename S::T* frequency_sums,
                                  typename S::T* gain_sums) {
  using T = typename S::T;
  T value[Lanes::value], gradient[Lanes::value];
  S::get(x, lanes, value);
  S::get(grad, lanes, gradient);
#pragma GCC unroll 2
  for (int l = 0; l < Lanes::value; ++l) {
    SnakeGradients<T> gradients = snake_gradients(value[l], gradient[l], frequency[l * step], gain[l * step]);
    value[l] = gradients.input;
    frequency_sums[l * step] += gradients.frequency;
    gain_sums[l * step] += gradients.gain;
  }
  S::put(out, lanes, value);
}

template <class S>
void backward(const Snake& p, int64_t begin_item, int64_t end_item, void* memory) {
  using T = typename S::T;
  using Stored = typename S::Stored;
  Scratch<T> scratch(p, memory);
  const T* __restrict frequency = scratch.frequency, * __restrict gain = scratch.gain;
  T* __restrict frequency_sums = scratch.frequency_sums, * __restrict gain_sums = scratch.gain_sums;
  int64_t channels = p.runs.channels, stride = p.runs.positions;
  for_each_segment(p.runs, p.channels_last, begin_item, end_item, [&](const Segment& segment) {
    const auto* __restrict x = static_cast<const Stored*>(p.input) + segment.element;
    const auto* __restrict grad = static_cast<const Stored*>(p.grad_output) + segment.element;
    auto* __restrict out = static_cast<Stored*>(p.grad_input) + segment.element;
    // float32 adds up kSumRun terms of a channel at most, before double takes the sums.
    for (int64_t begin = 0; begin < segment.positions; begin += kSumRun) {
      int64_t end = min64(begin + kSumRun, segment.positions);
      if (p.channels_last)
        for (int64_t row = begin * channels; row < end * channels; row += channels)
          for_each_word<S>(channels, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
            differentiate<S>(x + row + i, grad + row + i, out + row + i, lanes, frequency + i, gain + i, 1, frequency_sums + i,
                             gain_sums + i);
          });
      else
        for (int64_t c = 0; c < channels; ++c) {
          int64_t first = c * stride + begin, words = (end - begin) / S::kLanes * S::kLanes;
          T of_frequency = 0, of_gain = 0;
#pragma omp simd reduction(+ : of_frequency, of_gain)
          for (int64_t i = 0; i < words; i += S::kLanes)
            differentiate<S>(x + first + i, grad + first + i, out + first + i, Number<S::kLanes>{}, frequency + c, gain + c, 0,
                             &of_frequency, &of_gain);
          if (words < end - begin)
            differentiate<S>(x + first + words, grad + first + words, out + first + words, Number<1>{}, frequency + c, gain + c, 0,
                             &of_frequency, &of_gain);
          frequency_sums[c] += of_frequency;
          gain_sums[c] += of_gain;
        }
      flush_sums(p, segment.slot, scratch);
    }
  });
}

void run_forward(const Snake& p, int64_t begin, int64_t end, void* scratch) {
  record_run(Family::snake, kIsaName);
  with_storage_of(p.dtype, [&](auto storage) { forward<decltype(storage)>(p, begin, end, scratch); });
}

void run_backward(const Snake& p, int64_t begin, int64_t end, void* scratch) {
  record_run(Family::snake, kIsaName);
  with_storage_of(p.dtype, [&](auto storage) { backward<decltype(storage)>(p, begin, end, scratch); });
}

}  // namespace
}  // namespace FASTVAE_ISA

const SnakeKernels FASTVAE_CONCAT(snake_kernels_, FASTVAE_ISA) = {scratch_bytes, run_forward, run_backward, parameter_to_double,
                                                                  parameter_from_double};

}  // namespace fastvae
