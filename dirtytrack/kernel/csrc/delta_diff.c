/* SPDX-License-Identifier: MIT
 * Making a delta: the changed granules of dirty pages against a mirror. */
#include "delta.h"

#define BOUNCE_BLOCKS 16u /* 64 KiB: stays in the second-level cache between the copy and the comparison */
#define MOST_OPENING 10u  /* bytes of a number */
#define STREAK_AFTER 4u   /* blocks that changed as a whole: a streak's padding is a small part of them */
#define LIST_BYTES 2048u  /* of a streak's runs; when it is full another streak begins */

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

/* What a block may take beside its bytes, a run of its own in a streak being less; and a quarter of a streak's head, since
 * more blocks than that come before. */
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

/* Blocks that changed as a whole, whose bytes lie in one piece: where it is open, and what is to stand behind it. */
typedef struct streak {
    uint8_t *head; /* NULL: there is none */
    uint32_t blocks;
    uint64_t run; /* so many of them since the last gap */
    uint8_t *end; /* of the list */
    uint8_t list[LIST_BYTES];
} streak;

typedef struct differ {
    dt_delta_grid grid;
    uint8_t *mirror;
    bool update;
    bool large;     /* more than caches hold: worth streaming past them */
    bool differed;  /* the last block did: the next one probably does */
    uint32_t fulls; /* so many blocks before this one changed as a whole, and it probably did too */
    uint8_t *at;    /* the end of what is encoded */
    uint64_t next;  /* the block after the last one that was encoded */
    streak streak;
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

static void end_streak(differ *d)
{
    streak *s = &d->streak;
    if (!s->head)
        return;
    memcpy(s->head, &s->blocks, 4);
    s->end = dt_delta_put_number(s->end, s->run);
    size_t bytes = (size_t)(s->end - s->list);
    memcpy(d->at, s->list, bytes);
    d->at += bytes;
    s->head = NULL;
}

/* A block that probably changed as a whole: its bytes are put where they belong in a streak, and into the mirror, while it
 * is compared. If it did not change so, `mask` and `copy` are as after dt_delta_snapshot. */
static enum dt_delta_change encode_whole(differ *d, dt_delta_part part, uint64_t gap, uint8_t *copy, uint64_t *mask)
{
    streak *s = &d->streak;
    if (s->head && (s->end + 2 * MOST_OPENING > s->list + LIST_BYTES - MOST_OPENING || s->blocks == UINT32_MAX))
        end_streak(d);
    uint8_t *place = d->at, *head = s->head;
    if (!head) {
        head = dt_delta_put_opening(place, gap, DELTA_STREAK);
        place = (uint8_t *)dt_up((uintptr_t)head + DELTA_STREAK_HEAD, 64);
    }
    part.to = place;
    part.past = d->large;
    part.update = d->update ? (uint8_t *)(uintptr_t)part.mirror : NULL;
    enum dt_delta_change change = dt_delta_snapshot(&part, DELTA_BLOCK, d->grid.shift, mask);
    if (change != DELTA_ALL) {
        dt_delta_stream_end(); /* before something else is written there */
        memcpy(copy, place, DELTA_BLOCK);
        return change;
    }
    if (!s->head) {
        uint8_t padding = (uint8_t)(place - head - DELTA_STREAK_HEAD);
        head[4] = padding;
        memset(head + DELTA_STREAK_HEAD, 0, padding);
        s->head = head;
        s->blocks = 0;
        s->run = 0;
        s->end = s->list;
    } else if (gap) {
        s->end = dt_delta_put_number(dt_delta_put_number(s->end, s->run), gap);
        s->run = 0;
    }
    s->blocks++;
    s->run++;
    d->at = place + DELTA_BLOCK;
    return change;
}

/* A block of which the part at `from`, up to `to`, may have changed. */
static void encode(differ *d, uint64_t block, dt_delta_part *part, uint64_t from, uint64_t to)
{
    uint8_t copy[DELTA_BLOCK + DELTA_PAD] __attribute__((aligned(64)));
    uint64_t mask[DELTA_WORDS], gap = block - d->next, start = dt_delta_block_start(&d->grid, block);
    uint32_t bytes = (uint32_t)(dt_delta_block_end(&d->grid, block) - start), n = dt_delta_granules(&d->grid, bytes);
    uint32_t at = (uint32_t)(from - start);
    unsigned shift = d->grid.shift;
    bool whole = to - from == DELTA_BLOCK;
    enum dt_delta_change change;
    /* SAFETY: what is encoded and what the mirror gets is this copy, or else what encode_whole() holds in registers: each
     * byte was read once. A writer beside us may tear it, but not part the mirror from the delta; and the page is dirty
     * again then. */
    if (whole && d->fulls >= STREAK_AFTER) {
        change = encode_whole(d, *part, gap, copy, mask);
        if (change == DELTA_ALL) {
            d->next = block + 1;
            return;
        }
    } else {
        part->to = copy + at;
        change = dt_delta_snapshot(part, (uint32_t)(to - from), shift, mask);
    }
    end_streak(d);
    d->differed = change != DELTA_SAME;
    d->fulls = change == DELTA_ALL && whole ? d->fulls + 1 : 0;
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
    differ d;
    d = (differ){.grid = grid_of(memory, granule), .mirror = memory->mirror, .at = out + DELTA_HEADER};
    d.update = update && !bounce; /* where it may fail midway the mirror waits for the end */
    d.large = needed >= dt_delta_stream_bytes;
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
    end_streak(&d);
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
