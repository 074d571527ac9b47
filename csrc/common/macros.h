// Macros that let one source compile for each CPU instruction set and for CUDA.
#pragma once

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "fastvae: with -ffinite-math-only (or -ffast-math, -Ofast) a compiler drops the tests for NaN; compile without it"
#endif

// FASTVAE_INLINE stands before a free or static function, FASTVAE_MEMBER before a member function; both are inlined always, on the host and
// on the device.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define FASTVAE_MEMBER __host__ __device__ __forceinline__
#else
#define FASTVAE_MEMBER inline __attribute__((always_inline))
#endif
#define FASTVAE_INLINE static FASTVAE_MEMBER
// This stands before an inline template that calls a function object. Without it nvcc warns that the template, which may run on the host,
// calls a kernel's lambda, which may not.
#if defined(__CUDACC__)
#define FASTVAE_ANY_CALLEE _Pragma("nv_exec_check_disable")
#else
#define FASTVAE_ANY_CALLEE
#endif
// FASTVAE_UNROLL(count) unrolls the loop that follows. nvcc's host compiler pass gets no pragma, because it would warn about an unknown
// one.
#if defined(__CUDA_ARCH__)
#define FASTVAE_UNROLL(count) _Pragma("unroll")
#elif defined(__CUDACC__)
#define FASTVAE_UNROLL(count)
#else
#define FASTVAE_UNROLL(count) _Pragma(FASTVAE_STRING(GCC unroll count))
#endif

// Everything that is compiled once per instruction set lives in a namespace of that name. Otherwise the linker, which keeps one copy of
// each inline function, could put AVX512 code where a processor without it runs it.
#ifndef FASTVAE_ISA
#define FASTVAE_ISA scalar
#endif
#define FASTVAE_CONCAT_(a, b) a##b
#define FASTVAE_CONCAT(a, b) FASTVAE_CONCAT_(a, b)
#define FASTVAE_STRING_(a) #a
#define FASTVAE_STRING(a) FASTVAE_STRING_(a)
