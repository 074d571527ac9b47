// fastvae/_cuda.so is linked against this stand-in for libtorch_cuda.so, because a CPU build of torch has no such library. At run time the
// loader finds torch's own.
extern "C" int aoti_torch_get_current_cuda_stream() { return 1; }
