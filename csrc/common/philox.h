// The noise of the package: Philox4x32-10 (Salmon et al. 2011) and Box-Muller. docs/randomness.md says which counter gives which normal.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

constexpr int kNoiseTile = 512;   // normals of a noise tile
constexpr int kNoiseLanes = 128;  // counters of a noise tile; each gives four normals, one in each stream, whose numbers are 128 apart

struct PhiloxWords {
  uint32_t w[4];
};

// The random words of the counter (c0, c1, c2, c3) and the key (k0, k1).
FASTVAE_INLINE PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  FASTVAE_UNROLL(10)
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    uint32_t high0 = static_cast<uint32_t>(p0 >> 32), low0 = static_cast<uint32_t>(p0);
    uint32_t high1 = static_cast<uint32_t>(p1 >> 32), low1 = static_cast<uint32_t>(p1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Two normals from two words (Box and Muller 1958). u lies in (0, 1], so that its logarithm is finite.
FASTVAE_INLINE void box_muller(uint32_t even, uint32_t odd, float& first, float& second) {
  float u = static_cast<float>(even) * 0x1p-32f + 0x1p-33f;
  float radius = sqrt(-2.0f * log_normal(u));
  float sine, cosine;
  sincos_turn(odd, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
