/* SPDX-License-Identifier: MIT
 * Shared memory that this process has mapped more than once. A store through one mapping is reported in that one alone
 * (measured, Linux 6.12 to 7.3), so all of them are registered, armed and scanned, and each find is told at every address
 * that the page has. Mappings are looked for when a region is registered; those made later, and other processes', are
 * not seen. */
#include "engine.h"

typedef struct search {
    dt_session *s;
    dt_region *region;
    dt_mapping own; /* a mapping of the region's */
} search;

static int add(dt_session *s, dt_region *r, uint64_t start, uint64_t end, uint64_t other, uint64_t offset,
               const dt_mapping *m)
{
    int rc = dt_room((void **)&s->aliases, &s->alias_room, s->alias_count + 1, sizeof *s->aliases);
    if (rc)
        return rc;
    if (dt_uffd_register(s, other, other + (end - start))) {
        r->unseen_aliases += m->writable; /* another userfaultfd has it: as unseen as another process's */
        return 0;
    }
    s->aliases[s->alias_count++] = (dt_alias){r, start, end, other, m->inode, offset, m->device_major, m->device_minor, false};
    return 0;
}

static bool same_file(const dt_mapping *a, const dt_mapping *b)
{
    return a->shared && b->shared && a->inode && a->inode == b->inode && a->device_major == b->device_major &&
           a->device_minor == b->device_minor;
}

static int compare(void *context, const dt_mapping *m)
{
    const search *q = context;
    const dt_mapping *own = &q->own;
    if (!same_file(m, own))
        return 0;
    /* The region's part of its mapping, as offsets of the file, against all that this mapping has of the file. */
    uint64_t a = dt_max(own->start, q->region->start), b = dt_min(own->end, q->region->end);
    uint64_t from = dt_max(own->offset + (a - own->start), m->offset);
    uint64_t to = dt_min(own->offset + (b - own->start), m->offset + (m->end - m->start));
    if (from >= to)
        return 0;
    uint64_t start = own->start + (from - own->offset), other = m->start + (from - m->offset);
    if (start == other)
        return 0;
    return add(q->s, q->region, start, start + (to - from), other, from, m);
}

static int search_all(void *context, const dt_mapping *m)
{
    search *q = context;
    if (!m->shared || !m->inode)
        return 0;
    q->own = *m;
    return dt_each_mapping(q->s->space, 0, UINT64_MAX, compare, q);
}

int dt_alias_begin(dt_session *s, dt_region *r)
{
    if (!(r->kinds & DT_KIND_SHARED) || s->suspended || s->remedy & DT_REMEDY_NO_ALIAS)
        return 0;
    search q = {.s = s, .region = r};
    r->unseen_aliases = 0;
    return dt_each_mapping(s->space, r->start, r->end, search_all, &q);
}

/* Unregisters what of [start, end) no region and no alias has any more. */
static void let_go(dt_session *s, uint64_t start, uint64_t end)
{
    uint64_t at = start, from, to;
    while (dt_next_uncovered(s, dt_counts_registered, NULL, &at, end, &from, &to))
        while (from < to) {
            uint64_t next = to, behind = from;
            for (uint64_t i = 0; i < s->alias_count; i++) {
                uint64_t a = s->aliases[i].other, b = a + (s->aliases[i].end - s->aliases[i].start);
                if (a <= from && b > from)
                    behind = dt_max(behind, b);
                else if (a > from)
                    next = dt_min(next, a);
            }
            if (behind > from) {
                from = behind;
                continue;
            }
            dt_uffd_unregister(s, from, next);
            from = next;
        }
}

void dt_alias_end(dt_session *s, const dt_region *r)
{
    for (uint64_t i = 0; i < s->alias_count;) {
        dt_alias gone = s->aliases[i];
        if (gone.region != r) {
            i++;
            continue;
        }
        s->aliases[i] = s->aliases[--s->alias_count];
        if (s->uffd >= 0)
            let_go(s, gone.other, gone.other + (gone.end - gone.start));
    }
}

uint64_t dt_alias_count(const dt_session *s, const dt_region *r)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < s->alias_count; i++)
        count += s->aliases[i].region == r;
    return count;
}

/* ---- the same page at another address ----------------------------------------------------------------------------- */

/* The part of [start, end) that lies in [from, from + length), moved to `to`. */
static bool moved(uint64_t start, uint64_t end, uint64_t from, uint64_t length, uint64_t to, dt_run *out)
{
    uint64_t a = dt_max(start, from), b = dt_min(end, from + length);
    if (a >= b)
        return false;
    *out = (dt_run){to + (a - from), to + (b - from)};
    return true;
}

bool dt_alias_next(const dt_session *s, uint64_t start, uint64_t end, uint64_t *next, dt_run *elsewhere)
{
    while (*next < 2 * s->alias_count) { /* each from either side */
        const dt_alias *a = &s->aliases[*next / 2];
        bool back = (*next)++ % 2;
        if (moved(start, end, back ? a->other : a->start, a->end - a->start, back ? a->start : a->other, elsewhere))
            return true;
    }
    return false;
}

uint64_t dt_alias_origin(const dt_session *s, uint64_t number, uint64_t start)
{
    const dt_alias *a = &s->aliases[number / 2];
    return dt_max(start, number % 2 ? a->other : a->start);
}

bool dt_aliased(const dt_session *s, uint64_t start, uint64_t end)
{
    uint64_t next = 0;
    dt_run elsewhere;
    return dt_alias_next(s, start, end, &next, &elsewhere);
}

void dt_alias_tell(dt_session *s, uint64_t start, uint64_t end)
{
    uint64_t next = 0;
    dt_run elsewhere;
    while (dt_alias_next(s, start, end, &next, &elsewhere))
        dt_mark_all(s->watches, s->watch_count, elsewhere.start, elsewhere.end);
}

/* ---- arming ------------------------------------------------------------------------------------------------------- */

static bool has_listeners(const dt_session *s, const dt_alias *alias, uint64_t start, uint64_t end)
{
    for (uint64_t i = 0; i < s->region_count; i++)
        if (dt_counts_armed(s->regions[i], NULL) && s->regions[i]->start < end && start < s->regions[i]->end)
            return true;
    for (uint64_t i = 0; i < s->alias_count; i++) {
        const dt_alias *a = &s->aliases[i];
        if (a != alias && a->armed && a->other < end && start < a->other + (a->end - a->start))
            return true;
    }
    return false;
}

int dt_alias_arm(dt_session *s, const dt_region *r)
{
    bool healed = false;
    for (uint64_t i = 0; i < s->alias_count; i++) {
        dt_alias *a = &s->aliases[i];
        if (a->region != r || a->armed)
            continue;
        uint64_t start = a->other, end = start + (a->end - a->start);
        dt_pass pass = {.session = s, .everybody = true, .find_absent = true, .find_gigantic = true, .aliased = true};
        uint64_t known = s->alias_count;
        /* Where somebody waits for its bits, only a collecting scan may arm. */
        int rc = has_listeners(s, a, start, end) ? dt_scan_pass(&pass, start, end, NULL) : dt_protect(s, start, end);
        if (rc == -ENOENT && !healed && !(rc = dt_alias_heal(s, start, end)))
            healed = true, known = s->alias_count + 1;
        if (rc)
            return rc;
        if (known != s->alias_count) /* some were let go of, and others have their places */
            i = UINT64_MAX;
        else
            a->armed = true;
    }
    return 0;
}

typedef struct claim { const dt_alias *alias; bool holds; } claim;

static int check(void *context, const dt_mapping *m)
{
    claim *c = context;
    const dt_alias *a = c->alias;
    uint64_t at = dt_max(m->start, a->other);
    c->holds = c->holds && m->shared && m->inode == a->inode && m->device_major == a->device_major &&
               m->device_minor == a->device_minor && m->offset + (at - m->start) == a->offset + (at - a->other);
    return 0;
}

/* 1: [start, end) is still what it was; 0 or -errno. */
static int still_holds(const dt_session *s, const dt_alias *a)
{
    uint64_t end = a->other + (a->end - a->start);
    claim c = {a, dt_mapped(s, a->other, end)};
    int rc = dt_each_mapping(s->space, a->other, end, check, &c);
    return rc ? rc : c.holds;
}

int dt_alias_verify(dt_session *s, bool *lost)
{
    for (uint64_t i = 0; i < s->alias_count;) {
        dt_alias *a = &s->aliases[i];
        int rc = still_holds(s, a);
        if (rc > 0)
            rc = dt_uffd_owns(s, a->other, a->other + (a->end - a->start));
        if (rc < 0 && rc != -EINVAL)
            return rc;
        if (rc > 0) {
            i++;
            continue;
        }
        *lost = true;
        dt_mark_all(s->watches, s->watch_count, a->start, a->end);
        *a = s->aliases[--s->alias_count];
    }
    return 0;
}

int dt_alias_heal(dt_session *s, uint64_t start, uint64_t end)
{
    for (uint64_t i = 0; i < s->alias_count;) {
        dt_alias *a = &s->aliases[i];
        uint64_t length = a->end - a->start;
        if (a->other >= end || start >= a->other + length) {
            i++;
            continue;
        }
        int holds = still_holds(s, a);
        if (holds < 0)
            return holds;
        dt_mark_all(s->watches, s->watch_count, a->start, a->end);
        dt_mark_all(s->watches, s->watch_count, a->other, a->other + length); /* whose bits arming erases */
        if (holds && !dt_uffd_register(s, a->other, a->other + length) && !dt_protect(s, a->other, a->other + length))
            i++;
        else
            *a = s->aliases[--s->alias_count];
    }
    return 0;
}
