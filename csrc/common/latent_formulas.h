// Scalar formulas of sampling and of the Gaussian KL, with and without a learned prior. Log variances are clamped before they come here.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

// The ratio e^d of two variances from the difference d of their logarithms: root = e^(d / 2), excess = e^d - 1, and
// divergence = e^d - 1 - d, which is twice the KL of two Gaussians with the same mean. Computed as written, the last two would cancel near
// d = 0: the KL of a posterior near its prior would be rounding noise, negative half of the time. With a = e^(d / 2) - 1 they are a^2 + 2 a
// and a^2 + 2 (a - d / 2), and both terms of the latter are never negative.
template <class T>
struct VarianceRatio {
  T root, excess, divergence;
};

// kBounded promises that |difference| is at most twice kExponentBound, for which a cheaper exponential serves.
template <bool kBounded = false, class T>
FASTVAE_INLINE VarianceRatio<T> variance_ratio(T difference) {
  Exponential<T> half = kBounded ? bounded_exponential(T(0.5) * difference) : exponential(T(0.5) * difference);
  T square = half.minus_one * half.minus_one;
  return {half.value, fma(T(2), half.minus_one, square), fma(T(2), half.minus_line, square)};
}

// KL(N(mu, e^logvar) || N(0, 1)), where `divergence` is that of variance_ratio(logvar).
template <class T>
FASTVAE_INLINE T kl_standard(T mu, T divergence) {
  return T(0.5) * fma(mu, mu, divergence);
}

// KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)).
template <bool kBounded = false, class T>
FASTVAE_INLINE T kl_prior(T mu, T logvar, T prior_mu, T prior_logvar) {
  T delta = mu - prior_mu;
  return T(0.5) * fma(delta * delta, exp(-prior_logvar), variance_ratio<kBounded>(logvar - prior_logvar).divergence);
}

// The gradients of one KL term with respect to its four arguments.
template <class T>
struct KLGradient {
  T mu, logvar, prior_mu, prior_logvar;
};

template <bool kBounded = false, class T>
FASTVAE_INLINE KLGradient<T> kl_prior_gradient(T mu, T logvar, T prior_mu, T prior_logvar) {
  T delta = mu - prior_mu, excess = variance_ratio<kBounded>(logvar - prior_logvar).excess;
  T scaled = delta * exp(-prior_logvar);
  return {scaled, T(0.5) * excess, -scaled, T(-0.5) * fma(delta, scaled, excess)};
}

// The gradient of a log variance through its clamp to [clamp_min, clamp_max]: 0 outside.
template <class T>
FASTVAE_INLINE T gradient_through_clamp(T gradient, T logvar, T clamp_min, T clamp_max) {
  return ((logvar < clamp_min) | (logvar > clamp_max)) ? T(0) : gradient;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
