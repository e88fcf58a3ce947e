/* SPDX-License-Identifier: MIT
 * Deltas, once they are made: applied, composed, and asked what they hold. */
#include "delta.h"

/* ---- checking and applying ---- */

int dt_delta_check(const uint8_t *delta, uint64_t length, dt_delta_info *out, dt_failure *why)
{
    dt_delta_reader r;
    dt_delta_block b;
    int code = dt_delta_open(&r, delta, length, why);
    if (code)
        return code;
    dt_delta_info info = {.target_bytes = r.grid.target, .granule_bytes = 1u << r.grid.shift};
    while ((code = dt_delta_next(&r, &b, why)) == 1) {
        info.changed_bytes += b.changed_bytes;
        for (uint32_t from = 0, to = 0; dt_delta_mask_run(b.mask, b.granules, &from, &to);)
            info.pieces++;
    }
    if (!code)
        *out = info;
    return code;
}

/* Most runs are of one granule: no call for those. */
static inline void store(uint8_t *to, const uint8_t *from, uint32_t bytes)
{
    switch (bytes) {
    case 2:
        memcpy(to, from, 2);
        break;
    case 4:
        memcpy(to, from, 4);
        break;
    case 8:
        memcpy(to, from, 8);
        break;
    default:
        memcpy(to, from, bytes);
    }
}

/* The bytes that a run of a block's granules covers, from the block's start. */
static inline uint32_t run_bytes(const dt_delta_reader *r, const dt_delta_block *b, uint32_t from, uint32_t to,
                                 uint32_t *start)
{
    *start = from << r->grid.shift;
    return (uint32_t)dt_min((uint64_t)to << r->grid.shift, b->bytes) - *start;
}

int dt_delta_apply(const uint8_t *delta, uint64_t length, const dt_extent *target, dt_failure *why)
{
    dt_delta_reader r;
    dt_delta_block b;
    dt_delta_info info;
    int code = dt_delta_check(delta, length, &info, why); /* all of it, before a byte is written */
    if (code)
        return code;
    if (info.target_bytes != target->nbytes)
        return dt_fail_with(why, DT_TOO_SMALL, 0, DT_STEP_COPY, 0, 0);
    int fail = dt_fail_at(DT_SITE_COPY);
    if (DT_UNLIKELY(fail))
        return dt_fail_with(why, -abs(fail), abs(fail), DT_STEP_COPY, target->address, target->address + target->nbytes);
    dt_delta_open(&r, delta, length, why);
    /* Should somebody change the delta meanwhile, what the reader returns still lies within both. */
    if (r.grid.target != target->nbytes)
        return dt_fail_with(why, DT_MALFORMED, 0, DT_STEP_NONE, 0, 0);
    while ((code = dt_delta_next(&r, &b, why)) == 1) {
        const uint8_t *data = b.data;
        for (uint32_t from = 0, to = 0, start; dt_delta_mask_run(b.mask, b.granules, &from, &to);) {
            uint32_t bytes = run_bytes(&r, &b, from, to, &start);
            uint64_t address = target->address + b.start + start;
            if (target->unpinned) {
                code = dt_copy_vanishing(true, (uint8_t *)(uintptr_t)data, address, bytes, why); /* only read */
                if (code)
                    return code;
            } else {
                /* SAFETY: the reader's blocks lie within the target's bytes, which the caller holds. */
                store((uint8_t *)(uintptr_t)address, data, bytes);
            }
            data += bytes;
        }
    }
    return code;
}

/* ---- what it holds ---- */

uint64_t dt_delta_pieces(const uint8_t *delta, uint64_t length, dt_piece *out, uint64_t room)
{
    dt_delta_reader r;
    dt_delta_block b;
    uint64_t found = 0;
    if (dt_delta_open(&r, delta, length, NULL))
        return 0;
    while (dt_delta_next(&r, &b, NULL) == 1) {
        uint64_t at = (uint64_t)(b.data - delta);
        for (uint32_t from = 0, to = 0, start; dt_delta_mask_run(b.mask, b.granules, &from, &to);) {
            uint32_t bytes = run_bytes(&r, &b, from, to, &start);
            if (found < room)
                out[found] = (dt_piece){b.start + start, bytes, at};
            found++;
            at += bytes;
        }
    }
    return found;
}

uint64_t dt_delta_rows(const uint8_t *delta, uint64_t length, uint64_t offset, uint64_t row_bytes, uint64_t rows,
                       uint64_t *out, uint64_t room, uint8_t *marks)
{
    dt_delta_reader r;
    dt_delta_block b;
    uint64_t found = 0, next = 0; /* the first row that is not told yet */
    if (dt_delta_open(&r, delta, length, NULL))
        return 0;
    while (dt_delta_next(&r, &b, NULL) == 1 && next < rows) {
        for (uint32_t from = 0, to = 0, start; dt_delta_mask_run(b.mask, b.granules, &from, &to);) {
            uint64_t bytes = run_bytes(&r, &b, from, to, &start), at = b.start + start;
            if (at + bytes <= offset)
                continue;
            uint64_t first = at > offset ? (at - offset) / row_bytes : 0;
            uint64_t last = dt_min((at + bytes - offset - 1) / row_bytes + 1, rows);
            for (first = dt_max(first, next); first < last; first++) {
                if (found < room)
                    out[found] = first;
                if (marks)
                    marks[first] = 1;
                found++;
            }
            next = dt_max(next, last);
        }
    }
    return found;
}

/* ---- composing ---- */

typedef struct cursor {
    dt_delta_reader reader;
    dt_delta_block block;
    uint32_t from, to;    /* granules of the block */
    uint64_t start, end;  /* the run, as byte offsets; start == end: there is no more */
    const uint8_t *data;
    int code;
} cursor;

static void advance(cursor *c, dt_failure *why)
{
    while (!dt_delta_mask_run(c->block.mask, c->block.granules, &c->from, &c->to)) {
        c->code = dt_delta_next(&c->reader, &c->block, why);
        if (c->code != 1) {
            c->start = c->end = UINT64_MAX;
            return;
        }
        c->from = c->to = 0;
        c->data = c->block.data;
    }
    uint32_t start, bytes = run_bytes(&c->reader, &c->block, c->from, c->to, &start);
    c->start = c->block.start + start;
    c->end = c->start + bytes;
}

static int begin(cursor *c, const uint8_t *delta, uint64_t length, dt_failure *why)
{
    memset(c, 0, sizeof *c);
    int code = dt_delta_open(&c->reader, delta, length, why);
    if (!code) {
        advance(c, why);
        code = c->code < 0 ? c->code : 0;
    }
    return code;
}

/* Lays a delta's runs in [start, end) over the block's copy. */
static int lay(cursor *c, uint64_t start, uint64_t end, const dt_delta_grid *g, uint8_t *copy, uint64_t *mask,
               dt_failure *why)
{
    while (c->start < end) {
        uint64_t stop = dt_min(c->end, end), bytes = stop - c->start, at = c->start - start;
        memcpy(copy + at, c->data, bytes);
        dt_delta_mask_set(mask, (uint32_t)(at >> g->shift), dt_delta_granules(g, at + bytes));
        c->data += bytes;
        c->start = stop;
        if (stop == c->end)
            advance(c, why);
    }
    return c->code < 0 ? c->code : 0;
}

int dt_delta_compose(const uint8_t *first, uint64_t first_length, const uint8_t *second, uint64_t second_length,
                     uint8_t *out, uint64_t room, uint64_t *length, dt_failure *why)
{
    uint8_t copy[DELTA_BLOCK + DELTA_PAD], scratch[2 * DELTA_BLOCK];
    uint64_t mask[DELTA_WORDS];
    cursor a, b;
    int code = begin(&a, first, first_length, why);
    if (!code)
        code = begin(&b, second, second_length, why);
    if (code)
        return code;
    if (a.reader.grid.target != b.reader.grid.target)
        return dt_fail_with(why, -EINVAL, 0, DT_STEP_NONE, 0, 0);
    dt_delta_grid g = b.reader.grid;
    g.shift = (uint32_t)dt_min(g.shift, a.reader.grid.shift);
    uint64_t total = DELTA_HEADER, next = 0;
    if (out && room < DELTA_HEADER)
        return dt_fail_with(why, DT_TOO_SMALL, 0, DT_STEP_COPY, 0, 0);
    if (out)
        dt_delta_put_header(out, &g);
    while (a.start != UINT64_MAX || b.start != UINT64_MAX) {
        uint64_t block = dt_delta_block_of(&g, dt_min(a.start, b.start));
        uint64_t start = dt_delta_block_start(&g, block), end = dt_delta_block_end(&g, block);
        memset(mask, 0, sizeof mask);
        code = lay(&a, start, end, &g, copy, mask, why);
        if (!code)
            code = lay(&b, start, end, &g, copy, mask, why);
        if (code)
            return code;
        uint32_t bytes = (uint32_t)(end - start), n = dt_delta_granules(&g, bytes);
        uint8_t *done = dt_delta_put_block(scratch, block - next, mask, n, copy, bytes, g.shift);
        uint64_t made = (uint64_t)(done - scratch);
        if (out && room - total < made)
            return dt_fail_with(why, DT_TOO_SMALL, 0, DT_STEP_COPY, 0, 0);
        if (out)
            memcpy(out + total, scratch, made);
        total += made;
        next = block + 1;
    }
    *length = total;
    return 0;
}
