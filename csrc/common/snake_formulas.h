// Scalar formulas of Snake, y = x + gain * sin(frequency * x)^2, and of its gradients. With t = frequency * x,
//   dy/dx = 1 + 2 gain frequency sin(t) cos(t),   dy/dfrequency = 2 gain x sin(t) cos(t),   dy/dgain = sin(t)^2.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

// Both have the period pi, so that the signs of the sine and the cosine are lost in them.
template <class T>
struct SinePair {
  T square, product;  // sin(t)^2 and sin(t) cos(t)
};

// t = n pi + r with an integer n and |r| <= pi / 2. pi is subtracted in two parts, so that r keeps its digits up to n = 2^22. Beyond that
// float32 cannot hold the phase of t; the limits keep the results between 0 and 1 there, and NaN a NaN.
FASTVAE_INLINE SinePair<float> sine_pair(float t) {
  float n = round_even(t * 0.318309886f);
  float r = clamp(fma(n, 8.74227801e-8f, fma(n, -3.14159274f, t)), -1.5708f, 1.5708f), square = r * r;
  float s = fma(2.6087896356e-6f, square, -1.9811053451e-4f);
  s = fma(s, square, 8.3330874407e-3f);
  s = fma(s, square, -1.6666660438e-1f);
  s = fma(s * square, r, r);
  float c = fma(-2.6075662662e-7f, square, 2.4761808159e-5f);
  c = fma(c, square, -1.3888402069e-3f);
  c = fma(c, square, 4.1666640625e-2f);
  c = fma(c, square, -4.9999999547e-1f);
  c = fma(c, square, 1.0f);
  return {s * s, s * c};
}

FASTVAE_INLINE SinePair<double> sine_pair(double t) {
  double s = ::sin(t);
  return {s * s, s * ::cos(t)};
}

template <class T>
FASTVAE_INLINE T snake(T x, T frequency, T gain) {
  return fma(gain, sine_pair(frequency * x).square, x);
}

// The gradients of an element of Snake, for the incoming gradient g. That of the frequency lacks the factor 2 gain, which is one of the
// channel.
template <class T>
struct SnakeGradients {
  T input, frequency, gain;
};

template <class T>
FASTVAE_INLINE SnakeGradients<T> snake_gradients(T x, T g, T frequency, T gain) {
  SinePair<T> pair = sine_pair(frequency * x);
  return {g * fma(T(2) * gain * frequency, pair.product, T(1)), g * x * pair.product, g * pair.square};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
