#include "../../csrc/cpu/logistic_mixture_kernels.h"
#include "check.h"

namespace fastvae::testing {
namespace {

const LogisticMixtureKernels& kernels() { return FASTVAE_SELECT_KERNELS(logistic_mixture); }

// The log of the probability of a level, from the difference of two sigmoids in long double.
double log_bin(int level, long double mean, long double log_scale) {
  long double inverse = expl(-fmaxl(log_scale, kMinLogScale)), center = (2.0L * level - 255.0L) / 255.0L - mean;
  long double upper = inverse * (center + 1.0L / 255.0L), lower = inverse * (center - 1.0L / 255.0L);
  if (level == 0) return static_cast<double>(-log1pl(expl(-upper)));
  if (level == 255) return static_cast<double>(-log1pl(expl(lower)));
  return static_cast<double>(-log1pl(expl(-upper)) - log1pl(expl(lower)) + logl(-expm1l(-2.0L / 255.0L * inverse)));
}

struct Case {
  LogisticMixtureSizes sizes;
  DType dtype, target_dtype;
  bool elementwise, by_row;
};

double loss_of(const LogisticMixtureSizes& s, const Array& input, const Array& target, DType target_dtype, int64_t sample,
               int64_t position) {
  auto parameter = [&](int64_t row) { return input.get((sample * s.parameters() + row) * s.positions + position); };
  auto level = [&](int64_t channel) {
    double value = target.get((sample * s.channels + channel) * s.positions + position);
    return static_cast<int>(target_dtype == DType::uint8 ? value : std::nearbyint(std::fmin(std::fmax(value, 0.0), 1.0) * 255.0));
  };
  double total = 0.0, weights = 0.0;
  for (int64_t m = 0; m < s.mixtures; ++m) {
    double log_probability = 0.0, weight = std::exp(s.has_logits() ? parameter(m) : 0.0);
    for (int64_t c = 0; c < s.channels; ++c) {
      double mean = parameter(s.mean(m, c));
      for (int64_t d = 0; d < c; ++d) mean += std::tanh(parameter(s.coefficient(m, c, d))) * (2.0 * level(d) - 255.0) / 255.0;
      log_probability += log_bin(level(c), mean, parameter(s.log_scale(m, c)));
    }
    total += weight * std::exp(log_probability);
    weights += weight;
  }
  return std::log(weights) - std::log(total);
}

void check(const Case& c, Kind kind) {
  const LogisticMixtureSizes& s = c.sizes;
  int64_t numel = s.batch * s.positions;
  Source source(static_cast<uint64_t>(numel + s.mixtures));
  Array input(c.dtype, s.batch * s.parameters() * s.positions, source, kind);
  Array target(c.target_dtype, s.batch * s.channels * s.positions, source, kind);
  Array incoming(c.dtype, numel, source), loss(c.dtype, numel), grad_input(c.dtype, input.count);
  Partition partition = c.by_row ? Partition(s.batch, s.positions, kMixtureTile) : Partition(1, numel, kMixtureTile);
  LogisticMixture p{s,  input.data(), target.data(),   c.dtype, c.target_dtype,     partition,
                    {}, nullptr,      incoming.view(), 0.5,     grad_input.output()};
  std::vector<double> sums(partition.slots());
  if (c.elementwise)
    p.loss = loss.output();
  else
    p.sums = sums.data();
  on_threads(0, partition.items(), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(p.scratch_numbers());
    kernels().run(p, scratch.data(), begin, end);
  });
  if (kind != Kind::usual) return;

  std::string what = name("logistic_mixture", {s.batch, s.positions, s.channels, s.mixtures, static_cast<int>(c.dtype)});
  double total = 0.0;
  for (int64_t i = 0; i < numel; ++i) {
    double expected = loss_of(s, input, target, c.target_dtype, i / s.positions, i % s.positions);
    total += expected;
    if (c.elementwise) expect_near(loss.get(i), expected, c.dtype, 1e3, what, " loss");
  }
  double sum = 0.0;
  for (double slot : sums) sum += slot;
  if (!c.elementwise) expect_near(sum, total, accumulation_dtype(c.dtype), 1e3 * static_cast<double>(numel), what, " sum");
  // The mean gradients over the components of a single channel have the derivative of the loss by a shift of all means as their sum.
  if (c.dtype != DType::float64 || s.channels != 1) return;
  constexpr double kStep = 1e-5;
  for (int64_t i = 0; i < numel; ++i) {
    double change[2], gradient = 0.0;
    for (int side = 0; side < 2; ++side) {
      for (int64_t m = 0; m < s.mixtures; ++m) {
        int64_t at = ((i / s.positions) * s.parameters() + s.mean(m, 0)) * s.positions + i % s.positions;
        input.set(at, input.get(at) + (side == 0 ? kStep : -2.0 * kStep));
        if (side == 0) gradient += grad_input.get(at);
      }
      change[side] = loss_of(s, input, target, c.target_dtype, i / s.positions, i % s.positions);
    }
    double expected = 0.5 * incoming.get(i) * (change[0] - change[1]) / (2.0 * kStep);
    if (std::fabs(gradient - expected) > 1e-4 * (1.0 + std::fabs(expected))) fail(what, " gradient", ": got " + std::to_string(gradient));
  }
}

}  // namespace

void test_logistic_mixture() {
  constexpr LogisticMixtureSizes sizes[] = {{1, 1, 1, 1}, {2, 7, 3, 2}, {3, 300, 1, 3}, {1, 40, 9, 2}};
  for (const LogisticMixtureSizes& s : sizes)
    for (DType dtype : kFloats)
      for (int options = 0; options < 8; ++options)
        for (Kind kind : kKinds) check({s, dtype, (options & 1) != 0 ? DType::uint8 : dtype, (options & 2) != 0, (options & 4) != 0}, kind);
}

}  // namespace fastvae::testing
