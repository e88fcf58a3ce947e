/* SPDX-License-Identifier: MIT
 * The core without Python, without sessions: run algebra, bytes of a set, mappings, raw scans. Each answer is compared
 * with one found in another, simpler way. */
#include "internal.h" /* first: it asks for GNU names */
#include "abi.h"
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Where the engine's files are not linked in; what stands here then tells where a block went. */
#pragma weak dt_session_open
static dt_block *given_back, *released;
__attribute__((weak)) void dt_session_give_back(dt_block *block) { given_back = block; }
__attribute__((weak)) void dt_block_release(dt_block *block) { released = block; }

static unsigned passed, failed;
#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (condition) {                                                                        \
            passed++;                                                                           \
        } else {                                                                                \
            failed++;                                                                           \
            fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #condition); \
        }                                                                                       \
    } while (0)

static uint64_t random_state = 0x9E3779B97F4A7C15u;
static uint64_t random_below(uint64_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (random_state >> 11) % n;
}

/* ---- the model: one byte a page ---- */

#define PAGES 192u
#define BASE ((uint64_t)1 << 32)
typedef struct model { uint8_t page[PAGES]; } model;

static uint64_t page_bytes;
static uint64_t address_of(uint64_t page) { return BASE + page * page_bytes; }

static model random_model(void)
{
    model m = {{0}};
    uint64_t density = random_below(6); /* 0: empty, 5: nearly full */
    if (random_below(2)) {
        for (unsigned i = 0; i < PAGES; i++)
            m.page[i] = random_below(5) < density;
    } else {
        for (uint64_t k = 0; k < density; k++)
            for (uint64_t i = random_below(PAGES), n = random_below(40); n-- && i < PAGES; i++)
                m.page[i] = 1;
    }
    return m;
}

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

/* ---- bytes ---- */

static uint8_t *map_pages(uint64_t pages)
{
    uint8_t *p = mmap(NULL, pages * page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        abort();
    return p;
}

static void fill(uint8_t *p, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        p[i] = (uint8_t)random_below(256);
}

/* Sorted, disjoint extents over [0, total) bytes, as offsets; at most `most`. */
static uint64_t random_extents(uint64_t total, dt_extent *extents, uint64_t most)
{
    uint64_t n = 0, at = random_below(3) ? random_below(3 * page_bytes) : 0;
    while (n < most && at < total) {
        uint64_t nbytes = dt_min(random_below(2) ? random_below(9 * page_bytes) : random_below(200), total - at);
        extents[n++] = (dt_extent){.address = at, .nbytes = nbytes};
        at += nbytes + (random_below(2) ? 0 : random_below(2 * page_bytes));
    }
    return n;
}

static void bytes_rounds(int rounds)
{
    enum { MOST = 24 };
    uint64_t total = PAGES * page_bytes;
    uint8_t *memory = map_pages(PAGES), *packed = malloc(total), *want = malloc(total), *mirror = malloc(total);
    uint8_t *model_mirror = malloc(total);
    for (int round = 0; round < rounds; round++) {
        model m = random_model();
        dt_run runs[PAGES];
        uint64_t count = 0, n, expected = 0;
        for (unsigned i = 0; i < PAGES; i++)
            if (m.page[i])
                runs[count++] = (dt_run){(uintptr_t)memory + i * page_bytes, (uintptr_t)memory + (i + 1) * page_bytes};
        dt_set set = {0}, out = {0};
        dt_failure why = {0};
        CHECK(!dt_set_copy(runs, count, &set));
        dt_extent extents[MOST];
        n = random_extents(total, extents, MOST);
        fill(memory, total);
        fill(mirror, total);
        memcpy(model_mirror, mirror, total);
        bool unpinned = random_below(2);
        for (uint64_t k = 0; k < n; k++) {
            for (uint64_t i = extents[k].address; i < extents[k].address + extents[k].nbytes; i++)
                if (m.page[i / page_bytes])
                    want[expected++] = model_mirror[i] = memory[i];
            extents[k].mirror = mirror + extents[k].address;
            extents[k].address += (uintptr_t)memory;
            extents[k].unpinned = unpinned || !random_below(4);
        }
        CHECK(dt_set_nbytes(&set, extents, n) == expected);
        CHECK(!dt_gather(&set, extents, n, packed, expected, &why) && !memcmp(packed, want, expected));
        if (expected)
            CHECK(dt_gather(&set, extents, n, packed, expected - 1, &why) == DT_TOO_SMALL && why.code == DT_TOO_SMALL);

        CHECK(!dt_changed(&set, extents, n, page_bytes, &out)); /* before the copy: nearly all differ */
        dt_set_clear(&out);
        for (uint64_t k = n; k > 1; k--) { /* copy_out takes extents in any order */
            uint64_t j = random_below(k);
            dt_extent swap = extents[k - 1];
            extents[k - 1] = extents[j];
            extents[j] = swap;
        }
        CHECK(!dt_copy_out(&set, extents, n, &why) && !memcmp(mirror, model_mirror, total));
        CHECK(!dt_changed(&set, extents, n, page_bytes, &out) && !out.count && out.runs);
        dt_set_clear(&out);

        /* A few bytes differ: in the set or beside it, in an extent or beside it. */
        model differs = {{0}};
        for (int k = 0; k < 12; k++)
            memory[random_below(total)] ^= 0x55;
        uint64_t granule = (1 + random_below(6)) * page_bytes;
        for (uint64_t k = 0; k < n; k++)
            for (uint64_t i = 0; i < extents[k].nbytes; i++) {
                uint64_t at = extents[k].address + i, page = (at - (uintptr_t)memory) / page_bytes;
                if (!m.page[page] || *(uint8_t *)(uintptr_t)at == ((uint8_t *)extents[k].mirror)[i])
                    continue;
                uint64_t first = at - at % granule;
                for (uint64_t p = 0; p < PAGES; p++) {
                    uint64_t a = (uintptr_t)memory + p * page_bytes;
                    differs.page[p] |= m.page[p] && a >= first && a < first + granule;
                }
            }
        set.epoch = 7;
        CHECK(!dt_changed(&set, extents, n, granule, &out) && out.epoch == 7 && out.complete == set.complete);
        model seen = {{0}};
        for (uint64_t i = 0; i < out.count; i++)
            for (uint64_t a = out.runs[i].start; a < out.runs[i].end; a += page_bytes)
                seen.page[(a - (uintptr_t)memory) / page_bytes]++;
        uint64_t pages = 0;
        for (unsigned p = 0; p < PAGES; p++)
            pages += differs.page[p];
        CHECK(!memcmp(&seen, &differs, sizeof seen) && out.pages == pages);
        dt_set_clear(&out);

        n = random_extents(total, extents, MOST);
        for (uint64_t k = 0; k < n; k++) {
            extents[k].address += (uintptr_t)memory;
            extents[k].unpinned = unpinned;
        }
        expected = dt_set_nbytes(&set, extents, n);
        fill(packed, expected);
        memcpy(want, memory, total);
        for (uint64_t k = 0, at = 0; k < n; k++)
            for (uint64_t i = 0; i < extents[k].nbytes; i++) {
                uint64_t offset = extents[k].address - (uintptr_t)memory + i;
                if (m.page[offset / page_bytes])
                    want[offset] = packed[at++];
            }
        CHECK(!dt_scatter(&set, extents, n, packed, expected, &why) && !memcmp(memory, want, total));
        CHECK(dt_scatter(&set, extents, n, packed, expected + 1, &why) == DT_TOO_SMALL);
        CHECK(!memcmp(memory, want, total));
        dt_set_clear(&set);
    }
    munmap(memory, total);
    free(packed);
    free(want);
    free(mirror);
    free(model_mirror);
}

static void test_bytes(void) { bytes_rounds(250); }

static void test_changed_borders(void)
{
    /* Two extents share a page: it is changed if it differs in either. Mirrors may overlap in address. */
    uint8_t *memory = map_pages(2), mirrors[2][64] = {{0}};
    uint64_t a = (uintptr_t)memory;
    dt_run run = {a, a + 2 * page_bytes};
    dt_set set = {0}, out = {0};
    CHECK(!dt_set_copy(&run, 1, &set));
    dt_extent extents[] = {{a + 100, 64, mirrors[0], 0, 0, NULL}, {a + 50, 64, mirrors[1], 0, 0, NULL}, {a + 10, 9, NULL, 0, 0, NULL}};
    memory[10] = 1; /* in no mirror */
    CHECK(!dt_changed(&set, extents, 3, page_bytes, &out) && out.count == 0);
    dt_set_clear(&out);
    memory[60] = 1; /* only in the second extent */
    CHECK(!dt_changed(&set, extents, 3, page_bytes, &out) && out.count == 1 && out.pages == 1 &&
          out.runs[0].start == a);
    dt_set_clear(&out);
    memory[110] = 1; /* in both */
    CHECK(!dt_copy_out(&set, extents, 3, NULL) && mirrors[0][10] == 1 && mirrors[1][10] == 1 && mirrors[1][60] == 1);
    CHECK(dt_changed(&set, extents, 3, 0, &out) == -EINVAL &&
          dt_changed(&set, extents, 3, page_bytes + 1, &out) == -EINVAL);
    dt_set_clear(&out);
    dt_set_clear(&set);
    munmap(memory, 2 * page_bytes);
}

/* Big runs go through the batches and the bounce buffer; one page is missing. */
static void vanished_rounds(void)
{
    enum { N = 700 };
    uint8_t *memory = map_pages(N), *buffer = malloc(N * page_bytes);
    uint64_t a = (uintptr_t)memory;
    for (int kind = 0; kind < 4; kind++) {
        dt_run runs[N];
        uint64_t count = 0;
        dt_set set = {0}, out = {0};
        if (kind & 1) {
            runs[count++] = (dt_run){a, a + N * page_bytes};
        } else {
            for (uint64_t i = 0; i < N; i += 2)
                runs[count++] = (dt_run){a + i * page_bytes, a + (i + 1) * page_bytes};
        }
        CHECK(!dt_set_copy(runs, count, &set));
        dt_extent extent = {a + 5, N * page_bytes - 12, buffer, 1, 0, NULL};
        uint64_t hole = kind & 2 ? 0 : 566, nbytes = dt_set_nbytes(&set, &extent, 1);
        fill(memory, N * page_bytes);
        dt_failure why = {0};
        CHECK(!dt_copy_out(&set, &extent, 1, &why));
        CHECK(!dt_changed(&set, &extent, 1, page_bytes, &out) && !out.count);
        dt_set_clear(&out);
        munmap(memory + hole * page_bytes, page_bytes);
        uint64_t start = dt_max(a + hole * page_bytes, a + 5), end = a + (hole + 1) * page_bytes;
        CHECK(dt_copy_out(&set, &extent, 1, &why) == -EFAULT);
        CHECK(why.code == -EFAULT && why.os_errno == EFAULT && why.step == DT_STEP_COPY && why.start == start &&
              why.end == end);
        memset(&why, 0, sizeof why);
        CHECK(dt_gather(&set, &extent, 1, buffer, nbytes, &why) == -EFAULT && why.start == start && why.end == end);
        memset(&why, 0, sizeof why);
        CHECK(dt_scatter(&set, &extent, 1, buffer, nbytes, &why) == -EFAULT && why.start == start && why.end == end);
        CHECK(dt_changed(&set, &extent, 1, page_bytes, &out) == -EFAULT && out.why.start == start &&
              out.why.end == end);
        CHECK(!out.block_);
        dt_set_clear(&set);
        if (mmap(memory + hole * page_bytes, page_bytes, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
                 -1, 0) == MAP_FAILED)
            abort();
    }
    munmap(memory, N * page_bytes);

    /* A file cut short beneath its mapping: SIGBUS for whoever touches it. */
    int fd = memfd_create("cut", MFD_CLOEXEC);
    CHECK(fd >= 0 && !ftruncate(fd, (off_t)(4 * page_bytes)));
    memory = mmap(NULL, 4 * page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    a = (uintptr_t)memory;
    memset(memory, 1, 4 * page_bytes);
    dt_run run = {a, a + 4 * page_bytes};
    dt_set set = {0};
    dt_failure why = {0};
    CHECK(!dt_set_copy(&run, 1, &set) && !ftruncate(fd, (off_t)(2 * page_bytes)));
    dt_extent extent = {a, 4 * page_bytes, NULL, 1, 0, NULL};
    CHECK(dt_gather(&set, &extent, 1, buffer, 4 * page_bytes, &why) == -EFAULT && why.start == a + 2 * page_bytes);
    extent.nbytes = 2 * page_bytes;
    CHECK(!dt_gather(&set, &extent, 1, buffer, 4 * page_bytes, &why) && !memcmp(buffer, memory, 2 * page_bytes));
    dt_set_clear(&set);
    munmap(memory, 4 * page_bytes);
    close(fd);
    free(buffer);
}

static void test_vanished(void) { vanished_rounds(); }

/* The same where a filter forbids process_vm_readv: in a child, since a filter stays. */
static void test_vanished_filtered(void)
{
    fflush(NULL);
    pid_t child = fork();
    if (!child) {
        struct sock_filter code[] = {
            BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 1, 0),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_writev, 0, 1),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        struct sock_fprog program = {sizeof code / sizeof *code, code};
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
            _exit(2);
        failed = 0;
        bytes_rounds(40);
        vanished_rounds();
        _exit(failed ? 1 : 0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 2); /* 2: no seccomp here */
}

static void test_copy_faults(void)
{
    uint8_t *memory = map_pages(4), mirror[3] = {0};
    uint64_t a = (uintptr_t)memory;
    dt_run run = {a, a + 4 * page_bytes};
    dt_set set = {0}, out = {0};
    dt_failure why = {0};
    CHECK(!dt_set_copy(&run, 1, &set));
    dt_extent extents[] = {{a, 1, mirror, 0, 0, NULL}, {a + page_bytes, 1, mirror + 1, 1, 0, NULL}, {a + 2 * page_bytes, 1,
        mirror + 2, 0, 0, NULL}};
    memory[0] = memory[page_bytes] = memory[2 * page_bytes] = 9;
    dt_fail(DT_SITE_COPY, 2, 1, EIO, 0);
    CHECK(dt_copy_out(&set, extents, 3, &why) == -EIO && why.os_errno == EIO && why.start == a + page_bytes);
    CHECK(mirror[0] == 9 && mirror[1] == 0 && mirror[2] == 0);
    dt_fail(DT_SITE_COPY, 2, 1, EIO, 1);
    CHECK(dt_copy_out(&set, extents, 3, &why) == -EIO && mirror[1] == 9 && mirror[2] == 0);
    dt_fail(DT_SITE_COPY, 3, 1, EFAULT, 0);
    CHECK(dt_changed(&set, extents, 3, page_bytes, &out) == -EFAULT && !out.block_);
    for (uint64_t call = 1; call <= 2; call++) {
        dt_fail(DT_SITE_ALLOCATE, call, 1, ENOMEM, 0);
        CHECK(dt_changed(&set, extents, 3, page_bytes, &out) == -ENOMEM && !out.block_);
    }
    dt_fail(0, 0, 0, 0, 0);
    dt_set_clear(&set);
    munmap(memory, 4 * page_bytes);
}

/* ---- mappings ---- */

static bool same_mapping(dt_mapping a, dt_mapping b)
{
    a.page_bytes = b.page_bytes = 0;
    return !memcmp(&a, &b, sizeof a);
}

/* By both ways; ENOTTY is what kernels without the query say. */
static int mapping_both(uint64_t address, dt_mapping *out)
{
    dt_mapping text;
    int code = dt_mapping_at(address, out);
    dt_fail(DT_SITE_MAPS, 1, 1, ENOTTY, 0);
    int by_text = dt_mapping_at(address, &text);
    dt_fail(0, 0, 0, 0, 0);
    CHECK(code == by_text && (code || same_mapping(*out, text)));
    return code;
}

static void test_maps(void)
{
    dt_mapping m, first;
    uint8_t *p = map_pages(8);
    uint64_t a = (uintptr_t)p;
    munmap(p, page_bytes);
    munmap(p + 3 * page_bytes, page_bytes);
    mprotect(p + page_bytes, page_bytes, PROT_READ);
    CHECK(!mapping_both(a, &m) && m.start == a + page_bytes && m.end == a + 2 * page_bytes && m.readable &&
          !m.writable);
    CHECK(!mapping_both(a + 3 * page_bytes - 1, &m) && m.end == a + 3 * page_bytes && m.writable && !m.executable &&
          !m.shared);
    CHECK(!mapping_both(a + 3 * page_bytes, &m) && m.start == a + 4 * page_bytes && !m.name[0] && !m.inode);
    CHECK(m.page_bytes == 0 || m.page_bytes == page_bytes);
    CHECK(mapping_both(UINT64_MAX - 1, &m) == -ENOENT);
    munmap(p + page_bytes, 7 * page_bytes);

    /* Names: with a newline, with blanks, longer than dt_mapping holds. */
    char name[300];
    for (int round = 0; round < 3; round++) {
        snprintf(name, sizeof name, "/tmp/dirtytrack %d\nname", (int)getpid());
        if (round == 1)
            snprintf(name, sizeof name, "/tmp/dirtytrack-%d \\ b (deleted)", (int)getpid());
        if (round == 2)
            snprintf(name, sizeof name, "/tmp/%0250d", (int)getpid());
        int fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        CHECK(fd >= 0 && !ftruncate(fd, (off_t)(4 * page_bytes)));
        p = mmap(NULL, page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)(2 * page_bytes));
        CHECK(!mapping_both((uintptr_t)p, &m) && m.shared && m.offset == 2 * page_bytes && m.inode);
        name[255] = 0;
        CHECK(!strcmp(m.name, name));
        if (round == 2)
            snprintf(name, sizeof name, "/tmp/%0250d", (int)getpid());
        unlink(name);
        munmap(p, page_bytes);
        close(fd);
    }

    unsigned count = 0; /* the whole list, by both ways */
    for (uint64_t at = 0; !dt_mapping_at(at, &m); at = m.end, count++) {
        dt_fail(DT_SITE_MAPS, 1, 1, ENOTTY, 0);
        int code = dt_mapping_at(at, &first);
        dt_fail(0, 0, 0, 0, 0);
        if (code || !same_mapping(m, first))
            CHECK(!"the text says the same");
    }
    CHECK(count > 5);
    dt_fail(DT_SITE_MAPS, 1, 0, EIO, 0);
    CHECK(dt_mapping_at(0, &m) == -EIO);
    dt_fail(DT_SITE_MAPS, 1, 0, ENOTTY, 0);
    CHECK(dt_mapping_at(0, &m) == -ENOTTY);
    dt_fail(0, 0, 0, 0, 0);
}

/* ---- raw scans ---- */

static int pagemap = -1, uffd = -1;

static bool open_uffd(void)
{
    struct k_uffdio_api api = {K_UFFD_API, K_UFFD_FEATURE_WP_ASYNC | K_UFFD_FEATURE_WP_UNPOPULATED, 0};
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | K_UFFD_USER_MODE_ONLY);
    if (uffd < 0) {
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        uffd = device < 0 ? -1 : ioctl(device, K_USERFAULTFD_IOC_NEW, O_CLOEXEC);
        if (device >= 0)
            close(device);
    }
    pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    dt_scan_request nothing = {0};
    dt_scan_result result;
    bool scans = pagemap >= 0 && !dt_pagemap_scan(pagemap, &nothing, &result);
    dt_scan_result_clear(&result);
    return scans && uffd >= 0 && !ioctl(uffd, K_UFFDIO_API, &api);
}

static void watch(uint8_t *p, uint64_t pages)
{
    struct k_uffdio_register r = {{(uintptr_t)p, pages * page_bytes}, K_UFFDIO_REGISTER_MODE_WP, 0};
    CHECK(!ioctl(uffd, K_UFFDIO_REGISTER, &r));
    struct k_uffdio_writeprotect w = {r.range, K_UFFDIO_WRITEPROTECT_MODE_WP};
    CHECK(!ioctl(uffd, K_UFFDIO_WRITEPROTECT, &w));
}

static dt_scan_request arming(const uint8_t *p, uint64_t pages)
{
    return (dt_scan_request){.start = (uintptr_t)p, .end = (uintptr_t)p + pages * page_bytes,
                             .category_mask = K_PAGE_IS_WRITTEN, .return_mask = K_PAGE_IS_WRITTEN,
                             .flags = K_PM_SCAN_WP_MATCHING | K_PM_SCAN_CHECK_WPASYNC};
}

static bool holds(const dt_scan_result *result, const uint8_t *p, const uint8_t *dirty, uint64_t pages)
{
    uint64_t at = 0;
    for (uint64_t i = 0; i < result->count; i++) {
        const dt_page_region *r = result->regions + i;
        if (i && (r->start < r[-1].end || (r->start == r[-1].end && r->categories == r[-1].categories)))
            return false;
        uint64_t from = (r->start - (uintptr_t)p) / page_bytes, to = (r->end - (uintptr_t)p) / page_bytes;
        for (; at < from; at++)
            if (dirty[at])
                return false;
        for (; at < to; at++)
            if (!dirty[at])
                return false;
    }
    for (; at < pages; at++)
        if (dirty[at])
            return false;
    return true;
}

static void test_scan(void)
{
    enum { N = 16384 };
    uint8_t *p = map_pages(N), *dirty = calloc(1, N), *none = calloc(1, N);
    memset(p, 1, N * page_bytes);
    watch(p, N);
    dt_scan_request request = arming(p, N), peek = request;
    peek.flags = K_PM_SCAN_CHECK_WPASYNC;
    dt_scan_result result;
    CHECK(!dt_pagemap_scan(pagemap, &peek, &result) && !result.count && result.walk_end == request.end);
    dt_scan_result_clear(&result);

    /* More than 512 regions in a call: walk_end then names a place far before the walk's. */
    for (uint64_t separate = 500; separate <= 3000; separate += 250) {
        memset(dirty, 0, N);
        for (uint64_t i = 0; i < separate; i++) {
            p[2 * i * page_bytes]++;
            dirty[2 * i] = 1;
        }
        CHECK(!dt_pagemap_scan(pagemap, &peek, &result) && holds(&result, p, dirty, N));
        dt_scan_result_clear(&result);
        CHECK(!dt_pagemap_scan(pagemap, &request, &result) && holds(&result, p, dirty, N) && result.count == separate);
        CHECK(result.walk_end == request.end);
        dt_scan_result_clear(&result);
        CHECK(!dt_pagemap_scan(pagemap, &request, &result) && holds(&result, p, none, N));
        dt_scan_result_clear(&result);
    }

    for (int round = 0; round < 120; round++) { /* at random, with and without a limit */
        memset(dirty, 0, N);
        uint64_t density = 1 + random_below(100), pages = 0;
        for (uint64_t i = 0; i < N; i++)
            if (random_below(density) == 0 || (round % 4 == 0 && (i / 1000) % 2)) {
                p[i * page_bytes]++;
                dirty[i] = 1;
                pages++;
            }
        request.max_pages = round % 2 ? 1 + random_below(2 * pages + 2) : 0;
        uint64_t left = pages;
        request.start = (uintptr_t)p;
        do {
            uint64_t got = 0, start = request.start;
            CHECK(!dt_pagemap_scan(pagemap, &request, &result));
            for (uint64_t i = 0; i < result.count; i++)
                got += (result.regions[i].end - result.regions[i].start) / page_bytes;
            CHECK(got == (request.max_pages ? dt_min(left, request.max_pages) : left));
            uint8_t *part = calloc(1, N);
            uint64_t from = (start - (uintptr_t)p) / page_bytes, to = (result.walk_end - (uintptr_t)p) / page_bytes;
            memcpy(part + from, dirty + from, to - from);
            CHECK(holds(&result, p, part, N) && (to == N || request.max_pages == got));
            free(part);
            left -= got;
            request.start = result.walk_end;
            dt_scan_result_clear(&result);
        } while (request.start < request.end);
        CHECK(!left);
    }
    request = arming(p, N);

    /* Categories: neighbours of one kind are one region, also across the vector's end. */
    for (uint64_t i = 0; i < N; i++)
        if (i % 3)
            p[i * page_bytes]++;
    dt_scan_request all = {.start = request.start, .end = request.end, .return_mask = K_PAGE_IS_WRITTEN};
    CHECK(!dt_pagemap_scan(pagemap, &all, &result) && result.count == (N + 2) / 3 * 2 - (N % 3 == 1));
    bool good = result.regions[0].start == request.start && result.regions[result.count - 1].end == request.end;
    for (uint64_t i = 0; i < result.count; i++)
        good = good && result.regions[i].categories == (i % 2 ? K_PAGE_IS_WRITTEN : 0) &&
               (!i || result.regions[i].start == result.regions[i - 1].end);
    CHECK(good);
    dt_scan_result_clear(&result);
    CHECK(!dt_pagemap_scan(pagemap, &request, &result));
    dt_scan_result_clear(&result);

    /* Odd ranges get the kernel's answers. */
    dt_scan_request odd = request;
    odd.end = odd.start + 1; /* rounded up */
    p[0]++;
    CHECK(!dt_pagemap_scan(pagemap, &odd, &result) && result.count == 1 &&
          result.walk_end == request.start + page_bytes);
    dt_scan_result_clear(&result);
    odd.end = odd.start;
    p[0]++;
    CHECK(!dt_pagemap_scan(pagemap, &odd, &result) && !result.count && result.regions && result.walk_end == odd.start);
    dt_scan_result_clear(&result);
    odd.start += page_bytes;
    CHECK(dt_pagemap_scan(pagemap, &odd, &result) == -EFAULT && result.why.step == DT_STEP_SCAN);
    dt_scan_result_clear(&result);
    odd = request;
    odd.start++;
    CHECK(dt_pagemap_scan(pagemap, &odd, &result) == -EINVAL && result.why.os_errno == EINVAL);
    dt_scan_result_clear(&result);
    odd = request;
    odd.end = UINT64_MAX; /* refused as a whole: page 0 stays dirty */
    CHECK(dt_pagemap_scan(pagemap, &odd, &result) == -EFAULT);
    dt_scan_result_clear(&result);
    odd.end = UINT64_C(1) << 63;
    CHECK(dt_pagemap_scan(pagemap, &odd, &result) == -EFAULT && !result.count);
    dt_scan_result_clear(&result);
    CHECK(!dt_pagemap_scan(pagemap, &request, &result) && result.count == 1);
    dt_scan_result_clear(&result);
    CHECK(dt_pagemap_scan(-1, &request, &result) == -EBADF);
    dt_scan_result_clear(&result);

    /* A hole in what is registered: what was found and re-armed before it is told. */
    memset(dirty, 0, N);
    for (uint64_t i = 0; i < 8000; i += 2) {
        p[i * page_bytes]++;
        dirty[i] = i < 6000;
    }
    struct k_uffdio_range hole = {(uintptr_t)p + 6000 * page_bytes, 100 * page_bytes};
    CHECK(!ioctl(uffd, K_UFFDIO_UNREGISTER, &hole));
    CHECK(dt_pagemap_scan(pagemap, &request, &result) == -EPERM && result.why.step == DT_STEP_SCAN);
    CHECK(holds(&result, p, dirty, N) && result.why.start < hole.start && result.why.end > hole.start);
    dt_scan_result_clear(&result);
    watch(p + 6000 * page_bytes, 100);
    for (uint64_t i = 0; i < 8000; i++)
        dirty[i] = i >= 6100 && i % 2 == 0;
    CHECK(!dt_pagemap_scan(pagemap, &request, &result) && holds(&result, p, dirty, N));
    dt_scan_result_clear(&result);

    /* Every call and every allocation fails once: found in two goes, nothing lost. */
    for (int after = 0; after < 2; after++)
        for (uint64_t call = 1; call <= 6; call++)
            for (int site = DT_SITE_ALLOCATE; site <= DT_SITE_SCAN; site++) {
                memset(dirty, 0, N);
                for (uint64_t i = 0; i < 6000; i += 2) {
                    p[i * page_bytes]++;
                    dirty[i] = 1;
                }
                uint8_t *seen = calloc(1, N);
                for (int go = 0; go < 2; go++) {
                    dt_fail(go ? 0 : (uint32_t)site, call, 1, EPERM, after);
                    int code = dt_pagemap_scan(pagemap, &request, &result);
                    CHECK(code == 0 || (!go && code == (site == DT_SITE_SCAN ? -EPERM : -ENOMEM) &&
                          result.why.code == code));
                    for (uint64_t i = 0; i < result.count; i++)
                        for (uint64_t b = result.regions[i].start; b < result.regions[i].end; b += page_bytes)
                            seen[(b - (uintptr_t)p) / page_bytes]++;
                    dt_scan_result_clear(&result);
                }
                CHECK(!memcmp(seen, dirty, N));
                free(seen);
            }
    dt_fail(0, 0, 0, 0, 0);
    munmap(p, N * page_bytes);
    free(dirty);
    free(none);
}

/* More address space than one call takes. */
static void test_scan_far(void)
{
    uint64_t pages = (UINT64_C(5) << 30) / page_bytes;
    uint8_t *p = mmap(NULL, pages * page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
        -1, 0);
    CHECK(p != MAP_FAILED);
    if (p == MAP_FAILED)
        return;
    madvise(p, pages * page_bytes, MADV_NOHUGEPAGE);
    dt_scan_request request = {.start = (uintptr_t)p, .end = (uintptr_t)p + pages * page_bytes,
                               .category_mask = K_PAGE_IS_PRESENT, .return_mask = K_PAGE_IS_PRESENT};
    uint8_t *present = calloc(1, pages);
    for (int i = 0; i < 3000; i++) {
        uint64_t at = random_below(pages);
        p[at * page_bytes] = 1;
        present[at] = 1;
    }
    uint64_t border = (dt_up((uintptr_t)p + 1, (uint64_t)1 << 30) - (uintptr_t)p) / page_bytes;
    p[(border - 1) * page_bytes] = p[border * page_bytes] = 1; /* one region across the calls' border */
    present[border - 1] = present[border] = 1;
    dt_scan_result result;
    CHECK(!dt_pagemap_scan(pagemap, &request, &result) && holds(&result, p, present, pages) &&
          result.walk_end == request.end);
    dt_scan_result_clear(&result);
    free(present);
    munmap(p, pages * page_bytes);
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
    test_bytes();
    test_changed_borders();
    test_vanished();
    test_vanished_filtered();
    test_copy_faults();
    test_maps();
    if (open_uffd()) {
        test_scan();
        test_scan_far();
    } else {
        printf("raw scans skipped: this kernel does not track writes\n");
    }
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
