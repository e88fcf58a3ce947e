/* SPDX-License-Identifier: MIT
 * The session's own structures, shared by session.c, region.c, scan.c, heal.c, listener.c, collect.c and audit.c.
 *
 * Who owns what. A session lives while a handle to it, to one of its regions or to one of its listeners lives, or a set
 * that one of its listeners delivered. Everything below is guarded by session->lock, but for the three queues, which
 * finalisers push to without it and dt_enter empties with it. */
#ifndef DIRTYTRACK_ENGINE_H
#define DIRTYTRACK_ENGINE_H
#include "internal.h"
#include "abi.h"
#include <pthread.h>

/* A bound on the address space of one ioctl: a call over 64 GiB keeps mmap of other threads waiting for 1.5 s, one over
 * 1 GiB for 2-38 ms (measured, Linux 6.18). */
#define DT_CHUNK_BYTES ((uint64_t)1 << 30)
#define DT_BUDGET_CHUNK_BYTES ((uint64_t)32 << 20)
/* How many runs one ioctl may return: 8 KiB of them stay in the first cache, and for more the kernel takes its own buffer
 * from the page allocator, at 0.4 µs a call (measured, Linux 6.18). */
#define DT_VECTOR_LENGTH 341u

struct dt_region {
    dt_session *session;
    uint64_t id;
    uint64_t address, nbytes;     /* the user's bytes */
    uint64_t start, end;          /* the page span */
    _Atomic bool registered;
    bool armed;                   /* since its registration */
    bool dropped;                 /* no handle is left */
    uint32_t watchers;
    uint64_t gone_version;        /* counts what went away; a watch compares it with what it was told */
    uint64_t gone_start, gone_end, gone_bytes; /* the first hole, and all of them */
    uint64_t seen_start, seen_end, seen_bytes; /* the same, while dt_heal looks */
    dt_region *next_dropped;
};

/* What one listener has pending of one region: one bit a page. */
struct dt_watch {
    dt_watch *next_detached;
    dt_listener *listener;
    dt_region *region;
    uint64_t start, end;          /* the region's page span */
    uint64_t told;                /* the gone_version that the listener knows of */
    bool pending;                 /* false: no bit is set */
    uint64_t words;
    uint64_t bits[];
};

typedef struct dt_audit_slot { uint64_t page, hash; bool valid; } dt_audit_slot;

typedef struct dt_range {         /* what is scanned in one go: spans that touch or overlap, united */
    uint64_t start, end;
    uint64_t first, count;        /* its watches, everybody's, in listener->overlaps */
} dt_range;

struct dt_listener {
    dt_session *session;
    _Atomic uint32_t refs;        /* the handle, and each block */
    bool running;
    bool dropped;                 /* no handle is left */
    bool overlapping;             /* some of its own regions overlap */
    uint64_t epoch;
    dt_watch **watches;           /* sorted by start */
    uint64_t watch_count, watch_room, detached_count;
    uint64_t plan_version;        /* session->layout_version when the plan was made */
    dt_range *ranges;
    uint64_t range_count, range_room;
    dt_watch **overlaps;
    uint64_t overlap_room;
    uint64_t cursor;              /* where a collect with a budget goes on */
    uint64_t expected;            /* runs in the next collect: those of the last */
    double audit_fraction;
    dt_audit_slot *audit;
    uint64_t audit_count, audit_room, audit_random;
    dt_statistics statistics;
    dt_listener *next_dropped;
};

typedef struct dt_flight { uint64_t start, end, count; } dt_flight;

struct dt_session {
    _Atomic uint32_t refs;
    pthread_mutex_t lock;
    uint64_t generation;          /* of the process that made it: see dt_forked */
    _Atomic bool closed;
    bool suspended;
    bool find_absent;             /* remedy R1 */
    int uffd, pagemap, door;
    uint64_t features;
    uint64_t next_id;
    uint64_t layout_version;      /* changes whenever a watch comes or goes */
    dt_region **regions;
    uint64_t region_count, region_room;
    dt_watch **watches;           /* everybody's, detached ones included */
    uint64_t watch_count, watch_room;
    dt_flight *flights;
    uint64_t flight_count, flight_room;
    dt_run *bridges;              /* registered beyond any region, to spare the kernel mappings */
    uint64_t bridge_count, bridge_room;
    dt_run *foreign;              /* beneath our regions, but by now registered by another session */
    uint64_t foreign_count, foreign_room;
    uint64_t registrations, thefts; /* what of dt_registrations and dt_thefts has been looked at */
    struct k_page_region *vector; /* zeroed and faulted in whenever a scan begins */
    dt_statistics statistics;
    _Atomic(dt_block *) returned;
    _Atomic(dt_region *) dropped_regions;
    _Atomic(dt_listener *) dropped_listeners;
};

/* One collecting pass: who is told what a scan finds. */
typedef struct dt_pass {
    dt_session *session;
    dt_listener *self;            /* whose collect it is, or NULL */
    dt_region *only;              /* the region that it is about, or NULL: all of self's */
    dt_set *direct;               /* self's finds go here, sorted, instead of its bits; NULL: to its bits */
    dt_watch *const *watches;     /* everybody who watches some of the range */
    uint64_t watch_count;
} dt_pass;

/* session.c */
int dt_enter(dt_session *s);      /* 0 with the lock held and the queues empty, or DT_CLOSED, DT_FORKED */
void dt_leave(dt_session *s);
bool dt_forked(const dt_session *s);
void dt_retain(dt_session *s);
void dt_release(dt_session *s);
int dt_room(void **array, uint64_t *room, uint64_t wanted, size_t item_bytes); /* grow an array; -ENOMEM */
int dt_checked_ioctl(enum dt_site site, int fd, unsigned long request, void *argument); /* 0 or -errno */
int dt_open_door(enum dt_door door);          /* a descriptor or -errno */
int dt_open_any_door(dt_failure *why, int *door);
int dt_uffd_api(int fd, uint64_t features, uint64_t *all); /* 0 or -errno */
int dt_open_pagemap(void);

/* region.c */
int dt_uffd_register(dt_session *s, uint64_t start, uint64_t end);
int dt_uffd_unregister(dt_session *s, uint64_t start, uint64_t end);
int dt_uffd_owns(dt_session *s, uint64_t start, uint64_t end); /* of a registered mapping: 1, 0 or -errno */
/* Of all sessions of this process: how often memory was registered, and how often a scan may have taken another's bits. */
extern _Atomic uint64_t dt_registrations, dt_thefts;
/* The next part of [*at, end) that no region which `counts` holds; false at the end. */
typedef bool (*dt_counts)(const dt_region *region, const dt_region *except);
bool dt_next_uncovered(const dt_session *s, dt_counts counts, const dt_region *except, uint64_t *at, uint64_t end,
                       uint64_t *from, uint64_t *to);
bool dt_counts_armed(const dt_region *region, const dt_region *except);
void dt_region_unwatch(dt_region *region);    /* one watcher less; unregisters a dropped region with the last */
void dt_free_region(dt_session *s, dt_region *region);
void dt_drain_regions(dt_session *s);

/* scan.c */
uint64_t dt_now_ns(void);
void dt_mark(dt_watch *w, uint64_t start, uint64_t end);
void dt_mark_all(dt_watch *const *watches, uint64_t n, uint64_t start, uint64_t end);
void dt_unmark(dt_watch *w, uint64_t start, uint64_t end);
void dt_fold(dt_pass *pass);      /* what went to pass->direct goes to the bits, and so does the rest */
int dt_scan_pass(dt_pass *pass, uint64_t start, uint64_t end, dt_failure *why);
int dt_protect(dt_session *s, uint64_t start, uint64_t end);      /* UFFDIO_WRITEPROTECT, in chunks */
int dt_arm(dt_session *s, dt_region *region, dt_failure *why);    /* at first, or again with a collecting pass */
int dt_peek_range(dt_session *s, uint64_t start, uint64_t end, dt_set *written, dt_set *absent, dt_failure *why);
int dt_page_written(dt_session *s, uint64_t page);                /* 1, 0 or -errno; arms nothing */
int dt_page_armable(dt_session *s, uint64_t page);                /* 1: somebody registered its mapping for WP_ASYNC */

/* heal.c */
bool dt_mapped(uint64_t start, uint64_t end);
int dt_heal(dt_session *s, uint64_t start, uint64_t end);
int dt_look_for_strangers(dt_session *s);     /* 0, or -errno of dt_heal */
bool dt_next_own(const dt_session *s, uint64_t *at, uint64_t end, uint64_t *from, uint64_t *to);

/* listener.c */
int dt_fail_region(dt_failure *why, int code, const dt_region *region);
void dt_mark_whole(dt_watch *w);
void dt_forget(dt_watch *w);                  /* nothing is pending */
dt_watch *dt_watch_of(const dt_listener *l, const dt_region *region);
int dt_claim(dt_listener *l, dt_region *only, dt_set *out);
void dt_detach(dt_listener *l, dt_watch *w, dt_block *block);
void dt_drain_blocks(dt_session *s);
void dt_drain_listeners(dt_session *s);
void dt_free_watch(dt_session *s, dt_watch *w);
void dt_listener_unref(dt_listener *listener);

/* audit.c */
/* Both after arming: a write between that and the hash is reported, and then the hash is taken again. -ENOMEM. */
int dt_audit_start(dt_listener *l);
int dt_audit_add(dt_listener *l, const dt_watch *w);
int dt_audit_check(dt_listener *l, dt_set *found);                /* 0 or DT_MISSED with found->why */
void dt_audit_skip(dt_listener *l, const dt_set *found);          /* of a part: these were reported, so look anew */
#endif
