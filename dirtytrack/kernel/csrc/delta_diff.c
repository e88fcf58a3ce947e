/* SPDX-License-Identifier: MIT
 * Making a delta: the changed granules of dirty pages against a mirror.
 *
 * Where there are many, their halves are encoded side by side: one processor has not as many loads on their way as memory
 * answers. The second half is put where it belongs if all of the first changed, and moved otherwise, when there is less to
 * move. With one processor they are encoded one after the other, in the same way: the bytes do not tell. */
#include "delta.h"
#include <sched.h>

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
    uint64_t granule, first, last, i; /* of them those in [first, last), where blocks begin */
} windows;

static windows windows_within(const dt_set *set, const dt_extent *memory, uint32_t granule, uint64_t first, uint64_t last)
{
    return (windows){set, memory, granule, first, last, set ? dt_set_first(set, memory->address + first) : 0};
}

static windows windows_of(const dt_set *set, const dt_extent *memory, uint32_t granule)
{
    return windows_within(set, memory, granule, 0, memory->nbytes);
}

/* Byte offsets [*from, *to). Two windows never share a block: runs of a set do not touch, so a page lies between. */
static bool next_window(windows *w, uint64_t *from, uint64_t *to)
{
    if (!w->set) {
        *from = w->first;
        *to = w->last;
        return !w->i++ && *from < *to;
    }
    uint64_t address = w->memory->address, begin = address + w->first, end = dt_min(address + w->last, extent_end(w->memory));
    if (begin >= end || w->i == w->set->count || w->set->runs[w->i].start >= end)
        return false;
    dt_run run = w->set->runs[w->i++];
    *from = dt_down(dt_max(run.start, begin) - address, w->granule);
    *to = dt_min(dt_up(dt_min(run.end, end) - address, w->granule), w->last);
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
    bool large;       /* more than caches hold: worth streaming past them */
    bool differed;    /* the last block did: the next one probably does */
    uint32_t fulls;   /* so many blocks before this one changed as a whole, and it probably did too */
    uint8_t *at;      /* the end of what is encoded */
    uint64_t next;    /* the block after the last one that was encoded */
    uintptr_t limit;  /* nothing is written at or behind it */
    uint8_t *spill;   /* TIGHT bytes, for what comes too near to that; */
    uint8_t *spilled; /* then that is where it belongs, and nothing is encoded behind it. NULL before */
    streak streak;
} differ;

/* What is before the limit for certain: the list of a streak and a block. */
#define TIGHT (LIST_BYTES + DELTA_BLOCK + ROOM_FOR_BLOCK + DELTA_PAD)

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

/* Everything that was encoded is there, for other threads too. */
static void finish(differ *d)
{
    end_streak(d);
    dt_delta_stream_end();
}

static uint32_t number_bytes(uint64_t n) { return (70 - (uint32_t)__builtin_clzll(n | 1)) / 7; }

static bool takes_more(const streak *s)
{
    return s->head && s->end + 2 * MOST_OPENING <= s->list + LIST_BYTES - MOST_OPENING && s->blocks < UINT32_MAX;
}

/* Whether a block may be added to the streak so that its list ends before the limit. */
static bool streak_fits(const differ *d, uint64_t gap)
{
    const streak *s = &d->streak;
    if (!takes_more(s))
        return false;
    uint64_t list = (uint64_t)(s->end - s->list);
    list += gap ? number_bytes(s->run) + number_bytes(gap) + 1 : number_bytes(s->run + 1);
    return (uintptr_t)d->at + DELTA_BLOCK + list <= d->limit;
}

/* Where the bytes of the next block of a streak go; `head`: of that streak, which begins here where d has none. */
static uint8_t *place_in_streak(differ *d, uint64_t gap, uint8_t **head)
{
    *head = d->streak.head;
    if (takes_more(&d->streak))
        return d->at;
    end_streak(d);
    *head = dt_delta_put_opening(d->at, gap, DELTA_STREAK);
    return (uint8_t *)dt_up((uintptr_t)*head + DELTA_STREAK_HEAD, 64);
}

/* The block is there. */
static void add_to_streak(differ *d, uint64_t gap, uint8_t *head, uint8_t *place)
{
    streak *s = &d->streak;
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
}

/* A block that probably changed as a whole: its bytes are put where they belong in a streak, and into the mirror, while it
 * is compared. If it did not change so, `mask` and `copy` are as after dt_delta_snapshot. */
static enum dt_delta_change encode_whole(differ *d, dt_delta_part part, uint64_t gap, uint8_t *copy, uint64_t *mask)
{
    uint8_t *head, *place = place_in_streak(d, gap, &head);
    part.to = place;
    part.past = d->large;
    part.update = d->update ? (uint8_t *)(uintptr_t)part.mirror : NULL;
    enum dt_delta_change change = dt_delta_snapshot(&part, DELTA_BLOCK, d->grid.shift, mask);
    if (change == DELTA_ALL) {
        add_to_streak(d, gap, head, place);
    } else {
        dt_delta_stream_end(); /* before something else is written there */
        memcpy(copy, place, DELTA_BLOCK);
    }
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
    bool whole = to - from == DELTA_BLOCK, tight = d->limit - (uintptr_t)d->at < TIGHT;
    enum dt_delta_change change;
    /* SAFETY: what is encoded and what the mirror gets is this copy, or else what encode_whole() holds in registers: each
     * byte was read once. A writer beside us may tear it, but not part the mirror from the delta; and the page is dirty
     * again then. */
    if (whole && d->fulls >= STREAK_AFTER && (!tight || streak_fits(d, gap))) {
        change = encode_whole(d, *part, gap, copy, mask);
        if (change == DELTA_ALL) {
            d->next = block + 1;
            return;
        }
    } else {
        part->to = copy + at;
        change = dt_delta_snapshot(part, (uint32_t)(to - from), shift, mask);
    }
    if (tight) {
        d->spilled = d->at;
        d->at = d->spill;
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

/* Returns how far it came: to its end, or where the differ spilled. */
static uint64_t diff_window(differ *d, const window *w)
{
    const uint8_t *now = w->now;
    uint64_t block = dt_delta_block_of(&d->grid, w->from), from = w->from;
    for (uint64_t end; from < w->to && !d->spilled; from = end, block++) {
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
    return from;
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

/* ---- a part of the windows ---- */

typedef struct portion {
    differ *d;
    windows w;
    const uint8_t *bytes; /* of the memory */
    uint64_t from, to;    /* of the window that it is in */
    bool more;            /* there is one */
} portion;

static portion portion_of(differ *d, windows w)
{
    /* SAFETY: pinned memory stays mapped for as long as the caller holds its pin. */
    portion p = {.d = d, .w = w, .bytes = (const uint8_t *)(uintptr_t)w.memory->address};
    p.more = next_window(&p.w, &p.from, &p.to);
    return p;
}

/* Up to the end of the portion, or until it spills: it goes on there when it is called again. */
static void *encode_portion(void *context)
{
    portion *p = context;
    while (p->more && !p->d->spilled) {
        windows behind = p->w;
        uint64_t next, next_to;
        bool more = next_window(&behind, &next, &next_to);
        if (!more)
            next = p->from;
        p->from = diff_window(p->d, &(window){p->from, p->to, next, p->bytes + p->from, p->bytes + next});
        if (p->from < p->to)
            break;
        p->w = behind;
        p->from = next;
        p->to = next_to;
        p->more = more;
    }
    finish(p->d);
    return NULL;
}

/* Comes to where encode_portion() does if all of it changed. What it writes there is to be written again. */
static void assume_changed(portion *p)
{
    static const uint8_t bytes[DELTA_BLOCK + DELTA_PAD];
    differ *d = p->d;
    for (; p->more; p->more = next_window(&p->w, &p->from, &p->to)) {
        uint64_t block = dt_delta_block_of(&d->grid, p->from);
        for (uint64_t from = p->from, end; from < p->to; from = end, block++) {
            end = dt_min(dt_delta_block_end(&d->grid, block), p->to);
            bool whole = end - from == DELTA_BLOCK;
            uint64_t gap = block - d->next;
            if (whole && d->fulls >= STREAK_AFTER) {
                uint8_t *head, *place = place_in_streak(d, gap, &head);
                add_to_streak(d, gap, head, place);
            } else {
                uint64_t mask[DELTA_WORDS] = {0}, start = dt_delta_block_start(&d->grid, block);
                uint32_t nbytes = (uint32_t)(dt_delta_block_end(&d->grid, block) - start);
                dt_delta_mask_set(mask, (uint32_t)(from - start) >> d->grid.shift, dt_delta_granules(&d->grid, end - start));
                end_streak(d);
                d->at = dt_delta_put_block(d->at, gap, mask, dt_delta_granules(&d->grid, nbytes), bytes, nbytes, d->grid.shift);
                d->fulls = whole ? d->fulls + 1 : 0;
            }
            d->next = block + 1;
        }
    }
    end_streak(d);
}

/* ---- two halves, side by side ---- */

uint64_t dt_delta_halves_bytes = (uint64_t)1 << 20;

/* Where a block begins with about as much before it as behind it. */
static uint64_t middle_of(const dt_set *set, const dt_extent *memory, const dt_delta_grid *grid)
{
    uint64_t from, to, half = 0;
    uint32_t granule = 1u << grid->shift;
    for (windows w = windows_of(set, memory, granule); next_window(&w, &from, &to);)
        half += to - from;
    half /= 2;
    for (windows w = windows_of(set, memory, granule); next_window(&w, &from, &to); half -= to - from)
        if (half < to - from)
            return dt_delta_block_end(grid, dt_delta_block_of(grid, from + half));
    return memory->nbytes;
}

/* Puts `nbytes` of entries, the first of which was to be behind the block before `next`, behind those of d. */
static void append(differ *d, const uint8_t *entries, uint64_t nbytes, uint64_t next)
{
    if (d->at != entries || d->next != next) {
        uint8_t opening[MOST_OPENING];
        uint64_t first = 0;
        const uint8_t *rest = dt_delta_get_number(entries, entries + nbytes, &first);
        if (!rest)
            return; /* there is none */
        nbytes -= (uint64_t)(rest - entries);
        uint64_t bytes = (uint64_t)(dt_delta_put_number(opening, first + ((next - d->next) << 3)) - opening);
        memmove(d->at + bytes, rest, nbytes);
        memcpy(d->at, opening, bytes);
        d->at += bytes;
    }
    d->at += nbytes;
}

/* `end`: of the room that the delta may want. */
static void encode_halves(differ *d, const dt_set *set, const dt_extent *memory, uint8_t *end)
{
    uint8_t spill[TIGHT];
    uint64_t middle = middle_of(set, memory, &d->grid);
    uint32_t granule = 1u << d->grid.shift;
    differ assumed = *d, other = *d;
    portion first = portion_of(&assumed, windows_within(set, memory, granule, 0, middle));
    portion second = portion_of(&other, windows_within(set, memory, granule, middle, memory->nbytes)), all = first;
    assume_changed(&all);
    first.d = d;
    d->limit = (uintptr_t)assumed.at;
    d->spill = spill;
    other.at = assumed.at;
    other.next = assumed.next;

    cpu_set_t processors;
    pthread_t thread;
    bool beside = !sched_getaffinity(0, sizeof processors, &processors) && CPU_COUNT(&processors) > 1 &&
                  !dt_thread_start(&thread, encode_portion, &second);
    encode_portion(&first);
    if (beside)
        pthread_join(thread, NULL);
    else
        encode_portion(&second);

    uint8_t *entries = assumed.at;
    uint64_t nbytes = (uint64_t)(other.at - entries);
    d->limit = UINTPTR_MAX;
    if (d->spilled) { /* what did not change takes more room than it saves: the second half makes way */
        entries = memmove(end - nbytes, entries, nbytes);
        uint64_t spilled = (uint64_t)(d->at - spill);
        d->at = (uint8_t *)memcpy(d->spilled, spill, spilled) + spilled;
        d->spilled = NULL;
        encode_portion(&first);
    }
    append(d, entries, nbytes, assumed.next);
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
    d = (differ){.grid = grid_of(memory, granule), .mirror = memory->mirror, .at = out + DELTA_HEADER, .limit = UINTPTR_MAX};
    d.update = update && !bounce; /* where it may fail midway the mirror waits for the end */
    d.large = needed >= dt_delta_stream_bytes;
    dt_delta_put_header(out, &d.grid);
    if (bounce) {
        uint64_t from, to;
        for (windows w = windows_of(set, memory, granule); !code && next_window(&w, &from, &to);)
            code = diff_copied(&d, memory, bounce, from, to, why);
        finish(&d);
    } else if (needed >= dt_delta_halves_bytes) {
        encode_halves(&d, set, memory, out + needed);
    } else {
        portion all = portion_of(&d, windows_of(set, memory, granule));
        encode_portion(&all);
    }
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
