/* What a file or folder holds, as JSON: for `info` and for hosts that ask before they load. */
#include <string.h>

#include "core/api/need.h"
#include "core/io/json.h"
#include "core/model/load.h"

static json_t *describe_tensors(const usli_file_tensor *tensors, size_t count) {
    json_t *list = json_array();
    for (size_t i = 0; list && i < count; i++) {
        const usli_file_tensor *t = &tensors[i];
        json_t *shape = json_array();
        for (int d = 0; d < t->ndim; d++) json_array_append_new(shape, json_integer(t->shape[d]));
        json_array_append_new(list, json_pack("{s:s,s:s,s:o,s:I}", "name", t->name, "dtype", usl_dtype_name(t->dtype),
                                              "shape", shape, "bytes", (json_int_t)t->bytes));
    }
    return list;
}

/* Numbers and strings as they are; of an array, its length. */
static json_t *describe_metadata(const usli_gguf *g) {
    json_t *out = json_object();
    for (size_t i = 0; out && i < g->kv_count; i++) {
        const usli_gguf_kv *kv = &g->kv[i];
        json_t *v;
        if (kv->type == USLI_GGUF_STRING)
            v = json_stringn(kv->strings[0].data, kv->strings[0].len);
        else if (kv->type == USLI_GGUF_ARRAY)
            v = json_pack("{s:I}", "length", (json_int_t)kv->count);
        else if (kv->type == USLI_GGUF_F32 || kv->type == USLI_GGUF_F64)
            v = json_real(usli_gguf_float(g, kv->key, 0));
        else
            v = json_integer(usli_gguf_int(g, kv->key, 0));
        json_object_set_new(out, kv->key, v ? v : json_null());
    }
    return out;
}

/* Numbers of the linear weights, and of an adapter of rank 1 on all of them. */
static void count_linears(const usli_config *c, json_int_t *linear, json_int_t *adapter) {
    int64_t rows, cols;
    *linear = *adapter = 0;
    for (int64_t i = 0; i < c->layers * USLI_LINEARS; i++) {
        usli_slot slot = (usli_slot)(i % USLI_LINEARS);
        if (!usli_slot_shape(c, slot, i / USLI_LINEARS, &rows, &cols)) continue;
        int64_t experts = usli_slot_experts(c, slot);
        *linear += rows * cols;
        *adapter += rows + (experts ? experts : 1) * cols;
    }
}

/* Numbers of all weights, however a file packs them. */
static json_int_t count_parameters(const usli_config *c) {
    int64_t rows, cols, sum = 0;
    for (int64_t l = 0; l < c->layers; l++)
        for (int s = 0; s < USLI_LAYER_SLOTS; s++)
            if (usli_slot_shape(c, (usli_slot)s, l, &rows, &cols)) sum += rows * (cols ? cols : 1);
    for (int s = USLI_EMBED; s < USLI_SLOTS; s++)
        if (usli_slot_shape(c, (usli_slot)s, 0, &rows, &cols)) sum += rows * (cols ? cols : 1);
    return sum;
}

static json_t *describe_config(const usli_config *c) {
    json_int_t windowed = 0, linear, adapter;
    for (int64_t l = 0; l < c->layers; l++) windowed += usli_layer_windowed(c, l);
    count_linears(c, &linear, &adapter);
    return json_pack("{s:s,s:s,s:s?,s:s,s:f,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:b,s:I,s:I,s:I,s:I,s:I}",
                     "architecture", c->arch->name, "family", c->arch->model_type, "dtype",
                     c->dtype == USL_DTYPE_AUTO ? NULL : usl_dtype_name(c->dtype), "rope", usli_rope_name(c->rope.kind),
                     "rope_theta", c->rope.theta, "rotated", (json_int_t)c->rot_dim, "window", (json_int_t)c->window,
                     "windowed_layers", windowed, "layers", (json_int_t)c->layers, "hidden", (json_int_t)c->hidden,
                     "intermediate", (json_int_t)c->inter, "heads", (json_int_t)c->heads, "kv_heads",
                     (json_int_t)c->kv_heads, "head_dim", (json_int_t)c->head_dim, "vocab", (json_int_t)c->vocab,
                     "context", (json_int_t)c->context, "tied", c->tied, "linear", linear, "adapter", adapter,
                     "experts", (json_int_t)c->experts, "chosen", (json_int_t)c->top_k, "parameters",
                     count_parameters(c));
}

typedef struct found {
    usli_source src;
    usli_config config;
    bool has_config;
    const char *format;
} found;

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), k = strlen(end);
    return n >= k && strcmp(text + n - k, end) == 0;
}

/* A GGUF may hold a vocabulary alone: then there is nothing to check against an architecture. */
static usl_status look(usl_ctx *ctx, const char *path, found *f) {
    if (usli_is_dir(path)) {
        f->format = "folder";
        USLI_TRY(usli_source_open(ctx, path, &f->src, &f->config));
        f->has_config = true;
    } else if (ends_with(path, ".safetensors")) {
        f->format = "safetensors";
        return usli_safetensors_open(ctx, path, &f->src.safetensors);
    } else {
        f->format = "gguf";
        USLI_TRY(usli_gguf_open(ctx, path, &f->src.gguf));
        if (!f->src.gguf->tensor_count) return USL_OK;
        USLI_TRY(usli_config_from_gguf(ctx, f->src.gguf, &f->config));
        f->has_config = true;
    }
    return usli_source_check(ctx, path, &f->src, &f->config);
}

static json_t *describe(const found *f) {
    const usli_gguf *g = f->src.gguf;
    const usli_safetensors *s = f->src.safetensors;
    json_t *meta = g ? describe_metadata(g) : json_object();
    for (size_t i = 0; s && i < s->meta_count; i++)
        json_object_set_new(meta, s->meta[2 * i], json_string(s->meta[2 * i + 1] ? s->meta[2 * i + 1] : ""));
    return json_pack("{s:s,s:I,s:o,s:o,s:o}", "format", f->format, "files", (json_int_t)(s ? s->map_count : 1),
                     "tensors",
                     g ? describe_tensors(g->tensors, g->tensor_count) : describe_tensors(s->tensors, s->count),
                     "metadata", meta, "config", f->has_config ? describe_config(&f->config) : json_null());
}

usl_status usl_inspect(usl_ctx *ctx, const char *path, const usl_json_visitor *v, void *ud) {
    USLI_NEED_PATH(ctx, path, USL_ACCESS_READ);
    found f = { { NULL, NULL }, { 0 }, false, "" };
    char *text = NULL;
    size_t len = 0;
    usl_status st = look(ctx, path, &f);
    if (st == USL_OK) {
        json_t *json = describe(&f);
        st = json ? usli_json_dump(ctx, json, 0, &text, &len) : usli_nomem(ctx, 0);
        if (json) json_decref(json);
    }
    if (st == USL_OK) st = usl_json_visit(ctx, path, text, len, v, ud);
    usli_free(ctx, text);
    usli_source_close(&f.src);
    usli_config_free(&f.config);
    return st;
}
