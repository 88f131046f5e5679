/* Training behind unsloth.h. */
#include <string.h>

#include "core/api/need.h"
#include "core/train/checkpoint.h"

usl_status usl_trainer_new(usl_model *model, usl_rows *rows, usl_rows *eval, const usl_train_opts *opts,
                           usl_trainer **out) {
    return usli_trainer_new(model, rows, eval, opts, out);
}

void usl_trainer_free(usl_trainer *trainer) {
    usli_trainer_free(trainer);
}

usl_status usl_trainer_step(usl_trainer *trainer, usl_step_stats *stats) {
    return usli_trainer_step(trainer, stats);
}

usl_status usl_trainer_evaluate(usl_trainer *trainer, usl_step_stats *stats) {
    return usli_trainer_evaluate(trainer, stats);
}

usl_status usl_trainer_gradients(usl_trainer *trainer, int64_t first, int64_t count, usl_step_stats *stats) {
    return usli_trainer_gradients(trainer, first, count, stats);
}

usl_status usl_trainer_get_grad(usl_trainer *t, const char *name, usl_tensor **out) {
    usli_param_ref p;
    *out = NULL;
    USLI_NEED(t->ctx, name);
    if (!usli_model_find_param(t->model, name, &p) || !p.trainable)
        return usli_fail(t->ctx, USL_ERR_NOT_FOUND, "\"%s\" is no trained parameter", name);
    USLI_TRY(usl_tensor_new(t->ctx, USL_F32, p.ndim, p.shape, out));
    usli_exec *x = &t->model->exec;
    size_t bytes = (size_t)p.count * sizeof(float);
    float *lies = p.experts ? usli_malloc(t->ctx, bytes) : usl_tensor_data(*out);
    usl_status st = lies ? x->backend->copy_out(x, lies, *p.grad, bytes) : usli_nomem(t->ctx, bytes);
    if (p.experts) {
        if (st == USL_OK) usli_param_publish(&p, lies, usl_tensor_data(*out));
        usli_free(t->ctx, lies);
    }
    if (st != USL_OK) {
        usl_tensor_free(*out);
        *out = NULL;
        return st;
    }
    float scale = t->update.loss_scale, *g = usl_tensor_data(*out);
    for (int64_t i = 0; scale != 1 && i < p.count; i++) g[i] /= scale;
    return USL_OK;
}

void usl_trainer_set_learning_rate(usl_trainer *trainer, double rate) {
    trainer->rate = rate;
}

usl_status usl_trainer_set_rows(usl_trainer *trainer, usl_rows *rows) {
    return usli_trainer_set_rows(trainer, rows);
}

usl_status usl_trainer_skip(usl_trainer *trainer, int64_t updates) {
    return usli_trainer_skip(trainer, updates);
}

int64_t usl_trainer_position(const usl_trainer *trainer, int64_t *total) {
    if (total) *total = trainer->total;
    return trainer->step;
}

usl_status usl_trainer_save(usl_trainer *trainer, const char *dir, const char *extra) {
    USLI_NEED_PATH(trainer->ctx, dir, USL_ACCESS_WRITE);
    return usli_checkpoint_save(trainer, dir, extra);
}

usl_status usl_trainer_resume(usl_trainer *trainer, const char *dir, char **extra) {
    if (extra) *extra = NULL;
    USLI_NEED_PATH(trainer->ctx, dir, USL_ACCESS_READ);
    return usli_checkpoint_load(trainer, dir, extra);
}

void usl_trainer_get_plan(const usl_trainer *trainer, usl_plan *plan) {
    usli_plan_get(trainer, plan);
}
