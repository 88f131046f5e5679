/* The look at what was written, before it gets its name. Whatever reads it back reads it as any model is read. */
#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/export/export.h"
#include "core/infer/generate.h"
#include "core/quant/traits.h"

/* Rows of a matrix that are compared, and tokens of a prompt. */
enum { SAMPLED = 64, PROMPT = 24, CONTEXT = 64 };

static const char *const TEXTS[] = { "The quick brown fox jumps over the lazy dog.",
                                     "In 1969, 12 people said:  \"it's 3.14 \xE2\x82\xAC, isn't it?\"\n\n- yes",
                                     "def f(x):\n    return x + 1  # \xE4\xBD\xA0\xE5\xA5\xBD, caf\xC3\xA9" };
enum { TEXT_COUNT = sizeof TEXTS / sizeof *TEXTS };

typedef struct look {
    const usli_export_source *s;
    usl_model *read;
    usl_dtype vectors;
    float *live, *meant, *got; /* (widest) */
    unsigned char *bytes;      /* of a row in any type */
    double error, size;        /* sums of squares */
    double noise;              /* sum over matrices of their relative squared errors */
} look;

static usl_status differs(const look *k, usli_slot slot, int64_t layer) {
    char name[160];
    usli_slot_name(&k->s->m->config, slot, layer, false, name, sizeof name);
    return usli_fail(k->s->m->ctx, USL_ERR_NUMERIC,
                     "%s reads back otherwise than it was exported; please report it (verify = false or --no-verify "
                     "skips this check)",
                     name);
}

static usl_status look_at_vector(look *k, usli_slot slot, int64_t layer) {
    const usli_matrix *a = &usli_export_weight(k->s, slot, layer)->m, *b = &usli_model_weight(k->read, slot, layer)->m;
    const float *want = a->data, *got = b->data;
    float offset = usli_slot_is_norm(slot) ? k->s->m->config.arch->norm_offset : 0;
    for (int64_t i = 0; i < a->cols; i++) {
        float value;
        unsigned char bytes[8];
        usli_traits_of(k->vectors)->encode(&want[i], NULL, bytes, 1);
        usli_traits_of(k->vectors)->decode(bytes, &value, 1);
        /* A GGUF holds the sum with the offset. */
        if (!(fabsf(got[i] - value) <= 1e-6f * (fabsf(value) + offset)) && !(isnan(value) && isnan(got[i])))
            return differs(k, slot, layer);
    }
    return USL_OK;
}

/* What is read is, to the bit, what encoding the row gives. */
static usl_status look_at_matrix(look *k, usli_slot slot, int64_t layer) {
    const usli_matrix *w = &usli_model_weight(k->read, slot, layer)->m;
    bool raw = usli_export_raw(k->s, slot, layer, w->dtype);
    double error = 0, size = 0;
    for (int64_t r = 0; r < w->rows; r += 1 + w->rows / SAMPLED) {
        usli_model_rows(k->s->m, slot, layer, true, r, 1, k->live);
        usli_export_rows(k->s, slot, layer, r, 1, k->meant);
        usli_model_rows(k->read, slot, layer, false, r, 1, k->got);
        if (!raw) {
            usli_traits_of(w->dtype)->encode(k->meant, usli_imatrix_of(k->s->importance, slot, layer), k->bytes,
                                             w->cols);
            usli_traits_of(w->dtype)->decode(k->bytes, k->meant, w->cols);
        }
        if (memcmp(k->meant, k->got, (size_t)w->cols * sizeof(float)) != 0) return differs(k, slot, layer);
        for (int64_t c = 0; c < w->cols; c++) {
            double d = (double)k->got[c] - (double)k->live[c];
            error += d * d;
            size += (double)k->live[c] * (double)k->live[c];
        }
    }
    k->error += error;
    k->size += size;
    if (size > 0) k->noise += error / size;
    return USL_OK;
}

static usl_status look_at_weights(look *k) {
    usl_model *m = k->s->m;
    int64_t widest = 1, slots = usli_export_slots(m), layer;
    usli_slot slot;
    usl_status st = USL_OK;
    for (int64_t i = 0; i < slots; i++)
        if (usli_export_slot(m, i, &slot, &layer) && usli_model_weight(m, slot, layer)->m.cols > widest)
            widest = usli_model_weight(m, slot, layer)->m.cols;
    size_t bytes = (size_t)widest * (3 * sizeof(float) + 8);
    float *rows = usli_malloc_aligned(m->ctx, bytes);
    if (!rows) return usli_nomem(m->ctx, bytes);
    k->live = rows;
    k->meant = rows + widest;
    k->got = rows + 2 * widest;
    k->bytes = (unsigned char *)(rows + 3 * widest);
    for (int64_t i = 0; i < slots; i++) {
        if (!usli_export_slot(m, i, &slot, &layer)) continue;
        USLI_TRYGO(usli_progress(m->ctx, "checking", (uint64_t)i, (uint64_t)slots));
        int64_t n, cols;
        if (!usli_slot_shape(&k->read->config, slot, layer, &n, &cols)) {
            st = differs(k, slot, layer);
            goto done;
        }
        USLI_TRYGO(cols ? look_at_matrix(k, slot, layer) : look_at_vector(k, slot, layer));
    }
done:
    usli_free_aligned(m->ctx, rows);
    return st;
}

/* ---- Logits --------------------------------------------------------------------------------------------------------
 */

/* Sums of squares of the logits and of their difference, each row less its mean. */
static void add_distance(const float *a, const float *b, int64_t n, double *error, double *size) {
    double mean_a = 0, mean_b = 0;
    for (int64_t i = 0; i < n; i++) {
        mean_a += (double)a[i] / (double)n;
        mean_b += (double)b[i] / (double)n;
    }
    for (int64_t i = 0; i < n; i++) {
        double x = (double)a[i] - mean_a, d = (double)b[i] - mean_b - x;
        *error += d * d;
        *size += x * x;
    }
}

/* The ids of a prompt: of a text, or any where there is no tokenizer for it. */
static usl_status prompt_of(const usl_model *m, const usli_tokenizer *tok, int which, int64_t most, int32_t **ids,
                            int64_t *count) {
    size_t n = 0;
    *ids = NULL;
    if (tok)
        USLI_TRY(usli_tokenizer_encode(m->ctx, tok, TEXTS[which], strlen(TEXTS[which]), USLI_ENCODE_SPECIAL, ids, &n));
    for (size_t i = 0; i < n; i++)
        if ((*ids)[i] >= m->config.vocab) n = 0; /* a tokenizer of another model: a folder may hold it */
    if (!n) {
        usli_free(m->ctx, *ids);
        n = PROMPT;
        if (!(*ids = usli_malloc(m->ctx, n * sizeof **ids))) return usli_nomem(m->ctx, n * sizeof **ids);
        for (size_t i = 0; i < n; i++)
            (*ids)[i] = (int32_t)((i * 7919 + (size_t)which * 104729) % (size_t)m->config.vocab);
    }
    *count = (int64_t)n < most ? (int64_t)n : most;
    return USL_OK;
}

static int64_t positions_of(const look *k) {
    const usl_model *m = k->s->m;
    int64_t most = m->context < PROMPT ? m->context : PROMPT;
    if (k->read->context < most) most = k->read->context;
    /* What no reader of the format does is told when it is written, and not looked at here. */
    if (m->config.window > 0 && !k->read->config.window && m->config.window < most) most = m->config.window;
    return most;
}

/* Vectors of the model that is read, and others in their place; twice is once back. */
typedef struct other_vector {
    usli_weight *w;
    const void *data;
} other_vector;

static void exchange(other_vector *v, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const void *data = v[i].w->m.data;
        v[i].w->m.data = v[i].w->d.data = v[i].data;
        v[i].data = data;
    }
}

static usl_status logits_of(const look *k, const usli_tokenizer *tok, usl_model *m, int which, float *logits,
                            int64_t *count) {
    int32_t *ids;
    usl_status st = prompt_of(k->s->m, tok, which, positions_of(k), &ids, count);
    if (st == USL_OK) st = usli_logits(m, ids, *count, logits);
    usli_free(k->s->m->ctx, ids);
    return st;
}

/* How a model answers small errors: the relative change of its logits over the root sum of errors of DISTURBED in the
 * norms before attention and MLP. About one, or less; far more where scores are sharp, since softmax is then a switch.
 */
static usl_status measure_sharpness(const look *k, const usli_tokenizer *tok, double *sharpness) {
    enum { EACH = 2 };
    static const usli_slot slots[EACH] = { USLI_ATTN_NORM, USLI_MLP_NORM };
    const double DISTURBED = 1e-3;
    usl_ctx *ctx = k->s->m->ctx;
    const usli_config *c = &k->read->config;
    int64_t most = EACH * c->layers, room = positions_of(k) * c->vocab, count = 0, tokens;
    other_vector *v = usli_calloc(ctx, (size_t)most, sizeof *v);
    float *others = usli_malloc(ctx, (size_t)(most * c->hidden + 2 * room) * sizeof *others);
    float *logits = others ? others + most * c->hidden : NULL;
    usl_status st = v && others ? USL_OK : usli_nomem(ctx, (size_t)(most * c->hidden) * sizeof *others);
    for (int64_t i = 0; i < most && st == USL_OK; i++) {
        usli_weight *w = usli_model_weight(k->read, slots[i % EACH], i / EACH);
        if (!w->storage || w->m.cols > c->hidden) continue;
        const float *from = w->m.data;
        float *to = others + i * c->hidden, offset = k->s->m->config.arch->norm_offset;
        uint32_t bits = (uint32_t)i * 2654435761u + 1;
        for (int64_t n = 0; n < w->m.cols; n++) {
            bits = bits * 1664525u + 1013904223u;
            to[n] = (from[n] + offset) * (float)(bits >> 31 ? 1 + DISTURBED : 1 - DISTURBED) - offset;
        }
        v[count++] = (other_vector){ w, to };
    }
    double error = 0, size = 0;
    for (int i = 0; i < TEXT_COUNT && st == USL_OK; i++) {
        st = logits_of(k, tok, k->read, i, logits, &tokens);
        exchange(v, count);
        if (st == USL_OK) st = logits_of(k, tok, k->read, i, logits + room, &tokens);
        exchange(v, count);
        for (int64_t t = 0; t < tokens && st == USL_OK; t++)
            add_distance(logits + t * c->vocab, logits + room + t * c->vocab, c->vocab, &error, &size);
    }
    *sharpness = size > 0 && count ? sqrt(error / size) / (DISTURBED * sqrt((double)count)) : 1;
    usli_free(ctx, v);
    usli_free(ctx, others);
    return st;
}

/* The most that the logits may differ, relative. Noise of the weights adds up over the matrices, whose errors are
 * independent: its root sum is what it does to the logits where nothing dampens it (a fifth to two thirds of it was
 * seen on trained models of 5 to 30 layers in all formats, all of it on random ones); twice that is allowed. What
 * remains is the arithmetic of the live model. Logits that have nothing to do with one another differ by 1.4. */
static double expected_of(const look *k, double sharpness) {
    usl_dtype dtype = k->s->m->dtype;
    double arithmetic = dtype == USL_F32 ? 1e-4 : dtype == USL_F16 ? 2e-2 : 1e-1;
    double most = arithmetic + 2 * sqrt(k->noise) * fmax(sharpness, 1);
    /* The same noise turns routers' decisions, as often as it is large, and a token that goes to another expert differs
     * by half or less. Seen: of 12 random mixtures in 8 bits one beyond the noise (0.072, which allows 0.050), none
     * beyond 0.6 of what this allows. Exact weights turn none. */
    if (k->s->m->config.arch->mixture && most > 1e-3) most = sqrt(most * most + 0.25 * most);
    return fmin(most, 1.2);
}

/* What is left of the rows' errors without the largest, one in twenty and one more: of a mixture noise sends a token to
 * another expert now and then, whose answer is another. */
static double without_turned(double *errors, int64_t rows) {
    double sum = 0;
    for (int64_t n = rows / 20 + 1; n > 0; n--) {
        int64_t worst = 0;
        for (int64_t i = 1; i < rows; i++)
            if (errors[i] > errors[worst]) worst = i;
        if (rows) errors[worst] = 0;
    }
    for (int64_t i = 0; i < rows; i++) sum += errors[i];
    return sum;
}

static usl_status look_at_logits(const look *k, const usli_tokenizer *tok, usl_export_report *report) {
    usl_model *m = k->s->m;
    int64_t vocab = m->config.vocab, room = positions_of(k) * vocab, count;
    double errors[TEXT_COUNT * PROMPT], error = 0, size = 0, sharpness = 1;
    int64_t rows = 0;
    float *logits = usli_malloc(m->ctx, 2 * (size_t)room * sizeof *logits);
    if (!logits) return usli_nomem(m->ctx, 2 * (size_t)room * sizeof *logits);
    usl_status st = USL_OK;
    for (int i = 0; i < TEXT_COUNT && st == USL_OK; i++) {
        st = logits_of(k, tok, m, i, logits, &count);
        if (st == USL_OK) st = logits_of(k, tok, k->read, i, logits + room, &count);
        for (int64_t t = 0; t < count && st == USL_OK; t++, rows++) {
            errors[rows] = 0;
            add_distance(logits + t * vocab, logits + room + t * vocab, vocab, &errors[rows], &size);
            error += errors[rows];
        }
    }
    usli_free(m->ctx, logits);
    USLI_TRY(st);
    if (m->config.arch->mixture && k->noise > 0 && isfinite(error)) error = without_turned(errors, rows);
    report->logits = size > 0 ? sqrt(error / size) : sqrt(error);
    report->expected = expected_of(k, 1);
    if (report->logits > report->expected && isfinite(size)) {
        USLI_TRY(measure_sharpness(k, tok, &sharpness));
        report->expected = expected_of(k, sharpness);
    }
    if (report->logits <= report->expected) return USL_OK;
    if (!isfinite(size))
        return usli_fail(
            m->ctx, USL_ERR_NUMERIC,
            "the logits of the live model are not numbers, so there is nothing to compare with: its weights "
            "are damaged or overflow (verify = false or --no-verify skips this check)");
    return usli_fail(m->ctx, USL_ERR_NUMERIC,
                     "its logits differ by %.2g from the model's, and at most %.2g is what this format costs; please "
                     "report it (verify = false or --no-verify skips this check)",
                     report->logits, report->expected);
}

/* ---- Text ----------------------------------------------------------------------------------------------------------
 */

static usl_status same_ids(usl_ctx *ctx, const usli_tokenizer *a, const usli_tokenizer *b, const char *text) {
    int32_t *ids[2] = { NULL, NULL };
    size_t count[2];
    char *said[2] = { NULL, NULL };
    usl_status st;
    USLI_TRYGO(usli_tokenizer_encode(ctx, a, text, strlen(text), 0, &ids[0], &count[0]));
    USLI_TRYGO(usli_tokenizer_encode(ctx, b, text, strlen(text), 0, &ids[1], &count[1]));
    bool same = count[0] == count[1] && memcmp(ids[0], ids[1], count[0] * sizeof **ids) == 0;
    if (same) {
        USLI_TRYGO(usli_tokenizer_decode(ctx, a, ids[0], count[0], true, &said[0], NULL));
        USLI_TRYGO(usli_tokenizer_decode(ctx, b, ids[0], count[0], true, &said[1], NULL));
        same = strcmp(said[0], said[1]) == 0;
    }
    if (!same)
        st = usli_fail(ctx, USL_ERR_FORMAT,
                       "its tokenizer makes other tokens of \"%.20s...\" than the model's; please report it (verify = "
                       "false or --no-verify skips this check)",
                       text);
done:
    for (int i = 0; i < 2; i++) {
        usli_free(ctx, ids[i]);
        usli_free(ctx, said[i]);
    }
    return st;
}

usl_status usli_export_check_tokenizer(usl_ctx *ctx, const usli_tokenizer *tok, const usli_tokenizer *read,
                                       const char *name) {
    usl_status st = USL_OK;
    for (int i = 0; i < TEXT_COUNT && st == USL_OK; i++) st = same_ids(ctx, tok, read, TEXTS[i]);
    const char *a = usli_tokenizer_chat_template(tok), *b = usli_tokenizer_chat_template(read);
    if (st == USL_OK && (!a != !b || (a && strcmp(a, b) != 0)))
        st = usli_fail(ctx, USL_ERR_FORMAT,
                       "its chat template is not the model's; please report it (verify = false "
                       "or --no-verify skips this check)");
    if (st == USL_OK && (usli_tokenizer_adds_bos(tok) != usli_tokenizer_adds_bos(read) ||
                         usli_tokenizer_adds_eos(tok) != usli_tokenizer_adds_eos(read)))
        st = usli_fail(ctx, USL_ERR_FORMAT,
                       "it begins or ends a text with other tokens than the model; please report it "
                       "(verify = false or --no-verify skips this check)");
    for (int i = USLI_BOS; i <= USLI_EOS && st == USL_OK; i++) {
        int32_t id = usli_tokenizer_special(tok, (usli_special)i);
        if (id >= 0 && id != usli_tokenizer_special(read, (usli_special)i))
            st = usli_fail(ctx, USL_ERR_FORMAT, "its %s token is not the model's; please report it",
                           i == USLI_BOS ? "first" : "last");
    }
    return st == USL_OK || st == USL_ERR_NOMEM ? st : usli_fail_prefix(ctx, "%s", name);
}

static usl_status open_tokenizer(usl_ctx *ctx, const char *path, usli_tokenizer **out) {
    if (usli_is_dir(path)) return usli_tokenizer_open(ctx, path, out);
    usli_gguf *file;
    USLI_TRY(usli_gguf_open(ctx, path, &file));
    usl_status st = usli_tokenizer_from_gguf(ctx, file, out);
    usli_gguf_close(file);
    return st;
}

usl_status usli_export_check(const usli_export_source *s, const usli_tokenizer *tok, const char *path, const char *name,
                             usl_dtype vectors, usl_export_report *report) {
    usl_ctx *ctx = s->m->ctx;
    usl_model_opts opts = USL_MODEL_OPTS_INIT;
    look k = { .s = s, .vectors = vectors };
    usli_tokenizer *read = NULL;
    usl_status st;
    opts.device = "cpu";
    opts.dtype = USL_F32;
    opts.max_seq_length = CONTEXT < s->m->config.context ? CONTEXT : s->m->config.context;
    USLI_TRYGO(usli_model_open(ctx, path, &opts, &k.read));
    USLI_TRYGO(look_at_weights(&k));
    USLI_TRYGO(look_at_logits(&k, tok, report));
    if (tok) {
        USLI_TRYGO(open_tokenizer(ctx, path, &read));
        USLI_TRYGO(usli_export_check_tokenizer(ctx, tok, read, name));
    }
    report->checked = 1;
    report->weights = k.size > 0 ? sqrt(k.error / k.size) : 0;
done:
    usli_tokenizer_release(read);
    usli_model_release(k.read);
    return st == USL_ERR_NUMERIC ? usli_fail_prefix(ctx, "%s", name) : st;
}
