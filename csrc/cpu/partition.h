// How elements are shared among threads and summed: by sizes alone, so that results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace fastvae {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kItemElements = 16384;  // about 10 us of work; a multiple of the kernels' tile

// (rows, inner) elements in row-major order, cut into items of about kItemElements: a piece of one row, or several whole rows. Item i
// sums each of its rows into a slot of its own; a row's slots are adjacent, slots_per_row of them.
struct Partition {
  int64_t rows, inner;
  int64_t slots_per_row, rows_per_item;

  Partition(int64_t rows, int64_t inner) : rows(rows), inner(inner) {
    slots_per_row = inner > kItemElements ? (inner + kItemElements - 1) / kItemElements : 1;
    rows_per_item = inner > 0 && inner < kItemElements ? kItemElements / inner : 1;
  }

  int64_t items() const {
    if (rows == 0 || inner == 0) return 0;
    return slots_per_row > 1 ? rows * slots_per_row : (rows + rows_per_item - 1) / rows_per_item;
  }
  int64_t slots() const { return rows * slots_per_row; }

  int64_t begin(int64_t item) const {
    return slots_per_row > 1 ? (item / slots_per_row) * inner + (item % slots_per_row) * kItemElements : item * rows_per_item * inner;
  }
  int64_t end(int64_t item) const {
    int64_t row_end = slots_per_row > 1 ? (item / slots_per_row + 1) * inner : rows * inner;
    int64_t item_end = begin(item) + (slots_per_row > 1 ? kItemElements : rows_per_item * inner);
    return item_end < row_end ? item_end : row_end;
  }
  int64_t slot(int64_t item, int64_t element) const { return slots_per_row > 1 ? item : element / inner; }
};

}  // namespace fastvae
