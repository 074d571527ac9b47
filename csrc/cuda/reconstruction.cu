// The operators of the reconstruction losses on a GPU: the parameters of the kernels, the choice of kernels, and their launches. The
// kernels are in reconstruction_kernels.cuh, whose first lines list them.
#include "loss.h"
#include "reconstruction_kernels.cuh"

namespace fastvae {
namespace {

// The tensors that both operators take.
struct ReconstructionArguments {
  const Tensor &input, &target;
  const OptionalTensor &weight, &pos_weight, &logvar;
  Likelihood likelihood;
};

// An operand that broadcasts to `shape`.
template <class T>
BroadcastOperand operand_of(const Tensor& tensor, const Sizes& shape, int64_t numel, Copies& copies) {
  DType dtype = dtype_of(tensor);
  bool is_readable = dtype == DType::float32 || dtype == kDTypeOf<T>;
  const Tensor& values = is_readable ? readable(tensor, copies) : copies.emplace_back(contiguous_copy(tensor, ScalarType::Float));
  BroadcastOperand operand;
  operand.data = values.const_data_ptr();
  operand.is_float32 = dtype_of(values) == DType::float32;
  operand.full = values.numel() == numel;
  operand.aligned = operand.full && (operand.is_float32 ? is_aligned(static_cast<const float*>(operand.data))
                                                        : is_aligned(static_cast<const T*>(operand.data)));
  operand.inner = divider(broadcast_inner(values, shape));
  operand.period = divider(values.numel());
  return operand;
}

// Fills in what both passes read.
template <class T>
ReconstructionParams<T> params_of(const ReconstructionArguments& a, Copies& copies) {
  copies.reserve(8);
  ReconstructionParams<T> p{};
  Sizes shape = shape_of(a.input);
  p.numel = a.input.numel();
  p.input = static_cast<const T*>(readable(a.input, copies).const_data_ptr());
  p.target = readable(a.target, copies).const_data_ptr();
  p.target_dtype = dtype_of(a.target);
  size_t target_vector_bytes = kVector * a.target.element_size();
  p.aligned = is_aligned(p.input) && reinterpret_cast<uintptr_t>(p.target) % target_vector_bytes == 0;
  if (a.weight) p.weight = operand_of<T>(*a.weight, shape, p.numel, copies);
  if (a.pos_weight) p.extra = operand_of<T>(*a.pos_weight, shape, p.numel, copies);
  if (a.logvar) p.extra = operand_of<T>(*a.logvar, shape, p.numel, copies);
  p.scale = 1.0f;
  p.row = divider(batch_of(a.input) > 0 ? p.numel / batch_of(a.input) : 1);
  return p;
}

template <class T>
void launch_likelihood(const Launch& launch, const ReconstructionArguments& a, int64_t blocks, const ReconstructionParams<T>& p) {
  auto run = [&](auto terms) { launch.run(reconstruction_loss_kernel<T, decltype(terms)>, blocks, 1, kThreads, p); };
  switch (a.likelihood) {
    case Likelihood::bce_with_logits:
      return a.pos_weight ? run(WeightedBCEWithLogits{}) : run(BCEWithLogits{});
    case Likelihood::bce:
      return run(BCE{});
    case Likelihood::mse:
      return run(SquaredError{});
    case Likelihood::gaussian:
      return run(Gaussian{});
  }
}

// Launches the loss kernel and, where the gradient of a log variance with shared values is requested, the second pass for that. A log
// variance of one value needs no second pass, because its gradient is one sum over all elements.
template <class T>
void launch_loss(Launch& launch, const ReconstructionArguments& a, const LossPlan& plan, ReconstructionParams<T>& p,
                 const Tensor* grad_logvar) {
  p.chunk = plan.chunks.elements;
  p.loss_sum = plan.sum;
  p.ticket = plan.ticket;
  bool shared = grad_logvar && !p.extra.full;
  if (grad_logvar && p.extra.full) p.grad_logvar = output_of(*grad_logvar);
  if (shared && grad_logvar->numel() == 1) {
    Workspace workspace = launch.workspace();
    p.ticket = workspace.tickets;
    p.logvar_sum = {output_of(*grad_logvar), 1.0, workspace.slots + kMaxBlocks};
    shared = false;
  }
  launch_likelihood(launch, a, plan.chunks.blocks, p);
  if (!shared) return;
  ReconstructionSharedLogvarParams<T> by_value{
      p, column_sums_of(p.numel / grad_logvar->numel(), grad_logvar->numel(), p.extra.inner.divisor), launch.workspace()};
  by_value.grad_logvar = output_of(*grad_logvar);
  launch.run(reconstruction_shared_logvar_kernel<T>, by_value.columns.groups, by_value.columns.splits, kThreads, by_value);
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
ThreeTensors forward(const ReconstructionArguments& a, Reduction reduction, double grad_scale, bool with_grad) {
  Launch launch(a.input);
  Sizes nothing = {0};
  ScalarType dtype = a.input.scalar_type();
  Tensor loss = launch.empty_reduced(a.input, reduction);
  Tensor grad_input = launch.empty(with_grad ? shape_of(a.input) : nothing, dtype);
  bool with_logvar = with_grad && a.logvar;
  Tensor grad_logvar = with_logvar ? launch.empty(shape_of(*a.logvar), a.logvar->scalar_type()) : launch.empty(nothing, dtype);
  if (a.input.numel() == 0) {
    launch.fill(loss, 0);
    launch.fill(grad_logvar, 0);
    return {loss, grad_input, grad_logvar};
  }
  Copies copies;
  ReconstructionParams<T> p = params_of<T>(a, copies);
  if (reduction == Reduction::none) p.loss = static_cast<T*>(loss.mutable_data_ptr());
  if (with_grad) {
    p.grad_input = static_cast<T*>(grad_input.mutable_data_ptr());
    p.scale = static_cast<float>(grad_scale * reduction_scale(reduction, batch_of(a.input), p.numel));
  }
  launch_loss(launch, a, plan_loss(launch, reduction, a.input, p.numel, loss), p, with_logvar ? &grad_logvar : nullptr);
  return {loss, grad_input, grad_logvar};
}

// Writes the gradients. With `expected`, the forward pass wrote them for a grad_output of that value, and they stay as they are where it is
// that.
template <class T>
void write_gradients(Launch& launch, const ReconstructionArguments& a, const Tensor& grad_output, Reduction reduction,
                     std::optional<double> expected, const Tensor& grad_input, const Tensor* grad_target, const Tensor& grad_logvar) {
  if (a.input.numel() == 0) return launch.fill(grad_logvar, 0);
  Copies copies;
  ReconstructionParams<T> p = params_of<T>(a, copies);
  if (reduction == Reduction::none) {
    p.grad_elements = static_cast<const T*>(readable(grad_output, copies).const_data_ptr());
  } else {
    p.grad_rows = static_cast<const float*>(grad_output.const_data_ptr());
    p.grad_stride = reduction == Reduction::sample && grad_output.dim() > 0 ? grad_output.stride(0) : 0;
  }
  p.scale = static_cast<float>(reduction_scale(reduction, batch_of(a.input), p.numel));
  p.grad_input = static_cast<T*>(grad_input.mutable_data_ptr());
  if (grad_target) p.grad_target = output_of(*grad_target);
  p.is_written = expected.has_value();
  p.expected = static_cast<float>(expected.value_or(0.0));
  LossPlan plan;
  plan.chunks = chunks_of(p.numel, kMaxBlocks);
  launch_loss(launch, a, plan, p, a.logvar ? &grad_logvar : nullptr);
}

template <class T>
ThreeTensors backward(const ReconstructionArguments& a, const Tensor& grad_output, Reduction reduction, bool with_target) {
  Launch launch(a.input);
  Sizes nothing = {0};
  ScalarType dtype = a.input.scalar_type();
  Tensor grad_input = launch.empty(shape_of(a.input), dtype);
  Tensor grad_target = launch.empty(with_target ? shape_of(a.target) : nothing, a.target.scalar_type());
  Tensor grad_logvar = a.logvar ? launch.empty(shape_of(*a.logvar), a.logvar->scalar_type()) : launch.empty(nothing, dtype);
  write_gradients<T>(launch, a, grad_output, reduction, {}, grad_input, with_target ? &grad_target : nullptr, grad_logvar);
  return {grad_input, grad_target, grad_logvar};
}

ThreeTensors reconstruction_forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                    const OptionalTensor& pos_weight, const OptionalTensor& logvar, int64_t likelihood, int64_t reduction,
                                    double grad_scale, bool with_grad) {
  ReconstructionArguments arguments{input, target, weight, pos_weight, logvar, static_cast<Likelihood>(likelihood)};
  return dispatch(input.scalar_type(), [&](auto type) {
    return forward<typename decltype(type)::Type>(arguments, static_cast<Reduction>(reduction), grad_scale, with_grad);
  });
}

ThreeTensors reconstruction_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                     const OptionalTensor& pos_weight, const OptionalTensor& logvar, int64_t likelihood, int64_t reduction,
                                     bool with_target) {
  ReconstructionArguments arguments{input, target, weight, pos_weight, logvar, static_cast<Likelihood>(likelihood)};
  return dispatch(input.scalar_type(), [&](auto type) {
    return backward<typename decltype(type)::Type>(arguments, grad_output, static_cast<Reduction>(reduction), with_target);
  });
}

void reconstruction_backward_(Tensor grad_input, Tensor grad_logvar, const Tensor& grad_output, double expected, const Tensor& input,
                              const Tensor& target, const OptionalTensor& weight, const OptionalTensor& pos_weight,
                              const OptionalTensor& logvar, int64_t likelihood, int64_t reduction) {
  ReconstructionArguments arguments{input, target, weight, pos_weight, logvar, static_cast<Likelihood>(likelihood)};
  Launch launch(input);
  dispatch(input.scalar_type(), [&](auto type) {
    write_gradients<typename decltype(type)::Type>(launch, arguments, grad_output, static_cast<Reduction>(reduction), expected, grad_input,
                                                   nullptr, grad_logvar);
  });
}

void reconstruction_rescale_(Tensor grad, const Tensor& grad_output, double expected) {
  if (grad.numel() == 0) return;
  Launch launch(grad);
  STD_TORCH_CHECK(grad_output.scalar_type() == ScalarType::Float, "fastvae: grad_output has to be float32");
  auto run = [&](auto type) {
    using T = typename decltype(type)::Type;
    ReconstructionRescaleParams<T> p{static_cast<T*>(grad.mutable_data_ptr()), static_cast<const float*>(grad_output.const_data_ptr()),
                                     static_cast<float>(expected), false, chunks_of(grad.numel(), kMaxRescaleBlocks)};
    p.aligned = is_aligned(p.grad);
    launch.run(reconstruction_rescale_kernel<T>, p.chunks.blocks, 1, kThreads, p);
  };
  // The gradient of a log variance may be float64 although no kernel takes a float64 input.
  grad.scalar_type() == ScalarType::Double ? run(TypeTag<double>{}) : dispatch(grad.scalar_type(), run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("reconstruction_forward.cuda", TORCH_BOX(&reconstruction_forward));
  m.impl("reconstruction_backward.cuda", TORCH_BOX(&reconstruction_backward));
  m.impl("reconstruction_backward_.cuda", TORCH_BOX(&reconstruction_backward_));
  m.impl("reconstruction_rescale_.cuda", TORCH_BOX(&reconstruction_rescale_));
}

}  // namespace fastvae
