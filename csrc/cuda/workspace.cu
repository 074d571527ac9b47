// Memory for sums that lasts as long as the process: nothing is allocated or cleared in a call.
#include <mutex>

#include "launch.h"

namespace fastvae {
namespace {

constexpr int kStreams = 16;

struct StreamWorkspace {
  unsigned tickets[kTickets];
  float slots[kSlots];
};

// Zeroed when the module is loaded on a device.
__device__ StreamWorkspace stream_workspaces[kStreams];

struct Known {
  int32_t device;
  cudaStream_t stream;
  StreamWorkspace* workspace;
};

// The lasting workspace of a stream; nullptr where the device has no more of them.
StreamWorkspace* lasting(int32_t device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::vector<Known> known;
  std::lock_guard<std::mutex> lock(mutex);
  int used = 0;
  for (const Known& entry : known) {
    if (entry.device != device) continue;
    if (entry.stream == stream) return entry.workspace;
    ++used;
  }
  if (used == kStreams) return nullptr;
  void* first = nullptr;
  check_cuda(cudaGetSymbolAddress(&first, stream_workspaces), "finding the workspace");
  known.push_back({device, stream, static_cast<StreamWorkspace*>(first) + used});
  return known.back().workspace;
}

}  // namespace

Workspace workspace_of(int32_t device, cudaStream_t stream, Tensor* keep) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &capturing), "asking whether a graph is captured");
  // A graph may be replayed on any stream, so it has a workspace of its own, cleared as a part of the graph.
  StreamWorkspace* workspace = capturing == cudaStreamCaptureStatusNone ? lasting(device, stream) : nullptr;
  if (!workspace) {
    *keep = allocate({sizeof(StreamWorkspace)}, ScalarType::Byte, aoti_torch_device_type_cuda(), device);
    workspace = static_cast<StreamWorkspace*>(keep->mutable_data_ptr());
    check_cuda(cudaMemsetAsync(workspace->tickets, 0, sizeof workspace->tickets, stream), "clearing a workspace");
  }
  return {workspace->slots, workspace->tickets};
}

}  // namespace fastvae
