// Conversions between storage and arithmetic. A kernel works on tiles of T, which is double for float64 tensors and float otherwise,
// whatever the tensors hold.
#pragma once

#include "../../common/math.h"
#include "../view.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

// Elements that a kernel handles at a time. A tile of float takes 2 KiB, so that the operands and results of a kernel fit the L1 cache.
constexpr int kTile = 512;

FASTVAE_INLINE float bfloat16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

// Rounds to nearest even. A NaN becomes the canonical one, because rounding its bits could make it infinite.
FASTVAE_INLINE uint16_t float_to_bfloat16(float value) {
  uint32_t bits = float_to_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

FASTVAE_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  // 112 is the difference of the exponent biases, 127 - 15. A denormal half becomes a normal float by the subtraction of an implicit
  // leading bit; the exponent of infinities and NaN is raised a second time, to 255.
  float normal = bits_to_float((magnitude << 13) + (112u << 23));
  float denormal = bits_to_float((113u << 23) | (magnitude << 13)) - bits_to_float(113u << 23);
  float special = bits_to_float((magnitude << 13) + (224u << 23));
  float value = magnitude < 0x0400u ? denormal : (magnitude >= 0x7c00u ? special : normal);
  return bits_to_float(float_to_bits(value) | sign);
}

FASTVAE_INLINE uint16_t float_to_half(float value) {
  uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Rounds to nearest even. The step of a normal result follows from its exponent. The step of a denormal one is 2^-24, to which the
  // addition of 0.5 = (126 << 23), whose ulp that is, rounds. From 0x477ff000 = 65520 on the result is infinite; beyond 0x7f800000 = inf
  // the value is NaN.
  uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t denormal = float_to_bits(bits_to_float(magnitude) + bits_to_float(126u << 23)) - (126u << 23);
  uint32_t half = magnitude < (113u << 23) ? denormal : (magnitude >= 0x477ff000u ? 0x7c00u : normal);
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | sign);
}

template <class T, class From>
FASTVAE_INLINE void convert_run(const From* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

// Converts elements [offset, offset + count) to T. A uint8 pixel stands for a value in [0, 1].
template <class T>
static void convert(const void* data, DType dtype, int64_t offset, int64_t count, T* __restrict to) {
  const uint16_t* half = static_cast<const uint16_t*>(data) + offset;
  const uint8_t* byte = static_cast<const uint8_t*>(data) + offset;
  switch (dtype) {
    case DType::float32:
      return convert_run(static_cast<const float*>(data) + offset, count, to);
    case DType::float64:
      return convert_run(static_cast<const double*>(data) + offset, count, to);
    case DType::bfloat16:
      for (int64_t i = 0; i < count; ++i) to[i] = bfloat16_to_float(half[i]);
      return;
    case DType::float16:
      for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(half[i]);
      return;
    case DType::uint8:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(byte[i]) * (T(1) / T(255));
      return;
    case DType::boolean:
      return convert_run(byte, count, to);
  }
}

// The dtype of tensors that need no conversion.
template <class T>
constexpr DType native_dtype() {
  return sizeof(T) == sizeof(double) ? DType::float64 : DType::float32;
}

// Elements [begin, begin + count) of a view as T: in place where they are contiguous and of that dtype, otherwise copied into the buffer.
template <class T>
static const T* load(const View& view, int64_t begin, int64_t count, T* buffer) {
  int64_t done = 0;
  while (done < count) {
    int64_t row = (begin + done) / view.inner, column = (begin + done) - row * view.inner;
    int64_t run = view.inner - column < count - done ? view.inner - column : count - done;
    int64_t offset = (row % view.period) * view.outer_stride + column * view.inner_stride;
    if (view.inner_stride == 0) {
      T value{};
      convert(view.data, view.dtype, offset, 1, &value);
      for (int64_t i = 0; i < run; ++i) buffer[done + i] = value;
    } else if (run == count && view.dtype == native_dtype<T>()) {
      return static_cast<const T*>(view.data) + offset;
    } else {
      convert(view.data, view.dtype, offset, run, buffer + done);
    }
    done += run;
  }
  return buffer;
}

// The address at which a kernel writes the elements from `begin` on: that of the output where it holds T, otherwise the buffer, which
// store() then converts.
template <class T>
static T* destination(const Output& output, int64_t begin, T* buffer) {
  return output.dtype == native_dtype<T>() ? static_cast<T*>(output.data) + begin : buffer;
}

// Converts what destination() had put into a buffer. It does nothing where the kernel wrote to the output itself.
template <class T>
static void store(const Output& output, int64_t begin, int64_t count, const T* from) {
  uint16_t* half = static_cast<uint16_t*>(output.data) + begin;
  switch (output.dtype) {
    case DType::bfloat16:
      for (int64_t i = 0; i < count; ++i) half[i] = float_to_bfloat16(static_cast<float>(from[i]));
      return;
    case DType::float16:
      for (int64_t i = 0; i < count; ++i) half[i] = float_to_half(static_cast<float>(from[i]));
      return;
    case DType::float32:
      if (native_dtype<T>() != DType::float32) convert_run(from, count, static_cast<float*>(output.data) + begin);
      return;
    case DType::float64:
      if (native_dtype<T>() != DType::float64) convert_run(from, count, static_cast<double*>(output.data) + begin);
      return;
    default:
      return;
  }
}

// Asks the processor to load the cache lines of `to` for writing.
template <class T>
FASTVAE_INLINE void prefetch_to_write(const T* to, int64_t count) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kCacheLine) __builtin_prefetch(to + i, 1);
}

// Copies values to the output, converted to its dtype.
template <class T>
static void write(const Output& output, int64_t begin, int64_t count, const T* values) {
  if (output.dtype == native_dtype<T>())
    memcpy(static_cast<T*>(output.data) + begin, values, static_cast<size_t>(count) * sizeof(T));
  else
    store(output, begin, count, values);
}

// float32 adds up at most so many elements before double takes the sum, so that accuracy does not depend on how many partial sums the
// compiler's vectors keep.
constexpr int64_t kSumRun = 128;

// The sum over the elements of a tile; sum_of(begin, end) returns that of a piece. Whole pieces are apart, so that the compiler knows
// their length.
template <class F>
FASTVAE_INLINE double sum_pieces(int64_t count, F sum_of) {
  double total = 0.0;
  int64_t begin = 0;
  for (; begin + kSumRun <= count; begin += kSumRun) total += static_cast<double>(sum_of(begin, begin + kSumRun));
  if (begin < count) total += static_cast<double>(sum_of(begin, count));
  return total;
}

template <class T>
FASTVAE_INLINE T sum_piece(const T* values, int64_t begin, int64_t end) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = begin; i < end; ++i) total += values[i];
  return total;
}

template <class T>
static double sum_run(const T* values, int64_t count) {
  return sum_pieces(count, [values](int64_t begin, int64_t end) { return sum_piece(values, begin, end); });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
