// Elementwise formulas of group normalisation and its activation. An activation is a struct: its value, and its gradient times g.
#pragma once

#include "math.h"

namespace fastvae {

// The numbers are those of fastvae/_ops.py.
enum class NormActivation : int64_t { none = 0, silu = 1 };

inline namespace FASTVAE_ISA {

template <class T>
struct NormLogistic {
  T decay, sigmoid;  // e^-u and 1 / (1 + e^-u)
};

// How accurate the logistic function is: to about two units in the last place, or to 2e-4 for results that are rounded to bfloat16, which
// has half a unit of 2e-3.
struct Accurate {};
struct Coarse {};

#if defined(__CUDA_ARCH__)
template <class Accuracy>
FASTVAE_INLINE NormLogistic<float> logistic(Accuracy, float u) {
  float decay = exp(u < -87.0f ? 87.0f : -u);
  return {decay, divide(1.0f, 1.0f + decay)};
}
#else
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

// From an estimate with an error of 2^-13.
FASTVAE_INLINE float refine_reciprocal(Accurate, float value, float r) { return fma(r, fma(-value, r, 1.0f), r); }
FASTVAE_INLINE float refine_reciprocal(Coarse, float, float r) { return r; }

// Half the instructions of exp() and a division: e^-u needs no infinities, since |u| > 87 changes nothing in float, and its sum with 1 is a
// normal number. So it is for NaN, which the caller's product with u passes on.
template <class Accuracy>
FASTVAE_INLINE NormLogistic<float> logistic(Accuracy accuracy, float u) {
  // Between -87 and 87, NaN too: positive numbers are ordered as signed integers, to which the negative ones are less, and negative numbers
  // as unsigned ones, to which the positive ones are less.
  int32_t below = static_cast<int32_t>(float_to_bits(u));
  below = below < 0x42ae0000 ? below : 0x42ae0000;
  uint32_t bits = static_cast<uint32_t>(below);
  float x = bits_to_float(bits < 0xc2ae0000u ? bits : 0xc2ae0000u);
  // 2^(n + f), |f| <= 1/2: adding 1.5 * 2^23 + 127 rounds to the integer n and leaves it in the low bits, with the bias of an exponent.
  constexpr float kRoundAndBias = 12583039.0f;
  float shifted = fma(x, -1.44269504f, kRoundAndBias);
  float fraction = exp2_fraction(accuracy, fma(x, -1.44269504f, kRoundAndBias - shifted));
  float power = bits_to_float(float_to_bits(shifted) << 23);
  float sum = fma(fraction, power, 1.0f);
  // 1 / sum: five bits from the subtraction of the exponents, a cubic step to thirteen.
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

// Calls f with the struct of an activation.
FASTVAE_ANY_CALLEE
template <class Accuracy = Accurate, class F>
FASTVAE_INLINE void with_norm_activation(NormActivation activation, F f) {
  activation == NormActivation::silu ? f(NormSilu<Accuracy>{}) : f(NormIdentity{});
}

// What normalises a channel of a sample: u = (x - centre) * scale + offset. The centre is the group's mean in T; what that lost of the mean
// is in the offset.
template <class T>
FASTVAE_INLINE T affine(T x, T centre, T scale, T offset) {
  return fma(x - centre, scale, offset);
}

struct NormAffine {
  double centre, scale, offset;
};

FASTVAE_INLINE NormAffine affine_of(double mean, double centre, double rstd, double weight, double bias) {
  double scale = rstd * weight;
  return {centre, scale, bias - (mean - centre) * scale};
}

// The sum of du times the normalised input, from those of du and of du * (x - centre).
FASTVAE_INLINE double sum_of_normal(double mean, double centre, double rstd, double plain, double weighted) {
  return rstd * (weighted - (mean - centre) * plain);
}

// du is the gradient at u; slope and constant carry the gradients that come through the variance and the mean.
template <class T>
FASTVAE_INLINE T gradient_of_input(T x, T du, T centre, T scale, T slope, T constant) {
  return fma(du, scale, fma(x - centre, slope, constant));
}

struct NormThrough {
  double slope, constant;
};

// From a group's sums of weight * du and of weight * du times the normalised input.
FASTVAE_INLINE NormThrough through_statistics(double mean, double centre, double rstd, double grad_sum, double projection,
                                              double elements) {
  double slope = -rstd * rstd * projection / elements;
  return {slope, -rstd * grad_sum / elements - (mean - centre) * slope};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
