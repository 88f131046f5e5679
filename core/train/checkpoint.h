/* A checkpoint folder: what PEFT can load (an adapter) or the trained weights, optimizer.safetensors, and last of all
 * trainer_state.json: without it a folder is no checkpoint. */
#ifndef USLI_TRAIN_CHECKPOINT_H
#define USLI_TRAIN_CHECKPOINT_H

#include "core/train/trainer.h"

usl_status usli_checkpoint_save(usl_trainer *t, const char *dir, const char *extra);
usl_status usli_checkpoint_load(usl_trainer *t, const char *dir, char **extra);

#endif
