// Elementwise formulas of sampling and the Gaussian KL, with and without a learned prior.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

// KL(N(mu, e^logvar) || N(0, 1)); variance = e^logvar.
template <class T>
FASTVAE_INLINE T kl_standard(T mu, T logvar, T variance) {
  return T(0.5) * fma(mu, mu, variance - logvar - T(1));
}

// KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)).
template <class T>
FASTVAE_INLINE T kl_prior(T mu, T logvar, T prior_mu, T prior_logvar) {
  T delta = mu - prior_mu, difference = logvar - prior_logvar;
  return T(0.5) * fma(delta * delta, exp(-prior_logvar), exp(difference) - difference - T(1));
}

template <class T>
struct KLGradient {
  T mu, logvar, prior_mu, prior_logvar;
};

template <class T>
FASTVAE_INLINE KLGradient<T> kl_prior_gradient(T mu, T logvar, T prior_mu, T prior_logvar) {
  T delta = mu - prior_mu, ratio = exp(logvar - prior_logvar);
  T scaled = delta * exp(-prior_logvar);
  return {scaled, T(0.5) * (ratio - T(1)), -scaled, T(0.5) * (T(1) - ratio - delta * scaled)};
}

// Outside its limits a log variance has no gradient.
template <class T>
FASTVAE_INLINE T gradient_inside(T gradient, T logvar, T low, T high) {
  return ((logvar < low) | (logvar > high)) ? T(0) : gradient;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
