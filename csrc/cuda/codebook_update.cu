// The operators on a GPU that learn the codes: the gradients of codebook_quantize, the sums over the rows of each code, and the moving
// averages. The first lines of the included files list the kernels.
#include "codebook_ema.cuh"
#include "codebook_host.h"
#include "codebook_sort.cuh"

namespace fastvae {
namespace {

// Launches the sort of the rows by code. `memory` owns the scratch memory.
CodebookSortParams sort_by_code(const Launch& launch, const int64_t* indices, int64_t heads, int64_t rows, int64_t codes, int64_t* totals,
                                Copies& memory) {
  CodebookSortParams p{};
  p.indices = indices;
  p.heads = heads;
  p.rows = rows;
  p.codes = codes;
  p.parts = sort_parts(rows);
  p.totals = totals;
  memory.push_back(launch.empty({heads * p.parts.parts * codes * static_cast<int64_t>(sizeof(unsigned))}, ScalarType::Byte));
  p.counts = static_cast<unsigned*>(memory.back().mutable_data_ptr());
  launch.fill(memory.back(), 0);
  memory.push_back(allocate_parts(launch, [&](Arena& arena) {
    p.starts = arena.take<int64_t>(heads * (codes + 1));
    p.order = arena.take<int64_t>(heads * rows);
    p.sorted = arena.take<int32_t>(heads * rows);
  }));
  int64_t part_blocks = ceil_div(heads * p.parts.parts, kWarps);
  launch.run(codebook_count_kernel, part_blocks, 1, kThreads, p);
  launch.run(codebook_part_offsets_kernel, heads * ceil_div(codes, kOffsetCodes), 1, kThreads, p);
  launch.run(codebook_code_offsets_kernel, heads, 1, kThreads, p);
  launch.run(codebook_sort_kernel, part_blocks, 1, kThreads, p);
  return p;
}

// Launches the sums over the rows of each code. Sums of codes without rows stay as they are.
template <class T, bool kGradient>
void sum_by_code(const Launch& launch, CodebookSumParams<T>& p, int64_t dim, const Tensor& sums, Copies& memory) {
  p.dim = dim;
  p.pieces = ceil_div(p.sort.rows, kPieceRows);
  p.width = piece_group(dim);
  p.sums = output_of(sums);
  memory.push_back(allocate_parts(launch, [&](Arena& arena) { p.partial = arena.take<double>(p.sort.heads * p.pieces * 2 * dim); }));
  int64_t blocks = ceil_div(p.sort.heads * p.pieces, kThreads / p.width);
  launch.run(codebook_sum_pieces_kernel<T, kGradient>, blocks, 1, kThreads, p);
  launch.run(codebook_join_pieces_kernel<T>, blocks, 1, kThreads, p);
}

// grad_loss as the kernels read it; `rows` are those of all heads.
template <class T>
CodebookLossGradient<T> loss_gradient(const OptionalTensor& grad_loss, Reduction reduction, int64_t batch, int64_t rows, Copies& copies) {
  CodebookLossGradient<T> gradient;
  if (!grad_loss) return gradient;
  if (reduction == Reduction::none) {
    copies.push_back(dense(*grad_loss));
    gradient.elements = static_cast<const T*>(copies.back().const_data_ptr());
    return gradient;
  }
  gradient.samples = static_cast<const float*>(grad_loss->const_data_ptr());
  if (reduction == Reduction::sample) {
    gradient.stride = grad_loss->stride(0);
    gradient.sample_rows = divider(rows / batch);
  }
  return gradient;
}

// The arguments of codebook_quantize_backward.
struct CodebookBackwardArguments {
  const OptionalTensor &grad_quantized, &grad_loss;
  const Tensor &x, &codebook, &indices;
  int64_t batch;
  Reduction reduction;
  double codebook_cost, commitment_cost;
  bool rotation, with_codebook;
};

template <class T>
std::tuple<Tensor, Tensor> quantize_backward(const CodebookBackwardArguments& a) {
  Launch launch(a.x);
  Tensor grad_x = launch.empty(shape_of(a.x), a.x.scalar_type());
  Tensor grad_codebook = launch.empty(a.with_codebook ? shape_of(a.codebook) : Sizes{0}, a.codebook.scalar_type());
  launch.fill(grad_codebook, 0);
  if (a.x.numel() == 0) return {grad_x, grad_codebook};

  CodebookOperands o(a.x, a.codebook);
  Copies copies{dense(a.indices)};
  double scale = 2.0 * reduction_scale(a.reduction, a.batch, a.x.numel());
  CodebookBackwardParams<T> p{};
  p.x = static_cast<const T*>(o.x.data);
  p.view = o.x;
  p.codebook = o.codebook;
  if (a.grad_quantized) p.grad_quantized = codebook_view_of(*a.grad_quantized, copies);
  p.indices = static_cast<const int64_t*>(copies[0].const_data_ptr());
  p.gradient = loss_gradient<T>(a.grad_loss, a.reduction, a.batch, o.heads * o.rows, copies);
  p.factor = static_cast<float>(scale * a.commitment_cost);
  p.rows = divider(o.rows);
  p.count = o.heads * o.rows;
  p.dim = o.dim;
  p.width = row_group(o.dim);
  p.aligned = o.dim % kVector == 0;
  p.gradient_aligned = p.aligned && is_aligned(p.gradient.elements);
  p.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
  auto kernel = a.rotation && a.grad_quantized ? codebook_quantize_backward_kernel<T, true> : codebook_quantize_backward_kernel<T, false>;
  launch.run(kernel, ceil_div(p.count, kThreads / p.width), 1, kThreads, p);
  if (!a.with_codebook || !a.grad_loss) return {grad_x, grad_codebook};

  CodebookSumParams<T> s{};
  s.sort = sort_by_code(launch, p.indices, o.heads, o.rows, o.codes, nullptr, copies);
  s.x = o.x;
  s.codebook = o.codebook;
  s.gradient = p.gradient;
  s.factor = scale * a.codebook_cost;
  sum_by_code<T, true>(launch, s, o.dim, grad_codebook, copies);
  return {grad_x, grad_codebook};
}

std::tuple<Tensor, Tensor> codebook_quantize_backward(const OptionalTensor& grad_quantized, const OptionalTensor& grad_loss,
                                                      const Tensor& x, const Tensor& codebook, const Tensor& indices, int64_t batch,
                                                      int64_t reduction, double codebook_cost, double commitment_cost, bool rotation,
                                                      bool with_codebook) {
  CodebookBackwardArguments arguments{
      grad_quantized, grad_loss,       x,        codebook,     indices, batch, static_cast<Reduction>(reduction),
      codebook_cost,  commitment_cost, rotation, with_codebook};
  return dispatch(x.scalar_type(), [&](auto type) { return quantize_backward<typename decltype(type)::Type>(arguments); });
}

// The indices of the rows of x (heads, rows, dim), -1 for rows that are not finite.
Tensor indices_of_finite_rows(const Launch& launch, const CodebookView& view, const Tensor& x, const Tensor& indices) {
  Tensor result = launch.empty({x.size(0), x.size(1)}, ScalarType::Long);
  CodebookFiniteRowsParams p{view,
                             divider(x.size(1)),
                             x.size(0) * x.size(1),
                             x.size(2),
                             row_group(x.size(2)),
                             static_cast<const int64_t*>(indices.const_data_ptr()),
                             static_cast<int64_t*>(result.mutable_data_ptr())};
  launch.run(codebook_finite_rows_kernel, ceil_div(p.count, kThreads / p.width), 1, kThreads, p);
  return result;
}

std::tuple<Tensor, Tensor> codebook_sums(const Tensor& x, const Tensor& indices, int64_t codes) {
  Launch launch(x);
  int64_t heads = x.size(0), rows = x.size(1), dim = x.size(2);
  Tensor counts = launch.empty({heads, codes}, ScalarType::Long), sums = launch.empty({heads, codes, dim}, ScalarType::Float);
  launch.fill(sums, 0);
  if (heads * rows == 0) {
    launch.fill(counts, 0);
    return {counts, sums};
  }
  Copies copies;
  CodebookView view = codebook_view_of(x, copies);
  Tensor finite_indices = indices_of_finite_rows(launch, view, x, dense(indices));
  auto* totals = static_cast<int64_t*>(counts.mutable_data_ptr());
  CodebookSortParams sort =
      sort_by_code(launch, static_cast<const int64_t*>(finite_indices.const_data_ptr()), heads, rows, codes, totals, copies);
  dispatch(x.scalar_type(), [&](auto type) {
    CodebookSumParams<typename decltype(type)::Type> p{};
    p.sort = sort;
    p.x = view;
    p.factor = 1.0;
    sum_by_code<typename decltype(type)::Type, false>(launch, p, dim, sums, copies);
  });
  return {counts, sums};
}

void codebook_ema_(Tensor codebook, Tensor ema_count, Tensor ema_sum, const Tensor& counts, const Tensor& sums, double decay, double eps) {
  STD_TORCH_CHECK(codebook.scalar_type() == ScalarType::Float, "fastvae: the CUDA kernels take float32 codebooks");
  if (codebook.numel() == 0) return;
  Launch launch(codebook);
  Tensor dense_counts = dense(counts), dense_sums = dense(sums);
  int64_t heads = codebook.size(0), codes = codebook.size(1);
  Tensor inverse = launch.empty({heads, codes}, ScalarType::Double);
  CodebookEmaParams p{static_cast<float*>(codebook.mutable_data_ptr()),
                      static_cast<float*>(ema_count.mutable_data_ptr()),
                      static_cast<float*>(ema_sum.mutable_data_ptr()),
                      static_cast<const int64_t*>(dense_counts.const_data_ptr()),
                      {{dense_sums.const_data_ptr(), dtype_of(dense_sums), 0, 0}, false},
                      codes,
                      codebook.numel(),
                      divider(codebook.size(2)),
                      decay,
                      eps,
                      static_cast<double*>(inverse.mutable_data_ptr())};
  launch.run(codebook_ema_counts_kernel, heads, 1, kThreads, p);
  launch.run(codebook_ema_codes_kernel, ceil_div(p.numel, kThreads), 1, kThreads, p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("codebook_quantize_backward.cuda", TORCH_BOX(&codebook_quantize_backward));
  m.impl("codebook_sums.cuda", TORCH_BOX(&codebook_sums));
  m.impl("codebook_ema_.cuda", TORCH_BOX(&codebook_ema_));
}

}  // namespace fastvae
