#include "../../csrc/cpu/jacobian_kernels.h"
#include "check.h"

namespace fastvae::testing {
namespace {

const JacobianKernels& kernels() { return FASTVAE_SELECT_KERNELS(jacobian); }

constexpr Activation kActivations[] = {Activation::identity,   Activation::sigmoid,  Activation::tanh,     Activation::relu,
                                       Activation::leaky_relu, Activation::elu,      Activation::softplus, Activation::silu,
                                       Activation::gelu,       Activation::gelu_tanh};

double alpha_of(Activation activation) { return activation == Activation::leaky_relu ? 0.1 : 1.3; }

// A hidden value that the activation can have.
double hidden_value(Activation activation, double x) {
  if (activation == Activation::sigmoid) return 1.0 / (1.0 + std::exp(-x));
  if (activation == Activation::tanh) return std::tanh(x);
  if (activation == Activation::softplus) return std::log1p(std::exp(x));
  return activation == Activation::elu && x < 0.0 ? alpha_of(activation) * std::expm1(x) : x;
}

// phi' at the hidden value h, the activation's output, or its input for the last three.
double slope(Activation activation, double h) {
  double alpha = alpha_of(activation), sigmoid = 1.0 / (1.0 + std::exp(-h));
  switch (activation) {
    case Activation::identity:
      return 1.0;
    case Activation::sigmoid:
      return h * (1.0 - h);
    case Activation::tanh:
      return 1.0 - h * h;
    case Activation::relu:
      return h > 0.0;
    case Activation::leaky_relu:
      return h > 0.0 ? 1.0 : alpha;
    case Activation::elu:
      return h > 0.0 ? 1.0 : h + alpha;
    case Activation::softplus:
      return -std::expm1(-alpha * h);
    case Activation::silu:
      return sigmoid + h * sigmoid * (1.0 - sigmoid);
    case Activation::gelu:
      return 0.5 * std::erfc(-h * std::sqrt(0.5)) + h * std::exp(-0.5 * h * h) * 0.3989422804014327;
    case Activation::gelu_tanh: {
      double k = 0.7978845608028654, t = std::tanh(k * (h + 0.044715 * h * h * h));
      return 0.5 * (1.0 + t) + 0.5 * h * (1.0 - t * t) * k * (1.0 + 3.0 * 0.044715 * h * h);
    }
  }
  return kNaN;
}

// phi'^2 and, by a difference that is accurate to 1e-9, how it changes with h.
double square(Activation activation, double h) { return slope(activation, h) * slope(activation, h); }
double change(Activation activation, double h) {
  constexpr double step = 1e-5;
  return (square(activation, h + step) - square(activation, h - step)) / (2.0 * step);
}

struct Sizes {
  int64_t batch, units, inputs;
};
constexpr Sizes kSizes[] = {{1, 1, 1}, {3, 31, 7}, {70, 33, 40}, {5, 64, 1030}};

JacobianRows rows_of(const Array& array, int64_t stride) { return {array.data(), array.dtype, stride}; }

// What the weights of the elements are: one for all, one a sample, or one an element.
enum class Weights { none, samples, elements };

void check_penalty(const Sizes& s, Activation activation, DType dtype, Weights weights, Kind kind) {
  Source source(static_cast<uint64_t>(s.units));
  DType accumulate = accumulation_dtype(dtype);
  Array hidden(dtype, s.batch * s.units, source, kind), weight(dtype, s.units * s.inputs, source, kind), norms(accumulate, s.units);
  Array sample_weights(accumulate, s.batch, source), element_weights(dtype, s.batch * s.units, source);
  Array elements(dtype, s.batch * s.units), grad_hidden(dtype, s.batch * s.units), grad_weight(dtype, s.units * s.inputs);
  if (kind == Kind::usual)
    for (int64_t i = 0; i < hidden.count; ++i) hidden.set(i, hidden_value(activation, hidden.get(i)));
  ContractivePenalty p{};
  p.activation = activation;
  p.alpha = alpha_of(activation);
  p.hidden = rows_of(hidden, s.units);
  p.weight = rows_of(weight, s.inputs);
  p.batch = s.batch;
  p.units = s.units;
  p.inputs = s.inputs;
  p.is_double = dtype == DType::float64;
  p.squared_norms = norms.data();
  p.elements = elements.output();
  std::vector<double> sums(p.blocks()), sample_sums(p.blocks() * s.batch);
  p.sums = sums.data();
  p.sample_sums = sample_sums.data();
  p.grad_scale = 0.7;
  p.grad_hidden = grad_hidden.output();
  p.grad_weight = grad_weight.output();
  if (weights == Weights::samples) p.sample_grad_output = sample_weights.data();
  if (weights == Weights::elements) p.element_grad_output = rows_of(element_weights, s.units);
  on_threads(0, p.blocks(), 1, [&](int64_t begin, int64_t end) { kernels().contractive_penalty(p, begin, end); });
  if (kind != Kind::usual) return;

  std::string what = name("penalty", {s.batch, s.units, s.inputs, static_cast<int>(activation), static_cast<int>(dtype)});
  auto weight_of = [&](int64_t b, int64_t u) {
    if (weights == Weights::none) return 1.0;
    return weights == Weights::samples ? sample_weights.get(b) : element_weights.get(b * s.units + u);
  };
  for (int64_t u = 0; u < s.units; ++u) {
    double norm = 0.0, column = 0.0, column_size = 0.0;
    for (int64_t i = 0; i < s.inputs; ++i) norm += weight.get(u * s.inputs + i) * weight.get(u * s.inputs + i);
    expect_near(norms.get(u), norm, accumulate, norm, what, " norms");
    for (int64_t b = 0; b < s.batch; ++b) {
      double h = hidden.get(b * s.units + u), size = 1.0 + h * h, w = weight_of(b, u);
      size *= size;
      column += w * square(activation, h);
      column_size += std::fabs(w) * size;
      expect_near(elements.get(b * s.units + u), norm * square(activation, h), dtype, norm * size, what, " elements");
      bool at_a_kink = std::fabs(h) < 1e-4;
      // The difference is less accurate than float64.
      double expected = 0.7 * w * norm * change(activation, h);
      DType of = dtype == DType::float64 ? DType::float32 : dtype;
      if (!at_a_kink)
        expect_near(grad_hidden.get(b * s.units + u), expected, of, std::fabs(w) * norm * size * (1.0 + h * h), what, " grad_hidden");
    }
    for (int64_t i = 0; i < s.inputs; ++i) {
      double w = weight.get(u * s.inputs + i);
      expect_near(grad_weight.get(u * s.inputs + i), 1.4 * w * column, dtype, std::fabs(w) * column_size, what, " grad_weight");
    }
  }
}

// The symmetric product of rows, by panels of columns.
void check_product(int64_t rows, int64_t columns, bool weighted, DType dtype) {
  Source source(static_cast<uint64_t>(rows + columns));
  bool is_double = dtype == DType::float64;
  int64_t panel = kernels().gram_panel(is_double);
  Array scaled(dtype, rows * columns, source), weights(dtype, ceil_div(rows + 1, 3), source);
  GramProduct p{};
  int64_t padded = ceil_div(columns, panel) * panel;
  Array panels(dtype, rows * padded), weighted_panels(dtype, rows * padded), out(dtype, padded * padded);
  for (int64_t i = 0; i < out.count; ++i) out.set(i, 1.0);
  p.scaled = scaled.data();
  p.rows = rows;
  p.columns = columns;
  p.first_row = 1;
  p.weights = weighted ? weights.data() : nullptr;
  p.rows_per_weight = 3;
  p.is_double = is_double;
  p.panels = panels.data();
  p.weighted = weighted ? weighted_panels.data() : panels.data();
  p.out = out.data();
  kernels().gram_pack(p);
  on_threads(0, padded / panel, 1, [&](int64_t begin, int64_t end) { kernels().gram_multiply(p, begin, end); });
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = i; j < columns; ++j) {
      double total = 1.0, size = 1.0;
      for (int64_t d = 0; d < rows; ++d) {
        double term = scaled.get(d * columns + i) * scaled.get(d * columns + j) * (weighted ? weights.get((1 + d) / 3) : 1.0);
        total += term;
        size += std::fabs(term);
      }
      expect_near(out.get(i * padded + j), total, dtype, size, "gram_multiply");
    }
  Array sum(dtype, padded);
  kernels().gram_add(out.data(), padded, padded, padded, is_double, sum.data());
  for (int64_t j = 0; j < padded; ++j) {
    double total = 0.0, size = 0.0;
    for (int64_t i = 0; i < padded; ++i) {
      total += out.get(i * padded + j);
      size += std::fabs(out.get(i * padded + j));
    }
    expect_near(sum.get(j), total, dtype, size, "gram_add");
  }
}

void check_scaled(int64_t batch, int64_t rows, int64_t columns, bool batched, bool weighted, DType dtype, Kind kind) {
  Source source(static_cast<uint64_t>(batch + rows + columns));
  int64_t size = rows * columns;
  Array left(dtype, (batched ? batch : 1) * size, source, kind), inner(dtype, batch * columns, source, kind);
  Array outer(dtype, batch * rows, source, kind), weights(dtype, batch, source), product(dtype, batch * size, source),
      scaled(dtype, batch * size);
  ScaledMatrices m{left.data(), inner.data(), outer.data(), batch, rows, columns, batched, dtype == DType::float64};
  kernels().gram_scale(m, scaled.data(), 0, batch);
  Array norms(dtype, batch), grad_inner(dtype, inner.count), grad_outer(dtype, outer.count), grad_left(dtype, left.count);
  GramReduce p{
      m,    weighted ? weights.data() : nullptr, product.data(), norms.data(), grad_inner.data(), grad_outer.data(), grad_left.data(), true,
      false};
  kernels().gram_reduce(p, 0, batch);
  if (kind != Kind::usual) return;

  std::vector<double> of_left(left.count), left_size(left.count);
  for (int64_t b = 0; b < batch; ++b) {
    double norm = 0.0, norm_size = 0.0, w = weighted ? weights.get(b) : 1.0;
    std::vector<double> of_inner(columns), inner_size(columns);
    for (int64_t r = 0; r < rows; ++r) {
      double dot = 0.0, dot_size = 0.0, o = outer.get(b * rows + r);
      for (int64_t k = 0; k < columns; ++k) {
        int64_t at = r * columns + k, of = batched ? b * size + at : at;
        double l = left.get(of), i = inner.get(b * columns + k), x = product.get(b * size + at);
        expect_near(scaled.get(b * size + at), o * l * i, dtype, std::fabs(o * l * i), "gram_scale");
        dot += l * i * x;
        dot_size += std::fabs(l * i * x);
        of_inner[k] += 2.0 * w * o * l * x;
        inner_size[k] += std::fabs(2.0 * w * o * l * x);
        of_left[of] += 2.0 * w * o * i * x;
        left_size[of] += std::fabs(2.0 * w * o * i * x);
      }
      expect_near(grad_outer.get(b * rows + r), 2.0 * w * dot, dtype, std::fabs(2.0 * w) * dot_size, "gram_reduce grad_outer");
      norm += o * dot;
      norm_size += std::fabs(o) * dot_size;
    }
    expect_near(norms.get(b), norm, dtype, norm_size, "gram_reduce norms");
    for (int64_t k = 0; k < columns; ++k)
      expect_near(grad_inner.get(b * columns + k), of_inner[k], dtype, inner_size[k], "gram_reduce grad_inner");
  }
  for (int64_t i = 0; i < left.count; ++i) expect_near(grad_left.get(i), of_left[i], dtype, left_size[i], "gram_reduce grad_left");
}

}  // namespace

void test_jacobian() {
  for (const Sizes& s : kSizes)
    for (Activation activation : kActivations)
      for (DType dtype : kFloats)
        for (Kind kind : kKinds)
          for (Weights weights : {Weights::none, Weights::samples, Weights::elements}) {
            if (s.inputs > 1000 && activation != Activation::sigmoid) continue;
            check_penalty(s, activation, dtype, weights, kind);
          }
  for (DType dtype : {DType::float32, DType::float64})
    for (bool option : {false, true}) {
      for (int64_t columns : {1, 15, 33, 70}) check_product(columns / 2 + 1, columns, option, dtype);
      for (Kind kind : kKinds)
        for (int64_t columns : {1, 9, 600}) {
          check_scaled(3, 4, columns, option, true, dtype, kind);
          check_scaled(1, 1, columns, option, false, dtype, kind);
        }
    }
}

}  // namespace fastvae::testing
