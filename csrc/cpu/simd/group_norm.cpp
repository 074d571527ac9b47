// Group normalisation with its activation, one instruction set a compilation. Every loop runs over columns whose channels repeat from row
// to row, so that one kernel serves both memory layouts and any number of channels.
#include "../group_norm.h"

#include "tiles.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

template <int number>
struct Number {
  static constexpr int value = number;
};

// What a loop over columns handles at once: the elements of a word, or of the words of several rows. No function takes or gives it by
// value: clang passes two floats as one vector, and a loop that holds such a vector is not vectorised.
template <class T, int count>
struct Values {
  T at[count];

  Values() = default;
  FASTVAE_MEMBER explicit Values(const T* from) {
#pragma GCC unroll 2
    for (int i = 0; i < count; ++i) at[i] = from[i];
  }
};

// A storage type, how many of its elements make a word, and how accurate the activation has to be for values that are stored in it; sums
// have them in full. Where it is the type of the arithmetic, du passes through grad_input and is not computed twice.
template <class Value>
struct Unchanged {
  using Accuracy = Accurate;
  static constexpr bool kKeepsGradient = true;
  static constexpr int kLanes = 1;
  using Stored = Value;
  using T = Value;
  FASTVAE_INLINE void get(const Stored* from, Number<1>, T* to) { *to = *from; }
  FASTVAE_INLINE void put(Stored* to, Number<1>, const T* from) { *to = *from; }
};

// Two to a word of 32 bits: where the vectors are as wide as the arithmetic's, no instruction has to move elements across them.
struct BFloat16 {
  using Accuracy = Coarse;
  static constexpr bool kKeepsGradient = false;
  static constexpr int kLanes = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 2 : 1;
  using Stored = uint16_t;
  using Word [[gnu::may_alias, gnu::aligned(sizeof(Stored))]] = uint32_t;
  using T = float;
  FASTVAE_INLINE void get(const Stored* from, Number<1>, T* to) { *to = bfloat16_to_float(*from); }
  FASTVAE_INLINE void get(const Stored* from, Number<2>, T* to) {
    uint32_t word = *reinterpret_cast<const Word*>(from);
    to[0] = bits_to_float(word << 16);
    to[1] = bits_to_float(word & 0xffff0000u);
  }
  FASTVAE_INLINE void put(Stored* to, Number<1>, const T* from) { *to = static_cast<Stored>(rounded(*from) >> 16); }
  FASTVAE_INLINE void put(Stored* to, Number<2>, const T* from) {
    *reinterpret_cast<Word*>(to) = (rounded(from[0]) >> 16) | (rounded(from[1]) & 0xffff0000u);
  }

 private:
  // To nearest in the upper half, ties away from zero: one result in 65536 is a tie. NaN need no test: those that get here end in 16 zeros
  // (the tensors' and, by spread(), the parameters').
  FASTVAE_INLINE uint32_t rounded(T value) { return float_to_bits(value) + 0x8000u; }
};

struct Float16 {
  using Accuracy = Accurate;
  static constexpr bool kKeepsGradient = false;
  static constexpr int kLanes = 1;
  using Stored = uint16_t;
  using T = float;
  FASTVAE_INLINE void get(const Stored* from, Number<1>, T* to) { *to = half_to_float(*from); }
  FASTVAE_INLINE void put(Stored* to, Number<1>, const T* from) { *to = float_to_half(*from); }
};

// A piece of a run.
struct Piece {
  int64_t run, slot, offset, length;
};

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

// From the last item: those that an earlier pass read last are still in the cache.
template <class F>
FASTVAE_INLINE void for_each_piece_from_the_end(const NormRuns& runs, int64_t begin_item, int64_t end_item, F f) {
  for (int64_t item = end_item - 1; item >= begin_item; --item) for_pieces_of(runs, item, f);
}

// Calls f(rows, offset, count) with a compile-time number of rows of `count` columns: fours of rows, single ones, and the rest of one.
constexpr int kRows = 4;

template <class F>
FASTVAE_INLINE void for_each_rows(int64_t length, int64_t columns, F f) {
  int64_t offset = 0;
  for (; offset + kRows * columns <= length; offset += kRows * columns) f(Number<kRows>{}, offset, columns);
  for (; offset + columns <= length; offset += columns) f(Number<1>{}, offset, columns);
  if (offset < length) f(Number<1>{}, offset, length - offset);
}

// Calls f(lanes, column) for the words of a row and for the element that is left over where their number is odd.
template <class S, class F>
FASTVAE_INLINE void for_each_word(int64_t count, F f) {
  int64_t words = count / S::kLanes;
#pragma omp simd
  for (int64_t i = 0; i < words; ++i) f(Number<S::kLanes>{}, i * S::kLanes);
  if (S::kLanes > 1 && count % S::kLanes != 0) f(Number<1>{}, count - 1);
}

template <class T, int lanes>
FASTVAE_INLINE void add_to_columns(T* to, const Values<T, lanes>& values) {
#pragma GCC unroll 2
  for (int l = 0; l < lanes; ++l) to[l] += values.at[l];
}

// A word of each row, one behind the other. All are loaded before one is stored: the compiler, which cannot tell apart what is read and
// what is written, may then interleave their arithmetic.
template <class S, int rows, int lanes>
FASTVAE_INLINE void load_rows(const typename S::Stored* from, int64_t stride, Number<lanes> number,
                              Values<typename S::T, rows * lanes>& values) {
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) S::get(from + r * stride, number, values.at + r * lanes);
}

template <class S, int rows, int lanes>
FASTVAE_INLINE void store_rows(typename S::Stored* to, int64_t stride, Number<lanes> number,
                               const Values<typename S::T, rows * lanes>& values) {
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) S::put(to + r * stride, number, values.at + r * lanes);
}

template <class S, int rows>
void add_rows(const typename S::Stored* __restrict x, int64_t stride, int64_t count, typename S::T* __restrict sums) {
  for_each_word<S>(count, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
    Values<typename S::T, lanes.value> total{};
    Values<typename S::T, rows * lanes.value> values;
    load_rows<S, rows>(x + i, stride, lanes, values);
#pragma GCC unroll 8
    for (int j = 0; j < rows * lanes.value; ++j) total.at[j % lanes.value] += values.at[j];
    add_to_columns(sums + i, total);
  });
}

template <class S, int rows>
void add_moments(const typename S::Stored* __restrict x, int64_t stride, int64_t count, const typename S::T* __restrict shift,
                 typename S::T* __restrict first, typename S::T* __restrict second) {
  using T = typename S::T;
  for_each_word<S>(count, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
    Values<T, lanes.value> total{}, squares{};
    Values<T, lanes.value> k(shift + i);
    Values<typename S::T, rows * lanes.value> values;
    load_rows<S, rows>(x + i, stride, lanes, values);
#pragma GCC unroll 8
    for (int j = 0; j < rows * lanes.value; ++j) {
      int l = j % lanes.value;
      T d = values.at[j] - k.at[l];
      total.at[l] += d;
      squares.at[l] = fma(d, d, squares.at[l]);
    }
    add_to_columns(first + i, total);
    add_to_columns(second + i, squares);
  });
}

template <class S, class A, int rows>
void forward_rows(const typename S::Stored* __restrict x, typename S::Stored* __restrict y, int64_t stride, int64_t count,
                  const typename S::T* __restrict centre, const typename S::T* __restrict scale, const typename S::T* __restrict offset) {
  for_each_word<S>(count, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
    Values<typename S::T, lanes.value> c(centre + i), a(scale + i), b(offset + i);
    Values<typename S::T, rows * lanes.value> values;
    load_rows<S, rows>(x + i, stride, lanes, values);
#pragma GCC unroll 8
    for (int j = 0; j < rows * lanes.value; ++j) {
      int l = j % lanes.value;
      values.at[j] = A::value(affine(values.at[j], c.at[l], a.at[l], b.at[l]));
    }
    store_rows<S, rows>(y + i, stride, lanes, values);
  });
}

template <class S, class A, int rows>
void add_gradients(const typename S::Stored* __restrict x, const typename S::Stored* __restrict grad, typename S::Stored* __restrict kept,
                   int64_t stride, int64_t count, const typename S::T* __restrict centre, const typename S::T* __restrict scale,
                   const typename S::T* __restrict offset, typename S::T* __restrict plain, typename S::T* __restrict weighted) {
  using T = typename S::T;
  for_each_word<S>(count, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
    Values<T, lanes.value> total{}, product{};
    Values<typename S::T, lanes.value> c(centre + i), a(scale + i), b(offset + i);
    Values<T, rows * lanes.value> values, gradients;
    load_rows<S, rows>(x + i, stride, lanes, values);
    load_rows<S, rows>(grad + i, stride, lanes, gradients);
#pragma GCC unroll 8
    for (int j = 0; j < rows * lanes.value; ++j) {
      int l = j % lanes.value;
      T du = A::gradient(affine(values.at[j], c.at[l], a.at[l], b.at[l]), gradients.at[j]);
      gradients.at[j] = du;
      total.at[l] += du;
      product.at[l] = fma(du, values.at[j] - c.at[l], product.at[l]);
    }
    if (S::kKeepsGradient) store_rows<S, rows>(kept + i, stride, lanes, gradients);
    add_to_columns(plain + i, total);
    add_to_columns(weighted + i, product);
  });
}

// Where the storage keeps it, out holds du and grad is not read.
template <class S, class A, int rows>
void backward_rows(const typename S::Stored* __restrict x, const typename S::Stored* __restrict grad, typename S::Stored* out,
                   int64_t stride, int64_t count, const typename S::T* __restrict centre, const typename S::T* __restrict scale,
                   const typename S::T* __restrict offset, const typename S::T* __restrict slope,
                   const typename S::T* __restrict constant) {
  using T = typename S::T;
  for_each_word<S>(count, [=](auto lanes, int64_t i) __attribute__((always_inline)) {
    Values<typename S::T, lanes.value> c(centre + i), a(scale + i), b(offset + i);
    Values<T, lanes.value> s(slope + i), k(constant + i);
    Values<T, rows * lanes.value> values, gradients;
    load_rows<S, rows>(x + i, stride, lanes, values);
    load_rows<S, rows>((S::kKeepsGradient ? out : grad) + i, stride, lanes, gradients);
#pragma GCC unroll 8
    for (int j = 0; j < rows * lanes.value; ++j) {
      int l = j % lanes.value;
      T value = values.at[j], g = gradients.at[j];
      T du = S::kKeepsGradient ? g : A::gradient(affine(value, c.at[l], a.at[l], b.at[l]), g);
      gradients.at[j] = gradient_of_input(value, du, c.at[l], a.at[l], s.at[l], k.at[l]);
    }
    store_rows<S, rows>(out + i, stride, lanes, gradients);
  });
}

// Scratch of one range of items: arrays of one T a column, and of one double a channel.
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

// Adds the columns of each channel.
template <class T>
void fold(const T* columns, int64_t count, int64_t channels, double* to) {
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

// A NaN is stored without a payload.
template <class T>
FASTVAE_INLINE T narrowed(double value) {
  return value == value ? static_cast<T>(value) : T(NAN);
}

template <class T>
void spread(const double* values, int64_t count, int64_t channels, T* columns) {
  if (channels == 1) {
    for (int64_t i = 0; i < count; ++i) columns[i] = narrowed<T>(values[0]);
    return;
  }
  for (int64_t first = 0; first < count; first += channels)
    for (int64_t c = 0; c < channels; ++c) columns[first + c] = narrowed<T>(values[c]);
}

// Writes into every channel the sum over its group, times a factor.
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

// Sums about a shift, the mean of the first eighth of the piece. It lies within sqrt(8) standard deviations of the mean of the piece
// whatever the data are, so that the subtraction of the squares costs three bits at most.
template <class S>
void moments(const GroupNorm& p, int64_t begin_item, int64_t end_item, void* memory) {
  using T = typename S::T;
  Scratch<T> scratch(p.runs, memory);
  T *shift = scratch.column[0], *first = scratch.column[1], *second = scratch.column[2];
  double *total = scratch.channel[0], *squares = scratch.channel[1];
  int64_t channels = p.runs.channels, full = columns_of(p.runs), width = channels / p.groups;
  for_each_piece(p.runs, begin_item, end_item, [&](const Piece& piece) {
    const auto* x = static_cast<const typename S::Stored*>(p.input) + piece.offset;
    int64_t columns = piece.length < full ? piece.length : full;
    int64_t pilot_rows = (piece.length / columns + 7) / 8;
    clear(first, columns);
    for_each_rows(pilot_rows * columns, columns,
                  [&](auto rows, int64_t offset, int64_t count) { add_rows<S, rows.value>(x + offset, columns, count, first); });
    fold(first, columns, channels, total);
    sum_groups(total, channels, p.groups, 1.0 / static_cast<double>(pilot_rows * columns / p.groups));
    spread(total, columns, channels, shift);

    clear(first, columns);
    clear(second, columns);
    for_each_rows(piece.length, columns, [&](auto rows, int64_t offset, int64_t count) {
      add_moments<S, rows.value>(x + offset, columns, count, shift, first, second);
    });
    double elements = static_cast<double>(piece.length / p.groups);
    fold(first, columns, channels, total);
    fold(second, columns, channels, squares);
    sum_groups(total, channels, p.groups, 1.0);
    sum_groups(squares, channels, p.groups, 1.0);
    for (int64_t g = 0; g < p.groups; ++g) {
      double deviation = total[g * width] / elements;
      double* to = p.sums + (piece.slot * p.groups + g) * 2;
      to[0] = static_cast<double>(shift[g * width]) + deviation;
      double about_mean = squares[g * width] - deviation * total[g * width];
      to[1] = about_mean < 0 ? 0 : about_mean;
    }
  });
}

// Fills the columns with the parameters of a run, `count` kinds of them.
template <class T>
void spread_parameters(const GroupNorm& p, int64_t run, int64_t columns, int count, Scratch<T>& scratch) {
  const double* kinds[] = {p.channel.centre, p.channel.scale, p.channel.offset, p.channel.slope, p.channel.constant};
  for (int i = 0; i < count; ++i) spread(kinds[i] + run * p.runs.channels, columns, p.runs.channels, scratch.column[i]);
}

template <class S, class A>
void forward(const GroupNorm& p, int64_t begin_item, int64_t end_item, void* memory) {
  Scratch<typename S::T> scratch(p.runs, memory);
  auto& column = scratch.column;
  int64_t full = columns_of(p.runs), columns = p.runs.length < full ? p.runs.length : full, filled = -1;
  for_each_piece_from_the_end(p.runs, begin_item, end_item, [&](const Piece& piece) {
    const auto* x = static_cast<const typename S::Stored*>(p.input) + piece.offset;
    auto* y = static_cast<typename S::Stored*>(p.output) + piece.offset;
    if (piece.run != filled) spread_parameters(p, piece.run, columns, 3, scratch);
    filled = piece.run;
    for_each_rows(piece.length, columns, [&](auto rows, int64_t offset, int64_t count) {
      forward_rows<S, A, rows.value>(x + offset, y + offset, columns, count, column[0], column[1], column[2]);
    });
  });
}

template <class S, class A>
void gradient_sums(const GroupNorm& p, int64_t begin_item, int64_t end_item, void* memory) {
  Scratch<typename S::T> scratch(p.runs, memory);
  auto& column = scratch.column;
  int64_t channels = p.runs.channels, full = columns_of(p.runs), columns = p.runs.length < full ? p.runs.length : full, filled = -1;
  for_each_piece(p.runs, begin_item, end_item, [&](const Piece& piece) {
    const auto* x = static_cast<const typename S::Stored*>(p.input) + piece.offset;
    const auto* grad = static_cast<const typename S::Stored*>(p.grad_output) + piece.offset;
    auto* kept = static_cast<typename S::Stored*>(p.grad_input) + piece.offset;
    if (piece.run != filled) spread_parameters(p, piece.run, columns, 3, scratch);
    filled = piece.run;
    clear(column[3], columns);
    clear(column[4], columns);
    for_each_rows(piece.length, columns, [&](auto rows, int64_t offset, int64_t count) {
      add_gradients<S, A, rows.value>(x + offset, grad + offset, kept + offset, columns, count, column[0], column[1], column[2], column[3],
                                      column[4]);
    });
    fold(column[3], columns, channels, scratch.channel[0]);
    fold(column[4], columns, channels, scratch.channel[1]);
    double* to = p.sums + piece.slot * channels * 2;
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = scratch.channel[0][c];
      to[channels + c] = scratch.channel[1][c];
    }
  });
}

template <class S, class A>
void backward(const GroupNorm& p, int64_t begin_item, int64_t end_item, void* memory) {
  Scratch<typename S::T> scratch(p.runs, memory);
  auto& column = scratch.column;
  int64_t full = columns_of(p.runs), columns = p.runs.length < full ? p.runs.length : full, filled = -1;
  for_each_piece_from_the_end(p.runs, begin_item, end_item, [&](const Piece& piece) {
    const auto* x = static_cast<const typename S::Stored*>(p.input) + piece.offset;
    const auto* grad = static_cast<const typename S::Stored*>(p.grad_output) + piece.offset;
    auto* out = static_cast<typename S::Stored*>(p.grad_input) + piece.offset;
    if (piece.run != filled) spread_parameters(p, piece.run, columns, 5, scratch);
    filled = piece.run;
    for_each_rows(piece.length, columns, [&](auto rows, int64_t offset, int64_t count) {
      backward_rows<S, A, rows.value>(x + offset, grad + offset, out + offset, columns, count, column[0], column[1], column[2], column[3],
                                      column[4]);
    });
  });
}

template <class F>
void with_storage(const GroupNorm& p, F f) {
  record_run(Family::group_norm, kIsaName);
  switch (p.dtype) {
    case DType::float32:
      return f(Unchanged<float>{});
    case DType::float64:
      return f(Unchanged<double>{});
    case DType::bfloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

template <class F>
void with_types(const GroupNorm& p, F f) {
  with_storage(p, [&](auto storage) { with_norm_activation(p.activation, [&](auto activation) { f(storage, activation); }); });
}

template <class F>
void with_types_stored(const GroupNorm& p, F f) {
  with_storage(p, [&](auto storage) {
    using Accuracy = typename decltype(storage)::Accuracy;
    with_norm_activation<Accuracy>(p.activation, [&](auto activation) { f(storage, activation); });
  });
}

void run_moments(const GroupNorm& p, int64_t begin, int64_t end, void* scratch) {
  with_storage(p, [&](auto s) { moments<decltype(s)>(p, begin, end, scratch); });
}

void run_forward(const GroupNorm& p, int64_t begin, int64_t end, void* scratch) {
  with_types_stored(p, [&](auto s, auto a) { forward<decltype(s), decltype(a)>(p, begin, end, scratch); });
}

void run_gradient_sums(const GroupNorm& p, int64_t begin, int64_t end, void* scratch) {
  with_types(p, [&](auto s, auto a) { gradient_sums<decltype(s), decltype(a)>(p, begin, end, scratch); });
}

void run_backward(const GroupNorm& p, int64_t begin, int64_t end, void* scratch) {
  with_types_stored(p, [&](auto s, auto a) { backward<decltype(s), decltype(a)>(p, begin, end, scratch); });
}

void to_double(const View& view, int64_t count, double* to) { convert(view.data, view.dtype, 0, count, to); }

void from_double(const double* from, int64_t count, const Output& to) {
  to.dtype == DType::float64 ? write(to, 0, count, from) : store(to, 0, count, from);
}

}  // namespace
}  // namespace FASTVAE_ISA

const GroupNormKernels FASTVAE_CONCAT(group_norm_kernels_, FASTVAE_ISA) = {scratch_bytes, run_moments, run_forward, run_gradient_sums,
                                                                           run_backward,  to_double,   from_double};

}  // namespace fastvae
