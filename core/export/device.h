/* The GPU as a quantiser of rows: it gives the bytes that the traits' encoders give, so a file does not depend on where
 * it was made. */
#ifndef USLI_EXPORT_DEVICE_H
#define USLI_EXPORT_DEVICE_H

#include "core/model/model.h"

typedef struct usli_slab {
    char *rows, *blocks; /* pinned memory of the host: what the device reads, what it has written */
    char *device_rows, *device_blocks;
} usli_slab;

typedef struct usli_quantiser {
    usli_exec exec;
    usli_arena none;
    float *importance; /* on the device */
    bool weighted;
    bool gone;      /* it ran out of memory: nothing more is asked of it */
    int64_t values; /* that a slab holds, as float32 */
    size_t bytes;   /* of all that is made of them */
    usli_slab slab[2];
} usli_quantiser;

/* One for m's device, or NULL: that is the CPU, or it has no memory for one. */
usli_quantiser *usli_quantiser_open(usl_model *m);
void usli_quantiser_close(usli_quantiser *q); /* NULL is fine */
/* Whether it makes blocks of this type. */
bool usli_quantiser_makes(usl_dtype type);
/* The weights of the columns from now on; NULL: none. */
usl_status usli_quantiser_weigh(usli_quantiser *q, const float *importance, int64_t cols);
/* Takes a->rows rows of a slab to the device, once however many types they become. */
usl_status usli_quantiser_take(usli_quantiser *q, int slab, int64_t rows, int64_t cols, usl_dtype dtype);
/* Makes blocks of them at an offset of the slab's blocks (a multiple of 64), which are the host's after a wait. */
usl_status usli_quantiser_make(usli_quantiser *q, int slab, int64_t rows, int64_t cols, usl_dtype dtype, usl_dtype type,
                               size_t offset);
/* Both slabs' work is done. */
usl_status usli_quantiser_wait(usli_quantiser *q);

#endif
