// The second step of the exact search: one kernel decides the rows of the worklist in float64, and where that is too close, exactly.
//
// kernel                   grid                                reads                                writes
// codebook_recheck_kernel  (blocks, which take rows in turn)   x, codebook, start, the worklist     indices
#pragma once

#include "codebook_screen.cuh"

namespace fastvae {

struct CodebookRecheckParams {
  CodebookView x;  // (heads, rows, dim)
  Divider rows;
  PackedCodebook codes;
  CodebookWorklist worklist;
  double* buffers;   // (blocks, 3, dim): scratch memory for a row and two codes
  int64_t* indices;  // (heads, rows)
};

// The squared distance of a row x (dim,) to a code, infinite where the code is not searched. A group of threads computes it; each gets the
// result. C is the dtype of the codes.
template <class C>
__device__ __forceinline__ double distance_to(const CodebookRecheckParams& p, const double* x, int64_t head, int64_t code,
                                              const ThreadGroup& group) {
  const CodebookLayout& layout = p.codes.layout;
  double total = 0.0;
  bool searched = code < layout.codes && p.codes.start[head * layout.padded_codes + code] < kNeverNearest;
  if (searched) {
    const C* from = static_cast<const C*>(p.codes.source.data) + p.codes.source.offset(head, code);
    for (int64_t d = group.member; d < layout.dim; d += group.width) {
      double difference = x[d] - to_double(from[d]);
      total = fma(difference, difference, total);
    }
  }
  total = warp_sum(total, group.width);
  return searched ? total : static_cast<double>(INFINITY);
}

// Writes the elements of a row as double, and returns whether all are finite. Every thread of the block has to call this.
__device__ __forceinline__ bool row_to_double(const CodebookView& rows, int64_t head, int64_t row, int64_t dim, double* to) {
  int64_t first = rows.offset(head, row);
  int not_finite = 0;
  for (int64_t d = threadIdx.x; d < dim; d += kThreads) {
    to[d] = element_as_double(rows, first + d);
    not_finite |= !is_finite(to[d]);
  }
  return block_sum(not_finite) == 0;
}

// The nearest of the codes whose squared distance in float64 is at most `bound`, the lowest where several are. It compares them one after
// the other in exact arithmetic. x (dim,) is followed by scratch memory for two codes.
template <class C>
__device__ __forceinline__ int64_t decide_exactly(const CodebookRecheckParams& p, double* x, int64_t head, double bound,
                                                  const ThreadGroup& group) {
  __shared__ ExactSum exact;
  __shared__ bool near[kThreads];
  __shared__ int order;
  int64_t dim = p.codes.layout.dim, nearest = -1;
  double *best = x + dim, *other = x + 2 * dim;
  for (int64_t base = 0; base < p.codes.layout.codes; base += group.count) {
    double distance = distance_to<C>(p, x, head, base + group.number, group);
    if (group.member == 0) near[group.number] = distance <= bound;
    __syncthreads();
    for (int i = 0; i < group.count; ++i) {
      if (!near[i]) continue;
      row_to_double(p.codes.source, head, base + i, dim, other);
      if (nearest >= 0) {
        if (threadIdx.x == 0) order = compare_distances(x, other, best, dim, exact);
        __syncthreads();
        if (order >= 0) continue;
      }
      nearest = base + i;
      double* swapped = best;
      best = other;
      other = swapped;
    }
    __syncthreads();
  }
  return nearest;
}

// The minimum over the threads of the block; each thread gets it.
__device__ __forceinline__ double block_min(double value) {
  __shared__ double parts[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmin(value, __shfl_xor_sync(0xffffffffu, value, offset));
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  double result = parts[0];
  for (int warp = 1; warp < kWarps; ++warp) result = fmin(result, parts[warp]);
  __syncthreads();
  return result;
}

// A block decides one row of the worklist at a time. A row that is not finite, or whose distances all overflow, has the index 0.
template <class C>
__global__ void __launch_bounds__(kThreads, 8) codebook_recheck_kernel(const __grid_constant__ CodebookRecheckParams p) {
  ThreadGroup group(p.codes.width);
  int64_t dim = p.codes.layout.dim;
  double* x = p.buffers + blockIdx.x * 3 * dim;
  unsigned long long count = *p.worklist.count;
  for (unsigned long long entry = blockIdx.x; entry < count; entry += gridDim.x) {
    int64_t number = p.worklist.rows[entry], head = quotient(p.rows, number);
    __syncthreads();
    bool finite = row_to_double(p.x, head, number - head * p.rows.divisor, dim, x);
    if (!finite) {
      if (threadIdx.x == 0) p.indices[number] = 0;
      continue;
    }
    double smallest = INFINITY, second = INFINITY;  // distances of the codes that this group handles
    int64_t nearest = 0;
    for (int64_t base = 0; base < p.codes.layout.codes; base += group.count) {
      double distance = distance_to<C>(p, x, head, base + group.number, group);
      second = fmin(second, fmax(smallest, distance));
      nearest = distance < smallest ? base + group.number : nearest;
      smallest = fmin(smallest, distance);
    }
    double bound = tie_bound(block_min(smallest), dim);
    bool is_leader = group.member == 0 && is_finite(bound);
    // Codes that may be the nearest; of more than two in one group two are counted, which is enough.
    int close = block_sum(is_leader ? (smallest <= bound) + (second <= bound) : 0);
    if (close == 0) {
      if (threadIdx.x == 0) p.indices[number] = 0;
    } else if (close == 1) {
      if (is_leader && smallest <= bound) p.indices[number] = nearest;
    } else {
      nearest = decide_exactly<C>(p, x, head, bound, group);
      if (threadIdx.x == 0) p.indices[number] = nearest;
    }
  }
}

}  // namespace fastvae
