/* The scanners of published patterns against PCRE2. */
#include "core/text/parts.h"
#include "tests/test.h"

typedef struct pair {
    usl_ctx *ctx;
    usli_matcher *hand, *regex;
    const char *pattern;
} pair;

/* Every match of the text, from its beginning to its end, is the same. */
static bool same(pair *p, const char *text, size_t len) {
    for (size_t a = 0, b = 0, a_end, b_end; a < len || b < len; a = a_end, b = b_end) {
        CHECK_OK(p->ctx, usli_matcher_next(p->hand, text, len, &a, &a_end));
        CHECK_OK(p->ctx, usli_matcher_next(p->regex, text, len, &b, &b_end));
        if (a != b || a_end != b_end) return false;
    }
    return true;
}

/* Each character alone, and between letters. A character that only the newer of the two Unicode tables has may differ.
 */
static void test_characters(pair *p) {
    int other = 0, assigned = 0;
    for (int32_t c = 1; c < 0x32000; c++) {
        if (c >= 0xD800 && c < 0xE000) continue;
        char text[8] = "a";
        usli_buf b = { text + 1, 0, sizeof text - 1 };
        CHECK_OK(p->ctx, usli_buf_code(p->ctx, &b, c));
        text[1 + b.len] = 'a';
        bool ok = same(p, text + 1, b.len) && same(p, text, b.len + 2);
        if (!ok && getenv("USL_SHOW")) printf("U+%04X\n", (unsigned)c);
        other += !ok;
        assigned += !ok && c < 0x3000;
    }
    /* A release of Unicode brings a few thousand characters, next to none of them among the first ones. */
    CHECK(other < 6000 && assigned < 40, "%s: %d characters differ, %d of the first blocks", p->pattern, other,
          assigned);
    if (other) printf("%s: %d characters that one library does not know\n", p->pattern, other);
}

static void test_random(pair *p) {
    static const char *const PARTS[] = { "a",
                                         "S",
                                         "s",
                                         "l",
                                         "L",
                                         "re",
                                         "vE",
                                         "'",
                                         "'",
                                         "'",
                                         "\xC5\xBF",
                                         "\xE2\x80\x99",
                                         "1",
                                         "2",
                                         "34",
                                         "\xD9\xA3",
                                         "\xC2\xBD",
                                         " ",
                                         " ",
                                         " ",
                                         "\t",
                                         "\n",
                                         "\n",
                                         "\r",
                                         "\r\n",
                                         "\xC2\xA0",
                                         "\xE3\x80\x80",
                                         "\xE2\x80\xA8",
                                         "\xC2\x85",
                                         "\x0B",
                                         "\x1F",
                                         ".",
                                         "!?",
                                         "$",
                                         "_",
                                         "\xE4\xBD\xA0",
                                         "\xE3\x81\x82",
                                         "\xE3\x83\xBC",
                                         "\xED\x95\x9C",
                                         "e\xCC\x81",
                                         "\xCC\x81",
                                         "\xF0\x9F\x98\x80",
                                         "\xE2\x82\xAC",
                                         "\xC3\x9F",
                                         "\xEF\xBB\xBF",
                                         "\x01",
                                         "\x7F",
                                         "\xF0\x90\x90\x80",
                                         "\xE0\xA4\xBF",
                                         "\xE2\x91\xA0",
                                         "M",
                                         "d",
                                         "t" };
    uint32_t state = 1;
    int bad = 0;
    for (int i = 0; i < 60000; i++) {
        char text[128];
        size_t len = 0;
        state = state * 1664525u + 1013904223u;
        for (uint32_t n = 1 + (state >> 24) % 16; n; n--) {
            state = state * 1664525u + 1013904223u;
            const char *part = PARTS[(state >> 8) % (sizeof PARTS / sizeof *PARTS)];
            memcpy(text + len, part, strlen(part));
            len += strlen(part);
        }
        if (!same(p, text, len) && !bad++) CHECK(false, "%s differs on \"%.*s\"", p->pattern, (int)len, text);
    }
    CHECK(!bad, "%s: %d texts differ", p->pattern, bad);
}

int main(void) {
    usl_ctx *ctx;
    if (usl_ctx_new(NULL, &ctx) != USL_OK) return 1;
    for (const usli_scanner *s = usli_scanners; s->pattern; s++) {
        usli_regex *hand, *regex;
        pair p = { .ctx = ctx, .pattern = s->pattern };
        CHECK_OK(ctx, usli_regex_new(ctx, s->pattern, strlen(s->pattern), true, &hand));
        CHECK_OK(ctx, usli_regex_new(ctx, s->pattern, strlen(s->pattern), false, &regex));
        CHECK(usli_regex_scan(hand) == s->scan && !usli_regex_scan(regex), "who matches");
        CHECK_OK(ctx, usli_matcher_new(ctx, hand, &p.hand));
        CHECK_OK(ctx, usli_matcher_new(ctx, regex, &p.regex));
        test_characters(&p);
        test_random(&p);
        usli_matcher_free(p.hand);
        usli_matcher_free(p.regex);
        usli_regex_free(hand);
        usli_regex_free(regex);
    }
    usl_ctx_free(ctx);
    return test_end("test_scan");
}
