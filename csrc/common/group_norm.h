// Elementwise formulas of group normalisation and its activation. An activation is a struct: its value, and its gradient times g.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

struct Identity {
  template <class T>
  FASTVAE_INLINE T value(T u) {
    return u;
  }
  template <class T>
  FASTVAE_INLINE T gradient(T, T g) {
    return g;
  }
};

struct Silu {
  template <class T>
  FASTVAE_INLINE T value(T u) {
    return u / (T(1) + exp(-u));
  }
  template <class T>
  FASTVAE_INLINE T gradient(T u, T g) {
    T sigmoid = T(1) / (T(1) + exp(-u));
    return g * sigmoid * fma(u, T(1) - sigmoid, T(1));
  }
};

// What normalises a channel of a sample: u = (x - centre) * scale + offset. The centre is the group's mean in T; what that lost of the mean
// is in the offset.
template <class T>
FASTVAE_INLINE T affine(T x, T centre, T scale, T offset) {
  return fma(x - centre, scale, offset);
}

// du is the gradient at u; slope and constant carry the gradients that come through the variance and the mean.
template <class T>
FASTVAE_INLINE T gradient_of_input(T x, T du, T centre, T scale, T slope, T constant) {
  return fma(du, scale, fma(x - centre, slope, constant));
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
