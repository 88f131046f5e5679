/* Numbers as text, with a point between the digits whatever locale the host has set. */
#ifndef USLI_BASE_NUMBER_H
#define USLI_BASE_NUMBER_H

enum { USLI_NUMBER_TEXT = 40, USLI_NUMBER_FIXED = 400 };

double usli_number_parse(const char *text);
/* The shortest digits that read back the same, spelled as Python spells them: 0.1, 1.0, 1e-05, 1e+16. v is finite. */
void usli_number_text(double v, char out[USLI_NUMBER_TEXT]);
/* That many digits behind the point, 0 to 60; v is finite. */
void usli_number_fixed(double v, int digits, char out[USLI_NUMBER_FIXED]);

#endif
