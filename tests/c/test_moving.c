/* SPDX-License-Identifier: MIT
 * Pages on the move: taken from one memory and put into another, whatever their places in their pages. */
#include "moving.h"
#include <string.h>

enum { ROOM = 16, MOST_BYTES = 40 * 4096 };

typedef struct side {
    uint8_t *bytes;
    uint64_t table[2 * 64];
    dt_moving moving;
    dt_sent sent;
    uint64_t sent_table[2 * 64];
    uint8_t packed[ROOM * 4098];
} side;

static void set_up(side *s, uint8_t *bytes, uint64_t nbytes, uint64_t phase)
{
    s->bytes = bytes;
    s->moving = moving_over(bytes, nbytes, phase, s->table);
    memcpy(s->sent_table, s->table, sizeof s->sent_table);
    s->sent = (dt_sent){NULL, s->sent_table, s->packed, 0};
}

/* Puts what was taken straight into its place, first with one bit of it wrong. False where it must not. */
static bool in_place(side *to, const dt_stretch *stretches, const dt_moved *moved, const uint64_t *digests, const uint8_t *data)
{
    dt_failure why = {0};
    uint64_t places[ROOM], pages = to->moving.pages, bit = random_below(moved->data_pages * page_bytes * 8 + 1);
    bool whole = !to->moving.memory.unpinned || !moved->stretches;
    for (uint64_t i = 0; i < moved->stretches; i++)
        if (stretches[i].kind == DT_STRETCH_DATA)
            whole &= (stretches[i].first || !to->moving.phase) &&
                     (stretches[i].first + stretches[i].count < pages ||
                      (to->moving.phase + to->moving.memory.nbytes) % page_bytes == 0);
    int rc = dt_moving_expect(&to->moving, stretches, moved->stretches, places, &why);
    CHECK(rc == (whole ? 0 : DT_TOO_SMALL));
    for (uint64_t i = 0, k = 0; !rc && i < moved->stretches; i++) {
        CHECK(!places[i] == (stretches[i].kind != DT_STRETCH_DATA));
        for (uint64_t p = 0; places[i] && p < stretches[i].count; p++, k++) {
            uint64_t *known = to->table + 2 * (stretches[i].first + p);
            CHECK(!known[0] && !known[1]);
            memcpy((uint8_t *)places[i] + p * page_bytes, data + k * page_bytes, page_bytes);
        }
    }
    if (rc || !moved->data_pages)
        return !rc && !dt_moving_put(&to->moving, stretches, moved->stretches, digests, NULL, 0, &why);
    for (uint64_t i = 0, k = 0; i < moved->stretches && bit < moved->data_pages * page_bytes * 8; i++)
        for (uint64_t p = 0; places[i] && p < stretches[i].count; p++, k++) {
            if (k != bit / 8 / page_bytes)
                continue;
            uint8_t *wrong = (uint8_t *)places[i] + p * page_bytes + bit / 8 % page_bytes;
            uint64_t *known = to->table + 2 * (stretches[i].first + p);
            *wrong ^= (uint8_t)(1u << bit % 8);
            CHECK(dt_moving_put(&to->moving, stretches, moved->stretches, digests, NULL, moved->data_pages * page_bytes,
                                &why) == DT_MALFORMED);
            CHECK(why.start == k && !known[0] && !known[1]);
            *wrong ^= (uint8_t)(1u << bit % 8);
        }
    CHECK(!dt_moving_put(&to->moving, stretches, moved->stretches, digests, NULL, moved->data_pages * page_bytes, &why));
    return true;
}

/* Takes what the set has, part by part, and puts it; returns how many pages of data there were. */
static uint64_t move(const dt_set *set, side *from, side *to)
{
    static uint8_t data[ROOM * 4096];
    dt_stretch stretches[ROOM];
    uint64_t digests[2 * ROOM], moved_pages = 0;
    dt_failure why = {0};
    for (uint64_t at = set->count ? set->runs[0].start : UINT64_MAX, next; at != UINT64_MAX; at = next) {
        dt_moved moved = {0};
        next = dt_set_step(set, at, 1 + random_below(ROOM));
        dt_sent *sent = from->sent.bytes ? &from->sent : NULL;
        CHECK(!dt_moving_take(&from->moving, set, at, next, stretches, digests, data, ROOM, sent, &moved, &why));
        uint64_t nbytes = moved.data_pages * page_bytes;
        if (sent) { /* what differs says the same */
            static uint8_t opened[ROOM * 4096];
            uint64_t packed = sent->packed_bytes;
            CHECK(packed <= nbytes + 2 * moved.data_pages);
            CHECK(!dt_moving_open(&to->moving, stretches, moved.stretches, sent->packed, packed, opened, nbytes, &why));
            CHECK(!memcmp(opened, data, nbytes));
            CHECK(dt_moving_open(&to->moving, stretches, moved.stretches, sent->packed, packed + 1, opened, nbytes, &why) ==
                  DT_MALFORMED);
            for (int i = 0; packed && i < 20; i++) { /* cut, and nothing is read or written beyond */
                uint64_t length = random_below(packed);
                uint8_t *cut = malloc(length ? length : 1);
                memcpy(cut, sent->packed, length);
                CHECK(dt_moving_open(&to->moving, stretches, moved.stretches, cut, length, opened, nbytes, &why) ==
                      DT_MALFORMED);
                if (length)
                    cut[random_below(length)] ^= (uint8_t)(1u << random_below(8));
                dt_moving_open(&to->moving, stretches, moved.stretches, cut, length, opened, nbytes, &why);
                free(cut);
            }
        }
        if (moved.data_pages) { /* one bit of it, and nothing is written */
            uint64_t bit = random_below(nbytes * 8);
            data[bit / 8] ^= (uint8_t)(1u << bit % 8);
            CHECK(dt_moving_put(&to->moving, stretches, moved.stretches, digests, data, nbytes, &why) == DT_MALFORMED);
            CHECK(why.start == bit / 8 / page_bytes);
            data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
        CHECK(dt_moving_put(&to->moving, stretches, moved.stretches, digests, data, nbytes + 1, &why) == DT_MALFORMED);
        if (random_below(2) || !in_place(to, stretches, &moved, digests, data))
            CHECK(!dt_moving_put(&to->moving, stretches, moved.stretches, digests, data, nbytes, &why));
        moved_pages += moved.data_pages;
    }
    return moved_pages;
}

static void rounds(int count)
{
    uint8_t *memory = map_pages(48), *copy = malloc(MOST_BYTES + 8192);
    for (int round = 0; round < count; round++) {
        uint64_t phase = random_below(2) ? random_below(page_bytes) : 0, nbytes = 1 + random_below(MOST_BYTES);
        uint64_t shift = random_below(4096);
        side from, to;
        memset(memory, 0, 48 * page_bytes);
        memset(copy, 0xee, MOST_BYTES + 8192);
        memset(copy + shift, 0, nbytes);
        set_up(&from, memory + phase, nbytes, phase);
        set_up(&to, copy + shift, nbytes, phase);
        from.sent.bytes = random_below(2) ? calloc(from.moving.pages, page_bytes) : NULL;
        for (int again = 0; again < 3; again++) {
            dt_run runs[48];
            uint64_t n = 0, changed = 0;
            for (uint64_t p = 0; p < from.moving.pages; p++) {
                uint64_t low = p * page_bytes, high = low + page_bytes;
                if (random_below(3))
                    continue;
                runs[n++] = (dt_run){(uintptr_t)memory + low, (uintptr_t)memory + high};
                if (random_below(4))
                    for (uint64_t i = low; i < high; i += 1 + random_below(300))
                        memory[i] = (uint8_t)random_below(256), changed++;
                else if (random_below(2))
                    memset(memory + low, 0, page_bytes);
            }
            dt_set set = {0};
            CHECK(!dt_set_copy(runs, n, &set));
            move(&set, &from, &to);
            CHECK(!memcmp(from.bytes, to.bytes, nbytes));
            CHECK(!memcmp(from.table, to.table, from.moving.pages * 16));
            for (uint64_t i = 0; i < shift; i++)
                CHECK(copy[i] == 0xee);
            for (uint64_t i = shift + nbytes; i < MOST_BYTES + 8192; i++)
                CHECK(copy[i] == 0xee);
            CHECK(move(&set, &from, &to) == 0); /* nothing that is there already */
            uint64_t at = 0;
            dt_failure why = {0};
            CHECK(!dt_moving_digest(&to.moving, 0, to.moving.pages, 1, &at, &why) && at == to.moving.pages);
            uint64_t hit = random_below(nbytes);
            to.bytes[hit] ^= 1;
            CHECK(!dt_moving_digest(&to.moving, 0, to.moving.pages, 1, &at, &why) && at == (phase + hit) / page_bytes);
            to.bytes[hit] ^= 1;
            dt_set_clear(&set);
        }
        free(from.sent.bytes);
    }
    munmap(memory, 48 * page_bytes);
    free(copy);
}

/* Pages of every sort of difference, and how little is said of them. */
static void differences(int count)
{
    uint8_t *page = malloc(page_bytes), *before = malloc(page_bytes), *packed = malloc(page_bytes + 2);
    for (int round = 0; round < count; round++) {
        for (uint64_t i = 0; i < page_bytes; i++)
            page[i] = before[i] = (uint8_t)random_below(3);
        uint64_t touched = random_below(4) ? random_below(20) : random_below(page_bytes), changed = 0;
        for (uint64_t i = 0; i < touched; i++)
            page[random_below(page_bytes)] ^= (uint8_t)random_below(256);
        for (uint64_t i = 0; i < page_bytes; i += 8)
            changed += memcmp(page + i, before + i, 8) != 0;
        uint64_t length = dt_moving_pack(page, before, page_bytes, packed);
        CHECK(length <= 2 + 12 * changed || length == 2 + page_bytes);
        CHECK(changed > 20 || length <= 2 + 12 * changed);
        uint8_t *exact = malloc(length); /* a sanitizer sees what is read behind it */
        memcpy(exact, packed, length);
        CHECK(dt_moving_unpack(exact, length, before, page_bytes) == length);
        CHECK(!memcmp(page, before, page_bytes));
        free(exact);
        CHECK(dt_moving_pack(page, NULL, page_bytes, packed) == 2 + page_bytes);
    }
    free(page);
    free(before);
    free(packed);
}

static void nonsense(void)
{
    uint8_t *copy = calloc(4, page_bytes), *before = calloc(4, page_bytes);
    side to;
    set_up(&to, copy, 4 * page_bytes, 0);
    for (int round = 0; round < 20000; round++) {
        dt_stretch s[3];
        uint64_t digests[6] = {0};
        for (int i = 0; i < 3; i++)
            s[i] = (dt_stretch){random_below(2) ? random_below(6) : UINT64_MAX - random_below(3),
                                (uint32_t)(random_below(2) ? random_below(6) : UINT32_MAX - random_below(3)),
                                (uint32_t)(random_below(4) ? 1 : random_below(4))};
        dt_failure why = {0};
        uint64_t n = random_below(4);
        uint64_t places[3];
        int code = dt_moving_put(&to.moving, s, n, digests, copy, 0, &why);
        CHECK(code || to.moving.memory.unpinned || !dt_moving_expect(&to.moving, s, n, places, &why));
        CHECK(code == 0 || code == DT_MALFORMED);
        CHECK(!memcmp(copy, before, 4 * page_bytes)); /* zeroes at most */
    }
    free(copy);
    free(before);
}

int main(void)
{
    page_bytes = dt_page_bytes();
    make_key();
    if (page_bytes == 4096)
        rounds(60);
    differences(2000);
    nonsense();
    return outcome();
}
