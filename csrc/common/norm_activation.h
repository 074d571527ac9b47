// The activations behind a normalisation: y = act(u), and du = act'(u) * dy, the gradient with respect to u. An activation is a struct with
// two functions: value(u), and gradient(u, g) = act'(u) * g.
#pragma once

#include "normal.h"

namespace fastvae {

// These are the numbers of NORM_ACTIVATIONS in fastvae/ops/group_norm.py.
enum class NormActivation : int64_t { none = 0, silu = 1, relu = 2, gelu = 3 };

inline namespace FASTVAE_ISA {

template <class T>
struct NormLogistic {
  T decay, sigmoid;  // e^-u and 1 / (1 + e^-u)
};

// The relative error of the logistic function, and near 0 of the normal's distribution function: Accurate means about 2 ulp of float32.
// Coarse means 2e-4 and 6e-4, for results that are stored as bfloat16, whose rounding error of up to 2e-3 hides it.
struct Accurate {};
struct Coarse {};

#if defined(__CUDA_ARCH__)
// The bound keeps e^-u finite, because decay * sigmoid would be inf * 0 otherwise.
template <class Accuracy>
FASTVAE_INLINE NormLogistic<float> logistic(Accuracy, float u) {
  float decay = exp(u < -87.0f ? 87.0f : -u);
  return {decay, divide(1.0f, 1.0f + decay)};
}
template <class Accuracy>
FASTVAE_INLINE Normal<float> normal(Accuracy, float u) {
  return normal_at(u);
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

// 2^(n + f) as the factors 2^f and 2^n.
struct BinaryPower {
  float fraction, power;
};

// 2^(x * factor) for -127 <= x * factor <= 127, as n + f with an integer n and |f| <= 1/2. Where n is -127, `power` is 0.
template <class Accuracy>
FASTVAE_INLINE BinaryPower binary_power(Accuracy accuracy, float x, float factor) {
  // Adding 1.5 * 2^23 + 127 to x * factor rounds it to n, and leaves n + 127, the exponent field of 2^n, in the low bits of the sum.
  constexpr float kRoundAndBias = 12583039.0f;
  float shifted = fma(x, factor, kRoundAndBias);
  float fraction = exp2_fraction(accuracy, fma(x, factor, kRoundAndBias - shifted));
  return {fraction, bits_to_float(float_to_bits(shifted) << 23)};
}

// One Newton step for the reciprocal of `value` from an estimate r with a relative error of 2^-13.
FASTVAE_INLINE float refine_reciprocal(Accurate, float value, float r) { return fma(r, fma(-value, r, 1.0f), r); }
FASTVAE_INLINE float refine_reciprocal(Coarse, float, float r) { return r; }

// 1 / value for 1 <= value < 2^126.
template <class Accuracy>
FASTVAE_INLINE float reciprocal(Accuracy accuracy, float value) {
  // Subtracting the bits from a constant negates the exponent and gives five correct bits; a cubic step gives thirteen.
  float r = bits_to_float(0x7ef31000u - float_to_bits(value));
  float e = fma(-value, r, 1.0f);
  r = fma(r, fma(e, e, e), r);
  return refine_reciprocal(accuracy, value, r);
}

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
  BinaryPower decay = binary_power(accuracy, x, -1.44269504f);  // e^-x
  float sum = fma(decay.fraction, decay.power, 1.0f);
  return {decay.fraction * decay.power, reciprocal(accuracy, sum)};
}

// normal_tail() with a relative error of 2e-4, and the scale that its t is made with.
FASTVAE_INLINE float normal_tail_scale(Accurate) { return kNormalTailScale; }
FASTVAE_INLINE float normal_tail_scale(Coarse) { return 0.298f; }
FASTVAE_INLINE float normal_tail_of(Accurate, float t) { return normal_tail(t); }
FASTVAE_INLINE float normal_tail_of(Coarse, float t) {
  float p = 2.1775499e-1f;
  p = fma(p, t, 2.47581681e-2f);
  p = fma(p, t, 1.40682524e-1f);
  return fma(p, t, 1.16901172e-1f);
}

// As normal_at(), in fewer instructions. The relative error of the tail grows with u^2, by which that of the exponent does: to 8e-6 where
// the tail is no longer a normal number.
template <class Accuracy>
FASTVAE_INLINE Normal<float> normal(Accuracy accuracy, float u) {
  // Bounds |u| by 13.28 by comparing bits, as logistic() does; 0x41547ae1 is 13.28f. There e^(-u^2 / 2) is 2^-127.2, which binary_power()
  // takes as 0. A NaN becomes 13.28 here; the product with u in the caller restores it.
  int32_t bits = static_cast<int32_t>(float_to_bits(u) & 0x7fffffffu);
  float a = bits_to_float(static_cast<uint32_t>(bits < 0x41547ae1 ? bits : 0x41547ae1));
  BinaryPower decay = binary_power(accuracy, a * a, -0.721347520f);  // e^(-a^2 / 2)
  float e = decay.fraction * decay.power, t = reciprocal(accuracy, fma(normal_tail_scale(accuracy), a, 1.0f));
  float tail = normal_tail_of(accuracy, t) * t;
  return {0.398942280f * e, u < 0.0f ? tail * e : fma(-tail, e, 1.0f)};
}
#endif

template <class Accuracy>
FASTVAE_INLINE NormLogistic<double> logistic(Accuracy, double u) {
  double decay = exp(u < -700.0 ? 700.0 : -u);
  return {decay, 1.0 / (1.0 + decay)};
}

// As normal_at(), without the C library's erfc, which has no vector form. The polynomial is a minimax fit with a relative error of 6e-16.
template <class Accuracy>
FASTVAE_INLINE Normal<double> normal(Accuracy, double u) {
  double a = absolute(u), t = 1.0 / fma(0.25, a, 1.0), e = exp(-0.5 * a * a);
  double p = 0.00020636830397605384;
  p = fma(p, t, -0.004797225123337665);
  p = fma(p, t, 0.037702593791852396);
  p = fma(p, t, -0.15818718426863118);
  p = fma(p, t, 0.41515666969715237);
  p = fma(p, t, -0.7328024019444888);
  p = fma(p, t, 0.9055806295520379);
  p = fma(p, t, -0.8130136372313713);
  p = fma(p, t, 0.5593266033607015);
  p = fma(p, t, -0.3029884918847438);
  p = fma(p, t, 0.11756082565104257);
  p = fma(p, t, -0.04372436086498991);
  p = fma(p, t, 0.017620745261105467);
  p = fma(p, t, 0.02131765555604785);
  p = fma(p, t, 0.04356283268693375);
  p = fma(p, t, 0.0634671576030914);
  p = fma(p, t, 0.08103814423932361);
  p = fma(p, t, 0.09350192986293059);
  p = fma(p, t, 0.09973557573743862);
  p = fma(p, t, 0.09973557001392815);
  double tail = p * t;
  return {0.3989422804014327 * e, u < 0.0 ? tail * e : fma(-tail, e, 1.0)};
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

// max(u, 0). The comparisons are false for NaN: then the result is NaN, and the gradient passes, as with torch.
struct NormRelu {
  template <class T>
  FASTVAE_INLINE T value(T u) {
    return u <= T(0) ? T(0) : u;
  }
  template <class T>
  FASTVAE_INLINE T gradient(T u, T g) {
    return u <= T(0) ? T(0) : g;
  }
};

// u * P(X <= u) for a standard normal X. At -inf it is -inf * 0, NaN, as with torch.
template <class Accuracy>
struct NormGelu {
  template <class T>
  FASTVAE_INLINE T value(T u) {
    return u * normal(Accuracy{}, u).distribution;
  }
  template <class T>
  FASTVAE_INLINE T gradient(T u, T g) {
    auto n = normal(Accuracy{}, u);
    return g * fma(u, n.density, n.distribution);
  }
};

// Calls f with the struct of the activation.
FASTVAE_ANY_CALLEE
template <class Accuracy = Accurate, class F>
FASTVAE_INLINE void with_norm_activation(NormActivation activation, F f) {
  switch (activation) {
    case NormActivation::none:
      return f(NormIdentity{});
    case NormActivation::silu:
      return f(NormSilu<Accuracy>{});
    case NormActivation::relu:
      return f(NormRelu{});
    case NormActivation::gelu:
      return f(NormGelu<Accuracy>{});
  }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
