// unsloth.hpp: what C++ adds to unsloth.h: handles that free themselves, and exceptions with the sentence. Everything
// else is the C interface, which takes the handles as they are.
#ifndef UNSLOTH_HPP
#define UNSLOTH_HPP

#include <unsloth.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace usl {

struct error : std::runtime_error {
    usl_status code;
    error(usl_status c, const std::string &text) : std::runtime_error(text), code(c) {}
};

// A handle that is its C pointer wherever one is wanted.
template <class T, void (*Free)(T *)> class handle {
    struct release {
        void operator()(T *p) const { Free(p); }
    };
    std::unique_ptr<T, release> p;

public:
    using type = T;
    explicit handle(T *raw = nullptr) : p(raw) {}
    operator T *() const { return p.get(); }
};

using model = handle<usl_model, usl_model_free>;
using tokenizer = handle<usl_tokenizer, usl_tokenizer_free>;
using rows = handle<usl_rows, usl_rows_free>;
using trainer = handle<usl_trainer, usl_trainer_free>;

class context {
    handle<usl_ctx, usl_ctx_free> p;

public:
    explicit context(const usl_ctx_opts *opts = nullptr) {
        usl_ctx *raw;
        usl_status st = usl_ctx_new(opts, &raw);
        if (st != USL_OK) throw error(st, "no memory or threads for a context");
        p = handle<usl_ctx, usl_ctx_free>(raw);
    }
    operator usl_ctx *() const { return p; }

    void check(usl_status st) const {
        if (st != USL_OK) throw error(st, usl_ctx_errmsg(p));
    }

    // make<usl::model>(usl_model_open, path, &opts): calls f(ctx, args..., &out).
    template <class H, class F, class... A> H make(F f, A... args) const {
        typename H::type *raw = nullptr;
        check(f(p, args..., &raw));
        return H(raw);
    }

    std::vector<int32_t> encode(usl_tokenizer *tok, const std::string &text) const {
        int32_t *ids;
        size_t count;
        check(usl_tokenizer_encode(p, tok, text.data(), text.size(), 1, &ids, &count));
        std::vector<int32_t> out(ids, ids + count);
        usl_free(p, ids);
        return out;
    }

    std::string decode(usl_tokenizer *tok, const std::vector<int32_t> &ids) const {
        char *text;
        size_t len;
        check(usl_tokenizer_decode(p, tok, ids.data(), ids.size(), 1, &text, &len));
        std::string out(text, len);
        usl_free(p, text);
        return out;
    }

    std::vector<int32_t> generate(usl_model *m, const std::vector<int32_t> &ids, int64_t most) const {
        usl_generate_opts opts = USL_GENERATE_OPTS_INIT;
        int32_t *raw;
        size_t count;
        opts.max_new_tokens = most;
        check(usl_model_generate(m, ids.data(), ids.size(), &opts, &raw, &count));
        std::vector<int32_t> out(raw, raw + count);
        usl_free(p, raw);
        return out;
    }
};

} // namespace usl

#endif
