#define _GNU_SOURCE
#include "core/base/number.h"

#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The calling thread's locale becomes C's until it is put back; the other threads keep theirs. */
static locale_t enter_c(locale_t *c) {
    *c = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    return *c ? uselocale(*c) : (locale_t)0;
}

static void leave_c(locale_t c, locale_t old) {
    if (!c) return;
    uselocale(old);
    freelocale(c);
}

double usli_number_parse(const char *text) {
    locale_t c, old = enter_c(&c);
    double v = strtod(text, NULL);
    leave_c(c, old);
    return v;
}

void usli_number_text(double v, char out[USLI_NUMBER_TEXT]) {
    locale_t c, old = enter_c(&c);
    int digits = 1;
    do snprintf(out, USLI_NUMBER_TEXT, "%.*e", digits - 1, v);
    while (strtod(out, NULL) != v && ++digits <= 17);
    int exponent = atoi(strchr(out, 'e') + 1);
    if (exponent >= -4 && exponent < 16) {
        int decimals = digits - 1 - exponent;
        snprintf(out, USLI_NUMBER_TEXT, "%.*f", decimals > 0 ? decimals : 1, v);
    }
    leave_c(c, old);
}

void usli_number_fixed(double v, int digits, char out[USLI_NUMBER_FIXED]) {
    locale_t c, old = enter_c(&c);
    snprintf(out, USLI_NUMBER_FIXED, "%.*f", digits, v);
    leave_c(c, old);
}
