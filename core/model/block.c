#include "core/model/block.h"

#include "core/base/dtype.h"
#include "core/model/block_parts.h"

/* The same block over some of the tokens: an MLP does not mix them. */
typedef struct part {
    usli_batch batch;
    usli_pass_state s;
    usli_block_saved saved;
    void *dn;
} part;

static void make_part(const usli_pass_state *s, const usli_block_saved *saved, void *dn, int64_t first, part *p) {
    const usl_model *m = s->model;
    size_t cells = (size_t)first * (size_t)m->config.hidden, stream = cells * usli_dtype_bytes(m->res_dtype);
    int64_t left = s->batch->tokens - first;
    p->batch = *s->batch;
    p->batch.tokens = s->piece && s->piece < left ? s->piece : left;
    if (p->batch.row_of_token) p->batch.row_of_token += first;
    p->batch.position += first;
    p->batch.angle += first;
    p->s = *s;
    p->s.batch = &p->batch;
    p->s.first = first;
    p->s.x = (char *)s->x + cells * usli_dtype_bytes(m->dtype);
    p->saved =
        (usli_block_saved){ .n1 = (char *)saved->n1 + stream, .n2 = saved->n2 ? (char *)saved->n2 + stream : NULL };
    p->dn = dn ? (char *)dn + (size_t)(first * s->ldn) * usli_dtype_bytes(m->res_dtype) : NULL;
}

usl_status usli_block_forward(usli_pass_state *s, int64_t layer, const usli_cache *cache, const void *res,
                              const void *x, bool keep, usli_block_saved *saved) {
    USLI_TRY(usli_attention_forward(s, layer, cache, res, x, keep, saved));
    if (keep) return usli_mlp_forward(s, layer, true, true, saved);
    size_t mark = s->exec->arena->high;
    part p;
    for (int64_t first = 0; first < s->batch->tokens; first += p.batch.tokens) {
        make_part(s, saved, NULL, first, &p);
        USLI_TRY(usli_mlp_forward(&p.s, layer, false, true, &p.saved));
        s->exec->arena->high = mark;
    }
    return USL_OK;
}

usl_status usli_block_backward(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn, bool wants_input) {
    USLI_TRY(usli_mlp_backward(s, layer, saved, dn));
    return usli_attention_backward(s, layer, saved, dn, wants_input);
}

usl_status usli_block_again(usli_pass_state *s, int64_t layer, usli_block_saved *saved, void *dn, bool wants_input) {
    const usl_model *m = s->model;
    size_t row = (size_t)m->config.hidden * usli_dtype_bytes(m->res_dtype), mark = s->exec->arena->high;
    part p;
    USLI_TRY(usli_attention_forward(s, layer, NULL, saved->n1, NULL, true, saved));
    s->exec->arena->high = mark;
    for (int64_t first = 0; first < s->batch->tokens; first += p.batch.tokens) {
        make_part(s, saved, dn, first, &p);
        USLI_TAKE(p.saved.n2, s->exec, false, (size_t)p.batch.tokens * row);
        USLI_TRY(usli_mlp_forward(&p.s, layer, false, false, &p.saved));
        USLI_TRY(usli_mlp_backward(&p.s, layer, &p.saved, p.dn));
        s->exec->arena->high = mark;
    }
    return usli_attention_backward(s, layer, saved, dn, wants_input);
}
