// The memory of the emulated GPU. It is filled with NaN, so that an element that no kernel writes shows in a result, and it is freed in the
// order of the stream: a launch that came before may use it, one that comes after may not even have a pointer to it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

#include "emulation.h"
#include "exports.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size)
#define ASAN_UNPOISON_MEMORY_REGION(begin, size)
#endif

namespace emulation {
namespace {

constexpr size_t kAlignment = 64;

struct Block {
  size_t bytes;
  bool freed;     // by the host
  bool in_graph;  // it stays as long as the graph in whose capture it was allocated
};

// Blocks by their addresses, until the stream has come to where they are freed.
std::map<char*, Block> blocks;
std::mutex mutex;
int64_t allocations = 0, failing_allocation = -1;

void release(char* data) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(data);
  memset(data, 0xff, found->second.bytes);
  if (found->second.in_graph) {
    ASAN_POISON_MEMORY_REGION(data, found->second.bytes);
    return;
  }
  blocks.erase(found);
  free(data);
}

void free_in_order(char* data) {
  bool waits = in_operator() || is_recording();
  {
    std::lock_guard<std::mutex> lock(mutex);
    Block& block = blocks.at(data);
    block.freed = true;
    // A replay writes to it again, whatever the host did with its tensor.
    if (block.in_graph && !is_recording()) return;
  }
  waits ? enqueue([data] { release(data); }) : release(data);
}

char* allocate(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kAlignment, bytes) != 0) return nullptr;
  memset(data, 0xff, bytes);
  std::lock_guard<std::mutex> lock(mutex);
  blocks[static_cast<char*>(data)] = {bytes, false, is_recording()};
  // Each replay allocates it anew.
  if (is_recording()) enqueue([=] { ASAN_UNPOISON_MEMORY_REGION(data, bytes); });
  return static_cast<char*>(data);
}

}  // namespace

void check_pointers(const void* params, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  for (size_t at = 0; at + sizeof(char*) <= bytes; at += sizeof(char*)) {
    char* pointer = nullptr;
    memcpy(&pointer, static_cast<const char*>(params) + at, sizeof pointer);
    auto after = blocks.upper_bound(pointer);
    if (after == blocks.begin()) continue;
    const auto& [begin, block] = *std::prev(after);
    if (block.freed && pointer < begin + block.bytes) report("a kernel gets a pointer to memory that has been freed");
  }
}

void free_graph_memory() {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto it = blocks.begin(); it != blocks.end();) {
    if (it->second.in_graph && it->second.freed) {
      ASAN_UNPOISON_MEMORY_REGION(it->first, it->second.bytes);
      free(it->first);
      it = blocks.erase(it);
    } else {
      it->second.in_graph = false;
      ++it;
    }
  }
}

}  // namespace emulation

extern "C" {

AOTITorchError emulated_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t, int32_t,
                                      AtenTensorHandle* result) {
  using namespace emulation;
  if (allocations++ == failing_allocation) return AOTI_TORCH_FAILURE;
  auto scalar_type = static_cast<c10::ScalarType>(dtype);
  int64_t elements = 1;
  bool is_empty = false;
  for (int64_t d = 0; d < dimensions; ++d) {
    is_empty = is_empty || sizes[d] == 0;
    elements += (sizes[d] - 1) * strides[d];
  }
  char* data = is_empty ? nullptr : allocate(static_cast<size_t>(elements) * c10::elementSize(scalar_type));
  auto deleter = [](void* data) {
    if (data) free_in_order(static_cast<char*>(data));
  };
  at::Tensor tensor = at::from_blob(data, {sizes, static_cast<size_t>(dimensions)}, {strides, static_cast<size_t>(dimensions)}, deleter,
                                    at::TensorOptions().dtype(scalar_type));
  *result = reinterpret_cast<AtenTensorHandle>(new at::Tensor(std::move(tensor)));
  return AOTI_TORCH_SUCCESS;
}

// A copy by torch is work for the stream too. The stack is that of aten::copy_: to, from and non_blocking; the result is `to`.
AOTITorchError emulated_call_dispatcher(const char* name, const char*, StableIValue* stack, uint64_t) {
  if (strcmp(name, "aten::copy_") != 0) {
    emulation::report(std::string("operators call no other operator of torch than copy_, and this is ") + name);
    return AOTI_TORCH_FAILURE;
  }
  auto tensor_at = [&](int i) { return reinterpret_cast<at::Tensor*>(static_cast<uintptr_t>(stack[i])); };
  at::Tensor to = *tensor_at(0), from = *tensor_at(1);
  delete tensor_at(1);
  emulation::enqueue([to, from]() mutable {
    c10::NoGradGuard no_grad;
    to.copy_(from);
  });
  return AOTI_TORCH_SUCCESS;
}
}

// The allocation that comes after so many others fails; none with -1. Begins to count anew.
EXPORT void fail_allocation(int64_t number) {
  emulation::allocations = 0;
  emulation::failing_allocation = number;
}

EXPORT int64_t emulated_allocations() { return emulation::allocations; }

// The blocks that nobody has freed.
EXPORT int64_t emulated_blocks() {
  std::lock_guard<std::mutex> lock(emulation::mutex);
  int64_t count = 0;
  for (const auto& [data, block] : emulation::blocks) count += !block.freed;
  return count;
}
