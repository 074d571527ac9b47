// The Jacobian operators on the CPU. They allocate the results, share the work among threads, and choose the kernels of an instruction set.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "jacobian_kernels.h"
#include "tensor.h"

namespace fastvae {
namespace {

// An operator calls this once, because another thread may select another instruction set between two calls, and the size of a panel depends
// on the instruction set.
const JacobianKernels& selected_kernels() { return FASTVAE_SELECT_KERNELS(jacobian); }

JacobianRows rows_of(const Tensor& tensor, Copies& copies) {
  const Tensor& rows = with_contiguous_vectors(tensor, copies);
  return {rows.const_data_ptr(), dtype_of(rows), rows.stride(0)};
}

// Fills in what both passes read.
ContractivePenalty penalty_of(const Tensor& hidden, const Tensor& weight, int64_t activation, double alpha, const Tensor& norms,
                              Copies& copies) {
  ContractivePenalty p{};
  p.activation = static_cast<Activation>(activation);
  p.alpha = alpha;
  p.hidden = rows_of(hidden, copies);
  p.weight = rows_of(weight, copies);
  p.batch = hidden.size(0);
  p.units = hidden.size(1);
  p.inputs = weight.size(1);
  p.is_double = hidden.scalar_type() == ScalarType::Double;
  p.squared_norms = norms.mutable_data_ptr();
  return p;
}

void run(const ContractivePenalty& p) {
  const JacobianKernels& kernels = selected_kernels();
  torch::stable::parallel_for(0, p.blocks(), 1, [&](int64_t begin, int64_t end) { kernels.contractive_penalty(p, begin, end); });
}

double scalar_value(const Tensor& scalar) {
  return scalar.scalar_type() == ScalarType::Double ? *static_cast<const double*>(scalar.const_data_ptr())
                                                    : static_cast<double>(*static_cast<const float*>(scalar.const_data_ptr()));
}

// Writes scale * values into the elements of `out`.
void write_values(const std::vector<double>& values, double scale, const Tensor& out) {
  finish_reduction(values, Partition(static_cast<int64_t>(values.size()), 1), scale, out);
}

// Sums (items, count) over the items, in their order.
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
  Tensor penalty = cpu.empty_reduced(hidden, reduction);
  Tensor norms = cpu.empty({weight.size(0)}, accumulation_dtype(hidden));
  Tensor grad_hidden = cpu.empty_if(with_grad_hidden, hidden), grad_weight = cpu.empty_if(with_grad_weight, weight);

  Copies copies;
  ContractivePenalty p = penalty_of(hidden, weight, activation, alpha, norms, copies);
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
  // The kernel multiplies the sums of the slopes, which are 0, with norms that may be infinite.
  if (p.batch == 0) sums.assign(sums.size(), 0.0);
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
  Tensor grad_hidden = cpu.empty_if(with_grad_hidden, hidden), grad_weight = cpu.empty_if(with_grad_weight, weight);

  Copies copies;
  Tensor norms = dense(squared_norms), incoming = reduction == Reduction::sample ? dense(grad_output) : grad_output;
  ContractivePenalty p = penalty_of(hidden, weight, activation, alpha, norms, copies);
  p.norms_known = true;
  p.grad_scale = reduction_scale(reduction, p.batch, p.batch * p.units);
  if (reduction == Reduction::none)
    p.element_grad_output = rows_of(grad_output, copies);
  else if (reduction == Reduction::sample)
    p.sample_grad_output = incoming.const_data_ptr();
  else
    p.grad_scale *= scalar_value(grad_output);
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

// The number of elements and rows of the scaled matrices that are multiplied at a time. The matrices and their product, 512 KiB of float32
// each, stay in an L2 cache together with a small Gram matrix. With fewer rows a matrix product with a large Gram matrix would be slow.
constexpr int64_t kGramElements = 1 << 17, kGramRows = 512;
// A batch is cut into at most kGramParts parts, each with sums of its own, which are added at the end. The bound on the parts does not
// depend on the number of threads, so neither does the result. Where the sums of all parts would have more than kGramSums elements (64 MiB
// of float32) there are fewer parts, down to one, whose matrix products use all threads.
constexpr int64_t kGramParts = 16, kGramSums = 1 << 24;
// Rows whose symmetric product is added at a time. Two panels of so many rows (32 KiB of float32 with AVX512) fit an L1 cache.
constexpr int64_t kGramDepth = 128;

// A view of the first rows of a contiguous matrix.
Tensor first_rows(const Tensor& matrix, int64_t rows) {
  const int64_t sizes[] = {rows, matrix.size(1)}, strides[] = {matrix.size(1), 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// Adds the symmetric matrices of all parts, (parts, padded, padded), of which the panels up to that of the diagonal are computed, and
// mirrors the sum into the other half.
template <class T>
void add_symmetric_parts(const Tensor& parts, int64_t panel, const JacobianKernels& kernels, const Tensor& out) {
  const T* values = static_cast<const T*>(parts.const_data_ptr());
  T* sums = static_cast<T*>(out.mutable_data_ptr());
  int64_t size = out.size(0), stride = parts.size(2);
  torch::stable::parallel_for(0, size, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t first = row / panel * panel;
      kernels.gram_add(values + row * stride + first, stride * stride, parts.size(0), size - first, sizeof(T) == sizeof(double),
                       sums + row * size + first);
      for (int64_t column = first + panel; column < size; ++column) sums[column * size + row] = sums[row * size + column];
    }
  });
}

// The squared norms of a batch and their gradients by the Gram form. Each part of the batch has sums of its own, which are added in their
// order.
template <class T>
class GramForm {
 public:
  // The pointers of `whole` are those of sample 0.
  GramForm(const GramReduce& whole, const Tensor& gram)
      : kernels(selected_kernels()),
        whole(whole),
        m(whole.matrices),
        size(m.rows * m.columns),
        samples(std::min(m.batch, std::max(ceil_div(kGramRows, m.rows), kGramElements / size))),
        parts(std::min(ceil_div(m.batch, samples), std::max(int64_t{1}, std::min(kGramParts, kGramSums / (m.columns * m.columns))))),
        panel(kernels.gram_panel(m.is_double)),
        padded(ceil_div(m.columns, panel) * panel),
        gram(gram),
        lefts(buffer({shares_left() ? parts : 0, size})),
        grams(buffer({whole.with_grad ? parts : 0, padded, padded})) {}

  void run() const {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      Scratch scratch{buffer({samples * m.rows, m.columns}), buffer({samples * m.rows, m.columns}),
                      buffer({whole.with_grad ? kGramDepth : 0, padded}),
                      buffer({whole.with_grad && whole.weights ? kGramDepth : 0, padded})};
      for (int64_t part = first; part < last; ++part) run_part(part, scratch);
    });
  }

  void add_up(const Tensor& grad_left, const Tensor& grad_gram) const {
    add_symmetric_parts<T>(grams, panel, kernels, grad_gram);
    if (shares_left()) kernels.gram_add(lefts.const_data_ptr(), size, parts, size, m.is_double, grad_left.mutable_data_ptr());
  }

 private:
  // The scratch buffers of one thread.
  struct Scratch {
    Tensor scaled, product, panels, weighted;
  };

  bool shares_left() const { return whole.with_grad && !m.left_is_batched; }
  Tensor buffer(const Sizes& shape) const { return cpu.empty(shape, gram.scalar_type()); }
  T* gram_of(int64_t part) const { return static_cast<T*>(grams.mutable_data_ptr()) + part * padded * padded; }

  void run_part(int64_t part, const Scratch& scratch) const {
    int64_t begin = part * m.batch / parts, end = (part + 1) * m.batch / parts;
    if (whole.with_grad) std::fill_n(gram_of(part), padded * padded, T(0));
    for (int64_t first = begin; first < end; first += samples)
      run_samples(part, first, std::min(first + samples, end), first > begin, scratch);
  }

  void run_samples(int64_t part, int64_t begin, int64_t end, bool adds, const Scratch& scratch) const {
    int64_t rows = (end - begin) * m.rows;
    kernels.gram_scale(m, scratch.scaled.mutable_data_ptr(), begin, end);
    Tensor scaled = first_rows(scratch.scaled, rows), product = first_rows(scratch.product, rows);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(product.get(), scaled.get(), gram.get()));
    GramReduce p = whole;
    p.product = product.const_data_ptr();
    if (whole.with_grad) p.grad_left = grad_left_of(part, begin);
    p.adds = adds && !m.left_is_batched;
    kernels.gram_reduce(p, begin, end);
    if (whole.with_grad) add_gram(scratch, begin * m.rows, rows, gram_of(part));
  }

  // Adds the symmetric product of `rows` rows, whose first is number `first` of all samples, to `out`. The panels are shared among threads
  // where there is one part; otherwise this already runs in a parallel loop, where the inner one is serial.
  void add_gram(const Scratch& scratch, int64_t first, int64_t rows, T* out) const {
    const T* scaled = static_cast<const T*>(scratch.scaled.const_data_ptr());
    void *panels = scratch.panels.mutable_data_ptr(), *weighted = whole.weights ? scratch.weighted.mutable_data_ptr() : panels;
    for (int64_t row = 0; row < rows; row += kGramDepth) {
      GramProduct p{scaled + row * m.columns,
                    std::min(kGramDepth, rows - row),
                    m.columns,
                    first + row,
                    whole.weights,
                    m.rows,
                    m.is_double,
                    panels,
                    weighted,
                    out};
      kernels.gram_pack(p);
      torch::stable::parallel_for(0, padded / panel, 1, [&](int64_t begin, int64_t end) { kernels.gram_multiply(p, begin, end); });
    }
  }

  void* grad_left_of(int64_t part, int64_t sample) const {
    return m.left_is_batched ? static_cast<T*>(whole.grad_left) + sample * size : static_cast<T*>(lefts.mutable_data_ptr()) + part * size;
  }

  const JacobianKernels& kernels;
  GramReduce whole;
  const ScaledMatrices& m;
  int64_t size, samples, parts, panel, padded;
  Tensor gram, lefts, grams;
};

template <class T>
void run_gram(const GramReduce& p, const Tensor& gram, const Tensor& grad_left, const Tensor& grad_gram) {
  GramForm<T> form(p, gram);
  form.run();
  if (p.with_grad) form.add_up(grad_left, grad_gram);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> jacobian_gram(const Tensor& left, const Tensor& inner, const Tensor& outer,
                                                                 const Tensor& gram, const OptionalTensor& weights, bool with_grad) {
  for (const Tensor& tensor : {inner, outer, gram, weights.value_or(left)})
    STD_TORCH_CHECK(tensor.scalar_type() == left.scalar_type(), "fastvae: the operands of the Gram form have one dtype");
  Copies copies;
  ScaledMatrices m = matrices_of(left, inner, outer, copies);
  Tensor norms = cpu.empty({m.batch}, outer.scalar_type());
  Tensor grad_left = cpu.empty_if(with_grad, left), grad_inner = cpu.empty_if(with_grad, inner),
         grad_outer = cpu.empty_if(with_grad, outer), grad_gram = cpu.empty_if(with_grad, gram);
  if (m.batch * m.rows * m.columns == 0) {
    for (Tensor* tensor : {&norms, &grad_left, &grad_inner, &grad_outer, &grad_gram}) torch::stable::zero_(*tensor);
    return {norms, grad_left, grad_inner, grad_outer, grad_gram};
  }
  if (weights) copies.push_back(dense(*weights));
  GramReduce p{m,
               weights ? copies.back().const_data_ptr() : nullptr,
               nullptr,
               norms.mutable_data_ptr(),
               grad_inner.mutable_data_ptr(),
               grad_outer.mutable_data_ptr(),
               grad_left.mutable_data_ptr(),
               with_grad,
               false};
  Tensor square = dense(gram);
  m.is_double ? run_gram<double>(p, square, grad_left, grad_gram) : run_gram<float>(p, square, grad_left, grad_gram);
  return {norms, grad_left, grad_inner, grad_outer, grad_gram};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("jacobian_forward.cpp", TORCH_BOX(&jacobian_forward));
  m.impl("jacobian_backward.cpp", TORCH_BOX(&jacobian_backward));
  m.impl("jacobian_gram.cpp", TORCH_BOX(&jacobian_gram));
}

}  // namespace fastvae
