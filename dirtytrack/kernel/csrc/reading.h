/* SPDX-License-Identifier: MIT
 * The bytes of a set's pages, piece by piece, wherever they are. */
#ifndef DIRTYTRACK_READING_H
#define DIRTYTRACK_READING_H
#include "internal.h"

/* `bytes` are those at `address`: the memory itself where it is pinned, else a copy that lives until the call returns. Within
 * one page. Anything but 0 ends the walk and is returned by it. */
typedef int dt_read_piece(void *context, const uint8_t *bytes, uint64_t address, uint64_t nbytes, const dt_extent *of);

/* Of sorted, disjoint extents every byte in the set's pages, in the order of addresses. */
int dt_read_pieces(const dt_set *set, const dt_extent *extents, uint64_t n, dt_read_piece *piece, void *context,
                   dt_failure *why);
#endif
