// Sums in one launch and in a fixed order: each block leaves its part in slots of its own, and the last block to arrive adds them up.
#pragma once

#include "memory.cuh"

namespace fastvae {

// A launch's memory for sums; tickets are 0 before and after.
struct Workspace {
  float* slots;
  unsigned* tickets;
};

// Over groups of `width` adjacent threads, a power of two; each gets the sum.
template <class T>
__device__ __forceinline__ T warp_sum(T value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Over the threads of the block; each gets the sum.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T parts[kWarps];
  value = warp_sum(value, kWarp);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = parts[0];
  for (int warp = 1; warp < kWarps; ++warp) total += parts[warp];
  __syncthreads();
  return total;
}

// Over the threads of the block whose numbers differ in the bits `from` <= bit < `to` alone, powers of two; each gets the sum.
template <class T>
__device__ __forceinline__ T sum_across(T value, int from, int to) {
  for (int offset = from; offset < to && offset < kWarp; offset *= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (to <= kWarp) return value;
  __shared__ T parts[kThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  int first = threadIdx.x / to * to + threadIdx.x % kWarp;
  T total = parts[first];
  for (int warp = 1; warp < to / kWarp; ++warp) total += parts[first + warp * kWarp];
  __syncthreads();
  return total;
}

// Whether the other blocks that share the ticket have been here; what they wrote before is then visible to this one.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = blocks == 1 || atomicAdd(ticket, 1u) == blocks - 1;
    if (last && blocks > 1) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// A sum over all elements, times `scale`; without data, none is wanted.
struct ScalarSum {
  Output out;
  double scale = 1.0;
  float* slots = nullptr;
};

__device__ __forceinline__ void store_partial_sum(const ScalarSum& sum, float value) {
  float total = block_sum(value);
  if (threadIdx.x == 0) sum.slots[blockIdx.x] = total;
}

__device__ __forceinline__ void finish_sum(const ScalarSum& sum) {
  double total = 0.0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) total += __ldcg(sum.slots + block);
  total = block_sum(total);
  if (threadIdx.x == 0) store_one(sum.out, 0, total * sum.scale);
}

// What becomes of the elements of a loss: nothing, one sum, or a sum for each row.
struct LossSum {
  ScalarSum all;
  RowSums rows;
  float* row_out = nullptr;
  float* row_slots = nullptr;
  int group = 1, crossing_group = 1;

  __device__ __forceinline__ bool wanted() const { return all.out.data != nullptr || row_out != nullptr; }
};

// A block's side of a LossSum over its chunk of elements. Every thread of the block calls every function.
class LossAccumulator {
 public:
  __device__ __forceinline__ LossAccumulator(const LossSum& sum, int64_t chunk) : sum_(sum), begin_(blockIdx.x * chunk), chunk_(chunk) {
    if (sum_.row_out && threadIdx.x == 0) buffer().open[0] = 0.0f;
  }

  // Elements [base, base + kStep) come next.
  __device__ __forceinline__ void begin_step(int64_t base) {
    base_ = base;
    end_ = min64(base + kStep, sum_.rows.numel);
    spread_ = false;
    if (!sum_.row_out || base >= end_) return;
    row_ = quotient(sum_.rows.length, base);
    spread_ = row_end(row_) < end_;
  }

  // The vector at `offset` of the step; 0 where there are no elements.
  __device__ __forceinline__ void add(int offset, const float (&values)[kVector]) {
    if (spread_)
      store(buffer().values + offset, kVector, true, values);
    else
      total_ += (values[0] + values[1]) + (values[2] + values[3]);
  }

  __device__ __forceinline__ void end_step() {
    if (!sum_.row_out || base_ >= end_) return;
    if (spread_)
      sum_rows_of_step();
    else if (row_end(row_) == end_)
      close_row();
  }

  __device__ __forceinline__ void store_partial_sums() {
    if (sum_.all.out.data) store_partial_sum(sum_.all, total_);
    if (sum_.row_out) leave_open_row();
  }

  // In the last block alone.
  __device__ __forceinline__ void finish_sums() {
    if (sum_.all.out.data) finish_sum(sum_.all);
    if (sum_.row_out) add_crossing_rows();
  }

 private:
  struct Buffer {
    alignas(16) float values[kStep];
    float open[2];  // what earlier steps of the chunk have of the row that goes on; written for one turn while read for the other
  };
  __device__ __forceinline__ static Buffer& buffer() {
    __shared__ Buffer shared;
    return shared;
  }

  __device__ __forceinline__ int64_t row_begin(int64_t row) const { return row * sum_.rows.length.divisor; }
  __device__ __forceinline__ int64_t row_end(int64_t row) const { return (row + 1) * sum_.rows.length.divisor; }

  __device__ __forceinline__ void finish_row(int64_t row, float value) {
    if (row_begin(row) >= begin_)
      sum_.row_out[row] = value;
    else
      sum_.row_slots[head_slot(blockIdx.x)] = value;
  }

  // The row ends with the step.
  __device__ __forceinline__ void close_row() {
    float total = block_sum(total_);
    total_ = 0.0f;
    if (threadIdx.x != 0) return;
    finish_row(row_, buffer().open[turn_] + total);
    buffer().open[turn_] = 0.0f;
  }

  __device__ __forceinline__ void sum_rows_of_step() {
    float before = block_sum(total_);
    total_ = 0.0f;
    // Thread 0 alone touches this turn's, and the barriers of block_sum() stand before whoever reads the values.
    if (threadIdx.x == 0) buffer().open[turn_] += before;
    int thread = threadIdx.x, group = sum_.group, member = thread % group, mine = thread / group;
    int rows = static_cast<int>(quotient(sum_.rows.length, end_ - 1) - row_) + 1;
    for (int first = 0; first < rows; first += kThreads / group) {
      int index = first + mine;
      int64_t row = row_ + index;
      float total = 0.0f;
      if (index < rows) {
        int stop = static_cast<int>(min64(row_end(row), end_) - base_);
        for (int i = static_cast<int>(max64(row_begin(row) - base_, 0)) + member; i < stop; i += group) total += buffer().values[i];
      }
      total = warp_sum(total, group);
      if (index >= rows || member != 0) continue;
      if (index == 0) total += buffer().open[turn_];
      bool complete = row_end(row) <= end_;
      if (complete) finish_row(row, total);
      if (index == rows - 1) buffer().open[turn_ ^ 1] = complete ? 0.0f : total;
    }
    turn_ ^= 1;
    __syncthreads();
  }

  __device__ __forceinline__ void leave_open_row() {
    int64_t end = min64(begin_ + chunk_, sum_.rows.numel);
    if (begin_ >= end || remainder(sum_.rows.length, end) == 0) return;
    float total = block_sum(total_);
    if (threadIdx.x != 0) return;
    bool began_here = row_begin(quotient(sum_.rows.length, end)) >= begin_;
    sum_.row_slots[began_here ? tail_slot(blockIdx.x) : head_slot(blockIdx.x)] = buffer().open[turn_] + total;
  }

  __device__ __forceinline__ void add_crossing_rows() {
    int thread = threadIdx.x, group = sum_.crossing_group, member = thread % group;
    int64_t blocks = ceil_div(sum_.rows.numel, sum_.rows.chunk);
    for (int64_t first = 1; first < blocks; first += kThreads / group) {
      int64_t block = first + thread / group, row = 0;
      bool owned = block < blocks && owns_crossing_row(sum_.rows, block, row);
      double total = 0.0;
      if (owned) {
        int64_t last = last_block_of(sum_.rows, row);
        if (member == 0) total = __ldcg(sum_.row_slots + tail_slot(block - 1));
        for (int64_t part = block + member; part <= last; part += group) total += __ldcg(sum_.row_slots + head_slot(part));
      }
      total = warp_sum(total, group);
      if (owned && member == 0) sum_.row_out[row] = static_cast<float>(total);
    }
  }

  const LossSum& sum_;
  int64_t begin_, chunk_, base_ = 0, end_ = 0, row_ = 0;
  float total_ = 0.0f;
  int turn_ = 0;
  bool spread_ = false;
};

// Over the threads that share a column; the first `width` threads get the sums.
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

// finish(column, sum of element(i) over the column's elements i); grid (groups, splits).
template <class Element, class Finish>
__device__ __forceinline__ void sum_columns(const ColumnSums& c, const Workspace& workspace, Element element, Finish finish) {
  int thread = threadIdx.x, width = c.width, part = thread / width, parts = kThreads / width;
  int64_t column = static_cast<int64_t>(blockIdx.x) * width + thread % width;
  bool inside = column < c.columns, first = thread < width;
  int64_t begin = blockIdx.y * c.rows_per_split, end = min64(begin + c.rows_per_split, c.rows);
  float value = 0.0f;
  if (inside)
    for (int64_t row = begin + part; row < end; row += parts) value += element(column_element(c, row, column));
  value = column_block_sum(value, width);
  if (c.splits == 1) {
    if (first && inside) finish(column, static_cast<double>(value));
    return;
  }
  if (first && inside) workspace.slots[blockIdx.y * c.columns + column] = value;
  if (!is_last_block(workspace.tickets + blockIdx.x, c.splits)) return;
  double total = 0.0;
  if (inside)
    for (int split = part; split < c.splits; split += parts) total += __ldcg(workspace.slots + split * c.columns + column);
  total = column_block_sum(total, width);
  if (first && inside) finish(column, total);
}

}  // namespace fastvae
