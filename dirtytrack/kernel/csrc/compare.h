/* SPDX-License-Identifier: MIT
 * What a session that compares keeps of memory, and how it reads it: shared by compare.c and plate.c. */
#ifndef DIRTYTRACK_COMPARE_H
#define DIRTYTRACK_COMPARE_H
#include "engine.h"
#include "digest.h"

#define DT_BOUNCE_BYTES ((uint64_t)64 << 10) /* stays in the second-level cache between the copy and the comparison */
#define DT_ENTRIES 512u                      /* of the page map, asked for at once */

enum dt_known {
    DT_KNOWN,
    DT_EMPTY,   /* never populated when last looked: zeroes, which nobody has read into being */
    DT_UNKNOWN, /* could not be read, or not yet: returned by each scan that finds it mapped, until it can be */
};

typedef struct dt_plate {
    uint64_t start, end;
    uint8_t *copy;       /* DT_BACKEND_COPY; mapped, not inherited by children */
    dt_digest *digests;  /* DT_BACKEND_HASH */
    uint8_t *states;     /* enum dt_known */
    bool pinned;         /* it can be read directly: all regions in it are pinned */
} dt_plate;

struct dt_compare {
    uint32_t backend;
    dt_plate *plates;    /* sorted, disjoint */
    uint64_t count, room;
    uint8_t *bounce;
    dt_same same;
    dt_digester digest;
    dt_digest zero;      /* of a page of zeroes */
    uint8_t *key;
};

/* What it reads, and where that is. */
typedef struct dt_reader {
    const dt_compare *c;
    uint64_t start, end;   /* what the bounce buffer holds */
    uint64_t gone;         /* a page that cannot be read, or UINT64_MAX */
    int pagemap;           /* -1: not opened yet, -2: not to be had */
    int anonymous;         /* 1 or 0: all of the span is private and without a file; -1: not looked at yet */
    uint64_t entries_start, entries_end; /* of what stretch the entries are */
    uint64_t entries[DT_ENTRIES];
} dt_reader;

/* The index of the first plate that ends after `address`. */
uint64_t dt_plate_after(const dt_compare *c, uint64_t address);
/* So that each page of [start, end) is in a plate. 0 or -ENOMEM. */
int dt_plates_cover(dt_session *s, uint64_t start, uint64_t end);

void dt_read_begin(dt_reader *r, const dt_compare *c);
void dt_read_end(const dt_reader *r);
/* The page's bytes, NULL where it cannot be read. `end` is how far reading ahead makes sense. 0 or -errno. */
int dt_read_page(dt_reader *r, const dt_plate *p, uint64_t at, uint64_t end, const uint8_t **now);
/* Whether the page was never populated. [start, end) is what is looked at; `sure`: all of it is what it was. */
bool dt_read_empty(dt_reader *r, uint64_t at, uint64_t start, uint64_t end, bool sure);
#endif
