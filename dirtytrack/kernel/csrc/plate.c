/* SPDX-License-Identifier: MIT
 * Plates: what a session that compares keeps of each piece of the address space, and reading that memory, which may vanish
 * and need not be populated. */
#include "compare.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define POPULATED ((uint64_t)3 << 62) /* of an entry: present, or in swap (since Linux 2.6.25, for everybody) */

/* ---- plates ----------------------------------------------------------------------------------------------------- */

static void free_plate(dt_plate *p)
{
    if (p->copy)
        munmap(p->copy, p->end - p->start);
    dt_free(p->digests);
    dt_free(p->states);
}

void dt_compare_forget(dt_compare *c)
{
    for (uint64_t i = 0; i < c->count; i++)
        free_plate(&c->plates[i]);
    c->count = 0;
}

/* SAFETY: copies were not inherited (MADV_DONTFORK), so their addresses may be somebody else's here: never unmap them. */
void dt_compare_abandon(dt_compare *c)
{
    for (uint64_t i = 0; i < c->count; i++)
        c->plates[i].copy = NULL;
}

uint64_t dt_plate_after(const dt_compare *c, uint64_t address)
{
    uint64_t low = 0, high = c->count;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        if (c->plates[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* SAFETY: a region's memory is held by whoever scans it or reads it, for as long as that takes. So it may be read directly
 * where each region that has part of the plate is pinned, which the one that is scanned is among. */
static void note_pinned(const dt_session *s, dt_plate *p)
{
    p->pinned = true;
    for (uint64_t i = 0; i < s->region_count; i++) {
        const dt_region *r = s->regions[i];
        if (r->registered && r->start < p->end && p->start < r->end)
            p->pinned &= r->pinned;
    }
}

static uint8_t *map_copy(uint64_t bytes)
{
    if (dt_fail_at(DT_SITE_ALLOCATE))
        return NULL;
    void *copy = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (copy == MAP_FAILED)
        return NULL;
    madvise(copy, bytes, MADV_DONTFORK); /* else the next pass after a fork copies each page that it brings up to date */
    return copy;
}

static int add_plate(dt_session *s, uint64_t index, uint64_t start, uint64_t end)
{
    dt_compare *c = s->compare;
    uint64_t pages = (end - start) >> dt_page_shift();
    dt_plate p = {.start = start, .end = end};
    int rc = dt_room((void **)&c->plates, &c->room, c->count + 1, sizeof *c->plates);
    if (rc)
        return rc;
    p.states = dt_alloc(pages);
    if (c->backend == DT_BACKEND_COPY)
        p.copy = map_copy(end - start);
    else
        p.digests = dt_alloc(pages * sizeof *p.digests);
    if (!p.states || !(p.copy || p.digests)) {
        free_plate(&p);
        return -ENOMEM;
    }
    memset(p.states, DT_UNKNOWN, pages);
    note_pinned(s, &p);
    memmove(c->plates + index + 1, c->plates + index, (c->count++ - index) * sizeof p);
    c->plates[index] = p;
    return 0;
}

int dt_plates_cover(dt_session *s, uint64_t start, uint64_t end)
{
    const dt_compare *c = s->compare;
    int rc = 0;
    for (uint64_t at = start; at < end && !rc;) {
        uint64_t i = dt_plate_after(c, at), next = i < c->count ? c->plates[i].start : end;
        if (next > at)
            rc = add_plate(s, i, at, dt_min(next, end));
        else
            at = c->plates[i].end;
    }
    return rc;
}

void dt_compare_lose(dt_session *s, uint64_t start, uint64_t end)
{
    dt_compare *c = s->compare;
    for (uint64_t i = dt_plate_after(c, start); i < c->count && c->plates[i].start < end; i++) {
        const dt_plate *p = &c->plates[i];
        uint64_t from = dt_max(start, p->start), to = dt_min(end, p->end);
        memset(p->states + ((from - p->start) >> dt_page_shift()), DT_UNKNOWN, (to - from) >> dt_page_shift());
    }
}

void dt_compare_adjust(dt_session *s, const dt_region *region)
{
    dt_compare *c = s->compare;
    uint64_t first = dt_plate_after(c, region->start), kept = first, i = first;
    for (; i < c->count && c->plates[i].start < region->end; i++) {
        dt_plate *p = &c->plates[i];
        bool wanted = false;
        for (uint64_t k = 0; k < s->region_count && !wanted; k++) {
            const dt_region *r = s->regions[k];
            wanted = r->registered && r->start < p->end && p->start < r->end;
        }
        if (wanted) {
            note_pinned(s, p);
            c->plates[kept++] = *p;
        } else {
            free_plate(p);
        }
    }
    if (kept < i)
        memmove(c->plates + kept, c->plates + i, (c->count - i) * sizeof *c->plates);
    c->count -= i - kept;
}

/* ---- reading memory that may vanish ------------------------------------------------------------------------------------ */

void dt_read_begin(dt_reader *r, const dt_compare *c)
{
    r->c = c;
    r->start = r->end = r->entries_start = r->entries_end = 0;
    r->gone = UINT64_MAX;
    r->pagemap = r->anonymous = -1;
}

void dt_read_end(const dt_reader *r)
{
    if (r->pagemap >= 0)
        close(r->pagemap);
}

int dt_read_page(dt_reader *r, const dt_plate *p, uint64_t at, uint64_t end, const uint8_t **now)
{
    if (p->pinned) { /* SAFETY: see note_pinned() */
        *now = (const uint8_t *)(uintptr_t)at;
        return 0;
    }
    if (at == r->gone) {
        *now = NULL;
        return 0;
    }
    if (at < r->start || at >= r->end) {
        dt_failure why = {0};
        dt_run run = {at, at + dt_page_bytes()};
        end = dt_min(end, at + dt_max(DT_BOUNCE_BYTES, dt_page_bytes()));
        while (run.end < end && p->states[(run.end - p->start) >> dt_page_shift()] != DT_EMPTY) /* not read into being */
            run.end += dt_page_bytes();
        dt_set one = {.runs = &run, .count = 1};
        dt_extent extent = {.address = run.start, .nbytes = run.end - run.start, .unpinned = 1};
        int rc = dt_gather(&one, &extent, 1, r->c->bounce, extent.nbytes, &why);
        if (rc && rc != -EFAULT)
            return -EIO; /* EPERM and EFAULT mean something of their own to whoever scans */
        r->start = at;
        r->end = rc ? dt_down(why.start, dt_page_bytes()) : run.end;
        r->gone = rc ? r->end : UINT64_MAX;
        if (at == r->gone) {
            *now = NULL;
            return 0;
        }
    }
    *now = r->c->bounce + (at - r->start);
    return 0;
}

static int is_anonymous(void *context, const dt_mapping *m)
{
    (void)context;
    return dt_kind_of(m) == DT_KIND_ANONYMOUS ? 0 : 1;
}

/* Private memory without a file that was never populated is empty, and stays so if nobody reads it. Not so what is mapped
 * there instead by now, which only what is pinned cannot be. */
bool dt_read_empty(dt_reader *r, uint64_t at, uint64_t start, uint64_t end, bool sure)
{
    unsigned shift = dt_page_shift();
    if (r->pagemap == -1 && (r->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)) < 0)
        r->pagemap = -2;
    if (r->pagemap < 0)
        return false;
    if (r->anonymous < 0)
        r->anonymous = sure || dt_each_mapping(NULL, start, end, is_anonymous, NULL) == 0;
    if (!r->anonymous)
        return false;
    if (at < r->entries_start || at >= r->entries_end) {
        uint64_t pages = dt_min((end - at) >> shift, DT_ENTRIES);
        ssize_t got = pread(r->pagemap, r->entries, pages * sizeof *r->entries, (off_t)((at >> shift) * sizeof *r->entries));
        if (got < (ssize_t)sizeof *r->entries)
            return false;
        r->entries_start = at;
        r->entries_end = at + ((uint64_t)got / sizeof *r->entries << shift);
    }
    return !(r->entries[(at - r->entries_start) >> shift] & POPULATED);
}

