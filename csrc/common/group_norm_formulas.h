// Scalar formulas of group normalisation followed by an activation. The steps are u = (x - mean) * rstd * weight + bias and y = act(u); du
// stands for the gradient with respect to u.
#pragma once

#include "norm_activation.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

// u = (x - centre) * scale + offset. `centre` is the mean of the group rounded to T; affine_of() puts the rounding error of the mean into
// the offset, so that u is as accurate as with the mean in float64.
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

// The sum of du * xhat, where xhat = (x - mean) * rstd is the normalised input, from the sums of du and of du * (x - centre).
FASTVAE_INLINE double sum_du_xhat_of(double mean, double centre, double rstd, double sum_du, double sum_du_x) {
  return rstd * (sum_du_x - (mean - centre) * sum_du);
}

// grad_input = du * scale + (x - centre) * slope + intercept: the first term is the direct path, the others are the part of the gradient
// that flows through the variance and the mean of the group.
template <class T>
FASTVAE_INLINE T gradient_of_input(T x, T du, T centre, T scale, T slope, T intercept) {
  return fma(du, scale, fma(x - centre, slope, intercept));
}

// The part of grad_input that flows through the mean and rstd of a group, a linear function of x: (x - centre) * slope + intercept.
struct NormStatisticsGradient {
  double slope, intercept;
};

// Computes it from the sums of weight * du and of weight * du * xhat over a group of `elements` elements.
FASTVAE_INLINE NormStatisticsGradient statistics_gradient_of(double mean, double centre, double rstd, double sum_wdu, double sum_wdu_xhat,
                                                             double elements) {
  double slope = -rstd * rstd * sum_wdu_xhat / elements;
  return {slope, -rstd * sum_wdu / elements - (mean - centre) * slope};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
