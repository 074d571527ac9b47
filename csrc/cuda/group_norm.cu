// The operators of group norm on a GPU: the parameters of the kernels, the choice of kernels, and their launches. The kernels are in
// group_norm_forward.cuh and group_norm_backward.cuh, whose first lines list them.
#include "group_norm_backward.cuh"
#include "group_norm_forward.cuh"
#include "norm_host.h"

namespace fastvae {
namespace {

const double* moments_data(const Tensor& tensor, Copies& copies) {
  return static_cast<const double*>(readable(tensor, copies).const_data_ptr());
}

// The arguments that both operators share.
struct GroupNormArguments {
  const Tensor& input;
  const OptionalTensor &weight, &bias;
  GroupedChannels sizes;
  NormActivation activation;

  int64_t groups() const { return sizes.batch * sizes.groups; }
  // The layout that the kernels use. With one position both layouts are the same memory, and lines of channels are longer.
  bool channels_last() const { return sizes.channels_adjacent(); }
};

GroupNormGroups groups_of(const GroupedChannels& sizes) { return {sizes.groups, divider(sizes.width()), sizes.group_elements()}; }

// Fills in what both passes read.
template <class T>
GroupNormParams<T> params_of(const Launch& launch, const GroupNormArguments& a, Copies& copies) {
  const GroupedChannels& sizes = a.sizes;
  GroupNormParams<T> p{};
  p.blocks = group_norm_blocks(sizes.batch, sizes.channels, sizes.positions, sizes.groups, a.channels_last(), sizeof(T));
  p.groups = groups_of(sizes);
  p.activation = a.activation;
  p.input = data_in_layout<T>(launch, a.input, sizes.channels_last, copies);
  p.weight = parameter_of(a.weight, 1.0f, copies);
  p.bias = parameter_of(a.bias, 0.0f, copies);
  // Vectors are aligned and whole where lines consist of whole vectors.
  int64_t line = !a.channels_last() ? sizes.positions : p.blocks.whole_groups ? sizes.width() : sizes.channels;
  p.aligned = line % kVector == 0 && is_aligned(p.input);
  return p;
}

// Launches a kernel whose blocks handle whole groups. For each vector of a thread that it keeps, a block takes `vector_bytes` of shared
// memory.
template <class T>
void launch_whole_groups(const Launch& launch, void (*kernel)(GroupNormParams<T>), bool channels_last, int runs, int64_t vector_bytes,
                         GroupNormParams<T>& p) {
  int64_t vectors = vectors_of_group_thread(p.blocks, channels_last);
  launch_keeping_vectors(launch, kernel, p.blocks.count(), p.blocks.threads, vectors, runs, vector_bytes, p);
}

template <class T, bool kChannelsLast>
void launch_forward_of_groups(const Launch& launch, GroupNormParams<T>& p) {
  launch_whole_groups(launch, group_norm_forward_group_kernel<T, kChannelsLast>, kChannelsLast, kGroupRuns, sizeof(Vector<T>), p);
}

template <class T, bool kChannelsLast>
void launch_forward(const Launch& launch, const GroupNormArguments& a, GroupNormParams<T>& p) {
  if (p.blocks.whole_groups) return launch_forward_of_groups<T, kChannelsLast>(launch, p);
  Tensor partial_moments = launch.empty(Sizes{p.blocks.batch, p.blocks.splits, p.blocks.channels, 2}, ScalarType::Double);
  p.partial_moments = static_cast<double*>(partial_moments.mutable_data_ptr());
  launch.run(group_norm_moments_kernel<T, kChannelsLast>, p.blocks.count(), 1, kThreads, p);
  launch.run<GroupNormProblem>(group_norm_combine_moments_kernel, a.groups(), 1, kThreads, p);
  launch.run(group_norm_forward_kernel<T, kChannelsLast>, p.blocks.count(), 1, kThreads, p);
}

// Launches the kernel that wrote the output in the forward pass, so that the result is the same to the last bit: the one of whole groups,
// which computes the moments again, or the one that reads them.
template <class T, bool kChannelsLast>
void launch_recompute(const Launch& launch, const GroupNormArguments& a, GroupNormParams<T>& p) {
  if (!p.blocks.whole_groups) return launch.run(group_norm_forward_kernel<T, kChannelsLast>, p.blocks.count(), 1, kThreads, p);
  Tensor moments = launch.empty({2, a.groups()}, ScalarType::Double);
  p.mean = static_cast<double*>(moments.mutable_data_ptr());
  p.rstd = p.mean + a.groups();
  launch_forward_of_groups<T, kChannelsLast>(launch, p);
}

template <class T, bool kChannelsLast>
void launch_backward(const Launch& launch, const GroupNormArguments& a, GroupNormParams<T>& p) {
  if (p.blocks.whole_groups)
    return launch_whole_groups(launch, group_norm_backward_group_kernel<T, kChannelsLast>, kChannelsLast, kGroupGradientRuns<kChannelsLast>,
                               sizeof(Vector<T>) + sizeof(Vector<float>), p);
  Tensor statistics_gradient = launch.empty(Sizes{a.groups(), 2}, ScalarType::Float);
  p.statistics_gradient = static_cast<float*>(statistics_gradient.mutable_data_ptr());
  launch.run(group_norm_gradient_sums_kernel<T, kChannelsLast>, p.blocks.count(), 1, kThreads, p);
  launch.run<GroupNormProblem>(group_norm_combine_gradients_kernel, a.groups(), 1, kThreads, p);
  launch.run(group_norm_backward_kernel<T, kChannelsLast>, p.blocks.count(), 1, kThreads, p);
}

void launch_parameter_gradients(Launch& launch, const GroupNormProblem& p, const Tensor* grad_weight, const Tensor* grad_bias) {
  int64_t rows = p.blocks.batch * p.blocks.splits, columns = 2 * p.blocks.channels;
  GroupNormParameterGradientParams gradients{p.partial_sums,
                                             p.moments,
                                             p.groups,
                                             p.blocks.channels,
                                             divider(p.blocks.splits),
                                             divider(columns),
                                             column_sums_of(rows, columns, 1),
                                             launch.workspace(),
                                             {},
                                             {}};
  if (grad_weight) gradients.grad_weight = output_of(*grad_weight);
  if (grad_bias) gradients.grad_bias = output_of(*grad_bias);
  launch.run(group_norm_parameter_gradients_kernel, gradients.columns.groups, gradients.columns.splits, kThreads, gradients);
}

// Writes the moments of groups without elements, 0 and 1 / sqrt(eps).
void launch_empty_moments(const Launch& launch, const GroupNormArguments& a, GroupNormProblem& p) {
  p.groups = groups_of(a.sizes);
  if (a.groups() > 0) launch.run<GroupNormProblem>(group_norm_combine_moments_kernel, a.groups(), 1, kThreads, p);
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors group_norm_forward(const Tensor& input, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                                double eps, int64_t activation) {
  GroupNormArguments a{input, weight, bias, GroupedChannels(input, num_groups), static_cast<NormActivation>(activation)};
  Launch launch(input);
  Tensor output = empty_in_layout(launch, input, a.sizes.channels_last);
  Tensor mean = launch.empty({a.sizes.batch, num_groups}, ScalarType::Double), rstd = launch.empty(shape_of(mean), ScalarType::Double);
  dispatch(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    GroupNormParams<T> p{};
    if (input.numel() > 0) p = params_of<T>(launch, a, copies);
    p.eps = eps;
    p.output = static_cast<T*>(output.mutable_data_ptr());
    p.mean = static_cast<double*>(mean.mutable_data_ptr());
    p.rstd = static_cast<double*>(rstd.mutable_data_ptr());
    p.moments = {p.mean, p.rstd};
    if (input.numel() == 0) return launch_empty_moments(launch, a, p);
    a.channels_last() ? launch_forward<T, true>(launch, a, p) : launch_forward<T, false>(launch, a, p);
  });
  return {output, mean, rstd};
}

// Writes the output of the forward pass, which is dense in the layout of the input.
void recompute_to(Tensor& output, const GroupNormArguments& a, const Tensor& mean, const Tensor& rstd, double eps) {
  if (output.numel() == 0) return;
  Launch launch(a.input);
  dispatch(a.input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    GroupNormParams<T> p = params_of<T>(launch, a, copies);
    p.eps = eps;
    p.output = static_cast<T*>(output.mutable_data_ptr());
    p.aligned = p.aligned && is_aligned(p.output);
    p.moments = {moments_data(mean, copies), moments_data(rstd, copies)};
    a.channels_last() ? launch_recompute<T, true>(launch, a, p) : launch_recompute<T, false>(launch, a, p);
  });
}

Tensor group_norm_recompute(const Tensor& /* grad_output */, const Tensor& input, const Tensor& mean, const Tensor& rstd,
                            const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, double eps, int64_t activation) {
  GroupNormArguments a{input, weight, bias, GroupedChannels(input, num_groups), static_cast<NormActivation>(activation)};
  Tensor output = empty_in_layout(Launch(input), input, a.sizes.channels_last);
  recompute_to(output, a, mean, rstd, eps);
  return output;
}

ThreeTensors group_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
                                 const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, int64_t activation) {
  GroupNormArguments a{input, weight, bias, GroupedChannels(input, num_groups), static_cast<NormActivation>(activation)};
  Launch launch(input);
  Tensor grad_input = empty_in_layout(launch, input, a.sizes.channels_last);
  Tensor grad_weight = empty_gradient(launch, weight, input), grad_bias = empty_gradient(launch, bias, input);
  if (input.numel() == 0) {
    launch.fill(grad_weight, 0);
    launch.fill(grad_bias, 0);
    return {grad_input, grad_weight, grad_bias};
  }
  dispatch(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    GroupNormParams<T> p = params_of<T>(launch, a, copies);
    p.grad_output = data_in_layout<T>(launch, grad_output, a.sizes.channels_last, copies);
    p.aligned = p.aligned && is_aligned(p.grad_output);
    p.moments = {moments_data(mean, copies), moments_data(rstd, copies)};
    p.grad_input = static_cast<T*>(grad_input.mutable_data_ptr());
    Tensor partial_sums = launch.empty(Sizes{p.blocks.batch, p.blocks.splits, 2, p.blocks.channels}, ScalarType::Float);
    p.partial_sums = static_cast<float*>(partial_sums.mutable_data_ptr());
    a.channels_last() ? launch_backward<T, true>(launch, a, p) : launch_backward<T, false>(launch, a, p);
    if (weight || bias) launch_parameter_gradients(launch, p, weight ? &grad_weight : nullptr, bias ? &grad_bias : nullptr);
  });
  return {grad_input, grad_weight, grad_bias};
}

// group_norm_backward, which leaves the output of group_norm_forward in the memory of grad_output.
ThreeTensors group_norm_restoring_backward(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
                                           const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, double eps,
                                           int64_t activation) {
  ThreeTensors gradients = group_norm_backward(grad_output, input, mean, rstd, weight, bias, num_groups, activation);
  GroupNormArguments a{input, weight, bias, GroupedChannels(input, num_groups), static_cast<NormActivation>(activation)};
  Tensor restored = grad_output;
  if (is_in_layout(grad_output, a.sizes.channels_last))
    recompute_to(restored, a, mean, rstd, eps);
  else
    torch::stable::copy_(restored, group_norm_recompute(grad_output, input, mean, rstd, weight, bias, num_groups, eps, activation));
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("group_norm_forward.cuda", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_recompute.cuda", TORCH_BOX(&group_norm_recompute));
  m.impl("group_norm_backward.cuda", TORCH_BOX(&group_norm_backward));
  m.impl("group_norm_restoring_backward.cuda", TORCH_BOX(&group_norm_restoring_backward));
}

}  // namespace fastvae
