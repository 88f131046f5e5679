/* The shapes that instruction data comes in, made into one: a `messages` list of { role, content }. */
#ifndef USLI_DATA_FORMATS_H
#define USLI_DATA_FORMATS_H

#include "core/data/dataset.h"

/* *out is new. The first row tells the format, and every row must have it:
 *   alpaca    instruction, output, and maybe input, system      -> messages
 *   ShareGPT  conversations of { from, value }, maybe system    -> messages
 *   OpenAI    messages of { role, content }, maybe system       -> messages
 *   DPO       prompt (or conversations, messages), chosen, rejected -> the same columns with messages inside
 *   KTO       messages (or conversations, prompt + completion), label -> the same columns with messages inside
 * Roles become system, user, assistant or tool. Other columns (tools, id) stay as they are. */
usl_status usli_standardize(const usli_dataset *ds, usli_dataset **out);

#endif
