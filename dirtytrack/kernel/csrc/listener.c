/* SPDX-License-Identifier: MIT
 * Listeners: who waits for which pages. Pages leave a listener's pending set only for a dt_set, and come back from it
 * unless it is marked delivered. */
#include "engine.h"
#include <unistd.h>

int dt_fail_region(dt_failure *why, int code, const dt_region *region)
{
    dt_fail_with(why, code, code > DT_CLOSED ? -code : 0, DT_STEP_NONE, region ? region->start : 0, region ? region->end : 0);
    if (why && region)
        why->region = region->id;
    return code;
}

/* ---- watches ---------------------------------------------------------------------------------------------------- */

dt_watch *dt_make_watch(dt_listener *l, dt_region *region, unsigned bits)
{
    uint64_t pages = (region->end - region->start) >> dt_page_shift(), words = (pages + 63) / 64;
    dt_watch *w = dt_alloc(sizeof *w + (bits + (l ? 1 : 0)) * words * 8);
    if (!w)
        return NULL;
    w->listener = l;
    w->region = region;
    w->start = region->start;
    w->end = region->end;
    w->told = region->gone_version;
    w->words = words;
    w->assumed = w->bits + bits * words;
    return w;
}

void dt_mark_whole(dt_watch *w) { dt_mark(w, w->start, w->end); }

DT_HOT void dt_forget(dt_watch *w)
{
    if (w->pending)
        memset(w->bits, 0, w->words * 8);
    if (w->assuming)
        memset(w->assumed, 0, w->words * 8);
    w->pending = w->assuming = false;
}

/* Both arrays have room by now. */
static void attach(dt_listener *l, dt_watch *w)
{
    uint64_t i = l->watch_count++;
    for (; i && l->watches[i - 1]->start > w->start; i--)
        l->watches[i] = l->watches[i - 1];
    l->watches[i] = w;
    l->session->layout_version++;
}

static void enlist(dt_session *s, dt_watch *w)
{
    s->watches[s->watch_count++] = w;
    w->region->watchers++;
    s->layout_version++;
}

void dt_free_watch(dt_session *s, dt_watch *w)
{
    for (uint64_t i = 0; i < s->watch_count; i++)
        if (s->watches[i] == w) {
            s->watches[i] = s->watches[--s->watch_count];
            break;
        }
    s->layout_version++;
    if (w->listener)
        dt_region_unwatch(w->region);
    else
        w->region->content = NULL;
    dt_free(w);
}

void dt_detach(dt_listener *l, dt_watch *w, dt_block *block)
{
    uint64_t i = 0;
    while (l->watches[i] != w)
        i++;
    memmove(l->watches + i, l->watches + i + 1, (--l->watch_count - i) * sizeof *l->watches);
    w->next_detached = block->detached;
    block->detached = w;
    l->detached_count++;
    l->session->layout_version++;
}

dt_watch *dt_watch_of(const dt_listener *l, const dt_region *region)
{
    for (uint64_t i = 0; i < l->watch_count; i++)
        if (l->watches[i]->region == region)
            return l->watches[i];
    return NULL;
}

/* ---- life and death --------------------------------------------------------------------------------------------- */

int dt_listener_new(dt_session *s, dt_listener **out)
{
    int rc = dt_enter(s);
    if (rc)
        return rc;
    dt_listener *l = dt_alloc(sizeof *l);
    if (l) {
        l->session = s;
        l->refs = 1;
        dt_retain(s);
        *out = l;
    }
    dt_leave(s);
    return l ? 0 : -ENOMEM;
}

DT_HOT void dt_listener_unref(dt_listener *l)
{
    if (atomic_fetch_sub(&l->refs, 1) != 1)
        return;
    dt_free(l->watches);
    dt_free(l->ranges);
    dt_free(l->overlaps);
    dt_free(l->audit);
    dt_free(l->spare);
    dt_free(l);
}

void dt_listener_drop(dt_listener **listener)
{
    dt_listener *l = *listener;
    *listener = NULL;
    if (!l)
        return;
    dt_session *s = l->session;
    l->next_dropped = atomic_load(&s->dropped_listeners);
    while (!atomic_compare_exchange_weak(&s->dropped_listeners, &l->next_dropped, l))
        ;
    dt_release(s);
}

void dt_drain_listeners(dt_session *s)
{
    dt_listener *next;
    for (dt_listener *l = atomic_exchange(&s->dropped_listeners, NULL); l; l = next) {
        next = l->next_dropped;
        while (l->watch_count)
            dt_free_watch(s, l->watches[--l->watch_count]);
        l->running = false;
        l->dropped = true;
        dt_listener_unref(l);
    }
}

/* ---- sets on their way out and back --------------------------------------------------------------------------------- */

/* The set that a collect fills: it belongs to the listener, and keeps it and the session. */
DT_HOT int dt_claim(dt_listener *l, dt_region *only, dt_set *out)
{
    /* As many runs as last time, so that they need not be moved as they become more. */
    uint64_t room = l->expected + l->expected / 8 + DT_WORD_RUNS + 8;
    dt_block *spare = atomic_exchange(&l->spare, NULL);
    if (spare && spare->capacity >= room)
        dt_set_reuse(out, spare);
    else
        dt_free(spare);
    int rc = dt_set_reserve(out, room);
    if (rc)
        return dt_fail_with(&out->why, rc, ENOMEM, DT_STEP_MEMORY, 0, 0);
    dt_block *block = out->block_;
    block->listener = l;
    block->only = only;
    atomic_fetch_add(&l->refs, 1);
    dt_retain(l->session);
    return 0;
}

static void push_block(dt_block *block)
{
    dt_session *s = block->listener->session;
    block->next = atomic_load(&s->returned);
    while (!atomic_compare_exchange_weak(&s->returned, &block->next, block))
        ;
    dt_release(s); /* the queue belongs to the session: from here on it frees the block */
}

void dt_session_give_back(dt_block *block) { push_block(block); }

/* Of a delivered set. What it detached is in the session's lists, so that waits for somebody with the lock. */
DT_HOT void dt_block_release(dt_block *block)
{
    if (block->detached) {
        block->count = 0;
        block->stopped = 2; /* delivered: free what is detached */
        push_block(block);
        return;
    }
    dt_listener *l = block->listener;
    dt_session *s = l->session;
    dt_free(atomic_exchange(&l->spare, block));
    dt_listener_unref(l);
    dt_release(s);
}

static void free_detached(dt_session *s, dt_block *block)
{
    dt_watch *next;
    for (dt_watch *w = block->detached; w; w = next) {
        next = w->next_detached;
        block->listener->detached_count--;
        dt_free_watch(s, w);
    }
    block->detached = NULL;
}

int dt_settle(dt_set *set)
{
    dt_block *block = set->block_;
    if (!block || !block->listener)
        return 0;
    dt_session *s = block->listener->session;
    int rc = dt_enter(s);
    if (rc)
        return rc;
    set->delivered = 1;
    free_detached(s, block);
    dt_leave(s);
    return 0;
}

static void take_back(dt_session *s, dt_block *block)
{
    dt_listener *l = block->listener;
    if (block->stopped == 2 || l->dropped)
        free_detached(s, block);
    dt_watch *next;
    for (dt_watch *w = block->detached; w; w = next) {
        next = w->next_detached;
        l->detached_count--;
        dt_watch *again = dt_watch_of(l, w->region);
        if (again) { /* watched anew meanwhile */
            for (uint64_t i = 0; i < w->words; i++)
                again->bits[i] |= w->bits[i];
            again->pending |= w->pending;
            dt_free_watch(s, w);
        } else {
            attach(l, w); /* its place was kept */
        }
    }
    l->running |= block->stopped == 1 && !l->dropped;
    for (uint64_t i = 0; i < l->watch_count; i++) {
        if (block->only && l->watches[i]->region != block->only)
            continue;
        for (uint64_t r = 0; r < block->count; r++)
            dt_mark(l->watches[i], block->runs[r].start, block->runs[r].end);
    }
    dt_free(block);
    dt_listener_unref(l);
}

void dt_drain_blocks(dt_session *s)
{
    dt_block *next;
    for (dt_block *b = atomic_exchange(&s->returned, NULL); b; b = next) {
        next = b->next;
        take_back(s, b);
    }
}

/* ---- starting, adding ------------------------------------------------------------------------------------------------ */

static int room_for(dt_listener *l, uint64_t more)
{
    dt_session *s = l->session;
    int rc = dt_room((void **)&l->watches, &l->watch_room, l->watch_count + l->detached_count + more, sizeof *l->watches);
    return rc ? rc : dt_room((void **)&s->watches, &s->watch_room, s->watch_count + more, sizeof *s->watches);
}

/* Watched before it is armed: from the moment that it is armed, other listeners' scans take its bits. */
static int watch_region(dt_listener *l, dt_region *region, dt_failure *why)
{
    if (region->session != l->session || !region->registered)
        return dt_fail_region(why, DT_UNREGISTERED, region);
    if (dt_watch_of(l, region))
        return dt_fail_region(why, DT_WATCHED, region);
    dt_adapt_prepare(l->session, l, region);
    /* Again, each time: arming the one before may have added to the session's watches. */
    dt_watch *w = room_for(l, 1) ? NULL : dt_make_watch(l, region, 1);
    if (!w)
        return dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, region->start, region->end);
    attach(l, w);
    enlist(l->session, w);
    return l->session->suspended ? 0 : dt_arm(l->session, region, why);
}

static void unwatch_region(dt_listener *l, dt_region *region)
{
    dt_watch *w = dt_watch_of(l, region);
    if (!w)
        return;
    dt_block none = {0};
    dt_detach(l, w, &none);
    l->detached_count--;
    dt_free_watch(l->session, w);
}

int dt_start(dt_listener *l, dt_region *const *regions, uint64_t n, dt_failure *why)
{
    dt_session *s = l->session;
    int rc = dt_enter(s);
    if (rc)
        return dt_fail_region(why, rc, NULL);
    uint64_t done = 0;
    if (l->running)
        rc = dt_fail_region(why, DT_RUNNING, NULL);
    else if (room_for(l, n))
        rc = dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    else
        while (!rc && done < n)
            rc = watch_region(l, regions[done++], why);
    if (!rc && l->audit_fraction > 0 && (rc = dt_audit_start(l)))
        dt_fail_with(why, rc, ENOMEM, DT_STEP_MEMORY, 0, 0);
    if (rc && rc != DT_RUNNING) { /* those before the failed one, and it */
        while (l->watch_count)
            unwatch_region(l, l->watches[0]->region);
    } else if (!rc) {
        for (uint64_t i = 0; i < l->watch_count; i++) {
            if (!s->suspended)
                dt_forget(l->watches[i]);
            else
                dt_mark_whole(l->watches[i]);
        }
        l->running = true;
        l->epoch = 1;
        l->cursor = 0;
    }
    dt_leave(s);
    return rc;
}

int dt_add(dt_listener *l, dt_region *region, dt_failure *why)
{
    int rc = dt_enter(l->session);
    if (rc)
        return dt_fail_region(why, rc, region);
    if (!l->running)
        rc = dt_fail_region(why, DT_NOT_STARTED, region);
    else if (room_for(l, 1))
        rc = dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, region->start, region->end);
    else {
        rc = watch_region(l, region, why);
        if (!rc && l->audit_fraction > 0 && (rc = dt_audit_add(l, dt_watch_of(l, region))))
            dt_fail_with(why, rc, ENOMEM, DT_STEP_MEMORY, region->start, region->end);
        if (!rc) {
            dt_mark_whole(dt_watch_of(l, region)); /* nobody knows its past */
            if (l->session->space) /* it may have come since the last collect, and have been written before it was armed */
                dt_alias_tell(l->session, region->start, region->end);
        } else if (rc != DT_WATCHED)
            unwatch_region(l, region);
    }
    dt_leave(l->session);
    return rc;
}

int dt_put_back(dt_listener *l, const dt_set *set)
{
    int rc = dt_enter(l->session);
    if (rc)
        return rc;
    if (!l->running)
        rc = DT_NOT_STARTED;
    for (uint64_t i = 0; !rc && i < set->count; i++)
        dt_mark_all(l->watches, l->watch_count, set->runs[i].start, set->runs[i].end);
    dt_leave(l->session);
    return rc;
}

uint64_t dt_epoch(dt_listener *l) { return l->running ? l->epoch : 0; }

int64_t dt_watched(dt_listener *l, uint64_t *ids, uint64_t room)
{
    int rc = dt_enter(l->session);
    if (rc)
        return rc;
    uint64_t count = l->watch_count;
    for (uint64_t i = 0; i < dt_min(count, room); i++)
        ids[i] = l->watches[i]->region->id;
    dt_leave(l->session);
    return (int64_t)count;
}

int dt_listener_wish(dt_listener *l, int adaptive, int exact, uint64_t page_ns)
{
    int rc = dt_enter(l->session);
    if (rc)
        return rc;
    if (l->running) {
        rc = DT_RUNNING;
    } else {
        l->adaptive = adaptive;
        l->exact = exact;
        l->page_ns = page_ns;
    }
    dt_leave(l->session);
    return rc;
}

int dt_audit(dt_listener *l, double fraction)
{
    if (!(fraction >= 0 && fraction <= 1))
        return -EINVAL;
    int rc = dt_enter(l->session);
    if (rc)
        return rc;
    if (l->running)
        rc = DT_RUNNING;
    else
        l->audit_fraction = fraction;
    dt_leave(l->session);
    return rc;
}

int dt_listener_statistics(dt_listener *l, dt_statistics *out)
{
    int rc = dt_enter(l->session);
    if (rc)
        return rc;
    *out = l->statistics;
    dt_leave(l->session);
    return 0;
}
