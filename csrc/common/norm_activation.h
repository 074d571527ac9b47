// The activations behind a normalisation: y = act(u), and du = act'(u) * dy, the gradient with respect to u. An activation is a struct with
// two functions: value(u), and gradient(u, g) = act'(u) * g.
#pragma once

#include "math.h"

namespace fastvae {

// These are the numbers of NORM_ACTIVATIONS in fastvae/ops/group_norm.py.
enum class NormActivation : int64_t { none = 0, silu = 1 };

inline namespace FASTVAE_ISA {

template <class T>
struct NormLogistic {
  T decay, sigmoid;  // e^-u and 1 / (1 + e^-u)
};

// The relative error of the logistic function: Accurate means about 2 ulp of float32. Coarse means 2e-4, for results that are stored as
// bfloat16, whose rounding error of up to 2e-3 hides it.
struct Accurate {};
struct Coarse {};

#if defined(__CUDA_ARCH__)
// The bound keeps e^-u finite, because decay * sigmoid would be inf * 0 otherwise.
template <class Accuracy>
FASTVAE_INLINE NormLogistic<float> logistic(Accuracy, float u) {
  float decay = exp(u < -87.0f ? 87.0f : -u);
  return {decay, divide(1.0f, 1.0f + decay)};
}
#else
// 2^f for |f| <= 1/2, a minimax polynomial.
FASTVAE_INLINE float exp2_fraction(Accurate, float f) {
  float p = 1.3276471782e-3f;
  p = fma(p, f, 9.6755413328e-3f);
  p = fma(p, f, 5.5507132742e-2f);
  p = fma(p, f, 2.4022119724e-1f);
  p = fma(p, f, 6.9314696706e-1f);
  return fma(p, f, 1.0000000717f);
}
FASTVAE_INLINE float exp2_fraction(Coarse, float f) {
  float p = 5.5171670077e-2f;
  p = fma(p, f, 2.4261112830e-1f);
  p = fma(p, f, 6.9326098581e-1f);
  return fma(p, f, 9.9992807318e-1f);
}

// One Newton step for the reciprocal of `value` from an estimate r with a relative error of 2^-13.
FASTVAE_INLINE float refine_reciprocal(Accurate, float value, float r) { return fma(r, fma(-value, r, 1.0f), r); }
FASTVAE_INLINE float refine_reciprocal(Coarse, float, float r) { return r; }

// This takes half the instructions of exp() and a division. With |u| <= 87, e^-u is neither infinite nor denormal, and neither is its sum
// with 1, so that no special case is left; beyond 87, float32 cannot tell the results from their limits 0 and 1.
template <class Accuracy>
FASTVAE_INLINE NormLogistic<float> logistic(Accuracy accuracy, float u) {
  // Clamps u to [-87, 87] by comparing bits: floats of one sign are ordered like integers. 0x42ae0000 is 87.0f and 0xc2ae0000 is -87.0f. As
  // signed integers all negative floats lie below 87, as unsigned ones all positive floats lie below -87. A NaN becomes 87 or -87 here; the
  // product with u in the caller restores it.
  int32_t below = static_cast<int32_t>(float_to_bits(u));
  below = below < 0x42ae0000 ? below : 0x42ae0000;
  uint32_t bits = static_cast<uint32_t>(below);
  float x = bits_to_float(bits < 0xc2ae0000u ? bits : 0xc2ae0000u);
  // e^-x = 2^(n + f) with an integer n and |f| <= 1/2. Adding 1.5 * 2^23 + 127 to -x / ln 2 rounds it to n, and leaves n + 127, the
  // exponent field of 2^n, in the low bits of the sum.
  constexpr float kRoundAndBias = 12583039.0f;
  float shifted = fma(x, -1.44269504f, kRoundAndBias);
  float fraction = exp2_fraction(accuracy, fma(x, -1.44269504f, kRoundAndBias - shifted));
  float power = bits_to_float(float_to_bits(shifted) << 23);
  float sum = fma(fraction, power, 1.0f);
  // 1 / sum: subtracting the bits from a constant negates the exponent and gives five correct bits; a cubic step gives thirteen.
  float r = bits_to_float(0x7ef31000u - float_to_bits(sum));
  float e = fma(-sum, r, 1.0f);
  r = fma(r, fma(e, e, e), r);
  return {fraction * power, refine_reciprocal(accuracy, sum, r)};
}
#endif

template <class Accuracy>
FASTVAE_INLINE NormLogistic<double> logistic(Accuracy, double u) {
  double decay = exp(u < -700.0 ? 700.0 : -u);
  return {decay, 1.0 / (1.0 + decay)};
}

struct NormIdentity {
  template <class T>
  FASTVAE_INLINE T value(T u) {
    return u;
  }
  template <class T>
  FASTVAE_INLINE T gradient(T, T g) {
    return g;
  }
};

// u * sigmoid(u). Its derivative is sigmoid * (1 + u * (1 - sigmoid)), where decay * sigmoid is 1 - sigmoid without a difference.
template <class Accuracy>
struct NormSilu {
  template <class T>
  FASTVAE_INLINE T value(T u) {
    return u * logistic(Accuracy{}, u).sigmoid;
  }
  template <class T>
  FASTVAE_INLINE T gradient(T u, T g) {
    auto l = logistic(Accuracy{}, u);
    return g * l.sigmoid * fma(u, l.decay * l.sigmoid, T(1));
  }
};

// Calls f with the struct of the activation.
FASTVAE_ANY_CALLEE
template <class Accuracy = Accurate, class F>
FASTVAE_INLINE void with_norm_activation(NormActivation activation, F f) {
  activation == NormActivation::silu ? f(NormSilu<Accuracy>{}) : f(NormIdentity{});
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
