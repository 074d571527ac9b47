// Between storage and arithmetic: a kernel works on tiles of float (double for float64 tensors), whatever the tensors hold.
#pragma once

#include "../../common/math.h"
#include "../view.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

constexpr int kTile = 512;  // elements a kernel handles at once: its operands fit the L1 cache

FASTVAE_INLINE float bfloat16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

FASTVAE_INLINE uint16_t float_to_bfloat16(float value) {
  uint32_t bits = float_to_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

FASTVAE_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  // Denormals become normal by a subtraction, infinities and NaN by a second step of the exponent.
  float normal = bits_to_float((magnitude << 13) + (112u << 23));
  float denormal = bits_to_float((113u << 23) | (magnitude << 13)) - bits_to_float(113u << 23);
  float special = bits_to_float((magnitude << 13) + (224u << 23));
  float value = magnitude < 0x0400u ? denormal : (magnitude >= 0x7c00u ? special : normal);
  return bits_to_float(float_to_bits(value) | sign);
}

FASTVAE_INLINE uint16_t float_to_half(float value) {
  uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Round to nearest even, in the exponent's step for normal results and in fixed steps of 2^-24 for denormal ones.
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

template <class T>
constexpr DType native_dtype() {
  return sizeof(T) == sizeof(double) ? DType::float64 : DType::float32;
}

// Elements [begin, begin + count) as T, in place where they lie so in memory, else in the buffer.
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

// Where a kernel writes elements [begin, ...): the output itself, or the buffer that store() then converts.
template <class T>
static T* destination(const Output& output, int64_t begin, T* buffer) {
  return output.dtype == native_dtype<T>() ? static_cast<T*>(output.data) + begin : buffer;
}

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

template <class T>
FASTVAE_INLINE void prefetch_to_write(const T* to, int64_t count) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kCacheLine) __builtin_prefetch(to + i, 1);
}

// Copies values to the output.
template <class T>
static void write(const Output& output, int64_t begin, int64_t count, const T* values) {
  if (output.dtype == native_dtype<T>())
    memcpy(static_cast<T*>(output.data) + begin, values, static_cast<size_t>(count) * sizeof(T));
  else
    store(output, begin, count, values);
}

template <class T>
FASTVAE_INLINE T sum_run(const T* values, int64_t count) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
