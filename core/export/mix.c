#include "core/export/mix.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "core/quant/traits.h"

static const usli_method METHODS[] = {
    { "f32", USL_F32, 0, NULL, USL_DTYPE_AUTO },        { "f16", USL_F16, 1, NULL, USL_DTYPE_AUTO },
    { "bf16", USL_BF16, 32, NULL, USL_DTYPE_AUTO },     { "q8_0", USL_Q8_0, 7, NULL, USL_DTYPE_AUTO },
    { "q4_0", USL_Q4_0, 2, NULL, USL_DTYPE_AUTO },      { "q4_1", USL_Q4_1, 3, NULL, USL_DTYPE_AUTO },
    { "q5_0", USL_Q5_0, 8, NULL, USL_DTYPE_AUTO },      { "q5_1", USL_Q5_1, 9, NULL, USL_DTYPE_AUTO },
    { "q2_k", USL_Q2_K, 10, NULL, USL_DTYPE_AUTO },     { "q2_k_l", USL_Q2_K, 10, "q2_k", USL_Q8_0 },
    { "q3_k_s", USL_Q3_K, 11, NULL, USL_DTYPE_AUTO },   { "q3_k_m", USL_Q3_K, 12, NULL, USL_DTYPE_AUTO },
    { "q3_k_l", USL_Q3_K, 13, NULL, USL_DTYPE_AUTO },   { "q4_k_s", USL_Q4_K, 14, NULL, USL_DTYPE_AUTO },
    { "q4_k_m", USL_Q4_K, 15, NULL, USL_DTYPE_AUTO },   { "q5_k_s", USL_Q5_K, 16, NULL, USL_DTYPE_AUTO },
    { "q5_k_m", USL_Q5_K, 17, NULL, USL_DTYPE_AUTO },   { "q6_k", USL_Q6_K, 18, NULL, USL_DTYPE_AUTO },
    { "iq4_nl", USL_IQ4_NL, 25, NULL, USL_DTYPE_AUTO }, { "iq4_xs", USL_IQ4_XS, 30, NULL, USL_DTYPE_AUTO },
};
enum { METHOD_COUNT = sizeof METHODS / sizeof *METHODS };

static const struct {
    const char *alias, *name;
} ALIASES[] = {
    { "not_quantized", "bf16" }, { "fast_quantized", "q8_0" }, { "quantized", "q4_k_m" },
    { "q4_k", "q4_k_m" },        { "q5_k", "q5_k_m" },         { "q3_k", "q3_k_m" },
};

const usli_method *usli_method_find(const char *name) {
    for (size_t i = 0; i < sizeof ALIASES / sizeof *ALIASES; i++)
        if (strcasecmp(name, ALIASES[i].alias) == 0) name = ALIASES[i].name;
    for (int i = 0; i < METHOD_COUNT; i++)
        if (strcasecmp(name, METHODS[i].name) == 0) return &METHODS[i];
    return NULL;
}

void usli_method_list(char *buf, size_t size) {
    size_t used = 0;
    buf[0] = 0;
    for (int i = 0; i < METHOD_COUNT && used < size; i++) {
        int n = snprintf(buf + used, size - used, "%s%s", i ? ", " : "", METHODS[i].name);
        used += n > 0 ? (size_t)n : 0;
    }
}

/* ---- The mix -------------------------------------------------------------------------------------------------------
 */

typedef enum role { VALUE, KEY, OUT, DOWN } role;

typedef enum when {
    ALWAYS,
    FIRST_TWO, /* of the layers */
    FIRST_FOUR,
    FIRST_SIXTEENTH,
    FIRST_EIGHTH,
    BLIND_EIGHTH,  /* the first eighth, when there is no importance matrix */
    GUIDED_EIGHTH, /* the same when there is one */
    MORE_BITS,     /* the first and last eighth, and every third between */
    SHARED_FOUR,   /* four or more query heads to a key head */
    EIGHT_EXPERTS,
} when;

/* The first rule that fits counts; without one a matrix gets the method's own type. A method of NULL is any. */
static const struct {
    const char *method;
    role role;
    when when;
    usl_dtype type;
} RULES[] = {
    { NULL, VALUE, EIGHT_EXPERTS, USL_Q8_0 },   { NULL, KEY, EIGHT_EXPERTS, USL_Q8_0 },
    { "q2_k", VALUE, SHARED_FOUR, USL_Q4_K },   { "q2_k", VALUE, ALWAYS, USL_Q3_K },
    { "q3_k_m", VALUE, FIRST_TWO, USL_Q5_K },   { "q3_k_m", VALUE, ALWAYS, USL_Q4_K },
    { "q3_k_l", VALUE, ALWAYS, USL_Q5_K },      { "q4_k_s", VALUE, FIRST_FOUR, USL_Q5_K },
    { "q4_k_m", VALUE, MORE_BITS, USL_Q6_K },   { "q5_k_m", VALUE, MORE_BITS, USL_Q6_K },
    { "iq4_nl", VALUE, SHARED_FOUR, USL_Q5_K }, { "iq4_xs", VALUE, SHARED_FOUR, USL_Q5_K },
    { "q2_k", DOWN, ALWAYS, USL_Q3_K },         { "q3_k_m", DOWN, FIRST_SIXTEENTH, USL_Q5_K },
    { "q3_k_m", DOWN, ALWAYS, USL_Q4_K },       { "q3_k_l", DOWN, ALWAYS, USL_Q5_K },
    { "q4_k_s", DOWN, FIRST_EIGHTH, USL_Q5_K }, { "q4_k_m", DOWN, MORE_BITS, USL_Q6_K },
    { "q5_k_m", DOWN, MORE_BITS, USL_Q6_K },    { "iq4_nl", DOWN, BLIND_EIGHTH, USL_Q5_K },
    { "iq4_xs", DOWN, BLIND_EIGHTH, USL_Q5_K }, { "q4_0", DOWN, GUIDED_EIGHTH, USL_Q4_1 },
    { "q5_0", DOWN, GUIDED_EIGHTH, USL_Q5_1 },  { "q2_k", OUT, EIGHT_EXPERTS, USL_Q5_K },
    { "q3_k_s", OUT, EIGHT_EXPERTS, USL_Q5_K }, { "q3_k_m", OUT, EIGHT_EXPERTS, USL_Q5_K },
    { "q4_k_s", OUT, EIGHT_EXPERTS, USL_Q5_K }, { "q4_k_m", OUT, EIGHT_EXPERTS, USL_Q5_K },
    { "iq4_nl", OUT, EIGHT_EXPERTS, USL_Q5_K }, { "iq4_xs", OUT, EIGHT_EXPERTS, USL_Q5_K },
    { "q3_k_l", OUT, EIGHT_EXPERTS, USL_Q3_K }, { "q2_k", OUT, ALWAYS, USL_Q3_K },
    { "q3_k_m", OUT, ALWAYS, USL_Q4_K },        { "q3_k_l", OUT, ALWAYS, USL_Q5_K },
};

static const struct {
    const char *part; /* of the tensor's name */
    role role;
} ROLES[] = {
    { "attn_qkv.weight", VALUE }, { "attn_kv_b.weight", VALUE }, { "attn_v.weight", VALUE },
    { "attn_k.weight", KEY },     { "attn_output.weight", OUT }, { "ffn_down", DOWN },
};

static bool applies(when w, const usli_mix_model *m, int64_t layer) {
    int64_t n = m->layers;
    switch (w) {
    case ALWAYS: return true;
    case FIRST_TWO: return layer < 2;
    case FIRST_FOUR: return layer < 4;
    case FIRST_SIXTEENTH: return layer < n / 16;
    case FIRST_EIGHTH: return layer < n / 8;
    case BLIND_EIGHTH: return layer < n / 8 && !m->importance;
    case GUIDED_EIGHTH: return layer < n / 8 && m->importance;
    case MORE_BITS: return layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2;
    case SHARED_FOUR: return m->kv_heads > 0 && m->heads / m->kv_heads >= 4;
    case EIGHT_EXPERTS: return m->experts == 8;
    }
    return false;
}

static usl_dtype inner_type(const usli_method *method, const usli_mix_model *m, const char *tensor, int64_t layer) {
    const char *mix = method->mix ? method->mix : method->name;
    for (size_t r = 0; r < sizeof ROLES / sizeof *ROLES; r++) {
        if (!strstr(tensor, ROLES[r].part)) continue;
        usl_dtype type = method->matrix;
        for (size_t i = 0; i < sizeof RULES / sizeof *RULES; i++) {
            if (RULES[i].role != ROLES[r].role || (RULES[i].method && strcmp(RULES[i].method, mix) != 0) ||
                !applies(RULES[i].when, m, layer))
                continue;
            type = RULES[i].type;
            break;
        }
        /* Models of 80 layers whose heads share keys have small value matrices: more bits cost little. */
        bool small = ROLES[r].role == VALUE && m->layers == 80 && m->heads != m->kv_heads;
        return small && (type == USL_Q3_K || type == USL_Q4_K) ? USL_Q5_K : type;
    }
    return method->matrix;
}

/* Matrices that are too small or too delicate. */
static bool stays_float(const char *tensor) {
    static const char *const PARTS[] = { "ffn_gate_inp.weight", "_norm.weight" };
    for (size_t i = 0; i < sizeof PARTS / sizeof *PARTS; i++)
        if (strstr(tensor, PARTS[i])) return true;
    return false;
}

/* Rows that do not fit a block fall back as llama.cpp's do. */
static usl_dtype fitting(usl_dtype type, int64_t cols) {
    static const struct {
        usl_dtype type, instead;
    } FALLBACKS[] = { { USL_IQ4_XS, USL_IQ4_NL }, { USL_Q2_K, USL_Q4_0 }, { USL_Q3_K, USL_Q4_0 },
                      { USL_Q4_K, USL_Q5_0 },     { USL_Q5_K, USL_Q5_1 }, { USL_Q6_K, USL_Q8_0 } };
    for (size_t i = 0; cols % usli_traits_of(type)->block && i < sizeof FALLBACKS / sizeof *FALLBACKS; i++)
        if (FALLBACKS[i].type == type) {
            type = FALLBACKS[i].instead;
            break;
        }
    return cols % usli_traits_of(type)->block ? USL_F16 : type;
}

usl_dtype usli_mix_type(const usli_method *method, const usli_mix_model *m, const char *tensor, int64_t layer,
                        int64_t cols) {
    if (!cols || stays_float(tensor)) return USL_F32;
    usl_dtype type = method->matrix;
    if (usli_traits_of(type)->block == 1) return type;
    bool embedding = strcmp(tensor, "token_embd.weight") == 0, head = strcmp(tensor, "output.weight") == 0;
    if ((embedding || head) && method->output != USL_DTYPE_AUTO)
        type = method->output;
    else if (head || (embedding && m->tied))
        type = type == USL_Q8_0 || cols % usli_traits_of(type)->block ? USL_Q8_0 : USL_Q6_K;
    else if (!embedding)
        type = inner_type(method, m, tensor, layer);
    return fitting(type, cols);
}
