/* SPDX-License-Identifier: MIT
 * The scan: asks the kernel which pages were written and re-arms them in the same step, and sees to it that every page
 * found reaches everybody who waits for it, whatever the kernel answers. */
#include "engine.h"
#include <sys/mman.h>
#include <time.h>

uint64_t dt_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- bits ------------------------------------------------------------------------------------------------------- */

static inline uint64_t mask_from(uint64_t bit) { return ~(uint64_t)0 << (bit & 63); }
static inline uint64_t mask_to(uint64_t bit) { return ~(uint64_t)0 >> (63 - (bit & 63)); } /* up to and with bit */

/* The pages of [start, end) that the watch covers, as bit numbers first..last; false: none. */
static inline bool bits_of(const dt_watch *w, uint64_t start, uint64_t end, uint64_t *first, uint64_t *last)
{
    start = dt_max(start, w->start);
    end = dt_min(end, w->end);
    if (start >= end)
        return false;
    *first = (start - w->start) >> dt_page_shift();
    *last = (end - 1 - w->start) >> dt_page_shift();
    return true;
}

void dt_mark(dt_watch *w, uint64_t start, uint64_t end)
{
    uint64_t first, last;
    if (!bits_of(w, start, end, &first, &last))
        return;
    w->pending = true;
    uint64_t i = first >> 6, j = last >> 6;
    if (i == j) {
        w->bits[i] |= mask_from(first) & mask_to(last);
        return;
    }
    w->bits[i] |= mask_from(first);
    memset(w->bits + i + 1, 0xff, (j - i - 1) * 8);
    w->bits[j] |= mask_to(last);
}

void dt_unmark(dt_watch *w, uint64_t start, uint64_t end)
{
    uint64_t first, last;
    if (!bits_of(w, start, end, &first, &last))
        return;
    uint64_t i = first >> 6, j = last >> 6;
    if (i == j) {
        w->bits[i] &= ~(mask_from(first) & mask_to(last));
        return;
    }
    w->bits[i] &= ~mask_from(first);
    memset(w->bits + i + 1, 0, (j - i - 1) * 8);
    w->bits[j] &= ~mask_to(last);
}

void dt_mark_all(dt_watch *const *watches, uint64_t n, uint64_t start, uint64_t end)
{
    for (uint64_t i = 0; i < n; i++)
        dt_mark(watches[i], start, end);
}

/* ---- telling everybody ------------------------------------------------------------------------------------------ */

void dt_fold(dt_pass *pass)
{
    dt_set *direct = pass->direct;
    if (!direct)
        return;
    pass->direct = NULL;
    for (uint64_t w = 0; w < pass->self->watch_count; w++)
        for (uint64_t i = 0; i < direct->count; i++)
            dt_mark(pass->self->watches[w], direct->runs[i].start, direct->runs[i].end);
    direct->count = direct->pages = 0;
}

/* dt_mark of many sorted runs. Most are one page long, and neighbours share a word of bits: it is kept in a register. */
static void mark_found(dt_watch *w, const struct k_page_region *found, uint64_t n)
{
    unsigned shift = dt_page_shift();
    uint64_t i = 0, beyond = n, at = 0, word = 0;
    while (i < beyond) { /* the first that ends in or behind this watch */
        uint64_t middle = (i + beyond) / 2;
        if (found[middle].end <= w->start)
            i = middle + 1;
        else
            beyond = middle;
    }
    if (i < n && found[i].start < w->start)
        dt_mark(w, found[i].start, found[i].end), i++;
    for (; i < n && found[i].end <= w->end; i++) {
        uint64_t first = (found[i].start - w->start) >> shift, last = (found[i].end - 1 - w->start) >> shift;
        if (first >> 6 != at) {
            w->bits[at] |= word;
            at = first >> 6;
            word = 0;
        }
        word |= mask_from(first) & (last >> 6 == at ? mask_to(last) : ~(uint64_t)0);
        if (DT_UNLIKELY(last >> 6 != at))
            dt_mark(w, found[i].start, found[i].end);
        w->pending = true;
    }
    if (word)
        w->bits[at] |= word;
    for (; i < n && found[i].start < w->end; i++)
        dt_mark(w, found[i].start, found[i].end);
}

static void tell(dt_pass *pass, const struct k_page_region *found, uint64_t n)
{
    for (uint64_t w = 0; w < pass->watch_count; w++) {
        dt_watch *watch = pass->watches[w];
        if (pass->direct && watch->listener == pass->self && (!pass->only || watch->region == pass->only))
            continue;
        mark_found(watch, found, n);
    }
}

static void tell_range(dt_pass *pass, uint64_t start, uint64_t end)
{
    dt_fold(pass);
    dt_mark_all(pass->watches, pass->watch_count, start, end);
}

/* ---- the ioctls ------------------------------------------------------------------------------------------------- */

/* The number of regions found, or -errno. The vector is zeroed before and after, as far as it was filled. */
static long scan_ioctl(dt_session *s, uint64_t start, uint64_t end, uint64_t flags, uint64_t mask, uint64_t inverted,
                       uint64_t returned)
{
    struct k_pm_scan_arg arg = {.size = sizeof arg, .flags = flags, .start = start, .end = end,
                                .vec = (uint64_t)s->vector, .vec_len = DT_VECTOR_LENGTH, .category_mask = mask,
                                .category_inverted = inverted, .return_mask = returned};
    int fail = dt_fail_at(DT_SITE_SCAN);
    if (fail > 0)
        return -fail;
    long n = ioctl(s->pagemap, K_PAGEMAP_SCAN, &arg);
    int error = errno;
    s->statistics.scans++;
    if (fail < 0)
        return fail;
    return n < 0 ? -error : n;
}

static void wipe_vector(dt_session *s, uint64_t n) { memset(s->vector, 0, n * sizeof *s->vector); }

/* What a failed scan from `at` on left in the vector: its count is lost, not its finds. Behind them is either nothing, or
 * what an earlier call of the same pass found, before `at`. */
static uint64_t harvested(const dt_session *s, uint64_t at)
{
    uint64_t n = 0;
    while (n < DT_VECTOR_LENGTH && s->vector[n].end > at)
        n++;
    return n;
}

/* A scan that arms nothing over [start, end), told run by run. Resumes at the end of the last run it got: the kernel's
 * walk_end may name a place far before where the walk really was (measured, Linux 6.12-7.3), and is not used at all. */
typedef void (*dt_on_run)(void *context, uint64_t start, uint64_t end);
static int query(dt_session *s, uint64_t start, uint64_t end, uint64_t flags, uint64_t mask, uint64_t inverted,
                 uint64_t returned, dt_on_run on_run, void *context)
{
    for (uint64_t chunk = start; chunk < end; chunk += DT_CHUNK_BYTES) {
        uint64_t at = chunk, to = dt_min(end, chunk + DT_CHUNK_BYTES);
        for (;;) {
            long n = scan_ioctl(s, at, to, flags, mask, inverted, returned);
            if (n < 0) {
                wipe_vector(s, DT_VECTOR_LENGTH);
                return (int)n;
            }
            for (long i = 0; i < n; i++)
                on_run(context, s->vector[i].start, s->vector[i].end);
            at = n ? s->vector[n - 1].end : to;
            wipe_vector(s, (uint64_t)n);
            if (n < (long)DT_VECTOR_LENGTH || at >= to)
                break;
        }
    }
    return 0;
}

static void remember_yes(void *context, uint64_t start, uint64_t end)
{
    (void)start, (void)end;
    *(bool *)context = true;
}

int dt_page_written(dt_session *s, uint64_t page)
{
    bool written = false;
    int rc = query(s, page, page + dt_page_bytes(), 0, K_PAGE_IS_WRITTEN, 0, K_PAGE_IS_WRITTEN, remember_yes, &written);
    return rc ? rc : written;
}

int dt_page_armable(dt_session *s, uint64_t page)
{
    bool allowed = false;
    int rc = query(s, page, page + dt_page_bytes(), 0, K_PAGE_IS_WPALLOWED, 0, K_PAGE_IS_WPALLOWED, remember_yes, &allowed);
    return rc ? rc : allowed;
}

/* SAFETY: UFFDIO_WRITEPROTECT erases what was written before it (measured): callers have told every listener, or no
 * listener waits for these pages. */
int dt_protect(dt_session *s, uint64_t start, uint64_t end)
{
    for (uint64_t at = start; at < end; at += DT_CHUNK_BYTES) {
        uint64_t length = dt_min(end - at, DT_CHUNK_BYTES);
        int rc;
        do {
            struct k_uffdio_writeprotect wp = {{at, length}, K_UFFDIO_WRITEPROTECT_MODE_WP};
            int fail = dt_fail_at(DT_SITE_PROTECT);
            rc = fail > 0 ? -fail : ioctl(s->uffd, K_UFFDIO_WRITEPROTECT, &wp) ? -errno : 0;
            if (fail < 0)
                rc = fail;
            s->statistics.protects++;
        } while (rc == -EAGAIN);
        if (rc)
            return rc;
    }
    return 0;
}

/* ---- a collecting pass ----------------------------------------------------------------------------------------------- */

/* Told first, then armed: what is written between the two is read after this collect, and told by it. */
static void found_absent(void *context, uint64_t start, uint64_t end)
{
    dt_pass *pass = context;
    tell_range(pass, start, end);
    pass->session->statistics.pages_absent += (end - start) >> dt_page_shift();
    dt_protect(pass->session, start, end); /* ENOENT: not ours any more, which the scan that follows finds */
}

/* Remedy R1, where the probe found that the exact scan passes over freed page tables (Linux 6.12.43-7.1.7): pages that
 * are neither present nor swapped count as written. It comes before the exact scan: the other way round, a page that was
 * discarded and then written between the two would be in neither. */
static int find_absent(dt_pass *pass, uint64_t start, uint64_t end)
{
    uint64_t absent = K_PAGE_IS_PRESENT | K_PAGE_IS_SWAPPED;
    return query(pass->session, start, end, 0, absent, absent, K_PAGE_IS_PRESENT, found_absent, pass);
}

/* To the end of `direct`, which has room, if there is one. Returns the pages found. */
static uint64_t append(dt_set *direct, const struct k_page_region *found, uint64_t n)
{
    uint64_t bytes = 0, first = 0;
    if (!direct || !direct->count) { /* so that what follows has a run before it */
        if (direct)
            dt_set_append(direct, found[0].start, found[0].end);
        bytes += found[0].end - found[0].start;
        first = 1;
    }
    dt_run *last = direct ? direct->runs + direct->count - 1 : NULL;
    for (uint64_t i = first; i < n; i++) {
        uint64_t start = found[i].start, end = found[i].end;
        bytes += end - start;
        if (!last)
            continue;
        if (last->end == start) /* where the kernel flushed its buffer, neighbours come apart */
            last->end = end;
        else
            *++last = (dt_run){start, end};
    }
    if (direct) {
        direct->count = (uint64_t)(last - direct->runs) + 1;
        direct->pages += bytes >> dt_page_shift();
    }
    return bytes >> dt_page_shift();
}

/* One span of at most DT_CHUNK_BYTES. 0, -EPERM (some mapping in it is not registered; what was found is told), or
 * another -errno with nothing lost. */
static int scan_chunk(dt_pass *pass, uint64_t start, uint64_t end)
{
    dt_session *s = pass->session;
    int rc = s->find_absent ? find_absent(pass, start, end) : 0;
    if (rc)
        return rc;
    uint64_t used = 0;
    for (uint64_t at = start; at < end;) {
        long n = scan_ioctl(s, at, end, K_PM_SCAN_WP_MATCHING | K_PM_SCAN_CHECK_WPASYNC, K_PAGE_IS_WRITTEN, 0,
                            K_PAGE_IS_WRITTEN);
        if (DT_UNLIKELY(n < 0)) {
            uint64_t kept = harvested(s, at);
            dt_fold(pass);
            tell(pass, s->vector, kept);
            wipe_vector(s, DT_VECTOR_LENGTH);
            if (n == -EFAULT) { /* after re-arming, before all was told (measured, Linux 6.12-7.3) */
                s->statistics.scans_faulted++;
                tell_range(pass, at, end);
                return 0;
            }
            s->statistics.scans_refused += n == -EPERM;
            return (int)n;
        }
        if (!n)
            break;
        if (pass->direct && dt_set_reserve(pass->direct, pass->direct->count + (uint64_t)n))
            dt_fold(pass); /* no memory for runs: there are always the bits */
        tell(pass, s->vector, (uint64_t)n);
        s->statistics.pages_found += append(pass->direct, s->vector, (uint64_t)n);
        used = dt_max(used, (uint64_t)n);
        /* Fewer than fit: done, whatever walk_end says. Else on from the last one: what lies before it was walked. */
        at = n < (long)DT_VECTOR_LENGTH ? end : s->vector[n - 1].end;
    }
    wipe_vector(s, used);
    return 0;
}

/* [start, end) of a pass over [whole_start, whole_end). */
static int scan_part(dt_pass *pass, uint64_t whole_start, uint64_t whole_end, uint64_t start, uint64_t end, int tries,
                     dt_failure *why)
{
    uint64_t at = start, from, to;
    while (dt_next_own(pass->session, &at, end, &from, &to))
        for (uint64_t chunk = from; chunk < to; chunk += DT_CHUNK_BYTES) {
            uint64_t chunk_end = dt_min(to, chunk + DT_CHUNK_BYTES);
            int rc = scan_chunk(pass, chunk, chunk_end), step = DT_STEP_SCAN;
            if (rc == -EPERM && tries < 4) {
                dt_fold(pass);
                rc = dt_heal(pass->session, whole_start, whole_end);
                if (!rc) {
                    rc = scan_part(pass, whole_start, whole_end, chunk, chunk_end, tries + 1, why);
                    if (rc)
                        return rc;
                }
                step = DT_STEP_MAPS;
            } else if (rc == -EPERM) { /* somebody re-maps faster than we register, or it cannot be registered */
                tell_range(pass, chunk, chunk_end);
                rc = 0;
            }
            if (rc) {
                dt_fold(pass);
                return dt_fail_with(why, rc, -rc, step, chunk, chunk_end);
            }
        }
    return 0;
}

int dt_scan_pass(dt_pass *pass, uint64_t start, uint64_t end, dt_failure *why)
{
    return scan_part(pass, start, end, start, end, 0, why);
}

int dt_arm(dt_session *s, dt_region *region, dt_failure *why)
{
    dt_pass pass = {.session = s, .watches = s->watches, .watch_count = s->watch_count};
    int rc = dt_look_for_strangers(s);
    if (!rc && (region->gone_bytes || !dt_mapped(region->start, region->end)))
        rc = dt_heal(s, region->start, region->end);
    if (rc)
        return dt_fail_with(why, rc, -rc, DT_STEP_MAPS, region->start, region->end);
    if (region->gone_bytes) {
        if (why)
            why->region = region->id;
        return dt_fail_with(why, DT_GONE, 0, DT_STEP_PROTECT, region->gone_start, region->gone_end);
    }
    if (region->armed)
        return dt_scan_pass(&pass, region->start, region->end, why);
    /* What another armed region holds has listeners who wait for its bits: there only a collecting scan may arm. Twice
     * over the span: the parts that nobody armed yet, then all of it, where the first kind is quick. */
    uint64_t at = region->start, from, to;
    while (!rc && dt_next_uncovered(s, dt_counts_armed, region, &at, region->end, &from, &to)) {
        rc = dt_protect(s, from, to);
        if (rc == -ENOENT) { /* replaced since it was registered, maybe in part */
            rc = dt_heal(s, region->start, region->end);
            if (!rc)
                rc = dt_protect(s, from, to);
        }
        if (rc)
            dt_fail_with(why, rc, -rc, DT_STEP_PROTECT, from, to);
    }
    bool shared = false;
    for (uint64_t i = 0; i < s->region_count; i++) {
        const dt_region *other = s->regions[i];
        shared |= dt_counts_armed(other, region) && other->start < region->end && region->start < other->end;
    }
    if (!rc && shared)
        rc = dt_scan_pass(&pass, region->start, region->end, why);
    region->armed |= !rc;
    return rc;
}

/* ---- a look that changes nothing -------------------------------------------------------------------------------------- */

typedef struct peek_context { dt_set *out; int rc; } peek_context;

static void add_run(void *context, uint64_t start, uint64_t end)
{
    peek_context *c = context;
    if (!c->rc)
        c->rc = dt_set_reserve(c->out, c->out->count + 1);
    if (!c->rc)
        dt_set_append(c->out, start, end);
}

int dt_peek_range(dt_session *s, uint64_t start, uint64_t end, dt_set *written, dt_set *absent, dt_failure *why)
{
    peek_context c = {written, 0}, a = {absent, 0};
    uint64_t kept = written->count, neither = K_PAGE_IS_PRESENT | K_PAGE_IS_SWAPPED;
    int rc = query(s, start, end, K_PM_SCAN_CHECK_WPASYNC, K_PAGE_IS_WRITTEN, 0, K_PAGE_IS_WRITTEN, add_run, &c);
    if (rc == -EPERM && !c.rc) { /* some of it is not ours any more: a collect would renew it, wholly dirty */
        written->count = kept;
        add_run(&c, start, end);
        rc = 0;
    }
    if (!rc && s->find_absent) /* remedy R1, as in a collect */
        rc = query(s, start, end, 0, neither, neither, K_PAGE_IS_PRESENT, add_run, &a);
    int memory = c.rc ? c.rc : a.rc;
    if (memory)
        return dt_fail_with(why, memory, -memory, DT_STEP_MEMORY, start, end);
    return rc ? dt_fail_with(why, rc, -rc, DT_STEP_SCAN, start, end) : 0;
}
