/* SPDX-License-Identifier: MIT
 * The bytes of a set's pages, piece by piece: from where they are where that cannot vanish, else from a copy. */
#include "reading.h"

#define BOUNCE_BYTES ((uint64_t)64 << 10) /* stays in the second-level cache between the copy and its reading */

typedef struct reader {
    dt_read_piece *piece;
    void *context;
    uint8_t *bounce; /* made when it is first needed */
    dt_failure *why;
} reader;

/* after: where the next run begins, or where this one does. */
static int read_run(reader *r, const dt_extent *extent, uint64_t at, uint64_t end, uint64_t after)
{
    uint64_t page = dt_page_bytes();
    /* SAFETY: pinned memory stays mapped for as long as the caller holds its pin; a prefetch faults nowhere. */
    dt_piece_read p = {.of = extent};
    for (uint64_t next; at < end; at = next) {
        next = dt_min(dt_down(at, page) + page, end);
        p.bytes = (const uint8_t *)(uintptr_t)at;
        p.next = (const uint8_t *)(uintptr_t)(next < end ? next : after);
        p.address = at;
        p.nbytes = next - at;
        int code = r->piece(r->context, &p);
        if (code)
            return code;
    }
    return 0;
}

static int copy_run(reader *r, const dt_extent *extent, uint64_t at, uint64_t end)
{
    uint64_t page = dt_page_bytes();
    if (!r->bounce && !(r->bounce = dt_alloc(BOUNCE_BYTES)))
        return dt_fail_with(r->why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    while (at < end) {
        uint64_t stop = dt_min(dt_down(at, page) + BOUNCE_BYTES, end);
        dt_piece_read p = {.bytes = r->bounce, .next = r->bounce, .of = extent};
        int code = extent->through ? dt_compare_copy(extent->through, at, stop - at, r->bounce, r->why)
                                   : dt_copy_vanishing(false, r->bounce, at, stop - at, r->why);
        for (uint64_t next; at < stop && !code; p.bytes += next - at, at = next) {
            next = dt_min(dt_down(at, page) + page, stop);
            p.address = at;
            p.nbytes = next - at;
            code = r->piece(r->context, &p);
        }
        if (code)
            return code;
    }
    return 0;
}

static int read_extent(reader *r, const dt_set *set, uint64_t i, const dt_extent *extent)
{
    uint64_t end = extent->address + extent->nbytes;
    int code = 0;
    for (; i < set->count && set->runs[i].start < end && !code; i++) {
        uint64_t from = dt_max(set->runs[i].start, extent->address), to = dt_min(set->runs[i].end, end);
        if (extent->unpinned || extent->through)
            code = copy_run(r, extent, from, to);
        else
            code = read_run(r, extent, from, to, i + 1 < set->count ? set->runs[i + 1].start : from);
    }
    return code;
}

int dt_read_pieces(const dt_set *set, const dt_extent *extents, uint64_t n, dt_read_piece *piece, void *context,
                   dt_failure *why)
{
    reader r = {.piece = piece, .context = context, .why = why};
    int code = 0;
    for (uint64_t i = 0; i < n && !code; i++) {
        const dt_extent *extent = extents + i;
        uint64_t first = dt_set_first(set, extent->address);
        if (first >= set->count || set->runs[first].start >= extent->address + extent->nbytes)
            continue;
        int fail = dt_fail_at(DT_SITE_COPY);
        if (extent->through)
            code = dt_compare_begin_copy(extent->through, why);
        if (fail <= 0 && !code)
            code = read_extent(&r, set, first, extent);
        if (extent->through && code != DT_CLOSED && code != DT_FORKED)
            dt_compare_end_copy(extent->through);
        if (DT_UNLIKELY(fail && !code))
            code = dt_fail_with(why, -abs(fail), abs(fail), DT_STEP_COPY, extent->address,
                                extent->address + extent->nbytes);
    }
    dt_free(r.bounce);
    return code;
}
