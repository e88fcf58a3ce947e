/* SPDX-License-Identifier: MIT
 *
 * What people do without a kernel that tracks writes, for `dirtytrack demo` to compare with. Not part of the core:
 * nothing else calls these. cffi reads this file after dirtytrack.h; the conventions are the same.
 */
#ifndef DIRTYTRACK_BASELINE_H
#define DIRTYTRACK_BASELINE_H
#include <stdint.h>

/* Repeats stores: `spans` holds n pairs (offset, length), the bytes follow each other in `data`.
 * -EINVAL where a store would leave the memory or the data; the stores before it are done. */
int dt_baseline_replay(uint8_t *memory, uint64_t nbytes, const uint64_t *spans, uint64_t n, const uint8_t *data,
                       uint64_t length);

/* Compares each page with the mirror and copies those that differ; their number is added to `pages`. */
void dt_baseline_compare(const uint8_t *memory, uint8_t *mirror, uint64_t nbytes, uint64_t *pages);

/* mprotect and SIGSEGV. One range at a time in a process: -EBUSY beyond that; -EINVAL unless whole pages.
 * Faults elsewhere go on to the handler that was there before. */
int dt_baseline_protect(uint8_t *memory, uint64_t nbytes);
/* Protects again, then copies the pages written since to the same offset of the mirror; adds their number to `pages`. */
int dt_baseline_collect(uint8_t *mirror, uint64_t *pages);
/* Makes the range writable and puts the previous handler back. Does nothing where no range is protected. */
void dt_baseline_unprotect(void);

#endif
