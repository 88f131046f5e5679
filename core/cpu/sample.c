/* The warpers of transformers' generate, in its order: repetition penalty, temperature, top-k, top-p, min-p. Nothing is
 * sorted but the few values that top-p must compare. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/cpu/cpu.h"
#include "core/cpu/vec.h"

typedef struct job {
    const usli_sample_args *a;
    const usli_vec *v;
    float *z, *other; /* (cols) scores, then weights; room */
} job;

static void penalise(const job *j, int64_t r) {
    const usli_sample_args *a = j->a;
    float *done = j->other;
    for (int32_t i = a->cu_seen[r]; i < a->cu_seen[r + 1]; i++)
        if (a->seen[i] >= 0 && a->seen[i] < a->cols) done[a->seen[i]] = 0;
    for (int32_t i = a->cu_seen[r]; i < a->cu_seen[r + 1]; i++) {
        int32_t id = a->seen[i];
        if (id < 0 || id >= a->cols || done[id] != 0) continue;
        j->z[id] = j->z[id] > 0 ? j->z[id] / a->repetition_penalty : j->z[id] * a->repetition_penalty;
        done[id] = 1; /* once, however often it was seen */
    }
}

/* The k-th largest of n values, which change places: parts around a pivot, in the part that holds it, until it is
 * found. */
static float select_largest(float *x, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1, at = k - 1;
    while (low < high) {
        float pivot = x[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i > j) break;
            float keep = x[i];
            x[i++] = x[j];
            x[j--] = keep;
        }
        if (at <= j)
            high = j;
        else if (at >= i)
            low = i;
        else
            break;
    }
    return x[at];
}

/* Scores below the k-th largest go to -inf; those equal to it stay. */
static void keep_top_k(const job *j) {
    int64_t n = j->a->cols;
    memcpy(j->other, j->z, (size_t)n * sizeof *j->z);
    float least = select_largest(j->other, n, j->a->top_k);
    for (int64_t i = 0; i < n; i++)
        if (j->z[i] < least) j->z[i] = -INFINITY;
}

static int descending(const void *pa, const void *pb) {
    float a = *(const float *)pa, b = *(const float *)pb;
    return (a < b) - (a > b);
}

/* Keeps the smallest set of weights that reaches top_p of their sum, of equals those of lowest id; returns its sum. */
static double keep_top_p(const job *j, double sum) {
    int64_t n = j->a->cols, count = 0, kept = 0, equals = 0;
    double want = (double)j->a->top_p * sum, reached = 0;
    /* Even all of the others together are less than what may be left out. */
    float least = (float)((sum - want) / (double)n * 0.999);
    for (int64_t i = 0; i < n; i++)
        if (j->z[i] >= least) j->other[count++] = j->z[i];
    qsort(j->other, (size_t)count, sizeof *j->other, descending);
    while (kept < count && (kept == 0 || reached < want)) reached += (double)j->other[kept++];
    float last = j->other[kept - 1];
    for (int64_t i = kept; i-- > 0 && j->other[i] == last;) equals++;
    for (int64_t i = 0; i < n; i++)
        if (j->z[i] < last || (j->z[i] == last && equals-- <= 0)) j->z[i] = 0;
    return reached;
}

/* Keeps the weights from min_p times the largest, which is 1. */
static double keep_min_p(const job *j) {
    double sum = 0;
    for (int64_t i = 0; i < j->a->cols; i++) {
        if (j->z[i] < j->a->min_p) j->z[i] = 0;
        sum += (double)j->z[i];
    }
    return sum;
}

static int32_t draw(const job *j, int64_t r, float top) {
    const usli_sample_args *a = j->a;
    int64_t n = a->cols, last = 0;
    for (int64_t i = 0; i < n; i++) j->z[i] = (j->z[i] - top) / a->temperature; /* no temperature makes it overflow */
    if (a->top_k > 0 && a->top_k < n) keep_top_k(j);
    double sum = (double)j->v->exp_sum(j->z, 0, n);
    if (a->top_p < 1) sum = keep_top_p(j, sum);
    if (a->min_p > 0) sum = keep_min_p(j);
    uint32_t word[4];
    usli_philox(a->seed, *a->offset, (uint64_t)r, word);
    double at = ((double)((uint64_t)word[0] << 21 | word[1] >> 11) / 9007199254740992.0) * sum;
    for (int64_t i = 0; i < n; i++) {
        if (j->z[i] == 0) continue;
        last = i;
        at -= (double)j->z[i];
        if (at < 0) break;
    }
    return (int32_t)last;
}

static size_t workspace(const usli_exec *x, const void *args, usli_pass pass) {
    (void)x, (void)pass;
    return 2 * (size_t)((const usli_sample_args *)args)->cols * sizeof(float);
}

static usl_status run(usli_exec *x, void *args, usli_pass pass, void *ws) {
    const usli_sample_args *a = args;
    job j = { a, usli_vec_best(), ws, (float *)ws + a->cols };
    (void)pass;
    for (int64_t r = 0; r < a->rows; r++) {
        memcpy(j.z, a->logits + r * a->stride, (size_t)a->cols * sizeof *j.z);
        if (a->cu_seen && a->repetition_penalty != 1.0f) penalise(&j, r);
        bool numbers = true;
        for (int64_t i = 0; i < a->cols; i++) numbers = numbers && j.z[i] < INFINITY;
        float top = j.v->max(j.z, a->cols);
        if (!numbers || top == -INFINITY)
            return usli_fail(x->ctx, USL_ERR_NUMERIC,
                             "the logits are not numbers; the weights are damaged or overflow in this dtype");
        if (a->temperature > 0) {
            a->out[r] = draw(&j, r, top);
            continue;
        }
        int32_t best = 0;
        while (j.z[best] != top) best++;
        a->out[r] = best;
    }
    return USL_OK;
}

const usli_op_impl usli_cpu_sample = { run, workspace };
