/* The same for NF4 with rows of whole stages of 256 columns, which is nearly all a 4-bit decode step reads. A warp
 * copies its own codes to shared memory, two stages ahead and across tiles, and never waits for another warp but at a
 * tile's end: loads into registers asked for eight lines of memory each, and the load unit, not memory, set the pace
 * (54 us for gate|up, whose bytes take 18 us at 3.35 TB/s). A stage's rows are 128 bytes, copied as lines.
 *
 * What a piece (16 rows, 64 columns) costs a multiprocessor's load unit: 16 lookups, 4 clocks of codes, 4 of copies,
 * some 8 of scales and tokens; 128 registers hold the rest. */
#ifndef USLI_KERNELS_GEMV_NF4_CUH
#define USLI_KERNELS_GEMV_NF4_CUH

#include "kernels/gemv_tile.cuh"

namespace {

constexpr int NF4_STAGES = 3, STAGE_STEPS = 4, STAGE_COLS = STAGE_STEPS * STEP, STAGE_UNITS = STAGE_COLS / 32;

/* 16 bytes of codes are a unit; unit u of row r stands at u ^ r % 4 * 2, so that no two lanes meet in a bank. */
struct nf4_stage {
    uint4 codes[TILE_ROWS * STAGE_UNITS];
    uint4 absmax[TILE_ROWS]; /* nested: 4 bytes a row, then its absmax2, in 16 words each; else 4 floats a row */
};
struct nf4_room {
    room look;
    nf4_stage ring[WARPS][NF4_STAGES];
};

/* Where a lane finds what it copies next: of every fourth row 16 bytes a group, of one row four blocks' constants. */
struct nf4_source {
    const usli_nf4 *q;
    const uint8_t *codes;
    int64_t step; /* from a row to the fourth after it, in bytes */
    int block;
    bool valid[TILE_ROWS * STAGE_UNITS / USLI_WARP]; /* is there such a row */
    __device__ __forceinline__ nf4_source(const spot &p, int64_t in) : q(&p.s->nf4), step(in / 2 * 4) {
        int lane = (int)threadIdx.x % USLI_WARP, row = p.first_row + lane / STAGE_UNITS, rows = (int)p.s->rows;
        codes = q->codes + row * (in / 2) + lane % STAGE_UNITS * 16;
#pragma unroll
        for (int i = 0; i < TILE_ROWS * STAGE_UNITS / USLI_WARP; i++) valid[i] = row + 4 * i < rows;
        block = min(p.first_row + lane % TILE_ROWS, rows - 1) * (int)(in / USLI_NF4_BLOCK);
    }
    __device__ __forceinline__ void copy(nf4_stage *to, int group) const {
        int lane = (int)threadIdx.x % USLI_WARP, unit = lane % STAGE_UNITS ^ lane / STAGE_UNITS * 2;
        uint4 *at = &to->codes[lane / STAGE_UNITS * STAGE_UNITS + unit];
        const uint8_t *from = codes + group * (STAGE_COLS / 2);
#pragma unroll
        for (int i = 0; i < TILE_ROWS * STAGE_UNITS / USLI_WARP; i++, from += step)
            cp_async16(at + 4 * i * STAGE_UNITS, from, valid[i]);
        int first = block + group * STAGE_STEPS;
        if (q->absmax_q) {
            const void *word = q->absmax_q + first, *nest = q->absmax2 + first / USLI_NF4_NEST;
            cp_async4(reinterpret_cast<uint32_t *>(to->absmax) + lane, lane < TILE_ROWS ? word : nest);
        } else if (lane < TILE_ROWS) {
            cp_async16(&to->absmax[lane], q->absmax + first, true);
        }
    }
};

/* The scales of a row's four blocks, for STRETCHed levels. */
__device__ __forceinline__ void scales_of(const nf4_stage &s, const usli_nf4 &q, const float *map, int row,
                                          float (&scale)[STAGE_STEPS]) {
    const float *plain = reinterpret_cast<const float *>(s.absmax);
    if (q.absmax_q) {
        uint32_t four = reinterpret_cast<const uint32_t *>(s.absmax)[row];
        float nest = plain[TILE_ROWS + row] * (1.0f / STRETCH), offset = q.offset * (1.0f / STRETCH);
#pragma unroll
        for (int k = 0; k < STAGE_STEPS; k++) scale[k] = map[four >> (8 * k) & 255] * nest + offset;
    } else {
#pragma unroll
        for (int k = 0; k < STAGE_STEPS; k++) scale[k] = plain[row * STAGE_STEPS + k] * (1.0f / STRETCH);
    }
}

/* Byte I of codes as two levels: a shift, and one logic for the byte's line and the lane's column in it. */
template <int I> __device__ __forceinline__ uint32_t look_up(const room &look, uint32_t codes) {
    uint32_t line = I == 0 ? codes << 7 : codes >> (8 * I - 7);
    uint32_t at = (line & 0x7f80) | threadIdx.x % USLI_WARP * 4;
    return *reinterpret_cast<const uint32_t *>(reinterpret_cast<const char *>(look.table) + at);
}

template <typename T>
__device__ __forceinline__ void multiply_eight(const room &look, uint32_t up, uint32_t low, uint4 x, float (&d)[4]) {
    uint32_t first[4] = { look_up<0>(look, up), look_up<0>(look, low), look_up<1>(look, up), look_up<1>(look, low) };
    uint32_t second[4] = { look_up<2>(look, up), look_up<2>(look, low), look_up<3>(look, up), look_up<3>(look, low) };
    uint32_t b[2] = { x.x, x.y }, c[2] = { x.z, x.w };
    mma_16816<T>(d, first, b);
    mma_16816<T>(d, second, c);
}

/* Adds a stage's products; x: token g's values of the stage and lane, NULL: there is no such token. */
template <typename T>
__device__ __forceinline__ void multiply_stage(const nf4_stage &s, const usli_nf4 &q, const room &look, const T *x,
                                               float (&sum)[4]) {
    int lane = (int)threadIdx.x % USLI_WARP, g = lane / 4, t = lane % 4;
    float above[STAGE_STEPS], below[STAGE_STEPS];
    scales_of(s, q, look.map, g, above);
    scales_of(s, q, look.map, g + 8, below);
#pragma unroll
    for (int k = 0; k < STAGE_STEPS; k++) {
        uint4 first = make_uint4(0, 0, 0, 0), second = first;
        if (x) {
            first = *reinterpret_cast<const uint4 *>(x + k * STEP);
            second = *(reinterpret_cast<const uint4 *>(x + k * STEP) + 1);
        }
        const uint4 *unit = &s.codes[g * STAGE_UNITS + ((2 * k) ^ g % 4 * 2) + t / 2];
        uint2 up = reinterpret_cast<const uint2 *>(unit)[t % 2];
        uint2 low = reinterpret_cast<const uint2 *>(unit + 8 * STAGE_UNITS)[t % 2];
        float d[4] = {};
        multiply_eight<T>(look, up.x, low.x, first, d);
        multiply_eight<T>(look, up.y, low.y, second, d);
        sum[0] += above[k] * d[0], sum[1] += above[k] * d[1];
        sum[2] += below[k] * d[2], sum[3] += below[k] * d[3];
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 2) gemv_nf4(const __grid_constant__ gemv_args g, int tiles) {
    USLI_SHARED(nf4_room, shared);
    __shared__ float part[2][WARPS][TILE_ROWS][TILE_TOKENS], low[2][TILE_ROWS][TILE_TOKENS];
    int warp = (int)threadIdx.x / USLI_WARP, lane = (int)threadIdx.x % USLI_WARP, groups = (int)(g.in / STAGE_COLS);
    int token = (int)threadIdx.x % TILE_TOKENS, half = 0, into = 0, from = 0;
    bool writes = threadIdx.x < TILE_ROWS * TILE_TOKENS && token < g.tokens;
    const T *x = lane / 4 < g.tokens ? static_cast<const T *>(g.x) + lane / 4 * g.ldx + lane % 4 * LANE : nullptr;
    nf4_stage *ring = shared->ring[warp];
    int next_tile = (int)blockIdx.x, next_group = warp; /* what is copied next */
    nf4_source next(spot_of(g, next_tile), g.in);
    auto copy_next = [&] {
        if (next_group < groups) {
            next.copy(&ring[into], next_group);
            into = into + 1 == NF4_STAGES ? 0 : into + 1;
            next_group += WARPS;
            if (next_group >= groups) {
                next_tile += (int)gridDim.x;
                if (next_tile < tiles) next = nf4_source(spot_of(g, next_tile), g.in), next_group = warp;
            }
        }
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < NF4_STAGES - 1; i++) copy_next();
    fill<T>(&shared->look, *next.q);
    __syncthreads();
    await_earlier();
    for (int tile = (int)blockIdx.x; tile < tiles; tile += (int)gridDim.x) {
        spot here = spot_of(g, tile);
        gemv_low beside(*here.s, here.first_row);
        float sum[4] = {};
        for (int group = warp; group < groups; group += WARPS) {
            copy_next();
            cp_async_wait<NF4_STAGES - 1>();
            __syncwarp();
            multiply_stage<T>(ring[from], here.s->nf4, shared->look, x ? x + group * STAGE_COLS : nullptr, sum);
            __syncwarp(); /* the next copy goes there */
            from = from + 1 == NF4_STAGES ? 0 : from + 1;
        }
        int r = lane / 4, t = lane % 4 * 2;
        part[half][warp][r][t] = sum[0], part[half][warp][r][t + 1] = sum[1];
        part[half][warp][r + 8][t] = sum[2], part[half][warp][r + 8][t + 1] = sum[3];
        beside.add(g, *here.s, low[half]);
        __syncthreads();
        int row = (int)threadIdx.x / TILE_TOKENS, own = here.first_row + row;
        if (writes && own < here.s->rows) {
            float y = gemv_rest(g, *here.s, own, token) + low[half][row][token];
#pragma unroll
            for (int w = 0; w < WARPS; w++) y += part[half][w][row][token];
            store_any(g.y, g.y_dtype, token * g.ldy + here.s->row0 + own, y);
        }
        half ^= 1; /* the other half is free: who reads it has not come to this barrier yet */
    }
    cp_async_wait<0>();
}

/* Whole stages, and constants that are copied a word or four floats at a time. */
bool nf4_fits(const usli_exec *x, const gemv_args *g) {
    bool fits = g->in % STAGE_COLS == 0 && usli_cuda_of(x)->shared_most >= sizeof(nf4_room) + sizeof(float) * 5120;
    for (int i = 0; i < g->count; i++) {
        const usli_nf4 *q = &g->s[i].nf4;
        fits = fits && reinterpret_cast<uintptr_t>(q->absmax_q) % 4 == 0 && usli_aligned16(q->absmax) &&
               g->s[i].rows * g->in / USLI_NF4_BLOCK < INT32_MAX;
    }
    return fits;
}

template <typename T> usl_status launch_nf4(usli_exec *x, const gemv_args *g) {
    int tiles = 0, most = BLOCKS_A_MULTIPROCESSOR * usli_cuda_of(x)->multiprocessors;
    for (int i = 0; i < g->count; i++) tiles += g->s[i].tiles;
    USLI_TRY(USLI_ALLOW_SHARED(x, sizeof(nf4_room), gemv_nf4<T>));
    USLI_LAUNCH_EARLY((unsigned)(tiles < most ? tiles : most), THREADS, sizeof(nf4_room), x, gemv_nf4<T>)(*g, tiles);
    return USL_OK;
}

} // namespace

#endif
