/* SPDX-License-Identifier: MIT
 *
 * GCBench on libgc, the collector of Boehm, Demers and Weiser, beside benchmarks/barriers.c. Prints JSON.
 *
 *     cc -O2 libgc.c -lgc -o libgc && ./libgc DEPTH [stop | incremental | generational] [total | pauses]
 *
 * A step of incremental marking is no event that libgc tells, but lengthens an allocation: with "pauses" the clock is read
 * after each allocation, and those that took LEAST_PAUSE_NS and more are told. That makes the run longer, so the time of all
 * of it is told by a run of its own.
 */
#define STORE(slot, value) (*(slot) = (value)) /* it watches pages itself */
#define GC_THREADS /* for GC_set_markers_count */
#include <gc.h>
#include <string.h>
#include "gcbench.h"

enum { LEAST_PAUSE_NS = 50000, MOST_PAUSES = 1 << 20 };

static int pauses_wanted;
static uint64_t pauses[MOST_PAUSES], pause_count;

static node *allocate(uint64_t depth, uint64_t number)
{
    uint64_t began = pauses_wanted ? now() : 0;
    node *n = GC_MALLOC(sizeof *n);
    if (!n)
        exit(1);
    if (pauses_wanted) {
        uint64_t took = now() - began;
        if (took >= LEAST_PAUSE_NS && pause_count < MOST_PAUSES)
            pauses[pause_count++] = took;
    }
    n->depth = depth;
    n->number = number;
    return n;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return fprintf(stderr, "usage: libgc DEPTH [stop | incremental | generational] [total | pauses]\n"), 2;
    GC_set_markers_count(1); /* one thread, as the others have */
    GC_INIT();
    if (!strcmp(argv[2], "generational"))
        GC_set_time_limit(GC_TIME_UNLIMITED);
    if (strcmp(argv[2], "stop"))
        GC_enable_incremental();
    pauses_wanted = !strcmp(argv[3], "pauses");
    uint64_t began = now();
    run_gcbench((unsigned)atoi(argv[1]));
    printf("{\"total_ns\": %lu, \"collections\": %lu, \"heap_bytes\": %lu, \"incremental\": %d, \"version\": \"%d.%d.%d\", ",
           (unsigned long)(now() - began), (unsigned long)GC_get_gc_no(), (unsigned long)GC_get_heap_size(),
           GC_is_incremental_mode(), GC_VERSION_MAJOR, GC_VERSION_MINOR, GC_VERSION_MICRO);
    tell("pause_ns", pauses, pause_count, "}\n");
    return 0;
}
