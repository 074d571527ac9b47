// Elementwise formulas of sampling and the Gaussian KL, with and without a learned prior.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

// The ratio of two variances from the difference d of their logarithms: its root e^(d / 2), e^d - 1, and e^d - 1 - d, which is twice the KL
// of two Gaussians with one mean. Near d = 0 the differences would cancel: the KL of a posterior near its prior would be noise, negative
// half of the time. With a = e^(d / 2) - 1 the two are a^2 + 2 a and a^2 + 2 (a - d / 2), a sum of two numbers that are never negative.
template <class T>
struct VarianceRatio {
  T root, excess, divergence;
};

// kBounded: the difference is at most twice kExponentBound.
template <bool kBounded = false, class T>
FASTVAE_INLINE VarianceRatio<T> variance_ratio(T difference) {
  Exponential<T> half = kBounded ? bounded_exponential(T(0.5) * difference) : exponential(T(0.5) * difference);
  T square = half.minus_one * half.minus_one;
  return {half.value, fma(T(2), half.minus_one, square), fma(T(2), half.minus_line, square)};
}

// KL(N(mu, e^logvar) || N(0, 1)) from the variance_ratio() of logvar.
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

// Outside its limits a log variance has no gradient.
template <class T>
FASTVAE_INLINE T gradient_inside(T gradient, T logvar, T low, T high) {
  return ((logvar < low) | (logvar > high)) ? T(0) : gradient;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
