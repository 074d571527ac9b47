#include "../../csrc/cpu/reconstruction_kernels.h"
#include "check.h"

namespace fastvae::testing {
namespace {

const ReconstructionKernels& kernels() { return FASTVAE_SELECT_KERNELS(reconstruction); }

struct Terms {
  double loss, input, target, logvar, size;  // the loss, its gradients, and the size of what they are sums of
};

// Of the extra operand: the weight of positive targets, or the log variance.
Terms terms_of(Likelihood likelihood, double x, double t, double extra, bool weighted) {
  if (likelihood == Likelihood::bce_with_logits) {
    double softplus = std::log1p(std::exp(-std::fabs(x))), sigmoid = 1.0 / (1.0 + std::exp(-x)), p = weighted ? extra : 1.0;
    double of_minus = std::fmax(-x, 0.0) + softplus, factor = 1.0 + (p - 1.0) * t;
    double size = 1.0 + std::fabs(x) * (1.0 + std::fabs(t)) + std::fabs(factor) * (1.0 + of_minus) + std::fabs(p);
    return {(1.0 - t) * x + factor * of_minus, (1.0 - t) - factor * (1.0 - sigmoid), (p - 1.0) * of_minus - x, 0.0, size};
  }
  if (likelihood == Likelihood::bce) {
    double one = std::fmax(std::log(x), -100.0), zero = std::fmax(std::log1p(-x), -100.0), variance = std::fmax(x * (1.0 - x), 1e-12);
    double size = std::fabs(one) + std::fabs(zero) + (std::fabs(x) + std::fabs(t)) / variance;
    return {-(t * one + (1.0 - t) * zero), (x - t) / variance, zero - one, 0.0, size};
  }
  double difference = x - t, square = difference * difference, size = std::fabs(x) + std::fabs(t) + square;
  if (likelihood == Likelihood::mse) return {square, 2.0 * difference, -2.0 * difference, 0.0, size};
  double precision = std::exp(-extra), scaled = difference * precision;
  size = 2.0 + std::fabs(extra) + size * precision + square * precision;
  return {0.5 * (1.8378770664093453 + extra + square * precision), scaled, -scaled, 0.5 * (1.0 - square * precision), size};
}

struct Case {
  Likelihood likelihood;
  DType dtype, target_dtype;
  int64_t rows, inner;
  bool weighted, elementwise, by_row, with_incoming;
};

void check(const Case& c, Kind kind) {
  Source source(static_cast<uint64_t>(c.rows * 100 + c.inner));
  int64_t numel = c.rows * c.inner;
  bool with_extra = c.likelihood == Likelihood::gaussian || (c.weighted && c.likelihood == Likelihood::bce_with_logits);
  Array input(c.dtype, numel, source, kind), target(c.target_dtype, numel, source, kind), extra(c.dtype, c.inner, source, kind);
  Array weight(c.dtype, numel, source), incoming(c.dtype, numel, source), loss(c.dtype, numel);
  Array grad_input(c.dtype, numel), grad_target(c.target_dtype, numel), grad_logvar(c.dtype, numel);
  if (kind == Kind::usual && c.likelihood == Likelihood::bce)
    for (int64_t i = 0; i < numel; ++i) input.set(i, 1.0 / (1.0 + std::exp(-input.get(i))));

  Partition partition = c.by_row ? Partition(c.rows, c.inner) : Partition(1, numel);
  Reconstruction p{c.likelihood, {}, {}, {}, {}, partition, false, {}, nullptr, {}, 1.0, {}, {}, {}, nullptr};
  p.is_double = c.dtype == DType::float64;
  p.input = input.view();
  p.target = target.view();
  if (c.weighted) p.weight = weight.view();
  if (with_extra) {
    p.extra = extra.view();
    p.extra.inner = c.inner;
  }
  std::vector<double> sums(partition.slots()), logvar_sums(partition.items() * c.inner);
  if (c.elementwise)
    p.loss = loss.output();
  else
    p.sums = sums.data();
  p.grad_scale = 0.5;
  p.grad_input = grad_input.output();
  if (c.with_incoming) {
    p.grad_output = incoming.view();
    if (c.target_dtype != DType::uint8) p.grad_target = grad_target.output();
    if (c.likelihood == Likelihood::gaussian) {
      p.grad_logvar = grad_logvar.output();
      p.grad_logvar_sums = logvar_sums.data();
    }
  }
  on_threads(0, partition.items(), 1, [&](int64_t begin, int64_t end) { kernels().run(p, begin, end); });
  if (kind != Kind::usual) return;

  std::string what = name("reconstruction", {static_cast<int>(c.likelihood), static_cast<int>(c.dtype), c.rows, c.inner, c.weighted});
  double total = 0.0, size = 0.0;
  for (int64_t i = 0; i < numel; ++i) {
    double t = c.target_dtype == DType::uint8 ? target.get(i) / 255.0 : target.get(i), w = c.weighted ? weight.get(i) : 1.0;
    Terms terms = terms_of(c.likelihood, input.get(i), t, extra.get(i % c.inner), with_extra);
    double factor = 0.5 * w * (c.with_incoming ? incoming.get(i) : 1.0);
    total += w * terms.loss;
    size += std::fabs(w) * terms.size;
    if (c.elementwise) expect_near(loss.get(i), w * terms.loss, c.dtype, std::fabs(w) * terms.size, what, " loss");
    expect_near(grad_input.get(i), factor * terms.input, c.dtype, std::fabs(factor) * terms.size, what, " grad_input");
    if (p.grad_target)
      expect_near(grad_target.get(i), factor * terms.target, c.dtype, std::fabs(factor) * terms.size, what, " grad_target");
    if (p.grad_logvar)
      expect_near(grad_logvar.get(i), factor * terms.logvar, c.dtype, std::fabs(factor) * terms.size, what, " grad_logvar");
  }
  double sum = 0.0;
  for (double slot : sums) sum += slot;
  if (!c.elementwise) expect_near(sum, total, accumulation_dtype(c.dtype), size, what, " sum");
}

void check_scale(int64_t count, DType from_dtype, DType to_dtype) {
  Source source(3);
  Array from(from_dtype, count, source), to(to_dtype, count);
  bool is_double = from_dtype == DType::float64;
  kernels().scale(from.view(), to.output(), 0.3, is_double, 0, count / 2);
  kernels().scale(from.view(), to.output(), 0.3, is_double, count / 2, count);
  for (int64_t i = 0; i < count; ++i)
    expect_near(to.get(i), 0.3 * from.get(i), to_dtype, std::fabs(from.get(i)) * (is_double ? 1.0 : 2.0), "scale");
}

}  // namespace

void test_reconstruction() {
  constexpr int64_t sizes[][2] = {{1, 1}, {3, 7}, {5, 513}, {40, 33}, {2, 17000}};
  for (const auto& size : sizes)
    for (Likelihood likelihood : {Likelihood::bce_with_logits, Likelihood::bce, Likelihood::mse, Likelihood::gaussian})
      for (DType dtype : kFloats)
        for (int options = 0; options < 16; ++options)
          for (Kind kind : kKinds) {
            if (size[1] > 10000 && (options % 5 != 0 || kind != Kind::usual)) continue;
            DType target = (options & 9) == 9 ? DType::uint8 : dtype;
            check({likelihood, dtype, target, size[0], size[1], (options & 1) != 0, (options & 2) != 0, (options & 4) != 0,
                   (options & 8) != 0},
                  kind);
          }
  for (int64_t count : {1, 7, 512, 1500})
    for (DType dtype : kFloats) {
      check_scale(count, dtype, dtype);
      check_scale(count, DType::float64, dtype);
    }
}

}  // namespace fastvae::testing
