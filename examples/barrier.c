/* SPDX-License-Identifier: MIT
 *
 * A generational collector in C whose write barrier is the page tables: GCBench (Ellis, Kovac and Boehm) on a copying nursery
 * and a mark-sweep old generation. No store of the program is watched; a minor collection asks which pages were written.
 *
 *     cc -O2 $(python -m dirtytrack.gc --cflags) barrier.c $(python -m dirtytrack.gc --sources --libs) -o barrier
 *     ./barrier [DEPTH] [check | scan]
 *
 * "check" compares each minor collection's slots with a search of the whole old generation; "scan" has no barrier at all, and
 * searches so each time. Ends with the word "identical" where every tree was as it was built.
 */
#include <dirtytrack.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef struct node {
    struct node *left, *right;
    uint64_t depth, number;
} node;

enum { NURSERY_NODES = 1 << 17, OLD_NODES = 1 << 22, MOST_ROOTS = 256 };

static node *nursery, *nursery_top;
static node *old, *free_cells;      /* linked by `left` */
static uint64_t old_used, free_count; /* cells that were ever given out; those of them that are free again */
static uint8_t *marks;
static node *roots[MOST_ROOTS];     /* the program's local variables: nodes move */
static unsigned root_count;
static node **work;                 /* nodes whose fields are still to be looked at */
static uint64_t work_count;

static dt_session *session;
static dt_region *region;
static dt_listener *listener;
static dt_slots slots;
static enum { PAGES, CHECK, SCAN } mode;
static uint64_t minors, fulls, pages_read, slots_found, promoted;
static double minor_seconds, longest_seconds;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void fail(const char *what, int code, const dt_failure *why)
{
    fprintf(stderr, "barrier: %s: %d, errno %d, at %#lx\n", what, code, why ? why->os_errno : 0,
            why ? (unsigned long)why->start : 0);
    exit(1);
}

static void *map(uint64_t nbytes)
{
    void *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        exit(1);
    return memory;
}

static int is_young(const node *n) { return n >= nursery && n < nursery + NURSERY_NODES; }

/* ---- the barrier ---- */

static void open_barrier(void)
{
    dt_failure why = {0};
    int code = dt_session_open(DT_REMEDY_PROBE, 0, DT_BACKEND_KERNEL, &session, &why);
    if (!code)
        code = dt_register(session, (uintptr_t)old, OLD_NODES * sizeof(node), 0, DT_ARM_AUTO | DT_PINNED, &region, &why);
    if (!code)
        code = dt_listener_new(session, &listener);
    if (!code)
        code = dt_start(listener, &region, 1, &why);
    if (code)
        fail("tracking the old generation", code, &why);
}

/* The words of the old generation that point into the nursery. The program stands still until the end of the collection, so
 * it is enough to look: pages that are armed once, by forget_own_writes, take the collector's own stores without a fault.
 * Every object leaves the nursery in a minor collection, so a page that was read need not be kept for the next one; `kept`
 * is for collectors whose objects stay young for longer. */
static void find_slots(void)
{
    const dt_pointers plain = {.mask = 7};
    const dt_run young = {(uintptr_t)nursery, (uintptr_t)(nursery + NURSERY_NODES)};
    const dt_extent heap = {.address = (uintptr_t)old, .nbytes = old_used * sizeof(node)};
    const dt_run everything = {(uintptr_t)old, (heap.address + heap.nbytes + 4095) & ~UINT64_C(4095)};
    dt_set dirty = {0}, all = {0}, kept = {0};
    int code = everything.end > everything.start ? dt_set_copy(&everything, 1, &all) : 0;
    if (code)
        fail("making a set", code, &all.why);
    if (mode != SCAN && (code = dt_peek(listener, NULL, &dirty)))
        fail("looking for what was written", code, &dirty.why);
    code = dt_find_slots(mode == SCAN ? &all : &dirty, &heap, 1, &plain, &young, young.start, young.end, &slots, &kept);
    if (code)
        fail("reading the dirty pages", code, &kept.why);
    pages_read += mode == SCAN ? all.pages : dirty.pages;
    dt_set_clear(&dirty);
    dt_set_clear(&kept);
    if (mode == CHECK) {
        dt_slots truth = {0};
        code = dt_find_slots(&all, &heap, 1, &plain, &young, young.start, young.end, &truth, &kept);
        if (code || truth.count != slots.count ||
            (truth.count && memcmp(truth.addresses, slots.addresses, truth.count * sizeof *truth.addresses))) {
            printf("minor collection %lu: %lu slots in dirty pages, %lu in all\n", (unsigned long)minors,
                   (unsigned long)slots.count, (unsigned long)truth.count);
            exit(1);
        }
        dt_slots_clear(&truth);
        dt_set_clear(&kept);
    }
    dt_set_clear(&all);
}

/* What was written until now points to no young object: there is none any more. */
static void forget_own_writes(void)
{
    dt_set written = {0};
    if (mode == SCAN)
        return;
    int code = dt_collect(listener, NULL, -1, &written);
    if (code)
        fail("collecting", code, &written.why);
    written.delivered = 1; /* without it the pages would be told again in the next collection */
    dt_set_clear(&written);
}

/* ---- the old generation ---- */

static node *old_cell(void)
{
    if (free_cells) {
        node *cell = free_cells;
        free_cells = cell->left;
        free_count--;
        return cell;
    }
    if (old_used == OLD_NODES) {
        fprintf(stderr, "barrier: the heap is full\n");
        exit(1);
    }
    return old + old_used++;
}

static void mark(node *n)
{
    if (n && !marks[n - old]) {
        marks[n - old] = 1;
        work[work_count++] = n;
    }
}

/* Mark and sweep; the nursery is empty. */
static void full(void)
{
    fulls++;
    memset(marks, 0, old_used);
    for (unsigned i = 0; i < root_count; i++)
        mark(roots[i]);
    while (work_count) {
        node *n = work[--work_count];
        mark(n->left);
        mark(n->right);
    }
    free_cells = NULL;
    free_count = 0;
    for (uint64_t i = old_used; i--;) {
        if (marks[i])
            continue;
        old[i] = (node){.left = free_cells};
        free_cells = old + i;
        free_count++;
    }
    forget_own_writes();
}

/* ---- the nursery ---- */

static node *promote(node *n)
{
    if (!n || !is_young(n))
        return n;
    if (n->number >> 63) /* it is a copy's address already */
        return n->left;
    node *copy = old_cell();
    *copy = *n;
    n->left = copy;
    n->number |= UINT64_C(1) << 63;
    work[work_count++] = copy;
    promoted++;
    return copy;
}

static void minor(void)
{
    double began = now();
    find_slots();
    slots_found += slots.count;
    for (uint64_t i = 0; i < slots.count; i++) {
        node **slot = (node **)(uintptr_t)slots.addresses[i];
        *slot = promote(*slot);
    }
    for (unsigned i = 0; i < root_count; i++)
        roots[i] = promote(roots[i]);
    while (work_count) {
        node *n = work[--work_count];
        n->left = promote(n->left);
        n->right = promote(n->right);
    }
    nursery_top = nursery;
    minors++;
    if (OLD_NODES - old_used + free_count < NURSERY_NODES)
        full();
    else
        forget_own_writes();
    double took = now() - began;
    minor_seconds += took;
    longest_seconds = took > longest_seconds ? took : longest_seconds;
}

/* ---- the program: it stores pointers wherever it likes ---- */

static unsigned push(node *n)
{
    roots[root_count] = n;
    return root_count++;
}

static node *allocate(uint64_t depth, uint64_t number)
{
    if (nursery_top == nursery + NURSERY_NODES)
        minor();
    *nursery_top = (node){.depth = depth, .number = number};
    return nursery_top++;
}

/* From the top down: each child is stored into a node that may have grown old meanwhile. */
static void populate(unsigned at, unsigned depth)
{
    if (!depth)
        return;
    node *child = allocate(depth - 1, roots[at]->number * 2);
    roots[at]->left = child;
    child = allocate(depth - 1, roots[at]->number * 2 + 1);
    roots[at]->right = child;
    unsigned left = push(roots[at]->left), right = push(roots[at]->right);
    populate(left, depth - 1);
    populate(right, depth - 1);
    root_count -= 2;
}

/* From the bottom up: the root in `roots` is its result. */
static unsigned make(unsigned depth, uint64_t number)
{
    if (!depth)
        return push(allocate(0, number));
    unsigned left = make(depth - 1, number * 2), right = make(depth - 1, number * 2 + 1);
    node *n = allocate(depth, number);
    n->left = roots[left];
    n->right = roots[right];
    root_count -= 2;
    return push(n);
}

static uint64_t whole(const node *n, uint64_t depth, uint64_t number)
{
    if (!n || n->depth != depth || n->number != number)
        return 0;
    if (!depth)
        return !n->left && !n->right;
    uint64_t left = whole(n->left, depth - 1, number * 2);
    return left && whole(n->right, depth - 1, number * 2 + 1);
}

static void require(unsigned root, unsigned depth)
{
    if (!whole(roots[root], depth, 1)) {
        printf("a tree of depth %u DIFFERS after %lu minor collections\n", depth, (unsigned long)minors);
        exit(1);
    }
}

static void build_trees(unsigned depth, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        unsigned top_down = push(allocate(depth, 1));
        populate(top_down, depth);
        require(top_down, depth);
        root_count--;
        unsigned bottom_up = make(depth, 1);
        require(bottom_up, depth);
        root_count--;
    }
}

int main(int argc, char **argv)
{
    unsigned longest = argc > 1 ? (unsigned)atoi(argv[1]) : 16;
    mode = argc > 2 && !strcmp(argv[2], "check") ? CHECK : argc > 2 && !strcmp(argv[2], "scan") ? SCAN : PAGES;
    if (longest < 4 || longest > 18)
        return fprintf(stderr, "usage: barrier [DEPTH, 4 to 18] [check | scan]\n"), 2;
    nursery = nursery_top = map(NURSERY_NODES * sizeof(node));
    old = map(OLD_NODES * sizeof(node));
    marks = map(OLD_NODES);
    work = map(OLD_NODES * sizeof *work);
    if (mode != SCAN)
        open_barrier();

    double began = now();
    make(longest + 2, 1); /* stretches the heap */
    root_count = 0;
    unsigned long_lived = push(allocate(longest, 1));
    populate(long_lived, longest);
    for (unsigned depth = 4; depth <= longest; depth += 2)
        build_trees(depth, (2u << longest) / (2u << depth) + 1);
    require(long_lived, longest);
    double took = now() - began;

    printf("%.2f s, of which %lu minor and %lu full collections %.2f s, the longest %.1f ms\n", took, (unsigned long)minors,
           (unsigned long)fulls, minor_seconds, longest_seconds * 1e3);
    printf("%lu nodes promoted; %.0f pages read and %.1f slots found a collection\n", (unsigned long)promoted,
           minors ? (double)pages_read / (double)minors : 0, minors ? (double)slots_found / (double)minors : 0);
    dt_slots_clear(&slots);
    dt_listener_drop(&listener);
    dt_region_drop(&region);
    if (session)
        dt_session_close(session);
    dt_session_drop(&session);
    printf("every tree identical\n");
    return 0;
}
