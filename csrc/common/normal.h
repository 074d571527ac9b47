// The density and the distribution function of the standard normal, accurate in relative terms in its lower tail too.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

template <class T>
struct Normal {
  T density, distribution;
};

// For a >= 0 the distribution function at -a is e^(-a^2 / 2) * t * normal_tail(t) with t = 1 / (1 + kNormalTailScale * a). The coefficients
// are a minimax fit with a relative error of 4e-8.
constexpr float kNormalTailScale = 0.353553391f;

FASTVAE_INLINE float normal_tail(float t) {
  float p = -2.9534508e-2f;
  p = fma(p, t, 1.422876125e-1f);
  p = fma(p, t, -2.436002085e-1f);
  p = fma(p, t, 1.390338625e-1f);
  p = fma(p, t, -1.331301705e-2f);
  p = fma(p, t, 1.01343508e-1f);
  p = fma(p, t, 1.21551864e-1f);
  p = fma(p, t, 1.411876565e-1f);
  return fma(p, t, 1.41043209e-1f);
}

FASTVAE_INLINE Normal<float> normal_at(float a) {
  float t = divide(1.0f, fma(kNormalTailScale, absolute(a), 1.0f));
  float e = exp(-0.5f * a * a);
  float tail = normal_tail(t) * t * e;
  return {0.398942280f * e, a < 0.0f ? tail : 1.0f - tail};
}
FASTVAE_INLINE Normal<double> normal_at(double a) {
  return {0.3989422804014327 * ::exp(-0.5 * a * a), 0.5 * ::erfc(-a * 0.7071067811865476)};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
