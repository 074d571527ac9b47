// Finds accesses to memory that nothing orders, in the build whose kernels call the functions __tsan_* at each access (GCC's thread
// sanitizer without its library). It knows what orders accesses on a GPU, so it needs no unlucky schedule to find a race:
//
//   - within a block, the barriers of the block; within a warp, those of the warp too, while a shuffle orders nothing;
//   - between blocks, a fence and then an atomic access in one thread, which another thread's atomic access to the same address and then
//   its
//     fence follow. The barriers before the first fence and after the second one extend this to the threads of the two blocks.
//
// This is the memory model of PTX, as far as csrc/cuda/ uses it. A read of shared memory that the block has not written is found too.
#include "emulation.h"

#if !defined(EMULATION_RACES)

namespace emulation::races {
void begin_launch() {}
void begin_block(unsigned, const char*, size_t) {}
void pause_thread() {}
void resume_thread(unsigned) {}
void passed_block_barrier() {}
void passed_warp_barrier(unsigned) {}
void fence(unsigned) {}
void atomic(void*, size_t, const void*) {}
}  // namespace emulation::races

#else

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

namespace emulation::races {
namespace {

// An access, and when the thread made it: how many barriers of its block and of its warp it had passed. There are many of them.
struct Access {
  uint32_t block = 0;  // blocks are numbered over all launches, from 1; 0 stands for no access
  uint32_t block_barriers = 0;
  uint16_t warp_barriers = 0;
  uint16_t thread : 15, is_atomic : 1;
  int32_t code = 0;  // the address of the instruction, from that of report()

  Access() : thread(0), is_atomic(0) {}
};

// The last accesses to a piece of memory; of reads, those of the last two threads.
struct Cell {
  Access write, reads[2];
};

// The cells of a page of memory: one for each kCoarse bytes until an access needs finer ones, then one for each byte.
constexpr uintptr_t kPageBytes = 4096, kCoarse = 4;
struct Page {
  uintptr_t grain = kCoarse;
  std::vector<Cell> cells = std::vector<Cell>(kPageBytes / kCoarse);

  void refine() {
    std::vector<Cell> fine(kPageBytes);
    for (uintptr_t i = 0; i < kPageBytes; ++i) fine[i] = cells[i / grain];
    cells = std::move(fine);
    grain = 1;
  }
};

// What a thread knows of another block: its accesses before this number of barriers, and those of the releasing thread up to there.
struct Seen {
  uint32_t block_barriers = 0;
  uint16_t thread = 0;
};
using Knowledge = std::map<uint32_t, Seen>;

void merge(Knowledge& into, const Knowledge& from) {
  for (const auto& [block, seen] : from) {
    Seen& known = into[block];
    if (known.block_barriers <= seen.block_barriers) known = seen;
  }
}

struct Thread {
  Knowledge acquired;  // by its own fences since the last barrier of the block
  Knowledge observed;  // by atomic accesses since its last fence
  Knowledge released;  // what its later atomic accesses release
  bool has_fenced = false;
};

constexpr size_t kMaxPages = 4096;  // of one launch and more, 200 MiB of cells
std::unordered_map<uintptr_t, std::unique_ptr<Page> > pages;
std::array<std::pair<uintptr_t, Page*>, 256> recent{};
std::unordered_map<const void*, Knowledge> published;  // by address of an atomic access
std::array<Thread, kMaxThreads> threads;
std::array<uint16_t, kMaxThreads / kWarpSize> warp_barriers;
Knowledge known;  // by all threads of the block
uint32_t last_block = 0, first_block = 1, block_barriers = 0;
unsigned thread_count = 0, running = 0;
bool is_watching = false;
const char *local_begin = nullptr, *local_end = nullptr;  // the stacks of the threads

bool is_shared(uintptr_t address) {
  auto holds = [address](Range range) { return address - reinterpret_cast<uintptr_t>(range.begin) < range.bytes; };
  return holds(shared_variables()) || holds(requested_shared_memory());
}

Page& page_of(uintptr_t number) {
  auto& [key, page] = recent[number % recent.size()];
  if (key == number && page) return *page;
  auto& owner = pages[number];
  if (!owner) owner = std::make_unique<Page>();
  key = number;
  page = owner.get();
  return *page;
}

const char* base_of_code() { return reinterpret_cast<const char*>(&report); }

Access this_access(bool is_atomic, const void* code) {
  Access now;
  now.block = last_block;
  now.block_barriers = block_barriers;
  now.warp_barriers = warp_barriers[running / kWarpSize];
  now.thread = static_cast<uint16_t>(running);
  now.is_atomic = is_atomic;
  now.code = static_cast<int32_t>(static_cast<const char*>(code) - base_of_code());
  return now;
}

// Whether an earlier access comes before those that the running thread makes now, in every order in which the threads may run.
bool is_ordered(const Access& earlier) {
  if (earlier.block < first_block) return true;
  if (earlier.block == last_block) {
    if (earlier.thread == running || earlier.block_barriers < block_barriers) return true;
    return earlier.thread / kWarpSize == running / kWarpSize && earlier.warp_barriers < warp_barriers[running / kWarpSize];
  }
  auto covers = [&](const Knowledge& knowledge) {
    auto found = knowledge.find(earlier.block);
    if (found == knowledge.end()) return false;
    const Seen& seen = found->second;
    return earlier.block_barriers < seen.block_barriers || (earlier.block_barriers == seen.block_barriers && earlier.thread == seen.thread);
  };
  return covers(known) || covers(threads[running].acquired);
}

// The address of an instruction in this library, for addr2line. The call is before the address to which it returns.
std::string place_of(const Access& access) {
  Dl_info info;
  dladdr(base_of_code(), &info);
  char text[32];
  snprintf(text, sizeof text, "0x%zx", static_cast<size_t>(base_of_code() + access.code - 1 - static_cast<const char*>(info.dli_fbase)));
  return text;
}

void report_race(const char* what, const Access& earlier, const Access& now) {
  report(std::string(what) + " at " + place_of(now) + " and at " + place_of(earlier) + " (threads " + std::to_string(now.thread) + " and " +
         std::to_string(earlier.thread) + (now.block == earlier.block ? " of a block)" : " of two blocks)"));
}

// An access to a cell of shared memory by another block is one to other memory.
bool counts(const Access& access, bool shared) { return access.block >= (shared ? last_block : first_block); }

bool conflicts(const Access& earlier, const Access& now, bool shared) {
  return counts(earlier, shared) && !(earlier.is_atomic && now.is_atomic) && !is_ordered(earlier);
}

void read(Cell& cell, const Access& now, bool shared) {
  if (conflicts(cell.write, now, shared)) report_race("nothing orders a read after a write", cell.write, now);
  if (shared && !counts(cell.write, shared)) report("shared memory is read at " + place_of(now) + " before the block writes it");
  if (!counts(cell.reads[0], shared) || cell.reads[0].thread != now.thread || cell.reads[0].block != now.block)
    cell.reads[1] = cell.reads[0];
  cell.reads[0] = now;
}

void write(Cell& cell, const Access& now, bool shared) {
  if (conflicts(cell.write, now, shared)) report_race("nothing orders two writes", cell.write, now);
  for (const Access& earlier : cell.reads)
    if (conflicts(earlier, now, shared)) report_race("nothing orders a write after a read", earlier, now);
  cell.write = now;
}

void access(const void* address, size_t bytes, bool is_write, bool is_atomic, const void* code) {
  if (!is_watching || (address >= local_begin && address < local_end)) return;
  auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  bool shared = is_shared(begin);
  Access now = this_access(is_atomic, code);
  while (begin < end) {
    Page& page = page_of(begin / kPageBytes);
    uintptr_t stop = std::min(end, (begin / kPageBytes + 1) * kPageBytes);
    if (page.grain > 1 && (begin % page.grain != 0 || stop % page.grain != 0)) page.refine();
    for (; begin < stop; begin += page.grain) {
      Cell& cell = page.cells[begin % kPageBytes / page.grain];
      is_write ? write(cell, now, shared) : read(cell, now, shared);
    }
  }
}

}  // namespace

void begin_launch() {
  // A launch comes after all earlier ones, so nothing is lost.
  if (pages.size() > kMaxPages) {
    pages.clear();
    recent.fill({0, nullptr});
  }
  first_block = last_block + 1;
  published.clear();
}

void begin_block(unsigned count, const char* stacks, size_t stack_bytes) {
  ++last_block;
  block_barriers = 0;
  thread_count = count;
  known.clear();
  warp_barriers.fill(0);
  for (unsigned i = 0; i < count; ++i) threads[i] = Thread();
  local_begin = stacks;
  local_end = stacks + stack_bytes;
}

void pause_thread() { is_watching = false; }

void resume_thread(unsigned thread) {
  running = thread;
  is_watching = true;
}

void passed_block_barrier() {
  ++block_barriers;
  for (unsigned i = 0; i < thread_count; ++i) {
    if (threads[i].acquired.empty()) continue;
    merge(known, threads[i].acquired);
    threads[i].acquired.clear();
  }
}

void passed_warp_barrier(unsigned warp) { ++warp_barriers[warp]; }

void fence(unsigned thread) {
  Thread& self = threads[thread];
  merge(self.acquired, self.observed);
  self.observed.clear();
  self.released = known;
  merge(self.released, self.acquired);
  self.released[last_block] = {block_barriers, static_cast<uint16_t>(thread)};
  self.has_fenced = true;
}

void atomic(void* address, size_t bytes, const void* code) {
  access(address, bytes, true, true, code);
  Thread& self = threads[running];
  Knowledge& here = published[address];
  merge(self.observed, here);
  if (self.has_fenced) merge(here, self.released);
}

}  // namespace emulation::races

// What the compiler calls for the accesses of the kernels, and of the host's code beside them, which is not watched.
#define WATCHED(name, bytes, is_write) \
  extern "C" void name(void* address) { emulation::races::access(address, bytes, is_write, false, __builtin_return_address(0)); }

WATCHED(__tsan_read1, 1, false)
WATCHED(__tsan_read2, 2, false)
WATCHED(__tsan_read4, 4, false)
WATCHED(__tsan_read8, 8, false)
WATCHED(__tsan_read16, 16, false)
WATCHED(__tsan_write1, 1, true)
WATCHED(__tsan_write2, 2, true)
WATCHED(__tsan_write4, 4, true)
WATCHED(__tsan_write8, 8, true)
WATCHED(__tsan_write16, 16, true)
WATCHED(__tsan_unaligned_read2, 2, false)
WATCHED(__tsan_unaligned_read4, 4, false)
WATCHED(__tsan_unaligned_read8, 8, false)
WATCHED(__tsan_unaligned_read16, 16, false)
WATCHED(__tsan_unaligned_write2, 2, true)
WATCHED(__tsan_unaligned_write4, 4, true)
WATCHED(__tsan_unaligned_write8, 8, true)
WATCHED(__tsan_unaligned_write16, 16, true)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, size_t bytes) { emulation::races::access(address, bytes, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* address, size_t bytes) { emulation::races::access(address, bytes, true, false, __builtin_return_address(0)); }
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
}

// The atomic operations of the host's code, of which the compiler makes calls too.
#define ATOMICS(bits, type)                                                                                                             \
  extern "C" type __tsan_atomic##bits##_load(const volatile type* a, int) { return __atomic_load_n(a, __ATOMIC_SEQ_CST); }              \
  extern "C" void __tsan_atomic##bits##_store(volatile type* a, type v, int) { __atomic_store_n(a, v, __ATOMIC_SEQ_CST); }              \
  extern "C" type __tsan_atomic##bits##_exchange(volatile type* a, type v, int) { return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST); } \
  extern "C" type __tsan_atomic##bits##_fetch_add(volatile type* a, type v, int) { return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST); } \
  extern "C" type __tsan_atomic##bits##_fetch_sub(volatile type* a, type v, int) { return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST); } \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_strong(volatile type* a, type* expected, type v, int, int) {                   \
    return __atomic_compare_exchange_n(a, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                      \
  }                                                                                                                                     \
  extern "C" type __tsan_atomic##bits##_compare_exchange_val(volatile type* a, type expected, type v, int, int) {                       \
    __atomic_compare_exchange_n(a, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                            \
    return expected;                                                                                                                    \
  }

ATOMICS(8, uint8_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

#endif
