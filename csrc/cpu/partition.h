// The partition of elements among threads and the order of their partial sums. Both depend on sizes alone, so that results do not depend on
// the number of threads.
#pragma once

#include "../common/integers.h"

namespace fastvae {

constexpr int64_t kItemElements = 16384;  // about 10 us of work; a multiple of kTile, the elements that a kernel handles at a time

// The partition of (rows, inner) elements in row-major order into items of about item_elements, each a piece of one long row or several
// short rows. An item, which is what one thread takes at a time, adds each of its rows to a slot that no other item writes. The slots of a
// row, slots_per_row of them, are adjacent.
struct Partition {
  int64_t rows, inner, item_elements;
  int64_t slots_per_row, rows_per_item;

  Partition(int64_t rows, int64_t inner, int64_t item_elements = kItemElements) : rows(rows), inner(inner), item_elements(item_elements) {
    slots_per_row = inner > item_elements ? ceil_div(inner, item_elements) : 1;
    rows_per_item = inner > 0 && inner < item_elements ? item_elements / inner : 1;
  }

  int64_t items() const {
    if (rows == 0 || inner == 0) return 0;
    return slots_per_row > 1 ? rows * slots_per_row : ceil_div(rows, rows_per_item);
  }
  int64_t slots() const { return rows * slots_per_row; }

  // The elements [begin, end) of an item.
  int64_t begin(int64_t item) const {
    return slots_per_row > 1 ? (item / slots_per_row) * inner + (item % slots_per_row) * item_elements : item * rows_per_item * inner;
  }
  int64_t end(int64_t item) const {
    int64_t row_end = slots_per_row > 1 ? (item / slots_per_row + 1) * inner : rows * inner;
    int64_t item_end = begin(item) + (slots_per_row > 1 ? item_elements : rows_per_item * inner);
    return item_end < row_end ? item_end : row_end;
  }
  // The slot to which an item adds an element.
  int64_t slot(int64_t item, int64_t element) const { return slots_per_row > 1 ? item : element / inner; }
};

}  // namespace fastvae
