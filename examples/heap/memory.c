/* SPDX-License-Identifier: MIT
 * The heap as a whole, allocation, and objects by handle. */
#define _GNU_SOURCE
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define HANDLES (1 << 24) /* reserved, not populated */
#define LAB_BYTES 32768

void *reserve(uint64_t nbytes)
{
    void *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void unreserve(void *memory, uint64_t nbytes)
{
    if (memory)
        munmap(memory, nbytes);
}

void push(stack *stack, heap_word word)
{
    if (stack->count == stack->room) {
        uint64_t room = stack->room ? stack->room * 2 : 1024;
        heap_word *items = realloc(stack->items, room * sizeof *items);
        if (!items) { /* in the middle of a collection there is no way back */
            fputs("examples/heap: no memory for the collector's stack\n", stderr);
            abort();
        }
        stack->items = items;
        stack->room = room;
    }
    stack->items[stack->count++] = word;
}

static space space_at(uint8_t *start, uint64_t nbytes) { return (space){start, start, start + nbytes}; }

uint64_t heap_handles(void) { return HANDLES; }

heap *heap_open(const heap_plan *plan)
{
    heap *heap = calloc(1, sizeof *heap);
    if (!heap)
        return NULL;
    heap->plan = *plan;
    heap->eden = space_at(plan->young, plan->eden_bytes);
    heap->from = space_at(heap->eden.end, plan->survivor_bytes);
    heap->to = space_at(heap->from.end, plan->survivor_bytes);
    pthread_mutex_init(&heap->lock, NULL);
    pthread_cond_init(&heap->changed, NULL);
    heap->handles = reserve(HANDLES * sizeof *heap->handles);
    if (!heap->handles || old_open(heap)) {
        heap_close(heap);
        return NULL;
    }
    return heap;
}

void heap_close(heap *heap)
{
    while (heap->mutators)
        heap_detach(heap->mutators);
    old_close(heap);
    unreserve(heap->handles, HANDLES * sizeof *heap->handles);
    free(heap->to_mark.items);
    free(heap->promoted.items);
    free(heap->to_check.items);
    pthread_cond_destroy(&heap->changed);
    pthread_mutex_destroy(&heap->lock);
    free(heap);
}

/* ---- allocation -------------------------------------------------------------------------------------------------- */

static int collect(heap_mutator *mutator, uint32_t reason, uint64_t nbytes)
{
    /* Parked however deep this thread is in enter: what it holds is in handles and on its stack. */
    uint32_t depth = mutator->depth;
    mutator->depth = 1;
    heap_leave(mutator);
    int failed = mutator->heap->plan.collect(reason, nbytes);
    int outcome = heap_enter(mutator);
    mutator->depth = depth;
    return failed ? failed : outcome;
}

/* A new part of eden, of which the thread needs nbytes at once. */
static bool take_lab(heap_mutator *mutator, uint64_t nbytes)
{
    heap *heap = mutator->heap;
    uint64_t share = heap->plan.eden_bytes / 16 & ~(uint64_t)(UNIT - 1), wanted = share < LAB_BYTES ? share : LAB_BYTES;
    if (mutator->lab < mutator->lab_end) /* so that eden can be read from its start */
        store((heap_word *)mutator->lab, header(HEAP_FILLER, 0, (uint64_t)(mutator->lab_end - mutator->lab) - 8));
    mutator->lab = mutator->lab_end = NULL;
    pthread_mutex_lock(&heap->lock);
    uint64_t left = (uint64_t)(heap->eden.end - heap->eden.top);
    bool fits = nbytes <= left;
    if (fits) {
        wanted = wanted < nbytes ? nbytes : wanted > left ? left : wanted;
        mutator->lab = heap->eden.top;
        mutator->lab_end = heap->eden.top += wanted;
    }
    pthread_mutex_unlock(&heap->lock);
    return fits;
}

static heap_word allocate_large(heap_mutator *mutator, heap_word head, uint64_t nbytes)
{
    heap *heap = mutator->heap;
    for (;;) {
        pthread_mutex_lock(&heap->lock);
        uint8_t *at = old_allocate(heap, nbytes);
        if (at) {
            memset(at + 8, 0, nbytes - 8);
            store((heap_word *)at, head);
        }
        pthread_mutex_unlock(&heap->lock); /* a marker that finds the address somewhere finds the header too */
        if (at)
            return (heap_word)at;
        if (collect(mutator, HEAP_OLD_FULL, nbytes))
            return 0;
    }
}

heap_word allocate(heap_mutator *mutator, uint32_t kind, uint32_t tag, uint64_t length)
{
    heap *heap = mutator->heap;
    heap_word head = header(kind, tag, length);
    uint64_t nbytes = object_bytes(head);
    if (heap->plan.stress && collect(mutator, HEAP_STRESS, nbytes))
        return 0;
    if (nbytes > (uint64_t)(mutator->lab_end - mutator->lab)) {
        if (nbytes > SMALL_BYTES || nbytes > heap->plan.eden_bytes / 8)
            return allocate_large(mutator, head, nbytes);
        while (!take_lab(mutator, nbytes))
            if (collect(mutator, HEAP_EDEN_FULL, nbytes))
                return 0;
    }
    uint8_t *at = mutator->lab;
    mutator->lab += nbytes;
    store((heap_word *)at, head);
    memset(at + 8, 0, nbytes - 8);
    return (heap_word)at;
}

/* ---- objects, by handle ------------------------------------------------------------------------------------------ */

void keep(heap *heap, uint32_t handle, heap_word word)
{
    store(heap->handles + handle, word);
    uint32_t top = __atomic_load_n(&heap->handles_top, __ATOMIC_RELAXED);
    while (top <= handle &&
           !__atomic_compare_exchange_n(&heap->handles_top, &top, handle + 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        continue;
}

void heap_drop(heap *heap, uint32_t handle) { store(heap->handles + handle, NIL); }

int heap_forget(heap_mutator *mutator, uint32_t object)
{
    int outcome = heap_enter(mutator); /* else a collection might put the object's new address back */
    if (outcome)
        return outcome;
    heap_drop(mutator->heap, object);
    heap_leave(mutator);
    return HEAP_OK;
}

int heap_new(heap_mutator *mutator, uint32_t kind, uint32_t tag, uint64_t length, uint32_t out)
{
    int outcome = heap_enter(mutator);
    if (outcome)
        return outcome;
    heap_word object = allocate(mutator, kind, tag, length);
    if (object)
        keep(mutator->heap, out, object);
    heap_leave(mutator);
    return object ? HEAP_OK : HEAP_REFUSED;
}

/* The slot of a tuple, or an item of an array, and which it is; NULL and why not. */
static heap_word *slot_of(heap *heap, uint32_t handle, uint64_t index, uint32_t *kind, int *outcome)
{
    heap_word object = load(heap->handles + handle), head = is_object(object) ? header_of(object) : 0;
    *kind = kind_of(head);
    bool right = *kind == HEAP_TUPLE || *kind == HEAP_ARRAY;
    *outcome = !right ? HEAP_WRONG_KIND : index >= length_of(head) ? HEAP_WRONG_INDEX : HEAP_OK;
    return *outcome ? NULL : slot(object, index);
}

int heap_get(heap_mutator *mutator, uint32_t object, uint64_t index, uint32_t out, heap_word *word, uint32_t *kind)
{
    int outcome = heap_enter(mutator);
    if (outcome)
        return outcome;
    heap_word *at = slot_of(mutator->heap, object, index, kind, &outcome);
    if (at) {
        *word = load(at);
        if (*kind == HEAP_TUPLE && is_object(*word))
            keep(mutator->heap, out, *word);
    }
    heap_leave(mutator);
    return outcome;
}

/* All of the mutator's stores: nothing is done but storing, since the page tables are the write barrier. */
static int set(heap_mutator *mutator, uint32_t object, uint64_t index, heap_word in_tuple, const int64_t *in_array)
{
    uint32_t kind;
    int outcome;
    heap_word *at = slot_of(mutator->heap, object, index, &kind, &outcome);
    if (!at)
        return outcome;
    if (kind == HEAP_ARRAY && !in_array)
        return HEAP_WRONG_KIND;
    store(at, kind == HEAP_ARRAY ? (heap_word)*in_array : in_tuple);
    return HEAP_OK;
}

int heap_set(heap_mutator *mutator, uint32_t object, uint64_t index, heap_word word)
{
    int outcome = heap_enter(mutator);
    if (outcome)
        return outcome;
    outcome = set(mutator, object, index, word, NULL);
    heap_leave(mutator);
    return outcome;
}

int heap_set_number(heap_mutator *mutator, uint32_t object, uint64_t index, int64_t value)
{
    int outcome = heap_enter(mutator);
    if (outcome)
        return outcome;
    outcome = set(mutator, object, index, number(value), &value);
    heap_leave(mutator);
    return outcome;
}

int heap_set_object(heap_mutator *mutator, uint32_t object, uint64_t index, uint32_t value)
{
    int outcome = heap_enter(mutator);
    if (outcome)
        return outcome;
    outcome = set(mutator, object, index, load(mutator->heap->handles + value), NULL);
    heap_leave(mutator);
    return outcome;
}

int heap_copy(heap_mutator *mutator, uint32_t from, uint64_t at, uint32_t to, uint64_t index, uint64_t count)
{
    int outcome = heap_enter(mutator), other = HEAP_OK;
    if (outcome)
        return outcome;
    if (count) {
        heap *heap = mutator->heap;
        uint32_t kind, same = 0;
        heap_word *source = slot_of(heap, from, at + count - 1, &kind, &outcome);
        heap_word *target = slot_of(heap, to, index + count - 1, &same, &other);
        outcome = outcome ? outcome : at + count < count || index + count < count ? HEAP_WRONG_INDEX : other;
        if (!outcome && kind != same)
            outcome = HEAP_WRONG_KIND;
        if (!outcome)
            memmove(target - (count - 1), source - (count - 1), count * sizeof *source);
    }
    heap_leave(mutator);
    return outcome;
}

int heap_same(heap_mutator *mutator, uint32_t one, uint32_t other, uint32_t *same)
{
    int outcome = heap_enter(mutator);
    if (outcome)
        return outcome;
    *same = load(mutator->heap->handles + one) == load(mutator->heap->handles + other);
    heap_leave(mutator);
    return HEAP_OK;
}

int heap_kind_of(heap_mutator *mutator, uint32_t object, uint32_t *kind, uint32_t *tag, uint64_t *length)
{
    int outcome = heap_enter(mutator);
    if (outcome)
        return outcome;
    heap_word head = header_of(load(mutator->heap->handles + object));
    *kind = kind_of(head);
    *tag = tag_of(head);
    *length = length_of(head);
    heap_leave(mutator);
    return HEAP_OK;
}

int heap_contents(heap_mutator *mutator, uint32_t object, uint8_t **contents, uint64_t *nbytes)
{
    heap_word at = load(mutator->heap->handles + object);
    *contents = (uint8_t *)slot(at, 0);
    *nbytes = contents_bytes(header_of(at));
    return HEAP_OK;
}
