// The kernels for sampling and the Gaussian KL.
//
// kernel                          grid                            reads                                  writes
// latent_forward_kernel           (chunks of all samples)         mu, logvar, prior, seed or eps,        z, noise, kl
//                                                                 active
// latent_active_kernel            (groups, splits) of ColumnSums  mu, logvar, prior                      active
// latent_backward_kernel          (chunks of mu)                  the same as forward, grad_z, grad_kl   the gradients
// latent_backward_samples_kernel  (noise tiles of mu, splits)     the same                               the gradients
//
// latent_backward_kernel serves one sample of noise, latent_backward_samples_kernel several. Shapes and dtypes are beside the members of
// the parameter structs.
#pragma once

#include "latent_device.cuh"

namespace fastvae {
namespace {

// Outputs that are not requested are nullptr.
template <class T>
struct LatentForwardParams : LatentInputs<T> {
  T* z;             // (samples, numel)
  float* noise;     // (samples, numel)
  T* kl;            // (numel,), where the KL is not reduced
  float free_bits;  // replaces the KL of elements that are not active
  int64_t chunk;    // elements that a block handles
  LossSum kl_sum;   // into (batch,) or a scalar, where the KL is reduced
  unsigned* ticket;
};

// A warp handles one noise tile of z in a step. Elements are numbered over all samples; those of the first sample give the KL.
template <class T, bool kPrior>
__global__ void __launch_bounds__(kThreads, kPrior ? 4 : 6) latent_forward_kernel(const __grid_constant__ LatentForwardParams<T> p) {
  LossAccumulator kl_sum(p.kl_sum, p.chunk);
  NoiseKey key = {0, 0};
  if (p.seed) key = noise_key(p.seed);
  bool with_kl = p.kl || p.kl_sum.wanted();
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.total);
  for (int64_t base = begin; base < end; base += kStep) {
    kl_sum.begin_step(base);
    LatentPlace place{base + vector_offset(threadIdx.x, 0), p.total};
    bool vectorized = p.aligned && place.whole();
    LatentOperands<T> operands;
    LatentVectors<T> eps;
    load_operands<T, kPrior>(p, place, vectorized, true, operands);
    float normals[kVector][kRuns];
    if (p.seed) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) normals_of_lane(key, place.first / kNoiseTile, threadIdx.x % kWarp * kVector + k, normals[k]);
    } else if (p.eps) {
      load_contiguous(p.eps, place, vectorized, eps);
#pragma unroll
      for (int j = 0; j < kRuns; ++j)
        for (int k = 0; k < kVector; ++k) normals[k][j] = to_float(eps.run[j].v[k]);
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = place.element(j);
      int count = place.count(j);
      float mu[kVector], logvar[kVector], out[kVector];
      VarianceRatio<float> ratio[kVector];
      for (int k = 0; k < kVector; ++k) {
        mu[k] = to_float(operands.mu.run[j].v[k]);
        logvar[k] = clamp(to_float(operands.logvar.run[j].v[k]), p.clamp_min, p.clamp_max);
        ratio[k] = variance_ratio(logvar[k]);
      }
      if (p.z) {
        for (int k = 0; k < kVector; ++k) out[k] = fma(ratio[k].root, normals[k][j], mu[k]);
        store(p.z + element, count, count == kVector, out);
      }
      if (p.noise) {
        for (int k = 0; k < kVector; ++k) out[k] = normals[k][j];
        store(p.noise + element, count, count == kVector, out);
      }
      if (!with_kl) continue;
      int kl_count = static_cast<int>(max64(min64(p.numel.divisor - element, count), 0));
      for (int k = 0; k < kVector; ++k) {
        float value = kPrior ? kl_prior(mu[k], logvar[k], to_float(operands.prior_mu.run[j].v[k]),
                                        clamp(to_float(operands.prior_logvar.run[j].v[k]), p.clamp_min, p.clamp_max))
                             : kl_standard(mu[k], ratio[k].divergence);
        out[k] = 0.0f;
        if (k < kl_count) out[k] = is_active(p, element + k) ? value : p.free_bits;
      }
      if (p.kl) store(p.kl + element, kl_count, kl_count == kVector, out);
      kl_sum.add(vector_offset(threadIdx.x, j), out);
    }
    kl_sum.end_step();
  }
  if (!p.kl_sum.wanted()) return;
  kl_sum.store_partial_sums();
  if (is_last_block(p.ticket, gridDim.x)) kl_sum.finish_sums();
}

template <class T>
struct LatentActiveParams : LatentInputs<T> {
  ColumnSums columns;
  Workspace workspace;
  double free_bits;
  bool* out;  // (inner,)
};

// Decides whether the mean KL of each dimension over the batch is above the free bits. Without the number of blocks that a multiprocessor
// runs at a time, nvcc 13.0 spills on sm_120 to make room for more.
template <class T, bool kPrior>
__global__ void __launch_bounds__(kThreads, 6) latent_active_kernel(const __grid_constant__ LatentActiveParams<T> p) {
  auto kl = [&](int64_t element) {
    LatentCell cell = LatentCell::of(p, element);
    float mu = to_float(p.mu.data[cell.offset(p.mu)]);
    float logvar = clamp(to_float(p.logvar.data[cell.offset(p.logvar)]), p.clamp_min, p.clamp_max);
    if (!kPrior) return kl_standard(mu, variance_ratio(logvar).divergence);
    float prior_logvar = clamp(to_float(p.prior_logvar.data[cell.offset(p.prior_logvar)]), p.clamp_min, p.clamp_max);
    return kl_prior(mu, logvar, to_float(p.prior_mu.data[cell.offset(p.prior_mu)]), prior_logvar);
  };
  // The comparison is false for NaN, which free bits must not hide.
  auto finish = [&](int64_t column, double total) { p.out[column] = !(total / static_cast<double>(p.columns.rows) <= p.free_bits); };
  sum_columns(p.columns, p.workspace, kl, finish);
}

template <class T>
struct LatentBackwardParams : LatentInputs<T> {
  int64_t chunk;  // elements that a block handles
  int64_t samples;
  const T* grad_z;  // (samples, numel)
  // At most one of these two is given, by the reduction of the KL.
  const T* grad_kl_elements;  // (numel,)
  const float* grad_kl;       // (batch,) with grad_kl_stride, or a scalar with stride 0
  int64_t grad_kl_stride;
  float grad_kl_scale;                                           // multiplies grad_kl
  T *grad_mu, *grad_logvar, *grad_prior_mu, *grad_prior_logvar;  // (numel,)
  Workspace workspace;                                           // of a launch that splits the samples
};

// Loads the operands of the gradients, and those that only the KL needs where there is a grad_kl.
template <class T, bool kPrior>
__device__ __forceinline__ void load_kl_operands(const LatentBackwardParams<T>& p, const LatentPlace& place, bool vectorized,
                                                 LatentOperands<T>& operands, LatentVectors<T>& grad_kl) {
  load_operands<T, kPrior>(p, place, vectorized, p.grad_kl || p.grad_kl_elements, operands);
  if (p.grad_kl_elements) load_contiguous(p.grad_kl_elements, place, vectorized, grad_kl);
}

// The gradient with respect to the KL of an element.
template <class T>
__device__ __forceinline__ float kl_weight(const LatentBackwardParams<T>& p, const LatentVectors<T>& grad_kl, int j, int k,
                                           int64_t element) {
  if (!is_active(p, element)) return 0.0f;
  if (p.grad_kl_elements) return to_float(grad_kl.run[j].v[k]);
  int64_t row = p.grad_kl_stride != 0 ? quotient(p.inner, element) : 0;
  return p.grad_kl[row * p.grad_kl_stride] * p.grad_kl_scale;
}

// Writes the gradients of vector j. On entry grad_mu and grad_sigma are the parts that flow through z = mu + sigma * noise: grad_z, and
// grad_z * noise, each summed over the samples.
template <class T, bool kPrior>
__device__ __forceinline__ void write_gradients(const LatentBackwardParams<T>& p, const LatentOperands<T>& operands,
                                                const LatentVectors<T>& grad_kl, const LatentPlace& place, int j, float (&grad_mu)[kVector],
                                                float (&grad_sigma)[kVector]) {
  int64_t element = place.element(j);
  int count = place.count(j);
  bool with_kl = p.grad_kl || p.grad_kl_elements;
  float grad_logvar[kVector], grad_prior_mu[kVector], grad_prior_logvar[kVector];
  for (int k = 0; k < kVector; ++k) {
    float logvar = to_float(operands.logvar.run[j].v[k]), clamped = clamp(logvar, p.clamp_min, p.clamp_max);
    VarianceRatio<float> ratio = variance_ratio(clamped);
    grad_logvar[k] = 0.5f * ratio.root * grad_sigma[k];
    grad_prior_mu[k] = grad_prior_logvar[k] = 0.0f;
    if (with_kl && k < count) {
      float weight = kl_weight(p, grad_kl, j, k, element + k), mu = to_float(operands.mu.run[j].v[k]);
      if (kPrior) {
        float prior_logvar = to_float(operands.prior_logvar.run[j].v[k]);
        KLGradient<float> gradient =
            kl_prior_gradient(mu, clamped, to_float(operands.prior_mu.run[j].v[k]), clamp(prior_logvar, p.clamp_min, p.clamp_max));
        grad_mu[k] = fma(weight, gradient.mu, grad_mu[k]);
        grad_logvar[k] = fma(weight, gradient.logvar, grad_logvar[k]);
        grad_prior_mu[k] = weight * gradient.prior_mu;
        grad_prior_logvar[k] = gradient_through_clamp(weight * gradient.prior_logvar, prior_logvar, p.clamp_min, p.clamp_max);
      } else {
        grad_mu[k] = fma(weight, mu, grad_mu[k]);
        grad_logvar[k] = fma(0.5f * weight, ratio.excess, grad_logvar[k]);
      }
    }
    grad_logvar[k] = gradient_through_clamp(grad_logvar[k], logvar, p.clamp_min, p.clamp_max);
  }
  bool vectorized = count == kVector;
  store(p.grad_mu + element, count, vectorized, grad_mu);
  store(p.grad_logvar + element, count, vectorized, grad_logvar);
  if (kPrior) {
    store(p.grad_prior_mu + element, count, vectorized, grad_prior_mu);
    store(p.grad_prior_logvar + element, count, vectorized, grad_prior_logvar);
  }
}

// Serves one sample of noise, or a backward pass through the KL alone.
template <class T, bool kPrior>
__global__ void __launch_bounds__(kThreads, kPrior ? 3 : 4) latent_backward_kernel(const __grid_constant__ LatentBackwardParams<T> p) {
  NoiseKey key = {0, 0};
  if (p.seed) key = noise_key(p.seed);
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.total);
  for (int64_t base = begin; base < end; base += kStep) {
    LatentPlace place{base + vector_offset(threadIdx.x, 0), p.total};
    bool vectorized = p.aligned && place.whole();
    LatentOperands<T> operands;
    LatentVectors<T> grad_z, grad_kl, eps;
    if (p.grad_z) load_contiguous(p.grad_z, place, vectorized, grad_z);
    load_kl_operands<T, kPrior>(p, place, vectorized, operands, grad_kl);
    float normals[kVector][kRuns];
    if (p.grad_z && p.seed) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) normals_of_lane(key, place.first / kNoiseTile, threadIdx.x % kWarp * kVector + k, normals[k]);
    } else if (p.grad_z) {
      load_contiguous(p.eps, place, vectorized, eps);
#pragma unroll
      for (int j = 0; j < kRuns; ++j)
        for (int k = 0; k < kVector; ++k) normals[k][j] = to_float(eps.run[j].v[k]);
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      float grad_mu[kVector], grad_sigma[kVector];
      for (int k = 0; k < kVector; ++k) {
        grad_mu[k] = p.grad_z ? to_float(grad_z.run[j].v[k]) : 0.0f;
        grad_sigma[k] = p.grad_z ? grad_mu[k] * normals[k][j] : 0.0f;
      }
      write_gradients<T, kPrior>(p, operands, grad_kl, place, j, grad_mu, grad_sigma);
    }
  }
}

// The sums over samples that one thread has: of grad_z and of grad_z * noise.
using SampleSums = float[kRuns][kVector];

// Adds the sums of the blocks that share the samples of a noise tile. Returns true in the last of them, whose first warp gets the totals.
// Every thread of the block has to call this.
__device__ __forceinline__ bool add_sample_splits(const Workspace& workspace, SampleSums& grad_mu, SampleSums& grad_sigma) {
  auto slot = [&](unsigned split, int i) {
    return workspace.slots + ((split * gridDim.x + blockIdx.x) * kRuns * kVector + i) * 2 * kWarp + threadIdx.x;
  };
  bool first_warp = threadIdx.x < kWarp;
  if (first_warp) {
#pragma unroll
    for (int i = 0; i < kRuns * kVector; ++i) {
      slot(blockIdx.y, i)[0] = grad_mu[i / kVector][i % kVector];
      slot(blockIdx.y, i)[kWarp] = grad_sigma[i / kVector][i % kVector];
      grad_mu[i / kVector][i % kVector] = grad_sigma[i / kVector][i % kVector] = 0.0f;
    }
  }
  if (!is_last_block(workspace.tickets + blockIdx.x, gridDim.y)) return false;
  if (!first_warp) return true;
  for (unsigned split = 0; split < gridDim.y; ++split)
#pragma unroll
    for (int i = 0; i < kRuns * kVector; ++i) {
      grad_mu[i / kVector][i % kVector] += __ldcg(slot(split, i));
      grad_sigma[i / kVector][i % kVector] += __ldcg(slot(split, i) + kWarp);
    }
  return true;
}

// Serves several samples of noise. A block handles one noise tile of mu over one split of the samples; its warps sum over a part of them
// each, and the partial sums are added pairwise through shared memory, which is a fixed order, as are the sums of the splits.
template <class T, bool kPrior>
__global__ void __launch_bounds__(kMaxSampleWarps* kWarp, 1)
    latent_backward_samples_kernel(const __grid_constant__ LatentBackwardParams<T> p) {
  __shared__ float exchange[kMaxSampleWarps / 2][2 * kVector * kRuns][kWarp];
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kNoiseTile;
  LatentPlace place{first + lane * kVector, p.numel.divisor};
  bool vectorized = p.aligned && place.whole();
  NoiseKey key = {0, 0};
  if (p.seed) key = noise_key(p.seed);
  SampleSums grad_mu = {}, grad_sigma = {};
  for (int64_t sample = blockIdx.y * warps + warp; sample < p.samples; sample += gridDim.y * warps) {
    int64_t begin = sample * p.numel.divisor;
    LatentVectors<T> grad_z, eps;
    load_contiguous(p.grad_z + begin, place, vectorized, grad_z);
    float normals[kVector][kRuns];
    if (p.seed) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) normals_from(key, begin + first, lane * kVector + k, normals[k]);
    } else {
      load_contiguous(p.eps + begin, place, vectorized, eps);
#pragma unroll
      for (int j = 0; j < kRuns; ++j)
        for (int k = 0; k < kVector; ++k) normals[k][j] = to_float(eps.run[j].v[k]);
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      for (int k = 0; k < kVector; ++k) {
        float gradient = to_float(grad_z.run[j].v[k]);
        grad_mu[j][k] += gradient;
        grad_sigma[j][k] = fma(gradient, normals[k][j], grad_sigma[j][k]);
      }
  }
  for (int half = warps / 2; half > 0; half /= 2) {
    __syncthreads();
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < kRuns * kVector; ++i) {
        exchange[warp - half][2 * i][lane] = grad_mu[i / kVector][i % kVector];
        exchange[warp - half][2 * i + 1][lane] = grad_sigma[i / kVector][i % kVector];
      }
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < kRuns * kVector; ++i) {
        grad_mu[i / kVector][i % kVector] += exchange[warp][2 * i][lane];
        grad_sigma[i / kVector][i % kVector] += exchange[warp][2 * i + 1][lane];
      }
    }
  }
  if (gridDim.y > 1 && !add_sample_splits(p.workspace, grad_mu, grad_sigma)) return;
  if (warp != 0) return;
  LatentOperands<T> operands;
  LatentVectors<T> grad_kl;
  load_kl_operands<T, kPrior>(p, place, vectorized, operands, grad_kl);
#pragma unroll
  for (int j = 0; j < kRuns; ++j) write_gradients<T, kPrior>(p, operands, grad_kl, place, j, grad_mu[j], grad_sigma[j]);
}

}  // namespace
}  // namespace fastvae
