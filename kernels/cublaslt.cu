#include "kernels/cublaslt.cuh"

#if !defined(USLI_EMULATED) && __has_include(<cublasLt.h>)

#include <cstdlib>
#include <cstring>

#include <cublasLt.h>
#include <dlfcn.h>

namespace {

constexpr size_t WORKSPACE = (size_t)64 << 20;
/* Shapes that are remembered, and how many places one may have. A pass has some 30; the number of tokens changes from
 * pass to pass, so old ones must give way. */
constexpr size_t ENTRIES = 4096, PLACES = 8;

/* More is not told: where the arena puts a matrix must not decide which algorithm multiplies it. */
constexpr uintptr_t MOST_ALIGNED = 16;

/* What decides the algorithm. Two products with one key run the same one: the heuristic's first. */
struct key {
    int64_t m, n, k, lda, ldb, ldc;
    int trans_a, trans_b, type, c_type, align_a, align_b, align_c, reads_c;
};

struct entry {
    struct key key;
    bool known, usable;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
};

} // namespace

struct usli_cublaslt {
    void *library;
    cublasLtHandle_t handle;
    void *workspace;
    struct entry *entries; /* ENTRIES of them */
/* clang-format off */
#define FUNCTIONS                                                                                           \
    FUNCTION(Create) FUNCTION(Destroy) FUNCTION(Matmul) FUNCTION(MatmulAlgoGetHeuristic)                    \
    FUNCTION(MatmulDescCreate) FUNCTION(MatmulDescDestroy) FUNCTION(MatmulDescSetAttribute)                 \
    FUNCTION(MatrixLayoutCreate) FUNCTION(MatrixLayoutDestroy) FUNCTION(MatmulPreferenceCreate)             \
    FUNCTION(MatmulPreferenceDestroy) FUNCTION(MatmulPreferenceSetAttribute)
/* clang-format on */
#define FUNCTION(name) decltype(&cublasLt##name) name;
    FUNCTIONS
#undef FUNCTION
};

namespace {

bool find_functions(usli_cublaslt *b) {
    bool all = true;
#define FUNCTION(name)                                                                  \
    b->name = reinterpret_cast<decltype(b->name)>(dlsym(b->library, "cublasLt" #name)); \
    all = all && b->name;
    FUNCTIONS
#undef FUNCTION
    return all;
}

void *open_library() {
    static const char *const NAMES[] = { "libcublasLt.so.13", "/usr/local/cuda/lib64/libcublasLt.so.13",
                                         "libcublasLt.so.12", "/usr/local/cuda/lib64/libcublasLt.so.12" };
    for (const char *place : NAMES) {
        void *library = dlopen(place, RTLD_NOW | RTLD_LOCAL);
        if (library) return library;
    }
    return nullptr;
}

cudaDataType_t type_of(int dtype) {
    return dtype == USL_BF16 ? CUDA_R_16BF : dtype == USL_F16 ? CUDA_R_16F : CUDA_R_32F;
}

int alignment(const void *p, int64_t ld_bytes) {
    uintptr_t bits = reinterpret_cast<uintptr_t>(p) | (uintptr_t)ld_bytes | MOST_ALIGNED;
    return (int)(bits & (~bits + 1));
}

key key_of(const usli_gemm_args *g) {
    int64_t e = g->type == USL_F32 ? 4 : 2, c = g->c_type == USL_F32 ? 4 : 2;
    key k;
    memset(&k, 0, sizeof k);
    k.m = g->m, k.n = g->n, k.k = g->k, k.lda = g->lda, k.ldb = g->ldb, k.ldc = g->ldc;
    k.trans_a = g->trans_a, k.trans_b = g->trans_b, k.type = g->type, k.c_type = g->c_type;
    k.align_a = alignment(g->a, g->lda * e);
    k.align_b = alignment(g->b, g->ldb * e);
    k.align_c = alignment(g->c, g->ldc * c);
    k.reads_c = g->beta != 0;
    return k;
}

/* The library's matrices are column-major: a row-major c = a b is its c' = b' a', with b first. */
bool describe(usli_cublaslt *b, const usli_gemm_args *g, entry *e) {
    cublasOperation_t first = g->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N, second = g->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    cudaDataType_t type = type_of(g->type);
    bool ok = b->MatmulDescCreate(&e->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS;
    ok = ok && b->MatmulDescSetAttribute(e->product, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first) ==
                   CUBLAS_STATUS_SUCCESS;
    ok = ok && b->MatmulDescSetAttribute(e->product, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second) ==
                   CUBLAS_STATUS_SUCCESS;
    ok = ok && b->MatrixLayoutCreate(&e->a, type, (uint64_t)(g->trans_b ? g->k : g->n),
                                     (uint64_t)(g->trans_b ? g->n : g->k), g->ldb) == CUBLAS_STATUS_SUCCESS;
    ok = ok && b->MatrixLayoutCreate(&e->b, type, (uint64_t)(g->trans_a ? g->m : g->k),
                                     (uint64_t)(g->trans_a ? g->k : g->m), g->lda) == CUBLAS_STATUS_SUCCESS;
    return ok && b->MatrixLayoutCreate(&e->c, type_of(g->c_type), (uint64_t)g->n, (uint64_t)g->m, g->ldc) ==
                     CUBLAS_STATUS_SUCCESS;
}

bool choose(usli_cublaslt *b, entry *e) {
    cublasLtMatmulPreference_t preference = nullptr;
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    size_t workspace = WORKSPACE;
    uint32_t a = (uint32_t)e->key.align_b, bb = (uint32_t)e->key.align_a, c = (uint32_t)e->key.align_c;
    if (b->MatmulPreferenceCreate(&preference) != CUBLAS_STATUS_SUCCESS) return false;
    b->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    b->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a, sizeof a);
    b->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &bb, sizeof bb);
    b->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c, sizeof c);
    b->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c, sizeof c);
    cublasStatus_t st =
        b->MatmulAlgoGetHeuristic(b->handle, e->product, e->a, e->b, e->c, e->c, preference, 1, &result, &found);
    b->MatmulPreferenceDestroy(preference);
    if (st != CUBLAS_STATUS_SUCCESS || !found || result.state != CUBLAS_STATUS_SUCCESS) return false;
    e->algo = result.algo;
    return true;
}

void forget(usli_cublaslt *b, entry *e) {
    if (e->product) b->MatmulDescDestroy(e->product);
    if (e->a) b->MatrixLayoutDestroy(e->a);
    if (e->b) b->MatrixLayoutDestroy(e->b);
    if (e->c) b->MatrixLayoutDestroy(e->c);
}

size_t hash_of(const key *k) {
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(k);
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < sizeof *k; i++) h = (h ^ bytes[i]) * 1099511628211u;
    return (size_t)(h ^ h >> 32);
}

/* What a shape gets depends on nothing but the shape, so that forgetting one changes no result. */
entry *find(usli_cublaslt *b, const usli_gemm_args *g) {
    key k = key_of(g);
    size_t first = hash_of(&k);
    entry *e = &b->entries[first % ENTRIES];
    for (size_t i = 0; i < PLACES; i++) {
        entry *place = &b->entries[(first + i) % ENTRIES];
        if (place->known && memcmp(&place->key, &k, sizeof k) == 0) return place;
        if (place->known) continue;
        e = place;
        break;
    }
    forget(b, e);
    memset(e, 0, sizeof *e);
    e->key = k;
    e->known = true;
    e->usable = describe(b, g, e) && choose(b, e);
    return e;
}

} // namespace

bool usli_cublaslt_gemm(usli_exec *x, const usli_gemm_args *g, usl_status *st) {
    usli_cublaslt *b = usli_cuda_of(x)->blas;
    if (!b) return false;
    const entry *e = find(b, g);
    if (!e->usable) return false;
    cublasStatus_t status =
        b->Matmul(b->handle, e->product, &g->alpha, g->b, e->a, g->a, e->b, &g->beta, g->c, e->c, g->c, e->c, &e->algo,
                  b->workspace, WORKSPACE, static_cast<cudaStream_t>(x->stream));
    *st = status == CUBLAS_STATUS_SUCCESS
              ? USL_OK
              : usli_fail(x->ctx, USL_ERR_DEVICE, "cuBLASLt answers status %d for a %lldx%lldx%lld product",
                          (int)status, (long long)g->m, (long long)g->n, (long long)g->k);
    return true;
}

usl_status usli_cublaslt_open(usli_exec *x) {
    usli_cuda *c = usli_cuda_of(x);
    if (getenv("USL_NO_CUBLAS")) return USL_OK;
    void *library = open_library();
    if (!library) return USL_OK;
    usli_cublaslt *b = static_cast<usli_cublaslt *>(usli_calloc(x->ctx, 1, sizeof *b));
    entry *entries = static_cast<entry *>(usli_calloc(x->ctx, ENTRIES, sizeof *entries));
    if (!b || !entries) {
        usli_free(x->ctx, b);
        usli_free(x->ctx, entries);
        dlclose(library);
        return usli_nomem(x->ctx, ENTRIES * sizeof *entries);
    }
    b->library = library;
    b->entries = entries;
    c->blas = b;
    if (!find_functions(b) || b->Create(&b->handle) != CUBLAS_STATUS_SUCCESS) {
        b->handle = nullptr;
        usli_cublaslt_close(x);
        return USL_OK;
    }
    return usli_cuda_check(x, cudaMalloc(&b->workspace, WORKSPACE), "cuBLASLt's workspace");
}

void usli_cublaslt_close(usli_exec *x) {
    usli_cublaslt *b = usli_cuda_of(x)->blas;
    if (!b) return;
    for (size_t i = 0; i < ENTRIES; i++) forget(b, &b->entries[i]);
    if (b->handle) b->Destroy(b->handle);
    cudaFree(b->workspace);
    usli_free(x->ctx, b->entries);
    dlclose(b->library);
    usli_free(x->ctx, b);
    usli_cuda_of(x)->blas = nullptr;
}

#else

bool usli_cublaslt_gemm(usli_exec *, const usli_gemm_args *, usl_status *) {
    return false;
}

usl_status usli_cublaslt_open(usli_exec *) {
    return USL_OK;
}

void usli_cublaslt_close(usli_exec *) {}

#endif
