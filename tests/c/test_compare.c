/* SPDX-License-Identifier: MIT
 * The backend that compares: what it is made of, and where it differs from the kernel. What it has in common with it is
 * in test_engine.c, which runs on it too. */
#define _GNU_SOURCE
#include "../../dirtytrack/kernel/csrc/digest.h"
#include "counting.h"
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

static uint64_t page;
static uint32_t backend, pinned;

static uint8_t *map(uint64_t pages)
{
    uint8_t *p = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(p, pages * page, MADV_NOHUGEPAGE);
    return p;
}

static uint64_t draw(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    return *x ^= *x << 17;
}

/* ---- equality and the hash ------------------------------------------------------------------------------------------- */

/* As the definition has it, word by word. */
static dt_digest by_definition(const uint8_t *memory, uint64_t bytes, const uint8_t *key)
{
    dt_digest sum = {0, 0};
    for (uint64_t i = 0; i < bytes / 8; i++) {
        uint32_t m[2], k[2], l[2];
        memcpy(m, memory + 8 * i, 8);
        memcpy(k, key + 8 * i, 8);
        memcpy(l, key + 8 * i + 16, 8);
        sum.first += (uint64_t)(uint32_t)(m[0] + k[0]) * (uint32_t)(m[1] + k[1]);
        sum.second += (uint64_t)(uint32_t)(m[0] + l[0]) * (uint32_t)(m[1] + l[1]);
    }
    return sum;
}

static void test_digest(void)
{
    enum { BYTES = 4096 };
    uint64_t x = 88172645463325252u;
    uint8_t memory[BYTES], copy[BYTES], key[BYTES + DT_KEY_EXTRA];
    for (int round = 0; round < 500; round++) {
        for (uint64_t i = 0; i < BYTES; i++)
            memory[i] = round % 3 ? (uint8_t)draw(&x) : round % 2 ? 0xff : 0;
        for (uint64_t i = 0; i < sizeof key; i++)
            key[i] = (uint8_t)draw(&x);
        memcpy(copy, memory, BYTES);
        dt_digest wanted = by_definition(memory, BYTES, key);
        for (int plain = 0; plain < 2; plain++) {
            dt_digest got = dt_choose_digester(plain)(memory, BYTES, key);
            CHECK(got.first == wanted.first && got.second == wanted.second);
            memset(copy, 0x5a, BYTES);
            got = dt_choose_copier(plain)(memory, BYTES, key, copy);
            CHECK(got.first == wanted.first && got.second == wanted.second && !memcmp(memory, copy, BYTES));
        }
        for (int plain = 0; plain < 2; plain++)
            CHECK(dt_choose_same(plain)(memory, copy, BYTES, round % 2));
        uint64_t at = draw(&x) % BYTES;
        copy[at] ^= (uint8_t)(1u << round % 8); /* one bit, anywhere */
        dt_digest other = dt_choose_digester(false)(copy, BYTES, key);
        CHECK(other.first != wanted.first || other.second != wanted.second);
        for (int plain = 0; plain < 2; plain++)
            CHECK(!dt_choose_same(plain)(memory, copy, BYTES, round % 2) && !dt_choose_same(plain)(copy, memory, BYTES, round % 2));
        CHECK(dt_is_zero(memory, BYTES) == (round % 3 == 0 && round % 2 == 0));
    }
}

/* ---- a session --------------------------------------------------------------------------------------------------------- */

typedef struct { dt_session *session; dt_region *region; dt_listener *listener; uint8_t *memory; uint64_t pages; } world;

static world make(uint8_t *memory, uint64_t pages)
{
    world w = {.memory = memory, .pages = pages};
    dt_failure why = {0};
    CHECK(dt_session_open(0, 0, backend, &w.session, &why) == 0);
    CHECK(dt_register(w.session, (uint64_t)memory, pages * page, page, DT_ARM_AUTO | pinned, &w.region, &why) == 0);
    CHECK(dt_listener_new(w.session, &w.listener) == 0 && dt_start(w.listener, &w.region, 1, &why) == 0);
    return w;
}

static void end(world *w)
{
    dt_listener_drop(&w->listener);
    dt_region_drop(&w->region);
    dt_session_drop(&w->session);
    munmap(w->memory, w->pages * page);
}

static int64_t collect(world *w)
{
    dt_set set = {0};
    int rc = dt_collect(w->listener, NULL, -1, &set);
    int64_t pages = rc ? rc : (int64_t)set.pages;
    set.delivered = !rc;
    dt_set_clear(&set);
    return pages;
}

static void test_only_changes(void)
{
    world w = make(map(64), 64);
    memset(w.memory, 1, 64 * page);
    CHECK(collect(&w) == 64);
    for (uint64_t i = 0; i < 64; i++)
        ((volatile uint8_t *)w.memory)[i * page] = 1; /* as it was */
    CHECK(collect(&w) == 0);
    w.memory[5 * page] = 2;
    w.memory[5 * page] = 1; /* taken back */
    w.memory[9 * page + page - 1] = 7;
    CHECK(collect(&w) == 1 && collect(&w) == 0);
    CHECK(dt_session_fd(w.session) == -1 && dt_session_door(w.session) == DT_DOOR_NONE);
    end(&w);
}

/* Changed after the collect, read, and changed back: what was read through the session is remembered. */
static void test_what_was_copied_is_remembered(void)
{
    world w = make(map(8), 8);
    uint8_t *mirror = calloc(8, page);
    memset(w.memory, 1, 8 * page);
    dt_extent extent = {(uint64_t)w.memory, 8 * page, mirror, !pinned, 0, w.region};
    dt_set set = {0};
    CHECK(dt_collect(w.listener, NULL, -1, &set) == 0 && set.pages == 8);
    set.delivered = 1;
    w.memory[3 * page] = 2;
    dt_failure why = {0};
    CHECK(dt_copy_out(&set, &extent, 1, &why) == 0 && mirror[3 * page] == 2);
    w.memory[3 * page] = 1;
    dt_set_clear(&set);
    CHECK(dt_collect_into(w.listener, NULL, &extent, 1, &set) == 0 && set.pages == 1);
    set.delivered = 1;
    dt_set_clear(&set);
    CHECK(!memcmp(mirror, w.memory, 8 * page) && collect(&w) == 0);
    free(mirror);
    end(&w);
}

static uint64_t populated(const uint8_t *memory, uint64_t pages)
{
    uint64_t count = 0, entry;
    FILE *file = fopen("/proc/self/pagemap", "re");
    for (uint64_t i = 0; file && i < pages; i++)
        if (!fseek(file, (long)(((uint64_t)memory / page + i) * 8), SEEK_SET) && fread(&entry, 8, 1, file) == 1)
            count += entry >> 62 != 0;
    if (file)
        fclose(file);
    return count;
}

static void test_what_was_never_touched_stays_so(void)
{
    world w = make(map(4096), 4096);
    w.memory[100 * page] = 1;
    CHECK(collect(&w) == 1 && collect(&w) == 0);
    w.memory[101 * page] = 1;
    w.memory[4000 * page] = 1;
    dt_set set = {0};
    CHECK(dt_peek(w.listener, NULL, &set) == 0 && set.pages == 2);
    dt_set_clear(&set);
    CHECK(populated(w.memory, 4096) == 3);
    CHECK(collect(&w) == 2 && collect(&w) == 0);
    (void)*(volatile uint8_t *)(w.memory + 7 * page); /* read into being, and still zeroes */
    CHECK(collect(&w) == 0);
    madvise(w.memory + 100 * page, 2 * page, MADV_DONTNEED);
    CHECK(collect(&w) == 2 && collect(&w) == 0);
    end(&w);
}

/* Mapped, but nobody may read it: it is told until somebody may, and then once more. */
static void test_unreadable(void)
{
    world w = make(map(64), 64);
    memset(w.memory, 1, 64 * page);
    CHECK(collect(&w) == 64);
    mprotect(w.memory + 20 * page, 3 * page, PROT_NONE);
    w.memory[40 * page] = 2;
    CHECK(collect(&w) == 4 && collect(&w) == 3);
    mprotect(w.memory + 20 * page, 3 * page, PROT_READ | PROT_WRITE);
    CHECK(collect(&w) == 3 && collect(&w) == 0);
    end(&w);
}

/* A hole's pages were pending, and nobody can read them; what is mapped there then is told, even if it is what was there. */
static void test_a_hole_forgets(void)
{
    world w = make(map(64), 64);
    CHECK(collect(&w) == 0); /* zeroes */
    munmap(w.memory + 8 * page, 4 * page);
    CHECK(collect(&w) == DT_GONE && collect(&w) == 0);
    mmap(w.memory + 8 * page, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(collect(&w) == 4 && collect(&w) == 0);
    munmap(w.memory + 8 * page, 4 * page);
    CHECK(collect(&w) == DT_GONE);
    end(&w);
}

static void test_kept_bytes(void)
{
    world w = make(map(64), 64);
    uint64_t each = (backend == DT_BACKEND_COPY ? page : 16) + 1;
    dt_region *part = NULL, *more = NULL;
    dt_failure why = {0};
    CHECK(dt_session_kept_bytes(w.session) == 64 * each);
    uint8_t *other = map(8);
    CHECK(dt_register(w.session, (uint64_t)w.memory + 5 * page, 8 * page, page, DT_ARM_AUTO | pinned, &part, &why) == 0);
    CHECK(dt_register(w.session, (uint64_t)other, 8 * page, page, DT_ARM_ALL, &more, &why) == 0);
    CHECK(dt_write_protect(part, &why) == 0 && dt_write_protect(more, &why) == 0);
    CHECK(dt_session_kept_bytes(w.session) == 72 * each); /* what overlaps is kept once */
    CHECK(dt_unregister(part, &why) == 0 && dt_unregister(more, &why) == 0);
    CHECK(dt_session_kept_bytes(w.session) == 64 * each);
    CHECK(dt_session_suspend(w.session, &why) == 0 && dt_session_kept_bytes(w.session) == 0);
    CHECK(dt_session_resume(w.session, &why) == 0 && collect(&w) == 64 && collect(&w) == 0);
    dt_region_drop(&part);
    dt_region_drop(&more);
    munmap(other, 8 * page);
    end(&w);
}

/* Memory comes and goes beneath, while it is compared. */
static _Atomic int stop;
static void *remap(void *argument)
{
    world *w = argument;
    for (uint64_t x = 1; !stop;) {
        uint8_t *at = w->memory + draw(&x) % 60 * page;
        munmap(at, 4 * page);
        mmap(at, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        at[7] = (uint8_t)x;
    }
    return NULL;
}

static void test_memory_that_vanishes_is_no_crash(void)
{
    world w = make(map(64), 64);
    pthread_t thread;
    stop = 0;
    pthread_create(&thread, NULL, remap, &w);
    uint64_t told = 0;
    for (int i = 0; i < 3000; i++) {
        int64_t found = collect(&w);
        CHECK(found >= 0 || found == DT_GONE);
        told += found > 0;
    }
    stop = 1;
    pthread_join(thread, NULL);
    CHECK(told);
    while (collect(&w))
        ;
    w.memory[33 * page] ^= 0x55;
    CHECK(collect(&w) == 1);
    end(&w);
}

/* Writers write pages with one number throughout, page by page; a torn page is found by a later pass. */
static void *rewrite(void *argument)
{
    world *w = argument;
    for (uint64_t x = (uint64_t)&x | 1; !stop;) {
        uint64_t number = draw(&x), *at = (uint64_t *)(w->memory + number % w->pages * page);
        for (uint64_t i = 0; i < page / 8; i++)
            __atomic_store_n(at + i, number, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void test_torn_reads_are_found_later(void)
{
    world w = make(map(32), 32);
    pthread_t threads[2];
    uint8_t *mirror = calloc(w.pages, page);
    dt_extent extent = {(uint64_t)w.memory, w.pages * page, mirror, !pinned, 0, w.region};
    for (int round = 0; round < 20; round++) {
        stop = 0;
        for (int i = 0; i < 2; i++)
            pthread_create(&threads[i], NULL, rewrite, &w);
        for (int last = 0, i = 0; !last; i++) {
            if (i == 200) {
                stop = last = 1;
                for (int k = 0; k < 2; k++)
                    pthread_join(threads[k], NULL);
            }
            dt_set set = {0};
            CHECK(dt_collect_into(w.listener, NULL, &extent, 1, &set) == 0);
            set.delivered = 1;
            dt_set_clear(&set);
        }
        CHECK(!memcmp(mirror, w.memory, w.pages * page));
    }
    free(mirror);
    end(&w);
}

static void test_bad_backend(void)
{
    dt_session *s = NULL;
    dt_failure why = {0};
    CHECK(dt_session_open(0, 0, 9, &s, &why) == -EINVAL && !s);
    for (uint64_t nth = 1, rc = 1; rc; nth++) {
        dt_fail(DT_SITE_ALLOCATE, nth, 1, ENOMEM, 0);
        rc = dt_session_open(0, 0, backend, &s, &why) != 0;
        dt_fail(0, 0, 0, 0, 0);
        CHECK(!rc || why.code == -ENOMEM);
    }
    dt_session_drop(&s);
}

int main(void)
{
    page = dt_page_bytes();
    test_digest();
    for (backend = DT_BACKEND_COPY; backend <= DT_BACKEND_HASH; backend++)
        for (pinned = 0; pinned <= DT_PINNED; pinned += DT_PINNED) {
            test_only_changes();
            test_what_was_copied_is_remembered();
            test_what_was_never_touched_stays_so();
            test_kept_bytes();
            test_torn_reads_are_found_later();
            test_bad_backend();
            if (pinned)
                continue;
            test_unreadable();
            test_a_hole_forgets();
            test_memory_that_vanishes_is_no_crash();
        }
    return outcome();
}
