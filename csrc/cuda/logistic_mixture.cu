// The operators of the mixture of discretized logistics on a GPU: the parameters of the kernel and its launches. The kernel is in
// logistic_mixture_kernels.cuh.
#include "logistic_mixture_kernels.cuh"
#include "loss.h"

namespace fastvae {
namespace {

// The tensors and numbers that all operators take.
struct MixtureArguments {
  const Tensor &input, &target;
  int64_t mixtures;
  Reduction reduction;

  int64_t batch() const { return target.size(0); }
  int64_t positions() const {
    int64_t positions = 1;
    for (int64_t d = 2; d < target.dim(); ++d) positions *= target.size(d);
    return positions;
  }
  double scale() const { return reduction_scale(reduction, batch(), batch() * positions()); }
};

// Fills in what both passes read. `by_sample` asks for one sum a sample.
template <class T>
LogisticMixtureParams<T> params_of(const MixtureArguments& a, bool by_sample, Copies& copies) {
  copies.reserve(4);
  LogisticMixtureParams<T> p{};
  p.sizes = {a.batch(), a.positions(), a.target.size(1), a.mixtures};
  p.input = data_of<T>(a.input, copies);
  p.target = readable(a.target, copies).const_data_ptr();
  p.target_dtype = dtype_of(a.target);
  p.positions = divider(p.sizes.positions);
  int64_t sums = by_sample ? p.sizes.batch : 1;
  p.columns = position_sums_of(p.sizes.batch * p.sizes.positions / sums, sums);
  p.scale = 1.0f;
  return p;
}

template <class T>
void launch_kernel(const Launch& launch, const LogisticMixtureParams<T>& p) {
  launch.run(logistic_mixture_kernel<T>, p.columns.groups, p.columns.splits, kThreads, p);
}

template <class T>
std::tuple<Tensor, Tensor> forward(const MixtureArguments& a, double grad_scale, bool with_grad) {
  Launch launch(a.input);
  bool elementwise = a.reduction == Reduction::none, by_sample = a.reduction == Reduction::sample;
  Sizes loss_shape = by_sample ? Sizes{a.batch()} : Sizes{};
  if (elementwise) {
    loss_shape = shape_of(a.input);
    loss_shape.erase(loss_shape.begin() + 1);
  }
  Tensor loss = launch.empty(loss_shape, elementwise ? a.input.scalar_type() : ScalarType::Float);
  Tensor grad_input = launch.empty_if(with_grad, a.input);
  if (a.batch() * a.positions() == 0) {
    launch.fill(loss, 0);
    return {loss, grad_input};
  }
  Copies copies;
  LogisticMixtureParams<T> p = params_of<T>(a, by_sample, copies);
  if (elementwise) {
    p.loss = static_cast<T*>(loss.mutable_data_ptr());
  } else {
    p.loss_sum = output_of(loss);
    p.loss_scale = static_cast<float>(a.scale());
    p.workspace = launch.workspace();
  }
  if (with_grad) {
    p.grad_input = static_cast<T*>(grad_input.mutable_data_ptr());
    p.scale = static_cast<float>(grad_scale * a.scale());
  }
  launch_kernel(launch, p);
  return {loss, grad_input};
}

// Writes the gradient. With `expected`, the forward pass wrote it for a grad_output of that value, and it stays as it is where it is that.
template <class T>
void write_gradient(const Launch& launch, const MixtureArguments& a, const Tensor& grad_output, std::optional<double> expected,
                    const Tensor& grad_input) {
  if (a.batch() * a.positions() == 0) return;
  Copies copies;
  LogisticMixtureParams<T> p = params_of<T>(a, false, copies);
  if (a.reduction == Reduction::none) {
    p.grad_elements = data_of<T>(grad_output, copies);
  } else {
    p.grad_rows = static_cast<const float*>(grad_output.const_data_ptr());
    p.grad_stride = a.reduction == Reduction::sample ? grad_output.stride(0) : 0;
  }
  p.scale = static_cast<float>(a.scale());
  p.grad_input = static_cast<T*>(grad_input.mutable_data_ptr());
  p.is_written = expected.has_value();
  p.expected = static_cast<float>(expected.value_or(0.0));
  launch_kernel(launch, p);
}

std::tuple<Tensor, Tensor> logistic_mixture_forward(const Tensor& input, const Tensor& target, int64_t mixtures, int64_t reduction,
                                                    double grad_scale, bool with_grad) {
  MixtureArguments arguments{input, target, mixtures, static_cast<Reduction>(reduction)};
  return dispatch(input.scalar_type(), [&](auto type) { return forward<typename decltype(type)::Type>(arguments, grad_scale, with_grad); });
}

Tensor logistic_mixture_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target, int64_t mixtures,
                                 int64_t reduction) {
  MixtureArguments arguments{input, target, mixtures, static_cast<Reduction>(reduction)};
  Launch launch(input);
  Tensor grad_input = launch.empty(shape_of(input), input.scalar_type());
  dispatch(input.scalar_type(),
           [&](auto type) { write_gradient<typename decltype(type)::Type>(launch, arguments, grad_output, {}, grad_input); });
  return grad_input;
}

void logistic_mixture_backward_(Tensor grad_input, const Tensor& grad_output, double expected, const Tensor& input, const Tensor& target,
                                int64_t mixtures, int64_t reduction) {
  MixtureArguments arguments{input, target, mixtures, static_cast<Reduction>(reduction)};
  Launch launch(input);
  dispatch(input.scalar_type(),
           [&](auto type) { write_gradient<typename decltype(type)::Type>(launch, arguments, grad_output, expected, grad_input); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("logistic_mixture_forward.cuda", TORCH_BOX(&logistic_mixture_forward));
  m.impl("logistic_mixture_backward.cuda", TORCH_BOX(&logistic_mixture_backward));
  m.impl("logistic_mixture_backward_.cuda", TORCH_BOX(&logistic_mixture_backward_));
}

}  // namespace fastvae
