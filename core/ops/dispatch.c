/* Shapes and types are checked here, once, so that kernels stay short. */
#include "core/ops/ops.h"
#include "core/quant/traits.h"

#define REQUIRE(cond, ...)                                                    \
    do {                                                                      \
        if (!(cond)) return usli_fail(x->ctx, USL_ERR_INTERNAL, __VA_ARGS__); \
    } while (0)

static bool is_float(usl_dtype d) {
    return d == USL_F32 || d == USL_F16 || d == USL_BF16;
}

static usl_status check_embedding(usli_exec *x, const usli_embedding_args *a, usli_pass pass) {
    REQUIRE(a->tokens >= 0 && a->cols > 0 && a->table.cols == a->cols && is_float(a->dtype), "embedding: bad shape");
    REQUIRE(a->ids && (pass == USLI_FORWARD ? a->y != NULL : a->dy != NULL), "embedding: a pointer is missing");
    REQUIRE(a->lora.rank >= 0 && (!a->lora.rank || (a->lora.a && a->lora.b && !a->lora.magnitude)),
            "embedding: bad adapter");
    return USL_OK;
}

static usl_status check_rmsnorm(usli_exec *x, const usli_rmsnorm_args *a, usli_pass pass) {
    REQUIRE(a->rows >= 0 && a->cols > 0 && is_float(a->dtype) && is_float(a->weight_dtype),
            "rmsnorm: bad shape or type");
    REQUIRE(a->weight, "rmsnorm: no weight");
    if (pass == USLI_FORWARD) {
        REQUIRE((a->x || a->res) && a->y, "rmsnorm: a pointer is missing");
        REQUIRE(!(a->x && a->res) || a->res_out, "rmsnorm: the sum has nowhere to go");
    } else {
        REQUIRE(a->n && a->dy && a->rstd && (a->dn || a->dweight), "rmsnorm: a pointer is missing in backward");
    }
    return USL_OK;
}

static usl_status check_linear(usli_exec *x, const usli_linear_args *a, usli_pass pass) {
    REQUIRE(a->tokens >= 0 && a->in > 0 && a->segments > 0 && a->segments <= USLI_MAX_SEGMENTS, "linear: bad shape");
    REQUIRE(is_float(a->dtype) && is_float(a->y_dtype), "linear: bad type");
    int64_t out = 0, experts = a->experts ? a->experts : 1;
    for (int i = 0; i < a->segments; i++) {
        const usli_segment *s = &a->segment[i];
        REQUIRE(s->w.cols == a->in && s->w.rows > 0 && (s->w.data || s->w.nf4), "linear: segment %d has a bad matrix",
                i);
        REQUIRE(s->lora.rank >= 0 && (!s->lora.rank || (s->lora.a && s->lora.b)), "linear: segment %d: bad adapter", i);
        REQUIRE(!s->lora.magnitude || (s->lora.rank && s->lora.norm && !a->experts),
                "linear: segment %d: a magnitude without norms, or of experts", i);
        REQUIRE(!a->experts || (s->w.rows % a->experts == 0 && !s->bias && !s->dbias), "linear: segment %d is no stack",
                i);
        out += s->w.rows / experts;
    }
    REQUIRE(!a->experts || a->expert_offsets, "linear: no offsets of the experts");
    REQUIRE(out == a->out, "linear: segments have %lld rows, out is %lld", (long long)out, (long long)a->out);
    REQUIRE(!a->ldx || a->ldx >= a->in, "linear: ldx is too small");
    REQUIRE(!a->ldy || a->ldy >= a->out, "linear: ldy is too small");
    REQUIRE(!a->lddx || a->lddx >= a->in, "linear: lddx is too small");
    REQUIRE(!a->room || (a->ldx >= a->in + a->room && (pass == USLI_FORWARD || a->ldy >= a->out + a->room)),
            "linear: rows without room");
    REQUIRE(a->dropout.p >= 0 && a->dropout.p < 1, "linear: dropout %g is not in [0, 1)", (double)a->dropout.p);
    REQUIRE(pass == USLI_FORWARD ? a->x && a->y : a->dy != NULL, "linear: a pointer is missing");
    uint64_t base = 2 * (uint64_t)a->tokens * (uint64_t)a->in * (uint64_t)a->out;
    if (pass == USLI_FORWARD || a->dx) x->matmul_flops += base;
    bool again = false;
    for (int i = 0; i < a->segments; i++) again |= pass == USLI_BACKWARD && a->segment[i].lora.dmagnitude;
    if (again) x->matmul_flops += base;
    for (int i = 0; i < a->segments; i++) {
        const usli_segment *s = &a->segment[i];
        uint64_t low = 2 * (uint64_t)a->tokens * (uint64_t)s->lora.rank * (uint64_t)(a->in + s->w.rows / experts);
        x->matmul_flops += pass == USLI_FORWARD ? low : 2 * low;
        if (pass == USLI_BACKWARD && s->dw)
            x->matmul_flops += 2 * (uint64_t)a->tokens * (uint64_t)a->in * (uint64_t)(s->w.rows / experts);
    }
    return USL_OK;
}

static usl_status check_rope(usli_exec *x, const usli_rope_args *a, usli_pass pass) {
    REQUIRE(a->heads > 0 && a->head_dim > 0 && a->rot_dim >= 0 && a->rot_dim <= a->head_dim && a->rot_dim % 2 == 0,
            "rope: bad shape");
    REQUIRE(!a->head_stride || a->head_stride >= a->head_dim, "rope: heads overlap");
    REQUIRE(is_float(a->dtype) && a->position && a->cos && a->sin, "rope: a pointer is missing");
    REQUIRE(pass == USLI_FORWARD ? a->q != NULL : a->dq != NULL, "rope: a pointer is missing");
    return USL_OK;
}

static usl_status check_latent(usli_exec *x, const usli_latent_args *a, usli_pass pass) {
    REQUIRE(a->tokens >= 0 && a->heads > 0 && a->narrow > 0 && a->rotated > 0 && a->v_dim > 0 && is_float(a->dtype) &&
                a->shared_stride >= a->rotated,
            "latent: bad shape");
    REQUIRE(pass == USLI_FORWARD ? a->kv && a->shared && a->k && a->v : a->dk && a->dv && a->dkv && a->dshared,
            "latent: a pointer is missing");
    return USL_OK;
}

static usl_status check_attention(usli_exec *x, const usli_attention_args *a, usli_pass pass) {
    REQUIRE(a->heads > 0 && a->kv_heads > 0 && a->heads % a->kv_heads == 0, "attention: %d heads over %d kv heads",
            a->heads, a->kv_heads);
    REQUIRE(a->qk_dim > 0 && a->v_dim > 0 && is_float(a->dtype) && a->rows >= 0, "attention: bad shape");
    REQUIRE(a->cu_q && a->cu_k && a->q && a->k && a->v, "attention: a pointer is missing");
    REQUIRE(pass == USLI_FORWARD ? a->o != NULL : a->d_o && a->lse && a->dq && a->dk && a->dv,
            "attention: a pointer is missing");
    if (a->prefix)
        return usli_fail(x->ctx, USL_ERR_UNSUPPORTED, "attention: a shared prefix is not supported by this backend");
    return USL_OK;
}

static usl_status check_glu(usli_exec *x, const usli_glu_args *a, usli_pass pass) {
    REQUIRE(a->rows >= 0 && a->cols > 0 && is_float(a->dtype) && a->gate_up, "glu: bad shape");
    REQUIRE(pass == USLI_FORWARD ? a->h != NULL : a->dh && a->dgate_up, "glu: a pointer is missing");
    REQUIRE(!a->dweight || a->weight, "glu: gradients of weights that are not there");
    return USL_OK;
}

static usl_status check_route(usli_exec *x, const usli_route_args *a, usli_pass pass) {
    REQUIRE(a->tokens >= 0 && a->experts > 0 && a->experts <= USLI_MAX_EXPERTS && a->top_k > 0 &&
                a->top_k <= a->experts,
            "route: %d of %d experts", a->top_k, a->experts);
    REQUIRE(a->groups <= 1 || (a->groups <= USLI_MAX_GROUPS && a->experts % a->groups == 0 && a->best_groups > 0 &&
                               a->best_groups <= a->groups && a->top_k <= a->experts / a->groups * a->best_groups),
            "route: %d of %d experts in %d of %d groups", a->top_k, a->experts, a->best_groups, a->groups);
    REQUIRE(!a->by_pairs || a->groups <= 1 || a->experts / a->groups > 1, "route: no pairs in groups of one");
    REQUIRE(a->logits && a->chosen && (a->experts == 1 || a->row), "route: a pointer is missing");
    REQUIRE(!a->row == !a->offsets && !a->row == !a->token, "route: a pointer is missing");
    REQUIRE(!a->counts == !a->mass && (!(a->counts || a->dmass) || (a->micro && a->micros > 0)),
            "route: a pointer is missing");
    REQUIRE(pass == USLI_FORWARD ? a->weight != NULL : a->dweight && a->dlogits, "route: a pointer is missing");
    return USL_OK;
}

static usl_status check_balance(usli_exec *x, const usli_balance_args *a, usli_pass pass) {
    REQUIRE(pass == USLI_FORWARD && a->micros > 0 && a->experts > 0 && a->experts <= USLI_MAX_EXPERTS && a->layers > 0,
            "balance: bad shape");
    REQUIRE(a->micro && a->counts && a->mass && a->dmass && a->update, "balance: a pointer is missing");
    return USL_OK;
}

static usl_status check_combine(usli_exec *x, const usli_combine_args *a, usli_pass pass) {
    REQUIRE(pass == USLI_FORWARD && a->tokens >= 0 && a->cols > 0 && a->top_k > 0 && is_float(a->dtype),
            "combine: bad shape");
    REQUIRE(a->row && a->x && a->y, "combine: a pointer is missing");
    return USL_OK;
}

static usl_status check_gather(usli_exec *x, const usli_gather_args *a, usli_pass pass) {
    REQUIRE(a->rows >= 0 && a->cols > 0 && is_float(a->dtype), "gather: bad shape");
    REQUIRE(pass == USLI_FORWARD || a->rows <= a->x_rows, "gather: indices cannot be distinct");
    REQUIRE(a->index && (pass == USLI_FORWARD ? a->x && a->y : a->dy && a->dx), "gather: a pointer is missing");
    return USL_OK;
}

static usl_status check_dora(usli_exec *x, const usli_dora_args *a, usli_pass pass) {
    REQUIRE(pass == USLI_FORWARD && a->w.rows > 0 && a->w.cols > 0 && (a->w.data || a->w.nf4), "dora: bad matrix");
    REQUIRE(a->lora.rank > 0 && a->lora.a && a->lora.b && a->norm, "dora: a pointer is missing");
    return USL_OK;
}

static usl_status check_scatter(usli_exec *x, const usli_scatter_args *a, usli_pass pass) {
    REQUIRE(pass == USLI_FORWARD && a->rows >= 0 && a->cols > 0 && is_float(a->dtype), "scatter: bad shape");
    REQUIRE(a->index && a->x && a->y, "scatter: a pointer is missing");
    return USL_OK;
}

static usl_status check_cross_entropy(usli_exec *x, const usli_cross_entropy_args *a, usli_pass pass) {
    REQUIRE(pass == USLI_FORWARD, "cross_entropy: its gradient is made in the forward pass");
    REQUIRE(a->rows >= 0 && a->cols > 0 && is_float(a->dtype) && a->logits && a->target && a->losses && a->update,
            "cross_entropy: bad shape or pointer");
    return USL_OK;
}

static usl_status check_softcap(usli_exec *x, const usli_softcap_args *a, usli_pass pass) {
    REQUIRE(pass == USLI_FORWARD && a->n >= 0 && a->z && a->softcap > 0, "softcap: bad shape or pointer");
    return USL_OK;
}

static usl_status check_grad_norm(usli_exec *x, const usli_grad_norm_args *a, usli_pass pass) {
    (void)pass;
    REQUIRE(a->count >= 0 && a->update, "grad_norm: a pointer is missing");
    return USL_OK;
}

static usl_status check_adamw(usli_exec *x, const usli_adamw_args *a, usli_pass pass) {
    (void)pass;
    REQUIRE(a->count >= 0 && a->update, "adamw: a pointer is missing");
    for (int64_t i = 0; i < a->count; i++) {
        const usli_param *p = &a->params[i];
        REQUIRE(p->w && p->g && p->m && p->v &&
                    (p->state == USL_F32 || (p->state == USL_U8 && p->m_absmax && p->v_absmax)),
                "adamw: parameter %lld lacks its state", (long long)i);
    }
    return USL_OK;
}

static usl_status check_cast(usli_exec *x, const usli_cast_args *a, usli_pass pass) {
    (void)pass;
    REQUIRE(a->dst && is_float(a->dtype) && a->src.rows >= 0 && a->src.cols > 0, "cast: bad shape or type");
    return USL_OK;
}

static usl_status check_quantize(usli_exec *x, const usli_quantize_args *a, usli_pass pass) {
    const usli_traits *t = usli_traits_of(a->type);
    REQUIRE(pass == USLI_FORWARD && t && t->encode && a->type != USL_NF4 && a->type != USL_FP4, "quantize: bad type");
    REQUIRE(a->rows >= 0 && a->cols > 0 && a->cols % t->block == 0 && is_float(a->dtype), "quantize: bad shape");
    REQUIRE(a->x && a->y && (uintptr_t)a->x % 16 == 0 && (uintptr_t)a->importance % 16 == 0,
            "quantize: a pointer is missing or not aligned");
    return USL_OK;
}

static usl_status check_sample(usli_exec *x, const usli_sample_args *a, usli_pass pass) {
    (void)pass;
    REQUIRE(a->rows >= 0 && a->cols > 0 && a->stride >= a->cols && a->logits && a->out,
            "sample: a pointer is missing, or the rows overlap");
    return USL_OK;
}

static usl_status check(usli_exec *x, usli_op op, const void *args, usli_pass pass) {
    switch (op) {
#define USLI_OP(name)    \
    case USLI_OP_##name: \
        return check_##name(x, args, pass);
#include "core/ops/ops.def"
#undef USLI_OP
    default: return usli_fail(x->ctx, USL_ERR_INTERNAL, "no op has the number %d", (int)op);
    }
}

static const char *const OP_NAMES[] = {
#define USLI_OP(name) #name,
#include "core/ops/ops.def"
#undef USLI_OP
};

usl_status usli_run(usli_exec *x, usli_op op, void *args, usli_pass pass) {
    USLI_TRY(check(x, op, args, pass));
    const usli_op_impl *impl = x->backend->ops[op];
    if (!impl)
        return usli_fail(x->ctx, USL_ERR_UNSUPPORTED, "the %s backend has no %s yet; use device = \"cpu\"",
                         x->backend->name, OP_NAMES[op]);
    size_t mark = x->arena->high, bytes = impl->workspace ? impl->workspace(x, args, pass) : 0;
    void *ws = bytes ? usli_arena_scratch(x->arena, bytes) : NULL;
    if (bytes && !ws) return usli_nomem(x->ctx, bytes);
    usl_status st = x->arena->dry ? USL_OK : impl->run(x, args, pass, ws);
    if (x->observe && st == USL_OK && op == USLI_OP_linear && pass == USLI_FORWARD && !x->arena->dry)
        x->observe(x, args);
    x->arena->high = mark;
    return st;
}
