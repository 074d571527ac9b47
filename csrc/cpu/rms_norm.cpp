// The RMS norm operators on the CPU. They allocate the results, share the items among threads, add the partial sums of the kernels, and
// choose the kernels of an instruction set.
#include "norm_tensors.h"
#include "rms_norm_kernels.h"

namespace fastvae {

namespace {

// An operator calls this once, because another thread may select another instruction set between two calls.
const RmsNormKernels& selected_kernels() { return FASTVAE_SELECT_KERNELS(rms_norm); }

bool is_of_samples(const OptionalTensor& parameter) { return parameter && parameter->dim() == 2; }

// The arguments of the kernels and the memory that they point to.
struct RmsNormCall {
  const RmsNormKernels& kernels;
  GroupedChannels sizes;
  Tensor input;
  std::vector<double> weight, bias;  // (1 or batch, channels)
  RmsNorm p;

  RmsNormCall(const Tensor& tensor, const OptionalTensor& weight_tensor, const OptionalTensor& bias_tensor, double eps, int64_t eps_mode,
              int64_t activation)
      : kernels(selected_kernels()),
        sizes(tensor, 1),
        input(sizes.channels_last ? tensor : dense(tensor)),
        weight(parameter(weight_tensor, is_of_samples(bias_tensor), 1.0)),
        bias(parameter(bias_tensor, is_of_samples(weight_tensor), 0.0)),
        p{runs_of(is_of_samples(weight_tensor) || is_of_samples(bias_tensor)),
          sizes.channels_adjacent(),
          dtype_of(input),
          static_cast<NormActivation>(activation),
          static_cast<EpsMode>(eps_mode),
          eps,
          input.const_data_ptr(),
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          weight.data(),
          bias.data(),
          nullptr} {}

  // Calls a kernel, given as a member of the table, for all items; each thread has a scratch buffer of its own.
  template <class Kernel>
  void run(Kernel kernel) const {
    int64_t doubles = ceil_div(kernels.scratch_bytes(p), sizeof(double));
    torch::stable::parallel_for(0, p.runs.items(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(doubles);
      (kernels.*kernel)(p, begin, end, scratch.data());
    });
  }

  // rrms without the dimension of the channels.
  Tensor empty_rrms() const {
    Sizes shape = shape_of(input);
    shape.erase(shape.begin() + 1);
    return cpu.empty(shape, accumulation_dtype(input));
  }

  // The gradient of a parameter as a tensor, empty where there is no parameter, from the sums of each run, (runs, channels).
  Tensor parameter_gradient(const OptionalTensor& parameter, std::vector<double> sums) const {
    if (!parameter) return cpu.empty({0}, input.scalar_type());
    int64_t channels = sizes.channels;
    if (!is_of_samples(parameter) && !p.runs.shared) {
      for (int64_t i = channels; i < static_cast<int64_t>(sums.size()); ++i) sums[i % channels] += sums[i];
      sums.resize(channels);
    }
    Tensor grad = cpu.empty(shape_of(*parameter), parameter->scalar_type());
    if (grad.numel() > 0) kernels.from_double(sums.data(), grad.numel(), output_of(grad));
    return grad;
  }

 private:
  // The values of a parameter, one for each channel or for each sample's, where it or the other one is of samples.
  std::vector<double> parameter(const OptionalTensor& tensor, bool other_is_of_samples, double default_value) const {
    bool repeated = other_is_of_samples && !is_of_samples(tensor);
    int64_t count = repeated || is_of_samples(tensor) ? sizes.batch * sizes.channels : sizes.channels;
    std::vector<double> values(count, default_value);
    // An empty batch has room for no value, also where the parameter has one a channel.
    if (!tensor || count == 0) return values;
    kernels.to_double(contiguous_view(dense(*tensor)), tensor->numel(), values.data());
    for (int64_t i = tensor->numel(); i < count; ++i) values[i] = values[i - tensor->numel()];
    return values;
  }

  ChannelRuns runs_of(bool of_samples) const {
    return sizes.channels_adjacent() && !of_samples ? ChannelRuns(1, sizes.batch * sizes.positions, sizes.channels, true)
                                                    : ChannelRuns(sizes.batch, sizes.positions, sizes.channels, !of_samples);
  }
};

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                            int64_t eps_mode, int64_t activation) {
  RmsNormCall call(input, weight, bias, eps, eps_mode, activation);
  Tensor output = empty_in_layout(input, call.sizes.channels_last), rrms = call.empty_rrms();
  if (input.numel() == 0) set_bytes(rrms, 0);
  call.p.output = output.mutable_data_ptr();
  call.p.rrms = rrms.mutable_data_ptr();
  call.run(&RmsNormKernels::forward);
  return {output, rrms};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& rrms,
                                                     const OptionalTensor& weight, const OptionalTensor& bias, double eps, int64_t eps_mode,
                                                     int64_t activation) {
  RmsNormCall call(input, weight, bias, eps, eps_mode, activation);
  bool channels_last = call.sizes.channels_last;
  Tensor grad = in_layout(grad_output, channels_last), grad_input = empty_in_layout(input, channels_last), dense_rrms = dense(rrms);
  std::vector<double> slots(call.p.runs.slots() * 2 * call.sizes.channels);
  call.p.grad_output = grad.const_data_ptr();
  call.p.grad_input = grad_input.mutable_data_ptr();
  // The backward kernel only reads it.
  call.p.rrms = const_cast<void*>(dense_rrms.const_data_ptr());
  call.p.sums = slots.data();
  call.run(&RmsNormKernels::backward);
  ChannelSums sums = add_slots(call.p.runs, slots);
  return {grad_input, call.parameter_gradient(weight, sums.first), call.parameter_gradient(bias, sums.second)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("rms_norm_forward.cpp", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward.cpp", TORCH_BOX(&rms_norm_backward));
}

}  // namespace fastvae
