/* The lattices of ggml's types below four bits: eight (or four) values share one number, which is the place of a point
 * in a list. A point is its digits, the first in the lowest bits; levels say what a digit stands for. Points are in
 * ascending order, so those that share their higher half lie side by side: a run. */
#ifndef USLI_QUANT_GRIDS_H
#define USLI_QUANT_GRIDS_H

#include <stdint.h>

typedef struct usli_grid {
    const uint16_t *points; /* (count) */
    int count, digits, bits;
    float levels[8];
} usli_grid;

extern const usli_grid usli_grid_iq2_xxs, usli_grid_iq2_xs, usli_grid_iq2_s, usli_grid_iq3_xxs, usli_grid_iq3_s,
    usli_grid_iq1;

enum { USLI_MOST_RUNS = 81, USLI_MOST_POINTS = 2048, USLI_NO_RUN = 255 };

/* The list as a search wants it: of each run its higher half, where it starts, and the lower halves. */
typedef struct usli_runs {
    int count;
    uint8_t of[256]; /* the run of a higher half, or USLI_NO_RUN */
    uint8_t high[USLI_MOST_RUNS];
    uint16_t start[USLI_MOST_RUNS + 1];
    uint8_t low[USLI_MOST_POINTS];
} usli_runs;

void usli_runs_of(const usli_grid *grid, usli_runs *out);

#endif
