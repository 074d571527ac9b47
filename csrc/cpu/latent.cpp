// The latent operators on the CPU. They allocate the results, share the items among threads, finish the sums, and choose the kernels of an
// instruction set.
#include "latent_kernels.h"
#include "tensor.h"

namespace fastvae {
namespace {

// An operator calls this once, because another thread may select another instruction set between two calls.
const LatentKernels& selected_kernels() { return FASTVAE_SELECT_KERNELS(latent); }

// The arguments that both operators share.
struct LatentArguments {
  const Tensor &mu, &logvar;
  const OptionalTensor &prior_mu, &prior_logvar, &eps, &seed;
  std::optional<int64_t> num_samples;
  double clamp_min, clamp_max;
};

// Fills in what both passes read.
void fill_inputs(LatentInputs& in, const LatentArguments& a, Copies& copies) {
  copies.reserve(8);
  in.mu = row_view(a.mu, copies);
  in.logvar = row_view(a.logvar, copies);
  if (a.prior_mu) {
    in.prior_mu = row_view(*a.prior_mu, copies);
    in.prior_logvar = row_view(*a.prior_logvar, copies);
  }
  if (a.eps) {
    in.eps = dense_view(*a.eps, copies);
  } else if (a.seed) {
    uint64_t seed = static_cast<uint64_t>(*static_cast<const int64_t*>(a.seed->const_data_ptr()));
    in.key[0] = static_cast<uint32_t>(seed);
    in.key[1] = static_cast<uint32_t>(seed >> 32);
  }
  in.numel = a.mu.numel();
  in.samples = a.num_samples.value_or(1);
  in.clamp_min = a.clamp_min;
  in.clamp_max = a.clamp_max;
  in.is_double = a.mu.scalar_type() == ScalarType::Double;
}

// The view of `active`, which has one value for each dimension, expanded over the batch to `numel` elements.
View active_view(const Tensor& active, int64_t numel) {
  View view = contiguous_view(active);
  if (active.numel() < numel) {
    view.inner = active.numel();
    view.period = 1;
  }
  return view;
}

// Whether the mean KL of each dimension over the batch is above the free bits: the shape of mu without its batch dimension.
Tensor active_dimensions(const LatentInputs& in, const Tensor& mu, double free_bits, const LatentKernels& kernels) {
  Sizes shape = shape_of(mu);
  if (!shape.empty()) shape.erase(shape.begin());
  Tensor active = cpu.empty(shape, ScalarType::Bool);
  int64_t batch = batch_of(mu), inner = active.numel();
  if (inner == 0) return active;
  constexpr int64_t kDimensions = 512;  // of one call of the kernel
  int64_t groups = ceil_div(inner, kDimensions), block = kItemElements / min64(inner, kDimensions), blocks = ceil_div(batch, block);
  std::vector<double> sums(blocks * inner);
  torch::stable::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t row = i / groups * block, dimension = i % groups * kDimensions;
      kernels.dimension_sums(in, inner, row, min64(row + block, batch), dimension, min64(inner - dimension, kDimensions),
                             &sums[i / groups * inner + dimension]);
    }
  });
  bool* out = static_cast<bool*>(active.mutable_data_ptr());
  for (int64_t d = 0; d < inner; ++d) {
    double total = 0.0;
    for (int64_t b = 0; b < blocks; ++b) total += sums[b * inner + d];
    out[d] = !(total / static_cast<double>(batch) <= free_bits);  // true for NaN, which free bits must not hide
  }
  return active;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> latent_forward(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                                          const OptionalTensor& prior_logvar, const OptionalTensor& eps,
                                                          const OptionalTensor& seed, std::optional<int64_t> num_samples, bool with_kl,
                                                          int64_t reduction_number, double free_bits, double clamp_min, double clamp_max,
                                                          bool keep_noise) {
  auto reduction = static_cast<Reduction>(reduction_number);
  bool draws = eps.has_value() || seed.has_value();
  Sizes z_shape = shape_of(mu);
  if (num_samples) z_shape.insert(z_shape.begin(), *num_samples);
  Tensor z = cpu.empty(draws ? z_shape : Sizes{0}, mu.scalar_type());
  Tensor noise = cpu.empty(draws && keep_noise ? z_shape : Sizes{0}, accumulation_dtype(mu));
  Tensor kl = with_kl ? cpu.empty_reduced(mu, reduction) : cpu.empty({0}, accumulation_dtype(mu));

  const LatentKernels& kernels = selected_kernels();
  Copies copies;
  LatentForward p{{}, partition_of(mu, reduction), {}, {}, {}, nullptr, free_bits};
  fill_inputs(p, {mu, logvar, prior_mu, prior_logvar, eps, seed, num_samples, clamp_min, clamp_max}, copies);
  bool masked = with_kl && free_bits > 0.0;
  Tensor active = masked ? active_dimensions(p, mu, free_bits, kernels) : cpu.empty({0}, ScalarType::Bool);
  if (masked && active.numel() > 0) p.active = active_view(active, p.numel);
  if (draws) p.z = output_of(z);
  if (draws && keep_noise) p.noise = output_of(noise);
  std::vector<double> slots;
  if (with_kl && reduction == Reduction::none) p.kl = output_of(kl);
  if (with_kl && reduction != Reduction::none) {
    slots.resize(p.partition.slots());
    p.sums = slots.data();
  }
  torch::stable::parallel_for(0, p.partition.items(), 1, [&](int64_t begin, int64_t end) { kernels.forward(p, begin, end); });
  if (with_kl && reduction != Reduction::none) finish_reduction(slots, p.partition, reduction_scale(reduction, batch_of(mu), p.numel), kl);
  return {z, kl, active, noise};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> latent_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Tensor& mu,
                                                           const Tensor& logvar, const OptionalTensor& prior_mu,
                                                           const OptionalTensor& prior_logvar, const OptionalTensor& eps,
                                                           const OptionalTensor& seed, const Tensor& active,
                                                           std::optional<int64_t> num_samples, int64_t reduction_number, double clamp_min,
                                                           double clamp_max) {
  auto reduction = static_cast<Reduction>(reduction_number);
  Sizes shape = shape_of(mu), prior_shape = prior_mu ? shape : Sizes{0};
  Tensor grad_mu = cpu.empty(shape, mu.scalar_type()), grad_logvar = cpu.empty(shape, mu.scalar_type());
  Tensor grad_prior_mu = cpu.empty(prior_shape, mu.scalar_type()), grad_prior_logvar = cpu.empty(prior_shape, mu.scalar_type());

  Copies copies;
  LatentBackward p{{}, Partition(1, mu.numel()), {}, {}, 0.0, {}, {}, {}, {}};
  fill_inputs(p, {mu, logvar, prior_mu, prior_logvar, eps, seed, num_samples, clamp_min, clamp_max}, copies);
  if (active.numel() > 0) p.active = active_view(active, p.numel);
  if (grad_z) {
    p.grad_z = dense_view(*grad_z, copies);
  }
  if (grad_kl) {
    p.grad_kl = gradient_view(*grad_kl, reduction, p.numel, batch_of(mu), copies);
    p.grad_kl_scale = reduction_scale(reduction, batch_of(mu), p.numel);
  }
  p.grad_mu = output_of(grad_mu);
  p.grad_logvar = output_of(grad_logvar);
  p.grad_prior_mu = output_of(grad_prior_mu);
  p.grad_prior_logvar = output_of(grad_prior_logvar);
  const LatentKernels& kernels = selected_kernels();
  torch::stable::parallel_for(0, p.partition.items(), 1, [&](int64_t begin, int64_t end) { kernels.backward(p, begin, end); });
  return {grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("latent_forward.cpp", TORCH_BOX(&latent_forward));
  m.impl("latent_backward.cpp", TORCH_BOX(&latent_backward));
}

}  // namespace fastvae
