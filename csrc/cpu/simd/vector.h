// The widest vectors of the instruction set, for the inner loop of the search for nearest codes. Plain loops do not serve there, because
// more is done with the scores than adding.
#pragma once

#include <cstdint>

#include "../../common/macros.h"
#include "intrinsics.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

#if defined(__AVX512F__)

// The instruction is in assembly, because GCC 12 widens a mask through the stack, where it stores 16 bits and loads 32.
FASTVAE_INLINE uint32_t bits_of(__mmask16 mask) {
  uint32_t bits;
  __asm__("kmovw %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
}

struct FloatVector {
  static constexpr int kLanes = 16;
  __m512 v;

  FASTVAE_INLINE FloatVector load(const float* from) { return {_mm512_loadu_ps(from)}; }
  FASTVAE_INLINE FloatVector broadcast(float value) { return {_mm512_set1_ps(value)}; }
  FASTVAE_INLINE void store(float* to, FloatVector a) { _mm512_storeu_ps(to, a.v); }
  FASTVAE_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  FASTVAE_INLINE FloatVector min(FloatVector a, FloatVector b) { return {_mm512_min_ps(a.v, b.v)}; }
  FASTVAE_INLINE FloatVector max(FloatVector a, FloatVector b) { return {_mm512_max_ps(a.v, b.v)}; }
  // `yes` where a < b, otherwise `no`.
  FASTVAE_INLINE FloatVector where_less(FloatVector a, FloatVector b, FloatVector yes, FloatVector no) {
    return {_mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), yes.v)};
  }
  FASTVAE_INLINE float smallest(FloatVector a) { return _mm512_reduce_min_ps(a.v); }
  FASTVAE_INLINE float sum(FloatVector a) { return _mm512_reduce_add_ps(a.v); }
  FASTVAE_INLINE uint32_t at_most(FloatVector a, FloatVector b) { return bits_of(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)); }
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
  FASTVAE_INLINE FloatVector max(FloatVector a, FloatVector b) { return {_mm256_max_ps(a.v, b.v)}; }
  FASTVAE_INLINE FloatVector where_less(FloatVector a, FloatVector b, FloatVector yes, FloatVector no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
  }
  FASTVAE_INLINE float smallest(FloatVector a) {
    __m128 half = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    half = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
  }
  FASTVAE_INLINE float sum(FloatVector a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  FASTVAE_INLINE uint32_t at_most(FloatVector a, FloatVector b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)));
  }
};

#else

// Every processor that GCC and clang compile for has vectors of 16 bytes, or they emulate them.
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
  FASTVAE_INLINE FloatVector max(FloatVector a, FloatVector b) { return {a.v > b.v ? a.v : b.v}; }
  FASTVAE_INLINE FloatVector where_less(FloatVector a, FloatVector b, FloatVector yes, FloatVector no) {
    return {a.v < b.v ? yes.v : no.v};
  }
  FASTVAE_INLINE float smallest(FloatVector a) {
    float smallest = a.v[0];
    for (int lane = 1; lane < kLanes; ++lane) smallest = a.v[lane] < smallest ? a.v[lane] : smallest;
    return smallest;
  }
  FASTVAE_INLINE float sum(FloatVector a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
  FASTVAE_INLINE uint32_t at_most(FloatVector a, FloatVector b) {
    uint32_t mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<uint32_t>(a.v[lane] <= b.v[lane]) << lane;
    return mask;
  }
};

#endif

#if defined(__AVX512VNNI__)

// Pairs of 16-bit integers, whose products are added to 32-bit sums. One instruction does twice the products of a float instruction.
struct PairVector {
  static constexpr int kLanes = 16;
  __m512i v;

  FASTVAE_INLINE PairVector load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
  FASTVAE_INLINE PairVector broadcast(int32_t value) { return {_mm512_set1_epi32(value)}; }
  FASTVAE_INLINE void store(int32_t* to, PairVector a) { _mm512_storeu_si512(to, a.v); }
  // The instruction is in assembly, because around the intrinsic GCC 12 copies each sum to the stack and back.
  FASTVAE_INLINE PairVector multiply_add(PairVector a, PairVector b, PairVector c) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(c.v) : "v"(a.v), "v"(b.v));
    return c;
  }
  FASTVAE_INLINE PairVector min(PairVector a, PairVector b) { return {_mm512_min_epi32(a.v, b.v)}; }
  FASTVAE_INLINE PairVector max(PairVector a, PairVector b) { return {_mm512_max_epi32(a.v, b.v)}; }
  FASTVAE_INLINE PairVector where_less(PairVector a, PairVector b, PairVector yes, PairVector no) {
    return {_mm512_mask_mov_epi32(no.v, _mm512_cmplt_epi32_mask(a.v, b.v), yes.v)};
  }
  FASTVAE_INLINE int32_t smallest(PairVector a) { return _mm512_reduce_min_epi32(a.v); }
  FASTVAE_INLINE uint32_t at_most(PairVector a, PairVector b) { return bits_of(_mm512_cmple_epi32_mask(a.v, b.v)); }
};

#endif

}  // namespace FASTVAE_ISA
}  // namespace fastvae
