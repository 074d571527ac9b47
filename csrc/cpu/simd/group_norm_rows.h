// The loops of the group norm kernels over one to four rows of a piece; columns_of() in ../group_norm_kernels.h says what rows and columns
// are. Each loop treats column i of all rows together: the parameters of a column are loaded once, and the sum over
// the rows is added once to the sum of the column in memory.
//
//   add_rows         sums of x
//   add_moments      sums of x - shift and of its square
//   forward_rows     y = act((x - centre) * scale + offset)
//   add_gradients    sums of du and of du * (x - centre); stores du where the storage type keeps it
//   backward_rows    grad_input
//
// Parameters and sums are arrays of one value for each column. A loop that is told to restore also stores y, in the memory of the gradient
// or elsewhere: the last loop that computes the activation, to the accuracy of a stored result.
#pragma once

#include "../group_norm_kernels.h"
#include "words.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

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

template <class S, class A, bool restores, int rows>
void add_gradients(const typename S::Stored* __restrict x, const typename S::Stored* grad, typename S::Stored* __restrict stored_du,
                   typename S::Stored* restored, int64_t stride, int64_t count, const typename S::T* __restrict centre,
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
      T u = affine(values.at[j], c.at[l], a.at[l], b.at[l]), du = A::gradient(u, gradients.at[j]);
      gradients.at[j] = du;
      total.at[l] += du;
      product.at[l] = fma(du, values.at[j] - c.at[l], product.at[l]);
      if (restores) values.at[j] = A::value(u);
    }
    if (S::kKeepsGradient) store_rows<S, rows>(stored_du + i, stride, lanes, gradients);
    if (restores) store_rows<S, rows>(restored + i, stride, lanes, values);
    add_to_columns(sum_du + i, total);
    add_to_columns(sum_du_x + i, product);
  });
}

// Where the storage type keeps du, `out` holds it and `grad` is not read.
template <class S, class A, bool restores, int rows>
void backward_rows(const typename S::Stored* __restrict x, const typename S::Stored* grad, typename S::Stored* out,
                   typename S::Stored* restored, int64_t stride, int64_t count, const typename S::T* __restrict centre,
                   const typename S::T* __restrict scale, const typename S::T* __restrict offset, const typename S::T* __restrict slope,
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
      T value = values.at[j], g = gradients.at[j], u = affine(value, c.at[l], a.at[l], b.at[l]);
      T du = S::kKeepsGradient ? g : A::gradient(u, g);
      gradients.at[j] = gradient_of_input(value, du, c.at[l], a.at[l], s.at[l], k.at[l]);
      if (restores) values.at[j] = A::value(u);
    }
    store_rows<S, rows>(out + i, stride, lanes, gradients);
    if (restores) store_rows<S, rows>(restored + i, stride, lanes, values);
  });
}

}  // namespace
}  // namespace FASTVAE_ISA
}  // namespace fastvae
