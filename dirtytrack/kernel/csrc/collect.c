/* SPDX-License-Identifier: MIT
 * Collecting: what is pending for a listener, and what a scan finds, becomes a dt_set. */
#include "engine.h"

/* ---- from bits to runs ------------------------------------------------------------------------------------------------ */

/* Whether one of eight words has a bit. */
static inline bool any(const uint64_t *words)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < 8; i++)
        sum |= words[i];
    return sum;
}

/* Where runs start and where they end are found apart: two short loops a word, without a branch on each run's length. A
 * run that goes on from what `out` ends with is joined to it, unless that is one of its first `apart`. */
DT_HOT DT_APART static int emit_runs(uint64_t start, const uint64_t *words, uint64_t count, uint64_t apart, dt_set *out)
{
    unsigned shift = dt_page_shift();
    dt_run *runs = out->runs;
    uint64_t carry = out->count > apart && runs[out->count - 1].end == start && words[0] & 1;
    uint64_t starts = out->count, ends = out->count - carry, base = start, bytes = carry ? -start : 0, room = 0;
    for (uint64_t i = 0; i < count; i++, base += (uint64_t)64 << shift) {
        for (; !(i & 7) && !carry && count - i > 8 && !any(words + i); i += 8) /* most of a large memory */
            base += (uint64_t)512 << shift;
        uint64_t bits = words[i], before = bits << 1 | carry;
        if (bits == before) /* none of it, or all of it in the run that began before it */
            continue;
        if (DT_UNLIKELY(starts + DT_WORD_RUNS > room)) {
            if (dt_set_reserve(out, starts + DT_WORD_RUNS))
                return -ENOMEM;
            room = ((dt_block *)out->block_)->capacity;
            runs = out->runs;
        }
        for (uint64_t up = bits & ~before, at; up; up &= up - 1) {
            runs[starts++].start = at = base + ((uint64_t)__builtin_ctzll(up) << shift);
            bytes -= at;
        }
        for (uint64_t down = ~bits & before, at; down; down &= down - 1) {
            runs[ends++].end = at = base + ((uint64_t)__builtin_ctzll(down) << shift);
            bytes += at;
        }
        carry = bits >> 63;
    }
    if (carry) {
        runs[ends++].end = base;
        bytes += base;
    }
    out->count = ends;
    out->pages += bytes >> shift;
    return 0;
}

/* Everything pending in these watches, appended to `out`, which is empty unless they overlap; clears nothing. */
DT_HOT DT_APART static int extract(dt_watch *const *watches, uint64_t n, bool overlapping, dt_set *out)
{
    uint64_t count = out->count, pages = out->pages;
    for (uint64_t i = 0; i < n; i++) /* where they overlap, each by itself */
        if (watches[i]->pending &&
            emit_runs(watches[i]->start, watches[i]->bits, watches[i]->words, overlapping ? out->count : 0, out)) {
            out->count = count;
            out->pages = pages;
            return -ENOMEM;
        }
    if (overlapping) {
        dt_set_sort(out);
        dt_set_count_pages(out);
    }
    return 0;
}

/* ---- collecting ----------------------------------------------------------------------------------------------------- */

/* Holes are looked for before the scan, which passes over them in silence: a mapping that goes away after this look is
 * concurrent with the collect, and found by the next one. */
DT_HOT static int look_for_holes(dt_session *s, dt_watch *const *watches, uint64_t n, dt_range *ranges, uint64_t range_count,
                          bool tell, dt_failure *why)
{
    int strange = dt_look_for_strangers(s);
    if (strange)
        return dt_fail_with(why, strange, -strange, DT_STEP_MAPS, 0, 0);
    for (uint64_t i = 0, next; i < range_count && !s->space; i = next) { /* of a target, dt_layout_changed tells */
        next = i + ranges[i].together;
        if (DT_LIKELY(dt_mapped(s, ranges[i].start, ranges[next - 1].end)))
            continue;
        bool between = true; /* the hole is in none of them */
        for (uint64_t k = i; k < next; k++) {
            if (next - i > 1 && dt_mapped(s, ranges[k].start, ranges[k].end))
                continue;
            between = false;
            int rc = dt_heal(s, ranges[k].start, ranges[k].end);
            if (rc)
                return dt_fail_with(why, rc, -rc, DT_STEP_MAPS, ranges[k].start, ranges[k].end);
        }
        if (between)
            dt_put_together(s, ranges + i, next - i);
    }
    for (uint64_t i = 0; tell && i < n; i++) {
        dt_watch *w = watches[i];
        const dt_region *r = w->region;
        if (DT_LIKELY(w->told == r->gone_version))
            continue;
        w->told = r->gone_version;
        if (!r->gone_bytes)
            continue;
        dt_fail_region(why, DT_GONE, r);
        why->start = r->gone_start;
        why->end = r->gone_end;
        return DT_GONE;
    }
    return 0;
}

typedef struct selection {
    dt_watch *const *watches;
    uint64_t watch_count;
    dt_range *ranges;
    uint64_t range_count;
    bool overlapping;
    dt_range one;
    dt_watch *own;
} selection;

DT_HOT static int select_watches(dt_listener *l, dt_region *only, selection *out, dt_failure *why)
{
    *out = (selection){0};
    if (!l->running)
        return dt_fail_region(why, DT_NOT_STARTED, NULL);
    if (dt_plan(l))
        return dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    if (!only) {
        out->watches = l->watches;
        out->watch_count = l->watch_count;
        out->ranges = l->ranges;
        out->range_count = l->range_count;
        out->overlapping = l->overlapping;
        return 0;
    }
    out->own = dt_watch_of(l, only);
    if (!out->own)
        return dt_fail_region(why, DT_NOT_WATCHED, only);
    out->watches = &out->own;
    out->watch_count = 1;
    out->one = (dt_range){.start = only->start, .end = only->end, .present = only->present, .together = 1};
    for (uint64_t i = 0; i < l->range_count; i++)
        if (l->ranges[i].start == only->start && l->ranges[i].end == only->end) {
            out->one.adapt = l->ranges[i].adapt;
            out->one.wish = l->ranges[i].wish;
        }
    out->ranges = &out->one;
    out->range_count = 1;
    return 0;
}

DT_APART static int add_assumed_of(dt_set *to, const dt_watch *w)
{
    return w->assuming ? emit_runs(w->start, w->assumed, w->words, to->count, to) : 0; /* it may overlap what is there */
}

/* What is assumed at this moment. */
static int add_assumed_now(dt_set *to, const dt_range *range)
{
    int rc = 0;
    if (!dt_adapt_any(range->adapt))
        return 0;
    for (uint64_t at = range->start, from, next; !rc && dt_adapt_next(range->adapt, at, range->end, &from, &next); at = next)
        if (!(rc = dt_set_reserve(to, to->count + 1)))
            to->runs[to->count++] = (dt_run){from, next};
    return rc;
}

/* Which part of the set was told to its watches without having been watched: by other listeners' passes too. now: and
 * what would be, in a pass at this moment. */
DT_APART static int find_assumed(const selection *what, bool now, dt_set *out)
{
    dt_set assumed = {0};
    int rc = 0;
    for (uint64_t i = 0; i < what->watch_count && !rc; i++)
        rc = add_assumed_of(&assumed, what->watches[i]);
    for (uint64_t i = 0; now && i < what->range_count && !rc; i++)
        rc = add_assumed_now(&assumed, &what->ranges[i]);
    dt_set_sort(&assumed);
    if (!rc)
        rc = dt_set_assume(out, assumed.runs, assumed.count);
    dt_set_clear(&assumed);
    return rc;
}

DT_APART static void mark_flights(dt_session *s, const selection *what)
{
    for (uint64_t f = 0; f < s->flight_count; f++) {
        uint64_t next = 0;
        dt_run elsewhere;
        dt_mark_all(what->watches, what->watch_count, s->flights[f].start, s->flights[f].end);
        while (dt_alias_next(s, s->flights[f].start, s->flights[f].end, &next, &elsewhere))
            dt_mark_all(what->watches, what->watch_count, elsewhere.start, elsewhere.end);
    }
}

static void add_statistics(dt_statistics *restrict to, const dt_statistics *restrict now, const dt_statistics *restrict then)
{
    for (size_t i = 0; i < sizeof *to / sizeof(uint64_t); i++)
        ((uint64_t *)to)[i] += ((const uint64_t *)now)[i] - ((const uint64_t *)then)[i];
}

/* Scans [range.start, range.end) from `from` on, in small pieces until the deadline. 1: time is up, cursor is set. */
DT_APART static int scan_on_budget(dt_listener *l, dt_pass *pass, const dt_range *range, uint64_t from, uint64_t to, uint64_t deadline,
                          dt_failure *why)
{
    uint64_t piece = dt_max(DT_BUDGET_CHUNK_BYTES, l->granule);
    for (uint64_t at = dt_max(from, range->start), end; at < dt_min(to, range->end); at = end) {
        end = dt_min(dt_min(to, range->end), dt_down(at, piece) + piece);
        int rc = dt_scan_pass(pass, at, end, why);
        if (rc)
            return rc;
        l->cursor = end;
        if (dt_now_ns() >= deadline)
            return 1;
    }
    return 0;
}

static dt_pass pass_of(dt_listener *l, const selection *what)
{
    return (dt_pass){.session = l->session, .self = l, .only = what->own ? what->own->region : NULL, .everybody = what->own};
}

static void turn_to(dt_pass *pass, const selection *what, const dt_range *range)
{
    pass->range = what->own ? NULL : range;
    pass->watches = pass->self->overlaps + range->first;
    pass->watch_count = range->count;
    pass->present = range->present;
    pass->adapt = range->adapt;
    pass->wish = range->wish;
    pass->find_absent = pass->find_gigantic = pass->find_lost = pass->aliased = false;
}

/* Of the pages in the set, which waited, not all were looked at in this pass. */
DT_APART static int tell_lost(dt_listener *l, const selection *what, dt_set *out)
{
    dt_session *s = l->session;
    dt_pass pass = pass_of(l, what);
    uint64_t lost = s->statistics.pages_lost;
    for (uint64_t i = 0, r = 0; i < what->range_count; i++) {
        const dt_range *range = &what->ranges[i];
        turn_to(&pass, what, range);
        while (r < out->count && out->runs[r].start < range->end) {
            uint64_t start = dt_max(out->runs[r].start, range->start), end = dt_min(out->runs[r].end, range->end);
            int rc = dt_scan_lost(&pass, start, end);
            if (rc)
                return dt_fail_with(&out->why, rc, -rc, DT_STEP_MAPS, start, end);
            if (out->runs[r].end > range->end)
                break; /* the rest of it is in the next range */
            r++;
        }
    }
    if (lost == s->statistics.pages_lost)
        return 0;
    out->count = out->pages = 0; /* some may be told elsewhere too, where they are the same memory */
    int rc = extract(what->watches, what->watch_count, what->overlapping, out);
    return rc ? dt_fail_with(&out->why, rc, ENOMEM, DT_STEP_MEMORY, 0, 0) : 0;
}

DT_HOT static int scan_selection(dt_listener *l, const selection *what, double budget_seconds, bool direct, dt_set *out)
{
    bool limited = budget_seconds >= 0;
    double nanoseconds = (budget_seconds < 1e6 ? budget_seconds : 1e6) * 1e9;
    uint64_t deadline = limited ? dt_now_ns() + (uint64_t)nanoseconds : 0;
    uint64_t cursor = limited ? l->cursor : 0;
    dt_pass pass = pass_of(l, what);
    pass.direct = direct ? out : NULL;
    for (int lap = 0; lap < (limited ? 2 : 1); lap++)
        for (uint64_t i = 0; i < what->range_count; i++) {
            const dt_range *range = &what->ranges[i];
            turn_to(&pass, what, range);
            int rc = limited ? scan_on_budget(l, &pass, range, lap ? 0 : cursor, lap ? cursor : UINT64_MAX, deadline, &out->why)
                             : dt_scan_pass(&pass, range->start, range->end, &out->why);
            if (rc > 0) {
                bool rest = false; /* was that the end of it all? */
                for (uint64_t j = 0; j < what->range_count; j++)
                    rest |= lap ? what->ranges[j].start < cursor && what->ranges[j].end > l->cursor && l->cursor < cursor
                                : what->ranges[j].end > l->cursor || what->ranges[j].start < cursor;
                out->complete = !rest;
                return 0;
            }
            if (rc)
                return rc;
        }
    return 0;
}

DT_HOT static int collect_locked(dt_listener *l, dt_region *only, double budget_seconds, bool tell, dt_set *out)
{
    dt_session *s = l->session;
    selection what;
    uint64_t begun = dt_now_ns();
    dt_statistics before = s->statistics;
    int rc = select_watches(l, only, &what, &out->why);
    if (!rc)
        rc = look_for_holes(s, what.watches, what.watch_count, what.ranges, what.range_count, tell, &out->why);
    if (rc)
        return rc;
    if (DT_UNLIKELY(s->flight_count))
        mark_flights(s, &what);
    out->complete = 1;
    if (DT_UNLIKELY(s->suspended)) {
        for (uint64_t i = 0; i < what.watch_count; i++)
            dt_mark_whole(what.watches[i]);
    } else {
        bool direct = budget_seconds < 0;
        for (uint64_t i = 0; direct && i < what.watch_count; i++)
            direct = !what.watches[i]->pending;
        rc = scan_selection(l, &what, budget_seconds, direct, out);
        if (!rc && (rc = dt_look_for_strangers(s)))
            dt_fail_with(&out->why, rc, -rc, DT_STEP_MAPS, 0, 0);
        if (!rc && DT_UNLIKELY(s->space != NULL) && (rc = dt_target_there(s)))
            dt_fail_with(&out->why, rc, -rc, DT_STEP_SCAN, 0, 0);
    }
    /* Either all of it went to the set, or a fold put all of it into the bits. Bits set in both cases (a region of this
     * listener overlaps one that alone was asked for) stay where they are. */
    bool bits = false, assuming = false;
    for (uint64_t i = 0; i < what.watch_count; i++) {
        bits |= what.watches[i]->pending;
        assuming |= what.watches[i]->assuming;
    }
    if (!rc && bits) {
        rc = extract(what.watches, what.watch_count, what.overlapping || out->count, out);
        if (rc)
            dt_fail_with(&out->why, rc, ENOMEM, DT_STEP_MEMORY, 0, 0);
        else if (DT_UNLIKELY(!out->complete))
            rc = tell_lost(l, &what, out);
    }
    if (!rc && DT_UNLIKELY(assuming) && (rc = find_assumed(&what, false, out)))
        dt_fail_with(&out->why, rc, ENOMEM, DT_STEP_MEMORY, 0, 0);
    if (rc) {
        dt_pass pass = {.session = s, .self = l, .direct = out};
        dt_fold(&pass);
        return rc;
    }
    dt_set_trim(out);
    l->expected = out->count;
    if (DT_UNLIKELY(l->audit_count) && (only || !out->complete))
        dt_audit_skip(l, out);
    else if (DT_UNLIKELY(l->audit_count) && (rc = dt_audit_check(l, out))) {
        dt_pass pass = {.session = s, .self = l, .direct = out};
        dt_fold(&pass); /* not delivered: it waits for the next collect, with the page that was missed */
        return rc;
    }
    for (uint64_t i = 0; (bits || assuming) && i < what.watch_count; i++)
        dt_forget(what.watches[i]);
    out->epoch = l->epoch++;
    s->statistics.collects++;
    s->statistics.collect_ns += dt_now_ns() - begun;
    add_statistics(&l->statistics, &s->statistics, &before);
    return 0;
}

/* What a collect looks at, asked for at once instead of one after the other: a program that wrote much has left none of
 * it in the processor's caches. Only hints: what is not there any more, in a child or in another thread, is not read. */
DT_HOT static void ask_for_all(const dt_listener *l)
{
    dt_ask_for(l, sizeof *l);
    dt_ask_for(l->session, sizeof *l->session);
    dt_ask_for(l->ranges, sizeof *l->ranges);
    dt_ask_for(l->watches, sizeof *l->watches);
    dt_ask_for(l->overlaps, sizeof *l->overlaps);
    dt_ask_for(atomic_load_explicit(&l->spare, memory_order_relaxed), 64);
}

DT_HOT int dt_collect(dt_listener *l, dt_region *region, double budget_seconds, dt_set *out)
{
    *out = (dt_set){0};
    ask_for_all(l);
    int rc = dt_enter(l->session);
    if (rc)
        return dt_fail_region(&out->why, rc, NULL);
    rc = dt_claim(l, region, out);
    if (!rc)
        rc = collect_locked(l, region, budget_seconds, true, out);
    dt_leave(l->session);
    return rc;
}

int dt_collect_into(dt_listener *l, dt_region *region, const dt_extent *extents, uint64_t n, dt_set *out)
{
    int rc = dt_collect(l, region, -1, out);
    /* Re-armed, then copied: a write between the two is in the copy, or in the next epoch, or in both. */
    return rc ? rc : dt_copy_out(out, extents, n, &out->why);
}

int dt_remove(dt_listener *l, dt_region *region, dt_set *out)
{
    *out = (dt_set){0};
    int rc = dt_enter(l->session);
    if (rc)
        return dt_fail_region(&out->why, rc, region);
    rc = dt_claim(l, region, out);
    if (!rc)
        rc = collect_locked(l, region, -1, false, out);
    if (!rc)
        dt_detach(l, dt_watch_of(l, region), out->block_);
    dt_leave(l->session);
    return rc;
}

int dt_stop(dt_listener *l, dt_set *out)
{
    *out = (dt_set){0};
    int rc = dt_enter(l->session);
    if (rc)
        return dt_fail_region(&out->why, rc, NULL);
    rc = dt_claim(l, NULL, out);
    if (!rc)
        rc = collect_locked(l, NULL, -1, true, out);
    if (!rc) {
        dt_block *block = out->block_;
        while (l->watch_count)
            dt_detach(l, l->watches[l->watch_count - 1], block);
        block->stopped = 1;
        l->running = false;
    }
    dt_leave(l->session);
    return rc;
}

int dt_peek(dt_listener *l, dt_region *region, dt_set *out)
{
    *out = (dt_set){0};
    dt_session *s = l->session;
    int rc = dt_enter(s);
    if (rc)
        return dt_fail_region(&out->why, rc, NULL);
    selection what;
    dt_set pending = {0}, written = {0}, others = {0};
    rc = select_watches(l, region, &what, &out->why);
    if (!rc) {
        mark_flights(s, &what);
        rc = extract(what.watches, what.watch_count, what.overlapping, &pending);
        if (rc)
            dt_fail_with(&out->why, rc, ENOMEM, DT_STEP_MEMORY, 0, 0);
    }
    for (uint64_t i = 0; !rc && i < what.range_count; i++) {
        const dt_range *r = &what.ranges[i];
        if (!s->suspended)
            rc = dt_peek_range(s, r->start, r->end, r->present, s->watches, s->watch_count, &written, &others, &out->why);
        else if (!(rc = dt_set_reserve(&written, written.count + 1)))
            dt_set_append(&written, r->start, r->end);
        if (!rc)
            rc = add_assumed_now(&others, r);
    }
    dt_set_sort(&others);
    if (!rc) {
        const dt_set *parts[] = {&pending, &written, &others};
        rc = dt_set_union_many(parts, 3, out);
        out->epoch = l->epoch;
        out->complete = 1;
        if (!rc)
            rc = find_assumed(&what, true, out);
        if (rc)
            dt_fail_with(&out->why, rc, ENOMEM, DT_STEP_MEMORY, 0, 0);
    }
    dt_set_clear(&pending);
    dt_set_clear(&written);
    dt_set_clear(&others);
    dt_leave(s);
    return rc;
}
