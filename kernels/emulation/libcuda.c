// Stand-ins for NVIDIA's driver and cuBLASLt, for a test of how they are opened and called: the names that version 12.0 has of what we call, and
// no later ones. What only computes does nothing; memory and copies are real. Built twice, the second time with -DCUBLAS_LT.

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
#define CALL __attribute__((visibility("default"))) int

#ifdef CUBLAS_LT
#ifndef TOO_NEW
#define TOO_NEW 0
#endif

// Whether the driver beside it captures, when 13.3 refuses to choose.
static int captures(void) {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    int (*capturing)(void) = driver ? (int (*)(void))dlsym(driver, "standInCaptures") : NULL;
    return capturing != NULL && capturing();
}

// What was made and not destroyed, and the most of it that there may be.
enum { MOST_ALIVE = 5000 };
static int alive;
// One of a later version than the driver starts and does not work.
CALL cublasLtCreate(void** handle) { *handle = malloc(8); return TOO_NEW; }
size_t __attribute__((visibility("default"))) cublasLtGetVersion(void) { return 120000; }
const char* __attribute__((visibility("default"))) cublasLtGetStatusName(int status) { return status == 4242 ? "unknown" : "CUBLAS_STATUS_OF_A_STAND_IN"; }
CALL cublasLtDestroy(void* handle) { free(handle); return alive != 0; }
CALL cublasLtMatmulDescCreate(void** made, int compute, int scale) {
    // 32-bit floats, also for the factors.
    if (compute != 68 || scale != 0) return 15;
    if (alive > MOST_ALIVE) return 3;
    alive++, *made = malloc(8);
    return 0;
}
CALL cublasLtMatmulDescDestroy(void* made) { alive--, free(made); return 0; }
CALL cublasLtMatmulDescSetAttribute(void* made, int which, const void* value, size_t bytes) {
    // Only that the first operand is turned.
    return which != 3 || bytes != 4 || *(const int*)value != 1 ? 7 : 0;
}
CALL cublasLtMatmulPreferenceCreate(void** made) { alive++, *made = malloc(8); return 0; }
CALL cublasLtMatmulPreferenceDestroy(void* made) { alive--, free(made); return 0; }
CALL cublasLtMatmulPreferenceSetAttribute(void* made, int which, const void* value, size_t bytes) {
    return which != 1 || bytes != 8 || *(const u64*)value == 0 ? 7 : 0;
}
CALL cublasLtMatrixLayoutCreate(void** made, int type, u64 rows, u64 columns, long long apart) {
    if (apart < (long long)rows || columns == 0) return 7;
    alive++, *made = malloc(8);
    return 0;
}
CALL cublasLtMatrixLayoutDestroy(void* made) { alive--, free(made); return 0; }
CALL cublasLtMatmulAlgoGetHeuristic(void* handle, void* what, void* a, void* b, void* c, void* d, void* preference, int most, void* found, int* count) {
    if (captures()) return 14;
    // 64 bytes of an algorithm, a size, a status, a number and four more.
    memset(found, 0, 96);
    ((int*)found)[18] = 4242;
    *count = most;
    return 0;
}
CALL cublasLtMatmul(void* handle, void* what, const void* alpha, const void* a, void* la, const void* b, void* lb, const void* beta,
    const void* c, void* lc, void* d, void* ld, const void* algorithm, void* workspace, size_t bytes, void* stream) {
    // A number of a later version.
    if (beta != NULL && ((const float*)beta)[0] == 0 && alpha != NULL && a == NULL) return 4242;
    // No memory for a kernel.
    if (b == NULL) return 3;
    // What a library of a later version asks of its workspace.
    return (size_t)workspace % 256 != 0 || stream == NULL ? 7 : 0;
}

#else

enum { INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201, UNSUPPORTED = 900 };

static int ready, retained, capturing;
static __thread void* current;
static char context;

// What the thread must have, and what may not be asked for while work is written down.
#define NEEDS_CONTEXT if (current == NULL) return INVALID_CONTEXT
#define NOT_CAPTURED NEEDS_CONTEXT; if (capturing) return UNSUPPORTED

CALL cuDriverGetVersion(int* version) { *version = 12000; return 0; }
CALL cuInit(unsigned flags) { ready = flags == 0; return 0; }
// A number that no version that we know has.
enum { OF_A_LATER_VERSION = 4242 };
CALL cuGetErrorName(int code, const char** name) { *name = code == OF_A_LATER_VERSION ? NULL : "CUDA_ERROR_OF_A_STAND_IN"; return 0; }
CALL cuGetErrorString(int code, const char** words) { *words = code == OF_A_LATER_VERSION ? NULL : "as the stand-in has it"; return 0; }
CALL cuDeviceGetCount(int* count) { *count = 1; return ready ? 0 : NOT_INITIALIZED; }
CALL cuDeviceGet(int* device, int ordinal) { *device = 0; return !ready ? NOT_INITIALIZED : ordinal == 0 ? 0 : 101; }
CALL cuDeviceGetName(char* name, int bytes, int device) { strncpy(name, "a stand-in", bytes); return 0; }
CALL cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 1ull << 36; return 0; }
CALL cuDeviceGetAttribute(int* value, int which, int device) {
    // Compute capability 8.0.
    *value = which == 75 ? 8 : which == 76 ? 0 : 100;
    return 0;
}
CALL cuDevicePrimaryCtxRetain(void** made, int device) { retained++, *made = &context; return 0; }
CALL cuDevicePrimaryCtxRelease_v2(int device) { return retained-- > 0 ? 0 : INVALID_CONTEXT; }
CALL cuCtxSetCurrent(void* made) { current = made; return retained > 0 ? 0 : INVALID_CONTEXT; }
CALL cuMemGetInfo_v2(size_t* free, size_t* total) { NEEDS_CONTEXT; *free = 30ull << 30, *total = 1ull << 36; return 0; }
CALL cuMemAlloc_v2(u64* at, size_t bytes) { NOT_CAPTURED; *at = bytes ? (u64)aligned_alloc(512, (bytes + 511) / 512 * 512) : 0; return *at ? 0 : INVALID_VALUE; }
CALL cuMemFree_v2(u64 at) { NOT_CAPTURED; free((void*)at); return 0; }
CALL cuMemHostAlloc(void** at, size_t bytes, unsigned flags) { NOT_CAPTURED; if (bytes == OF_A_LATER_VERSION) return OF_A_LATER_VERSION; *at = malloc(bytes); return 0; }
CALL cuMemFreeHost(void* at) { NOT_CAPTURED; free(at); return 0; }
CALL cuMemsetD8Async(u64 at, unsigned char value, size_t bytes, void* stream) { NOT_CAPTURED; memset((void*)at, value, bytes); return 0; }
CALL cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, void* stream) { NOT_CAPTURED; memcpy((void*)to, from, bytes); return 0; }
CALL cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, void* stream) { NOT_CAPTURED; memcpy(to, (void*)from, bytes); return 0; }

struct Copy {
    size_t from_x, from_y; int from_kind; const void* from_host; u64 from_device; void* from_array; size_t from_pitch;
    size_t to_x, to_y; int to_kind; void* to_host; u64 to_device; void* to_array; size_t to_pitch;
    size_t width, height;
};

CALL cuMemcpy2DAsync_v2(const struct Copy* copy, void* stream) {
    NOT_CAPTURED;
    // 1: the machine's memory, 2: the card's.
    const char* from = copy->from_kind == 1 ? copy->from_host : (const char*)copy->from_device;
    char* to = copy->to_kind == 1 ? copy->to_host : (char*)copy->to_device;
    if (copy->from_kind + copy->to_kind != 3 || copy->width > copy->from_pitch || copy->width > copy->to_pitch) return INVALID_VALUE;
    for (size_t y = 0; y < copy->height; y++) memcpy(to + y * copy->to_pitch, from + y * copy->from_pitch, copy->width);
    return 0;
}

CALL cuStreamCreate(void** made, unsigned flags) { NOT_CAPTURED; *made = malloc(8); return flags == 1 ? 0 : INVALID_VALUE; }
CALL cuStreamDestroy_v2(void* stream) { NEEDS_CONTEXT; free(stream); return 0; }
// Whether something is done: 600 is CUDA_ERROR_NOT_READY, which every second time is said.
static int looks;
CALL cuStreamQuery(void* stream) { NOT_CAPTURED; return looks++ % 2 ? 0 : 600; }
CALL standInCaptures(void) { return capturing; }
CALL cuStreamBeginCapture_v2(void* stream, int mode) { NOT_CAPTURED; capturing = 1; return mode == 1 ? 0 : INVALID_VALUE; }
CALL cuStreamEndCapture(void* stream, void** graph) { NEEDS_CONTEXT; capturing = 0, *graph = malloc(8); return 0; }
CALL cuGraphInstantiateWithFlags(void** made, void* graph, u64 flags) { NOT_CAPTURED; *made = malloc(8); return flags ? INVALID_VALUE : 0; }
CALL cuGraphDestroy(void* graph) { free(graph); return 0; }
CALL cuGraphExecDestroy(void* made) { free(made); return 0; }
CALL cuGraphLaunch(void* made, void* stream) { NOT_CAPTURED; return 0; }
CALL cuEventCreate(void** made, unsigned flags) { NOT_CAPTURED; *made = malloc(8); return 0; }
CALL cuEventDestroy_v2(void* event) { free(event); return 0; }
CALL cuEventRecord(void* event, void* stream) { NOT_CAPTURED; return 0; }
CALL cuEventQuery(void* event) { NOT_CAPTURED; return looks++ % 2 ? 0 : 600; }
CALL cuEventElapsedTime(float* milliseconds, void* from, void* to) { NOT_CAPTURED; *milliseconds = 1500; return 0; }
CALL cuModuleLoadData(void** made, const void* image) { NOT_CAPTURED; *made = malloc(8); return 0; }
CALL cuModuleUnload(void* module) { NOT_CAPTURED; free(module); return 0; }
CALL cuModuleGetFunction(void** made, void* module, const char* name) { NEEDS_CONTEXT; *made = module; return 0; }
CALL cuFuncSetAttribute(void* function, int which, int value) { NEEDS_CONTEXT; return which == 8 && value <= 99 << 10 ? 0 : INVALID_VALUE; }
CALL cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared, void* stream,
    void** parameters, void** extra) {
    NEEDS_CONTEXT;
    return parameters == NULL || extra != NULL || y > 65535 || z > 65535 || tx > 1024 || stream == NULL ? INVALID_VALUE : 0;
}

#endif
