// A driver library that runs nothing: device memory is host memory, and a launch writes down what it was given. With it,
// tests see how the CUDA backend behaves with drivers and devices that no test machine has. Built by tests/cuda_driver.rs:
//
//   VERSION      what cuDriverGetVersion says             INIT      what cuInit returns
//   COUNT        visible devices                          SM        compute capability, 10 * major + minor
//   ONLY_VERSION no function but cuDriverGetVersion       NO_LAUNCH everything but cuLaunchKernelEx
//   STUB         every function returns the status of a toolkit's stub library
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, STUB_LIBRARY = 34, INVALID_CONTEXT = 201, INVALID_PTX = 218,
       NOT_FOUND = 500 };

#ifndef VERSION
#define VERSION 12040
#endif
#ifndef INIT
#define INIT SUCCESS
#endif
#ifndef COUNT
#define COUNT 2
#endif
#ifndef SM
#define SM 90
#endif

int cuDriverGetVersion(int *version) {
#ifdef STUB
    return STUB_LIBRARY;
#endif
    *version = VERSION;
    return SUCCESS;
}

#ifndef ONLY_VERSION

// What is alive, for the test to look at.
static int allocations, modules, retained;
static _Thread_local void *current;
static _Thread_local int depth;
static char context, foreign;

void fake_state(int *state) {
    state[0] = __atomic_load_n(&allocations, __ATOMIC_SEQ_CST);
    state[1] = __atomic_load_n(&modules, __ATOMIC_SEQ_CST);
    state[2] = __atomic_load_n(&retained, __ATOMIC_SEQ_CST);
    state[3] = depth;
    state[4] = current == &foreign;
}

void fake_foreign_context(void) { current = &foreign; }

static int add(int *count, int n) { return __atomic_add_fetch(count, n, __ATOMIC_SEQ_CST); }

#define NEEDS_CONTEXT                                                                                                  \
    if (current != &context)                                                                                           \
        return INVALID_CONTEXT;

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : INIT; }

int cuDeviceGetCount(int *count) {
    *count = COUNT;
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < COUNT ? SUCCESS : INVALID_VALUE;
}

int cuDeviceGetName(char *name, int len, int device) {
    (void)device;
    strncpy(name, "Fake GPU", (size_t)len);
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 75: *value = SM / 10; return SUCCESS;
    case 76: *value = SM % 10; return SUCCESS;
    case 16: *value = 132; return SUCCESS;
    case 97: *value = 227 << 10; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    (void)device;
    *bytes = (size_t)80 << 30;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **out, int device) {
    (void)device;
    add(&retained, 1);
    *out = &context;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    add(&retained, -1);
    return SUCCESS;
}

int cuCtxGetCurrent(void **out) {
    *out = current;
    return SUCCESS;
}

static _Thread_local void *below;

int cuCtxPushCurrent_v2(void *next) {
    if (depth++)
        return INVALID_VALUE; // this crate never nests
    below = current;
    current = next;
    return SUCCESS;
}

int cuCtxPopCurrent_v2(void **out) {
    if (!depth--)
        return INVALID_CONTEXT;
    *out = current;
    current = below;
    return SUCCESS;
}

int cuMemAlloc_v2(uint64_t *ptr, size_t bytes) {
    NEEDS_CONTEXT
    if (bytes > (size_t)1 << 40)
        return OUT_OF_MEMORY;
    *ptr = (uint64_t)(uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
    add(&allocations, 1);
    return SUCCESS;
}

int cuMemFree_v2(uint64_t ptr) {
    NEEDS_CONTEXT
    free((void *)(uintptr_t)ptr);
    add(&allocations, -1);
    return SUCCESS;
}

int cuMemcpyHtoD_v2(uint64_t dst, const void *src, size_t bytes) {
    NEEDS_CONTEXT
    memcpy((void *)(uintptr_t)dst, src, bytes);
    return SUCCESS;
}

int cuMemcpyDtoH_v2(void *dst, uint64_t src, size_t bytes) {
    NEEDS_CONTEXT
    memcpy(dst, (const void *)(uintptr_t)src, bytes);
    return SUCCESS;
}

int cuStreamSynchronize(void *stream) {
    (void)stream;
    NEEDS_CONTEXT
    return SUCCESS;
}

// The "compiler" accepts text that begins like PTX and does not contain the word `broken`.
int cuModuleLoadDataEx(void **module, const char *image, unsigned n, const int *options, void **values) {
    NEEDS_CONTEXT
    if (!strstr(image, ".version") || strstr(image, "broken")) {
        char *log = NULL;
        size_t size = 0;
        for (unsigned i = 0; i < n; i++) {
            if (options[i] == 5)
                log = values[i];
            if (options[i] == 6)
                size = (size_t)(uintptr_t)values[i];
        }
        if (log && size)
            strncpy(log, "ptxas fake, line 7; error : broken on purpose", size);
        return INVALID_PTX;
    }
    add(&modules, 1);
    *module = strdup(image);
    return SUCCESS;
}

int cuModuleUnload(void *module) {
    NEEDS_CONTEXT
    free(module);
    add(&modules, -1);
    return SUCCESS;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    NEEDS_CONTEXT
    *function = module;
    return strstr(module, name) ? SUCCESS : NOT_FOUND;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    (void)function;
    NEEDS_CONTEXT
    return attribute == 8 && value > 0 ? SUCCESS : INVALID_VALUE;
}

struct attribute {
    unsigned id;
    char pad[4];
    union {
        char bytes[64];
        unsigned dim[3];
        int flag;
    } value;
};

struct config {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    struct attribute *attributes;
    unsigned num_attributes;
};

#ifndef NO_LAUNCH
// Writes 14 words to the address in the third parameter: grid, block, shared memory, stream, cluster, programmatic,
// the first parameter's low word, and the kernel's last parameter if it is a seventh one of 32 bits.
int cuLaunchKernelEx(const struct config *config, void *function, void **params, void **extra) {
    NEEDS_CONTEXT
    if (!function || extra)
        return INVALID_VALUE;
    uint32_t *record = (uint32_t *)(uintptr_t)*(uint64_t *)params[2];
    memcpy(record, config->grid, 12);
    memcpy(record + 3, config->block, 12);
    record[6] = config->shared_bytes;
    record[7] = (uint32_t)(uintptr_t)config->stream;
    record[8] = record[9] = record[10] = 1;
    record[11] = 0;
    for (unsigned i = 0; i < config->num_attributes; i++) {
        const struct attribute *attribute = &config->attributes[i];
        if (attribute->id == 4)
            memcpy(record + 8, attribute->value.dim, 12);
        else if (attribute->id == 6)
            record[11] = (uint32_t)attribute->value.flag;
        else
            return INVALID_VALUE;
    }
    record[12] = (uint32_t)*(uint64_t *)params[0];
    record[13] = *(uint32_t *)params[6];
    return SUCCESS;
}
#endif

int cuGetErrorName(int error, const char **text) {
    switch (error) {
    case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; return SUCCESS;
    case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; return SUCCESS;
    case INVALID_PTX: *text = "CUDA_ERROR_INVALID_PTX"; return SUCCESS;
    case 999: *text = "CUDA_ERROR_UNKNOWN"; return SUCCESS;
    default: *text = NULL; return INVALID_VALUE;
    }
}

int cuGetErrorString(int error, const char **text) {
    if (cuGetErrorName(error, text))
        return INVALID_VALUE;
    *text = "the fake driver says no";
    return SUCCESS;
}

#endif
