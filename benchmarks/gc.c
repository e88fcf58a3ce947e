/* SPDX-License-Identifier: MIT
 *
 * What benchmarks/gc.py compares with: the loop that a collector's author writes to find the words of some pages that point
 * into the nursery. Shares no code with dirtytrack. Returns nanoseconds that C measured.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <time.h>

struct run {
    uint64_t start, end;
};

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t gc_slots(const struct run *runs, uint64_t n, uint64_t low, uint64_t high, uint64_t *out, uint64_t *found)
{
    int64_t begin = now();
    uint64_t count = 0;
    for (uint64_t i = 0; i < n; i++) {
        const uint64_t *end = (const uint64_t *)(uintptr_t)runs[i].end;
        for (const uint64_t *word = (const uint64_t *)(uintptr_t)runs[i].start; word < end; word++)
            if (*word >= low && *word < high)
                out[count++] = (uintptr_t)word;
    }
    *found = count;
    return now() - begin;
}
