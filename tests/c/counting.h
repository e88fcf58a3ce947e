/* SPDX-License-Identifier: MIT
 * Counted checks. */
#ifndef DT_TESTS_COUNTING_H
#define DT_TESTS_COUNTING_H

#include <stdio.h>

static unsigned passed, failed;
#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (condition) {                                                                        \
            passed++;                                                                           \
        } else {                                                                                \
            failed++;                                                                           \
            fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #condition); \
        }                                                                                       \
    } while (0)

static inline int outcome(void)
{
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}

#endif
