/* SPDX-License-Identifier: MIT
 * What the heap's files know of each other, and how an object lies in memory. */
#ifndef EXAMPLES_HEAP_INTERNAL_H
#define EXAMPLES_HEAP_INTERNAL_H
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "heap.h"

/* ---- objects -----------------------------------------------------------------------------------------------------
 * A header of one word, then the contents; all of it padded to a multiple of 16 bytes. The header is odd: bit 0 set, 3
 * bits of kind, 4 of age, 8 of tag, 48 of length. Where the object moved, the word is its new address: it is even. */

#define UNIT 16
#define NIL ((heap_word)0)
#define TRUE ((heap_word)2)
#define FALSE ((heap_word)6)
#define OLDEST 15

static inline heap_word load(const heap_word *slot) { return __atomic_load_n(slot, __ATOMIC_RELAXED); }
static inline void store(heap_word *slot, heap_word word) { __atomic_store_n(slot, word, __ATOMIC_RELAXED); }

static inline bool is_object(heap_word word) { return word && !(word & (UNIT - 1)); }
static inline bool is_number(heap_word word) { return word & 1; }
static inline heap_word number(int64_t value) { return (heap_word)value << 1 | 1; }
static inline int64_t value_of(heap_word word) { return (int64_t)word >> 1; }

static inline heap_word header(uint32_t kind, uint32_t tag, uint64_t length)
{
    return length << 16 | (uint64_t)tag << 8 | kind << 1 | 1;
}
static inline heap_word *words(heap_word object) { return (heap_word *)object; }
static inline heap_word header_of(heap_word object) { return load(words(object)); }
static inline bool moved(heap_word head) { return !(head & 1); }
static inline uint32_t kind_of(heap_word head) { return head >> 1 & 7; }
static inline uint32_t age_of(heap_word head) { return head >> 4 & 15; }
static inline uint32_t tag_of(heap_word head) { return head >> 8 & 255; }
static inline uint64_t length_of(heap_word head) { return head >> 16; }
static inline heap_word older(heap_word head) { return age_of(head) < OLDEST ? head + (1 << 4) : head; }
static inline heap_word *slot(heap_word object, uint64_t index) { return words(object) + 1 + index; }
static inline uint64_t contents_bytes(heap_word head)
{
    uint32_t kind = kind_of(head);
    return kind == HEAP_TUPLE || kind == HEAP_ARRAY ? length_of(head) * 8 : length_of(head);
}
static inline uint64_t round_up(uint64_t nbytes, uint64_t unit) { return (nbytes + unit - 1) & ~(unit - 1); }
static inline uint64_t object_bytes(heap_word head) { return round_up(8 + contents_bytes(head), UNIT); }

/* ---- the heap ---------------------------------------------------------------------------------------------------- */

#define BLOCK_BYTES 16384 /* of the old generation: cells of one size, or part of a run for one large object */
#define BLOCK_UNITS (BLOCK_BYTES / UNIT)
#define SMALL_BYTES 8192  /* no object that is born young is larger */
#define CLASSES 29
#define NONE UINT32_MAX
#define STACK_WORDS (1 << 20)

enum block_state { BLOCK_FREE, BLOCK_CELLS, BLOCK_RUN, BLOCK_RUN_REST };

typedef struct block {
    uint8_t state, cell_class, touched; /* touched: written since it was last given back to the system */
    uint32_t run;                       /* blocks of a run; in the rest of one, how far back it begins */
    uint32_t next;                      /* block of this class with free cells */
} block;

typedef struct space {
    uint8_t *start, *top, *end;
} space;

typedef struct stack {
    heap_word *items;
    uint64_t count, room;
} stack;

struct heap_mutator {
    heap *heap;
    heap_mutator *next;
    uint8_t *lab, *lab_end;  /* what is left of the part of eden that is this thread's own */
    heap_word *stack, *top;  /* roots, of the evaluator */
    uint32_t depth;          /* of heap_enter */
    uint32_t running;        /* between enter and leave, and not waiting */
};

struct heap {
    heap_plan plan;
    space eden, from, to;         /* `to` is empty between collections */
    pthread_mutex_t lock;         /* of the list of mutators, of eden's top, of large objects */
    pthread_cond_t changed;       /* somebody parked, or the world goes on */
    uint32_t stopping;
    pthread_t stopper;
    heap_mutator *mutators;
    heap_word *handles;
    uint32_t handles_top;
    /* the old generation */
    block *blocks;
    uint32_t block_count;         /* in use; the reservation may have more */
    uint32_t free_blocks, free_hint;
    uint32_t partial[CLASSES];    /* blocks with free cells, and how far the first one was searched */
    uint32_t cursor[CLASSES];
    uint64_t old_bytes;
    uint64_t *marks, *young_marks; /* a bit a unit */
    uint64_t *young_starts, *young_seen; /* for heap_verify */
    bool mark_young;
    stack to_mark, promoted, to_check;
    heap_numbers numbers;
};

static inline bool in_young(const heap *heap, heap_word word)
{
    return word - (uint64_t)heap->plan.young < heap->plan.eden_bytes + 2 * heap->plan.survivor_bytes;
}
static inline bool in_old(const heap *heap, heap_word word)
{
    return word - (uint64_t)heap->plan.old < (uint64_t)heap->block_count * BLOCK_BYTES;
}
static inline uint64_t old_unit(const heap *heap, heap_word word) { return (word - (uint64_t)heap->plan.old) / UNIT; }
static inline uint64_t young_unit(const heap *heap, heap_word word)
{
    return (word - (uint64_t)heap->plan.young) / UNIT;
}
static inline uint64_t young_bits_bytes(const heap *heap)
{
    return round_up((heap->plan.eden_bytes + 2 * heap->plan.survivor_bytes) / UNIT, 64) / 8;
}
static inline bool bit_of(const uint64_t *bits, uint64_t i) { return load(bits + i / 64) >> (i & 63) & 1; }
static inline void set_bit(uint64_t *bits, uint64_t i)
{
    store(bits + i / 64, load(bits + i / 64) | UINT64_C(1) << (i & 63));
}
/* Whether an object of the old generation begins there. */
static inline bool is_old_object(const heap *heap, heap_word word)
{
    return is_object(word) && in_old(heap, word) && bit_of(heap->plan.starts, old_unit(heap, word));
}

void push(stack *stack, heap_word word); /* memory.c */
void *reserve(uint64_t nbytes);
void unreserve(void *memory, uint64_t nbytes);
void keep(heap *heap, uint32_t handle, heap_word word); /* in a handle */
heap_word allocate(heap_mutator *mutator, uint32_t kind, uint32_t tag, uint64_t length); /* 0: collect() failed */

int old_open(heap *heap); /* old.c */
void old_close(heap *heap);
uint8_t *old_allocate(heap *heap, uint64_t nbytes); /* NULL: no room. The world is stopped, or heap->lock held */
heap_word old_object_of(heap *heap, uint64_t address); /* that has its contents there, or 0 */

#endif
