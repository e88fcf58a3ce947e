/* SPDX-License-Identifier: MIT
 * Marking, by bits beside the heap. Beside mutators the young generation is left out, since its objects move; a minor
 * collection that follows writes every old slot that leads there, so those slots' pages are read again at the end. */
#include "internal.h"

static void mark(heap *heap, heap_word word)
{
    uint64_t *bits, unit;
    if (!is_object(word))
        return;
    if (in_old(heap, word))
        bits = heap->marks, unit = old_unit(heap, word);
    else if (heap->mark_young && in_young(heap, word))
        bits = heap->young_marks, unit = young_unit(heap, word);
    else
        return;
    if (bit_of(bits, unit))
        return;
    set_bit(bits, unit);
    push(&heap->to_mark, word);
}

static uint64_t mark_from(heap *heap, heap_word object)
{
    heap_word head = header_of(object);
    if (kind_of(head) != HEAP_TUPLE)
        return 1;
    uint64_t length = length_of(head);
    for (uint64_t i = 0; i < length; i++) /* a mutator may write the slot meanwhile: then its page is dirty */
        mark(heap, load(slot(object, i)));
    return length + 1;
}

void heap_mark_begin(heap *heap)
{
    heap->to_mark.count = 0;
    memset(heap->marks, 0, (size_t)heap->block_count * (BLOCK_UNITS / 8));
}

void heap_mark_roots(heap *heap, uint32_t young_too)
{
    if (young_too)
        memset(heap->young_marks, 0, young_bits_bytes(heap));
    heap->mark_young = young_too;
    for (uint32_t i = 0; i < heap->handles_top; i++)
        mark(heap, load(heap->handles + i));
    for (heap_mutator *each = heap->mutators; each; each = each->next)
        for (heap_word *at = each->stack; at < each->top; at++)
            mark(heap, load(at));
}

void heap_mark_again(heap *heap, const uint64_t *starts, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        if (in_old(heap, starts[i]) && bit_of(heap->marks, old_unit(heap, starts[i])))
            mark_from(heap, starts[i]);
}

int heap_mark_more(heap *heap, uint64_t budget_words)
{
    for (uint64_t read = 0; heap->to_mark.count; read += mark_from(heap, heap->to_mark.items[--heap->to_mark.count]))
        if (read >= budget_words)
            return 0;
    return 1;
}
