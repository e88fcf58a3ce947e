/* SPDX-License-Identifier: MIT
 * The writers of the storm: they store without pause, tell nobody, and know nothing of the library under test. Built and
 * loaded by storm.py, which calls storm_write from several threads at once. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* The same in storm.py. Writer i of n stores only to words w of a page with w % n == i; word i is its stamp, the
 * last store of each visit. What it stores is the number of the store: it grows, and no two are alike. */
struct storm_writer {
    uint64_t *memory;
    uint64_t page_words;
    uint64_t index, writers;
    uint64_t zone_start, zone_end; /* pages that nobody else writes, and that this writer discards now and then */
    uint64_t random;               /* not 0 */
    uint64_t idle_one_in;          /* visits after which it does nothing for a while; 0: never */
    uint32_t *order;               /* its pages: the retired ones, then those in play, then those to come */
    uint64_t count;
    uint64_t retired;              /* how many pages in order[] are retired: nothing will be written to them any more */
    uint64_t stores, discards, touched;
};

static uint64_t draw(struct storm_writer *w, uint64_t below)
{
    w->random ^= w->random << 13;
    w->random ^= w->random >> 7;
    w->random ^= w->random << 17;
    return (w->random >> 11) % below;
}

static void store(struct storm_writer *w, uint64_t page, uint64_t word)
{
    uint64_t number = w->stores + 1;
    __atomic_store_n(w->memory + page * w->page_words + word, number, __ATOMIC_RELAXED); /* really done, each of them */
    __atomic_store_n(&w->stores, number, __ATOMIC_RELAXED);
}

static int discard(struct storm_writer *w, uint64_t page, uint64_t pages)
{
    __atomic_store_n(&w->discards, w->discards + pages, __ATOMIC_RELAXED);
    return madvise(w->memory + page * w->page_words, pages * w->page_words * sizeof *w->memory, MADV_DONTNEED);
}

static int visit(struct storm_writer *w, uint64_t page, uint64_t discard_one_in)
{
    if (page >= w->zone_start && page < w->zone_end && !draw(w, discard_one_in))
        return discard(w, page, 1);
    uint64_t slots = w->page_words / w->writers - 1;
    for (uint64_t left = 1 + draw(w, 8); left; left--)
        store(w, page, w->index + w->writers * (1 + draw(w, slots)));
    store(w, page, w->index);
    __atomic_store_n(&w->touched, w->touched + 1, __ATOMIC_RELAXED);
    return 0;
}

/* Stores at least so often, and until *stop. Some pages are in play at a time; one after another they retire, evenly
 * over the stores asked for. 0, or an errno. */
int storm_write(struct storm_writer *w, uint64_t stores, uint64_t in_play, uint64_t discard_one_in, const int *stop)
{
    uint64_t began = w->stores, pace = stores / w->count + 1, retired = 0;
    if (w->zone_end > w->zone_start && draw(w, 2) && discard(w, w->zone_start, w->zone_end - w->zone_start))
        return errno; /* whole page tables at once, while others ask about them */
    while (w->stores - began < stores || !__atomic_load_n(stop, __ATOMIC_ACQUIRE)) {
        uint64_t playing = w->count - retired < in_play ? w->count - retired : in_play, pick = retired + draw(w, playing);
        if (visit(w, w->order[pick], discard_one_in))
            return errno;
        if (w->idle_one_in && !draw(w, w->idle_one_in))
            nanosleep(&(struct timespec){.tv_nsec = (long)draw(w, 8) << 20}, NULL);
        if (w->stores - began < pace * (retired + 1) || retired + in_play >= w->count)
            continue;
        uint32_t page = w->order[pick];
        if (visit(w, page, 2)) /* the last that this page sees: in the zone, half of them are discards */
            return errno;
        w->order[pick] = w->order[retired];
        w->order[retired++] = page;
        __atomic_store_n(&w->retired, retired, __ATOMIC_RELEASE);
    }
    /* order's last page never retires and is in no zone: the last store is there, and its number is the count of all. */
    store(w, w->order[w->count - 1], w->index);
    return 0;
}

uint64_t storm_retired(const struct storm_writer *w) { return __atomic_load_n(&w->retired, __ATOMIC_ACQUIRE); }
uint64_t storm_touched(const struct storm_writer *w) { return __atomic_load_n(&w->touched, __ATOMIC_RELAXED); }

/* The stamps of all writers on the first pages of memory. memcpy(), and so numpy, promises no more than bytes: one of a
 * number that is just being stored may have the old bytes below the new ones, and be larger than either. */
void storm_stamps(const struct storm_writer *w, uint64_t pages, uint64_t *stamps)
{
    for (uint64_t page = 0; page < pages; page++)
        for (uint64_t i = 0; i < w->writers; i++)
            *stamps++ = __atomic_load_n(w->memory + page * w->page_words + i, __ATOMIC_RELAXED);
}

/* Pages to a mirror, for the same reason word by word. */
void storm_copy(const uint64_t *from, uint64_t *to, uint64_t words)
{
    for (uint64_t i = 0; i < words; i++)
        to[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
}

/* A child that is there for a moment, so that pages are copied on write. Its pid, or -1. */
int storm_fork(void)
{
    pid_t child = fork();
    if (!child)
        _exit(0);
    return child < 0 || waitpid(child, NULL, 0) != child ? -1 : (int)child;
}
