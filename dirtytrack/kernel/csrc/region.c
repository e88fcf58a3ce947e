/* SPDX-License-Identifier: MIT
 * Regions: what is registered with the kernel, for how long, and who else has it. */
#include "engine.h"
#include <stdio.h>
#include <sys/utsname.h>

_Atomic uint64_t dt_registrations, dt_thefts;

static int bare_register(dt_session *s, uint64_t start, uint64_t end)
{
    if (s->compare)
        return 0;
    struct k_uffdio_register request = {.range = {start, end - start}, .mode = K_UFFDIO_REGISTER_MODE_WP};
    return dt_checked_ioctl(DT_SITE_REGISTER, s->uffd, K_UFFDIO_REGISTER, &request);
}

/* ---- unregistering -------------------------------------------------------------------------------------------- */

static int bare_unregister(dt_session *s, uint64_t start, uint64_t end)
{
    struct k_uffdio_range range = {start, end - start};
    return dt_checked_ioctl(DT_SITE_UNREGISTER, s->uffd, K_UFFDIO_UNREGISTER, &range);
}

/* Up to Linux 6.16, to unregister a mapping hits a BUG in the kernel, and the process never ends, where the mapping would
 * be joined to the one on its left and its kind forbids that (System V memory, some file systems): measured on Linux
 * 6.12.43, "kernel BUG at fs/userfaultfd.c:1493". Not to be found out by trying. */
static bool unregistering_may_crash(void)
{
    static _Atomic int known; /* 1: no, 2: yes */
    if (!atomic_load(&known)) {
        struct utsname about;
        unsigned major, minor;
        bool told = !uname(&about) && sscanf(about.release, "%u.%u", &major, &minor) == 2;
        atomic_store(&known, 1 + (!told || major < 6 || (major == 6 && minor < 17)));
    }
    return atomic_load(&known) == 2;
}

static bool continues(const dt_mapping *left, const dt_mapping *m)
{
    return left->end == m->start && left->inode == m->inode && left->device_major == m->device_major &&
           left->device_minor == m->device_minor && left->offset + (left->end - left->start) == m->offset &&
           left->shared == m->shared && left->writable == m->writable && left->readable == m->readable;
}

/* What is registered is not joined to what is not. So the left one is registered first, without being armed, and
 * unregistered after, in the same way. */
static int unregister_mapping(dt_session *s, const dt_mapping *m, uint64_t start, uint64_t end)
{
    dt_mapping left;
    bool held = false;
    if (m->inode && start == m->start && end == m->end && !dt_mapping_of(s->space, start - dt_page_bytes(), &left) && continues(&left, m)) {
        int rc = dt_page_armable(s, left.end - dt_page_bytes());
        if (!rc)
            rc = bare_register(s, left.start, left.end), held = !rc;
        if (rc < 0)
            return -ENOMEM; /* it stays registered */
    }
    int rc = bare_unregister(s, start, end);
    return held ? unregister_mapping(s, &left, left.start, left.end) : rc;
}

typedef struct mappings { dt_mapping *all; uint64_t count, room; } mappings;

static int keep_mapping(void *context, const dt_mapping *m)
{
    mappings *kept = context;
    if (dt_room((void **)&kept->all, &kept->room, kept->count + 1, sizeof *kept->all))
        return -ENOMEM;
    kept->all[kept->count++] = *m;
    return 0;
}

int dt_uffd_unregister(dt_session *s, uint64_t start, uint64_t end)
{
    if (s->compare)
        return 0;
    if (!unregistering_may_crash() && !(s->remedy & DT_REMEDY_FROM_RIGHT))
        return bare_unregister(s, start, end);
    mappings kept = {0};
    int rc = dt_each_mapping(s->space, start, end, keep_mapping, &kept);
    for (uint64_t i = rc ? 0 : kept.count; i--;) { /* from the right: the left neighbour of each is still registered */
        const dt_mapping *m = &kept.all[i];
        int failed = unregister_mapping(s, m, dt_max(start, m->start), dt_min(end, m->end));
        rc = failed ? failed : rc;
    }
    dt_free(kept.all);
    return rc;
}

/* ---- registering ---------------------------------------------------------------------------------------------- */

static int register_ioctl(dt_session *s, uint64_t start, uint64_t end)
{
    int rc = bare_register(s, start, end);
    s->met_strangers |= rc == -EBUSY && s->space;
    if (!rc && !s->compare) { /* the others look whether it was theirs; we need not look at our own */
        uint64_t before = atomic_fetch_add(&dt_registrations, 1);
        s->registrations += s->registrations == before;
    }
    return rc;
}

/* No scan and no UFFDIO_WRITEPROTECT asks whose a mapping is (Linux 6.7 to 7.3), only UFFDIO_REGISTER does: on what is
 * ours already it does nothing, on another's it answers EBUSY. */
int dt_uffd_owns(dt_session *s, uint64_t start, uint64_t end)
{
    int rc = s->suspended ? 0 : bare_register(s, start, end);
    return rc == -EBUSY ? 0 : rc ? rc : 1;
}

static int add_bridge(dt_session *s, uint64_t start, uint64_t end)
{
    int rc = dt_room((void **)&s->bridges, &s->bridge_room, s->bridge_count + 1, sizeof *s->bridges);
    if (!rc)
        s->bridges[s->bridge_count++] = (dt_run){start, end};
    return rc;
}

/* Each island of registered pages splits its mapping in three, and a process has 65,530 mappings by default. Where they
 * run out, the gap to a registered neighbour in the same mapping is registered too (never armed, never scanned for
 * itself): then the island joins its neighbour and costs no mapping. */
static int register_with_bridge(dt_session *s, uint64_t start, uint64_t end)
{
    uint64_t below = 0, above = UINT64_MAX;
    for (uint64_t i = 0; i < s->region_count; i++) {
        const dt_region *r = s->regions[i];
        if (r->registered && r->end <= start)
            below = dt_max(below, r->end);
        if (r->registered && r->start >= end)
            above = dt_min(above, r->start);
    }
    dt_mapping m;
    if (below && below < start && !dt_mapping_of(s->space, below, &m) && m.start <= below && m.end >= start &&
        !register_ioctl(s, below, end))
        return add_bridge(s, below, start);
    if (above != UINT64_MAX && above > end && !dt_mapping_of(s->space, end, &m) && m.start <= end && m.end >= above &&
        !register_ioctl(s, start, above))
        return add_bridge(s, end, above);
    return -ENOMEM;
}

int dt_uffd_register(dt_session *s, uint64_t start, uint64_t end)
{
    int rc = register_ioctl(s, start, end);
    return rc == -ENOMEM ? register_with_bridge(s, start, end) : rc;
}

bool dt_counts_armed(const dt_region *region, const dt_region *except)
{
    return region != except && region->registered && region->armed;
}

bool dt_counts_registered(const dt_region *region, const dt_region *except)
{
    return region != except && region->registered;
}

bool dt_next_uncovered(const dt_session *s, dt_counts counts, const dt_region *except, uint64_t *at, uint64_t end,
                       uint64_t *from, uint64_t *to)
{
    while (*at < end) {
        uint64_t covered_to = *at, next = end;
        for (uint64_t i = 0; i < s->region_count; i++) {
            const dt_region *r = s->regions[i];
            if (!counts(r, except))
                continue;
            if (r->start <= *at && r->end > *at)
                covered_to = dt_max(covered_to, r->end);
            else if (r->start > *at)
                next = dt_min(next, r->start);
        }
        if (covered_to > *at) {
            *at = covered_to;
            continue;
        }
        *from = *at;
        *to = *at = dt_min(next, end);
        return true;
    }
    return false;
}

static int unregister_locked(dt_session *s, dt_region *region);

/* ---- what lies beneath ------------------------------------------------------------------------------------------ */

typedef struct survey { uint64_t address, end, start_page, end_page, largest; uint32_t kinds; } survey;

static int look_at(void *context, const dt_mapping *m)
{
    survey *seen = context;
    seen->kinds |= dt_kind_of(m);
    seen->largest = dt_max(seen->largest, m->page_bytes);
    if (m->start <= seen->address)
        seen->start_page = m->page_bytes;
    if (m->end >= seen->end)
        seen->end_page = m->page_bytes;
    return 0;
}

int dt_survey(dt_region *r, uint64_t granule)
{
    uint64_t end = r->address + r->nbytes, page = dt_page_bytes();
    survey seen = {r->address, end, page, page, page, 0};
    int rc = dt_each_mapping(r->session->space, r->address, end, look_at, &seen);
    if (rc)
        return rc;
    r->kinds = seen.kinds;
    r->granule = dt_max(granule, seen.largest);
    /* To the pages of the mapping at either end: a huge page that is asked for in part is passed over in silence. */
    r->start = dt_down(r->address, dt_max(granule, seen.start_page));
    r->end = dt_up(end, dt_max(granule, seen.end_page));
    return 0;
}

/* Markers for what is not populated cost 2 MiB of page tables a GiB, make fork slow and keep huge pages away (measured,
 * Linux 6.18). To arm only what is populated takes a second look at each collect instead: worth it where little is. */
#define LARGE_BYTES ((uint64_t)4 << 30)
#define MOSTLY_EMPTY 64

static void count_bytes(void *context, uint64_t start, uint64_t end) { *(uint64_t *)context += end - start; }

static bool worth_present(dt_session *s, const dt_region *r)
{
    static const dt_question populated = {.anyof = K_PAGE_IS_PRESENT | K_PAGE_IS_SWAPPED};
    uint64_t bytes = 0;
    return r->kinds == DT_KIND_ANONYMOUS && r->end - r->start >= LARGE_BYTES &&
           !dt_query(s, r->start, r->end, &populated, count_bytes, &bytes) && bytes < (r->end - r->start) / MOSTLY_EMPTY;
}

int dt_register(dt_session *s, uint64_t address, uint64_t nbytes, uint64_t granule_bytes, uint32_t arming,
                dt_region **out, dt_failure *why)
{
    uint64_t granule = dt_max(granule_bytes, dt_page_bytes());
    bool pinned = arming & DT_PINNED;
    arming &= ~(uint32_t)DT_PINNED;
    if (!nbytes || address + nbytes < address || granule & (granule - 1) || address + nbytes > UINT64_MAX - granule ||
        arming > DT_ARM_PRESENT)
        return dt_fail_with(why, -EINVAL, 0, DT_STEP_REGISTER, address, address + nbytes);
    int rc = dt_enter(s);
    if (rc)
        return dt_fail_with(why, rc, 0, DT_STEP_REGISTER, address, address + nbytes);
    dt_region *r = dt_alloc(sizeof *r);
    rc = r ? dt_room((void **)&s->regions, &s->region_room, s->region_count + 1, sizeof *s->regions) : -ENOMEM;
    if (rc) {
        dt_fail_with(why, rc, ENOMEM, DT_STEP_MEMORY, address, address + nbytes);
        goto failed;
    }
    *r = (dt_region){.session = s, .address = address, .nbytes = nbytes, .pinned = pinned};
    rc = s->compare ? dt_compare_survey(r) : dt_survey(r, granule);
    if (rc) {
        dt_fail_with(why, rc, -rc, DT_STEP_MAPS, address, address + nbytes);
        goto failed;
    }
    r->present = !s->compare && (arming == DT_ARM_PRESENT || (arming == DT_ARM_AUTO && worth_present(s, r)));
    if (r->present && r->kinds != DT_KIND_ANONYMOUS && r->kinds) {
        rc = dt_fail_with(why, DT_NOT_ANONYMOUS, 0, DT_STEP_REGISTER, r->start, r->end);
        goto failed;
    }
    /* On every register: the address may have been unmapped and mapped again since it was last registered. The kernel
     * skips holes in silence, so they are looked for first. */
    if (s->space && (rc = dt_target_fits(s, r->start, r->end))) {
        dt_fail_with(why, rc, -rc, DT_STEP_MAPS, r->start, r->end);
        goto failed;
    }
    if (!s->suspended) {
        rc = dt_mapped(s, r->start, r->end) ? dt_uffd_register(s, r->start, r->end) : -EFAULT;
        if (rc) {
            dt_fail_with(why, rc, -rc, DT_STEP_REGISTER, r->start, r->end);
            goto failed;
        }
    }
    r->id = ++s->next_id;
    r->registered = true;
    s->regions[s->region_count++] = r;
    if (s->compare)
        dt_compare_adjust(s, r);
    rc = dt_content_begin(s, r);
    if (!rc)
        rc = dt_alias_begin(s, r);
    if (rc) {
        dt_fail_with(why, rc, -rc, rc == -ENOMEM ? DT_STEP_MEMORY : DT_STEP_MAPS, r->start, r->end);
        unregister_locked(s, r);
        dt_free_region(s, r);
        r = NULL;
        goto failed;
    }
    dt_retain(s);
    *out = r;
    dt_leave(s);
    return 0;
failed:
    dt_free(r);
    dt_leave(s);
    return rc;
}

int dt_guard_pages(dt_session *s, uint64_t start, uint64_t end, uint64_t *out)
{
    static const dt_question guard = {.mask = K_PAGE_IS_GUARD};
    uint64_t bytes = 0;
    int rc = dt_enter(s);
    if (rc)
        return rc;
    rc = dt_query(s, start, end, &guard, count_bytes, &bytes);
    dt_leave(s);
    *out = bytes >> dt_page_shift();
    return rc == -EINVAL ? 0 : rc; /* a category that this kernel does not know */
}

static int unregister_locked(dt_session *s, dt_region *region)
{
    if (!atomic_exchange(&region->registered, false))
        return 0;
    region->armed = false;
    dt_alias_end(s, region);
    dt_content_end(s, region);
    if (s->compare)
        dt_compare_adjust(s, region);
    if (s->uffd < 0 || s->space) /* of a target: with the descriptor. To unregister part of a mapping would split it. */
        return 0;
    uint64_t at = region->start, from, to;
    int failed = 0;
    while (dt_next_uncovered(s, dt_counts_registered, region, &at, region->end, &from, &to)) {
        int rc = dt_uffd_unregister(s, from, to);
        /* No mapping left to split off: it stays registered until the session closes, which costs faults and nothing
         * else. EINVAL: the memory is gone already. */
        if (rc == -ENOMEM)
            rc = add_bridge(s, from, to);
        if (rc && rc != -EINVAL)
            failed = rc;
    }
    uint64_t left = 0;
    for (uint64_t i = 0; i < s->region_count; i++)
        left += s->regions[i]->registered;
    if (!left) {
        for (uint64_t i = 0; i < s->bridge_count; i++)
            dt_uffd_unregister(s, s->bridges[i].start, s->bridges[i].end);
        s->bridge_count = 0;
    }
    return failed;
}

void dt_free_region(dt_session *s, dt_region *region)
{
    dt_alias_end(s, region);
    dt_content_end(s, region);
    dt_free(region->adapt);
    for (uint64_t i = 0; i < s->region_count; i++)
        if (s->regions[i] == region) {
            s->regions[i] = s->regions[--s->region_count];
            break;
        }
    dt_free(region);
}

void dt_drain_regions(dt_session *s)
{
    dt_region *next;
    for (dt_region *r = atomic_exchange(&s->dropped_regions, NULL); r; r = next) {
        next = r->next_dropped;
        r->dropped = true;
        if (!r->watchers) {
            unregister_locked(s, r);
            dt_free_region(s, r);
        }
    }
}

int dt_unregister(dt_region *region, dt_failure *why)
{
    dt_session *s = region->session;
    int rc = dt_enter(s);
    if (rc)
        return dt_fail_with(why, rc, 0, DT_STEP_UNREGISTER, region->start, region->end);
    if (!region->registered)
        rc = dt_fail_with(why, DT_UNREGISTERED, 0, DT_STEP_UNREGISTER, region->start, region->end);
    else if (region->watchers)
        rc = dt_fail_with(why, -EBUSY, 0, DT_STEP_UNREGISTER, region->start, region->end);
    else if ((rc = unregister_locked(s, region)))
        dt_fail_with(why, rc, -rc, DT_STEP_UNREGISTER, region->start, region->end);
    dt_leave(s);
    return rc;
}

void dt_region_drop(dt_region **region)
{
    dt_region *r = *region;
    *region = NULL;
    if (!r)
        return;
    dt_session *s = r->session;
    r->next_dropped = atomic_load(&s->dropped_regions);
    while (!atomic_compare_exchange_weak(&s->dropped_regions, &r->next_dropped, r))
        ;
    dt_release(s);
}

void dt_region_unwatch(dt_region *region)
{
    dt_session *s = region->session;
    if (--region->watchers == 0 && region->dropped) {
        unregister_locked(s, region);
        dt_free_region(s, region);
    }
}


void dt_region_about(dt_region *region, dt_region_info *out)
{
    *out = (dt_region_info){.id = region->id, .start = region->start, .end = region->end, .granule_bytes = region->granule};
    int rc = dt_enter(region->session);
    out->kinds = region->kinds; /* as last seen: both change where something else is mapped there */
    out->arming = region->present ? DT_ARM_PRESENT : DT_ARM_ALL;
    out->aliases = rc ? 0 : (uint32_t)dt_alias_count(region->session, region);
    out->unseen_aliases = region->unseen_aliases;
    if (!rc)
        dt_leave(region->session);
}

int dt_region_registered(dt_region *region) { return !dt_forked(region->session) && region->registered; }

int dt_write_protect(dt_region *region, dt_failure *why)
{
    dt_session *s = region->session;
    int rc = dt_enter(s);
    if (rc)
        return dt_fail_with(why, rc, 0, DT_STEP_PROTECT, region->start, region->end);
    if (!region->registered)
        rc = dt_fail_with(why, DT_UNREGISTERED, 0, DT_STEP_PROTECT, region->start, region->end);
    else if (!s->suspended)
        rc = dt_arm(s, region, why);
    dt_leave(s);
    return rc;
}
