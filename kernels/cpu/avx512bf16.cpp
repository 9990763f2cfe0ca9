// AVX-512 with conversion to bfloat16 (Cooper Lake, Sapphire Rapids, Zen 4 and later), for bfloat16 logits.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>

#include <immintrin.h>

#include "problem.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prfchw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prfchw")
#endif
#define FUSEDLOSS_HAS_BF16
#define FUSEDLOSS_VECTOR_BYTES 64
#define FUSEDLOSS_KERNELS avx512bf16_kernels
#include "kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
