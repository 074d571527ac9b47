#include "../../csrc/cpu/codebook_steps.h"
#include "check.h"

namespace fastvae::testing {
namespace {

struct Sizes {
  int64_t heads, rows, codes, dim;
};
constexpr Sizes kSizes[] = {{1, 1, 1, 1},     {1, 5, 1, 3},    {2, 7, 33, 8},     {1, 97, 200, 4},   {3, 50, 65, 16},
                            {1, 20, 31, 100}, {1, 3, 40, 300}, {1, 130, 129, 17}, {1, 100, 1100, 64}};

const CodebookKernels& kernels() { return FASTVAE_SELECT_VNNI_KERNELS(codebook); }

CodebookRows rows_of(const Array& array, int64_t rows, int64_t dim) { return {array.data(), array.dtype, rows * dim, dim}; }

// Memory that is aligned as the packed codes have to be.
struct alignas(64) Line {
  float values[16];
};

struct Problem {
  Sizes sizes;
  Array x, codebook, quantized, loss;
  std::vector<int64_t> indices;
  std::vector<double> square_error;
  bool is_double;

  Problem(const Sizes& s, DType x_dtype, DType code_dtype, Source& source, Kind kind)
      : sizes(s),
        x(x_dtype, s.heads * s.rows * s.dim, source, kind),
        codebook(code_dtype, s.heads * s.codes * s.dim, source, kind == Kind::extreme ? Kind::usual : kind),
        quantized(x_dtype, x.count),
        loss(x_dtype, x.count),
        indices(s.heads * s.rows, -1),
        square_error(s.heads * s.rows, kNaN),
        is_double(x_dtype == DType::float64 || code_dtype == DType::float64) {
    // Every third code is equal to an earlier one.
    for (int64_t k = 3; k < s.heads * s.codes; k += 3)
      for (int64_t d = 0; d < s.dim; ++d) codebook.set(k * s.dim + d, codebook.get((k / s.codes * s.codes) * s.dim + d));
  }

  CodebookSearch search() {
    CodebookSearch search{};
    search.x = rows_of(x, sizes.rows, sizes.dim);
    search.codebook = rows_of(codebook, sizes.codes, sizes.dim);
    search.heads = sizes.heads;
    search.rows = sizes.rows;
    search.codes = sizes.codes;
    search.dim = sizes.dim;
    search.is_double = is_double;
    search.with_pairs = kernels().has_pairs && sizes.dim <= kMaxPairDim;
    search.indices = indices.data();
    search.quantized = quantized.output();
    search.loss = loss.output();
    search.loss_weight = 0.5;
    search.square_error = square_error.data();
    return search;
  }

  // Whether the codebook was taken.
  bool run() {
    CodebookSearch s = search();
    CodebookPacking packing(s, kernels());
    std::vector<Line> memory(ceil_div(packing.memory_size(), 16));
    if (!packing.pack(reinterpret_cast<float*>(memory.data()), on_threads)) return false;
    on_threads(0, search_blocks(s, kernels()), 1, [&](int64_t begin, int64_t end) { kernels().search(s, begin, end); });
    return true;
  }

  bool is_row_finite(int64_t row) const {
    for (int64_t d = 0; d < sizes.dim; ++d)
      if (!std::isfinite(x.get(row * sizes.dim + d))) return false;
    return true;
  }

  long double distance(int64_t row, int64_t code) const {
    long double total = 0.0L;
    for (int64_t d = 0; d < sizes.dim; ++d) {
      long double difference = static_cast<long double>(x.get(row * sizes.dim + d)) - codebook.get(code * sizes.dim + d);
      total += difference * difference;
    }
    return total;
  }

  bool are_equal(int64_t a, int64_t b) const {
    for (int64_t d = 0; d < sizes.dim; ++d)
      if (codebook.get(a * sizes.dim + d) != codebook.get(b * sizes.dim + d)) return false;
    return true;
  }

  // The lowest of equal codes, at the smallest distance as far as long double tells.
  void check_row(int64_t row, const std::string& what) const {
    int64_t first = row / sizes.rows * sizes.codes, index = indices[row];
    if (!is_row_finite(row)) return expect(index == 0, what, ": a row that is not finite has another index than 0");
    if (index < 0 || index >= sizes.codes) return expect(false, what, ": an index out of range");
    long double ours = distance(row, first + index), best = ours;
    for (int64_t k = 0; k < sizes.codes; ++k) best = std::min(best, distance(row, first + k));
    expect(ours <= best * (1.0L + 0x1p-55L), what, ": a code that is not the nearest");
    for (int64_t k = 0; k < index; ++k) expect(!are_equal(first + k, first + index), what, ": not the lowest of equal codes");
  }

  void check_outputs(int64_t row, const std::string& what) const {
    int64_t code = row / sizes.rows * sizes.codes + indices[row];
    double total = 0.0, weight = 0.5;
    for (int64_t d = 0; d < sizes.dim; ++d) {
      double c = codebook.get(code * sizes.dim + d), error = x.get(row * sizes.dim + d) - c;
      total += error * error;
      expect_near(quantized.get(row * sizes.dim + d), c, x.dtype, std::fabs(c), what, " quantized");
      expect_near(loss.get(row * sizes.dim + d), weight * error * error, x.dtype, error * error, what, " loss");
    }
    expect_near(square_error[row], total, is_double ? DType::float64 : DType::float32, total, what, " square_error");
  }
};

void check_search(const Sizes& s, DType x_dtype, DType code_dtype, Kind kind) {
  Source source(static_cast<uint64_t>(s.dim * 1000 + s.codes));
  Problem p(s, x_dtype, code_dtype, source, kind);
  std::string what = name("search", {s.heads, s.rows, s.codes, s.dim, static_cast<int>(x_dtype), static_cast<int>(kind)});
  expect(p.run(), what, ": a finite codebook was refused");
  for (int64_t row = 0; row < s.heads * s.rows; ++row) {
    p.check_row(row, what);
    if (kind == Kind::usual && x_dtype != DType::float16) p.check_outputs(row, what);
  }
}

// In each place of a vector and of its tail.
void check_codebooks_that_are_not_finite() {
  for (int64_t dim = 1; dim <= 35; ++dim)
    for (double value : {kNaN, kInfinity, -kInfinity}) {
      Source source(static_cast<uint64_t>(dim));
      Problem p({1, 4, 5, dim}, DType::float32, DType::float32, source, Kind::usual);
      p.codebook.set(2 * dim + static_cast<int64_t>(source.below(static_cast<uint64_t>(dim))), value);
      expect(!p.run(), name("a codebook that is not finite was taken, dim", {dim}));
    }
}

// Codes and rows at the end of float64, whose distances overflow it; rows on a code are found.
void check_largest_float64() {
  for (double scale : {1e154, 1e200, 1e307}) {
    Source source(5);
    Sizes s{1, 40, 70, 20};
    Problem p(s, DType::float64, DType::float64, source, Kind::usual);
    for (int64_t i = 0; i < p.codebook.count; ++i) p.codebook.set(i, p.codebook.get(i) * scale);
    for (int64_t i = 0; i < p.x.count; ++i) p.x.set(i, p.codebook.get(i));
    expect(p.run(), "huge codes were refused");
    for (int64_t row = 0; row < s.rows; ++row) p.check_row(row, name("on a huge code", {row}));
    for (int64_t i = 0; i < p.x.count; ++i) p.x.set(i, p.codebook.get(i) * (i % 2 ? 1.0 + 0x1p-40 : -0.9));
    p.run();
    for (int64_t row = 0; row < s.rows; ++row) expect(p.indices[row] >= 0 && p.indices[row] < s.codes, "beside a huge code");
  }
}

void check_backward(const Sizes& s, DType dtype, bool rotation) {
  Source source(7);
  Problem p(s, dtype, dtype, source, Kind::usual);
  p.run();
  Array incoming(dtype, p.x.count, source), weights(DType::float64, 1, source), grad_x(dtype, p.x.count);
  Array grad_loss(accumulation_dtype(dtype), 1);
  grad_loss.set(0, weights.get(0));
  CodebookBackward b{};
  b.x = rows_of(p.x, s.rows, s.dim);
  b.codebook = rows_of(p.codebook, s.codes, s.dim);
  b.grad_quantized = rows_of(incoming, s.rows, s.dim);
  b.heads = s.heads;
  b.rows = s.rows;
  b.codes = s.codes;
  b.dim = s.dim;
  b.is_double = p.is_double;
  b.indices = p.indices.data();
  b.grad_loss = grad_loss.view();
  b.grad_loss.inner = p.x.count;
  b.grad_loss.inner_stride = 0;
  b.loss_factor = 0.7;
  b.rotation = rotation;
  b.grad_x = grad_x.output();
  on_threads(0, s.heads * s.rows, 1, [&](int64_t begin, int64_t end) { kernels().backward(b, begin, end); });
  if (rotation) return;  // its formula is tested beside the other backends
  for (int64_t i = 0; i < p.x.count; ++i) {
    int64_t row = i / s.dim, code = row / s.rows * s.codes + p.indices[row];
    double pull = 0.7 * grad_loss.get(0) * (p.x.get(i) - p.codebook.get(code * s.dim + i % s.dim));
    expect_near(grad_x.get(i), incoming.get(i) + pull, dtype, std::fabs(incoming.get(i)) + std::fabs(pull), "grad_x");
  }
}

// Residual quantization: the heads of the codebook are its steps. Each step is held against a search for what the one before left.
struct ResidualProblem {
  Sizes sizes;
  Array x, codebooks, quantized, residuals;
  std::vector<uint8_t> mask;
  std::vector<int64_t> indices;
  std::vector<double> square_errors;
  bool is_double;

  ResidualProblem(const Sizes& s, DType x_dtype, DType code_dtype, Source& source, Kind kind)
      : sizes(s),
        x(x_dtype, s.rows * s.dim, source, kind),
        codebooks(code_dtype, s.heads * s.codes * s.dim, source, Kind::usual),
        quantized(x_dtype, x.count),
        residuals(x_dtype, s.heads * x.count),
        mask(s.rows, 1),
        indices(s.rows * s.heads, -2),
        square_errors(s.heads * ceil_div(s.rows, kernels().rows_per_block), kNaN),
        is_double(x_dtype == DType::float64 || code_dtype == DType::float64) {
    for (int64_t i = 2; i < s.rows; i += 5) mask[i] = 0;
  }

  void run() {
    CodebookResidual r{};
    r.search.x = {x.data(), x.dtype, 0, sizes.dim};
    r.search.codebook = rows_of(codebooks, sizes.codes, sizes.dim);
    r.search.heads = sizes.heads;
    r.search.rows = sizes.rows;
    r.search.codes = sizes.codes;
    r.search.dim = sizes.dim;
    r.search.is_double = is_double;
    r.search.with_pairs = kernels().has_pairs && sizes.dim <= kMaxPairDim;
    r.mask = mask.data();
    r.indices = indices.data();
    r.quantized = quantized.output();
    r.residuals = residuals.output();
    r.square_errors = square_errors.data();
    CodebookPacking packing(r.search, kernels());
    std::vector<Line> memory(ceil_div(packing.memory_size(), 16));
    expect(packing.pack(reinterpret_cast<float*>(memory.data()), on_threads), "finite codebooks were refused");
    int64_t blocks = ceil_div(sizes.rows, kernels().rows_per_block);
    on_threads(0, blocks, 1, [&](int64_t begin, int64_t end) { kernels().residual(r, begin, end); });
  }

  // The search of one step, for what the kernel says is left of the rows.
  void check_step(int64_t step, const std::string& what) const {
    Source unused(1);
    Problem p({1, sizes.rows, sizes.codes, sizes.dim}, x.dtype, codebooks.dtype, unused, Kind::usual);
    for (int64_t i = 0; i < x.count; ++i) p.x.set(i, residuals.get(step * x.count + i));
    for (int64_t i = 0; i < p.codebook.count; ++i) p.codebook.set(i, codebooks.get(step * p.codebook.count + i));
    p.run();
    double square_error = 0.0, expected = 0.0;
    for (int64_t row = 0; row < sizes.rows; ++row) {
      expect(indices[row * sizes.heads + step] == (mask[row] ? p.indices[row] : -1), what, ": another index than that of a search");
      expected += mask[row] ? p.square_error[row] : 0.0;
    }
    int64_t blocks = ceil_div(sizes.rows, kernels().rows_per_block);
    for (int64_t block = 0; block < blocks; ++block) square_error += square_errors[step * blocks + block];
    if (std::isfinite(expected)) expect_near(square_error, expected, DType::float32, expected, what, " square_errors");
  }

  // To the dtype of x, as codes are before they are subtracted.
  double rounded(double value) const {
    Array element(x.dtype, 1);
    element.set(0, value);
    return element.get(0);
  }

  // A step leaves these residuals and these sums of codes.
  void check_rows(const std::string& what) const {
    for (int64_t i = 0; i < x.count; ++i) {
      int64_t row = i / sizes.dim;
      double total = 0.0, magnitude = 0.0;
      for (int64_t step = 0; step < sizes.heads; ++step) {
        double left = residuals.get(step * x.count + i), code = 0.0;
        int64_t index = indices[row * sizes.heads + step];
        if (index >= 0) code = rounded(codebooks.get((step * sizes.codes + index) * sizes.dim + i % sizes.dim));
        if (step == 0) expect(mask[row] == 0 ? left == 0.0 : left == x.get(i) || !std::isfinite(left), what, ": not x at first");
        if (step + 1 < sizes.heads && std::isfinite(left))
          expect_near(residuals.get((step + 1) * x.count + i), left - code, x.dtype, 2 * (std::fabs(left) + std::fabs(code)), what,
                      " residuals");
        total += code;
        magnitude += std::fabs(code);
      }
      expect_near(quantized.get(i), total, x.dtype, static_cast<double>(sizes.heads) * magnitude, what, " quantized");
    }
  }
};

void check_residual(const Sizes& s, DType x_dtype, DType code_dtype, Kind kind) {
  Source source(static_cast<uint64_t>(s.dim * 100 + s.codes));
  ResidualProblem p(s, x_dtype, code_dtype, source, kind);
  std::string what = name("residual", {s.heads, s.rows, s.codes, s.dim, static_cast<int>(x_dtype), static_cast<int>(kind)});
  p.run();
  for (int64_t step = 0; step < s.heads; ++step) p.check_step(step, what);
  if (kind == Kind::usual) p.check_rows(what);
}

void check_residual_backward(const Sizes& s, DType dtype) {
  Source source(11);
  ResidualProblem p(s, dtype, dtype, source, Kind::usual);
  p.run();
  Array incoming(dtype, p.x.count, source), grad_x(dtype, p.x.count), residuals(dtype, p.residuals.count);
  std::vector<double> grad_losses(s.heads);
  for (int64_t step = 0; step < s.heads; ++step) grad_losses[step] = 0.5 + 0.25 * static_cast<double>(step);
  CodebookResidualBackward b{};
  b.x = {p.x.data(), dtype, 0, s.dim};
  b.codebooks = rows_of(p.codebooks, s.codes, s.dim);
  b.grad_quantized = {incoming.data(), dtype, 0, s.dim};
  b.rows = s.rows;
  b.steps = s.heads;
  b.dim = s.dim;
  b.is_double = p.is_double;
  b.indices = p.indices.data();
  b.grad_losses = grad_losses.data();
  b.loss_factor = 0.5;
  b.grad_x = grad_x.output();
  b.residuals = residuals.output();
  on_threads(0, s.rows, 1, [&](int64_t begin, int64_t end) { kernels().residual_backward(b, begin, end); });
  for (int64_t i = 0; i < p.residuals.count; ++i) expect(residuals.get(i) == p.residuals.get(i), "residuals of the backward pass");
  for (int64_t i = 0; i < p.x.count; ++i) {
    int64_t row = i / s.dim;
    double expected = p.mask[row] ? incoming.get(i) : 0.0, magnitude = std::fabs(expected);
    for (int64_t step = 0; p.mask[row] && step < s.heads; ++step) {
      double code = p.codebooks.get((step * s.codes + p.indices[row * s.heads + step]) * s.dim + i % s.dim);
      double pull = 0.5 * grad_losses[step] * (p.residuals.get(step * p.x.count + i) - code);
      expected += pull;
      magnitude += std::fabs(pull);
    }
    expect_near(grad_x.get(i), expected, dtype, 2 * magnitude, "grad_x of residual quantization");
  }
}

void check_sums(const Sizes& s, DType dtype) {
  Source source(9);
  Array x(dtype, s.heads * s.rows * s.dim, source), sums(accumulation_dtype(dtype), s.heads * s.codes * s.dim);
  for (int64_t i = 0; i < sums.count; ++i) sums.set(i, 0.0);
  std::vector<int64_t> indices(s.heads * s.rows);
  for (int64_t& index : indices) index = static_cast<int64_t>(source.below(static_cast<uint64_t>(s.codes + 1))) - 1;
  x.set(0, kNaN);
  CodebookSums segments{};
  segments.x = rows_of(x, s.rows, s.dim);
  segments.rows = s.rows;
  segments.dim = s.dim;
  segments.is_double = dtype == DType::float64;
  segments.factor = 1.0;
  segments.sums = sums.output();
  segments.num_codes = s.codes;
  for (segments.head = 0; segments.head < s.heads; ++segments.head) {
    std::vector<int64_t> kept = indices_of_finite_rows(segments, indices.data() + segments.head * s.rows, kernels());
    if (segments.head == 0) expect(kept[0] == -1, "a row that is not finite was kept");
    sum_by_code(segments, CodebookOrder(kept.data(), s.rows, s.codes), kernels(), on_threads);
  }
  indices[0] = -1;
  std::vector<double> expected(sums.count), magnitude(sums.count);
  for (int64_t i = 0; i < x.count; ++i) {
    int64_t row = i / s.dim;
    if (indices[row] < 0) continue;
    int64_t to = (row / s.rows * s.codes + indices[row]) * s.dim + i % s.dim;
    expected[to] += x.get(i);
    magnitude[to] += std::fabs(x.get(i));
  }
  for (int64_t i = 0; i < sums.count; ++i) expect_near(sums.get(i), expected[i], sums.dtype, magnitude[i], "sums");
}

}  // namespace

void test_codebook() {
  for (const Sizes& s : kSizes) {
    for (Kind kind : kKinds) check_search(s, DType::float32, DType::float32, kind);
    check_search(s, DType::float64, DType::float64, Kind::usual);
    check_search(s, DType::bfloat16, DType::float32, Kind::extreme);
    check_search(s, DType::float16, DType::float16, Kind::extreme);
    for (DType dtype : kFloats) {
      check_backward(s, dtype, false);
      check_backward(s, dtype, true);
      check_sums(s, dtype);
      check_residual(s, dtype, dtype, Kind::usual);
      check_residual_backward(s, dtype);
    }
    check_residual(s, DType::float32, DType::float32, Kind::extreme);
    check_residual(s, DType::bfloat16, DType::float32, Kind::usual);
  }
  check_sums({1, 3000, 2, 5}, DType::float32);
  check_codebooks_that_are_not_finite();
  check_largest_float64();
}

}  // namespace fastvae::testing
