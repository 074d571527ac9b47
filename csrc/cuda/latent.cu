// Sampling and the Gaussian KL on a GPU. An element's number decides its noise, so a warp takes whole noise tiles. The forward pass runs
// over the elements of all samples; the backward pass over those of mu, and sums over the samples in a fixed order.
#include "../common/latent.h"
#include "loss.h"
#include "noise.cuh"

namespace fastvae {
namespace {

template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0;
};

template <class T>
struct LatentInputs {
  Rows<T> mu, logvar, prior_mu, prior_logvar;
  Divider inner;  // elements of a row, that is of one of the batch
  Divider numel;  // of mu
  int64_t total;  // of all samples
  bool strided;   // some operand's rows do not follow each other
  bool vector;    // every vector of every operand is aligned
  bool sampled;   // there is more than one sample
  float low, high;
  const int64_t* seed;
  const T* eps;
  const bool* active;  // of each column; nullptr: all are
};

// A thread's vectors of one operand as they lie in memory, loaded before anything is computed.
template <class T>
struct Raw {
  Vector<T> run[kRuns];
};

// Where a thread's elements lie: element(j, k) = first + 128 j + k, as far as there are any.
struct Place {
  int64_t first, end;

  __device__ __forceinline__ int64_t element(int run) const { return first + run * kNoiseLanes; }
  __device__ __forceinline__ int count(int run) const { return vector_count(end - element(run)); }
  __device__ __forceinline__ bool whole() const { return element(kRuns - 1) + kVector <= end; }
};

template <class T>
__device__ __forceinline__ void load_contiguous(const T* from, const Place& place, bool fast, Raw<T>& to) {
  if (fast) {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) to.run[j] = *reinterpret_cast<const Vector<T>*>(from + place.element(j));
  } else {
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      for (int k = 0; k < kVector; ++k) to.run[j].v[k] = k < place.count(j) ? from[place.element(j) + k] : T{};
  }
}

template <class T>
struct LatentRaw {
  Raw<T> mu, logvar, prior_mu, prior_logvar;
};

// The row and the column of an element of mu.
struct Cell {
  int64_t row, column;

  template <class T>
  __device__ __forceinline__ static Cell of(const LatentInputs<T>& in, int64_t element) {
    if (in.sampled) element = remainder(in.numel, element);
    int64_t row = quotient(in.inner, element);
    return {row, element - row * in.inner.divisor};
  }

  template <class T>
  __device__ __forceinline__ int64_t in(const Rows<T>& rows) const {
    return row * rows.stride + column;
  }
};

template <class T, bool kPrior>
__device__ __forceinline__ void load_cell(const LatentInputs<T>& in, const Cell& cell, bool with_mu, int j, int k, LatentRaw<T>& to) {
  if (with_mu) to.mu.run[j].v[k] = in.mu.data[cell.in(in.mu)];
  to.logvar.run[j].v[k] = in.logvar.data[cell.in(in.logvar)];
  if (kPrior) {
    to.prior_mu.run[j].v[k] = in.prior_mu.data[cell.in(in.prior_mu)];
    to.prior_logvar.run[j].v[k] = in.prior_logvar.data[cell.in(in.prior_logvar)];
  }
}

template <class T>
__device__ __forceinline__ void load_vector(const Rows<T>& rows, int64_t offset, Vector<T>& to) {
  to = *reinterpret_cast<const Vector<T>*>(rows.data + offset);
}

template <class T, bool kPrior>
__device__ __forceinline__ void load_operands(const LatentInputs<T>& in, const Place& place, bool fast, bool with_mu, LatentRaw<T>& to) {
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    if (fast && !in.strided && !in.sampled) {
      int64_t element = place.element(j);
      if (with_mu) load_vector(in.mu, element, to.mu.run[j]);
      load_vector(in.logvar, element, to.logvar.run[j]);
      if (kPrior) {
        load_vector(in.prior_mu, element, to.prior_mu.run[j]);
        load_vector(in.prior_logvar, element, to.prior_logvar.run[j]);
      }
      continue;
    }
    Cell cell = Cell::of(in, place.element(j));
    if (fast) {
      if (with_mu) load_vector(in.mu, cell.in(in.mu), to.mu.run[j]);
      load_vector(in.logvar, cell.in(in.logvar), to.logvar.run[j]);
      if (kPrior) {
        load_vector(in.prior_mu, cell.in(in.prior_mu), to.prior_mu.run[j]);
        load_vector(in.prior_logvar, cell.in(in.prior_logvar), to.prior_logvar.run[j]);
      }
      continue;
    }
    for (int k = 0; k < kVector; ++k) {
      to.mu.run[j].v[k] = to.logvar.run[j].v[k] = T{};
      if (k < place.count(j)) load_cell<T, kPrior>(in, cell, with_mu, j, k, to);
      bool row_ends = cell.column + 1 == in.inner.divisor;
      bool sample_ends = row_ends && (cell.row + 1) * in.inner.divisor == in.numel.divisor;
      cell = {sample_ends ? 0 : cell.row + row_ends, row_ends ? 0 : cell.column + 1};
    }
  }
}

template <class T>
__device__ __forceinline__ bool is_active(const LatentInputs<T>& in, int64_t element) {
  return !in.active || in.active[remainder(in.inner, element)];
}

template <class T>
struct ForwardParams : LatentInputs<T> {
  T* z;
  float* noise;
  T* kl;
  float free_bits;
  int64_t chunk;
  LossSum loss;
  unsigned* ticket;
};

template <class T, bool kPrior>
__global__ void __launch_bounds__(kThreads, kPrior ? 4 : 6) forward_kernel(const __grid_constant__ ForwardParams<T> p) {
  LossAccumulator loss(p.loss, p.chunk);
  NoiseKey key = {0, 0};
  if (p.seed) key = noise_key(p.seed);
  bool with_kl = p.kl || p.loss.wanted();
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.total);
  for (int64_t base = begin; base < end; base += kStep) {
    loss.begin_step(base);
    Place place{base + vector_offset(threadIdx.x, 0), p.total};
    bool fast = p.vector && place.whole();
    LatentRaw<T> raw;
    Raw<T> given;
    load_operands<T, kPrior>(p, place, fast, true, raw);
    float normals[kVector][kRuns];
    if (p.seed) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) normals_of_lane(key, place.first / kNoiseTile, threadIdx.x % kWarp * kVector + k, normals[k]);
    } else if (p.eps) {
      load_contiguous(p.eps, place, fast, given);
#pragma unroll
      for (int j = 0; j < kRuns; ++j)
        for (int k = 0; k < kVector; ++k) normals[k][j] = widen(given.run[j].v[k]);
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      int64_t element = place.element(j);
      int count = place.count(j);
      float x[kVector], y[kVector], out[kVector];
      VarianceRatio<float> ratio[kVector];
      for (int k = 0; k < kVector; ++k) {
        x[k] = widen(raw.mu.run[j].v[k]);
        y[k] = clamp(widen(raw.logvar.run[j].v[k]), p.low, p.high);
        ratio[k] = variance_ratio(y[k]);
      }
      if (p.z) {
        for (int k = 0; k < kVector; ++k) out[k] = fma(ratio[k].root, normals[k][j], x[k]);
        store(p.z + element, count, count == kVector, out);
      }
      if (p.noise) {
        for (int k = 0; k < kVector; ++k) out[k] = normals[k][j];
        store(p.noise + element, count, count == kVector, out);
      }
      if (!with_kl) continue;
      // The KL is that of the first sample's elements.
      int kl_count = static_cast<int>(max64(min64(p.numel.divisor - element, count), 0));
      for (int k = 0; k < kVector; ++k) {
        float value = kPrior
                          ? kl_prior(x[k], y[k], widen(raw.prior_mu.run[j].v[k]), clamp(widen(raw.prior_logvar.run[j].v[k]), p.low, p.high))
                          : kl_standard(x[k], ratio[k].divergence);
        out[k] = 0.0f;
        if (k < kl_count) out[k] = is_active(p, element + k) ? value : p.free_bits;
      }
      if (p.kl) store(p.kl + element, kl_count, kl_count == kVector, out);
      loss.add(vector_offset(threadIdx.x, j), out);
    }
    loss.end_step();
  }
  if (!p.loss.wanted()) return;
  loss.store_partial_sums();
  if (is_last_block(p.ticket, gridDim.x)) loss.finish_sums();
}

template <class T>
struct ActiveParams : LatentInputs<T> {
  ColumnSums columns;
  Workspace workspace;
  double free_bits;
  bool* out;
};

// Which dimensions have a mean KL over the batch above the free bits.
template <class T, bool kPrior>
__global__ void __launch_bounds__(kThreads) active_kernel(const __grid_constant__ ActiveParams<T> p) {
  auto kl = [&](int64_t element) {
    Cell cell = Cell::of(p, element);
    float x = widen(p.mu.data[cell.in(p.mu)]), y = clamp(widen(p.logvar.data[cell.in(p.logvar)]), p.low, p.high);
    if (!kPrior) return kl_standard(x, variance_ratio(y).divergence);
    float prior_logvar = clamp(widen(p.prior_logvar.data[cell.in(p.prior_logvar)]), p.low, p.high);
    return kl_prior(x, y, widen(p.prior_mu.data[cell.in(p.prior_mu)]), prior_logvar);
  };
  // A NaN is not hidden.
  auto finish = [&](int64_t column, double total) { p.out[column] = !(total / static_cast<double>(p.columns.rows) <= p.free_bits); };
  sum_columns(p.columns, p.workspace, kl, finish);
}

template <class T>
struct BackwardParams : LatentInputs<T> {
  int64_t chunk;
  int64_t samples;
  const T* grad_z;
  // Of the KL: elementwise, or one a row (`grad_kl_stride` 0: one for all).
  const T* grad_kl_elements;
  const float* grad_kl;
  int64_t grad_kl_stride;
  float grad_kl_scale;
  T *grad_mu, *grad_logvar, *grad_prior_mu, *grad_prior_logvar;
};

// What the gradients of the KL are made of, beside the operands.
template <class T, bool kPrior>
__device__ __forceinline__ void load_backward(const BackwardParams<T>& p, const Place& place, bool fast, LatentRaw<T>& raw,
                                              Raw<T>& grad_kl) {
  load_operands<T, kPrior>(p, place, fast, p.grad_kl || p.grad_kl_elements, raw);
  if (p.grad_kl_elements) load_contiguous(p.grad_kl_elements, place, fast, grad_kl);
}

template <class T>
__device__ __forceinline__ float kl_weight(const BackwardParams<T>& p, const Raw<T>& grad_kl, int j, int k, int64_t element) {
  if (!is_active(p, element)) return 0.0f;
  if (p.grad_kl_elements) return widen(grad_kl.run[j].v[k]);
  int64_t row = p.grad_kl_stride != 0 ? quotient(p.inner, element) : 0;
  return p.grad_kl[row * p.grad_kl_stride] * p.grad_kl_scale;
}

// Writes the gradients of one vector. grad_mu: what comes through z; grad_sigma: its products with the noise.
template <class T, bool kPrior>
__device__ __forceinline__ void write_gradients(const BackwardParams<T>& p, const LatentRaw<T>& raw, const Raw<T>& grad_kl,
                                                const Place& place, int j, float (&grad_mu)[kVector], float (&grad_sigma)[kVector]) {
  int64_t element = place.element(j);
  int count = place.count(j);
  bool with_kl = p.grad_kl || p.grad_kl_elements;
  float grad_logvar[kVector], grad_prior_mu[kVector], grad_prior_logvar[kVector];
  for (int k = 0; k < kVector; ++k) {
    float logvar = widen(raw.logvar.run[j].v[k]), y = clamp(logvar, p.low, p.high);
    VarianceRatio<float> ratio = variance_ratio(y);
    grad_logvar[k] = 0.5f * ratio.root * grad_sigma[k];
    grad_prior_mu[k] = grad_prior_logvar[k] = 0.0f;
    if (with_kl && k < count) {
      float weight = kl_weight(p, grad_kl, j, k, element + k), x = widen(raw.mu.run[j].v[k]);
      if (kPrior) {
        float prior_logvar = widen(raw.prior_logvar.run[j].v[k]);
        KLGradient<float> gradient = kl_prior_gradient(x, y, widen(raw.prior_mu.run[j].v[k]), clamp(prior_logvar, p.low, p.high));
        grad_mu[k] = fma(weight, gradient.mu, grad_mu[k]);
        grad_logvar[k] = fma(weight, gradient.logvar, grad_logvar[k]);
        grad_prior_mu[k] = weight * gradient.prior_mu;
        grad_prior_logvar[k] = gradient_inside(weight * gradient.prior_logvar, prior_logvar, p.low, p.high);
      } else {
        grad_mu[k] = fma(weight, x, grad_mu[k]);
        grad_logvar[k] = fma(0.5f * weight, ratio.excess, grad_logvar[k]);
      }
    }
    grad_logvar[k] = gradient_inside(grad_logvar[k], logvar, p.low, p.high);
  }
  bool fast = count == kVector;
  store(p.grad_mu + element, count, fast, grad_mu);
  store(p.grad_logvar + element, count, fast, grad_logvar);
  if (kPrior) {
    store(p.grad_prior_mu + element, count, fast, grad_prior_mu);
    store(p.grad_prior_logvar + element, count, fast, grad_prior_logvar);
  }
}

// One sample, or none: each element by itself.
template <class T, bool kPrior>
__global__ void __launch_bounds__(kThreads, kPrior ? 3 : 4) backward_kernel(const __grid_constant__ BackwardParams<T> p) {
  NoiseKey key = {0, 0};
  if (p.seed) key = noise_key(p.seed);
  int64_t begin = blockIdx.x * p.chunk, end = min64(begin + p.chunk, p.total);
  for (int64_t base = begin; base < end; base += kStep) {
    Place place{base + vector_offset(threadIdx.x, 0), p.total};
    bool fast = p.vector && place.whole();
    LatentRaw<T> raw;
    Raw<T> grad_z, grad_kl, given;
    if (p.grad_z) load_contiguous(p.grad_z, place, fast, grad_z);
    load_backward<T, kPrior>(p, place, fast, raw, grad_kl);
    float normals[kVector][kRuns];
    if (p.grad_z && p.seed) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) normals_of_lane(key, place.first / kNoiseTile, threadIdx.x % kWarp * kVector + k, normals[k]);
    } else if (p.grad_z) {
      load_contiguous(p.eps, place, fast, given);
#pragma unroll
      for (int j = 0; j < kRuns; ++j)
        for (int k = 0; k < kVector; ++k) normals[k][j] = widen(given.run[j].v[k]);
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      float grad_mu[kVector], grad_sigma[kVector];
      for (int k = 0; k < kVector; ++k) {
        grad_mu[k] = p.grad_z ? widen(grad_z.run[j].v[k]) : 0.0f;
        grad_sigma[k] = p.grad_z ? grad_mu[k] * normals[k][j] : 0.0f;
      }
      write_gradients<T, kPrior>(p, raw, grad_kl, place, j, grad_mu, grad_sigma);
    }
  }
}

constexpr int kMostSampleWarps = 8;

// Several samples: the warps of a block share those of one noise tile of mu.
template <class T, bool kPrior>
__global__ void __launch_bounds__(kMostSampleWarps* kWarp, 1) backward_samples_kernel(const __grid_constant__ BackwardParams<T> p) {
  __shared__ float exchange[kMostSampleWarps / 2][2 * kVector * kRuns][kWarp];
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kNoiseTile;
  Place place{first + lane * kVector, p.numel.divisor};
  bool fast = p.vector && place.whole();
  NoiseKey key = {0, 0};
  if (p.seed) key = noise_key(p.seed);
  float grad_mu[kRuns][kVector] = {}, grad_sigma[kRuns][kVector] = {};
  for (int64_t sample = warp; sample < p.samples; sample += warps) {
    int64_t skipped = sample * p.numel.divisor;
    Raw<T> grad_z, given;
    load_contiguous(p.grad_z + skipped, place, fast, grad_z);
    float normals[kVector][kRuns];
    if (p.seed) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) normals_from(key, skipped + first, lane * kVector + k, normals[k]);
    } else {
      load_contiguous(p.eps + skipped, place, fast, given);
#pragma unroll
      for (int j = 0; j < kRuns; ++j)
        for (int k = 0; k < kVector; ++k) normals[k][j] = widen(given.run[j].v[k]);
    }
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
      for (int k = 0; k < kVector; ++k) {
        float gradient = widen(grad_z.run[j].v[k]);
        grad_mu[j][k] += gradient;
        grad_sigma[j][k] = fma(gradient, normals[k][j], grad_sigma[j][k]);
      }
  }
  for (int half = warps / 2; half > 0; half /= 2) {
    __syncthreads();
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < kRuns * kVector; ++i) {
        exchange[warp - half][2 * i][lane] = grad_mu[i / kVector][i % kVector];
        exchange[warp - half][2 * i + 1][lane] = grad_sigma[i / kVector][i % kVector];
      }
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < kRuns * kVector; ++i) {
        grad_mu[i / kVector][i % kVector] += exchange[warp][2 * i][lane];
        grad_sigma[i / kVector][i % kVector] += exchange[warp][2 * i + 1][lane];
      }
    }
  }
  if (warp != 0) return;
  LatentRaw<T> raw;
  Raw<T> grad_kl;
  load_backward<T, kPrior>(p, place, fast, raw, grad_kl);
#pragma unroll
  for (int j = 0; j < kRuns; ++j) write_gradients<T, kPrior>(p, raw, grad_kl, place, j, grad_mu[j], grad_sigma[j]);
}

struct Arguments {
  const Tensor &mu, &logvar;
  const OptionalTensor &prior_mu, &prior_logvar, &eps, &seed;
  std::optional<int64_t> num_samples;
  double clamp_min, clamp_max;
};

// The dimensions after the first follow each other; what lies between its entries does not matter.
bool has_dense_rows(const Tensor& tensor) {
  int64_t inner = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != inner) return false;
    inner *= tensor.size(d);
  }
  return tensor.dim() > 0;
}

template <class T>
Rows<T> rows_of(const Tensor& tensor, LatentInputs<T>& in, Copies& copies) {
  copies.push_back(has_dense_rows(tensor) ? tensor : dense(tensor));
  const Tensor& readable = copies.back();
  int64_t stride = readable.dim() > 0 ? readable.stride(0) : 0, rows = batch_of(tensor);
  in.strided = in.strided || (rows > 1 && stride != in.inner.divisor);
  Rows<T> result{static_cast<const T*>(readable.const_data_ptr()), stride};
  in.vector = in.vector && is_aligned(result.data) && (stride == in.inner.divisor || stride % kVector == 0);
  return result;
}

template <class T>
const T* contiguous_data(const Tensor& tensor, LatentInputs<T>& in, Copies& copies) {
  copies.push_back(dense(tensor));
  const T* data = static_cast<const T*>(copies.back().const_data_ptr());
  in.vector = in.vector && is_aligned(data);
  return data;
}

template <class T>
void fill_inputs(LatentInputs<T>& in, const Arguments& a, Copies& copies) {
  copies.reserve(8);
  int64_t numel = a.mu.numel(), batch = batch_of(a.mu), samples = a.num_samples.value_or(1);
  in.total = numel * samples;
  in.inner = divider(batch > 0 ? numel / batch : 1);
  in.numel = divider(numel);
  in.sampled = samples > 1;
  in.strided = false;
  in.vector = true;
  in.mu = rows_of(a.mu, in, copies);
  in.logvar = rows_of(a.logvar, in, copies);
  if (a.prior_mu) {
    in.prior_mu = rows_of(*a.prior_mu, in, copies);
    in.prior_logvar = rows_of(*a.prior_logvar, in, copies);
  }
  in.eps = a.eps ? contiguous_data(*a.eps, in, copies) : nullptr;
  in.seed = a.seed && !a.eps ? static_cast<const int64_t*>(a.seed->const_data_ptr()) : nullptr;
  in.active = nullptr;
  in.low = static_cast<float>(a.clamp_min);
  in.high = static_cast<float>(a.clamp_max);
}

// Whether vectors stay inside rows and samples.
template <class T>
void settle_vectors(LatentInputs<T>& in) {
  in.vector = in.vector && (!in.strided || in.inner.divisor % kVector == 0) && (!in.sampled || in.numel.divisor % kVector == 0);
}

template <class T>
Tensor active_dimensions(Launch& launch, const LatentInputs<T>& in, const Tensor& mu, double free_bits) {
  std::vector<int64_t> shape = shape_of(mu);
  if (!shape.empty()) shape.erase(shape.begin());
  Tensor active = launch.empty(shape, ScalarType::Bool);
  if (mu.numel() == 0) {
    launch.fill(active, 1);
    return active;
  }
  ActiveParams<T> p{in, column_sums_of(batch_of(mu), active.numel(), 1), launch.workspace(), free_bits,
                    static_cast<bool*>(active.mutable_data_ptr())};
  // Its elements are those of the first sample.
  p.sampled = false;
  launch.run(in.prior_mu.data ? active_kernel<T, true> : active_kernel<T, false>, p.columns.groups, p.columns.splits, kThreads, p);
  return active;
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
FourTensors forward(const Arguments& a, bool with_kl, Reduction reduction, double free_bits, bool keep_noise) {
  Launch launch(a.mu);
  ScalarType dtype = a.mu.scalar_type();
  bool draws = a.eps.has_value() || a.seed.has_value();
  std::vector<int64_t> z_shape = shape_of(a.mu), nothing = {0};
  if (a.num_samples) z_shape.insert(z_shape.begin(), *a.num_samples);
  Tensor z = launch.empty(draws ? z_shape : nothing, dtype);
  Tensor noise = launch.empty(draws && keep_noise ? z_shape : nothing, ScalarType::Float);
  Tensor kl = with_kl ? empty_reduced(launch, a.mu, reduction) : launch.empty(nothing, ScalarType::Float);
  bool masked = with_kl && free_bits > 0.0;

  Copies copies;
  ForwardParams<T> p{};
  fill_inputs(p, a, copies);
  settle_vectors(p);
  Tensor active = masked ? active_dimensions<T>(launch, p, a.mu, free_bits) : launch.empty(nothing, ScalarType::Bool);
  if (p.total == 0) {
    launch.fill(kl, 0);
    return {z, kl, active, noise};
  }
  p.active = masked ? static_cast<const bool*>(active.const_data_ptr()) : nullptr;
  p.z = draws ? static_cast<T*>(z.mutable_data_ptr()) : nullptr;
  p.noise = draws && keep_noise ? static_cast<float*>(noise.mutable_data_ptr()) : nullptr;
  p.kl = with_kl && reduction == Reduction::none ? static_cast<T*>(kl.mutable_data_ptr()) : nullptr;
  p.free_bits = static_cast<float>(free_bits);
  LossPlan plan = plan_loss(launch, with_kl ? reduction : Reduction::none, a.mu, p.total, kl);
  p.chunk = plan.chunks.elements;
  p.loss = plan.sum;
  p.ticket = plan.ticket;
  launch.run(a.prior_mu ? forward_kernel<T, true> : forward_kernel<T, false>, plan.chunks.blocks, 1, kThreads, p);
  return {z, kl, active, noise};
}

template <class T>
void fill_grad_kl(BackwardParams<T>& p, const OptionalTensor& grad_kl, const Tensor& mu, Reduction reduction, Copies& copies) {
  p.grad_kl_elements = nullptr;
  p.grad_kl = nullptr;
  if (!grad_kl) return;
  if (reduction == Reduction::none) {
    p.grad_kl_elements = contiguous_data(*grad_kl, p, copies);
    return;
  }
  p.grad_kl = static_cast<const float*>(grad_kl->const_data_ptr());
  p.grad_kl_stride = reduction == Reduction::sample && grad_kl->dim() > 0 ? grad_kl->stride(0) : 0;
  p.grad_kl_scale = static_cast<float>(reduction_scale(reduction, batch_of(mu), mu.numel()));
}

template <class T>
FourTensors backward(const Arguments& a, const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Tensor& active,
                     Reduction reduction) {
  Launch launch(a.mu);
  ScalarType dtype = a.mu.scalar_type();
  std::vector<int64_t> shape = shape_of(a.mu), prior_shape = a.prior_mu ? shape : std::vector<int64_t>{0};
  Tensor grad_mu = launch.empty(shape, dtype), grad_logvar = launch.empty(shape, dtype);
  Tensor grad_prior_mu = launch.empty(prior_shape, dtype), grad_prior_logvar = launch.empty(prior_shape, dtype);

  Copies copies;
  BackwardParams<T> p{};
  fill_inputs(p, a, copies);
  p.samples = a.num_samples.value_or(1);
  p.grad_z = grad_z ? contiguous_data(*grad_z, p, copies) : nullptr;
  fill_grad_kl(p, grad_kl, a.mu, reduction, copies);
  if (active.numel() > 0) p.active = static_cast<const bool*>(active.const_data_ptr());
  p.grad_mu = static_cast<T*>(grad_mu.mutable_data_ptr());
  p.grad_logvar = static_cast<T*>(grad_logvar.mutable_data_ptr());
  p.grad_prior_mu = static_cast<T*>(grad_prior_mu.mutable_data_ptr());
  p.grad_prior_logvar = static_cast<T*>(grad_prior_logvar.mutable_data_ptr());
  settle_vectors(p);
  if (a.mu.numel() == 0) return {grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar};
  if (p.grad_z && p.samples > 1) {
    int64_t tiles = ceil_div(a.mu.numel(), kNoiseTile);
    launch.run(a.prior_mu ? backward_samples_kernel<T, true> : backward_samples_kernel<T, false>, tiles, 1, sample_warps(p.samples) * kWarp,
               p);
  } else {
    p.sampled = false;
    p.total = a.mu.numel();
    Chunks chunks = chunks_of(p.total, kMaxBlocks);
    p.chunk = chunks.elements;
    launch.run(a.prior_mu ? backward_kernel<T, true> : backward_kernel<T, false>, chunks.blocks, 1, kThreads, p);
  }
  return {grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar};
}

FourTensors latent_forward(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                           const OptionalTensor& eps, const OptionalTensor& seed, std::optional<int64_t> num_samples, bool with_kl,
                           int64_t reduction, double free_bits, double clamp_min, double clamp_max, bool keep_noise) {
  Arguments arguments{mu, logvar, prior_mu, prior_logvar, eps, seed, num_samples, clamp_min, clamp_max};
  return dispatch(mu.scalar_type(), [&](auto type) {
    return forward<typename decltype(type)::Type>(arguments, with_kl, static_cast<Reduction>(reduction), free_bits, keep_noise);
  });
}

FourTensors latent_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Tensor& mu, const Tensor& logvar,
                            const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, const OptionalTensor& eps,
                            const OptionalTensor& seed, const Tensor& active, std::optional<int64_t> num_samples, int64_t reduction,
                            double clamp_min, double clamp_max) {
  Arguments arguments{mu, logvar, prior_mu, prior_logvar, eps, seed, num_samples, clamp_min, clamp_max};
  return dispatch(mu.scalar_type(), [&](auto type) {
    return backward<typename decltype(type)::Type>(arguments, grad_z, grad_kl, active, static_cast<Reduction>(reduction));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("latent_forward.cuda", TORCH_BOX(&latent_forward));
  m.impl("latent_backward.cuda", TORCH_BOX(&latent_backward));
}

}  // namespace fastvae
