/* SPDX-License-Identifier: MIT
 * PAGEMAP_SCAN in the kernel's own words, on any pagemap descriptor, resumed until it is done.
 *
 * An arming scan consumes what it finds, so nothing found may be lost on any path: room for the kernel's answer exists
 * before each call, and is zeroed, so that the answer can be told from nothing where a call fails and its count with it
 * (Linux 6.7 to 7.3: EPERM midway). */
#include "internal.h" /* first: it asks for GNU names */
#include "abi.h"
#include <assert.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* One call over 64 GiB keeps mmap in other threads waiting for more than a second, one over 1 GiB a few ms. Calls end
 * at multiples of it: a call that ended inside a huge page would skip that page in silence. */
#define CALL_BYTES ((uint64_t)1 << 30)
#define VECTOR_LENGTH 1024u

static_assert(sizeof(dt_page_region) == sizeof(struct k_page_region), "the kernel writes into our result");
static_assert(offsetof(dt_page_region, end) == offsetof(struct k_page_region, end), "in its own layout");
static_assert(offsetof(dt_page_region, categories) == offsetof(struct k_page_region, categories), "in its own layout");

static int reserve(dt_scan_result *result, uint64_t *room, uint64_t wanted)
{
    if (wanted <= *room)
        return 0;
    uint64_t more = dt_max(wanted, 2 * *room);
    if (more > SIZE_MAX / 4 / sizeof *result->regions)
        return -ENOMEM;
    dt_page_region *grown = dt_grow(result->regions, (size_t)*room * sizeof *grown, (size_t)more * sizeof *grown);
    if (!grown)
        return -ENOMEM;
    result->regions = grown;
    *room = more;
    return 0;
}

/* What fits a long-lived result; where shrinking fails the room stays. */
static void trim(dt_scan_result *result, uint64_t room)
{
    if (!result->regions || room <= 2 * result->count + 64)
        return;
    uint64_t count = dt_max(result->count, 1);
    dt_page_region *smaller = dt_grow(result->regions, (size_t)room * sizeof *smaller, (size_t)count * sizeof *smaller);
    if (smaller)
        result->regions = smaller;
}

static int scan_call(int fd, const dt_scan_request *request, uint64_t start, uint64_t end, uint64_t max_pages,
                     dt_page_region *vector, uint64_t length)
{
    struct k_pm_scan_arg arg = {
        .size = sizeof arg,
        .flags = request->flags,
        .start = start,
        .end = end,
        .vec = (uintptr_t)vector,
        .vec_len = length,
        .max_pages = max_pages,
        .category_inverted = request->category_inverted,
        .category_mask = request->category_mask,
        .category_anyof_mask = request->category_anyof_mask,
        .return_mask = request->return_mask,
    };
    int fail = dt_fail_at(DT_SITE_SCAN);
    if (fail > 0)
        return -fail;
    /* SAFETY: `vector` has room for `length` regions and stays until the call returns. It is never empty: an arming
     * call without one arms everything and tells nothing. */
    int n = ioctl(fd, K_PAGEMAP_SCAN, &arg);
    if (n < 0)
        return -errno;
    return fail ? fail : n;
}

/* Takes the `n` regions behind the last one into the result: pages counted, neighbours of one kind united. */
static uint64_t harvest(dt_scan_result *result, uint64_t n)
{
    dt_page_region *regions = result->regions;
    uint64_t bytes = 0, count = result->count, end = count + n;
    for (uint64_t i = count; i < end; i++) {
        bytes += regions[i].end - regions[i].start;
        dt_page_region *last = count ? regions + count - 1 : NULL;
        if (last && last->end == regions[i].start && last->categories == regions[i].categories)
            last->end = regions[i].end;
        else
            regions[count++] = regions[i];
    }
    result->count = count;
    return bytes >> dt_page_shift();
}

static int fail_scan(dt_scan_result *result, int code, enum dt_step step, uint64_t start, uint64_t end)
{
    result->walk_end = start;
    return dt_fail_with(&result->why, code, -code, step, start, end);
}

static int scan_range(int fd, const dt_scan_request *request, dt_scan_result *result, uint64_t *room)
{
    uint64_t page = dt_page_bytes(), at = request->start, last = request->end, budget = request->max_pages;
    if (last + page > last)
        last = dt_up(last, page);
    /* Arm64 passes over the top byte of an address, and would arm what lies at the rest of it. */
    if ((at | last) >> 56)
        return fail_scan(result, -EFAULT, DT_STEP_SCAN, at, last);
    /* A range that the kernel would refuse as a whole is refused before any of its parts is armed. Empty and reversed
     * ranges go to the kernel in one call, for its answer. */
    if (at >= last || last - at > CALL_BYTES) {
        uint64_t start = at >= last ? at : dt_down(last, page);
        if (reserve(result, room, 1))
            return fail_scan(result, -ENOMEM, DT_STEP_MEMORY, at, last);
        memset(result->regions, 0, sizeof *result->regions);
        int n = scan_call(fd, request, start, last, budget, result->regions, 1);
        if (n < 0)
            return fail_scan(result, n, DT_STEP_SCAN, at, last);
    }
    while (at < last) {
        uint64_t end = dt_min(last, dt_down(at, CALL_BYTES) + CALL_BYTES);
        uint64_t length = dt_max(dt_min(VECTOR_LENGTH, (end - at) / page), 1);
        if (budget)
            length = dt_min(length, budget);
        if (reserve(result, room, result->count + length))
            return fail_scan(result, -ENOMEM, DT_STEP_MEMORY, at, last);
        dt_page_region *vector = result->regions + result->count;
        memset(vector, 0, (size_t)length * sizeof *vector); /* faults it in too: EFAULT would cost what was found */
        int n = scan_call(fd, request, at, end, budget, vector, length);
        uint64_t found = 0;
        if (n >= 0)
            found = (uint64_t)n;
        else
            while (found < length && vector[found].end)
                found++;
        /* The next call starts where the last region ends, never where the kernel's walk_end says: after more than 512
         * regions it may name a place far before the walk's (Linux 6.12 to 7.3), and the walk would go backwards. */
        uint64_t reached = found ? vector[found - 1].end : at;
        bool forward = !found || (vector[0].start >= at && reached > at);
        uint64_t pages = harvest(result, found);
        if (n < 0)
            return fail_scan(result, n, DT_STEP_SCAN, at, end);
        if (DT_UNLIKELY(!forward))
            return fail_scan(result, -EIO, DT_STEP_SCAN, at, end);
        if (budget && pages >= budget) {
            result->walk_end = reached;
            return 0;
        }
        budget -= budget ? pages : 0;
        at = found < length ? end : reached;
    }
    result->walk_end = last;
    return 0;
}

/* A scan of a process that ended or replaced itself by exec walks an address space without mappings: some kernels say
 * ESRCH, others (a build of Linux 6.18.44 among them) nothing at all, which would read as "nothing was written". To read
 * the same descriptor gives the end of the file then, on both. Asked after the scan, since a process may end meanwhile
 * and none comes back. */
static int still_there(int fd, dt_scan_result *result)
{
    uint64_t entry;
    int fail = dt_fail_at(DT_SITE_SCAN);
    ssize_t n = fail ? -1 : pread(fd, &entry, sizeof entry, 0);
    int error = fail ? abs(fail) : n < 0 ? errno : ESRCH;
    return n > 0 ? 0 : dt_fail_with(&result->why, -error, error, DT_STEP_SCAN, 0, 0);
}

int dt_pagemap_scan(int pagemap_fd, const dt_scan_request *request, dt_scan_result *out)
{
    uint64_t room = 0;
    memset(out, 0, sizeof *out);
    int code = scan_range(pagemap_fd, request, out, &room);
    if (!code)
        code = still_there(pagemap_fd, out);
    trim(out, room);
    return code;
}

void dt_scan_result_clear(dt_scan_result *result)
{
    dt_free(result->regions);
    memset(result, 0, sizeof *result);
}
