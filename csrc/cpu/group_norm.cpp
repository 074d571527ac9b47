// The group norm operators on the CPU: what they allocate, how they share the work, and which instruction set's kernels do it.
#include <algorithm>
#include <cmath>

#include "../common/layout.h"
#include "group_norm_kernels.h"
#include "tensor.h"

namespace fastvae {

namespace {

// Read once a call: another thread may choose another instruction set meanwhile.
const GroupNormKernels& selected_kernels() { return FASTVAE_SELECT_KERNELS(group_norm); }

Tensor empty_in_layout(const Tensor& like, bool channels_last) {
  Sizes shape = shape_of(like);
  return empty_strided(shape, strides_in_layout(shape, channels_last), like.scalar_type());
}

Tensor copy_in_layout(const Tensor& tensor, bool channels_last) {
  Tensor copy = empty_in_layout(tensor, channels_last);
  torch::stable::copy_(copy, tensor);
  return copy;
}

NormRuns runs_of(const GroupedChannels& sizes) {
  return sizes.channels_adjacent() ? NormRuns(sizes.batch, sizes.positions * sizes.channels, sizes.channels)
                                   : NormRuns(sizes.batch * sizes.channels, sizes.positions, 1);
}

// Calls a kernel, a member of the table, with (p, begin_item, end_item, scratch) for all items.
template <class Kernel>
void run(const GroupNorm& p, const GroupNormKernels& kernels, Kernel kernel) {
  int64_t doubles = ceil_div(kernels.scratch_bytes(p.runs), sizeof(double));
  torch::stable::parallel_for(0, p.runs.items(), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(doubles);
    (kernels.*kernel)(p, begin, end, scratch.data());
  });
}

std::vector<double> parameter(const OptionalTensor& tensor, int64_t channels, double otherwise, const GroupNormKernels& kernels) {
  std::vector<double> values(channels, otherwise);
  if (tensor && channels > 0) kernels.to_double(contiguous_view(dense(*tensor)), channels, values.data());
  return values;
}

struct Problem {
  const GroupNormKernels& kernels;
  GroupedChannels sizes;
  Tensor input;
  GroupNorm p;
  std::vector<double> weight, bias, centre, scale, offset, slope, constant;

  Problem(const Tensor& tensor, int64_t groups, const OptionalTensor& weight_tensor, const OptionalTensor& bias_tensor, int64_t activation)
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
          {},
          1,
          nullptr},
        weight(parameter(weight_tensor, sizes.channels, 1.0, kernels)),
        bias(parameter(bias_tensor, sizes.channels, 0.0, kernels)) {
    if (sizes.channels_adjacent()) p.groups = groups;
  }

  // The mean as the kernels' arithmetic holds it.
  double rounded(double mean) const { return p.dtype == DType::float64 ? mean : static_cast<double>(static_cast<float>(mean)); }

  void set_normalisation(const double* mean, const double* rstd) {
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

// The moments of a group: the pieces' means and squared deviations, put together in their order (Chan, Golub and LeVeque 1983).
void combine_moments(const Problem& problem, double eps, double* mean, double* rstd) {
  const GroupedChannels& sizes = problem.sizes;
  const NormRuns& runs = problem.p.runs;
  int64_t per_slot = problem.p.groups;
  // Slots of a group, one behind the other: all pieces of its sample, or of its planes.
  int64_t slots = per_slot > 1 || sizes.channels_adjacent() ? runs.pieces_per_run : sizes.width() * runs.pieces_per_run;
  double elements = static_cast<double>(sizes.group_elements());
  for (int64_t group = 0; group < sizes.batch * sizes.groups; ++group) {
    int64_t first = sizes.channels_adjacent() ? group / sizes.groups * slots : group * slots, column = group % per_slot;
    auto moments = [&](int64_t slot) { return problem.p.sums + ((first + slot) * per_slot + column) * 2; };
    auto count = [&](int64_t slot) { return static_cast<double>(runs.piece_length(slot % runs.pieces_per_run) / per_slot); };
    double total = 0.0, squares = 0.0;
    // About the first piece's mean, so that equal means leave no rounding.
    double shift = elements > 0 ? moments(0)[0] : 0.0;
    if (elements > 0)
      for (int64_t slot = 0; slot < slots; ++slot) total += count(slot) * (moments(slot)[0] - shift);
    double deviation = elements > 0 ? total / elements : 0.0;
    mean[group] = shift + deviation;
    if (elements > 0)
      for (int64_t slot = 0; slot < slots; ++slot) {
        double apart = (moments(slot)[0] - shift) - deviation;
        squares += moments(slot)[1] + count(slot) * apart * apart;
      }
    rstd[group] = 1.0 / std::sqrt((elements > 0 ? squares / elements : 0.0) + eps);
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(const Tensor& input, int64_t num_groups, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, double eps, int64_t activation) {
  Problem problem(input, num_groups, weight, bias, activation);
  GroupNorm& p = problem.p;
  Tensor output = empty_in_layout(input, problem.sizes.channels_last);
  Tensor mean = empty({problem.sizes.batch, num_groups}, ScalarType::Double),
         rstd = empty({problem.sizes.batch, num_groups}, ScalarType::Double);
  auto* means = static_cast<double*>(mean.mutable_data_ptr());
  auto* rstds = static_cast<double*>(rstd.mutable_data_ptr());

  std::vector<double> moments(p.runs.slots() * p.groups * 2);
  p.sums = moments.data();
  run(p, problem.kernels, &GroupNormKernels::moments);
  combine_moments(problem, eps, means, rstds);
  problem.set_normalisation(means, rstds);
  p.output = output.mutable_data_ptr();
  run(p, problem.kernels, &GroupNormKernels::forward);
  return {output, mean, rstd};
}

// From the slots the sums of each channel of each sample: of du, and of du times the deviation from the rounded mean.
void combine_gradient_sums(const NormRuns& runs, const double* slots, double* plain, double* weighted) {
  int64_t channels = runs.channels;
  for (int64_t run = 0; run < runs.count; ++run)
    for (int64_t piece = 0; piece < runs.pieces_per_run; ++piece) {
      const double* slot = slots + (run * runs.pieces_per_run + piece) * channels * 2;
      for (int64_t c = 0; c < channels; ++c) plain[run * channels + c] += slot[c];
      for (int64_t c = 0; c < channels; ++c) weighted[run * channels + c] += slot[channels + c];
    }
}

Tensor parameter_gradient(const OptionalTensor& parameter, const Tensor& input, const std::vector<double>& values,
                          const GroupNormKernels& kernels) {
  if (!parameter) return empty({0}, input.scalar_type());
  Tensor grad = empty(shape_of(*parameter), parameter->scalar_type());
  if (!values.empty()) kernels.from_double(values.data(), static_cast<int64_t>(values.size()), output_of(grad));
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                                       const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                                       int64_t num_groups, int64_t activation) {
  Problem problem(input, num_groups, weight, bias, activation);
  GroupNorm& p = problem.p;
  const GroupedChannels& sizes = problem.sizes;
  Tensor grad = is_in_layout(grad_output, sizes.channels_last) ? grad_output : copy_in_layout(grad_output, sizes.channels_last);
  Tensor grad_input = empty_in_layout(input, sizes.channels_last), dense_mean = dense(mean), dense_rstd = dense(rstd);
  const auto* means = static_cast<const double*>(dense_mean.const_data_ptr());
  const auto* rstds = static_cast<const double*>(dense_rstd.const_data_ptr());

  problem.set_normalisation(means, rstds);
  p.grad_output = grad.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  std::vector<double> slots(p.runs.slots() * p.runs.channels * 2);
  p.sums = slots.data();
  run(p, problem.kernels, &GroupNormKernels::gradient_sums);

  int64_t count = sizes.batch * sizes.channels, width = sizes.width();
  std::vector<double> plain(count), weighted(count), grad_weight(sizes.channels), grad_bias(sizes.channels);
  combine_gradient_sums(p.runs, slots.data(), plain.data(), weighted.data());
  problem.slope.resize(count);
  problem.constant.resize(count);
  for (int64_t first = 0; first < count; first += width) {
    int64_t group = first / width;
    double grad_sum = 0.0, projection = 0.0;
    for (int64_t i = first; i < first + width; ++i) {
      int64_t channel = i % sizes.channels;
      double normal = sum_du_xhat_of(means[group], problem.centre[i], rstds[group], plain[i], weighted[i]);
      grad_weight[channel] += normal;
      grad_bias[channel] += plain[i];
      grad_sum += problem.weight[channel] * plain[i];
      projection += problem.weight[channel] * normal;
    }
    double elements = static_cast<double>(sizes.group_elements());
    NormStatisticsGradient through =
        statistics_gradient_of(means[group], problem.centre[first], rstds[group], grad_sum, projection, elements);
    for (int64_t i = first; i < first + width; ++i) {
      problem.slope[i] = through.slope;
      problem.constant[i] = through.intercept;
    }
  }
  p.channel.slope = problem.slope.data();
  p.channel.constant = problem.constant.data();
  run(p, problem.kernels, &GroupNormKernels::backward);
  return {grad_input, parameter_gradient(weight, input, grad_weight, problem.kernels),
          parameter_gradient(bias, input, grad_bias, problem.kernels)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("group_norm_forward.cpp", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_backward.cpp", TORCH_BOX(&group_norm_backward));
}

}  // namespace fastvae
