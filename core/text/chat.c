/* What apply_chat_template does around the template: which one, its variables, the final message that goes on. */
#include "core/text/chat.h"

#include <stdlib.h>
#include <string.h>

#include "core/text/parts.h"

#define NAME "chat template"
/* Stands behind the message that is to go on, so that its end is found in the text. */
#define MARK "CONTINUE_FINAL_MESSAGE_TAG "

static bool isspace_c(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* ---- Which template ---- */

static usl_status no_default(usl_ctx *ctx, const usli_tokenizer *tok) {
    char names[500] = "";
    if (!tok->template_count)
        return usli_fail(
            ctx, USL_ERR_INVALID,
            "the tokenizer has no chat template; give one as chat_template, or by unsloth.get_chat_template");
    for (size_t i = 0, n = 0; i < tok->template_count && n < sizeof names - 1; i++)
        n += (size_t)snprintf(names + n, sizeof names - n, "%s%.60s", i ? ", " : "", tok->templates[i].name);
    return usli_fail(ctx, USL_ERR_INVALID,
                     "the tokenizer has several chat templates and none is the default; choose one of %s", names);
}

static usl_status choose(usl_ctx *ctx, const usli_tokenizer *tok, const usl_chat_opts *o, const char **out) {
    const char *named = o->chat_template ? usli_tokenizer_template(tok, o->chat_template) : NULL;
    if (!named && !o->chat_template && o->tools) named = usli_tokenizer_template(tok, "tool_use");
    *out = named ? named : o->chat_template ? o->chat_template : tok->chat_template;
    return *out ? USL_OK : no_default(ctx, tok);
}

/* ---- Messages ---- */

/* Reasoning stands under several names; templates read the first, or `thinking`. New, NULL without memory. */
static json_t *with_reasoning(json_t *message, const json_t *reasoning) {
    json_t *out = json_object(), *value = (json_t *)(uintptr_t)reasoning;
    bool bad = !out || (!json_object_get(message, "thinking") && json_object_set(out, "thinking", value) != 0);
    if (bad || json_object_update(out, message) != 0 || json_object_set(out, "reasoning_content", value) != 0) {
        json_decref(out);
        return NULL;
    }
    return out;
}

static usl_status alias_reasoning(usl_ctx *ctx, json_t *messages, bool *changed) {
    static const char *const FIELDS[] = { "reasoning_content", "thinking", "reasoning" };
    for (size_t i = 0; i < json_array_size(messages); i++) {
        json_t *message = json_array_get(messages, i);
        const json_t *reasoning = NULL;
        if (!json_is_object(message))
            return usli_fail(ctx, USL_ERR_INVALID, "message %zu is no object with role and content", i + 1);
        for (size_t k = 0; k < 3 && !reasoning; k++) {
            reasoning = json_object_get(message, FIELDS[k]);
            if (json_is_null(reasoning)) reasoning = NULL;
        }
        if (!reasoning) continue;
        json_t *more = with_reasoning(message, reasoning);
        if (!more || json_array_set_new(messages, i, more) != 0) return usli_nomem(ctx, 0);
        *changed = true;
    }
    return USL_OK;
}

/* The text that a message ends with: its content, or the last part of it that has text. The holder is where it stands.
 */
static json_t *final_text(json_t *message, json_t **holder, const char **key) {
    json_t *content = json_object_get(message, "content");
    *holder = message;
    *key = "content";
    if (!json_is_array(content)) return content;
    *key = "text";
    for (size_t i = json_array_size(content); i-- > 0;) {
        *holder = json_array_get(content, i);
        if (json_object_get(*holder, "text")) return json_object_get(*holder, "text");
    }
    return NULL;
}

/* Puts MARK behind the last message; *final is that message's text, new. */
static usl_status mark_final(usl_ctx *ctx, json_t *messages, char **final) {
    json_t *message = json_array_get(messages, json_array_size(messages) - 1), *holder;
    const char *key;
    const json_t *text = message ? final_text(message, &holder, &key) : NULL;
    if (!json_is_string(text))
        return usli_fail(ctx, USL_ERR_INVALID,
                         "continue_final_message: there is no final message whose content is a text");
    size_t len = json_string_length(text);
    char *longer = usli_malloc(ctx, len + sizeof MARK);
    *final = usli_strndup(ctx, json_string_value(text), len);
    if (!longer || !*final) {
        usli_free(ctx, longer);
        return usli_nomem(ctx, len + sizeof MARK);
    }
    memcpy(longer, json_string_value(text), len);
    memcpy(longer + len, MARK, sizeof MARK);
    int failed = json_object_set_new(holder, key, json_stringn_nocheck(longer, len + sizeof MARK - 1));
    usli_free(ctx, longer);
    return failed ? usli_nomem(ctx, 0) : USL_OK;
}

static usl_status prepare(usl_ctx *ctx, const char *messages, bool go_on, char **text, size_t *len, char **final) {
    json_t *list = NULL;
    bool changed = go_on;
    usl_status st;
    *text = NULL;
    USLI_TRYGO(usli_json_parse(ctx, "messages", messages, strlen(messages), &list));
    if (!json_is_array(list)) {
        st = usli_fail(ctx, USL_ERR_INVALID, "messages must be an array of messages");
        goto done;
    }
    USLI_TRYGO(alias_reasoning(ctx, list, &changed));
    if (go_on) USLI_TRYGO(mark_final(ctx, list, final));
    if (changed) USLI_TRYGO(usli_json_dump(ctx, list, 0, text, len));
done:
    json_decref(list);
    return st;
}

/* Cuts the text where the final message ends. */
static usl_status cut_final(usl_ctx *ctx, usli_jinja_result *r, const char *final) {
    const char *mark = NULL;
    size_t bare = sizeof MARK - 2;
    for (const char *p = r->text; (p = strstr(p, "CONTINUE_FINAL_MESSAGE_TAG")); p++) mark = p;
    while (*final && isspace_c(*final)) final++;
    size_t n = strlen(final);
    while (n && isspace_c(final[n - 1])) n--;
    char *inner = usli_strndup(ctx, final, n);
    if (!inner) return usli_nomem(ctx, n + 1);
    bool found = mark && strstr(r->text, inner);
    usli_free(ctx, inner);
    if (!found)
        return usli_fail(ctx, USL_ERR_INVALID,
                         "continue_final_message: the chat template does not write the final message as it is");
    bool spaced = mark[bare] == ' ';
    r->len = (size_t)(mark - r->text);
    while (!spaced && r->len && isspace_c(r->text[r->len - 1])) r->len--;
    r->text[r->len] = 0;
    while (r->span_count && r->spans[r->span_count - 1].begin >= r->len) r->span_count--;
    if (r->span_count && r->spans[r->span_count - 1].end > r->len) r->spans[r->span_count - 1].end = r->len;
    return USL_OK;
}

/* ---- Rendering ---- */

static usli_jinja_var json_var(const char *name, const char *text) {
    if (!text) text = "null";
    return (usli_jinja_var){ name, text, strlen(text), USLI_JINJA_JSON };
}

static size_t special_vars(const usli_tokenizer *tok, usli_jinja_var *vars) {
    static const char *const NAMES[USLI_SPECIALS] = { "bos_token", "eos_token", "pad_token", "unk_token" };
    size_t n = 0;
    for (int i = 0; i < USLI_SPECIALS; i++) {
        usli_token t;
        if (tok->special[i] < 0 || !usli_tokenizer_token(tok, tok->special[i], &t)) continue;
        vars[n++] = (usli_jinja_var){ NAMES[i], t.text, t.len, USLI_JINJA_TEXT };
    }
    return n;
}

usl_status usli_chat_apply(usl_ctx *ctx, const usli_tokenizer *tok, const char *messages, const usl_chat_opts *opts,
                           usli_jinja_result *out) {
    usl_chat_opts o = USL_CHAT_OPTS_INIT;
    if (opts) memcpy(&o, opts, opts->size < sizeof o ? opts->size : sizeof o);
    usli_jinja_var vars[USLI_SPECIALS + 5];
    const char *source;
    char *text = NULL, *final = NULL;
    size_t len, n = special_vars(tok, vars);
    usl_status st;
    *out = (usli_jinja_result){ 0 };
    if (!messages) return usli_fail(ctx, USL_ERR_INVALID, "a chat template needs messages");
    if (o.continue_final_message && o.add_generation_prompt)
        return usli_fail(ctx, USL_ERR_INVALID,
                         "continue_final_message and add_generation_prompt exclude each other: choose one");
    USLI_TRYGO(choose(ctx, tok, &o, &source));
    USLI_TRYGO(prepare(ctx, messages, o.continue_final_message != 0, &text, &len, &final));
    if (o.variables) {
        vars[n] = json_var("variables", o.variables);
        vars[n++].kind = USLI_JINJA_FIELDS;
    }
    vars[n++] = json_var("messages", text ? text : messages);
    vars[n++] = json_var("tools", o.tools);
    vars[n++] = json_var("documents", o.documents);
    vars[n++] = json_var("add_generation_prompt", o.add_generation_prompt ? "true" : "false");
    USLI_TRYGO(usli_jinja_render(ctx, NAME, source, strlen(source), vars, n, out));
    if (final) USLI_TRYGO(cut_final(ctx, out, final));
done:
    usli_free(ctx, text);
    usli_free(ctx, final);
    if (st != USL_OK) usli_jinja_result_free(ctx, out);
    return st;
}

usl_status usli_chat_render(usl_ctx *ctx, const char *source, size_t len, const char *variables,
                            usli_jinja_result *out) {
    usli_jinja_var v = json_var("variables", variables ? variables : "{}");
    v.kind = USLI_JINJA_FIELDS;
    return usli_jinja_render(ctx, NAME, source, len, &v, 1, out);
}
