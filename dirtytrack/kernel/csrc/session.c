/* SPDX-License-Identifier: MIT
 * Sessions: the descriptors, and how long it all lives. */
#include "engine.h"
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

/* ---- forks -------------------------------------------------------------------------------------------------- */

/* Inherited descriptors act on the parent (measured, Linux 6.18): a child must never use them. A fork is known by a
 * page that the kernel wipes in the child, so that a fork which no hook sees (a C library's own) is found too. */
static _Atomic uint64_t *fork_word;
static uint64_t generations;
static pthread_mutex_t generation_lock = PTHREAD_MUTEX_INITIALIZER;
/* What cannot track may not be able to wipe either (before Linux 4.14, gVisor): there, for sessions that compare, a child
 * is known by its number, and by the C library's hook, since in another namespace it may have the same one. */
static _Atomic pid_t wiped_by_hand;

static void wipe(void) { atomic_store(fork_word, 0); }

static void wipe_in_child(void)
{
    if (wiped_by_hand && getpid() != wiped_by_hand) {
        wipe();
        wiped_by_hand = getpid();
    }
}

static uint64_t this_generation(void)
{
    uint64_t now = 0;
    /* SAFETY: in a child whose parent held this lock at the fork it would never be free again, so it is only tried:
     * the holder is another thread making its first session, at worst we wait for it by yielding. */
    for (int i = 0; pthread_mutex_trylock(&generation_lock); i++) {
        if (i == 1000000)
            return 0;
        sched_yield();
    }
    if (!fork_word) {
        void *page = mmap(NULL, dt_page_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        bool wipes = page != MAP_FAILED && !madvise(page, dt_page_bytes(), MADV_WIPEONFORK);
        if (page != MAP_FAILED && !wipes && pthread_atfork(NULL, NULL, wipe)) {
            munmap(page, dt_page_bytes());
            page = MAP_FAILED;
        }
        if (page != MAP_FAILED) {
            fork_word = page;
            wiped_by_hand = wipes ? 0 : getpid();
        }
    }
    if (fork_word) {
        wipe_in_child();
        now = atomic_load(fork_word);
        if (!now) {
            now = ++generations; /* inherited by a child, so its first one is larger than any that it inherited */
            atomic_store(fork_word, now);
        }
    }
    pthread_mutex_unlock(&generation_lock);
    return now;
}

uint64_t dt_generation(void) { return this_generation(); }

bool dt_forked(const dt_session *s)
{
    if (DT_UNLIKELY(wiped_by_hand))
        wipe_in_child();
    return atomic_load_explicit(fork_word, memory_order_relaxed) != s->generation;
}

/* Closes a descriptor that a child inherited, if that number still means what it meant: a daemon may have closed all
 * and opened others since. */
static void close_inherited(int fd, const char *what)
{
    char path[32], target[64];
    if (fd < 0)
        return;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, target, sizeof target - 1);
    if (n <= 0)
        return;
    target[n] = 0;
    if (strstr(target, what))
        close(fd);
}

static void forget_inherited(dt_session *s)
{
    int uffd = s->uffd, pagemap = s->pagemap;
    s->uffd = s->pagemap = -1;
    /* SAFETY: the vector was not inherited (MADV_DONTFORK), so its address may be somebody else's here: never unmap it. */
    s->vector = NULL;
    dt_events_forget(s);
    if (s->compare)
        dt_compare_abandon(s->compare);
    close_inherited(uffd, "userfaultfd");
    close_inherited(pagemap, "pagemap");
    if (s->space) {
        close_inherited(s->space->maps, "maps");
        close_inherited(s->pidfd, "pid");
        s->space->maps = s->pidfd = -1;
    }
}

/* ---- small things ------------------------------------------------------------------------------------------- */

int dt_room(void **array, uint64_t *room, uint64_t wanted, size_t item_bytes)
{
    if (wanted <= *room)
        return 0;
    uint64_t more = dt_max(wanted, *room ? *room * 2 : 8);
    void *grown = dt_grow(*array, *room * item_bytes, more * item_bytes);
    if (!grown)
        return -ENOMEM;
    *array = grown;
    *room = more;
    return 0;
}

DT_HOT void dt_retain(dt_session *s) { atomic_fetch_add(&s->refs, 1); }

int dt_checked_ioctl(enum dt_site site, int fd, unsigned long request, void *argument)
{
    int fail = dt_fail_at(site);
    if (fail > 0)
        return -fail;
    int rc = ioctl(fd, request, argument) ? -errno : 0;
    return fail < 0 ? fail : rc;
}

static int open_uffd(dt_session *s, dt_failure *why)
{
    if (s->compare)
        return 0;
    int door, fd = dt_open_any_door(why, &door);
    if (fd < 0)
        return fd;
    uint64_t all = 0, wanted = K_UFFD_FEATURE_WP_ASYNC | K_UFFD_FEATURE_WP_UNPOPULATED | K_UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    if (s->wants_events)
        wanted |= K_UFFD_FEATURE_EVENT_REMOVE | K_UFFD_FEATURE_EVENT_REMAP | K_UFFD_FEATURE_EVENT_UNMAP;
    int rc = dt_uffd_api(fd, wanted, &all);
    if (rc) {
        close(fd);
        return dt_fail_with(why, rc, -rc, DT_STEP_API, 0, 0);
    }
    s->uffd = fd;
    s->door = door;
    s->features = all;
    if (s->wants_events && (rc = dt_events_start(s))) {
        close(fd);
        s->uffd = -1;
        return dt_fail_with(why, rc, -rc, DT_STEP_EVENTS, 0, 0);
    }
    return 0;
}

/* ---- opening and closing -------------------------------------------------------------------------------------- */

void dt_free_session(dt_session *s)
{
    dt_target_finished(s);
    if (s->vector)
        munmap(s->vector, DT_VECTOR_LENGTH * sizeof *s->vector);
    dt_free(s->regions);
    dt_free(s->watches);
    dt_free(s->flights);
    dt_free(s->bridges);
    dt_free(s->foreign);
    dt_free(s->aliases);
    dt_free(s->events);
    if (s->compare)
        dt_compare_close(s->compare);
    pthread_mutex_destroy(&s->lock);
    pthread_mutex_destroy(&s->turn);
    dt_free(s);
}

int dt_new_session(dt_session **out, dt_failure *why)
{
    dt_session *s = dt_alloc(sizeof *s);
    if (!s)
        return dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    s->refs = 1;
    s->uffd = s->pagemap = s->pidfd = -1;
    s->chunk_bytes = DT_CHUNK_BYTES;
    s->generation = this_generation();
    s->registrations = atomic_load(&dt_registrations);
    s->thefts = atomic_load(&dt_thefts);
    pthread_mutex_init(&s->lock, NULL);
    pthread_mutex_init(&s->turn, NULL);
    int rc = s->generation ? 0 : dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    if (!rc) {
        size_t bytes = DT_VECTOR_LENGTH * sizeof *s->vector;
        /* Faulted in beforehand, and never copied on write: the kernel's EFAULT comes after it consumed dirty bits. */
        void *vector = dt_fail_at(DT_SITE_ALLOCATE)
                           ? MAP_FAILED
                           : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (vector == MAP_FAILED)
            rc = dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
        else {
            s->vector = vector;
            madvise(vector, bytes, MADV_DONTFORK);
            memset(vector, 0, bytes);
        }
    }
    if (rc)
        dt_free_session(s);
    else
        *out = s;
    return rc;
}

void dt_choose_remedies(dt_session *s, uint32_t remedy)
{
    static _Atomic int needs_remedy = -1; /* asked of the kernel once: a fork keeps the kernel */
    s->remedy = remedy;
    s->block_bytes = (remedy & DT_REMEDY_EAGER ? 8 : 64) * dt_page_bytes();
    if (remedy & (DT_REMEDY_ABSENT | DT_REMEDY_NO_ABSENT)) {
        s->find_absent = remedy & DT_REMEDY_ABSENT;
        return;
    }
    int needs = atomic_load(&needs_remedy);
    if (needs < 0) {
        dt_support support;
        dt_probe(&support);
        needs = !support.sees_discards || !support.sees_untouched;
        if (support.sees_stores) /* a probe that could not try (no memory, no descriptor) is not remembered */
            atomic_store(&needs_remedy, needs);
    }
    s->find_absent = needs;
}

int dt_session_open(uint32_t remedy, int events, uint32_t backend, dt_session **out, dt_failure *why)
{
    dt_session *s;
    int rc = dt_new_session(&s, why);
    if (rc)
        return rc;
    s->wants_events = events;
    if (!rc && backend != DT_BACKEND_KERNEL) {
        if ((rc = dt_compare_open(backend, &s->compare)))
            dt_fail_with(why, rc, -rc, rc == -ENOMEM ? DT_STEP_MEMORY : DT_STEP_NONE, 0, 0);
        remedy = DT_REMEDY_NONE;
        s->wants_events = false;
    }
    if (!rc)
        rc = open_uffd(s, why);
    if (!rc && !s->compare) {
        s->pagemap = dt_open_pagemap();
        if (s->pagemap < 0)
            rc = dt_fail_with(why, s->pagemap, -s->pagemap, DT_STEP_PAGEMAP, 0, 0);
    }
    if (!rc && !s->compare) { /* an old kernel says so now, not at the first collect */
        int written = dt_page_written(s, (uint64_t)s->vector);
        if (written < 0)
            rc = dt_fail_with(why, written, -written, DT_STEP_SCAN, 0, 0);
    }
    if (!rc)
        dt_choose_remedies(s, remedy);
    if (rc) {
        dt_events_stop(s);
        if (s->uffd >= 0)
            close(s->uffd);
        if (s->pagemap >= 0)
            close(s->pagemap);
        dt_free_session(s);
        return rc;
    }
    *out = s;
    return 0;
}

/* Lets go of all memory at once. Explicitly, because a child that inherited a copy of the descriptor would keep the
 * memory armed after our close. Holes and ranges that are gone are no matter. */
static void unregister_everything(dt_session *s)
{
    for (uint64_t i = 0; i < s->region_count; i++)
        dt_uffd_unregister(s, s->regions[i]->start, s->regions[i]->end);
    for (uint64_t i = 0; i < s->bridge_count; i++)
        dt_uffd_unregister(s, s->bridges[i].start, s->bridges[i].end);
    s->bridge_count = 0;
    for (uint64_t i = 0; i < s->alias_count; i++)
        dt_uffd_unregister(s, s->aliases[i].other, s->aliases[i].other + (s->aliases[i].end - s->aliases[i].start));
    s->alias_count = 0;
}

/* Whoever waits for an event to be read goes on as soon as the descriptor is closed. */
static void close_uffd(dt_session *s)
{
    if (s->compare) {
        dt_compare_forget(s->compare);
        return;
    }
    dt_events_stop(s);
    unregister_everything(s);
    close(s->uffd);
    s->uffd = -1;
}

static void close_locked(dt_session *s)
{
    if (atomic_exchange(&s->closed, true))
        return;
    if (s->uffd >= 0 || s->compare)
        close_uffd(s);
    if (s->pagemap >= 0)
        close(s->pagemap);
    s->pagemap = -1;
    if (s->space)
        dt_close_target(s);
    for (uint64_t i = 0; i < s->region_count; i++)
        atomic_store(&s->regions[i]->registered, false);
}

int dt_session_close(dt_session *s)
{
    if (dt_forked(s)) {
        forget_inherited(s);
        return DT_FORKED;
    }
    pthread_mutex_lock(&s->lock);
    close_locked(s);
    pthread_mutex_unlock(&s->lock);
    return 0;
}

static void drain(dt_session *s)
{
    if (DT_UNLIKELY(atomic_load_explicit(&s->returned, memory_order_relaxed) != NULL))
        dt_drain_blocks(s);
    if (DT_UNLIKELY(atomic_load_explicit(&s->dropped_listeners, memory_order_relaxed) != NULL))
        dt_drain_listeners(s);
    if (DT_UNLIKELY(atomic_load_explicit(&s->dropped_regions, memory_order_relaxed) != NULL))
        dt_drain_regions(s);
    if (DT_UNLIKELY(s->events != NULL))
        dt_events_drain(s);
}

DT_HOT void dt_release(dt_session *s)
{
    if (atomic_fetch_sub(&s->refs, 1) != 1)
        return;
    /* SAFETY: the last reference: nobody else can reach the session, so its lock need not be taken (in a forked child
     * it may be held for ever by a thread that does not exist there). */
    if (dt_forked(s)) {
        forget_inherited(s);
        atomic_store(&s->closed, true);
    }
    close_locked(s);
    drain(s);
    while (s->watch_count)
        dt_free_watch(s, s->watches[s->watch_count - 1]);
    while (s->region_count)
        dt_free_region(s, s->regions[s->region_count - 1]);
    dt_free_session(s);
}

void dt_session_drop(dt_session **session)
{
    dt_session *s = *session;
    *session = NULL;
    if (s)
        dt_release(s);
}

DT_HOT int dt_enter(dt_session *s)
{
    if (DT_UNLIKELY(dt_forked(s))) {
        forget_inherited(s);
        return DT_FORKED;
    }
    /* Who compares has the lock for milliseconds, and could have it again before another thread has woken up: so whoever
     * waits first keeps the others from coming before. */
    if (s->compare)
        pthread_mutex_lock(&s->turn);
    pthread_mutex_lock(&s->lock);
    if (s->compare)
        pthread_mutex_unlock(&s->turn);
    if (DT_UNLIKELY(s->closed)) {
        pthread_mutex_unlock(&s->lock);
        return DT_CLOSED;
    }
    drain(s);
    return 0;
}

DT_HOT void dt_leave(dt_session *s) { pthread_mutex_unlock(&s->lock); }

int dt_session_state(dt_session *s)
{
    int rc = dt_enter(s);
    if (!rc)
        dt_leave(s);
    return rc;
}

int dt_session_fd(dt_session *s) { return dt_forked(s) ? -1 : s->uffd; }
int dt_session_door(dt_session *s) { return s->door; }
uint64_t dt_session_features(dt_session *s) { return s->features; }

int dt_session_statistics(dt_session *s, dt_statistics *out)
{
    int rc = dt_enter(s);
    if (rc)
        return rc;
    *out = s->statistics;
    dt_leave(s);
    return 0;
}

/* ---- suspending ------------------------------------------------------------------------------------------------ */

int dt_session_suspend(dt_session *s, dt_failure *why)
{
    int rc = dt_enter(s);
    if (rc)
        return dt_fail_with(why, rc, 0, DT_STEP_NONE, 0, 0);
    if (!s->suspended) {
        close_uffd(s);
        s->suspended = true;
    }
    dt_leave(s);
    return 0;
}

int dt_session_resume(dt_session *s, dt_failure *why)
{
    int rc = dt_enter(s);
    if (rc)
        return dt_fail_with(why, rc, 0, DT_STEP_NONE, 0, 0);
    if (!s->suspended) {
        dt_leave(s);
        return 0;
    }
    rc = open_uffd(s, why);
    if (!rc) {
        s->suspended = false;
        /* Nobody watched meanwhile, so all of it counts as written, and nobody waits for the bits that arming erases. */
        for (uint64_t i = 0; i < s->watch_count; i++)
            dt_mark(s->watches[i], s->watches[i]->start, s->watches[i]->end);
        for (uint64_t i = 0; i < s->region_count && !rc; i++) {
            dt_region *r = s->regions[i];
            if (!r->registered)
                continue;
            rc = dt_uffd_register(s, r->start, r->end);
            if (rc == -EINVAL && !dt_mapped(s, r->start, r->end))
                rc = 0; /* gone meanwhile: its listeners are told at their next collect */
            else if (rc)
                dt_fail_with(why, rc, -rc, DT_STEP_REGISTER, r->start, r->end);
            else if ((r->armed |= r->watchers > 0) && !r->present && !s->compare) /* the watched meanwhile wait for their first arming */
                dt_protect(s, r->start, r->end); /* what it cannot arm, the next collect reports */
            if (!rc && !(rc = dt_alias_begin(s, r)) && r->armed)
                rc = dt_alias_arm(s, r);
        }
        if (rc) {
            close_uffd(s);
            s->suspended = true;
        }
    }
    dt_leave(s);
    return rc;
}

/* ---- writes that no page table saw -------------------------------------------------------------------------------- */

static int declare(dt_session *s, uint64_t start, uint64_t end)
{
    s->statistics.pages_declared += (dt_up(end, dt_page_bytes()) - dt_down(start, dt_page_bytes())) >> dt_page_shift();
    dt_mark_all(s->watches, s->watch_count, start, end);
    dt_alias_tell(s, start, end);
    return 0;
}

int dt_mark_dirty(dt_session *s, uint64_t start, uint64_t end)
{
    if (end < start)
        return -EINVAL;
    int rc = dt_enter(s);
    if (rc)
        return rc;
    rc = declare(s, start, end);
    dt_leave(s);
    return rc;
}

int dt_in_flight(dt_session *s, uint64_t start, uint64_t end, int begin)
{
    if (end <= start)
        return -EINVAL;
    int rc = dt_enter(s);
    if (rc)
        return rc;
    uint64_t i = 0;
    while (i < s->flight_count && (s->flights[i].start != start || s->flights[i].end != end))
        i++;
    if (begin) {
        rc = dt_room((void **)&s->flights, &s->flight_room, s->flight_count + 1, sizeof *s->flights);
        if (!rc && i == s->flight_count)
            s->flights[s->flight_count++] = (dt_flight){start, end, 0};
        if (!rc)
            s->flights[i].count++;
    } else if (i == s->flight_count) {
        rc = -EINVAL;
    } else {
        declare(s, start, end);
        if (!--s->flights[i].count)
            s->flights[i] = s->flights[--s->flight_count];
    }
    dt_leave(s);
    return rc;
}
