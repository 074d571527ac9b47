// The storage types of the normalisation kernels: how elements of each dtype are read from memory and written to it, a word at a time.
#pragma once

#include "../../common/norm_activation.h"
#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// A number that is known at compile time, as the type of a function argument.
template <int number>
struct Number {
  static constexpr int value = number;
};

// The values that one iteration of a loop handles: those of a word, or of the words of several rows. No function takes or
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
//   kKeepsGradient     whether memory holds a gradient as the arithmetic has it, so that one pass can leave it there for the next
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
  // 65536 is a tie. A NaN needs no test. Its lower 16 bits are 0, because those of a NaN in the tensors are, and narrowed() sees
  // to those of the parameters, so that the addition cannot carry into the sign.
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

// Calls f(Number<lanes>{}, column) for the words of a row of elements, and for the last element where the number of elements is odd.
template <class S, class F>
FASTVAE_INLINE void for_each_word(int64_t count, F f) {
  int64_t words = count / S::kLanes;
#pragma omp simd
  for (int64_t i = 0; i < words; ++i) f(Number<S::kLanes>{}, i * S::kLanes);
  if (S::kLanes > 1 && count % S::kLanes != 0) f(Number<1>{}, count - 1);
}

// Converts to T. A NaN loses its payload, because BFloat16::rounded() relies on that.
template <class T>
FASTVAE_INLINE T narrowed(double value) {
  return value == value ? static_cast<T>(value) : T(NAN);
}

// The weight or the bias and its gradient, which the operators handle in double.
void parameter_to_double(const View& view, int64_t count, double* to) { convert(view.data, view.dtype, 0, count, to); }

void parameter_from_double(const double* from, int64_t count, const Output& to) {
  to.dtype == DType::float64 ? write(to, 0, count, from) : store(to, 0, count, from);
}

// Calls f with the storage type of a dtype.
template <class F>
void with_storage_of(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(Native<float>{});
    case DType::float64:
      return f(Native<double>{});
    case DType::bfloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

}  // namespace
}  // namespace FASTVAE_ISA
}  // namespace fastvae
