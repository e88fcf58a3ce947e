/* SPDX-License-Identifier: MIT
 * What this kernel can do, found by trying on memory and descriptors of our own. Versions are never compared:
 * distributions backport. */
#include "engine.h"
#include <sys/mman.h>
#include <unistd.h>

typedef struct trial {
    int uffd, pagemap;
    char *memory;
    uint64_t page;
} trial;

static long look(const trial *t, const char *at, uint64_t pages, uint64_t flags, uint64_t mask, uint64_t *found)
{
    struct k_page_region vector[64] = {0};
    struct k_pm_scan_arg arg = {.size = sizeof arg, .flags = flags, .start = (uint64_t)at, .end = (uint64_t)at + pages * t->page,
                                .vec = (uint64_t)vector, .vec_len = 64, .category_mask = mask, .return_mask = mask};
    int fail = dt_fail_at(DT_SITE_SCAN);
    long n = fail ? -1 : ioctl(t->pagemap, K_PAGEMAP_SCAN, &arg);
    if (n < 0)
        return fail ? -abs(fail) : -errno;
    *found = 0;
    for (long i = 0; i < n; i++)
        *found += (vector[i].end - vector[i].start) / t->page;
    return 0;
}

static int enlist(const trial *t, const char *at, uint64_t bytes)
{
    struct k_uffdio_register request = {.range = {(uint64_t)at, bytes}, .mode = K_UFFDIO_REGISTER_MODE_WP};
    int fail = dt_fail_at(DT_SITE_REGISTER);
    return fail ? abs(fail) : ioctl(t->uffd, K_UFFDIO_REGISTER, &request) ? errno : 0;
}

enum { PAGES = 16 };
#define ARM_AND_CHECK (K_PM_SCAN_WP_MATCHING | K_PM_SCAN_CHECK_WPASYNC)

static void try_stores_and_discards(const trial *t, dt_support *out)
{
    uint64_t first, second, third;
    char *at = t->memory;
    memset(at, 1, PAGES * t->page);
    out->register_errno = enlist(t, at, PAGES * t->page);
    if (out->register_errno || look(t, at, PAGES, ARM_AND_CHECK, K_PAGE_IS_WRITTEN, &first))
        return;
    *(volatile char *)(at + 3 * t->page) = 2;
    if (look(t, at, PAGES, ARM_AND_CHECK, K_PAGE_IS_WRITTEN, &second) ||
        look(t, at, PAGES, ARM_AND_CHECK, K_PAGE_IS_WRITTEN, &third))
        return;
    out->sees_stores = first == PAGES && second == 1 && third == 0;
    if (!madvise(at + 5 * t->page, t->page, MADV_DONTNEED) &&
        !look(t, at, PAGES, K_PM_SCAN_CHECK_WPASYNC, K_PAGE_IS_WRITTEN, &first))
        out->sees_discards = first == 1;
}

/* The kernels that pass over an empty page table are those that pass over a freed one: a whole armed huge page that was
 * discarded, a few MiB of small ones (measured, Linux 6.12.43-7.1.7). Never touched is the cheap way to ask. */
static void try_untouched(const trial *t, const char *at, uint64_t bytes, dt_support *out)
{
    uint64_t found;
    if (!enlist(t, at, bytes) && !look(t, at, bytes / t->page, K_PM_SCAN_CHECK_WPASYNC, K_PAGE_IS_WRITTEN, &found))
        out->sees_untouched = found == bytes / t->page;
}

void dt_probe(dt_support *out)
{
    *out = (dt_support){.page_bytes = dt_page_bytes()};
    trial t = {.uffd = -1, .page = out->page_bytes};
    for (int door = DT_DOOR_USER_MODE; door <= DT_DOOR_FULL; door++) { /* each, so that the doctor can tell of each */
        int fd = dt_open_door((enum dt_door)door);
        out->door_errno[door] = fd < 0 ? -fd : 0;
        if (fd >= 0 && t.uffd < 0) {
            t.uffd = fd;
            out->door = door;
        } else if (fd >= 0) {
            close(fd);
        }
    }
    if (t.uffd >= 0) {
        int rc = dt_uffd_api(t.uffd, K_UFFD_FEATURE_WP_ASYNC | K_UFFD_FEATURE_WP_UNPOPULATED, &out->features);
        out->api_errno = -rc;
        int plain = rc ? dt_open_door((enum dt_door)out->door) : -1; /* asked for nothing, it says what it has */
        if (plain >= 0) {
            dt_uffd_api(plain, 0, &out->features);
            close(plain);
        }
    }
    t.pagemap = dt_open_pagemap();
    out->pagemap_errno = t.pagemap < 0 ? -t.pagemap : 0;
    uint64_t table = t.page * (t.page / 8), bytes = PAGES * t.page + 2 * table, ignored; /* what one page table maps */
    t.memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (t.memory != MAP_FAILED && t.pagemap >= 0) {
        madvise(t.memory, bytes, MADV_NOHUGEPAGE);
        out->scan_errno = (int)-look(&t, t.memory, 1, 0, K_PAGE_IS_WRITTEN, &ignored);
        for (unsigned bit = 0; !out->scan_errno && bit < 64; bit++)
            if (!look(&t, t.memory, 1, 0, (uint64_t)1 << bit, &ignored))
                out->categories |= (uint64_t)1 << bit;
        if (t.uffd >= 0 && !out->api_errno && !out->scan_errno) {
            try_stores_and_discards(&t, out);
            try_untouched(&t, (char *)dt_up((uint64_t)t.memory + PAGES * t.page, table), table, out);
        }
    }
    out->maps_query = dt_maps_query();
    if (t.uffd >= 0)
        close(t.uffd);
    if (t.pagemap >= 0)
        close(t.pagemap);
    if (t.memory != MAP_FAILED)
        munmap(t.memory, bytes);
}
