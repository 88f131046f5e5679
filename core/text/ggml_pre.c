/* The names that GGUF gives to pre-tokenisers, and which of them a tokenizer.json's is. */
#include <string.h>

#include "core/text/parts.h"

#define TAIL "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define HEAD "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
/* llama.cpp spells both cases out, Hugging Face's files say (?i:...). */
#define BOTH_CASES "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|"
#define ANY_CASE "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
#define CJK "[\xE4\xB8\x80-\xE9\xBE\xA5\xE3\x81\x80-\xE3\x82\x9F\xE3\x82\xA0-\xE3\x83\xBF]+"
#define DEEPSEEK                                                                                        \
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| " \
    "?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"

static const usli_ggml_pre PRES[] = {
    { ",llama-bpe,llama3,llama-v3,falcon3,",
      "llama-bpe",
      { BOTH_CASES HEAD "\\p{N}{1,3}" TAIL, USLI_BYTES },
      true,
      true },
    { ",qwen2,deepseek-r1-qwen,stablelm2,", "qwen2", { BOTH_CASES HEAD "\\p{N}" TAIL, USLI_BYTES }, false, false },
    { ",smollm,starcoder,refact,command-r,codeshell,", "smollm", { "\\p{N}", USLI_WORDS }, false, false },
    { ",gpt-2,gpt2,phi-2,mpt,olmo,", "gpt-2", { USLI_WORDS }, false, false },
    { ",deepseek-v3,", "deepseek-v3", { "\\p{N}{1,3}", CJK, DEEPSEEK, USLI_BYTES }, false, false },
    { ",default,",
      "default",
      { "[\\p{P}\\$\\+<=>\\^~\\|]+", "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)",
        "\\p{N}+", "[0-9][0-9][0-9]", USLI_BYTES },
      false,
      false },
};
/* Hugging Face's spellings of the same. */
#define DIGITS "digits"
static const struct {
    const char *name, *parts[3];
} SPELLINGS[] = {
    { "llama-bpe", { ANY_CASE HEAD "\\p{N}{1,3}" TAIL, USLI_BYTES } },
    { "qwen2", { ANY_CASE HEAD "\\p{N}" TAIL, USLI_BYTES } },
    { "smollm", { DIGITS, USLI_WORDS } },
};

const usli_ggml_pre *usli_ggml_pre_find(const char *name, size_t len) {
    for (size_t i = 0; len && i < sizeof PRES / sizeof *PRES; i++)
        for (const char *p = PRES[i].names; *p; p++)
            if (*p == ',' && strncmp(p + 1, name, len) == 0 && p[1 + len] == ',') return &PRES[i];
    return NULL;
}

usl_status usli_ggml_pre_json(usl_ctx *ctx, const usli_ggml_pre *pre, usli_buf *out) {
    USLI_TRY(usli_buf_text(ctx, out, "{\"type\": \"Sequence\", \"pretokenizers\": ["));
    for (int i = 0; i < 5 && pre->parts[i]; i++) {
        const char *part = pre->parts[i];
        bool words = strcmp(part, USLI_WORDS) == 0;
        if (words || strcmp(part, USLI_BYTES) == 0) {
            USLI_TRY(usli_buf_text(
                ctx, out,
                "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": "));
            USLI_TRY(usli_buf_text(ctx, out, words ? "true}" : "false}"));
            continue;
        }
        USLI_TRY(usli_buf_text(ctx, out, "{\"type\": \"Split\", \"pattern\": {\"Regex\": "));
        USLI_TRY(usli_buf_json(ctx, out, part, strlen(part)));
        USLI_TRY(usli_buf_text(ctx, out, "}, \"behavior\": \"Isolated\", \"invert\": false}, "));
    }
    return usli_buf_text(ctx, out, "]}");
}

static bool step_is(const usli_step *s, const char *part) {
    if (s->kind == USLI_PRE_BYTE_LEVEL)
        return !s->add_prefix_space && strcmp(part, s->regex ? USLI_WORDS : USLI_BYTES) == 0;
    if (s->kind == USLI_PRE_DIGITS) return s->split && strcmp(part, DIGITS) == 0;
    return s->kind == USLI_PRE_SPLIT && s->regex && s->behavior == USLI_ISOLATED && strcmp(part, s->text) == 0;
}

static bool steps_are(const usli_steps *steps, const char *const *parts, size_t max) {
    size_t n = 0;
    while (n < max && parts[n]) n++;
    if (n != steps->count) return false;
    for (size_t i = 0; i < n; i++)
        if (!step_is(&steps->items[i], parts[i])) return false;
    return true;
}

const char *usli_tokenizer_ggml_model(const usli_tokenizer *tok) {
    if (tok->model == USLI_MODEL_UNIGRAM) return "t5";
    for (size_t i = 0; i < tok->pre_tokenizer.count; i++)
        if (tok->pre_tokenizer.items[i].kind == USLI_PRE_BYTE_LEVEL) return "gpt2";
    return "llama";
}

static bool signs_spaces(const usli_tokenizer *tok) {
    bool signs = tok->model == USLI_MODEL_SPM;
    for (size_t i = 0; i < tok->normalizer.count; i++) {
        const usli_step *s = &tok->normalizer.items[i];
        signs |= s->kind == USLI_NORM_REPLACE && s->with && s->with_len == 3 && memcmp(s->with, "\xE2\x96\x81", 3) == 0;
    }
    for (size_t i = 0; i < tok->pre_tokenizer.count; i++)
        signs |= tok->pre_tokenizer.items[i].kind == USLI_PRE_METASPACE;
    return signs;
}

const char *usli_tokenizer_ggml_pre(const usli_tokenizer *tok) {
    if (tok->pre) return tok->pre->write;
    for (size_t i = 0; i < sizeof PRES / sizeof *PRES; i++)
        if (steps_are(&tok->pre_tokenizer, PRES[i].parts, 5)) return PRES[i].write;
    for (size_t i = 0; i < sizeof SPELLINGS / sizeof *SPELLINGS; i++)
        if (steps_are(&tok->pre_tokenizer, SPELLINGS[i].parts, 3)) return SPELLINGS[i].name;
    /* A SentencePiece vocabulary has no pre-tokeniser, and readers look at none; but their spaces become signs. */
    const char *model = usli_tokenizer_ggml_model(tok);
    return strcmp(model, "t5") == 0 || (strcmp(model, "llama") == 0 && signs_spaces(tok)) ? "default" : NULL;
}

/* ---- What stands around a SentencePiece vocabulary
 * ------------------------------------------------------------------------ */

#define SPACE "\xE2\x96\x81"
#define TO_SPACE_SIGN "{\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"" SPACE "\"}"
#define FROM_SPACE_SIGN "{\"type\": \"Replace\", \"pattern\": {\"String\": \"" SPACE "\"}, \"content\": \" \"}"
#define FROM_BYTES "{\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}"

const char *usli_ggml_normalizer(const usli_tokenizer *tok) {
    if (tok->model != USLI_MODEL_SPM) return "null";
    if (!tok->space_prefix) return TO_SPACE_SIGN;
    return "{\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"Prepend\", \"prepend\": \"" SPACE
           "\"}, " TO_SPACE_SIGN "]}";
}

const char *usli_ggml_decoder(const usli_tokenizer *tok) {
    if (tok->model != USLI_MODEL_SPM)
        return "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": false}";
    if (!tok->space_prefix) return "{\"type\": \"Sequence\", \"decoders\": [" FROM_SPACE_SIGN ", " FROM_BYTES "]}";
    return "{\"type\": \"Sequence\", \"decoders\": [" FROM_SPACE_SIGN ", " FROM_BYTES
           ", {\"type\": \"Strip\", \"content\": \" \", \"start\": 1, \"stop\": 0}]}";
}
