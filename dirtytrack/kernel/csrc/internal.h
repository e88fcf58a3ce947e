/* SPDX-License-Identifier: MIT
 * What the core's files share and nobody else sees. */
#ifndef DIRTYTRACK_INTERNAL_H
#define DIRTYTRACK_INTERNAL_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "dirtytrack.h"
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#define DT_LIKELY(x) __builtin_expect(!!(x), 1)
/* What is called in it becomes part of it, for where a system call is made a thousand times in a row: after each the
 * processor mispredicts every return. */
#define DT_FLAT __attribute__((flatten))
#define DT_UNLIKELY(x) __builtin_expect(!!(x), 0)
/* What each collect runs lies together, and what it seldom runs apart: when the kernel has re-armed pages the TLB is empty,
 * and each page of code is 20 ns or more. */
#define DT_HOT __attribute__((hot))
#define DT_APART __attribute__((noinline))

/* ---- fault.c: allocations and kernel calls, which tests can make fail ---- */
extern _Atomic uint32_t dt_fail_sites; /* 0 outside tests: then a site costs one load */
/* 0: go on; > 0: fail with this errno before the call; < 0: make the call, then fail with the negated errno. */
int dt_fail_check(enum dt_site site);
static inline int dt_fail_at(enum dt_site site)
{
    if (DT_LIKELY(!(atomic_load_explicit(&dt_fail_sites, memory_order_relaxed) & (uint32_t)site)))
        return 0;
    return dt_fail_check(site);
}
void *dt_alloc(size_t bytes);                     /* zeroed, or NULL */
void *dt_grow(void *block, size_t old_bytes, size_t bytes); /* the new part is not zeroed; NULL leaves the old block */
void dt_free(void *block);
int dt_room(void **array, uint64_t *room, uint64_t wanted, size_t item_bytes); /* grow an array; -ENOMEM */

/* ---- threads (thread.c) ---- */
/* One that gets none of the program's signals. 0 or an errno. */
int dt_thread_start(pthread_t *thread, void *(*run)(void *), void *context);

/* ---- mappings (maps.c) ---- */
/* Whose memory: NULL is this process. */
typedef struct dt_space {
    pid_t pid;
    int maps; /* its /proc/PID/maps: opened once, so that neither exec nor another process of that number can fool it */
} dt_space;
int dt_mapping_of(const dt_space *space, uint64_t address, dt_mapping *out); /* as dt_mapping_at */
/* Each mapping that touches [start, end), in order, until `visit` returns another number than 0, which is returned. */
int dt_each_mapping(const dt_space *space, uint64_t start, uint64_t end,
                    int (*visit)(void *context, const dt_mapping *mapping), void *context);
FILE *dt_open_proc(const dt_space *space, const char *name); /* /proc/PID/name, or NULL with errno */
bool dt_maps_query(void);                       /* whether PROCMAP_QUERY is there */
uint32_t dt_kind_of(const dt_mapping *mapping); /* enum dt_kind, or-ed */
int64_t dt_swapped_bytes(const dt_space *space, uint64_t start, uint64_t end); /* of the mappings that touch it, in swap; or -errno */

/* ---- pages ---- */
uint64_t dt_page_bytes(void);    /* asked of the system once */
unsigned dt_page_shift(void);
static inline uint64_t dt_down(uint64_t x, uint64_t unit) { return x & ~(unit - 1); }
static inline uint64_t dt_up(uint64_t x, uint64_t unit) { return (x + unit - 1) & ~(unit - 1); }
static inline uint64_t dt_max(uint64_t a, uint64_t b) { return a > b ? a : b; }
static inline uint64_t dt_min(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Has the processor fetch memory, all at once; a hint, of addresses that need not be there. */
static inline void dt_ask_for(const void *memory, uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch((const char *)memory + at);
}

/* Not the builtin: without the instruction, which x86-64 need not have, that is a call of a function with a table. */
static inline uint64_t dt_count_bits(uint64_t x)
{
    x -= x >> 1 & 0x5555555555555555u;
    x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
    return ((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56;
}

/* ---- sets (set.c) ---- */
#define DT_WORD_RUNS 33u /* that a word of bits may add, one that began before it included */

typedef struct dt_watch dt_watch;

/* Holds the runs of a dt_set. It is also the node by which an undelivered set finds its way back, so that giving pages
 * back allocates nothing. */
typedef struct dt_block {
    struct dt_block *next;     /* in the session's queue of returned blocks */
    dt_listener *listener;     /* whose pages these are; NULL in sets made by algebra */
    dt_region *only;           /* the region of a collect(region), else NULL */
    dt_watch *detached;        /* what dt_remove or dt_stop took away, given back with the pages */
    uint64_t capacity;         /* runs */
    uint64_t count;            /* runs, valid while queued */
    uint32_t stopped;          /* dt_stop made this set */
    uint32_t reserved;
    dt_run runs[];
} dt_block;

/* Room for at least `capacity` runs, keeping what is there; -ENOMEM changes nothing. Never returns less than one run. */
int dt_set_reserve(dt_set *set, uint64_t capacity);
void dt_set_reuse(dt_set *set, dt_block *block);  /* `set` is empty; the block was another's */
/* A set may be kept for long, and its room was for the worst case. Where shrinking fails the room stays. */
void dt_set_trim(dt_set *set);
/* Appends a run at or after the last one's start, coalescing; there must be room. Keeps count, not pages. */
static inline void dt_set_append(dt_set *set, uint64_t start, uint64_t end)
{
    dt_run *next = set->runs + set->count;
    if (set->count && next[-1].end >= start) {
        if (end > next[-1].end)
            next[-1].end = end;
        return;
    }
    *next = (dt_run){start, end};
    set->count++;
}
void dt_set_sort(dt_set *set);                    /* runs that were put there in no order: sorted and coalesced */
void dt_set_count_pages(dt_set *set);             /* pages, from the runs */
uint64_t dt_set_first(const dt_set *set, uint64_t address); /* index of the first run that ends after address */
void dt_session_give_back(dt_block *block);       /* listener.c: queue an undelivered block; takes no lock */
void dt_block_release(dt_block *block);           /* listener.c: free a delivered block, its watches and its reference */

/* digest.c: whether they are the same, of any length. Each byte is read once, whoever writes them meanwhile. Not memcmp():
 * where that finds a difference it reads those bytes again, and if somebody put them back it says "equal" of bytes that it
 * never looked at (seen with glibc 2.36: a page that was left out of a mirror). */
bool dt_same_bytes(const uint8_t *memory, const uint8_t *copy, uint64_t bytes);
/* copy.c: memcpy() past the caches, worth it from so many bytes in a row of copies on; seen by others after dt_copy_past_end(). */
extern uint64_t dt_copy_past_from; /* tests change it */
void dt_copy_past(void *out, const void *memory, uint64_t bytes);
void dt_copy_past_end(void);
/* bytes.c: copies by the kernel, so that a page that vanished is -EFAULT and `why`; `into` the tracked memory or out. */
int dt_copy_vanishing(bool into, uint8_t *ours, uint64_t tracked, uint64_t bytes, dt_failure *why);

/* ---- comparing (compare.c) ---- */
/* The bytes at [from, from + bytes) as the session of `region` knows them: what changes after that, it will tell. Between
 * the other two, which lock the session: once for many pieces, since a scan has the lock for long. */
int dt_compare_copy(dt_region *region, uint64_t from, uint64_t bytes, uint8_t *to, dt_failure *why);
int dt_compare_begin_copy(dt_region *region, dt_failure *why);
void dt_compare_end_copy(dt_region *region);

static inline int dt_fail_with(dt_failure *why, int code, int os_errno, enum dt_step step, uint64_t start, uint64_t end)
{
    if (why) {
        why->code = code;
        why->os_errno = os_errno;
        why->step = (int32_t)step;
        why->start = start;
        why->end = end;
    }
    return code;
}
#endif
