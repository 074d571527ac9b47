// The storage types of the group norm kernels, and the loops over one to four rows of a piece; columns_of() in ../group_norm_kernels.h says
// what rows and columns are. Each loop treats column i of all rows together: the parameters of a column are loaded once, and the sum over
// the rows is added once to the sum of the column in memory.
//
//   add_rows         sums of x
//   add_moments      sums of x - shift and of its square
//   forward_rows     y = act((x - centre) * scale + offset)
//   add_gradients    sums of du and of du * (x - centre); stores du where the storage type keeps it
//   backward_rows    grad_input
//
// Parameters and sums are arrays of one value for each column.
#pragma once

#include "../group_norm_kernels.h"
#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// A number that is known at compile time, as the type of a function argument.
template <int number>
struct Number {
  static constexpr int value = number;
};

// The values that one iteration of a loop over columns handles: those of a word, or of the words of several rows. No function takes or
// returns them by value, because clang passes two floats as one vector, and does not vectorise a loop that contains such a vector.
template <class T, int count>
struct Values {
  T at[count];

  Values() = default;
  FASTVAE_MEMBER explicit Values(const T* from) {
#pragma GCC unroll 2
    for (int i = 0; i < count; ++i) at[i] = from[i];
  }
};

// A storage type has these members:
//   Stored, T          what memory holds, and the type of the arithmetic
//   kLanes, get, put   the number of elements of a word, and access to a word or to one element
//   Accuracy           the accuracy of the activation that suffices for a stored result; sums always use Accurate
//   kKeepsGradient     whether gradient_sums stores du in grad_input, from where backward reads it; not where that would round du
//
// Native is the storage of float32 and float64, which are the types of the arithmetic themselves.
template <class Value>
struct Native {
  using Accuracy = Accurate;
  static constexpr bool kKeepsGradient = true;
  static constexpr int kLanes = 1;
  using Stored = Value;
  using T = Value;
  FASTVAE_INLINE void get(const Stored* from, Number<1>, T* to) { *to = *from; }
  FASTVAE_INLINE void put(Stored* to, Number<1>, const T* from) { *to = *from; }
};

// Two adjacent elements are handled as one word of 32 bits. A vector of words then has as many lanes as a vector of floats, and conversions
// need shifts and masks alone, where 16-bit elements would have to be moved across lanes.
struct BFloat16 {
  using Accuracy = Coarse;
  static constexpr bool kKeepsGradient = false;
  static constexpr int kLanes = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 2 : 1;
  using Stored = uint16_t;
  using Word [[gnu::may_alias, gnu::aligned(sizeof(Stored))]] = uint32_t;
  using T = float;
  FASTVAE_INLINE void get(const Stored* from, Number<1>, T* to) { *to = bfloat16_to_float(*from); }
  FASTVAE_INLINE void get(const Stored* from, Number<2>, T* to) {
    uint32_t word = *reinterpret_cast<const Word*>(from);
    to[0] = bits_to_float(word << 16);
    to[1] = bits_to_float(word & 0xffff0000u);
  }
  FASTVAE_INLINE void put(Stored* to, Number<1>, const T* from) { *to = static_cast<Stored>(rounded(*from) >> 16); }
  FASTVAE_INLINE void put(Stored* to, Number<2>, const T* from) {
    *reinterpret_cast<Word*>(to) = (rounded(from[0]) >> 16) | (rounded(from[1]) & 0xffff0000u);
  }

 private:
  // Rounds to the nearest bfloat16, in the upper 16 bits. Ties are rounded away from zero, which takes one addition only; one result in
  // 65536 is a tie. A NaN needs no test. Its lower 16 bits are 0, because those of a NaN in the tensors are, and spread() in group_norm.cpp
  // sees to those of the parameters, so that the addition cannot carry into the sign.
  FASTVAE_INLINE uint32_t rounded(T value) { return float_to_bits(value) + 0x8000u; }
};

struct Float16 {
  using Accuracy = Accurate;
  static constexpr bool kKeepsGradient = false;
  static constexpr int kLanes = 1;
  using Stored = uint16_t;
  using T = float;
  FASTVAE_INLINE void get(const Stored* from, Number<1>, T* to) { *to = half_to_float(*from); }
  FASTVAE_INLINE void put(Stored* to, Number<1>, const T* from) { *to = float_to_half(*from); }
};

// Rows that a loop over columns handles at a time: four independent chains of operations, which hide the latency of each.
constexpr int kRows = 4;

// Calls f(Number<rows>{}, offset, count) for groups of kRows rows, then for single rows, then for the rest of a row, where `count` is the
// number of columns.
template <class F>
FASTVAE_INLINE void for_each_rows(int64_t length, int64_t columns, F f) {
  int64_t offset = 0;
  for (; offset + kRows * columns <= length; offset += kRows * columns) f(Number<kRows>{}, offset, columns);
  for (; offset + columns <= length; offset += columns) f(Number<1>{}, offset, columns);
  if (offset < length) f(Number<1>{}, offset, length - offset);
}

// Calls f(Number<lanes>{}, column) for the words of a row, and for the last element where the number of elements is odd.
template <class S, class F>
FASTVAE_INLINE void for_each_word(int64_t count, F f) {
  int64_t words = count / S::kLanes;
#pragma omp simd
  for (int64_t i = 0; i < words; ++i) f(Number<S::kLanes>{}, i * S::kLanes);
  if (S::kLanes > 1 && count % S::kLanes != 0) f(Number<1>{}, count - 1);
}

template <class T, int lanes>
FASTVAE_INLINE void add_to_columns(T* to, const Values<T, lanes>& values) {
#pragma GCC unroll 2
  for (int l = 0; l < lanes; ++l) to[l] += values.at[l];
}

// Loads the word at `from` of each row, where rows are `stride` elements apart. Every loop loads the words of all rows before it stores
// one. Otherwise the compiler, which cannot prove that input and output do not overlap, could not interleave the arithmetic of the rows.
template <class S, int rows, int lanes>
FASTVAE_INLINE void load_rows(const typename S::Stored* from, int64_t stride, Number<lanes> number,
                              Values<typename S::T, rows * lanes>& values) {
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) S::get(from + r * stride, number, values.at + r * lanes);
}

template <class S, int rows, int lanes>
FASTVAE_INLINE void store_rows(typename S::Stored* to, int64_t stride, Number<lanes> number,
                               const Values<typename S::T, rows * lanes>& values) {
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) S::put(to + r * stride, number, values.at + r * lanes);
}

template <class S, int rows>
void add_rows(const typename S::Stored* __restrict x, int64_t stride, int64_t count, typename S::T* __restrict sums) {
  for_each_word<S>(count, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
    Values<typename S::T, lanes.value> total{};
    Values<typename S::T, rows * lanes.value> values;
    load_rows<S, rows>(x + i, stride, lanes, values);
#pragma GCC unroll 8
    for (int j = 0; j < rows * lanes.value; ++j) total.at[j % lanes.value] += values.at[j];
    add_to_columns(sums + i, total);
  });
}

template <class S, int rows>
void add_moments(const typename S::Stored* __restrict x, int64_t stride, int64_t count, const typename S::T* __restrict shift,
                 typename S::T* __restrict sums, typename S::T* __restrict square_sums) {
  using T = typename S::T;
  for_each_word<S>(count, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
    Values<T, lanes.value> total{}, squares{};
    Values<T, lanes.value> k(shift + i);
    Values<typename S::T, rows * lanes.value> values;
    load_rows<S, rows>(x + i, stride, lanes, values);
#pragma GCC unroll 8
    for (int j = 0; j < rows * lanes.value; ++j) {
      int l = j % lanes.value;
      T d = values.at[j] - k.at[l];
      total.at[l] += d;
      squares.at[l] = fma(d, d, squares.at[l]);
    }
    add_to_columns(sums + i, total);
    add_to_columns(square_sums + i, squares);
  });
}

template <class S, class A, int rows>
void forward_rows(const typename S::Stored* __restrict x, typename S::Stored* __restrict y, int64_t stride, int64_t count,
                  const typename S::T* __restrict centre, const typename S::T* __restrict scale, const typename S::T* __restrict offset) {
  for_each_word<S>(count, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
    Values<typename S::T, lanes.value> c(centre + i), a(scale + i), b(offset + i);
    Values<typename S::T, rows * lanes.value> values;
    load_rows<S, rows>(x + i, stride, lanes, values);
#pragma GCC unroll 8
    for (int j = 0; j < rows * lanes.value; ++j) {
      int l = j % lanes.value;
      values.at[j] = A::value(affine(values.at[j], c.at[l], a.at[l], b.at[l]));
    }
    store_rows<S, rows>(y + i, stride, lanes, values);
  });
}

template <class S, class A, int rows>
void add_gradients(const typename S::Stored* __restrict x, const typename S::Stored* __restrict grad,
                   typename S::Stored* __restrict stored_du, int64_t stride, int64_t count, const typename S::T* __restrict centre,
                   const typename S::T* __restrict scale, const typename S::T* __restrict offset, typename S::T* __restrict sum_du,
                   typename S::T* __restrict sum_du_x) {
  using T = typename S::T;
  for_each_word<S>(count, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
    Values<T, lanes.value> total{}, product{};
    Values<typename S::T, lanes.value> c(centre + i), a(scale + i), b(offset + i);
    Values<T, rows * lanes.value> values, gradients;
    load_rows<S, rows>(x + i, stride, lanes, values);
    load_rows<S, rows>(grad + i, stride, lanes, gradients);
#pragma GCC unroll 8
    for (int j = 0; j < rows * lanes.value; ++j) {
      int l = j % lanes.value;
      T du = A::gradient(affine(values.at[j], c.at[l], a.at[l], b.at[l]), gradients.at[j]);
      gradients.at[j] = du;
      total.at[l] += du;
      product.at[l] = fma(du, values.at[j] - c.at[l], product.at[l]);
    }
    if (S::kKeepsGradient) store_rows<S, rows>(stored_du + i, stride, lanes, gradients);
    add_to_columns(sum_du + i, total);
    add_to_columns(sum_du_x + i, product);
  });
}

// Where the storage type keeps du, `out` holds it and `grad` is not read.
template <class S, class A, int rows>
void backward_rows(const typename S::Stored* __restrict x, const typename S::Stored* __restrict grad, typename S::Stored* out,
                   int64_t stride, int64_t count, const typename S::T* __restrict centre, const typename S::T* __restrict scale,
                   const typename S::T* __restrict offset, const typename S::T* __restrict slope,
                   const typename S::T* __restrict intercept) {
  using T = typename S::T;
  for_each_word<S>(count, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
    Values<typename S::T, lanes.value> c(centre + i), a(scale + i), b(offset + i);
    Values<T, lanes.value> s(slope + i), k(intercept + i);
    Values<T, rows * lanes.value> values, gradients;
    load_rows<S, rows>(x + i, stride, lanes, values);
    load_rows<S, rows>((S::kKeepsGradient ? out : grad) + i, stride, lanes, gradients);
#pragma GCC unroll 8
    for (int j = 0; j < rows * lanes.value; ++j) {
      int l = j % lanes.value;
      T value = values.at[j], g = gradients.at[j];
      T du = S::kKeepsGradient ? g : A::gradient(affine(value, c.at[l], a.at[l], b.at[l]), g);
      gradients.at[j] = gradient_of_input(value, du, c.at[l], a.at[l], s.at[l], k.at[l]);
    }
    store_rows<S, rows>(out + i, stride, lanes, gradients);
  });
}

}  // namespace
}  // namespace FASTVAE_ISA
}  // namespace fastvae
