/* What the tests of ops allocate when they run on a real device: tests/ops/rig.h. */
#include <cstring>
#include <cuda_runtime.h>

extern "C" void *rig_pinned(size_t bytes);
extern "C" void *rig_pinned_zeroed(size_t count, size_t bytes);
extern "C" void rig_unpin(void *p);

void *rig_pinned(size_t bytes) {
    void *p = nullptr;
    return cudaHostAlloc(&p, bytes ? bytes : 1, cudaHostAllocPortable) == cudaSuccess ? p : nullptr;
}

void *rig_pinned_zeroed(size_t count, size_t bytes) {
    void *p = rig_pinned(count * bytes);
    return p ? memset(p, 0, count * bytes) : nullptr;
}

void rig_unpin(void *p) {
    cudaFreeHost(p);
}
