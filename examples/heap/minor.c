/* SPDX-License-Identifier: MIT
 * Minor collections: what lives in eden and the survivor space is copied, after Cheney, into the other survivor space
 * or into the old generation. The old slots that lead there come from the remembered set; nothing else old is read. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>

#define POISON 0xDA /* read as a header it tells that the object moved, to where none can be */

static uint8_t *place_for(heap *heap, heap_word head, uint64_t nbytes)
{
    if (age_of(head) < heap->plan.promote_age && nbytes <= (uint64_t)(heap->to.end - heap->to.top)) {
        uint8_t *at = heap->to.top;
        heap->to.top += nbytes;
        heap->numbers.survived_bytes += nbytes;
        return at;
    }
    uint8_t *at = old_allocate(heap, nbytes);
    if (!at) { /* heap_has_room() was asked before the first object moved */
        fputs("examples/heap: no room for a promoted object\n", stderr);
        abort();
    }
    heap->numbers.promoted_bytes += nbytes;
    push(&heap->promoted, (heap_word)at);
    return at;
}

/* Where the object is from now on. */
static heap_word evacuated(heap *heap, heap_word word)
{
    if (!is_object(word) || !in_young(heap, word))
        return word;
    if (word - (uint64_t)heap->to.start < (uint64_t)(heap->to.top - heap->to.start))
        return word; /* this slot was seen before */
    heap_word head = header_of(word);
    if (moved(head))
        return head;
    uint64_t nbytes = object_bytes(head);
    uint8_t *at = place_for(heap, head, nbytes);
    memcpy(at, (void *)word, nbytes);
    store((heap_word *)at, older(head));
    store(words(word), (heap_word)at);
    return (heap_word)at;
}

static void evacuate(heap *heap, heap_word *at)
{
    heap_word before = load(at), after = evacuated(heap, before);
    if (after != before)
        store(at, after);
}

static void evacuate_from(heap *heap, heap_word object)
{
    heap_word head = header_of(object);
    if (kind_of(head) == HEAP_TUPLE)
        for (uint64_t i = 0; i < length_of(head); i++)
            evacuate(heap, slot(object, i));
}

static void evacuate_roots(heap *heap)
{
    for (uint32_t i = 0; i < heap->handles_top; i++)
        evacuate(heap, heap->handles + i);
    for (heap_mutator *each = heap->mutators; each; each = each->next)
        for (heap_word *at = each->stack; at < each->top; at++)
            evacuate(heap, at);
}

static void evacuate_remembered(heap *heap, const uint64_t *slots, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        heap_word object = old_object_of(heap, slots[i]), *at = (heap_word *)slots[i];
        uint32_t kind = object ? kind_of(header_of(object)) : HEAP_FILLER;
        if (kind == HEAP_TUPLE && slots[i] != object) {
            evacuate(heap, at);
            heap->numbers.redirected++;
        } else if (!object)
            store(at, NIL); /* of an object that was freed: no need to find this word again and again */
    }
}

static void empty(heap *heap, space *space)
{
    if (heap->plan.poison)
        memset(space->start, POISON, (size_t)(space->top - space->start));
    space->top = space->start;
}

void heap_minor(heap *heap, const uint64_t *slots, uint64_t count)
{
    uint8_t *scanned = heap->to.start;
    evacuate_roots(heap);
    evacuate_remembered(heap, slots, count);
    while (scanned < heap->to.top || heap->promoted.count)
        if (heap->promoted.count)
            evacuate_from(heap, heap->promoted.items[--heap->promoted.count]);
        else {
            evacuate_from(heap, (heap_word)scanned);
            scanned += object_bytes(header_of((heap_word)scanned));
        }
    empty(heap, &heap->eden);
    empty(heap, &heap->from);
    space to = heap->to;
    heap->to = heap->from;
    heap->from = to;
}
