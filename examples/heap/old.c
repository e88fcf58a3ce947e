/* SPDX-License-Identifier: MIT
 * The old generation: blocks of cells of one size, and runs of blocks for large objects. Nothing of how it is organized
 * lies in its own memory: which cells are in use is told by the bits of object starts, and which live by the marker's.
 * So neither marking nor sweeping writes a page of the heap, and no page is dirty but by objects. */
#include "internal.h"

#include <stdlib.h>

static const uint16_t CELL_BYTES[CLASSES] = {16,  32,  48,  64,  80,  96,   112,  128,  160,  192,  224,
                                             256, 320, 384, 448, 512, 640,  768,  896,  1024, 1280, 1536,
                                             1792, 2048, 2720, 3264, 4096, 5456, 8192};
static uint8_t CLASS_OF[SMALL_BYTES / UNIT + 1];

static uint64_t blocks_reserved(const heap *heap) { return heap->plan.old_bytes / BLOCK_BYTES; }

int old_open(heap *heap)
{
    for (uint32_t units = 1, class = 0; units <= SMALL_BYTES / UNIT; units++) {
        while (CELL_BYTES[class] < units * UNIT)
            class++;
        CLASS_OF[units] = (uint8_t)class;
    }
    for (uint32_t class = 0; class < CLASSES; class++)
        heap->partial[class] = NONE;
    heap->blocks = reserve(blocks_reserved(heap) * sizeof *heap->blocks);
    heap->marks = reserve(heap->plan.old_bytes / UNIT / 8);
    uint64_t **young[] = {&heap->young_marks, &heap->young_starts, &heap->young_seen};
    for (int i = 0; i < 3; i++)
        if (!(*young[i] = reserve(young_bits_bytes(heap))))
            return -1;
    return heap->blocks && heap->marks ? 0 : -1;
}

void old_close(heap *heap)
{
    unreserve(heap->blocks, blocks_reserved(heap) * sizeof *heap->blocks);
    unreserve(heap->marks, heap->plan.old_bytes / UNIT / 8);
    unreserve(heap->young_marks, young_bits_bytes(heap));
    unreserve(heap->young_starts, young_bits_bytes(heap));
    unreserve(heap->young_seen, young_bits_bytes(heap));
}

static uint8_t *block_at(const heap *heap, uint32_t i) { return heap->plan.old + (uint64_t)i * BLOCK_BYTES; }

/* A start may be set while a marker looks for starts; whoever sees it looks at its mark first. */
static void set_start(heap *heap, uint64_t unit)
{
    set_bit(heap->plan.starts, unit);
    set_bit(heap->plan.summary, unit / 64 / 64); /* a bit for 64 words of `starts`, see dirtytrack.gc.CrossingMap */
}

/* ---- allocation -------------------------------------------------------------------------------------------------- */

static uint32_t blocks_for(uint64_t nbytes)
{
    uint64_t count = (nbytes + BLOCK_BYTES - 1) / BLOCK_BYTES;
    return count < NONE ? (uint32_t)count : NONE;
}

/* The first of so many free blocks in a row. */
static uint32_t find_blocks(const heap *heap, uint32_t count)
{
    uint32_t found = 0;
    for (uint32_t i = heap->free_hint; i < heap->block_count; i++) {
        found = heap->blocks[i].state == BLOCK_FREE ? found + 1 : 0;
        if (found == count)
            return i + 1 - count;
    }
    return NONE;
}

static uint32_t take_blocks(heap *heap, uint32_t count)
{
    uint32_t first = find_blocks(heap, count);
    if (first == NONE)
        return NONE;
    for (uint32_t i = 0; i < count; i++)
        heap->blocks[first + i] = (block){.state = BLOCK_RUN_REST, .touched = 1, .run = i, .next = NONE};
    while (heap->free_hint < heap->block_count && heap->blocks[heap->free_hint].state != BLOCK_FREE)
        heap->free_hint++; /* no block before it is free */
    heap->free_blocks -= count;
    return first;
}

static uint8_t *take_cell(heap *heap, uint32_t class)
{
    uint32_t i = heap->partial[class], cell = CELL_BYTES[class];
    uint64_t first = (uint64_t)i * BLOCK_UNITS;
    for (uint32_t at = heap->cursor[class]; at < BLOCK_BYTES / cell; at++) {
        uint64_t unit = first + (uint64_t)at * cell / UNIT;
        if (!bit_of(heap->plan.starts, unit)) {
            heap->cursor[class] = at + 1;
            set_start(heap, unit);
            heap->old_bytes += cell;
            return heap->plan.old + unit * UNIT;
        }
    }
    return NULL;
}

uint8_t *old_allocate(heap *heap, uint64_t nbytes)
{
    if (nbytes > SMALL_BYTES) {
        uint32_t count = blocks_for(nbytes), first = take_blocks(heap, count);
        if (first == NONE)
            return NULL;
        heap->blocks[first].state = BLOCK_RUN;
        heap->blocks[first].run = count;
        set_start(heap, (uint64_t)first * BLOCK_UNITS);
        heap->old_bytes += (uint64_t)count * BLOCK_BYTES;
        return block_at(heap, first);
    }
    uint32_t class = CLASS_OF[nbytes / UNIT];
    for (;;) {
        if (heap->partial[class] == NONE) {
            uint32_t i = take_blocks(heap, 1);
            if (i == NONE)
                return NULL;
            heap->blocks[i].state = BLOCK_CELLS;
            heap->blocks[i].cell_class = (uint8_t)class;
            heap->partial[class] = i;
            heap->cursor[class] = 0;
        }
        uint8_t *at = take_cell(heap, class);
        if (at)
            return at;
        heap->partial[class] = heap->blocks[heap->partial[class]].next;
        heap->cursor[class] = 0;
    }
}

heap_word old_object_of(heap *heap, uint64_t address)
{
    if (!in_old(heap, address))
        return 0;
    uint32_t i = (uint32_t)((address - (uint64_t)heap->plan.old) / BLOCK_BYTES);
    const block *block = heap->blocks + i;
    uint64_t start = (uint64_t)block_at(heap, i);
    switch (block->state) {
    case BLOCK_CELLS:
        start += (address - start) / CELL_BYTES[block->cell_class] * CELL_BYTES[block->cell_class];
        break;
    case BLOCK_RUN_REST:
        start -= (uint64_t)block->run * BLOCK_BYTES;
        break;
    case BLOCK_FREE:
        return 0;
    }
    if (!is_old_object(heap, start)) /* a cell that is free */
        return 0;
    return address < start + 8 + contents_bytes(header_of(start)) ? start : 0;
}

int heap_has_room(heap *heap, uint64_t nbytes)
{
    if (nbytes)
        return find_blocks(heap, blocks_for(nbytes)) != NONE;
    uint64_t young = (uint64_t)(heap->eden.top - heap->eden.start) + (uint64_t)(heap->from.top - heap->from.start);
    /* A cell is less than 3/2 of the object in it, but a block has a rest, and each class may begin one. */
    return (uint64_t)heap->free_blocks * BLOCK_BYTES >= 2 * young + (uint64_t)CLASSES * BLOCK_BYTES;
}

/* ---- sweeping ---------------------------------------------------------------------------------------------------- */

static void set_free(heap *heap, uint32_t i)
{
    heap->blocks[i].state = BLOCK_FREE;
    heap->free_blocks++;
}

/* Returns how many cells are left in use. */
static uint32_t keep_marked(heap *heap, uint32_t i)
{
    uint64_t *starts = heap->plan.starts + (uint64_t)i * (BLOCK_UNITS / 64);
    uint64_t *marks = heap->marks + (uint64_t)i * (BLOCK_UNITS / 64);
    uint32_t live = 0;
    for (uint32_t word = 0; word < BLOCK_UNITS / 64; word++) {
        starts[word] &= marks[word];
        live += (uint32_t)__builtin_popcountll(starts[word]);
    }
    return live;
}

void heap_sweep(heap *heap)
{
    uint64_t before = heap->old_bytes;
    heap->old_bytes = 0;
    for (uint32_t class = 0; class < CLASSES; class++) {
        heap->partial[class] = NONE;
        heap->cursor[class] = 0;
    }
    for (uint32_t i = heap->block_count; i--;) { /* downwards, so that low blocks are filled first */
        block *block = heap->blocks + i;
        if (block->state == BLOCK_CELLS) {
            uint32_t live = keep_marked(heap, i), cell = CELL_BYTES[block->cell_class];
            heap->old_bytes += (uint64_t)live * cell;
            if (!live)
                set_free(heap, i);
            else if (live < BLOCK_BYTES / cell) {
                block->next = heap->partial[block->cell_class];
                heap->partial[block->cell_class] = i;
            }
        } else if (block->state == BLOCK_RUN) {
            uint32_t count = block->run;
            if (keep_marked(heap, i))
                heap->old_bytes += (uint64_t)count * BLOCK_BYTES;
            else
                for (uint32_t k = 0; k < count; k++)
                    set_free(heap, i + k);
        }
    }
    heap->free_hint = 0;
    heap->numbers.freed_bytes += before - heap->old_bytes;
}

/* ---- growing and shrinking --------------------------------------------------------------------------------------- */

int heap_extend(heap *heap, uint64_t nbytes)
{
    uint32_t count = (uint32_t)(nbytes / BLOCK_BYTES);
    if (nbytes > heap->plan.old_bytes)
        return HEAP_REFUSED;
    for (uint32_t i = count; i < heap->block_count; i++)
        if (heap->blocks[i].state != BLOCK_FREE)
            return HEAP_REFUSED;
    if (count > heap->block_count) /* a marking that is under way has marked nothing there */
        memset(heap->marks + (uint64_t)heap->block_count * (BLOCK_UNITS / 64), 0,
               (uint64_t)(count - heap->block_count) * (BLOCK_UNITS / 8));
    heap->free_blocks += count - heap->block_count; /* modulo 2^32 where it shrinks */
    heap->block_count = count;
    heap->free_hint = heap->free_hint < count ? heap->free_hint : count;
    return HEAP_OK;
}

uint64_t heap_free_units(heap *heap, uint64_t unit_bytes, uint64_t *out, uint64_t room)
{
    uint32_t each = unit_bytes > BLOCK_BYTES ? (uint32_t)(unit_bytes / BLOCK_BYTES) : 1;
    uint64_t found = 0;
    for (uint32_t i = 0; i + each <= heap->block_count; i += each) {
        bool empty = true, touched = false;
        for (uint32_t k = i; k < i + each && empty; k++) {
            empty = heap->blocks[k].state == BLOCK_FREE;
            touched |= heap->blocks[k].touched;
        }
        if (!empty || !touched)
            continue;
        uint64_t start = (uint64_t)block_at(heap, i), end = start + (uint64_t)each * BLOCK_BYTES;
        if (found && out[2 * found - 1] == start)
            out[2 * found - 1] = end;
        else if (found == room)
            break;
        else {
            out[2 * found] = start;
            out[2 * found++ + 1] = end;
        }
        for (uint32_t k = i; k < i + each; k++)
            heap->blocks[k].touched = 0;
    }
    return found;
}

void heap_count(heap *heap, heap_numbers *out)
{
    *out = heap->numbers;
    out->young_bytes = (uint64_t)(heap->eden.top - heap->eden.start) + (uint64_t)(heap->from.top - heap->from.start);
    out->old_bytes = heap->old_bytes;
    out->block_bytes = BLOCK_BYTES;
    out->blocks = heap->block_count;
    out->free_blocks = heap->free_blocks;
}
