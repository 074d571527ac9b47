// What the partitions of group norm and RMS norm share: the limits of a block that keeps its elements in shared memory, and the number of
// vectors that it keeps.
#pragma once

#include "partition.h"

namespace fastvae {

// Two blocks of 512 threads with 64 registers fill the register file of a multiprocessor: while one waits for memory, the other computes.
constexpr int kMaxNormThreads = 512, kNormBlocks = 2;
// Elements for each thread of a block, up to kMaxNormThreads threads: eight vectors.
constexpr int64_t kNormThreadElements = 32;
// Memory delivers sectors of 32 bytes. A block that reads fewer adjacent bytes would waste the rest of each sector.
constexpr int64_t kSectorBytes = 32;

// The smallest power of two that is not below n.
FASTVAE_INLINE int next_power_of_two(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// The vectors of each of `threads` threads that a block keeps in `shared_bytes` of shared memory, where each takes `vector_bytes` and a
// thread has `vectors`: whole steps of `runs` vectors.
inline int kept_vectors(int64_t vectors, int threads, int runs, int64_t vector_bytes, int64_t shared_bytes) {
  return static_cast<int>(min64(ceil_div(vectors, runs), shared_bytes / (runs * threads * vector_bytes))) * runs;
}

}  // namespace fastvae
