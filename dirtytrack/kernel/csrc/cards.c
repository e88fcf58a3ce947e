/* SPDX-License-Identifier: MIT
 * Card tables: a byte a card, 1 where it is dirty. */
#include "reading.h"

void dt_cards_mark(const dt_set *set, uint64_t start, uint64_t end, const dt_cards *cards)
{
    for (uint64_t i = dt_set_first(set, start); i < set->count && set->runs[i].start < end; i++) {
        uint64_t from = (dt_max(set->runs[i].start, start) - cards->address) >> cards->shift;
        uint64_t to = (dt_min(set->runs[i].end, end) - 1 - cards->address) >> cards->shift;
        memset(cards->table + from, 1, (size_t)(to - from + 1));
    }
}

typedef struct comparison {
    const dt_cards *cards;
    int mark;
} comparison;

static int compare_piece(void *context, const dt_piece_read *p)
{
    const comparison *c = context;
    uint64_t card_bytes = (uint64_t)1 << c->cards->shift, address = p->address, end = address + p->nbytes;
    const uint8_t *bytes = p->bytes;
    uint8_t *mirror = (uint8_t *)p->of->mirror + (address - p->of->address);
    for (uint64_t next; address < end; bytes += next - address, mirror += next - address, address = next) {
        next = dt_min(dt_down(address, card_bytes) + card_bytes, end);
        if (dt_same_bytes(bytes, mirror, next - address))
            continue;
        /* The copy may be newer than what was compared, and the card is dirty all the same: whoever reads it now sees at
         * least that. */
        memcpy(mirror, bytes, next - address);
        if (c->mark)
            c->cards->table[(address - c->cards->address) >> c->cards->shift] = 1;
    }
    return 0;
}

int dt_cards_compare(const dt_set *set, const dt_extent *memory, const dt_cards *cards, int mark, dt_failure *why)
{
    comparison c = {.cards = cards, .mark = mark};
    return dt_read_pieces(set, memory, 1, compare_piece, &c, why);
}

typedef uint64_t __attribute__((aligned(1), may_alias)) any_word;

static bool all_clean(const uint8_t *table)
{
    const any_word *words = (const any_word *)table;
    uint64_t sum = 0;
    for (unsigned i = 0; i < 16; i++)
        sum |= words[i];
    return !sum;
}

/* The first card from `i` on whose byte is 0 or not, as asked; `end` where there is none. */
static uint64_t next_card(const uint8_t *table, uint64_t i, uint64_t end, bool dirty)
{
    while (i < end && (!!table[i]) != dirty) {
        while (dirty && i + 128 <= end && all_clean(table + i)) /* most of a large table */
            i += 128;
        while (dirty && i + 8 <= end && !*(const any_word *)(table + i))
            i += 8;
        if (i < end && (!!table[i]) != dirty)
            i++;
    }
    return i;
}

uint64_t dt_cards_dirty(const dt_cards *cards, uint64_t count, uint64_t *out, uint64_t room)
{
    uint64_t found = 0;
    for (uint64_t i = next_card(cards->table, 0, count, true); i < count; i = next_card(cards->table, i + 1, count, true)) {
        if (found < room)
            out[found] = cards->address + (i << cards->shift);
        found++;
    }
    return found;
}

uint64_t dt_cards_runs(const dt_cards *cards, uint64_t count, dt_run *out, uint64_t room)
{
    uint64_t found = 0;
    for (uint64_t i = next_card(cards->table, 0, count, true), to; i < count; i = next_card(cards->table, to, count, true)) {
        to = next_card(cards->table, i, count, false);
        if (found < room)
            out[found] = (dt_run){cards->address + (i << cards->shift), cards->address + (to << cards->shift)};
        found++;
    }
    return found;
}
