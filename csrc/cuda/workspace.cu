// The scratch memory for sums, slots and ticket counters. It is part of the loaded module and lasts as long as the process, so that no call
// allocates or clears anything: every launch leaves the tickets at 0.
#include <mutex>

#include "launch.h"

namespace fastvae {
namespace {

// Streams of a device that get a persistent workspace, 132 KiB each. On any further stream each call that sums allocates one.
constexpr int kStreams = 16;

struct StreamWorkspace {
  unsigned tickets[kTickets];
  float slots[kSlots];
};

// CUDA zeroes this memory when it loads the module on a device.
__device__ StreamWorkspace stream_workspaces[kStreams];

struct AssignedWorkspace {
  int32_t device;
  cudaStream_t stream;
  StreamWorkspace* workspace;
};

// The persistent workspace of a stream, or nullptr where all those of the device belong to other streams.
StreamWorkspace* persistent_workspace(int32_t device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::vector<AssignedWorkspace> assigned;
  std::lock_guard<std::mutex> lock(mutex);
  int used = 0;
  for (const AssignedWorkspace& entry : assigned) {
    if (entry.device != device) continue;
    if (entry.stream == stream) return entry.workspace;
    ++used;
  }
  if (used == kStreams) return nullptr;
  void* first = nullptr;
  check_cuda(cudaGetSymbolAddress(&first, stream_workspaces), "finding the workspace");
  assigned.push_back({device, stream, static_cast<StreamWorkspace*>(first) + used});
  return assigned.back().workspace;
}

}  // namespace

Workspace workspace_of(int32_t device, cudaStream_t stream, Tensor* owner) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &capturing), "asking whether a graph is captured");
  // A captured graph may be replayed on any stream, beside other launches, so it gets a workspace of its own that the graph itself clears.
  StreamWorkspace* workspace = capturing == cudaStreamCaptureStatusNone ? persistent_workspace(device, stream) : nullptr;
  if (!workspace) {
    *owner = allocate_strided({sizeof(StreamWorkspace)}, {1}, ScalarType::Byte, aoti_torch_device_type_cuda(), device);
    workspace = static_cast<StreamWorkspace*>(owner->mutable_data_ptr());
    check_cuda(cudaMemsetAsync(workspace->tickets, 0, sizeof workspace->tickets, stream), "clearing a workspace");
  }
  return {workspace->slots, workspace->tickets};
}

}  // namespace fastvae
