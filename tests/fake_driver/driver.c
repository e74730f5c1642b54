// A driver library that runs nothing: device memory is host memory, and a launch writes down what it was given. With it,
// tests see how the CUDA backend behaves with drivers and devices that no test machine has. Built by tests/cuda_driver.rs:
//
//   VERSION      what cuDriverGetVersion says             INIT      what cuInit returns
//   COUNT        visible devices                          SM        compute capability, 10 * major + minor
//   ONLY_VERSION no function but cuDriverGetVersion       NO_LAUNCH everything but cuLaunchKernelEx
//   STUB         every function returns the status of a toolkit's stub library
//   NO_GRAPHS    no streams, graphs and events: what only tests and benches ask for
//
// It is strict about what belongs to what: memory, modules, streams, graphs and events are of the context they were made in,
// and while a stream is captured, its thread may neither wait nor touch memory or modules.
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, STUB_LIBRARY = 34, INVALID_CONTEXT = 201, INVALID_PTX = 218,
       INVALID_HANDLE = 400, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900 };

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
static int allocations, modules, retained, handles;
static _Thread_local void *current;
static _Thread_local int depth;
static char contexts[COUNT + 1], foreign;

#define NOT_WHILE_CAPTURING                                                                                            \
    if (capturing)                                                                                                     \
        return CAPTURE_UNSUPPORTED;

// The stream that this thread captures.
static _Thread_local struct stream *capturing;

// Streams, graphs and events that are alive.
int fake_handles(void) { return __atomic_load_n(&handles, __ATOMIC_SEQ_CST); }

void fake_state(int *state) {
    state[0] = __atomic_load_n(&allocations, __ATOMIC_SEQ_CST);
    state[1] = __atomic_load_n(&modules, __ATOMIC_SEQ_CST);
    state[2] = __atomic_load_n(&retained, __ATOMIC_SEQ_CST);
    state[3] = depth;
    state[4] = current == &foreign;
}

void fake_foreign_context(void) { current = &foreign; }

// What happened in which order: w a stream waits for an event, r an event is recorded, l a launch, f memory is freed.
static char order[256];
static int num_done;

const char *fake_order(void) { return order; }

static void note(char what) {
    int i = __atomic_fetch_add(&num_done, 1, __ATOMIC_SEQ_CST);
    if (i < 255)
        order[i] = what;
}

static int add(int *count, int n) { return __atomic_add_fetch(count, n, __ATOMIC_SEQ_CST); }

#define NEEDS_CONTEXT                                                                                                  \
    if ((char *)current < contexts || (char *)current >= contexts + COUNT)                                             \
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
    case 115: *value = 0; return SUCCESS; // no memory pools
    default: return INVALID_VALUE;
    }
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    (void)device;
    *bytes = (size_t)80 << 30;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **out, int device) {
    add(&retained, 1);
    *out = &contexts[device];
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
    NOT_WHILE_CAPTURING
    if (bytes > (size_t)1 << 40)
        return OUT_OF_MEMORY;
    void **block = aligned_alloc(256, 256 + (bytes + 255) / 256 * 256); // its context stands in front
    *block = current;
    *ptr = (uint64_t)(uintptr_t)block + 256;
    add(&allocations, 1);
    return SUCCESS;
}

int cuMemFree_v2(uint64_t ptr) {
    NEEDS_CONTEXT
    NOT_WHILE_CAPTURING
    void **block = (void **)(uintptr_t)(ptr - 256);
    if (*block != current)
        return INVALID_VALUE;
    free(block);
    note('f');
    add(&allocations, -1);
    return SUCCESS;
}

int cuMemcpyHtoD_v2(uint64_t dst, const void *src, size_t bytes) {
    NEEDS_CONTEXT
    NOT_WHILE_CAPTURING
    memcpy((void *)(uintptr_t)dst, src, bytes);
    return SUCCESS;
}

int cuMemcpyDtoH_v2(void *dst, uint64_t src, size_t bytes) {
    NEEDS_CONTEXT
    NOT_WHILE_CAPTURING
    memcpy(dst, (const void *)(uintptr_t)src, bytes);
    return SUCCESS;
}

struct stream {
    void *context;
};

// The special streams are of every context.
#define NEEDS_STREAM(handle)                                                                                           \
    if ((uintptr_t)(handle) > 2 && ((struct stream *)(handle))->context != current)                                    \
        return INVALID_HANDLE;

int cuStreamSynchronize(void *stream) {
    NEEDS_CONTEXT
    NOT_WHILE_CAPTURING
    NEEDS_STREAM(stream)
    return SUCCESS;
}

struct module {
    void *context;
    char *image;
};

// The "compiler" accepts text that begins like PTX and does not contain the word `broken`.
int cuModuleLoadDataEx(void **module, const char *image, unsigned n, const int *options, void **values) {
    NEEDS_CONTEXT
    NOT_WHILE_CAPTURING
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
    struct module *made = malloc(sizeof *made);
    made->context = current;
    made->image = strdup(image);
    *module = made;
    return SUCCESS;
}

int cuModuleUnload(struct module *module) {
    NEEDS_CONTEXT
    if (module->context != current)
        return INVALID_HANDLE;
    free(module->image);
    free(module);
    add(&modules, -1);
    return SUCCESS;
}

int cuModuleGetFunction(struct module **function, struct module *module, const char *name) {
    NEEDS_CONTEXT
    if (module->context != current)
        return INVALID_HANDLE;
    *function = module;
    return strstr(module->image, name) ? SUCCESS : NOT_FOUND;
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

// What a launch would do: writes 14 words to the address in the third parameter.
struct launch {
    uint32_t *record, words[14];
};

static void run(const struct launch *launch) { memcpy(launch->record, launch->words, sizeof launch->words); }

// A graph, executable or not.
struct graph {
    void *context;
    int num_launches;
    struct launch launches[64];
};

// What was captured so far.
static _Thread_local struct graph captured;

#ifndef NO_LAUNCH
// The words: grid, block, shared memory, stream, cluster, programmatic, the first parameter's low word, and the kernel's
// last parameter if it is a seventh one of 32 bits.
int cuLaunchKernelEx(const struct config *config, struct module *function, void **params, void **extra) {
    NEEDS_CONTEXT
    NEEDS_STREAM(config->stream)
    if (!function || extra)
        return INVALID_VALUE;
    if (function->context != current)
        return INVALID_HANDLE;
    struct launch launch = {(uint32_t *)(uintptr_t)*(uint64_t *)params[2], {0}};
    uint32_t *words = launch.words;
    memcpy(words, config->grid, 12);
    memcpy(words + 3, config->block, 12);
    words[6] = config->shared_bytes;
    words[7] = (uint32_t)(uintptr_t)config->stream;
    words[8] = words[9] = words[10] = 1;
    words[11] = 0;
    for (unsigned i = 0; i < config->num_attributes; i++) {
        const struct attribute *attribute = &config->attributes[i];
        if (attribute->id == 4)
            memcpy(words + 8, attribute->value.dim, 12);
        else if (attribute->id == 6)
            words[11] = (uint32_t)attribute->value.flag;
        else
            return INVALID_VALUE;
    }
    words[12] = (uint32_t)*(uint64_t *)params[0];
    words[13] = *(uint32_t *)params[6];
    note('l');
    if (!capturing || config->stream != capturing)
        run(&launch);
    else if (captured.num_launches < 64)
        captured.launches[captured.num_launches++] = launch;
    else
        return OUT_OF_MEMORY;
    return SUCCESS;
}
#endif

#ifndef NO_GRAPHS
int cuStreamCreate(struct stream **stream, unsigned flags) {
    NEEDS_CONTEXT
    NOT_WHILE_CAPTURING
    if (flags > 1)
        return INVALID_VALUE;
    *stream = calloc(1, sizeof **stream);
    (*stream)->context = current;
    add(&handles, 1);
    return SUCCESS;
}

int cuStreamDestroy_v2(struct stream *stream) {
    NEEDS_CONTEXT
    NEEDS_STREAM(stream)
    free(stream);
    add(&handles, -1);
    return SUCCESS;
}

int cuStreamBeginCapture_v2(struct stream *stream, int mode) {
    NEEDS_CONTEXT
    NEEDS_STREAM(stream)
    if ((uintptr_t)stream <= 2 || capturing || mode != 1)
        return INVALID_VALUE;
    capturing = stream;
    captured.num_launches = 0;
    return SUCCESS;
}

static struct graph *copied(const struct graph *graph) {
    struct graph *copy = malloc(sizeof *copy);
    *copy = *graph;
    add(&handles, 1);
    return copy;
}

int cuStreamEndCapture(struct stream *stream, struct graph **graph) {
    NEEDS_CONTEXT
    if (stream != capturing || !stream)
        return INVALID_VALUE;
    captured.context = current;
    *graph = copied(&captured);
    capturing = NULL;
    return SUCCESS;
}

int cuGraphInstantiateWithFlags(struct graph **exec, const struct graph *graph, unsigned long long flags) {
    NEEDS_CONTEXT
    if (graph->context != current || flags)
        return INVALID_VALUE;
    *exec = copied(graph);
    return SUCCESS;
}

int cuGraphLaunch(const struct graph *exec, struct stream *stream) {
    NEEDS_CONTEXT
    NEEDS_STREAM(stream)
    if (exec->context != current)
        return INVALID_HANDLE;
    for (int i = 0; i < exec->num_launches; i++)
        run(&exec->launches[i]);
    return SUCCESS;
}

int cuGraphDestroy(struct graph *graph) {
    NEEDS_CONTEXT
    free(graph);
    add(&handles, -1);
    return SUCCESS;
}

int cuGraphExecDestroy(struct graph *exec) { return cuGraphDestroy(exec); }

struct event {
    void *context;
    int recorded;
};

int cuEventCreate(struct event **event, unsigned flags) {
    NEEDS_CONTEXT
    if (flags & ~2U) // 2: does not take the time
        return INVALID_VALUE;
    *event = calloc(1, sizeof **event);
    (*event)->context = current;
    add(&handles, 1);
    return SUCCESS;
}

int cuEventRecord(struct event *event, struct stream *stream) {
    NEEDS_CONTEXT
    NEEDS_STREAM(stream)
    event->recorded = 1;
    note('r');
    return event->context == current ? SUCCESS : INVALID_HANDLE;
}

int cuEventSynchronize(const struct event *event) {
    NEEDS_CONTEXT
    NOT_WHILE_CAPTURING
    return event->recorded ? SUCCESS : INVALID_HANDLE;
}

int cuEventElapsedTime(float *milliseconds, const struct event *start, const struct event *end) {
    NEEDS_CONTEXT
    *milliseconds = 0.125F;
    return start->recorded && end->recorded ? SUCCESS : INVALID_HANDLE;
}

int cuEventDestroy_v2(struct event *event) {
    NEEDS_CONTEXT
    free(event);
    add(&handles, -1);
    return SUCCESS;
}
// What cudarc calls besides.
int cuStreamWaitEvent(struct stream *stream, const struct event *event, unsigned flags) {
    NEEDS_CONTEXT
    NEEDS_STREAM(stream)
    note('w');
    return event->context == current && !flags ? SUCCESS : INVALID_HANDLE;
}

int cuCtxSetCurrent(void *next) {
    current = next;
    return SUCCESS;
}

int cuCtxSynchronize(void) {
    NEEDS_CONTEXT
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(uint64_t dst, const void *src, size_t bytes, void *stream) {
    NEEDS_STREAM(stream)
    return cuMemcpyHtoD_v2(dst, src, bytes);
}

int cuMemcpyDtoHAsync_v2(void *dst, uint64_t src, size_t bytes, void *stream) {
    NEEDS_STREAM(stream)
    return cuMemcpyDtoH_v2(dst, src, bytes);
}

int cuMemsetD8Async(uint64_t dst, unsigned char value, size_t bytes, void *stream) {
    NEEDS_CONTEXT
    NEEDS_STREAM(stream)
    memset((void *)(uintptr_t)dst, value, bytes);
    return SUCCESS;
}
#endif

int cuGetErrorName(int error, const char **text) {
    switch (error) {
    case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; return SUCCESS;
    case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; return SUCCESS;
    case INVALID_PTX: *text = "CUDA_ERROR_INVALID_PTX"; return SUCCESS;
    case INVALID_HANDLE: *text = "CUDA_ERROR_INVALID_HANDLE"; return SUCCESS;
    case CAPTURE_UNSUPPORTED: *text = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; return SUCCESS;
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
