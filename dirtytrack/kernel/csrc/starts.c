/* SPDX-License-Identifier: MIT
 * Crossing maps: where objects start, a bit a unit, and above it a bit for each 64 words of those that may have one set, so
 * that the start of a large object is found without reading all bits in between. */
#include "internal.h"

#define BLOCK_WORDS 64 /* that a bit of the summary stands for */

static uint64_t units(uint64_t nbytes, uint32_t shift) { return (nbytes + ((uint64_t)1 << shift) - 1) >> shift; }

uint64_t dt_starts_bits(uint64_t nbytes, uint32_t shift) { return (units(nbytes, shift) + 63) / 64 * 8; }

uint64_t dt_starts_summary(uint64_t nbytes, uint32_t shift)
{
    return (dt_starts_bits(nbytes, shift) / 8 + BLOCK_WORDS * 64 - 1) / (BLOCK_WORDS * 64) * 8;
}

static void set_bit(uint64_t *words, uint64_t i)
{
    if (!(__atomic_load_n(words + i / 64, __ATOMIC_RELAXED) >> (i & 63) & 1)) /* allocators of several threads */
        __atomic_fetch_or(words + i / 64, UINT64_C(1) << (i & 63), __ATOMIC_RELAXED);
}

static bool sound(const dt_starts *map, uint64_t start)
{
    return start >= map->address && start < map->end && !((start - map->address) & (((uint64_t)1 << map->shift) - 1));
}

int dt_starts_add(const dt_starts *map, const uint64_t *starts, uint64_t n, dt_failure *why)
{
    for (uint64_t i = 0; i < n; i++)
        if (!sound(map, starts[i]))
            return dt_fail_with(why, -EINVAL, 0, DT_STEP_NONE, starts[i], starts[i] + 1);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t unit = (starts[i] - map->address) >> map->shift;
        set_bit(map->bits, unit);
        set_bit(map->summary, unit / 64 / BLOCK_WORDS);
    }
    return 0;
}

/* The bits of a word that stand for units from `from` up to `to`, of which it has some. */
static uint64_t within(uint64_t word, uint64_t from, uint64_t to)
{
    uint64_t ones = ~UINT64_C(0);
    if (from > word * 64)
        ones &= ~UINT64_C(0) << (from & 63);
    if (to < word * 64 + 64)
        ones &= ~(~UINT64_C(0) << (to & 63));
    return ones;
}

static bool may_have(const dt_starts *map, uint64_t block) { return map->summary[block / 64] >> (block & 63) & 1; }

void dt_starts_clear(const dt_starts *map, uint64_t from, uint64_t to)
{
    from = dt_max(from, map->address);
    to = dt_min(to, map->end);
    if (from >= to)
        return;
    uint64_t first = units(from - map->address, map->shift), last = units(to - map->address, map->shift);
    for (uint64_t word = first / 64; word * 64 < last;) {
        if (!may_have(map, word / BLOCK_WORDS)) {
            word = (word / BLOCK_WORDS + 1) * BLOCK_WORDS;
            continue;
        }
        uint64_t ones = within(word, first, last);
        if (map->bits[word] & ones) /* where nothing is set nothing is populated */
            __atomic_fetch_and(map->bits + word, ~ones, __ATOMIC_RELAXED);
        word++;
    }
}

/* The last bit that is set at or before unit `at`, or UINT64_MAX. */
static uint64_t last_before(const dt_starts *map, uint64_t at)
{
    uint64_t word = at / 64, bits = map->bits[word] & (~UINT64_C(0) >> (63 - (at & 63)));
    while (!bits) {
        if (word % BLOCK_WORDS == 0) { /* back to the last block that may have one */
            uint64_t block = word / BLOCK_WORDS;
            if (!block--)
                return UINT64_MAX;
            uint64_t over = block / 64, some = map->summary[over] & (~UINT64_C(0) >> (63 - (block & 63)));
            while (!some) {
                if (!over--)
                    return UINT64_MAX;
                some = map->summary[over];
            }
            block = over * 64 + 63 - (uint64_t)__builtin_clzll(some);
            word = block * BLOCK_WORDS + BLOCK_WORDS;
        }
        bits = map->bits[--word];
    }
    return word * 64 + 63 - (uint64_t)__builtin_clzll(bits);
}

int dt_starts_at(const dt_starts *map, uint64_t address, uint64_t *out)
{
    if (address < map->address || address >= map->end)
        return -EINVAL;
    uint64_t unit = last_before(map, (address - map->address) >> map->shift);
    if (unit == UINT64_MAX)
        return -ENOENT;
    *out = map->address + (unit << map->shift);
    return 0;
}

uint64_t dt_starts_in(const dt_starts *map, const dt_run *runs, uint64_t n, uint64_t *out, uint64_t room)
{
    uint64_t count = 0, next = 0; /* units before `next` were told */
    for (uint64_t i = 0; i < n; i++) {
        uint64_t from = dt_max(runs[i].start, map->address), to = dt_min(runs[i].end, map->end);
        if (from >= to)
            continue;
        uint64_t first = (from - map->address) >> map->shift, last = units(to - map->address, map->shift);
        uint64_t crossing = last_before(map, first), at = dt_max(first, next);
        if (crossing != UINT64_MAX && crossing >= next) {
            if (count < room)
                out[count] = map->address + (crossing << map->shift);
            count++;
            at = dt_max(at, crossing + 1);
        }
        for (uint64_t word = at / 64; word * 64 < last; word++) {
            if (!may_have(map, word / BLOCK_WORDS)) {
                word |= BLOCK_WORDS - 1;
                continue;
            }
            for (uint64_t bits = map->bits[word] & within(word, at, last); bits; bits &= bits - 1, count++)
                if (count < room)
                    out[count] = map->address + ((word * 64 + (uint64_t)__builtin_ctzll(bits)) << map->shift);
        }
        next = dt_max(next, last);
    }
    return count;
}
