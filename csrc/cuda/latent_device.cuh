// The operands of the latent kernels and the device functions that load them. A thread handles kRuns vectors of kVector adjacent elements,
// one in each stream of a noise tile, because the number of an element decides its noise.
#pragma once

#include "../common/latent_formulas.h"
#include "noise.cuh"
#include "reduce.cuh"

namespace fastvae {
namespace {

// A matrix (batch, inner) whose rows are contiguous; `stride` is the number of elements from one row to the next.
template <class T>
struct LatentRows {
  const T* data = nullptr;
  int64_t stride = 0;
};

// The operands of both passes. Pointers are nullptr where the tensor is absent.
template <class T>
struct LatentInputs {
  LatentRows<T> mu, logvar, prior_mu, prior_logvar;  // without a prior the KL is against the standard normal
  Divider inner;                                     // elements of a row, which is one sample of the batch
  Divider numel;                                     // elements of mu
  int64_t total;                                     // elements of all samples of noise, samples * numel
  bool strided;                                      // the rows of some operand are not adjacent
  bool aligned;                                      // all vectors of all operands are aligned and lie in one row
  bool several_samples;                              // total is not numel
  float clamp_min, clamp_max;                        // the limits to which log variances are clamped
  const int64_t* seed;                               // scalar; nullptr where eps is given or nothing is drawn
  const T* eps;                                      // (samples, numel): the caller's noise
  const bool* active;                                // (inner,): false where free bits replace the KL; nullptr where the KL of all counts
};

// The vectors of one operand that a thread handles, as they lie in memory. They are loaded before anything is computed, so that the
// latencies of the loads overlap.
template <class T>
struct LatentVectors {
  Vector<T> run[kRuns];
};

// The elements that a thread handles: vector j begins at first + j * kNoiseLanes, and elements from `end` on do not exist.
struct LatentPlace {
  int64_t first, end;

  __device__ __forceinline__ int64_t element(int run) const { return first + run * kNoiseLanes; }
  __device__ __forceinline__ int count(int run) const { return vector_count(end - element(run)); }
  __device__ __forceinline__ bool whole() const { return element(kRuns - 1) + kVector <= end; }
};

// Loads vectors of a contiguous operand, and 0 for elements that do not exist. `vectorized` says that all vectors are whole and aligned.
template <class T>
__device__ __forceinline__ void load_contiguous(const T* from, const LatentPlace& place, bool vectorized, LatentVectors<T>& to) {
  if (vectorized) {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) to.run[j] = *reinterpret_cast<const Vector<T>*>(from + place.element(j));
  } else {
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      for (int k = 0; k < kVector; ++k) to.run[j].v[k] = k < place.count(j) ? from[place.element(j) + k] : T{};
  }
}

// The vectors of mu, logvar and the prior that a thread handles.
template <class T>
struct LatentOperands {
  LatentVectors<T> mu, logvar, prior_mu, prior_logvar;
};

// The row and the column of an element in the matrix (batch, inner).
struct LatentCell {
  int64_t row, column;

  // The cell of an element of all samples.
  template <class T>
  __device__ __forceinline__ static LatentCell of(const LatentInputs<T>& in, int64_t element) {
    if (in.several_samples) element = remainder(in.numel, element);
    int64_t row = quotient(in.inner, element);
    return {row, element - row * in.inner.divisor};
  }

  // The offset of the cell in an operand.
  template <class T>
  __device__ __forceinline__ int64_t offset(const LatentRows<T>& rows) const {
    return row * rows.stride + column;
  }
};

// Loads element k of vector j of each operand.
template <class T, bool kPrior>
__device__ __forceinline__ void load_cell(const LatentInputs<T>& in, const LatentCell& cell, bool with_mu, int j, int k,
                                          LatentOperands<T>& to) {
  if (with_mu) to.mu.run[j].v[k] = in.mu.data[cell.offset(in.mu)];
  to.logvar.run[j].v[k] = in.logvar.data[cell.offset(in.logvar)];
  if (kPrior) {
    to.prior_mu.run[j].v[k] = in.prior_mu.data[cell.offset(in.prior_mu)];
    to.prior_logvar.run[j].v[k] = in.prior_logvar.data[cell.offset(in.prior_logvar)];
  }
}

template <class T>
__device__ __forceinline__ void load_vector(const LatentRows<T>& rows, int64_t offset, Vector<T>& to) {
  to = *reinterpret_cast<const Vector<T>*>(rows.data + offset);
}

// Loads the vectors of all operands, and 0 for elements that do not exist; those of mu only where with_mu says so.
template <class T, bool kPrior>
__device__ __forceinline__ void load_operands(const LatentInputs<T>& in, const LatentPlace& place, bool vectorized, bool with_mu,
                                              LatentOperands<T>& to) {
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    if (vectorized && !in.strided && !in.several_samples) {
      int64_t element = place.element(j);
      if (with_mu) load_vector(in.mu, element, to.mu.run[j]);
      load_vector(in.logvar, element, to.logvar.run[j]);
      if (kPrior) {
        load_vector(in.prior_mu, element, to.prior_mu.run[j]);
        load_vector(in.prior_logvar, element, to.prior_logvar.run[j]);
      }
      continue;
    }
    LatentCell cell = LatentCell::of(in, place.element(j));
    if (vectorized) {
      if (with_mu) load_vector(in.mu, cell.offset(in.mu), to.mu.run[j]);
      load_vector(in.logvar, cell.offset(in.logvar), to.logvar.run[j]);
      if (kPrior) {
        load_vector(in.prior_mu, cell.offset(in.prior_mu), to.prior_mu.run[j]);
        load_vector(in.prior_logvar, cell.offset(in.prior_logvar), to.prior_logvar.run[j]);
      }
      continue;
    }
    // This loop steps from cell to cell, which takes no division per element.
    for (int k = 0; k < kVector; ++k) {
      to.mu.run[j].v[k] = to.logvar.run[j].v[k] = T{};
      if (k < place.count(j)) load_cell<T, kPrior>(in, cell, with_mu, j, k, to);
      bool row_ends = cell.column + 1 == in.inner.divisor;
      bool sample_ends = row_ends && (cell.row + 1) * in.inner.divisor == in.numel.divisor;
      cell = {sample_ends ? 0 : cell.row + row_ends, row_ends ? 0 : cell.column + 1};
    }
  }
}

template <class T>
__device__ __forceinline__ bool is_active(const LatentInputs<T>& in, int64_t element) {
  return !in.active || in.active[remainder(in.inner, element)];
}

}  // namespace
}  // namespace fastvae
