#include "../../csrc/common/philox.h"
#include "../../csrc/cpu/latent_kernels.h"
#include "check.h"

namespace fastvae::testing {
namespace {

const LatentKernels& kernels() { return FASTVAE_SELECT_KERNELS(latent); }

// The package's normal `element` for a key, from the same words by Box and Muller in double precision.
double expected_noise(const uint32_t (&key)[2], int64_t element) {
  int64_t tile = element / kNoiseTile, stream = element % kNoiseTile / kNoiseLanes, lane = element % kNoiseLanes;
  auto counter = static_cast<uint64_t>(tile * kNoiseLanes + lane);
  PhiloxWords words = philox4x32(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0, key[0], key[1]);
  uint32_t even = words.w[stream / 2 * 2], odd = words.w[stream / 2 * 2 + 1];
  float unit = static_cast<float>(even) * 0x1p-32f + 0x1p-33f;
  double radius = std::sqrt(-2.0 * std::log(static_cast<double>(unit))), turn = 2.0 * 3.14159265358979323846 * odd * 0x1p-32;
  return radius * (stream % 2 ? std::sin(turn) : std::cos(turn));
}

double limited(double logvar) { return std::fmin(std::fmax(logvar, -30.0), 20.0); }

struct Problem {
  int64_t rows, inner, samples;
  DType dtype;
  Array mu, logvar, prior_mu, prior_logvar, eps, z, kl, noise;
  bool with_prior, draws;

  Problem(int64_t rows, int64_t inner, int64_t samples, DType dtype, bool with_prior, bool draws, Source& source, Kind kind)
      : rows(rows),
        inner(inner),
        samples(samples),
        dtype(dtype),
        mu(dtype, rows * inner, source, kind),
        logvar(dtype, rows * inner, source, kind),
        prior_mu(dtype, rows * inner, source, kind),
        prior_logvar(dtype, rows * inner, source, kind),
        eps(dtype, samples * rows * inner, source, kind),
        z(dtype, samples * rows * inner),
        kl(dtype, rows * inner),
        noise(accumulation_dtype(dtype), samples * rows * inner),
        with_prior(with_prior),
        draws(draws) {}

  void fill(LatentInputs& in) const {
    in.mu = mu.view();
    in.logvar = logvar.view();
    if (with_prior) {
      in.prior_mu = prior_mu.view();
      in.prior_logvar = prior_logvar.view();
    }
    if (!draws) in.eps = eps.view();
    in.key[0] = 17;
    in.key[1] = 4;
    in.numel = rows * inner;
    in.samples = samples;
    in.clamp_min = -30.0;
    in.clamp_max = 20.0;
    in.is_double = dtype == DType::float64;
  }

  double kl_of(int64_t i) const {
    double m = mu.get(i), v = limited(logvar.get(i));
    if (!with_prior) return 0.5 * (m * m + std::expm1(v) - v);
    double delta = m - prior_mu.get(i), difference = v - limited(prior_logvar.get(i));
    return 0.5 * (delta * delta * std::exp(-limited(prior_logvar.get(i))) + std::expm1(difference) - difference);
  }

  // Of the terms that a KL is the sum of.
  double size_of_kl(int64_t i) const {
    double v = limited(logvar.get(i)), w = with_prior ? limited(prior_logvar.get(i)) : 0.0,
           delta = mu.get(i) - with_prior * prior_mu.get(i);
    return 1.0 + delta * delta * std::exp(-w) + std::exp(v - w) + std::fabs(v - w);
  }
};

void check_forward(Problem& p, bool elementwise, bool by_row, Kind kind) {
  LatentForward f{{}, by_row ? Partition(p.rows, p.inner) : Partition(1, p.rows * p.inner), {}, {}, {}, nullptr, 0.0};
  p.fill(f);
  f.z = p.z.output();
  if (p.draws) f.noise = p.noise.output();
  std::vector<double> sums(f.partition.slots());
  if (elementwise)
    f.kl = p.kl.output();
  else
    f.sums = sums.data();
  on_threads(0, f.partition.items(), 1, [&](int64_t begin, int64_t end) { kernels().forward(f, begin, end); });
  if (kind != Kind::usual) return;
  std::string what = name("latent", {p.rows, p.inner, p.samples, static_cast<int>(p.dtype), p.with_prior, p.draws});
  double total = 0.0, size = 0.0;
  for (int64_t i = 0; i < p.rows * p.inner; ++i) {
    total += p.kl_of(i);
    size += p.size_of_kl(i);
    if (elementwise) expect_near(p.kl.get(i), p.kl_of(i), p.dtype, p.size_of_kl(i), what, " kl");
    for (int64_t s = 0; s < p.samples; ++s) {
      int64_t element = s * p.rows * p.inner + i;
      double e = p.draws ? expected_noise(f.key, element) : p.eps.get(element), sigma = std::exp(0.5 * limited(p.logvar.get(i)));
      // Noise agrees to 2e-6, in float64 too.
      double size_of_z = std::fabs(p.mu.get(i)) + sigma * std::fabs(e);
      if (p.draws) expect(std::fabs(p.noise.get(element) - e) < 2e-6, what, " noise");
      expect_near(p.z.get(element), p.mu.get(i) + sigma * e, p.draws && p.dtype == DType::float64 ? DType::float32 : p.dtype, size_of_z,
                  what, " z");
    }
  }
  double sum = 0.0;
  for (double slot : sums) sum += slot;
  if (!elementwise) expect_near(sum, total, accumulation_dtype(p.dtype), size, what, " sum");
}

void check_backward(Problem& p, bool one_weight, Kind kind, Source& source) {
  int64_t numel = p.rows * p.inner;
  Array grad_z(p.dtype, p.samples * numel, source, kind), grad_kl(accumulation_dtype(p.dtype), one_weight ? 1 : numel, source, kind);
  Array grads[] = {{p.dtype, numel}, {p.dtype, numel}, {p.dtype, numel}, {p.dtype, numel}};
  LatentBackward b{{}, Partition(1, numel), grad_z.view(), grad_kl.view(), 0.3, {}, {}, {}, {}};
  p.fill(b);
  if (one_weight) {
    b.grad_kl.inner = numel;
    b.grad_kl.inner_stride = 0;
  }
  b.grad_mu = grads[0].output();
  b.grad_logvar = grads[1].output();
  if (p.with_prior) {
    b.grad_prior_mu = grads[2].output();
    b.grad_prior_logvar = grads[3].output();
  }
  on_threads(0, b.partition.items(), 1, [&](int64_t begin, int64_t end) { kernels().backward(b, begin, end); });
  if (kind != Kind::usual || p.draws) return;
  for (int64_t i = 0; i < numel; ++i) {
    double m = p.mu.get(i), v = p.logvar.get(i), sigma = std::exp(0.5 * v), weight = 0.3 * grad_kl.get(one_weight ? 0 : i);
    double precision = p.with_prior ? std::exp(-p.prior_logvar.get(i)) : 1.0, delta = m - (p.with_prior ? p.prior_mu.get(i) : 0.0);
    double of_mu = weight * delta * precision, of_logvar = weight * 0.5 * (sigma * sigma * precision - 1.0);
    double size = std::fabs(weight) * (1.0 + sigma * sigma * precision + std::fabs(delta) * precision * (1.0 + std::fabs(delta)));
    for (int64_t s = 0; s < p.samples; ++s) {
      double grad = grad_z.get(s * numel + i), through = 0.5 * sigma * grad * p.eps.get(s * numel + i);
      of_mu += grad;
      of_logvar += through;
      size += std::fabs(grad) + std::fabs(through);
    }
    expect_near(grads[0].get(i), of_mu, p.dtype, size, "latent grad_mu");
    expect_near(grads[1].get(i), of_logvar, p.dtype, size, "latent grad_logvar");
    if (!p.with_prior) continue;
    double of_prior = weight * 0.5 * (1.0 - sigma * sigma * precision - delta * delta * precision);
    expect_near(grads[2].get(i), -weight * delta * precision, p.dtype, size, "latent grad_prior_mu");
    expect_near(grads[3].get(i), of_prior, p.dtype, size, "latent grad_prior_logvar");
  }
}

void check_dimension_sums(Problem& p, Kind kind) {
  LatentInputs in{};
  p.fill(in);
  int64_t count = std::min<int64_t>(p.inner, 512);
  std::vector<double> sums(count, kNaN);
  kernels().dimension_sums(in, p.inner, 0, p.rows, p.inner - count, count, sums.data());
  if (kind != Kind::usual) return;
  for (int64_t d = 0; d < count; ++d) {
    double total = 0.0, size = 0.0;
    for (int64_t row = 0; row < p.rows; ++row) {
      total += p.kl_of(row * p.inner + p.inner - count + d);
      size += p.size_of_kl(row * p.inner + p.inner - count + d);
    }
    expect_near(sums[d], total, accumulation_dtype(p.dtype), size, "latent dimension_sums");
  }
}

}  // namespace

void test_latent() {
  constexpr int64_t sizes[][3] = {{1, 1, 1}, {3, 7, 2}, {5, 513, 1}, {2, 1030, 3}, {40, 33, 1}, {2, 17000, 1}};
  for (const auto& size : sizes)
    for (DType dtype : kFloats)
      for (int options = 0; options < 4; ++options)
        for (Kind kind : kKinds) {
          if (size[1] > 10000 && kind != Kind::usual) continue;
          Source source(static_cast<uint64_t>(size[0] + options));
          Problem p(size[0], size[1], size[2], dtype, options & 1, options & 2, source, kind);
          check_forward(p, false, false, kind);
          check_forward(p, true, true, kind);
          check_forward(p, false, true, kind);
          check_backward(p, true, kind, source);
          check_backward(p, false, kind, source);
          check_dimension_sums(p, kind);
        }
}

}  // namespace fastvae::testing
