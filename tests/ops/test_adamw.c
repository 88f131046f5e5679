/* adamw against its formula in double, and its 8-bit states against what bitsandbytes made (adamw_reference.bin, by
 * make_adamw_reference.py). */
#include "core/quant/optim8.h"
#include "tests/ops/rig.h"

enum { PARAMS = 3, STEPS = 5, REFERENCE = 700, BLOCKS = 3 };
static const int64_t SIZES[PARAMS] = { 1, 40000, 777 };

static void values(float *x, int64_t n, float scale, uint64_t seed) {
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)((int64_t)(seed >> 40) - (1 << 23)) * (scale / 8388608.0f);
    }
}

typedef struct state {
    usli_param p[PARAMS];
    usli_update update;
} state;

static void make_state(state *s, usl_dtype dtype) {
    memset(s, 0, sizeof *s);
    s->update = (usli_update){ .lr = { 1e-2f, 3e-3f }, .clip = 0.5f, .finite = 1 };
    for (int i = 0; i < PARAMS; i++) {
        size_t n = (size_t)SIZES[i], blocks = (n + USLI_OPTIM8_BLOCK - 1) / USLI_OPTIM8_BLOCK;
        usli_param p = { .w = malloc(n * sizeof(float)),
                         .g = malloc(n * sizeof(float)),
                         .n = SIZES[i],
                         .group = i % 2,
                         .weight_decay = i == 2 ? 0 : 0.1f,
                         .state = dtype,
                         .m = calloc(n, 4),
                         .v = calloc(n, 4),
                         .m_absmax = calloc(blocks, sizeof(float)),
                         .v_absmax = calloc(blocks, sizeof(float)) };
        values(p.w, p.n, 1, (uint64_t)(7 + i));
        s->p[i] = p;
    }
}

static void free_state(state *s) {
    for (int i = 0; i < PARAMS; i++)
        free(s->p[i].w), free(s->p[i].g), free(s->p[i].m), free(s->p[i].v), free(s->p[i].m_absmax),
            free(s->p[i].v_absmax);
    free(s);
}

static void update(state *s, int step, int threads) {
    rig r;
    rig_open(&r, threads);
    s->update.step = step;
    for (int i = 0; i < PARAMS; i++) values(s->p[i].g, s->p[i].n, 0.1f * (float)step, (uint64_t)(100 * i + step));
    usli_adamw_args a = {
        .params = s->p, .count = PARAMS, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .update = &s->update
    };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_adamw, &a, USLI_FORWARD));
    rig_close(&r);
}

static int64_t nonzero(const float *x, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += x[i] != 0;
    return count;
}

/* What a state holds, codes or floats. */
static void read_state(const usli_param *p, const void *codes, const float *map, const float *absmax, float *out) {
    if (p->state == USL_F32)
        memcpy(out, codes, (size_t)p->n * sizeof *out);
    else
        usli_dequantize_blockwise(codes, p->n, map, absmax, out);
}

/* Step by step: from the state as stored, one update in double. */
static void check_formula(usl_dtype dtype) {
    state *const s = malloc(sizeof *s);
    make_state(s, dtype);
    for (int step = 1; step <= STEPS; step++) {
        float *m[PARAMS], *v[PARAMS], *w[PARAMS];
        for (int i = 0; i < PARAMS; i++) {
            const usli_param *p = &s->p[i];
            m[i] = malloc((size_t)p->n * 4), v[i] = malloc((size_t)p->n * 4), w[i] = malloc((size_t)p->n * 4);
            read_state(p, p->m, usli_dynamic_map, p->m_absmax, m[i]),
                read_state(p, p->v, usli_dynamic_map_unsigned, p->v_absmax, v[i]);
            memcpy(w[i], p->w, (size_t)p->n * 4);
        }
        update(s, step, 1);
        for (int i = 0; i < PARAMS; i++) {
            const usli_param *p = &s->p[i];
            float *g = malloc((size_t)p->n * 4), *mn = malloc((size_t)p->n * 4), *vn = malloc((size_t)p->n * 4);
            values(g, p->n, 0.1f * (float)step, (uint64_t)(100 * i + step));
            read_state(p, p->m, usli_dynamic_map, p->m_absmax, mn),
                read_state(p, p->v, usli_dynamic_map_unsigned, p->v_absmax, vn);
            double lr = (double)s->update.lr[p->group], worst_w = 0, worst_m = 0, worst_v = 0;
            for (int64_t k = 0; k < p->n; k++) {
                double d = (double)g[k] * 0.5, me = 0.9 * (double)m[i][k] + 0.1 * d,
                       ve = 0.999 * (double)v[i][k] + 0.001 * d * d;
                double we = (double)w[i][k] * (1 - lr * (double)p->weight_decay);
                we -= lr / (1 - pow(0.9, step)) * me / (sqrt(ve) / sqrt(1 - pow(0.999, step)) + 1e-8);
                worst_w = fmax(worst_w, fabs((double)p->w[k] - we));
                worst_m = fmax(worst_m, fabs((double)mn[k] - me)), worst_v = fmax(worst_v, fabs((double)vn[k] - ve));
            }
            /* A code is at most half the widest step of its map away: m within 1/90 of the block's largest, v 1/180. */
            double largest = 0.05 * step, m_limit = dtype == USL_F32 ? 1e-8 : largest / 90,
                   v_limit = dtype == USL_F32 ? 1e-9 : largest * largest / 180;
            CHECK(worst_w < 3e-7 && worst_m < m_limit && worst_v < v_limit, "step %d, parameter %d: w %g m %g v %g",
                  step, i, worst_w, worst_m, worst_v);
            CHECK(nonzero(p->g, p->n) == 0, "gradients are cleared");
            free(g), free(mn), free(vn), free(m[i]), free(v[i]), free(w[i]);
        }
    }
    free_state(s);
}

static bool same(const state *a, const state *b) {
    for (int i = 0; i < PARAMS; i++) {
        size_t n = (size_t)SIZES[i], blocks = (n + USLI_OPTIM8_BLOCK - 1) / USLI_OPTIM8_BLOCK;
        if (memcmp(a->p[i].w, b->p[i].w, 4 * n) || memcmp(a->p[i].m, b->p[i].m, 4 * n) ||
            memcmp(a->p[i].v, b->p[i].v, 4 * n) || memcmp(a->p[i].m_absmax, b->p[i].m_absmax, 4 * blocks) ||
            memcmp(a->p[i].v_absmax, b->p[i].v_absmax, 4 * blocks))
            return false;
    }
    return true;
}

static void check_threads_and_skip(usl_dtype dtype) {
    state *const one = malloc(sizeof *one), *const more = malloc(sizeof *more), *const before = malloc(sizeof *before);
    make_state(one, dtype), make_state(more, dtype), make_state(before, dtype);
    for (int step = 1; step <= 3; step++)
        update(one, step, 1), update(more, step, step == 2 ? 5 : 2), update(before, step, 1);
    CHECK(same(one, more), "threads change the bits");
    one->update.finite = 0;
    update(one, 4, 2);
    CHECK(same(one, before), "an update that is not finite is skipped");
    for (int i = 0; i < PARAMS; i++) CHECK(nonzero(one->p[i].g, SIZES[i]) == 0, "but its gradients are cleared");
    free_state(one), free_state(more), free_state(before);
}

static void check_reference(void) {
    FILE *file = fopen("tests/ops/adamw_reference.bin", "rb");
    if (!file) {
        SKIP("tests/ops/adamw_reference.bin: run from the root of the repository");
        return;
    }
    float *w = malloc(REFERENCE * sizeof *w), *g = malloc(REFERENCE * sizeof *g);
    float *m_absmax = calloc(BLOCKS, sizeof *m_absmax), *v_absmax = calloc(BLOCKS, sizeof *v_absmax);
    float want_w[REFERENCE], want_absmax[2 * BLOCKS];
    uint8_t *m = calloc(REFERENCE, 1), *v = calloc(REFERENCE, 1), want[2 * REFERENCE];
    size_t got = fread(want_w, 4, REFERENCE, file) + fread(want, 1, 2 * REFERENCE, file) +
                 fread(want_absmax, 4, 2 * BLOCKS, file);
    CHECK(got == 3 * REFERENCE + 2 * BLOCKS, "adamw_reference.bin is cut short");
    fclose(file);
    rig r;
    rig_open(&r, 2);
    usli_update *u = rig_copy(&(usli_update){ .lr = { 1e-2f }, .clip = 0.5f, .finite = 1 }, sizeof *u);
    usli_param p = { .w = w,
                     .g = g,
                     .n = REFERENCE,
                     .weight_decay = 0.05f,
                     .state = USL_U8,
                     .m = m,
                     .v = v,
                     .m_absmax = m_absmax,
                     .v_absmax = v_absmax };
    usli_adamw_args a = { .params = &p, .count = 1, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .update = u };
    values(w, REFERENCE, 1, 1);
    for (u->step = 1; u->step <= 3; u->step++) {
        values(g, REFERENCE, 0.1f * (float)u->step, (uint64_t)(100 + u->step));
        CHECK_OK(r.ctx, rig_run(&r, USLI_OP_adamw, &a, USLI_FORWARD));
    }
    int codes = 0;
    for (int i = 0; i < REFERENCE; i++) codes += (m[i] != want[i]) + (v[i] != want[REFERENCE + i]);
    CHECK(codes == 0, "%d codes differ from bitsandbytes'", codes);
    for (int i = 0; i < BLOCKS; i++)
        CHECK(fabsf(m_absmax[i] / want_absmax[i] - 1) < 1e-6f &&
                  fabsf(v_absmax[i] / want_absmax[BLOCKS + i] - 1) < 1e-6f,
              "absmax %d", i);
    double error = test_rel_error(w, want_w, REFERENCE);
    CHECK(error < 1e-6, "weights are off by %g", error);
    rig_close(&r);
    free(w), free(g), free(m), free(v), free(m_absmax), free(v_absmax), free(u);
}

/* 2000 parameters of 1 to 600 values one behind the other, so that most begin anywhere; every third with codes. Each
 * must get the bits it gets alone. */
static void check_many(void) {
    enum { MANY = 2000, MOST = 600, BLOCKS_OF_MOST = 3 };
    size_t total = 0;
    usli_param *p = calloc(MANY, sizeof *p);
    float *w = malloc(MANY * MOST * sizeof *w), *g = malloc(MANY * MOST * sizeof *g);
    float *m = calloc(MANY * MOST, sizeof *m), *v = calloc(MANY * MOST, sizeof *v);
    float *absmax = calloc(2 * MANY * BLOCKS_OF_MOST, sizeof *absmax), *alone = malloc(MOST * sizeof *alone);
    float *rest = malloc(MOST * sizeof *rest), *own_m = malloc(MOST * sizeof *m), *own_v = malloc(MOST * sizeof *v);
    float *own_absmax = malloc(2 * BLOCKS_OF_MOST * sizeof *absmax);
    usli_update *u = rig_copy(&(usli_update){ .lr = { 1e-2f }, .clip = 1, .finite = 1, .step = 1 }, sizeof *u);
    rig r;
    rig_open(&r, 2);
    for (int i = 0; i < MANY; i++) {
        p[i] = (usli_param){ .w = w + total,
                             .g = g + total,
                             .n = i % 100 ? 1 + i % 5 : MOST - i / 100,
                             .weight_decay = 0.1f,
                             .state = i % 3 ? USL_F32 : USL_U8,
                             .m = m + total,
                             .v = v + total,
                             .m_absmax = absmax + 2 * i * BLOCKS_OF_MOST,
                             .v_absmax = absmax + (2 * i + 1) * BLOCKS_OF_MOST };
        values(p[i].w, p[i].n, 1, (uint64_t)i), values(p[i].g, p[i].n, 1, (uint64_t)(i + MANY));
        total += (size_t)p[i].n;
    }
    usli_adamw_args a = { .params = p, .count = MANY, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .update = u };
    CHECK_OK(r.ctx, rig_run(&r, USLI_OP_adamw, &a, USLI_FORWARD));
    CHECK(nonzero(g, (int64_t)total) == 0, "gradients are cleared");
    for (int i = 0; i < MANY; i += 25) {
        size_t bytes = (size_t)p[i].n * sizeof *alone;
        usli_param one = p[i];
        one.w = alone, one.g = rest, one.m = own_m, one.v = own_v, one.m_absmax = own_absmax,
        one.v_absmax = own_absmax + BLOCKS_OF_MOST;
        memset(own_m, 0, bytes), memset(own_v, 0, bytes), memset(own_absmax, 0, 2 * BLOCKS_OF_MOST * sizeof *absmax);
        values(alone, one.n, 1, (uint64_t)i), values(rest, one.n, 1, (uint64_t)(i + MANY));
        a.params = &one, a.count = 1;
        CHECK_OK(r.ctx, rig_run(&r, USLI_OP_adamw, &a, USLI_FORWARD));
        size_t stored = (size_t)one.n * (one.state == USL_U8 ? 1 : 4);
        CHECK(!memcmp(alone, p[i].w, bytes) && !memcmp(own_m, p[i].m, stored) && !memcmp(own_v, p[i].v, stored) &&
                  !memcmp(own_absmax, p[i].m_absmax, 2 * BLOCKS_OF_MOST * sizeof *absmax),
              "parameter %d of many has other bits", i);
    }
    rig_close(&r);
    free(p), free(w), free(g), free(m), free(v), free(absmax), free(alone), free(rest), free(own_m), free(own_v),
        free(own_absmax), free(u);
}

int main(void) {
    check_many();
    check_formula(USL_F32), check_formula(USL_U8);
    check_threads_and_skip(USL_F32), check_threads_and_skip(USL_U8);
    check_reference();
    return test_end("adamw");
}
