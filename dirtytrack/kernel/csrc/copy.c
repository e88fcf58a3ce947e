/* SPDX-License-Identifier: MIT
 * Copies past the caches. A plain store reads the line that it overwrites first: where neither side of a copy is in a cache
 * and much is copied, that is a third of the traffic, and what the caches held is lost for it. */
#include "internal.h"
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

uint64_t dt_copy_past_from = (uint64_t)8 << 20;

/* From so much in one piece on the C library goes past the caches by itself, several pages at once, which is quicker still. */
#define LONG_BYTES ((uint64_t)96 << 20)

void dt_copy_past(void *out, const void *memory, uint64_t bytes)
{
    if (bytes >= LONG_BYTES) {
        memcpy(out, memory, bytes);
        return;
    }
    uint8_t *to = out;
    const uint8_t *from = memory;
#if defined(__x86_64__)
    uint64_t head = dt_min(-(uintptr_t)to & 63, bytes), at = head;
    memcpy(to, from, head);
    for (; at + 64 <= bytes; at += 64) { /* whole lines, which are written without being read */
        const __m128i *line = (const __m128i *)(from + at);
        __m128i a = _mm_loadu_si128(line), b = _mm_loadu_si128(line + 1), c = _mm_loadu_si128(line + 2), d = _mm_loadu_si128(line + 3);
        __m128i *there = (__m128i *)(to + at);
        _mm_stream_si128(there, a), _mm_stream_si128(there + 1, b), _mm_stream_si128(there + 2, c), _mm_stream_si128(there + 3, d);
    }
    memcpy(to + at, from + at, bytes - at);
#else
    memcpy(to, from, bytes);
#endif
}

void dt_copy_past_end(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
