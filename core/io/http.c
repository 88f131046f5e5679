#include "core/io/http.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/base/file.h"

bool usli_http_good(const usli_request *r) {
    return r->status >= 200 && r->status < 300;
}

void usli_request_clear(usl_ctx *ctx, usli_request *r) {
    usli_free(ctx, r->text);
    usli_free(ctx, r->url);
    r->text = r->url = NULL;
}

#ifdef USL_HAVE_CURL

#include <curl/curl.h>

enum { WAITING, RUNNING, DONE };
enum {
    CONNECT_SECONDS = 20,
    STALL_SECONDS = 30,
    TEXT_MAX = 64 << 20,
    PATIENCE = 120 /* the longest Retry-After that is waited for */
};
static const double LATER = 0.1, FIRST_PAUSE = 0.2, LONGEST_PAUSE = 8;

struct usli_http {
    usl_ctx *ctx;
    CURLM *multi;
};

/* Since libcurl 7.84 this may be called by several threads at once, and each call is counted. */
usl_status usli_http_new(usl_ctx *ctx, usli_http **out) {
    *out = NULL;
    if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK)
        return usli_fail(ctx, USL_ERR_IO, "libcurl cannot be started; install it anew");
    usli_http *http = usli_calloc(ctx, 1, sizeof *http);
    if (http) http->multi = curl_multi_init();
    if (!http || !http->multi) {
        usli_free(ctx, http);
        curl_global_cleanup();
        return usli_nomem(ctx, sizeof *http);
    }
    http->ctx = ctx;
    *out = http;
    return USL_OK;
}

void usli_http_free(usli_http *http) {
    if (!http) return;
    curl_multi_cleanup(http->multi);
    usli_free(http->ctx, http);
    curl_global_cleanup();
}

/* ---- What comes ---- */

static void forget_answer(usli_request *r) {
    r->status = 0;
    r->text_len = 0;
    r->length = r->linked_size = r->retry_after = -1;
    r->etag[0] = r->linked_etag[0] = r->commit[0] = r->code[0] = r->message[0] = r->location[0] = r->trouble[0] = 0;
}

static void note(char *dst, size_t room, const char *value, size_t len) {
    if (len >= room) len = room - 1;
    memcpy(dst, value, len);
    dst[len] = 0;
}

/* Each redirect brings a head of its own: the last one's lines stand, but what the first said of the file stays. */
static size_t on_header(char *line, size_t size, size_t n, void *ud) {
    usli_request *r = ud;
    size_t len = size * n;
    const struct {
        const char *name;
        char *dst;
        size_t room;
    } notes[] = {
        { "etag", r->etag, sizeof r->etag },
        { "x-linked-etag", r->linked_etag, sizeof r->linked_etag },
        { "x-repo-commit", r->commit, sizeof r->commit },
        { "x-error-code", r->code, sizeof r->code },
        { "x-error-message", r->message, sizeof r->message },
        { "location", r->location, sizeof r->location },
    };
    const char *colon = memchr(line, ':', len);
    if (!colon) {
        if (len > 5 && strncmp(line, "HTTP/", 5) == 0) r->length = r->retry_after = -1;
        return len;
    }
    size_t name = (size_t)(colon - line);
    const char *value = colon + 1, *end = line + len;
    while (value < end && (*value == ' ' || *value == '\t')) value++;
    while (end > value && (end[-1] == '\r' || end[-1] == '\n' || end[-1] == ' ')) end--;
    for (size_t i = 0; i < sizeof notes / sizeof *notes; i++)
        if (strlen(notes[i].name) == name && strncasecmp(notes[i].name, line, name) == 0)
            note(notes[i].dst, notes[i].room, value, (size_t)(end - value));
    char number[32];
    note(number, sizeof number, value, (size_t)(end - value));
    if (name == 14 && strncasecmp("content-length", line, name) == 0) r->length = strtoll(number, NULL, 10);
    if (name == 13 && strncasecmp("x-linked-size", line, name) == 0) r->linked_size = strtoll(number, NULL, 10);
    if (name == 11 && strncasecmp("retry-after", line, name) == 0 && *number >= '0' && *number <= '9')
        r->retry_after = strtoll(number, NULL, 10);
    return len;
}

static usl_status keep_text(usl_ctx *ctx, usli_request *r, const char *data, size_t len) {
    if (r->text_len + len > TEXT_MAX)
        return usli_fail(ctx, USL_ERR_FORMAT, "%s: the answer is longer than an answer may be", r->url);
    char *text = usli_realloc(ctx, r->text, r->text_len + len + 1);
    if (!text) return usli_nomem(ctx, r->text_len + len + 1);
    memcpy(text + r->text_len, data, len);
    r->text = text;
    r->text_len += len;
    text[r->text_len] = 0;
    return USL_OK;
}

static size_t on_body(char *data, size_t size, size_t n, void *ud) {
    usli_request *r = ud;
    usl_ctx *ctx = r->http->ctx;
    size_t len = size * n;
    long status = 0;
    curl_easy_getinfo(r->easy, CURLINFO_RESPONSE_CODE, &status);
    if (r->receive && (status == 200 || status == 206)) {
        if (r->at == UINT64_MAX) r->at = status == 206 ? r->offset : 0;
        if (len) r->st = r->receive(r->ud, r->at, data, len);
        r->at += len;
        r->moved += len;
    } else {
        r->st = keep_text(ctx, r, data, len);
    }
    return r->st == USL_OK ? len : len ? 0 : 1;
}

static int on_transfer(void *ud, curl_off_t down_total, curl_off_t down, curl_off_t up_total, curl_off_t up) {
    usli_request *r = ud;
    (void)down_total, (void)down, (void)up_total;
    if (r->body && (uint64_t)up > r->sent) {
        r->moved += (uint64_t)up - r->sent;
        r->sent = (uint64_t)up;
    }
    return 0;
}

/* ---- One attempt ---- */

static void end_attempt(usli_http *http, usli_request *r) {
    if (r->easy) {
        curl_multi_remove_handle(http->multi, r->easy);
        curl_easy_cleanup(r->easy);
    }
    curl_slist_free_all(r->list);
    r->easy = r->list = NULL;
}

static bool add_header(usli_request *r, const char *line) {
    struct curl_slist *list = curl_slist_append(r->list, line);
    if (list) r->list = list;
    return list != NULL;
}

/* A custom Authorization line is dropped by libcurl where a redirect leads to another host, port or scheme. */
static bool set_headers(usli_request *r) {
    for (size_t i = 0; i < sizeof r->headers / sizeof *r->headers && r->headers[i]; i++)
        if (!add_header(r, r->headers[i])) return false;
    if (!add_header(r, "Expect:")) return false;
    if (!r->token) return true;
    char line[1024];
    snprintf(line, sizeof line, "Authorization: Bearer %s", r->token);
    return add_header(r, line);
}

static usl_status begin_attempt(usli_http *http, usli_request *r) {
    CURL *e = r->easy = curl_easy_init();
    if (!e || !set_headers(r)) return usli_nomem(http->ctx, 0);
    forget_answer(r);
    r->at = UINT64_MAX;
    r->moved -= r->sent; /* a body is sent from its start again */
    r->sent = 0;
    bool secure = strncmp(r->url, "https:", 6) == 0;
    CURLcode rc = curl_easy_setopt(e, CURLOPT_URL, r->url);
#if LIBCURL_VERSION_NUM >= 0x075500
    curl_easy_setopt(e, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(e, CURLOPT_REDIR_PROTOCOLS_STR, secure ? "https" : "http,https");
#else
    curl_easy_setopt(e, CURLOPT_PROTOCOLS, (long)(CURLPROTO_HTTP | CURLPROTO_HTTPS));
    curl_easy_setopt(e, CURLOPT_REDIR_PROTOCOLS, (long)(secure ? CURLPROTO_HTTPS : CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
    curl_easy_setopt(e, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(e, CURLOPT_USERAGENT, "unsloth-lua/" USL_VERSION);
    curl_easy_setopt(e, CURLOPT_CONNECTTIMEOUT, (long)CONNECT_SECONDS);
    curl_easy_setopt(e, CURLOPT_LOW_SPEED_LIMIT, 1L);
    curl_easy_setopt(e, CURLOPT_LOW_SPEED_TIME, (long)STALL_SECONDS);
    curl_easy_setopt(e, CURLOPT_FOLLOWLOCATION, r->follow ? 1L : 0L);
    curl_easy_setopt(e, CURLOPT_MAXREDIRS, 10L);
    curl_easy_setopt(e, CURLOPT_HTTPHEADER, r->list);
    curl_easy_setopt(e, CURLOPT_HEADERFUNCTION, on_header);
    curl_easy_setopt(e, CURLOPT_HEADERDATA, r);
    curl_easy_setopt(e, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(e, CURLOPT_WRITEDATA, r);
    curl_easy_setopt(e, CURLOPT_XFERINFOFUNCTION, on_transfer);
    curl_easy_setopt(e, CURLOPT_XFERINFODATA, r);
    curl_easy_setopt(e, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(e, CURLOPT_PRIVATE, r);
    if (strcmp(r->method, "HEAD") == 0) {
        curl_easy_setopt(e, CURLOPT_NOBODY, 1L);
    } else if (strcmp(r->method, "GET") != 0) {
        /* Whole in memory, or in a mapping: a POST's fields go as they lie. */
        curl_easy_setopt(e, CURLOPT_POST, 1L);
        curl_easy_setopt(e, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)r->body_size);
        curl_easy_setopt(e, CURLOPT_POSTFIELDS, r->body ? r->body : "");
        curl_easy_setopt(e, CURLOPT_CUSTOMREQUEST, r->method);
    }
    char range[48]; /* and not libcurl's own resuming, which takes a server's whole file for a failure */
    int n = snprintf(range, sizeof range, "%llu-", (unsigned long long)r->offset);
    if (r->limit) snprintf(range + n, sizeof range - (size_t)n, "%llu", (unsigned long long)(r->offset + r->limit - 1));
    if (r->offset || r->limit) curl_easy_setopt(e, CURLOPT_RANGE, range);
    if (rc != CURLE_OK || curl_multi_add_handle(http->multi, e) != CURLM_OK) return usli_nomem(http->ctx, 0);
    r->state = RUNNING;
    return USL_OK;
}

/* ---- After an attempt ---- */

static bool is_passing(CURLcode rc) {
    switch (rc) {
    case CURLE_COULDNT_CONNECT:
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_PARTIAL_FILE:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_GOT_NOTHING:
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_HTTP2:
    case CURLE_HTTP2_STREAM: return true;
    default: return false;
    }
}

/* A machine that has no network learns it soon. */
static int most_attempts(CURLcode rc) {
    return rc == CURLE_COULDNT_RESOLVE_HOST || rc == CURLE_COULDNT_CONNECT ? 2 : USLI_HTTP_ATTEMPTS;
}

static bool is_passing_status(long status) {
    return status == 408 || status == 429 || status == 500 || status == 502 || status == 503 || status == 504;
}

static double pause_after(const usli_request *r) {
    if (r->retry_after >= 0) return (double)r->retry_after;
    double pause = FIRST_PAUSE;
    for (int i = 1; i < r->attempts && pause < LONGEST_PAUSE; i++) pause *= 2;
    return pause < LONGEST_PAUSE ? pause : LONGEST_PAUSE;
}

static usl_status end_of(usli_http *http, usli_request *r, CURLcode rc) {
    usl_ctx *ctx = http->ctx;
    bool came = r->at != UINT64_MAX && r->at > r->offset;
    curl_easy_getinfo(r->easy, CURLINFO_RESPONSE_CODE, &r->status);
    if (rc != CURLE_OK) snprintf(r->trouble, sizeof r->trouble, "%s", curl_easy_strerror(rc));
    end_attempt(http, r);
    if (r->st != USL_OK) return r->st;
    r->state = DONE;
    if (came) r->attempts = 0; /* it goes on, if in pieces */
    r->attempts++;
    bool again = rc != CURLE_OK ? is_passing(rc) && r->attempts < most_attempts(rc)
                                : is_passing_status(r->status) && r->attempts < USLI_HTTP_ATTEMPTS;
    if (again && r->retry_after <= PATIENCE) {
        double pause = pause_after(r);
        usli_log(ctx, USL_LOG_DEBUG, "%s: trying again in %.1f s", r->url, pause);
        r->state = WAITING;
        r->when = usli_now() + pause;
        return USL_OK;
    }
    if (rc != CURLE_OK) r->status = 0;
    return rc == CURLE_OK && r->finish && (r->status == 200 || r->status == 206) ? r->finish(r->ud, r) : USL_OK;
}

static usl_status try_turn(usli_http *http, usli_request *r) {
    usli_http_turn turn = USLI_HTTP_GO;
    if (r->turn) USLI_TRY(r->turn(r->ud, r, &turn));
    if (turn == USLI_HTTP_SKIP) {
        forget_answer(r);
        r->status = 200;
        r->state = DONE;
    } else if (turn == USLI_HTTP_LATER) {
        r->when = usli_now() + LATER;
    } else {
        return begin_attempt(http, r);
    }
    return USL_OK;
}

/* Begins what may begin. *soon: seconds until the next is due. *left: how many have no answer. */
static usl_status begin_due(usli_http *http, usli_request *requests, size_t count, double *soon, size_t *left) {
    size_t running = 0;
    double now = usli_now();
    *soon = LATER;
    *left = 0;
    for (size_t i = 0; i < count; i++) running += requests[i].state == RUNNING;
    for (size_t i = 0; i < count; i++) {
        usli_request *r = &requests[i];
        if (r->state == WAITING && r->when <= now && running < USLI_HTTP_PARALLEL) {
            USLI_TRY(try_turn(http, r));
            running += r->state == RUNNING;
        }
        if (r->state == WAITING && r->when > now && r->when - now < *soon) *soon = r->when - now;
        *left += r->state != DONE;
    }
    return USL_OK;
}

static usl_status run(usli_http *http, usli_request *requests, size_t count, bool stop, usl_status (*tick)(void *ud),
                      void *ud) {
    double ticked = 0, soon;
    size_t left;
    for (;;) {
        USLI_TRY(begin_due(http, requests, count, &soon, &left));
        if (usli_now() - ticked >= LATER || !left) {
            USLI_TRY(tick ? tick(ud) : usli_checkpoint(http->ctx));
            ticked = usli_now();
        }
        if (!left) return USL_OK;
        int alive, queued;
        if (curl_multi_perform(http->multi, &alive) != CURLM_OK)
            return usli_fail(http->ctx, USL_ERR_IO, "libcurl cannot go on; try again");
        bool ended = false;
        for (CURLMsg *m; (m = curl_multi_info_read(http->multi, &queued));) {
            usli_request *r = NULL;
            if (m->msg != CURLMSG_DONE) continue;
            curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&r);
            USLI_TRY(end_of(http, r, m->data.result));
            ended = true;
            if (stop && r->state == DONE && !usli_http_good(r)) return USL_OK;
        }
        if (!ended) curl_multi_poll(http->multi, NULL, 0, (int)(soon * 1000) + 1, NULL);
    }
}

usl_status usli_http_run(usli_http *http, usli_request *requests, size_t count, bool stop, usl_status (*tick)(void *ud),
                         void *ud) {
    for (size_t i = 0; i < count; i++) {
        usli_request *r = &requests[i];
        r->http = http;
        r->state = WAITING;
        r->attempts = 0;
        r->when = 0;
        r->moved = r->sent = 0;
        r->easy = r->list = NULL;
        r->st = USL_OK;
        forget_answer(r);
    }
    usl_status st = run(http, requests, count, stop, tick, ud);
    for (size_t i = 0; i < count; i++) end_attempt(http, &requests[i]);
    return st;
}

#else

usl_status usli_http_new(usl_ctx *ctx, usli_http **out) {
    *out = NULL;
    return usli_fail(
        ctx, USL_ERR_UNSUPPORTED,
        "this build has no libcurl, so nothing is downloaded or uploaded; install libcurl4-openssl-dev and "
        "build again, or fetch the files otherwise and give their folder");
}

void usli_http_free(usli_http *http) {
    (void)http;
}

usl_status usli_http_run(usli_http *http, usli_request *requests, size_t count, bool stop, usl_status (*tick)(void *ud),
                         void *ud) {
    (void)http, (void)requests, (void)count, (void)stop, (void)tick, (void)ud;
    return USL_ERR_UNSUPPORTED; /* nobody has a session to call it with */
}

#endif
