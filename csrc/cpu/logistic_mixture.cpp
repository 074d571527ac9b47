// The logistic mixture operators on the CPU. They allocate the results, share the positions among threads and finish the sums.
#include "logistic_mixture_kernels.h"
#include "tensor.h"

namespace fastvae {
namespace {

// The partition of the positions: an item is whole tiles and about as much work as kItemElements of one number each.
Partition positions_partition(const LogisticMixtureSizes& sizes, Reduction reduction) {
  int64_t tiles = max64(kItemElements / (sizes.parameters() * kMixtureTile), 1), elements = tiles * kMixtureTile;
  if (reduction == Reduction::sample) return Partition(sizes.batch, sizes.positions, elements);
  return Partition(1, sizes.batch * sizes.positions, elements);
}

LogisticMixtureSizes sizes_of(const Tensor& target, int64_t mixtures) {
  int64_t positions = 1;
  for (int64_t d = 2; d < target.dim(); ++d) positions *= target.size(d);
  return {target.size(0), positions, target.size(1), mixtures};
}

// Fills in what both passes read.
LogisticMixture problem_of(const Tensor& input, const Tensor& target, int64_t mixtures, Reduction reduction, Copies& copies) {
  LogisticMixtureSizes sizes = sizes_of(target, mixtures);
  LogisticMixture p{sizes, nullptr, nullptr, dtype_of(input), dtype_of(target), positions_partition(sizes, reduction), {}, nullptr,
                    {},    1.0,     {}};
  p.input = readable(input, copies).const_data_ptr();
  p.target = readable(target, copies).const_data_ptr();
  return p;
}

void run(const LogisticMixture& p) {
  const LogisticMixtureKernels& kernels = FASTVAE_SELECT_KERNELS(logistic_mixture);
  // A thread gets at least two items, about 20 us of work (see kItemElements), because waking a thread for less would not pay.
  torch::stable::parallel_for(0, p.partition.items(), 2, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(p.is_double() ? p.scratch_numbers() : p.scratch_numbers() / 2);
    kernels.run(p, scratch.data(), begin, end);
  });
}

std::tuple<Tensor, Tensor> logistic_mixture_forward(const Tensor& input, const Tensor& target, int64_t mixtures, int64_t reduction_number,
                                                    double grad_scale, bool with_grad) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Copies copies;
  copies.reserve(2);
  LogisticMixture p = problem_of(input, target, mixtures, reduction, copies);
  Sizes loss_shape = shape_of(input);
  loss_shape.erase(loss_shape.begin() + 1);
  bool elementwise = reduction == Reduction::none;
  if (!elementwise) loss_shape = reduction == Reduction::sample ? Sizes{p.sizes.batch} : Sizes{};
  Tensor loss = cpu.empty(loss_shape, elementwise ? input.scalar_type() : accumulation_dtype(input));
  Tensor grad_input = cpu.empty_if(with_grad, input);

  double scale = reduction_scale(reduction, p.sizes.batch, p.sizes.batch * p.sizes.positions);
  std::vector<double> slots;
  if (elementwise) {
    p.loss = output_of(loss);
  } else {
    slots.resize(p.partition.slots());
    p.sums = slots.data();
  }
  if (with_grad) {
    p.grad_input = output_of(grad_input);
    p.grad_scale = grad_scale * scale;
  }
  run(p);
  if (!elementwise) finish_reduction(slots, p.partition, scale, loss);
  return {loss, grad_input};
}

Tensor logistic_mixture_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target, int64_t mixtures,
                                 int64_t reduction_number) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Copies copies;
  copies.reserve(3);
  LogisticMixture p = problem_of(input, target, mixtures, Reduction::none, copies);
  int64_t numel = p.sizes.batch * p.sizes.positions;
  Tensor grad_input = cpu.empty(shape_of(input), input.scalar_type());
  p.grad_output = gradient_view(grad_output, reduction, numel, p.sizes.batch, copies);
  p.grad_scale = reduction_scale(reduction, p.sizes.batch, numel);
  p.grad_input = output_of(grad_input);
  run(p);
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("logistic_mixture_forward.cpp", TORCH_BOX(&logistic_mixture_forward));
  m.impl("logistic_mixture_backward.cpp", TORCH_BOX(&logistic_mixture_backward));
}

}  // namespace fastvae
