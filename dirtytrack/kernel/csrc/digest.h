/* SPDX-License-Identifier: MIT
 * Whether a page is what it was: by its copy, or by a keyed hash of 128 bits. */
#ifndef DIRTYTRACK_DIGEST_H
#define DIRTYTRACK_DIGEST_H
#include "internal.h"

typedef struct dt_digest { uint64_t first, second; } dt_digest;

/* `bytes` is a multiple of 256 in all of these. Each byte of memory is read once: what a page is said to be is then what
 * it was, word by word, while it was read, whoever writes it meanwhile. */
/* far: neither of both is likely to be in a cache, so ask for what comes next. */
typedef bool (*dt_same)(const uint8_t *memory, const uint8_t *copy, uint64_t bytes, bool far);
bool dt_is_zero(const uint8_t *memory, uint64_t bytes);
/* `key`: bytes + DT_KEY_EXTRA random bytes. */
typedef dt_digest (*dt_digester)(const uint8_t *memory, uint64_t bytes, const uint8_t *key);
#define DT_KEY_EXTRA 16

/* The digest of what is copied meanwhile: one pass over memory instead of two. */
typedef dt_digest (*dt_copier)(const uint8_t *memory, uint64_t bytes, const uint8_t *key, uint8_t *out);

/* What is quickest on this processor, or what runs on each; their digests are the same. */
dt_same dt_choose_same(bool plain);
dt_digester dt_choose_digester(bool plain);
dt_copier dt_choose_copier(bool plain);
#endif
