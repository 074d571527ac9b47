// Between torch's stable tensors and the kernels' views.
#pragma once

#include "../common/reduction.h"
#include "../common/tensor.h"
#include "partition.h"
#include "poison.h"
#include "view.h"

namespace fastvae {

// A CPU tensor, filled with NaN where set_poison(true) asks for it.
Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype);
Tensor empty_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype);

inline Tensor empty_reduced(const Tensor& like, Reduction reduction) {
  if (reduction == Reduction::none) return empty(shape_of(like), like.scalar_type());
  std::vector<int64_t> shape;
  if (reduction == Reduction::sample && like.dim() > 0) shape.push_back(like.size(0));
  return empty(shape, accumulation_dtype(like));
}

inline Output output_of(const Tensor& tensor) { return {tensor.mutable_data_ptr(), dtype_of(tensor)}; }

inline View contiguous_view(const Tensor& tensor) {
  View view;
  view.data = tensor.const_data_ptr();
  view.dtype = dtype_of(tensor);
  view.inner = tensor.numel() > 0 ? tensor.numel() : 1;
  return view;
}

// Rows of the first dimension with any stride between them (h.chunk(2, 1), an expanded prior), each contiguous; else a contiguous copy,
// which `keep` owns.
inline View row_view(const Tensor& tensor, Tensor& keep) {
  if (!tensor.is_contiguous() && tensor.dim() > 1) {
    int64_t inner = 1;
    bool dense = true;
    for (int64_t d = tensor.dim() - 1; d > 0; --d) {
      dense = dense && (tensor.size(d) == 1 || tensor.stride(d) == inner);
      inner *= tensor.size(d);
    }
    if (dense && inner > 1) {
      View view = contiguous_view(tensor);
      view.inner = inner;
      view.period = tensor.size(0);
      view.outer_stride = tensor.stride(0);
      return view;
    }
  }
  keep = dense(tensor);
  return contiguous_view(keep);
}

// A tensor that broadcasts to `shape` over all but one run of dimensions, or over none.
inline View broadcast_view(const Tensor& tensor, const std::vector<int64_t>& shape, Tensor& keep) {
  keep = dense(tensor);
  View view = contiguous_view(keep);
  int64_t numel = 1, inner = 1;
  for (int64_t size : shape) numel *= size;
  if (keep.numel() == numel) return view;
  for (int64_t d = static_cast<int64_t>(shape.size()) - 1; d >= 0 && keep.size(d) == 1; --d) inner *= shape[d];
  view.period = keep.numel();
  view.inner = inner;
  view.outer_stride = 1;
  view.inner_stride = 0;
  if (inner == 1) {  // the last dimensions: rows that repeat
    view.inner = keep.numel();
    view.period = 1;
    view.outer_stride = 0;
    view.inner_stride = 1;
  }
  return view;
}

// The incoming gradient of a reduced loss, spread over the elements.
inline View gradient_view(const Tensor& grad, Reduction reduction, int64_t numel, int64_t batch, Tensor& keep) {
  keep = dense(grad);
  View view = contiguous_view(keep);
  if (reduction == Reduction::none) return view;
  int64_t rows = reduction == Reduction::sample ? batch : 1;
  view.inner = numel > rows && rows > 0 ? numel / rows : 1;
  view.period = rows > 0 ? rows : 1;
  view.outer_stride = 1;
  view.inner_stride = 0;
  return view;
}

inline Partition partition_of(const Tensor& tensor, Reduction reduction) {
  int64_t batch = batch_of(tensor), numel = tensor.numel();
  if (reduction == Reduction::sample) return Partition(batch, batch > 0 ? numel / batch : 0);
  return Partition(1, numel);
}

// Writes the result of a reduced loss from its slots, in their order.
void finish_reduction(const std::vector<double>& slots, const Partition& partition, double scale, const Tensor& out);

}  // namespace fastvae
