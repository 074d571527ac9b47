// The Snake operators on the CPU. They allocate the results, share the items among threads, add the partial sums of the kernels, and choose
// the kernels of an instruction set.
#include "norm_tensors.h"
#include "snake_kernels.h"

namespace fastvae {

namespace {

// An operator calls this once, because another thread may select another instruction set between two calls.
const SnakeKernels& selected_kernels() { return FASTVAE_SELECT_KERNELS(snake); }

ChannelRuns runs_of(const GroupedChannels& sizes) {
  return sizes.channels_adjacent() ? ChannelRuns(1, sizes.batch * sizes.positions, sizes.channels, true)
                                   : ChannelRuns(sizes.batch, sizes.positions, sizes.channels, true);
}

// The arguments of the kernels and the memory that they point to.
struct SnakeCall {
  const SnakeKernels& kernels;
  GroupedChannels sizes;
  Tensor input;
  std::vector<double> frequency, gain;  // (channels,)
  Snake p;

  SnakeCall(const Tensor& tensor, const Tensor& frequency_tensor, const Tensor& gain_tensor)
      : kernels(selected_kernels()),
        sizes(tensor, 1),
        input(sizes.channels_last ? tensor : dense(tensor)),
        frequency(parameter(frequency_tensor)),
        gain(parameter(gain_tensor)),
        p{runs_of(sizes),  sizes.channels_adjacent(),
          dtype_of(input), input.const_data_ptr(),
          nullptr,         nullptr,
          nullptr,         frequency.data(),
          gain.data(),     nullptr} {}

  // Calls a kernel, given as a member of the table, for all items; each thread has a scratch buffer of its own.
  template <class Kernel>
  void run(Kernel kernel) const {
    int64_t doubles = ceil_div(kernels.scratch_bytes(p.runs), sizeof(double));
    torch::stable::parallel_for(0, p.runs.items(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(doubles);
      (kernels.*kernel)(p, begin, end, scratch.data());
    });
  }

  Tensor parameter_gradient(const Tensor& parameter, const std::vector<double>& sums) const {
    Tensor grad = cpu.empty(shape_of(parameter), parameter.scalar_type());
    if (!sums.empty()) kernels.from_double(sums.data(), grad.numel(), output_of(grad));
    return grad;
  }

 private:
  std::vector<double> parameter(const Tensor& tensor) const {
    std::vector<double> values(sizes.channels);
    if (!values.empty()) kernels.to_double(contiguous_view(dense(tensor)), sizes.channels, values.data());
    return values;
  }
};

Tensor snake_forward(const Tensor& input, const Tensor& frequency, const Tensor& gain) {
  SnakeCall call(input, frequency, gain);
  Tensor output = empty_in_layout(input, call.sizes.channels_last);
  call.p.output = output.mutable_data_ptr();
  call.run(&SnakeKernels::forward);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> snake_backward(const Tensor& grad_output, const Tensor& input, const Tensor& frequency,
                                                  const Tensor& gain) {
  SnakeCall call(input, frequency, gain);
  bool channels_last = call.sizes.channels_last;
  Tensor grad = in_layout(grad_output, channels_last), grad_input = empty_in_layout(input, channels_last);
  std::vector<double> slots(call.p.runs.slots() * 2 * call.sizes.channels);
  call.p.grad_output = grad.const_data_ptr();
  call.p.grad_input = grad_input.mutable_data_ptr();
  call.p.sums = slots.data();
  call.run(&SnakeKernels::backward);
  ChannelSums sums = add_slots(call.p.runs, slots);
  for (int64_t c = 0; c < call.sizes.channels; ++c) sums.first[c] *= 2.0 * call.gain[c];
  return {grad_input, call.parameter_gradient(frequency, sums.first), call.parameter_gradient(gain, sums.second)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("snake_forward.cpp", TORCH_BOX(&snake_forward));
  m.impl("snake_backward.cpp", TORCH_BOX(&snake_backward));
}

}  // namespace fastvae
