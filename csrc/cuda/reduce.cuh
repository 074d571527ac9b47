// Sums that finish within one launch and in a fixed order, without atomic additions of floats. Each block writes its partial sums to slots
// of a scratch buffer that no other block writes; the last block to arrive, which a ticket counter tells, adds the slots in their order.
//
// LossAccumulator sums the elements of a loss over everything or over each row; ScalarSum is its sum over everything; sum_columns() sums
// the columns of a matrix.
#pragma once

#include "memory.cuh"

namespace fastvae {

// The scratch memory of a launch, see workspace.cu. Tickets are 0 before and after every launch.
struct Workspace {
  float* slots;       // (kSlots,)
  unsigned* tickets;  // (kTickets,)
};

// Sums over groups of `width` adjacent threads, a power of two up to kWarp; each thread gets its group's sum.
template <class T>
__device__ __forceinline__ T warp_sum(T value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sums over the threads of the block; each thread gets the sum.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T parts[kWarps];
  value = warp_sum(value, kWarp);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = parts[0];
  for (int warp = 1; warp < kWarps; ++warp) total += parts[warp];
  // Without this barrier the next call could overwrite `parts` before a slower warp has read it.
  __syncthreads();
  return total;
}

// Sums over the threads whose numbers agree in all bits but those between `from` (included) and `to` (excluded), both powers of two: for
// example, from = 4 and to = 32 sums every fourth thread of a warp. Each thread of the block, kMaxThreads at most, gets the sum.
template <int kMaxThreads = kThreads, class T>
__device__ __forceinline__ T sum_across(T value, int from, int to) {
  for (int offset = from; offset < to && offset < kWarp; offset *= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (to <= kWarp) return value;
  __shared__ T parts[kMaxThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  int first = threadIdx.x / to * to + threadIdx.x % kWarp;
  T total = parts[first];
  for (int warp = 1; warp < to / kWarp; ++warp) total += parts[first + warp * kWarp];
  __syncthreads();
  return total;
}

// Sums value(i) over i = first, first + stride, ... before `end`. kLoadsInFlight values are loaded before the first is added, because a
// thread would wait for memory after each otherwise.
template <class T, class Value>
__device__ __forceinline__ T sum_strided(int64_t first, int64_t end, int stride, Value value) {
  T sums[kLoadsInFlight] = {};
  int64_t i = first;
  for (; i + (kLoadsInFlight - 1) * stride < end; i += kLoadsInFlight * stride) {
    decltype(value(i)) values[kLoadsInFlight];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) values[j] = value(i + j * stride);
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) sums[j] += values[j];
  }
  for (; i < end; i += stride) sums[0] += value(i);
#pragma unroll
  for (int j = 1; j < kLoadsInFlight; ++j) sums[0] += sums[j];
  return sums[0];
}

// Returns true in the last of the `blocks` blocks that share the ticket counter to arrive here. What the others wrote before they arrived
// is visible to it then. It resets the counter for the next launch.
//
// In the memory model of PTX the barrier orders the writes of the block before the first fence, which is cumulative: together with the
// atomic addition it releases the writes of all threads, not of thread 0 alone. A fence that another thread executes before the barrier
// would release nothing, because that thread makes no atomic access after it. The second fence acquires what the other blocks released, and
// the last barrier passes it on to all threads.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = blocks == 1 || atomicAdd(ticket, 1u) == blocks - 1;
    __threadfence();
    // After the second fence no addition of another block can follow this store.
    if (last && blocks > 1) *ticket = 0;
  }
  __syncthreads();
  return last;
}

// A sum over all elements, times `scale`. Where `out` has no data, no sum is computed.
struct ScalarSum {
  Output out;
  double scale = 1.0;
  float* slots = nullptr;  // (blocks,), one partial sum a block
};

__device__ __forceinline__ void store_partial_sum(const ScalarSum& sum, float value) {
  float total = block_sum(value);
  if (threadIdx.x == 0) sum.slots[blockIdx.x] = total;
}

// Only the last block may call this. It reads past the L1 cache, which does not see what other multiprocessors wrote.
__device__ __forceinline__ void finish_sum(const ScalarSum& sum) {
  double total = sum_strided<double>(threadIdx.x, gridDim.x, kThreads, [&](int64_t block) { return __ldcg(sum.slots + block); });
  total = block_sum(total);
  if (threadIdx.x == 0) store_one(sum.out, 0, total * sum.scale);
}

// Describes into what a kernel reduces the elements of a loss: nothing, one sum (`all`), or one sum for each row (`row_out`).
struct LossSum {
  ScalarSum all;
  RowSums rows{};
  float* row_out = nullptr;           // (rows,)
  float* row_slots = nullptr;         // (blocks, 2): the head and the tail slot of each block
  int group = 1, crossing_group = 1;  // the results of row_group() and crossing_group()

  __device__ __forceinline__ bool wanted() const { return all.out.data != nullptr || row_out != nullptr; }
};

// The part of a LossSum that one block computes, over its chunk of elements. Its functions contain barriers, so every thread of the block
// has to call each of them.
class LossAccumulator {
 public:
  __device__ __forceinline__ LossAccumulator(const LossSum& sum, int64_t chunk) : sum_(sum), begin_(blockIdx.x * chunk), chunk_(chunk) {
    if (sum_.row_out && threadIdx.x == 0) shared().open_row[0] = 0.0f;
  }

  // The next values that are added are those of the elements [base, base + kStep).
  __device__ __forceinline__ void begin_step(int64_t base) {
    base_ = base;
    end_ = min64(base + kStep, sum_.rows.numel);
    row_ends_inside_ = false;
    if (!sum_.row_out || base >= end_) return;
    row_ = quotient(sum_.rows.length, base);
    row_ends_inside_ = row_end(row_) < end_;
  }

  // Adds the vector at `offset` of the step. Values beyond the last element have to be 0.
  __device__ __forceinline__ void add(int offset, const float (&values)[kVector]) {
    if (row_ends_inside_)
      store(shared().values + offset, kVector, true, values);
    else
      total_ += (values[0] + values[1]) + (values[2] + values[3]);
  }

  __device__ __forceinline__ void end_step() {
    if (!sum_.row_out || base_ >= end_) return;
    if (row_ends_inside_)
      sum_rows_of_step();
    else if (row_end(row_) == end_)
      close_row();
  }

  __device__ __forceinline__ void store_partial_sums() {
    if (sum_.all.out.data) store_partial_sum(sum_.all, total_);
    if (sum_.row_out) store_open_row();
  }

  // Only the last block may call this, after all blocks have stored their partial sums.
  __device__ __forceinline__ void finish_sums() {
    if (sum_.all.out.data) finish_sum(sum_.all);
    if (sum_.row_out) finish_crossing_rows();
  }

 private:
  struct Shared {
    alignas(16) float values[kStep];
    // The partial sum of the row that continues into the next step. It is double-buffered: sum_rows_of_step() reads one entry while the
    // thread of the last row writes the other.
    float open_row[2];
  };
  __device__ __forceinline__ static Shared& shared() {
    __shared__ Shared memory;
    return memory;
  }

  __device__ __forceinline__ int64_t row_begin(int64_t row) const { return row * sum_.rows.length.divisor; }
  __device__ __forceinline__ int64_t row_end(int64_t row) const { return (row + 1) * sum_.rows.length.divisor; }

  // Stores the sum of a row that ends in this chunk: the result where the row began here too, otherwise a partial sum.
  __device__ __forceinline__ void store_row(int64_t row, float value) {
    if (row_begin(row) >= begin_)
      sum_.row_out[row] = value;
    else
      sum_.row_slots[head_slot(blockIdx.x)] = value;
  }

  // Handles a step that lies in one row and ends where the row ends. Up to then the threads keep partial sums of the row in registers.
  __device__ __forceinline__ void close_row() {
    float total = block_sum(total_);
    total_ = 0.0f;
    if (threadIdx.x != 0) return;
    store_row(row_, shared().open_row[buffer_index_] + total);
    shared().open_row[buffer_index_] = 0.0f;
  }

  // Handles a step in which a row ends: the values are in shared memory, and groups of threads sum one row each.
  __device__ __forceinline__ void sum_rows_of_step() {
    float before = block_sum(total_);
    total_ = 0.0f;
    // Only thread 0 writes this entry, and the barriers of block_sum() separate the writes of the values from their reads below.
    if (threadIdx.x == 0) shared().open_row[buffer_index_] += before;
    int thread = threadIdx.x, group = sum_.group, member = thread % group, group_index = thread / group;
    int rows = static_cast<int>(quotient(sum_.rows.length, end_ - 1) - row_) + 1;
    for (int first = 0; first < rows; first += kThreads / group) {
      int index = first + group_index;
      int64_t row = row_ + index;
      float total = 0.0f;
      if (index < rows) {
        int stop = static_cast<int>(min64(row_end(row), end_) - base_);
        for (int i = static_cast<int>(max64(row_begin(row) - base_, 0)) + member; i < stop; i += group) total += shared().values[i];
      }
      total = warp_sum(total, group);
      if (index >= rows || member != 0) continue;
      if (index == 0) total += shared().open_row[buffer_index_];
      bool complete = row_end(row) <= end_;
      if (complete) store_row(row, total);
      if (index == rows - 1) shared().open_row[buffer_index_ ^ 1] = complete ? 0.0f : total;
    }
    buffer_index_ ^= 1;
    // The next step overwrites the values.
    __syncthreads();
  }

  // Stores the partial sum of the row that continues into the next chunk.
  __device__ __forceinline__ void store_open_row() {
    int64_t end = min64(begin_ + chunk_, sum_.rows.numel);
    if (begin_ >= end || remainder(sum_.rows.length, end) == 0) return;
    float total = block_sum(total_);
    if (threadIdx.x != 0) return;
    bool began_here = row_begin(quotient(sum_.rows.length, end)) >= begin_;
    sum_.row_slots[began_here ? tail_slot(blockIdx.x) : head_slot(blockIdx.x)] = shared().open_row[buffer_index_] + total;
  }

  // Adds the partial sums of every row that crosses chunks: the tail slot of the chunk in which it begins, then the head slots of the
  // others.
  __device__ __forceinline__ void finish_crossing_rows() {
    int thread = threadIdx.x, group = sum_.crossing_group, member = thread % group;
    int64_t blocks = ceil_div(sum_.rows.numel, sum_.rows.chunk);
    for (int64_t first = 1; first < blocks; first += kThreads / group) {
      int64_t block = first + thread / group, row = 0;
      bool owned = block < blocks && owns_crossing_row(sum_.rows, block, row);
      double total = 0.0;
      if (owned) {
        int64_t last = last_block_of(sum_.rows, row);
        if (member == 0) total = __ldcg(sum_.row_slots + tail_slot(block - 1));
        total +=
            sum_strided<double>(block + member, last + 1, group, [&](int64_t part) { return __ldcg(sum_.row_slots + head_slot(part)); });
      }
      total = warp_sum(total, group);
      if (owned && member == 0) sum_.row_out[row] = static_cast<float>(total);
    }
  }

  const LossSum& sum_;
  int64_t begin_, chunk_, base_ = 0, end_ = 0, row_ = 0;  // row_ is the row that contains element base_
  float total_ = 0.0f;                                    // this thread's partial sum of everything, or of the row that is open
  int buffer_index_ = 0;                                  // the entry of open_row that is read in this step
  bool row_ends_inside_ = false;                          // whether row_ ends before the step does
};

// Sums over the threads that share a column: all of the block where `width` is 1, otherwise every kWarp-th one. The first `width` threads
// get the sums.
template <class T>
__device__ __forceinline__ T column_block_sum(T value, int width) {
  if (width == 1) return block_sum(value);
  __shared__ T parts[kThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  T total = parts[threadIdx.x % kWarp];
  for (int warp = 1; warp < kWarps; ++warp) total += parts[warp * kWarp + threadIdx.x % kWarp];
  __syncthreads();
  return total;
}

// Adds the values of the threads that share a column and calls finish(column, sum). The grid is (groups, splits); with several splits each
// block stores partial sums in slots (splits, columns), and the last block of a group adds them.
template <class Finish>
__device__ __forceinline__ void finish_columns(const ColumnSums& c, const Workspace& workspace, float value, Finish finish) {
  int thread = threadIdx.x, width = c.width, part = thread / width, parts = kThreads / width;
  int64_t column = static_cast<int64_t>(blockIdx.x) * width + thread % width;
  bool inside = column < c.columns, first = thread < width;
  value = column_block_sum(value, width);
  if (c.splits == 1) {
    if (first && inside) finish(column, static_cast<double>(value));
    return;
  }
  if (first && inside) workspace.slots[blockIdx.y * c.columns + column] = value;
  if (!is_last_block(workspace.tickets + blockIdx.x, c.splits)) return;
  double total = 0.0;
  if (inside)
    total = sum_strided<double>(part, c.splits, parts, [&](int64_t split) { return __ldcg(workspace.slots + split * c.columns + column); });
  total = column_block_sum(total, width);
  if (first && inside) finish(column, total);
}

// Computes finish(column, sum of element(i) over the elements i of the column).
template <class Element, class Finish>
__device__ __forceinline__ void sum_columns(const ColumnSums& c, const Workspace& workspace, Element element, Finish finish) {
  int part = threadIdx.x / c.width, parts = kThreads / c.width;
  int64_t column = static_cast<int64_t>(blockIdx.x) * c.width + threadIdx.x % c.width;
  int64_t begin = blockIdx.y * c.rows_per_split, end = min64(begin + c.rows_per_split, c.rows);
  float value = 0.0f;
  if (column < c.columns)
    value = sum_strided<float>(begin + part, end, parts, [&](int64_t row) { return element(column_element(c, row, column)); });
  finish_columns(c, workspace, value, finish);
}

}  // namespace fastvae
