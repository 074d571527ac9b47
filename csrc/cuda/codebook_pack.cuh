// The kernels that pack the codes for the screen.
//
// kernel                   grid                             reads                       writes
// codebook_mean_kernel     (heads * groups of 32 columns)   codebook                    mean; 0 to exponent and worklist_count
// codebook_measure_kernel  (heads * blocks of codes)        codebook, mean              exponent, table, slot
// codebook_pack_kernel     (heads * blocks of codes)        codebook and all of these   elements, start, slope, error
//
// A code that is equal to an earlier one is left out of the search, because every row would have to decide between them exactly, which
// would make an untrained codebook of equal codes slow. The hash table finds such codes; the host fills it with 0xff.
#pragma once

#include "../common/codebook_formulas.h"
#include "codebook_device.cuh"
#include "codebook_partition.h"

namespace fastvae {

// The codes as the screen reads them: minus their mean, times a power of two. Codes that are not finite, codes that are equal to an earlier
// one, and padding are 0 and never nearest.
struct PackedCodebook {
  CodebookLayout layout;
  CodebookView source;  // (heads, codes, dim)
  ScoreErrorBounds errors;
  int width;           // threads that share a code
  float* mean;         // (heads, padded dim)
  unsigned* exponent;  // (heads,): kExponentZero + the exponent of the largest norm, or 0 where all norms are 0
  unsigned* table;     // (heads, slots): the lowest code whose hash is the slot
  unsigned* slot;      // (heads, padded codes): the slot of a code, or kNoSlot where it is not finite or padding
  float* elements;     // (heads, padded codes * padded dim), see CodebookLayout
  // (heads, padded codes): the bound of a score's error is error + slope |x|, and the score less that is start - slope |x| - x.c.
  float *start, *slope, *error;
};

constexpr unsigned kNoSlot = 0xffffffffu;
constexpr unsigned kExponentZero = 2048;  // keeps stored exponents positive, so that atomicMax() of unsigned numbers orders them
constexpr int kMaxScaleExponent = 120;    // up to it a power of two and its reciprocal are normal floats

FASTVAE_INLINE int max_norm_exponent(unsigned stored) { return stored == 0 ? 0 : static_cast<int>(stored - kExponentZero); }

FASTVAE_INLINE double scale_of(unsigned stored) {
  return power_of_two(static_cast<int>(max64(min64(-max_norm_exponent(stored), kMaxScaleExponent), -kMaxScaleExponent)));
}

struct CodebookPackParams {
  PackedCodebook codes;
  unsigned long long* worklist_count;  // scalar
};

// Computes the mean of some codes of a head and clears the counters of later kernels. Subtracting any vector from rows and codes leaves the
// distances as they are; a vector near all codes makes the norms small, and with them the rounding errors.
__global__ void __launch_bounds__(kThreads) codebook_mean_kernel(const __grid_constant__ CodebookPackParams p) {
  const CodebookLayout& layout = p.codes.layout;
  int64_t groups = ceil_div(layout.padded_dim, kWarp), head = blockIdx.x / groups;
  int64_t d = (blockIdx.x - head * groups) * kWarp + threadIdx.x % kWarp;
  int64_t step = max64(layout.codes / kMeanCodes, 1), count = ceil_div(layout.codes, step);
  double total = 0.0;
  if (d < layout.dim)
    for (int64_t i = threadIdx.x / kWarp; i < count; i += kWarps) {
      double value = element_as_double(p.codes.source, p.codes.source.offset(head, i * step) + d);
      total += is_finite(value) ? value : 0.0;
    }
  total = column_block_sum(total, kWarp);
  float mean = static_cast<float>(total / static_cast<double>(count));
  if (threadIdx.x < kWarp && d < layout.padded_dim) p.codes.mean[head * layout.padded_dim + d] = is_finite(mean) ? mean : 0.0f;
  if (d == 0 && threadIdx.x == 0) {
    p.codes.exponent[head] = 0;
    if (head == 0) *p.worklist_count = 0;
  }
}

// The code that a group of threads handles.
struct CodebookCode {
  int64_t head, code;

  __device__ __forceinline__ CodebookCode(const CodebookLayout& layout, const ThreadGroup& group) {
    int64_t blocks = ceil_div(layout.padded_codes, group.count);
    head = blockIdx.x / blocks;
    code = (blockIdx.x - head * blocks) * group.count + group.number;
  }
};

// Computes the exponent of the largest norm, the hash table, and the slot of each code.
__global__ void __launch_bounds__(kThreads) codebook_measure_kernel(const __grid_constant__ CodebookPackParams p) {
  const CodebookLayout& layout = p.codes.layout;
  ThreadGroup group(p.codes.width);
  CodebookCode place(layout, group);
  const float* mean = p.codes.mean + place.head * layout.padded_dim;
  double square = 0.0;
  unsigned long long hash = 0;
  if (place.code < layout.codes) {
    int64_t first = p.codes.source.offset(place.head, place.code);
    for (int64_t d = group.member; d < layout.dim; d += group.width) {
      double value = element_as_double(p.codes.source, first + d), centred = value - mean[d];
      square += centred * centred;
      hash += hash_of_element(value, d);
    }
  }
  square = warp_sum(square, group.width);
  hash = warp_sum(hash, group.width);
  if (group.member != 0 || place.code >= layout.padded_codes) return;
  bool usable = place.code < layout.codes && is_finite(square);
  unsigned slot = static_cast<unsigned>(hash ^ (hash >> 31)) & (layout.slots - 1);
  p.codes.slot[place.head * layout.padded_codes + place.code] = usable ? slot : kNoSlot;
  if (!usable) return;
  atomicMin(p.codes.table + place.head * layout.slots + slot, static_cast<unsigned>(place.code));
  if (square > 0.0) atomicMax(p.codes.exponent + place.head, kExponentZero + static_cast<unsigned>(norm_exponent(::sqrt(square))));
}

// Whether the group's code and the code `other` differ.
__device__ __forceinline__ bool differs_from(const PackedCodebook& codes, const CodebookCode& place, int64_t other,
                                             const ThreadGroup& group) {
  int64_t first = codes.source.offset(place.head, place.code), second = codes.source.offset(place.head, other);
  int differs = 0;
  if (other != place.code)
    for (int64_t d = group.member; d < codes.layout.dim; d += group.width)
      differs |= element_as_double(codes.source, first + d) != element_as_double(codes.source, second + d);
  return warp_sum(differs, group.width) != 0;
}

// Packs the codes, and computes the terms of their scores and error bounds.
__global__ void __launch_bounds__(kThreads) codebook_pack_kernel(const __grid_constant__ CodebookPackParams p) {
  const CodebookLayout& layout = p.codes.layout;
  ThreadGroup group(p.codes.width);
  CodebookCode place(layout, group);
  int64_t number = place.head * layout.padded_codes + place.code;
  unsigned slot = place.code < layout.padded_codes ? p.codes.slot[number] : kNoSlot;
  int64_t lowest = slot != kNoSlot ? p.codes.table[place.head * layout.slots + slot] : place.code;
  bool differs = differs_from(p.codes, place, lowest, group);
  bool used = slot != kNoSlot && (lowest == place.code || differs);
  double scale = scale_of(p.codes.exponent[place.head]), square = 0.0;
  const float* mean = p.codes.mean + place.head * layout.padded_dim;
  float* elements = p.codes.elements + place.head * layout.padded_codes * layout.padded_dim;
  int64_t first = p.codes.source.offset(place.head, place.code);
  if (place.code < layout.padded_codes)
    for (int64_t d = group.member; d < layout.padded_dim; d += group.width) {
      double value = used && d < layout.dim ? (element_as_double(p.codes.source, first + d) - mean[d]) * scale : 0.0;
      square += value * value;
      elements[code_element(layout, place.code, d)] = static_cast<float>(value);
    }
  square = warp_sum(square, group.width);
  if (group.member != 0 || place.code >= layout.padded_codes) return;
  float half_norm = static_cast<float>(0.5 * square), norm = code_norm_upper_bound(p.codes.errors, ::sqrt(square));
  float error = score_error_bound(p.codes.errors, half_norm, norm, 0.0f), start = half_norm - error;
  // A start that float32 cannot represent becomes 0: the code stays in the search, and decide_row() sends all rows to the worklist.
  p.codes.start[number] = !used ? kNeverNearest : start < kNeverNearest ? start : 0.0f;
  p.codes.slope[number] = p.codes.errors.rounding * norm;
  p.codes.error[number] = error;
}

}  // namespace fastvae
