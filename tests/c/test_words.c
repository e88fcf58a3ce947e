/* SPDX-License-Identifier: MIT
 * Slots, cards and object starts without Python: each way to scan, each format, odd lengths and addresses, against loops over
 * single words; and memory that vanishes. */
#include "checking.h"
#include "words.h"
#include <unistd.h>

#pragma weak dt_session_open
__attribute__((weak)) void dt_session_give_back(dt_block *block) { (void)block; }
__attribute__((weak)) void dt_block_release(dt_block *block) { (void)block; }

enum { PAGES = 16 };
#define YOUNG UINT64_C(0x700000000000)
#define YOUNG_END (YOUNG + 0x100000)

static bool points(const dt_pointers *p, uint64_t word, uint64_t low, uint64_t high)
{
    uint64_t target = p->compressed ? p->base + (word << p->shift) : word & ~p->strip;
    return target >= low && target < high && (p->compressed ? word != 0 : (word & p->mask) == p->tag);
}

static dt_pointers some_format(void)
{
    switch (random_below(6)) {
    case 0: return (dt_pointers){0};
    case 1: return (dt_pointers){.mask = 7};
    case 2: return (dt_pointers){.strip = 7};
    case 3: return (dt_pointers){.strip = 7, .mask = 7, .tag = 1 + random_below(7)};
    case 4: return (dt_pointers){.strip = 0xFFFFull << 48, .mask = 0xFFFFull << 48, .tag = 0xFFF9ull << 48};
    default: return (dt_pointers){.compressed = 1, .base = random_below(2) ? YOUNG : YOUNG - (1ull << 33),
                                  .shift = (uint32_t)random_below(5)};
    }
}

static uint64_t some_word(const dt_pointers *p)
{
    uint64_t near[] = {YOUNG - 8, YOUNG, YOUNG + 8, YOUNG_END - 8, YOUNG_END, YOUNG_END - 1, 0, ~UINT64_C(0), YOUNG / 2};
    uint64_t target = near[random_below(sizeof near / sizeof *near)];
    if (random_below(4) == 0)
        target = YOUNG + random_below(YOUNG_END - YOUNG);
    if (p->compressed)
        return random_below(8) ? (target - p->base) >> p->shift & 0xFFFFFFFF : random_below(1ull << 32);
    return random_below(4) ? (target & ~p->strip) | p->tag : target | (random_below(8));
}

/* A memory that ends where its mapping does, some pages of it in a set. */
typedef struct heap {
    uint8_t *memory;
    dt_set set;
    dt_run runs[PAGES];
    dt_extent extents[2];
    uint64_t n;
} heap;

static void fill(heap *h, const dt_pointers *p, uint8_t *memory)
{
    uint64_t width = p->compressed ? 4 : 8, step = 1 + random_below(200);
    memset(h, 0, sizeof *h);
    h->memory = memory;
    for (uint64_t at = 0; at < PAGES * page_bytes; at += width) {
        uint64_t word = random_below(step) ? random_below(1ull << 32) : some_word(p);
        memcpy(memory + at, &word, width);
    }
    h->set.runs = h->runs;
    for (uint64_t page = 0; page < PAGES; page++)
        if (random_below(3))
            dt_set_append(&h->set, (uintptr_t)memory + page * page_bytes, (uintptr_t)memory + (page + 1) * page_bytes);
    uint64_t from = random_below(2 * page_bytes), gap = 5 * page_bytes + random_below(page_bytes);
    uint64_t end = PAGES * page_bytes - (random_below(2) ? 0 : random_below(page_bytes));
    if (random_below(2))
        from = 0;
    h->extents[0] = (dt_extent){.address = (uintptr_t)memory + from, .nbytes = gap - from};
    h->extents[1] = (dt_extent){.address = (uintptr_t)memory + gap, .nbytes = end - gap, .unpinned = 1};
    h->n = 2;
    if (random_below(4) == 0) {
        h->extents[0].nbytes = end - from;
        h->n = 1;
    }
}

static void check_search(const heap *h, const dt_pointers *p, dt_slots *slots)
{
    uint64_t width = p->compressed ? 4 : 8, next = 0;
    uint64_t low = YOUNG + random_below(2) * random_below(1000), high = random_below(2) ? YOUNG_END : low + random_below(1000);
    dt_run young = {YOUNG, YOUNG_END};
    dt_set kept = {0};
    CHECK(dt_find_slots(&h->set, h->extents, h->n, p, &young, low, high, slots, &kept) == 0);
    bool right = true;
    for (uint64_t i = 0; i < h->n; i++) {
        uint64_t first = dt_up(h->extents[i].address, width), end = h->extents[i].address + h->extents[i].nbytes;
        for (uint64_t at = first; at + width <= end; at += width) {
            uint64_t word = 0;
            memcpy(&word, (void *)(uintptr_t)at, width);
            if (!dt_set_contains(&h->set, at) || !points(p, word, YOUNG, YOUNG_END))
                continue;
            right = right && dt_set_contains(&kept, at);
            if (points(p, word, low, high)) {
                uint64_t target = p->compressed ? p->base + (word << p->shift) : word & ~p->strip;
                right = right && next < slots->count && slots->addresses[next] == at && slots->targets[next] == target;
                next++;
            }
        }
    }
    CHECK(right && next == slots->count);
    CHECK(dt_set_subset(&kept, &h->set));
    dt_set_clear(&kept);
}

static void test_searches(void)
{
    uint8_t *memory = map_pages(PAGES + 1);
    mprotect(memory + PAGES * page_bytes, page_bytes, PROT_NONE); /* nothing is read beyond the end */
    dt_slots slots = {0};
    for (int way = -1; way < (int)dt_words_ways(); way++) {
        if (way >= 0 && !dt_words_way_works((unsigned)way))
            continue;
        dt_words_use_way(way);
        for (unsigned round = 0; round < 150; round++) {
            heap h;
            dt_pointers p = some_format();
            fill(&h, &p, memory);
            check_search(&h, &p, &slots);
        }
    }
    dt_words_use_way(-1);
    dt_slots_clear(&slots);
    CHECK(!slots.addresses && !slots.room);
    munmap(memory, (PAGES + 1) * page_bytes);
}

static void test_every_word_of_a_page(void)
{
    uint64_t *memory = (uint64_t *)map_pages(1);
    dt_run run = {(uintptr_t)memory, (uintptr_t)memory + page_bytes}, young = {YOUNG, YOUNG_END};
    dt_set set = {.runs = &run, .count = 1}, kept = {0};
    dt_extent extent = {.address = run.start, .nbytes = page_bytes};
    dt_pointers p = {0};
    dt_slots slots = {0};
    for (unsigned way = 0; way < dt_words_ways(); way++) {
        if (!dt_words_way_works(way))
            continue;
        dt_words_use_way((int)way);
        for (uint64_t i = 0; i < page_bytes / 8; i++) {
            memory[i] = YOUNG;
            CHECK(!dt_find_slots(&set, &extent, 1, &p, &young, YOUNG, YOUNG_END, &slots, &kept) && slots.count == 1 &&
                  slots.addresses[0] == (uintptr_t)(memory + i) && kept.pages == page_bytes / dt_page_bytes());
            dt_set_clear(&kept);
            memory[i] = 0;
        }
        memset(memory, 0x70, page_bytes);
        for (uint64_t i = 0; i < page_bytes / 8; i++)
            memory[i] = YOUNG + i;
        CHECK(!dt_find_slots(&set, &extent, 1, &p, &young, YOUNG, YOUNG_END, &slots, &kept) &&
              slots.count == page_bytes / 8);
        dt_set_clear(&kept);
        memset(memory, 0, page_bytes);
    }
    dt_words_use_way(-1);
    dt_slots_clear(&slots);
    munmap(memory, page_bytes);
}

static void test_redirecting(void)
{
    uint8_t *memory = map_pages(PAGES);
    dt_slots slots = {0};
    for (unsigned round = 0; round < 200; round++) {
        heap h;
        dt_pointers p = some_format();
        fill(&h, &p, memory);
        dt_run young = {YOUNG, YOUNG_END};
        dt_set kept = {0};
        CHECK(!dt_find_slots(&h.set, h.extents, h.n, &p, &young, YOUNG, YOUNG_END, &slots, &kept));
        dt_set_clear(&kept);
        uint64_t *targets = malloc((slots.count + 1) * 8), count = slots.count, unit = p.compressed ? 1ull << p.shift : 8;
        for (uint64_t i = 0; i < count; i++) /* beyond the young memory, with the same tag */
            targets[i] = dt_up(YOUNG_END, unit) + i * unit;
        CHECK(!dt_redirect_slots(h.extents, h.n, &p, slots.addresses, targets, count, NULL));
        bool right = true;
        for (uint64_t i = 0; i < count; i++) {
            uint64_t word = 0;
            memcpy(&word, (void *)(uintptr_t)slots.addresses[i], p.compressed ? 4 : 8);
            right = right && points(&p, word, targets[i], targets[i] + 1);
        }
        CHECK(right);
        CHECK(!dt_find_slots(&h.set, h.extents, h.n, &p, &young, YOUNG, YOUNG_END, &slots, &kept) && !slots.count);
        dt_set_clear(&kept);
        free(targets);
    }
    dt_extent extent = {.address = (uintptr_t)memory, .nbytes = 64};
    dt_pointers tagged = {.strip = 7, .mask = 7, .tag = 1}, narrow = {.compressed = 1, .base = 1 << 20, .shift = 3};
    uint64_t at = (uintptr_t)memory + 8, beyond = at + 56, odd = at + 4;
    uint64_t bad = 0x1001, before = 1 << 19, between = (1 << 20) + 4, far = (1 << 20) + (1ull << 36), good = 0x2000;
    dt_failure why;
    CHECK(dt_redirect_slots(&extent, 1, &tagged, &at, &bad, 1, &why) == -EINVAL && why.start == at);
    CHECK(dt_redirect_slots(&extent, 1, &narrow, &at, &before, 1, &why) == -EINVAL);
    CHECK(dt_redirect_slots(&extent, 1, &narrow, &at, &between, 1, &why) == -EINVAL);
    CHECK(dt_redirect_slots(&extent, 1, &narrow, &at, &far, 1, &why) == -EINVAL);
    CHECK(dt_redirect_slots(&extent, 1, &tagged, &beyond, &good, 1, &why) == DT_NOT_WATCHED && why.start == beyond);
    CHECK(dt_redirect_slots(&extent, 1, &tagged, &odd, &good, 1, &why) == DT_NOT_WATCHED);
    dt_slots_clear(&slots);
    munmap(memory, PAGES * page_bytes);
}

static void test_vanishing_and_no_memory(void)
{
    uint8_t *memory = map_pages(4);
    ((uint64_t *)memory)[1] = YOUNG;
    munmap(memory + 2 * page_bytes, page_bytes);
    dt_run run = {(uintptr_t)memory, (uintptr_t)memory + 4 * page_bytes}, young = {YOUNG, YOUNG_END};
    dt_set set = {.runs = &run, .count = 1}, kept = {0};
    dt_extent extent = {.address = run.start, .nbytes = 4 * page_bytes, .unpinned = 1};
    dt_pointers p = {0};
    dt_slots slots = {0};
    CHECK(dt_find_slots(&set, &extent, 1, &p, &young, YOUNG, YOUNG_END, &slots, &kept) == -EFAULT);
    CHECK(kept.why.start == run.start + 2 * page_bytes && !slots.count && !kept.count);
    extent.nbytes = 2 * page_bytes;
    extent.unpinned = 0;
    dt_slots_clear(&slots);
    for (uint64_t nth = 1; nth < 8; nth++) {
        dt_fail(DT_SITE_ALLOCATE, nth, 1, ENOMEM, 0);
        int code = dt_find_slots(&set, &extent, 1, &p, &young, YOUNG, YOUNG_END, &slots, &kept);
        dt_fail(0, 0, 0, 0, 0);
        CHECK(code == -ENOMEM ? !slots.count && !kept.count : code == 0 && slots.count == 1 && kept.pages == 1);
        dt_set_clear(&kept);
        dt_slots_clear(&slots);
    }
    CHECK(dt_find_slots(&set, &extent, 1, &p, &young, YOUNG - 8, YOUNG_END, &slots, &kept) == -EINVAL);
    CHECK(dt_find_slots(&set, &extent, 1, &p, &young, YOUNG_END, YOUNG, &slots, &kept) == -EINVAL);
    p.tag = 1;
    CHECK(dt_find_slots(&set, &extent, 1, &p, &young, YOUNG, YOUNG_END, &slots, &kept) == -EINVAL);
    munmap(memory, 2 * page_bytes);
    munmap(memory + 3 * page_bytes, page_bytes);
}

static void test_pages_of_addresses(void)
{
    for (unsigned round = 0; round < 100; round++) {
        uint64_t addresses[50], n = random_below(50), pages = 0;
        dt_set set = {0};
        for (uint64_t i = 0; i < n; i++)
            addresses[i] = YOUNG + random_below(40) * page_bytes + random_below(page_bytes);
        CHECK(!dt_pages_of(addresses, n, &set));
        for (uint64_t page = 0; page < 40; page++) {
            bool in = false;
            for (uint64_t i = 0; i < n; i++)
                in = in || addresses[i] / page_bytes == YOUNG / page_bytes + page;
            CHECK(dt_set_contains(&set, YOUNG + page * page_bytes) == in);
            pages += in;
        }
        CHECK(set.pages == pages);
        dt_set_clear(&set);
    }
}

static void test_cards(void)
{
    uint8_t *memory = map_pages(PAGES), *mirror = map_pages(PAGES);
    for (unsigned round = 0; round < 200; round++) {
        uint64_t shift = 9 + random_below(6), card = 1ull << shift, from = random_below(3000), end = PAGES * page_bytes - 77;
        uint64_t base = ((uintptr_t)memory + from) & ~(card - 1), count = ((uintptr_t)memory + end - base + card - 1) >> shift;
        uint8_t *table = calloc(count, 1);
        dt_cards cards = {.table = table, .address = base, .shift = (uint32_t)shift};
        heap h;
        dt_pointers p = {0};
        fill(&h, &p, memory);
        dt_cards_mark(&h.set, (uintptr_t)memory + from, (uintptr_t)memory + end, &cards);
        bool right = true;
        for (uint64_t i = 0; i < count; i++) {
            bool dirty = false;
            for (uint64_t at = dt_max(base + i * card, (uintptr_t)memory + from);
                 at < dt_min(base + (i + 1) * card, (uintptr_t)memory + end); at++)
                dirty = dirty || dt_set_contains(&h.set, at);
            right = right && table[i] == dirty;
        }
        CHECK(right);
        memset(table, 0, count);
        memcpy(mirror, memory, PAGES * page_bytes);
        for (uint64_t k = random_below(30); k; k--)
            memory[random_below(PAGES * page_bytes)] ^= 1;
        uint8_t *expected = calloc(count, 1);
        for (uint64_t i = from; i < end; i++)
            if (memory[i] != mirror[i] && dt_set_contains(&h.set, (uintptr_t)memory + i))
                expected[((uintptr_t)memory + i - base) >> shift] = 1;
        dt_extent extent = {.address = (uintptr_t)memory + from, .nbytes = end - from, .mirror = mirror + from,
                            .unpinned = random_below(2)};
        int mark = random_below(4) != 0;
        CHECK(!dt_cards_compare(&h.set, &extent, &cards, mark, NULL));
        for (uint64_t i = from; i < end; i++)
            right = right && (memory[i] == mirror[i] || !dt_set_contains(&h.set, (uintptr_t)memory + i));
        CHECK(right);
        if (!mark)
            memset(expected, 0, count);
        CHECK(!memcmp(table, expected, count));
        uint64_t addresses[2], runs = 0, dirty = 0;
        dt_run *found = malloc((count + 1) * sizeof *found);
        uint64_t n = dt_cards_runs(&cards, count, found, count + 1);
        for (uint64_t i = 0; i < count; i++) {
            dirty += expected[i];
            if (expected[i] && (!i || !expected[i - 1]))
                right = right && runs < n && found[runs++].start == base + i * card;
            if (!expected[i] && i && expected[i - 1])
                right = right && found[runs - 1].end == base + i * card;
        }
        CHECK(right && runs == n && dt_cards_dirty(&cards, count, addresses, 2) == dirty);
        free(found);
        free(expected);
        free(table);
    }
    munmap(memory, PAGES * page_bytes);
    munmap(mirror, PAGES * page_bytes);
}

static void test_starts(void)
{
    enum { UNITS = 9000 };
    for (unsigned round = 0; round < 60; round++) {
        uint32_t shift = 3 + (uint32_t)random_below(3);
        uint64_t nbytes = (UNITS << shift) - random_below(1u << shift), base = YOUNG, told[64];
        dt_starts map = {.bits = calloc(dt_starts_bits(nbytes, shift), 1), .summary = calloc(dt_starts_summary(nbytes, shift), 1),
                         .address = base, .end = base + nbytes, .shift = shift};
        uint8_t *model = calloc(UNITS, 1);
        for (uint64_t k = random_below(40); k; k--) {
            uint64_t unit = random_below(UNITS), at = base + (unit << shift), other = random_below(UNITS);
            if (random_below(5)) {
                CHECK(!dt_starts_add(&map, &at, 1, NULL));
                model[unit] = 1;
            } else {
                dt_starts_clear(&map, at, base + (other << shift));
                for (uint64_t i = unit; i < other; i++)
                    model[i] = 0;
            }
        }
        uint64_t last = UINT64_MAX, found;
        for (uint64_t i = 0; i < UNITS; i++) {
            last = model[i] ? i : last;
            int code = dt_starts_at(&map, base + (i << shift), &found);
            CHECK(last == UINT64_MAX ? code == -ENOENT : code == 0 && found == base + (last << shift));
        }
        dt_run whole = {base - 4096, base + nbytes + 4096};
        uint64_t n = dt_starts_in(&map, &whole, 1, told, 64), k = 0;
        for (uint64_t i = 0; i < UNITS; i++)
            if (model[i])
                CHECK(k < n && told[k++] == base + (i << shift));
        CHECK(k == n);
        uint64_t wrong = base + nbytes + 8, between = base + 4;
        dt_failure why;
        CHECK(dt_starts_add(&map, &wrong, 1, &why) == -EINVAL && dt_starts_add(&map, &between, 1, &why) == -EINVAL);
        free(model);
        free(map.bits);
        free(map.summary);
    }
}

int main(void)
{
    page_bytes = dt_page_bytes();
    test_searches();
    test_every_word_of_a_page();
    test_redirecting();
    test_vanishing_and_no_memory();
    test_pages_of_addresses();
    test_cards();
    test_starts();
    return outcome();
}
