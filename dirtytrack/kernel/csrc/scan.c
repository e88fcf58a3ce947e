/* SPDX-License-Identifier: MIT
 * The scan: asks the kernel which pages were written and re-arms them in the same step, and sees to it that every page
 * found reaches everybody who waits for it, whatever the kernel answers. */
#include "engine.h"
#include <sys/mman.h>
#include <time.h>

DT_HOT uint64_t dt_now_ns(void)
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

static void set_bits(uint64_t *bits, uint64_t first, uint64_t last)
{
    uint64_t i = first >> 6, j = last >> 6;
    if (i == j) {
        bits[i] |= mask_from(first) & mask_to(last);
        return;
    }
    bits[i] |= mask_from(first);
    memset(bits + i + 1, 0xff, (j - i - 1) * 8);
    bits[j] |= mask_to(last);
}

void dt_mark(dt_watch *w, uint64_t start, uint64_t end)
{
    uint64_t first, last;
    if (!bits_of(w, start, end, &first, &last))
        return;
    w->pending = true;
    set_bits(w->bits, first, last);
}

void dt_assume(dt_watch *w, uint64_t start, uint64_t end)
{
    uint64_t first, last;
    if (!bits_of(w, start, end, &first, &last))
        return;
    w->assuming = true;
    set_bits(w->assumed, first, last);
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

DT_APART void dt_fold(dt_pass *pass)
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
DT_HOT static void mark_found(dt_watch *w, const struct k_page_region *found, uint64_t n)
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

/* Those who are told. A mapping that was replaced by one of another kind may have added to the session's watches, and
 * moved them. */
static dt_watch *const *told(const dt_pass *pass, uint64_t *count)
{
    *count = pass->everybody ? pass->session->watch_count : pass->watch_count;
    return pass->everybody ? pass->session->watches : pass->watches;
}

DT_HOT DT_APART static void tell(dt_pass *pass, const struct k_page_region *found, uint64_t n)
{
    uint64_t count;
    dt_watch *const *watches = told(pass, &count);
    for (uint64_t w = 0; w < count; w++) {
        dt_watch *watch = watches[w];
        if (pass->direct && watch->listener == pass->self && (!pass->only || watch->region == pass->only))
            continue;
        mark_found(watch, found, n);
    }
    for (uint64_t i = 0; pass->aliased && i < n; i++)
        dt_alias_tell(pass->session, found[i].start, found[i].end);
}

DT_APART static void tell_range(dt_pass *pass, uint64_t start, uint64_t end)
{
    uint64_t count;
    dt_watch *const *watches = told(pass, &count);
    dt_fold(pass);
    dt_mark_all(watches, count, start, end);
    if (pass->aliased)
        dt_alias_tell(pass->session, start, end);
}

/* ---- the ioctls ------------------------------------------------------------------------------------------------- */

/* The kernel takes as much memory for its own as the answer may have: no more than one region a page, of 4 KiB or more. */
static inline uint64_t vector_for(uint64_t start, uint64_t end) { return dt_min(DT_VECTOR_LENGTH, (end - start) >> 12); }

/* The number of regions found, or -errno. */
static long scan_ioctl(dt_session *s, uint64_t start, uint64_t end, const dt_question *q)
{
    struct k_pm_scan_arg arg = {.size = sizeof arg, .flags = q->flags, .start = start, .end = end,
                                .vec = (uint64_t)s->vector, .vec_len = vector_for(start, end), .category_mask = q->mask,
                                .category_inverted = q->inverted, .category_anyof_mask = q->anyof,
                                .return_mask = q->mask & K_PAGE_IS_WRITTEN};
    int fail = dt_fail_at(DT_SITE_SCAN);
    if (fail > 0)
        return -fail;
    long n = s->compare ? dt_compare_scan(s, start, end, q, arg.vec_len) : ioctl(s->pagemap, K_PAGEMAP_SCAN, &arg);
    if (DT_UNLIKELY(n < 0) && !s->compare)
        n = -errno;
    s->statistics.scans++;
    s->filled = n < 0 ? DT_VECTOR_LENGTH : dt_max(s->filled, (uint64_t)n);
    return fail < 0 ? fail : n;
}

/* Before a scan whose finds must not be lost with their count; not after it, when the TLB is empty. */
static void wipe_vector(dt_session *s)
{
    memset(s->vector, 0, s->filled * sizeof *s->vector);
    s->filled = 0;
}

/* What a failed scan from `at` on left in the vector: its count is lost, not its finds. Behind them is either nothing, or
 * what an earlier call of the same pass found, before `at`. */
static uint64_t harvested(const dt_session *s, uint64_t at)
{
    uint64_t n = 0;
    while (n < DT_VECTOR_LENGTH && s->vector[n].end > at)
        n++;
    return n;
}

const dt_question DT_ABSENT = {.mask = K_PAGE_IS_PRESENT | K_PAGE_IS_SWAPPED,
                               .inverted = K_PAGE_IS_PRESENT | K_PAGE_IS_SWAPPED};

/* Calls end at multiples of a chunk or at the end of all: one that ended inside a huge page would pass over that page in
 * silence. */
static uint64_t chunk_end(const dt_session *s, uint64_t at, uint64_t end)
{
    return end - at <= s->chunk_bytes ? end : dt_down(at, s->chunk_bytes) + s->chunk_bytes;
}

/* Resumes at the end of the last run it got: the kernel's walk_end may name a place far before where the walk really was
 * (measured, Linux 6.12-7.3), and is not used at all. */
int dt_query(dt_session *s, uint64_t start, uint64_t end, const dt_question *question, dt_on_run on_run, void *context)
{
    for (uint64_t at = start, to; at < end; at = to) {
        to = chunk_end(s, at, end);
        for (;;) {
            long n = scan_ioctl(s, at, to, question);
            if (n < 0)
                return (int)n;
            struct k_page_region found[DT_VECTOR_LENGTH]; /* whoever is told may ask something in turn */
            memcpy(found, s->vector, (size_t)n * sizeof *found);
            for (long i = 0; i < n; i++)
                on_run(context, found[i].start, found[i].end);
            at = n ? found[n - 1].end : to;
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

static int is_any(dt_session *s, uint64_t page, uint64_t mask)
{
    bool any = false;
    int rc = dt_query(s, page, page + dt_page_bytes(), &(dt_question){.mask = mask}, remember_yes, &any);
    return rc ? rc : any;
}

int dt_page_written(dt_session *s, uint64_t page) { return is_any(s, page, K_PAGE_IS_WRITTEN); }
int dt_page_armable(dt_session *s, uint64_t page) { return is_any(s, page, K_PAGE_IS_WPALLOWED); }

/* SAFETY: UFFDIO_WRITEPROTECT erases what was written before it (measured): callers have told every listener, or no
 * listener waits for these pages. */
int dt_protect(dt_session *s, uint64_t start, uint64_t end)
{
    if (DT_UNLIKELY(s->compare))
        return dt_compare_protect(s, start, end);
    for (uint64_t at = start, length; at < end; at += length) {
        length = chunk_end(s, at, end) - at;
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

/* Told first, then armed: what is written between the two is read after this collect, and told by it. What cannot be
 * armed is told again by the next collect; ENOENT: not ours any more, which the scan that follows finds. */
static void tell_and_arm(dt_pass *pass, uint64_t start, uint64_t end)
{
    tell_range(pass, start, end);
    dt_protect(pass->session, start, end);
}

static void found_absent(void *context, uint64_t start, uint64_t end)
{
    dt_pass *pass = context;
    pass->session->statistics.pages_absent += (end - start) >> dt_page_shift();
    tell_and_arm(pass, start, end);
}

/* Remedy R1, where the probe found that the exact scan passes over freed page tables (Linux 6.12.43-7.1.7): pages that
 * are neither present nor swapped count as written. It comes before the exact scan: the other way round, a page that was
 * discarded and then written between the two would be in neither. */
DT_APART static int find_absent(dt_pass *pass, uint64_t start, uint64_t end)
{
    return dt_query(pass->session, start, end, &DT_ABSENT, found_absent, pass);
}

static void found_gigantic(void *context, uint64_t start, uint64_t end)
{
    dt_pass *pass = context;
    pass->session->statistics.pages_found += (end - start) >> dt_page_shift();
    tell_and_arm(pass, start, end);
}

static const dt_question DT_WRITTEN = {.flags = K_PM_SCAN_CHECK_WPASYNC, .mask = K_PAGE_IS_WRITTEN};

/* The arming scan takes a huge page of the pool for a part of one unless it is as large as what one entry of a PMD maps,
 * and neither reports nor arms it, in silence (Linux 6.7-6.12.43 at least; "use huge_page_size() in
 * pagemap_scan_hugetlb_entry" mends it, in some later one). So these are asked for without arming: told first, then
 * armed, as what is absent is. What was not written stays armed, and no write falls between the two. */
DT_APART static int find_gigantic(dt_pass *pass, uint64_t start, uint64_t end)
{
    int rc = dt_query(pass->session, start, end, &DT_WRITTEN, found_gigantic, pass);
    return rc == -EPERM ? 0 : rc; /* which the arming scan will meet too, and mend */
}

/* The one arming scan that is quick, and that finds discards on each kernel which reports them at all: any richer mask is
 * up to 36 times slower, and over huge pages of the pool it can hang the process for ever (measured, Linux 6.12-7.1). */
const dt_question DT_ARM_WRITTEN = {.flags = K_PM_SCAN_WP_MATCHING | K_PM_SCAN_CHECK_WPASYNC, .mask = K_PAGE_IS_WRITTEN};
/* The exception, for private anonymous memory: what is not populated gets no page table to hold a marker. */
const dt_question DT_ARM_POPULATED = {.flags = K_PM_SCAN_WP_MATCHING | K_PM_SCAN_CHECK_WPASYNC, .mask = K_PAGE_IS_WRITTEN,
                                        .anyof = K_PAGE_IS_PRESENT | K_PAGE_IS_SWAPPED};

/* To the end of `direct`, which has room, if there is one. Returns the pages found. */
DT_HOT static uint64_t append(dt_set *direct, const struct k_page_region *found, uint64_t n)
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

/* The remedies that come before the arming scan of [start, end). */
DT_APART static int find_before(dt_pass *pass, uint64_t start, uint64_t end)
{
    int rc = pass->find_absent ? find_absent(pass, start, end) : 0;
    return !rc && pass->find_gigantic ? find_gigantic(pass, start, end) : rc;
}

/* A scan from `at` on failed with `rc`. */
DT_APART static int harvest(dt_pass *pass, uint64_t at, uint64_t end, int rc)
{
    dt_session *s = pass->session;
    dt_fold(pass);
    tell(pass, s->vector, harvested(s, at));
    s->statistics.scans_refused += rc == -EPERM;
    if (rc != -EFAULT)
        return rc;
    s->statistics.scans_faulted++; /* after re-arming, before all was told (measured, Linux 6.12-7.3) */
    tell_range(pass, at, end);
    return 0;
}

/* One span of at most DT_CHUNK_BYTES. 0, -EPERM (some mapping in it is not registered; what was found is told), or
 * another -errno with nothing lost. */
DT_HOT static int find_and_arm(dt_pass *pass, uint64_t start, uint64_t end)
{
    dt_session *s = pass->session;
    wipe_vector(s);
    for (uint64_t at = start; at < end;) {
        long n = scan_ioctl(s, at, end, pass->present ? &DT_ARM_POPULATED : &DT_ARM_WRITTEN);
        if (DT_UNLIKELY(n < 0))
            return harvest(pass, at, end, (int)n);
        if (!n)
            break;
        if (pass->direct && dt_set_reserve(pass->direct, pass->direct->count + (uint64_t)n))
            dt_fold(pass); /* no memory for runs: there are always the bits */
        tell(pass, s->vector, (uint64_t)n);
        if (DT_UNLIKELY(pass->adapt != NULL))
            dt_adapt_found(pass->adapt, s->vector, (uint64_t)n);
        s->statistics.pages_found += append(pass->direct, s->vector, (uint64_t)n);
        /* Fewer than fit: done, whatever walk_end says. Else on from the last one: what lies before it was walked. */
        at = n < (long)DT_VECTOR_LENGTH ? end : s->vector[n - 1].end;
    }
    return 0;
}

static int scan_chunk(dt_pass *pass, uint64_t start, uint64_t end)
{
    int rc = DT_UNLIKELY(pass->find_absent || pass->find_gigantic) ? find_before(pass, start, end) : 0;
    return rc ? rc : find_and_arm(pass, start, end);
}

/* What is left unarmed is told without being asked for. */
DT_APART static void tell_unarmed(dt_pass *pass, uint64_t start, uint64_t end)
{
    const struct k_page_region all = {.start = start, .end = end};
    if (pass->session->remedy & DT_REMEDY_UNTOLD)
        return;
    if (pass->direct && dt_set_reserve(pass->direct, pass->direct->count + 1))
        dt_fold(pass);
    tell(pass, &all, 1);
    append(pass->direct, &all, 1);
}

static void assume(dt_pass *pass, uint64_t start, uint64_t end)
{
    uint64_t count;
    dt_watch *const *watches = told(pass, &count);
    for (uint64_t i = 0; i < count; i++)
        if (watches[i]->listener)
            dt_assume(watches[i], start, end);
    pass->session->statistics.pages_assumed += (end - start) >> dt_page_shift();
}

/* All of it, before any of it is armed. */
DT_APART static int tell_assumed(dt_pass *pass, uint64_t start, uint64_t end)
{
    tell_unarmed(pass, start, end);
    assume(pass, start, end);
    return dt_adapt_ask(pass->session, pass->adapt, start, end);
}

/* Where single pages are assumed, one question that arms nothing says between which of them there is something to arm. */
typedef struct between {
    dt_pass *pass;
    uint64_t at;                  /* what lies before it was told, and armed unless it is assumed */
    uint64_t first, last;         /* found behind it, and not yet armed: no page in it is assumed */
    uint64_t from, to;            /* the first run behind them that is assumed */
    uint64_t end;
    int rc;
} between;

/* In the order of addresses, as the set has them. */
static void arm_found(between *b)
{
    uint64_t from, to;
    for (; dt_adapt_next(b->pass->adapt, b->at, b->first, &from, &to); b->at = to)
        tell_unarmed(b->pass, from, to);
    if (b->first < b->last && !b->rc)
        b->rc = find_and_arm(b->pass, b->first, b->last);
    b->at = b->last;
}

static void found_between(void *context, uint64_t start, uint64_t end)
{
    between *b = context;
    while (start < end) {
        if (b->to <= start)
            dt_adapt_next(b->pass->adapt, start, b->end, &b->from, &b->to);
        uint64_t stop = start < b->from ? dt_min(end, b->from) : dt_min(end, b->to);
        if (start < b->from) {
            uint64_t from, to;
            if (b->first == b->last || dt_adapt_next(b->pass->adapt, b->last, start, &from, &to)) {
                arm_found(b);
                b->first = start;
            }
            b->last = stop;
        }
        start = stop;
    }
}

DT_APART static int scan_between(dt_pass *pass, uint64_t start, uint64_t end)
{
    between b = {.pass = pass, .at = start, .first = start, .last = start, .from = start, .to = start, .end = end};
    uint64_t from, to;
    int rc = find_before(pass, start, end);
    for (uint64_t at = start; !rc && dt_adapt_next(pass->adapt, at, end, &from, &to); at = to)
        assume(pass, from, to);
    dt_adapt_turn(pass->adapt, start, end);
    if (!rc)
        rc = dt_query(pass->session, start, end, &DT_WRITTEN, found_between, &b);
    if (!rc) {
        arm_found(&b);
        b.first = b.last = end;
        arm_found(&b);
    }
    return rc ? rc : b.rc;
}

static int scan_span(dt_pass *pass, uint64_t start, uint64_t end)
{
    static int (*const ways[])(dt_pass *, uint64_t, uint64_t) = {
        [DT_WAY_EXACT] = scan_chunk, [DT_WAY_ASSUMED] = tell_assumed, [DT_WAY_MIXED] = scan_between};
    int rc = 0;
    if (DT_LIKELY(!dt_adapt_any(pass->adapt)))
        return scan_chunk(pass, start, end);
    for (uint64_t at = start, to; at < end && !rc; at = to)
        rc = ways[dt_adapt_way(pass->adapt, at, end, &to)](pass, at, to);
    return rc;
}

/* [start, end) of a pass over [whole_start, whole_end), which `heal` looks at where it is not ours any more. */
typedef int (*heal)(dt_session *s, uint64_t start, uint64_t end);

static int scan_part(dt_pass *pass, uint64_t whole_start, uint64_t whole_end, uint64_t start, uint64_t end, heal mend,
                     int tries, dt_failure *why);

/* [at, next) of it was refused, or failed with `rc`. */
DT_APART static int scan_again(dt_pass *pass, uint64_t whole_start, uint64_t whole_end, uint64_t at, uint64_t next, heal mend,
                               int tries, int rc, dt_failure *why)
{
    int step = pass->session->compare ? dt_compare_step(rc) : DT_STEP_SCAN;
    dt_fold(pass);
    if (rc == -EPERM && tries < 4) {
        rc = mend(pass->session, whole_start, whole_end);
        if (!rc)
            return scan_part(pass, whole_start, whole_end, at, next, mend, tries + 1, why);
        step = DT_STEP_MAPS;
    } else if (rc == -EPERM) { /* somebody re-maps faster than we register, or it cannot be registered */
        tell_range(pass, at, next);
        return 0;
    }
    return dt_fail_with(why, rc, -rc, step, at, next);
}

static int scan_part(dt_pass *pass, uint64_t whole_start, uint64_t whole_end, uint64_t start, uint64_t end, heal mend,
                     int tries, dt_failure *why)
{
    uint64_t part = start, from, to;
    while (dt_next_own(pass->session, &part, end, &from, &to))
        for (uint64_t at = from, next; at < to; at = next) {
            next = chunk_end(pass->session, at, to);
            int rc = scan_span(pass, at, next);
            if (DT_UNLIKELY(rc) && (rc = scan_again(pass, whole_start, whole_end, at, next, mend, tries, rc, why)))
                return rc;
        }
    return 0;
}

int dt_scan_apart(dt_session *s, uint64_t start, uint64_t end, bool arm, uint64_t *written_pages)
{
    uint64_t bytes = 0;
    for (uint64_t at = start, to; at < end; at = to) {
        to = chunk_end(s, at, end);
        for (long n = DT_VECTOR_LENGTH; n == (long)DT_VECTOR_LENGTH && at < to;) {
            n = scan_ioctl(s, at, to, arm ? &DT_ARM_WRITTEN : &DT_WRITTEN);
            if (n < 0)
                return (int)n;
            for (long i = 0; i < n; i++)
                bytes += s->vector[i].end - s->vector[i].start;
            at = n ? s->vector[n - 1].end : to;
        }
    }
    *written_pages = bytes >> dt_page_shift();
    return 0;
}

static void forget_content(dt_session *s, uint64_t start, uint64_t end)
{
    for (uint64_t i = 0; i < s->watch_count; i++)
        if (!s->watches[i]->listener)
            dt_unmark(s->watches[i], start, end);
}

static void found_lost(void *context, uint64_t start, uint64_t end, bool keep)
{
    dt_pass *pass = context;
    dt_session *s = pass->session;
    tell_range(pass, start, end);
    if (!keep) { /* at each address and in each region that has it, lest they tell each other for ever */
        uint64_t next = 0;
        dt_run elsewhere;
        forget_content(s, start, end);
        while (pass->aliased && dt_alias_next(s, start, end, &next, &elsewhere))
            forget_content(s, elsewhere.start, elsewhere.end);
    }
    s->statistics.pages_lost += (end - start) >> dt_page_shift();
}

DT_APART static int find_lost(dt_pass *pass, uint64_t start, uint64_t end)
{
    int rc = 0;
    uint64_t count;
    dt_watch *const *watches = told(pass, &count);
    for (uint64_t i = 0; i < count && !rc; i++) {
        dt_watch *content = watches[i];
        if (!content->listener && content->region->armed)
            rc = dt_find_lost(pass->session, content, start, end, true, found_lost, pass);
    }
    return rc;
}

DT_HOT void dt_look_beneath(dt_pass *pass, uint64_t start, uint64_t end)
{
    const dt_session *s = pass->session;
    uint32_t kinds = pass->range ? pass->range->kinds : 0;
    uint64_t count = 0;
    dt_watch *const *watches = pass->range ? NULL : told(pass, &count);
    pass->find_lost |= pass->range && pass->range->content;
    for (uint64_t i = 0; i < count; i++) {
        const dt_watch *w = watches[i];
        if (w->start >= end || w->end <= start)
            continue;
        pass->find_lost |= !w->listener;
        kinds |= w->region->kinds;
    }
    bool hugetlb = kinds & DT_KIND_HUGETLB;
    pass->find_gigantic |= (kinds & DT_KIND_GIGANTIC) != 0;
    /* A huge page of the pool that was written and then discarded leaves neither page nor marker, and is not reported. */
    pass->find_absent |= s->find_absent || (hugetlb && !(s->remedy & DT_REMEDY_NO_ABSENT));
    pass->find_absent &= !pass->present;
    pass->aliased |= s->alias_count && dt_aliased(s, start, end);
}

/* What is delivered is read, and a page that was discarded is there again once it is read, as if nothing had been: so of
 * pages that this pass did not come to, others are told before. */
int dt_scan_lost(dt_pass *pass, uint64_t start, uint64_t end)
{
    dt_look_beneath(pass, start, end);
    return pass->find_lost ? find_lost(pass, start, end) : 0;
}

/* What [start, end) is mapped as elsewhere too. */
DT_APART static int scan_elsewhere(const dt_pass *pass, uint64_t start, uint64_t end, dt_failure *why)
{
    dt_session *s = pass->session;
    int rc = 0;
    uint64_t next = 0, known = s->alias_count;
    dt_run elsewhere;
    while (!rc && dt_alias_next(s, start, end, &next, &elsewhere)) {
        dt_pass other = {.session = s, .self = pass->self, .everybody = true, .find_absent = pass->find_absent,
                         .find_gigantic = pass->find_gigantic, .aliased = true};
        rc = scan_part(&other, elsewhere.start, elsewhere.end, elsewhere.start, elsewhere.end, dt_alias_heal, 0, why);
        if (known != s->alias_count) { /* some were let go of, and others have their places */
            known = s->alias_count;
            next = 0;
        }
    }
    return rc;
}

DT_HOT DT_FLAT int dt_scan_pass(dt_pass *pass, uint64_t start, uint64_t end, dt_failure *why)
{
    dt_session *s = pass->session;
    dt_look_beneath(pass, start, end);
    if (DT_UNLIKELY(pass->aliased))
        dt_fold(pass); /* what is found elsewhere is not found in the order of its addresses here */
    if (pass->aliased || pass->present)
        pass->adapt = NULL;
    dt_adapt *resting = DT_UNLIKELY(pass->adapt != NULL) && dt_adapt_rests(pass->adapt) ? pass->adapt : NULL;
    uint64_t before = s->statistics.pages_found;
    if (resting)
        pass->adapt = NULL;
    int rc = scan_part(pass, start, end, start, end, dt_heal, 0, why);
    if (DT_UNLIKELY(pass->adapt != NULL) && !rc)
        dt_adapt_decide(s, pass->adapt, start, end, &pass->wish);
    if (resting) {
        dt_adapt_rested(s, resting, s->statistics.pages_found - before);
        pass->adapt = resting;
    }
    if (DT_UNLIKELY(pass->aliased) && !rc)
        rc = scan_elsewhere(pass, start, end, why);
    if (!rc && pass->find_lost && (rc = find_lost(pass, start, end))) { /* what it had to look at is still pending */
        dt_fold(pass);
        dt_fail_with(why, rc, -rc, DT_STEP_MAPS, start, end);
    }
    return rc;
}
