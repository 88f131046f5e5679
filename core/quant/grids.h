/* The lattices of ggml's types below four bits: eight (or four) values share one number, which is the place of a point
 * in a list. A point is its digits, the first in the lowest bits; levels say what a digit stands for. Points are in
 * ascending order, so those that share their higher half lie side by side; 32 of them at most are a run. */
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

enum { USLI_RUN = 32 /* points at most */, USLI_MOST_RUNS = 96, USLI_MOST_POINTS = 2048 };

/* The list as a search wants it. A point has four parts: pairs of digits of two bits, or digits of three. Of each run:
 * where it starts, the parts of its higher half, and those of the lower halves, the last of them repeated. Runs that
 * are not there repeat the first. */
typedef struct usli_runs {
    int count, points;
    uint8_t part[4][USLI_MOST_POINTS];
    uint16_t start[USLI_MOST_RUNS + 1];
    uint8_t high[2][USLI_MOST_RUNS], low[2][USLI_MOST_RUNS][USLI_RUN];
} usli_runs;

void usli_runs_of(const usli_grid *grid, usli_runs *out);

#endif
