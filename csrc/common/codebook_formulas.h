// Scalar formulas of vector quantization: error bounds of float32 scores, exact comparison of two distances, the gradient of the rotation
// trick, and the moving averages of the codes. A score of code c for a row x is |c|^2 / 2 - x.c, which orders the codes as their distances
// do.
#pragma once

#include <cfloat>

#include "integers.h"
#include "math.h"

namespace fastvae {

// The half norm of a code that is never the nearest. Half norms of scaled codes are below 1.
constexpr float kNeverNearest = 1e30f;
// Codes are scaled by a power of two, after which the largest norm is in [kMaxCodeNorm / 2, kMaxCodeNorm). A little below 1, so that
// rounding each element to 16 bits leaves the norm below 1.
constexpr double kMaxCodeNorm = 0.97;
// Rows whose scaled norm is at least this large are not screened, because their scores could overflow float32.
constexpr float kMaxRowNorm = 0x1p60f;
// Bounds the sum of all operations on one score that underflow: 2^-126 each, where subnormal numbers are flushed to 0, for up to 2^25
// dimensions.
constexpr float kUnderflowBound = 0x1p-100f;
// Bounds each product of an exact sum, so that 2^33 of them do not overflow float64.
constexpr double kMaxProduct = 0x1p990;
// The result of compare_distances() where float64 overflows; the others are -1, 0 and 1.
constexpr int kUndecided = 2;

inline namespace FASTVAE_ISA {

FASTVAE_INLINE uint64_t double_to_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The highest bit of the result is set where the value is infinite or NaN: adding 1 to an exponent of all ones overflows into that bit.
// This is integer arithmetic, because with -fno-signed-zeros (see setup.py) a compiler may drop tests such as x * 0 == 0 or x - x == 0.
FASTVAE_INLINE uint64_t not_finite_bit(double value) { return (double_to_bits(value) & 0x7fffffffffffffffu) + 0x0010000000000000u; }

FASTVAE_INLINE bool is_finite(double value) { return not_finite_bit(value) >> 63 == 0; }

FASTVAE_INLINE double power_of_two(int exponent) {
  uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The exponent e for which norm / 2^e is in [kMaxCodeNorm / 2, kMaxCodeNorm). The norm has to be a normal number.
FASTVAE_INLINE int norm_exponent(double norm) { return static_cast<int>(double_to_bits(norm / kMaxCodeNorm) >> 52) - 1022; }

// The term that element d adds to the hash of a code. Equal numbers have equal terms, and so have 0 and -0.
FASTVAE_INLINE uint64_t hash_of_element(double value, int64_t d) {
  uint64_t bits = value == 0.0 ? 0 : double_to_bits(value);
  return (bits ^ (bits >> 27)) * (static_cast<uint64_t>(2 * d + 1) * 0x9e3779b97f4a7c15u);
}

// Rounding error bounds of a score in float32.
struct ScoreErrorBounds {
  float rounding;                     // bounds the error of a sum, relative to the sum of the absolute values of its terms
  float norm_factor, norm_underflow;  // norm * norm_factor + norm_underflow is at least the exact norm of a row
  float code_underflow;               // added to the norm of a code, see code_norm_upper_bound()
};

inline ScoreErrorBounds score_error_bounds(int64_t dim) {
  // The standard bound n u / (1 - n u) of a sum of n terms with u = 2^-24. The 16 additional terms cover the rounding of the operands and
  // the operations on the sum.
  double n = static_cast<double>(dim + 16) * 0x1p-24;
  float rounding = static_cast<float>(n < 0.5 ? n / (1.0 - n) : 1.0);
  float root = sqrtf(static_cast<float>(dim));
  return {rounding, 1.0f + 2.0f * rounding, 0x1p-60f * root, 0x1p-100f * root};
}

// An upper bound of a norm from its square in float32.
FASTVAE_INLINE float norm_upper_bound(const ScoreErrorBounds& errors, float square) {
  return sqrt(square) * errors.norm_factor + errors.norm_underflow;
}

// An upper bound of the norm of a packed code, from the norm in float64. An element of a packed code that underflows is off by up to
// 2^-126, and a row of norm 2^60 multiplies that. The last term makes the bound of the error, `rounding` times the norms of row and code,
// cover it: `rounding` is above 2^-20. So no such product of a rounding and a code's norm underflows.
FASTVAE_INLINE float code_norm_upper_bound(const ScoreErrorBounds& errors, double norm) {
  return static_cast<float>(norm * (1.0 + 1e-6)) + errors.code_underflow;
}

// An upper bound of the error of a score.
FASTVAE_INLINE float score_error_bound(const ScoreErrorBounds& errors, float half_norm, float code_norm, float row_norm) {
  return errors.rounding * (half_norm + row_norm * code_norm) + kUnderflowBound;
}

// The same for a score in float64 of a row and a code that are neither centred nor scaled. `square` is that of the code's norm. The terms
// with powers of two cover what underflows.
FASTVAE_INLINE double wide_score_error_bound(double square, double row_norm, int64_t dim) {
  double n = static_cast<double>(dim + 16);
  return n * 0x1p-52 * (0.5 * square + row_norm * (::sqrt(square) + n * 0x1p-500)) + n * 0x1p-1000;
}

// The largest squared distance in float64 whose exact value may be at most that of `smallest`: the bound covers the rounding errors of both
// sums of `dim` squares, and squares that underflow.
FASTVAE_INLINE double tie_bound(double smallest, int64_t dim) {
  double n = static_cast<double>(dim + 8);
  return smallest * (1.0 + 2.0 * n * 0x1p-52) + n * 0x1p-1000;
}

// Exact arithmetic follows. The error of a rounded product or sum is computed from the rounded value, so the compiler must not fuse a
// product and a sum into one rounding. Inlining would give it the chance, so on the host these functions are not inlined.
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

// A sum of doubles without rounding, as components that do not overlap, in ascending order (Shewchuk, Adaptive Precision Floating-Point
// Arithmetic and Fast Robust Geometric Predicates, 1997).
struct ExactSum {
  static constexpr int kMaxComponents = 64;  // all doubles span 2098 bits, and each component holds 53 of them: 40, and a margin
  double components[kMaxComponents];
  int count;
};

FASTVAE_UNFUSED void add_exactly(ExactSum& total, double term) {
  int count = 0;
  for (int i = 0; i < total.count; ++i) {
    double component = total.components[i], sum = term + component;
    double virtual_part = sum - term;
    double error = (term - (sum - virtual_part)) + (component - virtual_part);
    if (error != 0.0) total.components[count++] = error;
    term = sum;
  }
  total.count = count;
  if (term != 0.0) total.components[total.count++] = term;
}

// Adds a * b, or returns false and adds nothing where sums of such products could overflow. An infinite component would stay in the sum and
// leave a NaN error behind at every addition, so that the number of components had no bound.
FASTVAE_INLINE bool add_product_exactly(ExactSum& total, double a, double b) {
  double product = rounded_product(a, b);
  if (!(absolute(product) < kMaxProduct)) return false;
  add_exactly(total, product);
  add_exactly(total, ::fma(a, b, -product));
  return true;
}

// The power of two, at least 1, that takes the largest element of three vectors up to about 2^480. It leaves products below kMaxProduct,
// and keeps them and their rounding errors from underflow unless elements are 2^900 times smaller than the largest.
FASTVAE_INLINE double scale_for_exact_products(const double* x, const double* a, const double* b, int64_t dim) {
  double largest = 0.0;
  for (int64_t d = 0; d < dim; ++d) {
    largest = absolute(x[d]) > largest ? absolute(x[d]) : largest;
    largest = absolute(a[d]) > largest ? absolute(a[d]) : largest;
    largest = absolute(b[d]) > largest ? absolute(b[d]) : largest;
  }
  int exponent = static_cast<int>(double_to_bits(largest) >> 52) - 1023;
  return power_of_two(static_cast<int>(max64(min64(480 - exponent, 1000), 0)));
}

// The sign of |x - a|^2 - |x - b|^2 = |a|^2 - |b|^2 - 2 x.a + 2 x.b, or kUndecided where a product overflows float64. `sum` is scratch
// memory.
FASTVAE_INLINE int compare_distances(const double* x, const double* a, const double* b, int64_t dim, ExactSum& sum) {
  sum.count = 0;
  double scale = scale_for_exact_products(x, a, b, dim);
  for (int64_t d = 0; d < dim; ++d) {
    if (a[d] == b[d]) continue;
    double ad = a[d] * scale, bd = b[d] * scale, xd = x[d] * scale;
    bool added = add_product_exactly(sum, ad, ad) && add_product_exactly(sum, -bd, bd) && add_product_exactly(sum, -2.0 * xd, ad) &&
                 add_product_exactly(sum, 2.0 * xd, bd);
    if (!added) return kUndecided;
  }
  if (sum.count == 0) return 0;
  return sum.components[sum.count - 1] > 0.0 ? 1 : -1;
}

// The rotation and scaling that take x to its code c, times |c| / |x| (Fifty et al., 2024): with unit vectors x' = x / |x|, c' = c / |c|
// and h = x' + c', it is (I - 2 h h^T / |h|^2 + 2 c' x'^T) * |c| / |x|. Its transpose takes grad_output to grad_x.
template <class T>
struct CodebookRotation {
  T x_factor, code_factor, scale;  // 1 / |x|, 1 / |c|, |c| / |x|
  T grad_on_h, grad_on_code;       // h.grad_output / |h|^2 and c'.grad_output, see set_gradient()
};

// The norm, but at least the smallest normal number, so that it can be divided by.
template <class T>
FASTVAE_INLINE T nonzero_norm(T norm) {
  const T tiny = sizeof(T) == sizeof(float) ? T(FLT_MIN) : T(DBL_MIN);
  return norm < tiny ? tiny : norm;
}

template <class T>
FASTVAE_INLINE CodebookRotation<T> rotation_between(T x_norm, T code_norm) {
  T divisor = nonzero_norm(x_norm);
  return {T(1) / divisor, T(1) / nonzero_norm(code_norm), code_norm / divisor, T(0), T(0)};
}

// An element of h.
template <class T>
FASTVAE_INLINE T halfway(const CodebookRotation<T>& r, T x, T code) {
  return x * r.x_factor + code * r.code_factor;
}

// Takes the norm of h and the products h.grad_output and c.grad_output.
template <class T>
FASTVAE_INLINE void set_gradient(CodebookRotation<T>& r, T h_norm, T h_dot_grad, T code_dot_grad) {
  // Where x' and c' are opposite, h is what their rounding leaves: its direction is none, and its part of the rotation is left out.
  const T rounding = T(16) * (sizeof(T) == sizeof(float) ? T(FLT_EPSILON) : T(DBL_EPSILON));
  r.grad_on_h = h_norm <= rounding ? T(0) : h_dot_grad / h_norm / h_norm;
  r.grad_on_code = code_dot_grad * r.code_factor;
}

// An element of grad_x from those of grad_output, h and x.
template <class T>
FASTVAE_INLINE T rotate_back(const CodebookRotation<T>& r, T grad_output, T h, T x) {
  return r.scale * (grad_output - T(2) * r.grad_on_h * h + T(2) * r.grad_on_code * (x * r.x_factor));
}

FASTVAE_INLINE double moving_average(double average, double value, double decay) { return decay * average + (1.0 - decay) * value; }

// The count of a code with Laplace smoothing, which keeps the sum over all codes at `total`.
FASTVAE_INLINE double smoothed_count(double count, double total, int64_t codes, double eps) {
  return (count + eps) / (total + static_cast<double>(codes) * eps) * total;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
