// Launches, streams and captured graphs. What an operator launches waits until it ends, as on a GPU, where the host runs ahead: parameters
// that point to the host's variables, and memory that is freed too early, show then.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "emulation.h"
#include "exports.h"

namespace emulation {
namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kMemoryAllocation = 2, kInvalidConfiguration = 9, kLaunchOutOfResources = 701;
constexpr unsigned kMaxBlocksX = 0x7fffffffu, kMaxBlocksY = 65535;
constexpr size_t kMaxStaticAndDynamicShared = 227 * 1024;
// What a kernel may take without permission: 48 KB together with its variables, which take 4 KB at most.
constexpr size_t kSharedWithoutPermission = 44 * 1024;

using Work = std::function<void()>;

std::vector<Work> queue;
std::vector<Work> graph;
std::map<const void*, size_t> permitted_shared;

// Addresses that stand for streams. None is null, which is CUDA's default stream.
char streams[64];
int current_stream = 0;
int guards = 0;
bool capturing = false, recording = false;
int64_t launches = 0, failing_launch = -1;

void run_queue() {
  while (!queue.empty()) {
    // Running work may queue more. Tensors that the work keeps are freed when all of it has run.
    std::vector<Work> running = std::move(queue);
    queue.clear();
    for (const Work& work : running) work();
  }
}

void check_stream(const void* stream) {
  if (guards == 0) report("work is launched without a device guard");
  if (stream != streams + current_stream) report("work is launched on another stream than the current one");
}

bool is_valid(const Grid& grid) {
  const dim3 &blocks = grid.blocks, &threads = grid.threads;
  return blocks.x >= 1 && blocks.x <= kMaxBlocksX && blocks.y >= 1 && blocks.y <= kMaxBlocksY && blocks.z == 1 && threads.x >= 1 &&
         threads.x <= kMaxThreads && threads.y == 1 && threads.z == 1;
}

}  // namespace

bool in_operator() { return guards > 0; }

bool is_recording() { return recording; }

void enqueue(Work work) {
  if (recording)
    graph.push_back(std::move(work));
  else if (guards > 0)
    queue.push_back(std::move(work));
  else
    work();
}

void permit_shared(const void* kernel, size_t bytes) { permitted_shared[kernel] = bytes; }

int launch(void* stream, const void* kernel, const void* params, size_t bytes, const Grid& grid) {
  check_stream(stream);
  check_pointers(params, bytes);
  if (launches++ == failing_launch) return kLaunchOutOfResources;
  auto permitted = permitted_shared.find(kernel);
  size_t max_shared = permitted == permitted_shared.end() ? kSharedWithoutPermission : permitted->second;
  if (grid.shared_bytes > std::min(max_shared, kMaxStaticAndDynamicShared)) return kInvalidValue;
  if (!is_valid(grid)) return kInvalidConfiguration;
  enqueue([grid] { run_grid(grid); });
  return kSuccess;
}

int fill(void* stream, void* to, int byte, size_t count) {
  check_stream(stream);
  check_pointers(&to, sizeof to);
  enqueue([=] { memset(to, byte, count); });
  return kSuccess;
}

int is_capturing(void* stream, int* result) {
  check_stream(stream);
  *result = capturing;
  return kSuccess;
}

const char* error_string(int error) {
  switch (error) {
    case kInvalidValue:
      return "invalid argument";
    case kMemoryAllocation:
      return "out of memory";
    case kInvalidConfiguration:
      return "invalid configuration argument";
    case kLaunchOutOfResources:
      return "too many resources requested for launch";
    default:
      return "no error";
  }
}

}  // namespace emulation

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  if (emulation::guards == 0) emulation::report("the stream of a device is asked for without a device guard");
  *stream = emulation::streams + emulation::current_stream;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++emulation::guards;
  // A guard is deleted only where its handle is not null.
  *guard = reinterpret_cast<DeviceGuardHandle>(&emulation::guards);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_delete_device_guard(DeviceGuardHandle) {
  if (--emulation::guards == 0) emulation::run_queue();
  return AOTI_TORCH_SUCCESS;
}
}

EXPORT void set_stream(int number) { emulation::current_stream = number; }

// Says that the stream is being captured, so that launches have workspaces of their own; they run all the same.
EXPORT void set_capturing(int capturing) { emulation::capturing = capturing != 0; }

// Launches are recorded in a graph from here to end_capture(), and do not run before replay().
EXPORT void begin_capture() {
  emulation::capturing = emulation::recording = true;
  emulation::graph.clear();
}

EXPORT void end_capture() { emulation::capturing = emulation::recording = false; }

EXPORT void replay() {
  for (const auto& work : emulation::graph) work();
}

EXPORT void drop_graph() {
  emulation::graph.clear();
  emulation::free_graph_memory();
}

// The launch that comes after so many others fails; none with -1. Begins to count anew.
EXPORT void fail_launch(int64_t number) {
  emulation::launches = 0;
  emulation::failing_launch = number;
}

EXPORT int64_t emulated_launches() { return emulation::launches; }
