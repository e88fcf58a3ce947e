/* SPDX-License-Identifier: MIT
 * Pages on the move, told by what differs from what the other side has: words of 8 bytes that changed, in runs.
 *
 * A page is a number of 16 bits, how many runs; then each run: from which word, how many (16 bits each), and the words.
 * WHOLE instead of the number: the whole page follows. */
#include "internal.h"

enum { WORD = 8, WHOLE = 0xffff };

static uint64_t word_at(const uint8_t *page, uint64_t i)
{
    uint64_t word;
    memcpy(&word, page + WORD * i, WORD);
    return word;
}

static uint8_t *put16(uint8_t *out, uint64_t value)
{
    uint16_t word = (uint16_t)value;
    memcpy(out, &word, 2);
    return out + 2;
}

uint64_t dt_moving_pack(const uint8_t *page, const uint8_t *before, uint64_t page_bytes, uint8_t *out)
{
    uint64_t words = page_bytes / WORD, runs = 0;
    uint8_t *at = out + 2, *most = out + page_bytes / 2; /* more is not worth it */
    for (uint64_t i = 0; before && i < words;) {
        if (i % 8 == 0 && !memcmp(page + WORD * i, before + WORD * i, 8 * WORD)) {
            i += 8;
            continue;
        }
        if (word_at(page, i) == word_at(before, i)) {
            i++;
            continue;
        }
        uint64_t from = i, to = i + 1; /* a word alike ends a run: to begin another is shorter than the word */
        while (to < words && word_at(page, to) != word_at(before, to))
            to++;
        if (at + 4 + WORD * (to - from) > most) {
            before = NULL;
            break;
        }
        at = put16(put16(at, from), to - from);
        memcpy(at, page + WORD * from, WORD * (to - from));
        at += WORD * (to - from);
        runs++;
        i = to;
    }
    if (!before) {
        memcpy(put16(out, WHOLE), page, page_bytes);
        return 2 + page_bytes;
    }
    put16(out, runs);
    return (uint64_t)(at - out);
}

uint64_t dt_moving_unpack(const uint8_t *packed, uint64_t length, uint8_t *page, uint64_t page_bytes)
{
    uint16_t runs, run[2];
    uint64_t at = 2;
    if (length < 2)
        return 0;
    memcpy(&runs, packed, 2);
    if (runs == WHOLE) {
        if (length - at < page_bytes)
            return 0;
        memcpy(page, packed + at, page_bytes);
        return at + page_bytes;
    }
    for (uint64_t i = 0; i < runs; i++) {
        if (length - at < sizeof run)
            return 0;
        memcpy(run, packed + at, sizeof run);
        at += sizeof run;
        uint64_t from = (uint64_t)run[0] * WORD, bytes = (uint64_t)run[1] * WORD;
        if (!bytes || from + bytes > page_bytes || length - at < bytes)
            return 0;
        memcpy(page + from, packed + at, bytes);
        at += bytes;
    }
    return at;
}
