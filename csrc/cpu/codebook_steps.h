// The steps of the codebook operators around their kernels: packing the codes for a search, sorting rows by code, and summing them. No
// torch here, so that the C++ tests run them without it. parallel_for(begin, end, grain, f) calls f for parts of a range on several
// threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "codebook_kernels.h"

namespace fastvae {

// About so many codes, evenly spaced, give the mean. It need not be exact, and that of all codes would be a tenth of the packing.
constexpr int64_t kMeanCodes = 128;

// The codes of all heads in the form that a search reads.
class CodebookPacking {
 public:
  CodebookPacking(CodebookSearch& search, const CodebookKernels& kernels)
      : search_(search), kernels_(kernels), panels_(ceil_div(search.codes, kernels.codes_per_panel)) {
    int64_t codes = panels_ * kernels.codes_per_panel, dim = search.dim;
    int64_t padded = ceil_div(dim, kRowAlignment) * kRowAlignment, pairs = search.with_pairs ? ceil_div(dim, 2) : 0;
    sizes_ = {dim * 2, codes * padded, codes * dim, codes * pairs, codes, codes, codes};
    for (int64_t& size : sizes_) size = ceil_div(size, 16) * 16;
  }

  // The size of the memory for the packed codes, in floats. It has to be aligned to 64 bytes.
  int64_t memory_size() const {
    int64_t total = 0;
    for (int64_t size : sizes_) total += size;
    return search_.heads * total;
  }

  // Packs the codes and points the search to them. Returns false where a code is not finite.
  template <class ParallelFor>
  bool pack(float* memory, const ParallelFor& parallel_for) {
    lay_out(memory);
    search_.packed = heads_.data();
    int64_t heads = search_.heads, codes = search_.codes;
    std::vector<double> norms(heads * codes);
    std::vector<uint64_t> hashes(heads * codes);
    std::vector<std::vector<bool>> repeated(heads);
    std::atomic<bool> finite{true};
    parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) set_mean(head);
    });
    parallel_for(0, heads * codes, 256, [&](int64_t begin, int64_t end) {
      for_each_head(begin, end, codes, [&](int64_t head, int64_t first, int64_t last) {
        if (!kernels_.measure(search_, head, first, last, norms.data() + head * codes, hashes.data() + head * codes)) finite.store(false);
      });
    });
    if (!finite.load()) return false;
    parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        set_scale(head, *std::max_element(norms.begin() + head * codes, norms.begin() + (head + 1) * codes));
        repeated[head] = repeated_codes(head, hashes.data() + head * codes);
      }
    });
    parallel_for(0, heads * panels_, 8, [&](int64_t begin, int64_t end) {
      for_each_head(begin, end, panels_,
                    [&](int64_t head, int64_t first, int64_t last) { kernels_.pack(search_, head, repeated[head], first, last); });
    });
    return true;
  }

 private:
  void lay_out(float* memory) {
    heads_.resize(search_.heads);
    for (PackedCodebook& packed : heads_) {
      packed.panels = panels_;
      std::vector<float*> parts;
      for (int64_t size : sizes_) {
        parts.push_back(memory);
        memory += size;
      }
      packed.mean = reinterpret_cast<double*>(parts[0]);
      packed.rows = parts[1];
      packed.panel_rows = parts[2];
      packed.panel_pairs = reinterpret_cast<int32_t*>(parts[3]);
      packed.half_norm = parts[4];
      packed.norm = parts[5];
      packed.residual = parts[6];
    }
  }

  // Calls f(head, first, last) for the part of each head in items [begin, end), where a head has `items` of them.
  template <class F>
  static void for_each_head(int64_t begin, int64_t end, int64_t items, const F& f) {
    while (begin < end) {
      int64_t head = begin / items, stop = std::min(end, (head + 1) * items);
      f(head, begin - head * items, stop - head * items);
      begin = stop;
    }
  }

  void set_scale(int64_t head, double max_norm) {
    int exponent = max_norm > 0.0 ? norm_exponent(max_norm) : 0;
    // With these limits the scale and its reciprocal are normal numbers of the arithmetic's type.
    int limit = search_.is_double ? 1000 : 120;
    heads_[head].scale = power_of_two(std::clamp(-exponent, -limit, limit));
    heads_[head].has_pairs = search_.with_pairs && exponent <= limit;
  }

  // Subtracting any vector from rows and codes leaves the distances as they are. A vector near all codes makes the norms small, and with
  // them the rounding errors. Where differences from the mean could overflow, which only float64 codes can cause, it is 0.
  void set_mean(int64_t head) {
    int64_t dim = search_.dim, step = std::max<int64_t>(search_.codes / kMeanCodes, 1), count = 0;
    double* mean = heads_[head].mean;
    std::vector<double> code(dim);
    std::fill(mean, mean + dim, 0.0);
    for (int64_t k = 0; k < search_.codes; k += step, ++count) {
      kernels_.row_to_double(search_.codebook, head, k, dim, code.data());
      for (int64_t d = 0; d < dim; ++d) mean[d] += code[d];
    }
    for (int64_t d = 0; d < dim; ++d) {
      mean[d] /= static_cast<double>(count);
      if (!(std::fabs(mean[d]) < 0x1p900)) mean[d] = 0.0;
      if (!search_.is_double) mean[d] = static_cast<float>(mean[d]);
    }
  }

  // Whether each code is equal to an earlier one. Such codes are left out of the search, because every row would have to decide between
  // them exactly, which would make an untrained codebook of equal codes slow.
  std::vector<bool> repeated_codes(int64_t head, const uint64_t* hashes) {
    int64_t slots = 16;  // of a hash table with linear probing
    while (slots < 2 * search_.codes) slots *= 2;
    std::vector<int64_t> table(slots, -1);
    std::vector<bool> found(search_.codes);
    std::vector<double> code(search_.dim), other(search_.dim);
    for (int64_t k = 0; k < search_.codes; ++k) {
      int64_t slot = static_cast<int64_t>(hashes[k]) & (slots - 1);
      for (; table[slot] >= 0 && !found[k]; slot = (slot + 1) & (slots - 1)) {
        if (hashes[table[slot]] != hashes[k]) continue;
        kernels_.row_to_double(search_.codebook, head, k, search_.dim, code.data());
        kernels_.row_to_double(search_.codebook, head, table[slot], search_.dim, other.data());
        found[k] = code == other;
      }
      if (!found[k]) table[slot] = k;
    }
    return found;
  }

  CodebookSearch& search_;
  const CodebookKernels& kernels_;
  int64_t panels_;
  std::vector<int64_t> sizes_;
  std::vector<PackedCodebook> heads_;
};

// The number of blocks of a search over all heads.
inline int64_t search_blocks(const CodebookSearch& search, const CodebookKernels& kernels) {
  return search.heads * ceil_div(search.rows, kernels.rows_per_block);
}

// Counting sort of the rows of a head by code. A row with a negative index is left out; the other indices have to be below num_codes.
struct CodebookOrder {
  std::vector<int64_t> starts, order, codes;  // see CodebookSums

  CodebookOrder(const int64_t* indices, int64_t rows, int64_t num_codes) : starts(num_codes + 1) {
    for (int64_t i = 0; i < rows; ++i)
      if (indices[i] >= 0) ++starts[indices[i] + 1];
    for (int64_t k = 0; k < num_codes; ++k) starts[k + 1] += starts[k];
    order.resize(starts[num_codes]);
    codes.resize(starts[num_codes]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < rows; ++i) {
      if (indices[i] < 0) continue;
      int64_t position = next[indices[i]]++;
      order[position] = i;
      codes[position] = indices[i];
    }
  }
};

// Writes the sum over the rows of each code of a head, added in the order of the rows. It leaves the sums of codes without rows as they
// are.
template <class ParallelFor>
void sum_by_code(CodebookSums s, const CodebookOrder& sorted, const CodebookKernels& kernels, const ParallelFor& parallel_for) {
  s.order = sorted.order.data();
  s.codes = sorted.codes.data();
  s.starts = sorted.starts.data();
  s.count = static_cast<int64_t>(sorted.order.size());
  int64_t pieces = ceil_div(s.count, kPieceRows);
  std::vector<double> partial(2 * pieces * s.dim);
  s.partial = partial.data();
  parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) { kernels.sum_pieces(s, begin, end); });

  // Adds the partial sums of each code whose rows lie in several pieces.
  std::vector<double> total(s.dim);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    int64_t begin = piece * kPieceRows, end = std::min(begin + kPieceRows, s.count);
    int64_t ends[2] = {s.codes[begin], s.codes[end - 1]};
    for (int slot = 0; slot < (ends[0] == ends[1] ? 1 : 2); ++slot) {
      int64_t k = ends[slot];
      if (s.starts[k] >= begin && s.starts[k + 1] <= end) continue;
      if (s.starts[k] >= begin) std::fill(total.begin(), total.end(), 0.0);
      for (int64_t d = 0; d < s.dim; ++d) total[d] += partial[(2 * piece + slot) * s.dim + d];
      if (s.starts[k + 1] <= end) kernels.from_double(s.sums, (s.head * s.num_codes + k) * s.dim, s.dim, total.data());
    }
  }
}

// The indices of the rows of a head, -1 for a row that is not finite.
inline std::vector<int64_t> indices_of_finite_rows(const CodebookSums& s, const int64_t* indices, const CodebookKernels& kernels) {
  std::vector<int64_t> result(indices, indices + s.rows);
  std::vector<double> row(s.dim);
  for (int64_t i = 0; i < s.rows; ++i)
    if (result[i] >= 0 && !kernels.row_to_double(s.x, s.head, i, s.dim, row.data())) result[i] = -1;
  return result;
}

}  // namespace fastvae
