/* SPDX-License-Identifier: MIT
 *
 * GCBench (Ellis, Kovac and Boehm), as examples/barrier.c has it, for whoever provides `allocate` and STORE: nodes that live
 * in `roots` may move whenever one is allocated.
 */
#ifndef GCBENCH_H
#define GCBENCH_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef struct node {
    struct node *left, *right;
    uint64_t depth, number;
} node;

enum { MOST_ROOTS = 256 };

static node *roots[MOST_ROOTS];
static unsigned root_count;

static node *allocate(uint64_t depth, uint64_t number);

/* Processor time of this thread, in the kernel too: all that is timed here computes and never waits, and what others do on
 * the machine meanwhile is not in it. */
static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void tell(const char *name, const uint64_t *times, uint64_t n, const char *end)
{
    printf("\"%s\": [", name);
    for (uint64_t i = 0; i < n; i++)
        printf("%s%lu", i ? ", " : "", (unsigned long)times[i]);
    printf("]%s", end);
}

static unsigned push(node *n)
{
    roots[root_count] = n;
    return root_count++;
}

/* From the top down: each child is stored into a node that may have grown old meanwhile. */
static void populate(unsigned at, unsigned depth)
{
    if (!depth)
        return;
    node *child = allocate(depth - 1, roots[at]->number * 2);
    STORE(&roots[at]->left, child);
    child = allocate(depth - 1, roots[at]->number * 2 + 1);
    STORE(&roots[at]->right, child);
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
    STORE(&n->left, roots[left]);
    STORE(&n->right, roots[right]);
    root_count -= 2;
    return push(n);
}

static int whole(const node *n, uint64_t depth, uint64_t number)
{
    if (!n || n->depth != depth || n->number != number)
        return 0;
    if (!depth)
        return !n->left && !n->right;
    return whole(n->left, depth - 1, number * 2) && whole(n->right, depth - 1, number * 2 + 1);
}

static void require(unsigned root, unsigned depth)
{
    if (!whole(roots[root], depth, 1)) {
        fprintf(stderr, "a tree of depth %u differs\n", depth);
        exit(1);
    }
}

static void run_gcbench(unsigned longest)
{
    make(longest + 2, 1); /* stretches the heap */
    root_count = 0;
    unsigned long_lived = push(allocate(longest, 1));
    populate(long_lived, longest);
    for (unsigned depth = 4; depth <= longest; depth += 2)
        for (unsigned i = 0, count = (2u << longest) / (2u << depth) + 1; i < count; i++) {
            unsigned top_down = push(allocate(depth, 1));
            populate(top_down, depth);
            require(top_down, depth);
            root_count--;
            require(make(depth, 1), depth);
            root_count--;
        }
    require(long_lived, longest);
}
#endif
