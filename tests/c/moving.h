/* SPDX-License-Identifier: MIT
 * Memory whose pages move, with the digests of what it was at first: nothing but zeros. */
#ifndef DT_TESTS_MOVING_H
#define DT_TESTS_MOVING_H

#include "checking.h"

static uint8_t key[65536 + 16];

static void make_key(void)
{
    for (uint64_t i = 0; i < sizeof key; i++)
        key[i] = (uint8_t)random_below(256);
}

/* table: two words a page. */
static dt_moving moving_over(uint8_t *bytes, uint64_t nbytes, uint64_t phase, uint64_t *table)
{
    static const uint8_t zeros[4096];
    dt_moving made = {.memory = {.address = (uintptr_t)bytes, .nbytes = nbytes, .unpinned = (uint32_t)random_below(2)},
                      .phase = phase,
                      .page_bytes = page_bytes,
                      .pages = (phase + nbytes + page_bytes - 1) / page_bytes,
                      .key = key,
                      .table = table};
    for (uint64_t i = 0; i < made.pages; i++)
        dt_page_digest(zeros, page_bytes, key, table + 2 * i);
    return made;
}

#endif
