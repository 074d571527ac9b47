// The machine behind cuda_runtime.h: threads are fibers, and launches wait in the queue of a stream until the operator ends. What a GPU
// would do wrong, or might, is a report; conftest.py fails the test in which there is one.
//
// machine.cpp   blocks, threads, barriers and shuffles
// stream.cpp    launches, streams, captured graphs
// memory.cpp    allocations
// races.cpp     accesses to memory that nothing orders, in the build that watches every access
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

// Where a barrier or a fence stands in the sources. Tests take one away at a time.
struct Site {
  const char* file;
  int line;
};

void report(const std::string& what);

// What the running thread reads as threadIdx, blockIdx, blockDim and gridDim.
struct Place {
  dim3 thread, block, block_size, grid_size;
};
extern Place place;

unsigned char* dynamic_shared();
void block_barrier(Site site);
void warp_barrier(Site site);
void fence(Site site);
// Offers `value` to the other threads of the warp and returns the value of the thread whose number differs in the bits of lane_mask.
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane_mask);
// Notes an atomic operation that the instruction at `code` is about to make at an address.
void atomic_access(void* address, size_t bytes, const void* code);

// Counts the atomic additions to 64-bit counters. The search for nearest codes makes one for each row that it leaves to its second kernel,
// which tests look at.
extern int64_t wide_additions;

// Counts the squared distances in float64 that the recheck kernel of that search computes, see FASTVAE_COUNT in codebook_recheck.cuh.
extern int64_t distances;

// Adds to a counter of the emulation, which is not memory of a kernel.
void count(int64_t& counter, int64_t number);

// The number of threads that run together, where they run, and what they run.
struct Grid {
  dim3 blocks, threads;
  size_t shared_bytes;  // of dynamic shared memory for each block
  std::function<void()> thread;
};
void run_grid(const Grid& grid);

// Host calls give the codes of cudaError_t.
int launch(void* stream, const void* kernel, const void* params, size_t bytes, const Grid& grid);
// Permits a kernel so many bytes of dynamic shared memory.
void permit_shared(const void* kernel, size_t bytes);
int fill(void* stream, void* to, int byte, size_t count);
int is_capturing(void* stream, int* capturing);
const char* error_string(int error);

// Runs a piece of work when all that was queued before has run.
void enqueue(std::function<void()> work);
// Whether an operator is under way, from its device guard to the guard's end.
bool in_operator();
// Whether work is recorded in a graph instead of run.
bool is_recording();
// Reports a pointer among the bytes of a launch's parameters that leads to memory that the host has freed.
void check_pointers(const void* params, size_t bytes);
// Frees what the graph that was recorded last has allocated.
void free_graph_memory();

// A number that differs from a positive or negative one by so many units in its last place at most, always the same one.
float approximate(float value, int ulps);

// What races.cpp watches; elsewhere these do nothing.
namespace races {
void begin_launch();
// The stacks of the threads are memory of their own.
void begin_block(unsigned threads, const char* stacks, size_t stack_bytes);
void pause_thread();
void resume_thread(unsigned thread);
void passed_block_barrier();
void passed_warp_barrier(unsigned warp);
void fence(unsigned thread);
void atomic(void* address, size_t bytes, const void* code);
}  // namespace races

// The shared memory of the emulated kernels: that of their variables, in the builds that can tell where it is, and what a launch asks for.
struct Range {
  char* begin;
  size_t bytes;
};
Range shared_variables();
Range requested_shared_memory();

}  // namespace emulation
