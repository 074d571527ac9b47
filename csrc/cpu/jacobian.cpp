// The Jacobian operators on the CPU: what they allocate, how they share the work, and which instruction set's kernels do it.
#include "jacobian.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "tensor.h"

namespace fastvae {
namespace {

const JacobianKernels& kernels() { return FASTVAE_SELECT_KERNELS(jacobian); }

using Copies = std::vector<Tensor>;

Rows rows_of(const Tensor& tensor, Copies& copies) {
  bool contiguous_rows = tensor.stride(1) == 1 || tensor.size(1) <= 1;
  copies.push_back(contiguous_rows ? tensor : dense(tensor));
  return {copies.back().const_data_ptr(), dtype_of(tensor), copies.back().stride(0)};
}

Tensor empty_if(bool wanted, const Tensor& like) { return empty(wanted ? shape_of(like) : std::vector<int64_t>{0}, like.scalar_type()); }

ContractivePenalty problem(const Tensor& hidden, const Tensor& weight, int64_t activation, double alpha, const Tensor& norms,
                           Copies& copies) {
  ContractivePenalty p{};
  p.activation = static_cast<Activation>(activation);
  p.alpha = alpha;
  p.hidden = rows_of(hidden, copies);
  p.weight = rows_of(weight, copies);
  p.batch = hidden.size(0);
  p.units = hidden.size(1);
  p.inputs = weight.size(1);
  p.wide = hidden.scalar_type() == ScalarType::Double;
  p.squared_norms = norms.mutable_data_ptr();
  return p;
}

void run(const ContractivePenalty& p) {
  torch::stable::parallel_for(0, p.blocks(), 1, [&](int64_t begin, int64_t end) { kernels().contractive_penalty(p, begin, end); });
}

double value_of(const Tensor& scalar) {
  return scalar.scalar_type() == ScalarType::Double ? *static_cast<const double*>(scalar.const_data_ptr())
                                                    : static_cast<double>(*static_cast<const float*>(scalar.const_data_ptr()));
}

void write_values(const std::vector<double>& values, double scale, const Tensor& out) {
  finish_reduction(values, Partition(static_cast<int64_t>(values.size()), 1), scale, out);
}

// sums[i, j] over i, in order.
std::vector<double> sum_items(const std::vector<double>& sums, int64_t items, int64_t count) {
  std::vector<double> totals(count);
  for (int64_t item = 0; item < items; ++item)
    for (int64_t i = 0; i < count; ++i) totals[i] += sums[item * count + i];
  return totals;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jacobian_forward(const Tensor& hidden, const Tensor& weight, int64_t activation, double alpha,
                                                            int64_t reduction_number, double grad_scale, bool with_grad_hidden,
                                                            bool with_grad_weight) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Tensor penalty = empty_reduced(hidden, reduction);
  Tensor norms = empty({weight.size(0)}, accumulation_dtype(hidden));
  Tensor grad_hidden = empty_if(with_grad_hidden, hidden), grad_weight = empty_if(with_grad_weight, weight);

  Copies copies;
  ContractivePenalty p = problem(hidden, weight, activation, alpha, norms, copies);
  double scale = reduction_scale(reduction, p.batch, p.batch * p.units);
  p.grad_scale = grad_scale * scale;
  if (with_grad_hidden) p.grad_hidden = output_of(grad_hidden);
  if (with_grad_weight) p.grad_weight = output_of(grad_weight);
  std::vector<double> sums;
  if (reduction == Reduction::none) {
    p.elements = output_of(penalty);
  } else if (reduction == Reduction::sample) {
    sums.resize(p.blocks() * p.batch);
    p.sample_sums = sums.data();
  } else {
    sums.resize(p.blocks());
    p.sums = sums.data();
  }
  run(p);
  if (reduction == Reduction::sample)
    write_values(sum_items(sums, p.blocks(), p.batch), 1.0, penalty);
  else if (reduction != Reduction::none)
    write_values(sum_items(sums, p.blocks(), 1), scale, penalty);
  return {penalty, norms, grad_hidden, grad_weight};
}

std::tuple<Tensor, Tensor> jacobian_backward(const Tensor& grad_output, const Tensor& hidden, const Tensor& weight,
                                             const Tensor& squared_norms, int64_t activation, double alpha, int64_t reduction_number,
                                             bool with_grad_hidden, bool with_grad_weight) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Tensor grad_hidden = empty_if(with_grad_hidden, hidden), grad_weight = empty_if(with_grad_weight, weight);

  Copies copies;
  Tensor norms = dense(squared_norms), incoming = reduction == Reduction::sample ? dense(grad_output) : grad_output;
  ContractivePenalty p = problem(hidden, weight, activation, alpha, norms, copies);
  p.norms_known = true;
  p.grad_scale = reduction_scale(reduction, p.batch, p.batch * p.units);
  if (reduction == Reduction::none)
    p.element_weights = rows_of(grad_output, copies);
  else if (reduction == Reduction::sample)
    p.sample_weights = incoming.const_data_ptr();
  else
    p.grad_scale *= value_of(grad_output);
  if (with_grad_hidden) p.grad_hidden = output_of(grad_hidden);
  if (with_grad_weight) p.grad_weight = output_of(grad_weight);
  run(p);
  return {grad_hidden, grad_weight};
}

ScaledMatrices matrices_of(const Tensor& left, const Tensor& inner, const Tensor& outer, Copies& copies) {
  for (const Tensor& tensor : {left, inner, outer}) copies.push_back(dense(tensor));
  return {copies[0].const_data_ptr(),
          copies[1].const_data_ptr(),
          copies[2].const_data_ptr(),
          outer.size(0),
          outer.size(1),
          inner.size(1),
          left.dim() == 3,
          left.scalar_type() == ScalarType::Double};
}

// What is scaled at a time: little enough for a second-level cache to hold it, its product and the Gram matrix, and at least so many rows,
// without which a product with a larger Gram matrix is slow.
constexpr int64_t kGramElements = 1 << 17, kGramRows = 512;
// A batch is cut into so many parts at most, each with sums of its own: enough for the threads, few enough to add up. Beyond so many
// elements of sums there are fewer, down to one whose products use all threads.
constexpr int64_t kGramParts = 16, kGramSums = 1 << 22;

// A matrix in the memory of another tensor.
Tensor window(const Tensor& memory, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, int64_t offset) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), 2, sizes, strides, offset, &handle));
  return Tensor(handle);
}

// The lower left of a.T @ b is not computed: it is symmetric, and this leaves out three eighths of its columns.
struct SymmetricBlocks {
  static constexpr int64_t kBlocks = 4, kLeast = 64;
  int64_t size, width;

  explicit SymmetricBlocks(int64_t size) : size(size), width(ceil_divide(size, kBlocks)) {
    if (width < kLeast) width = kLeast;
  }

  // Writes to the matrix at the offset, or adds to it.
  void multiply(const Tensor& a, const Tensor& b, int64_t rows, const Tensor& out, int64_t offset, bool adds) const {
    for (int64_t begin = 0; begin < size; begin += width) {
      int64_t count = begin + width < size ? width : size - begin;
      Tensor left = window(a, count, rows, 1, size, begin), right = window(b, rows, size - begin, size, 1, begin),
             block = window(out, count, size - begin, size, 1, offset + begin * size + begin);
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(block.get(), block.get(), left.get(), right.get(), adds ? 1.0 : 0.0, 1.0));
    }
  }

  int64_t first_column(int64_t row) const { return row / width * width; }
};

// Adds up the parts' matrices, and mirrors what is right of the diagonal's blocks.
template <class T>
void add_symmetric_parts(const Tensor& parts, int64_t count, const SymmetricBlocks& blocks, const Tensor& out) {
  const T* values = static_cast<const T*>(parts.const_data_ptr());
  T* sums = static_cast<T*>(out.mutable_data_ptr());
  int64_t size = blocks.size;
  torch::stable::parallel_for(0, size, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t first = blocks.first_column(row), offset = row * size + first;
      kernels().gram_add(values + offset, size * size, count, size - first, sizeof(T) == sizeof(double), sums + offset);
      for (int64_t column = first + blocks.width; column < size; ++column) sums[column * size + row] = sums[row * size + column];
    }
  });
}

// The norms of a batch: each part of it has sums of its own, which are added up in their order.
template <class T>
class GramForm {
 public:
  // `whole` points to the tensors' beginnings.
  GramForm(const GramReduce& whole, const Tensor& gram)
      : whole(whole),
        m(whole.matrices),
        size(m.rows * m.columns),
        samples(least(m.batch, most(ceil_divide(kGramRows, m.rows), kGramElements / size))),
        parts(least(ceil_divide(m.batch, samples), most(1, least(kGramParts, kGramSums / (m.columns * m.columns))))),
        gram(gram),
        blocks(m.columns),
        lefts(buffer(shares_left() ? parts : 0, size)),
        grams(buffer(whole.with_grad ? parts : 0, m.columns * m.columns)) {}

  void run() const {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      Tensor scaled = buffer(samples * m.rows, m.columns), product = buffer(samples * m.rows, m.columns);
      for (int64_t part = first; part < last; ++part) run_part(part, scaled, product);
    });
  }

  void add_up(const Tensor& grad_left, const Tensor& grad_gram) const {
    add_symmetric_parts<T>(grams, parts, blocks, grad_gram);
    if (shares_left()) kernels().gram_add(lefts.const_data_ptr(), size, parts, size, m.wide, grad_left.mutable_data_ptr());
  }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

  bool shares_left() const { return whole.with_grad && !m.left_is_batched; }
  Tensor buffer(int64_t rows, int64_t columns) const { return empty({rows, columns}, gram.scalar_type()); }

  void run_part(int64_t part, const Tensor& scaled, const Tensor& product) const {
    int64_t begin = part * m.batch / parts, end = (part + 1) * m.batch / parts;
    for (int64_t first = begin; first < end; first += samples)
      run_samples(part, first, least(first + samples, end), first > begin, scaled, product);
  }

  void run_samples(int64_t part, int64_t begin, int64_t end, bool adds, const Tensor& scaled, const Tensor& product) const {
    int64_t rows = (end - begin) * m.rows;
    kernels().gram_scale(m, scaled.mutable_data_ptr(), begin, end);
    Tensor left = window(scaled, rows, m.columns, m.columns, 1, 0), out = window(product, rows, m.columns, m.columns, 1, 0);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), gram.get()));
    GramReduce p = whole;
    p.scaled = scaled.const_data_ptr();
    p.product = product.mutable_data_ptr();
    if (whole.with_grad) p.grad_left = grad_left_of(part, begin);
    p.adds = adds && !m.left_is_batched;
    kernels().gram_reduce(p, begin, end);
    if (p.with_grad) blocks.multiply(scaled, p.weights ? product : scaled, rows, grams, part * m.columns * m.columns, adds);
  }

  void* grad_left_of(int64_t part, int64_t sample) const {
    return m.left_is_batched ? static_cast<T*>(whole.grad_left) + sample * size : static_cast<T*>(lefts.mutable_data_ptr()) + part * size;
  }

  GramReduce whole;
  const ScaledMatrices& m;
  int64_t size, samples, parts;
  Tensor gram;
  SymmetricBlocks blocks;
  Tensor lefts, grams;
};

template <class T>
void run_gram(const GramReduce& p, const Tensor& gram, const Tensor& grad_left, const Tensor& grad_gram) {
  GramForm<T> form(p, gram);
  form.run();
  if (p.with_grad) form.add_up(grad_left, grad_gram);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> jacobian_gram(const Tensor& left, const Tensor& inner, const Tensor& outer,
                                                                 const Tensor& gram, const OptionalTensor& weights, bool with_grad) {
  Copies copies;
  ScaledMatrices m = matrices_of(left, inner, outer, copies);
  Tensor norms = empty({m.batch}, outer.scalar_type());
  Tensor grad_left = empty_if(with_grad, left), grad_inner = empty_if(with_grad, inner), grad_outer = empty_if(with_grad, outer),
         grad_gram = empty_if(with_grad, gram);
  if (m.batch * m.rows * m.columns == 0) {
    for (Tensor* tensor : {&norms, &grad_left, &grad_inner, &grad_outer, &grad_gram}) torch::stable::zero_(*tensor);
    return {norms, grad_left, grad_inner, grad_outer, grad_gram};
  }
  if (weights) copies.push_back(dense(*weights));
  GramReduce p{m,
               weights ? copies.back().const_data_ptr() : nullptr,
               nullptr,
               nullptr,
               norms.mutable_data_ptr(),
               grad_inner.mutable_data_ptr(),
               grad_outer.mutable_data_ptr(),
               grad_left.mutable_data_ptr(),
               with_grad,
               false};
  Tensor square = dense(gram);
  m.wide ? run_gram<double>(p, square, grad_left, grad_gram) : run_gram<float>(p, square, grad_left, grad_gram);
  return {norms, grad_left, grad_inner, grad_outer, grad_gram};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("jacobian_forward.cpp", TORCH_BOX(&jacobian_forward));
  m.impl("jacobian_backward.cpp", TORCH_BOX(&jacobian_backward));
  m.impl("jacobian_gram.cpp", TORCH_BOX(&jacobian_gram));
}

}  // namespace fastvae
