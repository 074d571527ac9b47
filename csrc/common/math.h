// Branch-free exp, log, log1p and sincos that a compiler vectorises: they select with ternaries instead of branches. NaN and infinities
// give what <cmath> gives. The float polynomials are minimax fits with errors of one or two units in the last place.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

FASTVAE_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTVAE_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// On a processor without the instruction these would be library calls.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__)
FASTVAE_INLINE float fma(float a, float b, float c) { return fmaf(a, b, c); }
FASTVAE_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
#else
FASTVAE_INLINE float fma(float a, float b, float c) { return a * b + c; }
FASTVAE_INLINE double fma(double a, double b, double c) { return a * b + c; }
#endif

// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, for numbers below 2^22.
constexpr float kRound = 12582912.0f;

FASTVAE_INLINE float round_even(float x) { return (x + kRound) - kRound; }
FASTVAE_INLINE double round_even(double x) { return ::nearbyint(x); }

// value = e^x, minus_one = e^x - 1 and minus_line = e^x - 1 - x. The last two keep their relative accuracy near 0, where the differences
// would cancel.
template <class T>
struct Exponential {
  T value, minus_one, minus_line;
};

// x = n ln 2 + r with |r| <= ln(2) / 2. The low bits of `rounded` are those of n.
struct ReducedExponent {
  float rounded, n, r;
  float tail;  // (e^r - 1 - r) / r^2
};

FASTVAE_INLINE ReducedExponent reduce_exponent(float x) {
  float t = fma(x, 1.44269504f, kRound), n = t - kRound;
  // ln 2 is subtracted in two parts. The first has 10 bits, so that its product with n is exact.
  float r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));
  float tail = 1.9875691500e-4f;
  tail = fma(tail, r, 1.3981999507e-3f);
  tail = fma(tail, r, 8.3334519073e-3f);
  tail = fma(tail, r, 4.1665795894e-2f);
  tail = fma(tail, r, 1.6666665459e-1f);
  tail = fma(tail, r, 5.0000001201e-1f);
  return {t, n, r, tail};
}

FASTVAE_INLINE Exponential<float> exponential(float x) {
  ReducedExponent e = reduce_exponent(x);
  float p = fma(fma(e.tail, e.r, 1.0f), e.r, 1.0f);
  float value = bits_to_float(float_to_bits(p) + (float_to_bits(e.rounded) << 23));
  // Results that would be denormal are 0. A NaN fails the second comparison, and the sum keeps it.
  value = x < -87.3f ? 0.0f : value;
  value = x <= 88.72f ? value : x + INFINITY;
  // With n = 0 nothing was subtracted: r is x, and the polynomial has the digits that the differences would lose.
  float rest = e.tail * (e.r * e.r), difference = value - 1.0f;
  bool near = e.n == 0.0f;
  return {value, near ? e.r + rest : difference, near ? rest : difference - x};
}

// The same for |x| <= kExponentBound or NaN. Then 2^n is a normal number and no special case is left, which makes all three values as cheap
// as e^x alone with its selections.
constexpr float kExponentBound = 87.0f;

FASTVAE_INLINE Exponential<float> bounded_exponential(float x) {
  ReducedExponent e = reduce_exponent(x);
  float scale = bits_to_float((float_to_bits(e.rounded) << 23) + 0x3f800000u);  // 2^n
  // The fused operations are explicit. Otherwise the compiler would fuse them differently where a caller needs e^x alone, and sampling
  // would have other bits with the KL than without it.
  float square = e.r * e.r, rest = e.tail * square, above_one = fma(e.tail, square, e.r);
  float minus_one = fma(scale, above_one, scale - 1.0f);
  return {fma(scale, above_one, scale), minus_one, e.n == 0.0f ? rest : minus_one - x};
}

FASTVAE_INLINE Exponential<double> exponential(double x) {
  double tail = 1.0 / 6227020800.0;  // the Taylor series of (e^x - 1 - x) / x^2, from 1 / 13!
  tail = fma(tail, x, 1.0 / 479001600.0);
  tail = fma(tail, x, 1.0 / 39916800.0);
  tail = fma(tail, x, 1.0 / 3628800.0);
  tail = fma(tail, x, 1.0 / 362880.0);
  tail = fma(tail, x, 1.0 / 40320.0);
  tail = fma(tail, x, 1.0 / 5040.0);
  tail = fma(tail, x, 1.0 / 720.0);
  tail = fma(tail, x, 1.0 / 120.0);
  tail = fma(tail, x, 1.0 / 24.0);
  tail = fma(tail, x, 1.0 / 6.0);
  tail = fma(tail, x, 0.5);
  double value = ::exp(x), rest = tail * (x * x), difference = value - 1.0;
  bool near = (x > -0.35) & (x < 0.35);
  return {value, near ? x + rest : difference, near ? rest : difference - x};
}
FASTVAE_INLINE Exponential<double> bounded_exponential(double x) { return exponential(x); }

#if defined(__CUDA_ARCH__)
// This has an error of two units in the last place and takes one instruction of the special function unit.
FASTVAE_INLINE float exp(float x) { return ::expf(x); }
#elif defined(FASTVAE_APPROXIMATE)
// Tests build with the errors of the GPU's instructions here and below.
FASTVAE_INLINE float exp(float x) { return FASTVAE_APPROXIMATE(exponential(x).value, 2); }
#else
FASTVAE_INLINE float exp(float x) { return exponential(x).value; }
#endif
FASTVAE_INLINE double exp(double x) { return ::exp(x); }

// The logarithm of a positive normal number.
FASTVAE_INLINE float log_normal(float x) {
  uint32_t bits = float_to_bits(x);
  // The exponent is chosen so that the mantissa 1 + f lies in [2/3, 4/3).
  int32_t exponent = static_cast<int32_t>(bits - 0x3f2aaaabu) >> 23;
  float f = bits_to_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  float p = 7.0376836292e-2f;
  p = fma(p, f, -1.1514610310e-1f);
  p = fma(p, f, 1.1676998740e-1f);
  p = fma(p, f, -1.2420140846e-1f);
  p = fma(p, f, 1.4249322787e-1f);
  p = fma(p, f, -1.6668057665e-1f);
  p = fma(p, f, 2.0000714765e-1f);
  p = fma(p, f, -2.4999993993e-1f);
  p = fma(p, f, 3.3333331174e-1f);
  float ef = static_cast<float>(exponent);
  float f2 = f * f;
  float tail = fma(p * f2, f, fma(-0.5f, f2, ef * -2.12194440e-4f));
  return fma(ef, 0.693359375f, tail + f);
}

FASTVAE_INLINE float log(float x) {
  bool denormal = x < 1.17549435e-38f;
  float value = log_normal(denormal ? x * 16777216.0f : x) - (denormal ? 16.6355323f : 0.0f);
  value = x > 3.40282347e38f ? x : value;
  value = x == 0.0f ? -INFINITY : value;
  return x >= 0.0f ? value : NAN;
}
FASTVAE_INLINE double log(double x) { return ::log(x); }

// log(1 + x) for x in [0, 1]. The polynomial is one for log(1 + x) / x, so that the result is accurate for small x too.
FASTVAE_INLINE float log1p_unit(float x) {
  float p = 5.232694093e-3f;
  p = fma(p, x, -2.950523980e-2f);
  p = fma(p, x, 7.822595537e-2f);
  p = fma(p, x, -1.366324574e-1f);
  p = fma(p, x, 1.910600662e-1f);
  p = fma(p, x, -2.484298199e-1f);
  p = fma(p, x, 3.331909776e-1f);
  p = fma(p, x, -4.999949336e-1f);
  p = fma(p, x, 9.999999404e-1f);
  return p * x;
}
FASTVAE_INLINE double log1p_unit(double x) { return ::log1p(x); }

// On CUDA the correctly rounded root and quotient are subroutines. These instructions have an error of up to two units in the last place,
// take denormals as 0, and give 0 for the reciprocal of a number above 2^126.
#if defined(__CUDA_ARCH__)
FASTVAE_INLINE float sqrt(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
FASTVAE_INLINE float divide(float a, float b) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return a * reciprocal;
}
#elif defined(FASTVAE_APPROXIMATE)
FASTVAE_INLINE float flush_denormal(float x) { return ::fabsf(x) < 1.17549435e-38f ? ::copysignf(0.0f, x) : x; }
FASTVAE_INLINE float sqrt(float x) { return FASTVAE_APPROXIMATE(::sqrtf(flush_denormal(x)), 1); }
FASTVAE_INLINE float divide(float a, float b) { return a * flush_denormal(FASTVAE_APPROXIMATE(1.0f / flush_denormal(b), 1)); }
#else
FASTVAE_INLINE float sqrt(float x) { return ::sqrtf(x); }
FASTVAE_INLINE float divide(float a, float b) { return a / b; }
#endif
FASTVAE_INLINE double sqrt(double x) { return ::sqrt(x); }
FASTVAE_INLINE double divide(double a, double b) { return a / b; }

FASTVAE_INLINE float absolute(float x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }
FASTVAE_INLINE double absolute(double x) { return ::fabs(x); }

// The sine and cosine of 2 pi w / 2^32. The quadrant is split off in integer arithmetic.
FASTVAE_INLINE void sincos_turn(uint32_t w, float& sine, float& cosine) {
  uint32_t quadrant = (w + 0x20000000u) >> 30;
  int32_t remainder = static_cast<int32_t>(w - (quadrant << 30));
  float x = static_cast<float>(remainder) * 1.46291807926715968e-9f;
  float x2 = x * x;
  float s = fma(-1.9515295891e-4f, x2, 8.3321608736e-3f);
  s = fma(fma(s, x2, -1.6666654611e-1f) * x2, x, x);
  float c = fma(2.443315711809948e-5f, x2, -1.388731625493765e-3f);
  c = fma(fma(c, x2, 4.166664568298827e-2f), x2 * x2, fma(-0.5f, x2, 1.0f));
  float s0 = (quadrant & 1u) ? c : s;
  float c0 = (quadrant & 1u) ? s : c;
  sine = bits_to_float(float_to_bits(s0) ^ ((quadrant & 2u) << 30));
  cosine = bits_to_float(float_to_bits(c0) ^ (((quadrant + 1u) & 2u) << 30));
}

template <class T>
FASTVAE_INLINE T clamp(T x, T low, T high) {
  T raised = x < low ? low : x;
  return raised > high ? high : raised;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
