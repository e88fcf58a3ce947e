/* SPDX-License-Identifier: MIT
 * Regions: what is registered with the kernel, for how long, and who else has it. */
#include "engine.h"

_Atomic uint64_t dt_registrations, dt_thefts;

int dt_uffd_unregister(dt_session *s, uint64_t start, uint64_t end)
{
    struct k_uffdio_range range = {start, end - start};
    return dt_checked_ioctl(DT_SITE_UNREGISTER, s->uffd, K_UFFDIO_UNREGISTER, &range);
}

/* ---- registering ---------------------------------------------------------------------------------------------- */

static int bare_register(dt_session *s, uint64_t start, uint64_t end)
{
    struct k_uffdio_register request = {.range = {start, end - start}, .mode = K_UFFDIO_REGISTER_MODE_WP};
    return dt_checked_ioctl(DT_SITE_REGISTER, s->uffd, K_UFFDIO_REGISTER, &request);
}

static int register_ioctl(dt_session *s, uint64_t start, uint64_t end)
{
    int rc = bare_register(s, start, end);
    if (!rc) { /* the others look whether it was theirs; we need not look at our own */
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
    if (below && below < start && !dt_mapping_at(below, &m) && m.start <= below && m.end >= start &&
        !register_ioctl(s, below, end))
        return add_bridge(s, below, start);
    if (above != UINT64_MAX && above > end && !dt_mapping_at(end, &m) && m.start <= end && m.end >= above &&
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

static bool counts_registered(const dt_region *region, const dt_region *except)
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

int dt_register(dt_session *s, uint64_t address, uint64_t nbytes, uint64_t granule_bytes, dt_region **out,
                dt_failure *why)
{
    uint64_t granule = dt_max(granule_bytes, dt_page_bytes());
    if (!nbytes || address + nbytes < address || granule & (granule - 1) || address + nbytes > UINT64_MAX - granule)
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
    *r = (dt_region){.session = s, .address = address, .nbytes = nbytes, .start = dt_down(address, granule),
                     .end = dt_up(address + nbytes, granule)};
    /* On every register: the address may have been unmapped and mapped again since it was last registered. The kernel
     * skips holes in silence, so they are looked for first. */
    if (!s->suspended) {
        rc = dt_mapped(r->start, r->end) ? dt_uffd_register(s, r->start, r->end) : -EFAULT;
        if (rc) {
            dt_fail_with(why, rc, -rc, DT_STEP_REGISTER, r->start, r->end);
            goto failed;
        }
    }
    r->id = ++s->next_id;
    r->registered = true;
    s->regions[s->region_count++] = r;
    dt_retain(s);
    *out = r;
    dt_leave(s);
    return 0;
failed:
    dt_free(r);
    dt_leave(s);
    return rc;
}

static int unregister_locked(dt_session *s, dt_region *region)
{
    if (!atomic_exchange(&region->registered, false) || s->uffd < 0)
        return 0;
    region->armed = false;
    uint64_t at = region->start, from, to;
    int failed = 0;
    while (dt_next_uncovered(s, counts_registered, region, &at, region->end, &from, &to)) {
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

uint64_t dt_region_id(dt_region *region) { return region->id; }
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
