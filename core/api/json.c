/* usl_json_visit: the pull reader of core/io turned into calls. */
#include <string.h>

#include "core/io/json.h"

static int visit_event(const usli_json_reader *r, const usl_json_visitor *v, void *ud) {
    switch (r->kind) {
    case USLI_JSON_NULL: return v->null ? v->null(ud) : 0;
    case USLI_JSON_BOOL: return v->boolean ? v->boolean(ud, r->i != 0) : 0;
    case USLI_JSON_INT: return v->integer ? v->integer(ud, r->i) : 0;
    case USLI_JSON_FLOAT: return v->real ? v->real(ud, r->d) : 0;
    case USLI_JSON_STRING: return v->string ? v->string(ud, r->str, r->len) : 0;
    case USLI_JSON_ARRAY: return v->begin_array ? v->begin_array(ud) : 0;
    case USLI_JSON_ARRAY_END: return v->end_array ? v->end_array(ud) : 0;
    case USLI_JSON_OBJECT: return v->begin_object ? v->begin_object(ud) : 0;
    case USLI_JSON_KEY: return v->key ? v->key(ud, r->str, r->len) : 0;
    case USLI_JSON_OBJECT_END: return v->end_object ? v->end_object(ud) : 0;
    case USLI_JSON_END: break;
    }
    return 0;
}

usl_status usl_json_visit(usl_ctx *ctx, const char *name, const char *text, size_t len, const usl_json_visitor *v,
                          void *ud) {
    usl_json_visitor visitor;
    memset(&visitor, 0, sizeof visitor);
    memcpy(&visitor, v, v->size < sizeof visitor ? v->size : sizeof visitor);
    usli_json_reader r;
    usli_json_init(&r, ctx, name, text, len);
    usl_status st;
    do {
        st = usli_json_next(&r);
        if (st == USL_OK && visit_event(&r, &visitor, ud))
            st = usli_fail(ctx, USL_ERR_CALLBACK, "%s: the caller stopped", name);
    } while (st == USL_OK && r.kind != USLI_JSON_END);
    usli_json_done(&r);
    return st;
}
