// An operator's access to its GPU: the device and stream of a tensor, allocation, launches, and the scratch memory for sums.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/tensor.h"
#include "reduce.cuh"

namespace fastvae {

// Raises the error of a call of the CUDA runtime; `what` names what was under way.
[[noreturn]] void raise_cuda_error(cudaError_t status, const char* what);

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) raise_cuda_error(status, what);
}

// A launch needs slots for one of four things: two scalar sums (one slot a block each), the sums of rows (two slots a block), the sums of
// columns (kWarp slots a block), or the sums over samples of noise (kSampleSlots a block).
constexpr int kSlots =
    static_cast<int>(max64(max64(2 * max64(kMaxBlocks, kMaxRowBlocks), kMaxColumnBlocks* kWarp), kMaxSampleBlocks* kSampleSlots));
// The sums of columns take one ticket for each group of columns, and those over samples one for each tile.
constexpr int kTickets = static_cast<int>(max64(kMaxColumnBlocks, kMaxSampleBlocks));

// The workspace of a stream; launches on one stream follow each other, so they share it. Where no persistent workspace is available, this
// allocates one, which `owner` then owns.
Workspace workspace_of(int32_t device, cudaStream_t stream, Tensor* owner);

// Makes the device of a tensor the current one for as long as an operator runs, and launches on the current stream of that device.
class Launch : public Allocations<Launch> {
 public:
  explicit Launch(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_), workspace_owner_(tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  Tensor empty_strided(const Sizes& shape, const Sizes& strides, ScalarType dtype) const {
    return allocate_strided(shape, strides, dtype, aoti_torch_device_type_cuda(), device_);
  }

  // The scratch memory that all launches of the operator share, because they follow each other on one stream. It is taken once: a second
  // temporary workspace would free the first, to which a kernel may hold pointers.
  Workspace workspace() {
    if (!workspace_.slots) workspace_ = workspace_of(device_, stream_, &workspace_owner_);
    return workspace_;
  }

  // Sets every byte of a contiguous tensor.
  void fill(const Tensor& tensor, int byte) const {
    size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
    if (bytes > 0) check_cuda(cudaMemsetAsync(tensor.mutable_data_ptr(), byte, bytes, stream_), "filling a tensor");
  }

  int32_t device() const { return device_; }

  // Launches a kernel, whose only parameter is a struct, on a grid (blocks_x, blocks_y). Each block gets `shared_bytes` of dynamic shared
  // memory.
  template <class Params>
  void run(void (*kernel)(Params), int64_t blocks_x, int64_t blocks_y, int threads, const Params& params, int64_t shared_bytes = 0) const {
    dim3 grid(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
    void* arguments[] = {const_cast<Params*>(&params)};
    check_cuda(cudaLaunchKernel(kernel, grid, dim3(threads), arguments, static_cast<size_t>(shared_bytes), stream_), "launching a kernel");
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor workspace_owner_;                 // owns the workspace where that is not persistent
  Workspace workspace_{nullptr, nullptr};  // without slots until an operator asks for it
  cudaStream_t stream_ = nullptr;
};

}  // namespace fastvae
