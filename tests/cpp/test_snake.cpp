#include "../../csrc/cpu/snake_kernels.h"
#include "check.h"

namespace fastvae::testing {
namespace {

const SnakeKernels& kernels() { return FASTVAE_SELECT_KERNELS(snake); }

// Runs of positions, see ChannelRuns.
struct Sizes {
  int64_t runs, positions, channels;
};
constexpr Sizes kSizes[] = {{1, 1, 1}, {3, 7, 6}, {2, 300, 1}, {2, 70, 33}, {1, 1100, 64}, {2, 3, 2100}, {70, 5, 96}};

struct Problem {
  Sizes s;
  Array input, grad_output, output, grad_input, frequency, gain;
  std::vector<double> sums;
  Snake p;

  Problem(const Sizes& s, DType dtype, bool channels_last, Source& source, Kind kind)
      : s(s),
        input(dtype, s.runs * s.positions * s.channels, source, kind),
        grad_output(dtype, input.count, source, kind),
        output(dtype, input.count),
        grad_input(dtype, input.count),
        frequency(DType::float64, s.channels, source, kind),
        gain(DType::float64, s.channels, source, kind),
        p{ChannelRuns(s.runs, s.positions, s.channels, true),
          channels_last,
          dtype,
          input.data(),
          grad_output.data(),
          output.data(),
          grad_input.data(),
          reinterpret_cast<const double*>(frequency.data()),
          reinterpret_cast<const double*>(gain.data()),
          nullptr} {
    // Parameters as the arithmetic holds them.
    for (Array* parameter : {&frequency, &gain})
      for (int64_t i = 0; dtype != DType::float64 && i < parameter->count; ++i) parameter->set(i, static_cast<float>(parameter->get(i)));
    sums.assign(p.runs.slots() * 2 * s.channels, 0.0);
    p.sums = sums.data();
  }

  // Calls a kernel for all items on several threads.
  template <class Kernel>
  void run(Kernel kernel) {
    int64_t doubles = ceil_div(kernels().scratch_bytes(p.runs), sizeof(double));
    on_threads(0, p.runs.items(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(doubles);
      (kernels().*kernel)(p, begin, end, scratch.data());
    });
  }

  int64_t channel(int64_t i) const { return p.channels_last ? i % s.channels : i / s.positions % s.channels; }
};

void check_results(const Problem& problem) {
  const Sizes& s = problem.s;
  DType dtype = problem.p.dtype, of_sums = accumulation_dtype(dtype);
  std::string what = name("snake", {s.runs, s.positions, s.channels, problem.p.channels_last, static_cast<int>(dtype)});
  std::vector<double> sums(2 * s.channels), sizes(sums.size());
  for (int64_t i = 0; i < problem.input.count; ++i) {
    int64_t c = problem.channel(i);
    double x = problem.input.get(i), g = problem.grad_output.get(i), a = problem.frequency.get(c), b = problem.gain.get(c);
    double sine = std::sin(a * x), product = sine * std::cos(a * x), phase = 1.0 + std::fabs(a * x);
    expect_near(problem.output.get(i), x + b * sine * sine, dtype, std::fabs(x) + std::fabs(b) * phase, what, " output");
    expect_near(problem.grad_input.get(i), g * (1.0 + 2.0 * a * b * product), dtype, std::fabs(g) * (1.0 + 2.0 * std::fabs(a * b) * phase),
                what, " grad_input");
    sums[c] += g * x * product;
    sums[s.channels + c] += g * sine * sine;
    sizes[c] += std::fabs(g * x) * phase;
    sizes[s.channels + c] += std::fabs(g) * phase;
  }
  ChannelSums added = add_slots(problem.p.runs, problem.sums);
  for (int64_t c = 0; c < s.channels; ++c) {
    expect_near(added.first[c], sums[c], of_sums, sizes[c], what, " sums of the frequency");
    expect_near(added.second[c], sums[s.channels + c], of_sums, sizes[s.channels + c], what, " sums of the gain");
  }
}

}  // namespace

void test_snake() {
  for (const Sizes& s : kSizes)
    for (DType dtype : kFloats)
      for (Kind kind : kKinds)
        for (bool channels_last : {false, true}) {
          Source source(static_cast<uint64_t>(s.channels));
          Problem problem(s, dtype, channels_last, source, kind);
          problem.run(&SnakeKernels::forward);
          problem.run(&SnakeKernels::backward);
          if (kind == Kind::usual) check_results(problem);
        }
}

}  // namespace fastvae::testing
