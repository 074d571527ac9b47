#include "../../csrc/cpu/rms_norm_kernels.h"
#include "check.h"

namespace fastvae::testing {
namespace {

const RmsNormKernels& kernels() { return FASTVAE_SELECT_KERNELS(rms_norm); }

// Runs of positions, see ChannelRuns.
struct Sizes {
  int64_t runs, positions, channels;
};
constexpr Sizes kSizes[] = {{1, 1, 1}, {3, 7, 6}, {2, 300, 1}, {2, 70, 33}, {1, 1100, 64}, {2, 3, 2100}, {1, 5000, 17}, {70, 5, 96}};

struct Problem {
  Sizes s;
  Array input, grad_output, output, grad_input, rrms, weight, bias;
  std::vector<double> sums;
  RmsNorm p;

  Problem(const Sizes& s, DType dtype, NormActivation activation, EpsMode mode, bool channels_last, bool shared, Source& source, Kind kind)
      : s(s),
        input(dtype, s.runs * s.positions * s.channels, source, kind),
        grad_output(dtype, input.count, source, kind),
        output(dtype, input.count),
        grad_input(dtype, input.count),
        rrms(accumulation_dtype(dtype), s.runs * s.positions),
        weight(DType::float64, (shared ? 1 : s.runs) * s.channels, source, kind),
        bias(DType::float64, weight.count, source, kind),
        // Of a vector of one or two channels, eps bounds the norm now and then.
        p{ChannelRuns(s.runs, s.positions, s.channels, shared),
          channels_last,
          dtype,
          activation,
          mode,
          0.7,
          input.data(),
          grad_output.data(),
          output.data(),
          grad_input.data(),
          rrms.data(),
          reinterpret_cast<const double*>(weight.data()),
          reinterpret_cast<const double*>(bias.data()),
          nullptr} {
    // Parameters as the arithmetic holds them.
    for (Array* parameter : {&weight, &bias})
      for (int64_t i = 0; dtype != DType::float64 && i < parameter->count; ++i) parameter->set(i, static_cast<float>(parameter->get(i)));
    sums.assign(p.runs.slots() * 2 * s.channels, 0.0);
    p.sums = sums.data();
  }

  // Calls a kernel for all items on several threads.
  template <class Kernel>
  void run(Kernel kernel) {
    int64_t doubles = ceil_div(kernels().scratch_bytes(p), sizeof(double));
    on_threads(0, p.runs.items(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(doubles);
      (kernels().*kernel)(p, begin, end, scratch.data());
    });
  }

  int64_t element(int64_t run, int64_t position, int64_t channel) const {
    return p.channels_last ? (run * s.positions + position) * s.channels + channel : (run * s.channels + channel) * s.positions + position;
  }
  int64_t parameter(int64_t run, int64_t channel) const { return (p.runs.shared ? 0 : run) * s.channels + channel; }
};

// Checks the results of one position, and adds to the sums of its channels and to the sizes of their terms.
void check_position(const Problem& problem, int64_t run, int64_t position, std::vector<double>& sums, std::vector<double>& sizes) {
  const Sizes& s = problem.s;
  const RmsNorm& p = problem.p;
  double squares = 0.0, count = static_cast<double>(s.channels);
  for (int64_t c = 0; c < s.channels; ++c) squares += std::pow(problem.input.get(problem.element(run, position, c)), 2.0);
  bool is_bounded = p.eps_mode == EpsMode::clamp && std::sqrt(squares) < p.eps;
  double rrms =
      p.eps_mode == EpsMode::add ? 1.0 / std::sqrt(squares / count + p.eps) : std::sqrt(count) / std::max(std::sqrt(squares), p.eps);
  std::string what = name("rms_norm", {s.runs, s.positions, s.channels, p.channels_last, p.runs.shared, static_cast<int>(p.dtype)});
  expect_near(problem.rrms.get(run * s.positions + position), rrms, accumulation_dtype(p.dtype), rrms * std::sqrt(count), what, " rrms");

  double projection = 0.0, projection_size = 0.0;
  auto normal_of = [&](int64_t c) { return problem.input.get(problem.element(run, position, c)) * rrms; };
  auto affine_of = [&](int64_t c) {
    int64_t to = problem.parameter(run, c);
    return normal_of(c) * problem.weight.get(to) + problem.bias.get(to);
  };
  auto size_of = [&](int64_t c) {
    int64_t to = problem.parameter(run, c);
    return 1.0 + std::fabs(normal_of(c) * problem.weight.get(to)) + std::fabs(problem.bias.get(to));
  };
  auto gradient_of = [&](int64_t c) {
    return problem.grad_output.get(problem.element(run, position, c)) * activation_slope(p.activation, affine_of(c));
  };
  auto gradient_size_of = [&](int64_t c) {
    return gradient_size(p.activation, p.dtype, affine_of(c), size_of(c), problem.grad_output.get(problem.element(run, position, c)));
  };
  for (int64_t c = 0; c < s.channels; ++c) {
    int64_t to = problem.parameter(run, c);
    double n = normal_of(c), du = gradient_of(c), size = gradient_size_of(c);
    sums[2 * to] += du * n;
    sums[2 * to + 1] += du;
    sizes[2 * to] += size * (1.0 + std::fabs(n));
    sizes[2 * to + 1] += size;
    projection += is_bounded ? 0.0 : problem.weight.get(to) * du * n / count;
    projection_size += std::fabs(problem.weight.get(to)) * size * (1.0 + std::fabs(n)) / count;
  }
  for (int64_t c = 0; c < s.channels; ++c) {
    int64_t i = problem.element(run, position, c), to = problem.parameter(run, c);
    double u = affine_of(c), n = normal_of(c), size = size_of(c);
    expect_near(problem.output.get(i), activated(p.activation, u), p.dtype, coarse(p.dtype, size), what, " output");
    double grad_input = rrms * (problem.weight.get(to) * gradient_of(c) - n * projection);
    size = rrms * (gradient_size_of(c) * std::fabs(problem.weight.get(to)) + std::fabs(n) * projection_size);
    expect_near(problem.grad_input.get(i), grad_input, p.dtype, size, what, " grad_input");
  }
}

void check_sums(const Problem& problem, const std::vector<double>& sums, const std::vector<double>& sizes) {
  const ChannelRuns& runs = problem.p.runs;
  int64_t channels = problem.s.channels, slots_per_row = runs.shared ? runs.slots() : runs.pieces_per_run;
  for (int64_t to = 0; to < problem.weight.count; ++to)
    for (int64_t kind = 0; kind < 2; ++kind) {
      double total = 0.0;
      for (int64_t i = 0; i < slots_per_row; ++i)
        total += problem.sums[((to / channels * slots_per_row + i) * 2 + kind) * channels + to % channels];
      expect_near(total, sums[2 * to + kind], accumulation_dtype(problem.p.dtype), sizes[2 * to + kind], "rms_norm gradient sums");
    }
}

void check(const Sizes& s, DType dtype, NormActivation activation, EpsMode mode, Kind kind) {
  for (int layout = 0; layout < 4; ++layout) {
    Source source(static_cast<uint64_t>(s.channels));
    Problem problem(s, dtype, activation, mode, layout % 2 == 0, layout / 2 == 0, source, kind);
    problem.run(&RmsNormKernels::forward);
    problem.run(&RmsNormKernels::backward);
    if (kind != Kind::usual) continue;
    std::vector<double> sums(2 * problem.weight.count), sizes(sums.size());
    for (int64_t run = 0; run < s.runs; ++run)
      for (int64_t position = 0; position < s.positions; ++position) check_position(problem, run, position, sums, sizes);
    check_sums(problem, sums, sizes);
  }
}

}  // namespace

void test_rms_norm() {
  for (const Sizes& s : kSizes)
    for (DType dtype : kFloats)
      for (Kind kind : kKinds) {
        for (NormActivation activation : kNormActivations) check(s, dtype, activation, EpsMode::add, kind);
        check(s, dtype, NormActivation::none, EpsMode::clamp, kind);
      }
}

}  // namespace fastvae::testing
