// The host's side of a reduced loss, for every family.
#pragma once

#include "../common/reduction.h"
#include "launch.h"

namespace fastvae {

template <class T>
struct TypeTag {
  using Type = T;
};

// f(TypeTag<T>) for the storage type of a dtype.
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

template <class T>
bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Vector<T>) == 0;
}

// Copies of tensors that no kernel reads as they are, alive as long as the launch.
using Copies = std::vector<Tensor>;

inline const Tensor& readable(const Tensor& tensor, Copies& copies) { return copies.emplace_back(dense(tensor)); }

inline Output output_of(const Tensor& tensor) { return {tensor.mutable_data_ptr(), dtype_of(tensor)}; }

inline Tensor empty_reduced(const Launch& launch, const Tensor& like, int64_t batch, Reduction reduction) {
  if (reduction == Reduction::none) return launch.empty(shape_of(like), like.scalar_type());
  std::vector<int64_t> shape;
  if (reduction == Reduction::sample && like.dim() > 0) shape.push_back(batch);
  return launch.empty(shape, ScalarType::Float);
}

inline Tensor empty_reduced(const Launch& launch, const Tensor& like, Reduction reduction) {
  return empty_reduced(launch, like, batch_of(like), reduction);
}

struct LossPlan {
  Chunks chunks;
  LossSum sum;
  unsigned* ticket = nullptr;
};

// How `total` elements, of which the first `numel` have a loss, are cut and their losses reduced into `out`.
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
