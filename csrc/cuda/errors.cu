// The errors that an operator raises. The stable ABI passes on no type of an exception, and of a failed allocation no reason.
#include <stdexcept>
#include <string>

#include "launch.h"

namespace fastvae {
namespace {

// Where a message begins so, fastvae/ops/_operator.py raises torch.OutOfMemoryError. Programs that retry with a smaller batch look for the
// words after the colon.
const std::string kOutOfMemory = "fastvae: CUDA out of memory. ";

}  // namespace

void raise_cuda_error(cudaError_t status, const char* what) {
  if (status == cudaErrorMemoryAllocation) throw std::runtime_error(kOutOfMemory + "No memory was left for " + what + ".");
  throw std::runtime_error(std::string("fastvae: ") + what + ": " + cudaGetErrorString(status));
}

void raise_failed_allocation(int64_t bytes) {
  size_t free_bytes = 0, all_bytes = 0;
  // This fails too where the reason is another one, such as a kernel that failed before.
  check_cuda(cudaMemGetInfo(&free_bytes, &all_bytes), "allocating memory");
  throw std::runtime_error(kOutOfMemory + "Tried to allocate " + std::to_string(bytes) + " bytes; of the " + std::to_string(all_bytes) +
                           " bytes of the GPU " + std::to_string(free_bytes) + " are free.");
}

}  // namespace fastvae
