// Scalar formulas of the reconstruction losses and their gradients. A likelihood is a struct with one function terms(x, t) of input and
// target, or terms(x, t, extra) with a third operand. It returns the loss and all gradients; after inlining the compiler drops those that
// the caller does not use.
#pragma once

#include "math.h"

namespace fastvae {

// These are the numbers of LIKELIHOODS in fastvae/ops/reconstruction.py.
enum class Likelihood : int64_t { bce_with_logits = 0, bce = 1, mse = 2, gaussian = 3 };

inline namespace FASTVAE_ISA {

template <class T>
struct LossTerms {
  T loss, input, target, logvar;  // the loss, and its gradients with respect to input, target and log variance
};

// Binary cross-entropy from logits x: (1 - t) x + softplus(-x).
struct BCEWithLogits {
  template <class T>
  FASTVAE_INLINE LossTerms<T> terms(T x, T t) {
    T e = exp(-absolute(x)), r = divide(T(1), T(1) + e);
    T sigmoid = x < T(0) ? e * r : r;
    T hinge = -x > T(0) ? -x : T(0);
    return {fma(T(1) - t, x, hinge + log1p_unit(e)), sigmoid - t, -x, T(0)};
  }
};

// Binary cross-entropy from logits with the weight p of positive targets (pos_weight): (1 - t) x + (1 + (p - 1) t) softplus(-x).
struct WeightedBCEWithLogits {
  template <class T>
  FASTVAE_INLINE LossTerms<T> terms(T x, T t, T p) {
    T e = exp(-absolute(x)), r = divide(T(1), T(1) + e);
    T complement = x < T(0) ? r : e * r;  // sigmoid(-x)
    T hinge = -x > T(0) ? -x : T(0);
    T softplus = hinge + log1p_unit(e);  // softplus(-x)
    T excess = p - T(1), factor = fma(excess, t, T(1));
    return {fma(T(1) - t, x, factor * softplus), fma(-factor, complement, T(1) - t), fma(excess, softplus, -x), T(0)};
  }
};

// Binary cross-entropy from probabilities x, with torch's floors: -100 for both logarithms, 1e-12 for the denominator of the gradient.
struct BCE {
  template <class T>
  FASTVAE_INLINE LossTerms<T> terms(T x, T t) {
    T complement = T(1) - x;
    T product = complement * x;
    T floored = product < T(1e-12) ? T(1e-12) : product;
    T log_one = floor_log(log(x)), log_zero = floor_log(log_complement(x, complement));
    return {-fma(t, log_one, (T(1) - t) * log_zero), divide(x - t, floored), log_zero - log_one, T(0)};
  }

 private:
  template <class T>
  FASTVAE_INLINE T floor_log(T value) {
    return value < T(-100) ? T(-100) : value;
  }
  // log(1 - x), where `complement` is 1 - x in T.
  FASTVAE_INLINE float log_complement(float x, float complement) {
    // The first-order term of the rounding error of 1 - x corrects the logarithm. At x = 1 the logarithm is -inf and the correction 0 / 0,
    // which would turn it into NaN.
    float correction = divide((1.0f - complement) - x, complement);
    return log(complement) + (complement == 0.0f ? 0.0f : correction);
  }
  FASTVAE_INLINE double log_complement(double x, double) { return ::log1p(-x); }
};

// (x - t)^2.
struct SquaredError {
  template <class T>
  FASTVAE_INLINE LossTerms<T> terms(T x, T t) {
    T difference = x - t;
    return {difference * difference, T(2) * difference, T(-2) * difference, T(0)};
  }
};

// The negative log density of a Gaussian with mean x: (log(2 pi) + logvar + (x - t)^2 / e^logvar) / 2.
struct Gaussian {
  template <class T>
  FASTVAE_INLINE LossTerms<T> terms(T x, T t, T logvar) {
    T difference = x - t, scaled = difference * exp(-logvar);
    T square = difference * scaled;
    T loss = T(0.5) * (T(1.8378770664093453) + logvar + square);
    return {loss, scaled, -scaled, T(0.5) * (T(1) - square)};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
