// The host code that the CUDA operators of all families share, beside csrc/common/tensor.h: dispatch on dtypes, alignment, and the plan of
// a reduced loss.
#pragma once

#include "launch.h"

namespace fastvae {

template <class T>
struct TypeTag {
  using Type = T;
};

// Calls f(TypeTag<T>{}) with the storage type T of a dtype.
template <class F>
auto dispatch(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(TypeTag<float>{});
    case ScalarType::BFloat16:
      return f(TypeTag<BFloat16>{});
    case ScalarType::Half:
      return f(TypeTag<Half>{});
    default:
      STD_TORCH_CHECK(false, "fastvae: the CUDA kernels take float32, bfloat16 and float16");
  }
}

// Whether vector accesses may begin at this address.
template <class T>
bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Vector<T>) == 0;
}

// The data of a tensor of T, or of its contiguous copy, which `copies` owns.
template <class T>
const T* data_of(const Tensor& tensor, Copies& copies) {
  return static_cast<const T*>(readable(tensor, copies).const_data_ptr());
}

// The partition of a launch into chunks and the reduction of its losses.
struct LossPlan {
  Chunks chunks;
  LossSum sum;
  unsigned* ticket = nullptr;
};

// Plans a launch over `total` elements, of which the first `numel` have a loss that is reduced into `out`. More elements than losses occur
// where several samples of noise share one KL.
inline LossPlan plan_loss(Launch& launch, Reduction reduction, int64_t batch, int64_t numel, int64_t total, const Tensor& out) {
  bool rows = reduction == Reduction::sample && batch > 1;
  LossPlan plan;
  plan.chunks = chunks_of(total, rows ? kMaxRowBlocks : kMaxBlocks);
  if (reduction == Reduction::none) return plan;
  Workspace workspace = launch.workspace();
  plan.ticket = workspace.tickets;
  if (!rows) {
    plan.sum.all = {output_of(out), reduction_scale(reduction, batch, numel), workspace.slots};
    return plan;
  }
  plan.sum.rows = {divider(numel / batch), numel, plan.chunks.elements};
  plan.sum.row_out = static_cast<float*>(out.mutable_data_ptr());
  plan.sum.row_slots = workspace.slots;
  plan.sum.group = row_group(numel / batch);
  plan.sum.crossing_group = crossing_group(plan.sum.rows);
  return plan;
}

inline LossPlan plan_loss(Launch& launch, Reduction reduction, const Tensor& like, int64_t total, const Tensor& out) {
  return plan_loss(launch, reduction, batch_of(like), like.numel(), total, out);
}

}  // namespace fastvae
