/* SPDX-License-Identifier: MIT
 * Arming a region, at first or again, and nobody who waits for its pages loses one. */
#include "engine.h"

static bool others_hold(const dt_session *s, const dt_region *region, uint64_t start, uint64_t end)
{
    for (uint64_t i = 0; i < s->region_count; i++) {
        const dt_region *other = s->regions[i];
        if (dt_counts_armed(other, region) && other->start < end && start < other->end)
            return true;
    }
    return false;
}

static bool others_wait(const dt_session *s, const dt_region *region, uint64_t start, uint64_t end)
{
    bool wait = others_hold(s, region, start, end);
    uint64_t next = 0;
    dt_run elsewhere;
    while (!wait && dt_alias_next(s, start, end, &next, &elsewhere))
        wait = others_hold(s, region, elsewhere.start, elsewhere.end);
    return wait;
}

static int arm_all(dt_session *s, dt_region *region, dt_failure *why)
{
    /* What another armed region holds has listeners who wait for its bits: there only a collecting scan may arm. */
    uint64_t at = region->start, from, to;
    int rc = 0;
    while (!rc && dt_next_uncovered(s, dt_counts_armed, region, &at, region->end, &from, &to)) {
        if (others_wait(s, region, from, to)) /* for the same pages at another address */
            continue;
        rc = dt_protect(s, from, to);
        if (rc == -ENOENT) { /* replaced since it was registered, maybe in part */
            rc = dt_heal(s, region->start, region->end);
            if (!rc)
                rc = dt_protect(s, from, to);
        }
        if (rc)
            dt_fail_with(why, rc, -rc, s->compare ? dt_compare_step(rc) : DT_STEP_PROTECT, from, to);
    }
    return rc;
}

int dt_arm(dt_session *s, dt_region *region, dt_failure *why)
{
    int rc = dt_look_for_strangers(s);
    if (!rc && (region->gone_bytes || !dt_mapped(s, region->start, region->end)))
        rc = dt_heal(s, region->start, region->end);
    if (rc)
        return dt_fail_with(why, rc, -rc, DT_STEP_MAPS, region->start, region->end);
    if (region->gone_bytes) {
        if (why)
            why->region = region->id;
        return dt_fail_with(why, DT_GONE, 0, DT_STEP_PROTECT, region->gone_start, region->gone_end);
    }
    bool first = !region->armed;
    if (first && (rc = dt_content_before_arming(s, region, region->start, region->end)))
        return dt_fail_with(why, rc, -rc, DT_STEP_MAPS, region->start, region->end);
    if (first && !region->present && (rc = arm_all(s, region, why)))
        return rc;
    dt_adapt_forget(region->adapt);
    if (!first || region->present || others_wait(s, region, region->start, region->end)) {
        dt_pass pass = {.session = s, .everybody = true, .present = region->present, .find_absent = first};
        rc = dt_scan_pass(&pass, region->start, region->end, why);
    }
    if (!rc && first && ((rc = dt_content_after_arming(s, region, region->start, region->end)) || (rc = dt_alias_arm(s, region))))
        dt_fail_with(why, rc, -rc, DT_STEP_PROTECT, region->start, region->end);
    region->armed |= !rc;
    return rc;
}
