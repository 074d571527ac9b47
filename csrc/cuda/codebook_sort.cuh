// Sums over the rows of each code: a stable counting sort of the rows by code, then sums in the order of the rows.
//
// kernel                        grid                        reads                       writes
// codebook_finite_rows_kernel   (blocks of rows)            x, indices                  indices, -1 for rows that are not finite
// codebook_count_kernel         (blocks of 4 parts)         indices                     counts of each part
// codebook_part_offsets_kernel  (blocks of 8 codes)         counts                      counts, totals, the counts of codes in starts
// codebook_code_offsets_kernel  (heads)                     starts                      starts
// codebook_sort_kernel          (blocks of 4 parts)         indices, counts, starts     order, sorted
// codebook_sum_pieces_kernel    (blocks of pieces)          x, order, sorted, starts    sums, partial
// codebook_join_pieces_kernel   (blocks of pieces)          partial, sorted, starts     sums
#pragma once

#include "../common/codebook_formulas.h"
#include "codebook_gradient.cuh"
#include "codebook_partition.h"

namespace fastvae {

struct CodebookFiniteRowsParams {
  CodebookView x;  // (heads, rows, dim)
  Divider rows;
  int64_t count, dim;               // count: rows of all heads
  int width;                        // threads that share a row
  const int64_t* indices;           // (heads, rows)
  int64_t* indices_of_finite_rows;  // (heads, rows)
};

// Writes the index of each row, or -1 for a row that is not finite, which leaves the row out of the sums.
__global__ void __launch_bounds__(kThreads) codebook_finite_rows_kernel(const __grid_constant__ CodebookFiniteRowsParams p) {
  ThreadGroup group(p.width);
  int64_t number = static_cast<int64_t>(blockIdx.x) * group.count + group.number;
  int not_finite = 0;
  if (number < p.count) {
    int64_t head = quotient(p.rows, number), first = p.x.offset(head, number - head * p.rows.divisor);
    for (int64_t d = group.member * kVector; d < p.dim; d += group.width * kVector) {
      float x[kVector];
      load(p.x, first + d, static_cast<int>(min64(p.dim - d, kVector)), p.x.aligned, x);
      for (int k = 0; k < kVector; ++k) not_finite |= !is_finite(x[k]);
    }
  }
  not_finite = warp_sum(not_finite, group.width);
  if (group.member == 0 && number < p.count) p.indices_of_finite_rows[number] = not_finite == 0 ? p.indices[number] : -1;
}

struct CodebookSortParams {
  const int64_t* indices;  // (heads, rows): a row whose code is below 0 or beyond the last one is left out
  int64_t heads, rows, codes;
  CodebookSortParts parts;
  unsigned* counts;  // (heads, parts, codes): the rows of a part on each code, later those of the parts before it
  int64_t* starts;   // (heads, codes + 1): the position of the first row of each code in the sorted rows, and the end
  int64_t* totals;   // (heads, codes): the rows on each code; nullptr where they are not requested
  int64_t* order;    // (heads, rows): the rows, sorted by code
  int32_t* sorted;   // (heads, rows): the codes of the sorted rows
};

// The code of a row, or -1 where the row is left out or does not exist.
__device__ __forceinline__ int32_t code_of_row(const CodebookSortParams& p, int64_t head, int64_t row, int64_t end) {
  int64_t code = row < end ? p.indices[head * p.rows + row] : -1;
  return code >= 0 && code < p.codes ? static_cast<int32_t>(code) : -1;
}

// The part of the rows of a head that a warp handles.
struct CodebookPart {
  int64_t head, part, begin, end;
  bool exists;

  __device__ __forceinline__ explicit CodebookPart(const CodebookSortParams& p) {
    int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    head = number / p.parts.parts;
    part = number - head * p.parts.parts;
    begin = part * p.parts.rows_per_part;
    end = min64(begin + p.parts.rows_per_part, p.rows);
    exists = head < p.heads;
  }

  __device__ __forceinline__ unsigned* counts(const CodebookSortParams& p) const {
    return p.counts + (head * p.parts.parts + part) * p.codes;
  }
};

// Counts the rows of each part on each code. The order of the atomic additions does not matter, because they are of integers.
__global__ void __launch_bounds__(kThreads) codebook_count_kernel(const __grid_constant__ CodebookSortParams p) {
  CodebookPart place(p);
  if (!place.exists) return;
  unsigned* counts = place.counts(p);
  load_then_store(
      place.begin + threadIdx.x % kWarp, place.end, kWarp, [&](int64_t row) { return code_of_row(p, place.head, row, place.end); },
      [&](int64_t, int32_t code) {
        if (code >= 0) atomicAdd(counts + code, 1u);
      });
}

// Replaces the counts of the parts by prefix sums over the parts, and stores the count of each code in `starts` for the next kernel. A
// block handles kOffsetCodes adjacent codes, 32 bytes of counts; the threads of a code share its parts.
__global__ void __launch_bounds__(kThreads) codebook_part_offsets_kernel(const __grid_constant__ CodebookSortParams p) {
  constexpr int kSlices = kThreads / kOffsetCodes;
  __shared__ unsigned sums[kSlices][kOffsetCodes];
  int64_t groups = ceil_div(p.codes, kOffsetCodes), head = blockIdx.x / groups;
  int lane = threadIdx.x % kOffsetCodes, slice = threadIdx.x / kOffsetCodes;
  int64_t code = (blockIdx.x - head * groups) * kOffsetCodes + lane;
  unsigned* counts = p.counts + head * p.parts.parts * p.codes + code;
  int64_t share = ceil_div(p.parts.parts, kSlices), begin = slice * share, end = min64(begin + share, p.parts.parts);
  if (code >= p.codes) end = begin;
  unsigned sum = 0;
#pragma unroll 8
  for (int64_t part = begin; part < end; ++part) sum += counts[part * p.codes];
  sums[slice][lane] = sum;
  __syncthreads();
  if (code >= p.codes) return;
  unsigned before = 0;
  for (int i = 0; i < slice; ++i) before += sums[i][lane];
  if (slice == kSlices - 1) {
    p.starts[head * (p.codes + 1) + code] = before + sum;
    if (p.totals) p.totals[head * p.codes + code] = before + sum;
  }
  load_then_store(
      begin, end, 1, [&](int64_t part) { return counts[part * p.codes]; },
      [&](int64_t part, unsigned count) {
        counts[part * p.codes] = before;
        before += count;
      });
}

// The sum over the threads before this one. `total` becomes the sum over all.
__device__ __forceinline__ int64_t sum_before(int64_t value, int64_t& total) {
  __shared__ int64_t sums[kWarps];
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t before = 0, sum = value;
  for (int mask = 1; mask < kWarp; mask *= 2) {
    int64_t other = __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane & mask) before += other;
    sum += other;
  }
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += sums[i];
    total += sums[i];
  }
  __syncthreads();
  return before;
}

// Replaces the counts of the codes in `starts` by prefix sums over the codes of a head. A thread handles kBatch adjacent codes at a time.
__global__ void __launch_bounds__(kThreads) codebook_code_offsets_kernel(const __grid_constant__ CodebookSortParams p) {
  int64_t* starts = p.starts + static_cast<int64_t>(blockIdx.x) * (p.codes + 1);
  int64_t next = 0;
  for (int64_t base = 0; base < p.codes; base += kThreads * kBatch) {
    int64_t first = base + threadIdx.x * kBatch, counts[kBatch], sum = 0, total;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      counts[k] = first + k < p.codes ? starts[first + k] : 0;
      sum += counts[k];
    }
    int64_t start = next + sum_before(sum, total);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k < p.codes) starts[first + k] = start;
      start += counts[k];
    }
    next += total;
  }
  if (threadIdx.x == 0) starts[p.codes] = next;
}

// Writes the rows of each part to their sorted positions. The sort is stable: a warp handles 32 rows at a time, and each lane counts the
// lanes before it that have the same code.
__global__ void __launch_bounds__(kThreads) codebook_sort_kernel(const __grid_constant__ CodebookSortParams p) {
  CodebookPart place(p);
  if (!place.exists) return;
  int lane = threadIdx.x % kWarp;
  const int64_t* starts = p.starts + place.head * (p.codes + 1);
  unsigned* counts = place.counts(p);
  for (int64_t first = place.begin; first < place.end; first += kBatch * kWarp) {
    int32_t codes[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) codes[k] = code_of_row(p, place.head, first + k * kWarp + lane, place.end);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      int32_t code = codes[k];
      unsigned peers = __match_any_sync(0xffffffffu, code);
      int before = __popc(peers & ((1u << lane) - 1u));
      unsigned placed = code >= 0 ? counts[code] : 0;
      __syncwarp();
      if (code >= 0 && before == 0) counts[code] = placed + static_cast<unsigned>(__popc(peers));
      __syncwarp();
      if (code < 0) continue;
      int64_t position = place.head * p.rows + starts[code] + placed + before;
      p.order[position] = first + k * kWarp + lane;
      p.sorted[position] = code;
    }
  }
}

template <class T>
struct CodebookSumParams {
  CodebookSortParams sort;
  CodebookView x;         // (heads, rows, dim)
  CodebookView codebook;  // (heads, codes, dim), where there is a gradient
  CodebookLossGradient<T> gradient;
  double factor;        // multiplies the sums
  int64_t dim, pieces;  // pieces of a head
  int width;            // threads that share a piece
  double* partial;      // (heads, pieces, 2, dim)
  Output sums;          // (heads, codes, dim)
};

// The piece of the sorted rows of a head that a group of threads handles: positions [begin, end).
struct CodebookPiece {
  int64_t head, piece, begin, end;
  int member;             // this thread's number in its group
  const int64_t* starts;  // (codes + 1,), those of the head

  template <class T>
  __device__ __forceinline__ explicit CodebookPiece(const CodebookSumParams<T>& p) : member(static_cast<int>(threadIdx.x) % p.width) {
    int64_t number = static_cast<int64_t>(blockIdx.x) * (kThreads / p.width) + threadIdx.x / p.width;
    head = min64(number / p.pieces, p.sort.heads - 1);
    piece = number - head * p.pieces;
    starts = p.sort.starts + head * (p.sort.codes + 1);
    begin = piece * kPieceRows;
    end = piece < p.pieces ? min64(begin + kPieceRows, starts[p.sort.codes]) : begin;
  }

  // The partial sum (dim,) in a slot of the head.
  template <class T>
  __device__ __forceinline__ double* partial(const CodebookSumParams<T>& p, int64_t slot) const {
    return p.partial + (head * p.pieces * 2 + slot) * p.dim;
  }
};

// The term of a row in element d of the sum of its code: x, or with a gradient grad_loss * (c - x).
template <class T, bool kGradient>
__device__ __forceinline__ double term_of_row(const CodebookSumParams<T>& p, int64_t head, int64_t row, int64_t d, double code) {
  double x = to_double(static_cast<const T*>(p.x.data)[p.x.offset(head, row) + d]);
  if (!kGradient) return x;
  int64_t number = head * p.sort.rows + row;
  float weight = p.gradient.elements ? to_float(p.gradient.elements[number * p.dim + d]) : weight_of_row(p.gradient, number);
  return static_cast<double>(weight) * (code - x);
}

// Sums each piece, a thread one dimension at a time. Writes the sums of codes that lie in the piece, and partial sums of the others.
template <class T, bool kGradient>
__global__ void __launch_bounds__(kThreads) codebook_sum_pieces_kernel(const __grid_constant__ CodebookSumParams<T> p) {
  CodebookPiece place(p);
  const int64_t* order = p.sort.order + place.head * p.sort.rows;
  const int32_t* sorted = p.sort.sorted + place.head * p.sort.rows;
  for (int64_t d = place.member; d < p.dim; d += p.width) {
    for (int64_t i = place.begin; i < place.end;) {
      int64_t code = sorted[i], start = place.starts[code], end = place.starts[code + 1], stop = min64(end, place.end);
      double value = kGradient ? element_as_double(p.codebook, p.codebook.offset(place.head, code) + d) : 0.0, total = 0.0;
#pragma unroll 4
      for (; i < stop; ++i) total += term_of_row<T, kGradient>(p, place.head, order[i], d, value);
      total *= p.factor;
      if (crosses_pieces(start, end))
        place.partial(p, piece_slot(place.piece, start))[d] = total;
      else
        store_one(p.sums, (place.head * p.sort.codes + code) * p.dim + d, total);
    }
  }
}

// Adds the partial sums of each code that crosses pieces, in their order. The piece in which the code begins does it.
template <class T>
__global__ void __launch_bounds__(kThreads) codebook_join_pieces_kernel(const __grid_constant__ CodebookSumParams<T> p) {
  CodebookPiece place(p);
  if (place.begin >= place.end) return;
  int64_t code = p.sort.sorted[place.head * p.sort.rows + place.end - 1], start = place.starts[code], end = place.starts[code + 1];
  if (start < place.begin || !crosses_pieces(start, end)) return;
  for (int64_t d = place.member; d < p.dim; d += p.width) {
    double total = place.partial(p, piece_slot(place.piece, start))[d];
#pragma unroll 4
    for (int64_t piece = place.piece + 1; piece * kPieceRows < end; ++piece) total += place.partial(p, piece_slot(piece, start))[d];
    store_one(p.sums, (place.head * p.sort.codes + code) * p.dim + d, total);
  }
}

}  // namespace fastvae
