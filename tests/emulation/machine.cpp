// Runs the blocks of a launch one after the other, in a shuffled order, and the threads of a block as fibers, whose order is shuffled too.
#include <dlfcn.h>
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "emulation.h"
#include "exports.h"

namespace emulation {

Place place;
int64_t wide_additions = 0;
int64_t distances = 0;

namespace {

enum class State { ready, at_warp_barrier, at_shuffle, at_block_barrier, done };

struct Fiber {
  ucontext_t context;
  State state;
  uint64_t offered;  // the value that this thread offers in a shuffle
};

constexpr size_t kStackBytes = 1 << 17;

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  std::unique_ptr<char[]> stacks{new char[kMaxThreads * kStackBytes]};
  ucontext_t scheduler;
  unsigned running = 0;
  const Grid* grid = nullptr;
  std::mt19937 random{2026};
  unsigned paused_warps = 0;  // one bit for each warp
  std::unique_ptr<unsigned char[]> dynamic_shared;
};
Machine machine;

std::vector<std::string> reports;
std::string removed_file;  // the site whose barrier or fence tests have taken away
int removed_line = 0;
std::set<std::pair<const char*, int>> reached;  // the sites that threads came to since tests asked last
Site last{nullptr, 0};                          // the site that was reached last

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// Notes that the running thread has come to a site. Returns whether its barrier or fence is taken away.
bool is_removed(Site site) {
  // A loop comes to one site again and again.
  if (last.file != site.file || last.line != site.line) {
    last = site;
    reached.insert({site.file, site.line});
  }
  return site.line == removed_line && removed_file == base_name(site.file);
}

// Suspends the running thread in this state until the scheduler sets it to ready again.
void wait(State state) {
  Fiber& self = machine.fibers[machine.running];
  self.state = state;
  races::pause_thread();
  swapcontext(&self.context, &machine.scheduler);
}

void fiber_main() {
  machine.grid->thread();
  races::pause_thread();
  machine.fibers[machine.running].state = State::done;
  // Returning continues at uc_link, which is the scheduler.
}

// Releases the threads [begin, end) from a barrier if all of them that still run have reached it. Returns whether it released any.
bool release(unsigned begin, unsigned end, State barrier) {
  bool waiting = false, exited = (end - begin) % kWarpSize != 0;
  for (unsigned i = begin; i < end; ++i) {
    State state = machine.fibers[i].state;
    exited = exited || state == State::done;
    if (state == State::done) continue;
    if (state != barrier) return false;
    waiting = true;
  }
  if (waiting && exited && barrier == State::at_shuffle) report("a shuffle names lanes that have exited");
  for (unsigned i = begin; i < end; ++i)
    if (machine.fibers[i].state == barrier) machine.fibers[i].state = State::ready;
  return waiting;
}

std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

char* stack_of(unsigned thread) { return machine.stacks.get() + thread * kStackBytes; }

void start(unsigned thread) {
  Fiber& fiber = machine.fibers[thread];
  fiber.state = State::ready;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(thread);
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &machine.scheduler;
  makecontext(&fiber.context, fiber_main, 0);
}

// Runs a thread until it waits or ends.
void resume(unsigned thread) {
  machine.running = thread;
  place.thread = dim3(thread);
  races::resume_thread(thread);
  swapcontext(&machine.scheduler, &machine.fibers[thread].context);
}

bool release_warps(unsigned threads, State barrier) {
  bool released = false;
  for (unsigned begin = 0; begin < threads; begin += kWarpSize)
    if (release(begin, std::min(begin + kWarpSize, threads), barrier)) {
      released = true;
      if (barrier == State::at_warp_barrier) races::passed_warp_barrier(begin / kWarpSize);
    }
  return released;
}

bool release_block(unsigned threads) {
  if (!release(0, threads, State::at_block_barrier)) return false;
  races::passed_block_barrier();
  return true;
}

// Fills shared memory with a byte that makes NaN in every floating dtype, so that what a kernel reads before it writes shows.
void poison_shared_memory() {
  for (Range range : {shared_variables(), requested_shared_memory()}) memset(range.begin, 0xff, range.bytes);
}

// Runs all threads of the current block to their end. Returns false where they wait for each other.
bool run_block(unsigned threads) {
  poison_shared_memory();
  races::begin_block(threads, machine.stacks.get(), kMaxThreads * kStackBytes);
  for (unsigned i = 0; i < threads; ++i) start(i);
  for (;;) {
    bool progress = false, finished = true;
    // Some warps pause for many rounds, so that the others run ahead of them as far as barriers let them.
    if (machine.random() % 16 == 0) machine.paused_warps = machine.random();
    for (unsigned i : shuffled(threads)) {
      if (machine.fibers[i].state == State::ready) {
        progress = true;
        if (!(machine.paused_warps >> (i / kWarpSize) & 1)) resume(i);
      }
      finished = finished && machine.fibers[i].state == State::done;
    }
    if (finished) return true;
    progress = release_warps(threads, State::at_warp_barrier) || progress;
    progress = release_warps(threads, State::at_shuffle) || progress;
    progress = release_block(threads) || progress;
    if (!progress) return false;
  }
}

}  // namespace

void report(const std::string& what) {
  // One test can fail in a million threads.
  if (reports.size() < 20) reports.push_back(what);
}

void count(int64_t& counter, int64_t number) { counter += number; }

unsigned char* dynamic_shared() { return machine.dynamic_shared.get(); }

Range requested_shared_memory() { return {reinterpret_cast<char*>(dynamic_shared()), machine.grid->shared_bytes}; }

void run_grid(const Grid& grid) {
  // What a kernel without a barrier leaves may keep the next ones in their loops forever.
  if (removed_line != 0 && !reports.empty()) return;
  machine.grid = &grid;
  machine.dynamic_shared.reset(new unsigned char[grid.shared_bytes]);
  place.block_size = grid.threads;
  place.grid_size = grid.blocks;
  races::begin_launch();
  for (unsigned i : shuffled(grid.blocks.x * grid.blocks.y)) {
    place.block = dim3(i % grid.blocks.x, i / grid.blocks.x);
    if (run_block(grid.threads.x)) continue;
    report("threads of a block wait at different barriers");
    return;
  }
}

void block_barrier(Site site) {
  if (!is_removed(site)) wait(State::at_block_barrier);
}

void warp_barrier(Site site) {
  if (!is_removed(site)) wait(State::at_warp_barrier);
}

void fence(Site site) {
  if (!is_removed(site)) races::fence(machine.running);
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned lane_mask) {
  if (mask != 0xffffffffu) report("only shuffles of whole warps are emulated");
  unsigned self = machine.running;
  machine.fibers[self].offered = value;
  wait(State::at_shuffle);
  uint64_t other = machine.fibers[self ^ lane_mask].offered;
  wait(State::at_shuffle);
  return other;
}

void atomic_access(void* address, size_t bytes, const void* code) { races::atomic(address, bytes, code); }

float approximate(float value, int ulps) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value == 0.0f || (bits & 0x7f800000u) == 0x7f800000u) return value;
  uint32_t hash = (bits * 2654435761u) >> 16;
  bits += hash % (2 * static_cast<uint32_t>(ulps) + 1) - static_cast<uint32_t>(ulps);
  memcpy(&value, &bits, sizeof value);
  return value;
}

#if defined(__SANITIZE_ADDRESS__)
Range shared_variables() { return {nullptr, 0}; }
#else
// The thread-local variables of this library, all of which are shared memory of kernels.
Range shared_variables() {
  static thread_local char any = 0;
  static Range range{nullptr, 0};
  static std::thread::id owner;
  // The first access in a thread allocates them.
  volatile char* touched = &any;
  *touched = 0;
  if (range.begin && owner == std::this_thread::get_id()) return range;
  owner = std::this_thread::get_id();
  auto find = [](dl_phdr_info* info, size_t, void* data) {
    auto found = static_cast<Range*>(data);
    auto address = reinterpret_cast<uintptr_t>(&reports);
    bool is_here = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& segment = info->dlpi_phdr[i];
      uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
      is_here = is_here || (segment.p_type == PT_LOAD && address >= begin && address < begin + segment.p_memsz);
    }
    if (!is_here) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i)
      if (info->dlpi_phdr[i].p_type == PT_TLS) *found = {static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
    return 1;
  };
  dl_iterate_phdr(find, &range);
  return range;
}
#endif

}  // namespace emulation

// Copies the reports since the last call, a line each, and returns their number.
EXPORT int take_reports(char* out, int size) {
  std::string text;
  for (const std::string& line : emulation::reports) text += line + "\n";
  int count = static_cast<int>(emulation::reports.size());
  emulation::reports.clear();
  strncpy(out, text.c_str(), static_cast<size_t>(size) - 1);
  out[size - 1] = 0;
  return count;
}

// Takes away the barrier or the fence in a line of a file; with no name, none.
EXPORT void remove_site(const char* file, int line) {
  emulation::removed_file = file;
  emulation::removed_line = line;
}

// Copies the barriers and fences that were reached since the last call, "file:line" each.
EXPORT void take_reached(char* out, int size) {
  std::string text;
  for (const auto& [file, line] : emulation::reached) text += std::string(emulation::base_name(file)) + ":" + std::to_string(line) + "\n";
  emulation::reached.clear();
  emulation::last = {nullptr, 0};
  strncpy(out, text.c_str(), static_cast<size_t>(size) - 1);
  out[size - 1] = 0;
}

EXPORT int64_t emulated_wide_additions() { return emulation::wide_additions; }

EXPORT int64_t emulated_distances() { return emulation::distances; }
