// The group norm operators on the CPU. They allocate the results, share the items among threads, combine the partial sums of the kernels,
// and choose the kernels of an instruction set. Each pass reads its tensors twice: first for partial sums, then with the sums of each
// group.
#include <algorithm>
#include <cmath>

#include "group_norm_kernels.h"
#include "norm_tensors.h"

namespace fastvae {

namespace {

// An operator calls this once, because another thread may select another instruction set between two calls.
const GroupNormKernels& selected_kernels() { return FASTVAE_SELECT_KERNELS(group_norm); }

NormRuns runs_of(const GroupedChannels& sizes) {
  return sizes.channels_adjacent() ? NormRuns(sizes.batch, sizes.positions * sizes.channels, sizes.channels)
                                   : NormRuns(sizes.batch * sizes.channels, sizes.positions, 1);
}

// Calls a kernel, given as a member of the table, for all items; each thread has a scratch buffer of its own.
template <class Kernel>
void run(const GroupNorm& p, const GroupNormKernels& kernels, Kernel kernel) {
  int64_t doubles = ceil_div(kernels.scratch_bytes(p.runs), sizeof(double));
  torch::stable::parallel_for(0, p.runs.items(), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(doubles);
    (kernels.*kernel)(p, begin, end, scratch.data());
  });
}

// The weight or the bias, one value for each channel, which is default_value where there is no tensor.
std::vector<double> parameter(const OptionalTensor& tensor, int64_t channels, double default_value, const GroupNormKernels& kernels) {
  std::vector<double> values(channels, default_value);
  if (tensor && channels > 0) kernels.to_double(contiguous_view(dense(*tensor)), channels, values.data());
  return values;
}

// The arguments of the kernels and the memory that they point to.
struct GroupNormCall {
  const GroupNormKernels& kernels;
  GroupedChannels sizes;
  Tensor input;
  GroupNorm p;
  std::vector<double> weight, bias;                             // (channels,)
  std::vector<double> centre, scale, offset, slope, intercept;  // (batch, channels)

  GroupNormCall(const Tensor& tensor, int64_t groups, const OptionalTensor& weight_tensor, const OptionalTensor& bias_tensor,
                int64_t activation)
      : kernels(selected_kernels()),
        sizes(tensor, groups),
        input(sizes.channels_last ? tensor : dense(tensor)),
        p{runs_of(sizes),
          dtype_of(input),
          static_cast<NormActivation>(activation),
          input.const_data_ptr(),
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          {},
          1,
          nullptr},
        weight(parameter(weight_tensor, sizes.channels, 1.0, kernels)),
        bias(parameter(bias_tensor, sizes.channels, 0.0, kernels)) {
    if (sizes.channels_adjacent()) p.groups = groups;
  }

  // The mean rounded to the type of the kernels' arithmetic.
  double rounded(double mean) const { return p.dtype == DType::float64 ? mean : static_cast<double>(static_cast<float>(mean)); }

  // Sets centre, scale and offset of each channel from the moments of its group.
  void set_affine(const double* mean, const double* rstd) {
    int64_t count = sizes.batch * sizes.channels, width = sizes.width();
    for (auto* values : {&centre, &scale, &offset}) values->resize(count);
    for (int64_t i = 0; i < count; ++i) {
      int64_t group = i / width, channel = i % sizes.channels;
      NormAffine affine = affine_of(mean[group], rounded(mean[group]), rstd[group], weight[channel], bias[channel]);
      centre[i] = affine.centre;
      scale[i] = affine.scale;
      offset[i] = affine.offset;
    }
    p.channel = {centre.data(), scale.data(), offset.data(), nullptr, nullptr};
  }
};

// Combines the moments of the slots of each group, in the order of the slots (Chan, Golub and LeVeque 1983). `mean` and `rstd` are
// (batch, groups).
void combine_moments(const GroupNormCall& call, double eps, double* mean, double* rstd) {
  const GroupedChannels& sizes = call.sizes;
  const NormRuns& runs = call.p.runs;
  int64_t per_slot = call.p.groups;
  // A group has this many adjacent slots: those of its sample, or those of its planes.
  int64_t slots = per_slot > 1 || sizes.channels_adjacent() ? runs.pieces_per_run : sizes.width() * runs.pieces_per_run;
  double elements = static_cast<double>(sizes.group_elements());
  for (int64_t group = 0; group < sizes.batch * sizes.groups; ++group) {
    int64_t first = sizes.channels_adjacent() ? group / sizes.groups * slots : group * slots, column = group % per_slot;
    auto moments = [&](int64_t slot) { return call.p.sums + ((first + slot) * per_slot + column) * 2; };
    auto count = [&](int64_t slot) { return static_cast<double>(runs.piece_length(slot % runs.pieces_per_run) / per_slot); };
    double total = 0.0, squares = 0.0;
    // Means are added relative to that of the first slot, so that equal means leave no rounding error.
    double shift = elements > 0 ? moments(0)[0] : 0.0;
    if (elements > 0)
      for (int64_t slot = 0; slot < slots; ++slot) total += count(slot) * (moments(slot)[0] - shift);
    double mean_from_shift = elements > 0 ? total / elements : 0.0;
    mean[group] = shift + mean_from_shift;
    if (elements > 0)
      for (int64_t slot = 0; slot < slots; ++slot) {
        double difference = (moments(slot)[0] - shift) - mean_from_shift;
        squares += moments(slot)[1] + count(slot) * difference * difference;
      }
    rstd[group] = 1.0 / std::sqrt((elements > 0 ? squares / elements : 0.0) + eps);
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(const Tensor& input, int64_t num_groups, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, double eps, int64_t activation) {
  GroupNormCall call(input, num_groups, weight, bias, activation);
  GroupNorm& p = call.p;
  Tensor output = empty_in_layout(input, call.sizes.channels_last);
  Tensor mean = cpu.empty({call.sizes.batch, num_groups}, ScalarType::Double),
         rstd = cpu.empty({call.sizes.batch, num_groups}, ScalarType::Double);
  auto* means = static_cast<double*>(mean.mutable_data_ptr());
  auto* rstds = static_cast<double*>(rstd.mutable_data_ptr());

  std::vector<double> moments(p.runs.slots() * p.groups * 2);
  p.sums = moments.data();
  run(p, call.kernels, &GroupNormKernels::moments);
  combine_moments(call, eps, means, rstds);
  call.set_affine(means, rstds);
  p.output = output.mutable_data_ptr();
  run(p, call.kernels, &GroupNormKernels::forward);
  return {output, mean, rstd};
}

// Computes the output of group_norm_forward again from the mean and the rstd that it gave, in one pass, to the last bit. grad_output is not
// read.
Tensor group_norm_recompute(const Tensor& /* grad_output */, const Tensor& input, const Tensor& mean, const Tensor& rstd,
                            const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, double /* eps */,
                            int64_t activation) {
  GroupNormCall call(input, num_groups, weight, bias, activation);
  Tensor output = empty_in_layout(input, call.sizes.channels_last), dense_mean = dense(mean), dense_rstd = dense(rstd);
  call.set_affine(static_cast<const double*>(dense_mean.const_data_ptr()), static_cast<const double*>(dense_rstd.const_data_ptr()));
  call.p.output = output.mutable_data_ptr();
  run(call.p, call.kernels, &GroupNormKernels::forward);
  return output;
}

// Adds the partial sums of the slots of each run, in their order: sum_du and sum_du_x are the sums of du and of du * (x - centre) for each
// channel of each sample, (batch, channels).
void combine_gradient_sums(const NormRuns& runs, const double* slots, double* sum_du, double* sum_du_x) {
  int64_t channels = runs.channels;
  for (int64_t run = 0; run < runs.count; ++run)
    for (int64_t piece = 0; piece < runs.pieces_per_run; ++piece) {
      const double* slot = slots + (run * runs.pieces_per_run + piece) * channels * 2;
      for (int64_t c = 0; c < channels; ++c) sum_du[run * channels + c] += slot[c];
      for (int64_t c = 0; c < channels; ++c) sum_du_x[run * channels + c] += slot[channels + c];
    }
}

// The gradient of a parameter as a tensor, empty where there is no parameter.
Tensor parameter_gradient(const OptionalTensor& parameter, const Tensor& input, const std::vector<double>& values,
                          const GroupNormKernels& kernels) {
  if (!parameter) return cpu.empty({0}, input.scalar_type());
  Tensor grad = cpu.empty(shape_of(*parameter), parameter->scalar_type());
  if (!values.empty()) kernels.from_double(values.data(), static_cast<int64_t>(values.size()), output_of(grad));
  return grad;
}

// The three gradients from `grad`, which has the layout of the call. Where the call restores its output, that may replace `grad`.
std::tuple<Tensor, Tensor, Tensor> gradients_of(GroupNormCall& call, const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias) {
  GroupNorm& p = call.p;
  const GroupedChannels& sizes = call.sizes;
  Tensor grad_input = empty_in_layout(input, sizes.channels_last), dense_mean = dense(mean), dense_rstd = dense(rstd);
  const auto* means = static_cast<const double*>(dense_mean.const_data_ptr());
  const auto* rstds = static_cast<const double*>(dense_rstd.const_data_ptr());

  call.set_affine(means, rstds);
  p.grad_output = grad.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  std::vector<double> slots(p.runs.slots() * p.runs.channels * 2);
  p.sums = slots.data();
  run(p, call.kernels, &GroupNormKernels::gradient_sums);

  int64_t count = sizes.batch * sizes.channels, width = sizes.width();
  std::vector<double> sum_du(count), sum_du_x(count), grad_weight(sizes.channels), grad_bias(sizes.channels);
  combine_gradient_sums(p.runs, slots.data(), sum_du.data(), sum_du_x.data());
  call.slope.resize(count);
  call.intercept.resize(count);
  for (int64_t first = 0; first < count; first += width) {
    int64_t group = first / width;
    double sum_wdu = 0.0, sum_wdu_xhat = 0.0;
    for (int64_t i = first; i < first + width; ++i) {
      int64_t channel = i % sizes.channels;
      double sum_du_xhat = sum_du_xhat_of(means[group], call.centre[i], rstds[group], sum_du[i], sum_du_x[i]);
      grad_weight[channel] += sum_du_xhat;
      grad_bias[channel] += sum_du[i];
      sum_wdu += call.weight[channel] * sum_du[i];
      sum_wdu_xhat += call.weight[channel] * sum_du_xhat;
    }
    double elements = static_cast<double>(sizes.group_elements());
    NormStatisticsGradient gradient =
        statistics_gradient_of(means[group], call.centre[first], rstds[group], sum_wdu, sum_wdu_xhat, elements);
    for (int64_t i = first; i < first + width; ++i) {
      call.slope[i] = gradient.slope;
      call.intercept[i] = gradient.intercept;
    }
  }
  p.channel.slope = call.slope.data();
  p.channel.intercept = call.intercept.data();
  run(p, call.kernels, &GroupNormKernels::backward);
  return {grad_input, parameter_gradient(weight, input, grad_weight, call.kernels),
          parameter_gradient(bias, input, grad_bias, call.kernels)};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                                       const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                                       int64_t num_groups, int64_t activation) {
  GroupNormCall call(input, num_groups, weight, bias, activation);
  return gradients_of(call, in_layout(grad_output, call.sizes.channels_last), input, mean, rstd, weight, bias);
}

// group_norm_backward, which leaves the output of group_norm_forward in the memory of grad_output, to the last bit. An element of the
// output is written where its gradient has just been read, so that it costs no pass over memory of its own.
std::tuple<Tensor, Tensor, Tensor> group_norm_restoring_backward(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                                                 const Tensor& rstd, const OptionalTensor& weight,
                                                                 const OptionalTensor& bias, int64_t num_groups, double /* eps */,
                                                                 int64_t activation) {
  GroupNormCall call(input, num_groups, weight, bias, activation);
  Tensor grad = in_layout(grad_output, call.sizes.channels_last), restored = grad_output;
  call.p.restored = grad.mutable_data_ptr();
  auto gradients = gradients_of(call, grad, input, mean, rstd, weight, bias);
  if (!is_in_layout(grad_output, call.sizes.channels_last)) torch::stable::copy_(restored, grad);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("group_norm_forward.cpp", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_recompute.cpp", TORCH_BOX(&group_norm_recompute));
  m.impl("group_norm_backward.cpp", TORCH_BOX(&group_norm_backward));
  m.impl("group_norm_restoring_backward.cpp", TORCH_BOX(&group_norm_restoring_backward));
}

}  // namespace fastvae
