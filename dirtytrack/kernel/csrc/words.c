/* SPDX-License-Identifier: MIT
 * Slots: the words of a set's pages that point into a range of addresses. */
#include "reading.h"
#include "words.h"

#define LEAST_ROOM 512 /* slots */

static bool is_narrow(const dt_pointers *p) { return p->compressed; }
static unsigned slot_shift(const dt_pointers *p) { return p->compressed ? 2 : 3; }

static uint64_t decode(const dt_pointers *p, uint64_t word)
{
    return p->compressed ? p->base + (word << p->shift) : word & ~p->strip;
}

/* How many units of 1 << shift lie between base and an address, rounded up. */
static uint64_t units_to(const dt_pointers *p, uint64_t address)
{
    if (address <= p->base)
        return 0;
    uint64_t bytes = address - p->base, unit = (uint64_t)1 << p->shift;
    return (bytes >> p->shift) + ((bytes & (unit - 1)) != 0);
}

static dt_needle needle_for(const dt_pointers *p, uint64_t low, uint64_t high)
{
    if (!p->compressed)
        return (dt_needle){.keep = ~p->strip, .low = low, .span = high - low, .mask = p->mask, .tag = p->tag};
    uint64_t most = (uint64_t)1 << 32;
    uint64_t from = dt_min(dt_max(units_to(p, low), 1), most), to = dt_min(units_to(p, high), most); /* 0 points nowhere */
    return (dt_needle){.low = from & (most - 1), .span = to > from ? to - from : 0};
}

typedef struct search {
    const dt_pointers *pointers;
    dt_needle needle;
    dt_scan_words *scan;
    uint64_t low, high; /* of the slots that are wanted */
    bool choosy;        /* not all that is found is wanted */
    dt_slots *slots;
    dt_set kept;
    dt_failure *why;
} search;

static int reserve(dt_slots *slots, uint64_t wanted)
{
    if (DT_LIKELY(wanted <= slots->room))
        return 0;
    uint64_t room = dt_max(dt_max(wanted, 2 * slots->room), LEAST_ROOM);
    uint64_t *addresses = dt_grow(slots->addresses, slots->room * 8, room * 8);
    if (addresses)
        slots->addresses = addresses;
    uint64_t *targets = addresses ? dt_grow(slots->targets, slots->room * 8, room * 8) : NULL;
    if (!targets)
        return -ENOMEM;
    slots->targets = targets;
    slots->room = room;
    return 0;
}

/* Adds slots, and what they point at. Read again, where somebody writes them meanwhile: that is dirty again. */
static void point(search *s, const uint64_t *where, uint64_t found, const uint8_t *bytes, uint64_t address)
{
    uint64_t *addresses = s->slots->addresses, *targets = s->slots->targets, count = s->slots->count;
    for (uint64_t i = 0; i < found; i++) {
        uint64_t word = 0;
        /* little endian, as all that tracks */
        memcpy(&word, bytes + (where[i] - address), (size_t)1 << slot_shift(s->pointers));
        uint64_t target = decode(s->pointers, word);
        addresses[count] = where[i];
        targets[count] = target;
        count += !s->choosy || target - s->low < s->high - s->low;
    }
    s->slots->count = count;
}

static int search_piece(void *context, const dt_piece_read *p)
{
    enum { PART = 4096 };
    uint64_t where[PART / 4]; /* most parts have none, and take no room elsewhere */
    search *s = context;
    unsigned shift = slot_shift(s->pointers);
    uint64_t at = dt_up(p->address, (uint64_t)1 << shift), end = p->address + p->nbytes;
    for (uint64_t next; at < end; at = next) {
        next = dt_min(at + PART, end);
        const uint8_t *bytes = p->bytes + (at - p->address), *ahead = next < end ? bytes + PART : p->next;
        uint64_t words = (next - at) >> shift, found = s->scan(bytes, ahead, words, s->needle, at, where);
        s->slots->words += words;
        if (DT_LIKELY(!found))
            continue;
        uint64_t page = dt_page_bytes(), start = dt_down(at, page);
        if (reserve(s->slots, s->slots->count + found) || dt_set_reserve(&s->kept, s->kept.count + 1))
            return dt_fail_with(s->why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
        dt_set_append(&s->kept, start, start + page);
        point(s, where, found, p->bytes, p->address);
    }
    return 0;
}

int dt_find_slots(const dt_set *set, const dt_extent *heap, uint64_t n, const dt_pointers *pointers, const dt_run *young,
                  uint64_t low, uint64_t high, dt_slots *out, dt_set *kept)
{
    bool odd = pointers->compressed ? pointers->shift > 31 : (pointers->tag & ~pointers->mask) != 0;
    if (odd || low > high || low < young->start || high > young->end)
        return dt_fail_with(&kept->why, -EINVAL, 0, DT_STEP_NONE, low, high);
    search s = {
        .pointers = pointers,
        .needle = needle_for(pointers, young->start, young->end),
        .scan = dt_words_scanner(is_narrow(pointers)),
        .low = low,
        .high = high,
        .choosy = low != young->start || high != young->end,
        .slots = out,
        .why = &kept->why,
    };
    out->count = out->words = 0;
    int code = dt_set_reserve(&s.kept, 1);
    if (code)
        return dt_fail_with(&kept->why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    code = dt_read_pieces(set, heap, n, search_piece, &s, &kept->why);
    if (code) {
        dt_set_clear(&s.kept);
        out->count = 0;
        return code;
    }
    dt_set_count_pages(&s.kept);
    s.kept.epoch = set->epoch;
    s.kept.complete = set->complete;
    *kept = s.kept;
    return 0;
}

void dt_slots_clear(dt_slots *slots)
{
    dt_free(slots->addresses);
    dt_free(slots->targets);
    memset(slots, 0, sizeof *slots);
}

int dt_pages_of(const uint64_t *addresses, uint64_t n, dt_set *out)
{
    uint64_t page = dt_page_bytes();
    dt_set made = {.complete = 1};
    if (n > UINT64_MAX / 64 || dt_set_reserve(&made, dt_max(n, 1)))
        return dt_fail_with(&out->why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t start = dt_down(addresses[i], page), last = made.count ? made.runs[made.count - 1].start : start + 1;
        if (start != last) /* those of one page mostly follow each other */
            made.runs[made.count++] = (dt_run){start, start + page};
    }
    dt_set_sort(&made);
    dt_set_count_pages(&made);
    *out = made;
    return 0;
}

/* ---- writing slots ---- */

static bool encode(const dt_pointers *p, uint64_t target, uint64_t old, uint64_t *word)
{
    if (!p->compressed) {
        *word = target | (old & p->strip);
        return !(target & p->strip) && (*word & p->mask) == p->tag;
    }
    uint64_t bytes = target - p->base;
    *word = bytes >> p->shift;
    return target > p->base && !(bytes & (((uint64_t)1 << p->shift) - 1)) && !(*word >> 32);
}

int dt_redirect_slots(const dt_extent *heap, uint64_t n, const dt_pointers *pointers, const uint64_t *slots,
                      const uint64_t *targets, uint64_t count, dt_failure *why)
{
    size_t width = (size_t)1 << slot_shift(pointers);
    for (uint64_t i = 0, k = 0; i < count; i++) {
        uint64_t at = slots[i], old = 0, word;
        if (k == n || at < heap[k].address) /* they need not rise */
            k = 0;
        while (k < n && heap[k].address + heap[k].nbytes < at + width)
            k++;
        if (k == n || at < heap[k].address || at % width)
            return dt_fail_with(why, DT_NOT_WATCHED, 0, DT_STEP_COPY, at, at + width);
        int code = 0;
        if (heap[k].unpinned)
            code = dt_copy_vanishing(false, (uint8_t *)&old, at, width, why);
        else /* SAFETY: pinned memory stays mapped for as long as the caller holds its pin. */
            memcpy(&old, (const void *)(uintptr_t)at, width);
        if (!code && !encode(pointers, targets[i], old, &word))
            return dt_fail_with(why, -EINVAL, 0, DT_STEP_NONE, at, at + width);
        if (!code && heap[k].unpinned)
            code = dt_copy_vanishing(true, (uint8_t *)&word, at, width, why);
        else if (!code)
            memcpy((void *)(uintptr_t)at, &word, width);
        if (code)
            return code;
    }
    return 0;
}
