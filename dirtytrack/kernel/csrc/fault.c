/* SPDX-License-Identifier: MIT
 * Allocations and pages; and the failures that tests order. */
#include "internal.h"
#include <signal.h>
#include <unistd.h>

_Atomic uint32_t dt_fail_sites;
static _Atomic uint64_t fail_calls, fail_nth, fail_times;
static _Atomic int fail_errno, fail_after;

uint64_t dt_fail(uint32_t sites, uint64_t nth, uint64_t times, int os_errno, int after)
{
    uint64_t calls = atomic_exchange(&fail_calls, 0);
    atomic_store(&dt_fail_sites, 0);
    atomic_store(&fail_nth, nth);
    atomic_store(&fail_times, times);
    atomic_store(&fail_errno, os_errno);
    atomic_store(&fail_after, after);
    atomic_store(&dt_fail_sites, sites);
    return calls;
}

int dt_fail_check(enum dt_site site)
{
    (void)site;
    uint64_t call = atomic_fetch_add(&fail_calls, 1) + 1;
    uint64_t first = atomic_load(&fail_nth), times = atomic_load(&fail_times);
    if (call < first || (times && call >= first + times))
        return 0;
    int error = atomic_load(&fail_errno);
    if (atomic_load(&fail_after) == 2)
        kill(getpid(), SIGKILL);
    return atomic_load(&fail_after) ? -error : error;
}

void *dt_alloc(size_t bytes)
{
    if (dt_fail_at(DT_SITE_ALLOCATE))
        return NULL;
    return calloc(1, bytes ? bytes : 1);
}

DT_HOT void *dt_grow(void *block, size_t old_bytes, size_t bytes)
{
    (void)old_bytes;
    if (dt_fail_at(DT_SITE_ALLOCATE))
        return NULL;
    return realloc(block, bytes);
}

void dt_free(void *block) { free(block); }

static _Atomic unsigned page_shift;

DT_HOT unsigned dt_page_shift(void)
{
    unsigned shift = atomic_load_explicit(&page_shift, memory_order_relaxed);
    if (DT_UNLIKELY(!shift)) {
        shift = (unsigned)__builtin_ctzl((unsigned long)sysconf(_SC_PAGESIZE));
        atomic_store_explicit(&page_shift, shift, memory_order_relaxed);
    }
    return shift;
}

uint64_t dt_page_bytes(void) { return (uint64_t)1 << dt_page_shift(); }
