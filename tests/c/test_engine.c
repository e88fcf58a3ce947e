/* SPDX-License-Identifier: MIT
 * The engine without Python: sessions, listeners, and that no written page is lost on any way out. */
#define _GNU_SOURCE
#include "../../dirtytrack/kernel/csrc/dirtytrack.h"
#include "counting.h"
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096 };
static char *map(size_t pages)
{
    char *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(p, pages * PAGE, MADV_NOHUGEPAGE);
    return p;
}

typedef struct { dt_session *session; dt_region *region; dt_listener *listener; char *memory; size_t pages; } world;

static uint32_t remedy = DT_REMEDY_PROBE, backend = DT_BACKEND_KERNEL, pinned;

static uint64_t id_of(dt_region *r)
{
    dt_region_info about;
    dt_region_about(r, &about);
    return about.id;
}

static dt_listener *listen_to(dt_session *s, dt_region *r)
{
    dt_listener *l = NULL;
    dt_failure why = {0};
    CHECK(dt_listener_new(s, &l) == 0);
    CHECK(dt_start(l, &r, 1, &why) == 0);
    return l;
}

static world make(size_t pages)
{
    world w = {.memory = map(pages), .pages = pages};
    dt_failure why = {0};
    memset(w.memory, 1, pages * PAGE);
    CHECK(dt_session_open(remedy, 0, backend, &w.session, &why) == 0);
    CHECK(dt_register(w.session, (uint64_t)w.memory, pages * PAGE, PAGE, DT_ARM_AUTO | pinned, &w.region, &why) == 0);
    w.listener = listen_to(w.session, w.region);
    return w;
}

static void end(world *w)
{
    dt_listener_drop(&w->listener);
    dt_region_drop(&w->region);
    dt_session_drop(&w->session);
    munmap(w->memory, w->pages * PAGE);
}

static uint64_t collect(dt_listener *l, dt_set *set)
{
    CHECK(dt_collect(l, NULL, -1, set) == 0);
    set->delivered = 1;
    return set->pages;
}

static uint64_t collect_pages(dt_listener *l)
{
    dt_set set = {0};
    uint64_t pages = collect(l, &set);
    dt_set_clear(&set);
    return pages;
}

static void test_exact(void)
{
    world w = make(1000);
    dt_set set = {0};
    CHECK(collect(w.listener, &set) == 0 && set.epoch == 1);
    dt_set_clear(&set);
    w.memory[5 * PAGE] = 2;
    w.memory[7 * PAGE + 9] = 2;
    w.memory[8 * PAGE] = 2;
    dt_set peeked = {0};
    CHECK(dt_peek(w.listener, NULL, &peeked) == 0 && peeked.pages == 3);
    CHECK(collect(w.listener, &set) == 3 && set.count == 2 && set.epoch == 2 && set.complete);
    CHECK(dt_set_equal(&set, &peeked));
    CHECK(set.runs[0].start == (uint64_t)w.memory + 5 * PAGE && set.runs[1].end == (uint64_t)w.memory + 9 * PAGE);
    dt_set_clear(&set);
    dt_set_clear(&peeked);
    CHECK(collect_pages(w.listener) == 0);
    for (size_t i = 0; i < w.pages; i += 2)
        w.memory[i * PAGE]++;
    CHECK(collect(w.listener, &set) == 500 && set.count == 500);
    dt_set_clear(&set);
    madvise(w.memory + 20 * PAGE, 3 * PAGE, MADV_DONTNEED);
    CHECK(collect_pages(w.listener) == 3);
    end(&w);
}

/* Page tables that are freed whole, or were never there: the exact scan of many kernels (6.12.43-7.1.7) passes over
 * them, so this is what remedy R1 is for. */
static uint64_t discarded_whole(int huge, int touch)
{
    size_t bytes = 4 << 20, table = 2 << 20;
    char *area = mmap(NULL, bytes + table, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *memory = (char *)(((uint64_t)area + table - 1) & ~(table - 1));
    madvise(memory, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    if (touch)
        memset(memory, 1, bytes);
    dt_session *s = NULL;
    dt_region *r = NULL;
    dt_failure why = {0};
    CHECK(dt_session_open(remedy, 0, backend, &s, &why) == 0);
    CHECK(dt_register(s, (uint64_t)memory, bytes, PAGE, DT_ARM_AUTO | pinned, &r, &why) == 0);
    dt_listener *l = listen_to(s, r);
    uint64_t found = collect_pages(l);
    CHECK(found == 0);
    if (touch) {
        madvise(memory, bytes, MADV_DONTNEED);
        dt_set peeked = {0};
        CHECK(dt_peek(l, NULL, &peeked) == 0 && (remedy == DT_REMEDY_NONE || peeked.pages == 1024));
        dt_set_clear(&peeked);
        found = collect_pages(l);
    }
    if (remedy != DT_REMEDY_NONE) { /* and tracked again */
        CHECK(collect_pages(l) == 0);
        memory[700 * PAGE] = 3;
        CHECK(collect_pages(l) == 1);
    }
    dt_listener_drop(&l);
    dt_region_drop(&r);
    dt_session_drop(&s);
    munmap(area, bytes + table);
    return found;
}

static void test_freed_page_tables(void)
{
    CHECK(discarded_whole(0, 1) == 1024);
    CHECK(discarded_whole(1, 1) == 1024);
    CHECK(discarded_whole(0, 0) == 0);
}

static void test_give_back(void)
{
    world w = make(64);
    dt_set set = {0};
    w.memory[3 * PAGE] = 2;
    CHECK(dt_collect(w.listener, NULL, -1, &set) == 0 && set.pages == 1);
    dt_set_clear(&set); /* never delivered */
    w.memory[9 * PAGE] = 2;
    CHECK(collect(w.listener, &set) == 2);
    CHECK(dt_put_back(w.listener, &set) == 0);
    dt_set_clear(&set);
    CHECK(collect_pages(w.listener) == 2);
    w.memory[11 * PAGE] = 2; /* a stop that nobody got */
    CHECK(dt_stop(w.listener, &set) == 0 && set.pages == 1);
    CHECK(dt_epoch(w.listener) == 0);
    dt_set_clear(&set);
    CHECK(collect_pages(w.listener) == 1);
    w.memory[12 * PAGE] = 2; /* and one that somebody got */
    dt_failure why = {0};
    CHECK(dt_stop(w.listener, &set) == 0 && set.pages == 1);
    CHECK(dt_unregister(w.region, &why) == -EBUSY);
    CHECK(dt_settle(&set) == 0);
    CHECK(dt_unregister(w.region, &why) == 0);
    dt_set_clear(&set);
    end(&w);
}

static void test_listeners(void)
{
    world w = make(256);
    dt_failure why = {0};
    dt_region *half = NULL;
    CHECK(dt_register(w.session, (uint64_t)w.memory + 128 * PAGE + 5, 64 * PAGE, PAGE, DT_ARM_AUTO | pinned, &half, &why) == 0);
    w.memory[130 * PAGE] = 2; /* before the second listener: only the first one's */
    dt_region *both[] = {w.region, half};
    dt_listener *second = NULL;
    CHECK(dt_listener_new(w.session, &second) == 0 && dt_start(second, both, 2, &why) == 0);
    w.memory[1 * PAGE] = 2;
    w.memory[140 * PAGE] = 2;
    CHECK(collect_pages(w.listener) == 3);
    CHECK(collect_pages(w.listener) == 0);
    dt_set set = {0};
    CHECK(dt_collect(second, half, -1, &set) == 0 && set.pages == 1);
    set.delivered = 1;
    dt_set_clear(&set);
    CHECK(collect_pages(second) == 2);
    w.memory[140 * PAGE] = 3; /* directly from the kernel: the other region of the same listener must hear of it */
    CHECK(dt_collect(second, half, -1, &set) == 0 && set.pages == 1);
    set.delivered = 1;
    dt_set_clear(&set);
    CHECK(collect_pages(second) == 1);
    CHECK(collect_pages(w.listener) == 1);
    w.memory[141 * PAGE] = 3;
    CHECK(dt_remove(second, half, &set) == 0 && set.pages == 1);
    CHECK(dt_settle(&set) == 0);
    dt_set_clear(&set);
    CHECK(dt_unregister(half, &why) == 0);
    w.memory[142 * PAGE] = 3; /* still watched by the whole region */
    CHECK(collect_pages(second) == 2);
    CHECK(collect_pages(w.listener) == 2);
    dt_region_drop(&half);
    dt_listener_drop(&second);
    end(&w);
}

static void test_gone_and_replaced(void)
{
    world w = make(64);
    dt_set set = {0};
    mmap(w.memory + 8 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    w.memory[40 * PAGE] = 2;
    CHECK(collect(w.listener, &set) == 5);
    dt_set_clear(&set);
    w.memory[9 * PAGE] = 2; /* tracked again */
    CHECK(collect_pages(w.listener) == 1);
    munmap(w.memory + 16 * PAGE, 2 * PAGE);
    w.memory[50 * PAGE] = 2;
    CHECK(dt_collect(w.listener, NULL, -1, &set) == DT_GONE);
    CHECK(set.why.region == id_of(w.region) && set.why.start == (uint64_t)w.memory + 16 * PAGE &&
          set.why.end == (uint64_t)w.memory + 18 * PAGE);
    dt_set_clear(&set);
    CHECK(collect_pages(w.listener) == 1); /* told once */
    mmap(w.memory + 16 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(collect_pages(w.listener) == 2);
    CHECK(collect_pages(w.listener) == 0);
    munmap(w.memory, 64 * PAGE);
    CHECK(dt_collect(w.listener, NULL, -1, &set) == DT_GONE);
    dt_set_clear(&set);
    CHECK(dt_remove(w.listener, w.region, &set) == 0 && set.pages == 0);
    CHECK(dt_settle(&set) == 0);
    dt_set_clear(&set);
    CHECK(collect_pages(w.listener) == 0);
    end(&w);
}

static void test_failures(void)
{
    static const struct { uint32_t site; int error, after; } trials[] = {
        {DT_SITE_ALLOCATE, ENOMEM, 0}, {DT_SITE_SCAN, ENOMEM, 0}, {DT_SITE_SCAN, EPERM, 1}, {DT_SITE_SCAN, EFAULT, 1},
        {DT_SITE_SCAN, EPERM, 0}, {DT_SITE_SCAN, EFAULT, 0}, {DT_SITE_SCAN, ENOMEM, 1}, {DT_SITE_COPY, EFAULT, 0}};
    for (size_t t = 0; t < sizeof trials / sizeof *trials; t++)
        for (uint64_t nth = 1; nth <= 6; nth++) {
            world w = make(3000);
            dt_listener *second = listen_to(w.session, w.region);
            char *mirror = malloc(w.pages * PAGE);
            memcpy(mirror, w.memory, w.pages * PAGE);
            dt_extent extent = {.address = (uint64_t)w.memory, .nbytes = w.pages * PAGE, .mirror = mirror,
                                .through = backend ? w.region : NULL};
            for (size_t i = 0; i < w.pages; i += 3)
                w.memory[i * PAGE] = 7;
            dt_set set = {0};
            dt_fail(trials[t].site, nth, 1, trials[t].error, trials[t].after);
            int rc = dt_collect_into(w.listener, NULL, &extent, 1, &set);
            dt_fail(0, 0, 0, 0, 0);
            set.delivered = !rc;
            dt_set_clear(&set);
            if (rc) {
                CHECK(dt_collect_into(w.listener, NULL, &extent, 1, &set) == 0 && set.pages >= 1000);
                set.delivered = 1;
                dt_set_clear(&set);
            }
            CHECK(!memcmp(mirror, w.memory, w.pages * PAGE));
            CHECK(collect(second, &set) >= 1000);
            dt_set_clear(&set);
            free(mirror);
            dt_listener_drop(&second);
            end(&w);
        }
}

static void test_declared(void)
{
    world w = make(64);
    CHECK(dt_mark_dirty(w.session, (uint64_t)w.memory + 5, (uint64_t)w.memory + PAGE + 1) == 0);
    CHECK(collect_pages(w.listener) == 2);
    CHECK(dt_in_flight(w.session, (uint64_t)w.memory, (uint64_t)w.memory + 4 * PAGE, 1) == 0);
    CHECK(collect_pages(w.listener) == 4 && collect_pages(w.listener) == 4);
    CHECK(dt_in_flight(w.session, (uint64_t)w.memory, (uint64_t)w.memory + 4 * PAGE, 0) == 0);
    CHECK(collect_pages(w.listener) == 4 && collect_pages(w.listener) == 0);
    dt_failure why = {0};
    w.memory[30 * PAGE] = 3;
    CHECK(dt_write_protect(w.region, &why) == 0);
    CHECK(collect_pages(w.listener) == 1);
    CHECK(dt_session_suspend(w.session, &why) == 0);
    CHECK(collect_pages(w.listener) == 64 && collect_pages(w.listener) == 64);
    CHECK(dt_session_resume(w.session, &why) == 0);
    CHECK(collect_pages(w.listener) == 64 && collect_pages(w.listener) == 0);
    w.memory[31 * PAGE] = 3;
    CHECK(collect_pages(w.listener) == 1);
    end(&w);
}

static void test_budget(void)
{
    world w = make(40000);
    dt_set set = {0};
    for (size_t i = 0; i < w.pages; i += 100)
        w.memory[i * PAGE] = 2;
    uint64_t pages = 0;
    int calls = 0, complete = 0;
    while (!complete && calls++ < 100) {
        CHECK(dt_collect(w.listener, NULL, 0, &set) == 0);
        pages += set.pages;
        complete = set.complete;
        set.delivered = 1;
        dt_set_clear(&set);
        if (calls == 6) /* 157 MiB, in pieces of 32 MiB that begin at multiples of it */
            break;
    }
    CHECK(pages == 400);
    CHECK(calls == 6 || complete);
    end(&w);
}

static void test_fork(void)
{
    world w = make(64);
    pid_t pid = fork();
    if (!pid) {
        dt_set set = {0};
        int rc = dt_collect(w.listener, NULL, -1, &set);
        dt_session *own = NULL;
        dt_failure why = {0};
        int again = dt_session_open(remedy, 0, backend, &own, &why);
        int old = dt_session_state(w.session);
        /* The parent's scan vector is not inherited, so the child's own lies where it was: letting go of the inherited
         * session must not unmap it. */
        end(&w);
        char *memory = map(8);
        memory[0] = 1;
        dt_region *region = NULL;
        again |= dt_register(own, (uint64_t)memory, 8 * PAGE, PAGE, DT_ARM_AUTO | pinned, &region, &why);
        dt_listener *listener = listen_to(own, region);
        memory[3 * PAGE] = 1;
        again |= collect_pages(listener) != 1;
        _exit(rc == DT_FORKED && !again && old == DT_FORKED && dt_session_state(own) == 0 ? 0 : 1);
    }
    int status = 1;
    waitpid(pid, &status, 0);
    CHECK(status == 0);
    w.memory[4 * PAGE] = 2;
    CHECK(collect_pages(w.listener) == 1);
    end(&w);
}

static void test_audit(void)
{
    world w = make(64);
    dt_set set = {0};
    dt_failure why = {0};
    CHECK(dt_stop(w.listener, &set) == 0);
    CHECK(dt_settle(&set) == 0);
    dt_set_clear(&set);
    CHECK(dt_audit(w.listener, 1.0) == 0 && dt_start(w.listener, &w.region, 1, &why) == 0);
    w.memory[3 * PAGE] = 2;
    CHECK(collect_pages(w.listener) == 1 && collect_pages(w.listener) == 0);
    w.memory[4 * PAGE] = 2;
    CHECK(collect_pages(w.listener) == 1);
    w.memory[5 * PAGE] = 2; /* and somebody erases the kernel's bit */
    struct { uint64_t start, length, mode; } wp = {(uint64_t)w.memory + 5 * PAGE, PAGE, 1};
    extern int ioctl(int, unsigned long, ...);
    CHECK(ioctl(dt_session_fd(w.session), 0xc018aa06ul, &wp) == 0);
    w.memory[6 * PAGE] = 2;
    CHECK(dt_collect(w.listener, NULL, -1, &set) == DT_MISSED && set.why.start == (uint64_t)w.memory + 5 * PAGE);
    dt_set_clear(&set);
    CHECK(collect_pages(w.listener) == 2);
    end(&w);
}

/* Threads that write without pause while two listeners collect into mirrors; in the end both mirrors are the memory. */
static _Atomic int stop_writing;
static _Atomic uint64_t writes;
static int storm_rounds = 400;
static uint64_t storm_writes = 3000000;
static void *write_on(void *arg)
{
    world *w = arg;
    uint64_t x = (uint64_t)&x | 1;
    while (!atomic_load_explicit(&stop_writing, memory_order_relaxed)) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        ((uint64_t *)w->memory)[x % (w->pages * PAGE / 8)] = x;
        if (x % 1024 == 0)
            writes += 1024;
    }
    return NULL;
}

static void test_storm(void)
{
    world w = make(2048);
    dt_listener *listeners[2] = {w.listener, listen_to(w.session, w.region)};
    char *mirrors[2];
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        mirrors[i] = malloc(w.pages * PAGE);
        memcpy(mirrors[i], w.memory, w.pages * PAGE);
    }
    stop_writing = 0;
    writes = 0;
    for (int i = 0; i < 2; i++)
        pthread_create(&threads[i], NULL, write_on, &w);
    for (int round = 0, last = 0; last < 2; round++) {
        if (!last && round >= storm_rounds && writes > storm_writes) {
            stop_writing = 1;
            for (int i = 0; i < 2; i++)
                pthread_join(threads[i], NULL);
        }
        int i = stop_writing ? last++ : round % 3 == 0;
        dt_extent extent = {.address = (uint64_t)w.memory, .nbytes = w.pages * PAGE, .mirror = mirrors[i],
                            .through = backend ? w.region : NULL};
        dt_set set = {0};
        CHECK(dt_collect_into(listeners[i], NULL, &extent, 1, &set) == 0);
        set.delivered = round % 7 || last; /* some sets are lost on the way */
        dt_set_clear(&set);
    }
    for (int i = 0; i < 2; i++) {
        CHECK(!memcmp(mirrors[i], w.memory, w.pages * PAGE));
        free(mirrors[i]);
    }
    printf("storm: about %llu writes\n", (unsigned long long)writes);
    dt_listener_drop(&listeners[1]);
    end(&w);
}

static void test_each(void)
{
    test_exact();
    test_freed_page_tables();
    test_give_back();
    test_listeners();
    if (!pinned)
        test_gone_and_replaced();
    test_failures();
    test_declared();
    test_budget();
    test_fork();
    if (!backend)
        test_audit();
    test_storm();
}

/* With the argument `asking`: only what asks the kernel, and short storms. In software a machine is emulated slowly. */
int main(int argc, char **argv)
{
    int asking = argc > 1 && !strcmp(argv[1], "asking");
    if (asking) {
        storm_rounds = 12;
        storm_writes = 20000;
    }
    for (backend = DT_BACKEND_COPY; !asking && backend <= DT_BACKEND_HASH; backend++) /* which each kernel can */
        for (pinned = 0; pinned <= DT_PINNED; pinned += DT_PINNED)
            test_each();
    backend = DT_BACKEND_KERNEL;
    pinned = 0;
    dt_support support;
    dt_probe(&support);
    printf("door %d, features %#llx, categories %#llx, stores %d, discards %d, untouched %d\n", support.door,
           (unsigned long long)support.features, (unsigned long long)support.categories, support.sees_stores,
           support.sees_discards, support.sees_untouched);
    if (!support.sees_stores) {
        printf("this kernel cannot track\n%u passed, %u failed\n", passed, failed);
        return failed || !(support.scan_errno || support.api_errno || support.pagemap_errno || !support.door);
    }
    for (int round = 0; round < 2; round++) { /* the second with remedy R1, needed by this kernel or not */
        test_each();
        remedy = DT_REMEDY_ABSENT;
    }
    remedy = DT_REMEDY_NONE;
    printf("without a remedy this kernel reports, of 1024 discarded pages, %llu (small pages) and %llu (huge pages)\n",
           (unsigned long long)discarded_whole(0, 1), (unsigned long long)discarded_whole(1, 1));
    return outcome();
}
