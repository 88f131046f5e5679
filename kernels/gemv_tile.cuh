/* A block owns 16 rows of y, its warps share the columns. Tensor cores multiply: weights are the 16 rows of a tile, the
 * tokens its 8 columns, so that 8 tokens cost as little arithmetic as one, and what is left to do a weight is decoding.
 *
 * Order within a tile is free as long as both factors have the same one: of 64 columns, lane t of the four that share a
 * row takes 16 neighbours, so codes are loaded 8 bytes at a time and 64 columns are one block of NF4.
 *
 * NF4: a byte is looked up as two 16-bit values at once, in a table that every lane has a column of (no two lanes meet
 * in a bank); products are summed over a block of 64, then multiplied by its absmax in float32. The table is stretched
 * by STRETCH before it is rounded to bfloat16: of all factors this one leaves the smallest error over normally
 * distributed weights, 0.08% where rounding decoded weights leaves 0.17%. Other types are decoded as kernels/decode.cu
 * does and rounded once.
 *
 * Llama-3-8B, one token: 3.6 GB of NF4 codes and constants, 0.75 ms at 4.8 TB/s (H200), 1.08 ms at 3.35 (H100), plus
 * the head, 1.05 GB in bfloat16: 0.22 / 0.31 ms. */
#ifndef USLI_KERNELS_GEMV_TILE_CUH
#define USLI_KERNELS_GEMV_TILE_CUH

#include "kernels/gemv_args.cuh"
#include "kernels/mma.cuh"

namespace {

constexpr int TILE_TOKENS = 8, STEP = 64, LANE = 16;
constexpr float STRETCH = 1.436767578125f;

/* ---- What a lane holds of one row and step: as loaded, and as words of two values ----------------------------------
 */

struct room {
    uint32_t table[256 * USLI_WARP];
    float map[256];
};

/* Types decoded value by value. Loads are issued where values are asked for. */
template <int TYPE, typename T> struct held {
    static constexpr bool SCALED = false;
    static constexpr int AHEAD = 1;
    const void *row;
    int64_t i;
    __device__ __forceinline__ void load(const gemv_segment &s, int64_t in, int64_t r, int64_t first) {
        row = s.data;
        i = r * in + first;
    }
    __device__ __forceinline__ void words(const room &, uint32_t (&w)[LANE / 2]) const {
        float v[LANE];
        values16<TYPE>::get(row, i, v);
#pragma unroll
        for (int k = 0; k < LANE / 2; k++) w[k] = pack_two<T>(v[2 * k], v[2 * k + 1]);
    }
    __device__ __forceinline__ float scale(const gemv_segment &, const room &) const {
        return 1.0f;
    }
};

/* Weights that are what products take. */
template <typename T> struct held_plain {
    static constexpr bool SCALED = false;
    static constexpr int AHEAD = 2;
    uint4 v[2];
    __device__ __forceinline__ void load(const gemv_segment &s, int64_t in, int64_t r, int64_t first) {
        (void)in;
        const char *row = static_cast<const char *>(s.data) + r * s.row_bytes;
        const uint4 *p = reinterpret_cast<const uint4 *>(row + first * (int64_t)sizeof(T));
        v[0] = __ldg(p);
        v[1] = __ldg(p + 1);
    }
    __device__ __forceinline__ void words(const room &, uint32_t (&w)[LANE / 2]) const {
        w[0] = v[0].x, w[1] = v[0].y, w[2] = v[0].z, w[3] = v[0].w;
        w[4] = v[1].x, w[5] = v[1].y, w[6] = v[1].z, w[7] = v[1].w;
    }
    __device__ __forceinline__ float scale(const gemv_segment &, const room &) const {
        return 1.0f;
    }
};
template <> struct held<USL_BF16, usli_bf16> : held_plain<usli_bf16> {};
template <> struct held<USL_F16, usli_f16> : held_plain<usli_f16> {};

/* Whole numbers up to 127 are exact in either type. */
template <typename T> struct held<USL_I8, T> {
    static constexpr bool SCALED = true;
    static constexpr int AHEAD = 2;
    uint4 v;
    float factor;
    __device__ __forceinline__ void load(const gemv_segment &s, int64_t in, int64_t r, int64_t first) {
        v = __ldg(reinterpret_cast<const uint4 *>(static_cast<const int8_t *>(s.data) + r * in + first));
        factor = s.scale[r];
    }
    __device__ __forceinline__ void words(const room &, uint32_t (&w)[LANE / 2]) const {
        const uint32_t four[4] = { v.x, v.y, v.z, v.w };
#pragma unroll
        for (int k = 0; k < LANE / 2; k++) {
            uint32_t two = four[k / 2] >> (k % 2 * 16);
            w[k] = pack_two<T>((float)(int8_t)(two & 255), (float)(int8_t)(two >> 8 & 255));
        }
    }
    __device__ __forceinline__ float scale(const gemv_segment &, const room &) const {
        return factor;
    }
};

template <typename T> struct held<USL_NF4, T> {
    static constexpr bool SCALED = true;
    static constexpr int AHEAD = 4;
    uint2 codes;
    float absmax; /* or absmax2 */
    int absmax_q;
    __device__ __forceinline__ void load(const gemv_segment &s, int64_t in, int64_t r, int64_t first) {
        int64_t i = r * in + first, block = i / USLI_NF4_BLOCK;
        codes = __ldg(reinterpret_cast<const uint2 *>(s.nf4.codes + i / 2));
        absmax_q = s.nf4.absmax_q ? s.nf4.absmax_q[block] : 0;
        absmax = s.nf4.absmax_q ? s.nf4.absmax2[block / USLI_NF4_NEST] : s.nf4.absmax[block];
    }
    __device__ __forceinline__ void words(const room &to, uint32_t (&w)[LANE / 2]) const {
        int lane = (int)threadIdx.x % USLI_WARP;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            w[k] = to.table[(codes.x >> (8 * k) & 255) * USLI_WARP + lane];
            w[k + 4] = to.table[(codes.y >> (8 * k) & 255) * USLI_WARP + lane];
        }
    }
    __device__ __forceinline__ float scale(const gemv_segment &s, const room &from) const {
        float v = s.nf4.absmax_q ? times_plus(from.map[absmax_q], absmax, s.nf4.offset) : absmax;
        return v * (1.0f / STRETCH);
    }
};

/* ---- The product ---------------------------------------------------------------------------------------------------
 */

/* A lane's part of a step: rows g and g + 8 of the tile. */
template <int TYPE, typename T> struct piece {
    held<TYPE, T> upper, lower;
    __device__ __forceinline__ void load(const gemv_args &g, const gemv_segment &s, int64_t row, int64_t other,
                                         int64_t first) {
        upper.load(s, g.in, row, first);
        lower.load(s, g.in, other, first);
    }
    /* x: token g's values, from the cache that all blocks fill; NULL: there is no such token. */
    __device__ __forceinline__ void multiply(const gemv_segment &s, const room &to, const T *x, float (&sum)[4]) const {
        uint32_t up[LANE / 2], low[LANE / 2];
        uint4 first = make_uint4(0, 0, 0, 0), second = first;
        if (x) {
            first = __ldg(reinterpret_cast<const uint4 *>(x));
            second = __ldg(reinterpret_cast<const uint4 *>(x) + 1);
        }
        uint32_t xs[LANE / 2] = { first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w };
        upper.words(to, up);
        lower.words(to, low);
        float d[4] = {};
#pragma unroll
        for (int k = 0; k < LANE / 2; k += 2) {
            uint32_t a[4] = { up[k], low[k], up[k + 1], low[k + 1] }, b[2] = { xs[k], xs[k + 1] };
            mma_16816<T>(held<TYPE, T>::SCALED ? d : sum, a, b);
        }
        if (!held<TYPE, T>::SCALED) return;
        float above = upper.scale(s, to), below = lower.scale(s, to);
        sum[0] += above * d[0], sum[1] += above * d[1];
        sum[2] += below * d[2], sum[3] += below * d[3];
    }
};

template <typename T> __device__ void fill(room *to, const usli_nf4 &q) {
    int byte = (int)threadIdx.x; /* THREADS is 256 */
    uint32_t two = pack_two<T>(STRETCH * q.table[byte >> 4], STRETCH * q.table[byte & 15]);
    for (int i = 0; i < USLI_WARP; i++) to->table[byte * USLI_WARP + (i + byte) % USLI_WARP] = two;
    to->map[byte] = q.map ? q.map[byte] : 0.0f; /* also for a segment behind q's, which may be doubly quantised */
}

/* A tile's segment and rows; those beyond the end read the last row. */
struct spot {
    const gemv_segment *s;
    int first_row, row, other;
};

__device__ __forceinline__ spot spot_of(const gemv_args &g, int tile) {
    int which = 0;
    while (tile >= g.s[which].tiles) tile -= g.s[which++].tiles;
    spot p = { &g.s[which], tile * TILE_ROWS, 0, 0 };
    int most = (int)p.s->rows - 1;
    p.row = min(p.first_row + (int)threadIdx.x % USLI_WARP / 4, most);
    p.other = min(p.row + 8, most);
    return p;
}

/* Blocks go from tile to tile with the next one's weights under way, so that memory never waits for a sum or a table.
 */
template <int TYPE, typename T>
__global__ void __launch_bounds__(THREADS, 2) gemv_tile(const __grid_constant__ gemv_args g, int tiles) {
    constexpr int AHEAD = held<TYPE, T>::AHEAD; /* steps whose loads are in flight while others are multiplied */
    USLI_SHARED(room, table);
    __shared__ float part[2][WARPS][TILE_ROWS][TILE_TOKENS];
    int steps = (int)(g.in / STEP), warp = (int)threadIdx.x / USLI_WARP, begin = warp * AHEAD;
    int lane = (int)threadIdx.x % USLI_WARP, from = lane % 4 * LANE;
    int token = (int)threadIdx.x % TILE_TOKENS, half = 0;
    bool writes = threadIdx.x < TILE_ROWS * TILE_TOKENS && token < g.tokens;
    const T *x = lane / 4 < g.tokens ? static_cast<const T *>(g.x) + lane / 4 * g.ldx + from : nullptr;
    piece<TYPE, T> odd[AHEAD] = {}, even[AHEAD] = {}; /* of steps beyond the end, the last once more: not multiplied */
    spot here = spot_of(g, (int)blockIdx.x);
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        odd[k].load(g, *here.s, here.row, here.other, (int64_t)min(begin + k, steps - 1) * STEP + from);
    if (TYPE == USL_NF4) {
        fill<T>(table, here.s->nf4);
        __syncthreads();
    }
    await_earlier();
    /* One group of steps, and the tile's end when it is the last: true while there is another. Two sets of registers
     * take turns, since a copy from one to the other would wait for what is under way. */
    int tile = (int)blockIdx.x, at = begin, group = 0;
    bool more = tile + (int)gridDim.x < tiles;
    spot then = more ? spot_of(g, tile + (int)gridDim.x) : here;
    float sum[4] = {};
    auto turn = [&](piece<TYPE, T>(&now)[AHEAD], piece<TYPE, T>(&next)[AHEAD]) {
        bool last = group + WARPS * AHEAD >= steps;
        spot p = { last ? then.s : here.s, 0, last ? then.row : here.row, last ? then.other : here.other };
        int first = last ? begin : at + WARPS * AHEAD;
        if (!last || more) {
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
                next[k].load(g, *p.s, p.row, p.other, (int64_t)min(first + k, steps - 1) * STEP + from);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (at + k < steps) now[k].multiply(*here.s, *table, x ? x + (at + k) * STEP : nullptr, sum);
        at = first;
        group = last ? 0 : group + WARPS * AHEAD;
        if (!last) return true;
        int r = lane / 4, t = lane % 4 * 2;
        part[half][warp][r][t] = sum[0], part[half][warp][r][t + 1] = sum[1];
        part[half][warp][r + 8][t] = sum[2], part[half][warp][r + 8][t + 1] = sum[3];
        __syncthreads();
        int own = here.first_row + (int)threadIdx.x / TILE_TOKENS;
        if (writes && own < here.s->rows) {
            float y = gemv_beside(g, *here.s, own, token);
            for (int w = 0; w < WARPS; w++) y += part[half][w][threadIdx.x / TILE_TOKENS][token];
            store_any(g.y, g.y_dtype, token * g.ldy + here.s->row0 + own, y);
        }
        if (!more) return false;
        half ^= 1; /* the other half is free: who reads it has not come to this barrier yet */
        sum[0] = sum[1] = sum[2] = sum[3] = 0;
        here = then;
        tile += (int)gridDim.x;
        more = tile + (int)gridDim.x < tiles;
        then = more ? spot_of(g, tile + (int)gridDim.x) : here;
        return true;
    };
    while (turn(odd, even) && turn(even, odd)) {
    }
}

constexpr int BLOCKS_A_MULTIPROCESSOR = 2;

/* A table is worth filling once a block; without one, blocks of one tile each do as well. */
template <int TYPE, typename T> void launch_tiles_of(usli_exec *x, const gemv_args *g) {
    int tiles = 0, most = BLOCKS_A_MULTIPROCESSOR * usli_cuda_of(x)->multiprocessors;
    for (int i = 0; i < g->count; i++) tiles += g->s[i].tiles;
    size_t shared = TYPE == USL_NF4 ? sizeof(room) : 0;
    int blocks = TYPE == USL_NF4 && tiles > most ? most : tiles;
    USLI_LAUNCH_EARLY((unsigned)blocks, THREADS, shared, x, gemv_tile<TYPE, T>)(*g, tiles);
}

template <typename T> void launch_tiles(usli_exec *x, const usli_matrix *w, const gemv_args *g) {
    if (w->nf4)
        launch_tiles_of<USL_NF4, T>(x, g);
    else if (w->dtype == USL_I8)
        launch_tiles_of<USL_I8, T>(x, g);
    else
        USLI_BY_TYPE(w->dtype, TYPE, (launch_tiles_of<TYPE, T>(x, g)))
}

} // namespace

#endif
