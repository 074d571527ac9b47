// The reconstruction kernels, compiled once per instruction set.
//
// kernel   reads                                               writes
// run      input, target, weight, extra, grad_output           loss or its sums, grad_input, grad_target, grad_logvar or its sums
// scale    a tensor                                            the tensor times a factor
//
// `run` computes the loss and its gradient in one pass over input and target, a tile of kTile elements at a time.
#include "../../common/reconstruction_formulas.h"
#include "../reconstruction_kernels.h"
#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// The operands of a tile. `terms` computes the formulas of the likelihood `Terms` for element i.
template <class Terms, class T>
struct Operands {
  const T *input, *target, *extra;

  FASTVAE_INLINE LossTerms<T> terms(const Operands& o, int64_t i) { return Terms::terms(o.input[i], o.target[i]); }
};

template <class T>
struct Operands<WeightedBCEWithLogits, T> {
  const T *input, *target, *extra;

  FASTVAE_INLINE LossTerms<T> terms(const Operands& o, int64_t i) {
    return WeightedBCEWithLogits::terms(o.input[i], o.target[i], o.extra[i]);
  }
};

template <class T>
struct Operands<Gaussian, T> {
  const T *input, *target, *extra;

  FASTVAE_INLINE LossTerms<T> terms(const Operands& o, int64_t i) { return Gaussian::terms(o.input[i], o.target[i], o.extra[i]); }
};

// Writes the gradient of the input of elements [begin, end), and returns the sum of their losses.
template <class Terms, class T>
FASTVAE_INLINE T loss_and_gradient(const Operands<Terms, T>& operands, int64_t begin, int64_t end, T scale, T* __restrict grad_input) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = begin; i < end; ++i) {
    LossTerms<T> terms = Operands<Terms, T>::terms(operands, i);
    total += terms.loss;
    grad_input[i] = terms.input * scale;
  }
  return total;
}

// Handles the common case, a scalar reduction without weights, in one loop whose values stay in registers.
template <class Terms, class T>
void plain_tile(const Reconstruction& p, const Operands<Terms, T>& operands, int64_t item, int64_t begin, int64_t count) {
  T grad_buffer[kTile];
  T* grad_input = destination(p.grad_input, begin, grad_buffer);
  T scale = static_cast<T>(p.grad_scale);
  double total =
      sum_pieces(count, [&](int64_t first, int64_t last) { return loss_and_gradient(operands, first, last, scale, grad_input); });
  store(p.grad_input, begin, count, grad_input);
  p.sums[p.partition.slot(item, begin)] += total;
}

// Writes values * factors.
template <class T>
void scale_into(const Output& output, int64_t begin, int64_t count, const T* values, const T* factors) {
  T buffer[kTile];
  T* to = destination(output, begin, buffer);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = values[i] * factors[i];
  store(output, begin, count, to);
}

// Adds values * factors, the gradients of the elements, to the sums of the values of a shared log variance.
template <class T>
void accumulate_shared(const View& view, int64_t begin, int64_t count, const T* values, const T* factors, double* sums) {
  T scaled[kTile];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) scaled[i] = values[i] * factors[i];
  if (view.inner_stride == 1) {
    int64_t column = begin % view.inner;
    for (int64_t i = 0; i < count; ++i) {
      sums[column] += scaled[i];
      column = column + 1 == view.inner ? 0 : column + 1;
    }
    return;
  }
  for (int64_t done = 0; done < count;) {
    int64_t row = (begin + done) / view.inner, row_end = (row + 1) * view.inner - begin;
    int64_t run = (row_end < count ? row_end : count) - done;
    sums[row % view.period] += sum_run(scaled + done, run);
    done += run;
  }
}

// The results of a tile, before weights and grad_output.
template <class T>
struct TermBuffers {
  T loss[kTile], input[kTile], target[kTile], logvar[kTile];
};

// Handles every case, with one loop for each step.
template <class Terms, class T>
void general_tile(const Reconstruction& p, const Operands<Terms, T>& operands, int64_t item, int64_t begin, int64_t count) {
  TermBuffers<T> terms;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    LossTerms<T> t = Operands<Terms, T>::terms(operands, i);
    terms.loss[i] = t.loss;
    terms.input[i] = t.input;
    terms.target[i] = t.target;
    terms.logvar[i] = t.logvar;
  }
  T weight_buffer[kTile], factors[kTile], incoming_buffer[kTile];
  const T* weight = p.weight ? load(p.weight, begin, count, weight_buffer) : nullptr;
  if (weight)
    for (int64_t i = 0; i < count; ++i) terms.loss[i] *= weight[i];
  if (p.loss) {
    T loss_buffer[kTile];
    T* loss = destination(p.loss, begin, loss_buffer);
    for (int64_t i = 0; i < count; ++i) loss[i] = terms.loss[i];
    store(p.loss, begin, count, loss);
  }
  if (p.sums) accumulate(p.partition, item, begin, count, terms.loss, p.sums);
  if (!p.grad_input) return;

  for (int64_t i = 0; i < count; ++i) factors[i] = static_cast<T>(p.grad_scale);
  if (p.grad_output) {
    const T* incoming = load(p.grad_output, begin, count, incoming_buffer);
    for (int64_t i = 0; i < count; ++i) factors[i] *= incoming[i];
  }
  if (weight)
    for (int64_t i = 0; i < count; ++i) factors[i] *= weight[i];
  scale_into(p.grad_input, begin, count, terms.input, factors);
  if (p.grad_target) scale_into(p.grad_target, begin, count, terms.target, factors);
  if (p.grad_logvar) scale_into(p.grad_logvar, begin, count, terms.logvar, factors);
  if (p.grad_logvar_sums) {
    int64_t values = p.extra.inner_stride == 1 ? p.extra.inner : p.extra.period;
    accumulate_shared(p.extra, begin, count, terms.logvar, factors, p.grad_logvar_sums + item * values);
  }
}

template <class Terms, class T>
void run_items(const Reconstruction& p, int64_t begin_item, int64_t end_item) {
  T input_buffer[kTile], target_buffer[kTile], extra_buffer[kTile];
  bool rows_share_items = p.partition.slots_per_row == 1 && p.partition.rows > 1;
  bool plain =
      p.sums && p.grad_input && !rows_share_items && !p.weight && !p.grad_output && !p.grad_target && !p.grad_logvar && !p.grad_logvar_sums;
  for_each_tile(p.partition, begin_item, end_item, [&](int64_t item, int64_t begin, int64_t count) {
    Operands<Terms, T> operands;
    operands.input = load(p.input, begin, count, input_buffer);
    operands.target = load(p.target, begin, count, target_buffer);
    operands.extra = p.extra ? load(p.extra, begin, count, extra_buffer) : nullptr;
    plain ? plain_tile(p, operands, item, begin, count) : general_tile(p, operands, item, begin, count);
  });
}

template <class T>
void run_likelihood(const Reconstruction& p, int64_t begin_item, int64_t end_item) {
  switch (p.likelihood) {
    case Likelihood::bce_with_logits:
      return p.extra ? run_items<WeightedBCEWithLogits, T>(p, begin_item, end_item) : run_items<BCEWithLogits, T>(p, begin_item, end_item);
    case Likelihood::bce:
      return run_items<BCE, T>(p, begin_item, end_item);
    case Likelihood::mse:
      return run_items<SquaredError, T>(p, begin_item, end_item);
    case Likelihood::gaussian:
      return run_items<Gaussian, T>(p, begin_item, end_item);
  }
}

void run(const Reconstruction& p, int64_t begin_item, int64_t end_item) {
  record_run(Family::reconstruction, kIsaName);
  p.is_double ? run_likelihood<double>(p, begin_item, end_item) : run_likelihood<float>(p, begin_item, end_item);
}

template <class T>
void scale_range(const View& from, const Output& to, T factor, int64_t begin, int64_t end) {
  T buffer[kTile], out_buffer[kTile];
  for (int64_t first = begin; first < end; first += kTile) {
    int64_t count = end - first < kTile ? end - first : kTile;
    const T* values = load(from, first, count, buffer);
    T* out = destination(to, first, out_buffer);
    for (int64_t i = 0; i < count; ++i) out[i] = values[i] * factor;
    store(to, first, count, out);
  }
}

void scale(const View& from, const Output& to, double factor, bool is_double, int64_t begin, int64_t end) {
  is_double ? scale_range<double>(from, to, factor, begin, end) : scale_range<float>(from, to, static_cast<float>(factor), begin, end);
}

}  // namespace
}  // namespace FASTVAE_ISA

const ReconstructionKernels FASTVAE_CONCAT(reconstruction_kernels_, FASTVAE_ISA) = {run, scale};

}  // namespace fastvae
