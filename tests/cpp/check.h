// What the tests of the kernels share. No torch and no Python here, so that any compiler and sanitizer can run them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "../../csrc/common/norm_activation.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/partition.h"
#include "../../csrc/cpu/view.h"

namespace fastvae::testing {

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();

// Counts what does not hold, and prints the first few.
inline int failures = 0;

inline void fail(std::string_view what, std::string_view part, const std::string& values = "") {
  if (++failures > 20) return;
  std::string text = std::string(kIsaNames[static_cast<int>(isa_in_use())]) + ": " + std::string(what) + std::string(part) + values;
  std::printf("%s\n", text.c_str());
}

inline void expect(bool holds, std::string_view what, std::string_view part = "") {
  if (!holds) fail(what, part);
}

// Calls f(begin, end) for parts of a range on several threads, which start at the same time.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  constexpr int64_t kThreads = 3;
  int64_t part = std::max(ceil_div(end - begin, kThreads), grain);
  if (end - begin <= part) return end > begin ? f(begin, end) : void();
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += part)
    threads.emplace_back([&f, first, part, end] { f(first, std::min(first + part, end)); });
  for (std::thread& thread : threads) thread.join();
}

inline const auto on_threads = [](int64_t begin, int64_t end, int64_t grain, const auto& f) { parallel_for(begin, end, grain, f); };

// What numbers a test draws.
enum class Kind { usual, tiny, huge, extreme };
constexpr Kind kKinds[] = {Kind::usual, Kind::tiny, Kind::huge, Kind::extreme};

class Source {
 public:
  explicit Source(uint64_t seed) : engine_(seed) {}

  double normal() { return distribution_(engine_); }
  uint64_t below(uint64_t count) { return engine_() % count; }

  // Tiny numbers are denormal in float32, huge ones have products beyond it, and extreme ones are at the ends of all.
  double of(Kind kind) {
    constexpr double extremes[] = {0.0,  -0.0,      1e-45,      -1e-40, 1.17549435e-38, 3.4028234e38, -3.4028234e38,
                                   1e-5, kInfinity, -kInfinity, kNaN};
    if (kind == Kind::tiny) return 1e-42 * normal();
    if (kind == Kind::huge) return 1e37 * normal();
    return kind == Kind::extreme && below(4) == 0 ? extremes[below(std::size(extremes))] : normal();
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> distribution_;
};

inline int64_t size_of(DType dtype) {
  if (dtype == DType::float64) return 8;
  if (dtype == DType::float32) return 4;
  return dtype == DType::uint8 || dtype == DType::boolean ? 1 : 2;
}

// Half a unit in the last place of 1.
inline double precision_of(DType dtype) {
  if (dtype == DType::float64) return 0x1p-53;
  if (dtype == DType::float32) return 0x1p-24;
  return dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
}

inline uint16_t bfloat16_of(double value) {
  float single = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &single, sizeof bits);
  if (single != single) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline double bfloat16_value(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float single;
  memcpy(&single, &bits, sizeof bits);
  return single;
}

inline uint16_t float16_of(double value) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  double size = std::fabs(value);
  if (size != size) return 0x7e00;
  if (size >= 65520.0) return sign | 0x7c00;
  int exponent = size > 0.0 ? std::max(std::ilogb(size), -14) : -14;
  // 1024 steps a power of two; the last one carries into the exponent.
  auto steps = static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps));
}

inline double float16_value(uint16_t half) {
  double sign = half & 0x8000 ? -1.0 : 1.0;
  int exponent = (half >> 10) & 31, steps = half & 1023;
  if (exponent == 31) return steps ? kNaN : sign * kInfinity;
  return sign * (exponent ? std::ldexp(1024 + steps, exponent - 25) : std::ldexp(steps, -24));
}

// Elements of a dtype in memory of exactly their size, which an address sanitizer guards on both sides.
class Array {
 public:
  DType dtype;
  int64_t count;

  Array(DType dtype, int64_t count) : dtype(dtype), count(count), data_(new char[static_cast<size_t>(count * size_of(dtype))]) {
    // NaN in every floating dtype: an element that nobody wrote shows.
    memset(data_.get(), 0xff, static_cast<size_t>(count * size_of(dtype)));
  }

  Array(DType dtype, int64_t count, Source& source, Kind kind = Kind::usual) : Array(dtype, count) {
    for (int64_t i = 0; i < count; ++i) set(i, source.of(kind));
  }

  char* data() { return data_.get(); }
  const char* data() const { return data_.get(); }

  double get(int64_t i) const {
    const char* from = data_.get() + i * size_of(dtype);
    if (dtype == DType::float64) return read<double>(from);
    if (dtype == DType::float32) return read<float>(from);
    if (dtype == DType::bfloat16) return bfloat16_value(read<uint16_t>(from));
    return dtype == DType::float16 ? float16_value(read<uint16_t>(from)) : read<uint8_t>(from);
  }

  void set(int64_t i, double value) {
    char* to = data_.get() + i * size_of(dtype);
    if (dtype == DType::float64) return write(to, value);
    if (dtype == DType::float32) return write(to, static_cast<float>(value));
    if (dtype == DType::bfloat16) return write(to, bfloat16_of(value));
    dtype == DType::float16 ? write(to, float16_of(value)) : write(to, static_cast<uint8_t>(std::fmin(std::fmax(value, 0.0), 255.0)));
  }

  View view() const {
    View view;
    view.data = data();
    view.dtype = dtype;
    view.inner = count > 0 ? count : 1;
    return view;
  }
  Output output() { return {data(), dtype}; }

 private:
  template <class T>
  static T read(const char* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  template <class T>
  static void write(char* to, T value) {
    memcpy(to, &value, sizeof value);
  }

  std::unique_ptr<char[]> data_;
};

inline DType accumulation_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// `actual`, which was rounded to `dtype`, is `expected` up to some units of the accumulation's last place of `magnitude`, the largest of
// the numbers that it was computed from.
inline void expect_near(double actual, double expected, DType dtype, double magnitude, std::string_view what, std::string_view part = "") {
  double bound = precision_of(dtype) * 1.01 * std::fabs(expected) + 64.0 * precision_of(accumulation_dtype(dtype)) * magnitude;
  // The smallest steps of the dtype, and of the formulas that have no denormal results.
  bound += dtype == DType::float64 ? 1e-300 : dtype == DType::float16 ? 0x1p-24 : 1e-36;
  if (std::fabs(actual - expected) <= bound) return;
  fail(what, part, ": got " + std::to_string(actual) + ", takes " + std::to_string(expected) + " +- " + std::to_string(bound));
}

inline std::string name(const std::string& what, std::initializer_list<int64_t> numbers) {
  std::string text = what;
  for (int64_t number : numbers) text += " " + std::to_string(number);
  return text;
}

inline double sigmoid(double u) { return u < 0.0 ? std::exp(u) / (1.0 + std::exp(u)) : 1.0 / (1.0 + std::exp(-u)); }
inline double silu(double u) { return u * sigmoid(u); }
inline double silu_slope(double u) { return sigmoid(u) * (1.0 + u * sigmoid(-u)); }

constexpr NormActivation kNormActivations[] = {NormActivation::none, NormActivation::silu, NormActivation::relu, NormActivation::gelu};

inline double normal_distribution(double u) { return 0.5 * std::erfc(-u * std::sqrt(0.5)); }

inline double activated(NormActivation activation, double u) {
  switch (activation) {
    case NormActivation::none:
      return u;
    case NormActivation::silu:
      return silu(u);
    case NormActivation::relu:
      return u <= 0.0 ? 0.0 : u;
    case NormActivation::gelu:
      return u * normal_distribution(u);
  }
  return kNaN;
}

inline double activation_slope(NormActivation activation, double u) {
  switch (activation) {
    case NormActivation::none:
      return 1.0;
    case NormActivation::silu:
      return silu_slope(u);
    case NormActivation::relu:
      return u <= 0.0 ? 0.0 : 1.0;
    case NormActivation::gelu:
      return normal_distribution(u) + u * std::exp(-0.5 * u * u) * 0.3989422804014327;
  }
  return kNaN;
}

// The size of the terms of a gradient act'(u) * g. Where rounding decides on which side of 0 u is, ReLU gives g or 0.
inline double gradient_size(NormActivation activation, DType dtype, double u, double u_size, double g) {
  bool at_kink = activation == NormActivation::relu && std::fabs(u) < 64.0 * precision_of(accumulation_dtype(dtype)) * u_size;
  return std::fabs(g) * (at_kink ? 1.0 / precision_of(accumulation_dtype(dtype)) : 1.0 + u_size);
}

// bfloat16 results come from coarser functions: see NormSilu and NormGelu.
inline double coarse(DType dtype, double size) { return dtype == DType::bfloat16 ? size * 100.0 : size; }

constexpr DType kFloats[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

// One a family; each runs the kernels of the instruction set in use.
void test_codebook();
void test_jacobian();
void test_group_norm();
void test_latent();
void test_logistic_mixture();
void test_reconstruction();
void test_rms_norm();
void test_snake();

}  // namespace fastvae::testing
