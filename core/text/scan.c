/* The published pre-tokenisers' patterns, matched by hand. A pattern that this knows is matched as PCRE2 would match
 * it, without a call for every piece; every other one goes to PCRE2. Each alternative below stands beside what it does.
 */
#include <string.h>
#include <utf8proc.h>

#include "core/text/parts.h"

enum {
    LETTER = 1,
    NUMBER = 2,
    SPACE = 4,
    NEWLINE = 8, /* \r, \n; SPACE too */
    MARK = 16,
    PUNCT = 32, /* \p{P} or \p{S} */
    WORD = LETTER | NUMBER,
    SOLID = LETTER | NUMBER | SPACE /* what [^\s\p{L}\p{N}] leaves out */
};

#define P PUNCT
#define L LETTER
#define N NUMBER
static const uint8_t ASCII[128] = {
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    SPACE,
    SPACE | NEWLINE,
    SPACE,
    SPACE,
    SPACE | NEWLINE,
    0,
    0, /* 00 */
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0, /* 10 */
    SPACE,
    P,
    P,
    P,
    P,
    P,
    P,
    P,
    P,
    P,
    P,
    P,
    P,
    P,
    P,
    P, /* 20 */
    N,
    N,
    N,
    N,
    N,
    N,
    N,
    N,
    N,
    N,
    P,
    P,
    P,
    P,
    P,
    P, /* 30 */
    P,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L, /* 40 */
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    P,
    P,
    P,
    P,
    P, /* 50 */
    P,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L, /* 60 */
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    L,
    P,
    P,
    P,
    P,
    0, /* 70 */
};
#undef P
#undef L
#undef N

static unsigned beyond_ascii(int32_t code) {
    static const uint8_t KINDS[] = {
        [UTF8PROC_CATEGORY_LU] = LETTER, [UTF8PROC_CATEGORY_LL] = LETTER, [UTF8PROC_CATEGORY_LT] = LETTER,
        [UTF8PROC_CATEGORY_LM] = LETTER, [UTF8PROC_CATEGORY_LO] = LETTER, [UTF8PROC_CATEGORY_MN] = MARK,
        [UTF8PROC_CATEGORY_MC] = MARK,   [UTF8PROC_CATEGORY_ME] = MARK,   [UTF8PROC_CATEGORY_ND] = NUMBER,
        [UTF8PROC_CATEGORY_NL] = NUMBER, [UTF8PROC_CATEGORY_NO] = NUMBER, [UTF8PROC_CATEGORY_PC] = PUNCT,
        [UTF8PROC_CATEGORY_PD] = PUNCT,  [UTF8PROC_CATEGORY_PS] = PUNCT,  [UTF8PROC_CATEGORY_PE] = PUNCT,
        [UTF8PROC_CATEGORY_PI] = PUNCT,  [UTF8PROC_CATEGORY_PF] = PUNCT,  [UTF8PROC_CATEGORY_PO] = PUNCT,
        [UTF8PROC_CATEGORY_SM] = PUNCT,  [UTF8PROC_CATEGORY_SC] = PUNCT,  [UTF8PROC_CATEGORY_SK] = PUNCT,
        [UTF8PROC_CATEGORY_SO] = PUNCT,  [UTF8PROC_CATEGORY_CO] = 0,
    };
    /* The ideographs and syllables that most such text consists of need no table. */
    if ((code >= 0x4E00 && code <= 0x9FFC) || (code >= 0xAC00 && code <= 0xD7A3)) return LETTER;
    if (usli_is_space(code)) return SPACE;
    return KINDS[utf8proc_category(code)];
}

/* What the character at `at` is, and where the next one begins; 0 at the end. */
static inline unsigned look(const char *text, size_t len, size_t at, size_t *next) {
    *next = at;
    if (at >= len) return 0;
    unsigned char c = (unsigned char)text[at];
    *next = at + 1;
    if (c < 0x80) return ASCII[c];
    *next = at + usli_utf8_step(text[at]);
    return beyond_ascii(usli_utf8_get(text + at));
}

/* The end of the run from `at` on of characters that are any of `want`. */
static inline size_t run_of(const char *text, size_t len, size_t at, unsigned want) {
    for (size_t next; at < len && (look(text, len, at, &next) & want); at = next) continue;
    return at;
}

/* ...that are none of `avoid`. */
static inline size_t run_without(const char *text, size_t len, size_t at, unsigned avoid) {
    for (size_t next; at < len && !(look(text, len, at, &next) & avoid); at = next) continue;
    return at;
}

static inline size_t newlines(const char *text, size_t len, size_t at) {
    while (at < len && (text[at] == '\r' || text[at] == '\n')) at++;
    return at;
}

/* ---- Parts of patterns: where the match that begins at `at` ends; `at` when there is none
 * ----------------------------------- */

typedef enum contraction_case {
    AS_WRITTEN, /* '(?:s|t|re|ve|m|ll|d) */
    EITHER,     /* '[sS] and so on */
    FOLDED      /* (?i:'s|...), by which the long s is an s too */
} contraction_case;

static size_t contraction(const char *text, size_t len, size_t at, contraction_case how) {
    if (text[at] != '\'' || len - at < 2) return at;
    unsigned char c = (unsigned char)text[at + 1], d = len - at > 2 ? (unsigned char)text[at + 2] : 0;
    if (how == FOLDED && c == 0xC5 && d == 0xBF) return at + 3;
    if (how != AS_WRITTEN && c < 0x80) c |= 0x20;
    if (how != AS_WRITTEN && d < 0x80) d |= 0x20;
    if (c == 's' || c == 't' || c == 'm' || c == 'd') return at + 2;
    bool two = ((c == 'r' || c == 'v') && d == 'e') || (c == 'l' && d == 'l');
    return two ? at + 3 : at;
}

/* \s*[\r\n]+|\s+(?!\S)|\s+, the first of them where lines count. Of a run of spaces the first takes all up to the last
 * newline; the second all of it at the end of the text, else all but the last one. */
static size_t spaces(const char *text, size_t len, size_t at, bool lines) {
    size_t end = at, last = at, after_line = 0;
    for (size_t next; end < len; end = next) {
        unsigned kind = look(text, len, end, &next);
        if (!(kind & SPACE)) break;
        last = end;
        if (kind & NEWLINE) after_line = next;
    }
    if (lines && after_line) return after_line;
    return end == len || last == at ? end : last;
}

/* (contractions)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
static inline size_t modern(const char *text, size_t len, size_t at, contraction_case how, int digits) {
    size_t next, after, end = contraction(text, len, at, how);
    if (end > at) return end;
    unsigned kind = look(text, len, at, &next);
    if (kind & LETTER) return run_of(text, len, next, LETTER);
    if (kind & NUMBER) {
        for (end = next; digits > 1 && (look(text, len, end, &after) & NUMBER); digits--) end = after;
        return end;
    }
    unsigned kind2 = look(text, len, next, &after);
    if (!(kind & NEWLINE) && (kind2 & LETTER)) return run_of(text, len, after, LETTER);
    if (!(kind & SPACE)) return newlines(text, len, run_without(text, len, next, SOLID));
    if (text[at] == ' ' && next < len && !(kind2 & SOLID))
        return newlines(text, len, run_without(text, len, after, SOLID));
    return spaces(text, len, at, true);
}

static size_t llama3(const char *text, size_t len, size_t at) {
    return modern(text, len, at, FOLDED, 3);
}
static size_t llama3_either(const char *text, size_t len, size_t at) {
    return modern(text, len, at, EITHER, 3);
}
static size_t qwen2(const char *text, size_t len, size_t at) {
    return modern(text, len, at, FOLDED, 1);
}
static size_t qwen2_either(const char *text, size_t len, size_t at) {
    return modern(text, len, at, EITHER, 1);
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t gpt2(const char *text, size_t len, size_t at) {
    size_t next, end = contraction(text, len, at, AS_WRITTEN);
    if (end > at) return end;
    unsigned kind = look(text, len, at, &next);
    if (kind & SPACE) {
        size_t after;
        if (text[at] != ' ' || next == len) return spaces(text, len, at, false);
        kind = look(text, len, next, &after);
        if (kind & SPACE) return spaces(text, len, at, false);
        next = after;
    }
    return kind & WORD ? run_of(text, len, next, kind & WORD) : run_without(text, len, next, SOLID);
}

/* \p{N}{1,3} */
static size_t three_digits(const char *text, size_t len, size_t at) {
    size_t end = at, next;
    for (int i = 0; i < 3 && (look(text, len, end, &next) & NUMBER); i++) end = next;
    return end;
}

size_t usli_scan_number(const char *text, size_t len, size_t at) {
    size_t next;
    return look(text, len, at, &next) & NUMBER ? next : at;
}

static bool is_cjk(const char *text, size_t len, size_t at) {
    if (len - at < 3 || (unsigned char)text[at] < 0xE3 || (unsigned char)text[at] > 0xE9) return false;
    int32_t c = usli_utf8_get(text + at);
    return (c >= 0x4E00 && c <= 0x9FA5) || (c >= 0x3040 && c <= 0x30FF);
}

/* Ideographs of the first block and kana: [...]+ */
static size_t cjk(const char *text, size_t len, size_t at) {
    while (at < len && is_cjk(text, len, at)) at += 3;
    return at;
}

static bool is_ascii_letter(char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
}

/* [ASCII punctuation][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
static size_t deepseek(const char *text, size_t len, size_t at) {
    size_t next, after;
    unsigned kind = look(text, len, at, &next);
    if ((unsigned char)text[at] < 0x80 && (kind & PUNCT) && next < len && is_ascii_letter(text[next])) {
        while (next < len && is_ascii_letter(text[next])) next++;
        return next;
    }
    if (kind & (LETTER | MARK)) return run_of(text, len, next, LETTER | MARK);
    unsigned kind2 = look(text, len, next, &after);
    if (!(kind & (NEWLINE | PUNCT)) && (kind2 & (LETTER | MARK))) return run_of(text, len, after, LETTER | MARK);
    if (kind & PUNCT) return newlines(text, len, run_of(text, len, next, PUNCT));
    if (text[at] == ' ' && (kind2 & PUNCT)) return newlines(text, len, run_of(text, len, after, PUNCT));
    return kind & SPACE ? spaces(text, len, at, true) : at;
}

/* ---- The list
 * ------------------------------------------------------------------------------------------------------------------ */

#define TAIL "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define HEAD "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define BOTH_CASES "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|"
#define ANY_CASE "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"

const usli_scanner usli_scanners[] = {
    { ANY_CASE HEAD "\\p{N}{1,3}" TAIL, llama3 },
    { BOTH_CASES HEAD "\\p{N}{1,3}" TAIL, llama3_either },
    { ANY_CASE HEAD "\\p{N}" TAIL, qwen2 },
    { BOTH_CASES HEAD "\\p{N}" TAIL, qwen2_either },
    { "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", gpt2 },
    { "\\p{N}{1,3}", three_digits },
    { "[\xE4\xB8\x80-\xE9\xBE\xA5\xE3\x81\x80-\xE3\x82\x9F\xE3\x82\xA0-\xE3\x83\xBF]+", cjk },
    { "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| "
      "?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
      deepseek },
    { NULL, NULL },
};

usli_scan_fn usli_scanner_find(const char *pattern, size_t len) {
    for (const usli_scanner *s = usli_scanners; s->pattern; s++)
        if (strlen(s->pattern) == len && memcmp(s->pattern, pattern, len) == 0) return s->scan;
    return NULL;
}
