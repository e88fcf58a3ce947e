/* SPDX-License-Identifier: MIT
 * What the files of deltas share: blocks, masks of changed granules, and the reader of an encoding.
 *
 * The memory is cut into blocks of 4096 bytes that begin where its pages begin, or less than a granule before, and each
 * block into granules, which begin at multiples of their size from the memory's first byte. A mask has a bit a granule
 * of one block. The format stands in docs/delta-format.md. */
#ifndef DIRTYTRACK_DELTA_H
#define DIRTYTRACK_DELTA_H
#include "internal.h"

#define DELTA_BLOCK 4096u
#define DELTA_WORDS (DELTA_BLOCK / 64) /* of a mask: granules of one byte */
#define DELTA_HEADER 24u
#define DELTA_MOST_SHIFT 12u
#define DELTA_PAD 64u /* small runs are copied in fixed lengths, that far beyond the end of their buffers */

/* How a block's mask is written; the low three bits of the number that opens a block. */
enum dt_delta_mode {
    DELTA_FULL = 0,
    DELTA_RUNS = 1,
    DELTA_BITMAP = 2,
    DELTA_ONES = 3,
    DELTA_ZEROS = 4,
    DELTA_STREAK = 5 /* many blocks that changed as a whole: their bytes in one piece, behind it which blocks they are */
};
#define DELTA_STREAK_HEAD 5u /* bytes: how many blocks, how much padding */
#define DELTA_MOST_PADDING 63u

typedef struct dt_delta_grid {
    uint64_t target; /* bytes of the memory */
    uint32_t phase;  /* the first block is that much shorter; a multiple of the granule */
    uint32_t shift;  /* log2 of the granule */
} dt_delta_grid;

static inline uint64_t dt_delta_block_of(const dt_delta_grid *g, uint64_t offset)
{
    return (offset + g->phase) / DELTA_BLOCK;
}
static inline uint64_t dt_delta_block_start(const dt_delta_grid *g, uint64_t block)
{
    return block ? block * DELTA_BLOCK - g->phase : 0;
}
static inline uint64_t dt_delta_block_end(const dt_delta_grid *g, uint64_t block)
{
    return dt_min((block + 1) * DELTA_BLOCK - g->phase, g->target);
}
static inline uint32_t dt_delta_granules(const dt_delta_grid *g, uint64_t bytes)
{
    return (uint32_t)((bytes + ((uint64_t)1 << g->shift) - 1) >> g->shift);
}

/* ---- masks (delta_mask.c) ---- */

/* A part of a block, or all of it, that is compared. */
typedef struct dt_delta_part {
    const uint8_t *now, *mirror;
    const uint8_t *next_now, *next_mirror; /* what will be compared next, which is fetched meanwhile; or these again */
    uint8_t *to;     /* where its bytes are copied to; as long */
    uint8_t *update; /* NULL, or the mirror again, which gets them too. What did not differ stays as it is */
    bool past;       /* past the caches where that can be; then `to` is aligned to 64 bytes */
} dt_delta_part;

enum dt_delta_change { DELTA_SAME, DELTA_SOME, DELTA_ALL };

/* Sets the bits of the granules that differ and copies `bytes` of part.now, each read once; tells how many of them do.
 * Bits from there on up to the next word are zero. `mask` has DELTA_WORDS words. */
enum dt_delta_change dt_delta_snapshot(const dt_delta_part *part, uint32_t bytes, unsigned shift, uint64_t *mask);
extern uint64_t dt_delta_stream_bytes; /* from how much on it is worth it; tests change it */
void dt_delta_stream_end(void);        /* what went past the caches is seen after this */
extern uint64_t dt_delta_halves_bytes; /* from how much on halves are encoded side by side; tests change it */
/* The ways to do that, the best first: which of them this processor has, and which one is used (-1: the best). */
unsigned dt_delta_ways(void);
int dt_delta_way_works(unsigned way);
void dt_delta_use_way(int way);

void dt_delta_mask_set(uint64_t *mask, uint32_t from, uint32_t to);
/* The first run of set bits at or after *to, as [*from, *to); false: there is none below n. */
static inline bool dt_delta_mask_run(const uint64_t *mask, uint32_t n, uint32_t *from, uint32_t *to)
{
    uint32_t at = *to;
    if (at >= n)
        return false;
    uint32_t word = at / 64, last = (n - 1) / 64;
    uint64_t bits = mask[word] & ~UINT64_C(0) << (at & 63);
    while (!bits) {
        if (word == last)
            return false;
        bits = mask[++word];
    }
    *from = word * 64 + (uint32_t)__builtin_ctzll(bits);
    bits = ~mask[word] & ~UINT64_C(0) << (*from & 63);
    while (!bits) {
        if (word == last) {
            *to = n;
            return true;
        }
        bits = ~mask[++word];
    }
    *to = (uint32_t)dt_min(word * 64 + (uint32_t)__builtin_ctzll(bits), n);
    return true;
}

/* ---- the encoding (delta_code.c) ---- */

/* Where it ends, or NULL: cut short, or more than 64 bits, or longer than it need be. */
const uint8_t *dt_delta_get_number(const uint8_t *at, const uint8_t *end, uint64_t *out);
uint8_t *dt_delta_put_number(uint8_t *at, uint64_t n); /* these return the end */
uint8_t *dt_delta_put_opening(uint8_t *out, uint64_t gap, enum dt_delta_mode mode);
void dt_delta_put_header(uint8_t *out, const dt_delta_grid *g);
/* Writes the block that lies `gap` blocks after the last one: its mask of n granules, at least one of them set, and
 * their bytes out of `copy`, which has DELTA_PAD bytes more than the block. Returns the end; writes up to DELTA_PAD
 * beyond. */
uint8_t *dt_delta_put_block(uint8_t *out, uint64_t gap, const uint64_t *mask, uint32_t n, const uint8_t *copy,
                         uint32_t bytes, unsigned shift);

typedef struct dt_delta_block {
    uint64_t start;     /* where it begins in the memory */
    uint32_t bytes;
    uint32_t granules;
    uint32_t changed_bytes;
    const uint8_t *data; /* that many */
    uint64_t mask[DELTA_WORDS];
} dt_delta_block;

typedef struct dt_delta_reader {
    dt_delta_grid grid;
    const uint8_t *begin, *at, *end;
    uint64_t next;      /* the first block that may come */
    uint64_t blocks;    /* of the memory */
    uint64_t streak;    /* blocks of a streak that are still to come, of these `run` before the next gap; */
    uint64_t run;
    const uint8_t *data, *list; /* their bytes, and what says which blocks they are */
} dt_delta_reader;

/* 0, or DT_MALFORMED with the position in `why`. Trusts nothing. */
int dt_delta_open(dt_delta_reader *r, const uint8_t *delta, uint64_t length, dt_failure *why);
/* 1 and the next block, 0 at the end, or DT_MALFORMED. Nothing that it returns lies outside the memory or the delta. */
int dt_delta_next(dt_delta_reader *r, dt_delta_block *b, dt_failure *why);
#endif
