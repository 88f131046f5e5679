/* Ids to text as they come. Decoders treat the first token of a text apart, and a character's bytes may be spread over
 * tokens, so new ids are decoded behind a few known ones, and the text grows only by what no later id can change. */
#include <string.h>

#include "core/text/parts.h"

#define BROKEN "\xEF\xBF\xBD"

/* Tokens of context: enough for the bytes of a character and for what a decoder does at the beginning of a text. */
enum { CONTEXT = 8 };
/* Broken bytes are shown as such after so many tokens that might have mended them. */
enum { HELD = 32 };

struct usl_text_stream {
    usl_ctx *ctx;
    usli_tokenizer *tok;
    usli_ids ids; /* context, then what has not been shown whole */
    size_t known; /* ids of context */
    char *text;   /* of ids, as decoded last; the piece that was shown last stands in it */
    size_t shown; /* bytes of text that were shown or are context */
    char *alone;  /* a piece that does not continue text */
    bool settled; /* all was shown */
    bool skip_special;
};

static bool is_skipped(const usli_text_stream *s, int32_t id) {
    return s->skip_special && id >= 0 && (size_t)id < s->tok->vocab.count && s->tok->vocab.entries[id].special;
}

static usl_status decode(usli_text_stream *s, size_t first, char **text, size_t *len) {
    return usli_tokenizer_decode(s->ctx, s->tok, s->ids.items + first, s->ids.count - first, s->skip_special, text,
                                 len);
}

/* Keeps the last few ids as the context of what comes. It must not begin inside a character. */
static usl_status keep_context(usli_text_stream *s) {
    size_t first = s->ids.count > CONTEXT ? s->ids.count - CONTEXT : 0, len;
    char *text = NULL;
    for (;; first++) {
        USLI_TRY(decode(s, first, &text, &len));
        if (first == s->ids.count || strncmp(text, BROKEN, 3) != 0) break;
        usli_free(s->ctx, text);
    }
    s->ids.count -= first;
    memmove(s->ids.items, s->ids.items + first, s->ids.count * sizeof *s->ids.items);
    s->known = s->ids.count;
    usli_free(s->ctx, s->text);
    s->text = text;
    s->shown = len;
    return USL_OK;
}

usl_status usli_text_stream_new(usl_ctx *ctx, usli_tokenizer *tok, const int32_t *before, size_t count,
                                bool skip_special, usli_text_stream **out) {
    usl_status st = USL_OK;
    *out = NULL;
    usli_text_stream *s = usli_calloc(ctx, 1, sizeof *s);
    if (!s) return usli_nomem(ctx, sizeof *s);
    s->ctx = ctx;
    usli_ctx_retain(ctx);
    s->tok = usli_tokenizer_retain(tok);
    s->skip_special = skip_special;
    size_t first = count;
    for (size_t kept = 0; first && kept < CONTEXT; first--) kept += !is_skipped(s, before[first - 1]);
    USLI_TRYGO(usli_grow(ctx, &s->ids.items, &s->ids.cap, CONTEXT, sizeof *s->ids.items));
    for (; first < count; first++)
        if (!is_skipped(s, before[first])) USLI_TRYGO(usli_ids_add(ctx, &s->ids, before[first]));
    st = keep_context(s);
done:
    if (st == USL_OK)
        *out = s;
    else
        usli_text_stream_free(s);
    return st;
}

void usli_text_stream_free(usli_text_stream *s) {
    if (!s) return;
    usl_ctx *ctx = s->ctx;
    usli_tokenizer_release(s->tok);
    usli_free(ctx, s->ids.items);
    usli_free(ctx, s->text);
    usli_free(ctx, s->alone);
    usli_free(ctx, s);
    usl_ctx_free(ctx);
}

/* The piece of text that is new and certain; all that is new when nothing will follow. */
static usl_status show(usli_text_stream *s, bool all, const char **piece, size_t *len) {
    char *text;
    size_t whole;
    USLI_TRY(decode(s, 0, &text, &whole));
    size_t sure = whole;
    while (!all && sure >= 3 && memcmp(text + sure - 3, BROKEN, 3) == 0) sure -= 3;
    if (sure >= s->shown && memcmp(text, s->text, s->shown) == 0) {
        usli_free(s->ctx, s->text);
        s->text = text;
        *piece = text + s->shown;
        *len = sure - s->shown;
        s->shown = sure;
        s->settled = sure == whole;
        return USL_OK;
    }
    usli_free(s->ctx, text);
    if (sure < whole) return USL_OK;
    /* Broken bytes spoil a character that was shown already: what came after it stands for itself. */
    usli_free(s->ctx, s->alone);
    s->alone = NULL;
    USLI_TRY(decode(s, s->known, &s->alone, len));
    *piece = s->alone;
    s->settled = true;
    return USL_OK;
}

usl_status usli_text_stream_push(usli_text_stream *s, int32_t id, const char **piece, size_t *len) {
    *piece = "";
    *len = 0;
    if (is_skipped(s, id)) return USL_OK;
    if (s->settled) USLI_TRY(keep_context(s));
    s->settled = false;
    USLI_TRY(usli_ids_add(s->ctx, &s->ids, id));
    usl_status st = show(s, s->ids.count - s->known > HELD, piece, len);
    if (st != USL_OK) s->ids.count--;
    return st;
}

usl_status usli_text_stream_end(usli_text_stream *s, const char **piece, size_t *len) {
    *piece = "";
    *len = 0;
    return s->settled ? USL_OK : show(s, true, piece, len);
}
