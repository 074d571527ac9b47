// What lets one formula compile for every instruction set and for CUDA.
#pragma once

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "fastvae: with -ffinite-math-only (or -ffast-math, -Ofast) a compiler drops the tests for NaN; compile without it"
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FASTVAE_MEMBER __host__ __device__ __forceinline__
#else
#define FASTVAE_MEMBER inline __attribute__((always_inline))
#endif
#define FASTVAE_INLINE static FASTVAE_MEMBER
// Before an inline template that calls what it is given: nvcc need not care that a kernel's lambda is for the device alone.
#if defined(__CUDACC__)
#define FASTVAE_ANY_CALLEE _Pragma("nv_exec_check_disable")
#else
#define FASTVAE_ANY_CALLEE
#endif
#if defined(__CUDA_ARCH__)
#define FASTVAE_UNROLL(count) _Pragma("unroll")
#elif defined(__CUDACC__)
#define FASTVAE_UNROLL(count)
#else
#define FASTVAE_UNROLL(count) _Pragma(FASTVAE_STRING(GCC unroll count))
#endif

// Everything compiled once per instruction set lives in a namespace of that name, so that the linker cannot put one set's code in
// another's place.
#ifndef FASTVAE_ISA
#define FASTVAE_ISA scalar
#endif
#define FASTVAE_CONCAT_(a, b) a##b
#define FASTVAE_CONCAT(a, b) FASTVAE_CONCAT_(a, b)
#define FASTVAE_STRING_(a) #a
#define FASTVAE_STRING(a) FASTVAE_STRING_(a)
