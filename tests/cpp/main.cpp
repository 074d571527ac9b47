// Runs the kernels of each family for each instruction set that this processor has, against plain loops in double precision.
#include "check.h"

int main() {
  using namespace fastvae;
  struct {
    const char* name;
    void (*run)();
  } families[] = {{"codebook", testing::test_codebook},
                  {"jacobian", testing::test_jacobian},
                  {"group_norm", testing::test_group_norm},
                  {"latent", testing::test_latent},
                  {"reconstruction", testing::test_reconstruction}};
  for (int i = 0; i < kIsaCount; ++i) {
    Isa isa = static_cast<Isa>(i);
    if (!isa_available(isa)) continue;
    set_isa(isa);
    for (const auto& family : families) {
      int before = testing::failures;
      family.run();
      std::printf("%-12s %-15s %s\n", kIsaNames[i], family.name, testing::failures == before ? "passed" : "FAILED");
      std::fflush(stdout);
    }
  }
  return testing::failures > 0;
}
