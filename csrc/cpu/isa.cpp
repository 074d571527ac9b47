#include "isa.h"

#include <atomic>
#include <initializer_list>

namespace fastvae {

namespace {

Isa widest() {
  for (Isa isa : {Isa::avx512_vnni, Isa::avx512, Isa::avx2})
    if (isa_available(isa)) return isa;
  return Isa::baseline;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{widest()};
  return isa;
}

std::atomic<const char*> last_runs[kFamilyCount];

}  // namespace

bool isa_available(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (isa == Isa::avx512)
    return isa_available(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512_vnni) return isa_available(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
#endif
  return isa == Isa::baseline;
}

Isa isa_in_use() { return current().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { current().store(isa, std::memory_order_relaxed); }

void record_run(Family family, const char* isa_name) { last_runs[static_cast<int>(family)].store(isa_name, std::memory_order_relaxed); }

const char* last_run(Family family) { return last_runs[static_cast<int>(family)].load(std::memory_order_relaxed); }

}  // namespace fastvae
