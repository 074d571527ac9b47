// The logistic mixture kernel, compiled once per instruction set.
//
// kernel   reads                          writes
// run      input, target, grad_output     loss or its sums, grad_input
//
// It handles a tile of up to kMixtureTile adjacent positions of one sample at a time. For each component it computes the probability of the
// tile's pixels and the gradient of its logarithm; then it weighs the components against each other, which gives the loss and the factor of
// each gradient.
#include "../logistic_mixture_kernels.h"
#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// A tile of a problem, and its scratch memory, rows of kMixtureTile numbers. The probability of a component times its weight, before the
// softmax's denominator, is exp(linear) * ratio.
template <class T>
struct MixtureTile {
  const LogisticMixture& p;
  T* gradients;       // (parameters, kMixtureTile)
  T *linear, *ratio;  // (mixtures, kMixtureTile)
  T *values, *sides;  // (channels, kMixtureTile), see Pixel
  int64_t sample = 0, first = 0, count = 0;

  MixtureTile(const LogisticMixture& p, T* scratch) : p(p), gradients(scratch) {
    linear = gradients + p.sizes.parameters() * kMixtureTile;
    ratio = linear + p.sizes.mixtures * kMixtureTile;
    values = ratio + p.sizes.mixtures * kMixtureTile;
    sides = values + p.sizes.channels * kMixtureTile;
  }

  int64_t offset(int64_t rows, int64_t row) const { return (sample * rows + row) * p.sizes.positions + first; }

  // One parameter of the tile's positions: in place where the input holds T, otherwise copied into the buffer.
  const T* parameter(int64_t row, T* buffer) const {
    int64_t from = offset(p.sizes.parameters(), row);
    if (p.dtype == native_dtype<T>()) return static_cast<const T*>(p.input) + from;
    convert(p.input, p.dtype, from, count, buffer);
    return buffer;
  }
};

template <class T>
T* row_of(T* rows, int64_t row) {
  return rows + row * kMixtureTile;
}

template <class T>
void load_pixels(const MixtureTile<T>& tile) {
  T buffer[kMixtureTile];
  for (int64_t channel = 0; channel < tile.p.sizes.channels; ++channel) {
    convert(tile.p.target, tile.p.target_dtype, tile.offset(tile.p.sizes.channels, channel), tile.count, buffer);
    T *values = row_of(tile.values, channel), *sides = row_of(tile.sides, channel);
#pragma omp simd
    for (int64_t i = 0; i < tile.count; ++i) {
      Pixel<T> pixel = pixel_of(buffer[i]);
      values[i] = pixel.value;
      sides[i] = pixel.side;
    }
  }
}

// Adds what the channels before `channel` contribute to its mean, and writes the derivative of the mean by each coefficient.
template <class T>
void couple(const MixtureTile<T>& tile, int64_t m, int64_t channel, T* __restrict mean) {
  T buffer[kMixtureTile];
  for (int64_t before = 0; before < channel; ++before) {
    int64_t row = tile.p.sizes.coefficient(m, channel, before);
    const T *coefficient = tile.parameter(row, buffer), *values = row_of(tile.values, before);
    T* __restrict gradient = row_of(tile.gradients, row);
#pragma omp simd
    for (int64_t i = 0; i < tile.count; ++i) {
      LogisticMixtureTanh<T> tanh = tanh_of(coefficient[i]);
      mean[i] = fma(tanh.value, values[i], mean[i]);
      gradient[i] = tanh.derivative * values[i];
    }
  }
}

// Multiplies the probability of a component by that of one channel, and writes the gradients of its logarithm.
template <class T>
void multiply_channel(const MixtureTile<T>& tile, int64_t m, int64_t channel, const T* mean, bool take_log) {
  const LogisticMixtureSizes& sizes = tile.p.sizes;
  T buffer[kMixtureTile];
  const T* log_scale = tile.parameter(sizes.log_scale(m, channel), buffer);
  const T *values = row_of(tile.values, channel), *sides = row_of(tile.sides, channel);
  T* __restrict linear = row_of(tile.linear, m), * __restrict ratio = row_of(tile.ratio, m);
  T* __restrict grad_mean = row_of(tile.gradients, sizes.mean(m, channel));
  T* __restrict grad_log_scale = row_of(tile.gradients, sizes.log_scale(m, channel));
#pragma omp simd
  for (int64_t i = 0; i < tile.count; ++i) {
    LogisticBin<T> bin = logistic_bin(Pixel<T>{values[i], sides[i]}, mean[i], log_scale[i]);
    linear[i] += bin.linear;
    ratio[i] *= bin.ratio;
    grad_mean[i] = bin.grad_mean;
    grad_log_scale[i] = bin.grad_log_scale;
  }
  for (int64_t before = 0; before < channel; ++before) {
    T* __restrict gradient = row_of(tile.gradients, sizes.coefficient(m, channel, before));
    for (int64_t i = 0; i < tile.count; ++i) gradient[i] *= grad_mean[i];
  }
  if (!take_log) return;
  for (int64_t i = 0; i < tile.count; ++i) {
    linear[i] += log(ratio[i]);
    ratio[i] = T(1);
  }
}

template <class T>
void compute_component(const MixtureTile<T>& tile, int64_t m) {
  const LogisticMixtureSizes& sizes = tile.p.sizes;
  T buffer[kMixtureTile], mean[kMixtureTile];
  T *linear = row_of(tile.linear, m), *ratio = row_of(tile.ratio, m);
  const T* logit = sizes.has_logits() ? tile.parameter(m, buffer) : nullptr;
  for (int64_t i = 0; i < tile.count; ++i) {
    linear[i] = logit ? logit[i] : T(0);
    ratio[i] = T(1);
  }
  for (int64_t channel = 0; channel < sizes.channels; ++channel) {
    const T* from = tile.parameter(sizes.mean(m, channel), buffer);
    for (int64_t i = 0; i < tile.count; ++i) mean[i] = from[i];
    couple(tile, m, channel, mean);
    multiply_channel(tile, m, channel, mean, channel % kRatiosPerLog == kRatiosPerLog - 1);
  }
}

// Writes the largest of the rows, of which there is one at least.
template <class T>
void largest_row(const T* rows, int64_t count_rows, int64_t count, T* __restrict largest) {
  for (int64_t i = 0; i < count; ++i) largest[i] = rows[i];
  for (int64_t m = 1; m < count_rows; ++m) {
    const T* row = row_of(rows, m);
    for (int64_t i = 0; i < count; ++i) largest[i] = row[i] > largest[i] ? row[i] : largest[i];
  }
}

// rows = exp(rows - largest) * factors, whose sum over the rows is returned in `total`. Without factors they are 1.
template <class T>
void exponentials(T* rows, const T* factors, int64_t count_rows, int64_t count, const T* largest, T* __restrict total) {
  for (int64_t i = 0; i < count; ++i) total[i] = T(0);
  for (int64_t m = 0; m < count_rows; ++m) {
    T* row = row_of(rows, m);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      row[i] = exp(row[i] - largest[i]) * (factors ? row_of(factors, m)[i] : T(1));
      total[i] += row[i];
    }
  }
}

// Writes the loss. Then `linear` has the share of each component in the probability, times `total`, and the gradients of the logits have
// the softmax of the logits, times `logits_total`.
template <class T>
void weigh_components(const MixtureTile<T>& tile, T* __restrict loss, T* __restrict total, T* __restrict logits_total) {
  const LogisticMixtureSizes& sizes = tile.p.sizes;
  T largest[kMixtureTile];
  largest_row(tile.linear, sizes.mixtures, tile.count, largest);
  exponentials(tile.linear, tile.ratio, sizes.mixtures, tile.count, largest, total);
  for (int64_t i = 0; i < tile.count; ++i) loss[i] = -largest[i] - log(total[i]);
  if (!sizes.has_logits()) return;
  for (int64_t m = 0; m < sizes.mixtures; ++m) {
    T* buffer = row_of(tile.gradients, m);
    const T* logit = tile.parameter(m, buffer);
    if (logit != buffer) memcpy(buffer, logit, static_cast<size_t>(tile.count) * sizeof(T));
  }
  largest_row(tile.gradients, sizes.mixtures, tile.count, largest);
  exponentials(tile.gradients, static_cast<const T*>(nullptr), sizes.mixtures, tile.count, largest, logits_total);
  for (int64_t i = 0; i < tile.count; ++i) loss[i] += largest[i] + log(logits_total[i]);
}

// Writes the gradient value(i) of one parameter of position i.
template <class T, class Value>
void write_gradient(const MixtureTile<T>& tile, int64_t row, Value value) {
  T buffer[kMixtureTile];
  int64_t begin = tile.offset(tile.p.sizes.parameters(), row);
  T* __restrict to = destination(tile.p.grad_input, begin, buffer);
  for (int64_t i = 0; i < tile.count; ++i) to[i] = value(i);
  store(tile.p.grad_input, begin, tile.count, to);
}

// Writes the gradients, `factors` times those of the loss.
template <class T>
void write_gradients(const MixtureTile<T>& tile, const T* factors, const T* total, const T* logits_total) {
  const LogisticMixtureSizes& sizes = tile.p.sizes;
  T share[kMixtureTile], by_total[kMixtureTile], by_logits_total[kMixtureTile];
  for (int64_t i = 0; i < tile.count; ++i) {
    by_total[i] = -divide(factors[i], total[i]);
    by_logits_total[i] = sizes.has_logits() ? divide(factors[i], logits_total[i]) : T(0);
  }
  for (int64_t m = 0; m < sizes.mixtures; ++m) {
    const T* linear = row_of(tile.linear, m);
    for (int64_t i = 0; i < tile.count; ++i) share[i] = linear[i] * by_total[i];
    auto write_scaled = [&](int64_t row) {
      const T* gradients = row_of(tile.gradients, row);
      write_gradient(tile, row, [&](int64_t i) { return gradients[i] * share[i]; });
    };
    if (sizes.has_logits()) {
      const T* softmax = row_of(tile.gradients, m);
      write_gradient(tile, m, [&](int64_t i) { return fma(softmax[i], by_logits_total[i], share[i]); });
    }
    for (int64_t channel = 0; channel < sizes.channels; ++channel) {
      write_scaled(sizes.mean(m, channel));
      write_scaled(sizes.log_scale(m, channel));
      for (int64_t before = 0; before < channel; ++before) write_scaled(sizes.coefficient(m, channel, before));
    }
  }
}

template <class T>
void run_tile(const MixtureTile<T>& tile, int64_t item) {
  const LogisticMixture& p = tile.p;
  T loss[kMixtureTile], total[kMixtureTile], logits_total[kMixtureTile], factors[kMixtureTile], buffer[kMixtureTile];
  load_pixels(tile);
  for (int64_t m = 0; m < p.sizes.mixtures; ++m) compute_component(tile, m);
  weigh_components(tile, loss, total, logits_total);
  int64_t begin = tile.sample * p.sizes.positions + tile.first;
  if (p.loss) write(p.loss, begin, tile.count, loss);
  if (p.sums) p.sums[p.partition.slot(item, begin)] += sum_run(loss, tile.count);
  if (!p.grad_input) return;

  for (int64_t i = 0; i < tile.count; ++i) factors[i] = static_cast<T>(p.grad_scale);
  if (p.grad_output) {
    const T* incoming = load(p.grad_output, begin, tile.count, buffer);
    for (int64_t i = 0; i < tile.count; ++i) factors[i] *= incoming[i];
  }
  write_gradients(tile, factors, total, logits_total);
}

template <class T>
void run_items(const LogisticMixture& p, T* scratch, int64_t begin_item, int64_t end_item) {
  MixtureTile<T> tile(p, scratch);
  for (int64_t item = begin_item; item < end_item; ++item) {
    int64_t begin = p.partition.begin(item), end = p.partition.end(item);
    while (begin < end) {
      tile.sample = begin / p.sizes.positions;
      tile.first = begin - tile.sample * p.sizes.positions;
      int64_t rest = p.sizes.positions - tile.first < end - begin ? p.sizes.positions - tile.first : end - begin;
      tile.count = rest < kMixtureTile ? rest : kMixtureTile;
      run_tile(tile, item);
      begin += tile.count;
    }
  }
}

void run(const LogisticMixture& p, void* scratch, int64_t begin_item, int64_t end_item) {
  record_run(Family::logistic_mixture, kIsaName);
  p.is_double() ? run_items(p, static_cast<double*>(scratch), begin_item, end_item)
                : run_items(p, static_cast<float*>(scratch), begin_item, end_item);
}

}  // namespace
}  // namespace FASTVAE_ISA

const LogisticMixtureKernels FASTVAE_CONCAT(logistic_mixture_kernels_, FASTVAE_ISA) = {run};

}  // namespace fastvae
