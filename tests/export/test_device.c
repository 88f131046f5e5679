/* Exports by way of a device that quantises: the bytes are the CPU's, slab after slab, with whatever is merged or asked
 * for beside, and where its memory ends the CPU goes on. The device is an imagined one: memory that is not the host's,
 * and work that is not done before somebody waits for it. */
#include "core/export/device.h"

#include "core/base/dtype.h"
#include "core/cpu/cpu.h"
#include "core/export/export.h"
#include "core/quant/traits.h"
#include "tests/test.h"

/* ---- The device ----------------------------------------------------------------------------------------------------
 */

enum { MOST_WORK = 4096 };

typedef struct work {
    void *dst;
    const void *src;
    size_t bytes;
    usli_quantize_args args; /* of an op, where bytes is 0 */
} work;

static struct {
    usli_backend backend;
    usli_op_impl quantize;
    work work[MOST_WORK];
    int waiting, taken, ops;
    int fail_alloc, fail_work; /* the how many-th fails; 0: none */
    usl_status how;
    int calls;
} device;

static void *device_alloc(usli_exec *x, size_t bytes) {
    if (++device.taken == device.fail_alloc) return NULL;
    return usli_malloc_aligned(x->ctx, bytes);
}

static usl_status keep(usli_exec *x, const work *w) {
    if (++device.calls == device.fail_work) return usli_fail(x->ctx, device.how, "the device says no");
    CHECK(device.waiting < MOST_WORK, "too much work");
    device.work[device.waiting++] = *w;
    return USL_OK;
}

static usl_status copy_beside(usli_exec *x, void *dst, const void *src, size_t bytes, int slot) {
    (void)slot;
    return keep(x, &(work){ .dst = dst, .src = src, .bytes = bytes });
}

static usl_status quantize(usli_exec *x, void *args, usli_pass pass, void *ws) {
    (void)pass, (void)ws;
    device.ops++;
    return keep(x, &(work){ .args = *(usli_quantize_args *)args });
}

static usl_status sync_all(usli_exec *x) {
    for (int i = 0; i < device.waiting; i++) {
        work *w = &device.work[i];
        if (w->bytes)
            memcpy(w->dst, w->src, w->bytes);
        else
            USLI_TRY(usli_cpu_quantize.run(x, &w->args, USLI_FORWARD, NULL));
    }
    device.waiting = 0;
    return ++device.calls == device.fail_work ? usli_fail(x->ctx, device.how, "the device says no") : USL_OK;
}

static void imagine(usl_model *m) {
    memset(&device, 0, sizeof device);
    device.backend = *m->exec.backend;
    device.backend.host = false;
    device.backend.alloc = device.backend.alloc_host = device_alloc;
    device.backend.copy_beside = copy_beside;
    device.backend.sync = sync_all;
    device.quantize = (usli_op_impl){ quantize, NULL };
    device.backend.ops[USLI_OP_quantize] = &device.quantize;
    m->exec.backend = &device.backend;
}

/* ---- Exports into memory -------------------------------------------------------------------------------------------
 */

static const usl_dtype OUTPUTS[] = { USL_Q8_0, USL_BF16, USL_Q4_K, USL_MXFP4, USL_Q6_K };
enum { OUTPUT_COUNT = sizeof OUTPUTS / sizeof *OUTPUTS };

typedef struct sheet {
    char *data;
    size_t bytes, room;
} sheet;

static usl_status sink(void *ud, const void *data, size_t bytes) {
    sheet *s = ud;
    if (s->bytes + bytes > s->room) return USL_ERR_INTERNAL;
    memcpy(s->data + s->bytes, data, bytes);
    s->bytes += bytes;
    return USL_OK;
}

/* The embedding and a layer as the first so many outputs. */
static usl_status export_some(const usli_export_source *s, sheet *sheets, int count) {
    usli_slot slot;
    usli_piece p;
    int64_t layer;
    for (int i = 0; i < count; i++) sheets[i].bytes = 0;
    for (int64_t i = 0; i <= USLI_LAYER_SLOTS; i++) {
        if (!usli_export_slot(s->m, i, &slot, &layer)) continue;
        usli_export_out outs[OUTPUT_COUNT];
        usli_slot_piece(&s->m->config, slot, layer, USLI_FORM_GGUF, 0, &p);
        for (int k = 0; k < count; k++)
            outs[k] = (usli_export_out){ p.ndim > 1 ? OUTPUTS[k] : USL_F32, sink, &sheets[k] };
        USLI_TRY(usli_export_tensor(s, slot, layer, &p, true, outs, count));
    }
    return USL_OK;
}

static void take_sheets(const usl_model *m, sheet *sheets) {
    for (int i = 0; i < OUTPUT_COUNT; i++) {
        sheets[i].room = (size_t)usli_model_weight_bytes(m) * 4 + 1;
        sheets[i].data = malloc(sheets[i].room);
    }
}

static void free_sheets(sheet *sheets) {
    for (int i = 0; i < OUTPUT_COUNT; i++) free(sheets[i].data);
}

static void same(const sheet *a, const sheet *b, int count, const char *what, int number) {
    for (int i = 0; i < count; i++)
        CHECK(a[i].bytes == b[i].bytes && memcmp(a[i].data, b[i].data, a[i].bytes) == 0, "%s %d: %s differs", what,
              number, usl_dtype_name(OUTPUTS[i]));
}

/* Through slabs of so many values. */
static usl_status by_device(const usli_export_source *s, int64_t values, sheet *sheets, int count) {
    usli_export_source with = *s;
    device.calls = device.ops = device.taken = device.waiting = 0;
    with.device = usli_quantiser_open(s->m);
    if (with.device) {
        with.device->values = values;
        with.device->bytes = (size_t)values * sizeof(float);
    }
    usl_status st = export_some(&with, sheets, count);
    usli_quantiser_close(with.device);
    return st;
}

static void test_slabs(const usli_export_source *s, sheet *cpu, sheet *got, const char *what) {
    static const int64_t VALUES[] = { 1 << 22, 40000, 6000, 700 };
    CHECK_OK(s->m->ctx, export_some(s, cpu, OUTPUT_COUNT));
    imagine(s->m);
    for (int i = 0; i < 4; i++) {
        CHECK_OK(s->m->ctx, by_device(s, VALUES[i], got, OUTPUT_COUNT));
        CHECK(device.ops || i > 1, "%s: the device was not asked", what); /* a row as five types fits no small one */
        same(cpu, got, OUTPUT_COUNT, what, i);
        CHECK_OK(s->m->ctx, by_device(s, VALUES[i], got, 1));
        CHECK(device.ops || i > 2, "%s: the device was not asked for one", what);
        same(cpu, got, 1, what, i);
    }
}

static void test_refusals(const usli_export_source *s, const sheet *cpu, sheet *got) {
    usl_ctx *ctx = s->m->ctx;
    bool whole = false;
    for (device.fail_alloc = 1; !whole; device.fail_alloc++) {
        CHECK_OK(ctx, by_device(s, 40000, got, 1));
        whole = device.taken < device.fail_alloc;
        CHECK(whole == (device.ops > 0), "allocation %d of the device", device.fail_alloc);
        same(cpu, got, 1, "without allocation", device.fail_alloc);
    }
    CHECK(device.fail_alloc == 11, "%d allocations", device.fail_alloc - 2);
    device.fail_alloc = 0;
    device.how = USL_ERR_NOMEM;
    for (device.fail_work = 1, whole = false; !whole; device.fail_work += 1 + device.fail_work / 8) {
        CHECK_OK(ctx, by_device(s, 40000, got, 1));
        whole = device.calls < device.fail_work;
        same(cpu, got, 1, "without work", device.fail_work);
    }
    device.how = USL_ERR_DEVICE;
    for (device.fail_work = 1, whole = false; !whole; device.fail_work += 1 + device.fail_work / 4) {
        usl_status st = by_device(s, 40000, got, 1);
        whole = device.calls < device.fail_work;
        CHECK(st == (whole ? USL_OK : USL_ERR_DEVICE), "work %d fails: %d", device.fail_work, (int)st);
    }
    device.fail_work = 0;
}

/* ---- Models --------------------------------------------------------------------------------------------------------
 */

static usl_imatrix *any_importance(usl_model *m) {
    int32_t ids[40];
    usl_imatrix *im = NULL;
    for (int i = 0; i < 40; i++) ids[i] = i * 23 + 3;
    CHECK_OK(m->ctx, usli_imatrix_new(m, ids, 40, 20, &im));
    return im;
}

int main(void) {
    usl_ctx_opts ctx_opts = USL_CTX_OPTS_INIT;
    usl_ctx *ctx;
    ctx_opts.threads = 2;
    CHECK_OK(NULL, usl_ctx_new(&ctx_opts, &ctx));
    for (int kind = 0; kind < 3; kind++) {
        static const char *const NAMES[] = { "16 bits", "merged", "weighted" };
        usl_model_opts opts = USL_MODEL_OPTS_INIT;
        usl_model *m;
        opts.device = "cpu";
        opts.dtype = kind ? USL_F32 : USL_BF16;
        CHECK_OK(ctx, usl_model_open(ctx, "examples/tiny-llama", &opts, &m));
        const usli_backend *real = m->exec.backend;
        usli_export_source source = { .m = m, .base = m };
        usl_lora_opts lora = USL_LORA_OPTS_INIT;
        lora.init = "random";
        lora.rank = 4;
        if (kind == 1) CHECK_OK(ctx, usl_model_add_lora(m, &lora));
        if (kind == 2) source.importance = any_importance(m);
        sheet cpu[OUTPUT_COUNT], got[OUTPUT_COUNT];
        take_sheets(m, cpu), take_sheets(m, got);
        test_slabs(&source, cpu, got, NAMES[kind]);
        if (kind < 2) test_refusals(&source, cpu, got);
        free_sheets(cpu), free_sheets(got);
        m->exec.backend = real;
        usli_imatrix_free((usl_imatrix *)(uintptr_t)source.importance);
        usl_model_free(m);
    }
    usl_ctx_free(ctx);
    return test_end("device");
}
