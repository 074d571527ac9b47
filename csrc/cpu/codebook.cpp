// The codebook operators on the CPU: what they allocate, how they share the work, and which instruction set's kernels do it.
#include "codebook.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>

#include "tensor.h"

namespace fastvae {
namespace {

const CodebookKernels& kernels() { return FASTVAE_SELECT_VNNI_KERNELS(codebook); }

std::mutex statistics_mutex;
SearchCounts statistics;

void add_statistics(const SearchCounts& counts) {
  std::lock_guard<std::mutex> lock(statistics_mutex);
  statistics.rows += counts.rows;
  statistics.rechecked += counts.rechecked;
  statistics.screened_again += counts.screened_again;
}

// (heads, rows, dim); a copy, which `keep` owns, where a row's elements do not lie side by side.
Rows rows_of(const Tensor& tensor, Tensor& keep) {
  bool side_by_side = tensor.size(2) == 1 || tensor.stride(2) == 1;
  keep = side_by_side ? tensor : torch::stable::contiguous(tensor);
  return {keep.const_data_ptr(), dtype_of(keep), keep.stride(0), keep.stride(1)};
}

constexpr int64_t kMeanCodes = 1024;

// All heads' codes in the form that the search reads.
class Packing {
 public:
  explicit Packing(Search& search) : search_(search), heads_(search.heads), storage_(allocate()) {
    search.packed = heads_.data();
    for (int64_t head = 0; head < search.heads; ++head) pack(head);
  }

 private:
  Tensor allocate() {
    int64_t codes = panels() * kernels().codes_per_panel, dim = search_.dim;
    int64_t padded = (dim + kRowAlignment - 1) / kRowAlignment * kRowAlignment, pairs = search_.pairs ? (dim + 1) / 2 : 0;
    std::vector<int64_t> sizes{dim * 2, codes * padded, codes * dim, codes * pairs, codes, codes, codes};
    int64_t words = 0;
    for (int64_t& size : sizes) {
      size = (size + 15) / 16 * 16;
      words += size;
    }
    Tensor storage = empty({search_.heads, words}, ScalarType::Float);
    float* next = static_cast<float*>(storage.mutable_data_ptr());
    for (PackedCodes& packed : heads_) {
      packed.panels = panels();
      float* parts[7];
      for (int i = 0; i < 7; ++i) {
        parts[i] = next;
        next += sizes[i];
      }
      packed.mean = reinterpret_cast<double*>(parts[0]);
      packed.rows = parts[1];
      packed.panel_rows = parts[2];
      packed.panel_pairs = reinterpret_cast<int32_t*>(parts[3]);
      packed.half_norm = parts[4];
      packed.norm = parts[5];
      packed.residual = parts[6];
    }
    return storage;
  }

  int64_t panels() const { return (search_.codes + kernels().codes_per_panel - 1) / kernels().codes_per_panel; }

  void pack(int64_t head) {
    set_mean(head);
    std::vector<double> norms(search_.codes);
    std::vector<uint64_t> hashes(search_.codes);
    std::atomic<bool> finite{true};
    torch::stable::parallel_for(0, search_.codes, 256, [&](int64_t begin, int64_t end) {
      if (!kernels().measure(search_, head, begin, end, norms.data(), hashes.data())) finite.store(false);
    });
    STD_TORCH_CHECK(finite.load(), "codebook: got NaN or infinite values, takes finite ones");
    double largest = *std::max_element(norms.begin(), norms.end());
    int exponent = largest > 0.0 ? norm_exponent(largest) : 0;
    // Both ends leave the factor itself a normal float, or double.
    int limit = search_.wide ? 1000 : 120;
    heads_[head].scale = power_of_two(std::clamp(-exponent, -limit, limit));
    heads_[head].pairs = search_.pairs && exponent <= limit;
    std::vector<bool> skipped = repeated(head, hashes);
    torch::stable::parallel_for(0, panels(), 8, [&](int64_t begin, int64_t end) { kernels().pack(search_, head, skipped, begin, end); });
  }

  // Any vector would do; one near to all codes makes their norms, and with them the errors, small.
  void set_mean(int64_t head) {
    int64_t dim = search_.dim, step = std::max<int64_t>(search_.codes / kMeanCodes, 1), count = 0;
    double* mean = heads_[head].mean;
    std::vector<double> code(dim);
    std::fill(mean, mean + dim, 0.0);
    for (int64_t k = 0; k < search_.codes; k += step, ++count) {
      kernels().convert(search_.codebook, head, k, dim, code.data());
      for (int64_t d = 0; d < dim; ++d) mean[d] += code[d];
    }
    for (int64_t d = 0; d < dim; ++d) {
      mean[d] /= static_cast<double>(count);
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
        kernels().convert(search_.codebook, head, k, search_.dim, code.data());
        kernels().convert(search_.codebook, head, table[slot], search_.dim, other.data());
        found[k] = code == other;
      }
      if (!found[k]) table[slot] = k;
    }
    return found;
  }

  const Search& search_;
  std::vector<PackedCodes> heads_;
  Tensor storage_;
};

struct Codes {
  Tensor x, codebook;  // what the search reads, kept alive
  Search search;

  Codes(const Tensor& x_in, const Tensor& codebook_in, const Tensor& indices) {
    search = {};
    search.x = rows_of(x_in, x);
    search.codebook = rows_of(codebook_in, codebook);
    search.heads = x_in.size(0);
    search.rows = x_in.size(1);
    search.dim = x_in.size(2);
    search.codes = codebook_in.size(1);
    search.wide = search.x.dtype == DType::float64 || search.codebook.dtype == DType::float64;
    search.pairs = kernels().has_pairs && search.dim <= kLongestPairs;
    search.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  }

  void run() {
    if (search.heads == 0 || search.rows == 0) return;
    Packing packing(search);
    int64_t per_head = (search.rows + kernels().rows_per_block - 1) / kernels().rows_per_block;
    torch::stable::parallel_for(0, search.heads * per_head, 1,
                                [&](int64_t begin, int64_t end) { add_statistics(kernels().search(search, begin, end)); });
  }
};

double sum(const double* values, int64_t count) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

void set(const Tensor& tensor, int64_t i, double value) {
  if (tensor.scalar_type() == ScalarType::Double)
    static_cast<double*>(tensor.mutable_data_ptr())[i] = value;
  else
    static_cast<float*>(tensor.mutable_data_ptr())[i] = static_cast<float>(value);
}

std::tuple<Tensor, Tensor> codebook_nearest(const Tensor& x, const Tensor& codebook, bool with_distance) {
  std::vector<int64_t> shape{x.size(0), x.size(1)};
  Tensor indices = empty(shape, ScalarType::Long);
  Tensor distance = empty(with_distance ? shape : std::vector<int64_t>{0}, accumulation_dtype(x));
  Codes codes(x, codebook, indices);
  std::vector<double> errors(distance.numel());
  if (with_distance) codes.search.errors = errors.data();
  codes.run();
  for (int64_t i = 0; i < distance.numel(); ++i) set(distance, i, errors[i]);
  return {indices, distance};
}

std::tuple<Tensor, Tensor, Tensor> codebook_quantize(const Tensor& x, const Tensor& codebook, int64_t batch, int64_t reduction_number,
                                                     double loss_weight) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Tensor quantized = empty(shape_of(x), x.scalar_type());
  Tensor indices = empty({x.size(0), x.size(1)}, ScalarType::Long);
  bool elementwise = reduction == Reduction::none;
  std::vector<int64_t> loss_shape = elementwise ? shape_of(x) : std::vector<int64_t>{};
  if (reduction == Reduction::sample) loss_shape.push_back(batch);
  Tensor loss = empty(loss_shape, elementwise ? x.scalar_type() : accumulation_dtype(x));

  Codes codes(x, codebook, indices);
  std::vector<double> errors(elementwise ? 0 : indices.numel());
  codes.search.quantized = output_of(quantized);
  codes.search.loss_weight = loss_weight;
  if (elementwise)
    codes.search.loss = output_of(loss);
  else
    codes.search.errors = errors.data();
  codes.run();
  if (elementwise) return {quantized, indices, loss};
  int64_t sums = loss.numel(), rows = sums > 0 ? indices.numel() / sums : 0;
  double scale = loss_weight * reduction_scale(reduction, batch, x.numel());
  for (int64_t i = 0; i < sums; ++i) set(loss, i, scale * sum(errors.data() + i * rows, rows));
  return {quantized, indices, loss};
}

// Rows in the order of their codes, by counting; a negative index leaves its row out.
struct Sorted {
  std::vector<int64_t> starts, order, codes;

  Sorted(const int64_t* indices, int64_t rows, int64_t num_codes) : starts(num_codes + 1) {
    for (int64_t i = 0; i < rows; ++i) {
      STD_TORCH_CHECK(indices[i] < num_codes, "indices: got ", indices[i], ", takes indices below the number of codes, ", num_codes);
      if (indices[i] >= 0) ++starts[indices[i] + 1];
    }
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

// The sums over all rows of each code, in row order.
void sum_by_code(Segments s, const Sorted& sorted) {
  int64_t pieces = (s.count + kPieceRows - 1) / kPieceRows;
  std::vector<double> partial(2 * pieces * s.dim);
  s.order = sorted.order.data();
  s.codes = sorted.codes.data();
  s.starts = sorted.starts.data();
  s.partial = partial.data();
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) { kernels().sum_segments(s, begin, end); });

  std::vector<double> total(s.dim);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    int64_t begin = piece * kPieceRows, end = std::min(begin + kPieceRows, s.count);
    int64_t ends[2] = {s.codes[begin], s.codes[end - 1]};
    for (int slot = 0; slot < (ends[0] == ends[1] ? 1 : 2); ++slot) {
      int64_t k = ends[slot];
      if (s.starts[k] >= begin && s.starts[k + 1] <= end) continue;
      if (s.starts[k] >= begin) std::fill(total.begin(), total.end(), 0.0);
      for (int64_t d = 0; d < s.dim; ++d) total[d] += partial[(2 * piece + slot) * s.dim + d];
      if (s.starts[k + 1] <= end) kernels().write(s.sums, (s.head * s.num_codes + k) * s.dim, s.dim, total.data());
    }
  }
}

void fill_zero(const Tensor& tensor) { memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size()); }

std::tuple<Tensor, Tensor> codebook_sums(const Tensor& x, const Tensor& indices, int64_t codes) {
  int64_t heads = x.size(0), rows = x.size(1), dim = x.size(2);
  Tensor counts = empty({heads, codes}, ScalarType::Long), sums = empty({heads, codes, dim}, accumulation_dtype(x));
  fill_zero(sums);
  Tensor keep = x, dense_indices = dense(indices);
  Segments s{};
  s.x = rows_of(x, keep);
  s.rows = rows;
  s.dim = dim;
  s.wide = s.x.dtype == DType::float64;
  s.factor = 1.0;
  s.sums = output_of(sums);
  s.num_codes = codes;
  for (s.head = 0; s.head < heads; ++s.head) {
    Sorted sorted(static_cast<const int64_t*>(dense_indices.const_data_ptr()) + s.head * rows, rows, codes);
    auto* head_counts = static_cast<int64_t*>(counts.mutable_data_ptr()) + s.head * codes;
    for (int64_t k = 0; k < codes; ++k) head_counts[k] = sorted.starts[k + 1] - sorted.starts[k];
    s.count = static_cast<int64_t>(sorted.order.size());
    sum_by_code(s, sorted);
  }
  return {counts, sums};
}

std::tuple<Tensor, Tensor> codebook_quantize_backward(const OptionalTensor& grad_quantized, const OptionalTensor& grad_loss,
                                                      const Tensor& x, const Tensor& codebook, const Tensor& indices, int64_t batch,
                                                      int64_t reduction_number, double codebook_cost, double commitment_cost, bool rotation,
                                                      bool with_codebook) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Tensor grad_x = empty(shape_of(x), x.scalar_type());
  Tensor grad_codebook = empty(with_codebook ? shape_of(codebook) : std::vector<int64_t>{0}, codebook.scalar_type());
  if (with_codebook) fill_zero(grad_codebook);
  if (x.numel() == 0) return {grad_x, grad_codebook};

  Tensor kept_x = x, kept_codebook = codebook, kept_quantized = x, kept_loss = x, dense_indices = dense(indices);
  double scale = 2.0 * reduction_scale(reduction, batch, x.numel());
  Backward b{};
  b.x = rows_of(x, kept_x);
  b.codebook = rows_of(codebook, kept_codebook);
  if (grad_quantized) b.grad_quantized = rows_of(*grad_quantized, kept_quantized);
  b.heads = x.size(0);
  b.rows = x.size(1);
  b.codes = codebook.size(1);
  b.dim = x.size(2);
  b.wide = b.x.dtype == DType::float64 || b.codebook.dtype == DType::float64;
  b.indices = static_cast<const int64_t*>(dense_indices.const_data_ptr());
  if (grad_loss) b.grad_loss = gradient_view(*grad_loss, reduction, x.numel(), batch, kept_loss);
  b.loss_factor = scale * commitment_cost;
  b.rotation = rotation;
  b.grad_x = output_of(grad_x);
  int64_t grain = std::max<int64_t>(kItemElements / b.dim, 1);
  torch::stable::parallel_for(0, b.heads * b.rows, grain, [&](int64_t begin, int64_t end) { kernels().backward(b, begin, end); });
  if (!with_codebook || !grad_loss) return {grad_x, grad_codebook};

  Segments s{};
  s.x = b.x;
  s.codebook = b.codebook;
  s.rows = b.rows;
  s.dim = b.dim;
  s.wide = b.wide;
  s.grad_loss = b.grad_loss;
  s.factor = scale * codebook_cost;
  s.sums = output_of(grad_codebook);
  s.num_codes = b.codes;
  for (s.head = 0; s.head < b.heads; ++s.head) {
    Sorted sorted(b.indices + s.head * b.rows, b.rows, b.codes);
    s.count = static_cast<int64_t>(sorted.order.size());
    sum_by_code(s, sorted);
  }
  return {grad_x, grad_codebook};
}

template <class T>
void ema_step(Tensor& codebook, Tensor& ema_count, Tensor& ema_sum, const Tensor& counts, const Tensor& sums, double decay, double eps) {
  int64_t heads = codebook.size(0), codes = codebook.size(1), dim = codebook.size(2);
  auto *code = static_cast<T*>(codebook.mutable_data_ptr()), *count = static_cast<T*>(ema_count.mutable_data_ptr()),
       *mean = static_cast<T*>(ema_sum.mutable_data_ptr());
  const auto* hits = static_cast<const int64_t*>(counts.const_data_ptr());
  const void* added = sums.const_data_ptr();
  bool wide_sums = sums.scalar_type() == ScalarType::Double;
  for (int64_t head = 0; head < heads; ++head) {
    double total = 0.0;
    for (int64_t k = head * codes; k < (head + 1) * codes; ++k) {
      count[k] = static_cast<T>(moving_average(count[k], static_cast<double>(hits[k]), decay));
      total += count[k];
    }
    for (int64_t k = head * codes; k < (head + 1) * codes; ++k) {
      double smoothed = smoothed_count(count[k], total, codes, eps);
      double inverse = 1.0 / smoothed;
      for (int64_t i = k * dim; i < (k + 1) * dim; ++i) {
        double sum = wide_sums ? static_cast<const double*>(added)[i] : static_cast<const float*>(added)[i];
        mean[i] = static_cast<T>(moving_average(mean[i], sum, decay));
        if (smoothed > 0.0) code[i] = static_cast<T>(mean[i] * inverse);
      }
    }
  }
}

void codebook_ema_(Tensor codebook, Tensor ema_count, Tensor ema_sum, const Tensor& counts, const Tensor& sums, double decay, double eps) {
  Tensor dense_counts = dense(counts), dense_sums = dense(sums);
  if (codebook.scalar_type() == ScalarType::Double)
    ema_step<double>(codebook, ema_count, ema_sum, dense_counts, dense_sums, decay, eps);
  else
    ema_step<float>(codebook, ema_count, ema_sum, dense_counts, dense_sums, decay, eps);
}

}  // namespace

SearchCounts codebook_statistics(bool reset) {
  std::lock_guard<std::mutex> lock(statistics_mutex);
  SearchCounts counts = statistics;
  if (reset) statistics = {};
  return counts;
}

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("codebook_nearest.cpp", TORCH_BOX(&codebook_nearest));
  m.impl("codebook_quantize.cpp", TORCH_BOX(&codebook_quantize));
  m.impl("codebook_quantize_backward.cpp", TORCH_BOX(&codebook_quantize_backward));
  m.impl("codebook_sums.cpp", TORCH_BOX(&codebook_sums));
  m.impl("codebook_ema_.cpp", TORCH_BOX(&codebook_ema_));
}

}  // namespace fastvae
