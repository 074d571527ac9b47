// The screen of the exact search for the nearest codes: scores of all codes in float32. A row whose best score is the smallest even by the
// rounding error bounds of all scores is decided; the others go on a worklist, which codebook_recheck.cuh decides. The order of the
// worklist is that of a race between blocks, but no row's result depends on it.
//
// kernel                        grid             reads                         writes
// codebook_screen_short_kernel  (tiles, splits)  x, the packed codes           indices, worklist
// codebook_screen_kernel        (tiles, splits)  the same                      the same
//
// The short kernel serves rows of up to kShortDim elements. See CodebookScreenGrid for tiles and splits; the last block of a tile merges
// the results of its splits.
#pragma once

#include "codebook_pack.cuh"

namespace fastvae {

// A row that the screen could not decide.
struct alignas(16) CodebookListedRow {
  int64_t row;          // numbered over the heads
  float bound;          // an upper bound of the score of the code that the screen found
  int32_t second_code;  // the only other code that can be the nearest, or one of the constants below
};

// The second_code of a row for which several codes can be the nearest beside the one that the screen found, and of one whose scores could
// overflow, or which is not finite.
constexpr int32_t kSeveralCodes = -1, kNotScreened = -2;

struct CodebookWorklist {
  unsigned long long* count;  // scalar
  CodebookListedRow* rows;    // (heads * rows,), of which the first `count` are set
};

template <class T>
struct CodebookScreenParams {
  const T* x;         // (heads, rows, dim)
  CodebookView view;  // the strides of x
  int64_t rows;
  CodebookScreenGrid grid;
  PackedCodebook codes;
  NearestTwo* partial;  // (splits, tiles, rows of a tile), for the last block of a tile
  unsigned* tickets;    // (tiles,)
  int64_t* indices;     // (heads, rows)
  CodebookWorklist worklist;
};

// The rows and the codes that a block handles.
struct CodebookScreenTile {
  int64_t tile, head, first_row, first_code, end_code;

  template <class T>
  __device__ __forceinline__ explicit CodebookScreenTile(const CodebookScreenParams<T>& p) {
    tile = blockIdx.x;
    head = tile / p.grid.tiles_per_head;
    first_row = (tile - head * p.grid.tiles_per_head) * p.grid.tile_rows;
    first_code = blockIdx.y * p.grid.codes_per_split;
    end_code = min64(first_code + p.grid.codes_per_split, p.codes.layout.padded_codes);
  }
};

// Loads kVector elements of a row, minus the mean and scaled; elements beyond the row are 0, because the packed mean is 0 there.
template <class T>
__device__ __forceinline__ void load_centred(const CodebookScreenParams<T>& p, const T* row, bool inside, int64_t d, const float* mean,
                                             float scale, float* to) {
  int count = inside ? static_cast<int>(max64(min64(p.codes.layout.dim - d, kVector), 0)) : 0;
  float raw[kVector];
  load(row + d, count, p.view.aligned && count == kVector, raw);
  Vector<float> centre = *reinterpret_cast<const Vector<float>*>(mean + d);
  for (int k = 0; k < kVector; ++k) to[k] = (raw[k] - centre.v[k]) * scale;
}

// Writes the index of a row and, where the error bounds leave other codes, adds the row to the worklist.
template <class T>
__device__ __forceinline__ void decide_row(const CodebookScreenParams<T>& p, int64_t head, int64_t row, const NearestTwo& best,
                                           float norm) {
  const PackedCodebook& codes = p.codes;
  int64_t number = head * p.rows + row, k = head * codes.layout.padded_codes + best.code;
  bool screened = norm < kMaxRowNorm && max_norm_exponent(codes.exponent[head]) <= kMaxScaleExponent;
  float bound = best.smallest + 2.0f * fma(codes.slope[k], norm, codes.error[k]);
  p.indices[number] = best.code;
  if (screened && best.second > bound && best.rest > bound) return;
  CodebookListedRow listed{number, bound, !screened ? kNotScreened : best.rest > bound ? best.second_code : kSeveralCodes};
  p.worklist.rows[atomicAdd(p.worklist.count, 1ull)] = listed;
}

// Loads what another block has written.
__device__ __forceinline__ NearestTwo load_past_l1(const NearestTwo* from) {
  return {__ldcg(&from->smallest), __ldcg(&from->second), __ldcg(&from->rest), __ldcg(&from->code), __ldcg(&from->second_code)};
}

// Decides the rows of a tile. With several splits every block stores its scores, and the last block of the tile merges them. Row i of a
// thread is first_row + thread + i * kThreads.
template <class T, int kCount>
__device__ __forceinline__ void finish_rows(const CodebookScreenParams<T>& p, const CodebookScreenTile& place, NearestTwo (&best)[kCount],
                                            const float (&norm)[kCount]) {
  if (p.grid.splits > 1) {
    int64_t stride = p.grid.tiles * p.grid.tile_rows, first = place.tile * p.grid.tile_rows + threadIdx.x;
    for (int i = 0; i < kCount; ++i) p.partial[blockIdx.y * stride + first + i * kThreads] = best[i];
    if (!is_last_block(p.tickets + place.tile, static_cast<unsigned>(p.grid.splits))) return;
    for (int i = 0; i < kCount; ++i) {
      best[i] = nearest_two(no_scores());
      for (int64_t split = 0; split < p.grid.splits; ++split)
        merge_nearest(best[i], load_past_l1(p.partial + split * stride + first + i * kThreads));
    }
  }
  for (int i = 0; i < kCount; ++i) {
    int64_t row = place.first_row + threadIdx.x + i * kThreads;
    if (row < p.rows) decide_row(p, place.head, row, best[i], norm[i]);
  }
}

// Screens rows of at most kDim elements. A thread keeps kShortRows of them in registers; the codes come through shared memory.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 4) codebook_screen_short_kernel(const __grid_constant__ CodebookScreenParams<T> p) {
  struct Codes {
    alignas(16) float elements[kShortCodes * kDim];
    float start[kShortCodes], slope[kShortCodes];
  };
  __shared__ Codes codes;
  CodebookScreenTile place(p);
  const float* mean = p.codes.mean + place.head * kDim;
  float scale = static_cast<float>(scale_of(p.codes.exponent[place.head]));
  float x[kShortRows][kDim], norm[kShortRows];
  TwoSmallest best[kShortRows];
#pragma unroll
  for (int i = 0; i < kShortRows; ++i) {
    int64_t row = place.first_row + threadIdx.x + i * kThreads;
    float square = 0.0f;
#pragma unroll
    for (int d = 0; d < kDim; d += kVector) load_centred(p, p.x + p.view.offset(place.head, row), row < p.rows, d, mean, scale, x[i] + d);
#pragma unroll
    for (int d = 0; d < kDim; ++d) square = fma(x[i][d], x[i][d], square);
    norm[i] = norm_upper_bound(p.codes.errors, square);
    best[i] = no_scores();
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
        insert_score(best[i], codes.start[k] - fma(codes.slope[k], norm[i], product[i]), static_cast<int32_t>(base) + k);
    }
    __syncthreads();
  }
  NearestTwo nearest[kShortRows];
#pragma unroll
  for (int i = 0; i < kShortRows; ++i) nearest[i] = nearest_two(best[i]);
  finish_rows(p, place, nearest, norm);
}

// A thread computes 8 x 8 scores of a tile: of the rows, and of the codes, two vectors that are half a tile apart, so that the threads of a
// warp read adjacent vectors of shared memory.
constexpr int kThreadRows = 8, kThreadCodes = 8;
constexpr int kThreadsAcross = kTileCodes / kThreadCodes;  // threads side by side along the codes
static_assert(kThreadsAcross * (kTileRows / kThreadRows) == kThreads && kTileRows == kThreads, "a thread loads a row and holds its scores");

// The row or the code of the tile, whose side it is kSide long, that is number i of the thread at `place`.
template <int kSide>
__device__ __forceinline__ int tile_element(int place, int i) {
  return i / kVector * (kSide / 2) + place * kVector + i % kVector;
}

// The operands of kTileDepth dimensions.
struct CodebookTileBuffer {
  alignas(16) float rows[kTileDepth][kTileRows];
  alignas(16) float codes[kTileDepth][kTileCodes];
};

// Loads the 8 operands of a thread.
template <int kSide>
__device__ __forceinline__ void load_side(const float (&from)[kSide], int place, float (&to)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vector<float> vector = *reinterpret_cast<const Vector<float>*>(from + tile_element<kSide>(place, half * kVector));
    for (int k = 0; k < kVector; ++k) to[half * kVector + k] = vector.v[k];
  }
}

// The operands that a thread loads for the next buffer while the block multiplies the current one: kTileDepth dimensions of its row, and
// one vector of the panel of codes.
struct CodebookStaged {
  float row[kTileDepth];
  Vector<float> codes;
};
static_assert(kTileDepth * kTileCodes == kThreads * kVector, "a thread stages one vector of codes");

__device__ __forceinline__ void store_staged(const CodebookStaged& staged, CodebookTileBuffer& buffer) {
#pragma unroll
  for (int step = 0; step < kTileDepth; ++step) buffer.rows[step][threadIdx.x] = staged.row[step];
  int element = threadIdx.x * kVector;
  *reinterpret_cast<Vector<float>*>(&buffer.codes[element / kTileCodes][element % kTileCodes]) = staged.codes;
}

// Adds the products of a buffer to the scores of a thread.
__device__ __forceinline__ void multiply(const CodebookTileBuffer& buffer, int down, int across,
                                         float (&score)[kThreadRows][kThreadCodes]) {
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

// The smallest scores of each row of a thread. They are in shared memory, where each thread has a column, and in registers only between two
// tiles: with them beside the scores a multiprocessor would hold three blocks, not four.
struct CodebookThreadScores {
  float smallest[kThreadRows][kThreads], second[kThreadRows][kThreads];
  int32_t code[kThreadRows][kThreads];

  __device__ __forceinline__ TwoSmallest load(int i) const {
    return {smallest[i][threadIdx.x], second[i][threadIdx.x], code[i][threadIdx.x]};
  }
  __device__ __forceinline__ void store(int i, const TwoSmallest& scores) {
    smallest[i][threadIdx.x] = scores.smallest;
    second[i][threadIdx.x] = scores.second;
    code[i][threadIdx.x] = scores.code;
  }
};

// Merges the scores of the threads along the codes, which are adjacent.
__device__ __forceinline__ NearestTwo merge_across(const TwoSmallest& scores) {
  NearestTwo best = nearest_two(scores);
#pragma unroll
  for (int mask = kThreadsAcross / 2; mask > 0; mask /= 2) {
    NearestTwo other;
    other.smallest = __shfl_xor_sync(0xffffffffu, best.smallest, mask);
    other.second = __shfl_xor_sync(0xffffffffu, best.second, mask);
    other.rest = __shfl_xor_sync(0xffffffffu, best.rest, mask);
    other.code = __shfl_xor_sync(0xffffffffu, best.code, mask);
    other.second_code = __shfl_xor_sync(0xffffffffu, best.second_code, mask);
    merge_nearest(best, other);
  }
  return best;
}

// Screens longer rows. A block computes tiles of kTileRows x kTileCodes products in registers; the operands come through two buffers in
// shared memory, one of which is filled while the other is read.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) codebook_screen_kernel(const __grid_constant__ CodebookScreenParams<T> p) {
  struct Shared {
    CodebookTileBuffer buffers[2];
    CodebookThreadScores scores;
    float norms[kTileRows];
    NearestTwo best[kTileRows];
  };
  __shared__ Shared shared;
  CodebookScreenTile place(p);
  const CodebookLayout& layout = p.codes.layout;
  int across = threadIdx.x % kThreadsAcross, down = threadIdx.x / kThreadsAcross;
  int64_t row = place.first_row + threadIdx.x, first = place.head * layout.padded_codes;
  const T* x = p.x + p.view.offset(place.head, row);
  const float* mean = p.codes.mean + place.head * layout.padded_dim;
  float scale = static_cast<float>(scale_of(p.codes.exponent[place.head])), norm = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) shared.scores.store(i, no_scores());
  for (int64_t base = place.first_code; base < place.end_code; base += kTileCodes) {
    const float* panel = p.codes.elements + (first + base) * layout.padded_dim + threadIdx.x * kVector;
    CodebookStaged staged;
    auto stage = [&](int64_t d) {
#pragma unroll
      for (int k = 0; k < kTileDepth; k += kVector) load_centred(p, x, row < p.rows, d + k, mean, scale, staged.row + k);
      staged.codes = *reinterpret_cast<const Vector<float>*>(panel + d * kTileCodes);
    };
    float score[kThreadRows][kThreadCodes] = {}, square = 0.0f;
    stage(0);
    for (int64_t d = 0; d < layout.padded_dim; d += kTileDepth) {
      CodebookTileBuffer& buffer = shared.buffers[d / kTileDepth % 2];
      store_staged(staged, buffer);
#pragma unroll
      for (int k = 0; k < kTileDepth; ++k) square = fma(staged.row[k], staged.row[k], square);
      __syncthreads();
      if (d + kTileDepth < layout.padded_dim) stage(d + kTileDepth);
      multiply(buffer, down, across, score);
    }
    norm = norm_upper_bound(p.codes.errors, square);
    shared.norms[threadIdx.x] = norm;
    // The norms are read below, and the first buffer of the next tile is overwritten.
    __syncthreads();
    float row_norm[kThreadRows], start[kThreadCodes], slope[kThreadCodes];
    load_side(shared.norms, down, row_norm);
#pragma unroll
    for (int j = 0; j < kThreadCodes; ++j) {
      int64_t code = first + base + tile_element<kTileCodes>(across, j);
      start[j] = p.codes.start[code];
      slope[j] = p.codes.slope[code];
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      TwoSmallest best = shared.scores.load(i);
#pragma unroll
      for (int j = 0; j < kThreadCodes; ++j)
        insert_score(best, start[j] - fma(slope[j], row_norm[i], score[i][j]),
                     static_cast<int32_t>(base) + tile_element<kTileCodes>(across, j));
      shared.scores.store(i, best);
    }
  }
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    NearestTwo best = merge_across(shared.scores.load(i));
    if (across == 0) shared.best[tile_element<kTileRows>(down, i)] = best;
  }
  __syncthreads();
  NearestTwo row_best[1] = {shared.best[threadIdx.x]};
  float row_norm[1] = {norm};
  finish_rows(p, place, row_best, row_norm);
}

}  // namespace fastvae
