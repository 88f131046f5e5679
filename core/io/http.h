/* HTTP through libcurl, several requests at once on one thread. What fails on the way (a cut connection, 408, 429 with
 * Retry-After, 5xx) is tried again, more slowly each time; what the server says otherwise is the caller's to judge.
 * Without libcurl usli_http_new says so. */
#ifndef USLI_IO_HTTP_H
#define USLI_IO_HTTP_H

#include "core/base/ctx.h"

typedef struct usli_http usli_http;
/* *out is new. Nothing is contacted before usli_http_run. */
usl_status usli_http_new(usl_ctx *ctx, usli_http **out);
void usli_http_free(usli_http *http); /* NULL is fine */

enum { USLI_HTTP_NOTE = 256, USLI_HTTP_ATTEMPTS = 5, USLI_HTTP_PARALLEL = 4 };

/* What a request's turn comes to. */
typedef enum usli_http_turn { USLI_HTTP_GO, USLI_HTTP_LATER, USLI_HTTP_SKIP } usli_http_turn;

typedef struct usli_request {
    /* Given. Strings are borrowed. */
    const char *method; /* "GET", "HEAD", "POST", "PUT" */
    char *url;
    const char *headers[8]; /* "Name: value"; the first NULL ends them */
    const char *token;      /* NULL: none; never sent on to another host than url's */
    const void *body;       /* NULL: none; must stay */
    uint64_t body_size;
    bool follow; /* redirects, wherever they lead */
    void *ud;
    /* Before each attempt, may be NULL: sets offset, or puts the request off for a moment, or skips it. */
    usl_status (*turn)(void *ud, struct usli_request *r, usli_http_turn *turn);
    /* The bytes of a 200 or 206, in order, `at` their place; NULL: they go into text. at is 0 when the server does not
     * know ranges, whatever offset was. */
    usl_status (*receive)(void *ud, uint64_t at, const void *data, size_t size);
    /* After a 200 or 206 that came whole, may be NULL. */
    usl_status (*finish)(void *ud, struct usli_request *r);
    uint64_t offset; /* > 0: asks for what comes from there on */
    uint64_t limit;  /* > 0: asks for so many bytes of it; a server that knows no ranges sends more */
    /* Answered. */
    long status; /* 0: nothing came */
    char *text;  /* new, 0-terminated: usli_request_clear; NULL when there is none */
    size_t text_len;
    int64_t length; /* Content-Length; -1: unknown */
    int64_t linked_size;
    char etag[USLI_HTTP_NOTE], linked_etag[USLI_HTTP_NOTE], commit[USLI_HTTP_NOTE]; /* "" when absent */
    char code[USLI_HTTP_NOTE], message[USLI_HTTP_NOTE];                             /* X-Error-Code, X-Error-Message */
    char location[2048];
    int64_t retry_after;          /* seconds; -1: not said */
    char trouble[USLI_HTTP_NOTE]; /* of a connection that failed for good; then status is 0 */
    uint64_t moved;               /* bytes of bodies so far, in either direction */
    /* private */
    int state, attempts;
    double when;
    uint64_t at, sent;
    void *easy, *list;
    struct usli_http *http;
    usl_status st;
} usli_request;

void usli_request_clear(usl_ctx *ctx, usli_request *r); /* text and url; the rest is borrowed */

/* Until all have an answer. tick, may be NULL, is called ten times a second. Fails with the first failure of a callback
 * or of tick, and with USL_ERR_CANCELLED; what a server refuses is no failure here. stop: end at the first request
 * whose status is no success. */
usl_status usli_http_run(usli_http *http, usli_request *requests, size_t count, bool stop, usl_status (*tick)(void *ud),
                         void *ud);
/* True for 200 to 299. */
bool usli_http_good(const usli_request *r);

#endif
