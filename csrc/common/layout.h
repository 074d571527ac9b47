// The memory layouts of (batch, channels, ...): contiguous, and with the channels last.
#pragma once

#include "tensor.h"

namespace fastvae {

// The dimensions in the order of memory with the channels last: batch, positions, channels.
inline int64_t channels_last_dimension(int64_t place, int64_t dimensions) {
  return place == 0 ? 0 : (place == dimensions - 1 ? 1 : place + 1);
}

inline Sizes strides_in_layout(const Sizes& shape, bool channels_last) {
  if (!channels_last) return contiguous_strides(shape);
  int64_t dimensions = static_cast<int64_t>(shape.size()), stride = 1;
  Sizes strides(shape.size());
  for (int64_t place = dimensions - 1; place >= 0; --place) {
    int64_t d = channels_last_dimension(place, dimensions);
    strides[d] = stride;
    stride *= shape[d];
  }
  return strides;
}

inline bool channels_are_last(const Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  Sizes strides = strides_in_layout(shape_of(tensor), true);
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != 1 && tensor.stride(d) != strides[d]) return false;
  return true;
}

inline bool is_in_layout(const Tensor& tensor, bool channels_last) {
  return channels_last ? channels_are_last(tensor) : tensor.is_contiguous();
}

// A tensor whose channels are normalised in groups.
struct GroupedChannels {
  int64_t batch, channels, positions, groups;
  bool channels_last;

  GroupedChannels(const Tensor& input, int64_t groups)
      : batch(input.size(0)), channels(input.size(1)), positions(1), groups(groups), channels_last(channels_are_last(input)) {
    for (int64_t d = 2; d < input.dim(); ++d) positions *= input.size(d);
  }

  int64_t width() const { return channels / groups; }
  int64_t group_elements() const { return width() * positions; }
  // One position: the channels lie side by side in either layout.
  bool channels_adjacent() const { return channels_last || positions == 1; }
};

}  // namespace fastvae
