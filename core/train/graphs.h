/* Passes whose shapes come again, and the recorded work that runs them: a pass launches thousands of kernels, and where
 * these are short the host cannot launch them as fast as they run.
 *
 * A device that can record sees short passes of few shapes. Tokens are rounded up to a multiple of USLI_BUCKET, at most
 * to the plan's: the tail that this adds is a row of its own, whose labels do not count, so that all gradients that
 * reach it are zeros. Rows are those of the plan's largest pass and one more, which leaves room for the tail; those
 * that are not there are empty. The longest row is said to be the plan's. What is rounded does not depend on whether
 * anything is recorded, so the bits do not either.
 *
 * Recorded are the halves, all blocks forward and all blocks backward. The head between them is launched plainly: its
 * size is the number of labels that count, another one each time. (A pass recorded whole would need these padded too,
 * for the sake of some ten launches.) */
#ifndef USLI_TRAIN_GRAPHS_H
#define USLI_TRAIN_GRAPHS_H

#include "core/model/pass.h"

enum { USLI_BUCKET = 128 };

typedef struct usli_shape {
    int64_t tokens, rows, longest;
} usli_shape;

/* Whether passes of this model are rounded: where the device records, and not of mixtures, whose tail would go to the
 * experts and be counted there. */
bool usli_shape_rounds(const usl_model *m);
/* The most that rounding makes of passes of at most that size. */
usli_shape usli_shape_most(const usl_model *m, usli_shape most);
/* What a pass is rounded to. Rows of one length whose tokens fill their bucket stay as they are: such attention may be
 * a library's. So do passes that keep the device busy for longer than their launches take. */
usli_shape usli_shape_of(const usl_model *m, usli_shape most, usli_shape pass);

/* Shapes that are counted; pairs of halves that may be recorded. */
enum { USLI_GRAPH_KEYS = 64, USLI_GRAPH_PAIRS = 16, USLI_GRAPH_HALVES = 2 };

/* One shape of passes. */
typedef struct usli_graph {
    usli_shape shape;
    bool drops;
    int64_t uses; /* 0: a free place */
    bool seen[USLI_GRAPH_HALVES];
    void *work[USLI_GRAPH_HALVES]; /* recorded; NULL: not */
} usli_graph;

typedef struct usli_graphs {
    usli_graph at[USLI_GRAPH_KEYS];
    bool refused;    /* the device would not record, or the user does not want it to */
    int placing;     /* the model's, when what is recorded was */
    int wanted;      /* uses of a shape before it is recorded */
    int pairs;       /* that may be recorded */
    size_t most;     /* bytes of the device that they may take: when they take more, pairs is the number that did not */
    int64_t bytes;   /* that they take, as the driver counts */
    int64_t replays; /* of halves, so far */
} usli_graphs;

/* Before the first pass: recorded work may take so many bytes of the device. */
void usli_graphs_begin(usli_graphs *g, size_t most);
/* After an update that replayed nothing: so long did the host wait for the device at its end, of what it took. It is
 * decided by the clock whether recording is worth it; the bits are the same. */
void usli_graphs_judge(usli_graphs *g, double waited, double took);
/* Before the arena that passes run in is given back. */
void usli_graphs_forget(usli_graphs *g, usli_exec *x);
/* As usli_pass_forward and usli_pass_backward, of work that was recorded where the shape is a known one. g NULL: as
 * they are. */
usl_status usli_graphs_forward(usli_graphs *g, usli_pass_state *s, void **hidden);
usl_status usli_graphs_backward(usli_graphs *g, usli_pass_state *s, void *dhidden);

#endif
