// The recheck of the exact search: one kernel decides the rows that the screen put on the worklist. It finds the codes that can be the
// nearest of a row, its candidates, and decides between them alone: by squared distances in float64, and where those are too close, by
// exact sums. Where exact products would overflow float64, see order_of(), the distances in float64 decide.
//
// kernel                   grid      reads                                                            writes
// codebook_recheck_kernel  (blocks)  x, codebook, the packed codes, the worklist, indices of pairs    indices; its scratch memory, tickets
//
// Where the worklist has at most half as many rows as the grid has blocks, several blocks share the codes of a row. Each searches one part
// of them, a split, and the last block to finish decides between the candidates of all splits.
//
// A row for which the screen left two codes, a pair, reads those alone. Any other row that was screened reads the packed codes, 4 bytes an
// element: 256 KiB of 1,024 codes of 64 elements, which up to 4 blocks share, or 8 MiB of 8,192 codes of 256 elements, which up to 32
// share. A row that was not screened reads the codebook itself in float64. Each candidate then costs one distance in float64.
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
  int64_t max_splits;  // the most blocks that may share the codes of a row
  // Each block has scratch memory for a row and two codes in float64, for the row minus the mean and scaled, and for what it found in a
  // split: the number of candidates, then their codes. A number above kSplitCandidates says that not all of them are stored.
  double* vectors;  // (blocks, 3, dim)
  float* centred;   // (blocks, padded dim)
  int32_t* found;   // (blocks, 1 + kSplitCandidates)
  // Each entry of the worklist whose codes are shared has a ticket counter, which is 0 before and after the launch, see is_last_block().
  unsigned* tickets;
  int64_t* indices;  // (heads, rows): the screen wrote the first code of each pair
};

// The number of candidates that a block keeps before it decides between them. A step of scan() adds at most one for each thread.
constexpr int kCandidates = 2 * kThreads;
// A block that stops before the end of its split stores this as the number of candidates.
constexpr int kCandidateOverflow = kCandidates;
static_assert(kCandidateOverflow > kSplitCandidates, "load_candidates() sees that candidates are missing");
static_assert(kMaxRecheckSplits * kSplitCandidates <= kCandidates, "the candidates of all splits fit");
static_assert(kMaxRecheckSplits <= kThreads, "a thread reads the candidates of one split");

// The list of the codes that may be the nearest, in any order.
struct CodebookCandidates {
  int count;
  int32_t codes[kCandidates];

  __device__ __forceinline__ void add(int64_t code) { codes[atomicAdd(&count, 1)] = static_cast<int32_t>(code); }
};

// Returns the minimum over the threads of the block to each of them.
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

// Writes the elements of row number `row` as double, and returns whether all are finite. Every thread of the block has to call this.
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

// Returns the product of the centred row and code threadIdx.x % kTileCodes of a panel of kTileCodes codes, see CodebookLayout. A thread
// multiplies kVector adjacent codes by every kSlices-th element of the row, and then adds the partial sums of one code. Every thread of the
// block has to call this, and a barrier has to come before the next call, which overwrites the partial sums.
__device__ __forceinline__ float panel_product(const float* centred, const float* panel, int64_t padded_dim) {
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
    float x = centred[d];
    for (int k = 0; k < kVector; ++k) total[k] = fma(x, code.v[k], total[k]);
  }
  store(&parts.products[slice][first], kVector, /*vectorized=*/true, total);
  __syncthreads();
  float product = 0.0f;
#pragma unroll
  for (int i = 0; i < kSlices; ++i) product += parts.products[i][threadIdx.x % kTileCodes];
  return product;
}

// Returns the product of the centred row and a short code, which is a panel by itself. Each thread has a code of its own.
__device__ __forceinline__ float short_product(const float* centred, const float* code, int64_t padded_dim) {
  float total = 0.0f;
  for (int64_t d = 0; d < padded_dim; d += kVector) {
    Vector<float> values = *reinterpret_cast<const Vector<float>*>(code + d);
    for (int k = 0; k < kVector; ++k) total = fma(centred[d + k], values.v[k], total);
  }
  return total;
}

// Searches the nearest code of one row of the worklist on one block. C is the dtype of the codebook. Every thread of the block has to call
// each public function, because most contain barriers. All members but group_ have the same values in all threads.
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
        x_(p.vectors + blockIdx.x * 3 * layout_.dim),
        centred_(p.centred + blockIdx.x * layout_.padded_dim) {}

  // Loads the row and, unless it has a pair, what its scores need. Returns false where an element is not finite.
  __device__ __forceinline__ bool load_row() {
    if (threadIdx.x == 0) candidates().count = 0;
    bool finite = row_to_double(p_.x, head_, listed_.row - head_ * p_.rows.divisor, layout_.dim, x_);
    // A pair, whose second code is known, needs no scores.
    if (!finite || listed_.second_code >= 0) return finite;
    const float* mean = p_.codes.mean + head_ * layout_.padded_dim;
    double scale = scale_of(p_.codes.exponent[head_]), square = 0.0;
    // add_by_double() scores a row that was not screened as it is: its norm is not centred either, and nothing reads centred_.
    bool screened = is_screened();
    for (int64_t d = threadIdx.x; d < layout_.padded_dim; d += kThreads) {
      double x = d < layout_.dim ? x_[d] : 0.0, value = screened && d < layout_.dim ? (x - mean[d]) * scale : x;
      centred_[d] = static_cast<float>(value);
      square += value * value;
    }
    square = block_sum(square);
    // The factor is above the relative rounding error of the sum and the root, about dim * 2^-54.
    norm_ = ::sqrt(square) * (1.0 + 1e-6);
    return true;
  }

  // Adds the two codes that the screen left as candidates.
  __device__ __forceinline__ void add_pair() {
    if (threadIdx.x == 0) {
      candidates().add(p_.indices[listed_.row]);
      candidates().add(listed_.second_code);
    }
    __syncthreads();
  }

  // Finds the candidates among the codes [begin, end), both multiples of kTileCodes, until the list may have no room for those of another
  // step. Returns the code before which it stopped.
  __device__ __forceinline__ int64_t scan(int64_t begin, int64_t end) {
    bool screened = is_screened();
    // A step handles one code for each group of threads, one short code for each thread, or one panel.
    int64_t step = !screened ? group_.count : layout_.panel_codes == 1 ? kThreads : kTileCodes;
    double bound = INFINITY;
    for (int64_t base = begin; base < end; base += step) {
      int count = candidates().count;
      // Every thread has to read the count before another one adds to it below.
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

  // Stores the candidates of this block's split for the last block that shares the row. Where there are more than kSplitCandidates, that
  // block sees the count and searches again. `complete` says that the scan reached the end of the split.
  __device__ __forceinline__ void store_candidates(bool complete) const {
    int count = candidates().count;
    int32_t* to = found_by(blockIdx.x);
    if (threadIdx.x == 0) to[0] = complete ? count : kCandidateOverflow;
    if (threadIdx.x < min64(count, kSplitCandidates)) to[1 + threadIdx.x] = candidates().codes[threadIdx.x];
  }

  // Loads the candidates that blocks [first, first + count) stored. Returns false, with an empty list, where one of them found more than it
  // could store. __ldcg() bypasses the L1 cache, which does not see what other multiprocessors wrote.
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

  // Decides between the candidates and the nearest code of earlier calls, and empties the list of candidates.
  __device__ __forceinline__ void decide() {
    __shared__ double distances[kThreads];
    int count = candidates().count;
    // Without a candidate there is no barrier between this and the write below.
    if (count == 0) return;
    for (int base = 0; base < count; base += group_.count) {
      int index = base + group_.number;
      // A group without a candidate passes a number above every code and gets an infinite distance. It cannot skip the call, because
      // distance_to() shuffles among all threads of a warp.
      double distance = distance_to(index < count ? candidates().codes[index] : layout_.codes);
      if (group_.member == 0) distances[group_.number] = distance;
      __syncthreads();
      for (int i = 0; i < group_.count && base + i < count; ++i) keep_nearer(candidates().codes[base + i], distances[i]);
      __syncthreads();
    }
    if (threadIdx.x == 0) candidates().count = 0;
    __syncthreads();
  }

  // Writes the index of the nearest code, or 0 where no code has a finite distance.
  __device__ __forceinline__ void write_index() const {
    if (threadIdx.x == 0) p_.indices[listed_.row] = max64(nearest_, 0);
  }

 private:
  __device__ __forceinline__ static CodebookCandidates& candidates() {
    __shared__ CodebookCandidates memory;
    return memory;
  }

  __device__ __forceinline__ int32_t* found_by(int64_t block) const { return p_.found + block * (1 + kSplitCandidates); }

  __device__ __forceinline__ bool is_screened() const { return listed_.second_code != kNotScreened; }

  // Returns whether a code can be the nearest. The start of padding, and of codes that are not finite or are equal to an earlier one, is
  // kNeverNearest.
  __device__ __forceinline__ bool is_searched(int64_t code) const {
    return code < layout_.codes && p_.codes.start[first_code_ + code] < kNeverNearest;
  }

  // Adds the candidates of one step from code `base` on: those whose lower bound of the score, start - slope * norm - product as in the
  // screen, is at most the upper bound of the score of the code that the screen found.
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
    float lower = p_.codes.start[first_code_ + code] - fma(p_.codes.slope[first_code_ + code], norm, product);
    // A NaN would make the code a candidate, which is safe.
    if (!(lower > listed_.bound)) candidates().add(code);
  }

  // Adds the candidates of one step for a row that was not screened. Scores are computed in float64 from the inputs. `bound` is an upper
  // bound of the smallest score of the codes of earlier steps. The function returns that bound with the codes of this step included, and
  // compares their lower bounds with it.
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

  // Returns the squared distance of the row to a code, or infinity where the code is not searched. The threads of a group share the sum,
  // and each gets the result.
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

  // Compares a code with the nearest one so far. Returns a negative number where the code is nearer, 0 where it is as near, and a positive
  // number where it is farther. A distance above the tie_bound() of another one is larger in exact arithmetic too.
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
    // A product overflows only where a float64 codebook has elements of 2^495 or more.
    return distance < distance_ ? -1 : distance > distance_;
  }

  const CodebookRecheckParams& p_;
  const CodebookLayout& layout_;
  ThreadGroup group_;
  CodebookListedRow listed_;
  int64_t head_, first_code_;
  double* x_;             // (3, dim): the row, and scratch memory for two codes
  float* centred_;        // (padded dim,): the row minus the mean and scaled, as the screen reads it; unused where it was not screened
  double norm_ = 0.0;     // an upper bound of the norm of the centred row, or of the row itself where it was not screened
  int64_t nearest_ = -1;  // the nearest code so far, -1 where there is none
  double distance_ = INFINITY;  // the squared distance of the nearest code in float64
};

// Decides one row. Where several blocks share its codes, each searches one split. The last of them decides between the candidates of all
// splits, or searches all codes itself where a split has more candidates than its block can store.
template <class C>
__device__ __forceinline__ void recheck_row(const CodebookRecheckParams& p, int64_t entry, int64_t split, int64_t splits) {
  CodebookListedRow listed = p.worklist.rows[entry];
  bool is_pair = listed.second_code >= 0, is_shared = !is_pair && splits > 1;
  if (is_pair && split > 0) return;
  CodebookRecheck<C> search(p, listed);
  if (!search.load_row()) {
    if (split == 0) search.write_index();
    return;
  }
  int64_t codes = p.codes.layout.padded_codes, codes_per_split = ceil_div(codes / kTileCodes, splits) * kTileCodes;
  // The codes [next, end) are still to be scanned.
  int64_t next = is_shared ? split * codes_per_split : 0, end = is_shared ? min64(next + codes_per_split, codes) : codes;
  if (is_pair) {
    search.add_pair();
    next = end;
  }
  for (;;) {
    next = search.scan(next, end);
    if (is_shared) {
      search.store_candidates(next >= end);
      if (!is_last_block(p.tickets + entry, static_cast<unsigned>(splits))) return;
      is_shared = false;
      next = search.load_candidates(blockIdx.x - split, splits) ? codes : 0;
      end = codes;
      if (next < end) continue;
    }
    search.decide();
    if (next >= end) break;
  }
  search.write_index();
}

// Adjacent blocks share a row where there are two or more for each; otherwise every block takes whole rows, gridDim.x entries apart. The
// launch bounds limit the registers, so that four blocks run on a multiprocessor at a time, as many as kRecheckBlocks has for each.
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
