// This emulates as much of CUDA on the CPU as csrc/cuda/ uses. Every thread of a block is a fiber, blocks run one after the other, and both
// are scheduled in a shuffled order. A barrier that part of a warp or of a block never reaches ends the process, and so does a vector
// access that is not aligned.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

// The operators register themselves for CPU tensors, and the device guard does nothing.
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_create_device_guard emulated_create_device_guard
#define aoti_torch_delete_device_guard emulated_delete_device_guard
// Allocations are filled with NaN, so that an element that no kernel writes shows in a result.
#define aoti_torch_empty_strided emulated_empty_strided
#include <torch/csrc/stable/library.h>
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)

// The dynamic shared memory of a block.
#define FASTVAE_DYNAMIC_SHARED(name) unsigned char* name = emulation::dynamic_shared()

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation: %s\n", what);
  abort();
}

enum class State { ready, at_warp_barrier, at_block_barrier, done };

// One thread of a block.
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  dim3 index;         // threadIdx
  uint64_t exchange;  // the value that this thread offers in a shuffle
};

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 1 << 17;

// The state of the launch that runs.
struct Machine {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  std::function<void()> kernel;
  std::mt19937 random{2026};
  unsigned paused_warps = 0;  // one bit for each warp
  dim3 block_index, block_size, grid_size;
  std::unique_ptr<std::max_align_t[]> shared;  // as many bytes as the launch asks for, rounded up
};
inline Machine machine;

inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(machine.shared.get()); }

// Suspends the running thread in this state until the scheduler sets it to ready again.
inline void wait(State state) {
  Fiber* self = machine.running;
  self->state = state;
  swapcontext(&self->context, &machine.scheduler);
}

inline void fiber_main() {
  machine.kernel();
  machine.running->state = State::done;
  // Returning continues at uc_link, which is the scheduler.
}

// Releases the threads [begin, end) from a barrier if all of them that still run have reached it. Returns whether it released any.
inline bool release(unsigned begin, unsigned end, State barrier) {
  bool waiting = false;
  for (unsigned i = begin; i < end; ++i) {
    State state = machine.fibers[i].state;
    if (state == State::done) continue;
    if (state != barrier) return false;
    waiting = true;
  }
  for (unsigned i = begin; i < end; ++i)
    if (machine.fibers[i].state == barrier) machine.fibers[i].state = State::ready;
  return waiting;
}

inline std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

// Runs all threads of the current block to their end.
inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.state = State::ready;
    fiber.index = dim3(i);
    getcontext(&fiber.context);
    fiber.stack.resize(kStackBytes);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &machine.scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (;;) {
    bool progress = false, finished = true;
    // Some warps pause for many rounds, so that the others run ahead of them as far as barriers let them.
    if (machine.random() % 16 == 0) machine.paused_warps = machine.random();
    for (unsigned i : shuffled(threads)) {
      Fiber& fiber = machine.fibers[i];
      if (fiber.state == State::ready) {
        progress = true;
        if (!(machine.paused_warps >> (i / kWarpSize) & 1)) {
          machine.running = &fiber;
          swapcontext(&machine.scheduler, &fiber.context);
        }
      }
      finished = finished && fiber.state == State::done;
    }
    if (finished) return;
    for (unsigned warp = 0; warp < threads; warp += kWarpSize)
      progress = release(warp, std::min(warp + kWarpSize, threads), State::at_warp_barrier) || progress;
    progress = release(0, threads, State::at_block_barrier) || progress;
    if (!progress) fail("threads wait at different barriers");
  }
}

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  machine.kernel = std::move(kernel);
  machine.block_size = block;
  machine.grid_size = grid;
  if (machine.fibers.size() < block.x) machine.fibers.resize(block.x);
  for (unsigned i : shuffled(grid.x * grid.y)) {
    machine.block_index = dim3(i % grid.x, i / grid.x);
    // NaN in every floating dtype: what a kernel reads before it writes shows in a result.
    size_t units = (shared_bytes + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t);
    machine.shared.reset(new std::max_align_t[units]);
    memset(machine.shared.get(), 0xff, units * sizeof(std::max_align_t));
    run_block(block.x);
  }
}

// Offers `value` to the other threads of the warp and returns the value of the thread whose number differs in the bits of lane_mask.
template <class T>
T exchange(T value, unsigned lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber* self = machine.running;
  memcpy(&self->exchange, &value, sizeof value);
  wait(State::at_warp_barrier);
  T other;
  memcpy(&other, &machine.fibers[self->index.x ^ lane_mask].exchange, sizeof other);
  wait(State::at_warp_barrier);
  return other;
}

}  // namespace emulation

#define threadIdx (emulation::machine.running->index)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block_size)
#define gridDim (emulation::machine.grid_size)

inline void __syncthreads() { emulation::wait(emulation::State::at_block_barrier); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xffffffffu) emulation::fail("only whole warps are emulated");
  return emulation::exchange(value, static_cast<unsigned>(lane_mask));
}

inline void __syncwarp() { emulation::wait(emulation::State::at_warp_barrier); }

// The mask of the lanes of the warp that have the same value as this one.
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  if (mask != 0xffffffffu) emulation::fail("only whole warps are emulated");
  unsigned lanes = 0;
  for (unsigned other = 0; other < emulation::kWarpSize; ++other)
    if (emulation::exchange(value, other) == value) lanes |= 1u << ((threadIdx.x ^ other) % emulation::kWarpSize);
  return lanes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

namespace emulation {
// Counts the atomic additions to 64-bit counters. The search for nearest codes makes one for each row that it leaves to its second kernel,
// which tests look at.
inline int64_t wide_additions = 0;

// Counts the squared distances in float64 that the second kernel of that search computes, see FASTVAE_COUNT in codebook_recheck.cuh.
inline int64_t distances = 0;
}  // namespace emulation

#define FASTVAE_COUNT(event, number) (emulation::event += (number))

template <class T>
T atomicAdd(T* address, T value) {
  emulation::wide_additions += sizeof(T) == sizeof(int64_t);
  T before = *address;
  *address += value;
  return before;
}

template <class T>
T atomicMin(T* address, T value) {
  T before = *address;
  *address = std::min(before, value);
  return before;
}

template <class T>
T atomicMax(T* address, T value) {
  T before = *address;
  *address = std::max(before, value);
  return before;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };

inline const char* cudaGetErrorString(cudaError_t) { return "no error is emulated"; }

namespace emulation {
// Tests set this. A launch during capture still runs, with a workspace of its own.
inline bool capturing = false;
}  // namespace emulation

struct cudaFuncAttributes {};

template <class Kernel>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t) {
  memset(to, byte, count);
  return cudaSuccess;
}

template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

// The emulated GPU has little shared memory, so that kernels which keep what fits into it keep a part of small tensors.
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 32768,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 24576,
  cudaDevAttrReservedSharedMemoryPerBlock = 1024,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute;
  return cudaSuccess;
}

namespace emulation {
// The dynamic shared memory that each kernel has been permitted.
inline std::map<const void*, size_t> permitted_shared;
}  // namespace emulation

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cudaDevAttrMaxSharedMemoryPerBlockOptin) emulation::fail("a kernel is permitted more shared memory than there is");
  emulation::permitted_shared[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t) {
  if (shared_bytes > 0 && shared_bytes > emulation::permitted_shared[reinterpret_cast<const void*>(kernel)])
    emulation::fail("a block asks for more shared memory than its kernel is permitted");
  const Params& params = *static_cast<const Params*>(arguments[0]);
  emulation::run_grid(grid, block, shared_bytes, [&] { kernel(params); });
  return cudaSuccess;
}
