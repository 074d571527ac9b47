// The group norm kernels, compiled once per instruction set. Each walks over pieces and their rows; group_norm_rows.h has the loops over
// the columns. A piece is read as rows whose columns repeat the channels, so that one kernel serves both memory layouts and any number of
// channels.
//
// kernel           reads                                             writes
// moments          input                                             mean and squared deviations of each group of each slot
// forward          input, centre, scale, offset                      output
// gradient_sums    input, grad_output, centre, scale, offset         sums of du and of du * (x - centre) of each channel of each slot
// backward         the same, slope, intercept                        grad_input
// one of these two also writes the output where it is to be restored
#include <type_traits>

#include "../group_norm_kernels.h"
#include "group_norm_rows.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// A piece of a run: `offset` is its first element in the tensor, `length` the number of its elements.
struct Piece {
  int64_t run, slot, offset, length;
};

// Calls f(piece) for the pieces of an item: one piece of a long run, or several short runs.
template <class F>
FASTVAE_INLINE void for_pieces_of(const NormRuns& runs, int64_t item, F f) {
  int64_t first = item / runs.pieces_per_run * runs.runs_per_item, part = item % runs.pieces_per_run;
  int64_t end = first + runs.runs_per_item < runs.count ? first + runs.runs_per_item : runs.count;
  for (int64_t run = first; run < end; ++run)
    f(Piece{run, run * runs.pieces_per_run + part, run * runs.length + part * runs.piece, runs.piece_length(part)});
}

template <class F>
FASTVAE_INLINE void for_each_piece(const NormRuns& runs, int64_t begin_item, int64_t end_item, F f) {
  for (int64_t item = begin_item; item < end_item; ++item) for_pieces_of(runs, item, f);
}

// Begins with the last item, because the pieces that the pass before read last are still in the cache.
template <class F>
FASTVAE_INLINE void for_each_piece_backwards(const NormRuns& runs, int64_t begin_item, int64_t end_item, F f) {
  for (int64_t item = end_item - 1; item >= begin_item; --item) for_pieces_of(runs, item, f);
}

// The scratch buffer of one call: five arrays of one T for each column, and two of one double for each channel.
template <class T>
struct Scratch {
  static constexpr int kArrays = 5;
  T* column[kArrays];
  double* channel[2];

  Scratch(const NormRuns& runs, void* memory) {
    int64_t columns = columns_of(runs);
    channel[0] = static_cast<double*>(memory);
    channel[1] = channel[0] + runs.channels;
    T* start = reinterpret_cast<T*>(channel[1] + runs.channels);
    for (int i = 0; i < kArrays; ++i) column[i] = start + i * columns;
  }
};

int64_t scratch_bytes(const NormRuns& runs) {
  int64_t column = Scratch<double>::kArrays * columns_of(runs), channel = 2 * runs.channels;
  return (column + channel) * static_cast<int64_t>(sizeof(double));
}

// Sums the columns of each channel: to[c] is the sum of columns[i] over i = c (mod channels).
template <class T>
void sum_columns_by_channel(const T* columns, int64_t count, int64_t channels, double* to) {
  if (channels == 1) {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) total += columns[i];
    to[0] = total;
    return;
  }
  for (int64_t c = 0; c < channels; ++c) to[c] = 0;
  for (int64_t first = 0; first < count; first += channels)
    for (int64_t c = 0; c < channels; ++c) to[c] += columns[first + c];
}

// Fills the columns with the value of their channel, the inverse of sum_columns_by_channel().
template <class T>
void spread(const double* values, int64_t count, int64_t channels, T* columns) {
  if (channels == 1) {
    for (int64_t i = 0; i < count; ++i) columns[i] = narrowed<T>(values[0]);
    return;
  }
  for (int64_t first = 0; first < count; first += channels)
    for (int64_t c = 0; c < channels; ++c) columns[first + c] = narrowed<T>(values[c]);
}

// Replaces the value of every channel by the sum over its group, times a factor.
void sum_groups(double* channel, int64_t channels, int64_t groups, double factor) {
  int64_t width = channels / groups;
  for (int64_t first = 0; first < channels; first += width) {
    double total = 0;
    for (int64_t c = first; c < first + width; ++c) total += channel[c];
    for (int64_t c = first; c < first + width; ++c) channel[c] = total * factor;
  }
}

template <class T>
void clear(T* values, int64_t count) {
  memset(values, 0, static_cast<size_t>(count) * sizeof(T));
}

// Sums deviations from a shift, the mean of the first eighth of the piece, because sums of x and x * x would cancel where the mean is large
// beside the standard deviation. Whatever the data are, the shift lies within sqrt(8) standard deviations of the mean of the piece, so that
// subtracting the squares at the end costs three bits at most.
template <class S>
void moments(const GroupNorm& p, int64_t begin_item, int64_t end_item, void* memory) {
  using T = typename S::T;
  Scratch<T> scratch(p.runs, memory);
  T *shift = scratch.column[0], *column_sums = scratch.column[1], *column_squares = scratch.column[2];
  double *total = scratch.channel[0], *squares = scratch.channel[1];
  int64_t channels = p.runs.channels, full = columns_of(p.runs), width = channels / p.groups;
  for_each_piece(p.runs, begin_item, end_item, [&](const Piece& piece) {
    const auto* x = static_cast<const typename S::Stored*>(p.input) + piece.offset;
    int64_t columns = piece.length < full ? piece.length : full;
    int64_t shift_rows = (piece.length / columns + 7) / 8;
    clear(column_sums, columns);
    for_each_rows(shift_rows * columns, columns,
                  [&](auto rows, int64_t offset, int64_t count) { add_rows<S, rows.value>(x + offset, columns, count, column_sums); });
    sum_columns_by_channel(column_sums, columns, channels, total);
    sum_groups(total, channels, p.groups, 1.0 / static_cast<double>(shift_rows * columns / p.groups));
    spread(total, columns, channels, shift);

    clear(column_sums, columns);
    clear(column_squares, columns);
    for_each_rows(piece.length, columns, [&](auto rows, int64_t offset, int64_t count) {
      add_moments<S, rows.value>(x + offset, columns, count, shift, column_sums, column_squares);
    });
    double elements = static_cast<double>(piece.length / p.groups);
    sum_columns_by_channel(column_sums, columns, channels, total);
    sum_columns_by_channel(column_squares, columns, channels, squares);
    sum_groups(total, channels, p.groups, 1.0);
    sum_groups(squares, channels, p.groups, 1.0);
    for (int64_t g = 0; g < p.groups; ++g) {
      double mean_from_shift = total[g * width] / elements;
      double* to = p.sums + (piece.slot * p.groups + g) * 2;
      to[0] = static_cast<double>(shift[g * width]) + mean_from_shift;
      double squared_deviations = squares[g * width] - mean_from_shift * total[g * width];
      // Rounding can make the difference negative. The comparison keeps NaN.
      to[1] = squared_deviations < 0 ? 0 : squared_deviations;
    }
  });
}

// Fills the first `count` column arrays with the parameters of a run: centre, scale, offset, slope, intercept.
template <class T>
void spread_parameters(const GroupNorm& p, int64_t run, int64_t columns, int count, Scratch<T>& scratch) {
  const double* parameters[] = {p.channel.centre, p.channel.scale, p.channel.offset, p.channel.slope, p.channel.intercept};
  for (int i = 0; i < count; ++i) spread(parameters[i] + run * p.runs.channels, columns, p.runs.channels, scratch.column[i]);
}

template <class S, class A>
void forward(const GroupNorm& p, int64_t begin_item, int64_t end_item, void* memory) {
  Scratch<typename S::T> scratch(p.runs, memory);
  auto& column = scratch.column;
  int64_t full = columns_of(p.runs), columns = p.runs.length < full ? p.runs.length : full, filled_run = -1;
  for_each_piece_backwards(p.runs, begin_item, end_item, [&](const Piece& piece) {
    const auto* x = static_cast<const typename S::Stored*>(p.input) + piece.offset;
    auto* y = static_cast<typename S::Stored*>(p.output) + piece.offset;
    if (piece.run != filled_run) spread_parameters(p, piece.run, columns, 3, scratch);
    filled_run = piece.run;
    for_each_rows(piece.length, columns, [&](auto rows, int64_t offset, int64_t count) {
      forward_rows<S, A, rows.value>(x + offset, y + offset, columns, count, column[0], column[1], column[2]);
    });
  });
}

template <class S, class A, bool restores>
void gradient_sums(const GroupNorm& p, int64_t begin_item, int64_t end_item, void* memory) {
  Scratch<typename S::T> scratch(p.runs, memory);
  auto& column = scratch.column;
  int64_t channels = p.runs.channels, full = columns_of(p.runs), columns = p.runs.length < full ? p.runs.length : full, filled_run = -1;
  for_each_piece(p.runs, begin_item, end_item, [&](const Piece& piece) {
    const auto* x = static_cast<const typename S::Stored*>(p.input) + piece.offset;
    const auto* grad = static_cast<const typename S::Stored*>(p.grad_output) + piece.offset;
    auto* stored_du = static_cast<typename S::Stored*>(p.grad_input) + piece.offset;
    auto* restored = restores ? static_cast<typename S::Stored*>(p.restored) + piece.offset : nullptr;
    if (piece.run != filled_run) spread_parameters(p, piece.run, columns, 3, scratch);
    filled_run = piece.run;
    clear(column[3], columns);
    clear(column[4], columns);
    for_each_rows(piece.length, columns, [&](auto rows, int64_t offset, int64_t count) {
      add_gradients<S, A, restores, rows.value>(x + offset, grad + offset, stored_du + offset, restores ? restored + offset : nullptr,
                                                columns, count, column[0], column[1], column[2], column[3], column[4]);
    });
    sum_columns_by_channel(column[3], columns, channels, scratch.channel[0]);
    sum_columns_by_channel(column[4], columns, channels, scratch.channel[1]);
    double* to = p.sums + piece.slot * channels * 2;
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = scratch.channel[0][c];
      to[channels + c] = scratch.channel[1][c];
    }
  });
}

template <class S, class A, bool restores>
void backward(const GroupNorm& p, int64_t begin_item, int64_t end_item, void* memory) {
  Scratch<typename S::T> scratch(p.runs, memory);
  auto& column = scratch.column;
  int64_t full = columns_of(p.runs), columns = p.runs.length < full ? p.runs.length : full, filled_run = -1;
  for_each_piece_backwards(p.runs, begin_item, end_item, [&](const Piece& piece) {
    const auto* x = static_cast<const typename S::Stored*>(p.input) + piece.offset;
    const auto* grad = static_cast<const typename S::Stored*>(p.grad_output) + piece.offset;
    auto* out = static_cast<typename S::Stored*>(p.grad_input) + piece.offset;
    auto* restored = restores ? static_cast<typename S::Stored*>(p.restored) + piece.offset : nullptr;
    if (piece.run != filled_run) spread_parameters(p, piece.run, columns, 5, scratch);
    filled_run = piece.run;
    for_each_rows(piece.length, columns, [&](auto rows, int64_t offset, int64_t count) {
      backward_rows<S, A, restores, rows.value>(x + offset, grad + offset, out + offset, restores ? restored + offset : nullptr, columns,
                                                count, column[0], column[1], column[2], column[3], column[4]);
    });
  });
}

// Calls f with the storage type of the tensors.
template <class F>
void with_storage(const GroupNorm& p, F f) {
  record_run(Family::group_norm, kIsaName);
  with_storage_of(p.dtype, f);
}

// Calls f with the storage type and the activation, accurate for sums.
template <class F>
void with_types(const GroupNorm& p, F f) {
  with_storage(p, [&](auto storage) { with_norm_activation(p.activation, [&](auto activation) { f(storage, activation); }); });
}

// The same for results that are stored: the activation need not be more accurate than the storage type.
template <class F>
void with_stored_types(const GroupNorm& p, F f) {
  with_storage(p, [&](auto storage) {
    using Accuracy = typename decltype(storage)::Accuracy;
    with_norm_activation<Accuracy>(p.activation, [&](auto activation) { f(storage, activation); });
  });
}

void run_moments(const GroupNorm& p, int64_t begin, int64_t end, void* scratch) {
  with_storage(p, [&](auto s) { moments<decltype(s)>(p, begin, end, scratch); });
}

void run_forward(const GroupNorm& p, int64_t begin, int64_t end, void* scratch) {
  with_stored_types(p, [&](auto s, auto a) { forward<decltype(s), decltype(a)>(p, begin, end, scratch); });
}

// A storage type that keeps du has its output restored by the pass that computes it, another one by the last pass.
void run_gradient_sums(const GroupNorm& p, int64_t begin, int64_t end, void* scratch) {
  with_types(p, [&](auto s, auto a) {
    using S = decltype(s);
    p.restored ? gradient_sums<S, decltype(a), S::kKeepsGradient>(p, begin, end, scratch)
               : gradient_sums<S, decltype(a), false>(p, begin, end, scratch);
  });
}

// Where the storage type keeps du, the activation is behind it.
void run_backward(const GroupNorm& p, int64_t begin, int64_t end, void* scratch) {
  with_stored_types(p, [&](auto s, auto a) {
    using S = decltype(s);
    using Activation = std::conditional_t<S::kKeepsGradient, NormIdentity, decltype(a)>;
    p.restored ? backward<S, Activation, !S::kKeepsGradient>(p, begin, end, scratch)
               : backward<S, Activation, false>(p, begin, end, scratch);
  });
}

}  // namespace
}  // namespace FASTVAE_ISA

const GroupNormKernels FASTVAE_CONCAT(group_norm_kernels_, FASTVAE_ISA) = {
    scratch_bytes, run_moments, run_forward, run_gradient_sums, run_backward, parameter_to_double, parameter_from_double};

}  // namespace fastvae
