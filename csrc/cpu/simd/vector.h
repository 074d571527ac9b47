// The widest vectors of the instruction set, for the one product that the compiler does not tile by itself.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../../common/macros.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

#if defined(__AVX512F__)

struct FloatVector {
  static constexpr int kLanes = 16;
  __m512 v;

  FASTVAE_INLINE FloatVector load(const float* from) { return {_mm512_loadu_ps(from)}; }
  FASTVAE_INLINE FloatVector broadcast(float value) { return {_mm512_set1_ps(value)}; }
  FASTVAE_INLINE void store(float* to, FloatVector a) { _mm512_storeu_ps(to, a.v); }
  FASTVAE_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  FASTVAE_INLINE FloatVector min(FloatVector a, FloatVector b) { return {_mm512_min_ps(a.v, b.v)}; }
  FASTVAE_INLINE uint32_t at_most(FloatVector a, FloatVector b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
};

#elif defined(__AVX2__)

struct FloatVector {
  static constexpr int kLanes = 8;
  __m256 v;

  FASTVAE_INLINE FloatVector load(const float* from) { return {_mm256_loadu_ps(from)}; }
  FASTVAE_INLINE FloatVector broadcast(float value) { return {_mm256_set1_ps(value)}; }
  FASTVAE_INLINE void store(float* to, FloatVector a) { _mm256_storeu_ps(to, a.v); }
  FASTVAE_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  FASTVAE_INLINE FloatVector min(FloatVector a, FloatVector b) { return {_mm256_min_ps(a.v, b.v)}; }
  FASTVAE_INLINE uint32_t at_most(FloatVector a, FloatVector b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)));
  }
};

#else

// Every processor that gcc and clang know has vectors of 16 bytes.
struct FloatVector {
  static constexpr int kLanes = 4;
  typedef float Lanes __attribute__((vector_size(16)));
  Lanes v;

  FASTVAE_INLINE FloatVector load(const float* from) {
    FloatVector a;
    __builtin_memcpy(&a.v, from, sizeof a.v);
    return a;
  }
  FASTVAE_INLINE FloatVector broadcast(float value) { return {Lanes{value, value, value, value}}; }
  FASTVAE_INLINE void store(float* to, FloatVector a) { __builtin_memcpy(to, &a.v, sizeof a.v); }
  FASTVAE_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) { return {a.v * b.v + c.v}; }
  FASTVAE_INLINE FloatVector min(FloatVector a, FloatVector b) { return {a.v < b.v ? a.v : b.v}; }
  FASTVAE_INLINE uint32_t at_most(FloatVector a, FloatVector b) {
    uint32_t mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<uint32_t>(a.v[lane] <= b.v[lane]) << lane;
    return mask;
  }
};

#endif

#if defined(__AVX512VNNI__)

// Pairs of 16-bit integers, whose products are added to 32-bit sums: twice the products of a float instruction.
struct PairVector {
  static constexpr int kLanes = 16;
  __m512i v;

  FASTVAE_INLINE PairVector load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
  FASTVAE_INLINE PairVector broadcast(int32_t value) { return {_mm512_set1_epi32(value)}; }
  FASTVAE_INLINE void store(int32_t* to, PairVector a) { _mm512_storeu_si512(to, a.v); }
  FASTVAE_INLINE PairVector multiply_add(PairVector a, PairVector b, PairVector c) { return {_mm512_dpwssd_epi32(c.v, a.v, b.v)}; }
  FASTVAE_INLINE PairVector min(PairVector a, PairVector b) { return {_mm512_min_epi32(a.v, b.v)}; }
  FASTVAE_INLINE uint32_t at_most(PairVector a, PairVector b) { return _mm512_cmple_epi32_mask(a.v, b.v); }
};

#endif

}  // namespace FASTVAE_ISA
}  // namespace fastvae
