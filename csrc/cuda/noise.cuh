// The package's noise on a GPU: a warp takes a noise tile, and each of its threads four lanes, whose counters give an element in each of
// the tile's four streams.
#pragma once

#include "partition.h"

namespace fastvae {

struct NoiseKey {
  uint32_t low, high;
};

__device__ __forceinline__ NoiseKey noise_key(const int64_t* seed) {
  uint64_t key = static_cast<uint64_t>(*seed);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// The four normals of a lane of a tile, one a stream.
FASTVAE_INLINE void normals_of_lane(const NoiseKey& key, int64_t tile, int lane, float (&out)[kRuns]) {
  uint64_t counter = static_cast<uint64_t>(tile) * kNoiseLanes + static_cast<uint32_t>(lane);
  PhiloxWords words = philox4x32(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0, key.low, key.high);
  box_muller(words.w[0], words.w[1], out[0], out[1]);
  box_muller(words.w[2], words.w[3], out[2], out[3]);
}

// Normals number first + lane + 128 j for any `first`. They are of one lane of the tile that `first` lies in and of the same lane of the
// next tile, so two counters suffice; where `first` begins a tile, one.
FASTVAE_INLINE void normals_from(const NoiseKey& key, int64_t first, int lane, float (&out)[kRuns]) {
  int64_t tile = first / kNoiseTile;
  int place = static_cast<int>(first % kNoiseTile) + lane;
  int turn = place / kNoiseLanes;  // the stream, from 0 to 4, of the first of the four
  float here[kRuns], there[kRuns] = {0.0f, 0.0f, 0.0f, 0.0f};
  normals_of_lane(key, tile, place % kNoiseLanes, here);
  if (turn > 0) normals_of_lane(key, tile + 1, place % kNoiseLanes, there);
  for (int j = 0; j < kRuns; ++j) {
    float value = here[j];
    for (int shift = 1; shift <= kRuns; ++shift) {
      float candidate = j + shift < kRuns ? here[(j + shift) % kRuns] : there[(j + shift) % kRuns];
      value = turn == shift ? candidate : value;
    }
    out[j] = value;
  }
}

}  // namespace fastvae
