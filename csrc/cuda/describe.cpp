// How the library was built, for `python -m fastvae.info`.
extern "C" __attribute__((visibility("default"))) const char* fastvae_cuda_build() { return FASTVAE_CUDA_BUILD; }
