// AVX2 with FMA (Haswell, Zen and later).
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>

#include "problem.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FUSEDLOSS_VECTOR_BYTES 32
#define FUSEDLOSS_KERNELS avx2_kernels
#include "kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
