/* SPDX-License-Identifier: MIT
 * Which words of a piece of memory point into a range: what words.c asks of words_scan.c. */
#ifndef DIRTYTRACK_WORDS_H
#define DIRTYTRACK_WORDS_H
#include "internal.h"

/* A word is one of those that are looked for where ((word & keep) - low) mod 2^n < span and (word & mask) == tag. Of 32-bit
 * slots only the low half of each number counts, and keep and mask take all or nothing. */
typedef struct dt_needle {
    uint64_t keep, low, span, mask, tag;
} dt_needle;

/* Writes where the words are that it finds among `words`, as base + their offset in bytes; `out` has room for all. Fetches
 * as much from `next` on. */
typedef uint64_t dt_scan_words(const uint8_t *from, const uint8_t *next, uint64_t words, dt_needle needle, uint64_t base,
                               uint64_t *out);

/* The ways to do it, the best first; the last is plain C. For tests: one works here or not, and may be forced; -1 is the
 * best again. */
unsigned dt_words_ways(void);
int dt_words_way_works(unsigned way);
void dt_words_use_way(int way);

dt_scan_words *dt_words_scanner(bool narrow); /* narrow: 32-bit slots */
#endif
