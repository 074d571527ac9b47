// Scalar formulas of RMS normalisation followed by an activation. The channels of a position are normalised: u = x * rrms * weight + bias
// and y = act(u), where rrms is 1 / RMS; du stands for the gradient with respect to u, and n for x * rrms.
#pragma once

#include "norm_activation.h"

namespace fastvae {

// These are the numbers of EPS_MODES in fastvae/ops/rms_norm.py.
enum class EpsMode : int64_t { add = 0, clamp = 1 };

inline namespace FASTVAE_ISA {

// What keeps rrms finite. In the mode `add`, eps is added to the mean square. In the mode `clamp` it is the least norm of the channels, so
// that rrms is at most `limit`.
template <class T>
struct RmsBound {
  T eps, limit;

  RmsBound() = default;
  FASTVAE_MEMBER RmsBound(EpsMode mode, double eps, int64_t channels)
      : eps(mode == EpsMode::add ? static_cast<T>(eps) : T(0)),
        limit(mode == EpsMode::add ? T(INFINITY) : static_cast<T>(::sqrt(static_cast<double>(channels)) / eps)) {}

  // A NaN stays one, and with an infinite limit, so does 1 / 0.
  FASTVAE_MEMBER T rrms(T mean_square) const {
    T value = divide(T(1), sqrt(mean_square + eps));
    return value > limit ? limit : value;
  }
  // Where the limit decides, rrms does not depend on x.
  FASTVAE_MEMBER bool is_constant(T rrms) const { return limit < T(INFINITY) && rrms >= limit; }
};

// grad_input = (weight * du - n * projection) * rrms, where the projection is the mean over the channels of weight * du * n: the part of
// the gradient that flows through rrms.
template <class T>
FASTVAE_INLINE T rms_gradient_of_input(T x, T weighted_du, T rrms, T projection) {
  return (weighted_du - x * rrms * projection) * rrms;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
