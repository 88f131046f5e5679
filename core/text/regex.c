/* Regular expressions of tokenizer.json, over PCRE2. They were written for Oniguruma, whose \s is Unicode's White_Space
 * and whose \w takes marks too: both are spelled out before PCRE2 compiles the pattern. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <string.h>

#include "core/text/parts.h"

struct usli_regex {
    usl_ctx *ctx;
    usli_scan_fn scan; /* what matches instead of PCRE2; the rest is NULL then */
    pcre2_general_context *memory;
    pcre2_code *code;
};

struct usli_matcher {
    usl_ctx *ctx;
    const usli_regex *regex;
    pcre2_general_context *memory;
    pcre2_match_data *data;
};

static void *take(PCRE2_SIZE size, void *ctx) {
    return usli_malloc(ctx, size);
}

static void give(void *ptr, void *ctx) {
    usli_free(ctx, ptr);
}

#define SPACES \
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
/* Oniguruma takes the fractions and raised digits of Latin-1 for letters, no others. */
#define WORDS "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}"

/* What a class escape becomes outside and inside brackets; NULL: as it is. */
static const char *escape_for(char c, bool in_class) {
    switch (c) {
    case 's': return in_class ? SPACES : "[" SPACES "]";
    case 'S': return in_class ? NULL : "[^" SPACES "]";
    case 'w': return in_class ? WORDS : "[" WORDS "]";
    case 'W': return in_class ? NULL : "[^" WORDS "]";
    default: return NULL;
    }
}

static usl_status translate(usl_ctx *ctx, const char *p, size_t len, usli_buf *out) {
    bool in_class = false;
    size_t class_start = 0;
    for (size_t i = 0; i < len; i++) {
        size_t take_bytes = 1;
        const char *put = NULL;
        if (p[i] == '\\' && i + 1 < len) {
            take_bytes = 2;
            put = escape_for(p[i + 1], in_class);
        } else if (!in_class && p[i] == '[') {
            in_class = true;
            if (i + 1 < len && p[i + 1] == '^') take_bytes = 2;
            class_start = i + take_bytes;
        } else if (in_class && p[i] == '[') {
            if (i + 1 >= len || p[i + 1] != ':')
                return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                                 "a class inside a class is not supported in the regular expression %.*s",
                                 (int)(len < 200 ? len : 200), p);
            const char *close = NULL;
            for (size_t k = i + 2; k + 1 < len && !close; k++)
                if (p[k] == ':' && p[k + 1] == ']') close = p + k + 2;
            if (close) take_bytes = (size_t)(close - (p + i));
        } else if (in_class && p[i] == '&' && i + 1 < len && p[i + 1] == '&') {
            return usli_fail(ctx, USL_ERR_UNSUPPORTED,
                             "an intersection of classes is not supported in the regular expression %.*s",
                             (int)(len < 200 ? len : 200), p);
        } else if (in_class && p[i] == ']' && i > class_start) {
            in_class = false;
        }
        if (put)
            USLI_TRY(usli_buf_add(ctx, out, put, strlen(put)));
        else
            USLI_TRY(usli_buf_add(ctx, out, p + i, take_bytes));
        i += take_bytes - 1;
    }
    return USL_OK;
}

usl_status usli_regex_new(usl_ctx *ctx, const char *pattern, size_t len, bool by_hand, usli_regex **out) {
    usli_buf text = { 0 };
    *out = NULL;
    usli_regex *r = usli_calloc(ctx, 1, sizeof *r);
    if (!r) return usli_nomem(ctx, sizeof *r);
    r->ctx = ctx;
    r->scan = by_hand ? usli_scanner_find(pattern, len) : NULL;
    if (r->scan) {
        *out = r;
        return USL_OK;
    }
    usl_status st;
    USLI_TRYGO(usli_buf_add(ctx, &text, "", 0));
    USLI_TRYGO(translate(ctx, pattern, len, &text));
    r->memory = pcre2_general_context_create(take, give, ctx);
    pcre2_compile_context *compile = r->memory ? pcre2_compile_context_create(r->memory) : NULL;
    if (!compile) {
        st = usli_nomem(ctx, 0);
        goto done;
    }
    int error;
    PCRE2_SIZE where;
    r->code = pcre2_compile((PCRE2_SPTR)text.data, text.len,
                            PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &where, compile);
    pcre2_compile_context_free(compile);
    if (!r->code && error == PCRE2_ERROR_HEAP_FAILED) {
        st = usli_nomem(ctx, 0);
        goto done;
    }
    if (!r->code) {
        PCRE2_UCHAR why[128] = "";
        pcre2_get_error_message(error, why, sizeof why);
        st = usli_fail(ctx, USL_ERR_UNSUPPORTED, "the regular expression %.*s cannot be compiled: %s",
                       (int)(len < 200 ? len : 200), pattern, (const char *)why);
        goto done;
    }
    /* Without the just-in-time compiler the interpreter matches the same, only slower. */
    (void)pcre2_jit_compile(r->code, PCRE2_JIT_COMPLETE);
    *out = r;
done:
    usli_free(ctx, text.data);
    if (st != USL_OK) usli_regex_free(r);
    return st;
}

usli_scan_fn usli_regex_scan(const usli_regex *regex) {
    return regex->scan;
}

void usli_regex_free(usli_regex *r) {
    if (!r) return;
    pcre2_code_free(r->code);
    pcre2_general_context_free(r->memory);
    usli_free(r->ctx, r);
}

usl_status usli_matcher_new(usl_ctx *ctx, const usli_regex *regex, usli_matcher **out) {
    *out = NULL;
    usli_matcher *m = usli_calloc(ctx, 1, sizeof *m);
    if (!m) return usli_nomem(ctx, sizeof *m);
    m->ctx = ctx;
    m->regex = regex;
    if (regex->scan) {
        *out = m;
        return USL_OK;
    }
    m->memory = pcre2_general_context_create(take, give, ctx);
    if (m->memory) m->data = pcre2_match_data_create(1, m->memory);
    if (!m->data) {
        usli_matcher_free(m);
        return usli_nomem(ctx, 0);
    }
    *out = m;
    return USL_OK;
}

void usli_matcher_free(usli_matcher *m) {
    if (!m) return;
    pcre2_match_data_free(m->data);
    pcre2_general_context_free(m->memory);
    usli_free(m->ctx, m);
}

usl_status usli_matcher_next(usli_matcher *m, const char *text, size_t len, size_t *start, size_t *end) {
    size_t at = *start;
    if (m->regex->scan) {
        for (; at < len; at += usli_utf8_step(text[at])) {
            *end = m->regex->scan(text, len, at);
            if (*end == at) continue;
            *start = at;
            return USL_OK;
        }
        at = len + 1;
    }
    while (at <= len) {
        int rc = pcre2_match(m->regex->code, (PCRE2_SPTR)text, len, at, PCRE2_NO_UTF_CHECK, m->data, NULL);
        /* The machine code's stack is small; the interpreter takes the heap. */
        if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
            rc = pcre2_match(m->regex->code, (PCRE2_SPTR)text, len, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, m->data,
                             NULL);
        if (rc == PCRE2_ERROR_NOMATCH) break;
        if (rc == PCRE2_ERROR_NOMEMORY) return usli_nomem(m->ctx, 0);
        if (rc < 0) {
            PCRE2_UCHAR why[128] = "";
            pcre2_get_error_message(rc, why, sizeof why);
            return usli_fail(m->ctx, USL_ERR_UNSUPPORTED,
                             "the pre-tokenizer's regular expression gave up on the text: %s", (const char *)why);
        }
        const PCRE2_SIZE *v = pcre2_get_ovector_pointer(m->data);
        if (v[1] > v[0] && v[0] >= at) {
            *start = v[0];
            *end = v[1];
            return USL_OK;
        }
        size_t from = v[1] > at ? v[1] : at;
        at = from < len ? from + usli_utf8_step(text[from]) : len + 1;
    }
    *start = *end = len;
    return USL_OK;
}
