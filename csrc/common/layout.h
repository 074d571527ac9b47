// The two memory layouts of a tensor (batch, channels, ...): contiguous, and channels-last, in which the channels of one position are
// adjacent.
#pragma once

#include "tensor.h"

namespace fastvae {

// The dimension that comes at `rank` in the order of channels-last memory, which is batch, positions, channels.
inline int64_t channels_last_dimension(int64_t rank, int64_t dimensions) { return rank == 0 ? 0 : (rank == dimensions - 1 ? 1 : rank + 1); }

inline Sizes strides_in_layout(const Sizes& shape, bool channels_last) {
  if (!channels_last) return contiguous_strides(shape);
  int64_t dimensions = static_cast<int64_t>(shape.size()), stride = 1;
  Sizes strides(shape.size());
  for (int64_t rank = dimensions - 1; rank >= 0; --rank) {
    int64_t d = channels_last_dimension(rank, dimensions);
    strides[d] = stride;
    stride *= shape[d];
  }
  return strides;
}

// Whether the tensor is channels-last and not contiguous. The strides of dimensions of size 1 do not matter.
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

// The sizes of a tensor whose channels are normalised in groups.
struct GroupedChannels {
  int64_t batch, channels, positions, groups;  // positions are the product of the spatial dimensions; groups are those of a sample
  bool channels_last;

  GroupedChannels(const Tensor& input, int64_t groups)
      : batch(input.size(0)), channels(input.size(1)), positions(1), groups(groups), channels_last(channels_are_last(input)) {
    for (int64_t d = 2; d < input.dim(); ++d) positions *= input.size(d);
  }

  int64_t width() const { return channels / groups; }  // channels of a group
  int64_t group_elements() const { return width() * positions; }
  // With one position the channels are adjacent in either layout.
  bool channels_adjacent() const { return channels_last || positions == 1; }
};

}  // namespace fastvae
