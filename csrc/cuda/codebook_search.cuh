// The exact search for nearest codes. A float32 product screens all codes: a row whose best score is the smallest even by the bounds of
// all errors is decided. Other rows go on a worklist, and a second kernel decides them in float64, and where that is too close in exact
// arithmetic. The order of the list is that of a race; no row's result depends on it.
#pragma once

#include "../common/codebook.h"
#include "codebook_partition.h"
#include "reduce.cuh"

namespace fastvae {

// (heads, rows, dim) with any distance between heads and rows; the elements of a row are contiguous.
struct RowView {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t head_stride = 0, row_stride = 0;
  bool vector = false;  // each row is aligned to vectors
};

FASTVAE_INLINE int64_t row_offset(const RowView& rows, int64_t head, int64_t row) {
  return head * rows.head_stride + row * rows.row_stride;
}

__device__ __forceinline__ double to_double(double x) { return x; }
template <class T>
__device__ __forceinline__ double to_double(T x) {
  return static_cast<double>(widen(x));
}

__device__ __forceinline__ double wide_element(const RowView& rows, int64_t index) {
  switch (rows.dtype) {
    case DType::float32:
      return to_double(static_cast<const float*>(rows.data)[index]);
    case DType::bfloat16:
      return to_double(static_cast<const BFloat16*>(rows.data)[index]);
    case DType::float16:
      return to_double(static_cast<const Half*>(rows.data)[index]);
    default:
      return static_cast<const double*>(rows.data)[index];
  }
}

__device__ __forceinline__ void load(const RowView& rows, int64_t index, int count, bool fast, float (&to)[kVector]) {
  switch (rows.dtype) {
    case DType::float32:
      return load(static_cast<const float*>(rows.data) + index, count, fast, to);
    case DType::bfloat16:
      return load(static_cast<const BFloat16*>(rows.data) + index, count, fast, to);
    case DType::float16:
      return load(static_cast<const Half*>(rows.data) + index, count, fast, to);
    default:
      return load(static_cast<const double*>(rows.data) + index, count, fast, to);
  }
}

// A thread's place among those that share a row: `width` adjacent ones, a power of two up to a warp.
struct Group {
  int width, member, number, count;

  __device__ __forceinline__ explicit Group(int width)
      : width(width),
        member(static_cast<int>(threadIdx.x) % width),
        number(static_cast<int>(threadIdx.x) / width),
        count(kThreads / width) {}
};

// The codes as the screen reads them: the mean subtracted, times a power of two. Codes that are not finite, those equal to an earlier one,
// and padding are 0 and never nearest.
struct PackedCodes {
  CodeLayout layout;
  RowView source;
  ScoreErrors errors;
  int width;           // threads that share a code
  float* mean;         // (heads, padded dim)
  unsigned* exponent;  // (heads): that of the largest norm above kExponentZero; 0 where all norms are
  unsigned* table;     // (heads, slots): the lowest code of those that share a slot
  unsigned* slot;      // (heads, padded codes): of a code in the table
  float* elements;     // (heads, padded codes * padded dim)
  // (heads, padded codes). A score less the bound of its error is start - slope |x| - x.c, the bound error + slope |x|.
  float *start, *slope, *error;
};

constexpr unsigned kNone = 0xffffffffu;
constexpr unsigned kExponentZero = 2048;
constexpr int kMostScale = 120;  // the exponent of a factor that is, as its reciprocal, a normal float

FASTVAE_INLINE int largest_exponent(unsigned stored) { return stored == 0 ? 0 : static_cast<int>(stored - kExponentZero); }

FASTVAE_INLINE double scale_of(unsigned stored) {
  return power_of_two(static_cast<int>(max64(min64(-largest_exponent(stored), kMostScale), -kMostScale)));
}

// Rows that the screen leaves, numbered over the heads.
struct Worklist {
  unsigned long long* count;
  int64_t* rows;
};

struct PackParams {
  PackedCodes codes;
  unsigned long long* listed;
};

// Any vector would do; one near to all codes makes their norms, and with them the errors, small. Also clears what later kernels count in.
__global__ void __launch_bounds__(kThreads) code_mean_kernel(const __grid_constant__ PackParams p) {
  const CodeLayout& layout = p.codes.layout;
  int64_t groups = ceil_div(layout.padded_dim, kWarp), head = blockIdx.x / groups;
  int64_t d = (blockIdx.x - head * groups) * kWarp + threadIdx.x % kWarp;
  int64_t step = max64(layout.codes / kMeanCodes, 1), count = ceil_div(layout.codes, step);
  double total = 0.0;
  if (d < layout.dim)
    for (int64_t i = threadIdx.x / kWarp; i < count; i += kWarps) {
      double value = wide_element(p.codes.source, row_offset(p.codes.source, head, i * step) + d);
      total += is_finite(value) ? value : 0.0;
    }
  total = column_block_sum(total, kWarp);
  float mean = static_cast<float>(total / static_cast<double>(count));
  if (threadIdx.x < kWarp && d < layout.padded_dim) p.codes.mean[head * layout.padded_dim + d] = is_finite(mean) ? mean : 0.0f;
  if (d == 0 && threadIdx.x == 0) {
    p.codes.exponent[head] = 0;
    if (head == 0) *p.listed = 0;
  }
}

// A group's code, numbered over the heads.
struct CodePlace {
  int64_t head, code;

  __device__ __forceinline__ CodePlace(const CodeLayout& layout, const Group& group) {
    int64_t blocks = ceil_div(layout.padded_codes, group.count);
    head = blockIdx.x / blocks;
    code = (blockIdx.x - head * blocks) * group.count + group.number;
  }
};

// The largest norm, and the lowest code of each hash.
__global__ void __launch_bounds__(kThreads) measure_codes_kernel(const __grid_constant__ PackParams p) {
  const CodeLayout& layout = p.codes.layout;
  Group group(p.codes.width);
  CodePlace place(layout, group);
  const float* mean = p.codes.mean + place.head * layout.padded_dim;
  double square = 0.0;
  unsigned long long hash = 0;
  if (place.code < layout.codes) {
    int64_t first = row_offset(p.codes.source, place.head, place.code);
    for (int64_t d = group.member; d < layout.dim; d += group.width) {
      double value = wide_element(p.codes.source, first + d), centred = value - mean[d];
      square += centred * centred;
      hash += hash_of_element(value, d);
    }
  }
  square = warp_sum(square, group.width);
  hash = warp_sum(hash, group.width);
  if (group.member != 0 || place.code >= layout.padded_codes) return;
  bool usable = place.code < layout.codes && is_finite(square);
  unsigned slot = static_cast<unsigned>(hash ^ (hash >> 31)) & (layout.slots - 1);
  p.codes.slot[place.head * layout.padded_codes + place.code] = usable ? slot : kNone;
  if (!usable) return;
  atomicMin(p.codes.table + place.head * layout.slots + slot, static_cast<unsigned>(place.code));
  if (square > 0.0) atomicMax(p.codes.exponent + place.head, kExponentZero + static_cast<unsigned>(norm_exponent(::sqrt(square))));
}

__device__ __forceinline__ bool differs_from(const PackedCodes& codes, const CodePlace& place, int64_t other, const Group& group) {
  int64_t first = row_offset(codes.source, place.head, place.code), second = row_offset(codes.source, place.head, other);
  int differs = 0;
  if (other != place.code)
    for (int64_t d = group.member; d < codes.layout.dim; d += group.width)
      differs |= wide_element(codes.source, first + d) != wide_element(codes.source, second + d);
  return warp_sum(differs, group.width) != 0;
}

__global__ void __launch_bounds__(kThreads) pack_codes_kernel(const __grid_constant__ PackParams p) {
  const CodeLayout& layout = p.codes.layout;
  Group group(p.codes.width);
  CodePlace place(layout, group);
  int64_t number = place.head * layout.padded_codes + place.code;
  unsigned slot = place.code < layout.padded_codes ? p.codes.slot[number] : kNone;
  int64_t lowest = slot != kNone ? p.codes.table[place.head * layout.slots + slot] : place.code;
  bool differs = differs_from(p.codes, place, lowest, group);
  bool used = slot != kNone && (lowest == place.code || differs);
  double scale = scale_of(p.codes.exponent[place.head]), square = 0.0;
  const float* mean = p.codes.mean + place.head * layout.padded_dim;
  float* elements = p.codes.elements + place.head * layout.padded_codes * layout.padded_dim;
  int64_t first = row_offset(p.codes.source, place.head, place.code);
  if (place.code < layout.padded_codes)
    for (int64_t d = group.member; d < layout.padded_dim; d += group.width) {
      double value = used && d < layout.dim ? (wide_element(p.codes.source, first + d) - mean[d]) * scale : 0.0;
      square += value * value;
      elements[code_element(layout, place.code, d)] = static_cast<float>(value);
    }
  square = warp_sum(square, group.width);
  if (group.member != 0 || place.code >= layout.padded_codes) return;
  float half_norm = static_cast<float>(0.5 * square), norm = static_cast<float>(::sqrt(square) * (1.0 + 1e-6));
  float error = score_error(p.codes.errors, half_norm, norm, 0.0f), start = half_norm - error;
  // Codes too large for float32 are not screened, but they are there.
  p.codes.start[number] = !used ? kNeverNearest : start < kNeverNearest ? start : 0.0f;
  p.codes.slope[number] = p.codes.errors.rounding * norm;
  p.codes.error[number] = error;
}

template <class T>
struct ScreenParams {
  const T* x;
  RowView view;  // of x
  int64_t rows;
  ScreenGrid grid;
  PackedCodes codes;
  // (splits, tiles, rows of a tile): what each split's block leaves for the last of a tile's blocks.
  float *least, *second;
  int32_t* code;
  unsigned* tickets;
  int64_t* indices;
  Worklist worklist;
};

// A block's rows and codes.
struct ScreenPlace {
  int64_t tile, head, first_row, first_code, end_code;

  template <class T>
  __device__ __forceinline__ explicit ScreenPlace(const ScreenParams<T>& p) {
    tile = blockIdx.x;
    head = tile / p.grid.tiles_per_head;
    first_row = (tile - head * p.grid.tiles_per_head) * p.grid.tile_rows;
    first_code = blockIdx.y * p.grid.codes_per_split;
    end_code = min64(first_code + p.grid.codes_per_split, p.codes.layout.padded_codes);
  }
};

// Four elements of a row, centred and scaled; the rest of a row is 0.
template <class T>
__device__ __forceinline__ void load_centred(const ScreenParams<T>& p, const T* row, bool inside, int64_t d, const float* mean, float scale,
                                             float* to) {
  int count = inside ? static_cast<int>(max64(min64(p.codes.layout.dim - d, kVector), 0)) : 0;
  float raw[kVector];
  load(row + d, count, p.view.vector && count == kVector, raw);
  Vector<float> centre = *reinterpret_cast<const Vector<float>*>(mean + d);
  for (int k = 0; k < kVector; ++k) to[k] = (raw[k] - centre.v[k]) * scale;
}

template <class T>
__device__ __forceinline__ void decide(const ScreenParams<T>& p, int64_t head, int64_t row, const Best& best, float norm) {
  const PackedCodes& codes = p.codes;
  int64_t number = head * p.rows + row, k = head * codes.layout.padded_codes + best.code;
  bool screened = norm < kLargestRow && largest_exponent(codes.exponent[head]) <= kMostScale;
  p.indices[number] = best.code;
  if (!screened || !is_separated(best, fma(codes.slope[k], norm, codes.error[k])))
    p.worklist.rows[atomicAdd(p.worklist.count, 1ull)] = number;
}

// A thread's rows are first_row + thread + i kThreads.
template <class T, int kCount>
__device__ __forceinline__ void settle(const ScreenParams<T>& p, const ScreenPlace& place, Best (&best)[kCount],
                                       const float (&norm)[kCount]) {
  if (p.grid.splits > 1) {
    int64_t stride = p.grid.tiles * p.grid.tile_rows, first = place.tile * p.grid.tile_rows + threadIdx.x;
    for (int i = 0; i < kCount; ++i) {
      int64_t slot = blockIdx.y * stride + first + i * kThreads;
      p.least[slot] = best[i].least;
      p.second[slot] = best[i].second;
      p.code[slot] = best[i].code;
    }
    if (!is_last_block(p.tickets + place.tile, static_cast<unsigned>(p.grid.splits))) return;
    for (int i = 0; i < kCount; ++i) {
      best[i] = no_best();
      for (int64_t split = 0; split < p.grid.splits; ++split) {
        int64_t slot = split * stride + first + i * kThreads;
        merge_best(best[i], {__ldcg(p.least + slot), __ldcg(p.second + slot), __ldcg(p.code + slot)});
      }
    }
  }
  for (int i = 0; i < kCount; ++i) {
    int64_t row = place.first_row + threadIdx.x + i * kThreads;
    if (row < p.rows) decide(p, place.head, row, best[i], norm[i]);
  }
}

// Rows of at most kDim elements: a thread holds some of them whole, and the codes pass by in shared memory.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 4) screen_short_kernel(const __grid_constant__ ScreenParams<T> p) {
  struct Codes {
    alignas(16) float elements[kShortCodes * kDim];
    float start[kShortCodes], slope[kShortCodes];
  };
  __shared__ Codes codes;
  ScreenPlace place(p);
  const float* mean = p.codes.mean + place.head * kDim;
  float scale = static_cast<float>(scale_of(p.codes.exponent[place.head]));
  float x[kShortRows][kDim], norm[kShortRows];
  Best best[kShortRows];
#pragma unroll
  for (int i = 0; i < kShortRows; ++i) {
    int64_t row = place.first_row + threadIdx.x + i * kThreads;
    float square = 0.0f;
#pragma unroll
    for (int d = 0; d < kDim; d += kVector)
      load_centred(p, p.x + row_offset(p.view, place.head, row), row < p.rows, d, mean, scale, x[i] + d);
#pragma unroll
    for (int d = 0; d < kDim; ++d) square = fma(x[i][d], x[i][d], square);
    norm[i] = norm_at_least(p.codes.errors, square);
    best[i] = no_best();
  }
  for (int64_t base = place.first_code; base < place.end_code; base += kShortCodes) {
    int count = static_cast<int>(min64(place.end_code - base, kShortCodes));
    int64_t first = place.head * p.codes.layout.padded_codes + base;
    for (int v = threadIdx.x * kVector; v < count * kDim; v += kThreads * kVector)
      *reinterpret_cast<Vector<float>*>(codes.elements + v) = *reinterpret_cast<const Vector<float>*>(p.codes.elements + first * kDim + v);
    for (int k = threadIdx.x; k < count; k += kThreads) {
      codes.start[k] = p.codes.start[first + k];
      codes.slope[k] = p.codes.slope[first + k];
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      float product[kShortRows] = {};
#pragma unroll
      for (int d = 0; d < kDim; d += kVector) {
        Vector<float> code = *reinterpret_cast<const Vector<float>*>(codes.elements + k * kDim + d);
#pragma unroll
        for (int i = 0; i < kShortRows; ++i)
          for (int j = 0; j < kVector; ++j) product[i] = fma(x[i][d + j], code.v[j], product[i]);
      }
#pragma unroll
      for (int i = 0; i < kShortRows; ++i)
        keep_best(best[i], codes.start[k] - fma(codes.slope[k], norm[i], product[i]), static_cast<int32_t>(base) + k);
    }
    __syncthreads();
  }
  settle(p, place, best, norm);
}

constexpr int kThreadRows = 8, kThreadCodes = 8;  // of a tile: two vectors of each, half a tile apart
constexpr int kThreadsAcross = kTileCodes / kThreadCodes;
static_assert(kThreadsAcross * (kTileRows / kThreadRows) == kThreads && kTileRows == kThreads, "a thread loads a row and holds its scores");

template <int kSide>
__device__ __forceinline__ int tile_element(int place, int i) {
  return i / kVector * (kSide / 2) + place * kVector + i % kVector;
}

struct TileBuffer {
  alignas(16) float rows[kTileDepth][kTileRows];
  alignas(16) float codes[kTileDepth][kTileCodes];
};

template <int kSide>
__device__ __forceinline__ void load_side(const float (&from)[kSide], int place, float (&to)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vector<float> vector = *reinterpret_cast<const Vector<float>*>(from + tile_element<kSide>(place, half * kVector));
    for (int k = 0; k < kVector; ++k) to[half * kVector + k] = vector.v[k];
  }
}

// What a thread brings to a buffer: some dimensions of its row, and a vector of codes.
struct Carried {
  float row[kTileDepth];
  Vector<float> codes;
};
static_assert(kTileDepth * kTileCodes == kThreads * kVector, "a thread carries one vector of codes");

__device__ __forceinline__ void put(const Carried& carried, TileBuffer& buffer) {
#pragma unroll
  for (int step = 0; step < kTileDepth; ++step) buffer.rows[step][threadIdx.x] = carried.row[step];
  int element = threadIdx.x * kVector;
  *reinterpret_cast<Vector<float>*>(&buffer.codes[element / kTileCodes][element % kTileCodes]) = carried.codes;
}

__device__ __forceinline__ void multiply(const TileBuffer& buffer, int down, int across, float (&score)[kThreadRows][kThreadCodes]) {
#pragma unroll
  for (int step = 0; step < kTileDepth; ++step) {
    float row[kThreadRows], code[kThreadCodes];
    load_side(buffer.rows[step], down, row);
    load_side(buffer.codes[step], across, code);
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadCodes; ++j) score[i][j] = fma(row[i], code[j], score[i][j]);
  }
}

// Longer rows: tiles of scores in registers, whose operands pass by in shared memory.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) screen_kernel(const __grid_constant__ ScreenParams<T> p) {
  struct Shared {
    TileBuffer buffers[2];
    float norms[kTileRows];
    Best best[kTileRows];
  };
  __shared__ Shared shared;
  ScreenPlace place(p);
  const CodeLayout& layout = p.codes.layout;
  int across = threadIdx.x % kThreadsAcross, down = threadIdx.x / kThreadsAcross;
  int64_t row = place.first_row + threadIdx.x, first = place.head * layout.padded_codes;
  const T* x = p.x + row_offset(p.view, place.head, row);
  const float* mean = p.codes.mean + place.head * layout.padded_dim;
  float scale = static_cast<float>(scale_of(p.codes.exponent[place.head])), norm = 0.0f;
  Best best[kThreadRows];
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) best[i] = no_best();
  for (int64_t base = place.first_code; base < place.end_code; base += kTileCodes) {
    const float* panel = p.codes.elements + (first + base) * layout.padded_dim + threadIdx.x * kVector;
    Carried carried;
    auto carry = [&](int64_t d) {
#pragma unroll
      for (int k = 0; k < kTileDepth; k += kVector) load_centred(p, x, row < p.rows, d + k, mean, scale, carried.row + k);
      carried.codes = *reinterpret_cast<const Vector<float>*>(panel + d * kTileCodes);
    };
    float score[kThreadRows][kThreadCodes] = {}, square = 0.0f;
    carry(0);
    for (int64_t d = 0; d < layout.padded_dim; d += kTileDepth) {
      TileBuffer& buffer = shared.buffers[d / kTileDepth % 2];
      put(carried, buffer);
#pragma unroll
      for (int k = 0; k < kTileDepth; ++k) square = fma(carried.row[k], carried.row[k], square);
      __syncthreads();
      if (d + kTileDepth < layout.padded_dim) carry(d + kTileDepth);
      multiply(buffer, down, across, score);
    }
    norm = norm_at_least(p.codes.errors, square);
    shared.norms[threadIdx.x] = norm;
    // Also before the next tile's first buffer is filled.
    __syncthreads();
    float row_norm[kThreadRows];
    load_side(shared.norms, down, row_norm);
#pragma unroll
    for (int j = 0; j < kThreadCodes; ++j) {
      int64_t code = base + tile_element<kTileCodes>(across, j);
      float start = p.codes.start[first + code], slope = p.codes.slope[first + code];
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) keep_best(best[i], start - fma(slope, row_norm[i], score[i][j]), static_cast<int32_t>(code));
    }
  }
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int mask = kThreadsAcross / 2; mask > 0; mask /= 2) {
      float other_least = __shfl_xor_sync(0xffffffffu, best[i].least, mask),
            other_second = __shfl_xor_sync(0xffffffffu, best[i].second, mask);
      merge_best(best[i], {other_least, other_second, __shfl_xor_sync(0xffffffffu, best[i].code, mask)});
    }
    if (across == 0) shared.best[tile_element<kTileRows>(down, i)] = best[i];
  }
  __syncthreads();
  Best mine[1] = {shared.best[threadIdx.x]};
  float my_norm[1] = {norm};
  settle(p, place, mine, my_norm);
}

struct RecheckParams {
  RowView x;
  Divider rows;
  PackedCodes codes;
  Worklist worklist;
  double* buffers;  // (blocks, 3, dim)
  int64_t* indices;
};

template <class C>
__device__ __forceinline__ double distance_to(const RecheckParams& p, const double* x, int64_t head, int64_t code, const Group& group) {
  const CodeLayout& layout = p.codes.layout;
  double total = 0.0;
  bool used = code < layout.codes && p.codes.start[head * layout.padded_codes + code] < kNeverNearest;
  if (used) {
    const C* from = static_cast<const C*>(p.codes.source.data) + row_offset(p.codes.source, head, code);
    for (int64_t d = group.member; d < layout.dim; d += group.width) {
      double difference = x[d] - to_double(from[d]);
      total = fma(difference, difference, total);
    }
  }
  total = warp_sum(total, group.width);
  return used ? total : static_cast<double>(INFINITY);
}

// A row as doubles; whether all are finite. Every thread of the block calls it.
__device__ __forceinline__ bool widen_row(const RowView& rows, int64_t head, int64_t row, int64_t dim, double* to) {
  int64_t first = row_offset(rows, head, row);
  int strange = 0;
  for (int64_t d = threadIdx.x; d < dim; d += kThreads) {
    to[d] = wide_element(rows, first + d);
    strange |= !is_finite(to[d]);
  }
  return block_sum(strange) == 0;
}

// Which of the codes at most `bound` away is the nearest, the lowest where several are.
template <class C>
__device__ __forceinline__ int64_t decide_exactly(const RecheckParams& p, double* x, int64_t head, double bound, const Group& group) {
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
      widen_row(p.codes.source, head, base + i, dim, other);
      if (nearest >= 0) {
        if (threadIdx.x == 0) order = compare_distances(x, other, best, dim, exact);
        __syncthreads();
        if (order >= 0) continue;
      }
      nearest = base + i;
      double* former = best;
      best = other;
      other = former;
    }
    __syncthreads();
  }
  return nearest;
}

__device__ __forceinline__ double block_least(double value) {
  __shared__ double parts[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmin(value, __shfl_xor_sync(0xffffffffu, value, offset));
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  double result = parts[0];
  for (int warp = 1; warp < kWarps; ++warp) result = fmin(result, parts[warp]);
  __syncthreads();
  return result;
}

template <class C>
__global__ void __launch_bounds__(kThreads, 8) recheck_kernel(const __grid_constant__ RecheckParams p) {
  Group group(p.codes.width);
  int64_t dim = p.codes.layout.dim;
  double* x = p.buffers + blockIdx.x * 3 * dim;
  unsigned long long count = *p.worklist.count;
  for (unsigned long long entry = blockIdx.x; entry < count; entry += gridDim.x) {
    int64_t number = p.worklist.rows[entry], head = quotient(p.rows, number);
    __syncthreads();
    bool finite = widen_row(p.x, head, number - head * p.rows.divisor, dim, x);
    if (!finite) {
      if (threadIdx.x == 0) p.indices[number] = 0;
      continue;
    }
    double least = INFINITY, second = INFINITY;
    int64_t nearest = 0;
    for (int64_t base = 0; base < p.codes.layout.codes; base += group.count) {
      double distance = distance_to<C>(p, x, head, base + group.number, group);
      second = fmin(second, fmax(least, distance));
      nearest = distance < least ? base + group.number : nearest;
      least = fmin(least, distance);
    }
    double bound = near_tie(block_least(least), dim);
    bool speaks = group.member == 0 && is_finite(bound);
    int close = block_sum(speaks ? (least <= bound) + (second <= bound) : 0);
    if (close == 0) {
      if (threadIdx.x == 0) p.indices[number] = 0;
    } else if (close == 1) {
      if (speaks && least <= bound) p.indices[number] = nearest;
    } else {
      nearest = decide_exactly<C>(p, x, head, bound, group);
      if (threadIdx.x == 0) p.indices[number] = nearest;
    }
  }
}

}  // namespace fastvae
