// What decides between codes that float32 cannot tell apart: squared distances in float64, and where those are too close the sign of their
// difference in exact arithmetic.
#pragma once

#include <cmath>

#include "../../common/macros.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

static double squared_distance(const double* x, const double* code, int64_t dim) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < dim; ++d) total += (x[d] - code[d]) * (x[d] - code[d]);
  return total;
}

// A sum of doubles without rounding, as components that do not overlap, smallest first (Shewchuk, Adaptive Precision Floating-Point
// Arithmetic and Fast Robust Geometric Predicates, 1997).
class ExactSum {
 public:
  // Not inlined: a product fused into the first sum would not be the rounded one that the error is taken against.
  __attribute__((noinline)) void add(double term) {
    int kept = 0;
    for (int i = 0; i < count_; ++i) {
      double sum = term + components_[i];
      double virtual_part = sum - term;
      double error = (term - (sum - virtual_part)) + (components_[i] - virtual_part);
      if (error != 0.0) components_[kept++] = error;
      term = sum;
    }
    count_ = kept;
    if (term != 0.0) components_[count_++] = term;
  }

  void add_product(double a, double b) {
    double product = a * b;
    add(product);
    add(std::fma(a, b, -product));
  }

  int sign() const { return count_ == 0 ? 0 : (components_[count_ - 1] > 0.0 ? 1 : -1); }

 private:
  static constexpr int kMost = 64;  // 2098 bits span all doubles, and each component holds 53 of them
  double components_[kMost];
  int count_ = 0;
};

// The sign of |x - a|^2 - |x - b|^2.
static int compare_distances(const double* x, const double* a, const double* b, int64_t dim) {
  ExactSum sum;
  for (int64_t d = 0; d < dim; ++d) {
    sum.add_product(a[d], a[d]);
    sum.add_product(-b[d], b[d]);
    sum.add_product(-2.0 * x[d], a[d]);
    sum.add_product(2.0 * x[d], b[d]);
  }
  return sum.sign();
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
