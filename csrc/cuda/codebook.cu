// The operators codebook_nearest and codebook_quantize on a GPU: the exact search for the nearest codes, then the outputs that follow from
// the indices. The first lines of the included files list the kernels.
#include "codebook_host.h"
#include "codebook_quantize.cuh"
#include "codebook_recheck.cuh"

namespace fastvae {
namespace {

// Launches the kernels that pack the codes. `memory` owns the scratch memory.
PackedCodebook pack_codes(const Launch& launch, const CodebookOperands& o, unsigned long long* worklist_count, Copies& memory) {
  PackedCodebook packed{};
  packed.layout = codebook_layout(o.codes, o.dim);
  packed.source = o.codebook;
  packed.errors = score_error_bounds(o.dim);
  packed.width = row_group(o.dim);
  const CodebookLayout& layout = packed.layout;
  int64_t padded = o.heads * layout.padded_codes;
  memory.push_back(launch.empty({o.heads * layout.slots * static_cast<int64_t>(sizeof(unsigned))}, ScalarType::Byte));
  packed.table = static_cast<unsigned*>(memory.back().mutable_data_ptr());
  launch.fill(memory.back(), 0xff);
  memory.push_back(allocate_parts(launch, [&](Arena& arena) {
    packed.mean = arena.take<float>(o.heads * layout.padded_dim);
    packed.exponent = arena.take<unsigned>(o.heads);
    packed.slot = arena.take<unsigned>(padded);
    packed.elements = arena.take<float>(padded * layout.padded_dim);
    packed.start = arena.take<float>(padded);
    packed.slope = arena.take<float>(padded);
    packed.error = arena.take<float>(padded);
  }));
  CodebookPackParams p{packed, worklist_count};
  int64_t blocks = o.heads * ceil_div(layout.padded_codes, kThreads / packed.width);
  launch.run(codebook_mean_kernel, o.heads * ceil_div(layout.padded_dim, kWarp), 1, kThreads, p);
  launch.run(codebook_measure_kernel, blocks, 1, kThreads, p);
  launch.run(codebook_pack_kernel, blocks, 1, kThreads, p);
  return packed;
}

// The screen for rows of `dim` elements.
template <class T>
void (*screen_of(int64_t dim))(CodebookScreenParams<T>) {
  if (!has_short_rows(dim)) return codebook_screen_kernel<T>;
  if (short_dim(dim) == 4) return codebook_screen_short_kernel<T, 4>;
  return short_dim(dim) == 8 ? codebook_screen_short_kernel<T, 8> : codebook_screen_short_kernel<T, kShortDim>;
}

template <class T>
void screen(const Launch& launch, const CodebookOperands& o, const CodebookScreenGrid& grid, const PackedCodebook& packed,
            const CodebookWorklist& worklist, unsigned* tickets, int64_t* indices, Copies& memory) {
  CodebookScreenParams<T> p{};
  p.x = static_cast<const T*>(o.x.data);
  p.view = o.x;
  p.rows = o.rows;
  p.grid = grid;
  p.codes = packed;
  p.tickets = tickets;
  p.indices = indices;
  p.worklist = worklist;
  if (grid.splits > 1)
    memory.push_back(
        allocate_parts(launch, [&](Arena& arena) { p.partial = arena.take<NearestTwo>(grid.splits * grid.tiles * grid.tile_rows); }));
  launch.run(screen_of<T>(o.dim), grid.tiles, grid.splits, kThreads, p);
}

// Returns the recheck kernel for codes of a dtype.
void (*recheck_of(DType dtype))(CodebookRecheckParams) {
  if (dtype == DType::float32) return codebook_recheck_kernel<float>;
  if (dtype == DType::bfloat16) return codebook_recheck_kernel<BFloat16>;
  return dtype == DType::float16 ? codebook_recheck_kernel<Half> : codebook_recheck_kernel<double>;
}

// Launches the recheck, which decides the rows that the screen put on the worklist.
void recheck(const Launch& launch, const CodebookOperands& o, const PackedCodebook& packed, const CodebookWorklist& worklist,
             int64_t max_splits, unsigned* tickets, int64_t* indices, Copies& memory) {
  int64_t blocks = min64(o.heads * o.rows * max_splits, kRecheckBlocks);
  CodebookRecheckParams p{};
  p.x = o.x;
  p.rows = divider(o.rows);
  p.codes = packed;
  p.worklist = worklist;
  p.max_splits = max_splits;
  memory.push_back(allocate_parts(launch, [&](Arena& arena) {
    p.vectors = arena.take<double>(blocks * 3 * o.dim);
    p.centred = arena.take<float>(blocks * packed.layout.padded_dim);
    p.found = arena.take<int32_t>(blocks * (1 + kSplitCandidates));
  }));
  p.tickets = tickets;
  p.indices = indices;
  launch.run(recheck_of(o.codebook.dtype), blocks, 1, kThreads, p);
}

// Launches the search, which writes the indices (heads, rows).
void find_nearest(Launch& launch, const CodebookOperands& o, const Tensor& indices) {
  if (o.heads == 0 || o.rows == 0) return;
  Copies memory;
  auto* found = static_cast<int64_t*>(indices.mutable_data_ptr());
  CodebookWorklist worklist{};
  memory.push_back(allocate_parts(launch, [&](Arena& arena) {
    worklist.count = arena.take<unsigned long long>(1);
    worklist.rows = arena.take<CodebookListedRow>(o.heads * o.rows);
  }));
  PackedCodebook packed = pack_codes(launch, o, worklist.count, memory);
  CodebookScreenGrid grid = screen_grid(o.heads, o.rows, packed.layout);
  int64_t max_splits = max_recheck_splits(packed.layout);
  unsigned* tickets = grid.splits > 1 || max_splits > 1 ? launch.workspace().tickets : nullptr;
  dispatch(o.copies[0].scalar_type(),
           [&](auto type) { screen<typename decltype(type)::Type>(launch, o, grid, packed, worklist, tickets, found, memory); });
  recheck(launch, o, packed, worklist, max_splits, tickets, found, memory);
}

// Launches the kernel for the squared distances (heads, rows).
void measure_distances(const Launch& launch, const CodebookOperands& o, const Tensor& indices, const Tensor& distance) {
  int64_t count = o.heads * o.rows;
  if (count == 0) return;
  CodebookDistanceParams p{o.x,
                           o.codebook,
                           divider(o.rows),
                           count,
                           o.dim,
                           row_group(o.dim),
                           static_cast<const int64_t*>(indices.const_data_ptr()),
                           static_cast<float*>(distance.mutable_data_ptr())};
  launch.run(codebook_distance_kernel, ceil_div(p.count, kThreads / p.width), 1, kThreads, p);
}

std::tuple<Tensor, Tensor> codebook_nearest(const Tensor& x, const Tensor& codebook, bool with_distance) {
  Launch launch(x);
  CodebookOperands operands(x, codebook);
  Sizes shape{operands.heads, operands.rows};
  Tensor indices = launch.empty(shape, ScalarType::Long);
  Tensor distance = launch.empty(with_distance ? shape : Sizes{0}, ScalarType::Float);
  find_nearest(launch, operands, indices);
  if (with_distance) measure_distances(launch, operands, indices, distance);
  return {indices, distance};
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
ThreeTensors quantize(const Tensor& x, const Tensor& codebook, int64_t batch, Reduction reduction, double loss_weight) {
  Launch launch(x);
  CodebookOperands operands(x, codebook);
  Tensor indices = launch.empty({operands.heads, operands.rows}, ScalarType::Long), quantized = launch.empty(shape_of(x), x.scalar_type());
  Tensor loss = launch.empty_reduced(x, batch, reduction);
  int64_t numel = x.numel();
  if (numel == 0) {
    launch.fill(loss, 0);
    return {quantized, indices, loss};
  }
  find_nearest(launch, operands, indices);
  CodebookQuantizeParams<T> p{};
  p.x = static_cast<const T*>(operands.x.data);
  p.view = operands.x;
  p.codebook = operands.codebook;
  p.rows = divider(operands.rows);
  p.dim = divider(operands.dim);
  LossPlan plan = plan_loss(launch, reduction, batch, numel, numel, loss);
  p.numel = numel;
  p.chunk = plan.chunks.elements;
  p.aligned = operands.x.aligned && operands.codebook.aligned;
  p.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  p.quantized = static_cast<T*>(quantized.mutable_data_ptr());
  p.loss = reduction == Reduction::none ? static_cast<T*>(loss.mutable_data_ptr()) : nullptr;
  p.weight = static_cast<float>(loss_weight);
  p.loss_sum = plan.sum;
  p.ticket = plan.ticket;
  launch.run(codebook_quantize_kernel<T>, plan.chunks.blocks, 1, kThreads, p);
  return {quantized, indices, loss};
}

ThreeTensors codebook_quantize(const Tensor& x, const Tensor& codebook, int64_t batch, int64_t reduction, double loss_weight) {
  return dispatch(x.scalar_type(), [&](auto type) {
    return quantize<typename decltype(type)::Type>(x, codebook, batch, static_cast<Reduction>(reduction), loss_weight);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("codebook_nearest.cuda", TORCH_BOX(&codebook_nearest));
  m.impl("codebook_quantize.cuda", TORCH_BOX(&codebook_quantize));
}

}  // namespace fastvae
