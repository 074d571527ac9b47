// The package's noise on a GPU, see docs/randomness.md. A warp draws one noise tile of 512 normals: each of its 32 threads takes four of
// the 128 lanes, and the Philox counter of a lane gives one normal in each of the four streams of the tile.
#pragma once

#include "partition.h"

namespace fastvae {

// The two halves of the seed.
struct NoiseKey {
  uint32_t low, high;
};

// `seed` is a scalar int64 tensor on the device.
__device__ __forceinline__ NoiseKey noise_key(const int64_t* seed) {
  uint64_t key = static_cast<uint64_t>(*seed);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// Draws the four normals of a lane of a tile, one for each stream.
FASTVAE_INLINE void normals_of_lane(const NoiseKey& key, int64_t tile, int lane, float (&out)[kRuns]) {
  uint64_t counter = static_cast<uint64_t>(tile) * kNoiseLanes + static_cast<uint32_t>(lane);
  PhiloxWords words = philox4x32(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0, key.low, key.high);
  box_muller(words.w[0], words.w[1], out[0], out[1]);
  box_muller(words.w[2], words.w[3], out[2], out[3]);
}

// Draws the normals number first + lane + 128 j for j = 0 to 3. They belong to one lane of the tile that contains number `first` and to the
// same lane of the next tile, so that two counters suffice. One suffices where number first + lane lies in stream 0.
FASTVAE_INLINE void normals_from(const NoiseKey& key, int64_t first, int lane, float (&out)[kRuns]) {
  int64_t tile = first / kNoiseTile;
  int place = static_cast<int>(first % kNoiseTile) + lane;
  int stream = place / kNoiseLanes;  // 0 to 4: the stream of the normal for j = 0, where 4 is stream 0 of the next tile
  float here[kRuns], there[kRuns] = {0.0f, 0.0f, 0.0f, 0.0f};
  normals_of_lane(key, tile, place % kNoiseLanes, here);
  if (stream > 0) normals_of_lane(key, tile + 1, place % kNoiseLanes, there);
  for (int j = 0; j < kRuns; ++j) {
    // This loop selects element j + stream of (here, there). An index that is known at run time alone would put the arrays into memory.
    float value = here[j];
    for (int shift = 1; shift <= kRuns; ++shift) {
      float candidate = j + shift < kRuns ? here[(j + shift) % kRuns] : there[(j + shift) % kRuns];
      value = stream == shift ? candidate : value;
    }
    out[j] = value;
  }
}

}  // namespace fastvae
