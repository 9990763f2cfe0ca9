// The instruction set that the compiler assumes anyway: SSE2 on x86-64, NEON on aarch64.
#include "problem.h"

#define FUSEDLOSS_VECTOR_BYTES 16
#define FUSEDLOSS_KERNELS baseline_kernels
#include "kernel.h"
