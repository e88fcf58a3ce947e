/* SPDX-License-Identifier: MIT
 * The plan of a listener's passes: which spans to scan, and who watches each. */
#include "engine.h"

/* One system call finds the holes in a thousand ranges as quickly as in one, where no hole is between them. */
void dt_put_together(const dt_session *s, dt_range *ranges, uint64_t count)
{
    dt_range *first = ranges;
    for (uint64_t i = 0; i < count; i++) {
        ranges[i].together = 1;
        if (i && ranges[i].start - ranges[i - 1].end < DT_CHUNK_BYTES && dt_mapped(s, ranges[i - 1].end, ranges[i].start))
            first->together++;
        else
            first = &ranges[i];
    }
}

/* Blocks of a range may be left unarmed where it is one region, of small pages that no other remedy watches over, and
 * one of its listeners wants it and none forbids it. */
static void plan_adapting(const dt_listener *l, dt_range *range)
{
    dt_region *region = l->overlaps[range->first]->region;
    dt_wish wish = {0};
    bool wanted = false;
    if (l->session->compare) /* no page of it is armed, and its writer faults on none */
        return;
    if (range->present || region->granule != dt_page_bytes() || region->start != range->start || region->end != range->end)
        return;
    for (uint64_t i = 0; i < range->count; i++) {
        const dt_watch *w = l->overlaps[range->first + i];
        if (w->region != region || (w->listener && w->listener->exact))
            return;
        if (!w->listener || !w->listener->adaptive)
            continue;
        wanted = true;
        wish.measured |= !w->listener->page_ns;
        wish.page_ns = dt_max(wish.page_ns, w->listener->page_ns);
    }
    if (wanted && !region->adapt)
        region->adapt = dt_adapt_new(l->session, region->start, region->end);
    range->adapt = wanted ? region->adapt : NULL;
    range->wish = wish;
}

int dt_plan_anew(dt_listener *l)
{
    dt_session *s = l->session;
    if (dt_room((void **)&l->ranges, &l->range_room, l->watch_count, sizeof *l->ranges))
        return -ENOMEM;
    l->range_count = 0;
    l->overlapping = false;
    l->granule = 0;
    for (uint64_t i = 0; i < l->watch_count; i++) {
        const dt_watch *w = l->watches[i];
        dt_range *last = l->range_count ? &l->ranges[l->range_count - 1] : NULL;
        bool present = w->region->present;
        l->granule = dt_max(l->granule, w->region->granule);
        if (last && (w->start < last->end || (w->start == last->end && present == last->present))) {
            l->overlapping |= w->start < last->end;
            last->end = dt_max(last->end, w->end);
            last->present &= present;
        } else {
            l->ranges[l->range_count++] = (dt_range){.start = w->start, .end = w->end, .present = present};
        }
    }
    /* Watches and ranges are many-to-many; both counts are small or, with thousands of regions, mostly one to one: find
     * each watch's first range by bisection. Two rounds: count, then place. */
    uint64_t total = 0;
    for (int place = 0; place < 2; place++) {
        if (place) {
            if (dt_room((void **)&l->overlaps, &l->overlap_room, total, sizeof *l->overlaps))
                return -ENOMEM;
            uint64_t first = 0;
            for (uint64_t r = 0; r < l->range_count; r++) {
                l->ranges[r].first = first;
                first += l->ranges[r].count;
                l->ranges[r].count = 0;
            }
        }
        for (uint64_t i = 0; i < s->watch_count; i++) {
            dt_watch *w = s->watches[i];
            uint64_t low = 0, high = l->range_count;
            while (low < high) {
                uint64_t middle = (low + high) / 2;
                if (l->ranges[middle].end <= w->start)
                    low = middle + 1;
                else
                    high = middle;
            }
            for (; low < l->range_count && l->ranges[low].start < w->end; low++) {
                dt_range *range = &l->ranges[low];
                if (place)
                    l->overlaps[range->first + range->count] = w;
                range->count++;
                range->kinds |= w->region->kinds;
                range->content |= !w->listener;
                total += !place;
            }
        }
    }
    for (uint64_t r = 0; r < l->range_count; r++)
        plan_adapting(l, &l->ranges[r]);
    dt_put_together(s, l->ranges, l->range_count);
    l->plan_version = s->layout_version;
    return 0;
}
