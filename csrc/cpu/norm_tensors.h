// The tensors of the normalisation operators on the CPU, contiguous or channels-last.
#pragma once

#include "../common/layout.h"
#include "tensor.h"

namespace fastvae {

inline Tensor empty_in_layout(const Tensor& like, bool channels_last) {
  Sizes shape = shape_of(like);
  return cpu.empty_strided(shape, strides_in_layout(shape, channels_last), like.scalar_type());
}

// The tensor itself where it is in this layout, otherwise a copy that is.
inline Tensor in_layout(const Tensor& tensor, bool channels_last) {
  if (is_in_layout(tensor, channels_last)) return tensor;
  Tensor copy = empty_in_layout(tensor, channels_last);
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace fastvae
