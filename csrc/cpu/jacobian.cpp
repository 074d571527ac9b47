// The Jacobian operators on the CPU: what they allocate, how they share the work, and which instruction set's kernels do it.
#include "jacobian.h"

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

Tensor jacobian_gram_scale(const Tensor& left, const Tensor& inner, const Tensor& outer) {
  Copies copies;
  ScaledMatrices m = matrices_of(left, inner, outer, copies);
  Tensor scaled = empty({m.batch * m.rows, m.columns}, left.scalar_type());
  void* out = scaled.mutable_data_ptr();
  torch::stable::parallel_for(0, m.batch, 1, [&](int64_t begin, int64_t end) { kernels().gram_scale(m, out, begin, end); });
  return scaled;
}

std::tuple<Tensor, Tensor, Tensor> jacobian_gram_reduce(const Tensor& left, const Tensor& inner, const Tensor& outer, const Tensor& product,
                                                        bool with_grad) {
  Copies copies;
  ScaledMatrices m = matrices_of(left, inner, outer, copies);
  copies.push_back(dense(product));
  Tensor dots = empty(shape_of(outer), outer.scalar_type());
  Tensor grad_inner = empty_if(with_grad, inner), grad_left = empty_if(with_grad, left);
  if (with_grad && !m.left_is_batched && m.batch == 0) torch::stable::zero_(grad_left);

  GramReduce p{m, copies.back().const_data_ptr(), nullptr, nullptr, nullptr};
  if (with_grad) {
    p.grad_inner = grad_inner.mutable_data_ptr();
    p.grad_left = grad_left.mutable_data_ptr();
  }
  std::vector<double> partial(p.items() * m.batch * m.rows);
  p.dots = partial.data();
  torch::stable::parallel_for(0, p.items(), 1, [&](int64_t begin, int64_t end) { kernels().gram_reduce(p, begin, end); });
  write_values(sum_items(partial, p.items(), m.batch * m.rows), 1.0, dots);
  return {dots, grad_inner, grad_left};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("jacobian_forward.cpp", TORCH_BOX(&jacobian_forward));
  m.impl("jacobian_backward.cpp", TORCH_BOX(&jacobian_backward));
  m.impl("jacobian_gram_scale.cpp", TORCH_BOX(&jacobian_gram_scale));
  m.impl("jacobian_gram_reduce.cpp", TORCH_BOX(&jacobian_gram_reduce));
}

}  // namespace fastvae
