/* Attention over packed rows, in tiles: the queries of all heads that share a kv head, side by side, against a block of
 * keys; softmax kept running, never a whole score matrix. All stands transposed, keys by queries and values by queries,
 * so what softmax does to a query's scores (largest, exp, sum, a new scale of its output) is done to whole rows of
 * columns.
 *
 *   forward    s = k q^T    p = exp(scale s - top)    o^T += v^T p
 *   backward   dp = v do^T    ds = p (dp - delta)     dq^T += k^T ds    dv += p do    dk += ds q
 *
 * Operands are float32, or bfloat16 as usli_vec.mul_pairs takes them where that is quicker. A forward task is a row, a
 * kv head and some tiles of queries. A backward task is a row, a kv head, a span of queries and a span of keys; tasks
 * of one phase share neither, so that each adds to dq, dk and dv alone, and one phase comes after the other: long rows
 * keep many threads busy, and the bits do not depend on how many. Decode is the same code. */
#include <math.h>
#include <string.h>

#include "core/base/dtype.h"
#include "core/base/pool.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

#ifndef USLI_ATTENTION_VEC
#define USLI_ATTENTION_VEC usli_vec_best() /* a test has another */
#endif

/* Of a tile; columns are (query head, query). A forward task has TILES of them, so that keys are made ready less often.
 * A span is SPAN keys, and as many whole tiles of queries as that holds. */
enum { COLUMNS = 96, KEYS = 64, TILES = 4, SPAN = 256, FEW = 32 };

typedef struct job {
    const usli_attention_args *a;
    const usli_vec *v;
    bool pairs;    /* operands are bfloat16 */
    int group;     /* query heads of a kv head */
    int64_t tile;  /* queries of a tile */
    int64_t tiles; /* of a forward task */
    int64_t tasks; /* forward: of the longest row */
    int64_t width; /* columns of a whole tile, padded to a register */
    int64_t keys;  /* of a block, even: KEYS, or all where there are fewer */
    int64_t span;  /* queries of a span */
    int64_t spans; /* of the longest row: queries or keys, whichever has more */
    int64_t phase;
    float *room; /* a worker's tiles */
    size_t room_floats;
    int64_t all_tiles; /* backward: room for so many of a kv head */
    float *shift;      /* (kv_heads, all_tiles, width) lse of each column */
    float *delta;      /* likewise: dot(do, o) */
    float *dq;         /* (kv_heads, all_tiles, qk_dim, width) */
    float *dk, *dv;    /* (kv_heads, tokens_k, dim) */
} job;

/* Sides of products: keys and values stand left (rows, each the values of one sum), queries right. With float32 a
 * transpose is the same memory, read the other way. Parts hold float32 or, with pairs, bfloat16. */
typedef struct room {
    float *k, *v, *kt, *vt;    /* a block of KEYS; in backward SPAN / KEYS of them */
    float *qt, *q, *dot, *d_o; /* (dim, width) and (width, dim) */
    float *rows;               /* (width or KEYS, dim): on the way in or out */
    float *words;              /* (KEYS / 2, dim), likewise */
    float *s, *dp, *slope;     /* (KEYS, width) */
    float *left, *right;       /* s or dp as pairs */
    float *o;                  /* (v_dim, width): forward has TILES of these, of qt and of the next two */
    float *top, *sum;          /* (width) */
    float *factor, *shift;     /* (width) */
} room;

typedef struct row {
    int64_t r, q0, nq, k0, nk, shift; /* query i sees keys up to i + shift */
} row;

/* A tile of queries of one kv head. */
typedef struct tile {
    row w;
    int64_t kv, first, count, width; /* column g * count + i is query first + i of head kv * group + g */
    int64_t from, to;                /* keys that any of them sees */
} tile;

static row row_of(const usli_attention_args *a, int64_t r) {
    row w = { .r = r, .q0 = a->cu_q[r], .nq = a->cu_q[r + 1] - a->cu_q[r], .k0 = a->cu_k[r] };
    w.nk = a->k_lens ? a->k_lens[r] : a->cu_k[r + 1] - a->cu_k[r];
    w.shift = w.nk - w.nq;
    return w;
}

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static int64_t even(int64_t n) {
    return (n + 1) & ~(int64_t)1;
}

static uint16_t *halves_of(float *part) {
    return (uint16_t *)(void *)part;
}

static uint32_t *words_of(float *part) {
    return (uint32_t *)(void *)part;
}

static int64_t padded(const job *j, int64_t columns) {
    return ceil_div(columns, j->v->lanes) * j->v->lanes;
}

static tile tile_of(const job *j, const row *w, int64_t kv, int64_t first) {
    const usli_attention_args *a = j->a;
    tile t = { .w = *w, .kv = kv, .first = first, .count = min64(w->nq - first, j->tile), .to = w->nk };
    t.width = padded(j, t.count * j->group);
    int64_t begin = first + w->shift, end = begin + t.count;
    if (a->causal && end < t.to) t.to = end;
    if (a->window && begin - a->window + 1 > 0) t.from = begin - a->window + 1;
    return t;
}

/* ---- Reading and writing tiles --------------------------------------------------------------------------------------
 */

static const char *token_at(const job *j, const void *base, int64_t stride, int64_t token, int64_t column) {
    return (const char *)base + (size_t)(token * stride + column) * usli_dtype_bytes(j->a->dtype);
}

static void load_rows(const job *j, const void *base, int64_t stride, int64_t token, int64_t count, int64_t column,
                      int64_t dim, float *dst) {
    for (int64_t i = 0; i < count; i++, dst += dim) {
        const char *at = token_at(j, base, stride, token + i, column);
        usli_row_store(j->v, usli_row_load(j->v, at, j->a->dtype, dst, dim), dst, USL_F32, dim);
    }
}

static void store_rows(const job *j, const float *src, void *base, int64_t stride, int64_t token, int64_t count,
                       int64_t column, int64_t dim) {
    for (int64_t i = 0; i < count; i++)
        usli_row_store(j->v, src + i * dim, (char *)(uintptr_t)token_at(j, base, stride, token + i, column),
                       j->a->dtype, dim);
}

/* Rows as a left side of pairs: an odd dim ends with a zero. */
static void copy_rows(const job *j, const void *base, int64_t stride, int64_t token, int64_t count, int64_t column,
                      int64_t dim, uint16_t *dst) {
    for (int64_t i = 0; i < count; i++, dst += even(dim)) {
        dst[even(dim) - 1] = 0;
        memcpy(dst, token_at(j, base, stride, token + i, column), (size_t)dim * sizeof *dst);
    }
}

/* The tile's queries (or do, or o) as float32 rows, one a column of the tile, zeros for the padding. */
static void load_columns(const job *j, const tile *t, const void *base, int64_t stride, int64_t dim, float *rows) {
    for (int g = 0; g < j->group; g++)
        load_rows(j, base, stride, t->w.q0 + t->first, t->count, (t->kv * j->group + g) * dim, dim,
                  rows + g * t->count * dim);
    int64_t used = t->count * j->group;
    memset(rows + used * dim, 0, (size_t)((t->width - used) * dim) * sizeof *rows);
}

/* The same as right sides: transposed, and as they are when that is asked for. */
static void load_sides(const job *j, const tile *t, const void *base, int64_t stride, int64_t dim, float *rows,
                       float *transposed, float *straight) {
    if (!j->pairs) {
        float *at = straight ? straight : rows;
        load_columns(j, t, base, stride, dim, at);
        j->v->transpose(at, t->width, dim, dim, transposed, t->width);
        return;
    }
    uint16_t *at = halves_of(rows);
    int64_t used = t->count * j->group, whole = even(dim);
    for (int g = 0; g < j->group; g++)
        copy_rows(j, base, stride, t->w.q0 + t->first, t->count, (t->kv * j->group + g) * dim, dim,
                  at + g * t->count * whole);
    memset(at + used * whole, 0, (size_t)((t->width - used) * whole) * sizeof *at);
    j->v->transpose(rows, t->width, whole / 2, whole / 2, transposed, t->width);
    if (straight) j->v->pair_rows(at, t->width, dim, whole, words_of(straight));
}

/* Transposed sums (dim, width), each column times its factor, become rows of the tile's heads. */
static void store_columns(const job *j, const tile *t, const float *sums, float *rows, void *base, int64_t stride,
                          int64_t dim) {
    j->v->transpose(sums, dim, t->width, t->width, rows, dim);
    for (int g = 0; g < j->group; g++)
        store_rows(j, rows + g * t->count * dim, base, stride, t->w.q0 + t->first, t->count,
                   (t->kv * j->group + g) * dim, dim);
}

/* A block of keys or values as a left side: as rows, and transposed; either may be NULL. */
static void load_block(const job *j, const void *base, int64_t stride, int64_t token, int64_t count, int64_t column,
                       int64_t dim, const room *m, float *rows, float *transposed) {
    if (!j->pairs) {
        load_rows(j, base, stride, token, count, column, dim, rows ? rows : transposed);
        return;
    }
    uint16_t *at = halves_of(rows ? rows : m->rows);
    copy_rows(j, base, stride, token, count, column, dim, at);
    if (!transposed) return;
    j->v->pair_rows(at, count, dim, even(dim), words_of(m->words));
    j->v->transpose(m->words, (count + 1) / 2, dim, dim, transposed, j->keys / 2);
}

/* ---- Products -------------------------------------------------------------------------------------------------------
 */

/* c (m, n) = or += a (m, k) b (k, n) */
static void product(const job *j, int64_t m, int64_t n, int64_t k, float *a, float *b, float *c, bool accumulate) {
    if (j->pairs)
        j->v->mul_pairs(m, n, even(k) / 2, halves_of(a), even(k), words_of(b), n, c, n, accumulate);
    else
        j->v->mul(m, n, k, a, k, 1, b, n, c, n, accumulate);
}

/* c (m, n) += a^T b, a a block of k keys, transposed, and b (k, n). */
static void add_transposed(const job *j, int64_t m, int64_t n, int64_t k, float *a, float *b, float *c) {
    if (j->pairs)
        j->v->mul_pairs(m, n, even(k) / 2, halves_of(a), j->keys, words_of(b), n, c, n, true);
    else
        j->v->mul(m, n, k, a, 1, m, b, n, c, n, true);
}

/* -inf where a query does not see a key: for one key, the queries before it and those a window behind. */
static void hide(const job *j, const tile *t, int64_t key, int64_t count, float *s) {
    const usli_attention_args *a = j->a;
    if (!a->window && (!a->causal || key + count - 1 <= t->first + t->w.shift)) return;
    for (int64_t k = 0; k < count; k++) {
        int64_t own = key + k - t->w.shift - t->first, before = a->causal ? own : 0,
                after = a->window ? own + a->window : t->count;
        if (before > t->count) before = t->count;
        for (int g = 0; g < j->group; g++) {
            float *at = s + k * t->width + g * t->count;
            for (int64_t i = 0; i < before; i++) at[i] = -INFINITY;
            for (int64_t i = after > 0 ? after : 0; i < t->count; i++) at[i] = -INFINITY;
        }
    }
}

/* m->s = k q^T, or softcap(scale k q^T) with a soft-cap, with what is not seen at -inf; m->slope, when there is one,
 * gets d capped / d raw. Times factor_of they are scores. */
static void scores(const job *j, const tile *t, int64_t key, int64_t count, float *k, const room *m) {
    const usli_attention_args *a = j->a;
    int64_t n = count * t->width;
    product(j, count, t->width, a->qk_dim, k, m->qt, m->s, false);
    if (a->softcap > 0) {
        j->v->scale(a->scale / a->softcap, m->s, n);
        j->v->tanh(m->s, n);
        for (int64_t i = 0; m->slope && i < n; i++) m->slope[i] = 1.0f - m->s[i] * m->s[i];
        j->v->scale(a->softcap, m->s, n);
    }
    hide(j, t, key, count, m->s);
}

static float factor_of(const job *j) {
    return j->a->softcap > 0 ? 1.0f : j->a->scale;
}

/* ---- Room -----------------------------------------------------------------------------------------------------------
 */

/* Floats of a block of keys. */
static size_t block_floats(const job *j, int64_t dim) {
    return (size_t)(j->keys * even(dim)) / (j->pairs ? 2 : 1);
}

/* Lays a worker's tiles out from `at`, or only counts where that is NULL; returns how many floats they take. */
static size_t lay_out(const job *j, usli_pass pass, float *at, room *m) {
    const usli_attention_args *a = j->a;
    bool back = pass == USLI_BACKWARD, pairs = j->pairs;
    size_t n = (size_t)j->width, dq = (size_t)a->qk_dim, dv = (size_t)a->v_dim, dim = dq > dv ? dq : dv, used = 0;
    size_t tiles = back ? 1 : (size_t)j->tiles, keys = (size_t)j->keys, most = n > keys ? n : keys;
    size_t blocks = back ? (size_t)ceil_div(min64(SPAN, a->max_k), KEYS) : 1;
    size_t k = blocks * block_floats(j, a->qk_dim), v = blocks * block_floats(j, a->v_dim);
    const struct {
        float **part;
        size_t floats;
    } parts[] = { { &m->k, k },
                  { &m->v, back || !pairs ? v : 0 },
                  { &m->kt, back && pairs ? k : 0 },
                  { &m->vt, !back && pairs ? v : 0 },
                  { &m->qt, tiles * (dq + 1) * n },
                  { &m->q, back ? dq * n : 0 },
                  { &m->dot, back ? (dv + 1) * n : 0 },
                  { &m->d_o, back ? dv * n : 0 },
                  { &m->rows, most * (dim + 1) },
                  { &m->words, pairs ? keys / 2 * dim : 0 },
                  { &m->s, keys * n },
                  { &m->dp, back ? keys * n : 0 },
                  { &m->slope, back && a->softcap > 0 ? keys * n : 0 },
                  { &m->left, back && pairs ? keys / 2 * n : 0 },
                  { &m->right, pairs ? keys / 2 * n : 0 },
                  { &m->o, back ? 0 : tiles * dv * n },
                  { &m->top, back ? 0 : tiles * n },
                  { &m->sum, back ? 0 : tiles * n },
                  { &m->factor, back ? 0 : n },
                  { &m->shift, back ? 0 : n } };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].part = at && parts[i].floats ? at + used : NULL;
        used += (parts[i].floats + 15) & ~(size_t)15; /* each begins at 64 bytes */
    }
    if (!pairs) m->kt = m->k, m->vt = m->v;
    return used;
}

static room room_of(const job *j, int worker, usli_pass pass) {
    room m;
    lay_out(j, pass, j->room + (size_t)worker * j->room_floats, &m);
    return m;
}

/* ---- Forward --------------------------------------------------------------------------------------------------------
 */

/* Brings in the scores of some keys: the running largest, sum and output of every column. */
static void absorb(const job *j, const tile *t, int64_t count, const room *m) {
    int64_t n = t->width;
    float factor = factor_of(j);
    bool changed = false;
    memcpy(m->factor, m->top, (size_t)n * sizeof *m->top);
    j->v->column_max(m->s, count, n, m->top);
    /* A column that has seen nothing yet holds only -inf, and exp of that less 0 is 0. */
    for (int64_t i = 0; i < n; i++) {
        m->shift[i] = m->top[i] == -INFINITY ? 0 : m->top[i] * factor;
        changed |= m->top[i] != m->factor[i];
    }
    if (changed) {
        j->v->column_exp(factor, m->factor, 1, n, m->shift, NULL);
        j->v->times(1, m->sum, m->factor, m->sum, n);
        for (int64_t i = 0; i < j->a->v_dim; i++) j->v->times(1, m->o + i * n, m->factor, m->o + i * n, n);
    }
    j->v->column_exp(factor, m->s, count, n, m->shift, m->sum);
    if (j->pairs) j->v->round_pairs(m->s, count, n, words_of(m->right));
    add_transposed(j, j->a->v_dim, n, count, m->vt, j->pairs ? m->right : m->s, m->o);
}

static void finish(const job *j, const tile *t, const room *m) {
    const usli_attention_args *a = j->a;
    for (int64_t i = 0; i < t->count * j->group; i++) {
        float sum = m->sum[i];
        int64_t h = t->kv * j->group + i / t->count, token = t->w.q0 + t->first + i % t->count;
        if (a->lse) a->lse[h * a->tokens_q + token] = sum == 0 ? -INFINITY : m->top[i] * factor_of(j) + logf(sum);
        m->sum[i] = sum == 0 ? 0 : 1.0f / sum;
    }
    for (int64_t i = 0; i < a->v_dim; i++) j->v->times(1, m->o + i * t->width, m->sum, m->o + i * t->width, t->width);
    store_columns(j, t, m->o, m->rows, a->o, a->o_stride, a->v_dim);
}

/* The part of the room that is tile i's own. */
static room of_tile(const job *j, const room *m, int64_t i) {
    room own = *m;
    own.qt += i * (j->a->qk_dim + 1) * j->width;
    own.o += i * j->a->v_dim * j->width;
    own.top += i * j->width;
    own.sum += i * j->width;
    return own;
}

static void begin(const job *j, const tile *t, const room *m) {
    const usli_attention_args *a = j->a;
    load_sides(j, t, a->q, a->q_stride, a->qk_dim, m->rows, m->qt, NULL);
    memset(m->o, 0, (size_t)(t->width * a->v_dim) * sizeof *m->o);
    for (int64_t i = 0; i < t->width; i++) m->top[i] = -INFINITY, m->sum[i] = 0;
}

/* The longest tasks, those at the ends of rows, come first. */
static void forward_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    const usli_attention_args *a = j->a;
    int64_t heads = (int64_t)a->rows * a->kv_heads, first = (j->tasks - 1 - task / heads) * j->tiles * j->tile;
    int64_t kv = task % a->kv_heads, from = INT64_MAX, to = 0, tiles = 0;
    row w = row_of(a, task % heads / a->kv_heads);
    room m = room_of(j, worker, USLI_FORWARD), own[TILES];
    tile t[TILES];
    for (; tiles < j->tiles && first < w.nq; tiles++, first += j->tile) {
        t[tiles] = tile_of(j, &w, kv, first);
        own[tiles] = of_tile(j, &m, tiles);
        begin(j, &t[tiles], &own[tiles]);
        from = min64(from, t[tiles].from);
        if (t[tiles].to > to) to = t[tiles].to;
    }
    for (int64_t key = from; key < to; key += KEYS) {
        int64_t end = min64(to, key + KEYS);
        load_block(j, a->k, a->k_stride, w.k0 + key, end - key, kv * a->qk_dim, a->qk_dim, &m, m.k, NULL);
        load_block(j, a->v, a->v_stride, w.k0 + key, end - key, kv * a->v_dim, a->v_dim, &m, NULL, m.vt);
        for (int64_t i = 0; i < tiles; i++) {
            int64_t count = min64(t[i].to, end) - key;
            if (count <= 0 || end <= t[i].from) continue;
            scores(j, &t[i], key, count, m.k, &own[i]);
            absorb(j, &t[i], count, &own[i]);
        }
    }
    for (int64_t i = 0; i < tiles; i++) finish(j, &t[i], &own[i]);
}

/* ---- Backward -------------------------------------------------------------------------------------------------------
 */

/* A row and kv head, and a span of it. */
typedef struct part {
    row w;
    int64_t kv, span;
} part;

static part part_of(const job *j, int64_t task) {
    int64_t heads = (int64_t)j->a->rows * j->a->kv_heads;
    return (part){ row_of(j->a, task % heads / j->a->kv_heads), task % j->a->kv_heads, task / heads };
}

/* Where a tile's columns are among those of all tiles. Rows begin in tiles of their own. */
static int64_t place_of(const job *j, const tile *t) {
    return t->kv * j->all_tiles + t->w.q0 / j->tile + t->w.r + t->first / j->tile;
}

static float *dq_of(const job *j, const tile *t) {
    return j->dq + place_of(j, t) * j->a->qk_dim * j->width;
}

static int64_t key_of(const job *j, const part *p, int64_t key) {
    return p->kv * j->a->tokens_k + p->w.k0 + key;
}

/* lse and delta of every column, and zeros to add to. */
static void open_tile(const job *j, const tile *t, const room *m) {
    const usli_attention_args *a = j->a;
    float *shift = j->shift + place_of(j, t) * j->width, *delta = j->delta + place_of(j, t) * j->width;
    load_columns(j, t, a->o, a->o_stride, a->v_dim, m->rows);
    load_columns(j, t, a->d_o, a->o_stride, a->v_dim, m->d_o);
    for (int64_t i = 0; i < t->width; i++) {
        int64_t h = t->kv * j->group + i / t->count, token = t->w.q0 + t->first + i % t->count;
        float lse = i < t->count * j->group ? a->lse[h * a->tokens_q + token] : 0;
        shift[i] = lse == -INFINITY ? 0 : lse; /* it saw nothing: all of its scores are -inf */
        delta[i] = j->v->dot(m->rows + i * a->v_dim, m->d_o + i * a->v_dim, a->v_dim);
    }
    memset(dq_of(j, t), 0, (size_t)(a->qk_dim * t->width) * sizeof *j->dq);
}

static void open_part(const job *j, const part *p, const room *m) {
    const usli_attention_args *a = j->a;
    for (int64_t first = p->span * j->span; first < min64(p->w.nq, (p->span + 1) * j->span); first += j->tile) {
        tile t = tile_of(j, &p->w, p->kv, first);
        open_tile(j, &t, m);
    }
    int64_t key = p->span * SPAN, keys = min64(SPAN, p->w.nk - key);
    if (keys <= 0) return;
    memset(j->dk + key_of(j, p, key) * a->qk_dim, 0, (size_t)(keys * a->qk_dim) * sizeof *j->dk);
    memset(j->dv + key_of(j, p, key) * a->v_dim, 0, (size_t)(keys * a->v_dim) * sizeof *j->dv);
}

/* What a tile and a block of keys add to each other's gradients. */
static void add_block(const job *j, const part *p, const tile *t, int64_t key, int64_t count, float *k, float *v,
                      float *kt, const room *m) {
    const usli_attention_args *a = j->a;
    int64_t n = t->width, dq = a->qk_dim, dv = a->v_dim;
    float *left = j->pairs ? m->left : m->s;
    scores(j, t, key, count, k, m);
    j->v->column_exp(factor_of(j), m->s, count, n, j->shift + place_of(j, t) * j->width, NULL);
    if (j->pairs) j->v->f32_to_bf16(m->s, halves_of(left), count * n);
    product(j, count, dv, n, left, m->d_o, j->dv + key_of(j, p, key) * dv, true);
    product(j, count, n, dv, v, m->dot, m->dp, false);
    j->v->column_softmax_backward(m->s, m->dp, count, n, j->delta + place_of(j, t) * j->width);
    for (int64_t i = 0; m->slope && i < count * n; i++) m->dp[i] *= m->slope[i];
    float *right = m->dp;
    if (j->pairs) {
        j->v->f32_to_bf16(m->dp, halves_of(left), count * n);
        j->v->pair_rows(halves_of(left), count, n, n, words_of(m->right));
        right = m->right;
    } else {
        left = m->dp;
    }
    product(j, count, dq, n, left, m->q, j->dk + key_of(j, p, key) * dq, true);
    add_transposed(j, dq, n, count, kt, right, dq_of(j, t));
}

/* What the part's queries and the keys of a span add to each other's gradients. */
static void add_span(const job *j, const part *p, int64_t span, const room *m) {
    const usli_attention_args *a = j->a;
    int64_t begin_key = span * SPAN, end_key = min64(p->w.nk, begin_key + SPAN), loaded = begin_key;
    size_t k = block_floats(j, a->qk_dim), v = block_floats(j, a->v_dim);
    for (int64_t first = p->span * j->span; first < min64(p->w.nq, (p->span + 1) * j->span); first += j->tile) {
        tile t = tile_of(j, &p->w, p->kv, first);
        int64_t to = min64(t.to, end_key);
        if (to <= begin_key || t.from >= to) continue;
        for (; loaded < to; loaded += KEYS) {
            int64_t count = min64(KEYS, end_key - loaded);
            size_t b = (size_t)((loaded - begin_key) / KEYS);
            load_block(j, a->k, a->k_stride, p->w.k0 + loaded, count, p->kv * a->qk_dim, a->qk_dim, m, m->k + b * k,
                       m->kt + b * k);
            load_block(j, a->v, a->v_stride, p->w.k0 + loaded, count, p->kv * a->v_dim, a->v_dim, m, m->v + b * v,
                       NULL);
        }
        load_sides(j, &t, a->q, a->q_stride, a->qk_dim, m->rows, m->qt, m->q);
        load_sides(j, &t, a->d_o, a->o_stride, a->v_dim, m->rows, m->dot, m->d_o);
        for (int64_t key = begin_key, b = 0; key < to; key += KEYS, b++)
            if (key + KEYS > t.from)
                add_block(j, p, &t, key, min64(KEYS, to - key), m->k + b * (int64_t)k, m->v + b * (int64_t)v,
                          m->kt + b * (int64_t)k, m);
    }
}

static void close_part(const job *j, const part *p, const room *m) {
    const usli_attention_args *a = j->a;
    for (int64_t first = p->span * j->span; first < min64(p->w.nq, (p->span + 1) * j->span); first += j->tile) {
        tile t = tile_of(j, &p->w, p->kv, first);
        j->v->scale(a->scale, dq_of(j, &t), t.width * a->qk_dim);
        store_columns(j, &t, dq_of(j, &t), m->rows, a->dq, a->q_stride, a->qk_dim);
    }
    int64_t key = p->span * SPAN, keys = min64(SPAN, p->w.nk - key);
    if (keys <= 0) return;
    float *dk = j->dk + key_of(j, p, key) * a->qk_dim, *dv = j->dv + key_of(j, p, key) * a->v_dim;
    j->v->scale(a->scale, dk, keys * a->qk_dim);
    store_rows(j, dk, a->dk, a->k_stride, p->w.k0 + key, keys, p->kv * a->qk_dim, a->qk_dim);
    store_rows(j, dv, a->dv, a->v_stride, p->w.k0 + key, keys, p->kv * a->v_dim, a->v_dim);
}

static void open_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    part p = part_of(j, task);
    room m = room_of(j, worker, USLI_BACKWARD);
    open_part(j, &p, &m);
}

/* In a phase each span of queries has a span of keys of its own. */
static void add_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    part p = part_of(j, task);
    room m = room_of(j, worker, USLI_BACKWARD);
    add_span(j, &p, (j->phase - p.span + j->spans) % j->spans, &m);
}

static void close_task(void *arg, int64_t task, int worker) {
    const job *j = arg;
    part p = part_of(j, task);
    room m = room_of(j, worker, USLI_BACKWARD);
    close_part(j, &p, &m);
}

/* Where all rows are of one span, in one go: what is added to stays in the cache. */
static void only_task(void *arg, int64_t task, int worker) {
    open_task(arg, task, worker);
    add_task(arg, task, worker);
    close_task(arg, task, worker);
}

/* ---- Running --------------------------------------------------------------------------------------------------------
 */

static job job_of(const usli_attention_args *a) {
    job j = { .a = a, .v = USLI_ATTENTION_VEC, .group = a->heads / a->kv_heads };
    j.tile = COLUMNS / j.group > 1 ? COLUMNS / j.group : 1;
    if (j.tile > a->max_q && a->max_q > 0) j.tile = a->max_q;
    int64_t tiles = ceil_div(a->max_q, j.tile);
    j.tiles = tiles < TILES ? tiles : TILES;
    j.tasks = tiles ? ceil_div(tiles, j.tiles) : 0;
    j.width = padded(&j, j.tile * j.group);
    /* A few columns do not repay the transposing of values. */
    j.pairs = a->dtype == USL_BF16 && j.v->pairs && j.width >= FEW;
    j.keys = even(min64(KEYS, a->max_k));
    j.span = (SPAN / j.tile > 1 ? SPAN / j.tile : 1) * j.tile;
    j.spans = ceil_div(a->max_q, j.span);
    if (j.spans < ceil_div(a->max_k, SPAN)) j.spans = ceil_div(a->max_k, SPAN);
    j.all_tiles = a->tokens_q / j.tile + a->rows + 1;
    return j;
}

/* Lays out what all tasks of a backward pass share, or only counts; returns floats. */
static size_t lay_out_shared(job *j, float *at) {
    const usli_attention_args *a = j->a;
    size_t tiles = (size_t)(a->kv_heads * j->all_tiles * j->width), keys = (size_t)(a->kv_heads * a->tokens_k),
           used = 0;
    const struct {
        float **part;
        size_t floats;
    } parts[] = { { &j->shift, tiles },
                  { &j->delta, tiles },
                  { &j->dq, tiles * (size_t)a->qk_dim },
                  { &j->dk, keys * (size_t)a->qk_dim },
                  { &j->dv, keys * (size_t)a->v_dim } };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].part = at ? at + used : NULL;
        used += (parts[i].floats + 15) & ~(size_t)15;
    }
    return used;
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    job j = job_of(args);
    room m;
    size_t floats = lay_out(&j, pass, NULL, &m) * (size_t)usli_pool_threads(x->ctx->pool);
    if (pass == USLI_BACKWARD) floats += lay_out_shared(&j, NULL);
    return floats * sizeof(float);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_attention_args *a = args;
    job j = job_of(a);
    int64_t heads = (int64_t)a->rows * a->kv_heads;
    room m;
    j.room = ws;
    j.room_floats = lay_out(&j, pass, NULL, &m);
    if (pass == USLI_FORWARD) {
        usli_pool_run(x->ctx->pool, heads * j.tasks, forward_task, &j);
        return USL_OK;
    }
    lay_out_shared(&j, j.room + j.room_floats * (size_t)usli_pool_threads(x->ctx->pool));
    if (j.spans <= 1) {
        if (j.spans == 1) usli_pool_run(x->ctx->pool, heads, only_task, &j);
        return USL_OK;
    }
    usli_pool_run(x->ctx->pool, heads * j.spans, open_task, &j);
    for (; j.phase < j.spans; j.phase++) usli_pool_run(x->ctx->pool, heads * j.spans, add_task, &j);
    usli_pool_run(x->ctx->pool, heads * j.spans, close_task, &j);
    return USL_OK;
}

#ifndef USLI_ATTENTION_NAME
#define USLI_ATTENTION_NAME usli_cpu_attention
#endif
const usli_op_impl USLI_ATTENTION_NAME = { run, workspace };
