// Kernels for sampling and the Gaussian KL. They are plain loops over tiles of up to kTile elements, which the compiler vectorises for each
// instruction set.
//
// kernel           computes, for the items that it is given
// forward          z, the noise, and the KL or its sums
// backward         the gradients of mu, logvar and the prior, summed over the samples
// dimension_sums   the KL of each dimension, summed over some rows
#include "../../common/latent_formulas.h"
#include "../latent_kernels.h"
#include "philox_tile.h"
#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// Draws the 512 normals of a noise tile, see docs/randomness.md.
void normal_tile(const uint32_t* key, int64_t tile, float* __restrict out) {
  uint32_t words[4][kNoiseLanes];
  // The first counter is a multiple of 128, so the counters of a tile differ in the low word alone.
  uint64_t counter = static_cast<uint64_t>(tile) * kNoiseLanes;
  philox_tile(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), key[0], key[1], words);
  for (int pair = 0; pair < 4; pair += 2) {
    float* first = out + pair * kNoiseLanes;
    float* second = first + kNoiseLanes;
#pragma omp simd
    for (int lane = 0; lane < kNoiseLanes; ++lane) box_muller(words[pair][lane], words[pair + 1][lane], first[lane], second[lane]);
  }
}

// Draws the normals [begin, begin + count), count <= kTile, which may lie in two noise tiles.
const float* draw(const uint32_t* key, int64_t begin, int64_t count, float (&buffer)[2 * kNoiseTile]) {
  int64_t tile = begin / kNoiseTile, offset = begin - tile * kNoiseTile;
  normal_tile(key, tile, buffer);
  if (offset + count > kNoiseTile) normal_tile(key, tile + 1, buffer + kNoiseTile);
  return buffer + offset;
}

// Whether the clamp keeps log variances within kExponentBound, and so differences of two of them within twice that. Then the exponentials
// need no special cases.
bool is_bounded(const LatentInputs& in) { return in.clamp_min >= -kExponentBound && in.clamp_max <= kExponentBound; }

// The operands of a tile, in place or converted into a buffer, and what is computed from each log variance.
template <class T>
struct LatentTile {
  T mu_buffer[kTile], logvar_buffer[kTile], prior_mu_buffer[kTile], prior_logvar_buffer[kTile], noise_buffer[kTile];
  T sigma[kTile], excess[kTile], divergence[kTile];  // the members of variance_ratio() for the clamped log variance
  float drawn_buffer[2 * kNoiseTile];
  const T *mu, *logvar, *prior_mu, *prior_logvar;  // log variances before the clamp
  T clamp_min, clamp_max;

  void read(const LatentInputs& in, int64_t begin, int64_t count) {
    clamp_min = static_cast<T>(in.clamp_min);
    clamp_max = static_cast<T>(in.clamp_max);
    mu = load(in.mu, begin, count, mu_buffer);
    logvar = load(in.logvar, begin, count, logvar_buffer);
    if (in.prior_mu) {
      prior_mu = load(in.prior_mu, begin, count, prior_mu_buffer);
      prior_logvar = load(in.prior_logvar, begin, count, prior_logvar_buffer);
    }
  }

  template <bool kBounded>
  void compute_sigma(int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sigma[i] = variance_ratio<kBounded>(clamp(logvar[i], clamp_min, clamp_max)).root;
  }

  // Computes sigma, and the divergence, which the KL against the standard normal needs.
  template <bool kBounded>
  void compute_divergence(int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      VarianceRatio<T> ratio = variance_ratio<kBounded>(clamp(logvar[i], clamp_min, clamp_max));
      sigma[i] = ratio.root;
      divergence[i] = ratio.divergence;
    }
  }

  // Computes sigma, and the excess, which the gradient of that KL needs.
  template <bool kBounded>
  void compute_excess(int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      VarianceRatio<T> ratio = variance_ratio<kBounded>(clamp(logvar[i], clamp_min, clamp_max));
      sigma[i] = ratio.root;
      excess[i] = ratio.excess;
    }
  }

  // The noise of elements [begin, begin + count) of all samples: the caller's, or drawn.
  const T* noise(const LatentInputs& in, int64_t begin, int64_t count) {
    if (in.eps) return load(in.eps, begin, count, noise_buffer);
    const float* drawn = draw(in.key, begin, count, drawn_buffer);
    if constexpr (sizeof(T) == sizeof(float)) {
      return drawn;
    } else {
      convert_run(drawn, count, noise_buffer);
      return noise_buffer;
    }
  }

  template <bool kBounded>
  void kl(const LatentInputs& in, int64_t count, T* __restrict out) const {
    if (in.prior_mu) {
      for (int64_t i = 0; i < count; ++i)
        out[i] =
            kl_prior<kBounded>(mu[i], clamp(logvar[i], clamp_min, clamp_max), prior_mu[i], clamp(prior_logvar[i], clamp_min, clamp_max));
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = kl_standard(mu[i], divergence[i]);
    }
  }
};

// Writes z, and the noise where it is requested, of all samples of a tile.
template <class T>
void sample(const LatentForward& p, LatentTile<T>& tile, int64_t begin, int64_t count) {
  T z_buffer[kTile];
  const T *mu = tile.mu, *sigma = tile.sigma;
  for (int64_t s = 0; s < p.samples; ++s) {
    int64_t first = s * p.numel + begin;
    T* z = destination(p.z, first, z_buffer);
    const T* noise = tile.noise(p, first, count);
    if (p.noise) write(p.noise, first, count, noise);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] = fma(sigma[i], noise[i], mu[i]);
    store(p.z, first, count, z);
  }
}

// Writes the KL of a tile or adds it to the sums.
template <bool kBounded, class T>
void forward_kl(const LatentForward& p, const LatentTile<T>& tile, int64_t item, int64_t begin, int64_t count) {
  T kl_buffer[kTile], active_buffer[kTile];
  T* kl = p.kl ? destination(p.kl, begin, kl_buffer) : kl_buffer;
  tile.template kl<kBounded>(p, count, kl);
  if (p.active) {
    const T* active = load(p.active, begin, count, active_buffer);
    T free_bits = static_cast<T>(p.free_bits);
    for (int64_t i = 0; i < count; ++i) kl[i] = active[i] != T(0) ? kl[i] : free_bits;
  }
  if (p.kl) store(p.kl, begin, count, kl);
  if (p.sums) accumulate(p.partition, item, begin, count, kl, p.sums);
}

// Forward for the common case, one sample and the total KL against the standard normal: one loop, whose values stay in registers.
template <class T>
void plain_forward(const LatentForward& p, LatentTile<T>& tile, int64_t item, int64_t begin, int64_t count) {
  T z_buffer[kTile];
  T* z = destination(p.z, begin, z_buffer);
  // The cache lines of z arrive while the random words are computed.
  prefetch_to_write(z, count);
  const T *noise = tile.noise(p, begin, count), *mu = tile.mu, *logvar = tile.logvar;
  if (p.noise) write(p.noise, begin, count, noise);
  T clamp_min = tile.clamp_min, clamp_max = tile.clamp_max;
  p.sums[p.partition.slot(item, begin)] += sum_pieces(count, [=](int64_t first, int64_t last) {
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = first; i < last; ++i) {
      VarianceRatio<T> ratio = variance_ratio<true>(clamp(logvar[i], clamp_min, clamp_max));
      z[i] = fma(ratio.root, noise[i], mu[i]);
      total += kl_standard(mu[i], ratio.divergence);
    }
    return total;
  });
  store(p.z, begin, count, z);
}

template <bool kBounded, class T>
void general_forward(const LatentForward& p, LatentTile<T>& tile, int64_t item, int64_t begin, int64_t count) {
  if ((p.kl || p.sums) && !p.prior_mu)
    tile.template compute_divergence<kBounded>(count);
  else if (p.z)
    tile.template compute_sigma<kBounded>(count);
  if (p.z) sample(p, tile, begin, count);
  if (p.kl || p.sums) forward_kl<kBounded>(p, tile, item, begin, count);
}

template <class T>
void forward_items(const LatentForward& p, int64_t begin_item, int64_t end_item) {
  LatentTile<T> tile;
  bool one_slot_per_item = p.partition.slots_per_row > 1 || p.partition.rows == 1;
  bool bounded = is_bounded(p), plain = bounded && p.z && p.samples == 1 && p.sums && one_slot_per_item && !p.prior_mu && !p.active;
  for_each_tile(p.partition, begin_item, end_item, [&](int64_t item, int64_t begin, int64_t count) {
    tile.read(p, begin, count);
    if (plain) return plain_forward(p, tile, item, begin, count);
    bounded ? general_forward<true>(p, tile, item, begin, count) : general_forward<false>(p, tile, item, begin, count);
  });
}

// The gradients of a tile.
template <class T>
struct LatentGradients {
  T mu[kTile], logvar[kTile], prior_mu[kTile], prior_logvar[kTile];
};

// Adds the part of the gradients of mu and logvar that flows through z, summed over the samples in their order.
template <class T>
void backward_z(const LatentBackward& p, LatentTile<T>& tile, int64_t begin, int64_t count, LatentGradients<T>& grads) {
  T grad_buffer[kTile];
  for (int64_t s = 0; s < p.samples; ++s) {
    int64_t first = s * p.numel + begin;
    const T* noise = tile.noise(p, first, count);
    const T* grad = load(p.grad_z, first, count, grad_buffer);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      grads.mu[i] += grad[i];
      grads.logvar[i] = fma(T(0.5) * tile.sigma[i] * grad[i], noise[i], grads.logvar[i]);
    }
  }
}

// The gradient with respect to the KL of each element: grad_kl times its scale, and 0 where free bits replace the KL.
template <class T>
const T* kl_weights(const LatentBackward& p, int64_t begin, int64_t count, T* weights) {
  const T* grad_kl = load(p.grad_kl, begin, count, weights);
  T active_buffer[kTile], scale = static_cast<T>(p.grad_kl_scale);
  for (int64_t i = 0; i < count; ++i) weights[i] = grad_kl[i] * scale;
  if (p.active) {
    const T* active = load(p.active, begin, count, active_buffer);
    for (int64_t i = 0; i < count; ++i) weights[i] = active[i] != T(0) ? weights[i] : T(0);
  }
  return weights;
}

// Adds the part of the gradients that flows through the KL.
template <bool kBounded, class T>
void backward_kl(const LatentBackward& p, const LatentTile<T>& tile, int64_t begin, int64_t count, LatentGradients<T>& grads) {
  T weight_buffer[kTile];
  const T* weight = kl_weights(p, begin, count, weight_buffer);
  const T *mu = tile.mu, *logvar = tile.logvar;
  if (!p.prior_mu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      grads.mu[i] = fma(weight[i], mu[i], grads.mu[i]);
      grads.logvar[i] = fma(T(0.5) * weight[i], tile.excess[i], grads.logvar[i]);
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    T posterior = clamp(logvar[i], tile.clamp_min, tile.clamp_max), prior = clamp(tile.prior_logvar[i], tile.clamp_min, tile.clamp_max);
    KLGradient<T> gradient = kl_prior_gradient<kBounded>(mu[i], posterior, tile.prior_mu[i], prior);
    grads.mu[i] = fma(weight[i], gradient.mu, grads.mu[i]);
    grads.logvar[i] = fma(weight[i], gradient.logvar, grads.logvar[i]);
    grads.prior_mu[i] = weight[i] * gradient.prior_mu;
    grads.prior_logvar[i] = weight[i] * gradient.prior_logvar;
  }
}

// Writes the gradient of a log variance through its clamp.
template <class T>
void write_through_clamp(const LatentTile<T>& tile, const Output& output, int64_t begin, int64_t count, const T* logvar,
                         const T* gradient) {
  T buffer[kTile];
  T* to = destination(output, begin, buffer);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = gradient_through_clamp(gradient[i], logvar[i], tile.clamp_min, tile.clamp_max);
  store(output, begin, count, to);
}

// Backward for the common case, one sample and one weight for the KL against the standard normal: one loop, whose values stay in registers.
template <class T>
void plain_backward(const LatentBackward& p, LatentTile<T>& tile, T weight, int64_t begin, int64_t count) {
  LatentGradients<T> buffers;
  T grad_buffer[kTile], clamp_min = tile.clamp_min, clamp_max = tile.clamp_max;
  const T *noise = tile.noise(p, begin, count), *grad = load(p.grad_z, begin, count, grad_buffer), *mu = tile.mu, *logvar = tile.logvar;
  T *grad_mu = destination(p.grad_mu, begin, buffers.mu), *grad_logvar = destination(p.grad_logvar, begin, buffers.logvar);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    VarianceRatio<T> ratio = variance_ratio<true>(clamp(logvar[i], clamp_min, clamp_max));
    T gradient = T(0.5) * fma(grad[i] * ratio.root, noise[i], weight * ratio.excess);
    grad_mu[i] = fma(weight, mu[i], grad[i]);
    grad_logvar[i] = gradient_through_clamp(gradient, logvar[i], clamp_min, clamp_max);
  }
  store(p.grad_mu, begin, count, grad_mu);
  store(p.grad_logvar, begin, count, grad_logvar);
}

template <bool kBounded, class T>
void general_backward(const LatentBackward& p, LatentTile<T>& tile, LatentGradients<T>& grads, int64_t begin, int64_t count) {
  p.grad_kl && !p.prior_mu ? tile.template compute_excess<kBounded>(count) : tile.template compute_sigma<kBounded>(count);
  memset(&grads, 0, sizeof grads);
  if (p.grad_z) backward_z(p, tile, begin, count, grads);
  if (p.grad_kl) backward_kl<kBounded>(p, tile, begin, count, grads);
  write(p.grad_mu, begin, count, grads.mu);
  write_through_clamp(tile, p.grad_logvar, begin, count, tile.logvar, grads.logvar);
  if (p.prior_mu) {
    write(p.grad_prior_mu, begin, count, grads.prior_mu);
    write_through_clamp(tile, p.grad_prior_logvar, begin, count, tile.prior_logvar, grads.prior_logvar);
  }
}

template <class T>
void backward_items(const LatentBackward& p, int64_t begin_item, int64_t end_item) {
  LatentTile<T> tile;
  LatentGradients<T> grads;
  bool one_weight = p.grad_kl && p.grad_kl.inner_stride == 0 && p.grad_kl.period == 1 && !p.active;
  bool bounded = is_bounded(p), plain = bounded && p.grad_z && p.samples == 1 && one_weight && !p.prior_mu;
  T weight = 0;
  if (plain) kl_weights(p, 0, 1, &weight);
  for_each_tile(p.partition, begin_item, end_item, [&](int64_t, int64_t begin, int64_t count) {
    tile.read(p, begin, count);
    if (plain) return plain_backward(p, tile, weight, begin, count);
    bounded ? general_backward<true>(p, tile, grads, begin, count) : general_backward<false>(p, tile, grads, begin, count);
  });
}

template <bool kBounded, class T>
void sum_dimensions(const LatentInputs& p, int64_t inner, int64_t begin_row, int64_t end_row, int64_t dimension, int64_t count,
                    double* sums) {
  LatentTile<T> tile;
  T kl[kTile];
  for (int64_t i = 0; i < count; ++i) sums[i] = 0.0;
  for (int64_t row = begin_row; row < end_row; ++row) {
    tile.read(p, row * inner + dimension, count);
    if (!p.prior_mu) tile.template compute_divergence<kBounded>(count);
    tile.template kl<kBounded>(p, count, kl);
    for (int64_t i = 0; i < count; ++i) sums[i] += kl[i];
  }
}

void forward(const LatentForward& p, int64_t begin_item, int64_t end_item) {
  record_run(Family::latent, kIsaName);
  p.is_double ? forward_items<double>(p, begin_item, end_item) : forward_items<float>(p, begin_item, end_item);
}

void backward(const LatentBackward& p, int64_t begin_item, int64_t end_item) {
  record_run(Family::latent, kIsaName);
  p.is_double ? backward_items<double>(p, begin_item, end_item) : backward_items<float>(p, begin_item, end_item);
}

void dimension_sums(const LatentInputs& p, int64_t inner, int64_t begin_row, int64_t end_row, int64_t dimension, int64_t count,
                    double* sums) {
  auto sum = p.is_double ? sum_dimensions<false, double> : is_bounded(p) ? sum_dimensions<true, float> : sum_dimensions<false, float>;
  sum(p, inner, begin_row, end_row, dimension, count, sums);
}

}  // namespace
}  // namespace FASTVAE_ISA

const LatentKernels FASTVAE_CONCAT(latent_kernels_, FASTVAE_ISA) = {forward, backward, dimension_sums};

}  // namespace fastvae
