/* SPDX-License-Identifier: MIT
 * A generational heap, as Python sees it: cffi reads this file without its lines that begin with #.
 *
 * Objects are born in eden. A minor collection copies those that live into a survivor space, or, when they are old
 * enough, into the old generation, where nothing moves any more: it is marked and swept, by bits that lie beside it. No
 * store tells anybody anything. Who finds the old slots that point to young objects, and the old objects that changed
 * while they were marked, is dirtytrack.gc; who decides when to collect is Python.
 *
 * Addresses of objects are good until the next safepoint only. What must survive one is held in a handle, or on a
 * mutator's stack. A function that returns int returns HEAP_OK or what else heap_outcome has. */
#ifndef EXAMPLES_HEAP_H
#define EXAMPLES_HEAP_H
#include <stdint.h>

/* 0 is nil; an odd word is the number word >> 1; 2 and 6 are true and false; all else is the address of an object,
 * a multiple of 16. */
typedef uint64_t heap_word;
typedef struct heap heap;
typedef struct heap_mutator heap_mutator; /* a thread that uses the heap */

enum heap_kind { HEAP_FILLER, HEAP_TUPLE, HEAP_BYTES, HEAP_ARRAY }; /* words; bytes; numbers of 64 bits */
enum heap_outcome { HEAP_OK, HEAP_REFUSED, HEAP_BUSY, HEAP_WRONG_KIND, HEAP_WRONG_INDEX, HEAP_CORRUPT };
enum heap_reason { HEAP_EDEN_FULL, HEAP_OLD_FULL, HEAP_STRESS };

typedef struct heap_plan {
    uint8_t *young;             /* eden, then two survivor spaces */
    uint64_t eden_bytes;
    uint64_t survivor_bytes;    /* of each */
    uint8_t *old;               /* reserved for the old generation, which uses as much of it as heap_extend says */
    uint64_t old_bytes;
    uint64_t *starts, *summary; /* the two parts of the CrossingMap of the reservation, in units of 16 bytes */
    uint32_t promote_age;       /* how many minor collections an object survives in the young generation */
    uint32_t stress;            /* 1: a minor collection before each allocation */
    uint32_t poison;            /* 1: memory of young objects that are gone is overwritten */
    /* Collect, called with no lock held and the thread parked; not 0: it failed, and so does the allocation. */
    int (*collect)(uint32_t reason, uint64_t nbytes);
} heap_plan;

heap *heap_open(const heap_plan *plan);
void heap_close(heap *heap);
uint64_t heap_handles(void); /* how many handles there are */

/* ---- mutators and safepoints ------------------------------------------------------------------------------------- */

heap_mutator *heap_attach(heap *heap);
void heap_detach(heap_mutator *mutator); /* the world being stopped, by the caller */
/* Between enter and leave no object moves, but where this thread itself allocates or calls heap_safepoint. They nest.
 * HEAP_BUSY: the world was stopped by this very thread. */
int heap_enter(heap_mutator *mutator);
void heap_leave(heap_mutator *mutator);
uint32_t heap_depth(heap_mutator *mutator);
void heap_leave_to(heap_mutator *mutator, uint32_t depth); /* as often as it takes */
void heap_safepoint(heap_mutator *mutator);
/* Waits until no thread is between enter and leave, and lets none in before heap_resume. The caller is in neither. */
void heap_stop(heap *heap);
void heap_resume(heap *heap);

/* ---- objects, by handle ------------------------------------------------------------------------------------------ */

/* A new object of zeroes. */
int heap_new(heap_mutator *mutator, uint32_t kind, uint32_t tag, uint64_t length, uint32_t out);
/* The word, and what kind the object is; if the word is the address of another, that is put into `out`. */
int heap_get(heap_mutator *mutator, uint32_t object, uint64_t index, uint32_t out, heap_word *word, uint32_t *kind);
/* A word that is no address, into a tuple; a number, into a tuple or an array, as those hold numbers; an object. */
int heap_set(heap_mutator *mutator, uint32_t object, uint64_t index, heap_word word);
int heap_set_number(heap_mutator *mutator, uint32_t object, uint64_t index, int64_t value);
int heap_set_object(heap_mutator *mutator, uint32_t object, uint64_t index, uint32_t value);
/* memmove of slots, from one object to another of its kind or the same. */
int heap_copy(heap_mutator *mutator, uint32_t from, uint64_t at, uint32_t to, uint64_t index, uint64_t count);
int heap_same(heap_mutator *mutator, uint32_t one, uint32_t other, uint32_t *same);
int heap_kind_of(heap_mutator *mutator, uint32_t object, uint32_t *kind, uint32_t *tag, uint64_t *length);
/* Where its contents are: between enter and leave. */
int heap_contents(heap_mutator *mutator, uint32_t object, uint8_t **contents, uint64_t *nbytes);
/* The handle holds nothing any more: by a mutator; or by whoever stopped the world. */
int heap_forget(heap_mutator *mutator, uint32_t object);
void heap_drop(heap *heap, uint32_t handle);

/* ---- collections, the world being stopped unless something else is said ------------------------------------------ */

typedef struct heap_numbers {
    uint64_t young_bytes;  /* eden and survivors, as allocated */
    uint64_t old_bytes;    /* cells and runs of blocks in use */
    uint64_t block_bytes;
    uint64_t blocks, free_blocks;
    uint64_t promoted_bytes, survived_bytes, freed_bytes; /* since heap_open */
    uint64_t redirected;   /* old slots that a minor collection wrote, since heap_open */
} heap_numbers;

void heap_count(heap *heap, heap_numbers *out);
/* Use the first nbytes of the reservation; fewer than before only if they hold no object. */
int heap_extend(heap *heap, uint64_t nbytes);
/* Whether there is room for a large object; with 0, whether a minor collection is sure to find what it may need. */
int heap_has_room(heap *heap, uint64_t nbytes);
/* Copies what lives out of eden and the survivor space. `slots` are addresses of words of the old generation that may
 * point there, from RememberedSet.minor; those that are in no tuple are passed over. */
void heap_minor(heap *heap, const uint64_t *slots, uint64_t count);

/* Marking. Between two stops it may go on beside mutators, but not beside a minor collection; the young generation is
 * then left out, whose objects move. */
void heap_mark_begin(heap *heap);
void heap_mark_roots(heap *heap, uint32_t young_too);
/* Reads those of these objects again that are marked. */
void heap_mark_again(heap *heap, const uint64_t *starts, uint64_t count);
/* Marks until nothing is left, which returns 1, or about so many words were read. */
int heap_mark_more(heap *heap, uint64_t budget_words);
/* Frees the old objects that are not marked; marking ends. */
void heap_sweep(heap *heap);

/* Runs [start, end) of whole units, counted from the reservation's start, that hold nothing and were used since they
 * were last told. */
uint64_t heap_free_units(heap *heap, uint64_t unit_bytes, uint64_t *out, uint64_t room);

typedef struct heap_fault {
    uint64_t holder; /* the address of the object, or 0: a root */
    uint64_t slot;
    uint64_t value;
} heap_fault;

/* Looks at every reference there is. HEAP_CORRUPT and the first that leads to no object. */
int heap_verify(heap *heap, heap_fault *fault);

typedef struct heap_object {
    uint64_t address;
    uint32_t kind, tag;
    uint64_t length;
    heap_word first; /* its first word, if it has one */
} heap_object;

/* All objects, those of the old generation first: writes at most `room`, returns how many there are. */
uint64_t heap_objects(heap *heap, heap_object *out, uint64_t room);

/* ---- the evaluator (lisp.c) -------------------------------------------------------------------------------------- */

enum lisp_outcome { LISP_OK = 0, LISP_FAILED = 100 };

/* What a program is made of: tuples of [operation, operands...], whose tag is LISP_NODE. */
enum lisp_operation {
    LISP_CONSTANT,   /* value */
    LISP_LOCAL,      /* frames up, index in the frame */
    LISP_GLOBAL,     /* symbol */
    LISP_SET_LOCAL,  /* frames up, index, node */
    LISP_SET_GLOBAL, /* symbol, node */
    LISP_IF,         /* node, node, node */
    LISP_SEQUENCE,   /* nodes */
    LISP_LAMBDA,     /* number of parameters, node, further slots of its frames */
    LISP_CALL,       /* node of the function, nodes of the arguments */
    LISP_PRIMITIVE,  /* lisp_primitive, nodes of the arguments */
};
enum lisp_primitive {
    LISP_CONS, LISP_CAR, LISP_CDR, LISP_SET_CAR, LISP_SET_CDR, LISP_IS_NULL, LISP_IS_PAIR, LISP_IS_SYMBOL,
    LISP_IS_NUMBER, LISP_IS_EQ, LISP_NOT, LISP_ADD, LISP_SUBTRACT, LISP_MULTIPLY, LISP_QUOTIENT, LISP_REMAINDER,
    LISP_LESS, LISP_NUMBER_EQ, LISP_MAKE_VECTOR, LISP_VECTOR_REF, LISP_VECTOR_SET, LISP_VECTOR_LENGTH,
};
enum lisp_tag { LISP_PLAIN, LISP_PAIR, LISP_SYMBOL, LISP_CLOSURE, LISP_NODE, LISP_FRAME, LISP_VECTOR };

/* Evaluates a node. LISP_FAILED: what is wrong is in `message`, of 128 bytes; HEAP_REFUSED: collect() failed. */
int lisp_evaluate(heap_mutator *mutator, uint32_t node, uint32_t out, heap_word *word, char *message);

#endif
