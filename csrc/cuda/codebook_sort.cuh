// Sums over the rows of each code: a stable counting sort of the rows by code, then sums in the order of the rows.
#pragma once

#include "codebook_search.cuh"

namespace fastvae {

// A row's code below 0 or beyond the last one leaves it out.
struct SortParams {
  const int64_t* indices;  // (heads, rows)
  int64_t heads, rows, codes;
  SortParts parts;
  unsigned* counts;  // (heads, parts, codes): the rows of a part on each code, then those of the parts before it
  int64_t* starts;   // (heads, codes + 1): of each code in the sorted rows
  int64_t* totals;   // (heads, codes): rows on each code; may be null
  int64_t* order;    // (heads, rows): rows in the order of their codes
  int32_t* sorted;   // (heads, rows): the code of each
};

__device__ __forceinline__ int32_t code_of_row(const SortParams& p, int64_t head, int64_t row, int64_t end) {
  int64_t code = row < end ? p.indices[head * p.rows + row] : -1;
  return code >= 0 && code < p.codes ? static_cast<int32_t>(code) : -1;
}

// A warp's part of a head's rows.
struct PartPlace {
  int64_t head, part, begin, end;
  bool exists;

  __device__ __forceinline__ explicit PartPlace(const SortParams& p) {
    int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    head = number / p.parts.parts;
    part = number - head * p.parts.parts;
    begin = part * p.parts.rows_per_part;
    end = min64(begin + p.parts.rows_per_part, p.rows);
    exists = head < p.heads;
  }

  __device__ __forceinline__ unsigned* counts(const SortParams& p) const { return p.counts + (head * p.parts.parts + part) * p.codes; }
};

__global__ void __launch_bounds__(kThreads) count_codes_kernel(const __grid_constant__ SortParams p) {
  PartPlace place(p);
  if (!place.exists) return;
  for (int64_t row = place.begin + threadIdx.x % kWarp; row < place.end; row += kWarp) {
    int32_t code = code_of_row(p, place.head, row, place.end);
    if (code >= 0) atomicAdd(place.counts(p) + code, 1u);
  }
}

// Of each code: counts of parts become counts of the parts before, and the code's count goes where its start will be.
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const __grid_constant__ SortParams p) {
  int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= p.heads * p.codes) return;
  int64_t head = number / p.codes, code = number - head * p.codes;
  unsigned* counts = p.counts + head * p.parts.parts * p.codes + code;
  unsigned total = 0;
#pragma unroll 8
  for (int64_t part = 0; part < p.parts.parts; ++part) {
    unsigned count = counts[part * p.codes];
    counts[part * p.codes] = total;
    total += count;
  }
  p.starts[head * (p.codes + 1) + code] = total;
  if (p.totals) p.totals[number] = total;
}

// Of each head: counts of codes become starts.
__global__ void __launch_bounds__(kThreads) start_codes_kernel(const __grid_constant__ SortParams p) {
  __shared__ int64_t shares[kThreads];
  int64_t* starts = p.starts + static_cast<int64_t>(blockIdx.x) * (p.codes + 1);
  int64_t share = ceil_div(p.codes, kThreads), begin = min64(threadIdx.x * share, p.codes), end = min64(begin + share, p.codes), total = 0;
  for (int64_t code = begin; code < end; ++code) total += starts[code];
  shares[threadIdx.x] = total;
  __syncthreads();
  int64_t next = 0;
  for (int thread = 0; thread < static_cast<int>(threadIdx.x); ++thread) next += shares[thread];
  for (int64_t code = begin; code < end; ++code) {
    int64_t count = starts[code];
    starts[code] = next;
    next += count;
  }
  if (threadIdx.x == kThreads - 1) starts[p.codes] = next;
}

__global__ void __launch_bounds__(kThreads) sort_rows_kernel(const __grid_constant__ SortParams p) {
  PartPlace place(p);
  if (!place.exists) return;
  int lane = threadIdx.x % kWarp;
  const int64_t* starts = p.starts + place.head * (p.codes + 1);
  unsigned* counts = place.counts(p);
  for (int64_t first = place.begin; first < place.end; first += kWarp) {
    int64_t row = first + lane;
    int32_t code = code_of_row(p, place.head, row, place.end);
    unsigned peers = __match_any_sync(0xffffffffu, code);
    int before = __popc(peers & ((1u << lane) - 1u));
    unsigned placed = code >= 0 ? counts[code] : 0;
    __syncwarp();
    if (code >= 0 && before == 0) counts[code] = placed + static_cast<unsigned>(__popc(peers));
    __syncwarp();
    if (code < 0) continue;
    int64_t position = place.head * p.rows + starts[code] + placed + before;
    p.order[position] = row;
    p.sorted[position] = code;
  }
}

// The gradient of a loss as a row meets it: elementwise, or one a sample (`stride` 0: one for all), times a factor.
template <class T>
struct LossGradient {
  const T* elements = nullptr;
  const float* samples = nullptr;
  int64_t stride = 0;
  Divider sample_rows{1, 0, 0};

  __device__ __forceinline__ explicit operator bool() const { return elements != nullptr || samples != nullptr; }
};

template <class T>
__device__ __forceinline__ float weight_of_row(const LossGradient<T>& gradient, int64_t row) {
  return gradient.samples ? gradient.samples[quotient(gradient.sample_rows, row) * gradient.stride] : 0.0f;
}

template <class T>
struct SegmentParams {
  SortParams sort;
  RowView x, codebook;  // the codebook where there is a gradient
  LossGradient<T> gradient;
  double factor;
  int64_t dim, pieces;  // of a head
  int width;
  double* partial;  // (heads, pieces, 2, dim)
  Output sums;      // (heads, codes, dim)
};

// The threads that share a piece of a head's sorted rows.
struct PiecePlace {
  int64_t head, piece, begin, end;
  int member;
  const int64_t* starts;

  template <class T>
  __device__ __forceinline__ explicit PiecePlace(const SegmentParams<T>& p) : member(static_cast<int>(threadIdx.x) % p.width) {
    int64_t number = static_cast<int64_t>(blockIdx.x) * (kThreads / p.width) + threadIdx.x / p.width;
    head = min64(number / p.pieces, p.sort.heads - 1);
    piece = number - head * p.pieces;
    starts = p.sort.starts + head * (p.sort.codes + 1);
    begin = piece * kPieceRows;
    end = piece < p.pieces ? min64(begin + kPieceRows, starts[p.sort.codes]) : begin;
  }

  template <class T>
  __device__ __forceinline__ double* partial(const SegmentParams<T>& p, int64_t slot) const {
    return p.partial + (head * p.pieces * 2 + slot) * p.dim;
  }
};

// What a row adds to element d of its code's sum: x, or with a gradient the negative of the loss's slope at x.
template <class T, bool kGradient>
__device__ __forceinline__ double term_of_row(const SegmentParams<T>& p, int64_t head, int64_t row, int64_t d, double code) {
  double x = to_double(static_cast<const T*>(p.x.data)[row_offset(p.x, head, row) + d]);
  if (!kGradient) return x;
  int64_t number = head * p.sort.rows + row;
  float weight = p.gradient.elements ? widen(p.gradient.elements[number * p.dim + d]) : weight_of_row(p.gradient, number);
  return static_cast<double>(weight) * (code - x);
}

template <class T, bool kGradient>
__global__ void __launch_bounds__(kThreads) sum_pieces_kernel(const __grid_constant__ SegmentParams<T> p) {
  PiecePlace place(p);
  const int64_t* order = p.sort.order + place.head * p.sort.rows;
  const int32_t* sorted = p.sort.sorted + place.head * p.sort.rows;
  for (int64_t d = place.member; d < p.dim; d += p.width) {
    for (int64_t i = place.begin; i < place.end;) {
      int64_t code = sorted[i], start = place.starts[code], end = place.starts[code + 1], stop = min64(end, place.end);
      double value = kGradient ? wide_element(p.codebook, row_offset(p.codebook, place.head, code) + d) : 0.0, total = 0.0;
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

// The piece in which a code that crosses pieces begins puts it together.
template <class T>
__global__ void __launch_bounds__(kThreads) join_pieces_kernel(const __grid_constant__ SegmentParams<T> p) {
  PiecePlace place(p);
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
