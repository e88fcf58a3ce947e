/* SPDX-License-Identifier: MIT
 * Run algebra and the parts of a set. Each answer is compared with one found in another, simpler way. */
#include "model.h"

/* Where the engine's files are not linked in; what stands here then tells where a block went. */
#pragma weak dt_session_open
static dt_block *given_back, *released;
__attribute__((weak)) void dt_session_give_back(dt_block *block) { given_back = block; }
__attribute__((weak)) void dt_block_release(dt_block *block) { released = block; }

#define BASE ((uint64_t)1 << 32)
static uint64_t address_of(uint64_t page) { return BASE + page * page_bytes; }

static dt_set set_of(const model *m)
{
    dt_run runs[PAGES];
    uint64_t n = 0;
    dt_set set = {0};
    for (unsigned i = 0; i < PAGES; i++)
        if (m->page[i])
            runs[n++] = (dt_run){address_of(i), address_of(i + 1)}; /* touching: dt_set_copy coalesces */
    CHECK(dt_set_copy(runs, n, &set) == 0);
    return set;
}

static bool matches(const dt_set *set, const model *m)
{
    model seen = {{0}};
    uint64_t pages = 0;
    for (uint64_t i = 0; i < set->count; i++) {
        if (set->runs[i].start >= set->runs[i].end || (i && set->runs[i].start <= set->runs[i - 1].end))
            return false; /* empty, unsorted, overlapping or touching */
        for (uint64_t a = set->runs[i].start; a < set->runs[i].end; a += page_bytes, pages++)
            seen.page[(a - BASE) / page_bytes] = 1;
    }
    return set->runs && set->pages == pages && !memcmp(&seen, m, sizeof seen);
}

static void test_algebra(void)
{
    for (int round = 0; round < 3000; round++) {
        model x = random_model(), y = random_model(), both, either, less;
        dt_set a = set_of(&x), b = set_of(&y), out = {0};
        bool subset = true;
        for (unsigned i = 0; i < PAGES; i++) {
            both.page[i] = x.page[i] & y.page[i];
            either.page[i] = x.page[i] | y.page[i];
            less.page[i] = x.page[i] & !y.page[i];
            subset = subset && x.page[i] <= y.page[i];
        }
        a.epoch = random_below(9);
        b.epoch = random_below(9);
        a.complete = (uint32_t)random_below(2);
        CHECK(matches(&a, &x) && matches(&b, &y));
        CHECK(!dt_set_union(&a, &b, &out) && matches(&out, &either));
        CHECK(out.epoch == dt_max(a.epoch, b.epoch) && out.complete == a.complete && !out.delivered);
        CHECK(dt_set_subset(&a, &out) && dt_set_subset(&b, &out));
        dt_set_clear(&out);
        CHECK(!dt_set_intersection(&a, &b, &out) && matches(&out, &both) && dt_set_subset(&out, &a));
        dt_set_clear(&out);
        CHECK(!dt_set_difference(&a, &b, &out) && matches(&out, &less));
        dt_set_clear(&out);
        CHECK(dt_set_subset(&a, &b) == subset);
        CHECK(dt_set_equal(&a, &b) == !memcmp(&x, &y, sizeof x) && dt_set_equal(&a, &a));
        for (unsigned i = 0; i < PAGES; i++)
            if (dt_set_contains(&a, address_of(i) + random_below(page_bytes)) != x.page[i])
                CHECK(!"contains");

        uint64_t from = random_below(PAGES + 1), to = random_below(PAGES + 1);
        model part = x;
        for (unsigned i = 0; i < PAGES; i++)
            part.page[i] = part.page[i] && i >= from && i < to;
        CHECK(!dt_set_clip(&a, address_of(from), address_of(to), &out) && matches(&out, &part));
        CHECK(out.epoch == a.epoch && out.complete == a.complete);
        dt_set_clear(&out);
        dt_set_clear(&a);
        dt_set_clear(&b);
        CHECK(!a.runs && !a.block_ && !a.count);
    }
}

static void test_union_many(void)
{
    for (int round = 0; round < 300; round++) {
        dt_set sets[11] = {{0}}, out = {0};
        const dt_set *pointers[11];
        uint64_t n = random_below(12), epoch = 0;
        model all = {{0}};
        for (uint64_t k = 0; k < n; k++) {
            model m = random_model();
            sets[k] = set_of(&m);
            sets[k].epoch = random_below(100);
            epoch = dt_max(epoch, sets[k].epoch);
            pointers[k] = sets + k;
            for (unsigned i = 0; i < PAGES; i++)
                all.page[i] |= m.page[i];
        }
        CHECK(!dt_set_union_many(pointers, n, &out) && matches(&out, &all) && out.epoch == epoch && out.complete == 1);
        dt_set_clear(&out);
        for (uint64_t call = 1; call <= 4; call++) { /* each allocation fails once: nothing made, nothing leaked */
            dt_fail(DT_SITE_ALLOCATE, call, 1, ENOMEM, 0);
            int code = dt_set_union_many(pointers, n, &out);
            dt_fail(0, 0, 0, 0, 0);
            CHECK(code == 0 ? matches(&out, &all) : code == -ENOMEM && !out.block_ && out.why.step == DT_STEP_MEMORY);
            dt_set_clear(&out);
        }
        for (uint64_t k = 0; k < n; k++)
            dt_set_clear(sets + k);
    }
}

static void test_copy_validates(void)
{
    uint64_t p = page_bytes;
    dt_run bad[][2] = {{{1, p}, {2 * p, 3 * p}},          {{0, p + 1}, {2 * p, 3 * p}}, {{p, p}, {2 * p, 3 * p}},
                       {{2 * p, p}, {3 * p, 4 * p}},      {{2 * p, 3 * p}, {0, p}},     {{0, 2 * p}, {p, 3 * p}}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        dt_set out = {0};
        CHECK(dt_set_copy(bad[i], 2, &out) == -EINVAL && !out.block_);
    }
    dt_set empty = {0}, zero = {0}, out = {0};
    CHECK(!dt_set_copy(NULL, 0, &empty) && empty.runs && !empty.count);
    CHECK(dt_set_equal(&empty, &zero) && dt_set_subset(&zero, &empty) && !dt_set_contains(&zero, 0));
    CHECK(!dt_set_union(&zero, &zero, &out) && out.runs && !out.count);
    dt_set_clear(&out);
    CHECK(!dt_set_difference(&zero, &empty, &out) && !out.count);
    dt_set_clear(&out);
    CHECK(!dt_set_clip(&zero, 0, p, &out) && !out.count);
    dt_set_clear(&out);
    dt_set_clear(&empty);
    dt_set_clear(&zero);
    dt_set_clear(&zero);

    CHECK(dt_set_reserve(&zero, UINT64_MAX / 2) == -ENOMEM && dt_set_reserve(&zero, UINT64_MAX) == -ENOMEM &&
          !zero.block_);
}

static void test_ownership(void)
{
    if (dt_session_open)
        return; /* the blocks go to the engine, whose own tests follow them */
    dt_set set = {0};
    dt_listener *listener = (dt_listener *)&set; /* never looked into here */
    CHECK(!dt_set_reserve(&set, 1));
    dt_set_append(&set, 0, page_bytes);
    dt_block *block = set.block_;
    block->listener = listener;
    dt_set_clear(&set);
    CHECK(given_back == block && block->count == 1 && !released && !set.block_);
    set.block_ = block;
    set.runs = block->runs;
    set.delivered = 1;
    given_back = NULL;
    dt_set_clear(&set);
    CHECK(released == block && !given_back && !set.block_);
    dt_free(block);
}

static void test_growth(void)
{
    dt_set set = {0};
    uint64_t grows = 0; /* geometric: a million appends one by one grow it a few times */
    for (uint64_t i = 0; i < 1000000; i++) {
        void *before = set.block_;
        uint64_t room = before ? ((dt_block *)before)->capacity : 0;
        if (dt_set_reserve(&set, set.count + 1))
            abort();
        grows += ((dt_block *)set.block_)->capacity != room;
        dt_set_append(&set, 2 * i * page_bytes, (2 * i + 1) * page_bytes);
    }
    CHECK(set.count == 1000000 && grows < 25);
    dt_fail(DT_SITE_ALLOCATE, 1, 0, ENOMEM, 0);
    void *block_before = set.block_;
    CHECK(dt_set_reserve(&set, UINT64_C(1) << 22) == -ENOMEM && set.block_ == block_before && set.count == 1000000);
    dt_fail(0, 0, 0, 0, 0);
    dt_set_clear(&set);
}

static void test_where(void)
{
    for (int round = 0; round < 1500; round++) {
        model m = random_model();
        dt_set set = set_of(&m);
        uint64_t total = PAGES * page_bytes;
        uint64_t address = BASE + random_below(total), nbytes = random_below(BASE + total - address + 1);

        dt_run runs[PAGES + 1];
        uint64_t n = dt_set_offsets(&set, address, nbytes, runs, PAGES), few = random_below(n + 1);
        bool good = true;
        for (uint64_t i = 0, k = 0; i < nbytes && good; k++) { /* walk page by page, runs in step */
            uint64_t at = address + i, next = dt_min(dt_down(at, page_bytes) + page_bytes - address, nbytes);
            bool covered = false;
            for (uint64_t r = 0; r < n; r++)
                covered = covered || (runs[r].start <= i && next <= runs[r].end);
            good = covered == m.page[(at - BASE) / page_bytes];
            i = next;
        }
        for (uint64_t r = 0; r < n; r++)
            good = good && runs[r].start < runs[r].end && runs[r].end <= nbytes &&
                (!r || runs[r - 1].end < runs[r].start);
        CHECK(good);
        dt_run cut[PAGES + 1];
        memset(cut, 0xAA, sizeof cut);
        CHECK(dt_set_offsets(&set, address, nbytes, cut, few) == n && !memcmp(cut, runs, few * sizeof *cut));
        CHECK(cut[few].start == 0xAAAAAAAAAAAAAAAAu);

        uint64_t from = random_below(PAGES), to = from + random_below(PAGES - from + 1), want = 0;
        uint64_t pages[PAGES + 1];
        uint8_t bits[PAGES / 8 + 2];
        memset(bits, 0xAA, sizeof bits);
        n = dt_set_pages(&set, address_of(from), address_of(to), pages, PAGES);
        dt_set_bitmap(&set, address_of(from), address_of(to), bits);
        good = true;
        for (uint64_t i = 0; i < (to - from + 7) / 8 * 8; i++) {
            bool dirty = from + i < to && m.page[from + i];
            good = good && ((bits[i / 8] >> (i % 8)) & 1) == dirty;
            if (dirty)
                good = good && want < n && pages[want++] == i;
        }
        CHECK(good && want == n && bits[(to - from + 7) / 8] == 0xAA);
        few = random_below(n + 1);
        pages[few] = 0xAAAA;
        CHECK(dt_set_pages(&set, address_of(from), address_of(to), pages, few) == n && pages[few] == 0xAAAA);

        dt_run spans[PAGES];
        uint64_t counts[PAGES + 1], spans_made = 0;
        for (uint64_t at = random_below(3); at < PAGES && spans_made < PAGES;) { /* some touch, some are apart */
            uint64_t until = dt_min(at + 1 + random_below(round % 2 ? 3 : PAGES), PAGES);
            spans[spans_made++] = (dt_run){address_of(at), address_of(until)};
            at = until + random_below(3);
        }
        counts[spans_made] = 0xAAAA;
        good = !dt_set_counts(&set, spans, spans_made, counts) && counts[spans_made] == 0xAAAA;
        for (uint64_t k = 0; k < spans_made; k++) {
            want = 0;
            for (uint64_t at = spans[k].start; at < spans[k].end; at += page_bytes)
                want += m.page[(at - BASE) / page_bytes];
            good = good && counts[k] == want;
        }
        CHECK(good);
        if (spans_made > 1) {
            spans[0].end = spans[1].start + page_bytes; /* no longer disjoint, or not in order */
            CHECK(dt_set_counts(&set, spans, spans_made, counts) == -EINVAL);
        }

        uint64_t stride = 1 + random_below(3 * page_bytes), row = random_below(round % 3 ? stride + 1 : 4 * stride);
        uint64_t rows = row < total ? random_below((total - row) / stride + 1) : 0;
        static uint64_t numbers[PAGES * 4096];
        if (rows > PAGES * 4096)
            rows = PAGES * 4096;
        address = BASE + random_below(total - (rows ? (rows - 1) * stride + row : 0) + 1);
        if (rows * (row + 1) > 40 * total) /* keep the brute force short */
            rows /= 50;
        n = dt_set_rows(&set, address, stride, row, rows, numbers, PAGES * 4096);
        want = 0;
        good = true;
        for (uint64_t i = 0; i < rows; i++) {
            bool touched = false;
            uint64_t start = address + i * stride;
            if (row)
                for (uint64_t p = (start - BASE) / page_bytes; p <= (start + row - 1 - BASE) / page_bytes &&
                    p < PAGES; p++)
                    touched = touched || m.page[p];
            if (touched)
                good = good && want < n && numbers[want++] == i;
        }
        CHECK(good && want == n);
        dt_set_clear(&set);
    }
}

int main(void)
{
    page_bytes = dt_page_bytes();
    test_algebra();
    test_union_many();
    test_copy_validates();
    test_ownership();
    test_growth();
    test_where();
    return outcome();
}
