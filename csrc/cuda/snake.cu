// The operators of Snake on a GPU: the parameters of the kernels and their launches. The kernels are in snake_kernels.cuh.
#include "norm_host.h"
#include "snake_kernels.cuh"

namespace fastvae {
namespace {

// Fills in what both passes read. With one position both layouts are the same memory, and lines of channels are longer.
template <class T>
SnakeParams<T> params_of(const Launch& launch, const Tensor& input, const GroupedChannels& sizes, const Tensor& frequency,
                         const Tensor& gain, Copies& copies) {
  SnakeParams<T> p{};
  bool adjacent = sizes.channels_adjacent();
  p.blocks = split_group_norm_blocks(sizes.batch, sizes.channels, sizes.positions, adjacent, GroupNormLimits{}.max_blocks);
  p.frequency = parameter_of(frequency, 0.0f, copies);
  p.gain = parameter_of(gain, 0.0f, copies);
  p.input = data_in_layout<T>(launch, input, sizes.channels_last, copies);
  // Vectors are aligned and whole where lines consist of whole vectors.
  p.aligned = (adjacent ? sizes.channels : sizes.positions) % kVector == 0 && is_aligned(p.input);
  return p;
}

Tensor snake_forward(const Tensor& input, const Tensor& frequency, const Tensor& gain) {
  GroupedChannels sizes(input, 1);
  Launch launch(input);
  Tensor output = empty_in_layout(launch, input, sizes.channels_last);
  if (input.numel() == 0) return output;
  dispatch(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    SnakeParams<T> p = params_of<T>(launch, input, sizes, frequency, gain, copies);
    p.output = static_cast<T*>(output.mutable_data_ptr());
    auto kernel = sizes.channels_adjacent() ? snake_forward_kernel<T, true> : snake_forward_kernel<T, false>;
    launch.run(kernel, p.blocks.count(), 1, kThreads, p);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> snake_backward(const Tensor& grad_output, const Tensor& input, const Tensor& frequency,
                                                  const Tensor& gain) {
  GroupedChannels sizes(input, 1);
  Launch launch(input);
  Tensor grad_input = empty_in_layout(launch, input, sizes.channels_last);
  Tensor grad_frequency = empty_gradient(launch, frequency, input), grad_gain = empty_gradient(launch, gain, input);
  if (input.numel() == 0) {
    launch.fill(grad_frequency, 0);
    launch.fill(grad_gain, 0);
    return {grad_input, grad_frequency, grad_gain};
  }
  dispatch(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    SnakeParams<T> p = params_of<T>(launch, input, sizes, frequency, gain, copies);
    p.grad_output = data_in_layout<T>(launch, grad_output, sizes.channels_last, copies);
    p.aligned = p.aligned && is_aligned(p.grad_output);
    p.grad_input = static_cast<T*>(grad_input.mutable_data_ptr());
    Tensor partial_sums = launch.empty(Sizes{p.blocks.batch, p.blocks.splits, 2, p.blocks.channels}, ScalarType::Float);
    p.partial_sums = static_cast<float*>(partial_sums.mutable_data_ptr());
    auto kernel = sizes.channels_adjacent() ? snake_backward_kernel<T, true> : snake_backward_kernel<T, false>;
    launch.run(kernel, p.blocks.count(), 1, kThreads, p);
    int64_t rows = p.blocks.batch * p.blocks.splits, columns = 2 * p.blocks.channels;
    SnakeParameterGradientParams gradients{
        p.partial_sums,      p.gain, p.blocks.channels, column_sums_of(rows, columns, 1), launch.workspace(), output_of(grad_frequency),
        output_of(grad_gain)};
    launch.run(snake_parameter_gradients_kernel, gradients.columns.groups, gradients.columns.splits, kThreads, gradients);
  });
  return {grad_input, grad_frequency, grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("snake_forward.cuda", TORCH_BOX(&snake_forward));
  m.impl("snake_backward.cuda", TORCH_BOX(&snake_backward));
}

}  // namespace fastvae
