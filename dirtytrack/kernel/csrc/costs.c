/* SPDX-License-Identifier: MIT
 * What tracking costs on this machine, for adapt.c to weigh: measured once, before what may be adapted is watched. */
#include "engine.h"
#include <sys/mman.h>

dt_costs dt_cost; /* fault stays 0 where it cannot be measured */
static _Atomic int measuring; /* 0: not yet, 1: somebody does, 2: done, as far as it went */

#define FAULTS 64u
#define APART 16u           /* pages from one that is written to the next */
#define COPIES 64u
#define TRIES 3

/* What a program wrote in an epoch is in no cache of ours when it is copied. */
static void push_out(const uint8_t *memory, uint64_t bytes)
{
#ifdef __x86_64__
    for (uint64_t i = 0; i < bytes; i += 64)
        __builtin_ia32_clflush(memory + i);
#else
    (void)memory, (void)bytes;
#endif
}

/* Nor is what the processor keeps of the page tables. 0, or -errno: then it must not be written to. */
static int forget_places(uint8_t *memory, uint64_t bytes)
{
    if (mprotect(memory, bytes, PROT_READ))
        return 0;
    return mprotect(memory, bytes, PROT_READ | PROT_WRITE) ? -errno : 0;
}

static uint64_t a_page_since(uint64_t begun, uint64_t pages) { return dt_max((dt_now_ns() - begun) / pages, 1); }

/* Pages of our own: those to be written lie apart, behind a piece without gaps. */
static void measure(dt_session *s, uint8_t *memory, uint64_t step)
{
    uint64_t page = dt_page_bytes();
    uint8_t *apart = memory + 2 * COPIES * page;
    uint64_t start = (uintptr_t)apart, end = start + FAULTS * step;
    uint64_t fault = UINT64_MAX, arm = UINT64_MAX, call = UINT64_MAX, look = UINT64_MAX;
    uint64_t copy = UINT64_MAX, copy_apart = UINT64_MAX, compare = UINT64_MAX;
    int rc = dt_uffd_register(s, start, end);
    for (int i = 0; !rc && i <= TRIES; i++) {
        uint64_t begun = dt_now_ns(), found;
        for (uint64_t k = 0; k < FAULTS; k++)
            *(volatile uint8_t *)(apart + k * step) = 1;
        if (i) /* armed by then */
            fault = dt_min(fault, a_page_since(begun, FAULTS));
        begun = dt_now_ns();
        rc = dt_scan_apart(s, start, end, true, &found);
        arm = dt_min(arm, a_page_since(begun, FAULTS));
        for (uint64_t k = 0; k < FAULTS; k++)
            *(volatile uint8_t *)(apart + k * step) = 1;
        begun = dt_now_ns();
        for (uint64_t k = 0; k < FAULTS && !rc; k++)
            rc = dt_scan_apart(s, start + k * step, start + k * step + page, true, &found);
        call = dt_min(call, a_page_since(begun, FAULTS));
        begun = dt_now_ns();
        rc = rc ? rc : dt_scan_apart(s, start, end, false, &found);
        look = dt_min(look, a_page_since(begun, FAULTS * APART));
        push_out(memory, 2 * COPIES * page);
        if (rc || (rc = forget_places(memory, 2 * COPIES * page)))
            break;
        begun = dt_now_ns();
        dt_copy_past(memory + COPIES * page, memory, COPIES * page);
        dt_copy_past_end();
        if (i) /* populated by then */
            copy = dt_min(copy, a_page_since(begun, COPIES));
        push_out(memory, 2 * COPIES * page);
        if ((rc = forget_places(memory, 2 * COPIES * page)))
            break;
        begun = dt_now_ns();
        for (uint64_t k = 0; k < COPIES; k++)
            rc |= !dt_same_bytes(memory + k * page, memory + (COPIES + k) * page, page);
        compare = dt_min(compare, a_page_since(begun, COPIES));
        push_out(memory + COPIES * page, COPIES * page);
        for (uint64_t k = 0; k < FAULTS; k++)
            push_out(apart + k * step, page);
        if (rc || (rc = forget_places(memory, 2 * COPIES * page)) || (rc = forget_places(apart, FAULTS * step)))
            break;
        begun = dt_now_ns();
        for (uint64_t k = 0; k < FAULTS; k++)
            dt_copy_past(memory + (COPIES + k * (COPIES / FAULTS)) * page, apart + k * step, page);
        dt_copy_past_end();
        copy_apart = dt_min(copy_apart, a_page_since(begun, FAULTS));
    }
    dt_uffd_unregister(s, start, end);
    dt_cost.arm = arm;
    dt_cost.call = call;
    dt_cost.look = look;
    dt_cost.copy = copy;
    dt_cost.copy_apart = dt_max(copy_apart, copy);
    dt_cost.compare = compare;
    if (!rc)
        dt_cost.fault = fault;
}

/* Once in a process, in some 2 ms: not to be done in a collect, which may be somebody's pause. */
bool dt_costs_known(dt_session *s)
{
    int before = 0;
    if (!atomic_compare_exchange_strong(&measuring, &before, 1))
        return before == 2 && dt_cost.fault;
    uint64_t page = dt_page_bytes(), step = APART * page, bytes = 2 * COPIES * page + FAULTS * step;
    uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory != MAP_FAILED) {
        madvise(memory, bytes, MADV_NOHUGEPAGE);
        memset(memory, 1, COPIES * page);
        measure(s, memory, step);
        munmap(memory, bytes);
    }
    atomic_store(&measuring, 2);
    return dt_cost.fault;
}

void dt_costs_exchange(dt_costs *costs)
{
    dt_costs before = dt_cost;
    dt_cost = *costs;
    *costs = before;
    atomic_store(&measuring, dt_cost.fault ? 2 : 0);
}
