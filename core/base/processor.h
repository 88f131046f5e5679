/* What the compiler's own question about the processor does not answer. */
#ifndef USLI_BASE_PROCESSOR_H
#define USLI_BASE_PROCESSOR_H

#include <stdbool.h>

/* Whether this process may multiply with AMX's bfloat16 tiles: the processor has them, and the system has let us have
 * their registers, which it is asked for here. True only where AVX512_BF16 is too. */
bool usli_may_use_amx(void);

#endif
