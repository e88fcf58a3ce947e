/* SPDX-License-Identifier: MIT
 * Sets of pages: sorted, disjoint runs that never touch, and their algebra.
 *
 * The merges write each candidate to the output and move the output's end by a comparison's result: which side comes
 * next is a coin toss in real sets, and a mispredicted branch costs more than the rest of a step. For that the output
 * always has room for one candidate a step. */
#include "internal.h"

static size_t block_bytes(uint64_t capacity) { return sizeof(dt_block) + (size_t)capacity * sizeof(dt_run); }

static dt_block *block_of(const dt_set *set) { return set->block_; }

static void adopt(dt_set *set, dt_block *block, uint64_t capacity)
{
    block->capacity = capacity;
    set->block_ = block;
    set->runs = block->runs;
}

DT_HOT void dt_set_reuse(dt_set *set, dt_block *block)
{
    uint64_t capacity = block->capacity;
    memset(block, 0, sizeof *block);
    adopt(set, block, capacity);
}

DT_HOT int dt_set_reserve(dt_set *set, uint64_t capacity)
{
    dt_block *block = block_of(set);
    uint64_t room = block ? block->capacity : 0;
    if (block && capacity <= room)
        return 0;
    if (capacity > (SIZE_MAX / 4 - sizeof(dt_block)) / sizeof(dt_run))
        return -ENOMEM;
    capacity = dt_max(dt_max(capacity, 2 * room), 4);
    /* Not dt_alloc: zeroing the runs would touch memory that a large but mostly empty result never needs. */
    dt_block *grown = dt_grow(block, block ? block_bytes(room) : 0, block_bytes(capacity));
    if (!grown)
        return -ENOMEM;
    if (!block)
        memset(grown, 0, sizeof *grown);
    adopt(set, grown, capacity);
    return 0;
}

DT_HOT void dt_set_trim(dt_set *set)
{
    dt_block *block = block_of(set);
    if (DT_LIKELY(block->capacity <= 2 * set->count + 64))
        return;
    uint64_t capacity = dt_max(set->count, 1);
    dt_block *smaller = dt_grow(block, block_bytes(block->capacity), block_bytes(capacity));
    if (smaller)
        adopt(set, smaller, capacity);
}

DT_HOT void dt_set_clear(dt_set *set)
{
    dt_block *block = block_of(set);
    if (block && block->listener && !set->delivered) {
        block->count = set->count;
        dt_session_give_back(block);
    } else if (block && block->listener) {
        dt_block_release(block);
    } else {
        dt_free(block);
    }
    dt_free(set->assumed_block_);
    memset(set, 0, sizeof *set);
}

int dt_set_assume(dt_set *set, const dt_run *runs, uint64_t count)
{
    dt_set given = {.runs = (dt_run *)runs, .count = count}, part = {0};
    int code = dt_set_intersection(&given, set, &part);
    if (code)
        return code;
    dt_free(set->assumed_block_);
    set->assumed = part.runs;
    set->assumed_count = part.count;
    set->assumed_block_ = part.block_;
    return 0;
}

static int by_start(const void *a, const void *b)
{
    uint64_t x = ((const dt_run *)a)->start, y = ((const dt_run *)b)->start;
    return (x > y) - (x < y);
}

void dt_set_sort(dt_set *set)
{
    uint64_t count = set->count;
    if (!count) /* nor an array to sort */
        return;
    qsort(set->runs, count, sizeof *set->runs, by_start);
    set->count = 0;
    for (uint64_t i = 0; i < count; i++)
        dt_set_append(set, set->runs[i].start, set->runs[i].end);
}

void dt_set_count_pages(dt_set *set)
{
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < set->count; i++)
        bytes += set->runs[i].end - set->runs[i].start;
    set->pages = bytes >> dt_page_shift();
}

uint64_t dt_set_first(const dt_set *set, uint64_t address)
{
    const dt_run *base = set->runs;
    uint64_t left = set->count;
    if (!left)
        return 0;
    while (left > 1) { /* no branch on the data: the loop's length depends on the count alone */
        uint64_t half = left / 2;
        base += base[half - 1].end <= address ? half : 0;
        left -= half;
    }
    return (uint64_t)(base - set->runs) + (base->end <= address);
}

/* How many runs start before `address`. */
static uint64_t starting_before(const dt_set *set, uint64_t address)
{
    uint64_t i = dt_set_first(set, address);
    return i + (i < set->count && set->runs[i].start < address);
}

/* ---- making a set: nothing reaches `out` before nothing can fail any more ---- */

static int begin(dt_set *made, uint64_t room, dt_set *out)
{
    memset(made, 0, sizeof *made);
    if (DT_UNLIKELY(dt_set_reserve(made, room)))
        return dt_fail_with(&out->why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    return 0;
}

static void finish(dt_set *made, uint64_t epoch, uint32_t complete, dt_set *out)
{
    dt_set_trim(made);
    made->epoch = epoch;
    made->complete = complete;
    dt_set_count_pages(made);
    *out = *made;
}

static uint64_t put(dt_run *out, const dt_run *from, uint64_t n)
{
    if (n) /* memcpy takes no NULL, not even for nothing */
        memcpy(out, from, (size_t)n * sizeof *out);
    return n;
}

/* Page-aligned, sorted, disjoint, none empty; else `*wrong`, where asked for, is the first that is not. */
static bool sound(const dt_run *runs, uint64_t count, uint64_t *wrong)
{
    uint64_t within = dt_page_bytes() - 1, last = 0;
    for (uint64_t i = 0; i < count; i++) {
        if (((runs[i].start | runs[i].end) & within) || runs[i].start >= runs[i].end || runs[i].start < last) {
            if (wrong)
                *wrong = i;
            return false;
        }
        last = runs[i].end;
    }
    return true;
}

int dt_set_copy(const dt_run *runs, uint64_t count, dt_set *out)
{
    uint64_t wrong;
    if (!sound(runs, count, &wrong))
        return dt_fail_with(&out->why, -EINVAL, 0, DT_STEP_NONE, runs[wrong].start, runs[wrong].end);
    dt_set made;
    int code = begin(&made, count, out);
    if (code)
        return code;
    for (uint64_t i = 0; i < count; i++)
        dt_set_append(&made, runs[i].start, runs[i].end);
    finish(&made, 0, 1, out);
    return 0;
}

/* ---- algebra ---- */

/* Writes at most na + nb runs. `out` overlaps neither input. */
static uint64_t unite(const dt_run *restrict a, uint64_t na, const dt_run *restrict b, uint64_t nb,
                      dt_run *restrict out)
{
    if (!na || !nb)
        return na ? put(out, a, na) : put(out, b, nb);
    uint64_t i = 0, j = 0, n = 0;
    dt_run open = a[0].start <= b[0].start ? a[0] : b[0];
    while (i < na && j < nb) {
        uint64_t from_b = b[j].start < a[i].start;
        uint64_t start = from_b ? b[j].start : a[i].start, end = from_b ? b[j].end : a[i].end;
        uint64_t apart = start > open.end;
        out[n] = open;
        n += apart;
        open.start = apart ? start : open.start;
        open.end = dt_max(open.end, end); /* right in both cases: apart means that it ends later too */
        i += !from_b;
        j += from_b;
    }
    const dt_run *rest = i < na ? a + i : b + j;
    uint64_t left = i < na ? na - i : nb - j;
    for (; left && rest->start <= open.end; rest++, left--)
        open.end = dt_max(open.end, rest->end);
    out[n++] = open;
    return n + put(out + n, rest, left);
}

int dt_set_union(const dt_set *a, const dt_set *b, dt_set *out)
{
    dt_set made;
    int code = begin(&made, a->count + b->count, out);
    if (code)
        return code;
    made.count = unite(a->runs, a->count, b->runs, b->count, made.runs);
    finish(&made, dt_max(a->epoch, b->epoch), a->complete && b->complete, out);
    return 0;
}

typedef struct part { const dt_run *runs; uint64_t count; } part;

/* Merges neighbours two by two, from one buffer to the other, until one part is left. */
int dt_set_union_many(const dt_set *const *sets, uint64_t n, dt_set *out)
{
    uint64_t total = 0, epoch = 0;
    uint32_t complete = 1;
    for (uint64_t i = 0; i < n; i++) {
        total += sets[i]->count;
        epoch = dt_max(epoch, sets[i]->epoch);
        complete = complete && sets[i]->complete;
    }
    dt_set made, spare;
    int code = begin(&made, total, out);
    if (code)
        return code;
    if (n <= 2) { /* the usual cases need no second buffer */
        if (n)
            made.count = unite(sets[0]->runs, sets[0]->count, n > 1 ? sets[1]->runs : NULL, n > 1 ? sets[1]->count : 0,
                               made.runs);
        finish(&made, epoch, complete, out);
        return 0;
    }
    part *parts = n <= SIZE_MAX / sizeof *parts ? dt_alloc((size_t)n * sizeof *parts) : NULL;
    if (!parts || begin(&spare, total, out)) {
        dt_free(parts);
        dt_set_clear(&made);
        return dt_fail_with(&out->why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    }
    for (uint64_t i = 0; i < n; i++)
        parts[i] = (part){sets[i]->runs, sets[i]->count};
    for (uint64_t left = n; left > 1; left = (left + 1) / 2) {
        /* What the parts hold is in the sets or in made's buffer; it goes to the spare one. */
        uint64_t used = 0;
        for (uint64_t i = 0; i < left; i += 2) {
            part one = parts[i], two = i + 1 < left ? parts[i + 1] : (part){NULL, 0};
            uint64_t count = unite(one.runs, one.count, two.runs, two.count, spare.runs + used);
            parts[i / 2] = (part){spare.runs + used, count};
            used += count;
        }
        spare.count = used;
        dt_set swap = made;
        made = spare;
        spare = swap;
    }
    dt_free(parts);
    dt_set_clear(&spare);
    finish(&made, epoch, complete, out);
    return 0;
}

int dt_set_intersection(const dt_set *a, const dt_set *b, dt_set *out)
{
    dt_set made;
    int code = begin(&made, a->count + b->count, out);
    if (code)
        return code;
    const dt_run *restrict x = a->runs, *restrict y = b->runs;
    dt_run *restrict to = made.runs;
    uint64_t i = 0, j = 0, n = 0, na = a->count, nb = b->count;
    while (i < na && j < nb) {
        uint64_t x_end = x[i].end, y_end = y[j].end;
        uint64_t start = dt_max(x[i].start, y[j].start), end = dt_min(x_end, y_end);
        to[n].start = start;
        to[n].end = end;
        n += start < end;
        i += x_end <= y_end;
        j += y_end <= x_end;
    }
    made.count = n;
    finish(&made, dt_max(a->epoch, b->epoch), a->complete && b->complete, out);
    return 0;
}

int dt_set_difference(const dt_set *a, const dt_set *b, dt_set *out)
{
    dt_set made;
    int code = begin(&made, a->count + b->count, out);
    if (code)
        return code;
    const dt_run *restrict x = a->runs, *restrict y = b->runs;
    dt_run *restrict to = made.runs;
    uint64_t i = 0, j = 0, n = 0, na = a->count, nb = b->count;
    uint64_t passed = 0; /* where the last run of b that was left behind ended: nothing before it remains */
    while (i < na && j < nb) {
        uint64_t x_end = x[i].end, y_end = y[j].end;
        uint64_t start = dt_max(x[i].start, passed), end = dt_min(x_end, y[j].start);
        to[n].start = start;
        to[n].end = end;
        n += start < end;
        uint64_t inside = y_end < x_end;
        passed = inside ? y_end : passed;
        j += inside;
        i += !inside;
    }
    if (i < na) {
        to[n].start = dt_max(x[i].start, passed);
        to[n++].end = x[i++].end; /* never empty: b's last run ended before it, or it would have been left behind */
        n += put(to + n, x + i, na - i);
    }
    made.count = n;
    finish(&made, dt_max(a->epoch, b->epoch), a->complete && b->complete, out);
    return 0;
}

int dt_set_equal(const dt_set *a, const dt_set *b)
{
    return a->count == b->count && (!a->count || !memcmp(a->runs, b->runs, (size_t)a->count * sizeof *a->runs));
}

int dt_set_subset(const dt_set *a, const dt_set *b)
{
    uint64_t i = 0, j = 0;
    while (i < a->count) {
        if (j == b->count)
            return 0;
        uint64_t before = b->runs[j].end < a->runs[i].end;
        if (DT_UNLIKELY((before ^ 1) & (uint64_t)(b->runs[j].start > a->runs[i].start)))
            return 0;
        j += before;
        i += before ^ 1;
    }
    return 1;
}

int dt_set_contains(const dt_set *set, uint64_t address)
{
    uint64_t i = dt_set_first(set, address);
    return i < set->count && set->runs[i].start <= address;
}

int dt_set_clip(const dt_set *set, uint64_t start, uint64_t end, dt_set *out)
{
    uint64_t first = dt_set_first(set, start), last = starting_before(set, end);
    uint64_t count = start < end && first < last ? last - first : 0;
    dt_set made;
    int code = begin(&made, count, out);
    if (code)
        return code;
    if (count) {
        made.count = put(made.runs, set->runs + first, count);
        made.runs[0].start = dt_max(made.runs[0].start, start);
        made.runs[count - 1].end = dt_min(made.runs[count - 1].end, end);
    }
    finish(&made, set->epoch, set->complete, out);
    return 0;
}

/* ---- where ---- */

static uint64_t sum_or_last(uint64_t a, uint64_t b) { return a + b < a ? UINT64_MAX : a + b; }

uint64_t dt_set_offsets(const dt_set *set, uint64_t address, uint64_t nbytes, dt_run *out, uint64_t room)
{
    uint64_t end = sum_or_last(address, nbytes);
    uint64_t first = dt_set_first(set, address), last = starting_before(set, end);
    uint64_t count = nbytes && first < last ? last - first : 0;
    for (uint64_t i = 0; i < dt_min(count, room); i++) {
        out[i].start = dt_max(set->runs[first + i].start, address) - address;
        out[i].end = dt_min(set->runs[first + i].end, end) - address;
    }
    return count;
}

uint64_t dt_set_pages(const dt_set *set, uint64_t start, uint64_t end, uint64_t *out, uint64_t room)
{
    unsigned shift = dt_page_shift();
    uint64_t count = 0;
    for (uint64_t i = dt_set_first(set, start); i < set->count && set->runs[i].start < end; i++) {
        uint64_t from = (dt_max(set->runs[i].start, start) - start) >> shift;
        uint64_t to = (dt_min(set->runs[i].end, end) - start) >> shift;
        uint64_t left = room - dt_min(count, room), n = dt_min(to - from, left);
        for (uint64_t k = 0; k < n; k++)
            out[count + k] = from + k;
        count += to - from;
    }
    return count;
}

void dt_set_bitmap(const dt_set *set, uint64_t start, uint64_t end, uint8_t *out)
{
    unsigned shift = dt_page_shift();
    if (start >= end)
        return;
    memset(out, 0, (size_t)((((end - start) >> shift) + 7) / 8));
    for (uint64_t i = dt_set_first(set, start); i < set->count && set->runs[i].start < end; i++) {
        uint64_t from = (dt_max(set->runs[i].start, start) - start) >> shift;
        uint64_t to = (dt_min(set->runs[i].end, end) - start) >> shift;
        uint64_t head = from / 8, tail = to / 8;
        uint8_t high = (uint8_t)(0xff << (from % 8)), low = (uint8_t)~(0xff << (to % 8));
        if (head == tail) {
            out[head] |= high & low;
            continue;
        }
        out[head] |= high;
        memset(out + head + 1, 0xff, (size_t)(tail - head - 1));
        if (low) /* the byte after the last one is not ours */
            out[tail] |= low;
    }
}

uint64_t dt_set_rows(const dt_set *set, uint64_t address, uint64_t stride, uint64_t row_bytes, uint64_t rows,
                     uint64_t *out, uint64_t room)
{
    uint64_t count = 0, next = 0; /* rows before `next` are decided: a row that two runs touch is one row */
    if (!row_bytes)
        return 0;
    for (uint64_t i = dt_set_first(set, address); i < set->count && next < rows; i++) {
        uint64_t start = dt_max(set->runs[i].start, address) - address, end = set->runs[i].end - address;
        uint64_t from = start < row_bytes ? 0 : (start - row_bytes) / stride + 1; /* the first that ends after start */
        uint64_t to = dt_min((end - 1) / stride + 1, rows);                       /* the first that starts after it */
        for (from = dt_max(from, next); from < to; from++, count++)
            if (count < room)
                out[count] = from;
        next = dt_max(next, to);
    }
    return count;
}

int dt_set_counts(const dt_set *set, const dt_run *spans, uint64_t n, uint64_t *out)
{
    unsigned shift = dt_page_shift();
    if (!sound(spans, n, NULL))
        return -EINVAL;
    uint64_t i = 0;
    for (uint64_t k = 0; k < n; k++) {
        uint64_t start = spans[k].start, end = spans[k].end, bytes = 0;
        if (i < set->count && set->runs[i].end <= start) { /* far behind where spans leave much out: search, then walk */
            dt_set rest = {.runs = set->runs + i, .count = set->count - i};
            i += dt_set_first(&rest, start);
        }
        for (; i < set->count && set->runs[i].start < end; i++) {
            bytes += dt_min(set->runs[i].end, end) - dt_max(set->runs[i].start, start);
            if (set->runs[i].end > end) /* the next span may have the rest of it */
                break;
        }
        out[k] = bytes >> shift;
    }
    return 0;
}
