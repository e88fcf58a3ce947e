/* SPDX-License-Identifier: MIT
 * What tests ask: whether every reference leads to an object, found by reading all of the heap; and what is there. */
#include "internal.h"

typedef void visitor(heap *heap, heap_word object, void *state);

static void visit_space(heap *heap, const space *space, visitor *visit, void *state)
{
    for (uint8_t *at = space->start; at < space->top; at += object_bytes(header_of((heap_word)at)))
        if (kind_of(header_of((heap_word)at)) != HEAP_FILLER)
            visit(heap, (heap_word)at, state);
}

static void visit_old(heap *heap, visitor *visit, void *state)
{
    for (uint64_t word = 0; word < (uint64_t)heap->block_count * (BLOCK_UNITS / 64); word++)
        for (uint64_t bits = heap->plan.starts[word]; bits; bits &= bits - 1)
            visit(heap, (heap_word)heap->plan.old + (word * 64 + (uint64_t)__builtin_ctzll(bits)) * UNIT, state);
}

static void visit_young(heap *heap, visitor *visit, void *state)
{
    visit_space(heap, &heap->eden, visit, state);
    visit_space(heap, &heap->from, visit, state);
}

/* ---- verifying --------------------------------------------------------------------------------------------------- */

static void note_young(heap *heap, heap_word object, void *state)
{
    (void)state;
    set_bit(heap->young_starts, young_unit(heap, object));
}

static void check(heap *heap, heap_word holder, const heap_word *at, heap_fault *fault)
{
    heap_word word = load(at);
    if (fault->slot || !word || is_number(word) || word == TRUE || word == FALSE || is_old_object(heap, word))
        return;
    if (!is_object(word) || !in_young(heap, word) || !bit_of(heap->young_starts, young_unit(heap, word))) {
        *fault = (heap_fault){holder, (uint64_t)at, word};
        return;
    }
    if (!bit_of(heap->young_seen, young_unit(heap, word))) {
        set_bit(heap->young_seen, young_unit(heap, word));
        push(&heap->to_check, word);
    }
}

static void check_object(heap *heap, heap_word object, void *state)
{
    heap_word head = header_of(object);
    if (kind_of(head) == HEAP_TUPLE)
        for (uint64_t i = 0; i < length_of(head); i++)
            check(heap, object, slot(object, i), state);
}

/* All old objects are looked at, and those young ones that something leads to: those that nothing leads to may hold the
 * addresses of old objects that were freed. */
int heap_verify(heap *heap, heap_fault *fault)
{
    *fault = (heap_fault){0, 0, 0};
    memset(heap->young_starts, 0, young_bits_bytes(heap));
    memset(heap->young_seen, 0, young_bits_bytes(heap));
    heap->to_check.count = 0;
    visit_young(heap, note_young, NULL);
    for (uint32_t i = 0; i < heap->handles_top; i++)
        check(heap, 0, heap->handles + i, fault);
    for (heap_mutator *each = heap->mutators; each; each = each->next)
        for (heap_word *at = each->stack; at < each->top; at++)
            check(heap, 0, at, fault);
    visit_old(heap, check_object, fault);
    while (heap->to_check.count)
        check_object(heap, heap->to_check.items[--heap->to_check.count], fault);
    return fault->slot ? HEAP_CORRUPT : HEAP_OK;
}

/* ---- listing ----------------------------------------------------------------------------------------------------- */

struct list {
    heap_object *out;
    uint64_t room, count;
};

static void add(heap *heap, heap_word object, void *state)
{
    (void)heap;
    struct list *list = state;
    heap_word head = header_of(object);
    bool has_first = contents_bytes(head) >= 8;
    if (list->count < list->room)
        list->out[list->count] = (heap_object){object, kind_of(head), tag_of(head), length_of(head),
                                               has_first ? load(slot(object, 0)) : NIL};
    list->count++;
}

uint64_t heap_objects(heap *heap, heap_object *out, uint64_t room)
{
    struct list list = {out, room, 0};
    visit_old(heap, add, &list);
    visit_young(heap, add, &list);
    return list.count;
}
