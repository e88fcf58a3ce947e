/* SPDX-License-Identifier: MIT
 * Every kind of memory without Python: stores, discards that leave a marker behind (remedy R2), huge pages of the pool (R1),
 * what is populated only, several mappings of one memory, and what the kernel tells by itself. */
#define _GNU_SOURCE
#include "../../dirtytrack/kernel/csrc/dirtytrack.h"
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static int passed, failed;
static uint64_t page; /* of the kind in question */
static const char *now;
#define CHECK(condition)                                                                                                \
    do {                                                                                                                \
        if (condition)                                                                                                  \
            passed++;                                                                                                   \
        else {                                                                                                          \
            failed++;                                                                                                   \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, now, #condition);                                             \
        }                                                                                                               \
    } while (0)

enum { PAGES = 8, HUGE_FLAG = 0x40000, REMOVE = 9, MFD_HUGE = 4 };

typedef struct kind { const char *name; bool shared, huge; int file; /* 0: none, 1: memfd, 2: on a disk */ } kind;
static const kind KINDS[] = {
    {"private", false, false, 0},        {"shared", true, false, 0},        {"memfd shared", true, false, 1},
    {"memfd private", false, false, 1},  {"file shared", true, false, 2},   {"file private", false, false, 2},
    {"hugetlb private", false, true, 0}, {"hugetlb shared", true, true, 0}, {"hugetlb memfd shared", true, true, 1},
    {"hugetlb memfd private", false, true, 1},
};

/* NULL where this machine cannot provide it. */
static char *map_kind(const kind *k, int *fd)
{
    static uint64_t small;
    small = (uint64_t)sysconf(_SC_PAGESIZE);
    page = k->huge ? (uint64_t)2 << 20 : small;
    int flags = (k->shared ? MAP_SHARED : MAP_PRIVATE) | (k->file ? 0 : MAP_ANONYMOUS) | (k->huge && !k->file ? HUGE_FLAG : 0);
    *fd = -1;
    if (k->file == 1)
        *fd = memfd_create("kind", MFD_CLOEXEC | (k->huge ? MFD_HUGE : 0));
    else if (k->file == 2) {
        char name[] = "./test_kinds.XXXXXX";
        *fd = mkstemp(name);
        if (*fd >= 0)
            unlink(name);
    }
    if (k->file && (*fd < 0 || ftruncate(*fd, (off_t)(PAGES * page))))
        return NULL;
    char *memory = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, flags, *fd, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static dt_listener *listen_to(dt_session *s, dt_region *r)
{
    dt_listener *l = NULL;
    dt_failure why = {0};
    CHECK(dt_listener_new(s, &l) == 0);
    CHECK(dt_start(l, &r, 1, &why) == 0);
    return l;
}

/* One bit a page of the kind. */
static unsigned bits_of(dt_set *set, const char *memory)
{
    unsigned bits = 0;
    for (unsigned i = 0; i < PAGES; i++)
        bits |= (unsigned)dt_set_contains(set, (uint64_t)memory + i * page) << i;
    set->delivered = 1;
    dt_set_clear(set);
    return bits;
}

static unsigned collect(dt_listener *l, const char *memory)
{
    dt_set set = {0};
    CHECK(dt_collect(l, NULL, -1, &set) == 0);
    return bits_of(&set, memory);
}

static unsigned peek(dt_listener *l, const char *memory)
{
    dt_set set = {0};
    CHECK(dt_peek(l, NULL, &set) == 0);
    return bits_of(&set, memory);
}

/* With `remedy` all of it is found; without remedies, what is missed shows that they were needed: `missed` counts it. */
static int test_kind(const kind *k, uint32_t remedy, unsigned *missed)
{
    int fd;
    char *memory = map_kind(k, &fd);
    now = k->name;
    if (!memory) {
        if (fd >= 0)
            close(fd);
        return 0;
    }
    for (unsigned i = 0; i < PAGES / 2; i++)
        memory[i * page] = 1;
    dt_session *s = NULL;
    dt_region *r = NULL;
    dt_failure why = {0};
    dt_region_info about;
    CHECK(dt_session_open(remedy, 0, DT_BACKEND_KERNEL, &s, &why) == 0);
    CHECK(dt_register(s, (uint64_t)memory + 5, PAGES * page - 9, 0, DT_ARM_AUTO, &r, &why) == 0);
    dt_region_about(r, &about);
    CHECK(about.granule_bytes == page && about.start == (uint64_t)memory && about.end == (uint64_t)memory + PAGES * page);
    dt_listener *l = listen_to(s, r), *late = listen_to(s, r);
    unsigned found, all = 0;
    CHECK(peek(l, memory) == 0 && collect(l, memory) == 0);
    memory[page] = 2;
    memory[7 * page + 9] = 2;
    all |= 1u << 1 | 1u << 7;
    CHECK(peek(l, memory) == (1u << 1 | 1u << 7));
    CHECK(collect(l, memory) == (1u << 1 | 1u << 7) && collect(l, memory) == 0);
    /* A clean page is discarded: its content is gone, its marker may not be. */
    int advice = k->shared ? REMOVE : MADV_DONTNEED;
    CHECK(madvise(memory + 2 * page, page, advice) == 0);
    found = peek(l, memory);
    *missed += !(found & 1u << 2);
    CHECK(collect(l, memory) == found);
    CHECK(remedy || found == 1u << 2);
    CHECK(collect(l, memory) == 0);
    /* A page that was written is discarded before anybody asked. */
    memory[3 * page] = 3;
    CHECK(madvise(memory + 3 * page, page, advice) == 0);
    found = collect(l, memory);
    *missed += !(found & 1u << 3);
    CHECK(remedy || found == 1u << 3);
    CHECK(collect(l, memory) == 0);
    /* It is written again, and again discarded. */
    memory[3 * page] = 4;
    CHECK(collect(l, memory) == 1u << 3);
    CHECK(madvise(memory + 3 * page, page, advice) == 0);
    CHECK(remedy || collect(l, memory) == 1u << 3);
    if (fd >= 0) { /* shrunk and grown again; the last page had content */
        memory[6 * page] = 1;
        CHECK((collect(l, memory) & 1u << 6) != 0);
        int shrunk = ftruncate(fd, (off_t)(6 * page)), grown = ftruncate(fd, (off_t)(PAGES * page));
        CHECK(!shrunk && !grown);
        found = collect(l, memory);
        CHECK(remedy || (found & 3u << 6) == 3u << 6);
    }
    all |= 1u << 2 | 1u << 3;
    CHECK(remedy || (collect(late, memory) & all) == all); /* whoever sleeps is told of all of it */
    dt_listener_drop(&l);
    dt_listener_drop(&late);
    dt_region_drop(&r);
    dt_session_drop(&s);
    munmap(memory, PAGES * page);
    if (fd >= 0)
        close(fd);
    return 1;
}

static void test_present(void)
{
    now = "present";
    page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t bytes = (uint64_t)16 << 30;
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory != MAP_FAILED);
    if (memory == MAP_FAILED)
        return;
    madvise(memory, bytes, MADV_NOHUGEPAGE);
    for (uint64_t at = 0; at < bytes; at += (uint64_t)1 << 30)
        memory[at + 3 * page] = 1;
    dt_session *s = NULL;
    dt_region *r = NULL, *small = NULL;
    dt_failure why = {0};
    dt_region_info about;
    CHECK(dt_session_open(0, 0, DT_BACKEND_KERNEL, &s, &why) == 0);
    CHECK(dt_register(s, (uint64_t)memory, bytes, 0, DT_ARM_AUTO, &r, &why) == 0);
    dt_region_about(r, &about);
    CHECK(about.arming == DT_ARM_PRESENT);
    dt_listener *l = listen_to(s, r);
    char *part = memory + ((uint64_t)5 << 30);
    CHECK(collect(l, part) == 0);
    part[3 * page] = part[4 * page] = 2;
    CHECK(peek(l, part) == (1u << 3 | 1u << 4) && collect(l, part) == (1u << 3 | 1u << 4) && collect(l, part) == 0);
    CHECK(madvise(part + 3 * page, page, MADV_DONTNEED) == 0);
    CHECK(peek(l, part) == 1u << 3 && collect(l, part) == 1u << 3 && collect(l, part) == 0);
    part[5 * page] = 2;
    CHECK(madvise(part, (size_t)1 << 29, MADV_DONTNEED) == 0);
    CHECK((collect(l, part) & 1u << 4) && collect(l, part) == 0);
    CHECK(dt_register(s, (uint64_t)part, 8 * page, 0, DT_ARM_PRESENT, &small, &why) == 0); /* within: both ways at once */
    dt_listener *other = listen_to(s, small);
    part[page] = 1;
    CHECK(collect(other, part) == 1u << 1 && collect(l, part) == 1u << 1 && collect(other, part) == 0);
    dt_listener_drop(&l);
    dt_listener_drop(&other);
    dt_region_drop(&r);
    dt_region_drop(&small);
    dt_session_drop(&s);
    munmap(memory, bytes);
}

static void test_aliases(void)
{
    now = "aliases";
    page = (uint64_t)sysconf(_SC_PAGESIZE);
    int fd = memfd_create("alias", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)(PAGES * page)) == 0);
    char *one = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *two = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *half = mmap(NULL, PAGES / 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)(PAGES / 2 * page));
    memset(one, 1, PAGES * page);
    memset(two, 1, PAGES * page); /* present at each address: a page that is not, in a file that was just changed, is told */
    dt_session *s = NULL;
    dt_region *r = NULL, *second = NULL;
    dt_failure why = {0};
    dt_region_info about;
    CHECK(dt_session_open(0, 0, DT_BACKEND_KERNEL, &s, &why) == 0);
    CHECK(dt_register(s, (uint64_t)one, PAGES * page, 0, DT_ARM_AUTO, &r, &why) == 0);
    dt_region_about(r, &about);
    CHECK(about.aliases == 2);
    dt_listener *l = listen_to(s, r);
    CHECK(collect(l, one) == 0);
    one[0] = two[page] = half[0] = 2;
    CHECK(peek(l, one) == (1u << 0 | 1u << 1 | 1u << 4) && collect(l, one) == (1u << 0 | 1u << 1 | 1u << 4));
    CHECK(collect(l, one) == 0);
    CHECK(dt_register(s, (uint64_t)two, PAGES * page, 0, DT_ARM_AUTO, &second, &why) == 0);
    dt_listener *other = listen_to(s, second);
    CHECK(collect(other, two) == 0 && collect(l, one) == 0);
    one[2 * page] = two[3 * page] = half[page] = 3;
    CHECK(collect(other, two) == (3u << 2 | 1u << 5) && collect(l, one) == (3u << 2 | 1u << 5));
    CHECK(collect(other, two) == 0 && collect(l, one) == 0);
    CHECK(dt_mark_dirty(s, (uint64_t)one, (uint64_t)one + 1) == 0);
    CHECK(collect(other, two) == 1 && collect(l, one) == 1);
    CHECK(madvise(one + 6 * page, page, REMOVE) == 0); /* gone at each of its addresses */
    CHECK(collect(other, two) == 1u << 6 && (collect(l, one) & 1u << 6));
    CHECK((collect(other, two) | collect(l, one) | 1u << 6) == 1u << 6); /* found by either, it may be told twice */
    CHECK(collect(other, two) == 0 && collect(l, one) == 0);
    munmap(half, PAGES / 2 * page);
    two[7 * page] = 1;
    CHECK(collect(l, one) == 1u << 7);
    dt_listener_drop(&other);
    dt_region_drop(&second);
    two[5 * page] = 1; /* it stays an alias of the first */
    CHECK((collect(l, one) & 1u << 5) != 0);
    CHECK(collect(l, one) == 0);
    two[5 * page] = 1;
    CHECK(collect(l, one) == 1u << 5);
    dt_listener_drop(&l);
    dt_region_drop(&r);
    dt_session_drop(&s);
    munmap(one, PAGES * page);
    munmap(two, PAGES * page);
    close(fd);
}

/* The page is read before the next collect: it is there again, and armed. Only who was told knows. */
static void test_events(void)
{
    now = "events";
    const kind memfd = KINDS[2];
    int fd;
    char *memory = map_kind(&memfd, &fd);
    memset(memory, 1, PAGES * page);
    dt_session *s = NULL;
    dt_region *r = NULL;
    dt_failure why = {0};
    CHECK(dt_session_open(DT_REMEDY_NONE, 1, DT_BACKEND_KERNEL, &s, &why) == 0);
    CHECK(dt_register(s, (uint64_t)memory, PAGES * page, 0, DT_ARM_AUTO, &r, &why) == 0);
    dt_listener *l = listen_to(s, r);
    CHECK(collect(l, memory) == 0);
    CHECK(madvise(memory + 2 * page, page, REMOVE) == 0 && memory[2 * page] == 0);
    CHECK(collect(l, memory) == 1u << 2);
    struct timespec settle = {0, 60 * 1000 * 1000};
    nanosleep(&settle, NULL);
    collect(l, memory); /* once more, in case that the discard came after that collect */
    CHECK(collect(l, memory) == 0);
    for (int i = 0; i < 10000; i++) /* more than are kept */
        madvise(memory + (i % 4) * page, page, REMOVE);
    CHECK((collect(l, memory) & 15) == 15);
    CHECK(dt_session_suspend(s, &why) == 0);
    CHECK(madvise(memory, page, REMOVE) == 0); /* nobody is waited for */
    CHECK(dt_session_resume(s, &why) == 0);
    CHECK(collect(l, memory) == 255);
    nanosleep(&settle, NULL);
    collect(l, memory);
    CHECK(madvise(memory + 5 * page, page, REMOVE) == 0 && memory[5 * page] == 0);
    CHECK(collect(l, memory) == 1u << 5);
    for (int i = 0; i < 2000; i++) { /* whoever discards may ask at once: the event was read, and must be known */
        memory[3 * page] = 1;
        collect(l, memory);
        CHECK(madvise(memory + 3 * page, page, REMOVE) == 0 && memory[3 * page] == 0);
        CHECK((collect(l, memory) & 1u << 3) != 0);
    }
    dt_session_close(s);
    CHECK(madvise(memory + 5 * page, page, REMOVE) == 0);
    dt_listener_drop(&l);
    dt_region_drop(&r);
    dt_session_drop(&s);
    munmap(memory, PAGES * page);
    close(fd);
}

int main(void)
{
    dt_support support;
    dt_probe(&support);
    if (!support.sees_stores) {
        printf("this kernel cannot track\n0 passed, 0 failed\n");
        return 0;
    }
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        unsigned missed = 0, without = 0;
        if (!test_kind(&KINDS[i], 0, &missed)) {
            printf("%s: not here\n", KINDS[i].name);
            continue;
        }
        test_kind(&KINDS[i], DT_REMEDY_NONE, &without);
        CHECK(missed == 0);
        printf("%s: without remedies %u of 2 discards are missed\n", KINDS[i].name, without);
    }
    test_present();
    test_aliases();
    test_events();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
