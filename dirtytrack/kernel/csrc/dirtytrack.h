/* SPDX-License-Identifier: MIT
 *
 * The core of dirtytrack: which pages of this process were written since the last epoch.
 *
 * Plain GNU C11, no Python.h; another runtime can include this header and link the .c files beside it.
 * cffi reads this very file (its lines that begin with '#' left out), so each declaration stands once.
 *
 * Conventions
 *   - A function that can fail returns 0 or a negative number: -errno, or one of `enum dt_code`.
 *     Out-parameters come last and are written on success only, except `dt_failure`, which is written on failure only.
 *   - Addresses and lengths are bytes, ranges are half-open [start, end).
 *   - Every function may be called from any thread; the session's lock is taken and released inside the call.
 *   - Handles (`dt_session`, `dt_region`, `dt_listener`) are reference counted. The `*_drop` functions take the address
 *     of the variable that holds the handle (it may hold NULL), only queue work, never block and never fail.
 */
#ifndef DIRTYTRACK_H
#define DIRTYTRACK_H
#include <stdint.h>
#include <stddef.h>

typedef struct dt_session dt_session;
typedef struct dt_region dt_region;
typedef struct dt_listener dt_listener;

enum dt_code {
    DT_OK = 0,
    DT_CLOSED = -10001,       /* the session is closed */
    DT_FORKED = -10002,       /* made before a fork; this is the child */
    DT_NOT_STARTED = -10003,  /* the listener is not running */
    DT_RUNNING = -10004,      /* the listener is running already */
    DT_NOT_WATCHED = -10005,  /* that region is not one of this listener's */
    DT_WATCHED = -10006,      /* that region is one of this listener's already */
    DT_GONE = -10007,         /* (part of) a region's mapping went away */
    DT_UNREGISTERED = -10008, /* that region was unregistered */
    DT_MISSED = -10009,       /* the audit found a change that nobody reported */
    DT_TOO_SMALL = -10010,    /* an output buffer is too small, or the input does not fit */
    DT_NOT_ANONYMOUS = -10012, /* DT_ARM_PRESENT is for private anonymous memory only */
    DT_MALFORMED = -10013,    /* these bytes are no delta, or a damaged one */
    DT_HUGETLB_MASK = -10011  /* an arming scan with that mask can hang a process for ever over hugetlb */
};

/* What was being tried when a call failed. */
enum dt_step {
    DT_STEP_NONE = 0,
    DT_STEP_USERFAULTFD = 1, /* userfaultfd(2) or /dev/userfaultfd */
    DT_STEP_API = 2,         /* UFFDIO_API */
    DT_STEP_PAGEMAP = 3,     /* open /proc/PID/pagemap */
    DT_STEP_REGISTER = 4,    /* UFFDIO_REGISTER */
    DT_STEP_UNREGISTER = 5,  /* UFFDIO_UNREGISTER */
    DT_STEP_PROTECT = 6,     /* UFFDIO_WRITEPROTECT */
    DT_STEP_SCAN = 7,        /* PAGEMAP_SCAN */
    DT_STEP_MEMORY = 8,      /* an allocation */
    DT_STEP_COPY = 9,        /* reading or writing tracked memory */
    DT_STEP_MAPS = 10,       /* reading /proc/self/maps */
    DT_STEP_EVENTS = 11,     /* starting the thread that is told of discards */
    DT_STEP_SOCKET = 12      /* sending or receiving */
};

typedef struct dt_failure {
    int32_t code;      /* what the call returned */
    int32_t os_errno;  /* the kernel's errno where there was one, else 0 */
    int32_t step;      /* enum dt_step */
    int32_t door;      /* enum dt_door that was tried last, for DT_STEP_USERFAULTFD */
    uint64_t start;    /* the range in question, or 0, 0 */
    uint64_t end;
    uint64_t region;   /* id of the region in question, or 0 */
} dt_failure;

/* ---- what this kernel can do -------------------------------------------------------------------------------- */

enum dt_door { DT_DOOR_NONE = 0, DT_DOOR_USER_MODE = 1, DT_DOOR_DEVICE = 2, DT_DOOR_FULL = 3 };

typedef struct dt_support {
    int32_t door;             /* the first door that opened, in the order above */
    int32_t door_errno[4];    /* by door: 0 where it opened or was not tried */
    int32_t api_errno;        /* UFFDIO_API with WP_ASYNC | WP_UNPOPULATED */
    int32_t pagemap_errno;    /* open /proc/self/pagemap */
    int32_t scan_errno;       /* PAGEMAP_SCAN */
    int32_t register_errno;   /* UFFDIO_REGISTER in write-protect mode of anonymous memory */
    int32_t sees_stores;      /* 1: a store to an armed page is reported, and once only */
    int32_t sees_discards;    /* 1: the exact scan reports an armed page that was discarded */
    int32_t sees_untouched;   /* 1: the exact scan reports a never-touched range (no page table) */
    int32_t maps_query;       /* 1: PROCMAP_QUERY (Linux 6.11) */
    int32_t reserved;
    uint64_t features;        /* as UFFDIO_API lists them, unknown bits included */
    uint64_t categories;      /* the page categories that PAGEMAP_SCAN accepts */
    uint64_t page_bytes;
} dt_support;

/* Finds out by trying, on memory and descriptors of its own. Always succeeds; what failed is in `out`. */
void dt_probe(dt_support *out);

/* ---- sets of pages ------------------------------------------------------------------------------------------ */

typedef struct dt_run {
    uint64_t start, end; /* addresses, page-aligned in sets of pages */
} dt_run;

/* Sorted, disjoint, coalesced runs. The caller provides the struct, zeroed; dt_set_clear frees what it holds.
 * A set filled by dt_collect, dt_remove or dt_stop belongs to the listener until `delivered` is set to 1:
 * cleared before that, its pages (and regions) go back to the listener. */
typedef struct dt_set {
    dt_run *runs;
    uint64_t count;      /* runs */
    uint64_t pages;      /* base pages in them */
    uint64_t epoch;      /* the epoch that the collect closed */
    uint32_t complete;   /* 0: the time budget ended the collect early */
    uint32_t delivered;
    dt_run *assumed;     /* the part that was told without having been watched: see dt_listener_wish */
    uint64_t assumed_count; /* runs */
    dt_failure why;      /* why a call that was to fill this set failed */
    void *block_;        /* private: what holds the runs */
    void *assumed_block_;
} dt_set;

void dt_set_clear(dt_set *set);
int dt_set_copy(const dt_run *runs, uint64_t count, dt_set *out); /* -EINVAL unless page-aligned, sorted, disjoint */
int dt_set_union(const dt_set *a, const dt_set *b, dt_set *out);
int dt_set_union_many(const dt_set *const *sets, uint64_t n, dt_set *out);
int dt_set_intersection(const dt_set *a, const dt_set *b, dt_set *out);
int dt_set_difference(const dt_set *a, const dt_set *b, dt_set *out);
/* Notes which part of it these sorted runs are, in place of what was noted; -ENOMEM changes nothing. */
int dt_set_assume(dt_set *set, const dt_run *runs, uint64_t count);
int dt_set_equal(const dt_set *a, const dt_set *b);               /* 1 or 0 */
int dt_set_subset(const dt_set *a, const dt_set *b);              /* 1 or 0 */
int dt_set_contains(const dt_set *set, uint64_t address);         /* 1 or 0 */
int dt_set_clip(const dt_set *set, uint64_t start, uint64_t end, dt_set *out); /* start, end page-aligned */

/* Byte offsets from `address` of the parts of [address, address + nbytes) that the set touches: writes at most `room`
 * runs, returns how many there are. */
uint64_t dt_set_offsets(const dt_set *set, uint64_t address, uint64_t nbytes, dt_run *out, uint64_t room);
/* Page numbers from `start`, one number a page; `out` has room for as many as the set has pages in [start, end). */
uint64_t dt_set_pages(const dt_set *set, uint64_t start, uint64_t end, uint64_t *out, uint64_t room);
/* One bit a page of [start, end), LSB first; `out` has (pages + 7) / 8 bytes, written whole. */
void dt_set_bitmap(const dt_set *set, uint64_t start, uint64_t end, uint8_t *out);
/* Which of `rows` rows at address + i * stride, each row_bytes long, the set touches: writes at most `room` numbers,
 * returns how many there are. `stride` > 0. */
uint64_t dt_set_rows(const dt_set *set, uint64_t address, uint64_t stride, uint64_t row_bytes, uint64_t rows,
                     uint64_t *out, uint64_t room);
/* How many of its pages are in each of n spans; -EINVAL unless these are page-aligned, sorted and disjoint. */
int dt_set_counts(const dt_set *set, const dt_run *spans, uint64_t n, uint64_t *out);

/* ---- bytes of a set ----------------------------------------------------------------------------------------- */

/* A piece of tracked memory, and where its bytes are or go elsewhere. */
typedef struct dt_extent {
    uint64_t address;
    uint64_t nbytes;
    void *mirror;       /* as long as nbytes, or NULL */
    uint32_t unpinned;  /* 1: it may vanish beneath us, so copy by a system call that reports it */
    uint32_t reserved;
    dt_region *through; /* NULL, or a region of a session that compares: read as that session knows the bytes */
} dt_extent;

/* `extents` are sorted and disjoint in gather, scatter and nbytes. On a page that vanished: -EFAULT and `why`. */
uint64_t dt_set_nbytes(const dt_set *set, const dt_extent *extents, uint64_t n);
int dt_gather(const dt_set *set, const dt_extent *extents, uint64_t n, uint8_t *out, uint64_t room, dt_failure *why);
/* The same, and of what was gathered from each extent its XXH64, which costs little while the bytes are at hand. */
int dt_gather_summed(const dt_set *set, const dt_extent *extents, uint64_t n, uint8_t *out, uint64_t room, uint64_t *sums,
                     dt_failure *why);
int dt_scatter(const dt_set *set, const dt_extent *extents, uint64_t n, const uint8_t *data, uint64_t length,
               dt_failure *why);
/* Each extent's dirty bytes to the same offset of its mirror. */
int dt_copy_out(const dt_set *set, const dt_extent *extents, uint64_t n, dt_failure *why);
/* The pages of the set that differ from the mirrors, in whole granules (a multiple of the page, counted from address 0). */
int dt_changed(const dt_set *set, const dt_extent *extents, uint64_t n, uint64_t granule_bytes, dt_set *out);

/* ---- deltas: the changed bytes of a memory, encoded (docs/delta-format.md) -------------------------------------- */

typedef struct dt_delta_info {
    uint64_t target_bytes;   /* of the memory that it changes */
    uint64_t changed_bytes;  /* that it carries */
    uint64_t pieces;
    uint32_t granule_bytes;
    uint32_t reserved;
} dt_delta_info;

typedef struct dt_piece {
    uint64_t offset;         /* into the memory */
    uint64_t nbytes;
    uint64_t at;             /* where its bytes are in the delta */
} dt_piece;

/* How many bytes dt_diff may want for a delta, UINT64_MAX where the granule is not a power of two up to 4096. */
uint64_t dt_delta_room(const dt_set *set, const dt_extent *memory, uint32_t granule);
/* The granules of the set's pages (NULL: of all) that differ from memory->mirror. update = 1: the mirror gets the bytes
 * that are encoded; on a failure it is as before. The delta has no checksum: see dt_delta_checksum. */
int dt_diff(const dt_set *set, const dt_extent *memory, uint32_t granule, int update, uint8_t *out, uint64_t room,
            uint64_t *length, dt_failure *why);
/* Of all but bytes 16 to 23, which are its place; `length` is 24 or more. */
uint64_t dt_delta_checksum(const uint8_t *delta, uint64_t length);
/* 0, or DT_MALFORMED with the position in why->start. Looks at everything but the checksum. */
int dt_delta_check(const uint8_t *delta, uint64_t length, dt_delta_info *out, dt_failure *why);
/* Writes nothing unless the whole delta is well-formed and for a target of that length (else DT_TOO_SMALL). */
int dt_delta_apply(const uint8_t *delta, uint64_t length, const dt_extent *target, dt_failure *why);
/* One delta that does what the first and then the second does. out = NULL: only `length`. -EINVAL where their targets
 * have different lengths. */
int dt_delta_compose(const uint8_t *first, uint64_t first_length, const uint8_t *second, uint64_t second_length,
                     uint8_t *out, uint64_t room, uint64_t *length, dt_failure *why);
/* The changed runs, none longer than a block: writes at most `room`, returns how many there are. */
uint64_t dt_delta_pieces(const uint8_t *delta, uint64_t length, dt_piece *out, uint64_t room);
/* Which of `rows` rows of row_bytes each, from `offset` on, it changes: writes at most `room` numbers, returns how many
 * there are; marks: NULL, or a byte a row, which is set to 1. */
uint64_t dt_delta_rows(const uint8_t *delta, uint64_t length, uint64_t offset, uint64_t row_bytes, uint64_t rows,
                       uint64_t *out, uint64_t room, uint8_t *marks);

/* ---- packed runs: what checkpoints are made of (docs/checkpoint-format.md) -------------------------------------- */

typedef struct dt_span {
    uint64_t offset, nbytes; /* of a memory */
} dt_span;

/* XXH64 by its specification. */
uint64_t dt_xxh64(const uint8_t *data, uint64_t length, uint64_t seed);
/* The same of data in parts: `add` takes as many whole 32 bytes as there are, `end` the last part, whole or not. */
typedef struct dt_xxh64_parts {
    uint64_t lane[4], length;
} dt_xxh64_parts;
void dt_xxh64_begin(dt_xxh64_parts *parts, uint64_t seed);
void dt_xxh64_add(dt_xxh64_parts *parts, const uint8_t *data, uint64_t length);
uint64_t dt_xxh64_end(dt_xxh64_parts *parts, const uint8_t *data, uint64_t length);
/* As `add`, and copies what it adds, each byte of which is read once. */
void dt_xxh64_copy(dt_xxh64_parts *parts, uint8_t *out, const uint8_t *data, uint64_t length);
int dt_all_zero(const uint8_t *data, uint64_t length); /* 1 or 0 */
/* Of each of `count` pages, a keyed hash of 128 bits (digest.c). key: page_bytes + 16 random bytes; out: two a page. */
void dt_digest_pages(const uint8_t *data, uint64_t count, uint64_t page_bytes, const uint8_t *key, uint64_t *out);
/* Reads a file from `offset` on until `length` bytes are there or it ends, and adds the whole 32 bytes of what came to
 * `parts` while the processor's cache has them. How many bytes, or -errno. */
int64_t dt_read_adding(int file, uint64_t offset, uint8_t *room, uint64_t length, dt_xxh64_parts *parts);
/* Has the disk begin with these bytes of a file; nothing is waited for, and whether it can is told by fsync(2). */
void dt_begin_writing(int file, uint64_t offset, uint64_t length);
/* Their sum; UINT64_MAX unless they are in order, disjoint, not empty and within the memory. */
uint64_t dt_spans_nbytes(const dt_span *spans, uint64_t n, uint64_t memory_nbytes);
/* The spans' bytes one behind the other into `out`, or from `data` (NULL: zeros) back to their places. -EINVAL unless the
 * spans are as above, DT_TOO_SMALL unless their sum is `length`: nothing is written then. `through` is not looked at. */
int dt_pack(const dt_extent *memory, const dt_span *spans, uint64_t n, uint8_t *out, uint64_t length, dt_failure *why);
int dt_unpack(const dt_extent *memory, const dt_span *spans, uint64_t n, const uint8_t *data, uint64_t length,
              dt_failure *why);

/* ---- for garbage collectors: words that point somewhere, cards, object starts -------------------------------- */

/* How a slot, which is a word of the heap, holds an address. All zero: any aligned word of 64 bits is one, as it is. */
typedef struct dt_pointers {
    uint64_t mask, tag;   /* a word is a pointer only where (word & mask) == tag; tag has no other bits than mask */
    uint64_t strip;       /* and these bits of it are no part of the address */
    uint64_t base;        /* compressed: the address is base + (word << shift), and 0 points nowhere */
    uint32_t shift;       /* up to 31 */
    uint32_t compressed;  /* 1: slots are words of 32 bits, and mask, tag and strip are not looked at */
} dt_pointers;

/* The caller provides the struct, zeroed, and may use it again: room is kept until dt_slots_clear. */
typedef struct dt_slots {
    uint64_t *addresses;  /* of the words, rising */
    uint64_t *targets;    /* what each pointed at when it was read, without its tag */
    uint64_t count;
    uint64_t room;
    uint64_t words;       /* that were read */
} dt_slots;

void dt_slots_clear(dt_slots *slots);
/* Reads the heap's bytes in the set's pages. `kept` are the pages with a word that points into `young`, and `out` those
 * words that point into [low, high), which is part of it. On a failure, told in kept->why, `out` has no slots and `kept`
 * none of what this call found. -EINVAL: [low, high) is not in young, or there are no such pointers. `heap` is sorted and
 * disjoint. One thread at a time may use one dt_slots. */
int dt_find_slots(const dt_set *set, const dt_extent *heap, uint64_t n, const dt_pointers *pointers, const dt_run *young,
                  uint64_t low, uint64_t high, dt_slots *out, dt_set *kept);
/* The pages that these addresses are in, which come in any order. */
int dt_pages_of(const uint64_t *addresses, uint64_t n, dt_set *out);
/* Makes each slot point at a target, and keeps its tag. -EINVAL and the slot in `why` where a slot cannot hold that target,
 * DT_NOT_WATCHED where it is no slot of the heap; those before it are written. */
int dt_redirect_slots(const dt_extent *heap, uint64_t n, const dt_pointers *pointers, const uint64_t *slots,
                      const uint64_t *targets, uint64_t count, dt_failure *why);

/* A byte a card of 1 << shift bytes, 1 where it is dirty; the first one's card begins at `address`, a multiple of it. */
typedef struct dt_cards {
    uint8_t *table;
    uint64_t address;
    uint32_t shift;
    uint32_t reserved;
} dt_cards;

/* Every card of [start, end) with part of a page of the set. */
void dt_cards_mark(const dt_set *set, uint64_t start, uint64_t end, const dt_cards *cards);
/* Every card of the set's pages that differs from memory->mirror, which is brought up to date; mark = 0: only that. */
int dt_cards_compare(const dt_set *set, const dt_extent *memory, const dt_cards *cards, int mark, dt_failure *why);
/* The addresses of the dirty ones among the first `count` cards, or their runs: writes at most `room`, returns how many
 * there are. */
uint64_t dt_cards_dirty(const dt_cards *cards, uint64_t count, uint64_t *out, uint64_t room);
uint64_t dt_cards_runs(const dt_cards *cards, uint64_t count, dt_run *out, uint64_t room);

/* A crossing map: where objects start in [address, end), in units of 1 << shift bytes from `address` on. The caller
 * provides bits and summary, zeroed, of as many bytes as dt_starts_bits and dt_starts_summary say. */
typedef struct dt_starts {
    uint64_t *bits, *summary;
    uint64_t address, end;
    uint32_t shift;
    uint32_t reserved;
} dt_starts;

uint64_t dt_starts_bits(uint64_t nbytes, uint32_t shift);
uint64_t dt_starts_summary(uint64_t nbytes, uint32_t shift);
/* Of objects that were allocated, in any order, from any thread. -EINVAL and the first in `why` where one is outside or
 * between units; none is added then. */
int dt_starts_add(const dt_starts *map, const uint64_t *starts, uint64_t n, dt_failure *why);
/* No object starts in [from, to) any more. */
void dt_starts_clear(const dt_starts *map, uint64_t from, uint64_t to);
/* The last start at or before an address: of the object that it is in, if it is in one. -ENOENT: there is none. */
int dt_starts_at(const dt_starts *map, uint64_t address, uint64_t *out);
/* Of sorted, disjoint runs: where each object starts that may have a byte in one, once: the last that starts at or before
 * the run's first byte, and all that start in it. Writes at most `room`, returns how many there are. */
uint64_t dt_starts_in(const dt_starts *map, const dt_run *runs, uint64_t n, uint64_t *out, uint64_t room);

/* ---- pages on the move: what migrations are made of (docs/migration-protocol.md) --------------------------------- */

enum dt_stretch_kind { DT_STRETCH_DATA = 0, DT_STRETCH_ZERO = 1 };

/* Pages of one memory that follow one another, counted from the page in which it begins. */
typedef struct dt_stretch {
    uint64_t first;
    uint32_t count;
    uint32_t kind;           /* enum dt_stretch_kind */
} dt_stretch;

/* A memory of which the other side has, or gets, a copy. */
typedef struct dt_moving {
    dt_extent memory;        /* `mirror` is not looked at */
    uint64_t phase;          /* how far into its first page it begins */
    uint64_t page_bytes;     /* a power of two from 4096 to 65536 */
    uint64_t pages;
    const uint8_t *key;      /* page_bytes + 16 bytes */
    uint64_t *table;         /* two numbers a page, its digest: what the copy's owner has; 0, 0 where nobody knows */
} dt_moving;

typedef struct dt_moved {
    uint64_t stretches;      /* that were written */
    uint64_t data_pages;     /* whose bytes were */
    uint64_t zero_pages;
    uint64_t same_pages;     /* that were left out, since the copy has them so */
} dt_moved;

/* What was sent of a memory last, beside it: as much memory again, populated where it was sent. */
typedef struct dt_sent {
    uint8_t *bytes;          /* of all pages, from the one in which the memory begins; zero at first */
    uint64_t *table;         /* their digests, as in dt_moving */
    uint8_t *packed;         /* room for what is packed: 2 + page_bytes for each page of data */
    uint64_t packed_bytes;   /* of it, that dt_moving_take() wrote */
} dt_sent;

/* Behind how many pages of the set from the address `from` on: where the next part begins. UINT64_MAX behind the last. */
uint64_t dt_set_step(const dt_set *set, uint64_t from, uint64_t pages);
/* The set's pages in [from, to) that the table has otherwise: read once each into `out`, whole, told by `stretches` and
 * `digests`, noted in the table. `room` of all three is in pages. The pages are base pages, as page_bytes says.
 * On a failure the table may have pages that nobody has. `sent` may be NULL; else the pages of data are also packed, by
 * what differs from it, and noted in it. */
int dt_moving_take(const dt_moving *m, const dt_set *set, uint64_t from, uint64_t to, dt_stretch *stretches,
                   uint64_t *digests, uint8_t *out, uint64_t room, dt_sent *sent, dt_moved *moved, dt_failure *why);
/* A page by what differs from the one before, NULL where nobody knows that: at most 2 + page_bytes. Returns how long. */
uint64_t dt_moving_pack(const uint8_t *page, const uint8_t *before, uint64_t page_bytes, uint8_t *out);
/* The other way, over a page that is the one before. Returns how many bytes of `packed` it took; 0 where it is malformed. */
uint64_t dt_moving_unpack(const uint8_t *packed, uint64_t length, uint8_t *page, uint64_t page_bytes);
/* The pages of data of these stretches into `out`, from what was packed and what is in memory. DT_MALFORMED as below. */
int dt_moving_open(const dt_moving *m, const dt_stretch *stretches, uint64_t n, const uint8_t *packed, uint64_t length,
                   uint8_t *out, uint64_t nbytes, dt_failure *why);
/* What comes into its place, by the socket: where each stretch of data lies, 0 for one of zeroes. What comes there is in no
 * table until dt_moving_put() has looked at it. DT_TOO_SMALL, and nothing is done, where a page is not wholly the
 * memory's, or the memory may vanish: then it must come through a buffer. DT_MALFORMED as below. */
int dt_moving_expect(const dt_moving *m, const dt_stretch *stretches, uint64_t n, uint64_t *places, dt_failure *why);
/* Writes what the other side took. DT_MALFORMED, and nothing is written, where the stretches are none, do not fit, or a
 * page is not what its digest says: why->start is which page, counted in the order of the stretches. `data` is NULL
 * where it is in its place already, as dt_moving_expect() said; then what is not what its digest says stays in no table. */
int dt_moving_put(const dt_moving *m, const dt_stretch *stretches, uint64_t n, const uint64_t *digests,
                  const uint8_t *data, uint64_t nbytes, dt_failure *why);
/* Digests of pages as they are in memory: into the table, or compared with it where check = 1. *at: the first that differs,
 * or the number behind the last. */
int dt_moving_digest(const dt_moving *m, uint64_t first, uint64_t count, int check, uint64_t *at, dt_failure *why);
/* Looks at one in `every` of the set's pages: at how many, and how many of them the table has otherwise. */
int dt_moving_differing(const dt_moving *m, const dt_set *set, uint64_t every, uint64_t *looked, uint64_t *differing,
                        dt_failure *why);
void dt_page_digest(const uint8_t *page, uint64_t page_bytes, const uint8_t *key, uint64_t *out); /* two numbers */

/* A connected socket. */
typedef struct dt_link {
    int32_t fd;
    int32_t timeout_ms;      /* without any progress; -1: as long as it takes */
} dt_link;

/* Who writes memory that comes, and whether anybody still may. Several threads may use one. */
typedef struct dt_gate {
    int32_t shut, inside;
    uint64_t received_bytes; /* so far, by all of them */
} dt_gate;

/* 1, and from then on until dt_gate_leave() it counts as inside; 0 where the gate is shut. */
int dt_gate_enter(dt_gate *gate);
void dt_gate_leave(dt_gate *gate);
/* From now on nobody enters. Returns how many are inside. */
int dt_gate_shut(dt_gate *gate);

/* Takes the set's pages in [from, to) and sends them, in frames of at most so many pages. `body`: 32 bytes for each of
 * them, `data`: a page for each. `sent_bytes`, and the numbers in `moved`, grow with each frame. Step DT_STEP_SOCKET: the
 * errno of sendmsg(), or ETIMEDOUT. On a failure the table may have pages that nobody has. */
int dt_moving_send(const dt_moving *m, const dt_set *set, uint64_t from, uint64_t to, const dt_link *link, uint32_t region,
                   uint64_t round, uint64_t frame_pages, uint8_t *body, uint8_t *data, uint64_t *sent_bytes, dt_moved *moved,
                   dt_failure *why);
/* Puts what such frames bring, until one comes that is another, is not sound, or comes when the gate is shut: its header is
 * in `first` then (32 bytes), and of its body the first `body_bytes` are in `body`. `body` and `data` have room for 1 MiB.
 * Step DT_STEP_SOCKET: the errno of recv(), ENODATA where it was closed. DT_MALFORMED as dt_moving_put(). */
int dt_moving_receive(const dt_moving *const *memories, uint64_t n, const dt_link *link, uint8_t *body, uint8_t *data,
                      uint8_t *first, uint64_t *body_bytes, dt_gate *gate, dt_failure *why);

/* A part of what a set has of one of several memories: `count` spans, from the `first` of all on. */
typedef struct dt_cut {
    uint64_t memory; /* its index */
    uint64_t first, count;
    uint64_t nbytes; /* of the spans together */
} dt_cut;

/* Cuts what the set has of each memory's own bytes into parts of at most `most_nbytes` > 0, memory by memory; memories may
 * overlap and be in any order. Writes at most as much as there is room for. `total`: how many cuts there are (as
 * `memory`), how many spans, how many bytes. */
void dt_set_cut(const dt_set *set, const dt_extent *memories, uint64_t n, uint64_t most_nbytes, dt_span *spans,
                uint64_t span_room, dt_cut *cuts, uint64_t cut_room, dt_cut *total);

/* ---- mappings and raw scans ---------------------------------------------------------------------------------- */

typedef struct dt_mapping {
    uint64_t start, end;
    uint64_t offset, inode;
    uint32_t device_major, device_minor;
    uint32_t readable, writable, executable, shared;
    uint64_t page_bytes;   /* the kernel's page size for it, 0 where the kernel does not say */
    char name[256];        /* path or [heap] and the like; cut at 255 bytes */
} dt_mapping;

/* The first mapping of this process that ends after `address`; -ENOENT where there is none, -ENODEV without a /proc.
 * page_bytes is 0 only where neither the query nor /proc/self/smaps can be had. */
int dt_mapping_at(uint64_t address, dt_mapping *out);

typedef struct dt_page_region {
    uint64_t start, end, categories;
} dt_page_region;

typedef struct dt_scan_request {
    uint64_t start, end;
    uint64_t category_mask, category_inverted, category_anyof_mask, return_mask;
    uint64_t flags;       /* PM_SCAN_* */
    uint64_t max_pages;   /* 0: no limit */
} dt_scan_request;

typedef struct dt_scan_result {
    dt_page_region *regions; /* sorted, disjoint; freed by dt_scan_result_clear */
    uint64_t count;
    uint64_t walk_end;       /* where the walk really got */
    dt_failure why;
} dt_scan_result;

/* PAGEMAP_SCAN in the kernel's own words on any pagemap descriptor, resumed until it is done. Where an arming scan
 * fails midway, what it had found is in `out` beside the error. */
int dt_pagemap_scan(int pagemap_fd, const dt_scan_request *request, dt_scan_result *out);
void dt_scan_result_clear(dt_scan_result *result);

/* ---- sessions ----------------------------------------------------------------------------------------------- */

enum dt_remedy {
    DT_REMEDY_PROBE = 0,     /* what dt_probe and the kind of memory make necessary */
    DT_REMEDY_ABSENT = 1,    /* R1 everywhere: pages neither present nor swapped count as written, by a pass of its own */
    DT_REMEDY_NO_ABSENT = 2, /* for tests: never R1, though the kernel or the kind of memory needs it */
    DT_REMEDY_NO_LOST = 4,   /* for tests: never R2, though the kind of memory needs it */
    DT_REMEDY_NO_ALIAS = 8,  /* for tests: other mappings of the same memory are left alone */
    DT_REMEDY_NONE = 14,
    DT_REMEDY_EAGER = 32,    /* for tests: blocks are of 8 pages; of two, one is assumed as soon as 2 of them
                                were written, and the other by single pages, which were found twice */
    DT_REMEDY_UNTOLD = 64,   /* for tests: what is assumed is told to nobody */
    DT_REMEDY_FROM_RIGHT = 16 /* for tests: unregister as kernels up to Linux 6.16 need it */
};

enum dt_arming {
    DT_ARM_AUTO = 0,    /* chosen from the range: DT_ARM_PRESENT where it is large, private, anonymous and mostly empty */
    DT_ARM_ALL = 1,     /* every page, unpopulated ones too */
    DT_ARM_PRESENT = 2, /* what is populated; what is not has no page table to arm. Private anonymous memory only */
    DT_PINNED = 16      /* or-ed to one of these: it can neither vanish nor be protected from reading while registered */
};

/* Who says what was written. */
enum dt_backend {
    DT_BACKEND_KERNEL = 0, /* userfaultfd and PAGEMAP_SCAN */
    DT_BACKEND_COPY = 1,   /* what differs from a copy of the memory */
    DT_BACKEND_HASH = 2    /* what differs in a keyed 128-bit hash a page: a changed page goes unseen by a chance of 2^-64 */
};

/* What lies beneath a region; several bits where several mappings do. */
enum dt_kind {
    DT_KIND_ANONYMOUS = 1, /* private, without a file */
    DT_KIND_FILE = 2,      /* private, of a file or of a memfd */
    DT_KIND_SHARED = 4,    /* shared: anonymous, memfd, tmpfs, SysV or a file */
    DT_KIND_HUGETLB = 8,   /* huge pages of the pool, beside one of the above */
    DT_KIND_GIGANTIC = 16  /* some of them of another size than the usual one, which one entry of a PMD maps */
};

typedef struct dt_statistics {
    uint64_t collects;         /* collecting passes */
    uint64_t scans;            /* PAGEMAP_SCAN calls */
    uint64_t protects;         /* UFFDIO_WRITEPROTECT calls */
    uint64_t pages_found;      /* written pages that scans found and re-armed: each cost its writer one fault */
    uint64_t pages_absent;     /* pages that remedy R1 found */
    uint64_t pages_lost;       /* pages that remedy R2 found: discarded beneath a marker that survived */
    uint64_t pages_assumed;    /* pages told without having been watched */
    uint64_t faults_avoided;   /* pages of those that were written, by the samples */
    uint64_t overhead_ns;      /* of adaptive listeners, by what things cost here: faults, and copies of assumed pages */
    uint64_t predicted_ns;     /* that were not written; and the same as it was predicted a pass before */
    uint64_t pages_told;       /* pages that the kernel told of by an event (dt_session_open with events) */
    uint64_t pages_declared;   /* pages dirty by mark_dirty and in_flight */
    uint64_t mappings_renewed; /* replaced mappings that were registered again */
    uint64_t scans_refused;    /* EPERM: what was found was harvested all the same */
    uint64_t scans_faulted;    /* EFAULT: the range was taken as dirty */
    uint64_t pages_audited;
    uint64_t collect_ns;       /* inside collecting passes, nearly all of it in the kernel */
} dt_statistics;

/* events = 1: the kernel tells of discards, moves and unmaps too, to a thread that the session starts. Whoever discards
 * waits for that thread, some 20 microseconds a call. A backend that compares has neither remedies nor events. */
int dt_session_open(uint32_t remedy, int events, uint32_t backend, dt_session **out, dt_failure *why);
void dt_session_drop(dt_session **session);
uint64_t dt_generation(void);                          /* of this process: another after each fork; 0: no memory */
int dt_session_close(dt_session *session);             /* unregisters everything; the second call does nothing */
int dt_session_state(dt_session *session);             /* 0, DT_CLOSED or DT_FORKED (which closes what it inherited) */
int dt_session_fd(dt_session *session);                /* -1 when closed or suspended */
int dt_session_door(dt_session *session);
uint64_t dt_session_features(dt_session *session);
int dt_session_suspend(dt_session *session, dt_failure *why);
int dt_session_resume(dt_session *session, dt_failure *why);
int dt_session_statistics(dt_session *session, dt_statistics *out);
/* Descriptors of another process. A session that adopts them closes them with itself; where adopting fails they stay the
 * caller's. */
typedef struct dt_target {
    int32_t pid;
    int32_t pidfd;
    int32_t uffd;          /* of userfaultfd(2) in that process; UFFDIO_API is still to be called, or was (ready) */
    int32_t pagemap, maps; /* /proc/PID/pagemap and maps, of before it could replace itself by exec */
    int32_t ready;
} dt_target;

/* Whether two processes have one memory, as a child of vfork and its parent do until it replaced itself by exec: 1, 0, or
 * -errno where that cannot be told (kcmp(2)). */
int dt_shares_memory(int32_t pid, int32_t other);

/* A userfaultfd of this process, for another that will track it. */
int dt_open_userfaultfd(int32_t *out, dt_failure *why);

/* A session for the memory of another process: what it is told of addresses is about that process. */
int dt_session_adopt(const dt_target *target, uint32_t remedy, dt_session **out, dt_failure *why);
/* The mappings of the target, sorted, and from now on what dt_layout_changed compares with. At most `room` are written;
 * their number is returned, or -errno. It compares with nothing, and says 1, until all of them had room. */
int64_t dt_layout_read(dt_session *session, dt_mapping *out, uint64_t room);
/* The same, of a process without a session, by its /proc/PID/maps. */
int64_t dt_mappings_of(int32_t pid, int32_t maps, dt_mapping *out, uint64_t room);
/* 1: the target's writable mappings are others than at the last dt_layout_read; 0, or -errno. */
int dt_layout_changed(dt_session *session);

/* Reads the pages of a set from another process, packed in the order of their addresses, by few system calls. `out` has
 * room for all of them. mem: its /proc/PID/mem, or -1: by process_vm_readv, which takes the right to trace it. A page that cannot be read fails with -EFAULT and why->start; *done bytes before it are there. */
int dt_read_target(int32_t pid, int32_t mem, const dt_set *set, uint8_t *out, uint64_t room, uint64_t *done, dt_failure *why);

uint64_t dt_session_kept_bytes(dt_session *session);   /* copies or hashes, to compare with; 0 where the kernel tells */

typedef struct dt_region_info {
    uint64_t id;
    uint64_t start, end;     /* the page span: rounded outward to the pages of the mappings at either end */
    uint64_t granule_bytes;  /* the largest page in it */
    uint32_t kinds;          /* enum dt_kind, or-ed */
    uint32_t arming;         /* DT_ARM_ALL or DT_ARM_PRESENT */
    uint32_t aliases;        /* other mappings of the same memory that are armed with it */
    uint32_t unseen_aliases; /* and those, writable, that could not be registered: writes through them are not seen */
} dt_region_info;

/* Registers the pages around [address, address + nbytes). granule_bytes: what the caller knows to be resolved for this
 * memory, 0 or the page where it knows nothing; a huge page of the pool is found by itself. Arms nothing. */
int dt_register(dt_session *session, uint64_t address, uint64_t nbytes, uint64_t granule_bytes, uint32_t arming,
                dt_region **out, dt_failure *why);
/* Pages of [start, end) that MADV_GUARD_INSTALL took away; none on a kernel without it (it came with Linux 6.13). */
int dt_guard_pages(dt_session *session, uint64_t start, uint64_t end, uint64_t *out);
int dt_unregister(dt_region *region, dt_failure *why); /* -EBUSY while a listener watches it */
void dt_region_drop(dt_region **region);
void dt_region_about(dt_region *region, dt_region_info *out);
int dt_region_registered(dt_region *region);           /* 1 or 0 */
/* Collects for every listener of those pages and re-arms; first arms what was never armed. */
int dt_write_protect(dt_region *region, dt_failure *why);
/* [start, end) was written where no page table saw it: dirty for every listener. */
int dt_mark_dirty(dt_session *session, uint64_t start, uint64_t end);
/* begin = 1: [start, end) is dirty in every collect until the matching begin = 0, and once after. */
int dt_in_flight(dt_session *session, uint64_t start, uint64_t end, int begin);

/* ---- listeners ---------------------------------------------------------------------------------------------- */

int dt_listener_new(dt_session *session, dt_listener **out);
void dt_listener_drop(dt_listener **listener);
int dt_start(dt_listener *listener, dt_region *const *regions, uint64_t n, dt_failure *why);
int dt_add(dt_listener *listener, dt_region *region, dt_failure *why);   /* wholly dirty in the next collect */
int dt_remove(dt_listener *listener, dt_region *region, dt_set *final_set);
int dt_stop(dt_listener *listener, dt_set *final_set);
/* Before dt_start. adaptive: blocks that are densely rewritten may be left unarmed, and are told whole, and single pages
 * that are, and are told; exact: nothing that it watches may be, whoever wants it. page_ns: what a page that is told costs this listener; 0: a copy of it. */
int dt_listener_wish(dt_listener *listener, int adaptive, int exact, uint64_t page_ns);
/* Collects `region`, or all of the listener's regions where it is NULL. budget_seconds < 0: no budget. */
int dt_collect(dt_listener *listener, dt_region *region, double budget_seconds, dt_set *out);
/* The same, then copies the dirty bytes to the extents' mirrors, in this order, in one call. */
int dt_collect_into(dt_listener *listener, dt_region *region, const dt_extent *extents, uint64_t n, dt_set *out);
int dt_peek(dt_listener *listener, dt_region *region, dt_set *out);
/* Delivers a set from dt_remove or dt_stop, and lets go of the regions now rather than when the set is cleared. */
int dt_settle(dt_set *set);
int dt_put_back(dt_listener *listener, const dt_set *set);
uint64_t dt_epoch(dt_listener *listener);              /* the open epoch, 0 when not running */
/* The ids of the regions that it watches, at most room of them, in the order of their addresses; returns how many there
 * are, or DT_CLOSED or DT_FORKED. */
int64_t dt_watched(dt_listener *listener, uint64_t *ids, uint64_t room);
int dt_audit(dt_listener *listener, double fraction);  /* of the clean pages, 0 turns it off; before dt_start */
int dt_listener_statistics(dt_listener *listener, dt_statistics *out);

/* ---- the guardian: run in a process of its own -------------------------------------------------------------- */

typedef struct dt_guard_wish {
    int32_t pid;
    int32_t pidfd;            /* of that process, which a number alone may not mean any more */
    int32_t channel;          /* a socket, for the answer: dt_guard_answer, with the descriptor beside it */
    uint32_t freeze;          /* 1: stop all threads, answer, go on when the channel closes or something comes by it */
    uint32_t timeout_ms;
    uint32_t suspend_seccomp; /* 1: the target's filters do not see the injected calls; takes CAP_SYS_ADMIN */
    uint32_t fault_step;      /* for tests: after so many steps somebody is killed */
    uint32_t fault_tracker;   /* 1: the guardian's parent; 0: the guardian */
    uint32_t registers;       /* 1, with freeze: those of all threads come with the answer, in a memory file */
} dt_guard_wish;

/* A thread that stands still, in that file: then its register sets, as many bytes as it says, and zeros up to a multiple
 * of 8 bytes. The process's first thread comes first. */
typedef struct dt_thread_state {
    int32_t tid;
    uint32_t prstatus_bytes;  /* NT_PRSTATUS */
    uint32_t fpregset_bytes;  /* NT_PRFPREG; 0: it has none */
    uint32_t xstate_bytes;    /* NT_X86_XSTATE; 0: it has none */
    uint64_t signal_mask;
    char name[16];
} dt_thread_state;

enum dt_guard_step {
    DT_GUARD_OPEN = 0,        /* nothing yet */
    DT_GUARD_GADGET = 1,      /* looking for a system call instruction in the target's text */
    DT_GUARD_STOP = 2,        /* PTRACE_SEIZE, and waiting for a stop */
    DT_GUARD_CALL = 3,        /* changing registers, running the injected call */
    DT_GUARD_USERFAULTFD = 4, /* what that call answered */
    DT_GUARD_TAKE = 5,        /* pidfd_getfd */
    DT_GUARD_REGISTERS = 6    /* reading those of all threads */
};

typedef struct dt_guard_answer {
    int32_t code;             /* 0 or -errno */
    int32_t step;             /* enum dt_guard_step */
    uint64_t stall_ns;        /* from the first stop to the last letting go */
    uint32_t threads;
    uint32_t reserved;
    uint64_t steps;           /* how many there were */
} dt_guard_answer;

/* Does it all, and answers. Blocks all signals of its process. 0, or 1 where it failed. */
int dt_guard_run(const dt_guard_wish *wish);

/* ---- failures on purpose, for tests -------------------------------------------------------------------------- */

enum dt_site {
    DT_SITE_ALLOCATE = 1, DT_SITE_SCAN = 2, DT_SITE_REGISTER = 4, DT_SITE_UNREGISTER = 8, DT_SITE_PROTECT = 16,
    DT_SITE_API = 32, DT_SITE_OPEN_USER_MODE = 64, DT_SITE_OPEN_DEVICE = 128, DT_SITE_OPEN_FULL = 256,
    DT_SITE_OPEN_PAGEMAP = 512, DT_SITE_COPY = 1024, DT_SITE_MAPS = 2048, DT_SITE_EVENTS = 4096
};

/* The nth call (from 1) at any of `sites`, and the `times` - 1 calls after it (0: all of them), fail with os_errno;
 * after = 1: the call is made, then reported as failed. sites = 0 turns it off. Returns how many calls the sites saw
 * since the last dt_fail. after = 2: the process is killed before that call. Process-wide, not for concurrent use. */
uint64_t dt_fail(uint32_t sites, uint64_t nth, uint64_t times, int os_errno, int after);

/* What tracking costs: ns a page, but for `call`, a scan of its own that finds and arms one page. look: at one that was not
 * written. fault = 0: not measured, or it cannot be. */
typedef struct dt_costs {
    uint64_t fault, arm, call, look, copy, copy_apart, compare;
} dt_costs;

/* Exchange those that were measured for others, by which it is then weighed what to leave unarmed: tests of what is decided
 * are not to depend on the machine. With fault = 0 they are measured again when they are next wanted. Process-wide, not
 * for concurrent use. */
void dt_costs_exchange(dt_costs *costs);

#endif
