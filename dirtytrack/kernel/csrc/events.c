/* SPDX-License-Identifier: MIT
 * What the kernel tells by itself: discards, moves and unmaps (UFFD_FEATURE_EVENT_REMOVE, _REMAP, _UNMAP).
 *
 * Whoever calls madvise or munmap waits until the event was read. So a thread reads, which takes no lock and allocates
 * nothing: whoever holds the session's lock may be the one that waits, since free() may give memory back. What it reads
 * goes to a ring, and from there to the listeners by the next call that holds the lock. */
#include "engine.h"
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* An event is read before the discard is done, so a collect may come between the two. Told again while it is so young
 * that this is possible; a thread that is stopped for longer in the middle of madvise escapes it. */
#define SETTLED_NS 50000000u
enum { RING = 4096, RECENT = 256 };

typedef struct event { uint64_t start, end, other, at_ns; } event; /* other: where it was moved to, or 0 */

struct dt_events {
    pthread_t thread;
    bool running;
    int uffd, stop;               /* an eventfd that ends the thread */
    _Atomic uint64_t begun, done; /* reads of the descriptor; equal while the thread waits for an event */
    _Atomic uint64_t written, read;
    _Atomic bool overflow;
    event ring[RING];
    uint64_t recent_count;
    event recent[RECENT];
};

static void push(dt_events *e, uint64_t start, uint64_t end, uint64_t other)
{
    uint64_t at = atomic_load_explicit(&e->written, memory_order_relaxed);
    if (at - atomic_load_explicit(&e->read, memory_order_acquire) == RING) {
        atomic_store(&e->overflow, true);
        return;
    }
    e->ring[at % RING] = (event){start, end, other, dt_now_ns()};
    atomic_store_explicit(&e->written, at + 1, memory_order_release);
}

static bool read_one(dt_events *e)
{
    struct k_uffd_msg message;
    /* Whoever discards goes on as soon as the event is read, which is before it is in the ring: a collect waits for
     * reads that were begun. */
    atomic_fetch_add(&e->begun, 1);
    bool any = read(e->uffd, &message, sizeof message) == sizeof message;
    if (any && (message.event == K_UFFD_EVENT_REMOVE || message.event == K_UFFD_EVENT_UNMAP))
        push(e, message.arg.remove.start, message.arg.remove.end, 0);
    else if (any && message.event == K_UFFD_EVENT_REMAP)
        push(e, message.arg.remap.from, message.arg.remap.from + message.arg.remap.len, message.arg.remap.to);
    atomic_fetch_add(&e->done, 1);
    return any;
}

static void *read_events(void *context)
{
    dt_events *e = context;
    struct pollfd fds[] = {{.fd = e->uffd, .events = POLLIN}, {.fd = e->stop, .events = POLLIN}};
    for (;;) {
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            return NULL;
        if (fds[1].revents)
            return NULL;
        while (read_one(e))
            ;
    }
}

int dt_events_start(dt_session *s)
{
    dt_events *e = s->events;
    int fail = dt_fail_at(DT_SITE_EVENTS);
    if (fail)
        return -abs(fail);
    if (!e && !(e = s->events = dt_alloc(sizeof *e)))
        return -ENOMEM;
    e->uffd = s->uffd;
    e->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (e->stop < 0)
        return -errno;
    int error = dt_thread_start(&e->thread, read_events, e);
    e->running = !error;
    if (error)
        close(e->stop);
    return -error;
}

void dt_events_stop(dt_session *s)
{
    dt_events *e = s->events;
    if (!e || !e->running)
        return;
    eventfd_write(e->stop, 1);
    pthread_join(e->thread, NULL);
    close(e->stop);
    e->running = false;
}

void dt_events_forget(dt_session *s)
{
    dt_events *e = s->events;
    if (e && e->running)
        close(e->stop); /* inherited; its thread was not */
    if (e)
        e->running = false;
}

static void tell(dt_session *s, uint64_t start, uint64_t end)
{
    dt_mark_all(s->watches, s->watch_count, start, end);
    dt_alias_tell(s, start, end);
}

/* A move takes the registration along, to where no region is: nobody would ever scan it there. */
static void let_go(dt_session *s, uint64_t start, uint64_t end)
{
    uint64_t at = start, from, to;
    while (s->uffd >= 0 && dt_next_uncovered(s, dt_counts_registered, NULL, &at, end, &from, &to))
        dt_uffd_unregister(s, from, to);
}

void dt_events_drain(dt_session *s)
{
    dt_events *e = s->events;
    for (uint64_t begun = atomic_load(&e->begun); atomic_load(&e->done) < begun;)
        sched_yield(); /* the thread needs no lock of ours */
    uint64_t written = atomic_load_explicit(&e->written, memory_order_acquire), read = atomic_load(&e->read);
    if (DT_LIKELY(written == read && !e->recent_count && !atomic_load(&e->overflow)))
        return;
    uint64_t now = dt_now_ns(), kept = 0;
    for (uint64_t i = 0; i < e->recent_count; i++) {
        tell(s, e->recent[i].start, e->recent[i].end);
        if (now - e->recent[i].at_ns < SETTLED_NS)
            e->recent[kept++] = e->recent[i];
    }
    e->recent_count = kept;
    bool all = atomic_exchange(&e->overflow, false);
    for (; read < written; read++) {
        const event *one = &e->ring[read % RING];
        tell(s, one->start, one->end);
        s->statistics.pages_told += (one->end - one->start) >> dt_page_shift();
        if (one->other)
            let_go(s, one->other, one->other + (one->end - one->start));
        else if (now - one->at_ns < SETTLED_NS) {
            if (e->recent_count < RECENT)
                e->recent[e->recent_count++] = *one;
            else /* in one with the last: more is told than need be */
                e->recent[RECENT - 1] = (event){dt_min(one->start, e->recent[RECENT - 1].start),
                                                dt_max(one->end, e->recent[RECENT - 1].end), 0, one->at_ns};
        }
        atomic_store_explicit(&e->read, read + 1, memory_order_release);
    }
    for (uint64_t i = 0; all && i < s->watch_count; i++) /* some were not kept: nobody knows which */
        dt_mark_whole(s->watches[i]);
}
