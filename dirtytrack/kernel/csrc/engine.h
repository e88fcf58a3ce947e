/* SPDX-License-Identifier: MIT
 * The session's own structures, shared by session.c, region.c, scan.c, arm.c, peek.c, content.c, alias.c, events.c, heal.c,
 * listener.c, plan.c, collect.c, doors.c, adapt.c, costs.c, audit.c, compare.c and plate.c.
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

/* What the adaptive listeners of some memory want: see adapt.c. */
typedef struct dt_wish {
    uint64_t page_ns;             /* the dearest of what they said that a page costs them */
    bool measured;                /* some said nothing: what a copy costs here */
} dt_wish;
typedef struct dt_adapt dt_adapt;

struct dt_region {
    dt_session *session;
    uint64_t id;
    uint64_t address, nbytes;     /* the user's bytes */
    uint64_t start, end;          /* the page span */
    _Atomic bool registered;
    bool armed;                   /* since its registration */
    bool dropped;                 /* no handle is left */
    bool present;                 /* DT_ARM_PRESENT: what is not populated is not armed */
    bool pinned;                  /* DT_PINNED */
    uint32_t kinds;               /* enum dt_kind, or-ed */
    uint64_t granule;             /* the largest page in it */
    dt_watch *content;            /* remedy R2: the pages that may have content (content.c); NULL where it needs none */
    dt_adapt *adapt;              /* which blocks are left unarmed; NULL: none ever was */
    uint32_t unseen_aliases;      /* other mappings of its memory that could not be registered */
    uint32_t watchers;
    uint64_t gone_version;        /* counts what went away; a watch compares it with what it was told */
    uint64_t gone_start, gone_end, gone_bytes; /* the first hole, and all of them */
    uint64_t seen_start, seen_end, seen_bytes; /* the same, while dt_heal looks */
    dt_region *next_dropped;
};

/* What one listener has pending of one region: one bit a page. Without a listener: region->content, which is told of
 * each page that the listeners are told of. */
struct dt_watch {
    dt_watch *next_detached;
    dt_listener *listener;
    dt_region *region;
    uint64_t start, end;          /* the region's page span */
    uint64_t told;                /* the gone_version that the listener knows of */
    bool pending;                 /* false: no bit is set */
    bool assuming;                /* false: no bit is set in `assumed` */
    uint64_t words;
    uint64_t *assumed;            /* behind `bits`: one bit a page, of those told without being watched since the last
                                   * collect. No memory until there are some: it is zeroed, and never touched. */
    uint64_t bits[];
};

typedef struct dt_audit_slot { uint64_t page, hash; bool valid; } dt_audit_slot;

typedef struct dt_range {         /* what is scanned in one go: spans that touch or overlap, united */
    uint64_t start, end;
    bool present;                 /* all of its own watches are of regions with DT_ARM_PRESENT */
    bool content;                 /* some of its watches are region->content */
    uint32_t kinds;               /* of all that is watched in it */
    uint64_t first, count;        /* its watches, everybody's, in listener->overlaps */
    dt_adapt *adapt;              /* NULL: all of it is tracked exactly */
    dt_wish wish;
    uint64_t together;            /* how many ranges from this one on had nothing but mappings between them */
} dt_range;

struct dt_listener {
    dt_session *session;
    _Atomic uint32_t refs;        /* the handle, and each block */
    bool running;
    bool dropped;                 /* no handle is left */
    bool overlapping;             /* some of its own regions overlap */
    bool adaptive, exact;         /* it wants blocks to be assumed where that is cheaper; it forbids it */
    uint64_t page_ns;             /* what a page that is told costs it; 0: a copy */
    uint64_t granule;             /* the largest page in its regions */
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
    _Atomic(dt_block *) spare;    /* of the delivered set that was freed last: for the next, without page faults */
    double audit_fraction;
    dt_audit_slot *audit;
    uint64_t audit_count, audit_room, audit_random;
    dt_statistics statistics;
    dt_listener *next_dropped;
};

/* [start, end) is the same shared memory as [other, ...), mapped elsewhere in this process. */
typedef struct dt_alias {
    const dt_region *region;      /* whose memory it is; [start, end) lies in it */
    uint64_t start, end, other;
    uint64_t inode, offset;       /* of the file, at `other` */
    uint32_t device_major, device_minor;
    bool armed;
} dt_alias;
typedef struct dt_events dt_events;
typedef struct dt_compare dt_compare;

typedef struct dt_flight { uint64_t start, end, count; } dt_flight;

struct dt_session {
    _Atomic uint32_t refs;
    pthread_mutex_t lock;
    pthread_mutex_t turn;         /* of those who wait for the lock, the one who is next: see dt_enter */
    uint64_t generation;          /* of the process that made it: see dt_forked */
    _Atomic bool closed;
    bool suspended;
    bool find_absent;             /* remedy R1, of all memory: this kernel needs it */
    uint32_t remedy;              /* enum dt_remedy, as given */
    uint64_t block_bytes;         /* what is left unarmed together: see adapt.c */
    int uffd, pagemap, door;
    dt_space *space;              /* NULL: this process; else another, whose pidfd says whether it is there: see foreign.c */
    int pidfd;
    uint64_t chunk_bytes;         /* of address space in one ioctl */
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
    dt_alias *aliases;            /* pairs of ranges that are the same memory: see alias.c */
    uint64_t alias_count, alias_room;
    bool wants_events;
    dt_events *events;            /* what the kernel tells by itself, NULL where it was not asked to */
    dt_run *foreign;              /* beneath our regions, but by now registered by another session */
    uint64_t foreign_count, foreign_room;
    bool met_strangers;           /* another userfaultfd has, or had, some of a target's memory */
    uint64_t registrations, thefts; /* what of dt_registrations and dt_thefts has been looked at */
    dt_compare *compare;          /* what memory is compared with; NULL where the kernel tells */
    struct k_page_region *vector; /* of what scans find; faulted in */
    uint64_t filled;              /* so many of it may not be zero */
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
    bool everybody;               /* all of the session's watches are told, which may become more in the middle */
    const dt_range *range;        /* not NULL: what is known of what lies beneath */
    dt_watch *const *watches;     /* else these: everybody who watches some of the range */
    uint64_t watch_count;
    bool present;                 /* arm and find what is populated only */
    bool find_absent;             /* remedy R1: the kernel or the kind of memory needs it */
    bool find_gigantic;           /* some of it the arming scan may pass over: huge pages of an unusual size */
    bool find_lost;               /* remedy R2: somewhere beneath it a marker may survive a discard */
    bool aliased;                 /* some of it is mapped elsewhere too */
    dt_adapt *adapt;              /* NULL: nothing is assumed in it */
    dt_wish wish;
} dt_pass;

/* session.c */
int dt_enter(dt_session *s);      /* 0 with the lock held and the queues empty, or DT_CLOSED, DT_FORKED */
void dt_leave(dt_session *s);
bool dt_forked(const dt_session *s);
void dt_retain(dt_session *s);
void dt_release(dt_session *s);

int dt_checked_ioctl(enum dt_site site, int fd, unsigned long request, void *argument); /* 0 or -errno */

/* doors.c */
int dt_open_door(enum dt_door door);          /* a descriptor or -errno */
int dt_open_any_door(dt_failure *why, int *door);
int dt_uffd_api(int fd, uint64_t features, uint64_t *all); /* 0 or -errno */
int dt_open_pagemap(void);
int dt_new_session(dt_session **out, dt_failure *why); /* one without a descriptor */
void dt_choose_remedies(dt_session *s, uint32_t remedy);
void dt_free_session(dt_session *s);

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
bool dt_counts_registered(const dt_region *region, const dt_region *except);
int dt_survey(dt_region *region, uint64_t granule); /* its kinds, granule and page span, from what is mapped there */
void dt_region_unwatch(dt_region *region);    /* one watcher less; unregisters a dropped region with the last */
void dt_free_region(dt_session *s, dt_region *region);
void dt_drain_regions(dt_session *s);

/* content.c: remedy R2 */
bool dt_needs_content(const dt_region *region);
int dt_content_begin(dt_session *s, dt_region *region);     /* -ENOMEM; what may have content is unknown: all of it */
void dt_content_end(dt_session *s, dt_region *region);
/* Around the first arming: before it, while a page in swap can be told from a marker, and after it. */
int dt_content_before_arming(dt_session *s, dt_region *region, uint64_t start, uint64_t end);
int dt_content_after_arming(dt_session *s, dt_region *region, uint64_t start, uint64_t end);
/* Pages of `content` within [start, end) that may have had content and are neither present nor known to hold data. Where
 * it is certain that nothing is left of a page, `keep` is false: it need not be told again. */
typedef void (*dt_on_lost)(void *context, uint64_t start, uint64_t end, bool keep);
int dt_find_lost(dt_session *s, dt_watch *content, uint64_t start, uint64_t end, bool note, dt_on_lost on_lost,
                 void *context);

/* alias.c */
int dt_alias_begin(dt_session *s, dt_region *region);       /* finds and registers the other mappings of its memory */
void dt_alias_end(dt_session *s, const dt_region *region);
uint64_t dt_alias_count(const dt_session *s, const dt_region *region);
bool dt_aliased(const dt_session *s, uint64_t start, uint64_t end);
int dt_alias_arm(dt_session *s, const dt_region *region);
/* [start, end) was written: so were the same pages elsewhere. */
void dt_alias_tell(dt_session *s, uint64_t start, uint64_t end);
/* What [start, end) is elsewhere, one part at a time; `next` begins as 0. */
bool dt_alias_next(const dt_session *s, uint64_t start, uint64_t end, uint64_t *next, dt_run *elsewhere);
/* The address in [start, ...) that became elsewhere->start, `number` being the `next` of that call less 1. */
uint64_t dt_alias_origin(const dt_session *s, uint64_t number, uint64_t start);
/* Part of an alias is not registered any more: it is again, or it is no alias any more. Either way it may have been
 * written: its pages elsewhere are told. */
int dt_alias_heal(dt_session *s, uint64_t start, uint64_t end);
/* Another session may have registered what is mapped there by now: those are let go of. lost: there were some. */
int dt_alias_verify(dt_session *s, bool *lost);

/* events.c */
int dt_events_start(dt_session *s);
void dt_events_stop(dt_session *s);                         /* before the userfaultfd is closed */
void dt_events_forget(dt_session *s);                       /* in a forked child */
void dt_events_drain(dt_session *s);

/* plan.c */
int dt_plan_anew(dt_listener *l);             /* 0 or -ENOMEM */
static inline int dt_plan(dt_listener *l) /* as the layout is now */
{
    return DT_LIKELY(l->plan_version == l->session->layout_version) ? 0 : dt_plan_anew(l);
}
void dt_put_together(const dt_session *s, dt_range *ranges, uint64_t count);

/* scan.c */
uint64_t dt_now_ns(void);
/* A scan that arms nothing over [start, end), told run by run: pages whose categories, `inverted` ones turned round, have
 * all of `mask` and, where it is not 0, any of `anyof`. */
typedef void (*dt_on_run)(void *context, uint64_t start, uint64_t end);
typedef struct dt_question { uint64_t flags, mask, inverted, anyof; } dt_question;
extern const dt_question DT_ABSENT; /* neither present nor swapped: no marker either */
extern const dt_question DT_ARM_WRITTEN, DT_ARM_POPULATED; /* the two that arm: of all pages, of what is populated */
int dt_query(dt_session *s, uint64_t start, uint64_t end, const dt_question *question, dt_on_run on_run, void *context);
void dt_mark(dt_watch *w, uint64_t start, uint64_t end);
void dt_mark_all(dt_watch *const *watches, uint64_t n, uint64_t start, uint64_t end);
void dt_unmark(dt_watch *w, uint64_t start, uint64_t end);
void dt_fold(dt_pass *pass);      /* what went to pass->direct goes to the bits, and so does the rest */
void dt_look_beneath(dt_pass *pass, uint64_t start, uint64_t end); /* which remedies the memory there needs */
int dt_scan_pass(dt_pass *pass, uint64_t start, uint64_t end, dt_failure *why);
int dt_scan_lost(dt_pass *pass, uint64_t start, uint64_t end);    /* remedy R2 by itself */
int dt_protect(dt_session *s, uint64_t start, uint64_t end);      /* UFFDIO_WRITEPROTECT, in chunks */
int dt_page_written(dt_session *s, uint64_t page);                /* 1, 0 or -errno; arms nothing */
int dt_page_armable(dt_session *s, uint64_t page);                /* 1: somebody registered its mapping for WP_ASYNC */

/* Of what was told to everybody in this very pass: how much is written, and where `arm`, armed again. 0 or -errno. */
int dt_scan_apart(dt_session *s, uint64_t start, uint64_t end, bool arm, uint64_t *written_pages);
void dt_assume(dt_watch *w, uint64_t start, uint64_t end); /* that was told without having been watched */

/* arm.c */
int dt_arm(dt_session *s, dt_region *region, dt_failure *why); /* at first, or again with a collecting pass */

/* costs.c */
extern dt_costs dt_cost;                                    /* once these are known */
bool dt_costs_known(dt_session *s);                         /* measures them; false: they cannot be, or somebody does */

/* adapt.c */
dt_adapt *dt_adapt_new(const dt_session *s, uint64_t start, uint64_t end); /* NULL: too small, or no memory: all of it stays exact */
void dt_adapt_prepare(dt_session *s, const dt_listener *l, const dt_region *region); /* measures, where costs may matter later */
bool dt_adapt_any(const dt_adapt *a);                       /* whether some page is assumed */
void dt_adapt_forget(dt_adapt *a);                          /* all of it was armed */
/* How to pass over what is at `at`, until *to, at most `end`. MIXED: single pages of it are assumed. */
enum dt_way { DT_WAY_EXACT, DT_WAY_ASSUMED, DT_WAY_MIXED };
enum dt_way dt_adapt_way(const dt_adapt *a, uint64_t at, uint64_t end, uint64_t *to);
/* The next run of [at, end) that is assumed; false: there is none, and both are `end`. */
bool dt_adapt_next(const dt_adapt *a, uint64_t at, uint64_t end, uint64_t *from, uint64_t *to);
void dt_adapt_found(dt_adapt *a, const struct k_page_region *found, uint64_t n);
/* [start, end) is assumed, and was told: those whose turn it is are sampled, or armed. -errno of a scan. */
int dt_adapt_ask(dt_session *s, dt_adapt *a, uint64_t start, uint64_t end);
/* [start, end) is mixed: blocks whose turn it is are not assumed any more, and this pass is to arm all of them. */
void dt_adapt_turn(dt_adapt *a, uint64_t start, uint64_t end);
/* Whether a pass, which now begins, goes without it: nothing is assumed, and nothing was worth it for long. `found`: pages. */
bool dt_adapt_rests(dt_adapt *a);
void dt_adapt_rested(dt_session *s, dt_adapt *a, uint64_t found);
/* At the end of a pass over [start, end): which blocks are left unarmed from now on. */
void dt_adapt_decide(dt_session *s, dt_adapt *a, uint64_t start, uint64_t end, const dt_wish *wish);

/* peek.c */
int dt_peek_range(dt_session *s, uint64_t start, uint64_t end, bool present, dt_watch *const *watches, uint64_t watch_count,
                  dt_set *written, dt_set *others, dt_failure *why);

/* heal.c */
bool dt_mapped(const dt_session *s, uint64_t start, uint64_t end);
int dt_heal(dt_session *s, uint64_t start, uint64_t end);
int dt_look_for_strangers(dt_session *s);     /* 0, or -errno of dt_heal */
bool dt_next_own(const dt_session *s, uint64_t *at, uint64_t end, uint64_t *from, uint64_t *to);

/* foreign.c */
int dt_target_there(const dt_session *s);     /* 0, or -ESRCH: the process ended, or replaced itself by exec */
void dt_close_target(dt_session *s);
void dt_target_finished(dt_session *s);       /* frees what it has of the target */
/* 0 where [start, end) is whole mappings as of now, but for what is registered before it; else -EAGAIN, or -errno: what
 * is registered in part is two mappings, and an mremap() of the target over both fails. */
int dt_target_fits(dt_session *s, uint64_t start, uint64_t end);
bool dt_target_mapped(const dt_session *s, uint64_t start, uint64_t end);

/* compare.c, plate.c: a session without a userfaultfd and a pagemap. Its part of what the kernel does elsewhere. */
int dt_compare_open(uint32_t backend, dt_compare **out);     /* 0 or -errno */
void dt_compare_forget(dt_compare *c);                       /* all that is known of any page, and its memory */
void dt_compare_abandon(dt_compare *c);                      /* in a forked child: not all of it was inherited */
void dt_compare_close(dt_compare *c);
int dt_compare_survey(dt_region *region);
/* Instead of the ioctls, with their answers: runs in the session's vector and their number, or -errno; 0 or -errno. */
long dt_compare_scan(dt_session *s, uint64_t start, uint64_t end, const dt_question *question, uint64_t room);
int dt_compare_protect(dt_session *s, uint64_t start, uint64_t end);
static inline enum dt_step dt_compare_step(int rc) { return rc == -ENOMEM ? DT_STEP_MEMORY : DT_STEP_COPY; } /* that failed */
int dt_compare_mapping(uint64_t address, uint64_t end, dt_mapping *out); /* as dt_mapping_at, of where there is any */
void dt_compare_lose(dt_session *s, uint64_t start, uint64_t end); /* nothing is mapped there any more */
void dt_compare_adjust(dt_session *s, const dt_region *region);    /* which was registered or unregistered */

/* listener.c */
int dt_fail_region(dt_failure *why, int code, const dt_region *region);
dt_watch *dt_make_watch(dt_listener *l, dt_region *region, unsigned bits); /* so many a page; NULL: no memory */
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
