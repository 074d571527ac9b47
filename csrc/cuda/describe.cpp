// Returns the nvcc version and the compute capabilities that setup.py built for; `python -m fastvae.info` prints them.
extern "C" __attribute__((visibility("default"))) const char* fastvae_cuda_build() { return FASTVAE_CUDA_BUILD; }
