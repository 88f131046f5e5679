/* The largest singular values of a matrix and their vectors. Small ones by one-sided Jacobi (Hestenes 1958), which is
 * exact; large ones by subspace iteration from random vectors (Halko, Martinsson, Tropp 2011), then Jacobi on what is
 * left. All in double; sums have one order. */
#include <math.h>
#include <string.h>

#include "core/base/pool.h"
#include "core/base/rng.h"
#include "core/model/adapter.h"

enum { SMALL = 192, OVER = 16, MOST = 60, SWEEPS = 40, COLS = 64 };

/* Rows of x (n, m) become orthogonal by rotations, which turn (n, n), the identity at first, goes through too. */
static void jacobi(double *x, int64_t n, int64_t m, double *turn) {
    memset(turn, 0, (size_t)(n * n) * sizeof *turn);
    for (int64_t i = 0; i < n; i++) turn[i * n + i] = 1;
    for (int sweep = 0, left = 1; left && sweep < SWEEPS; sweep++) {
        left = 0;
        for (int64_t p = 0; p < n; p++)
            for (int64_t q = p + 1; q < n; q++) {
                double *a = x + p * m, *b = x + q * m, aa = 0, bb = 0, ab = 0;
                for (int64_t i = 0; i < m; i++) aa += a[i] * a[i], bb += b[i] * b[i], ab += a[i] * b[i];
                if (fabs(ab) <= 1e-15 * sqrt(aa * bb) || ab == 0) continue;
                left = 1;
                double z = (bb - aa) / (2 * ab), t = (z < 0 ? -1 : 1) / (fabs(z) + sqrt(1 + z * z));
                double c = 1 / sqrt(1 + t * t), s = c * t;
                double *u = turn + p * n, *v = turn + q * n;
                for (int64_t i = 0; i < m; i++) {
                    double old = a[i];
                    a[i] = c * old - s * b[i];
                    b[i] = s * old + c * b[i];
                }
                for (int64_t i = 0; i < n; i++) {
                    double old = u[i];
                    u[i] = c * old - s * v[i];
                    v[i] = s * old + c * v[i];
                }
            }
    }
}

static double length(const double *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sqrt(sum);
}

/* Rows of x are made orthonormal, each against those before it, twice. */
static void orthonormal(double *x, int64_t n, int64_t m) {
    for (int64_t k = 0; k < n; k++) {
        double *a = x + k * m;
        for (int twice = 0; twice < 2; twice++)
            for (int64_t j = 0; j < k; j++) {
                const double *b = x + j * m;
                double dot = 0;
                for (int64_t i = 0; i < m; i++) dot += a[i] * b[i];
                for (int64_t i = 0; i < m; i++) a[i] -= dot * b[i];
            }
        double norm = length(a, m);
        for (int64_t i = 0; i < m; i++) a[i] = norm > 0 ? a[i] / norm : 0;
    }
}

/* The order of n lengths, falling; of equals the first comes first. */
static void by_length(const double *lengths, int64_t n, int64_t *order) {
    for (int64_t i = 0; i < n; i++) {
        int64_t at = i;
        for (; at > 0 && lengths[order[at - 1]] < lengths[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
}

typedef struct range {
    const float *w;
    int64_t rows, cols, n;
    double *y, *z; /* (n, rows), (n, cols) */
} range;

/* y = z W^T */
static void make_y(void *arg, int64_t row, int worker) {
    const range *g = arg;
    const float *w = g->w + row * g->cols;
    (void)worker;
    for (int64_t k = 0; k < g->n; k++) {
        const double *z = g->z + k * g->cols;
        double sum = 0;
        for (int64_t c = 0; c < g->cols; c++) sum += (double)w[c] * z[c];
        g->y[k * g->rows + row] = sum;
    }
}

/* z = y W, a task for some columns. */
static void make_z(void *arg, int64_t task, int worker) {
    const range *g = arg;
    int64_t col = task * COLS, n = g->cols - col < COLS ? g->cols - col : COLS;
    (void)worker;
    for (int64_t k = 0; k < g->n; k++) {
        double *z = g->z + k * g->cols + col;
        const double *y = g->y + k * g->rows;
        memset(z, 0, (size_t)n * sizeof *z);
        for (int64_t r = 0; r < g->rows; r++) {
            const float *w = g->w + r * g->cols + col;
            for (int64_t c = 0; c < n; c++) z[c] += y[r] * (double)w[c];
        }
    }
}

/* The square root of what of W the subspace holds. */
static double held(const range *g) {
    return length(g->z, g->n * g->cols);
}

static void iterate(usl_ctx *ctx, range *g, int iterations) {
    usli_rng rng;
    usli_rng_seed(&rng, 0x5EED);
    for (int64_t i = 0; i < g->n * g->cols; i++) g->z[i] = usli_rng_normal(&rng);
    double before = 0;
    for (int i = 0; i <= (iterations < 0 ? MOST : iterations); i++) {
        if (i) orthonormal(g->z, g->n, g->cols);
        usli_pool_run(ctx->pool, g->rows, make_y, g);
        orthonormal(g->y, g->n, g->rows);
        usli_pool_run(ctx->pool, (g->cols + COLS - 1) / COLS, make_z, g);
        double now = held(g);
        if (iterations < 0 && now - before <= 1e-11 * now) break;
        before = now;
    }
}

/* W = y^T z: the rotations that make z's rows orthogonal turn y's too. */
static usl_status of_product(usl_ctx *ctx, const range *g, int rank, float *u, float *s, float *v) {
    usl_status st = USL_OK;
    double *turn = usli_malloc(ctx, (size_t)(g->n * g->n) * sizeof *turn),
           *lengths = usli_malloc(ctx, (size_t)g->n * sizeof *lengths);
    int64_t *order = usli_malloc(ctx, (size_t)g->n * sizeof *order);
    if (!turn || !lengths || !order) {
        st = usli_nomem(ctx, (size_t)(g->n * g->n) * sizeof *turn);
        goto done;
    }
    jacobi(g->z, g->n, g->cols, turn);
    for (int64_t k = 0; k < g->n; k++) lengths[k] = length(g->z + k * g->cols, g->cols);
    by_length(lengths, g->n, order);
    for (int r = 0; r < rank; r++) {
        int64_t k = order[r];
        s[r] = (float)lengths[k];
        for (int64_t c = 0; c < g->cols; c++)
            v[r * g->cols + c] = lengths[k] > 0 ? (float)(g->z[k * g->cols + c] / lengths[k]) : 0;
        for (int64_t i = 0; i < g->rows; i++) {
            double sum = 0;
            for (int64_t j = 0; j < g->n; j++) sum += turn[k * g->n + j] * g->y[j * g->rows + i];
            u[i * rank + r] = (float)sum;
        }
    }
done:
    usli_free(ctx, turn);
    usli_free(ctx, lengths);
    usli_free(ctx, order);
    return st;
}

usl_status usli_svd(usl_ctx *ctx, const float *w, int64_t rows, int64_t cols, int rank, int iterations, float *u,
                    float *s, float *v) {
    int64_t least = rows < cols ? rows : cols, n = (int64_t)rank + OVER;
    if (rank > least)
        return usli_fail(ctx, USL_ERR_INVALID, "a %lldx%lld matrix has no %d singular values; lower r", (long long)rows,
                         (long long)cols, rank);
    /* The whole of a small matrix: with as many rows as vectors y is the identity; with as many columns the subspace is
     * all of it after one step. */
    if (n > least || (least <= SMALL && iterations < 0)) n = least;
    bool exact = n == rows;
    range g = { w, rows, cols, n, NULL, NULL };
    size_t bytes = (size_t)(n * (rows + cols)) * sizeof(double);
    if (!(g.y = usli_malloc(ctx, bytes))) return usli_nomem(ctx, bytes);
    g.z = g.y + n * rows;
    if (exact) {
        memset(g.y, 0, (size_t)(n * rows) * sizeof *g.y);
        for (int64_t i = 0; i < n; i++) g.y[i * rows + i] = 1;
        for (int64_t i = 0; i < n * cols; i++) g.z[i] = (double)w[i];
    } else {
        iterate(ctx, &g, iterations);
    }
    usl_status st = of_product(ctx, &g, rank, u, s, v);
    usli_free(ctx, g.y);
    return st;
}
