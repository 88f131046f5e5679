/* What a tokenizer is made of. A text goes through added tokens, normalisers, pre-tokenisers, the model and the
 * template; ids come back through the decoders. Each list of steps is flat: a Sequence's members stand in it one after
 * the other. */
#ifndef USLI_TEXT_PARTS_H
#define USLI_TEXT_PARTS_H

#include "core/io/json.h"
#include "core/text/tokenizer.h"

/* ---- Bytes and pieces
 * ------------------------------------------------------------------------------------------------- */

typedef struct usli_buf {
    char *data;
    size_t len, cap;
} usli_buf;
usl_status usli_buf_add(usl_ctx *ctx, usli_buf *b, const char *data, size_t len);
usl_status usli_buf_code(usl_ctx *ctx, usli_buf *b, int32_t code); /* as UTF-8 */

typedef struct usli_span {
    size_t start, end;
    bool match; /* of a pattern; unused otherwise */
} usli_span;
typedef struct usli_spans {
    usli_span *items;
    size_t count, cap;
} usli_spans;
usl_status usli_spans_grow(usl_ctx *ctx, usli_spans *s);
static inline usl_status usli_spans_add(usl_ctx *ctx, usli_spans *s, size_t start, size_t end, bool match) {
    if (s->count == s->cap) USLI_TRY(usli_spans_grow(ctx, s));
    s->items[s->count++] = (usli_span){ start, end, match };
    return USL_OK;
}

/* A text cut into pieces, which need not lie one behind the other. */
typedef struct usli_pieces {
    usli_buf text;
    usli_spans spans;
} usli_pieces;

/* Two of everything a list of steps needs: steps read one and write the other. One for each call, never shared. */
typedef struct usli_work {
    usli_pieces now, next;
    usli_spans found;
    bool from_start; /* now's first piece begins where the caller's text begins */
} usli_work;
void usli_work_free(usl_ctx *ctx, usli_work *w);

/* ---- Characters -----------------------------------------------------------------------------------------------------
 */

/* What SentencePiece writes for a space. */
#define USLI_SPACE_SIGN "\xE2\x96\x81"

/* Length of the sequence that starts with this byte of valid UTF-8. */
static inline size_t usli_utf8_step(char lead) {
    unsigned char c = (unsigned char)lead;
    return c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
}
int32_t usli_utf8_get(const char *p);
/* Bytes of valid UTF-8 at the start; len when it is all valid. *bad_len: how many bytes one U+FFFD stands for there. */
size_t usli_utf8_valid(const char *text, size_t len, size_t *bad_len);
bool usli_is_space(int32_t code);
bool usli_is_numeric(int32_t code);
bool usli_is_punctuation(int32_t code);
bool usli_is_word(int32_t code);
/* Appends text in a normal form: options are utf8proc's. */
usl_status usli_unicode_normalize(usl_ctx *ctx, const char *text, size_t len, int options, usli_buf *out);
/* The character that byte-level BPE writes for a byte, and back (-1 for a character that stands for none). */
int32_t usli_byte_char(unsigned char byte);
int usli_char_byte(int32_t code);

/* ---- Regular expressions
 * ---------------------------------------------------------------------------------------------- */

/* Where the match of a pattern that begins at `at` (before len) ends; `at` when there is none. Without state. */
typedef size_t (*usli_scan_fn)(const char *text, size_t len, size_t at);
typedef struct usli_scanner {
    const char *pattern;
    usli_scan_fn scan;
} usli_scanner;
extern const usli_scanner usli_scanners[];                        /* the last one is empty */
usli_scan_fn usli_scanner_find(const char *pattern, size_t len);  /* NULL: no scanner knows this pattern */
size_t usli_scan_number(const char *text, size_t len, size_t at); /* \p{N} */

typedef struct usli_regex usli_regex;
/* by_hand: a scanner matches where one knows the pattern; tests ask for PCRE2 itself. */
usl_status usli_regex_new(usl_ctx *ctx, const char *pattern, size_t len, bool by_hand, usli_regex **out);
void usli_regex_free(usli_regex *regex);
usli_scan_fn usli_regex_scan(const usli_regex *regex); /* NULL: PCRE2 matches it */
/* What one caller needs to match; ctx pays for the memory. */
typedef struct usli_matcher usli_matcher;
usl_status usli_matcher_new(usl_ctx *ctx, const usli_regex *regex, usli_matcher **out);
void usli_matcher_free(usli_matcher *m);
/* The next match that is not empty, from *start on; *start = len when there is none. text is valid UTF-8. */
usl_status usli_matcher_next(usli_matcher *m, const char *text, size_t len, size_t *start, size_t *end);

/* ---- Steps
 * ------------------------------------------------------------------------------------------------------------ */

typedef enum usli_step_kind {
    USLI_NORM_PREPEND,
    USLI_NORM_REPLACE,
    USLI_NORM_UNICODE,
    USLI_NORM_LOWERCASE,
    USLI_NORM_STRIP,
    USLI_NORM_CHARSMAP, /* text: the map, left: bytes of its trie */
    USLI_PRE_SPLIT,
    USLI_PRE_BYTE_LEVEL,
    USLI_PRE_METASPACE,
    USLI_PRE_DIGITS,
    USLI_PRE_SPACES,
    USLI_PRE_PUNCTUATION,
    USLI_DEC_REPLACE,
    USLI_DEC_BYTE_FALLBACK,
    USLI_DEC_FUSE,
    USLI_DEC_STRIP,
    USLI_DEC_BYTE_LEVEL,
    USLI_DEC_METASPACE
} usli_step_kind;

typedef enum usli_behavior {
    USLI_REMOVED,
    USLI_ISOLATED,
    USLI_CONTIGUOUS,
    USLI_MERGED_PREVIOUS,
    USLI_MERGED_NEXT
} usli_behavior;

typedef enum usli_prepend { USLI_PREPEND_NEVER, USLI_PREPEND_FIRST, USLI_PREPEND_ALWAYS } usli_prepend;

typedef struct usli_step {
    usli_step_kind kind;
    usli_regex *regex; /* the pattern; NULL when it is plain text */
    char *text;        /* what is looked for, put in front, or stripped; of a regex, its source */
    size_t text_len;
    char *with; /* the replacement */
    size_t with_len;
    usli_behavior behavior;
    usli_prepend prepend;
    bool invert;
    bool add_prefix_space; /* BYTE_LEVEL */
    bool split;            /* METASPACE; DIGITS: one by one */
    int unicode;           /* NORM_UNICODE: utf8proc's options */
    int64_t left, right;   /* STRIP: how many, or whether */
} usli_step;

typedef struct usli_steps {
    usli_step *items;
    size_t count, cap;
} usli_steps;
void usli_steps_free(usl_ctx *ctx, usli_steps *s);

/* Appends what one component of tokenizer.json says; null adds nothing. An unknown type is an error that names it. */
usl_status usli_read_normalizer(usl_ctx *ctx, const json_t *json, usli_steps *out);
usl_status usli_read_pre_tokenizer(usl_ctx *ctx, const json_t *json, usli_steps *out);
usl_status usli_read_decoder(usl_ctx *ctx, const json_t *json, usli_steps *out);

/* Marks the matches of a step's pattern in text (and what lies between them), moved by base, in out. */
usl_status usli_step_find(usl_ctx *ctx, const usli_step *step, usli_matcher *m, const char *text, size_t len,
                          size_t base, usli_spans *out);

/* charsmap.c: what Precompiled holds, in base64; appends a text with its characters replaced. */
usl_status usli_charsmap_read(usl_ctx *ctx, const char *base64, size_t len, usli_step *step);
usl_status usli_charsmap_apply(usl_ctx *ctx, const usli_step *step, const char *text, size_t len, usli_buf *out);
/* w->now.text is one text, normalised in place; its spans do not matter. */
usl_status usli_normalize(usl_ctx *ctx, const usli_steps *steps, usli_work *w);
/* Cuts w->now's pieces further. */
usl_status usli_pre_tokenize(usl_ctx *ctx, const usli_steps *steps, usli_work *w);
/* w->now's pieces are the spellings of tokens; afterwards they are parts of the text. */
usl_status usli_decode(usl_ctx *ctx, const usli_steps *steps, usli_work *w);

/* ---- Vocabulary
 * ------------------------------------------------------------------------------------------------------- */

typedef struct usli_entry {
    size_t at, len; /* in the blob; a 0 follows */
    float score;
    uint8_t kind; /* usli_token_kind */
    bool used, special;
} usli_entry;

typedef struct usli_vocab {
    usli_buf blob;
    usli_entry *entries; /* by id */
    size_t count, cap;
    uint32_t *slots; /* open addressing, pairs: id and one (0: free), the hash's upper half */
    size_t slot_count, used;
} usli_vocab;
uint64_t usli_hash_bytes(const char *text, size_t len);
void usli_vocab_free(usl_ctx *ctx, usli_vocab *v);
/* An id or a spelling that is there already is an error, unless last_wins: then the spelling finds the newer id. */
usl_status usli_vocab_add(usl_ctx *ctx, usli_vocab *v, const char *text, size_t len, int64_t id, bool last_wins);
/* Room for so many, found at once. */
usl_status usli_vocab_reserve(usl_ctx *ctx, usli_vocab *v, size_t count);
/* This one will be added soon: its place is brought near. */
void usli_vocab_expect(const usli_vocab *v, const char *text, size_t len);
int32_t usli_vocab_find(const usli_vocab *v, const char *text, size_t len); /* -1: none */
/* Another spelling, which no token has, for a token. What points into the blob must be renewed, also after a failure.
 */
usl_status usli_vocab_rename(usl_ctx *ctx, usli_vocab *v, int32_t id, const char *text, size_t len);
static inline const char *usli_vocab_text(const usli_vocab *v, int32_t id) {
    return v->blob.data + v->entries[id].at;
}

typedef struct usli_merges {
    int32_t *pairs; /* left, right, result; by rank */
    size_t count, cap;
    struct usli_merge *slots; /* open addressing */
    size_t slot_count;
    uint32_t *maybe; /* a bit for each hash that a pair has: most neighbours are none, and this is small */
    unsigned slot_shift, maybe_shift;
} usli_merges;
typedef struct usli_merge {
    int32_t left, right, result;
    uint32_t rank1; /* rank and one; 0: free */
} usli_merge;
void usli_merges_free(usl_ctx *ctx, usli_merges *m);
usl_status usli_merges_add(usl_ctx *ctx, usli_merges *m, int32_t left, int32_t right, int32_t result);
/* Call once, after the last. Of equal pairs the last counts. */
usl_status usli_merges_index(usl_ctx *ctx, usli_merges *m);
static inline uint64_t usli_merge_hash(int32_t left, int32_t right) {
    uint64_t hash = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u;
    return (hash ^ hash >> 32) * 0xd6e8feb86659fd93u;
}
/* NULL: none. */
static inline const usli_merge *usli_merges_find(const usli_merges *m, int32_t left, int32_t right) {
    if (!m->slots) return NULL;
    uint64_t hash = usli_merge_hash(left, right);
    size_t bit = hash >> m->maybe_shift, mask = m->slot_count - 1;
    if (!(m->maybe[bit / 32] >> (bit & 31) & 1)) return NULL;
    for (size_t i = hash >> m->slot_shift;; i = (i + 1) & mask) {
        const usli_merge *s = &m->slots[i];
        if (!s->rank1 || (s->left == left && s->right == right)) return s->rank1 ? s : NULL;
    }
}

/* ---- Added tokens
 * ------------------------------------------------------------------------------------------------------ */

typedef struct usli_added {
    const char *text; /* in the vocabulary, or own when it is normalised */
    size_t len;
    int32_t id;
    bool special, normalized, lstrip, rstrip, single_word;
    bool owned;
} usli_added;

typedef struct usli_added_set {
    usli_added *items; /* sorted by their bytes after usli_added_index */
    size_t count, cap;
    size_t first[257]; /* items whose first byte is c: first[c] .. first[c + 1] */
} usli_added_set;
void usli_added_free(usl_ctx *ctx, usli_added_set *set);
usl_status usli_added_add(usl_ctx *ctx, usli_added_set *set, const usli_added *token);
void usli_added_index(usli_added_set *set);

typedef struct usli_segment {
    size_t start, end;
    int32_t id; /* -1: text between tokens */
} usli_segment;
typedef struct usli_segments {
    usli_segment *items;
    size_t count, cap;
} usli_segments;
/* Cuts text at added tokens: leftmost, then longest. out is emptied first. */
usl_status usli_added_split(usl_ctx *ctx, const usli_added_set *set, const char *text, size_t len, usli_segments *out);

/* ---- Models
 * ------------------------------------------------------------------------------------------------------------ */

typedef enum usli_model_kind {
    USLI_MODEL_BPE,     /* pairs of ids, ranked by the list of merges */
    USLI_MODEL_UNIGRAM, /* the likeliest way to write a piece */
    USLI_MODEL_SPM      /* pairs whose joined text is a token, ranked by its score */
} usli_model_kind;

typedef struct usli_ids {
    int32_t *items;
    size_t count, cap;
} usli_ids;
usl_status usli_ids_grow(usl_ctx *ctx, usli_ids *ids);
static inline usl_status usli_ids_add(usl_ctx *ctx, usli_ids *ids, int32_t id) {
    if (ids->count == ids->cap) USLI_TRY(usli_ids_grow(ctx, ids));
    ids->items[ids->count++] = id;
    return USL_OK;
}

typedef struct usli_symbol {
    uint32_t start, len; /* len 0: merged away */
    int32_t prev, next, id;
} usli_symbol;
typedef struct usli_bigram {
    uint32_t rank, left, len;
    int32_t id;
} usli_bigram;
/* A short word that was encoded before: one line of the processor's cache. */
typedef struct usli_word {
    int32_t ids[5];
    uint8_t count, len; /* len 0: free */
    char text[42];
} usli_word;
/* The best way to write a text up to here. */
typedef struct usli_unigram_end {
    double score;
    size_t start; /* of its last token; SIZE_MAX: there is none yet */
    int32_t id;   /* -1: an unknown character */
    size_t next;  /* on the way that was chosen, where the token behind this place ends */
} usli_unigram_end;
/* One for each call. */
typedef struct usli_bpe_work {
    usli_unigram_end *ends;
    size_t ends_cap;
    usli_word *words; /* each at the place its hash gives; a newer one takes it over */
    size_t word_count;
    usli_symbol *symbols;
    usli_bigram *heap;
    size_t symbol_cap, heap_cap, heap_count, symbol_count;
    usli_buf affixed, spelled;
} usli_bpe_work;
/* len: of the whole text, so that short ones pay for little. */
usl_status usli_bpe_work_new(usl_ctx *ctx, usli_bpe_work *w, size_t len);
void usli_bpe_work_free(usl_ctx *ctx, usli_bpe_work *w);
typedef struct usli_unigram {
    double *scores; /* by id: logarithms of probability */
    size_t count, cap, longest;
    double least;
} usli_unigram;
void usli_unigram_free(usl_ctx *ctx, usli_unigram *u);
/* Of the next token, which is len bytes long. */
usl_status usli_unigram_add(usl_ctx *ctx, usli_unigram *u, size_t len, double score);
usl_status usli_unigram_encode(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text, size_t len,
                               usli_ids *out);
/* Sets words_part and joint; direct and its cuts. */
void usli_bpe_find_words(usli_tokenizer *tok);
void usli_bpe_find_cuts(usli_tokenizer *tok);
/* Appends the ids of one piece, which is not spelled yet when the tokenizer is direct. */
usl_status usli_bpe_encode(usl_ctx *ctx, const usli_tokenizer *tok, usli_bpe_work *w, const char *text, size_t len,
                           usli_ids *out);

/* ---- The whole
 * --------------------------------------------------------------------------------------------------------- */

/* Spellings as JSON writes them, with their quotes. */
typedef struct usli_renamed {
    char *from, *to;
} usli_renamed;

typedef struct usli_named_template {
    char *name, *text;
} usli_named_template;

struct usl_tokenizer {
    usl_ctx *ctx;
    atomic_int refs;
    usli_vocab vocab;
    usli_merges merges;
    usli_unigram unigram;
    uint32_t *score_rank; /* SPM: by id */
    usli_model_kind model;
    bool byte_fallback, ignore_merges, fuse_unk;
    bool words_part; /* a piece may be cut before each run of USLI_SPACE_SIGN... */
    bool joint[256]; /* ...that does not come after this byte: no token can lie across the cut */
    /* Pre-tokenising that does nothing but cut where these match, one within the pieces of the other, and spell bytes:
     * then a text is encoded as it is read, and only words that were not met before are spelled. */
    bool direct;
    usli_scan_fn cuts[4];
    int cut_count;
    int32_t char_ids[0x800]; /* of the characters below, -1: none */
    bool keep_unknown;       /* a character without a token stays between its neighbours, as in llama.cpp */
    char *prefix, *suffix;   /* continuing_subword_prefix, end_of_word_suffix; NULL when empty */
    size_t prefix_len, suffix_len;
    int32_t model_unk; /* what a character without a token becomes; -1: nothing */
    int32_t byte_ids[256];
    usli_added_set raw, normalized; /* added tokens, looked for before and after normalising */
    usli_steps normalizer, pre_tokenizer, decoder;
    bool has_decoder;
    usli_ids template_before, template_after;
    int32_t special[USLI_SPECIALS];
    bool adds_bos, adds_eos;
    char *chat_template;            /* the default; NULL: none */
    usli_named_template *templates; /* all that have names ("default", "tool_use") */
    size_t template_count, template_cap;
    usli_renamed *renamed; /* tokens that the source spells otherwise, in the order of their renaming */
    size_t renamed_count, renamed_cap;
    usli_ids extra; /* added since it was read */
    usli_map *source;
    char *config; /* tokenizer_config.json's bytes; NULL when there was none */
    size_t config_len;
    bool template_file;              /* the chat template stood in a file of its own */
    const struct usli_ggml_pre *pre; /* of byte-level BPE from GGUF */
    bool space_prefix;               /* of a SentencePiece vocabulary from GGUF */
};

usl_status usli_tokenizer_new(usl_ctx *ctx, usli_tokenizer **out);
/* Once the vocabulary, the added tokens and the steps stand: kinds, byte ids, the tables of added tokens. */
usl_status usli_tokenizer_finish(usli_tokenizer *tok);
/* What depends on spellings: characters' ids; the tables of added tokens, whose text lies in the vocabulary's blob. */
usl_status usli_tokenizer_index_added(usli_tokenizer *tok);
/* Appends text with each `from` of the tokens renamed since it was read replaced. */
usl_status usli_renamed_text(usl_ctx *ctx, const usli_tokenizer *tok, const char *text, size_t len, usli_buf *out);
/* Appends tokenizer.json with the tokens added since it was read. */
usl_status usli_extended_text(usl_ctx *ctx, const usli_tokenizer *tok, const char *source, size_t len, usli_buf *out);
/* Appends a named chat template; takes copies. */
usl_status usli_tokenizer_add_template(usli_tokenizer *tok, const char *name, size_t name_len, const char *text,
                                       size_t len);
/* Registers an added token whose id is in the vocabulary. */
usl_status usli_tokenizer_add_token(usli_tokenizer *tok, const usli_added *flags);

/* ---- The cache (cache.c)
 * ----------------------------------------------------------------------------------------------- */

/* A value in the source: the vocabulary's, the merges'; NULL: there is none. */
typedef struct usli_cut {
    const char *from, *to;
} usli_cut;
/* Whether vocabulary and merges of tok->source, read from path before, were taken from the cache; rest gets the JSON
 * without them. */
bool usli_cache_load(usl_ctx *ctx, usli_tokenizer *tok, const char *path, usli_buf *rest);
/* Keeps them, where a cache can be written. */
void usli_cache_store(usl_ctx *ctx, const usli_tokenizer *tok, const char *path, const usli_cut cuts[2]);

/* A pre-tokeniser that llama.cpp has names for. parts: regular expressions that cut one after the other, and at last
 * USLI_BYTES, or USLI_WORDS where GPT-2's own pattern cuts too. */
#define USLI_BYTES "bytes"
#define USLI_WORDS "words"
typedef struct usli_ggml_pre {
    const char *names; /* tokenizer.ggml.pre, each between commas */
    const char *write; /* the one that we write */
    const char *parts[5];
    bool ignore_merges, add_bos;
} usli_ggml_pre;
const usli_ggml_pre *usli_ggml_pre_find(const char *name, size_t len);
/* Appends the pre-tokeniser as tokenizer.json has it. */
usl_status usli_ggml_pre_json(usl_ctx *ctx, const usli_ggml_pre *pre, usli_buf *out);
/* The other components of a vocabulary from GGUF, as tokenizer.json has them. */
const char *usli_ggml_normalizer(const usli_tokenizer *tok);
const char *usli_ggml_decoder(const usli_tokenizer *tok);

/* Appends text as a JSON string with its quotes. */
usl_status usli_buf_json(usl_ctx *ctx, usli_buf *b, const char *text, size_t len);
usl_status usli_buf_text(usl_ctx *ctx, usli_buf *b, const char *text);

#endif
