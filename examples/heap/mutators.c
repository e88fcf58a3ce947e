/* SPDX-License-Identifier: MIT
 * Threads that use the heap, and how they are stopped. A thread is running between heap_enter and heap_leave, else
 * parked: so a thread that is busy elsewhere, or blocked, never keeps the collector waiting. */
#include "internal.h"

#include <stdlib.h>

heap_mutator *heap_attach(heap *heap)
{
    heap_mutator *mutator = calloc(1, sizeof *mutator);
    if (!mutator)
        return NULL;
    mutator->heap = heap;
    mutator->stack = mutator->top = reserve(STACK_WORDS * sizeof *mutator->stack);
    if (!mutator->stack) {
        free(mutator);
        return NULL;
    }
    pthread_mutex_lock(&heap->lock);
    mutator->next = heap->mutators;
    heap->mutators = mutator;
    pthread_mutex_unlock(&heap->lock);
    return mutator;
}

void heap_detach(heap_mutator *mutator)
{
    heap *heap = mutator->heap;
    pthread_mutex_lock(&heap->lock);
    heap_mutator **link = &heap->mutators;
    while (*link != mutator)
        link = &(*link)->next;
    *link = mutator->next;
    pthread_mutex_unlock(&heap->lock);
    unreserve(mutator->stack, STACK_WORDS * sizeof *mutator->stack);
    free(mutator);
}

static void park(heap_mutator *mutator)
{
    heap *heap = mutator->heap;
    /* Either whoever stops the world sees that this thread is parked, or this thread sees that the world is stopped:
     * both are written before the other is read, in one order for all. */
    __atomic_store_n(&mutator->running, 0, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&heap->stopping, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&heap->lock);
        pthread_cond_broadcast(&heap->changed);
        pthread_mutex_unlock(&heap->lock);
    }
}

static int run(heap_mutator *mutator)
{
    heap *heap = mutator->heap;
    for (;;) {
        __atomic_store_n(&mutator->running, 1, __ATOMIC_SEQ_CST);
        if (!__atomic_load_n(&heap->stopping, __ATOMIC_SEQ_CST))
            return HEAP_OK;
        park(mutator);
        pthread_mutex_lock(&heap->lock);
        bool mine = heap->stopping && pthread_equal(heap->stopper, pthread_self());
        while (heap->stopping && !mine)
            pthread_cond_wait(&heap->changed, &heap->lock);
        pthread_mutex_unlock(&heap->lock);
        if (mine)
            return HEAP_BUSY;
    }
}

int heap_enter(heap_mutator *mutator)
{
    int outcome = mutator->depth ? HEAP_OK : run(mutator);
    if (!outcome)
        mutator->depth++;
    return outcome;
}

void heap_leave(heap_mutator *mutator)
{
    if (!--mutator->depth)
        park(mutator);
}

uint32_t heap_depth(heap_mutator *mutator) { return mutator->depth; }

void heap_leave_to(heap_mutator *mutator, uint32_t depth)
{
    while (mutator->depth > depth)
        heap_leave(mutator);
}

void heap_safepoint(heap_mutator *mutator)
{
    if (__atomic_load_n(&mutator->heap->stopping, __ATOMIC_RELAXED)) {
        park(mutator);
        run(mutator);
    }
}

void heap_stop(heap *heap)
{
    pthread_mutex_lock(&heap->lock);
    while (heap->stopping)
        pthread_cond_wait(&heap->changed, &heap->lock);
    heap->stopper = pthread_self();
    __atomic_store_n(&heap->stopping, 1, __ATOMIC_SEQ_CST);
    for (heap_mutator *each = heap->mutators; each;)
        if (__atomic_load_n(&each->running, __ATOMIC_SEQ_CST)) {
            pthread_cond_wait(&heap->changed, &heap->lock);
            each = heap->mutators; /* the list may be another one */
        } else
            each = each->next;
    for (heap_mutator *each = heap->mutators; each; each = each->next) {
        if (each->lab < each->lab_end)
            store((heap_word *)each->lab, header(HEAP_FILLER, 0, (uint64_t)(each->lab_end - each->lab) - 8));
        each->lab = each->lab_end = NULL;
    }
    pthread_mutex_unlock(&heap->lock);
}

void heap_resume(heap *heap)
{
    pthread_mutex_lock(&heap->lock);
    __atomic_store_n(&heap->stopping, 0, __ATOMIC_SEQ_CST);
    pthread_cond_broadcast(&heap->changed);
    pthread_mutex_unlock(&heap->lock);
}
