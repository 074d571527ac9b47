// Sampling and the Gaussian KL, one instruction set a compilation: plain loops over tiles that the compiler vectorises.
#include "../latent.h"

#include "../../common/latent.h"
#include "../../common/philox.h"
#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

void normal_tile(const uint32_t* key, int64_t tile, float* __restrict out) {
  uint32_t words[4][kNoiseLanes];
  // A tile's counters differ in the low word alone: it starts at a multiple of 128.
  uint64_t counter = static_cast<uint64_t>(tile) * kNoiseLanes;
  uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32), k0 = key[0], k1 = key[1];
#pragma omp simd
  for (int lane = 0; lane < kNoiseLanes; ++lane) {
    PhiloxWords random = philox4x32(low + lane, high, 0, 0, k0, k1);
    words[0][lane] = random.w[0];
    words[1][lane] = random.w[1];
    words[2][lane] = random.w[2];
    words[3][lane] = random.w[3];
  }
  for (int pair = 0; pair < 4; pair += 2) {
    float* first = out + pair * kNoiseLanes;
    float* second = first + kNoiseLanes;
#pragma omp simd
    for (int lane = 0; lane < kNoiseLanes; ++lane) box_muller(words[pair][lane], words[pair + 1][lane], first[lane], second[lane]);
  }
}

// Normals [begin, begin + count), count <= kTile; they may lie in two tiles.
const float* draw(const uint32_t* key, int64_t begin, int64_t count, float (&buffer)[2 * kNoiseTile]) {
  int64_t tile = begin / kNoiseTile, offset = begin - tile * kNoiseTile;
  normal_tile(key, tile, buffer);
  if (offset + count > kNoiseTile) normal_tile(key, tile + 1, buffer + kNoiseTile);
  return buffer + offset;
}

template <class T>
struct Tile {
  T mu_buffer[kTile], logvar_buffer[kTile], prior_mu_buffer[kTile], prior_logvar_buffer[kTile], eps_buffer[kTile];
  float noise_buffer[2 * kNoiseTile];
  const T *mu, *logvar, *prior_mu, *prior_logvar;

  void read(const LatentInputs& in, int64_t begin, int64_t count) {
    mu = load(in.mu, begin, count, mu_buffer);
    logvar = clamped(in, in.logvar, begin, count, logvar_buffer);
    if (in.prior_mu) {
      prior_mu = load(in.prior_mu, begin, count, prior_mu_buffer);
      prior_logvar = clamped(in, in.prior_logvar, begin, count, prior_logvar_buffer);
    }
  }

  const T* noise(const LatentInputs& in, int64_t begin, int64_t count) {
    if (in.eps) return load(in.eps, begin, count, eps_buffer);
    const float* drawn = draw(in.key, begin, count, noise_buffer);
    if constexpr (sizeof(T) == sizeof(float)) {
      return drawn;
    } else {
      convert_run(drawn, count, eps_buffer);
      return eps_buffer;
    }
  }

  void kl(const LatentInputs& in, int64_t count, T* __restrict out) const {
    if (in.prior_mu) {
      for (int64_t i = 0; i < count; ++i) out[i] = kl_prior(mu[i], logvar[i], prior_mu[i], prior_logvar[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = kl_standard(mu[i], logvar[i]);
    }
  }

 private:
  static const T* clamped(const LatentInputs& in, const View& view, int64_t begin, int64_t count, T* __restrict buffer) {
    const T* raw = load(view, begin, count, buffer);
    T low = static_cast<T>(in.clamp_min), high = static_cast<T>(in.clamp_max);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffer[i] = clamp(raw[i], low, high);
    return buffer;
  }
};

template <class T>
void sample(const LatentForward& p, Tile<T>& tile, int64_t begin, int64_t count) {
  T sigma[kTile], z_buffer[kTile];
  const T* mu = tile.mu;
  for (int64_t i = 0; i < count; ++i) sigma[i] = exp(T(0.5) * tile.logvar[i]);
  for (int64_t s = 0; s < p.samples; ++s) {
    int64_t first = s * p.numel + begin;
    const T* eps = tile.noise(p, first, count);
    T* z = destination(p.z, first, z_buffer);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] = fma(sigma[i], eps[i], mu[i]);
    store(p.z, first, count, z);
  }
}

template <class T>
void forward_kl(const LatentForward& p, const Tile<T>& tile, int64_t item, int64_t begin, int64_t count) {
  T kl_buffer[kTile], active_buffer[kTile];
  T* kl = p.kl ? destination(p.kl, begin, kl_buffer) : kl_buffer;
  tile.kl(p, count, kl);
  if (p.active) {
    const T* active = load(p.active, begin, count, active_buffer);
    T free_bits = static_cast<T>(p.free_bits);
    for (int64_t i = 0; i < count; ++i) kl[i] = active[i] != T(0) ? kl[i] : free_bits;
  }
  if (p.kl) store(p.kl, begin, count, kl);
  if (p.sums) accumulate(p.partition, item, begin, count, kl, p.sums);
}

template <class T>
void forward_items(const LatentForward& p, int64_t begin_item, int64_t end_item) {
  Tile<T> tile;
  for_each_tile(p.partition, begin_item, end_item, [&](int64_t item, int64_t begin, int64_t count) {
    tile.read(p, begin, count);
    if (p.z) sample(p, tile, begin, count);
    if (p.kl || p.sums) forward_kl(p, tile, item, begin, count);
  });
}

// The gradients that come through z: of mu, and of log sigma.
template <class T>
void backward_z(const LatentBackward& p, Tile<T>& tile, int64_t begin, int64_t count, T* __restrict grad_mu, T* __restrict grad_logvar) {
  T grad_buffer[kTile];
  for (int64_t s = 0; s < p.samples; ++s) {
    int64_t first = s * p.numel + begin;
    const T* eps = tile.noise(p, first, count);
    const T* grad = load(p.grad_z, first, count, grad_buffer);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      grad_mu[i] += grad[i];
      grad_logvar[i] = fma(grad[i], eps[i], grad_logvar[i]);
    }
  }
  const T* logvar = tile.logvar;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) grad_logvar[i] *= T(0.5) * exp(T(0.5) * logvar[i]);
}

// The incoming gradient of each element's KL.
template <class T>
const T* kl_weights(const LatentBackward& p, int64_t begin, int64_t count, T* __restrict weights) {
  T active_buffer[kTile];
  const T* incoming = load(p.grad_kl, begin, count, weights);
  T scale = static_cast<T>(p.grad_kl_scale);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) weights[i] = incoming[i] * scale;
  if (p.active) {
    const T* active = load(p.active, begin, count, active_buffer);
    for (int64_t i = 0; i < count; ++i) weights[i] = active[i] != T(0) ? weights[i] : T(0);
  }
  return weights;
}

template <class T>
struct Gradients {
  T mu[kTile], logvar[kTile], prior_mu[kTile], prior_logvar[kTile];
};

template <class T>
void backward_kl(const LatentBackward& p, const Tile<T>& tile, int64_t begin, int64_t count, Gradients<T>& grads) {
  T weight_buffer[kTile];
  const T* weight = kl_weights(p, begin, count, weight_buffer);
  const T *mu = tile.mu, *logvar = tile.logvar;
  if (!p.prior_mu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      grads.mu[i] = fma(weight[i], mu[i], grads.mu[i]);
      grads.logvar[i] = fma(weight[i] * T(0.5), exp(logvar[i]) - T(1), grads.logvar[i]);
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    KLGradient<T> gradient = kl_prior_gradient(mu[i], logvar[i], tile.prior_mu[i], tile.prior_logvar[i]);
    grads.mu[i] = fma(weight[i], gradient.mu, grads.mu[i]);
    grads.logvar[i] = fma(weight[i], gradient.logvar, grads.logvar[i]);
    grads.prior_mu[i] = weight[i] * gradient.prior_mu;
    grads.prior_logvar[i] = weight[i] * gradient.prior_logvar;
  }
}

template <class T>
void write(const Output& output, int64_t begin, int64_t count, const T* gradient) {
  T* to = destination(output, begin, const_cast<T*>(gradient));
  for (int64_t i = 0; i < count; ++i) to[i] = gradient[i];
  store(output, begin, count, gradient);
}

// A gradient of a log variance, 0 where the raw value lies outside the limits.
template <class T>
void write_logvar(const LatentBackward& p, const Output& output, const View& view, int64_t begin, int64_t count, T* __restrict gradient) {
  T buffer[kTile];
  const T* raw = load(view, begin, count, buffer);
  T low = static_cast<T>(p.clamp_min), high = static_cast<T>(p.clamp_max);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) gradient[i] = gradient_inside(gradient[i], raw[i], low, high);
  write(output, begin, count, gradient);
}

template <class T>
void backward_items(const LatentBackward& p, int64_t begin_item, int64_t end_item) {
  Tile<T> tile;
  Gradients<T> grads;
  for_each_tile(p.partition, begin_item, end_item, [&](int64_t, int64_t begin, int64_t count) {
    tile.read(p, begin, count);
    memset(&grads, 0, sizeof grads);
    if (p.grad_z) backward_z(p, tile, begin, count, grads.mu, grads.logvar);
    if (p.grad_kl) backward_kl(p, tile, begin, count, grads);
    write(p.grad_mu, begin, count, grads.mu);
    write_logvar(p, p.grad_logvar, p.logvar, begin, count, grads.logvar);
    if (p.prior_mu) {
      write(p.grad_prior_mu, begin, count, grads.prior_mu);
      write_logvar(p, p.grad_prior_logvar, p.prior_logvar, begin, count, grads.prior_logvar);
    }
  });
}

template <class T>
void sum_dimensions(const LatentInputs& p, int64_t inner, int64_t begin_row, int64_t end_row, int64_t dimension, int64_t count,
                    double* sums) {
  Tile<T> tile;
  T kl[kTile];
  for (int64_t i = 0; i < count; ++i) sums[i] = 0.0;
  for (int64_t row = begin_row; row < end_row; ++row) {
    tile.read(p, row * inner + dimension, count);
    tile.kl(p, count, kl);
    for (int64_t i = 0; i < count; ++i) sums[i] += kl[i];
  }
}

void forward(const LatentForward& p, int64_t begin_item, int64_t end_item) {
  record_run(Family::latent, kIsaName);
  p.wide ? forward_items<double>(p, begin_item, end_item) : forward_items<float>(p, begin_item, end_item);
}

void backward(const LatentBackward& p, int64_t begin_item, int64_t end_item) {
  record_run(Family::latent, kIsaName);
  p.wide ? backward_items<double>(p, begin_item, end_item) : backward_items<float>(p, begin_item, end_item);
}

void dimension_sums(const LatentInputs& p, int64_t inner, int64_t begin_row, int64_t end_row, int64_t dimension, int64_t count,
                    double* sums) {
  p.wide ? sum_dimensions<double>(p, inner, begin_row, end_row, dimension, count, sums)
         : sum_dimensions<float>(p, inner, begin_row, end_row, dimension, count, sums);
}

}  // namespace
}  // namespace FASTVAE_ISA

const LatentKernels FASTVAE_CONCAT(latent_kernels_, FASTVAE_ISA) = {forward, backward, dimension_sums};

}  // namespace fastvae
