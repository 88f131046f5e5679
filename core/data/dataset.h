/* A data set: a list of rows, each a JSON object that nobody changes any more, and where each came from, so that an
 * error can say "alpaca.json: row 3" (of a list) or "alpaca.jsonl: line 12". Data sets share rows and are counted. */
#ifndef USLI_DATA_DATASET_H
#define USLI_DATA_DATASET_H

#include <jansson.h>

#include "core/base/ctx.h"

typedef struct usl_dataset usli_dataset;

/* Reads files one after another; *out is new. kind is one of
 *   "json"  a list of objects, such a list under "data" in an object, or one object a line: the content tells which;
 *   "text"  a row { text } for each line that is not blank;
 *   "csv"   RFC 4180 with a row of names first; every value is a string.
 * A byte order mark, CRLF, blank lines and a missing last newline are fine; a file without rows is an error. */
usl_status usli_dataset_load(usl_ctx *ctx, const char *kind, const char *const *paths, size_t count,
                             usli_dataset **out);

/* *out is new and empty. */
usl_status usli_dataset_new(usl_ctx *ctx, usli_dataset **out);
usli_dataset *usli_dataset_retain(usli_dataset *ds); /* NULL is fine */
void usli_dataset_release(usli_dataset *ds);
usl_ctx *usli_dataset_ctx(const usli_dataset *ds);

int64_t usli_dataset_rows(const usli_dataset *ds);
const json_t *usli_dataset_row(const usli_dataset *ds, int64_t i); /* borrowed */
/* "FILE: line 12", "FILE: row 3", or "row 3" of a row from no file. Returns buf; a long file name loses its beginning.
 */
const char *usli_dataset_where(const usli_dataset *ds, int64_t i, char *buf, size_t size);
enum { USLI_WHERE_MAX = 512 };

/* Takes one JSON object; only while ds is all the caller's own and came from usli_dataset_new. */
usl_status usli_dataset_append(usli_dataset *ds, const char *json, size_t len);
/* Adds row i of `from`, as `row` instead when that is not NULL (taken over, also on failure). */
usl_status usli_dataset_add(usli_dataset *ds, const usli_dataset *from, int64_t i, json_t *row);
/* *out is new: those rows, counted from 0. */
usl_status usli_dataset_select(const usli_dataset *ds, const int64_t *index, int64_t count, usli_dataset **out);
/* *out is new: the rows in the order of torch.randperm with this seed. */
usl_status usli_dataset_shuffle(const usli_dataset *ds, uint32_t seed, usli_dataset **out);

/* ---- For the readers of files (read.c) ---- */

/* A file that rows came from; counted. */
typedef struct usli_source usli_source;
usl_status usli_source_new(usl_ctx *ctx, const char *name, bool lines,
                           usli_source **out);               /* lines: "line N", else "row N" */
void usli_source_release(usl_ctx *ctx, usli_source *source); /* NULL is fine */
/* Takes row over, also on failure. source NULL: from no file. */
usl_status usli_dataset_push(usli_dataset *ds, usli_source *source, int64_t number, json_t *row);
/* A word for messages: "a string", "a list", "null", ... */
const char *usli_json_type_name(const json_t *value);

#endif
