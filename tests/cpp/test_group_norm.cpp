#include "../../csrc/cpu/group_norm_kernels.h"
#include "check.h"

namespace fastvae::testing {
namespace {

const GroupNormKernels& kernels() { return FASTVAE_SELECT_KERNELS(group_norm); }

// Runs of positions * channels elements with the channels side by side, in groups; see NormRuns.
struct Sizes {
  int64_t runs, positions, channels, groups;
};
constexpr Sizes kSizes[] = {{1, 1, 1, 1},     {3, 7, 6, 3},    {2, 300, 1, 1},  {2, 70, 33, 11},
                            {1, 1100, 64, 8}, {2, 3, 2100, 4}, {5, 40000, 1, 1}};

struct Problem {
  Sizes s;
  Array input, grad_output, output, grad_input, restored;
  Array parameters;  // centre, scale, offset, slope and intercept of each channel of each run
  std::vector<double> sums;
  GroupNorm p;

  Problem(const Sizes& s, DType dtype, NormActivation activation, Source& source, Kind kind)
      : s(s),
        input(dtype, s.runs * s.positions * s.channels, source, kind),
        grad_output(dtype, input.count, source, kind),
        output(dtype, input.count),
        grad_input(dtype, input.count),
        restored(dtype, input.count),
        parameters(DType::float64, 5 * s.runs * s.channels, source, kind),
        p{NormRuns(s.runs, s.positions * s.channels, s.channels),
          dtype,
          activation,
          input.data(),
          grad_output.data(),
          output.data(),
          grad_input.data(),
          nullptr,
          {},
          s.groups,
          nullptr} {
    // Parameters as the arithmetic holds them.
    if (dtype != DType::float64)
      for (int64_t i = 0; i < parameters.count; ++i) parameters.set(i, static_cast<float>(parameters.get(i)));
    const auto* values = reinterpret_cast<const double*>(parameters.data());
    int64_t count = s.runs * s.channels;
    p.channel = {values, values + count, values + 2 * count, values + 3 * count, values + 4 * count};
  }

  // Calls a kernel for all items on several threads, with sums of so many doubles a slot.
  template <class Kernel>
  void run(Kernel kernel, int64_t per_slot) {
    sums.assign(p.runs.slots() * per_slot, kNaN);
    p.sums = sums.data();
    int64_t doubles = ceil_div(kernels().scratch_bytes(p.runs), sizeof(double));
    on_threads(0, p.runs.items(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(doubles);
      (kernels().*kernel)(p, begin, end, scratch.data());
    });
  }

  double parameter(int kind, int64_t run, int64_t channel) const { return parameters.get((kind * s.runs + run) * s.channels + channel); }

  // The normalised and scaled value of an element, and the size of its terms.
  double affine(int64_t i, double& size) const {
    int64_t run = i / (s.positions * s.channels), channel = i % s.channels;
    double apart = input.get(i) - parameter(0, run, channel), scaled = apart * parameter(1, run, channel),
           offset = parameter(2, run, channel);
    size = (std::fabs(input.get(i)) + std::fabs(parameter(0, run, channel))) * std::fabs(parameter(1, run, channel)) + std::fabs(offset);
    return scaled + offset;
  }

  double gradient(int64_t i, double& size) const {
    double u = affine(i, size), g = grad_output.get(i);
    size = gradient_size(p.activation, p.dtype, u, size, g);
    return g * activation_slope(p.activation, u);
  }
};

void check_moments(Problem& problem) {
  const Sizes& s = problem.s;
  const NormRuns& runs = problem.p.runs;
  for (int64_t slot = 0; slot < runs.slots(); ++slot) {
    int64_t first = slot / runs.pieces_per_run * runs.length + slot % runs.pieces_per_run * runs.piece, width = s.channels / s.groups;
    int64_t length = runs.piece_length(slot % runs.pieces_per_run), count = length / s.groups;
    std::vector<double> mean(s.groups), squares(s.groups), size(s.groups);
    auto group_of = [&](int64_t i) { return (first + i) % s.channels / width; };
    for (int64_t i = 0; i < length; ++i) mean[group_of(i)] += problem.input.get(first + i) / static_cast<double>(count);
    for (int64_t i = 0; i < length; ++i) {
      double apart = problem.input.get(first + i) - mean[group_of(i)];
      squares[group_of(i)] += apart * apart;
      size[group_of(i)] += 1.0 + apart * apart;
    }
    for (int64_t g = 0; g < s.groups; ++g) {
      DType of = accumulation_dtype(problem.p.dtype);
      std::string what = name("moments", {s.runs, s.positions, s.channels, slot, g});
      expect_near(problem.sums[(slot * s.groups + g) * 2], mean[g], of, 1.0, what);
      expect_near(problem.sums[(slot * s.groups + g) * 2 + 1], squares[g], of, size[g], what);
    }
  }
}

void check_elements(const Problem& problem) {
  DType dtype = problem.p.dtype;
  const Sizes& s = problem.s;
  std::string what = name("group_norm", {s.runs, s.positions, s.channels, s.groups, static_cast<int>(dtype)});
  for (int64_t i = 0; i < problem.input.count; ++i) {
    int64_t run = i / (s.positions * s.channels), channel = i % s.channels;
    double size, gradient_size, u = problem.affine(i, size), du = problem.gradient(i, gradient_size);
    double y = activated(problem.p.activation, u), apart = problem.input.get(i) - problem.parameter(0, run, channel);
    expect_near(problem.output.get(i), y, dtype, coarse(dtype, size), what, " output");
    double through = apart * problem.parameter(3, run, channel) + problem.parameter(4, run, channel),
           scale = problem.parameter(1, run, channel);
    double through_size =
        (std::fabs(problem.input.get(i)) + std::fabs(problem.parameter(0, run, channel))) * std::fabs(problem.parameter(3, run, channel));
    gradient_size = coarse(dtype, gradient_size * std::fabs(scale)) + through_size + std::fabs(problem.parameter(4, run, channel));
    expect_near(problem.grad_input.get(i), du * scale + through, dtype, gradient_size, what, " grad_input");
  }
}

void check_gradient_sums(const Problem& problem) {
  const Sizes& s = problem.s;
  const NormRuns& runs = problem.p.runs;
  std::vector<double> plain(s.runs * s.channels), weighted(plain.size()), plain_size(plain.size()), weighted_size(plain.size());
  for (int64_t i = 0; i < problem.input.count; ++i) {
    int64_t run = i / (s.positions * s.channels), channel = i % s.channels, to = run * s.channels + channel;
    double size, du = problem.gradient(i, size), apart = problem.input.get(i) - problem.parameter(0, run, channel);
    plain[to] += du;
    weighted[to] += du * apart;
    plain_size[to] += size;
    weighted_size[to] += size * (std::fabs(problem.input.get(i)) + std::fabs(problem.parameter(0, run, channel)));
  }
  for (int64_t to = 0; to < s.runs * s.channels; ++to) {
    double sums[2] = {0.0, 0.0};
    for (int64_t piece = 0; piece < runs.pieces_per_run; ++piece)
      for (int kind = 0; kind < 2; ++kind) {
        int64_t slot = to / s.channels * runs.pieces_per_run + piece;
        sums[kind] += problem.sums[(slot * 2 + kind) * s.channels + to % s.channels];
      }
    DType of = accumulation_dtype(problem.p.dtype);
    expect_near(sums[0], plain[to], of, plain_size[to], "group_norm gradient sums");
    expect_near(sums[1], weighted[to], of, weighted_size[to], "group_norm weighted gradient sums");
  }
}

// A backward pass that restores the output gives the same gradient, and the output to the last bit, also over the gradient that it reads.
void check_restored(Problem& problem) {
  auto bytes_of = [](const Array& array) { return std::string(array.data(), array.data() + array.count * size_of(array.dtype)); };
  std::string gradient = bytes_of(problem.grad_input);
  for (Array* to : {&problem.restored, &problem.grad_output}) {
    problem.p.restored = to->data();
    problem.run(&GroupNormKernels::gradient_sums, problem.s.channels * 2);
    problem.run(&GroupNormKernels::backward, 0);
    expect(bytes_of(*to) == bytes_of(problem.output), "a restored output");
    expect(bytes_of(problem.grad_input) == gradient, "a gradient beside a restored output");
  }
}

void check(const Sizes& s, DType dtype, NormActivation activation, Kind kind) {
  Source source(static_cast<uint64_t>(s.channels));
  Problem problem(s, dtype, activation, source, kind);
  problem.run(&GroupNormKernels::moments, s.groups * 2);
  if (kind == Kind::usual) check_moments(problem);
  problem.run(&GroupNormKernels::forward, 0);
  problem.run(&GroupNormKernels::gradient_sums, s.channels * 2);
  if (kind == Kind::usual) check_gradient_sums(problem);
  problem.run(&GroupNormKernels::backward, 0);
  if (kind != Kind::usual) return;
  check_elements(problem);
  check_restored(problem);
}

// NaN in a parameter, with any payload, is NaN in all that it touches.
void check_nan_parameters(DType dtype, NormActivation activation) {
  Source source(1);
  Problem problem({1, 70, 33, 11}, dtype, activation, source, Kind::usual);
  memset(problem.parameters.data() + 2 * 33 * 8, 0x7f, 8);
  memset(problem.parameters.data() + 2 * 33 * 8 + 4, 0xff, 4);
  problem.run(&GroupNormKernels::forward, 0);
  for (int64_t i = 0; i < problem.output.count; ++i) expect(std::isnan(problem.output.get(i)) == (i % 33 == 0), "a parameter that is NaN");
}

// GELU keeps its relative accuracy where it is small, and at infinity and NaN the functions are those of torch.
template <class T, class Accuracy>
void check_activations(Accuracy, double tolerance) {
  for (int step = -1200; step <= 1200; ++step) {
    T u = static_cast<T>(0.01 * step);
    double at = static_cast<double>(u), value = activated(NormActivation::gelu, at), slope = activation_slope(NormActivation::gelu, at);
    double bound = tolerance * (1.0 + at * at / 8.0);
    // The derivative is 0 at -0.7518, where its terms cancel.
    expect(std::fabs(NormGelu<Accuracy>::value(u) - value) <= bound * std::fabs(value), name("GELU", {step}));
    expect(std::fabs(NormGelu<Accuracy>::gradient(u, T(1)) - slope) <= bound * std::fmax(std::fabs(slope), at < -1.5 ? 0.0 : 1.0),
           name("GELU's derivative", {step}));
  }
  T infinity = static_cast<T>(kInfinity), nan = static_cast<T>(kNaN);
  for (T u : {nan, -infinity})
    expect(std::isnan(NormGelu<Accuracy>::value(u)) && std::isnan(NormGelu<Accuracy>::gradient(u, T(1))), "GELU");
  expect(NormGelu<Accuracy>::value(infinity) == infinity && std::isnan(NormGelu<Accuracy>::gradient(infinity, T(1))), "GELU at infinity");
  expect(NormGelu<Accuracy>::value(T(-1e30)) == T(0) && NormGelu<Accuracy>::value(T(1e30)) == T(1e30), "GELU far from 0");
  expect(NormRelu::value(-infinity) == T(0) && NormRelu::value(infinity) == infinity && std::isnan(NormRelu::value(nan)), "ReLU");
  expect(NormRelu::gradient(T(0), T(3)) == T(0) && NormRelu::gradient(nan, T(3)) == T(3), "ReLU's derivative");
}

void check_conversions(DType dtype) {
  Source source(2);
  Array from(dtype, 37, source), to(dtype, 37);
  std::vector<double> values(37);
  kernels().to_double(from.view(), 37, values.data());
  kernels().from_double(values.data(), 37, to.output());
  for (int64_t i = 0; i < 37; ++i) expect(values[i] == from.get(i) && to.get(i) == from.get(i), "conversions of parameters");
}

}  // namespace

void test_group_norm() {
  for (const Sizes& s : kSizes)
    for (DType dtype : kFloats)
      for (NormActivation activation : kNormActivations)
        for (Kind kind : kKinds) check(s, dtype, activation, kind);
  for (DType dtype : kFloats) {
    for (NormActivation activation : kNormActivations) check_nan_parameters(dtype, activation);
    check_conversions(dtype);
  }
  check_activations<float>(Accurate{}, 1e-6);
  check_activations<float>(Coarse{}, 1e-3);
  check_activations<double>(Accurate{}, 1e-14);
}

}  // namespace fastvae::testing
