/* Stands in for libcuda behind Triton's launcher, where there is no GPU: remembers what the last launch was given, does nothing.
   tests/launch_check.py loads it. */

#include <stdint.h>
#include <string.h>

enum { MAX_ARGUMENTS = 128, SUCCESS = 0 };

/* CUlaunchConfig, as far as it is read here. */
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void *stream, *attributes;
  unsigned n_attributes;
} LaunchConfig;

typedef struct {
  long n_launches;
  LaunchConfig config;
  uint64_t function;
  uint64_t arguments[MAX_ARGUMENTS];
} Launch;

static Launch last;
static int sizes[MAX_ARGUMENTS], n_arguments;

/* Tells how many bytes each argument of the next launch has: a launch does not. */
void stub_expect(int n, const int *bytes) {
  n_arguments = n;
  memcpy(sizes, bytes, n * sizeof(int));
}

const Launch *stub_last_launch(void) { return &last; }

int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **arguments, void **extra) {
  (void)extra;
  last.n_launches++;
  last.config = *config;
  last.function = (uint64_t)function;
  memset(last.arguments, 0, sizeof last.arguments);
  for (int i = 0; i < n_arguments; i++) memcpy(&last.arguments[i], arguments[i], sizes[i]);
  return SUCCESS;
}

/* An H100, as far as Triton asks. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 8: case 97: *value = 232448; break; /* shared memory of a block, and what it can opt in to */
    case 10: *value = 32; break;             /* warp size */
    case 16: *value = 132; break;            /* multiprocessors */
    case 75: *value = 9; break;              /* compute capability */
    case 76: *value = 0; break;
    default: *value = 65536;
  }
  return SUCCESS;
}

static uintptr_t n_modules = 100;

int cuModuleLoadData(void **module, const void *image) { (void)image; *module = (void *)n_modules++; return SUCCESS; }
int cuModuleGetFunction(void **function, void *module, const char *name) { (void)name; *function = module; return SUCCESS; }
int cuFuncGetAttribute(int *value, int attribute, void *f) { (void)f; *value = attribute == 0 ? 1024 : 0; return SUCCESS; }
int cuPointerGetAttribute(void *out, int attribute, uint64_t pointer) {
  (void)attribute;
  memcpy(out, &pointer, sizeof pointer);
  return SUCCESS;
}
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)1; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { (void)error; *text = "an error of the stub"; return SUCCESS; }
int cuOccupancyMaxActiveClusters(int *n, void *f, void *config) { (void)f; (void)config; *n = 1; return SUCCESS; }
int cuStreamIsCapturing(void *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }
int cuCtxGetLimit(size_t *value, int limit) { (void)limit; *value = 1 << 20; return SUCCESS; }

/* What Triton looks up, and has no effect here. */
#define NOTHING(name) int name(void) { return SUCCESS; }
NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxPushCurrent_v2)
NOTHING(cuCtxPopCurrent_v2)
NOTHING(cuCtxSetLimit)
NOTHING(cuModuleUnload)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuStreamSynchronize)
NOTHING(cuMemcpy)
NOTHING(cuMemAlloc_v2)
NOTHING(cuMemFree_v2)
NOTHING(cuMemcpyDtoH_v2)
NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuTensorMapEncodeIm2col)
