/* SPDX-License-Identifier: MIT
 * What the tests of the core without sessions share: numbers at random, pages, counted checks. */
#ifndef DT_TESTS_CHECKING_H
#define DT_TESTS_CHECKING_H

#include "internal.h" /* first: it asks for GNU names */
#include "counting.h"
#include <sys/mman.h>

static uint64_t random_state = 0x9E3779B97F4A7C15u;
static inline uint64_t random_below(uint64_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (random_state >> 11) % n;
}

static uint64_t page_bytes;

static inline uint8_t *map_pages(uint64_t pages)
{
    uint8_t *p = mmap(NULL, pages * page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        abort();
    return p;
}

#endif
