// The latent operators on a GPU: the parameters of the kernels, the choice of kernels, and their launches. The kernels are in
// latent_kernels.cuh, whose first lines list them.
#include "latent_kernels.cuh"
#include "loss.h"

namespace fastvae {
namespace {

// The arguments that both operators share.
struct LatentArguments {
  const Tensor &mu, &logvar;
  const OptionalTensor &prior_mu, &prior_logvar, &eps, &seed;
  std::optional<int64_t> num_samples;
  double clamp_min, clamp_max;
};

// The rows of an operand, copied where they are not contiguous. Updates the facts about all operands.
template <class T>
LatentRows<T> rows_of(const Tensor& tensor, LatentInputs<T>& in, Copies& copies) {
  const Tensor& rows = copies.emplace_back(has_contiguous_rows(tensor) ? tensor : dense(tensor));
  int64_t stride = rows.dim() > 0 ? rows.stride(0) : 0;
  in.strided = in.strided || (batch_of(tensor) > 1 && stride != in.inner.divisor);
  LatentRows<T> result{static_cast<const T*>(rows.const_data_ptr()), stride};
  in.aligned = in.aligned && is_aligned(result.data) && (stride == in.inner.divisor || stride % kVector == 0);
  return result;
}

// The data of a contiguous operand, or of its copy.
template <class T>
const T* contiguous_data(const Tensor& tensor, LatentInputs<T>& in, Copies& copies) {
  const T* data = data_of<T>(tensor, copies);
  in.aligned = in.aligned && is_aligned(data);
  return data;
}

// Fills in what both passes read.
template <class T>
void fill_inputs(LatentInputs<T>& in, const LatentArguments& a, Copies& copies) {
  copies.reserve(8);
  int64_t numel = a.mu.numel(), batch = batch_of(a.mu), samples = a.num_samples.value_or(1);
  in.total = numel * samples;
  in.inner = divider(batch > 0 ? numel / batch : 1);
  in.numel = divider(numel);
  in.several_samples = samples > 1;
  in.strided = false;
  in.aligned = true;
  in.mu = rows_of(a.mu, in, copies);
  in.logvar = rows_of(a.logvar, in, copies);
  if (a.prior_mu) {
    in.prior_mu = rows_of(*a.prior_mu, in, copies);
    in.prior_logvar = rows_of(*a.prior_logvar, in, copies);
  }
  in.eps = a.eps ? contiguous_data(*a.eps, in, copies) : nullptr;
  in.seed = a.seed && !a.eps ? static_cast<const int64_t*>(a.seed->const_data_ptr()) : nullptr;
  in.active = nullptr;
  in.clamp_min = static_cast<float>(a.clamp_min);
  in.clamp_max = static_cast<float>(a.clamp_max);
}

// Forbids vector accesses where a vector could cross the end of a row or of a sample.
template <class T>
void forbid_crossing_vectors(LatentInputs<T>& in) {
  in.aligned = in.aligned && (!in.strided || in.inner.divisor % kVector == 0) && (!in.several_samples || in.numel.divisor % kVector == 0);
}

// Whether the mean KL of each dimension over the batch is above the free bits: the shape of mu without its batch dimension.
template <class T>
Tensor active_dimensions(Launch& launch, const LatentInputs<T>& in, const Tensor& mu, double free_bits) {
  Sizes shape = shape_of(mu);
  if (!shape.empty()) shape.erase(shape.begin());
  Tensor active = launch.empty(shape, ScalarType::Bool);
  if (mu.numel() == 0) {
    launch.fill(active, 1);
    return active;
  }
  LatentActiveParams<T> p{in, column_sums_of(batch_of(mu), active.numel(), 1), launch.workspace(), free_bits,
                          static_cast<bool*>(active.mutable_data_ptr())};
  // The kernel reads the elements of mu, not those of all samples.
  p.several_samples = false;
  launch.run(in.prior_mu.data ? latent_active_kernel<T, true> : latent_active_kernel<T, false>, p.columns.groups, p.columns.splits,
             kThreads, p);
  return active;
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
FourTensors forward(const LatentArguments& a, bool with_kl, Reduction reduction, double free_bits, bool keep_noise) {
  Launch launch(a.mu);
  ScalarType dtype = a.mu.scalar_type();
  bool draws = a.eps.has_value() || a.seed.has_value();
  Sizes z_shape = shape_of(a.mu), nothing = {0};
  if (a.num_samples) z_shape.insert(z_shape.begin(), *a.num_samples);
  Tensor z = launch.empty(draws ? z_shape : nothing, dtype);
  Tensor noise = launch.empty(draws && keep_noise ? z_shape : nothing, ScalarType::Float);
  Tensor kl = with_kl ? launch.empty_reduced(a.mu, reduction) : launch.empty(nothing, ScalarType::Float);
  bool masked = with_kl && free_bits > 0.0;

  Copies copies;
  LatentForwardParams<T> p{};
  fill_inputs(p, a, copies);
  forbid_crossing_vectors(p);
  Tensor active = masked ? active_dimensions<T>(launch, p, a.mu, free_bits) : launch.empty(nothing, ScalarType::Bool);
  if (p.total == 0) {
    launch.fill(kl, 0);
    return {z, kl, active, noise};
  }
  p.active = masked ? static_cast<const bool*>(active.const_data_ptr()) : nullptr;
  p.z = draws ? static_cast<T*>(z.mutable_data_ptr()) : nullptr;
  p.noise = draws && keep_noise ? static_cast<float*>(noise.mutable_data_ptr()) : nullptr;
  p.kl = with_kl && reduction == Reduction::none ? static_cast<T*>(kl.mutable_data_ptr()) : nullptr;
  p.free_bits = static_cast<float>(free_bits);
  LossPlan plan = plan_loss(launch, with_kl ? reduction : Reduction::none, a.mu, p.total, kl);
  p.chunk = plan.chunks.elements;
  p.kl_sum = plan.sum;
  p.ticket = plan.ticket;
  launch.run(a.prior_mu ? latent_forward_kernel<T, true> : latent_forward_kernel<T, false>, plan.chunks.blocks, 1, kThreads, p);
  return {z, kl, active, noise};
}

template <class T>
void fill_grad_kl(LatentBackwardParams<T>& p, const OptionalTensor& grad_kl, const Tensor& mu, Reduction reduction, Copies& copies) {
  p.grad_kl_elements = nullptr;
  p.grad_kl = nullptr;
  if (!grad_kl) return;
  if (reduction == Reduction::none) {
    p.grad_kl_elements = contiguous_data(*grad_kl, p, copies);
    return;
  }
  p.grad_kl = static_cast<const float*>(grad_kl->const_data_ptr());
  p.grad_kl_stride = reduction == Reduction::sample && grad_kl->dim() > 0 ? grad_kl->stride(0) : 0;
  p.grad_kl_scale = static_cast<float>(reduction_scale(reduction, batch_of(mu), mu.numel()));
}

template <class T>
FourTensors backward(const LatentArguments& a, const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Tensor& active,
                     Reduction reduction) {
  Launch launch(a.mu);
  ScalarType dtype = a.mu.scalar_type();
  Sizes shape = shape_of(a.mu), prior_shape = a.prior_mu ? shape : Sizes{0};
  Tensor grad_mu = launch.empty(shape, dtype), grad_logvar = launch.empty(shape, dtype);
  Tensor grad_prior_mu = launch.empty(prior_shape, dtype), grad_prior_logvar = launch.empty(prior_shape, dtype);

  Copies copies;
  LatentBackwardParams<T> p{};
  fill_inputs(p, a, copies);
  p.samples = a.num_samples.value_or(1);
  p.grad_z = grad_z ? contiguous_data(*grad_z, p, copies) : nullptr;
  fill_grad_kl(p, grad_kl, a.mu, reduction, copies);
  if (active.numel() > 0) p.active = static_cast<const bool*>(active.const_data_ptr());
  p.grad_mu = static_cast<T*>(grad_mu.mutable_data_ptr());
  p.grad_logvar = static_cast<T*>(grad_logvar.mutable_data_ptr());
  p.grad_prior_mu = static_cast<T*>(grad_prior_mu.mutable_data_ptr());
  p.grad_prior_logvar = static_cast<T*>(grad_prior_logvar.mutable_data_ptr());
  forbid_crossing_vectors(p);
  if (a.mu.numel() == 0) return {grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar};
  if (p.grad_z && p.samples > 1) {
    int64_t tiles = ceil_div(a.mu.numel(), kNoiseTile), splits = sample_splits(tiles, p.samples);
    if (splits > 1) p.workspace = launch.workspace();
    launch.run(a.prior_mu ? latent_backward_samples_kernel<T, true> : latent_backward_samples_kernel<T, false>, tiles, splits,
               sample_warps(p.samples) * kWarp, p);
  } else {
    p.several_samples = false;
    p.total = a.mu.numel();
    Chunks chunks = chunks_of(p.total, kMaxBlocks);
    p.chunk = chunks.elements;
    launch.run(a.prior_mu ? latent_backward_kernel<T, true> : latent_backward_kernel<T, false>, chunks.blocks, 1, kThreads, p);
  }
  return {grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar};
}

FourTensors latent_forward(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                           const OptionalTensor& eps, const OptionalTensor& seed, std::optional<int64_t> num_samples, bool with_kl,
                           int64_t reduction, double free_bits, double clamp_min, double clamp_max, bool keep_noise) {
  LatentArguments arguments{mu, logvar, prior_mu, prior_logvar, eps, seed, num_samples, clamp_min, clamp_max};
  return dispatch(mu.scalar_type(), [&](auto type) {
    return forward<typename decltype(type)::Type>(arguments, with_kl, static_cast<Reduction>(reduction), free_bits, keep_noise);
  });
}

FourTensors latent_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Tensor& mu, const Tensor& logvar,
                            const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, const OptionalTensor& eps,
                            const OptionalTensor& seed, const Tensor& active, std::optional<int64_t> num_samples, int64_t reduction,
                            double clamp_min, double clamp_max) {
  LatentArguments arguments{mu, logvar, prior_mu, prior_logvar, eps, seed, num_samples, clamp_min, clamp_max};
  return dispatch(mu.scalar_type(), [&](auto type) {
    return backward<typename decltype(type)::Type>(arguments, grad_z, grad_kl, active, static_cast<Reduction>(reduction));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("latent_forward.cuda", TORCH_BOX(&latent_forward));
  m.impl("latent_backward.cuda", TORCH_BOX(&latent_backward));
}

}  // namespace fastvae
