// The reconstruction operators on the CPU. They allocate the results, share the items among threads, finish the sums, and choose the
// kernels of an instruction set.
#include "reconstruction_kernels.h"
#include "tensor.h"

namespace fastvae {
namespace {

// An operator calls this once, because another thread may select another instruction set between two calls.
const ReconstructionKernels& selected_kernels() { return FASTVAE_SELECT_KERNELS(reconstruction); }

// The arguments that both operators share.
struct ReconstructionArguments {
  const Tensor &input, &target;
  const OptionalTensor &weight, &pos_weight, &logvar;
  int64_t likelihood;
};

// Fills in what both passes read.
Reconstruction problem_of(const ReconstructionArguments& a, const Partition& partition, Copies& copies) {
  Reconstruction p{static_cast<Likelihood>(a.likelihood), {}, {}, {}, {}, partition, false, {}, nullptr, {}, 1.0, {}, {}, {}, nullptr};
  Sizes shape = shape_of(a.input);
  p.input = dense_view(a.input, copies);
  p.target = dense_view(a.target, copies);
  if (a.weight) p.weight = broadcast_view(*a.weight, shape, copies);
  if (a.pos_weight) p.extra = broadcast_view(*a.pos_weight, shape, copies);
  if (a.logvar) p.extra = broadcast_view(*a.logvar, shape, copies);
  p.is_double = a.input.scalar_type() == ScalarType::Double;
  return p;
}

void run(const Reconstruction& p, const ReconstructionKernels& kernels) {
  // A thread gets at least two items, about 20 us of work (see kItemElements), because waking a thread for less would not pay.
  torch::stable::parallel_for(0, p.partition.items(), 2, [&](int64_t begin, int64_t end) { kernels.run(p, begin, end); });
}

// Decides where the kernels write the gradient of the log variance. A log variance of one value for each element gets it directly. Where
// elements share values, each item has a sum for each value, and finish() adds those in the order of the items.
class LogvarGradient {
 public:
  LogvarGradient(Reconstruction& p, const OptionalTensor& logvar, const Tensor& grad) : grad_(grad) {
    if (!logvar) return;
    if (logvar->numel() == p.partition.rows * p.partition.inner) {
      p.grad_logvar = output_of(grad);
      return;
    }
    sums_.resize(p.partition.items() * grad.numel());
    p.grad_logvar_sums = sums_.data();
    shared_ = true;
  }

  void finish(const ReconstructionKernels& kernels) {
    if (!shared_) return;
    int64_t values = grad_.numel(), items = values > 0 ? static_cast<int64_t>(sums_.size()) / values : 0;
    std::vector<double> totals(values);
    for (int64_t item = 0; item < items; ++item)
      for (int64_t i = 0; i < values; ++i) totals[i] += sums_[item * values + i];
    View view;
    view.data = totals.data();
    view.dtype = DType::float64;
    view.inner = values > 0 ? values : 1;
    kernels.scale(view, output_of(grad_), 1.0, true, 0, values);
  }

 private:
  const Tensor& grad_;
  std::vector<double> sums_;
  bool shared_ = false;
};

std::tuple<Tensor, Tensor, Tensor> reconstruction_forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                                          const OptionalTensor& pos_weight, const OptionalTensor& logvar,
                                                          int64_t likelihood, int64_t reduction_number, double grad_scale, bool with_grad) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Tensor loss = cpu.empty_reduced(input, reduction);
  Tensor grad_input = with_grad ? cpu.empty(shape_of(input), input.scalar_type()) : cpu.empty({0}, input.scalar_type());
  Tensor grad_logvar = with_grad && logvar ? cpu.empty(shape_of(*logvar), logvar->scalar_type()) : cpu.empty({0}, input.scalar_type());

  Copies copies;
  copies.reserve(4);
  Reconstruction p = problem_of({input, target, weight, pos_weight, logvar, likelihood}, partition_of(input, reduction), copies);
  double scale = reduction_scale(reduction, batch_of(input), input.numel());
  std::vector<double> slots;
  if (reduction == Reduction::none) {
    p.loss = output_of(loss);
  } else {
    slots.resize(p.partition.slots());
    p.sums = slots.data();
  }
  LogvarGradient logvar_gradient(p, with_grad ? logvar : std::nullopt, grad_logvar);
  if (with_grad) {
    p.grad_input = output_of(grad_input);
    p.grad_scale = grad_scale * scale;
  }
  const ReconstructionKernels& kernels = selected_kernels();
  run(p, kernels);
  if (reduction != Reduction::none) finish_reduction(slots, p.partition, scale, loss);
  logvar_gradient.finish(kernels);
  return {loss, grad_input, grad_logvar};
}

std::tuple<Tensor, Tensor, Tensor> reconstruction_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                                           const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                                           const OptionalTensor& logvar, int64_t likelihood, int64_t reduction_number,
                                                           bool with_target) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Tensor grad_input = cpu.empty(shape_of(input), input.scalar_type());
  Tensor grad_target = cpu.empty(with_target ? shape_of(target) : Sizes{0}, target.scalar_type());
  Tensor grad_logvar = logvar ? cpu.empty(shape_of(*logvar), logvar->scalar_type()) : cpu.empty({0}, input.scalar_type());

  Copies copies;
  copies.reserve(5);
  Reconstruction p = problem_of({input, target, weight, pos_weight, logvar, likelihood}, Partition(1, input.numel()), copies);
  p.grad_output = gradient_view(grad_output, reduction, input.numel(), batch_of(input), copies);
  p.grad_scale = reduction_scale(reduction, batch_of(input), input.numel());
  p.grad_input = output_of(grad_input);
  if (with_target) p.grad_target = output_of(grad_target);
  LogvarGradient logvar_gradient(p, logvar, grad_logvar);
  const ReconstructionKernels& kernels = selected_kernels();
  run(p, kernels);
  logvar_gradient.finish(kernels);
  return {grad_input, grad_target, grad_logvar};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("reconstruction_forward.cpp", TORCH_BOX(&reconstruction_forward));
  m.impl("reconstruction_backward.cpp", TORCH_BOX(&reconstruction_backward));
}

}  // namespace fastvae
