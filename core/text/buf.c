/* Growing bytes, spans and ids. */
#include <stdio.h>
#include <string.h>

#include "core/text/parts.h"

usl_status usli_buf_add(usl_ctx *ctx, usli_buf *b, const char *data, size_t len) {
    USLI_TRY(usli_grow(ctx, &b->data, &b->cap, b->len + len + 1, 1));
    if (len) memcpy(b->data + b->len, data, len);
    b->len += len;
    b->data[b->len] = 0;
    return USL_OK;
}

usl_status usli_buf_code(usl_ctx *ctx, usli_buf *b, int32_t code) {
    char c[4];
    size_t n;
    if (code < 0x80) {
        c[0] = (char)code;
        n = 1;
    } else if (code < 0x800) {
        c[0] = (char)(0xC0 | code >> 6);
        c[1] = (char)(0x80 | (code & 63));
        n = 2;
    } else if (code < 0x10000) {
        c[0] = (char)(0xE0 | code >> 12);
        c[1] = (char)(0x80 | (code >> 6 & 63));
        c[2] = (char)(0x80 | (code & 63));
        n = 3;
    } else {
        c[0] = (char)(0xF0 | code >> 18);
        c[1] = (char)(0x80 | (code >> 12 & 63));
        c[2] = (char)(0x80 | (code >> 6 & 63));
        c[3] = (char)(0x80 | (code & 63));
        n = 4;
    }
    return usli_buf_add(ctx, b, c, n);
}

usl_status usli_spans_grow(usl_ctx *ctx, usli_spans *s) {
    return usli_grow(ctx, &s->items, &s->cap, s->count + 1, sizeof *s->items);
}

usl_status usli_ids_grow(usl_ctx *ctx, usli_ids *ids) {
    return usli_grow(ctx, &ids->items, &ids->cap, ids->count + 1, sizeof *ids->items);
}

static void pieces_free(usl_ctx *ctx, usli_pieces *p) {
    usli_free(ctx, p->text.data);
    usli_free(ctx, p->spans.items);
}

void usli_work_free(usl_ctx *ctx, usli_work *w) {
    pieces_free(ctx, &w->now);
    pieces_free(ctx, &w->next);
    usli_free(ctx, w->found.items);
    memset(w, 0, sizeof *w);
}

usl_status usli_buf_text(usl_ctx *ctx, usli_buf *b, const char *text) {
    return usli_buf_add(ctx, b, text, strlen(text));
}

usl_status usli_buf_json(usl_ctx *ctx, usli_buf *b, const char *text, size_t len) {
    USLI_TRY(usli_buf_add(ctx, b, "\"", 1));
    for (size_t i = 0, start = 0; i <= len; i++) {
        unsigned char c = i < len ? (unsigned char)text[i] : 0;
        if (i < len && c >= 0x20 && c != '"' && c != '\\') continue;
        USLI_TRY(usli_buf_add(ctx, b, text + start, i - start));
        start = i + 1;
        if (i == len) break;
        char escape[8];
        snprintf(escape, sizeof escape, c < 0x20 ? "\\u%04x" : "\\%c", c);
        USLI_TRY(usli_buf_text(ctx, b, escape));
    }
    return usli_buf_add(ctx, b, "\"", 1);
}
