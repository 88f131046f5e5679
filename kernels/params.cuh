/* The list of trained parameters on the device: the host's array travels in kernel parameters, 48 entries a launch,
 * into the workspace, each with the number of its first chunk. A chunk belongs to one parameter. */
#ifndef USLI_KERNELS_PARAMS_CUH
#define USLI_KERNELS_PARAMS_CUH

#include "kernels/device.cuh"

enum { USLI_PARAM_CHUNK = 4096, USLI_PARAMS_SENT = 48 };

typedef struct usli_listed {
    usli_param p;
    int64_t first; /* chunk */
} usli_listed;

typedef struct usli_param_parcel {
    usli_listed item[USLI_PARAMS_SENT];
} usli_param_parcel;

static inline int64_t usli_param_chunks(const usli_param *params, int64_t count) {
    int64_t chunks = 0;
    for (int64_t i = 0; i < count; i++) chunks += usli_ceil_div(params[i].n, USLI_PARAM_CHUNK);
    return chunks;
}

static __global__ void usli_unpack_params(usli_param_parcel parcel, usli_listed *list, int count) {
    int i = (int)threadIdx.x;
    if (i < count) list[i] = parcel.item[i];
}

static inline void usli_send_params(usli_exec *x, const usli_param *params, int64_t count, usli_listed *list) {
    int64_t first = 0;
    for (int64_t i = 0; i < count; i += USLI_PARAMS_SENT) {
        int n = count - i < USLI_PARAMS_SENT ? (int)(count - i) : (int)USLI_PARAMS_SENT;
        usli_param_parcel parcel;
        for (int k = 0; k < n; k++) {
            parcel.item[k] = { params[i + k], first };
            first += usli_ceil_div(params[i + k].n, USLI_PARAM_CHUNK);
        }
        USLI_LAUNCH(1, 64, 0, x, usli_unpack_params)(parcel, list + i, n);
    }
}

/* The parameter that a chunk belongs to. */
__device__ __forceinline__ const usli_listed &usli_find_param(const usli_listed *list, int64_t count, int64_t chunk) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (list[middle].first <= chunk)
            low = middle;
        else
            high = middle - 1;
    }
    return list[low];
}

#endif
