// Arithmetic of vector quantization: what float32 can tell apart, what decides where it cannot, the gradient of the rotation, and the
// moving averages.
#pragma once

#include <cfloat>

#include "math.h"

namespace fastvae {

constexpr float kNeverNearest = 1e30f;       // a half norm
constexpr double kLargestNorm = 0.97;        // below which a power of two brings the norms of all codes
constexpr float kLargestRow = 0x1p60f;       // norms of scaled rows beyond it could overflow
constexpr float kUnderflow = 0x1p-110f;      // more than all products of one score that vanish
constexpr double kLargestProduct = 0x1p990;  // 2^33 of them do not overflow float64
constexpr int kNoOrder = 2;                  // of two distances: beside -1, 0 and 1

inline namespace FASTVAE_ISA {

FASTVAE_INLINE uint64_t double_to_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The highest bit says whether the value is infinite or NaN: its exponent, all ones then, overflows into that bit. Integer arithmetic,
// since a compiler may drop floating-point tests such as x * 0 == 0 or x - x == 0: to it zeros have no sign (setup.py).
FASTVAE_INLINE uint64_t not_finite_bit(double value) { return (double_to_bits(value) & 0x7fffffffffffffffu) + 0x0010000000000000u; }

FASTVAE_INLINE bool is_finite(double value) { return not_finite_bit(value) >> 63 == 0; }

FASTVAE_INLINE double power_of_two(int exponent) {
  uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The exponent e for which norm / 2^e is in [kLargestNorm / 2, kLargestNorm), for a normal number.
FASTVAE_INLINE int norm_exponent(double norm) { return static_cast<int>(double_to_bits(norm / kLargestNorm) >> 52) - 1022; }

// What element d adds to the hash of a code; equal numbers have equal hashes.
FASTVAE_INLINE uint64_t hash_of_element(double value, int64_t d) {
  uint64_t bits = value == 0.0 ? 0 : double_to_bits(value);
  return (bits ^ (bits >> 27)) * (static_cast<uint64_t>(2 * d + 1) * 0x9e3779b97f4a7c15u);
}

// Bounds for a score |c|^2 / 2 - x.c in float arithmetic.
struct ScoreErrors {
  float rounding;  // the error of a sum, relative to the sum of its terms' absolute values
  float norm_factor, norm_underflow;
};

inline ScoreErrors score_errors(int64_t dim) {
  // Beside the sum's own terms for the rounding of its operands and of what is done with it.
  double n = static_cast<double>(dim + 16) * 0x1p-24;
  float rounding = static_cast<float>(n < 0.5 ? n / (1.0 - n) : 1.0);
  return {rounding, 1.0f + 2.0f * rounding, 0x1p-60f * sqrtf(static_cast<float>(dim))};
}

// A norm from its square as float arithmetic gives it, rounded up.
FASTVAE_INLINE float norm_at_least(const ScoreErrors& errors, float square) {
  return sqrt(square) * errors.norm_factor + errors.norm_underflow;
}

// At least the error of a score.
FASTVAE_INLINE float score_error(const ScoreErrors& errors, float half_norm, float code_norm, float row_norm) {
  return errors.rounding * (half_norm + row_norm * code_norm) + kUnderflow;
}

// Squared distances in float64 up to which a code may be as near as the one at the smallest.
FASTVAE_INLINE double near_tie(double smallest, int64_t dim) { return smallest * (1.0 + 2.0 * static_cast<double>(dim + 8) * 0x1p-52); }

// What decides in exact arithmetic: no product may be fused with a sum, against whose rounding its error is taken.
#if defined(__CUDACC__)
#define FASTVAE_UNFUSED static __host__ __device__ __forceinline__
#else
#define FASTVAE_UNFUSED static inline __attribute__((noinline))
#endif
#if defined(__CUDA_ARCH__)
FASTVAE_INLINE double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#else
FASTVAE_INLINE double rounded_product(double a, double b) { return a * b; }
#endif

// A sum of doubles without rounding, as components that do not overlap, smallest first (Shewchuk, Adaptive Precision Floating-Point
// Arithmetic and Fast Robust Geometric Predicates, 1997).
struct ExactSum {
  static constexpr int kMost = 64;  // 2098 bits span all doubles, and each component holds 53 of them
  double components[kMost];
  int count;
};

FASTVAE_UNFUSED void add_exactly(ExactSum& total, double term) {
  int kept = 0;
  for (int i = 0; i < total.count; ++i) {
    double component = total.components[i], sum = term + component;
    double virtual_part = sum - term;
    double error = (term - (sum - virtual_part)) + (component - virtual_part);
    if (error != 0.0) total.components[kept++] = error;
    term = sum;
  }
  total.count = kept;
  if (term != 0.0) total.components[total.count++] = term;
}

// False, and adds nothing, where sums of such products could overflow: the components of an infinite sum have no bound on their number.
FASTVAE_INLINE bool add_product_exactly(ExactSum& total, double a, double b) {
  double product = rounded_product(a, b);
  if (!(absolute(product) < kLargestProduct)) return false;
  add_exactly(total, product);
  add_exactly(total, ::fma(a, b, -product));
  return true;
}

// The sign of |x - a|^2 - |x - b|^2, or kNoOrder where their parts overflow float64; `sum` is a buffer.
FASTVAE_INLINE int compare_distances(const double* x, const double* a, const double* b, int64_t dim, ExactSum& sum) {
  sum.count = 0;
  for (int64_t d = 0; d < dim; ++d) {
    if (a[d] == b[d]) continue;
    bool added = add_product_exactly(sum, a[d], a[d]) && add_product_exactly(sum, -b[d], b[d]) &&
                 add_product_exactly(sum, -2.0 * x[d], a[d]) && add_product_exactly(sum, 2.0 * x[d], b[d]);
    if (!added) return kNoOrder;
  }
  if (sum.count == 0) return 0;
  return sum.components[sum.count - 1] > 0.0 ? 1 : -1;
}

// The rotation and scaling that take x to its code: I - 2 r r^T + 2 c x^T for unit x and c and the unit vector r halfway between them,
// times |c| / |x|.
template <class T>
struct Rotation {
  T x_factor, code_factor, scale;
  T along, along_code;  // of the gradient: its part along r, over the length of x + c; and its part along c
};

template <class T>
FASTVAE_INLINE T at_least_tiny(T norm) {
  const T tiny = sizeof(T) == sizeof(float) ? T(FLT_MIN) : T(DBL_MIN);
  return norm < tiny ? tiny : norm;
}

template <class T>
FASTVAE_INLINE Rotation<T> rotation_between(T x_norm, T code_norm) {
  T divisor = at_least_tiny(x_norm);
  return {T(1) / divisor, T(1) / at_least_tiny(code_norm), code_norm / divisor, T(0), T(0)};
}

// An element of the sum of both unit vectors.
template <class T>
FASTVAE_INLINE T halfway(const Rotation<T>& r, T x, T code) {
  return x * r.x_factor + code * r.code_factor;
}

// From the norm of halfway() and the products of the gradient with it and with the code.
template <class T>
FASTVAE_INLINE void project(Rotation<T>& r, T norm, T along, T along_code) {
  T divisor = at_least_tiny(norm);
  r.along = along / divisor / divisor;
  r.along_code = along_code * r.code_factor;
}

// An element of the gradient's image under the transpose.
template <class T>
FASTVAE_INLINE T rotate_back(const Rotation<T>& r, T gradient, T between, T x) {
  return r.scale * (gradient - T(2) * r.along * between + T(2) * r.along_code * (x * r.x_factor));
}

FASTVAE_INLINE double moving_average(double average, double value, double decay) { return decay * average + (1.0 - decay) * value; }

FASTVAE_INLINE double smoothed_count(double count, double total, int64_t codes, double eps) {
  return (count + eps) / (total + static_cast<double>(codes) * eps) * total;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
