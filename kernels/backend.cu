/* Opening a device, its memory, and the table of ops. */
#include "kernels/device.cuh"

#include <cstdlib>
#include <cstring>

#include "kernels/cublaslt.cuh"
#include "kernels/cudnn_attention.cuh"

extern "C" {
#include "core/base/file.h"
}

/* Each op's file defines usli_cuda_NAME. */
#define USLI_OP(name) extern "C" const usli_op_impl usli_cuda_##name;
#include "core/ops/ops.def"
#undef USLI_OP

usl_status usli_cuda_check(usli_exec *x, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return USL_OK;
    if (error == cudaErrorMemoryAllocation)
        return usli_fail(x->ctx, USL_ERR_NOMEM,
                         "%s: the GPU has no memory left for it; close other programs that use the GPU, or lower "
                         "max_seq_length or the batch",
                         what);
    return usli_fail(x->ctx, USL_ERR_DEVICE, "%s: the GPU reports \"%s\"", what, cudaGetErrorString(error));
}

static cudaStream_t stream_of(const usli_exec *x) {
    return static_cast<cudaStream_t>(x->stream);
}

static void *device_alloc(usli_exec *x, size_t bytes) {
    void *p = nullptr;
    cudaSetDevice(usli_cuda_of(x)->device);
    if (cudaMalloc(&p, bytes) == cudaSuccess) return p;
    (void)cudaGetLastError(); /* the caller says what did not fit */
    return nullptr;
}

static void device_free(usli_exec *x, void *ptr) {
    (void)x;
    cudaFree(ptr);
}

static usl_status copy_in(usli_exec *x, void *dst, const void *host, size_t bytes) {
    if (!bytes) return USL_OK;
    return usli_cuda_check(x, cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, stream_of(x)),
                           "copy to the GPU");
}

/* Waits for everything before it. */
static usl_status copy_out(usli_exec *x, void *host, const void *src, size_t bytes) {
    if (bytes)
        USLI_TRY(usli_cuda_check(x, cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, stream_of(x)),
                                 "copy from the GPU"));
    return usli_cuda_check(x, cudaStreamSynchronize(stream_of(x)), "copy from the GPU");
}

static usl_status zero(usli_exec *x, void *dst, size_t bytes) {
    if (!bytes) return USL_OK;
    return usli_cuda_check(x, cudaMemsetAsync(dst, 0, bytes, stream_of(x)), "clearing memory");
}

static usl_status sync(usli_exec *x) {
    return usli_cuda_check(x, cudaStreamSynchronize(stream_of(x)), "waiting for the GPU");
}

/* Pinning more than there is would have the system end processes, not answer. */
static void *alloc_host(usli_exec *x, size_t bytes) {
    void *p = nullptr;
    uint64_t left = usli_free_memory();
    if (left && bytes > left) return nullptr;
    cudaSetDevice(usli_cuda_of(x)->device);
    if (cudaHostAlloc(&p, bytes, cudaHostAllocDefault) == cudaSuccess) return p;
    (void)cudaGetLastError(); /* the caller says what did not fit */
    return nullptr;
}

static void free_host(usli_exec *x, void *ptr) {
    (void)x;
    cudaFreeHost(ptr);
}

static usl_status copy_beside(usli_exec *x, void *dst, const void *src, size_t bytes, int slot) {
    usli_cuda *c = usli_cuda_of(x);
    cudaStream_t copies = c->copies[slot >= USLI_WEIGHT_SLOT];
    cudaError_t error = cudaEventRecord(c->ready, stream_of(x));
    if (error == cudaSuccess) error = cudaStreamWaitEvent(copies, c->ready, 0);
    if (error == cudaSuccess) error = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, copies);
    if (error == cudaSuccess) error = cudaEventRecord(c->copied[slot], copies);
    return usli_cuda_check(x, error, "copy beside the work");
}

static usl_status await_copy(usli_exec *x, int slot) {
    return usli_cuda_check(x, cudaStreamWaitEvent(stream_of(x), usli_cuda_of(x)->copied[slot], 0),
                           "waiting for a copy");
}

/* USL_NO_GRAPHS=1 runs everything plainly, to compare. */
static bool record(usli_exec *x) {
    if (getenv("USL_NO_GRAPHS")) return false;
    bool began = cudaStreamBeginCapture(stream_of(x), cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    if (!began) (void)cudaGetLastError();
    return began;
}

static void *recorded(usli_exec *x) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    bool made = cudaStreamEndCapture(stream_of(x), &graph) == cudaSuccess && graph &&
                cudaGraphInstantiate(&ready, graph, 0) == cudaSuccess;
    (void)cudaGetLastError(); /* who cannot record runs the work itself */
    if (graph) cudaGraphDestroy(graph);
    return made ? ready : nullptr;
}

static usl_status replay(usli_exec *x, void *work) {
    return usli_cuda_check(x, cudaGraphLaunch(static_cast<cudaGraphExec_t>(work), stream_of(x)), "replaying a graph");
}

static void forget(usli_exec *x, void *work) {
    (void)x;
    if (work) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(work));
}

/* In use once a device is open, cuBLASLt's workspace included: what a plan without a GPU counts. Read on an H200. */
constexpr size_t ABSENT_USED = (size_t)600 << 20;

static usl_status memory(usli_exec *x, size_t *used, size_t *total) {
    size_t left = 0;
    if (usli_cuda_of(x)->device < 0) {
        *used = ABSENT_USED;
        *total = 0;
        return USL_OK;
    }
    USLI_TRY(usli_cuda_check(x, cudaMemGetInfo(&left, total), "asking for free memory"));
    *used = *total - left;
    return USL_OK;
}

static usl_dtype fast_dtype(const usli_exec *x) {
    return usli_cuda_of(x)->sm >= 80 ? USL_BF16 : USL_F16;
}

static const char *libraries(const usli_exec *x) {
    bool blas = usli_cuda_of(x)->blas != nullptr;
    if (usli_cudnn_used(x)) return blas ? "cuBLASLt, cuDNN" : "cuDNN";
    return blas ? "cuBLASLt" : "none";
}

static void close_device(usli_exec *x) {
    usli_cuda *c = usli_cuda_of(x);
    if (!c) return;
    usli_cublaslt_close(x);
    usli_cudnn_close(x);
    if (x->stream) cudaStreamDestroy(stream_of(x));
    for (int i = 0; i < 2; i++)
        if (c->copies[i]) cudaStreamDestroy(c->copies[i]);
    if (c->ready) cudaEventDestroy(c->ready);
    for (int i = 0; i < USLI_COPY_SLOTS; i++)
        if (c->copied[i]) cudaEventDestroy(c->copied[i]);
    usli_free(x->ctx, c);
    x->state = x->stream = nullptr;
}

static const usli_backend CUDA = {
    .name = "cuda",
    .host = false,
    .ops = {
#define USLI_OP(name) &usli_cuda_##name,
#include "core/ops/ops.def"
#undef USLI_OP
    },
    .alloc = device_alloc,
    .free = device_free,
    .copy_in = copy_in,
    .copy_out = copy_out,
    .zero = zero,
    .sync = sync,
    .alloc_host = alloc_host,
    .free_host = free_host,
    .copy_beside = copy_beside,
    .await_copy = await_copy,
    .record = record,
    .recorded = recorded,
    .replay = replay,
    .forget = forget,
    .memory = memory,
    .fast_dtype = fast_dtype,
    .libraries = libraries,
    .close = close_device,
};

extern "C" int usli_cuda_count(void) {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return count;
}

#ifndef USLI_EMULATED
static __global__ void nothing() {}

/* PTX that was translated for a newer device does what it was compiled for. */
static int compiled_for(int sm) {
    cudaFuncAttributes a = {};
    if (cudaFuncGetAttributes(&a, nothing) != cudaSuccess) (void)cudaGetLastError();
    return a.ptxVersion && a.ptxVersion < sm ? a.ptxVersion : sm;
}
#else
static int compiled_for(int sm) {
    return sm;
}
#endif

static usl_status open_stream(usli_exec *x, usli_cuda *c) {
    cudaDeviceProp prop;
    cudaStream_t stream;
    USLI_TRY(usli_cuda_check(x, cudaSetDevice(c->device), "opening the GPU"));
    USLI_TRY(usli_cuda_check(x, cudaGetDeviceProperties(&prop, c->device), "opening the GPU"));
    c->sm = compiled_for(prop.major * 10 + prop.minor);
    c->multiprocessors = prop.multiProcessorCount;
    c->shared_most = prop.sharedMemPerBlockOptin;
    if (c->sm < 75)
        return usli_fail(x->ctx, USL_ERR_UNSUPPORTED,
                         "GPU %d (%s) is of compute capability %d.%d; 7.5 or newer is needed; use device = \"cpu\"",
                         c->device, prop.name, prop.major, prop.minor);
    USLI_TRY(usli_cuda_check(x, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "opening the GPU"));
    x->stream = stream;
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < 2 && error == cudaSuccess; i++)
        error = cudaStreamCreateWithFlags(&c->copies[i], cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&c->ready, cudaEventDisableTiming);
    for (int i = 0; i < USLI_COPY_SLOTS && error == cudaSuccess; i++)
        error = cudaEventCreateWithFlags(&c->copied[i], cudaEventDisableTiming);
    USLI_TRY(usli_cuda_check(x, error, "opening the GPU"));
    USLI_TRY(usli_cublaslt_open(x));
    return usli_cudnn_open(x);
}

extern "C" usl_status usli_cuda_open_absent(usl_ctx *ctx, usli_exec *x) {
    usli_cuda *c = static_cast<usli_cuda *>(usli_calloc(ctx, 1, sizeof *c));
    if (!c) return usli_nomem(ctx, sizeof *c);
    c->device = -1;
    c->sm = 90;
    c->multiprocessors = 132;
    c->shared_most = 227 << 10;
    x->ctx = ctx;
    x->backend = &CUDA;
    x->state = c;
    x->stream = nullptr;
    usl_status st = usli_cudnn_open_absent(x);
    if (st != USL_OK) close_device(x);
    return st;
}

extern "C" usl_status usli_cuda_open(usl_ctx *ctx, int device, usli_exec *x) {
    int count = usli_cuda_count();
    if (device < 0 || device >= count)
        return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                         count ? "device \"cuda:%d\": there are %d GPUs here, counted from 0"
                               : "device \"cuda:%d\": no usable GPU or driver is here (%d found); use device = \"cpu\"",
                         device, count);
    usli_cuda *c = static_cast<usli_cuda *>(usli_calloc(ctx, 1, sizeof *c));
    if (!c) return usli_nomem(ctx, sizeof *c);
    c->device = device;
    x->ctx = ctx;
    x->backend = &CUDA;
    x->state = c;
    x->stream = nullptr;
    usl_status st = open_stream(x, c);
    if (st != USL_OK) {
        close_device(x);
        x->backend = nullptr;
    }
    return st;
}
