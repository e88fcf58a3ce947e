/* SPDX-License-Identifier: MIT
 * The encoding of a delta, written and read. docs/delta-format.md tells each byte.
 *
 * A block takes at most one number, and a bit for 64 granules, more than its bytes: so much does DELTA_ZEROS, since it
 * takes a byte for each granule whose bytes it leaves out, and nothing that takes more is ever chosen. */
#include "delta.h"

/* ---- numbers, seven bits a byte, low ones first ---- */

uint8_t *dt_delta_put_number(uint8_t *at, uint64_t n)
{
    for (; n >= 0x80; n >>= 7)
        *at++ = (uint8_t)(n | 0x80);
    *at++ = (uint8_t)n;
    return at;
}

const uint8_t *dt_delta_get_number(const uint8_t *at, const uint8_t *end, uint64_t *out)
{
    uint64_t n = 0;
    for (unsigned shift = 0; at < end && shift < 64; shift += 7) {
        uint8_t byte = *at++;
        if (shift == 63 && byte > 1)
            return NULL;
        n |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80) {
            *out = n;
            return byte || !shift ? at : NULL;
        }
    }
    return NULL;
}

/* ---- masks ---- */

typedef struct census { uint32_t set, runs; } census;

static census count(const uint64_t *mask, uint32_t n)
{
    census c = {0, 0};
    uint64_t before = 0;
    for (uint32_t i = 0; i < (n + 63) / 64; i++) {
        uint64_t bits = mask[i];
        c.set += (uint32_t)__builtin_popcountll(bits);
        c.runs += (uint32_t)__builtin_popcountll(bits & ~(bits << 1 | before));
        before = bits >> 63;
    }
    return c;
}

/* A bit for each group of 64 granules that has any of them, then a byte for each: its place in the group, 0x80 set on
 * the group's last. `flip`: all ones to list those that are not set. */
static uint8_t *put_list(uint8_t *at, const uint64_t *mask, uint32_t n, uint64_t flip)
{
    uint32_t groups = (n + 63) / 64, top_bytes = (groups + 7) / 8;
    uint8_t *top = at;
    memset(top, 0, top_bytes);
    at += top_bytes;
    for (uint32_t i = 0; i < groups; i++) {
        uint64_t bits = mask[i] ^ flip;
        if (n - i * 64 < 64)
            bits &= ((uint64_t)1 << (n - i * 64)) - 1;
        if (!bits)
            continue;
        top[i / 8] |= (uint8_t)(1u << i % 8);
        for (; bits; bits &= bits - 1)
            *at++ = (uint8_t)__builtin_ctzll(bits);
        at[-1] |= 0x80;
    }
    return at;
}

static const uint8_t *get_list(const uint8_t *at, const uint8_t *end, uint64_t *mask, uint32_t n, uint64_t flip)
{
    uint32_t groups = (n + 63) / 64, top_bytes = (groups + 7) / 8;
    if ((uint64_t)(end - at) < top_bytes)
        return NULL;
    const uint8_t *top = at;
    at += top_bytes;
    if (groups % 8 && top[top_bytes - 1] >> groups % 8)
        return NULL;
    for (uint32_t i = 0; i < groups; i++) {
        uint32_t within = (uint32_t)dt_min(n - i * 64, 64);
        uint64_t all = ~UINT64_C(0) >> (64 - within), bits = 0;
        if (top[i / 8] >> i % 8 & 1) {
            int before = -1, byte;
            do {
                if (at == end)
                    return NULL;
                byte = *at++;
                int place = byte & 0x7F;
                if (place <= before || (uint32_t)place >= within)
                    return NULL;
                bits |= (uint64_t)1 << place;
                before = place;
            } while (byte < 0x80);
        }
        mask[i] = (bits ^ flip) & all;
    }
    return at;
}

static uint8_t *put_runs(uint8_t *at, const uint64_t *mask, uint32_t n, uint32_t runs)
{
    at = dt_delta_put_number(at, runs);
    for (uint32_t from = 0, to = 0, before = 0; dt_delta_mask_run(mask, n, &from, &to); before = to) {
        at = dt_delta_put_number(at, from - before);
        at = dt_delta_put_number(at, to - from);
    }
    return at;
}

static const uint8_t *get_runs(const uint8_t *at, const uint8_t *end, uint64_t *mask, uint32_t n)
{
    uint64_t runs, gap, length, before = 0;
    memset(mask, 0, (n + 63) / 64 * sizeof *mask);
    if (!(at = dt_delta_get_number(at, end, &runs)))
        return NULL;
    for (uint64_t i = 0; i < runs; i++) {
        if (!(at = dt_delta_get_number(at, end, &gap)) || !(at = dt_delta_get_number(at, end, &length)))
            return NULL;
        if (gap > n - before || length > n - before - gap || !length || (i && !gap))
            return NULL;
        dt_delta_mask_set(mask, (uint32_t)(before + gap), (uint32_t)(before + gap + length));
        before += gap + length;
    }
    return at;
}

static const uint8_t *get_bitmap(const uint8_t *at, const uint8_t *end, uint64_t *mask, uint32_t n)
{
    uint32_t bytes = (n + 7) / 8;
    if ((uint64_t)(end - at) < bytes || (n % 8 && at[bytes - 1] >> n % 8))
        return NULL;
    mask[(n - 1) / 64] = 0;
    memcpy(mask, at, bytes);
    return at + bytes;
}

static uint32_t runs_bytes(const uint64_t *mask, uint32_t n, uint32_t runs)
{
    uint32_t bytes = (runs < 128 ? 1 : 2) + 2 * runs; /* and one more for each number of 128 or more */
    for (uint32_t from = 0, to = 0, before = 0; dt_delta_mask_run(mask, n, &from, &to); before = to)
        bytes += (from - before >= 128) + (to - from >= 128);
    return bytes;
}

static enum dt_delta_mode shortest(const uint64_t *mask, uint32_t n, census c)
{
    if (c.set == n)
        return DELTA_FULL;
    uint32_t top = (n + 511) / 512, ones = top + c.set, zeros = top + n - c.set, least = (n + 7) / 8;
    enum dt_delta_mode mode = DELTA_BITMAP;
    if (ones < least) {
        least = ones;
        mode = DELTA_ONES;
    }
    if (zeros < least) {
        least = zeros;
        mode = DELTA_ZEROS;
    }
    return 1 + 2 * c.runs <= least && runs_bytes(mask, n, c.runs) <= least ? DELTA_RUNS : mode;
}

uint8_t *dt_delta_put_opening(uint8_t *out, uint64_t gap, enum dt_delta_mode mode)
{
    return dt_delta_put_number(out, gap << 3 | mode);
}

uint8_t *dt_delta_put_block(uint8_t *out, uint64_t gap, const uint64_t *mask, uint32_t n, const uint8_t *copy,
                         uint32_t bytes, unsigned shift)
{
    census c = count(mask, n);
    enum dt_delta_mode mode = shortest(mask, n, c);
    out = dt_delta_put_opening(out, gap, mode);
    switch (mode) {
    case DELTA_FULL:
        memcpy(out, copy, bytes);
        return out + bytes;
    case DELTA_RUNS:
        out = put_runs(out, mask, n, c.runs);
        break;
    case DELTA_BITMAP:
        memcpy(out, mask, (n + 7) / 8);
        out += (n + 7) / 8;
        break;
    default:
        out = put_list(out, mask, n, mode == DELTA_ZEROS ? ~UINT64_C(0) : 0);
    }
    for (uint32_t from = 0, to = 0; dt_delta_mask_run(mask, n, &from, &to);) {
        uint32_t start = from << shift, length = (uint32_t)dt_min((uint64_t)to << shift, bytes) - start;
        memcpy(out, copy + start, 16); /* most runs are small: no call, and what is too much is overwritten */
        if (length > 16)
            memcpy(out + 16, copy + start + 16, length - 16);
        out += length;
    }
    return out;
}

/* ---- header and reader ---- */

static const uint8_t magic[4] = {'D', 'T', 'D', 1}; /* the version is the last */

void dt_delta_put_header(uint8_t *out, const dt_delta_grid *g)
{
    uint16_t phase = (uint16_t)g->phase;
    memcpy(out, magic, 4);
    out[4] = (uint8_t)g->shift;
    out[5] = 0;
    memcpy(out + 6, &phase, 2);
    memcpy(out + 8, &g->target, 8);
    memset(out + 16, 0, 8); /* the checksum, once it is asked for */
}

static int malformed(const dt_delta_reader *r, dt_failure *why)
{
    uint64_t at = (uint64_t)(r->at - r->begin);
    return dt_fail_with(why, DT_MALFORMED, 0, DT_STEP_NONE, at, at);
}

int dt_delta_open(dt_delta_reader *r, const uint8_t *delta, uint64_t length, dt_failure *why)
{
    uint16_t phase;
    *r = (dt_delta_reader){.begin = delta, .at = delta, .end = delta + length};
    if (length < DELTA_HEADER || memcmp(delta, magic, 4))
        return malformed(r, why);
    r->at += 4;
    memcpy(&phase, delta + 6, 2);
    memcpy(&r->grid.target, delta + 8, 8);
    r->grid.shift = delta[4];
    r->grid.phase = phase;
    if (r->grid.shift > DELTA_MOST_SHIFT || delta[5] || phase >= DELTA_BLOCK || phase & ((1u << r->grid.shift) - 1) ||
        r->grid.target > INT64_MAX)
        return malformed(r, why);
    r->at = delta + DELTA_HEADER;
    r->blocks = r->grid.target ? dt_delta_block_of(&r->grid, r->grid.target - 1) + 1 : 0;
    return 0;
}

/* What stands before the bytes of a streak, from `at` on. */
static bool open_streak(dt_delta_reader *r, const uint8_t *at)
{
    uint32_t count;
    if (r->end - at < (ptrdiff_t)DELTA_STREAK_HEAD)
        return false;
    memcpy(&count, at, 4);
    uint32_t padding = at[4];
    at += DELTA_STREAK_HEAD;
    if (!count || padding > DELTA_MOST_PADDING || (uint64_t)(r->end - at) < padding + (uint64_t)count * DELTA_BLOCK)
        return false;
    for (; padding; padding--)
        if (*at++)
            return false;
    r->data = at;
    r->list = at + (uint64_t)count * DELTA_BLOCK;
    r->streak = count;
    return (r->list = dt_delta_get_number(r->list, r->end, &r->run)) && r->run && r->run <= count;
}

/* The next block of a streak, which begins `gap` blocks after the last one where it is the streak's first. */
static bool next_of_streak(dt_delta_reader *r, dt_delta_block *b, uint64_t gap)
{
    if (!r->run && (!(r->list = dt_delta_get_number(r->list, r->end, &gap)) || !gap ||
                    !(r->list = dt_delta_get_number(r->list, r->end, &r->run)) || !r->run || r->run > r->streak))
        return false;
    if (gap >= r->blocks - r->next) /* next is at most blocks */
        return false;
    uint64_t block = r->next + gap;
    b->start = dt_delta_block_start(&r->grid, block);
    if (dt_delta_block_end(&r->grid, block) - b->start != DELTA_BLOCK)
        return false;
    b->bytes = b->changed_bytes = DELTA_BLOCK;
    b->granules = DELTA_BLOCK >> r->grid.shift;
    memset(b->mask, 0, (b->granules + 63) / 64 * sizeof *b->mask);
    dt_delta_mask_set(b->mask, 0, b->granules);
    b->data = r->data;
    r->data += DELTA_BLOCK;
    r->next = block + 1;
    r->run--;
    if (!--r->streak)
        r->at = r->list;
    return true;
}

int dt_delta_next(dt_delta_reader *r, dt_delta_block *b, dt_failure *why)
{
    uint64_t opening;
    if (r->streak)
        return next_of_streak(r, b, 0) ? 1 : malformed(r, why);
    if (r->at == r->end)
        return 0;
    const uint8_t *at = dt_delta_get_number(r->at, r->end, &opening);
    if (!at || opening >> 3 >= r->blocks - r->next) /* next is at most blocks */
        return malformed(r, why);
    if ((opening & 7) == DELTA_STREAK)
        return open_streak(r, at) && next_of_streak(r, b, opening >> 3) ? 1 : malformed(r, why);
    uint64_t block = r->next + (opening >> 3);
    b->start = dt_delta_block_start(&r->grid, block);
    b->bytes = (uint32_t)(dt_delta_block_end(&r->grid, block) - b->start);
    uint32_t n = b->granules = dt_delta_granules(&r->grid, b->bytes);
    switch (opening & 7) {
    case DELTA_FULL:
        memset(b->mask, 0, (n + 63) / 64 * sizeof *b->mask);
        dt_delta_mask_set(b->mask, 0, n);
        break;
    case DELTA_RUNS:
        at = get_runs(at, r->end, b->mask, n);
        break;
    case DELTA_BITMAP:
        at = get_bitmap(at, r->end, b->mask, n);
        break;
    case DELTA_ONES:
        at = get_list(at, r->end, b->mask, n, 0);
        break;
    case DELTA_ZEROS:
        at = get_list(at, r->end, b->mask, n, ~UINT64_C(0));
        break;
    default:
        at = NULL;
    }
    if (!at)
        return malformed(r, why);
    uint32_t set = (opening & 7) == DELTA_FULL ? n : count(b->mask, n).set;
    uint64_t changed = (uint64_t)set << r->grid.shift, whole = (uint64_t)n << r->grid.shift;
    if (b->mask[(n - 1) / 64] >> ((n - 1) & 63) & 1) /* the last granule may be short */
        changed -= whole - b->bytes;
    if (!set || (uint64_t)(r->end - at) < changed)
        return malformed(r, why);
    b->changed_bytes = (uint32_t)changed;
    b->data = at;
    r->at = at + changed;
    r->next = block + 1;
    return 1;
}

/* ---- XXH64, by its specification ---- */

/* The hardware's own guess ends with the page. */
#define AHEAD_BYTES 4096
#define P1 UINT64_C(0x9E3779B185EBCA87)
#define P2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define P3 UINT64_C(0x165667B19E3779F9)
#define P4 UINT64_C(0x85EBCA77C2B2AE63)
#define P5 UINT64_C(0x27D4EB2F165667C5)

static uint64_t rotated(uint64_t x, unsigned by) { return x << by | x >> (64 - by); }
static uint64_t word_at(const uint8_t *at)
{
    uint64_t x;
    memcpy(&x, at, 8);
    return x;
}
static uint64_t mixed(uint64_t lane, uint64_t word) { return rotated(lane + word * P2, 31) * P1; }

void dt_xxh64_begin(dt_xxh64_parts *parts, uint64_t seed)
{
    *parts = (dt_xxh64_parts){{seed + P1 + P2, seed + P2, seed, seed - P1}, 0};
}

void dt_xxh64_add(dt_xxh64_parts *parts, const uint8_t *at, uint64_t length)
{
    uint64_t lane[4];
    memcpy(lane, parts->lane, sizeof lane); /* so that they live in registers */
    for (const uint8_t *end = at + dt_down(length, 32); at < end; at += 32) {
        __builtin_prefetch(at + AHEAD_BYTES);
        for (unsigned i = 0; i < 4; i++)
            lane[i] = mixed(lane[i], word_at(at + 8 * i));
    }
    memcpy(parts->lane, lane, sizeof lane);
    parts->length += dt_down(length, 32);
}

void dt_xxh64_copy(dt_xxh64_parts *parts, uint8_t *out, const uint8_t *at, uint64_t length)
{
    uint64_t lane[4];
    memcpy(lane, parts->lane, sizeof lane);
    for (const uint8_t *end = at + dt_down(length, 32); at < end; at += 32, out += 32) {
        __builtin_prefetch(at + AHEAD_BYTES);
        for (unsigned i = 0; i < 4; i++) {
            /* Read once: another thread may write it meanwhile, and what is copied is what is added. */
            struct { uint64_t word; } __attribute__((packed, may_alias)) volatile const *from = (const void *)(at + 8 * i);
            uint64_t word = from->word;
            memcpy(out + 8 * i, &word, 8);
            lane[i] = mixed(lane[i], word);
        }
    }
    memcpy(parts->lane, lane, sizeof lane);
    parts->length += dt_down(length, 32);
}

uint64_t dt_xxh64_end(dt_xxh64_parts *parts, const uint8_t *at, uint64_t length)
{
    dt_xxh64_add(parts, at, length);
    const uint8_t *end = at + length;
    const uint64_t *lane = parts->lane;
    uint64_t h = lane[2] + P5; /* the seed, where there was nothing to mix in */
    at += dt_down(length, 32);
    if (parts->length) {
        h = rotated(lane[0], 1) + rotated(lane[1], 7) + rotated(lane[2], 12) + rotated(lane[3], 18);
        for (unsigned i = 0; i < 4; i++)
            h = (h ^ mixed(0, lane[i])) * P1 + P4;
    }
    h += parts->length + (uint64_t)(end - at);
    for (; end - at >= 8; at += 8)
        h = rotated(h ^ mixed(0, word_at(at)), 27) * P1 + P4;
    if (end - at >= 4) {
        uint32_t half;
        memcpy(&half, at, 4);
        h = rotated(h ^ half * P1, 23) * P2 + P3;
        at += 4;
    }
    for (; at < end; at++)
        h = rotated(h ^ *at * P5, 11) * P1;
    h = (h ^ h >> 33) * P2;
    h = (h ^ h >> 29) * P3;
    return h ^ h >> 32;
}

uint64_t dt_xxh64(const uint8_t *data, uint64_t length, uint64_t seed)
{
    dt_xxh64_parts parts;
    dt_xxh64_begin(&parts, seed);
    return dt_xxh64_end(&parts, data, length);
}

uint64_t dt_delta_checksum(const uint8_t *delta, uint64_t length)
{
    return dt_xxh64(delta + DELTA_HEADER, length - DELTA_HEADER, dt_xxh64(delta, 16, 0));
}
