/* SPDX-License-Identifier: MIT
 * Mappings that went away beneath a region, or were replaced, or belong to somebody else by now. */
#include "engine.h"
#include <sys/mman.h>

static void unmark_all(dt_session *s, uint64_t start, uint64_t end)
{
    for (uint64_t i = 0; i < s->watch_count; i++)
        dt_unmark(s->watches[i], start, end);
}

/* msync(MS_ASYNC) writes nothing since Linux 2.6.19; it says ENOMEM where part of the range is not mapped, at the cost
 * of one system call. A scan would pass over such a hole in silence. */
DT_HOT bool dt_mapped(const dt_session *s, uint64_t start, uint64_t end)
{
    if (s && s->space)
        return dt_target_mapped(s, start, end);
    return msync((void *)start, end - start, MS_ASYNC) == 0 || errno != ENOMEM;
}

static void note_hole(dt_session *s, uint64_t within_start, uint64_t within_end, uint64_t start, uint64_t end)
{
    unmark_all(s, start, end); /* nobody can read them any more */
    if (s->compare)
        dt_compare_lose(s, start, end);
    for (uint64_t i = 0; i < s->region_count; i++) {
        dt_region *r = s->regions[i];
        uint64_t a = dt_max(start, r->start), b = dt_min(end, r->end);
        if (a >= b || r->start < within_start || r->end > within_end)
            continue;
        if (!r->seen_bytes) {
            r->seen_start = a;
            r->seen_end = b;
        }
        r->seen_bytes += b - a;
    }
}

/* Of [start, end) it is found out anew. What is forgotten beyond it would be scanned, and its bits taken. */
static int forget_foreign(dt_session *s, uint64_t start, uint64_t end)
{
    int rc = dt_room((void **)&s->foreign, &s->foreign_room, s->foreign_count + 1, sizeof *s->foreign);
    for (uint64_t i = 0; !rc && i < s->foreign_count;) {
        dt_run *f = &s->foreign[i];
        if (f->end <= start || f->start >= end) {
            i++;
        } else if (f->start < start && f->end > end) { /* no other run lies in it: there is one such at most */
            s->foreign[s->foreign_count++] = (dt_run){end, f->end};
            f->end = start;
            i++;
        } else if (f->start < start) {
            f->end = start;
            i++;
        } else if (f->end > end) {
            f->start = end;
            i++;
        } else {
            *f = s->foreign[--s->foreign_count];
        }
    }
    return rc;
}

static int note_foreign(dt_session *s, uint64_t within_start, uint64_t within_end, uint64_t start, uint64_t end)
{
    int rc = dt_room((void **)&s->foreign, &s->foreign_room, s->foreign_count + 1, sizeof *s->foreign);
    if (rc)
        return rc;
    s->foreign[s->foreign_count++] = (dt_run){start, end};
    note_hole(s, within_start, within_end, start, end);
    return 0;
}

/* The next part of [*at, end) that is not foreign; false at the end. */
DT_HOT bool dt_next_own(const dt_session *s, uint64_t *at, uint64_t end, uint64_t *from, uint64_t *to)
{
    while (*at < end) {
        uint64_t next = end, behind = *at;
        for (uint64_t i = 0; i < s->foreign_count; i++) {
            const dt_run *f = &s->foreign[i];
            if (f->start <= *at && f->end > *at)
                behind = dt_max(behind, f->end);
            else if (f->start > *at)
                next = dt_min(next, f->start);
        }
        if (behind > *at) {
            *at = behind;
            continue;
        }
        *from = *at;
        *to = *at = next;
        return true;
    }
    return false;
}

/* Where an address that went away beneath a region was used again and registered by another session, the kernel lets us
 * scan and arm it all the same, and take that session's bits. So whenever another session registered something, ours is
 * looked at again before it is scanned; and after, since it may have been meanwhile. What another process registers in a
 * target is not heard of: once one was met there, each time. To look costs 2 us a region and more: see
 * ProcessTracker._look_once for why those who have met nobody need not. */
DT_HOT int dt_look_for_strangers(dt_session *s)
{
    uint64_t registrations = atomic_load(&dt_registrations), thefts = atomic_load(&dt_thefts);
    if (DT_LIKELY(registrations == s->registrations && thefts == s->thefts && !s->foreign_count && !s->met_strangers) || s->suspended || s->compare)
        return 0;
    for (uint64_t i = 0; i < s->region_count; i++) {
        int rc = s->regions[i]->registered ? dt_heal(s, s->regions[i]->start, s->regions[i]->end) : 0;
        if (rc)
            return rc;
    }
    bool lost = false;
    int rc = dt_alias_verify(s, &lost);
    if (rc)
        return rc;
    if (registrations != s->registrations && (s->foreign_count || lost))
        thefts = atomic_fetch_add(&dt_thefts, 1) + 1;
    s->registrations = registrations;
    for (uint64_t i = 0; thefts != s->thefts && i < s->watch_count; i++)
        dt_mark(s->watches[i], s->watches[i]->start, s->watches[i]->end);
    s->thefts = thefts;
    return 0;
}

/* A mapping that was replaced may be of another kind than the one that was registered. */
static int note_kind(dt_session *s, uint64_t start, uint64_t end, const dt_mapping *m, bool *fits, bool *present)
{
    *fits = *present = true;
    for (uint64_t i = 0; i < s->region_count; i++) {
        dt_region *r = s->regions[i];
        if (!r->registered || r->start >= end || r->end <= start)
            continue;
        uint32_t kinds = r->kinds | dt_kind_of(m);
        s->layout_version += kinds != r->kinds;
        r->kinds = kinds;
        r->present &= kinds == DT_KIND_ANONYMOUS;
        *present &= r->present;
        /* Part of a huge page would be passed over in silence. */
        *fits &= !((dt_max(r->start, m->start) | dt_min(r->end, m->end)) & (m->page_bytes - 1));
        if (dt_content_begin(s, r))
            return -ENOMEM;
    }
    return 0;
}

/* What is mapped there now; it is wholly dirty already. */
static int arm_anew(dt_session *s, uint64_t start, uint64_t end, bool present)
{
    int rc = 0;
    for (uint64_t i = 0; i < s->region_count && !rc; i++)
        rc = dt_content_before_arming(s, s->regions[i], start, end);
    if (!rc && !present)
        dt_protect(s, start, end); /* what it cannot arm, the scan that follows reports */
    for (uint64_t i = 0; i < s->region_count && !rc; i++)
        rc = dt_content_after_arming(s, s->regions[i], start, end);
    return rc;
}

/* Looks at what is mapped in [start, end), which holds whole regions: what was replaced is registered again and counts
 * as written, what is gone is noted in its regions. */
int dt_heal(dt_session *s, uint64_t start, uint64_t end)
{
    int forgotten = forget_foreign(s, start, end);
    if (forgotten)
        return forgotten;
    for (uint64_t i = 0; i < s->region_count; i++)
        s->regions[i]->seen_start = s->regions[i]->seen_end = s->regions[i]->seen_bytes = 0;
    for (uint64_t at = start; at < end;) {
        dt_mapping m;
        int rc = s->compare ? dt_compare_mapping(at, end, &m) : dt_mapping_of(s->space, at, &m);
        if (rc && rc != -ENOENT)
            return rc;
        uint64_t next = rc ? end : dt_min(end, m.start);
        if (next > at) {
            note_hole(s, start, end, at, next);
            at = next;
            continue;
        }
        next = dt_min(end, m.end);
        rc = dt_page_armable(s, at);
        if (rc < 0)
            return rc;
        if (rc) {
            rc = dt_uffd_owns(s, at, next);
            if (rc == -EINVAL && s->space) { /* gone since: whatever it is now is found when mappings are looked at anew */
                dt_mark_all(s->watches, s->watch_count, at, next);
                rc = 1;
            }
            if (!rc)
                rc = note_foreign(s, start, end, at, next);
            if (rc < 0)
                return rc;
        } else {
            bool fits, present;
            rc = note_kind(s, at, next, &m, &fits, &present);
            if (rc)
                return rc;
            /* Of a target the whole mapping, beyond what is watched of it too: see dt_target_fits. */
            uint64_t first = s->space ? m.start : at, last = s->space ? m.end : next;
            dt_mark_all(s->watches, s->watch_count, first, last);
            dt_alias_tell(s, first, last);
            s->statistics.mappings_renewed++;
            /* What cannot be registered (a special mapping, another's userfaultfd) counts as written at each collect:
             * its scan fails with EPERM each time and comes here. */
            if (fits && !dt_uffd_register(s, first, last) && (rc = arm_anew(s, at, next, present)))
                return rc;
        }
        at = next;
    }
    for (uint64_t i = 0; i < s->region_count; i++) {
        dt_region *r = s->regions[i];
        if (r->start < start || r->end > end)
            continue;
        if (r->seen_bytes && (r->seen_start != r->gone_start || r->seen_end != r->gone_end || r->seen_bytes != r->gone_bytes))
            r->gone_version++;
        r->gone_start = r->seen_start;
        r->gone_end = r->seen_end;
        r->gone_bytes = r->seen_bytes;
    }
    return 0;
}
