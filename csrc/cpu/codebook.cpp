// The codebook operators on the CPU. They allocate the results, share the work among threads, finish the sums, and choose the kernels of an
// instruction set.
#include <algorithm>
#include <mutex>

#include "codebook_kernels.h"
#include "codebook_steps.h"
#include "tensor.h"

namespace fastvae {
namespace {

// An operator calls this once, because another thread may select another instruction set between two steps, and the size of a panel depends
// on the instruction set.
const CodebookKernels& selected_kernels() { return FASTVAE_SELECT_VNNI_KERNELS(codebook); }

constexpr auto parallel_for = [](int64_t begin, int64_t end, int64_t grain, const auto& f) {
  torch::stable::parallel_for(begin, end, grain, f);
};

std::mutex statistics_mutex;
CodebookSearchCounts statistics;

void add_statistics(const CodebookSearchCounts& counts) {
  std::lock_guard<std::mutex> lock(statistics_mutex);
  statistics.rows += counts.rows;
  statistics.rechecked += counts.rechecked;
  statistics.screened_again += counts.screened_again;
}

// The search for `rows` vectors a head in the codebook (heads, codes, dim). The operator adds the outputs.
CodebookSearch search_of(const CodebookRows& x, int64_t rows, const Tensor& codebook, const CodebookKernels& kernels, Copies& copies) {
  CodebookSearch search{};
  search.x = x;
  search.codebook = codebook_rows_of(codebook, copies);
  search.heads = codebook.size(0);
  search.rows = rows;
  search.codes = codebook.size(1);
  search.dim = codebook.size(2);
  search.is_double = search.x.dtype == DType::float64 || search.codebook.dtype == DType::float64;
  search.with_pairs = kernels.has_pairs && search.dim <= kMaxPairDim;
  return search;
}

// Packs the codebook for a search. Returns the memory of the packed codes.
Tensor pack(CodebookPacking& packing, const char* argument) {
  Tensor memory = cpu.empty({packing.memory_size()}, ScalarType::Float);
  bool finite = packing.pack(static_cast<float*>(memory.mutable_data_ptr()), parallel_for);
  STD_TORCH_CHECK(finite, argument, ": got NaN or infinite values, takes finite ones");
  return memory;
}

// The search of an operator, whose optional outputs the operator adds before it calls run().
struct CodebookCall {
  Copies copies;
  const CodebookKernels& kernels;
  CodebookSearch search;

  CodebookCall(const Tensor& x, const Tensor& codebook, const Tensor& indices) : kernels(selected_kernels()) {
    copies.reserve(2);
    search = search_of(codebook_rows_of(x, copies), x.size(1), codebook, kernels, copies);
    search.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  }

  void run() {
    if (search.heads == 0 || search.rows == 0) return;
    CodebookPacking packing(search, kernels);
    Tensor memory = pack(packing, "codebook");
    parallel_for(0, search_blocks(search, kernels), 1,
                 [&](int64_t begin, int64_t end) { add_statistics(kernels.search(search, begin, end)); });
  }
};

double sum(const double* values, int64_t count) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

// Sets an element of a tensor of sums.
void set(const Tensor& tensor, int64_t i, double value) {
  if (tensor.scalar_type() == ScalarType::Double)
    static_cast<double*>(tensor.mutable_data_ptr())[i] = value;
  else
    static_cast<float*>(tensor.mutable_data_ptr())[i] = static_cast<float>(value);
}

// An element of a tensor of sums.
double get(const Tensor& tensor, int64_t i) {
  const void* data = tensor.const_data_ptr();
  return tensor.scalar_type() == ScalarType::Double ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
}

std::tuple<Tensor, Tensor> codebook_nearest(const Tensor& x, const Tensor& codebook, bool with_distance) {
  Sizes shape{x.size(0), x.size(1)};
  Tensor indices = cpu.empty(shape, ScalarType::Long);
  Tensor distance = cpu.empty(with_distance ? shape : Sizes{0}, accumulation_dtype(x));
  CodebookCall call(x, codebook, indices);
  std::vector<double> square_error(distance.numel());
  if (with_distance) call.search.square_error = square_error.data();
  call.run();
  for (int64_t i = 0; i < distance.numel(); ++i) set(distance, i, square_error[i]);
  return {indices, distance};
}

std::tuple<Tensor, Tensor, Tensor> codebook_quantize(const Tensor& x, const Tensor& codebook, int64_t batch, int64_t reduction_number,
                                                     double loss_weight) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Tensor quantized = cpu.empty(shape_of(x), x.scalar_type());
  Tensor indices = cpu.empty({x.size(0), x.size(1)}, ScalarType::Long);
  bool elementwise = reduction == Reduction::none;
  Tensor loss = cpu.empty_reduced(x, batch, reduction);

  CodebookCall call(x, codebook, indices);
  std::vector<double> square_error(elementwise ? 0 : indices.numel());
  call.search.quantized = output_of(quantized);
  call.search.loss_weight = loss_weight;
  if (elementwise)
    call.search.loss = output_of(loss);
  else
    call.search.square_error = square_error.data();
  call.run();
  if (elementwise) return {quantized, indices, loss};
  int64_t sums = loss.numel(), rows = sums > 0 ? indices.numel() / sums : 0;
  double scale = loss_weight * reduction_scale(reduction, batch, x.numel());
  for (int64_t i = 0; i < sums; ++i) set(loss, i, scale * sum(square_error.data() + i * rows, rows));
  return {quantized, indices, loss};
}

void check_indices(const int64_t* indices, int64_t count, int64_t codes) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(indices[i] < codes, "indices: got ", indices[i], ", takes indices below the number of codes, ", codes);
}

// Whether elements [begin, end) of a tensor of sums are finite.
bool are_finite(const Tensor& sums, int64_t begin, int64_t end) {
  const void* data = sums.const_data_ptr();
  bool is_double = sums.scalar_type() == ScalarType::Double;
  uint64_t bits = 0;
  for (int64_t i = begin; i < end; ++i)
    bits |= not_finite_bit(is_double ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i]);
  return bits >> 63 == 0;
}

// Writes the counts and sums of a head.
void sum_head(const CodebookSums& s, const int64_t* indices, const CodebookKernels& kernels, const Tensor& counts) {
  CodebookOrder sorted(indices, s.rows, s.num_codes);
  auto* head_counts = static_cast<int64_t*>(counts.mutable_data_ptr()) + s.head * s.num_codes;
  for (int64_t k = 0; k < s.num_codes; ++k) head_counts[k] = sorted.starts[k + 1] - sorted.starts[k];
  sum_by_code(s, sorted, kernels, parallel_for);
}

std::tuple<Tensor, Tensor> codebook_sums(const Tensor& x, const Tensor& indices, int64_t codes) {
  int64_t heads = x.size(0), rows = x.size(1), dim = x.size(2), head_size = codes * dim;
  Tensor counts = cpu.empty({heads, codes}, ScalarType::Long), sums = cpu.empty({heads, codes, dim}, accumulation_dtype(x));
  set_bytes(sums, 0);
  Copies copies;
  Tensor dense_indices = dense(indices);
  const auto* index = static_cast<const int64_t*>(dense_indices.const_data_ptr());
  check_indices(index, heads * rows, codes);
  const CodebookKernels& kernels = selected_kernels();
  CodebookSums s{};
  s.x = codebook_rows_of(x, copies);
  s.rows = rows;
  s.dim = dim;
  s.is_double = s.x.dtype == DType::float64;
  s.factor = 1.0;
  s.sums = output_of(sums);
  s.num_codes = codes;
  for (s.head = 0; s.head < heads; ++s.head) {
    sum_head(s, index + s.head * rows, kernels, counts);
    if (are_finite(sums, s.head * head_size, (s.head + 1) * head_size)) continue;
    // A row that is not finite makes the sum of its code so too. Only then are rows checked one by one, and those left out.
    memset(static_cast<char*>(sums.mutable_data_ptr()) + s.head * head_size * sums.element_size(), 0, head_size * sums.element_size());
    sum_head(s, indices_of_finite_rows(s, index + s.head * rows, kernels).data(), kernels, counts);
  }
  return {counts, sums};
}

std::tuple<Tensor, Tensor> codebook_quantize_backward(const OptionalTensor& grad_quantized, const OptionalTensor& grad_loss,
                                                      const Tensor& x, const Tensor& codebook, const Tensor& indices, int64_t batch,
                                                      int64_t reduction_number, double codebook_cost, double commitment_cost, bool rotation,
                                                      bool with_codebook) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Tensor grad_x = cpu.empty(shape_of(x), x.scalar_type());
  Tensor grad_codebook = cpu.empty(with_codebook ? shape_of(codebook) : Sizes{0}, codebook.scalar_type());
  if (with_codebook) set_bytes(grad_codebook, 0);
  if (x.numel() == 0) return {grad_x, grad_codebook};

  Copies copies;
  copies.reserve(4);
  Tensor dense_indices = dense(indices);
  double scale = 2.0 * reduction_scale(reduction, batch, x.numel());
  CodebookBackward b{};
  b.x = codebook_rows_of(x, copies);
  b.codebook = codebook_rows_of(codebook, copies);
  if (grad_quantized) b.grad_quantized = codebook_rows_of(*grad_quantized, copies);
  b.heads = x.size(0);
  b.rows = x.size(1);
  b.codes = codebook.size(1);
  b.dim = x.size(2);
  b.is_double = b.x.dtype == DType::float64 || b.codebook.dtype == DType::float64;
  b.indices = static_cast<const int64_t*>(dense_indices.const_data_ptr());
  if (grad_loss) b.grad_loss = gradient_view(*grad_loss, reduction, x.numel(), batch, copies);
  b.loss_factor = scale * commitment_cost;
  b.rotation = rotation;
  b.grad_x = output_of(grad_x);
  const CodebookKernels& kernels = selected_kernels();
  int64_t grain = std::max<int64_t>(kItemElements / b.dim, 1);
  parallel_for(0, b.heads * b.rows, grain, [&](int64_t begin, int64_t end) { kernels.backward(b, begin, end); });
  if (!with_codebook || !grad_loss) return {grad_x, grad_codebook};

  CodebookSums s{};
  s.x = b.x;
  s.codebook = b.codebook;
  s.rows = b.rows;
  s.dim = b.dim;
  s.is_double = b.is_double;
  s.grad_loss = b.grad_loss;
  s.factor = scale * codebook_cost;
  s.sums = output_of(grad_codebook);
  s.num_codes = b.codes;
  check_indices(b.indices, b.heads * b.rows, b.codes);
  for (s.head = 0; s.head < b.heads; ++s.head)
    sum_by_code(s, CodebookOrder(b.indices + s.head * b.rows, b.rows, b.codes), kernels, parallel_for);
  return {grad_x, grad_codebook};
}

// The view of a tensor (rows, dim) as one head.
CodebookRows one_head_of(const Tensor& tensor, Copies& copies) {
  const Tensor& vectors = with_contiguous_vectors(tensor, copies);
  return {vectors.const_data_ptr(), dtype_of(vectors), 0, vectors.stride(0)};
}

// The factor of the sum of the squared errors of a step in its loss: the loss is a mean over the rows that the mask leaves. `mask` has no
// data where all rows count.
double residual_scale(const uint8_t* mask, int64_t rows, int64_t dim) {
  int64_t kept = mask == nullptr ? rows : std::count_if(mask, mask + rows, [](uint8_t value) { return value != 0; });
  return 1.0 / static_cast<double>(std::max<int64_t>(kept * dim, 1));
}

const uint8_t* mask_data(const OptionalTensor& mask, Copies& copies) {
  return mask ? static_cast<const uint8_t*>(readable(*mask, copies).const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> codebook_residual_quantize(const Tensor& x, const Tensor& codebooks, const OptionalTensor& mask,
                                                                      double loss_weight, bool with_residuals) {
  int64_t rows = x.size(0), dim = x.size(1), steps = codebooks.size(0);
  Tensor quantized = cpu.empty({rows, dim}, x.scalar_type());
  Tensor indices = cpu.empty({rows, steps}, ScalarType::Long);
  Tensor losses = cpu.empty({steps}, accumulation_dtype(x));
  Tensor residuals = cpu.empty(with_residuals ? Sizes{steps, rows, dim} : Sizes{0}, x.scalar_type());
  set_bytes(losses, 0);
  if (rows == 0) return {quantized, indices, losses, residuals};

  const CodebookKernels& kernels = selected_kernels();
  Copies copies;
  copies.reserve(3);
  CodebookResidual r{};
  r.search = search_of(one_head_of(x, copies), rows, codebooks, kernels, copies);
  r.mask = mask_data(mask, copies);
  r.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  r.quantized = output_of(quantized);
  if (with_residuals) r.residuals = output_of(residuals);
  CodebookPacking packing(r.search, kernels);
  Tensor memory = pack(packing, "codebooks");
  int64_t blocks = ceil_div(rows, kernels.rows_per_block);
  std::vector<double> square_errors(steps * blocks);
  r.square_errors = square_errors.data();
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { add_statistics(kernels.residual(r, begin, end)); });
  double scale = loss_weight * residual_scale(r.mask, rows, dim);
  for (int64_t step = 0; step < steps; ++step) set(losses, step, scale * sum(square_errors.data() + step * blocks, blocks));
  return {quantized, indices, losses, residuals};
}

// Writes the gradients of the codebooks, from what each step searched for.
void sum_residual_gradients(const CodebookResidualBackward& b, const Tensor& grad_losses, double factor, const Tensor& grad_codebooks,
                            const CodebookKernels& kernels) {
  Copies copies;
  copies.reserve(1);
  CodebookSums s{};
  s.x = {b.residuals.data, b.residuals.dtype, b.rows * b.dim, b.dim};
  s.codebook = b.codebooks;
  s.rows = b.rows;
  s.dim = b.dim;
  s.is_double = b.is_double;
  s.grad_loss = gradient_view(grad_losses, Reduction::sample, b.steps * b.rows * b.dim, b.steps, copies);
  s.factor = factor;
  s.sums = output_of(grad_codebooks);
  s.num_codes = grad_codebooks.size(1);
  std::vector<int64_t> indices(b.rows);
  for (s.head = 0; s.head < b.steps; ++s.head) {
    for (int64_t i = 0; i < b.rows; ++i) indices[i] = b.indices[i * b.steps + s.head];
    check_indices(indices.data(), b.rows, s.num_codes);
    sum_by_code(s, CodebookOrder(indices.data(), b.rows, s.num_codes), kernels, parallel_for);
  }
}

std::tuple<Tensor, Tensor> codebook_residual_quantize_backward(const OptionalTensor& grad_quantized, const OptionalTensor& grad_losses,
                                                               const Tensor& x, const Tensor& codebooks, const OptionalTensor& mask,
                                                               const Tensor& indices, double codebook_cost, double commitment_cost,
                                                               bool with_codebooks) {
  int64_t rows = x.size(0), dim = x.size(1), steps = codebooks.size(0);
  Tensor grad_x = cpu.empty({rows, dim}, x.scalar_type());
  Tensor grad_codebooks = cpu.empty(with_codebooks ? shape_of(codebooks) : Sizes{0}, codebooks.scalar_type());
  set_bytes(grad_codebooks, 0);
  if (rows == 0) return {grad_x, grad_codebooks};

  Copies copies;
  copies.reserve(5);
  bool sums_codes = with_codebooks && grad_losses;
  Tensor residuals = cpu.empty(sums_codes ? Sizes{steps, rows, dim} : Sizes{0}, x.scalar_type());
  double scale = 2.0 * residual_scale(mask_data(mask, copies), rows, dim);
  CodebookResidualBackward b{};
  b.x = one_head_of(x, copies);
  b.codebooks = codebook_rows_of(codebooks, copies);
  if (grad_quantized) b.grad_quantized = one_head_of(*grad_quantized, copies);
  b.rows = rows;
  b.steps = steps;
  b.dim = dim;
  b.is_double = b.x.dtype == DType::float64 || b.codebooks.dtype == DType::float64;
  b.indices = static_cast<const int64_t*>(readable(indices, copies).const_data_ptr());
  std::vector<double> loss_gradients(steps);
  if (grad_losses) {
    Tensor values = dense(*grad_losses);
    for (int64_t step = 0; step < steps; ++step) loss_gradients[step] = get(values, step);
    b.grad_losses = loss_gradients.data();
  }
  b.loss_factor = scale * commitment_cost;
  b.grad_x = output_of(grad_x);
  if (sums_codes) b.residuals = output_of(residuals);
  const CodebookKernels& kernels = selected_kernels();
  int64_t grain = std::max<int64_t>(kItemElements / (dim * steps), 1);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernels.residual_backward(b, begin, end); });
  if (sums_codes) sum_residual_gradients(b, *grad_losses, scale * codebook_cost, grad_codebooks, kernels);
  return {grad_x, grad_codebooks};
}

// Updates the moving averages (heads, codes) of the counts and (heads, codes, dim) of the sums, and the codes, which are their quotients.
template <class T>
void ema_step(Tensor& codebook, Tensor& ema_count, Tensor& ema_sum, const Tensor& counts, const Tensor& sums, double decay, double eps) {
  int64_t heads = codebook.size(0), codes = codebook.size(1), dim = codebook.size(2);
  auto *code = static_cast<T*>(codebook.mutable_data_ptr()), *average_count = static_cast<T*>(ema_count.mutable_data_ptr()),
       *average_sum = static_cast<T*>(ema_sum.mutable_data_ptr());
  const auto* new_counts = static_cast<const int64_t*>(counts.const_data_ptr());
  const void* new_sums = sums.const_data_ptr();
  bool sums_are_double = sums.scalar_type() == ScalarType::Double;
  for (int64_t head = 0; head < heads; ++head) {
    double total = 0.0;
    for (int64_t k = head * codes; k < (head + 1) * codes; ++k) {
      average_count[k] = static_cast<T>(moving_average(average_count[k], static_cast<double>(new_counts[k]), decay));
      total += average_count[k];
    }
    for (int64_t k = head * codes; k < (head + 1) * codes; ++k) {
      double smoothed = smoothed_count(average_count[k], total, codes, eps);
      double inverse = 1.0 / smoothed;
      for (int64_t i = k * dim; i < (k + 1) * dim; ++i) {
        double sum = sums_are_double ? static_cast<const double*>(new_sums)[i] : static_cast<const float*>(new_sums)[i];
        average_sum[i] = static_cast<T>(moving_average(average_sum[i], sum, decay));
        if (smoothed > 0.0) code[i] = static_cast<T>(average_sum[i] * inverse);
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

CodebookSearchCounts codebook_statistics(bool reset) {
  std::lock_guard<std::mutex> lock(statistics_mutex);
  CodebookSearchCounts counts = statistics;
  if (reset) statistics = {};
  return counts;
}

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("codebook_nearest.cpp", TORCH_BOX(&codebook_nearest));
  m.impl("codebook_quantize.cpp", TORCH_BOX(&codebook_quantize));
  m.impl("codebook_quantize_backward.cpp", TORCH_BOX(&codebook_quantize_backward));
  m.impl("codebook_residual_quantize.cpp", TORCH_BOX(&codebook_residual_quantize));
  m.impl("codebook_residual_quantize_backward.cpp", TORCH_BOX(&codebook_residual_quantize_backward));
  m.impl("codebook_sums.cpp", TORCH_BOX(&codebook_sums));
  m.impl("codebook_ema_.cpp", TORCH_BOX(&codebook_ema_));
}

}  // namespace fastvae
