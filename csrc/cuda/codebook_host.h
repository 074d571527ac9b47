// The host code that codebook.cu and codebook_update.cu share: operands, and scratch memory.
#pragma once

#include "codebook_device.cuh"
#include "loss.h"

namespace fastvae {

inline int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The view of a tensor (heads, rows, dim), and whether its vectors are aligned.
inline CodebookView codebook_view_of(const Tensor& tensor, Copies& copies) {
  CodebookView view{codebook_rows_of(tensor, copies), false};
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(kVector * element_size(view.dtype)) == 0;
  view.aligned = aligned && view.dtype != DType::float64 && tensor.size(2) % kVector == 0 && view.head_stride % kVector == 0 &&
                 view.row_stride % kVector == 0;
  return view;
}

// Cuts scratch memory into arrays that are aligned to 16 bytes. Without memory it adds up their sizes.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    uintptr_t part = memory_ + used_;
    used_ += static_cast<uintptr_t>(ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16);
    return reinterpret_cast<T*>(part);
  }

  int64_t used() const { return static_cast<int64_t>(used_); }

 private:
  uintptr_t memory_, used_ = 0;
};

// Allocates memory for the arrays that lay_out(arena) takes. It calls lay_out twice: for the size, and with the memory.
template <class LayOut>
Tensor allocate_parts(const Launch& launch, LayOut lay_out) {
  Arena sizes(nullptr);
  lay_out(sizes);
  Tensor memory = launch.empty({sizes.used()}, ScalarType::Byte);
  Arena parts(memory.mutable_data_ptr());
  lay_out(parts);
  return memory;
}

// The operands of an operator: x (heads, rows, dim) and the codebook (heads, codes, dim).
struct CodebookOperands {
  Copies copies;
  CodebookView x, codebook;
  int64_t heads, rows, codes, dim;

  CodebookOperands(const Tensor& x_in, const Tensor& codebook_in)
      : x(codebook_view_of(x_in, copies)),
        codebook(codebook_view_of(codebook_in, copies)),
        heads(x_in.size(0)),
        rows(x_in.size(1)),
        codes(codebook_in.size(1)),
        dim(x_in.size(2)) {
    STD_TORCH_CHECK(codes <= int64_t{1} << 30, "codebook: got ", codes, " codes, takes at most 2^30");
  }
};

}  // namespace fastvae
