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
    [USLI_ATTN_NORM] = { "input_layernorm.weight", "attn_norm.weight", NULL },
    [USLI_POST_ATTN_NORM] = { "post_attention_layernorm.weight", "post_attention_norm.weight", NULL },
    [USLI_MLP_NORM] = { "post_attention_layernorm.weight", "ffn_norm.weight", NULL },
    [USLI_POST_MLP_NORM] = { "post_feedforward_layernorm.weight", "post_ffw_norm.weight", NULL },
    [USLI_Q_NORM] = { "self_attn.q_norm.weight", "attn_q_norm.weight", NULL },
    [USLI_K_NORM] = { "self_attn.k_norm.weight", "attn_k_norm.weight", NULL },
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
    (void)layer;
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, d = c->hidden, f = c->inter;
    bool fused = c->arch->fused;
    const struct {
        int64_t rows, cols;
        bool present;
    } shape[USLI_SLOTS] = {
        [USLI_Q] = { q, d, !fused },
        [USLI_K] = { kv, d, !fused },
        [USLI_V] = { kv, d, !fused },
        [USLI_O] = { d, q, true },
        [USLI_GATE] = { f, d, !fused },
        [USLI_UP] = { f, d, !fused },
        [USLI_DOWN] = { d, f, true },
        [USLI_QKV] = { q + 2 * kv, d, fused },
        [USLI_GATE_UP] = { 2 * f, d, fused },
        [USLI_ATTN_NORM] = { d, 0, true },
        [USLI_POST_ATTN_NORM] = { d, 0, c->arch->post_norms },
        [USLI_MLP_NORM] = { d, 0, true },
        [USLI_POST_MLP_NORM] = { d, 0, c->arch->post_norms },
        [USLI_Q_NORM] = { c->head_dim, 0, c->arch->qk_norm },
        [USLI_K_NORM] = { c->head_dim, 0, c->arch->qk_norm },
        [USLI_Q_BIAS] = { q, 0, c->attention_bias },
        [USLI_K_BIAS] = { kv, 0, c->attention_bias },
        [USLI_V_BIAS] = { kv, 0, c->attention_bias },
        [USLI_O_BIAS] = { d, 0, c->output_bias },
        [USLI_GATE_BIAS] = { f, 0, c->mlp_bias },
        [USLI_UP_BIAS] = { f, 0, c->mlp_bias },
        [USLI_DOWN_BIAS] = { d, 0, c->mlp_bias },
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
    if (slot >= USLI_EMBED)
        snprintf(buf, size, "%s", word);
    else
        snprintf(buf, size, "%s.%lld.%s", gguf ? "blk" : "model.layers", (long long)layer, word);
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
    return (slot >= USLI_ATTN_NORM && slot <= USLI_K_NORM) || slot == USLI_FINAL_NORM;
}

bool usli_slot_turns(usli_slot slot) {
    return slot == USLI_Q || slot == USLI_K || slot == USLI_Q_BIAS || slot == USLI_K_BIAS;
}
