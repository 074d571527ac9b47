// Group normalisation and its activation on a GPU, contiguous or with the channels last. A group that fits on chip is read once a pass, by
// a block. Larger ones are read twice: blocks sum pieces of some channels, a small launch puts a group's pieces together in a fixed order,
// and a second pass applies what came out.
#include "../common/group_norm.h"
#include "../common/layout.h"
#include "group_norm.h"
#include "loss.h"

namespace fastvae {
namespace {

// A value for each channel.
struct Parameter {
  const void* data;
  DType dtype;
  float otherwise;  // without data
};

__device__ __forceinline__ float value_of(const Parameter& parameter, int64_t channel) {
  if (!parameter.data) return parameter.otherwise;
  switch (parameter.dtype) {
    case DType::float32:
      return static_cast<const float*>(parameter.data)[channel];
    case DType::bfloat16:
      return widen(static_cast<const BFloat16*>(parameter.data)[channel]);
    default:
      return widen(static_cast<const Half*>(parameter.data)[channel]);
  }
}

struct Groups {
  int64_t count;  // in a sample
  Divider width;
  int64_t elements;  // of one

  __device__ __forceinline__ int64_t of(int64_t sample, int64_t channel) const { return sample * count + quotient(width, channel); }
};

// Mean and 1 / standard deviation of each group.
struct Moments {
  const double *mean, *rstd;
};

// The mean, what the kernels' precision leaves of it, and 1 / standard deviation.
struct Statistics {
  double mean, centre, rstd;

  __device__ __forceinline__ Statistics(double mean, double rstd)
      : mean(mean), centre(static_cast<double>(static_cast<float>(mean))), rstd(rstd) {}
  __device__ __forceinline__ Statistics(const Moments& moments, int64_t group) : Statistics(moments.mean[group], moments.rstd[group]) {}
};

struct NormProblem {
  NormBlocks blocks;
  Groups groups;
  NormActivation activation;
  bool vector;  // every vector of every operand is aligned
  Parameter weight, bias;
  Moments moments;
  double eps;
  double *mean, *rstd;  // where the forward pass writes the moments
  double* pieces;       // of each channel in each piece, (sample, split, channel, 2): mean and squared deviations
  float* sums;          // likewise, (sample, split, 2, channel): of du, and of du * (x - centre)
  float* through;       // slope and constant of each group
};

template <class T>
struct NormParams : NormProblem {
  const T *input, *grad_output;
  T *output, *grad_input;
};

// Which part of a sample a block has.
struct BlockPlace {
  int64_t sample, tile, split;

  __device__ __forceinline__ explicit BlockPlace(const NormBlocks& b) {
    unsigned tiles = static_cast<unsigned>(b.tiles), splits = static_cast<unsigned>(b.splits), rest = blockIdx.x / tiles;
    tile = blockIdx.x - rest * tiles;
    split = rest % splits;
    sample = rest / splits;
  }
};

// The channels of a thread's vectors.
template <bool kLast>
constexpr int kChannels = kLast ? kVector : 1;

// Which of them element k of a vector belongs to.
template <bool kLast>
__device__ __forceinline__ constexpr int channel_of(int k) {
  return kLast ? k : 0;
}

// Over the threads of the block that share a channel; each gets the sum.
template <bool kLast, class T>
__device__ __forceinline__ T channel_sum(T value, int team) {
  return kLast ? sum_across(value, team, kThreads) : sum_across(value, 1, team);
}

template <int kCount>
using Held = float[kCount][kVector];

// Vectors that are aligned are whole.
template <int kCount, class T, bool kLast>
__device__ __forceinline__ void load_walk(const T* from, const Walk<kLast>& walk, bool vector, Held<kCount>& to) {
  Vector<T> raw[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) raw[j] = {};
  if (vector) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (walk.count(j) > 0) raw[j] = *reinterpret_cast<const Vector<T>*>(from + walk.element + j * walk.stride);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      for (int k = 0; k < kVector; ++k)
        if (k < walk.count(j)) raw[j].v[k] = from[walk.element + j * walk.stride + k];
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    for (int k = 0; k < kVector; ++k) to[j][k] = widen(raw[j].v[k]);
}

template <int kCount, class T, bool kLast>
__device__ __forceinline__ void store_walk(T* to, const Walk<kLast>& walk, bool vector, const Held<kCount>& from) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    int count = walk.count(j);
    store(to + walk.element + j * walk.stride, count, vector && count > 0, from[j]);
  }
}

// Calls f(j, k, channel) for each of a thread's elements.
template <int kCount, bool kLast, class F>
__device__ __forceinline__ void for_each_element(const Walk<kLast>& walk, F f) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    for (int k = 0; k < kVector; ++k)
      if (k < walk.count(j)) f(j, k, channel_of<kLast>(k));
}

// Of each channel in each piece the mean and the squared deviations from it. Sums are about the mean of the piece's first positions: of a
// piece n times as long, the subtraction of the squares costs log2(n) bits at most.
template <class T, bool kLast>
__global__ void __launch_bounds__(kThreads) moments_kernel(const __grid_constant__ NormParams<T> p) {
  constexpr int kCount = kChannels<kLast>;
  BlockPlace place(p.blocks);
  Walk<kLast> walk = walk_of<kLast>(p.blocks, place.sample, place.tile, place.split, threadIdx.x);
  int team = p.blocks.team;
  int64_t positions = least(p.blocks.piece, p.blocks.positions - place.split * p.blocks.piece);
  float pilot = static_cast<float>(least(positions, positions_at_once(team, kLast)));
  Held<kRuns> values;
  float shift[kCount] = {}, total[kCount] = {}, squares[kCount] = {};
  load_walk<kRuns>(p.input, walk, p.vector, values);
  for_each_element<kRuns>(walk, [&](int j, int k, int c) { shift[c] += values[j][k]; });
#pragma unroll
  for (int c = 0; c < kCount; ++c) shift[c] = channel_sum<kLast>(shift[c], team) / pilot;

  int64_t channel = walk.channel;
  int channels = walk.channels;
  for (; walk.rest > 0; walk.skip(kRuns)) {
    load_walk<kRuns>(p.input, walk, p.vector, values);
    for_each_element<kRuns>(walk, [&](int j, int k, int c) {
      float difference = values[j][k] - shift[c];
      total[c] += difference;
      squares[c] = fma(difference, difference, squares[c]);
    });
  }
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    double sum = channel_sum<kLast>(total[c], team), square = channel_sum<kLast>(squares[c], team);
    if (c >= channels || !leads<kLast>(p.blocks, threadIdx.x)) continue;
    double deviation = sum / static_cast<double>(positions), about_mean = square - deviation * sum;
    double* slot = p.pieces + ((place.sample * p.blocks.splits + place.split) * p.blocks.channels + channel + c) * 2;
    slot[0] = shift[c] + deviation;
    slot[1] = about_mean < 0.0 ? 0.0 : about_mean;
  }
}

// The pieces of a group's channels: index i is channel i % width of split i / width.
struct GroupPieces {
  int64_t sample, group, count;

  __device__ __forceinline__ explicit GroupPieces(const NormProblem& p) {
    unsigned groups = static_cast<unsigned>(p.groups.count);
    sample = blockIdx.x / groups;
    group = blockIdx.x - sample * groups;
    count = p.blocks.splits * p.groups.width.divisor;
  }

  struct Piece {
    int64_t split, channel;
  };

  __device__ __forceinline__ Piece piece(const NormProblem& p, int64_t i) const {
    int64_t split = quotient(p.groups.width, i);
    return {split, group * p.groups.width.divisor + i - split * p.groups.width.divisor};
  }
};

// Mean and 1 / standard deviation of a group from the moments of its pieces (Chan, Golub and LeVeque 1983).
__global__ void __launch_bounds__(kThreads) combine_moments_kernel(const __grid_constant__ NormProblem p) {
  GroupPieces pieces(p);
  auto slot = [&](int64_t i) {
    auto piece = pieces.piece(p, i);
    return p.pieces + ((pieces.sample * p.blocks.splits + piece.split) * p.blocks.channels + piece.channel) * 2;
  };
  auto size = [&](int64_t i) {
    int64_t begin = pieces.piece(p, i).split * p.blocks.piece;
    return static_cast<double>(least(p.blocks.piece, p.blocks.positions - begin));
  };
  double elements = static_cast<double>(most(p.groups.elements, 1));
  // About the first piece's mean, so that equal means leave no rounding.
  double shift = pieces.count > 0 ? *slot(0) : 0.0, total = 0.0, squares = 0.0;
  for (int64_t i = threadIdx.x; i < pieces.count; i += kThreads) total += size(i) * (slot(i)[0] - shift);
  double deviation = block_sum(total) / elements;
  for (int64_t i = threadIdx.x; i < pieces.count; i += kThreads) {
    double apart = (slot(i)[0] - shift) - deviation;
    squares += slot(i)[1] + size(i) * apart * apart;
  }
  squares = block_sum(squares);
  if (threadIdx.x != 0) return;
  p.mean[blockIdx.x] = shift + deviation;
  p.rstd[blockIdx.x] = 1.0 / ::sqrt(squares / elements + p.eps);
}

// What the kernels need of a channel.
struct Channel {
  float centre, scale, offset;
};

__device__ __forceinline__ Channel channel_at(const NormProblem& p, const Statistics& s, int64_t channel) {
  NormAffine affine = affine_of(s.mean, s.centre, s.rstd, value_of(p.weight, channel), value_of(p.bias, channel));
  return {static_cast<float>(affine.centre), static_cast<float>(affine.scale), static_cast<float>(affine.offset)};
}

template <bool kLast>
__device__ __forceinline__ void load_channels(const NormProblem& p, int64_t sample, const Walk<kLast>& walk,
                                              Channel (&to)[kChannels<kLast>]) {
#pragma unroll
  for (int c = 0; c < kChannels<kLast>; ++c) {
    to[c] = {};
    int64_t channel = walk.channel + c;
    if (c < walk.channels) to[c] = channel_at(p, Statistics(p.moments, p.groups.of(sample, channel)), channel);
  }
}

// From the input to the output, in place.
template <int kCount, bool kLast>
__device__ __forceinline__ void apply(NormActivation activation, const Channel (&channels)[kChannels<kLast>], Held<kCount>& values) {
  with_norm_activation(activation, [&](auto act) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      for (int k = 0; k < kVector; ++k) {
        const Channel& channel = channels[channel_of<kLast>(k)];
        values[j][k] = act.value(affine(values[j][k], channel.centre, channel.scale, channel.offset));
      }
  });
}

// From the incoming gradient to that of u, in place.
template <int kCount, bool kLast>
__device__ __forceinline__ void differentiate(NormActivation activation, const Channel (&channels)[kChannels<kLast>],
                                              const Held<kCount>& inputs, Held<kCount>& gradients) {
  with_norm_activation(activation, [&](auto act) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      for (int k = 0; k < kVector; ++k) {
        const Channel& channel = channels[channel_of<kLast>(k)];
        gradients[j][k] = act.gradient(affine(inputs[j][k], channel.centre, channel.scale, channel.offset), gradients[j][k]);
      }
  });
}

template <class T, bool kLast>
__global__ void __launch_bounds__(kThreads) normalise_kernel(const __grid_constant__ NormParams<T> p) {
  BlockPlace place(p.blocks);
  Walk<kLast> walk = walk_of<kLast>(p.blocks, place.sample, place.tile, place.split, threadIdx.x);
  Channel channels[kChannels<kLast>];
  load_channels(p, place.sample, walk, channels);
  for (; walk.rest > 0; walk.skip(kRuns)) {
    Held<kRuns> values;
    load_walk<kRuns>(p.input, walk, p.vector, values);
    apply<kRuns, kLast>(p.activation, channels, values);
    store_walk<kRuns>(p.output, walk, p.vector, values);
  }
}

// Statistics and output of a group that fits on chip.
template <class T, bool kLast>
__global__ void __launch_bounds__(kThreads) normalise_group_kernel(const __grid_constant__ NormParams<T> p) {
  BlockPlace place(p.blocks);
  Walk<kLast> walk = walk_of<kLast>(p.blocks, place.sample, place.tile, 0, threadIdx.x);
  Held<kHeldRuns> values;
  load_walk<kHeldRuns>(p.input, walk, p.vector, values);
  float size = static_cast<float>(p.groups.elements), total = 0.0f, rest = 0.0f, squares = 0.0f;
  for_each_element<kHeldRuns>(walk, [&](int j, int k, int) { total += values[j][k]; });
  float centre = block_sum(total) / size;
  // What rounding lost of the mean.
  for_each_element<kHeldRuns>(walk, [&](int j, int k, int) { rest += values[j][k] - centre; });
  rest = block_sum(rest) / size;
  for_each_element<kHeldRuns>(walk, [&](int j, int k, int) {
    float deviation = (values[j][k] - centre) - rest;
    squares = fma(deviation, deviation, squares);
  });
  squares = block_sum(squares);
  double mean = static_cast<double>(centre) + static_cast<double>(rest);
  double rstd = 1.0 / ::sqrt(static_cast<double>(squares) / static_cast<double>(p.groups.elements) + p.eps);
  if (threadIdx.x == 0) {
    p.mean[blockIdx.x] = mean;
    p.rstd[blockIdx.x] = rstd;
  }
  Statistics statistics(mean, rstd);
  Channel channels[kChannels<kLast>] = {};
#pragma unroll
  for (int c = 0; c < kChannels<kLast>; ++c)
    if (c < walk.channels) channels[c] = channel_at(p, statistics, walk.channel + c);
  apply<kHeldRuns, kLast>(p.activation, channels, values);
  store_walk<kHeldRuns>(p.output, walk, p.vector, values);
}

// A thread's sums for each of its channels: of du, and of du * (x - centre).
template <bool kLast>
struct GradientSums {
  float plain[kChannels<kLast>] = {}, weighted[kChannels<kLast>] = {};

  template <int kCount>
  __device__ __forceinline__ void add(const Walk<kLast>& walk, const Channel (&channels)[kChannels<kLast>], const Held<kCount>& inputs,
                                      const Held<kCount>& gradients) {
    for_each_element<kCount>(walk, [&](int j, int k, int c) {
      plain[c] += gradients[j][k];
      weighted[c] = fma(gradients[j][k], inputs[j][k] - channels[c].centre, weighted[c]);
    });
  }

  // Writes those of the block.
  __device__ __forceinline__ void write(const NormBlocks& b, const BlockPlace& place, const Walk<kLast>& walk, float* sums) const {
    float* slot = sums + (place.sample * b.splits + place.split) * 2 * b.channels + walk.channel;
#pragma unroll
    for (int c = 0; c < kChannels<kLast>; ++c) {
      float of_plain = channel_sum<kLast>(plain[c], b.team), of_weighted = channel_sum<kLast>(weighted[c], b.team);
      if (c >= walk.channels || !leads<kLast>(b, threadIdx.x)) continue;
      slot[c] = of_plain;
      slot[b.channels + c] = of_weighted;
    }
  }
};

template <class T, bool kLast>
__global__ void __launch_bounds__(kThreads) gradient_sums_kernel(const __grid_constant__ NormParams<T> p) {
  BlockPlace place(p.blocks);
  const Walk<kLast> start = walk_of<kLast>(p.blocks, place.sample, place.tile, place.split, threadIdx.x);
  Channel channels[kChannels<kLast>];
  load_channels(p, place.sample, start, channels);
  GradientSums<kLast> sums;
  for (Walk<kLast> walk = start; walk.rest > 0; walk.skip(kRuns)) {
    Held<kRuns> inputs, gradients;
    load_walk<kRuns>(p.input, walk, p.vector, inputs);
    load_walk<kRuns>(p.grad_output, walk, p.vector, gradients);
    differentiate<kRuns, kLast>(p.activation, channels, inputs, gradients);
    sums.add(walk, channels, inputs, gradients);
  }
  sums.write(p.blocks, place, start, p.sums);
}

// What comes through the statistics of a group.
__global__ void __launch_bounds__(kThreads) combine_gradients_kernel(const __grid_constant__ NormProblem p) {
  GroupPieces pieces(p);
  Statistics s(p.moments, blockIdx.x);
  double grad_sum = 0.0, projection = 0.0;
  for (int64_t i = threadIdx.x; i < pieces.count; i += kThreads) {
    auto piece = pieces.piece(p, i);
    const float* slot = p.sums + (pieces.sample * p.blocks.splits + piece.split) * 2 * p.blocks.channels + piece.channel;
    double weight = value_of(p.weight, piece.channel);
    grad_sum += weight * slot[0];
    projection += weight * sum_of_normal(s.mean, s.centre, s.rstd, slot[0], slot[p.blocks.channels]);
  }
  grad_sum = block_sum(grad_sum);
  projection = block_sum(projection);
  if (threadIdx.x != 0) return;
  NormThrough through = through_statistics(s.mean, s.centre, s.rstd, grad_sum, projection, static_cast<double>(p.groups.elements));
  p.through[2 * static_cast<int64_t>(blockIdx.x)] = static_cast<float>(through.slope);
  p.through[2 * static_cast<int64_t>(blockIdx.x) + 1] = static_cast<float>(through.constant);
}

struct ThroughChannel {
  float slope, constant;
};

// From the gradient at u to that of the input, in place.
template <int kCount, bool kLast>
__device__ __forceinline__ void gradients_of_input(const Channel (&channels)[kChannels<kLast>],
                                                   const ThroughChannel (&through)[kChannels<kLast>], const Held<kCount>& inputs,
                                                   Held<kCount>& gradients) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    for (int k = 0; k < kVector; ++k) {
      int c = channel_of<kLast>(k);
      gradients[j][k] =
          gradient_of_input(inputs[j][k], gradients[j][k], channels[c].centre, channels[c].scale, through[c].slope, through[c].constant);
    }
}

template <class T, bool kLast>
__global__ void __launch_bounds__(kThreads) propagate_kernel(const __grid_constant__ NormParams<T> p) {
  BlockPlace place(p.blocks);
  Walk<kLast> walk = walk_of<kLast>(p.blocks, place.sample, place.tile, place.split, threadIdx.x);
  Channel channels[kChannels<kLast>];
  load_channels(p, place.sample, walk, channels);
  ThroughChannel through[kChannels<kLast>] = {};
#pragma unroll
  for (int c = 0; c < kChannels<kLast>; ++c) {
    if (c >= walk.channels) continue;
    const float* from = p.through + 2 * p.groups.of(place.sample, walk.channel + c);
    through[c] = {from[0], from[1]};
  }
  for (; walk.rest > 0; walk.skip(kRuns)) {
    Held<kRuns> inputs, gradients;
    load_walk<kRuns>(p.input, walk, p.vector, inputs);
    load_walk<kRuns>(p.grad_output, walk, p.vector, gradients);
    differentiate<kRuns, kLast>(p.activation, channels, inputs, gradients);
    gradients_of_input<kRuns, kLast>(channels, through, inputs, gradients);
    store_walk<kRuns>(p.grad_input, walk, p.vector, gradients);
  }
}

// The whole backward pass of a group that fits on chip, but for the sums over the batch.
template <class T, bool kLast>
__global__ void __launch_bounds__(kThreads) propagate_group_kernel(const __grid_constant__ NormParams<T> p) {
  BlockPlace place(p.blocks);
  Walk<kLast> walk = walk_of<kLast>(p.blocks, place.sample, place.tile, 0, threadIdx.x);
  Held<kHeldRuns> inputs, gradients;
  load_walk<kHeldRuns>(p.input, walk, p.vector, inputs);
  load_walk<kHeldRuns>(p.grad_output, walk, p.vector, gradients);
  Statistics s(p.moments, blockIdx.x);
  Channel channels[kChannels<kLast>];
  load_channels(p, place.sample, walk, channels);
  differentiate<kHeldRuns, kLast>(p.activation, channels, inputs, gradients);
  GradientSums<kLast> sums;
  sums.add(walk, channels, inputs, gradients);
  sums.write(p.blocks, place, walk, p.sums);
  double grad_sum = 0.0, projection = 0.0;
#pragma unroll
  for (int c = 0; c < kChannels<kLast>; ++c) {
    if (c >= walk.channels) continue;
    double weight = value_of(p.weight, walk.channel + c);
    grad_sum += weight * sums.plain[c];
    projection += weight * sum_of_normal(s.mean, s.centre, s.rstd, sums.plain[c], sums.weighted[c]);
  }
  grad_sum = block_sum(grad_sum);
  projection = block_sum(projection);
  NormThrough through = through_statistics(s.mean, s.centre, s.rstd, grad_sum, projection, static_cast<double>(p.groups.elements));
  ThroughChannel of_channels[kChannels<kLast>];
#pragma unroll
  for (int c = 0; c < kChannels<kLast>; ++c) of_channels[c] = {static_cast<float>(through.slope), static_cast<float>(through.constant)};
  gradients_of_input<kHeldRuns, kLast>(channels, of_channels, inputs, gradients);
  store_walk<kHeldRuns>(p.grad_input, walk, p.vector, gradients);
}

struct ParameterGradientParams {
  const float* sums;
  Moments moments;
  Groups groups;
  int64_t channels;
  Divider splits, both;  // pieces of a sample; sums of a piece
  ColumnSums columns;
  Workspace workspace;
  Output grad_weight, grad_bias;
};

// The gradients of bias and weight: the sums over samples and pieces of both kinds of slots.
__global__ void __launch_bounds__(kThreads) parameter_gradients_kernel(const __grid_constant__ ParameterGradientParams p) {
  auto term = [&](int64_t i) {
    int64_t row = quotient(p.both, i), channel = i - row * p.both.divisor - p.channels;
    if (channel < 0) return p.sums[i];
    Statistics s(p.moments, p.groups.of(quotient(p.splits, row), channel));
    return static_cast<float>(sum_of_normal(s.mean, s.centre, s.rstd, p.sums[i - p.channels], p.sums[i]));
  };
  auto finish = [&](int64_t column, double total) {
    bool of_bias = column < p.channels;
    const Output& grad = of_bias ? p.grad_bias : p.grad_weight;
    if (grad.data) store_one(grad, of_bias ? column : column - p.channels, total);
  };
  sum_columns(p.columns, p.workspace, term, finish);
}

Tensor empty_in_layout(const Launch& launch, const Tensor& like, bool channels_last) {
  Sizes shape = shape_of(like);
  return launch.empty_strided(shape, strides_in_layout(shape, channels_last), like.scalar_type());
}

// The data of a tensor in this layout, copied where it has another.
template <class T>
const T* data_in_layout(const Launch& launch, const Tensor& tensor, bool channels_last, Copies& copies) {
  if (is_in_layout(tensor, channels_last)) return static_cast<const T*>(tensor.const_data_ptr());
  copies.push_back(empty_in_layout(launch, tensor, channels_last));
  torch::stable::copy_(copies.back(), tensor);
  return static_cast<const T*>(copies.back().const_data_ptr());
}

Parameter parameter(const OptionalTensor& tensor, float otherwise, Copies& copies) {
  if (!tensor) return {nullptr, DType::float32, otherwise};
  return {readable(*tensor, copies).const_data_ptr(), dtype_of(*tensor), otherwise};
}

const double* data_of_moments(const Tensor& tensor, Copies& copies) {
  return static_cast<const double*>(readable(tensor, copies).const_data_ptr());
}

struct Arguments {
  const Tensor& input;
  const OptionalTensor &weight, &bias;
  GroupedChannels sizes;
  NormActivation activation;

  int64_t groups() const { return sizes.batch * sizes.groups; }
  bool last() const { return sizes.channels_adjacent(); }
};

Groups groups_of(const GroupedChannels& sizes) { return {sizes.groups, divider(sizes.width()), sizes.group_elements()}; }

template <class T>
NormParams<T> problem(const Launch& launch, const Arguments& a, Copies& copies) {
  const GroupedChannels& sizes = a.sizes;
  NormParams<T> p{};
  p.blocks = blocks_of(sizes.batch, sizes.channels, sizes.positions, sizes.groups, a.last(), sizeof(T));
  p.groups = groups_of(sizes);
  p.activation = a.activation;
  p.input = data_in_layout<T>(launch, a.input, sizes.channels_last, copies);
  p.weight = parameter(a.weight, 1.0f, copies);
  p.bias = parameter(a.bias, 0.0f, copies);
  int64_t line = !a.last() ? sizes.positions : p.blocks.on_chip ? sizes.width() : sizes.channels;
  p.vector = line % kVector == 0 && is_aligned(p.input);
  return p;
}

// The kernels of a dtype and of a layout.
template <class T, bool kLast>
void normalise(const Launch& launch, const Arguments& a, NormParams<T>& p) {
  if (p.blocks.on_chip) return launch.run(normalise_group_kernel<T, kLast>, p.blocks.count(), 1, kThreads, p);
  Tensor pieces = launch.empty(Sizes{p.blocks.batch, p.blocks.splits, p.blocks.channels, 2}, ScalarType::Double);
  p.pieces = static_cast<double*>(pieces.mutable_data_ptr());
  launch.run(moments_kernel<T, kLast>, p.blocks.count(), 1, kThreads, p);
  launch.run<NormProblem>(combine_moments_kernel, a.groups(), 1, kThreads, p);
  launch.run(normalise_kernel<T, kLast>, p.blocks.count(), 1, kThreads, p);
}

template <class T, bool kLast>
void propagate(const Launch& launch, const Arguments& a, NormParams<T>& p) {
  if (p.blocks.on_chip) return launch.run(propagate_group_kernel<T, kLast>, p.blocks.count(), 1, kThreads, p);
  Tensor through = launch.empty(Sizes{a.groups(), 2}, ScalarType::Float);
  p.through = static_cast<float*>(through.mutable_data_ptr());
  launch.run(gradient_sums_kernel<T, kLast>, p.blocks.count(), 1, kThreads, p);
  launch.run<NormProblem>(combine_gradients_kernel, a.groups(), 1, kThreads, p);
  launch.run(propagate_kernel<T, kLast>, p.blocks.count(), 1, kThreads, p);
}

void parameter_gradients(Launch& launch, const NormProblem& p, const Tensor* grad_weight, const Tensor* grad_bias) {
  int64_t rows = p.blocks.batch * p.blocks.splits, columns = 2 * p.blocks.channels;
  ParameterGradientParams gradients{p.sums,
                                    p.moments,
                                    p.groups,
                                    p.blocks.channels,
                                    divider(p.blocks.splits),
                                    divider(columns),
                                    column_sums_of(rows, columns, 1),
                                    launch.workspace(),
                                    {},
                                    {}};
  if (grad_weight) gradients.grad_weight = output_of(*grad_weight);
  if (grad_bias) gradients.grad_bias = output_of(*grad_bias);
  launch.run(parameter_gradients_kernel, gradients.columns.groups, gradients.columns.splits, kThreads, gradients);
}

// Without elements the moments are those of nothing: 0 and 1 / sqrt(eps).
void moments_of_nothing(const Launch& launch, const Arguments& a, NormProblem& p) {
  p.groups = groups_of(a.sizes);
  if (a.groups() > 0) launch.run<NormProblem>(combine_moments_kernel, a.groups(), 1, kThreads, p);
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors group_norm_forward(const Tensor& input, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                                double eps, int64_t activation) {
  Arguments a{input, weight, bias, GroupedChannels(input, num_groups), static_cast<NormActivation>(activation)};
  Launch launch(input);
  Tensor output = empty_in_layout(launch, input, a.sizes.channels_last);
  Tensor mean = launch.empty({a.sizes.batch, num_groups}, ScalarType::Double), rstd = launch.empty(shape_of(mean), ScalarType::Double);
  dispatch(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    NormParams<T> p{};
    if (input.numel() > 0) p = problem<T>(launch, a, copies);
    p.eps = eps;
    p.output = static_cast<T*>(output.mutable_data_ptr());
    p.mean = static_cast<double*>(mean.mutable_data_ptr());
    p.rstd = static_cast<double*>(rstd.mutable_data_ptr());
    p.moments = {p.mean, p.rstd};
    if (input.numel() == 0) return moments_of_nothing(launch, a, p);
    a.last() ? normalise<T, true>(launch, a, p) : normalise<T, false>(launch, a, p);
  });
  return {output, mean, rstd};
}

Tensor empty_gradient(const Launch& launch, const OptionalTensor& parameter, const Tensor& input) {
  return parameter ? launch.empty(shape_of(*parameter), parameter->scalar_type()) : launch.empty({0}, input.scalar_type());
}

ThreeTensors group_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
                                 const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, int64_t activation) {
  Arguments a{input, weight, bias, GroupedChannels(input, num_groups), static_cast<NormActivation>(activation)};
  Launch launch(input);
  Tensor grad_input = empty_in_layout(launch, input, a.sizes.channels_last);
  Tensor grad_weight = empty_gradient(launch, weight, input), grad_bias = empty_gradient(launch, bias, input);
  if (input.numel() == 0) {
    launch.fill(grad_weight, 0);
    launch.fill(grad_bias, 0);
    return {grad_input, grad_weight, grad_bias};
  }
  dispatch(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::Type;
    Copies copies;
    NormParams<T> p = problem<T>(launch, a, copies);
    p.grad_output = data_in_layout<T>(launch, grad_output, a.sizes.channels_last, copies);
    p.vector = p.vector && is_aligned(p.grad_output);
    p.moments = {data_of_moments(mean, copies), data_of_moments(rstd, copies)};
    p.grad_input = static_cast<T*>(grad_input.mutable_data_ptr());
    Tensor sums = launch.empty(Sizes{p.blocks.batch, p.blocks.splits, 2, p.blocks.channels}, ScalarType::Float);
    p.sums = static_cast<float*>(sums.mutable_data_ptr());
    a.last() ? propagate<T, true>(launch, a, p) : propagate<T, false>(launch, a, p);
    if (weight || bias) parameter_gradients(launch, p, weight ? &grad_weight : nullptr, bias ? &grad_bias : nullptr);
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("group_norm_forward.cuda", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_backward.cuda", TORCH_BOX(&group_norm_backward));
}

}  // namespace fastvae
