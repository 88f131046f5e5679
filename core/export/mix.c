#include "core/export/mix.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "core/quant/traits.h"

#define OWN USL_DTYPE_AUTO
/* clang-format off */
static const usli_method METHODS[] = {
    { "f32", USL_F32, 0, NULL, OWN, OWN },           { "f16", USL_F16, 1, NULL, OWN, OWN },
    { "bf16", USL_BF16, 32, NULL, OWN, OWN },        { "q8_0", USL_Q8_0, 7, NULL, OWN, OWN },
    { "q4_0", USL_Q4_0, 2, NULL, OWN, OWN },         { "q4_1", USL_Q4_1, 3, NULL, OWN, OWN },
    { "q5_0", USL_Q5_0, 8, NULL, OWN, OWN },         { "q5_1", USL_Q5_1, 9, NULL, OWN, OWN },
    { "q2_k", USL_Q2_K, 10, NULL, OWN, OWN },        { "q2_k_l", USL_Q2_K, 10, "q2_k", USL_Q8_0, USL_Q8_0 },
    { "q2_k_s", USL_Q2_K, 21, NULL, OWN, OWN },      { "q3_k_s", USL_Q3_K, 11, NULL, OWN, OWN },
    { "q3_k_m", USL_Q3_K, 12, NULL, OWN, OWN },      { "q3_k_l", USL_Q3_K, 13, NULL, OWN, OWN },
    { "q4_k_s", USL_Q4_K, 14, NULL, OWN, OWN },      { "q4_k_m", USL_Q4_K, 15, NULL, OWN, OWN },
    { "q5_k_s", USL_Q5_K, 16, NULL, OWN, OWN },      { "q5_k_m", USL_Q5_K, 17, NULL, OWN, OWN },
    { "q6_k", USL_Q6_K, 18, NULL, OWN, OWN },        { "iq4_nl", USL_IQ4_NL, 25, NULL, OWN, OWN },
    { "iq4_xs", USL_IQ4_XS, 30, NULL, OWN, OWN },    { "iq3_m", USL_IQ3_S, 27, NULL, OWN, OWN },
    { "iq3_s", USL_IQ3_S, 26, NULL, OWN, OWN },      { "iq3_xs", USL_IQ3_S, 22, NULL, OWN, OWN },
    { "iq3_xxs", USL_IQ3_XXS, 23, NULL, USL_Q5_K, USL_IQ3_S },
    { "iq2_m", USL_IQ2_S, 29, NULL, USL_Q5_K, USL_IQ3_S },
    { "iq2_s", USL_IQ2_XS, 28, NULL, USL_Q5_K, USL_IQ3_S },
    { "iq2_xs", USL_IQ2_XS, 20, NULL, USL_Q5_K, USL_Q2_K },
    { "iq2_xxs", USL_IQ2_XXS, 19, NULL, USL_Q5_K, USL_Q2_K },
    { "iq1_m", USL_IQ1_M, 31, NULL, USL_Q5_K, USL_Q2_K },
    { "iq1_s", USL_IQ1_S, 24, NULL, USL_Q5_K, USL_Q2_K },
};
/* clang-format on */
enum { METHOD_COUNT = sizeof METHODS / sizeof *METHODS };

static const struct {
    const char *alias, *name;
} ALIASES[] = {
    { "not_quantized", "bf16" }, { "fast_quantized", "q8_0" }, { "quantized", "q4_k_m" }, { "q4_k", "q4_k_m" },
    { "q5_k", "q5_k_m" },        { "q3_k", "q3_k_m" },         { "q3_k_xs", "iq3_xs" },
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

typedef enum role { VALUE, KEY, QUERY, OUT, DOWN, UP } role;

typedef enum when {
    ALWAYS,
    FIRST_TWO, /* of the layers */
    FIRST_FOUR,
    FIRST_SIXTEENTH,
    FIRST_EIGHTH,
    MIDDLE,        /* all but the first and last eighth */
    BLIND,         /* when there is no importance matrix */
    BLIND_EIGHTH,  /* the first eighth, when there is no importance matrix */
    GUIDED_EIGHTH, /* the same when there is one */
    MORE_BITS,     /* the first and last eighth, and every third between */
    SHARED_FOUR,   /* four or more query heads to a key head */
    FOUR_EXPERTS,  /* or more */
    EIGHT_EXPERTS,
    EIGHT_MORE_BITS, /* both */
} when;

/* Methods of one bit and two. */
#define ONE "iq1_s iq1_m"
#define SMALL_TWO "iq2_xxs iq2_xs"
#define TWO "iq2_s iq2_m"

/* The first rule that fits counts; without one a matrix gets the method's own type. methods: words; NULL is any. */
static const struct {
    const char *methods;
    role role;
    when when;
    usl_dtype type;
} RULES[] = {
    { ONE " " SMALL_TWO " " TWO, VALUE, SHARED_FOUR, USL_Q4_K },
    { ONE " " SMALL_TWO " " TWO, VALUE, FOUR_EXPERTS, USL_Q4_K },
    { TWO, VALUE, ALWAYS, USL_IQ3_S },
    { ONE " " SMALL_TWO, VALUE, ALWAYS, USL_Q2_K },
    { ONE " " SMALL_TWO " " TWO, KEY, EIGHT_EXPERTS, USL_Q4_K },
    { TWO, DOWN, FIRST_EIGHTH, USL_IQ3_S },
    { ONE " " SMALL_TWO, DOWN, FIRST_EIGHTH, USL_Q2_K },
    { ONE " " SMALL_TWO " " TWO, OUT, EIGHT_EXPERTS, USL_Q5_K },
    { ONE, OUT, ALWAYS, USL_IQ2_XXS },
    { TWO, OUT, ALWAYS, USL_IQ3_S },
    { NULL, VALUE, EIGHT_EXPERTS, USL_Q8_0 },
    { NULL, KEY, EIGHT_EXPERTS, USL_Q8_0 },
    { "q2_k q2_k_s iq3_xxs iq3_xs iq3_s", VALUE, SHARED_FOUR, USL_Q4_K },
    { "q2_k", VALUE, ALWAYS, USL_Q3_K },
    { "q3_k_m", VALUE, FIRST_TWO, USL_Q5_K },
    { "q3_k_m iq3_m", VALUE, ALWAYS, USL_Q4_K },
    { "q3_k_l", VALUE, ALWAYS, USL_Q5_K },
    { "q4_k_s", VALUE, FIRST_FOUR, USL_Q5_K },
    { "q4_k_m q5_k_m", VALUE, MORE_BITS, USL_Q6_K },
    { "iq4_nl iq4_xs", VALUE, SHARED_FOUR, USL_Q5_K },
    { "iq3_xs", KEY, ALWAYS, USL_IQ3_XXS },
    { "iq3_xs", QUERY, ALWAYS, USL_IQ3_XXS },
    { "iq3_xs", UP, MIDDLE, USL_IQ3_XXS },
    { "iq3_xxs", VALUE, BLIND, USL_IQ3_S },
    { "iq3_xxs", KEY, ALWAYS, USL_IQ2_S },
    { "iq3_xxs", QUERY, ALWAYS, USL_IQ2_S },
    { "q2_k", DOWN, ALWAYS, USL_Q3_K },
    { "q2_k_s iq3_m", DOWN, FIRST_EIGHTH, USL_Q4_K },
    { "iq3_xxs", DOWN, BLIND_EIGHTH, USL_Q4_K },
    { "iq3_xxs", DOWN, BLIND, USL_Q3_K },
    { "iq3_m", DOWN, EIGHT_MORE_BITS, USL_Q4_K },
    { "q3_k_m", DOWN, FIRST_SIXTEENTH, USL_Q5_K },
    { "q3_k_m", DOWN, ALWAYS, USL_Q4_K },
    { "q3_k_l", DOWN, ALWAYS, USL_Q5_K },
    { "q4_k_s", DOWN, FIRST_EIGHTH, USL_Q5_K },
    { "q4_k_m q5_k_m", DOWN, MORE_BITS, USL_Q6_K },
    { "iq4_nl iq4_xs", DOWN, BLIND_EIGHTH, USL_Q5_K },
    { "q4_0", DOWN, GUIDED_EIGHTH, USL_Q4_1 },
    { "q5_0", DOWN, GUIDED_EIGHTH, USL_Q5_1 },
    { "q2_k q3_k_s q3_k_m q4_k_s q4_k_m iq4_nl iq4_xs iq3_xxs iq3_xs iq3_s iq3_m", OUT, EIGHT_EXPERTS, USL_Q5_K },
    { "q3_k_l", OUT, EIGHT_EXPERTS, USL_Q3_K },
    { "q2_k", OUT, ALWAYS, USL_Q3_K },
    { "q3_k_m iq3_m", OUT, ALWAYS, USL_Q4_K },
    { "q3_k_l", OUT, ALWAYS, USL_Q5_K },
    { "iq3_xxs", OUT, ALWAYS, USL_IQ3_S },
};

static const struct {
    const char *part; /* of the tensor's name */
    role role;
} ROLES[] = {
    { "attn_qkv.weight", VALUE }, { "attn_kv_b.weight", VALUE }, { "attn_v.weight", VALUE }, { "attn_k.weight", KEY },
    { "attn_q.weight", QUERY },   { "attn_output.weight", OUT }, { "ffn_up", UP },           { "ffn_gate", UP },
    { "ffn_down", DOWN },
};

/* word stands in list, between spaces. */
static bool names(const char *list, const char *word) {
    size_t n = strlen(word);
    for (const char *at = list; (at = strstr(at, word)); at++)
        if ((at == list || at[-1] == ' ') && (at[n] == ' ' || !at[n])) return true;
    return false;
}

static bool applies(when w, const usli_mix_model *m, int64_t layer) {
    int64_t n = m->layers;
    switch (w) {
    case ALWAYS: return true;
    case FIRST_TWO: return layer < 2;
    case FIRST_FOUR: return layer < 4;
    case FIRST_SIXTEENTH: return layer < n / 16;
    case FIRST_EIGHTH: return layer < n / 8;
    case MIDDLE: return layer >= n / 8 && layer < 7 * n / 8;
    case BLIND: return !m->importance;
    case BLIND_EIGHTH: return layer < n / 8 && !m->importance;
    case GUIDED_EIGHTH: return layer < n / 8 && m->importance;
    case MORE_BITS: return layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2;
    case SHARED_FOUR: return m->kv_heads > 0 && m->heads / m->kv_heads >= 4;
    case FOUR_EXPERTS: return m->experts >= 4;
    case EIGHT_EXPERTS: return m->experts == 8;
    case EIGHT_MORE_BITS: return m->experts == 8 && applies(MORE_BITS, m, layer);
    }
    return false;
}

static usl_dtype inner_type(const usli_method *method, const usli_mix_model *m, const char *tensor, int64_t layer) {
    const char *mix = method->mix ? method->mix : method->name;
    for (size_t r = 0; r < sizeof ROLES / sizeof *ROLES; r++) {
        if (!strstr(tensor, ROLES[r].part)) continue;
        usl_dtype type = method->matrix;
        for (size_t i = 0; i < sizeof RULES / sizeof *RULES; i++) {
            if (RULES[i].role != ROLES[r].role || (RULES[i].methods && !names(RULES[i].methods, mix)) ||
                !applies(RULES[i].when, m, layer))
                continue;
            type = RULES[i].type;
            break;
        }
        /* Models of 80 layers whose heads share keys have small value matrices: more bits cost little. */
        bool small = ROLES[r].role == VALUE && m->layers == 80 && m->heads != m->kv_heads &&
                     !names(ONE " " SMALL_TWO " " TWO, mix);
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
    } FALLBACKS[] = { { USL_IQ4_XS, USL_IQ4_NL }, { USL_IQ3_S, USL_IQ4_NL },  { USL_IQ3_XXS, USL_IQ4_NL },
                      { USL_IQ2_S, USL_IQ4_NL },  { USL_IQ2_XS, USL_IQ4_NL }, { USL_IQ2_XXS, USL_IQ4_NL },
                      { USL_IQ1_M, USL_IQ4_NL },  { USL_IQ1_S, USL_IQ4_NL },  { USL_Q2_K, USL_Q4_0 },
                      { USL_Q3_K, USL_Q4_0 },     { USL_Q4_K, USL_Q5_0 },     { USL_Q5_K, USL_Q5_1 },
                      { USL_Q6_K, USL_Q8_0 } };
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
    if (head || (embedding && m->tied)) {
        type = type == USL_Q8_0 || cols % usli_traits_of(type)->block ? USL_Q8_0 : USL_Q6_K;
        if (method->head != OWN && type == USL_Q6_K) type = method->head;
    } else if (embedding) {
        if (method->embeddings != OWN) type = method->embeddings;
    } else {
        type = inner_type(method, m, tensor, layer);
    }
    return fitting(type, cols);
}

bool usli_mix_wants_importance(const usli_method *method, const char *tensor, usl_dtype type) {
    if (strcmp(tensor, "token_embd.weight") == 0 || strcmp(tensor, "output.weight") == 0) return false;
    switch (type) {
    case USL_IQ3_XXS:
    case USL_IQ2_S:
    case USL_IQ2_XS:
    case USL_IQ2_XXS:
    case USL_IQ1_M:
    case USL_IQ1_S: return true;
    case USL_Q2_K: return strcmp(method->name, "q2_k_s") == 0;
    default: return false;
    }
}
