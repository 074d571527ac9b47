// The steps of the codebook operators around their kernels: how codes are packed for a search, and rows sorted and summed by code. No
// torch here, so that a program without it runs them too; parallel_for(begin, end, grain, f) calls f for parts of a range on threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "codebook.h"

namespace fastvae {

constexpr int64_t kMeanCodes = 1024;

// All heads' codes in the form that a search reads.
class CodebookPacking {
 public:
  CodebookPacking(CodebookSearch& search, const CodebookKernels& kernels)
      : search_(search), kernels_(kernels), panels_((search.codes + kernels.codes_per_panel - 1) / kernels.codes_per_panel) {
    int64_t codes = panels_ * kernels.codes_per_panel, dim = search.dim;
    int64_t padded = (dim + kRowAlignment - 1) / kRowAlignment * kRowAlignment, pairs = search.pairs ? (dim + 1) / 2 : 0;
    sizes_ = {dim * 2, codes * padded, codes * dim, codes * pairs, codes, codes, codes};
    for (int64_t& size : sizes_) size = (size + 15) / 16 * 16;
  }

  // Floats of memory, aligned to 64 bytes, that the packed codes take.
  int64_t memory_size() const {
    int64_t total = 0;
    for (int64_t size : sizes_) total += size;
    return search_.heads * total;
  }

  // Packs the codes and points the search to them; false where one is not finite.
  template <class ParallelFor>
  bool pack(float* memory, const ParallelFor& parallel_for) {
    lay_out(memory);
    search_.packed = heads_.data();
    for (int64_t head = 0; head < search_.heads; ++head)
      if (!pack_head(head, parallel_for)) return false;
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

  template <class ParallelFor>
  bool pack_head(int64_t head, const ParallelFor& parallel_for) {
    set_mean(head);
    std::vector<double> norms(search_.codes);
    std::vector<uint64_t> hashes(search_.codes);
    std::atomic<bool> finite{true};
    parallel_for(0, search_.codes, 256, [&](int64_t begin, int64_t end) {
      if (!kernels_.measure(search_, head, begin, end, norms.data(), hashes.data())) finite.store(false);
    });
    if (!finite.load()) return false;
    double largest = *std::max_element(norms.begin(), norms.end());
    int exponent = largest > 0.0 ? norm_exponent(largest) : 0;
    // Both ends leave the factor itself a normal float, or double.
    int limit = search_.wide ? 1000 : 120;
    heads_[head].scale = power_of_two(std::clamp(-exponent, -limit, limit));
    heads_[head].pairs = search_.pairs && exponent <= limit;
    std::vector<bool> skipped = repeated(head, hashes);
    parallel_for(0, panels_, 8, [&](int64_t begin, int64_t end) { kernels_.pack(search_, head, skipped, begin, end); });
    return true;
  }

  // Any vector would do; one near to all codes makes their norms, and with them the errors, small. It is 0 where the differences from it
  // could overflow, which takes float64 codes.
  void set_mean(int64_t head) {
    int64_t dim = search_.dim, step = std::max<int64_t>(search_.codes / kMeanCodes, 1), count = 0;
    double* mean = heads_[head].mean;
    std::vector<double> code(dim);
    std::fill(mean, mean + dim, 0.0);
    for (int64_t k = 0; k < search_.codes; k += step, ++count) {
      kernels_.convert(search_.codebook, head, k, dim, code.data());
      for (int64_t d = 0; d < dim; ++d) mean[d] += code[d];
    }
    for (int64_t d = 0; d < dim; ++d) {
      mean[d] /= static_cast<double>(count);
      if (!(std::fabs(mean[d]) < 0x1p900)) mean[d] = 0.0;
      if (!search_.wide) mean[d] = static_cast<float>(mean[d]);
    }
  }

  // Which codes are equal to an earlier one, so that an untrained codebook of equal codes costs no more than another.
  std::vector<bool> repeated(int64_t head, const std::vector<uint64_t>& hashes) {
    int64_t slots = 16;
    while (slots < 2 * search_.codes) slots *= 2;
    std::vector<int64_t> table(slots, -1);
    std::vector<bool> found(search_.codes);
    std::vector<double> code(search_.dim), other(search_.dim);
    for (int64_t k = 0; k < search_.codes; ++k) {
      int64_t slot = static_cast<int64_t>(hashes[k]) & (slots - 1);
      for (; table[slot] >= 0 && !found[k]; slot = (slot + 1) & (slots - 1)) {
        if (hashes[table[slot]] != hashes[k]) continue;
        kernels_.convert(search_.codebook, head, k, search_.dim, code.data());
        kernels_.convert(search_.codebook, head, table[slot], search_.dim, other.data());
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

// Blocks of a search over all heads, of CodebookKernels::rows_per_block rows each.
inline int64_t search_blocks(const CodebookSearch& search, const CodebookKernels& kernels) {
  return search.heads * ((search.rows + kernels.rows_per_block - 1) / kernels.rows_per_block);
}

// Rows in the order of their codes, by counting; a negative index leaves its row out. The others are below the number of codes.
struct CodebookOrder {
  std::vector<int64_t> starts, order, codes;

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

// The sums over all rows of each code of a head, in row order; those of codes without rows are left as they are.
template <class ParallelFor>
void sum_by_code(CodebookSegments s, const CodebookOrder& sorted, const CodebookKernels& kernels, const ParallelFor& parallel_for) {
  s.order = sorted.order.data();
  s.codes = sorted.codes.data();
  s.starts = sorted.starts.data();
  s.count = static_cast<int64_t>(sorted.order.size());
  int64_t pieces = (s.count + kPieceRows - 1) / kPieceRows;
  std::vector<double> partial(2 * pieces * s.dim);
  s.partial = partial.data();
  parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) { kernels.sum_segments(s, begin, end); });

  std::vector<double> total(s.dim);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    int64_t begin = piece * kPieceRows, end = std::min(begin + kPieceRows, s.count);
    int64_t ends[2] = {s.codes[begin], s.codes[end - 1]};
    for (int slot = 0; slot < (ends[0] == ends[1] ? 1 : 2); ++slot) {
      int64_t k = ends[slot];
      if (s.starts[k] >= begin && s.starts[k + 1] <= end) continue;
      if (s.starts[k] >= begin) std::fill(total.begin(), total.end(), 0.0);
      for (int64_t d = 0; d < s.dim; ++d) total[d] += partial[(2 * piece + slot) * s.dim + d];
      if (s.starts[k + 1] <= end) kernels.write(s.sums, (s.head * s.num_codes + k) * s.dim, s.dim, total.data());
    }
  }
}

// The indices of a head's rows, -1 for a row with NaN or infinite values.
inline std::vector<int64_t> indices_of_finite_rows(const CodebookSegments& s, const int64_t* indices, const CodebookKernels& kernels) {
  std::vector<int64_t> kept(indices, indices + s.rows);
  std::vector<double> row(s.dim);
  for (int64_t i = 0; i < s.rows; ++i)
    if (kept[i] >= 0 && !kernels.convert(s.x, s.head, i, s.dim, row.data())) kept[i] = -1;
  return kept;
}

}  // namespace fastvae
