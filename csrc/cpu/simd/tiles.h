// The loop over the tiles of a partition, and the sums of its rows, for the kernels of all families.
#pragma once

#include "../partition.h"
#include "storage.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

constexpr const char* kIsaName = FASTVAE_STRING(FASTVAE_ISA);

// Calls f(item, begin, count) for each piece of an item between multiples of kTile, so that a piece lies in one noise tile of the first
// sample.
template <class F>
static void for_each_tile(const Partition& partition, int64_t begin_item, int64_t end_item, F f) {
  for (int64_t item = begin_item; item < end_item; ++item) {
    int64_t begin = partition.begin(item), end = partition.end(item);
    while (begin < end) {
      int64_t boundary = (begin / kTile + 1) * kTile;
      int64_t count = (boundary < end ? boundary : end) - begin;
      f(item, begin, count);
      begin += count;
    }
  }
}

// Adds the values of elements [begin, begin + count) to the slots of their rows.
template <class T>
static void accumulate(const Partition& partition, int64_t item, int64_t begin, int64_t count, const T* values, double* sums) {
  if (partition.slots_per_row > 1 || partition.rows == 1) {
    sums[partition.slots_per_row > 1 ? item : 0] += sum_run(values, count);
    return;
  }
  for (int64_t done = 0; done < count;) {
    int64_t row = (begin + done) / partition.inner;
    int64_t row_end = (row + 1) * partition.inner - begin;
    int64_t run = (row_end < count ? row_end : count) - done;
    sums[row] += sum_run(values + done, run);
    done += run;
  }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
