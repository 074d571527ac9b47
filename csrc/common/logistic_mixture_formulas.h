// Scalar formulas of the mixture of discretized logistics: the log probability of a bin of one logistic with its gradients, and the tanh of
// a coefficient.
#pragma once

#include "math.h"

namespace fastvae {

// This is MIN_LOG_SCALE in fastvae/ops/logistic_mixture.py.
constexpr double kMinLogScale = -7.0;

// The sizes of a problem, and where the parameters of component m lie on dimension 1 of the input (batch, parameters(), positions).
struct LogisticMixtureSizes {
  int64_t batch, positions, channels, mixtures;

  FASTVAE_MEMBER bool has_logits() const { return mixtures > 1; }
  FASTVAE_MEMBER int64_t pairs() const { return channels * (channels - 1) / 2; }
  FASTVAE_MEMBER int64_t mean(int64_t m, int64_t channel) const { return (has_logits() + channel) * mixtures + m; }
  FASTVAE_MEMBER int64_t log_scale(int64_t m, int64_t channel) const { return mean(m, channels + channel); }
  // The coefficient of `channel` on the channel `before` it.
  FASTVAE_MEMBER int64_t coefficient(int64_t m, int64_t channel, int64_t before) const {
    return mean(m, 2 * channels + channel * (channel - 1) / 2 + before);
  }
  FASTVAE_MEMBER int64_t parameters() const { return mean(0, 2 * channels + pairs()); }
};

inline namespace FASTVAE_ISA {

template <class T>
struct Hyperbolic {
  T sinhc, cosh;  // sinh(h) / h and cosh(h)
};

// These are minimax fits of the relative error (3e-8 and 3e-9) as polynomials in h^2 <= 18.5, which is (e^7 / 255)^2.
FASTVAE_INLINE Hyperbolic<float> hyperbolic(float h) {
  float y = h * h;
  float s = fma(y, 2.132353044e-10f, 2.377694130e-8f);
  s = fma(s, y, 2.770409992e-6f);
  s = fma(s, y, 1.983290422e-4f);
  s = fma(s, y, 8.333550766e-3f);
  s = fma(s, y, 1.666664630e-1f);
  s = fma(s, y, 1.0f);
  float c = fma(y, 1.508451350e-11f, 1.988404774e-9f);
  c = fma(c, y, 2.769264711e-7f);
  c = fma(c, y, 2.479180512e-5f);
  c = fma(c, y, 1.388925361e-3f);
  c = fma(c, y, 4.166660458e-2f);
  c = fma(c, y, 5.000000596e-1f);
  c = fma(c, y, 1.0f);
  return {s, c};
}
FASTVAE_INLINE Hyperbolic<double> hyperbolic(double h) {
  double cosh = ::cosh(h);
  return {h < 1e-3 ? 1.0 + h * h / 6.0 * (1.0 + h * h / 20.0) : ::sinh(h) / h, cosh};
}

// One channel of an image at one position.
template <class T>
struct Pixel {
  T value;  // in [-1, 1]
  T side;   // -1 for the lowest level and 1 for the highest, whose bins are open; otherwise 0
};

// `target` is in [0, 1] and stands for the nearest of the 256 levels.
template <class T>
FASTVAE_INLINE Pixel<T> pixel_of(T target) {
  T level = round_even(clamp(target * T(255), T(0), T(255)));
  T side = level == T(0) ? T(-1) : (level == T(255) ? T(1) : T(0));
  return {divide(fma(level, T(2), T(-255)), T(255)), side};
}

// The probability of a bin is exp(linear) * ratio, and ratio lies between 1/76 and 9. The gradients are those of its logarithm.
template <class T>
struct LogisticBin {
  T linear, ratio, grad_mean, grad_log_scale;
};

// Channels whose ratios are multiplied before a logarithm is taken: the product stays a normal float.
constexpr int64_t kRatiosPerLog = 8;

// With u the distance from the mean and h half the width of the bin, both in units of the scale, the probability is
//   sigmoid(u + h) - sigmoid(u - h) = sinh(h) / (cosh(u) + cosh(h)) = 2 sinh(h) e^-|u| / (1 + 2 cosh(h) e^-|u| + e^-2|u|),
// in which nothing cancels. An open bin has sigmoid(v), where v is the distance of the mean from its border.
template <class T>
FASTVAE_INLINE LogisticBin<T> logistic_bin(Pixel<T> pixel, T mean, T log_scale) {
  bool clamped = log_scale < T(kMinLogScale), open = pixel.side != T(0);
  T scale = clamped ? T(kMinLogScale) : log_scale;
  T inverse = exp(-scale), h = inverse * (T(1) / T(255));
  Hyperbolic<T> hyper = hyperbolic(h);
  T u = (pixel.value - mean) * inverse, v = fma(-pixel.side, u, h);
  T size = absolute(open ? v : u), e = exp(-size);
  T denominator = open ? T(1) + e : fma(fma(T(2), hyper.cosh, e), e, T(1));
  // One division gives the reciprocals of both factors.
  T both = divide(T(1), denominator * hyper.sinhc);
  T reciprocal = both * hyper.sinhc, inverse_sinhc = both * denominator;

  LogisticBin<T> bin;
  T log_width = T(-4.848116364598481) - scale;  // log(2 / 255), the width of the bin in units of the scale
  bin.linear = open ? (v < T(0) ? v : T(0)) : log_width - size;
  bin.ratio = open ? reciprocal : reciprocal * hyper.sinhc;
  T tail = (v < T(0) ? T(1) : e) * reciprocal;            // sigmoid(-v)
  T slope = (T(1) - e) * (T(1) + e) * reciprocal;         // sinh|u| / (cosh(u) + cosh(h))
  T curve = T(2) * h * h * hyper.sinhc * e * reciprocal;  // h sinh(h) / (cosh(u) + cosh(h))
  T by_mean = open ? pixel.side * tail : (u < T(0) ? -slope : slope);
  T by_scale = open ? -v * tail : fma(size, slope, curve) - hyper.cosh * inverse_sinhc;
  bin.grad_mean = by_mean * inverse;
  bin.grad_log_scale = clamped ? T(0) : by_scale;
  return bin;
}

template <class T>
struct LogisticMixtureTanh {
  T value, derivative;
};

template <class T>
FASTVAE_INLINE LogisticMixtureTanh<T> tanh_of(T x) {
  T e = exp(T(-2) * absolute(x)), reciprocal = divide(T(1), T(1) + e);
  T size = (T(1) - e) * reciprocal;
  return {x < T(0) ? -size : size, T(4) * e * reciprocal * reciprocal};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
