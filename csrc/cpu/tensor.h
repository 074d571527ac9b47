// The host part of the CPU operators, beside csrc/common/tensor.h: allocation, and the kernels' views of torch's stable tensors.
#pragma once

#include <cstring>

#include "../common/tensor.h"
#include "partition.h"
#include "poison.h"
#include "view.h"

namespace fastvae {

// The allocations of a CPU operator. New tensors are filled with NaN where set_poison(true) asks for it.
class Cpu : public Allocations<Cpu> {
 public:
  Tensor empty_strided(const Sizes& shape, const Sizes& strides, ScalarType dtype) const;
};

constexpr Cpu cpu{};

// A tensor without elements has no address, and memset takes none even for no bytes.
inline void set_bytes(const Tensor& tensor, int value) {
  if (tensor.numel() > 0) memset(tensor.mutable_data_ptr(), value, tensor.numel() * tensor.element_size());
}

inline View contiguous_view(const Tensor& tensor) {
  View view;
  view.data = tensor.const_data_ptr();
  view.dtype = dtype_of(tensor);
  view.inner = tensor.numel() > 0 ? tensor.numel() : 1;
  return view;
}

// The view of a tensor, or of its contiguous copy, which `copies` owns.
inline View dense_view(const Tensor& tensor, Copies& copies) { return contiguous_view(readable(tensor, copies)); }

// The view of rows of the first dimension. Rows that are not contiguous are copied.
inline View row_view(const Tensor& tensor, Copies& copies) {
  if (tensor.is_contiguous() || tensor.dim() < 2 || !has_contiguous_rows(tensor)) return dense_view(tensor, copies);
  int64_t rows = tensor.size(0), inner = tensor.numel() / rows;  // an empty tensor is contiguous
  // With rows of one element load() would take one element at a time.
  if (inner == 1) return dense_view(tensor, copies);
  View view = contiguous_view(tensor);
  view.inner = inner;
  view.period = rows;
  view.outer_stride = tensor.stride(0);
  return view;
}

// The view of an operand that broadcasts to `shape` over all but one run of adjacent dimensions, or over none.
inline View broadcast_view(const Tensor& tensor, const Sizes& shape, Copies& copies) {
  const Tensor& operand = readable(tensor, copies);
  View view = contiguous_view(operand);
  int64_t numel = 1, inner = broadcast_inner(operand, shape);
  for (int64_t size : shape) numel *= size;
  if (operand.numel() == numel) return view;
  view.period = operand.numel();
  view.inner = inner;
  view.outer_stride = 1;
  view.inner_stride = 0;
  if (inner == 1) {  // the operand has the last dimensions: it is a row that repeats
    view.inner = operand.numel();
    view.period = 1;
    view.outer_stride = 0;
    view.inner_stride = 1;
  }
  return view;
}

// The view of the grad_output of a loss, expanded from its reduced shape to one value for each element.
inline View gradient_view(const Tensor& grad_output, Reduction reduction, int64_t numel, int64_t batch, Copies& copies) {
  View view = dense_view(grad_output, copies);
  if (reduction == Reduction::none) return view;
  int64_t rows = reduction == Reduction::sample ? batch : 1;
  view.inner = numel > rows && rows > 0 ? numel / rows : 1;
  view.period = rows > 0 ? rows : 1;
  view.outer_stride = 1;
  view.inner_stride = 0;
  return view;
}

// The partition for a loss over elements of the shape of a tensor: one row for each sum.
inline Partition partition_of(const Tensor& tensor, Reduction reduction) {
  int64_t batch = batch_of(tensor), numel = tensor.numel();
  if (reduction == Reduction::sample) return Partition(batch, batch > 0 ? numel / batch : 0);
  return Partition(1, numel);
}

// Writes the result of a reduced loss: for each row of the partition the sum of its slots, added in their order, times `scale`.
void finish_reduction(const std::vector<double>& slots, const Partition& partition, double scale, const Tensor& out);

}  // namespace fastvae
