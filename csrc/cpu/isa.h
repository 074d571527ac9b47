// The instruction sets that csrc/cpu/simd/ is compiled for, and the selection of one of them.
#pragma once

namespace fastvae {

enum class Isa { baseline, avx2, avx512, avx512_vnni };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_vnni"};
constexpr int kIsaCount = 4;

bool isa_available(Isa isa);  // whether it is compiled in and the processor has it
Isa isa_in_use();             // the widest available, unless set_isa() chose another
void set_isa(Isa isa);

// Each compiled path records that it ran, so that tests can prove that they reach it.
enum class Family { latent, reconstruction, jacobian, codebook, group_norm, logistic_mixture, rms_norm, snake };
constexpr const char* kFamilyNames[] = {"latent",     "reconstruction",   "jacobian", "codebook",
                                        "group_norm", "logistic_mixture", "rms_norm", "snake"};
constexpr int kFamilyCount = 8;

void record_run(Family family, const char* isa_name);
const char* last_run(Family family);  // nullptr before the first run

#if defined(__x86_64__)
#define FASTVAE_DECLARE_KERNELS(Table, stem) extern const Table stem##_kernels_baseline, stem##_kernels_avx2, stem##_kernels_avx512;
#define FASTVAE_SELECT_KERNELS(stem) \
  (isa_in_use() >= Isa::avx512 ? stem##_kernels_avx512 : (isa_in_use() == Isa::avx2 ? stem##_kernels_avx2 : stem##_kernels_baseline))
// The same for a family that is compiled for AVX512-VNNI too, see ONLY_FOR in setup.py.
#define FASTVAE_DECLARE_VNNI_KERNELS(Table, stem) \
  FASTVAE_DECLARE_KERNELS(Table, stem)            \
  extern const Table stem##_kernels_avx512_vnni;
#define FASTVAE_SELECT_VNNI_KERNELS(stem) (isa_in_use() == Isa::avx512_vnni ? stem##_kernels_avx512_vnni : FASTVAE_SELECT_KERNELS(stem))
#else
#define FASTVAE_DECLARE_KERNELS(Table, stem) extern const Table stem##_kernels_baseline;
#define FASTVAE_SELECT_KERNELS(stem) (stem##_kernels_baseline)
#define FASTVAE_DECLARE_VNNI_KERNELS(Table, stem) FASTVAE_DECLARE_KERNELS(Table, stem)
#define FASTVAE_SELECT_VNNI_KERNELS(stem) FASTVAE_SELECT_KERNELS(stem)
#endif

}  // namespace fastvae
