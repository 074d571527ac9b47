// Scalar formulas of the contractive penalty: phi'(a)^2 and its derivative, for each activation phi. An activation is a struct with one
// function at(h, alpha). Its hidden value h is the output phi(a), or for SiLU and both GELUs, whose output does not determine the
// derivative, the input a. alpha is the parameter of the activation, which most of them ignore.
#pragma once

#include "normal.h"

namespace fastvae {

// These are the numbers of ACTIVATIONS in fastvae/ops/jacobian.py.
enum class Activation : int64_t { identity, sigmoid, tanh, relu, leaky_relu, elu, softplus, silu, gelu, gelu_tanh };

inline namespace FASTVAE_ISA {

template <class T>
struct SquaredSlope {
  T square, change;  // phi'^2, and the derivative of that with respect to h
};

// Squares the slope phi', whose derivative with respect to h is `change`.
template <class T>
FASTVAE_INLINE SquaredSlope<T> squared(T slope, T change) {
  return {slope * slope, T(2) * slope * change};
}

// A constant result that still passes a NaN of h on.
template <class T>
FASTVAE_INLINE T constant(T value, T h) {
  return h == h ? value : h;
}

// exp(x) - 1 for x <= 0.
FASTVAE_INLINE float expm1_negative(float x) {
  // Near 0 the difference would cancel. The series has six terms of the Taylor expansion.
  float series = x * fma(x, fma(x, fma(x, fma(x, fma(x, 1.3888889e-3f, 8.3333333e-3f), 4.1666667e-2f), 1.6666667e-1f), 0.5f), 1.0f);
  return x > -0.35f ? series : exp(x) - 1.0f;
}
FASTVAE_INLINE double expm1_negative(double x) { return ::expm1(x); }

struct Identity {
  template <class T>
  FASTVAE_INLINE SquaredSlope<T> at(T h, T) {
    return {constant(T(1), h), constant(T(0), h)};
  }
};

struct Sigmoid {
  template <class T>
  FASTVAE_INLINE SquaredSlope<T> at(T h, T) {
    return squared(h * (T(1) - h), fma(T(-2), h, T(1)));
  }
};

struct Tanh {
  template <class T>
  FASTVAE_INLINE SquaredSlope<T> at(T h, T) {
    return squared(fma(-h, h, T(1)), T(-2) * h);
  }
};

struct ReLU {
  template <class T>
  FASTVAE_INLINE SquaredSlope<T> at(T h, T) {
    return {constant(h <= T(0) ? T(0) : T(1), h), constant(T(0), h)};
  }
};

struct LeakyReLU {
  template <class T>
  FASTVAE_INLINE SquaredSlope<T> at(T h, T alpha) {
    return {constant(h <= T(0) ? alpha * alpha : T(1), h), constant(T(0), h)};
  }
};

struct ELU {
  template <class T>
  FASTVAE_INLINE SquaredSlope<T> at(T h, T alpha) {
    return squared(h <= T(0) ? h + alpha : constant(T(1), h), constant(h <= T(0) ? T(1) : T(0), h));
  }
};

struct Softplus {
  template <class T>
  FASTVAE_INLINE SquaredSlope<T> at(T h, T alpha) {
    T slope = -expm1_negative(-alpha * h);
    return squared(slope, alpha * (T(1) - slope));
  }
};

// 1 / (1 + e^-a), from an exponential that cannot overflow.
template <class T>
FASTVAE_INLINE T logistic(T a) {
  T e = exp(-absolute(a)), r = divide(T(1), T(1) + e);
  return a < T(0) ? e * r : r;
}

struct SiLU {
  template <class T>
  FASTVAE_INLINE SquaredSlope<T> at(T h, T) {
    T sigma = logistic(h), product = sigma * logistic(-h);
    return squared(fma(h, product, sigma), product * fma(h, fma(T(-2), sigma, T(1)), T(2)));
  }
};

struct GELU {
  template <class T>
  FASTVAE_INLINE SquaredSlope<T> at(T h, T) {
    Normal<T> n = normal_at(h);
    return squared(fma(h, n.density, n.distribution), n.density * fma(-h, h, T(2)));
  }
};

// The approximation of GELU by h * (1 + tanh(g)) / 2 with g = sqrt(2 / pi) * (h + 0.044715 h^3), where (1 + tanh(g)) / 2 = logistic(2 g).
struct GELUTanh {
  template <class T>
  FASTVAE_INLINE SquaredSlope<T> at(T h, T) {
    const T k = T(0.7978845608028654), cubic = T(0.044715);
    T square = h * h;
    T sigma = logistic(T(2) * k * h * fma(cubic, square, T(1)));
    T complement = logistic(T(-2) * k * h * fma(cubic, square, T(1)));
    T inner = k * fma(T(3) * cubic, square, T(1)), curvature = T(6) * k * cubic * h;
    T half_slope = T(2) * sigma * complement;  // (1 - tanh^2) / 2, half the derivative of tanh
    T tanh = sigma - complement;
    return squared(fma(h * half_slope, inner, sigma), half_slope * fma(h, fma(T(-2) * tanh, inner * inner, curvature), T(2) * inner));
  }
};

// Calls f with the struct of the activation.
FASTVAE_ANY_CALLEE
template <class F>
FASTVAE_INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::identity:
      return f(Identity{});
    case Activation::sigmoid:
      return f(Sigmoid{});
    case Activation::tanh:
      return f(Tanh{});
    case Activation::relu:
      return f(ReLU{});
    case Activation::leaky_relu:
      return f(LeakyReLU{});
    case Activation::elu:
      return f(ELU{});
    case Activation::softplus:
      return f(Softplus{});
    case Activation::silu:
      return f(SiLU{});
    case Activation::gelu:
      return f(GELU{});
    case Activation::gelu_tanh:
      return f(GELUTanh{});
  }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
