/* SPDX-License-Identifier: MIT
 * Mappings and raw scans, asked in two ways each. */
#include "checking.h"
#include "abi.h"
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

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
    test_maps();
    if (open_uffd()) {
        test_scan();
        test_scan_far();
    } else {
        printf("raw scans skipped: this kernel does not track writes\n");
    }
    return outcome();
}
