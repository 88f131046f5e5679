/* SHA-256 and SHA-1 of bytes that come in pieces: what the hub names and checks its files by, no protection against
 * anybody. */
#ifndef USLI_BASE_DIGEST_H
#define USLI_BASE_DIGEST_H

#include <stddef.h>
#include <stdint.h>

typedef enum usli_digest_kind { USLI_SHA1, USLI_SHA256 } usli_digest_kind;
enum { USLI_DIGEST_HEX = 65 }; /* room for either in hexadecimal, with its 0 */

typedef struct usli_digest {
    usli_digest_kind kind;
    uint32_t state[8];
    uint64_t size;
    uint8_t block[64];
} usli_digest;

void usli_digest_init(usli_digest *d, usli_digest_kind kind);
void usli_digest_add(usli_digest *d, const void *data, size_t size);
/* hex: 40 or 64 lower-case digits and a 0. */
void usli_digest_end(usli_digest *d, char hex[USLI_DIGEST_HEX]);
/* The head that git puts before a file's bytes; the SHA-1 of both is the blob's name. */
void usli_digest_git_blob(usli_digest *d, uint64_t size);

#endif
