#include <stdio.h>
#include <string.h>

#include "core/model/model.h"

const usli_slot_info usli_slots[USLI_SLOTS] = {
    [USLI_Q] = { "self_attn.q_proj.weight", "attn_q.weight", "q_proj" },
    [USLI_K] = { "self_attn.k_proj.weight", "attn_k.weight", "k_proj" },
    [USLI_V] = { "self_attn.v_proj.weight", "attn_v.weight", "v_proj" },
    [USLI_O] = { "self_attn.o_proj.weight", "attn_output.weight", "o_proj" },
    [USLI_GATE] = { "mlp.gate_proj.weight", "ffn_gate.weight", "gate_proj" },
    [USLI_UP] = { "mlp.up_proj.weight", "ffn_up.weight", "up_proj" },
    [USLI_DOWN] = { "mlp.down_proj.weight", "ffn_down.weight", "down_proj" },
    [USLI_QKV] = { "self_attn.qkv_proj.weight", "attn_qkv.weight", "qkv_proj" },
    [USLI_GATE_UP] = { "mlp.gate_up_proj.weight", "ffn_up.weight", "gate_up_proj" },
    [USLI_Q_A] = { "self_attn.q_a_proj.weight", "attn_q_a.weight", "q_a_proj" },
    [USLI_KV_A] = { "self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight", "kv_a_proj_with_mqa" },
    [USLI_Q_B] = { "self_attn.q_b_proj.weight", "attn_q_b.weight", "q_b_proj" },
    [USLI_KV_B] = { "self_attn.kv_b_proj.weight", "attn_kv_b.weight", "kv_b_proj" },
    [USLI_SHARED_GATE] = { "mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", "shared_expert_gate" },
    [USLI_EXPERTS_IN] = { "mlp.experts.gate_up_proj", "ffn_gate_exps.weight", "gate_up_proj" },
    [USLI_EXPERTS_OUT] = { "mlp.experts.down_proj", "ffn_down_exps.weight", "down_proj" },
    [USLI_ROUTER] = { "mlp.gate.weight", "ffn_gate_inp.weight", "gate" },
    [USLI_ATTN_NORM] = { "input_layernorm.weight", "attn_norm.weight", NULL },
    [USLI_POST_ATTN_NORM] = { "post_attention_layernorm.weight", "post_attention_norm.weight", NULL },
    [USLI_MLP_NORM] = { "post_attention_layernorm.weight", "ffn_norm.weight", NULL },
    [USLI_POST_MLP_NORM] = { "post_feedforward_layernorm.weight", "post_ffw_norm.weight", NULL },
    [USLI_Q_NORM] = { "self_attn.q_norm.weight", "attn_q_norm.weight", NULL },
    [USLI_K_NORM] = { "self_attn.k_norm.weight", "attn_k_norm.weight", NULL },
    [USLI_Q_A_NORM] = { "self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight", NULL },
    [USLI_KV_A_NORM] = { "self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight", NULL },
    [USLI_ROUTER_BIAS] = { "mlp.gate.e_score_correction_bias", "exp_probs_b.bias", NULL },
    [USLI_Q_BIAS] = { "self_attn.q_proj.bias", "attn_q.bias", NULL },
    [USLI_K_BIAS] = { "self_attn.k_proj.bias", "attn_k.bias", NULL },
    [USLI_V_BIAS] = { "self_attn.v_proj.bias", "attn_v.bias", NULL },
    [USLI_O_BIAS] = { "self_attn.o_proj.bias", "attn_output.bias", NULL },
    [USLI_GATE_BIAS] = { "mlp.gate_proj.bias", "ffn_gate.bias", NULL },
    [USLI_UP_BIAS] = { "mlp.up_proj.bias", "ffn_up.bias", NULL },
    [USLI_DOWN_BIAS] = { "mlp.down_proj.bias", "ffn_down.bias", NULL },
    [USLI_EMBED] = { "model.embed_tokens.weight", "token_embd.weight", NULL },
    [USLI_FINAL_NORM] = { "model.norm.weight", "output_norm.weight", NULL },
    [USLI_HEAD] = { "lm_head.weight", "output.weight", NULL },
};

bool usli_slot_shape(const usli_config *c, usli_slot slot, int64_t layer, int64_t *rows, int64_t *cols) {
    const usli_mixture *mix = c->arch->mixture;
    bool sparse = usli_layer_sparse(c, layer), latent = c->arch->latent, fused = c->arch->fused;
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, d = c->hidden, o = c->heads * c->v_dim;
    /* Where a layer is a mixture, its dense MLP is the expert that sees every token. */
    int64_t f = sparse ? c->shared_inter : c->inter, e = c->experts, narrow = c->head_dim - c->rot_dim;
    const struct {
        int64_t rows, cols;
        bool present;
    } shape[USLI_SLOTS] = {
        [USLI_Q] = { q, d, !c->q_lora && !fused },
        [USLI_K] = { kv, d, !latent && !fused },
        [USLI_V] = { kv, d, !latent && !fused },
        [USLI_O] = { d, o, true },
        [USLI_GATE] = { f, d, f > 0 && !fused },
        [USLI_UP] = { f, d, f > 0 && !fused },
        [USLI_DOWN] = { d, f, f > 0 },
        [USLI_QKV] = { q + 2 * kv, d, fused },
        [USLI_GATE_UP] = { 2 * f, d, fused && f > 0 },
        [USLI_Q_A] = { c->q_lora, d, c->q_lora > 0 },
        [USLI_KV_A] = { c->kv_lora + c->rot_dim, d, latent },
        [USLI_Q_B] = { q, c->q_lora, c->q_lora > 0 },
        [USLI_KV_B] = { c->heads * (narrow + c->v_dim), c->kv_lora, latent },
        [USLI_SHARED_GATE] = { 1, d, sparse && f > 0 && mix->shared_gate },
        [USLI_EXPERTS_IN] = { 2 * e * c->expert_inter, d, sparse },
        [USLI_EXPERTS_OUT] = { e * d, c->expert_inter, sparse },
        [USLI_ROUTER] = { e, d, sparse },
        [USLI_ATTN_NORM] = { d, 0, true },
        [USLI_POST_ATTN_NORM] = { d, 0, c->arch->post_norms },
        [USLI_MLP_NORM] = { d, 0, true },
        [USLI_POST_MLP_NORM] = { d, 0, c->arch->post_norms },
        [USLI_Q_NORM] = { c->head_dim, 0, c->arch->qk_norm },
        [USLI_K_NORM] = { c->head_dim, 0, c->arch->qk_norm },
        [USLI_Q_A_NORM] = { c->q_lora, 0, c->q_lora > 0 },
        [USLI_KV_A_NORM] = { c->kv_lora, 0, latent },
        [USLI_ROUTER_BIAS] = { e, 0, sparse && mix->biased },
        [USLI_Q_BIAS] = { q, 0, c->attention_bias },
        [USLI_K_BIAS] = { kv, 0, c->attention_bias },
        [USLI_V_BIAS] = { kv, 0, c->attention_bias },
        [USLI_O_BIAS] = { d, 0, c->output_bias },
        [USLI_GATE_BIAS] = { f, 0, c->mlp_bias && !sparse },
        [USLI_UP_BIAS] = { f, 0, c->mlp_bias && !sparse },
        [USLI_DOWN_BIAS] = { d, 0, c->mlp_bias && !sparse },
        [USLI_EMBED] = { c->vocab, d, true },
        [USLI_FINAL_NORM] = { d, 0, true },
        [USLI_HEAD] = { c->vocab, d, !c->tied },
    };
    *rows = shape[slot].rows;
    *cols = shape[slot].cols;
    return shape[slot].present;
}

void usli_slot_name(const usli_config *c, usli_slot slot, int64_t layer, bool gguf, char *buf, size_t size) {
    const char *word = gguf ? usli_slots[slot].gguf : usli_slots[slot].hf;
    /* Where attention has a norm behind it, that one takes the name which elsewhere is the next one's. */
    if (!gguf && slot == USLI_MLP_NORM && c->arch->post_norms) word = "pre_feedforward_layernorm.weight";
    bool shared =
        slot < USLI_EMBED && (slot == USLI_GATE || slot == USLI_UP || slot == USLI_DOWN) && usli_layer_sparse(c, layer);
    if (shared && gguf)
        snprintf(buf, size, "blk.%lld.%.*s_shexp.weight", (long long)layer, (int)strcspn(word, "."), word);
    else if (shared)
        snprintf(buf, size, "model.layers.%lld.mlp.%s.%s", (long long)layer, c->arch->mixture->shared,
                 word + strlen("mlp."));
    else if (slot >= USLI_EMBED)
        snprintf(buf, size, "%s", word);
    else
        snprintf(buf, size, "%s.%lld.%s", gguf ? "blk" : "model.layers", (long long)layer, word);
}

/* ---- What a checkpoint holds of a slot -----------------------------------------------------------------------------
 */

static bool has_stacks(usli_slot slot) {
    return slot == USLI_EXPERTS_IN || slot == USLI_EXPERTS_OUT;
}

/* The matrices of a stack: gate and up of each expert, or its down. */
static int64_t parts_of(usli_slot slot) {
    return slot == USLI_EXPERTS_IN ? 2 : 1;
}

int64_t usli_slot_experts(const usli_config *c, usli_slot slot) {
    return has_stacks(slot) ? c->experts : 0;
}

int64_t usli_slot_pieces(const usli_config *c, usli_slot slot, usli_form form) {
    if (!has_stacks(slot) || form == USLI_FORM_STACKED) return 1;
    return form == USLI_FORM_GGUF ? parts_of(slot) : c->experts * parts_of(slot);
}

void usli_slot_piece(const usli_config *c, usli_slot slot, int64_t layer, usli_form form, int64_t i, usli_piece *p) {
    int64_t rows, cols, parts = parts_of(slot);
    usli_slot_shape(c, slot, layer, &rows, &cols);
    *p = (usli_piece){ .ndim = cols ? 2 : 1, .shape = { rows, cols }, .rows = rows, .run = rows, .stride = rows };
    usli_slot_name(c, slot, layer, form == USLI_FORM_GGUF, p->name, sizeof p->name);
    const usli_mixture *mix = c->arch->mixture;
    /* A router lies where its experts do. */
    if (form != USLI_FORM_GGUF && (slot == USLI_ROUTER || slot == USLI_ROUTER_BIAS))
        snprintf(p->name, sizeof p->name, "model.layers.%lld.%s.%s", (long long)layer, mix->folder,
                 usli_slots[slot].hf + strlen("mlp."));
    if (form == USLI_FORM_GGUF && slot == USLI_SHARED_GATE) /* a vector there */
        p->ndim = 1, p->shape[0] = cols;
    if (!has_stacks(slot)) return;
    int64_t each = rows / c->experts, part = each / parts;
    if (form == USLI_FORM_STACKED) {
        *p = (usli_piece){ .ndim = 3, .shape = { c->experts, each, cols }, .rows = rows, .run = rows, .stride = rows };
        usli_slot_name(c, slot, layer, false, p->name, sizeof p->name);
    } else if (form == USLI_FORM_GGUF) {
        p->ndim = 3;
        p->shape[0] = c->experts, p->shape[1] = part, p->shape[2] = cols;
        p->rows = c->experts * part;
        p->first = i * part, p->run = part, p->stride = each;
        if (i == 1) snprintf(p->name, sizeof p->name, "blk.%lld.ffn_up_exps.weight", (long long)layer);
    } else {
        p->shape[0] = p->rows = p->run = p->stride = part;
        p->first = i * part;
        snprintf(p->name, sizeof p->name, "model.layers.%lld.%s.experts.%lld.%s.weight", (long long)layer, mix->folder,
                 (long long)(i / parts), mix->words[slot == USLI_EXPERTS_OUT ? 2 : i % parts]);
    }
}

int64_t usli_gguf_qk_row(int64_t hf_row, int64_t head_dim) {
    int64_t head = hf_row / head_dim, r = hf_row % head_dim, half = head_dim / 2;
    return head * head_dim + (r % half) * 2 + r / half;
}

bool usli_name_spelling(int i, const char *name, char *buf, size_t size) {
    static const struct {
        const char *from, *to;
    } START[] = { { "", "" }, { "model.", "model.language_model." }, { "", "language_model." } };
    if (i >= (int)(sizeof START / sizeof *START)) return false;
    size_t skip = strncmp(name, START[i].from, strlen(START[i].from)) == 0 ? strlen(START[i].from) : 0;
    snprintf(buf, size, "%s%s", START[i].to, name + skip);
    return true;
}

bool usli_slot_is_norm(usli_slot slot) {
    return (slot >= USLI_ATTN_NORM && slot <= USLI_KV_A_NORM) || slot == USLI_FINAL_NORM;
}

bool usli_slot_turns(usli_slot slot) {
    return slot == USLI_Q || slot == USLI_K || slot == USLI_Q_BIAS || slot == USLI_K_BIAS;
}
