// Runs the kernels of each family for each instruction set that this processor has, against plain loops in double precision.
#include "check.h"

int main() {
  using namespace fastvae;
  struct {
    const char* name;
    void (*run)();
    Isa widest;  // with kernels of their own
  } families[] = {{"codebook", testing::test_codebook, Isa::avx512_vnni},
                  {"jacobian", testing::test_jacobian, Isa::avx512},
                  {"group_norm", testing::test_group_norm, Isa::avx512},
                  {"latent", testing::test_latent, Isa::avx512},
                  {"logistic_mixture", testing::test_logistic_mixture, Isa::avx512},
                  {"reconstruction", testing::test_reconstruction, Isa::avx512},
                  {"rms_norm", testing::test_rms_norm, Isa::avx512},
                  {"snake", testing::test_snake, Isa::avx512}};
  for (int i = 0; i < kIsaCount; ++i) {
    Isa isa = static_cast<Isa>(i);
    if (!isa_available(isa)) continue;
    set_isa(isa);
    for (const auto& family : families) {
      if (isa > family.widest) continue;
      int before = testing::failures;
      family.run();
      std::printf("%-12s %-16s %s\n", kIsaNames[i], family.name, testing::failures == before ? "passed" : "FAILED");
      std::fflush(stdout);
    }
  }
  return testing::failures > 0;
}
