/* Tokenizers: text to ids and back, exactly as Hugging Face's `tokenizers` does for a tokenizer.json and as llama.cpp
 * does for a GGUF file. Read-only once loaded: several threads may use one, each with its own context. */
#ifndef USLI_TEXT_TOKENIZER_H
#define USLI_TEXT_TOKENIZER_H

#include "core/io/gguf.h"

/* The public handle is the same struct. Counted; keeps the context it was loaded with alive. */
typedef struct usl_tokenizer usli_tokenizer;

/* ggml's own numbers. */
typedef enum usli_token_kind {
    USLI_TOKEN_NORMAL = 1,
    USLI_TOKEN_UNKNOWN,
    USLI_TOKEN_CONTROL, /* special: left out by skip_special */
    USLI_TOKEN_USER,    /* matched in the text before anything else, but not special */
    USLI_TOKEN_UNUSED,  /* no token has this id */
    USLI_TOKEN_BYTE
} usli_token_kind;

typedef struct usli_token {
    const char *text; /* 0-terminated; the spelling as stored ("\u2581the", "\u0120the", "<0x0A>") */
    size_t len;
    usli_token_kind kind;
    float score; /* as a SentencePiece vocabulary in GGUF wants it; made from the ranks of the merges otherwise */
} usli_token;

typedef enum usli_special { USLI_BOS, USLI_EOS, USLI_PAD, USLI_UNK, USLI_SPECIALS } usli_special;

enum { USLI_ENCODE_SPECIAL = 1 }; /* add what the post-processor adds (usually BOS) */

/* path: a tokenizer.json, or a folder that holds one; beside it tokenizer_config.json, special_tokens_map.json and
 * chat_template.jinja are read when they are there. *out is new: usli_tokenizer_release. */
usl_status usli_tokenizer_load(usl_ctx *ctx, const char *path, usli_tokenizer **out);
/* From the metadata tokenizer.*; the file may be closed afterwards. */
usl_status usli_tokenizer_from_gguf(usl_ctx *ctx, const usli_gguf *file, usli_tokenizer **out);
/* A folder, a tokenizer.json or a .gguf. */
usl_status usli_tokenizer_open(usl_ctx *ctx, const char *path, usli_tokenizer **out);
usli_tokenizer *usli_tokenizer_retain(usli_tokenizer *tok); /* NULL is fine */
void usli_tokenizer_release(usli_tokenizer *tok);           /* NULL is fine */

/* *ids is new (usli_free), never NULL. Spellings of added tokens become their ids. The text must be UTF-8; NUL is a
 * character like others. */
usl_status usli_tokenizer_encode(usl_ctx *ctx, const usli_tokenizer *tok, const char *text, size_t len, unsigned flags,
                                 int32_t **ids, size_t *count);
/* Many texts on the context's threads: text i's ids stand at offsets[i] .. offsets[i + 1] of ids. Both are new. */
usl_status usli_tokenizer_encode_batch(usl_ctx *ctx, const usli_tokenizer *tok, const char *const *texts,
                                       const size_t *lens, size_t count, unsigned flags, int32_t **ids,
                                       size_t **offsets);
/* *text is new (usli_free), 0-terminated, len without it; always UTF-8 (broken bytes become U+FFFD). An id that no
 * token has is an error. len may be NULL. */
usl_status usli_tokenizer_decode(usl_ctx *ctx, const usli_tokenizer *tok, const int32_t *ids, size_t count,
                                 bool skip_special, char **text, size_t *len);

/* Ids to text as they come. The pieces are whole characters and together the text that decode gives, behind the text of
 * the ids `before` (a prompt's; NULL with count 0 at the beginning of a text); only beside broken bytes may they
 * differ. *out is new: usli_text_stream_free; it keeps the tokenizer alive. */
typedef struct usl_text_stream usli_text_stream;
usl_status usli_text_stream_new(usl_ctx *ctx, usli_tokenizer *tok, const int32_t *before, size_t count,
                                bool skip_special, usli_text_stream **out);
void usli_text_stream_free(usli_text_stream *s); /* NULL is fine */
/* *piece is borrowed until the next call, not 0-terminated, often empty. After a failure the id counts as not pushed.
 */
usl_status usli_text_stream_push(usli_text_stream *s, int32_t id, const char **piece, size_t *len);
/* What was held back, when no id will follow. */
usl_status usli_text_stream_end(usli_text_stream *s, const char **piece, size_t *len);

/* The largest id and one; ids below it may be unused. */
int64_t usli_tokenizer_size(const usli_tokenizer *tok);
/* -1 when no token is spelled like this. */
int32_t usli_tokenizer_id(const usli_tokenizer *tok, const char *text, size_t len);
/* False when id is out of range; an unused id gives "" and USLI_TOKEN_UNUSED. Borrowed. */
bool usli_tokenizer_token(const usli_tokenizer *tok, int32_t id, usli_token *out);
/* -1 when there is none. */
int32_t usli_tokenizer_special(const usli_tokenizer *tok, usli_special which);
/* NULL when there is none. Borrowed. */
const char *usli_tokenizer_chat_template(const usli_tokenizer *tok);
/* One of several templates by its name ("tool_use"); NULL: there is none. Borrowed. */
const char *usli_tokenizer_template(const usli_tokenizer *tok, const char *name);
/* Another default template, and other tokens at the ends; what save writes follows. Not while others use the tokenizer.
 */
usl_status usli_tokenizer_set_chat_template(usl_ctx *ctx, usli_tokenizer *tok, const char *text);
usl_status usli_tokenizer_set_special(usl_ctx *ctx, usli_tokenizer *tok, usli_special which, int32_t id);
/* Added tokens: spellings that become their id wherever they stand in a text. Those that no token has get the ids
 * behind the last one; one that was added before is left alone. *added: how many were not. */
usl_status usli_tokenizer_add_tokens(usl_ctx *ctx, usli_tokenizer *tok, const char *const *texts, const size_t *lens,
                                     size_t count, bool special, size_t *added);
/* Another spelling for a token, which no other token has. */
usl_status usli_tokenizer_rename(usl_ctx *ctx, usli_tokenizer *tok, int32_t id, const char *text, size_t len);
/* What GGUF metadata says about the ends: add_bos_token of tokenizer_config.json, else what the post-processor does. */
bool usli_tokenizer_adds_bos(const usli_tokenizer *tok);
bool usli_tokenizer_adds_eos(const usli_tokenizer *tok);
bool usli_tokenizer_adds_space_prefix(const usli_tokenizer *tok);

/* For GGUF: tokenizer.ggml.model ("gpt2" for byte-level BPE, "llama" for SentencePiece) and tokenizer.ggml.pre
 * ("default" when the pre-tokeniser is none that llama.cpp has a name for known here). Static. */
const char *usli_tokenizer_ggml_model(const usli_tokenizer *tok);
const char *usli_tokenizer_ggml_pre(const usli_tokenizer *tok);
/* Merges in the order of their rank, as ids. None for a SentencePiece vocabulary from GGUF: its scores rank. */
size_t usli_tokenizer_merges(const usli_tokenizer *tok);
void usli_tokenizer_merge(const usli_tokenizer *tok, size_t rank, int32_t *left, int32_t *right);

/* The bytes of the tokenizer.json it was read from; NULL when it came from GGUF. Borrowed. */
const char *usli_tokenizer_source(const usli_tokenizer *tok, size_t *len);
/* Writes tokenizer.json and tokenizer_config.json into dir (made when missing): copies of the source where there is
 * one, else files made from the parts that Hugging Face's libraries load. */
usl_status usli_tokenizer_save(usl_ctx *ctx, const usli_tokenizer *tok, const char *dir);

#endif
