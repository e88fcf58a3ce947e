/* SPDX-License-Identifier: MIT
 * When it is measured what tracking costs: before the first epoch of what may be adapted, and in no collect. */
#include "engine.h"
#include "counting.h"
#include <sys/mman.h>

static dt_session *session;

static void watch(uint64_t nbytes, int adaptive, int exact)
{
    void *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    dt_failure why = {0};
    dt_region *region = NULL;
    dt_listener *listener = NULL;
    CHECK(dt_register(session, (uint64_t)(uintptr_t)memory, nbytes, 0, DT_ARM_AUTO, &region, &why) == 0);
    CHECK(dt_listener_new(session, &listener) == 0);
    CHECK(dt_listener_wish(listener, adaptive, exact, 0) == 0);
    CHECK(dt_start(listener, &region, 1, &why) == 0);
    dt_listener_drop(&listener);
    dt_region_drop(&region);
}

int main(void)
{
    dt_support support;
    dt_probe(&support);
    if (!support.sees_stores)
        return printf("this kernel cannot track\n"), 0;
    dt_failure why = {0};
    CHECK(dt_session_open(DT_REMEDY_PROBE, 0, DT_BACKEND_KERNEL, &session, &why) == 0);
    watch(1 << 20, 1, 0);
    watch(8 << 20, 0, 0);
    watch(8 << 20, 1, 1);
    CHECK(dt_cost.fault == 0); /* nobody needs it */
    watch(8 << 20, 1, 0);
    CHECK(dt_cost.fault > 0);
    CHECK(dt_cost.arm > 0 && dt_cost.call > 0 && dt_cost.copy > 0 && dt_cost.copy_apart >= dt_cost.copy);
    uint64_t before = dt_cost.fault;
    dt_cost.fault = before + 1;
    watch(16 << 20, 1, 0);
    CHECK(dt_cost.fault == before + 1); /* once in a process */
    dt_session_drop(&session);
    return outcome();
}
