// The operators of RMS norm on a GPU: the parameters of the kernels, the choice of kernels, and their launches. The kernels are in
// rms_norm_forward.cuh and rms_norm_backward.cuh, whose first lines list them.
#include "norm_host.h"
#include "rms_norm_backward.cuh"
#include "rms_norm_forward.cuh"

namespace fastvae {
namespace {

bool is_of_samples(const OptionalTensor& parameter) { return parameter && parameter->dim() == 2; }

// The arguments that both operators share.
struct RmsNormArguments {
  const Tensor& input;
  const OptionalTensor &weight, &bias;
  GroupedChannels sizes;
  RmsBound<float> bound;
  NormActivation activation;

  RmsNormArguments(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps, int64_t eps_mode,
                   int64_t activation)
      : input(input),
        weight(weight),
        bias(bias),
        sizes(input, 1),
        bound(static_cast<EpsMode>(eps_mode), eps, sizes.channels),
        activation(static_cast<NormActivation>(activation)) {}

  // Whether the line kernels serve. With one position both layouts are the same memory.
  bool channels_last() const { return sizes.channels_adjacent() && has_line_kernel(sizes.channels); }
  // The memory layout of the tensors that the kernels read and write. That of the input may differ where a position has more channels than
  // the line kernels take: its tensors are copied.
  bool channels_last_tensors() const { return sizes.channels_last && channels_last(); }

  // The partition. In channels-last memory the positions of all samples are adjacent, and are one sample's where the parameters are the
  // same for all samples.
  RmsNormBlocks blocks(bool backward) const {
    bool one_sample = channels_last() && !is_of_samples(weight) && !is_of_samples(bias);
    int64_t batch = one_sample ? 1 : sizes.batch, positions = one_sample ? sizes.batch * sizes.positions : sizes.positions;
    return rms_norm_blocks(batch, sizes.channels, positions, channels_last(), input.element_size(), backward);
  }
};

RmsNormParameter rms_norm_parameter_of(const OptionalTensor& tensor, float default_value, Copies& copies) {
  return {parameter_of(tensor, default_value, copies), is_of_samples(tensor) ? tensor->size(1) : 0};
}

// Fills in what both passes read.
template <class T>
RmsNormParams<T> params_of(const Launch& launch, const RmsNormArguments& a, bool backward, Copies& copies) {
  // The kernels count channels in 32 bits.
  STD_TORCH_CHECK(a.sizes.channels < (int64_t{1} << 30), "fastvae: the CUDA kernels of rms_norm take fewer than 2^30 channels");
  RmsNormParams<T> p{};
  p.bound = a.bound;
  p.blocks = a.blocks(backward);
  p.inverse_channels = static_cast<float>(1.0 / static_cast<double>(a.sizes.channels));
  p.activation = a.activation;
  p.input = data_in_layout<T>(launch, a.input, a.channels_last_tensors(), copies);
  p.weight = rms_norm_parameter_of(a.weight, 1.0f, copies);
  p.bias = rms_norm_parameter_of(a.bias, 0.0f, copies);
  // Vectors are aligned and whole where lines consist of whole vectors.
  p.aligned = (a.channels_last() ? a.sizes.channels : a.sizes.positions) % kVector == 0 && is_aligned(p.input);
  return p;
}

// The result where the kernels wrote `written`: in the layout of the input, in which both are the same tensor but for many channels.
Tensor in_layout_of_input(const Launch& launch, const RmsNormArguments& a, const Tensor& written) {
  if (a.sizes.channels_last == a.channels_last_tensors()) return written;
  Tensor result = empty_in_layout(launch, a.input, a.sizes.channels_last);
  torch::stable::copy_(result, written);
  return result;
}

// Launches a tile kernel, which takes `vector_bytes` of shared memory for each vector of a thread that it keeps.
template <class T>
void launch_tile(const Launch& launch, void (*kernel)(RmsNormParams<T>), int runs, int64_t vector_bytes, RmsNormParams<T>& p) {
  launch_keeping_vectors(launch, kernel, p.blocks.count(), p.blocks.threads, p.blocks.vectors, runs, vector_bytes, p);
}

template <class T>
void launch_forward(const Launch& launch, const RmsNormArguments& a, RmsNormParams<T>& p) {
  if (!a.channels_last()) return launch_tile(launch, rms_norm_forward_tile_kernel<T>, kTileRuns, sizeof(Vector<T>), p);
  launch.run(rms_norm_forward_line_kernel<T>, p.blocks.count(), 1, kThreads, p, LineParameters::bytes(p.blocks));
}

template <class T>
void launch_backward(const Launch& launch, const RmsNormArguments& a, RmsNormParams<T>& p) {
  if (!a.channels_last())
    return launch_tile(launch, rms_norm_backward_tile_kernel<T>, kTileShortRuns, sizeof(Vector<T>) + sizeof(Vector<float>), p);
  int64_t shared_bytes = LineParameters::bytes(p.blocks) + LineGradientSums::bytes(p.blocks);
  launch.run(rms_norm_backward_line_kernel<T>, p.blocks.count(), 1, kThreads, p, shared_bytes);
}

// Sums the partial sums of those parameters that are of samples, or of those that are not.
void launch_parameter_gradients(Launch& launch, const RmsNormArguments& a, const RmsNormBlocks& blocks, const float* partial_sums,
                                bool of_samples, const Tensor& grad_weight, const Tensor& grad_bias) {
  bool has_weight = a.weight && is_of_samples(a.weight) == of_samples, has_bias = a.bias && is_of_samples(a.bias) == of_samples;
  if (!has_weight && !has_bias) return;
  int64_t both_sums = 2 * blocks.channels, rows = blocks.splits * (of_samples ? 1 : blocks.batch);
  int64_t columns = of_samples ? blocks.batch * both_sums : both_sums;
  RmsNormParameterGradientParams p{
      partial_sums, blocks.channels, divider(both_sums), column_sums_of(rows, columns, 1), launch.workspace(), {}, {}};
  if (has_weight) p.grad_weight = output_of(grad_weight);
  if (has_bias) p.grad_bias = output_of(grad_bias);
  launch.run(rms_norm_parameter_gradients_kernel, p.columns.groups, p.columns.splits, kThreads, p);
}

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                            int64_t eps_mode, int64_t activation) {
  RmsNormArguments a(input, weight, bias, eps, eps_mode, activation);
  Launch launch(input);
  Sizes shape = shape_of(input);
  shape.erase(shape.begin() + 1);
  Tensor output = empty_in_layout(launch, input, a.channels_last_tensors()), rrms = launch.empty(shape, ScalarType::Float);
  if (input.numel() == 0) {
    launch.fill(rrms, 0);
    return {output, rrms};
  }
  dispatch(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    RmsNormParams<T> p = params_of<T>(launch, a, false, copies);
    p.output = static_cast<T*>(output.mutable_data_ptr());
    p.rrms = static_cast<float*>(rrms.mutable_data_ptr());
    launch_forward(launch, a, p);
  });
  return {in_layout_of_input(launch, a, output), rrms};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& rrms,
                                                     const OptionalTensor& weight, const OptionalTensor& bias, double eps, int64_t eps_mode,
                                                     int64_t activation) {
  RmsNormArguments a(input, weight, bias, eps, eps_mode, activation);
  Launch launch(input);
  Tensor grad_input = empty_in_layout(launch, input, a.channels_last_tensors());
  Tensor grad_weight = empty_gradient(launch, weight, input), grad_bias = empty_gradient(launch, bias, input);
  if (input.numel() == 0) {
    launch.fill(grad_weight, 0);
    launch.fill(grad_bias, 0);
    return {grad_input, grad_weight, grad_bias};
  }
  dispatch(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    RmsNormParams<T> p = params_of<T>(launch, a, true, copies);
    p.grad_output = data_in_layout<T>(launch, grad_output, a.channels_last_tensors(), copies);
    p.stored_rrms = data_of<float>(rrms, copies);
    p.aligned = p.aligned && is_aligned(p.grad_output) && is_aligned(p.stored_rrms);
    p.grad_input = static_cast<T*>(grad_input.mutable_data_ptr());
    bool has_parameters = weight || bias;
    Tensor partial_sums =
        launch.empty(Sizes{has_parameters ? p.blocks.splits * p.blocks.batch : 0, 2, p.blocks.channels}, ScalarType::Float);
    if (has_parameters) p.partial_sums = static_cast<float*>(partial_sums.mutable_data_ptr());
    launch_backward(launch, a, p);
    for (bool of_samples : {false, true})
      launch_parameter_gradients(launch, a, p.blocks, p.partial_sums, of_samples, grad_weight, grad_bias);
  });
  return {in_layout_of_input(launch, a, grad_input), grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("rms_norm_forward.cuda", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward.cuda", TORCH_BOX(&rms_norm_backward));
}

}  // namespace fastvae
