/* SPDX-License-Identifier: MIT
 * A backend that needs nothing of the kernel: what differs from a copy of the memory, or in a hash a page, was written.
 *
 * It stands in for the ioctls alone (scan_ioctl, dt_protect), so that the whole of the delivery contract is the same code:
 * "arming" reads the pages into the copy, and the arming scan is a pass that compares, returns the runs that differ, and
 * brings the copy up to date. The copy belongs to the session and is kept by address, so that overlapping regions share
 * it as they share the kernel's bits.
 *
 * Why no store is lost, whoever writes meanwhile. Of each word of a page the copy holds what was read at some moment; it
 * changes only in an arming pass, which returns that page to everybody. A store before the pass reads its word makes a
 * difference now. A store after that makes one to the copy, which the next pass finds, also where this pass compared
 * first and copied then: what it copied is the newer, and the page is returned. A page that was read while it was being
 * written is a mixture of words, each of which was there; the next pass compares with that mixture. The hash is of a page
 * whose words were each read once (digest.h), so of such a mixture too.
 *
 * What this cannot see is a word that was changed and changed back between two passes. Nothing came of it, but for whoever
 * read the memory himself in between. So whoever copies by this library gets what the passes saw (dt_compare_copy). */
#include "compare.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- opening and closing -------------------------------------------------------------------------------------------- */

static int draw_key(uint8_t *key, uint64_t bytes)
{
    int fd = -1, rc = 0;
    for (uint64_t done = 0; done < bytes && !rc;) {
        long got = fd < 0 ? syscall(SYS_getrandom, key + done, bytes - done, 0) : read(fd, key + done, bytes - done);
        if (got > 0)
            done += (uint64_t)got;
        else if (got < 0 && errno == EINTR)
            continue;
        else if (fd >= 0 || (fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC)) < 0) /* a kernel before 3.17 */
            rc = got < 0 ? -errno : -EIO;
    }
    if (fd >= 0)
        close(fd);
    return rc;
}

int dt_compare_open(uint32_t backend, dt_compare **out)
{
    uint64_t page = dt_page_bytes();
    if (backend != DT_BACKEND_COPY && backend != DT_BACKEND_HASH)
        return -EINVAL;
    dt_compare *c = dt_alloc(sizeof *c);
    if (!c)
        return -ENOMEM;
    c->backend = backend;
    c->same = dt_choose_same(false);
    c->bounce = dt_alloc(dt_max(DT_BOUNCE_BYTES, page));
    c->key = dt_alloc(page + DT_KEY_EXTRA);
    int rc = c->bounce && c->key ? 0 : -ENOMEM;
    if (!rc && backend == DT_BACKEND_HASH && !(rc = draw_key(c->key, page + DT_KEY_EXTRA))) {
        c->digest = dt_choose_digester(false);
        c->zero = c->digest(c->bounce, page, c->key);
    }
    if (rc) {
        dt_compare_close(c);
        return rc;
    }
    *out = c;
    return 0;
}

void dt_compare_close(dt_compare *c)
{
    dt_compare_forget(c);
    dt_free(c->plates);
    dt_free(c->bounce);
    dt_free(c->key);
    dt_free(c);
}

uint64_t dt_session_kept_bytes(dt_session *s)
{
    uint64_t bytes = 0;
    if (dt_enter(s))
        return 0;
    for (uint64_t i = 0; s->compare && i < s->compare->count; i++) {
        const dt_plate *p = &s->compare->plates[i];
        uint64_t each = (s->compare->backend == DT_BACKEND_COPY ? dt_page_bytes() : sizeof(dt_digest)) + 1;
        bytes += ((p->end - p->start) >> dt_page_shift()) * each;
    }
    dt_leave(s);
    return bytes;
}

/* ---- the scan ---------------------------------------------------------------------------------------------------------- */

static void keep(const dt_compare *c, dt_plate *p, uint64_t i, const uint8_t *now, const dt_digest *digest)
{
    if (c->backend == DT_BACKEND_COPY)
        memcpy(p->copy + (i << dt_page_shift()), now, dt_page_bytes());
    else
        p->digests[i] = *digest;
    p->states[i] = DT_KNOWN;
}

/* More than the second-level cache of any processor holds of memory and copy. */
#define FAR_BYTES ((uint64_t)4 << 20)

static bool differs(const dt_compare *c, const dt_plate *p, uint64_t i, const uint8_t *now, dt_digest *digest)
{
    uint64_t page = dt_page_bytes();
    if (c->backend == DT_BACKEND_HASH) {
        const dt_digest *then = p->states[i] == DT_EMPTY ? &c->zero : &p->digests[i];
        *digest = c->digest(now, page, c->key);
        return p->states[i] == DT_UNKNOWN || digest->first != then->first || digest->second != then->second;
    }
    if (p->states[i] == DT_KNOWN)
        return !c->same(now, p->copy + (i << dt_page_shift()), page, true);
    return p->states[i] == DT_UNKNOWN || !dt_is_zero(now, page);
}

typedef struct answer { struct k_page_region *runs; uint64_t count, room; } answer;

static bool fits(const answer *a, uint64_t start)
{
    return a->count < a->room || (a->count && a->runs[a->count - 1].end == start);
}

static void add(answer *a, uint64_t start, uint64_t end)
{
    if (a->count && a->runs[a->count - 1].end == start)
        a->runs[a->count - 1].end = end;
    else
        a->runs[a->count++] = (struct k_page_region){start, end, K_PAGE_IS_WRITTEN};
}

/* Where the hole ends that begins at `at`; `at` where something is mapped there, which only cannot be read. */
static uint64_t hole_end(uint64_t at, uint64_t end)
{
    dt_mapping m;
    int rc = dt_compare_mapping(at, end, &m);
    return rc == -ENOENT ? end : rc ? at : dt_min(end, dt_max(at, m.start));
}

/* The page is there again. Should it go once more, that is told once more. */
static void found_again(dt_session *s, uint64_t at)
{
    for (uint64_t i = 0; i < s->region_count; i++) {
        dt_region *r = s->regions[i];
        if (r->gone_start <= at && at < r->gone_end)
            r->gone_start = r->gone_end = r->gone_bytes = 0;
    }
}

/* The part [start, end) of a plate. 1: the answer is full. */
static int scan_plate(dt_session *s, dt_plate *p, uint64_t start, uint64_t end, bool arm, answer *found)
{
    const dt_compare *c = s->compare;
    uint64_t page = dt_page_bytes();
    dt_reader r;
    dt_read_begin(&r, c);
    int rc = 0;
    const uint8_t *copy = p->pinned ? p->copy : NULL;
    bool far = end - start > FAR_BYTES;
    unsigned shift = dt_page_shift();
    for (uint64_t at = start; at < end; at += page) {
        uint64_t i = (at - p->start) >> shift;
        /* The short way for what most pages are. SAFETY: see note_pinned(). */
        if (copy && p->states[i] == DT_KNOWN && c->same((const uint8_t *)(uintptr_t)at, copy + (i << shift), page, far))
            continue;
        const uint8_t *now;
        dt_digest digest = {0, 0};
        if (p->states[i] == DT_EMPTY && dt_read_empty(&r, at, start, end, p->pinned))
            continue;
        if ((rc = dt_read_page(&r, p, at, end, &now)))
            break;
        if (DT_UNLIKELY(!now)) {
            uint64_t beyond = hole_end(at, end);
            if (arm)
                memset(p->states + i, DT_UNKNOWN, (dt_max(beyond, at + page) - at) >> dt_page_shift());
            if (beyond > at) { /* which is found and told as one by the next collect, if it was not yet */
                at = beyond - page;
                continue;
            }
        }
        bool differ = !now || differs(c, p, i, now, &digest);
        if (DT_LIKELY(!differ && p->states[i] == DT_KNOWN))
            continue;
        if (differ && !fits(found, at)) { /* before it is taken for known */
            rc = 1;
            break;
        }
        if (differ)
            add(found, at, at + page);
        if (!arm || !now)
            continue;
        if (p->states[i] == DT_UNKNOWN)
            found_again(s, at);
        keep(c, p, i, now, &digest);
    }
    dt_read_end(&r);
    return rc;
}

long dt_compare_scan(dt_session *s, uint64_t start, uint64_t end, const dt_question *question, uint64_t room)
{
    dt_compare *c = s->compare;
    answer found = {s->vector, 0, room};
    bool arm = question->flags & K_PM_SCAN_WP_MATCHING;
    if (question->mask == K_PAGE_IS_WPALLOWED) /* nothing is registered anywhere, so nothing can have lost that */
        add(&found, start, end);
    if (question->mask != K_PAGE_IS_WRITTEN)
        return (long)found.count;
    int rc = arm ? dt_plates_cover(s, start, end) : 0;
    for (uint64_t at = start, next; at < end && !rc; at = next) {
        uint64_t i = dt_plate_after(c, at);
        bool kept = i < c->count && c->plates[i].start <= at;
        next = kept ? dt_min(end, c->plates[i].end) : i < c->count ? dt_min(end, c->plates[i].start) : end;
        if (kept)
            rc = scan_plate(s, &c->plates[i], at, next, arm, &found);
        else if (fits(&found, at))
            add(&found, at, next);
        else
            rc = 1;
    }
    return rc < 0 ? rc : (long)found.count;
}

int dt_compare_protect(dt_session *s, uint64_t start, uint64_t end)
{
    dt_compare *c = s->compare;
    uint64_t page = dt_page_bytes();
    int fail = dt_fail_at(DT_SITE_PROTECT), rc = fail > 0 ? -fail : dt_plates_cover(s, start, end);
    s->statistics.protects++;
    for (uint64_t i = dt_plate_after(c, start); !rc && i < c->count && c->plates[i].start < end; i++) {
        dt_plate *p = &c->plates[i];
        uint64_t from = dt_max(start, p->start), to = dt_min(end, p->end);
        dt_reader r;
        dt_read_begin(&r, c);
        uint64_t empty = 0;
        for (uint64_t at = from; at < to; at += page) {
            bool is_empty = dt_read_empty(&r, at, from, to, false);
            p->states[(at - p->start) >> dt_page_shift()] = is_empty ? DT_EMPTY : DT_UNKNOWN;
            empty += is_empty ? page : 0;
        }
        /* A quarter quicker to compare with (measured, 256 MiB); not where most of it would be taken for nothing. */
        if (p->copy && empty < (to - from) / 2)
            madvise(p->copy + (from - p->start), to - from, MADV_HUGEPAGE);
        for (uint64_t at = from; at < to && !rc; at += page) {
            uint64_t k = (at - p->start) >> dt_page_shift();
            const uint8_t *now;
            dt_digest digest = {0, 0};
            if (p->states[k] == DT_EMPTY || (rc = dt_read_page(&r, p, at, to, &now)) || !now)
                continue;
            if (c->backend == DT_BACKEND_HASH)
                digest = c->digest(now, page, c->key);
            keep(c, p, k, now, &digest);
        }
        dt_read_end(&r);
    }
    return rc ? rc : fail;
}

/* ---- what lies beneath, without a /proc where there is none --------------------------------------------------------------- */

static int note_kind(void *context, const dt_mapping *m)
{
    *(uint32_t *)context |= dt_kind_of(m);
    return 0;
}

int dt_compare_survey(dt_region *r)
{
    r->granule = dt_page_bytes(); /* huge pages too are compared in small ones */
    r->start = dt_down(r->address, r->granule);
    r->end = dt_up(r->address + r->nbytes, r->granule);
    dt_each_mapping(NULL, r->start, r->end, note_kind, &r->kinds); /* to tell of it only */
    r->kinds &= ~(uint32_t)DT_KIND_GIGANTIC;                 /* which another scan would be made for */
    return 0;
}

/* As /proc tells it, else found by trying. */
int dt_compare_mapping(uint64_t address, uint64_t end, dt_mapping *out)
{
    uint64_t page = dt_page_bytes(), at = address;
    int rc = dt_mapping_at(address, out);
    if (!rc || rc == -ENOENT)
        return rc;
    while (at < end && !dt_mapped(NULL, at, at + page))
        at += page;
    if (at >= end)
        return -ENOENT;
    uint64_t mapped = at + page, beyond = end; /* [at, mapped) is, and [at, beyond + page) is not */
    while (mapped < beyond) {
        uint64_t middle = mapped + dt_up((beyond - mapped) / 2, page);
        if (dt_mapped(NULL, at, middle))
            mapped = middle;
        else
            beyond = middle - page;
    }
    *out = (dt_mapping){.start = at, .end = mapped, .page_bytes = page};
    return 0;
}

/* ---- bytes as they are known ------------------------------------------------------------------------------------------------ */

/* Each page is read once, into a place where nobody writes, and compared there: what is given out is what is known from
 * then on. Is it another than the last scan read, then all are told, the caller too. What is in no plate is of a session
 * that is suspended, which reports it again in any case. */
int dt_compare_copy(dt_region *region, uint64_t from, uint64_t bytes, uint8_t *to, dt_failure *why)
{
    dt_session *s = region->session;
    const dt_compare *c = s->compare;
    uint64_t page = dt_page_bytes(), end = from + bytes, last = dt_up(end, page);
    dt_plate *p = NULL, none = {0};
    dt_reader r;
    dt_read_begin(&r, c);
    for (uint64_t at = from, next; at < end; at = next) {
        uint64_t base = dt_down(at, page);
        const uint8_t *now;
        dt_digest digest = {0, 0};
        next = dt_min(end, base + page);
        if (!p || p->end <= base) {
            uint64_t n = dt_plate_after(c, base);
            bool kept = n < c->count && c->plates[n].start <= base;
            none = (dt_plate){.start = base, .end = base + page};
            p = kept ? &c->plates[n] : &none;
        }
        int rc = dt_read_page(&r, p, base, dt_min(last, p->end), &now);
        if (rc || !now)
            return dt_fail_with(why, rc ? rc : -EFAULT, rc ? -rc : EFAULT, DT_STEP_COPY, base, base + page);
        if (p->pinned)
            now = memcpy(c->bounce, now, page);
        uint64_t i = (base - p->start) >> dt_page_shift();
        if (p != &none && differs(c, p, i, now, &digest)) {
            dt_mark_all(s->watches, s->watch_count, base, base + page);
            keep(c, p, i, now, &digest);
        }
        memcpy(to + (at - from), now + (at - base), next - at);
    }
    return 0;
}

int dt_compare_begin_copy(dt_region *region, dt_failure *why)
{
    int rc = dt_enter(region->session);
    return rc ? dt_fail_with(why, rc, 0, DT_STEP_COPY, region->start, region->end) : 0;
}

void dt_compare_end_copy(dt_region *region) { dt_leave(region->session); }
