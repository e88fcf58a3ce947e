/* SPDX-License-Identifier: MIT
 * The bytes of a set's pages, piece by piece, wherever they are. */
#ifndef DIRTYTRACK_READING_H
#define DIRTYTRACK_READING_H
#include "internal.h"

/* The bytes at `address`, within one page: the memory itself where it is pinned, else a copy that lives until the call
 * returns. What comes after them is not far from `next`, and worth fetching: the hardware's own guess ends with the page. */
typedef struct dt_piece_read {
    const uint8_t *bytes, *next;
    uint64_t address, nbytes;
    const dt_extent *of;
} dt_piece_read;

/* Anything but 0 ends the walk and is returned by it. */
typedef int dt_read_piece(void *context, const dt_piece_read *piece);

/* Of sorted, disjoint extents every byte in the set's pages, in the order of addresses. */
int dt_read_pieces(const dt_set *set, const dt_extent *extents, uint64_t n, dt_read_piece *piece, void *context,
                   dt_failure *why);
#endif
