/* SPDX-License-Identifier: MIT
 * Deltas without Python: each way to compare, each length, alignment and granule, against byte loops; and bytes that are
 * no delta. */
#include "checking.h"
#include "delta.h"
#include <sched.h>
#include <unistd.h>

#pragma weak dt_session_open
__attribute__((weak)) void dt_session_give_back(dt_block *block) { (void)block; }
__attribute__((weak)) void dt_block_release(dt_block *block) { (void)block; }

#define MOST (12u * 4096u)

typedef struct memories {
    uint8_t *now, *mirror, *before, *out;
    uint64_t nbytes;
    dt_extent extent;
    uint32_t granule;
} memories;

static uint8_t area[2][MOST + 3 * 4096] __attribute__((aligned(4096)));

/* Two memories that differ in one of many ways; each ends where its allocation does, for the address sanitizer. */
static memories some(void)
{
    memories m = {.granule = 1u << random_below(13)};
    m.nbytes = random_below(4) ? 1 + random_below(MOST) : 4096 * (1 + random_below(12));
    uint64_t skew = random_below(3) ? 0 : random_below(4096);
    m.now = area[0] + skew;
    m.mirror = malloc(m.nbytes);
    m.before = malloc(m.nbytes);
    for (uint64_t i = 0; i < m.nbytes; i++)
        m.now[i] = (uint8_t)random_below(4);
    memcpy(m.mirror, m.now, m.nbytes);
    uint64_t way = random_below(6), period = 1 + random_below(300);
    for (uint64_t i = 0; i < m.nbytes; i++)
        if (way == 0 ? !random_below(period) : way == 1 ? i % period == 0 : way == 2 ? i % period != 0 : way == 3)
            m.now[i] ^= 0xF0;
    for (uint64_t k = way == 4 ? random_below(20) : 0; k; k--)
        for (uint64_t i = random_below(m.nbytes), n = random_below(200); n && i < m.nbytes; n--)
            m.now[i++] ^= 0xF0;
    memcpy(m.before, m.mirror, m.nbytes);
    m.extent = (dt_extent){.address = (uintptr_t)m.now, .nbytes = m.nbytes, .mirror = m.mirror};
    return m;
}

static void done(memories *m)
{
    free(m->mirror);
    free(m->before);
    free(m->out);
}

static uint64_t encode(memories *m, const dt_set *set, int update)
{
    uint64_t room = dt_delta_room(set, &m->extent, m->granule), length = 0;
    m->out = malloc(room);
    dt_delta_halves_bytes = random_below(2) ? 0 : UINT64_MAX;
    CHECK(dt_diff(set, &m->extent, m->granule, update, m->out, room, &length, NULL) == 0);
    CHECK(length <= room - DELTA_PAD);
    return length;
}

/* The granules that the delta names are those that differ, in order. */
static bool exact(const memories *m, uint64_t length)
{
    uint64_t rows = (m->nbytes + m->granule - 1) / m->granule, next = 0;
    uint64_t found = dt_delta_rows(m->out, length, 0, m->granule, rows, NULL, 0, NULL);
    uint64_t *named = malloc((found + 1) * sizeof *named);
    uint8_t *marks = calloc(rows, 1);
    bool right = dt_delta_rows(m->out, length, 0, m->granule, rows, named, found, marks) == found;
    for (uint64_t i = 0; i < rows; i++) {
        uint64_t at = i * m->granule, bytes = dt_min(m->granule, m->nbytes - at);
        bool differs = memcmp(m->now + at, m->before + at, bytes) != 0;
        right = right && marks[i] == differs && (!differs || (next < found && named[next] == i));
        next += differs;
    }
    right = right && next == found;
    free(named);
    free(marks);
    return right;
}

static void test_round_trips(void)
{
    for (unsigned round = 0; round < 3000; round++) {
        memories m = some();
        int update = (int)random_below(2);
        uint64_t length = encode(&m, NULL, update);
        CHECK(!memcmp(m.mirror, update ? m.now : m.before, m.nbytes));
        CHECK(exact(&m, length));
        dt_extent target = {.address = (uintptr_t)m.before, .nbytes = m.nbytes};
        CHECK(dt_delta_apply(m.out, length, &target, NULL) == 0);
        CHECK(!memcmp(m.before, m.now, m.nbytes));
        uint64_t pages = (dt_up(m.extent.address + m.nbytes, 4096) - dt_down(m.extent.address, 4096));
        if (m.extent.address % m.granule == 0) /* else a granule more */
            CHECK(length <= pages + pages / 100);
        done(&m);
    }
}

static void test_only_the_pages_of_the_set(void)
{
    for (unsigned round = 0; round < 1000; round++) {
        memories m = some();
        uint64_t page = dt_page_bytes(), base = dt_down(m.extent.address, page);
        dt_run runs[MOST / 4096 + 4];
        uint64_t n = 0, expected = 0;
        for (uint64_t at = base; at < m.extent.address + m.nbytes + page; at += page)
            if (random_below(2))
                runs[n++] = (dt_run){at, at + page};
        dt_set set = {0};
        CHECK(dt_set_copy(runs, n, &set) == 0);
        uint64_t length = encode(&m, &set, 0);
        dt_extent target = {.address = (uintptr_t)m.mirror, .nbytes = m.nbytes};
        CHECK(dt_delta_apply(m.out, length, &target, NULL) == 0);
        uint8_t *wanted = malloc(m.nbytes); /* a granule counts where a page of the set touches it */
        memcpy(wanted, m.before, m.nbytes);
        for (uint64_t at = 0; at < m.nbytes; at += m.granule) {
            uint64_t end = dt_min(at + m.granule, m.nbytes);
            bool touched = false;
            for (uint64_t k = 0; k < n; k++)
                touched |= runs[k].start < m.extent.address + end && runs[k].end > m.extent.address + at;
            if (touched) {
                expected += end - at;
                memcpy(wanted + at, m.now + at, end - at);
            }
        }
        CHECK(!memcmp(wanted, m.mirror, m.nbytes));
        CHECK(length <= expected + expected / 100 + DELTA_HEADER + n * 24);
        free(wanted);
        dt_set_clear(&set);
        done(&m);
    }
}

static void test_ways_agree(void)
{
    static uint8_t now[DELTA_BLOCK], before[DELTA_BLOCK], mirror[DELTA_BLOCK];
    static uint8_t copy[DELTA_BLOCK] __attribute__((aligned(64)));
    unsigned whole = 0;
    for (unsigned way = 0; way < dt_delta_ways(); way++) {
        if (!dt_delta_way_works(way)) {
            printf("way %u to compare: not on this processor\n", way);
            continue;
        }
        dt_delta_use_way((int)way);
        for (unsigned round = 0; round < 4000; round++) {
            unsigned shift = (unsigned)random_below(DELTA_MOST_SHIFT + 1);
            uint32_t bytes = (uint32_t)(random_below(3) ? 1 + random_below(DELTA_BLOCK) : DELTA_BLOCK);
            uint64_t rare = 1 + random_below(random_below(2) ? 500 : 2 * DELTA_BLOCK), mask[DELTA_WORDS];
            bool mostly = random_below(2); /* differs, or not */
            for (uint32_t i = 0; i < bytes; i++) {
                bool same = random_below(rare) ? !mostly : mostly;
                mirror[i] = (uint8_t)((now[i] = (uint8_t)random_below(256)) ^ (same ? 0 : 1 + random_below(255)));
            }
            memcpy(before, mirror, bytes);
            memset(copy, 0, sizeof copy);
            memset(mask, 0xAA, sizeof mask);
            dt_delta_part part = {.now = now, .mirror = mirror, .next_now = now, .next_mirror = mirror, .to = copy};
            part.past = random_below(2);
            part.update = random_below(2) ? mirror : NULL;
            enum dt_delta_change change = dt_delta_snapshot(&part, bytes, shift, mask);
            dt_delta_stream_end();
            CHECK(!memcmp(now, copy, bytes) && !memcmp(mirror, part.update ? now : before, bytes));
            memcpy(mirror, before, bytes);
            CHECK((change == DELTA_SAME) == !memcmp(now, mirror, bytes));
            if (change == DELTA_SAME)
                continue;
            bool right = true, all = true;
            uint32_t n = (bytes + (1u << shift) - 1) >> shift;
            for (uint32_t i = 0; i < (n + 63) / 64 * 64; i++) {
                uint32_t at = i << shift, end = (uint32_t)dt_min((uint64_t)(i + 1) << shift, bytes);
                bool differs = i < n && memcmp(now + at, mirror + at, end - at);
                right = right && (mask[i / 64] >> i % 64 & 1) == differs;
                all = all && (differs || i >= n);
            }
            CHECK(right && (change == DELTA_ALL) == all);
            whole += all && bytes == DELTA_BLOCK;
        }
    }
    CHECK(whole > 100);
    dt_delta_use_way(-1);
}

static void test_composing(void)
{
    for (unsigned round = 0; round < 1500; round++) {
        memories m = some();
        uint64_t first = encode(&m, NULL, 1), second, length = 0, again = 0;
        uint8_t *one = m.out;
        for (uint64_t k = random_below(400); k; k--)
            m.now[random_below(m.nbytes)] = (uint8_t)random_below(256);
        m.granule = 1u << random_below(13);
        second = encode(&m, NULL, 1);
        CHECK(dt_delta_compose(one, first, m.out, second, NULL, 0, &length, NULL) == 0);
        uint8_t *both = malloc(length);
        CHECK(dt_delta_compose(one, first, m.out, second, both, length - 1, &again, NULL) == DT_TOO_SMALL);
        CHECK(dt_delta_compose(one, first, m.out, second, both, length, &again, NULL) == 0 && again == length);
        dt_extent target = {.address = (uintptr_t)m.before, .nbytes = m.nbytes};
        CHECK(dt_delta_apply(both, length, &target, NULL) == 0);
        CHECK(!memcmp(m.before, m.now, m.nbytes));
        free(both);
        free(one);
        done(&m);
    }
}

static void test_hostile_bytes(void)
{
    unsigned refused = 0;
    for (unsigned round = 0; round < 20000; round++) {
        memories m = some();
        if (round % 2) { /* a streak */
            for (uint64_t i = 0; i < m.nbytes; i++)
                m.now[i] = (uint8_t)(m.mirror[i] ^ 0x80);
        }
        dt_run runs[3]; /* so that it has gaps */
        for (uint64_t k = 0, at = dt_down(m.extent.address, 4096); k < 3; k++, at = runs[k - 1].end + 4096)
            runs[k] = (dt_run){at, at + 4096 * (1 + random_below(6))};
        dt_set set = {.runs = runs, .count = 3};
        uint64_t length = encode(&m, round % 4 == 1 ? &set : NULL, 0);
        uint64_t cut = random_below(3) ? length : random_below(length + 1);
        uint8_t *hostile = malloc(cut ? cut : 1); /* of that very length */
        memcpy(hostile, m.out, cut);
        for (uint64_t k = random_below(4); k && cut; k--)
        { /* at either end it says most */
            uint64_t edge = random_below(dt_min(cut, 40)), at[] = {random_below(cut), edge, cut - 1 - edge};
            hostile[at[random_below(3)]] = (uint8_t)random_below(256);
        }
        dt_extent target = {.address = (uintptr_t)m.mirror, .nbytes = m.nbytes};
        dt_delta_info info;
        dt_failure why = {0};
        int code = dt_delta_apply(hostile, cut, &target, &why);
        CHECK(code == 0 || code == DT_MALFORMED || code == DT_TOO_SMALL);
        CHECK(code != DT_MALFORMED || why.start <= cut);
        if (code) {
            refused++;
            CHECK(!memcmp(m.mirror, m.before, m.nbytes)); /* before a byte is written */
        }
        CHECK((dt_delta_check(hostile, cut, &info, NULL) == DT_MALFORMED) == (code == DT_MALFORMED));
        uint64_t composed;
        dt_delta_compose(hostile, cut, m.out, length, NULL, 0, &composed, NULL);
        dt_delta_compose(m.out, length, hostile, cut, NULL, 0, &composed, NULL);
        dt_delta_pieces(hostile, cut, NULL, 0);
        dt_delta_rows(hostile, cut, random_below(100), 1 + random_below(100), random_below(100), NULL, 0, NULL);
        free(hostile);
        done(&m);
    }
    CHECK(refused > 1000);
}

static void test_vanishing(void)
{
    uint64_t page = dt_page_bytes();
    uint8_t *p = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t *mirror = calloc(4, page), *zero = calloc(4, page), *out;
    memset(p, 1, 4 * page);
    dt_extent memory = {.address = (uintptr_t)p, .nbytes = 4 * page, .mirror = mirror, .unpinned = 1};
    uint64_t room = dt_delta_room(NULL, &memory, 8), length = 0;
    dt_failure why = {0};
    out = malloc(room);
    CHECK(dt_diff(NULL, &memory, 8, 0, out, room, &length, &why) == 0);
    mprotect(p + 2 * page, page, PROT_NONE); /* as if it were unmapped, but nobody else gets it: threads map memory */
    uint64_t other = 77;
    CHECK(dt_diff(NULL, &memory, 8, 1, out, room, &other, &why) == -EFAULT && other == 77);
    CHECK(why.start == (uintptr_t)(p + 2 * page) && why.end == why.start + page);
    CHECK(!memcmp(mirror, zero, 4 * page)); /* an update is whole or not at all */
    dt_run run = {(uintptr_t)p, (uintptr_t)p + 2 * page};
    dt_set set = {.runs = &run, .count = 1};
    CHECK(dt_diff(&set, &memory, 8, 1, out, room, &length, &why) == 0);
    CHECK(!memcmp(mirror, p, 2 * page) && !memcmp(mirror + 2 * page, zero, 2 * page));
    dt_extent whole = {.address = (uintptr_t)zero, .nbytes = 4 * page, .mirror = mirror};
    memset(zero, 9, 4 * page);
    CHECK(dt_diff(NULL, &whole, 4096, 0, out, room, &length, &why) == 0);
    CHECK(dt_delta_apply(out, length, &memory, &why) == -EFAULT && why.start == (uintptr_t)(p + 2 * page));
    munmap(p, 4 * page);
    free(mirror);
    free(zero);
    free(out);
}

static void test_arguments(void)
{
    uint8_t now[64] = {1}, mirror[64] = {0}, out[256];
    dt_extent memory = {.address = (uintptr_t)now, .nbytes = sizeof now, .mirror = mirror};
    uint64_t length = 5;
    for (uint32_t granule = 0; granule < 9000; granule++)
        if ((granule & (granule - 1)) || !granule || granule > 4096) {
            CHECK(dt_diff(NULL, &memory, granule, 0, out, sizeof out, &length, NULL) == -EINVAL);
            CHECK(dt_delta_room(NULL, &memory, granule) == UINT64_MAX);
        }
    CHECK(dt_diff(NULL, &memory, 8, 0, out, dt_delta_room(NULL, &memory, 8) - 1, &length, NULL) == DT_TOO_SMALL);
    CHECK(length == 5);
    CHECK(dt_diff(NULL, &memory, 8, 0, out, sizeof out, &length, NULL) == 0);
    CHECK(dt_delta_checksum(out, length) != dt_delta_checksum(out, length - 1));
    dt_extent shorter = {.address = (uintptr_t)mirror, .nbytes = sizeof mirror - 1};
    CHECK(dt_delta_apply(out, length, &shorter, NULL) == DT_TOO_SMALL && !mirror[0]);
    dt_fail(DT_SITE_COPY, 1, 1, EIO, 0);
    CHECK(dt_diff(NULL, &memory, 8, 1, out, sizeof out, &length, NULL) == -EIO && !mirror[0]);
    dt_fail(0, 0, 0, 0, 0);
}

/* As in large memory: where blocks change as a whole their bytes go past the caches, at every alignment of the delta. */
static void test_streams(void)
{
    uint64_t before = dt_delta_stream_bytes;
    dt_delta_stream_bytes = 0;
    for (unsigned way = 0; way < dt_delta_ways(); way++) {
        if (!dt_delta_way_works(way))
            continue;
        dt_delta_use_way((int)way);
        for (unsigned round = 0; round < 1000; round++) {
            memories m = some();
            uint64_t rare = random_below(4) ? 30000 : 6000;
            for (uint64_t i = 0; i < m.nbytes; i++) /* whole blocks, but for a few bytes in some of them */
                if (random_below(rare))
                    m.now[i] = (uint8_t)(m.mirror[i] ^ 0x80);
            int update = (int)random_below(2);
            uint8_t *out = m.out = malloc(dt_delta_room(NULL, &m.extent, m.granule) + 64);
            uint64_t skew = random_below(64), length = 0; /* of the delta */
            dt_delta_halves_bytes = random_below(2) ? 0 : UINT64_MAX;
            CHECK(dt_diff(NULL, &m.extent, m.granule, update, out + skew, UINT64_MAX, &length, NULL) == 0);
            CHECK(length <= m.nbytes + m.nbytes / 100 + 4096 / 100 || m.extent.address % m.granule);
            memmove(out, out + skew, length);
            CHECK(!memcmp(m.mirror, update ? m.now : m.before, m.nbytes));
            CHECK(exact(&m, length));
            dt_extent target = {.address = (uintptr_t)m.before, .nbytes = m.nbytes};
            CHECK(dt_delta_apply(out, length, &target, NULL) == 0 && !memcmp(m.before, m.now, m.nbytes));
            done(&m);
        }
    }
    dt_delta_use_way(-1);
    dt_delta_stream_bytes = before;
}

/* Pages here and there that changed as a whole: one streak after the other, whose runs do not fit into one list. */
static void test_streaks_over_gaps(void)
{
    enum { PAGES = 5000 };
    uint64_t before = dt_delta_stream_bytes;
    uint8_t *now = NULL, *mirror = calloc(PAGES, 4096), *other = calloc(PAGES, 4096);
    CHECK(!posix_memalign((void **)&now, 4096, PAGES * 4096));
    memset(now, 5, PAGES * 4096);
    for (unsigned round = 0; round < 6; round++) {
        dt_delta_stream_bytes = round % 2 ? 0 : before;
        dt_delta_halves_bytes = round % 3 ? 0 : UINT64_MAX;
        dt_run *runs = malloc(PAGES * sizeof *runs);
        dt_set set = {.runs = runs};
        uint64_t pages = 0, length = 0, most = round < 4 ? 2 : 300; /* how far apart, and how many together */
        for (uint64_t at = random_below(most); at < PAGES;) {
            uint64_t end = dt_min(at + 1 + random_below(most), PAGES);
            runs[set.count++] = (dt_run){(uintptr_t)now + at * 4096, (uintptr_t)now + end * 4096};
            pages += end - at;
            at = end + 1 + random_below(most);
        }
        memset(mirror, 0, PAGES * 4096);
        memset(other, 0, PAGES * 4096);
        dt_extent extent = {.address = (uintptr_t)now, .nbytes = PAGES * 4096, .mirror = mirror};
        uint64_t room = dt_delta_room(&set, &extent, 8);
        uint8_t *out = malloc(room);
        CHECK(dt_diff(&set, &extent, 8, 1, out, room, &length, NULL) == 0);
        CHECK(length <= pages * 4096 + pages * 4 + 69 * (1 + set.count / 500) + 100); /* hardly more than the bytes */
        dt_extent target = {.address = (uintptr_t)other, .nbytes = PAGES * 4096};
        CHECK(dt_delta_apply(out, length, &target, NULL) == 0 && !memcmp(mirror, other, PAGES * 4096));
        uint64_t next = 0;
        bool right = true;
        for (uint64_t i = 0; i < PAGES; i++) {
            uint64_t address = (uintptr_t)now + i * 4096;
            next += next < set.count && runs[next].end <= address;
            bool dirty = next < set.count && runs[next].start <= address;
            right = right && other[i * 4096] == 5 * dirty && other[i * 4096 + 4095] == 5 * dirty;
        }
        CHECK(right);
        free(out);
        free(runs);
    }
    free(now);
    free(mirror);
    free(other);
    dt_delta_stream_bytes = before;
}

/* Whatever the first half turns out to need: what was assumed, less, or more than there is; and by two threads or one. */
static void test_halves(void)
{
    enum { PAGES = 60 };
    static uint8_t now[PAGES * 4096] __attribute__((aligned(4096))), mirror[sizeof now], was[sizeof now];
    uint64_t length[2], whole = 0, less = 0, more = 0;
    cpu_set_t all, one;
    CPU_ZERO(&one);
    CHECK(!sched_getaffinity(0, sizeof all, &all));
    for (int cpu = 0; cpu < CPU_SETSIZE && !CPU_COUNT(&one); cpu++)
        if (CPU_ISSET(cpu, &all))
            CPU_SET(cpu, &one);
    dt_delta_halves_bytes = 0;
    for (unsigned round = 0; round < 1500; round++) {
        uint32_t granule = 1u << random_below(13);
        uint64_t skew = random_below(2) ? 0 : random_below(4096), nbytes = sizeof now - 2 * 4096 - random_below(4096);
        uint64_t way = random_below(4), period = way == 1 ? 5 + random_below(4) : 1 + random_below(9);
        uint64_t same = way < 2 ? granule : random_below(4096);
        dt_extent extent = {.address = (uintptr_t)now + skew, .nbytes = nbytes, .mirror = mirror};
        for (uint64_t i = 0; i < nbytes; i++)
            now[skew + i] = (uint8_t)(was[i] ^ 0x80);
        for (uint64_t page = 0; way && page < PAGES; page++) /* one granule or so of a page did not change, or most */
            if (way == 1 ? page % period == 0 : !random_below(period))
                memcpy(now + skew + page * 4096, was + page * 4096, dt_min(same, nbytes - dt_min(nbytes, page * 4096)));
        dt_run runs[PAGES];
        dt_set set = {.runs = runs};
        for (uint64_t page = 0, most = 1 + random_below(20); page < PAGES; page += most) {
            uint64_t end = dt_min(page + 1 + random_below(most), PAGES);
            runs[set.count++] = (dt_run){(uintptr_t)now + page * 4096, (uintptr_t)now + end * 4096};
            page = end;
        }
        const dt_set *within = random_below(2) ? &set : NULL;
        uint64_t room = dt_delta_room(within, &extent, granule);
        uint8_t *out[2];
        for (int i = 0; i < 2; i++) {
            CHECK(!sched_setaffinity(0, sizeof one, i ? &one : &all));
            CHECK(!posix_memalign((void **)&out[i], 64, room));
            memcpy(mirror, was, nbytes);
            CHECK(dt_diff(within, &extent, granule, i, out[i], room, &length[i], NULL) == 0);
        }
        CHECK(length[0] == length[1] && length[0] <= room && !memcmp(out[0], out[1], length[0]));
        uint64_t bytes = 0, expected = 0;
        bool right = true; /* the mirror has the pages of the set, and they alone */
        for (uint64_t i = 0, k = 0; i < nbytes; i += granule) {
            uint64_t end = dt_min(i + granule, nbytes);
            while (k < set.count && runs[k].end <= extent.address + i)
                k++;
            if (within && (k == set.count || runs[k].start >= extent.address + end)) {
                right = right && !memcmp(mirror + i, was + i, end - i);
                continue;
            }
            bytes += end - i;
            expected += memcmp(now + skew + i, was + i, end - i) ? end - i : 0;
            right = right && !memcmp(mirror + i, now + skew + i, end - i);
        }
        CHECK(right);
        dt_delta_info info;
        CHECK(dt_delta_check(out[0], length[0], &info, NULL) == 0 && info.changed_bytes == expected);
        memcpy(now, mirror, nbytes);
        memcpy(mirror, was, nbytes);
        dt_extent target = {.address = (uintptr_t)mirror, .nbytes = nbytes};
        CHECK(dt_delta_apply(out[0], length[0], &target, NULL) == 0 && !memcmp(mirror, now, nbytes));
        whole += expected == bytes;
        less += expected < bytes;
        more += expected < bytes && length[0] > DELTA_HEADER + bytes;
        free(out[0]);
        free(out[1]);
    }
    CHECK(!sched_setaffinity(0, sizeof all, &all));
    CHECK(whole > 200 && less > 200 && more > 50);
}

int main(void)
{
    test_ways_agree();
    test_round_trips();
    test_streams();
    test_streaks_over_gaps();
    test_halves();
    test_only_the_pages_of_the_set();
    test_composing();
    test_hostile_bytes();
    test_vanishing();
    test_arguments();
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
