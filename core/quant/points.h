/* What an encoder of points (core/quant/grids.h) is told of its type, and what it finds. */
#ifndef USLI_QUANT_POINTS_H
#define USLI_QUANT_POINTS_H

#include "core/quant/grids.h"

typedef enum usli_signs {
    USLI_SIGNS_FREE,  /* one for every value */
    USLI_SIGNS_EVEN,  /* of eight values an even number are minus */
    USLI_SIGNS_SHIFT, /* none: levels have their own, and are all moved by an eighth up or down, for each scale */
    USLI_SIGNS_SHIFTS /* the same for every eight values */
} usli_signs;

typedef struct usli_lattice {
    const usli_grid *grid;
    int span; /* values of a scale */
    int top;  /* the largest scale */
    usli_signs signs;
} usli_lattice;

/* 256 values: x = d (2 ls + 1) level. Bit k of signs[g] is the sign of value 8 g + k; a shift down sets all bits. */
typedef struct usli_points {
    uint16_t d;
    uint8_t ls[16];
    uint16_t at[64]; /* places in the grid */
    uint8_t signs[32];
} usli_points;

#endif
