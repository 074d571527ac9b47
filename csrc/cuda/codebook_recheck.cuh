// The second step of the exact search: one kernel decides the rows of the worklist. It finds the codes that can be the nearest of a row,
// its candidates, and decides between them alone: by squared distances in float64, and where those are too close, exactly.
//
// kernel                   grid      reads                                                            writes
// codebook_recheck_kernel  (blocks)  x, codebook, the packed codes, the worklist, indices of pairs    indices
//
// Where there are fewer rows than blocks, several blocks share the codes of a row, and the last of them to finish decides between the
// candidates that they found.
//
// A row for which the screen left two codes reads those alone. Any other row that was screened reads the packed codes, 4 bytes an element:
// 256 KiB of 1,024 codes of 64 elements, which 4 blocks share, and 8 MiB of 8,192 codes of 256, which 32 share. A row that was not screened
// reads the codebook itself in float64. Each candidate then costs one distance in float64.
#pragma once

#include "codebook_screen.cuh"

// The emulation of CUDA in tests/ counts events.
#if !defined(FASTVAE_COUNT)
#define FASTVAE_COUNT(event, number) static_cast<void>(0)
#endif

namespace fastvae {

struct CodebookRecheckParams {
  CodebookView x;  // (heads, rows, dim)
  Divider rows;
  PackedCodebook codes;
  CodebookWorklist worklist;
  int64_t max_splits;  // blocks that share a row, at most
  // Scratch memory of each block: a row and two codes in float64, a row as the screen reads it, and the candidates of a split.
  double* exact;      // (blocks, 3, dim)
  float* centred;     // (blocks, padded dim)
  int32_t* found;     // (blocks, 1 + kSplitCandidates): the number of candidates, then their codes
  unsigned* tickets;  // (blocks,), where max_splits > 1
  int64_t* indices;   // (heads, rows)
};

// The number of candidates that a block keeps before it decides between them. A step of a scan adds at most one for each thread.
constexpr int kCandidates = 2 * kThreads;
static_assert(kMaxRecheckSplits * kSplitCandidates <= kCandidates, "the candidates of all splits fit");
static_assert(kMaxRecheckSplits <= kThreads, "a thread reads the candidates of one split");

// Codes that may be the nearest, in any order.
struct CodebookCandidates {
  int count;
  int32_t codes[kCandidates];

  __device__ __forceinline__ void add(int64_t code) { codes[atomicAdd(&count, 1)] = static_cast<int32_t>(code); }
};

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

// Writes the elements of a row as double, and returns whether all are finite. Every thread of the block has to call this.
__device__ __forceinline__ bool row_to_double(const CodebookView& rows, int64_t head, int64_t row, int64_t dim, double* to) {
  int64_t first = rows.offset(head, row);
  int not_finite = 0;
  for (int64_t d = threadIdx.x; d < dim; d += kThreads) {
    double value = element_as_double(rows, first + d);
    to[d] = value;
    not_finite |= !is_finite(value);
  }
  return block_sum(not_finite) == 0;
}

// The products of the centred row and the codes of a panel. Thread t < kTileCodes gets that of code t; the result of the others has no
// meaning. A thread multiplies kVector adjacent codes with every eighth element of the row. A barrier has to come before the next call.
__device__ __forceinline__ float panel_product(const float* row, const float* panel, int64_t padded_dim) {
  constexpr int kAcross = kTileCodes / kVector, kSlices = kThreads / kAcross;
  struct Parts {
    alignas(16) float products[kSlices][kTileCodes];
  };
  __shared__ Parts parts;
  int slice = threadIdx.x / kAcross, first = threadIdx.x % kAcross * kVector;
  float total[kVector] = {};
#pragma unroll 8
  for (int64_t d = slice; d < padded_dim; d += kSlices) {
    Vector<float> code = *reinterpret_cast<const Vector<float>*>(panel + d * kTileCodes + first);
    float x = row[d];
    for (int k = 0; k < kVector; ++k) total[k] = fma(x, code.v[k], total[k]);
  }
  store(&parts.products[slice][first], kVector, true, total);
  __syncthreads();
  float product = 0.0f;
#pragma unroll
  for (int i = 0; i < kSlices; ++i) product += parts.products[i][threadIdx.x % kTileCodes];
  return product;
}

// The product of the centred row and a code that is packed by itself.
__device__ __forceinline__ float short_product(const float* row, const float* code, int64_t padded_dim) {
  float total = 0.0f;
  for (int64_t d = 0; d < padded_dim; d += kVector) {
    Vector<float> values = *reinterpret_cast<const Vector<float>*>(code + d);
    for (int k = 0; k < kVector; ++k) total = fma(row[d + k], values.v[k], total);
  }
  return total;
}

// The nearest code of one row of the worklist, which a block searches. C is the dtype of the codes. Every thread of the block has to call
// each function, and has the same values in all members.
template <class C>
class CodebookRecheck {
 public:
  __device__ __forceinline__ CodebookRecheck(const CodebookRecheckParams& p, const CodebookListedRow& listed)
      : p_(p),
        layout_(p.codes.layout),
        group_(p.codes.width),
        listed_(listed),
        head_(quotient(p.rows, listed.row)),
        first_code_(head_ * layout_.padded_codes),
        x_(p.exact + blockIdx.x * 3 * layout_.dim),
        centred_(p.centred + blockIdx.x * layout_.padded_dim) {}

  // Loads the row. Returns false where it is not finite.
  __device__ __forceinline__ bool load_row() {
    if (threadIdx.x == 0) candidates().count = 0;
    bool finite = row_to_double(p_.x, head_, listed_.row - head_ * p_.rows.divisor, layout_.dim, x_);
    if (!finite || listed_.second_code >= 0) return finite;
    const float* mean = p_.codes.mean + head_ * layout_.padded_dim;
    double scale = scale_of(p_.codes.exponent[head_]), square = 0.0;
    bool screened = listed_.second_code != kNotScreened;
    for (int64_t d = threadIdx.x; d < layout_.padded_dim; d += kThreads) {
      double x = d < layout_.dim ? x_[d] : 0.0, value = screened && d < layout_.dim ? (x - mean[d]) * scale : x;
      centred_[d] = static_cast<float>(value);
      square += value * value;
    }
    square = block_sum(square);
    norm_ = ::sqrt(square) * (1.0 + 1e-6);
    return true;
  }

  // The candidates are the two codes that the screen left.
  __device__ __forceinline__ void add_pair() {
    if (threadIdx.x == 0) {
      candidates().add(p_.indices[listed_.row]);
      candidates().add(listed_.second_code);
    }
    __syncthreads();
  }

  // Finds the candidates among the codes [begin, end), which are whole panels, until there is no room for those of another step. Returns
  // the code before which it stopped.
  __device__ __forceinline__ int64_t scan(int64_t begin, int64_t end) {
    bool screened = listed_.second_code != kNotScreened;
    int64_t step = !screened ? group_.count : layout_.panel_codes == 1 ? kThreads : kTileCodes;
    double bound = INFINITY;
    for (int64_t base = begin; base < end; base += step) {
      int count = candidates().count;
      // This step adds to the count.
      __syncthreads();
      if (count > kCandidates - kThreads) return base;
      if (screened)
        add_by_float(base, end);
      else
        bound = add_by_double(base, end, bound);
      __syncthreads();
    }
    return end;
  }

  // Stores the candidates of this block for the last one that shares the row.
  __device__ __forceinline__ void store_candidates(bool complete) const {
    int count = candidates().count;
    int32_t* to = found_by(blockIdx.x);
    if (threadIdx.x == 0) to[0] = complete ? count : kCandidates;
    if (threadIdx.x < min64(count, kSplitCandidates)) to[1 + threadIdx.x] = candidates().codes[threadIdx.x];
  }

  // Loads the candidates that blocks [first, first + count) stored. Returns false where one of them found more than it could store.
  __device__ __forceinline__ bool load_candidates(int64_t first, int64_t count) {
    int overflow = 0;
    if (threadIdx.x == 0) candidates().count = 0;
    __syncthreads();
    if (threadIdx.x < count) {
      const int32_t* from = found_by(first + threadIdx.x);
      int found = __ldcg(from);
      overflow = found > kSplitCandidates;
      for (int i = 0; i < found && !overflow; ++i) candidates().add(__ldcg(from + 1 + i));
    }
    if (block_sum(overflow) == 0) return true;
    if (threadIdx.x == 0) candidates().count = 0;
    __syncthreads();
    return false;
  }

  // Decides between the candidates, and the nearest of those before them, and removes them.
  __device__ __forceinline__ void decide() {
    __shared__ double distances[kThreads];
    int count = candidates().count;
    for (int base = 0; base < count; base += group_.count) {
      int place = base + group_.number;
      double distance = distance_to(place < count ? candidates().codes[place] : layout_.codes);
      if (group_.member == 0) distances[group_.number] = distance;
      __syncthreads();
      for (int i = 0; i < group_.count && base + i < count; ++i) keep_nearer(candidates().codes[base + i], distances[i]);
      __syncthreads();
    }
    if (threadIdx.x == 0) candidates().count = 0;
    __syncthreads();
  }

  // Writes the index. Where no code has a finite distance, it is 0.
  __device__ __forceinline__ void write_index() const {
    if (threadIdx.x == 0) p_.indices[listed_.row] = max64(nearest_, 0);
  }

 private:
  __device__ __forceinline__ static CodebookCandidates& candidates() {
    __shared__ CodebookCandidates memory;
    return memory;
  }

  __device__ __forceinline__ int32_t* found_by(int64_t block) const { return p_.found + block * (1 + kSplitCandidates); }

  __device__ __forceinline__ bool is_searched(int64_t code) const {
    return code < layout_.codes && p_.codes.start[first_code_ + code] < kNeverNearest;
  }

  // Adds the candidates of one step from code `base` on: those whose lower bound of the score, computed as in the screen, is at most the
  // upper bound of the score of the code that the screen found.
  __device__ __forceinline__ void add_by_float(int64_t base, int64_t end) {
    int64_t code = base + threadIdx.x;
    const float* elements = p_.codes.elements + first_code_ * layout_.padded_dim;
    float product = 0.0f;
    bool inside = code < end;
    if (layout_.panel_codes > 1) {
      inside = threadIdx.x < kTileCodes;
      product = panel_product(centred_, elements + base * layout_.padded_dim, layout_.padded_dim);
    } else if (inside) {
      product = short_product(centred_, elements + code * layout_.padded_dim, layout_.padded_dim);
    }
    if (!inside || !is_searched(code)) return;
    float norm = static_cast<float>(norm_) * p_.codes.errors.norm_factor + p_.codes.errors.norm_underflow;
    float lowered = p_.codes.start[first_code_ + code] - fma(p_.codes.slope[first_code_ + code], norm, product);
    if (!(lowered > listed_.bound)) candidates().add(code);
  }

  // The same for a row that was not screened, in float64 from the inputs. `bound` is an upper bound of the smallest score of earlier codes;
  // it returns that of these codes too.
  __device__ __forceinline__ double add_by_double(int64_t base, int64_t end, double bound) {
    int64_t code = base + group_.number;
    bool searched = code < end && is_searched(code);
    double square = 0.0, product = 0.0;
    if (searched) {
      const C* from = static_cast<const C*>(p_.codes.source.data) + p_.codes.source.offset(head_, code);
#pragma unroll 2
      for (int64_t d = group_.member; d < layout_.dim; d += group_.width) {
        double value = to_double(from[d]);
        square = fma(value, value, square);
        product = fma(x_[d], value, product);
      }
    }
    square = warp_sum(square, group_.width);
    product = warp_sum(product, group_.width);
    double score = 0.5 * square - product, error = wide_score_error_bound(square, norm_, layout_.dim);
    // Where float64 overflows, the code is a candidate and bounds no other.
    bool known = is_finite(score) && is_finite(error), leads = searched && group_.member == 0;
    bound = fmin(bound, block_min(leads && known ? score + error : INFINITY));
    if (leads && (!known || score - error <= bound)) candidates().add(code);
    return bound;
  }

  // The squared distance of the row to a code, infinite where the code is not searched. A group of threads computes it; each gets the
  // result.
  __device__ __forceinline__ double distance_to(int64_t code) const {
    double total = 0.0;
    bool searched = is_searched(code);
    if (searched) {
      FASTVAE_COUNT(distances, group_.member == 0);
      const C* from = static_cast<const C*>(p_.codes.source.data) + p_.codes.source.offset(head_, code);
#pragma unroll 2
      for (int64_t d = group_.member; d < layout_.dim; d += group_.width) {
        double difference = x_[d] - to_double(from[d]);
        total = fma(difference, difference, total);
      }
    }
    total = warp_sum(total, group_.width);
    return searched ? total : static_cast<double>(INFINITY);
  }

  // Replaces the nearest code by another one if that is nearer, or as near and lower.
  __device__ __forceinline__ void keep_nearer(int64_t code, double distance) {
    if (!is_finite(distance)) return;
    int order = order_of(code, distance);
    if (order > 0 || (order == 0 && code > nearest_)) return;
    nearest_ = code;
    distance_ = distance;
  }

  // Whether a code is nearer than the nearest so far (negative), as near (0), or not (positive).
  __device__ __forceinline__ int order_of(int64_t code, double distance) {
    __shared__ ExactSum sum;
    __shared__ int order;
    int64_t dim = layout_.dim;
    if (nearest_ < 0 || tie_bound(distance, dim) < distance_) return -1;
    if (tie_bound(distance_, dim) < distance) return 1;
    row_to_double(p_.codes.source, head_, code, dim, x_ + dim);
    row_to_double(p_.codes.source, head_, nearest_, dim, x_ + 2 * dim);
    if (threadIdx.x == 0) order = compare_distances(x_, x_ + dim, x_ + 2 * dim, dim, sum);
    __syncthreads();
    if (order != kUndecided) return order;
    return distance < distance_ ? -1 : distance > distance_;
  }

  const CodebookRecheckParams& p_;
  const CodebookLayout& layout_;
  ThreadGroup group_;
  CodebookListedRow listed_;
  int64_t head_, first_code_;
  double* x_;       // (3, dim): the row, and scratch memory for two codes
  float* centred_;  // (padded dim,): the row as the screen reads it
  double norm_ = 0.0;
  int64_t nearest_ = -1;
  double distance_ = INFINITY;  // of the nearest code
};

// Decides one row. With several splits each block searches a part of the codes, and the last one decides between what all have found, or
// searches all codes where a block has found more than it can store.
template <class C>
__device__ __forceinline__ void recheck_row(const CodebookRecheckParams& p, int64_t entry, int64_t split, int64_t splits) {
  CodebookListedRow listed = p.worklist.rows[entry];
  bool is_pair = listed.second_code >= 0, is_shared = !is_pair && splits > 1;
  if (is_pair && split > 0) return;
  CodebookRecheck<C> row(p, listed);
  if (!row.load_row()) {
    if (split == 0) row.write_index();
    return;
  }
  int64_t codes = p.codes.layout.padded_codes, share = ceil_div(codes / kTileCodes, splits) * kTileCodes;
  int64_t code = is_shared ? split * share : 0, end = is_shared ? min64(code + share, codes) : codes;
  if (is_pair) {
    row.add_pair();
    code = end;
  }
  for (;;) {
    code = row.scan(code, end);
    if (is_shared) {
      row.store_candidates(code >= end);
      if (!is_last_block(p.tickets + entry, static_cast<unsigned>(splits))) return;
      is_shared = false;
      code = row.load_candidates(blockIdx.x - split, splits) ? codes : 0;
      end = codes;
      if (code < end) continue;
    }
    row.decide();
    if (code >= end) break;
  }
  row.write_index();
}

// Where there are fewer rows than blocks, the blocks of a row are adjacent; otherwise blocks take rows in turn.
template <class C>
__global__ void __launch_bounds__(kThreads, 4) codebook_recheck_kernel(const __grid_constant__ CodebookRecheckParams p) {
  int64_t count = static_cast<int64_t>(*p.worklist.count);
  if (count == 0) return;
  int64_t splits = max64(min64(gridDim.x / count, p.max_splits), 1);
  for (int64_t item = blockIdx.x; item < count * splits; item += gridDim.x) {
    int64_t entry = item / splits;
    recheck_row<C>(p, entry, item - entry * splits, splits);
    // The next row overwrites the scratch memory.
    __syncthreads();
  }
}

}  // namespace fastvae
