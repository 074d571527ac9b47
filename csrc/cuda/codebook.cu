// Vector quantization on a GPU: the exact search for the nearest codes, what follows from it, and the moving averages of the codes.
#include "codebook_sort.cuh"
#include "loss.h"

namespace fastvae {
namespace {

int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// (heads, rows, dim); a copy where a row's elements do not lie side by side.
RowView rows_of(const Tensor& tensor, Copies& copies) {
  bool side_by_side = tensor.size(2) == 1 || tensor.stride(2) == 1;
  copies.push_back(side_by_side ? tensor : torch::stable::contiguous(tensor));
  const Tensor& readable = copies.back();
  RowView view{readable.const_data_ptr(), dtype_of(readable), readable.stride(0), readable.stride(1), false};
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(kVector * element_size(view.dtype)) == 0;
  view.vector = aligned && view.dtype != DType::float64 && tensor.size(2) % kVector == 0 && view.head_stride % kVector == 0 &&
                view.row_stride % kVector == 0;
  return view;
}

// Parts of one piece of memory; without it, their size alone.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    uintptr_t part = memory_ + used_;
    used_ += static_cast<uintptr_t>(ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16);
    return reinterpret_cast<T*>(part);
  }

  int64_t used() const { return static_cast<int64_t>(used_); }

 private:
  uintptr_t memory_, used_ = 0;
};

template <class LayOut>
Tensor allocate_parts(const Launch& launch, LayOut lay_out) {
  Arena sizes(nullptr);
  lay_out(sizes);
  Tensor memory = launch.empty({sizes.used()}, ScalarType::Byte);
  Arena parts(memory.mutable_data_ptr());
  lay_out(parts);
  return memory;
}

// x and the codebook of an operator, (heads, rows, dim) and (heads, codes, dim).
struct Operands {
  Copies copies;
  RowView x, codebook;
  int64_t heads, rows, codes, dim;

  Operands(const Tensor& x_in, const Tensor& codebook_in)
      : x(rows_of(x_in, copies)),
        codebook(rows_of(codebook_in, copies)),
        heads(x_in.size(0)),
        rows(x_in.size(1)),
        codes(codebook_in.size(1)),
        dim(x_in.size(2)) {
    STD_TORCH_CHECK(codes <= int64_t{1} << 30, "codebook: got ", codes, " codes, takes at most 2^30");
  }
};

PackedCodes pack_codes(const Launch& launch, const Operands& o, unsigned long long* listed, Copies& memory) {
  PackedCodes packed{};
  packed.layout = code_layout(o.codes, o.dim);
  packed.source = o.codebook;
  packed.errors = score_errors(o.dim);
  packed.width = row_group(o.dim);
  const CodeLayout& layout = packed.layout;
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
  PackParams p{packed, listed};
  int64_t blocks = o.heads * ceil_div(layout.padded_codes, kThreads / packed.width);
  launch.run(code_mean_kernel, o.heads * ceil_div(layout.padded_dim, kWarp), 1, kThreads, p);
  launch.run(measure_codes_kernel, blocks, 1, kThreads, p);
  launch.run(pack_codes_kernel, blocks, 1, kThreads, p);
  return packed;
}

template <class T>
void (*screen_of(int64_t dim))(ScreenParams<T>) {
  if (!has_short_rows(dim)) return screen_kernel<T>;
  if (short_dim(dim) == 4) return screen_short_kernel<T, 4>;
  return short_dim(dim) == 8 ? screen_short_kernel<T, 8> : screen_short_kernel<T, kShortDim>;
}

template <class T>
void screen(Launch& launch, const Operands& o, const PackedCodes& packed, const Worklist& worklist, int64_t* indices, Copies& memory) {
  ScreenParams<T> p{};
  p.x = static_cast<const T*>(o.x.data);
  p.view = o.x;
  p.rows = o.rows;
  p.grid = screen_grid(o.heads, o.rows, packed.layout);
  p.codes = packed;
  p.indices = indices;
  p.worklist = worklist;
  if (p.grid.splits > 1) {
    int64_t count = p.grid.splits * p.grid.tiles * p.grid.tile_rows;
    p.tickets = launch.workspace().tickets;
    memory.push_back(allocate_parts(launch, [&](Arena& arena) {
      p.least = arena.take<float>(count);
      p.second = arena.take<float>(count);
      p.code = arena.take<int32_t>(count);
    }));
  }
  launch.run(screen_of<T>(o.dim), p.grid.tiles, p.grid.splits, kThreads, p);
}

void (*recheck_of(DType dtype))(RecheckParams) {
  if (dtype == DType::float32) return recheck_kernel<float>;
  if (dtype == DType::bfloat16) return recheck_kernel<BFloat16>;
  return dtype == DType::float16 ? recheck_kernel<Half> : recheck_kernel<double>;
}

void find_nearest(Launch& launch, const Operands& o, const Tensor& indices) {
  if (o.heads == 0 || o.rows == 0) return;
  Copies memory;
  auto* found = static_cast<int64_t*>(indices.mutable_data_ptr());
  int64_t blocks = min64(o.heads * o.rows, kRecheckBlocks);
  Worklist worklist{};
  double* buffers = nullptr;
  memory.push_back(allocate_parts(launch, [&](Arena& arena) {
    worklist.count = arena.take<unsigned long long>(1);
    worklist.rows = arena.take<int64_t>(o.heads * o.rows);
    buffers = arena.take<double>(blocks * 3 * o.dim);
  }));
  PackedCodes packed = pack_codes(launch, o, worklist.count, memory);
  dispatch(o.copies[0].scalar_type(),
           [&](auto type) { screen<typename decltype(type)::Type>(launch, o, packed, worklist, found, memory); });
  RecheckParams p{o.x, divider(o.rows), packed, worklist, buffers, found};
  launch.run(recheck_of(o.codebook.dtype), blocks, 1, kThreads, p);
}

struct DistanceParams {
  RowView x, codebook;
  Divider rows;
  int64_t count, dim;
  int width;
  const int64_t* indices;
  float* distance;
};

__global__ void __launch_bounds__(kThreads) distance_kernel(const __grid_constant__ DistanceParams p) {
  Group group(p.width);
  int64_t number = static_cast<int64_t>(blockIdx.x) * group.count + group.number;
  float total = 0.0f;
  if (number < p.count) {
    int64_t head = quotient(p.rows, number), row = number - head * p.rows.divisor;
    int64_t x = row_offset(p.x, head, row), code = row_offset(p.codebook, head, p.indices[number]);
    for (int64_t d = group.member * kVector; d < p.dim; d += group.width * kVector) {
      int count = static_cast<int>(min64(p.dim - d, kVector));
      float a[kVector], b[kVector];
      load(p.x, x + d, count, p.x.vector, a);
      load(p.codebook, code + d, count, p.codebook.vector, b);
      for (int k = 0; k < kVector; ++k) total = fma(a[k] - b[k], a[k] - b[k], total);
    }
  }
  total = warp_sum(total, group.width);
  if (group.member == 0 && number < p.count) p.distance[number] = total;
}

void measure_distances(const Launch& launch, const Operands& o, const Tensor& indices, const Tensor& distance) {
  int64_t count = o.heads * o.rows;
  if (count == 0) return;
  DistanceParams p{o.x,
                   o.codebook,
                   divider(o.rows),
                   count,
                   o.dim,
                   row_group(o.dim),
                   static_cast<const int64_t*>(indices.const_data_ptr()),
                   static_cast<float*>(distance.mutable_data_ptr())};
  launch.run(distance_kernel, ceil_div(p.count, kThreads / p.width), 1, kThreads, p);
}

std::tuple<Tensor, Tensor> codebook_nearest(const Tensor& x, const Tensor& codebook, bool with_distance) {
  Launch launch(x);
  Operands operands(x, codebook);
  Sizes shape{operands.heads, operands.rows};
  Tensor indices = launch.empty(shape, ScalarType::Long);
  Tensor distance = launch.empty(with_distance ? shape : Sizes{0}, ScalarType::Float);
  find_nearest(launch, operands, indices);
  if (with_distance) measure_distances(launch, operands, indices, distance);
  return {indices, distance};
}

template <class T>
struct QuantizeParams {
  const T* x;
  RowView view, codebook;  // of x
  Divider rows, dim;
  int64_t numel, chunk;
  bool vector;
  const int64_t* indices;
  T *quantized, *loss;
  float weight;
  LossSum loss_sum;
  unsigned* ticket;
};

// Where an element of x lies, and that of its code.
struct PairPlace {
  int64_t x, code;

  template <class T>
  __device__ __forceinline__ PairPlace(const QuantizeParams<T>& p, int64_t element) {
    int64_t number = quotient(p.dim, element), d = element - number * p.dim.divisor;
    int64_t head = quotient(p.rows, number), row = number - head * p.rows.divisor;
    x = row_offset(p.view, head, row) + d;
    code = row_offset(p.codebook, head, p.indices[number]) + d;
  }
};

// Elements of x from `element` on and those of their codes; 0 where there are none.
template <class T>
__device__ __forceinline__ void load_with_codes(const QuantizeParams<T>& p, int64_t element, int count, float (&x)[kVector],
                                                float (&code)[kVector]) {
  if (p.vector && count == kVector) {
    PairPlace place(p, element);
    load(p.x + place.x, kVector, true, x);
    load(p.codebook, place.code, kVector, true, code);
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    x[k] = code[k] = 0.0f;
    if (k >= count) continue;
    PairPlace place(p, element + k);
    x[k] = widen(p.x[place.x]);
    code[k] = static_cast<float>(wide_element(p.codebook, place.code));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ QuantizeParams<T> p) {
  LossAccumulator loss(p.loss_sum, p.chunk);
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.numel);
  for (int64_t base = begin; base < end; base += kStep) {
    loss.begin_step(base);
    float x[kRuns][kVector], code[kRuns][kVector];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = base + vector_offset(threadIdx.x, j);
      load_with_codes(p, element, static_cast<int>(max64(min64(p.numel - element, kVector), 0)), x[j], code[j]);
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int offset = vector_offset(threadIdx.x, j);
      int count = static_cast<int>(max64(min64(p.numel - base - offset, kVector), 0));
      store(p.quantized + base + offset, count, count == kVector, code[j]);
      float values[kVector];
      for (int k = 0; k < kVector; ++k) values[k] = p.weight * (x[j][k] - code[j][k]) * (x[j][k] - code[j][k]);
      if (p.loss) store(p.loss + base + offset, count, count == kVector, values);
      loss.add(offset, values);
    }
    loss.end_step();
  }
  if (!p.loss_sum.wanted()) return;
  loss.store_partial_sums();
  if (is_last_block(p.ticket, gridDim.x)) loss.finish_sums();
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
ThreeTensors quantize(const Tensor& x, const Tensor& codebook, int64_t batch, Reduction reduction, double loss_weight) {
  Launch launch(x);
  Operands operands(x, codebook);
  Tensor indices = launch.empty({operands.heads, operands.rows}, ScalarType::Long), quantized = launch.empty(shape_of(x), x.scalar_type());
  Tensor loss = empty_reduced(launch, x, batch, reduction);
  int64_t numel = x.numel();
  if (numel == 0) {
    launch.fill(loss, 0);
    return {quantized, indices, loss};
  }
  find_nearest(launch, operands, indices);
  QuantizeParams<T> p{};
  p.x = static_cast<const T*>(operands.x.data);
  p.view = operands.x;
  p.codebook = operands.codebook;
  p.rows = divider(operands.rows);
  p.dim = divider(operands.dim);
  LossPlan plan = plan_loss(launch, reduction, batch, numel, numel, loss);
  p.numel = numel;
  p.chunk = plan.chunks.elements;
  p.vector = operands.x.vector && operands.codebook.vector;
  p.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  p.quantized = static_cast<T*>(quantized.mutable_data_ptr());
  p.loss = reduction == Reduction::none ? static_cast<T*>(loss.mutable_data_ptr()) : nullptr;
  p.weight = static_cast<float>(loss_weight);
  p.loss_sum = plan.sum;
  p.ticket = plan.ticket;
  launch.run(quantize_kernel<T>, plan.chunks.blocks, 1, kThreads, p);
  return {quantized, indices, loss};
}

ThreeTensors codebook_quantize(const Tensor& x, const Tensor& codebook, int64_t batch, int64_t reduction, double loss_weight) {
  return dispatch(x.scalar_type(), [&](auto type) {
    return quantize<typename decltype(type)::Type>(x, codebook, batch, static_cast<Reduction>(reduction), loss_weight);
  });
}

template <class T>
struct QuantizeBackwardParams {
  const T* x;
  RowView view, codebook, grad_quantized;  // of x
  const int64_t* indices;
  LossGradient<T> gradient;
  float factor;
  Divider rows;
  int64_t count, dim;
  int width;
  bool vector, gradient_vector;  // of grad_x; of the elementwise gradient
  T* grad_x;
};

// What the gradient of a group's row is made of, from element d on.
template <class T>
struct RowOperands {
  const QuantizeBackwardParams<T>& p;
  int64_t x_from, code_from, incoming_from;

  __device__ __forceinline__ RowOperands(const QuantizeBackwardParams<T>& p, int64_t number) : p(p) {
    int64_t head = quotient(p.rows, number), row = number - head * p.rows.divisor;
    x_from = row_offset(p.view, head, row);
    code_from = row_offset(p.codebook, head, p.indices[number]);
    incoming_from = row_offset(p.grad_quantized, head, row);
  }

  __device__ __forceinline__ int count(int64_t d) const { return static_cast<int>(min64(p.dim - d, kVector)); }
  __device__ __forceinline__ void load_x(int64_t d, float (&to)[kVector]) const { load(p.x + x_from + d, count(d), p.view.vector, to); }
  __device__ __forceinline__ void load_code(int64_t d, float (&to)[kVector]) const {
    load(p.codebook, code_from + d, count(d), p.codebook.vector, to);
  }
  __device__ __forceinline__ void load_incoming(int64_t d, float (&to)[kVector]) const {
    load(p.grad_quantized, incoming_from + d, count(d), p.grad_quantized.vector, to);
  }
};

template <class T>
__device__ __forceinline__ Rotation<float> rotation_of(const RowOperands<T>& row, const Group& group, bool exists) {
  const QuantizeBackwardParams<T>& p = row.p;
  float x[kVector], code[kVector], incoming[kVector], x_square = 0.0f, code_square = 0.0f;
  int64_t first = exists ? group.member * kVector : p.dim, step = group.width * kVector;
  for (int64_t d = first; d < p.dim; d += step) {
    row.load_x(d, x);
    row.load_code(d, code);
    for (int k = 0; k < kVector; ++k) {
      x_square = fma(x[k], x[k], x_square);
      code_square = fma(code[k], code[k], code_square);
    }
  }
  Rotation<float> rotation = rotation_between(sqrt(warp_sum(x_square, group.width)), sqrt(warp_sum(code_square, group.width)));
  float square = 0.0f, along = 0.0f, along_code = 0.0f;
  for (int64_t d = first; d < p.dim; d += step) {
    row.load_x(d, x);
    row.load_code(d, code);
    row.load_incoming(d, incoming);
    for (int k = 0; k < kVector; ++k) {
      float between = halfway(rotation, x[k], code[k]);
      square = fma(between, between, square);
      along = fma(between, incoming[k], along);
      along_code = fma(code[k], incoming[k], along_code);
    }
  }
  square = warp_sum(square, group.width);
  along = warp_sum(along, group.width);
  project(rotation, sqrt(square), along, warp_sum(along_code, group.width));
  return rotation;
}

template <class T, bool kRotation>
__global__ void __launch_bounds__(kThreads) quantize_backward_kernel(const __grid_constant__ QuantizeBackwardParams<T> p) {
  Group group(p.width);
  int64_t number = static_cast<int64_t>(blockIdx.x) * group.count + group.number;
  bool exists = number < p.count;
  RowOperands<T> row(p, exists ? number : 0);
  Rotation<float> rotation{};
  if (kRotation) rotation = rotation_of(row, group, exists);
  if (!exists) return;
  float weight = weight_of_row(p.gradient, number);
  for (int64_t d = group.member * kVector; d < p.dim; d += group.width * kVector) {
    float x[kVector], code[kVector], out[kVector] = {}, weights[kVector] = {weight, weight, weight, weight};
    int64_t element = number * p.dim + d;
    row.load_x(d, x);
    row.load_code(d, code);
    if (p.grad_quantized.data) row.load_incoming(d, out);
    if (p.gradient.elements) load(p.gradient.elements + element, row.count(d), p.gradient_vector, weights);
    for (int k = 0; k < kVector; ++k) {
      if (kRotation) out[k] = rotate_back(rotation, out[k], halfway(rotation, x[k], code[k]), x[k]);
      if (p.gradient) out[k] = fma(p.factor * weights[k], x[k] - code[k], out[k]);
    }
    store(p.grad_x + element, row.count(d), p.vector, out);
  }
}

SortParams sort_by_code(const Launch& launch, const int64_t* indices, int64_t heads, int64_t rows, int64_t codes, int64_t* totals,
                        Copies& memory) {
  SortParams p{};
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
  launch.run(count_codes_kernel, part_blocks, 1, kThreads, p);
  launch.run(add_parts_kernel, ceil_div(heads * codes, kThreads), 1, kThreads, p);
  launch.run(start_codes_kernel, heads, 1, kThreads, p);
  launch.run(sort_rows_kernel, part_blocks, 1, kThreads, p);
  return p;
}

// Into sums, which are 0 where a code has no rows.
template <class T, bool kGradient>
void sum_by_code(const Launch& launch, SegmentParams<T>& p, int64_t dim, const Tensor& sums, Copies& memory) {
  p.dim = dim;
  p.pieces = ceil_div(p.sort.rows, kPieceRows);
  p.width = piece_group(dim);
  p.sums = output_of(sums);
  memory.push_back(allocate_parts(launch, [&](Arena& arena) { p.partial = arena.take<double>(p.sort.heads * p.pieces * 2 * dim); }));
  int64_t blocks = ceil_div(p.sort.heads * p.pieces, kThreads / p.width);
  launch.run(sum_pieces_kernel<T, kGradient>, blocks, 1, kThreads, p);
  launch.run(join_pieces_kernel<T>, blocks, 1, kThreads, p);
}

template <class T>
LossGradient<T> loss_gradient(const OptionalTensor& grad_loss, Reduction reduction, int64_t batch, int64_t rows, Copies& copies) {
  LossGradient<T> gradient;
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

struct BackwardArguments {
  const OptionalTensor &grad_quantized, &grad_loss;
  const Tensor &x, &codebook, &indices;
  int64_t batch;
  Reduction reduction;
  double codebook_cost, commitment_cost;
  bool rotation, with_codebook;
};

template <class T>
std::tuple<Tensor, Tensor> quantize_backward(const BackwardArguments& a) {
  Launch launch(a.x);
  Tensor grad_x = launch.empty(shape_of(a.x), a.x.scalar_type());
  Tensor grad_codebook = launch.empty(a.with_codebook ? shape_of(a.codebook) : Sizes{0}, a.codebook.scalar_type());
  launch.fill(grad_codebook, 0);
  if (a.x.numel() == 0) return {grad_x, grad_codebook};

  Operands o(a.x, a.codebook);
  Copies copies{dense(a.indices)};
  double scale = 2.0 * reduction_scale(a.reduction, a.batch, a.x.numel());
  QuantizeBackwardParams<T> p{};
  p.x = static_cast<const T*>(o.x.data);
  p.view = o.x;
  p.codebook = o.codebook;
  if (a.grad_quantized) p.grad_quantized = rows_of(*a.grad_quantized, copies);
  p.indices = static_cast<const int64_t*>(copies[0].const_data_ptr());
  p.gradient = loss_gradient<T>(a.grad_loss, a.reduction, a.batch, o.heads * o.rows, copies);
  p.factor = static_cast<float>(scale * a.commitment_cost);
  p.rows = divider(o.rows);
  p.count = o.heads * o.rows;
  p.dim = o.dim;
  p.width = row_group(o.dim);
  p.vector = o.dim % kVector == 0;
  p.gradient_vector = p.vector && is_aligned(p.gradient.elements);
  p.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
  auto kernel = a.rotation && a.grad_quantized ? quantize_backward_kernel<T, true> : quantize_backward_kernel<T, false>;
  launch.run(kernel, ceil_div(p.count, kThreads / p.width), 1, kThreads, p);
  if (!a.with_codebook || !a.grad_loss) return {grad_x, grad_codebook};

  SegmentParams<T> s{};
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
  BackwardArguments arguments{grad_quantized, grad_loss,       x,        codebook,     indices, batch, static_cast<Reduction>(reduction),
                              codebook_cost,  commitment_cost, rotation, with_codebook};
  return dispatch(x.scalar_type(), [&](auto type) { return quantize_backward<typename decltype(type)::Type>(arguments); });
}

struct FiniteRowsParams {
  RowView x;
  Divider rows;
  int64_t count, dim;
  int width;
  const int64_t* indices;
  int64_t* kept;
};

// kept is the index of each row, -1 for a row that is not finite.
__global__ void __launch_bounds__(kThreads) finite_rows_kernel(const __grid_constant__ FiniteRowsParams p) {
  Group group(p.width);
  int64_t number = static_cast<int64_t>(blockIdx.x) * group.count + group.number;
  int strange = 0;
  if (number < p.count) {
    int64_t head = quotient(p.rows, number), first = row_offset(p.x, head, number - head * p.rows.divisor);
    for (int64_t d = group.member * kVector; d < p.dim; d += group.width * kVector) {
      float x[kVector];
      load(p.x, first + d, static_cast<int>(min64(p.dim - d, kVector)), p.x.vector, x);
      for (int k = 0; k < kVector; ++k) strange |= !is_finite(x[k]);
    }
  }
  strange = warp_sum(strange, group.width);
  if (group.member == 0 && number < p.count) p.kept[number] = strange == 0 ? p.indices[number] : -1;
}

// The indices of the rows of x (heads, rows, dim), of which those that are not finite have none.
Tensor indices_of_finite_rows(const Launch& launch, const RowView& view, const Tensor& x, const Tensor& indices) {
  Tensor kept = launch.empty({x.size(0), x.size(1)}, ScalarType::Long);
  FiniteRowsParams p{view,
                     divider(x.size(1)),
                     x.size(0) * x.size(1),
                     x.size(2),
                     row_group(x.size(2)),
                     static_cast<const int64_t*>(indices.const_data_ptr()),
                     static_cast<int64_t*>(kept.mutable_data_ptr())};
  launch.run(finite_rows_kernel, ceil_div(p.count, kThreads / p.width), 1, kThreads, p);
  return kept;
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
  RowView view = rows_of(x, copies);
  Tensor kept = indices_of_finite_rows(launch, view, x, dense(indices));
  auto* totals = static_cast<int64_t*>(counts.mutable_data_ptr());
  SortParams sort = sort_by_code(launch, static_cast<const int64_t*>(kept.const_data_ptr()), heads, rows, codes, totals, copies);
  dispatch(x.scalar_type(), [&](auto type) {
    SegmentParams<typename decltype(type)::Type> p{};
    p.sort = sort;
    p.x = view;
    p.factor = 1.0;
    sum_by_code<typename decltype(type)::Type, false>(launch, p, dim, sums, copies);
  });
  return {counts, sums};
}

struct EmaParams {
  float *codebook, *ema_count, *ema_sum;
  const int64_t* counts;
  RowView sums;  // contiguous
  int64_t codes, numel;
  Divider dim;
  double decay, eps;
  double* inverse;  // (heads, codes): 1 over the smoothed count; 0 where that is none, and the code stays
};

// A head's block.
__global__ void __launch_bounds__(kThreads) ema_counts_kernel(const __grid_constant__ EmaParams p) {
  int64_t first = blockIdx.x * p.codes, end = first + p.codes;
  double total = 0.0;
  for (int64_t k = first + threadIdx.x; k < end; k += kThreads) {
    p.ema_count[k] = static_cast<float>(moving_average(p.ema_count[k], static_cast<double>(p.counts[k]), p.decay));
    total += p.ema_count[k];
  }
  total = block_sum(total);
  for (int64_t k = first + threadIdx.x; k < end; k += kThreads) {
    double smoothed = smoothed_count(p.ema_count[k], total, p.codes, p.eps);
    p.inverse[k] = smoothed > 0.0 ? 1.0 / smoothed : 0.0;
  }
}

__global__ void __launch_bounds__(kThreads) ema_codes_kernel(const __grid_constant__ EmaParams p) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.numel) return;
  double inverse = p.inverse[quotient(p.dim, i)];
  float sum = static_cast<float>(moving_average(p.ema_sum[i], wide_element(p.sums, i), p.decay));
  p.ema_sum[i] = sum;
  if (inverse > 0.0) p.codebook[i] = static_cast<float>(sum * inverse);
}

void codebook_ema_(Tensor codebook, Tensor ema_count, Tensor ema_sum, const Tensor& counts, const Tensor& sums, double decay, double eps) {
  STD_TORCH_CHECK(codebook.scalar_type() == ScalarType::Float, "fastvae: the CUDA kernels take float32 codebooks");
  if (codebook.numel() == 0) return;
  Launch launch(codebook);
  Tensor dense_counts = dense(counts), dense_sums = dense(sums);
  int64_t heads = codebook.size(0), codes = codebook.size(1);
  Tensor inverse = launch.empty({heads, codes}, ScalarType::Double);
  EmaParams p{static_cast<float*>(codebook.mutable_data_ptr()),
              static_cast<float*>(ema_count.mutable_data_ptr()),
              static_cast<float*>(ema_sum.mutable_data_ptr()),
              static_cast<const int64_t*>(dense_counts.const_data_ptr()),
              {dense_sums.const_data_ptr(), dtype_of(dense_sums), 0, 0, false},
              codes,
              codebook.numel(),
              divider(codebook.size(2)),
              decay,
              eps,
              static_cast<double*>(inverse.mutable_data_ptr())};
  launch.run(ema_counts_kernel, heads, 1, kThreads, p);
  launch.run(ema_codes_kernel, ceil_div(p.numel, kThreads), 1, kThreads, p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("codebook_nearest.cuda", TORCH_BOX(&codebook_nearest));
  m.impl("codebook_quantize.cuda", TORCH_BOX(&codebook_quantize));
  m.impl("codebook_quantize_backward.cuda", TORCH_BOX(&codebook_quantize_backward));
  m.impl("codebook_sums.cuda", TORCH_BOX(&codebook_sums));
  m.impl("codebook_ema_.cuda", TORCH_BOX(&codebook_ema_));
}

}  // namespace fastvae
