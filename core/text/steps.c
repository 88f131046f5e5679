/* What normalisers, pre-tokenisers and decoders do. */
#include <string.h>
#include <utf8proc.h>

#include "core/text/parts.h"

/* ---- Patterns
 * --------------------------------------------------------------------------------------------------------- */

/* Marks start .. end as a match and what lies between it and the last one as none. */
static usl_status mark(usl_ctx *ctx, usli_spans *out, size_t base, size_t *last, size_t start, size_t end) {
    if (start > *last) USLI_TRY(usli_spans_add(ctx, out, base + *last, base + start, false));
    *last = end;
    return end > start ? usli_spans_add(ctx, out, base + start, base + end, true) : USL_OK;
}

static size_t find_text(const char *text, size_t len, size_t from, const char *what, size_t what_len) {
    while (from + what_len <= len) {
        const char *hit = memchr(text + from, what[0], len - what_len - from + 1);
        if (!hit) break;
        from = (size_t)(hit - text);
        if (memcmp(hit, what, what_len) == 0) return from;
        from++;
    }
    return len;
}

static bool step_takes(usli_step_kind kind, int32_t c) {
    switch (kind) {
    case USLI_PRE_DIGITS: return usli_is_numeric(c);
    case USLI_PRE_SPACES: return usli_is_space(c);
    default: return usli_is_punctuation(c);
    }
}

usl_status usli_step_find(usl_ctx *ctx, const usli_step *step, usli_matcher *m, const char *text, size_t len,
                          size_t base, usli_spans *out) {
    size_t last = 0;
    if (m) {
        for (size_t start = 0, end; start < len; start = end) {
            USLI_TRY(usli_matcher_next(m, text, len, &start, &end));
            if (start < len) USLI_TRY(mark(ctx, out, base, &last, start, end));
        }
    } else if (step->text) {
        for (size_t at = 0; (at = find_text(text, len, at, step->text, step->text_len)) < len; at += step->text_len)
            USLI_TRY(mark(ctx, out, base, &last, at, at + step->text_len));
    } else {
        for (size_t i = 0, n; i < len; i += n) {
            n = usli_utf8_step(text[i]);
            if (step_takes(step->kind, usli_utf8_get(text + i))) USLI_TRY(mark(ctx, out, base, &last, i, i + n));
        }
    }
    return mark(ctx, out, base, &last, len, len);
}

static void swap(usli_work *w) {
    usli_pieces p = w->now;
    w->now = w->next;
    w->next = p;
    w->next.text.len = 0;
    w->next.spans.count = 0;
}

/* Appends text to out with the step's matches replaced. */
static usl_status replace(usl_ctx *ctx, const usli_step *step, usli_matcher *m, const char *text, size_t len,
                          usli_spans *found, usli_buf *out) {
    found->count = 0;
    USLI_TRY(usli_step_find(ctx, step, m, text, len, 0, found));
    for (size_t i = 0; i < found->count; i++) {
        const usli_span *s = &found->items[i];
        USLI_TRY(s->match ? usli_buf_add(ctx, out, step->with, step->with_len)
                          : usli_buf_add(ctx, out, text + s->start, s->end - s->start));
    }
    return USL_OK;
}

/* ---- Normalisers
 * ------------------------------------------------------------------------------------------------------- */

static usl_status lowercase(usl_ctx *ctx, const char *text, size_t len, usli_buf *out) {
    for (size_t i = 0; i < len; i += usli_utf8_step(text[i])) {
        int32_t c = usli_utf8_get(text + i);
        /* The one letter whose small form is two characters. */
        if (c == 0x130)
            USLI_TRY(usli_buf_add(ctx, out, "i\xCC\x87", 3));
        else
            USLI_TRY(usli_buf_code(ctx, out, utf8proc_tolower(c)));
    }
    return USL_OK;
}

static usl_status strip_spaces(usl_ctx *ctx, const usli_step *step, const char *text, size_t len, usli_buf *out) {
    size_t start = 0, end = 0;
    while (step->left && start < len && usli_is_space(usli_utf8_get(text + start)))
        start += usli_utf8_step(text[start]);
    for (size_t i = start, n; i < len; i += n) {
        n = usli_utf8_step(text[i]);
        if (!step->right || !usli_is_space(usli_utf8_get(text + i))) end = i + n;
    }
    return end > start ? usli_buf_add(ctx, out, text + start, end - start) : USL_OK;
}

static usl_status normalize(usl_ctx *ctx, const usli_step *step, usli_matcher *m, usli_work *w) {
    const char *text = w->now.text.data;
    size_t len = w->now.text.len;
    usli_buf *out = &w->next.text;
    switch (step->kind) {
    case USLI_NORM_PREPEND:
        USLI_TRY(usli_buf_add(ctx, out, step->text, step->text_len));
        return usli_buf_add(ctx, out, text, len);
    case USLI_NORM_REPLACE: return replace(ctx, step, m, text, len, &w->found, out);
    case USLI_NORM_UNICODE: return usli_unicode_normalize(ctx, text, len, step->unicode, out);
    case USLI_NORM_LOWERCASE: return lowercase(ctx, text, len, out);
    case USLI_NORM_CHARSMAP: return usli_charsmap_apply(ctx, step, text, len, out);
    default: return strip_spaces(ctx, step, text, len, out);
    }
}

usl_status usli_normalize(usl_ctx *ctx, const usli_steps *steps, usli_work *w) {
    for (size_t i = 0; i < steps->count && w->now.text.len; i++) {
        usli_matcher *m = NULL;
        if (steps->items[i].regex) USLI_TRY(usli_matcher_new(ctx, steps->items[i].regex, &m));
        usl_status st = normalize(ctx, &steps->items[i], m, w);
        usli_matcher_free(m);
        USLI_TRY(st);
        swap(w);
    }
    return USL_OK;
}

/* ---- Pre-tokenisers
 * ----------------------------------------------------------------------------------------------------- */

/* Turns the marked spans of one piece into pieces. */
static usl_status cut(usl_ctx *ctx, const usli_step *step, const usli_spans *found, usli_spans *out) {
    size_t first = out->count;
    bool previous = false;
    for (size_t k = 0; k < found->count; k++) {
        /* Merging with the next is merging with the previous, read backwards. */
        const usli_span *s = &found->items[step->behavior == USLI_MERGED_NEXT ? found->count - 1 - k : k];
        bool match = s->match != step->invert, join = false;
        if (step->behavior == USLI_CONTIGUOUS) join = match == previous;
        if (step->behavior == USLI_MERGED_PREVIOUS || step->behavior == USLI_MERGED_NEXT) join = match && !previous;
        previous = match;
        if (step->behavior == USLI_REMOVED && match) continue;
        if (!join || out->count == first)
            USLI_TRY(usli_spans_add(ctx, out, s->start, s->end, false));
        else if (step->behavior == USLI_MERGED_NEXT)
            out->items[out->count - 1].start = s->start;
        else
            out->items[out->count - 1].end = s->end;
    }
    if (step->behavior == USLI_MERGED_NEXT)
        for (size_t a = first, b = out->count; a + 1 < b; a++, b--) {
            usli_span t = out->items[a];
            out->items[a] = out->items[b - 1];
            out->items[b - 1] = t;
        }
    return USL_OK;
}

/* Where all matches and all that lies between them are pieces, nothing needs marking first. */
static usl_status isolate(usl_ctx *ctx, usli_matcher *m, const char *text, usli_span s, usli_spans *out) {
    size_t len = s.end - s.start, last = 0;
    text += s.start;
    for (size_t start = 0, end; start < len; start = end) {
        USLI_TRY(usli_matcher_next(m, text, len, &start, &end));
        if (start > last) USLI_TRY(usli_spans_add(ctx, out, s.start + last, s.start + start, false));
        last = end;
        if (end > start) USLI_TRY(usli_spans_add(ctx, out, s.start + start, s.start + end, false));
    }
    return USL_OK;
}

/* Cuts each piece of w->now and leaves its text alone. */
static usl_status split(usl_ctx *ctx, const usli_step *step, usli_matcher *m, usli_work *w) {
    const usli_spans *in = &w->now.spans;
    for (size_t i = 0; i < in->count; i++) {
        usli_span s = in->items[i];
        if (m && step->behavior == USLI_ISOLATED && !step->invert) {
            USLI_TRY(isolate(ctx, m, w->now.text.data, s, &w->next.spans));
            continue;
        }
        w->found.count = 0;
        USLI_TRY(usli_step_find(ctx, step, m, w->now.text.data + s.start, s.end - s.start, s.start, &w->found));
        USLI_TRY(cut(ctx, step, &w->found, &w->next.spans));
    }
    usli_spans t = w->now.spans;
    w->now.spans = w->next.spans;
    w->next.spans = t;
    w->next.spans.count = 0;
    return USL_OK;
}

/* Puts a space before every piece that does not begin with one. */
static usl_status prefix_spaces(usl_ctx *ctx, usli_work *w) {
    for (size_t i = 0; i < w->now.spans.count; i++) {
        usli_span s = w->now.spans.items[i];
        size_t start = w->next.text.len;
        if (w->now.text.data[s.start] != ' ') USLI_TRY(usli_buf_add(ctx, &w->next.text, " ", 1));
        USLI_TRY(usli_buf_add(ctx, &w->next.text, w->now.text.data + s.start, s.end - s.start));
        USLI_TRY(usli_spans_add(ctx, &w->next.spans, start, w->next.text.len, false));
    }
    swap(w);
    return USL_OK;
}

static usl_status spell_bytes(usl_ctx *ctx, usli_work *w) {
    char spelled[256][2];
    size_t bytes = 0;
    for (int c = 0; c < 256; c++) {
        int32_t code = usli_byte_char((unsigned char)c);
        spelled[c][0] = (char)(code < 0x80 ? code : 0xC0 | code >> 6);
        spelled[c][1] = (char)(0x80 | (code & 63));
    }
    for (size_t i = 0; i < w->now.spans.count; i++) bytes += w->now.spans.items[i].end - w->now.spans.items[i].start;
    USLI_TRY(usli_grow(ctx, &w->next.text.data, &w->next.text.cap, 2 * bytes + 1, 1));
    char *out = w->next.text.data;
    for (size_t i = 0; i < w->now.spans.count; i++) {
        usli_span *s = &w->now.spans.items[i];
        size_t start = (size_t)(out - w->next.text.data);
        for (size_t k = s->start; k < s->end; k++) {
            const char *c = spelled[(unsigned char)w->now.text.data[k]];
            *out++ = c[0];
            if ((unsigned char)c[0] >= 0x80) *out++ = c[1];
        }
        *s = (usli_span){ start, (size_t)(out - w->next.text.data), false };
    }
    *out = 0;
    w->next.text.len = (size_t)(out - w->next.text.data);
    usli_buf t = w->now.text;
    w->now.text = w->next.text;
    w->next.text = t;
    w->next.text.len = 0;
    return USL_OK;
}

static usl_status metaspace(usl_ctx *ctx, const usli_step *step, usli_work *w) {
    for (size_t i = 0; i < w->now.spans.count; i++) {
        usli_span s = w->now.spans.items[i];
        const char *text = w->now.text.data + s.start;
        size_t len = s.end - s.start, start = w->next.text.len;
        bool there = text[0] == ' ' || (len >= step->text_len && memcmp(text, step->text, step->text_len) == 0);
        bool wanted =
            step->prepend == USLI_PREPEND_ALWAYS || (step->prepend == USLI_PREPEND_FIRST && w->from_start && i == 0);
        if (wanted && !there) USLI_TRY(usli_buf_add(ctx, &w->next.text, step->text, step->text_len));
        for (size_t k = 0; k < len; k++)
            USLI_TRY(text[k] == ' ' ? usli_buf_add(ctx, &w->next.text, step->text, step->text_len)
                                    : usli_buf_add(ctx, &w->next.text, text + k, 1));
        USLI_TRY(usli_spans_add(ctx, &w->next.spans, start, w->next.text.len, false));
    }
    swap(w);
    return step->split ? split(ctx, step, NULL, w) : USL_OK;
}

static usl_status pre_tokenize(usl_ctx *ctx, const usli_step *step, usli_matcher *m, usli_work *w) {
    switch (step->kind) {
    case USLI_PRE_BYTE_LEVEL:
        if (step->add_prefix_space) USLI_TRY(prefix_spaces(ctx, w));
        if (m) USLI_TRY(split(ctx, step, m, w));
        return spell_bytes(ctx, w);
    case USLI_PRE_METASPACE: return metaspace(ctx, step, w);
    default: return split(ctx, step, m, w);
    }
}

static usl_status each_step(usl_ctx *ctx, const usli_steps *steps, usli_work *w,
                            usl_status (*run)(usl_ctx *, const usli_step *, usli_matcher *, usli_work *)) {
    for (size_t i = 0; i < steps->count; i++) {
        usli_matcher *m = NULL;
        if (steps->items[i].regex) USLI_TRY(usli_matcher_new(ctx, steps->items[i].regex, &m));
        usl_status st = run(ctx, &steps->items[i], m, w);
        usli_matcher_free(m);
        USLI_TRY(st);
    }
    return USL_OK;
}

usl_status usli_pre_tokenize(usl_ctx *ctx, const usli_steps *steps, usli_work *w) {
    return each_step(ctx, steps, w, pre_tokenize);
}

/* ---- Decoders
 * ----------------------------------------------------------------------------------------------------------- */

/* Text with U+FFFD for each longest broken beginning of a character. */
static usl_status add_lossy(usl_ctx *ctx, usli_buf *out, const char *text, size_t len) {
    while (len) {
        size_t broken, valid = usli_utf8_valid(text, len, &broken);
        USLI_TRY(usli_buf_add(ctx, out, text, valid));
        if (broken) USLI_TRY(usli_buf_add(ctx, out, "\xEF\xBF\xBD", 3));
        text += valid + broken;
        len -= valid + broken;
    }
    return USL_OK;
}

static int hex(char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* The byte that "<0xE2>" spells; -1 for another token. */
static int spelled_byte(const char *text, size_t len) {
    if (len != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') return -1;
    int high = hex(text[3]), low = hex(text[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

/* Runs of byte tokens become characters when all of a run is valid, else one U+FFFD a byte. */
static usl_status byte_fallback(usl_ctx *ctx, usli_work *w) {
    usli_pieces *in = &w->now, *out = &w->next;
    for (size_t i = 0; i < in->spans.count;) {
        size_t start = out->text.len;
        usli_span s = in->spans.items[i];
        int byte = spelled_byte(in->text.data + s.start, s.end - s.start);
        if (byte < 0) {
            USLI_TRY(usli_buf_add(ctx, &out->text, in->text.data + s.start, s.end - s.start));
            i++;
        } else {
            for (; byte >= 0 && i < in->spans.count; i++) {
                char c = (char)byte;
                USLI_TRY(usli_buf_add(ctx, &out->text, &c, 1));
                if (i + 1 < in->spans.count) s = in->spans.items[i + 1];
                byte = spelled_byte(in->text.data + s.start, s.end - s.start);
            }
            size_t bytes = out->text.len - start, broken;
            usli_utf8_valid(out->text.data + start, bytes, &broken);
            if (broken) {
                out->text.len = start;
                for (size_t k = 0; k < bytes; k++) USLI_TRY(usli_buf_add(ctx, &out->text, "\xEF\xBF\xBD", 3));
            }
        }
        USLI_TRY(usli_spans_add(ctx, &out->spans, start, out->text.len, false));
    }
    swap(w);
    return USL_OK;
}

static usl_status fuse(usl_ctx *ctx, usli_work *w) {
    for (size_t i = 0; i < w->now.spans.count; i++) {
        usli_span s = w->now.spans.items[i];
        USLI_TRY(usli_buf_add(ctx, &w->next.text, w->now.text.data + s.start, s.end - s.start));
    }
    USLI_TRY(usli_spans_add(ctx, &w->next.spans, 0, w->next.text.len, false));
    swap(w);
    return USL_OK;
}

/* A token all of whose characters stand for bytes gives these, another one its own bytes. */
static usl_status unspell_bytes(usl_ctx *ctx, usli_work *w) {
    usli_buf *bytes = &w->next.text;
    for (size_t i = 0; i < w->now.spans.count; i++) {
        usli_span s = w->now.spans.items[i];
        const char *text = w->now.text.data + s.start;
        size_t len = s.end - s.start, before = bytes->len, k = 0;
        for (; k < len; k += usli_utf8_step(text[k])) {
            int byte = usli_char_byte(usli_utf8_get(text + k));
            if (byte < 0) break;
            char c = (char)byte;
            USLI_TRY(usli_buf_add(ctx, bytes, &c, 1));
        }
        if (k < len) {
            bytes->len = before;
            USLI_TRY(usli_buf_add(ctx, bytes, text, len));
        }
    }
    swap(w);
    USLI_TRY(add_lossy(ctx, &w->next.text, w->now.text.data, w->now.text.len));
    USLI_TRY(usli_spans_add(ctx, &w->next.spans, 0, w->next.text.len, false));
    swap(w);
    return USL_OK;
}

static void strip(const usli_step *step, const char *text, usli_span *s) {
    size_t n = step->text_len;
    for (int64_t k = 0; k < step->left && s->end - s->start >= n && memcmp(text + s->start, step->text, n) == 0; k++)
        s->start += n;
    for (int64_t k = 0; k < step->right && s->end - s->start >= n && memcmp(text + s->end - n, step->text, n) == 0; k++)
        s->end -= n;
}

/* The sign for a space becomes one; in the first token it goes when a text got one put in front. */
static usl_status unspell_spaces(usl_ctx *ctx, const usli_step *step, usli_work *w) {
    usli_step as = *step;
    for (size_t i = 0; i < w->now.spans.count; i++) {
        usli_span s = w->now.spans.items[i];
        size_t start = w->next.text.len;
        as.with = " ";
        as.with_len = i == 0 && step->prepend != USLI_PREPEND_NEVER ? 0 : 1;
        USLI_TRY(replace(ctx, &as, NULL, w->now.text.data + s.start, s.end - s.start, &w->found, &w->next.text));
        USLI_TRY(usli_spans_add(ctx, &w->next.spans, start, w->next.text.len, false));
    }
    swap(w);
    return USL_OK;
}

static usl_status replace_each(usl_ctx *ctx, const usli_step *step, usli_matcher *m, usli_work *w) {
    for (size_t i = 0; i < w->now.spans.count; i++) {
        usli_span s = w->now.spans.items[i];
        size_t start = w->next.text.len;
        USLI_TRY(replace(ctx, step, m, w->now.text.data + s.start, s.end - s.start, &w->found, &w->next.text));
        USLI_TRY(usli_spans_add(ctx, &w->next.spans, start, w->next.text.len, false));
    }
    swap(w);
    return USL_OK;
}

static usl_status decode(usl_ctx *ctx, const usli_step *step, usli_matcher *m, usli_work *w) {
    switch (step->kind) {
    case USLI_DEC_REPLACE: return replace_each(ctx, step, m, w);
    case USLI_DEC_BYTE_FALLBACK: return byte_fallback(ctx, w);
    case USLI_DEC_FUSE: return fuse(ctx, w);
    case USLI_DEC_BYTE_LEVEL: return unspell_bytes(ctx, w);
    case USLI_DEC_METASPACE: return unspell_spaces(ctx, step, w);
    default:
        for (size_t i = 0; i < w->now.spans.count; i++) strip(step, w->now.text.data, &w->now.spans.items[i]);
        return USL_OK;
    }
}

usl_status usli_decode(usl_ctx *ctx, const usli_steps *steps, usli_work *w) {
    return each_step(ctx, steps, w, decode);
}
