/* SPDX-License-Identifier: MIT
 * Deltas: the changed granules of dirty pages against a mirror, applied, composed, and asked what they hold. */
#include "delta.h"

#define BOUNCE_BLOCKS 16u /* 64 KiB: stays in the second-level cache between the copy and the comparison */
#define MOST_OPENING 10u  /* bytes of a number */
#define STREAK_AFTER 4u   /* blocks that changed as a whole: a streak's padding is a small part of them */

static uint64_t extent_end(const dt_extent *extent)
{
    uint64_t end = extent->address + extent->nbytes;
    return end < extent->address ? UINT64_MAX : end;
}

/* ---- the windows of a memory that a set covers, in whole granules ---- */

typedef struct windows {
    const dt_set *set; /* NULL: everything, once */
    const dt_extent *memory;
    uint64_t granule, i;
} windows;

static windows windows_of(const dt_set *set, const dt_extent *memory, uint32_t granule)
{
    return (windows){set, memory, granule, set ? dt_set_first(set, memory->address) : 0};
}

/* Byte offsets [*from, *to). Two windows never share a block: runs of a set do not touch, so a page lies between. */
static bool next_window(windows *w, uint64_t *from, uint64_t *to)
{
    uint64_t address = w->memory->address, nbytes = w->memory->nbytes;
    if (!w->set) {
        *from = 0;
        *to = nbytes;
        return !w->i++ && nbytes;
    }
    if (w->i == w->set->count || w->set->runs[w->i].start >= extent_end(w->memory))
        return false;
    dt_run run = w->set->runs[w->i++];
    *from = dt_down(dt_max(run.start, address) - address, w->granule);
    *to = dt_min(dt_up(dt_min(run.end, extent_end(w->memory)) - address, w->granule), nbytes);
    return true;
}

/* What a block may take beside its bytes; and a quarter of a streak's head, since more blocks than that come before. */
#define ROOM_FOR_BLOCK (MOST_OPENING + DELTA_BLOCK / 512 + 1 + (1 + DELTA_STREAK_HEAD + DELTA_MOST_PADDING) / STREAK_AFTER)

static bool is_granule(uint32_t bytes) { return bytes && !(bytes & (bytes - 1)) && bytes <= 1u << DELTA_MOST_SHIFT; }

static dt_delta_grid grid_of(const dt_extent *memory, uint32_t granule)
{
    uint32_t phase = (uint32_t)(memory->address % DELTA_BLOCK) & ~(granule - 1);
    return (dt_delta_grid){memory->nbytes, phase, (uint32_t)__builtin_ctz(granule)};
}

uint64_t dt_delta_room(const dt_set *set, const dt_extent *memory, uint32_t granule)
{
    if (!is_granule(granule))
        return UINT64_MAX;
    dt_delta_grid grid = grid_of(memory, granule);
    uint64_t from, to, room = DELTA_HEADER + DELTA_PAD;
    for (windows w = windows_of(set, memory, granule); next_window(&w, &from, &to);) {
        uint64_t blocks = dt_delta_block_of(&grid, to - 1) - dt_delta_block_of(&grid, from) + 1;
        room += to - from + blocks * ROOM_FOR_BLOCK;
    }
    return room;
}

/* ---- diff ---- */

typedef struct differ {
    dt_delta_grid grid;
    uint8_t *mirror;
    bool update;
    bool large;     /* more than caches hold: worth streaming past them */
    bool differed;  /* the last block did: the next one probably does */
    uint32_t fulls; /* so many blocks before this one changed as a whole, and it probably did too */
    uint8_t *at;    /* the end of what is encoded */
    uint64_t next;  /* the block after the last one that was encoded */
    uint8_t *streak;        /* where the streak that is open has its count, or NULL */
    uint32_t streak_blocks; /* that count */
} differ;

/* Bytes that can be compared: [from, to) of the memory, which begin at `now`; and where it goes on. */
typedef struct window {
    uint64_t from, to, next; /* next: where the window behind it begins, or any other offset */
    const uint8_t *now, *next_now;
} window;

static void update_mirror(uint8_t *mirror, const uint64_t *mask, uint32_t n, const uint8_t *copy, uint32_t bytes,
                          unsigned shift)
{
    for (uint32_t from = 0, to = 0; dt_delta_mask_run(mask, n, &from, &to);) {
        uint32_t start = from << shift, end = (uint32_t)dt_min((uint64_t)to << shift, bytes);
        memcpy(mirror + start, copy + start, end - start);
    }
}

static bool is_full(const uint64_t *mask, uint32_t n)
{
    uint64_t all = ~UINT64_C(0);
    for (uint32_t i = 0; i < n / 64; i++)
        all &= mask[i];
    return !~all && (n % 64 == 0 || mask[n / 64] == ((uint64_t)1 << n % 64) - 1);
}

/* A block that probably changed as a whole: its bytes are put where they belong in the delta while it is compared. False:
 * it did not, and `mask` and `copy` are as after dt_delta_snapshot; or nothing differs, and then there is no copy. */
static bool encode_whole(differ *d, dt_delta_part part, uint64_t gap, uint8_t *copy, uint64_t *mask, bool *differs)
{
    uint8_t opening[MOST_OPENING], *place = d->at;
    bool streak = d->fulls >= STREAK_AFTER && !gap, stream = streak && d->large;
    if (!streak)
        place += dt_delta_put_opening(opening, gap, DELTA_FULL) - opening;
    else if (!d->streak)
        place = (uint8_t *)dt_up((uintptr_t)place + 1 + DELTA_STREAK_HEAD, 64);
    part.stream = stream ? place : NULL;
    part.update = stream && d->update ? (uint8_t *)(uintptr_t)part.mirror : NULL;
    *differs = dt_delta_snapshot(&part, place, DELTA_BLOCK, d->grid.shift, mask);
    bool full = *differs && is_full(mask, DELTA_BLOCK >> d->grid.shift);
    if (!full) {
        if (stream)
            dt_delta_stream_end(); /* before something else is written there */
        memcpy(copy, place, DELTA_BLOCK);
        return false;
    }
    if (!streak) {
        dt_delta_put_opening(d->at, gap, DELTA_FULL);
    } else if (!d->streak) {
        uint8_t *head = dt_delta_put_opening(d->at, 0, DELTA_STREAK);
        uint8_t padding = (uint8_t)(place - head - DELTA_STREAK_HEAD);
        head[4] = padding;
        memset(head + DELTA_STREAK_HEAD, 0, padding);
        d->streak = head;
        d->streak_blocks = 0;
    }
    if (d->streak) {
        d->streak_blocks++;
        memcpy(d->streak, &d->streak_blocks, 4);
    }
    if (d->update && !stream)
        memcpy((uint8_t *)(uintptr_t)part.mirror, place, DELTA_BLOCK);
    d->at = place + DELTA_BLOCK;
    return true;
}

/* A block of which the part at `from`, up to `to`, may have changed. */
static void encode(differ *d, uint64_t block, const dt_delta_part *part, uint64_t from, uint64_t to)
{
    uint8_t copy[DELTA_BLOCK + DELTA_PAD] __attribute__((aligned(64)));
    uint64_t mask[DELTA_WORDS], gap = block - d->next, start = dt_delta_block_start(&d->grid, block);
    uint32_t bytes = (uint32_t)(dt_delta_block_end(&d->grid, block) - start), n = dt_delta_granules(&d->grid, bytes);
    uint32_t at = (uint32_t)(from - start);
    unsigned shift = d->grid.shift;
    bool whole = to - from == DELTA_BLOCK;
    if (gap || !whole)
        d->streak = NULL;
    /* SAFETY: what is encoded and what the mirror gets is this copy, of which each byte was read once. A writer beside us
     * may tear it, but not part the mirror from the delta; and the page is dirty again then. */
    if (d->fulls && whole) {
        if (encode_whole(d, *part, gap, copy, mask, &d->differed)) {
            d->next = block + 1;
            d->fulls++;
            return;
        }
    } else {
        d->differed = dt_delta_snapshot(part, copy + at, (uint32_t)(to - from), shift, mask);
    }
    d->streak = NULL;
    d->fulls = d->differed && whole && is_full(mask, n);
    if (!d->differed)
        return;
    if (to - from < bytes) { /* the block is clean but for a part: its bits go where they belong */
        uint64_t bits[DELTA_WORDS];
        uint32_t part_granules = dt_delta_granules(&d->grid, to - from), first = at >> shift;
        memcpy(bits, mask, (part_granules + 63) / 64 * sizeof *bits);
        memset(mask, 0, (n + 63) / 64 * sizeof *mask);
        for (uint32_t a = 0, b = 0; dt_delta_mask_run(bits, part_granules, &a, &b);)
            dt_delta_mask_set(mask, first + a, first + b);
    }
    d->at = dt_delta_put_block(d->at, gap, mask, n, copy, bytes, shift);
    d->next = block + 1;
    if (d->update)
        update_mirror(d->mirror + start, mask, n, copy, bytes, shift);
}

static void diff_window(differ *d, const window *w)
{
    const uint8_t *now = w->now;
    uint64_t block = dt_delta_block_of(&d->grid, w->from);
    for (uint64_t from = w->from, end; from < w->to; from = end, block++) {
        end = dt_min(dt_delta_block_end(&d->grid, block), w->to);
        bool last = end == w->to;
        dt_delta_part part = {.now = now, .mirror = d->mirror + from};
        part.next_now = last ? w->next_now : now + (end - from);
        part.next_mirror = d->mirror + (last ? w->next : end);
        for (uint32_t i = 0; !d->differed && i < 4 * 64; i += 64) { /* scattered pages: the walk to the next one's bytes */
            __builtin_prefetch(part.next_now + i, 0, 2);
            __builtin_prefetch(part.next_mirror + i, 0, 2);
        }
        if (d->differed || !dt_same_bytes(now, part.mirror, end - from))
            encode(d, block, &part, from, end);
        now += end - from;
    }
}

/* The same of memory that may vanish, which the kernel copies first; or of which a session that compares knows the bytes. */
static int diff_copied(differ *d, const dt_extent *memory, uint8_t *bounce, uint64_t from, uint64_t to,
                          dt_failure *why)
{
    for (uint64_t end; from < to; from = end) {
        end = dt_min(dt_delta_block_end(&d->grid, dt_delta_block_of(&d->grid, from) + BOUNCE_BLOCKS - 1), to);
        uint64_t at = memory->address + from;
        int code = memory->through ? dt_compare_copy(memory->through, at, end - from, bounce, why)
                                   : dt_copy_vanishing(false, bounce, at, end - from, why);
        if (code)
            return code;
        diff_window(d, &(window){.from = from, .to = end, .next = from, .now = bounce, .next_now = bounce});
    }
    return 0;
}

int dt_diff(const dt_set *set, const dt_extent *memory, uint32_t granule, int update, uint8_t *out, uint64_t room,
            uint64_t *length, dt_failure *why)
{
    if (!is_granule(granule) || !memory->mirror || memory->nbytes > INT64_MAX)
        return dt_fail_with(why, -EINVAL, 0, DT_STEP_NONE, 0, 0);
    uint64_t needed = dt_delta_room(set, memory, granule);
    if (needed > room)
        return dt_fail_with(why, DT_TOO_SMALL, 0, DT_STEP_COPY, 0, 0);
    int fail = dt_fail_at(DT_SITE_COPY), code = 0;
    if (DT_UNLIKELY(fail))
        return dt_fail_with(why, -abs(fail), abs(fail), DT_STEP_COPY, memory->address, extent_end(memory));
    bool copied = memory->unpinned || memory->through;
    uint8_t *bounce = copied ? dt_alloc(BOUNCE_BLOCKS * DELTA_BLOCK) : NULL;
    if (copied && !bounce)
        return dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    if (memory->through && (code = dt_compare_begin_copy(memory->through, why))) {
        dt_free(bounce);
        return code;
    }
    differ d = {.grid = grid_of(memory, granule), .mirror = memory->mirror, .at = out + DELTA_HEADER};
    d.update = update && !bounce; /* where it may fail midway the mirror waits for the end */
    d.large = needed >= dt_delta_stream_bytes && dt_delta_streams();
    dt_delta_put_header(out, &d.grid);
    windows w = windows_of(set, memory, granule);
    uint64_t from, to, next, next_to;
    for (bool more = next_window(&w, &from, &to); more && !code; from = next, to = next_to) {
        more = next_window(&w, &next, &next_to);
        if (!more)
            next = from;
        /* SAFETY: pinned memory stays mapped for as long as the caller holds its pin. */
        const uint8_t *bytes = (const uint8_t *)(uintptr_t)memory->address;
        if (bounce)
            code = diff_copied(&d, memory, bounce, from, to, why);
        else
            diff_window(&d, &(window){from, to, next, bytes + from, bytes + next});
    }
    dt_delta_stream_end();
    if (memory->through)
        dt_compare_end_copy(memory->through);
    dt_free(bounce);
    uint64_t encoded = (uint64_t)(d.at - out);
    if (!code && update && !d.update) {
        dt_extent mirror = {.address = (uintptr_t)memory->mirror, .nbytes = memory->nbytes};
        code = dt_delta_apply(out, encoded, &mirror, why);
    }
    if (!code)
        *length = encoded;
    return code;
}

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
        return dt_fail_with(why, -abs(fail), abs(fail), DT_STEP_COPY, target->address, extent_end(target));
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
