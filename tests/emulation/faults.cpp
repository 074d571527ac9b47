// Kernels and launches with one fault each, to show that the emulation finds it.
#include <torch/csrc/stable/accelerator.h>

#include "exports.h"

namespace {

struct FaultParams {
  float* memory;  // (2 * blocks,)
  unsigned* ticket;
};

void nothing(FaultParams) {}

// The last lane of a warp leaves before a shuffle that names it.
void exited_lane(FaultParams p) {
  if (threadIdx.x == 31) return;
  p.memory[0] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

void waits_apart(FaultParams) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncwarp();
  __syncthreads();
}

void reads_unwritten(FaultParams p) {
  __shared__ float value[64];
  if (threadIdx.x < 32) value[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) p.memory[0] = value[40];
}

// Each thread reads what its neighbour wrote, with `order` between.
template <void (*order)(), int kDistance>
void reads_neighbour(FaultParams p) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  order();
  float value = values[threadIdx.x ^ kDistance];
  __syncthreads();
  if (threadIdx.x == 0) p.memory[0] = value;
}

void no_order() {}
void warp_order() { __syncwarp(); }
void shuffle_order() { __shfl_xor_sync(0xffffffffu, 1.0f, 1); }
void block_order() { __syncthreads(); }

void writes_over(FaultParams p) { p.memory[0] = static_cast<float>(blockIdx.x); }

// The last block to arrive adds what the others stored; the fences on either side of the ticket may be left out, or be another thread's.
template <bool kBefore, bool kAfter, bool kOtherThread>
void adds_in_last_block(FaultParams p) {
  __shared__ bool last;
  p.memory[blockIdx.x * 64 + threadIdx.x] = 1.0f;
  if (kOtherThread) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kBefore) __threadfence();
    last = atomicAdd(p.ticket, 1u) == gridDim.x - 1;
    if (kAfter) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float total = 0.0f;
  for (unsigned i = threadIdx.x; i < 64 * gridDim.x; i += 64) total += __ldcg(p.memory + i);
  p.memory[threadIdx.x] = total;
}

using Kernel = void (*)(FaultParams);

cudaError_t run(Kernel kernel, dim3 grid, dim3 block, float* memory, void* stream) {
  memory[0] = 0.0f;
  static unsigned ticket;
  ticket = 0;
  FaultParams params{memory, &ticket};
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, grid, block, arguments, 0, stream);
}

}  // namespace

// Launches a kernel of the table and returns the code of the launch.
EXPORT int launch_kernel(const char* name, int blocks_x, int blocks_y, int threads, int on_default_stream, int with_guard) {
  static float memory[1024];
  struct Named {
    const char* name;
    Kernel kernel;
  };
  const Named table[] = {{"nothing", nothing},
                         {"exited lane", exited_lane},
                         {"waits apart", waits_apart},
                         {"reads unwritten", reads_unwritten},
                         {"no barrier", reads_neighbour<no_order, 1>},
                         {"shuffle for a barrier", reads_neighbour<shuffle_order, 1>},
                         {"barrier of the warp", reads_neighbour<warp_order, 1>},
                         {"barrier of the warp between warps", reads_neighbour<warp_order, 32>},
                         {"barrier of the block", reads_neighbour<block_order, 32>},
                         {"blocks write one address", writes_over},
                         {"both fences", adds_in_last_block<true, true, false>},
                         {"no fence before", adds_in_last_block<false, true, false>},
                         {"no fence after", adds_in_last_block<true, false, false>},
                         {"fences of each thread before", adds_in_last_block<false, true, true>}};
  for (const Named& entry : table) {
    if (strcmp(entry.name, name) != 0) continue;
    void* stream = nullptr;
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (with_guard) {
      guard.emplace(0);
      if (!on_default_stream) aoti_torch_get_current_cuda_stream(0, &stream);
    }
    return run(entry.kernel, dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y)), dim3(static_cast<unsigned>(threads)),
               memory, stream);
  }
  return -1;
}
