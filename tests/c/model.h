/* SPDX-License-Identifier: MIT
 * A set of pages, as the model has it: one byte a page. */
#ifndef DT_TESTS_MODEL_H
#define DT_TESTS_MODEL_H

#include "checking.h"

#define PAGES 192u
typedef struct model { uint8_t page[PAGES]; } model;

static model random_model(void)
{
    model m = {{0}};
    uint64_t density = random_below(6); /* 0: empty, 5: nearly full */
    if (random_below(2)) {
        for (unsigned i = 0; i < PAGES; i++)
            m.page[i] = random_below(5) < density;
    } else {
        for (uint64_t k = 0; k < density; k++)
            for (uint64_t i = random_below(PAGES), n = random_below(40); n-- && i < PAGES; i++)
                m.page[i] = 1;
    }
    return m;
}

#endif
