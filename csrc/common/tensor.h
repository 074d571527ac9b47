// The part of an operator that runs on the host, as the CPU and the CUDA backend share it: dtypes and shapes of torch's stable tensors,
// views of operands or contiguous copies of them, and the allocation of results.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "codebook_rows.h"
#include "dtype.h"
#include "reduction.h"

namespace fastvae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Byte:
      return DType::uint8;
    case ScalarType::Bool:
      return DType::boolean;
    default:
      STD_TORCH_CHECK(false, "fastvae: a dtype that no kernel takes");
  }
}

inline int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      STD_TORCH_CHECK(false, "fastvae: a dtype that no kernel gives");
  }
}

// The dtype of sums over the elements of a tensor.
inline ScalarType accumulation_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Sizes shape_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

inline int64_t batch_of(const Tensor& tensor) { return tensor.dim() > 0 ? tensor.size(0) : 1; }

inline Output output_of(const Tensor& tensor) { return {tensor.mutable_data_ptr(), dtype_of(tensor)}; }

// Raises the error of an allocation of so many bytes that failed. The stable ABI reports a failure without its reason, so each backend says
// what it knows of it.
[[noreturn]] void raise_failed_allocation(int64_t bytes);

// This calls the C shim, which takes a fourth of the time of the dispatcher's aten::empty.
inline Tensor allocate_strided(const Sizes& shape, const Sizes& strides, ScalarType dtype, int32_t device_type, int32_t device_index) {
  AtenTensorHandle handle = nullptr;
  AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), shim_dtype(dtype),
                                                  device_type, device_index, &handle);
  if (error != AOTI_TORCH_SUCCESS) {
    int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(shim_dtype(dtype)));
    for (int64_t size : shape) bytes *= size;
    raise_failed_allocation(bytes);
  }
  return Tensor(handle);
}

inline Sizes contiguous_strides(const Sizes& shape) {
  Sizes strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= shape[d] > 0 ? shape[d] : 1;
  }
  return strides;
}

// A contiguous copy in a dtype. torch::stable::contiguous() and to() would allocate it themselves and lose the reason of a failure.
inline Tensor contiguous_copy(const Tensor& tensor, ScalarType dtype) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  Sizes shape = shape_of(tensor);
  Tensor copy = allocate_strided(shape, contiguous_strides(shape), dtype, device_type, tensor.get_device_index());
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The tensor itself where it is contiguous, otherwise a contiguous copy.
inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : contiguous_copy(tensor, tensor.scalar_type()); }

// Owns the copies of operands until their kernels have run, or on a GPU have been launched.
using Copies = std::vector<Tensor>;

// dense(), owned by `copies`. The reference stays valid only while `copies` does not grow beyond its capacity.
inline const Tensor& readable(const Tensor& tensor, Copies& copies) { return copies.emplace_back(dense(tensor)); }

// Whether the elements of each row are contiguous, where a row is what the dimensions after the first make up. The distance from one row to
// the next, stride(0), may be any: the halves of h.chunk(2, 1) and a prior that is expanded over the batch are read in place.
inline bool has_contiguous_rows(const Tensor& tensor) {
  int64_t inner = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != inner) return false;
    inner *= tensor.size(d);
  }
  return tensor.dim() > 0;
}

// The tensor itself where the elements of its last dimension are contiguous, otherwise a contiguous copy; `copies` owns it.
inline const Tensor& with_contiguous_vectors(const Tensor& tensor, Copies& copies) {
  int64_t last = tensor.dim() - 1;
  return copies.emplace_back(tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : contiguous_copy(tensor, tensor.scalar_type()));
}

// The view of a tensor (heads, rows, dim).
inline CodebookRows codebook_rows_of(const Tensor& tensor, Copies& copies) {
  const Tensor& vectors = with_contiguous_vectors(tensor, copies);
  return {vectors.const_data_ptr(), dtype_of(vectors), vectors.stride(0), vectors.stride(1)};
}

// The number of adjacent elements of `shape` that read one value of an operand that broadcasts to it: element e reads value
// (e / inner) % numel of the operand. The dimensions in which it is not broadcast have to be adjacent, which the public functions check.
inline int64_t broadcast_inner(const Tensor& operand, const Sizes& shape) {
  int64_t inner = 1;
  for (int64_t d = static_cast<int64_t>(shape.size()) - 1; d >= 0 && operand.size(d) == 1; --d) inner *= shape[d];
  return inner;
}

// The shape of a loss over elements of the shape of `like`: that shape, (batch,) or a scalar.
inline Sizes reduced_shape(const Tensor& like, int64_t batch, Reduction reduction) {
  if (reduction == Reduction::none) return shape_of(like);
  return reduction == Reduction::sample && like.dim() > 0 ? Sizes{batch} : Sizes{};
}

// The allocations of an operator in terms of one function of the device, empty_strided(shape, strides, dtype).
template <class Device>
class Allocations {
 public:
  Tensor empty(const Sizes& shape, ScalarType dtype) const { return device().empty_strided(shape, contiguous_strides(shape), dtype); }

  // A tensor like `like`, or one without elements where it is not requested.
  Tensor empty_if(bool requested, const Tensor& like) const { return empty(requested ? shape_of(like) : Sizes{0}, like.scalar_type()); }

  // The result of a loss over elements of the shape of `like`, in its dtype or, where it is reduced, in the dtype of sums.
  Tensor empty_reduced(const Tensor& like, int64_t batch, Reduction reduction) const {
    return empty(reduced_shape(like, batch, reduction), reduction == Reduction::none ? like.scalar_type() : accumulation_dtype(like));
  }
  Tensor empty_reduced(const Tensor& like, Reduction reduction) const { return empty_reduced(like, batch_of(like), reduction); }

 private:
  const Device& device() const { return static_cast<const Device&>(*this); }
};

}  // namespace fastvae
