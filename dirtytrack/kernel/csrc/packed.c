/* SPDX-License-Identifier: MIT
 * Runs of a memory, packed one behind the other and put back; what frames of a checkpoint hold. */
#include "digest.h"
#include <fcntl.h>
#include <unistd.h>

uint64_t dt_spans_nbytes(const dt_span *spans, uint64_t n, uint64_t memory_nbytes)
{
    uint64_t at = 0, sum = 0;
    for (uint64_t i = 0; i < n; i++) {
        if (!spans[i].nbytes || spans[i].offset < at || spans[i].offset > memory_nbytes ||
            spans[i].nbytes > memory_nbytes - spans[i].offset)
            return UINT64_MAX;
        at = spans[i].offset + spans[i].nbytes;
        sum += spans[i].nbytes; /* disjoint, so never more than memory_nbytes */
    }
    return sum;
}

/* 0 where the spans lie in the memory and have exactly that many bytes. */
static int fits(const dt_extent *memory, const dt_span *spans, uint64_t n, uint64_t length, dt_failure *why)
{
    uint64_t sum = dt_spans_nbytes(spans, n, memory->nbytes);
    if (sum == UINT64_MAX)
        return dt_fail_with(why, -EINVAL, EINVAL, DT_STEP_COPY, memory->address, memory->address + memory->nbytes);
    return sum == length ? 0 : dt_fail_with(why, DT_TOO_SMALL, 0, DT_STEP_COPY, 0, 0);
}

/* Looked at again, since another thread may change the spans after `fits`: no byte outside of both is ever touched. */
static bool inside(const dt_extent *memory, dt_span span, uint64_t left)
{
    return span.offset <= memory->nbytes && span.nbytes <= memory->nbytes - span.offset && span.nbytes <= left;
}

int dt_pack(const dt_extent *memory, const dt_span *spans, uint64_t n, uint8_t *out, uint64_t length, dt_failure *why)
{
    int code = fits(memory, spans, n, length, why);
    for (uint64_t i = 0; !code && i < n; i++) {
        dt_span span = spans[i];
        uint64_t address = memory->address + span.offset;
        if (DT_UNLIKELY(!inside(memory, span, length)))
            return dt_fail_with(why, -EINVAL, EINVAL, DT_STEP_COPY, 0, 0);
        if (memory->unpinned)
            code = dt_copy_vanishing(false, out, address, span.nbytes, why);
        else
            /* SAFETY: within the memory, which the caller holds, and within `length` bytes of `out`. */
            memcpy(out, (const uint8_t *)(uintptr_t)address, span.nbytes);
        out += span.nbytes;
        length -= span.nbytes;
    }
    return code;
}

/* Zeros into memory that may vanish: the kernel copies them from here. */
static int clear_vanishing(uint64_t address, uint64_t bytes, dt_failure *why)
{
    static const uint8_t zeros[64 << 10];
    int code = 0;
    for (uint64_t done = 0; !code && done < bytes;) {
        uint64_t some = dt_min(bytes - done, sizeof zeros);
        code = dt_copy_vanishing(true, (uint8_t *)(uintptr_t)zeros, address + done, some, why); /* only read */
        done += some;
    }
    return code;
}

int dt_unpack(const dt_extent *memory, const dt_span *spans, uint64_t n, const uint8_t *data, uint64_t length,
              dt_failure *why)
{
    int code = fits(memory, spans, n, length, why);
    for (uint64_t i = 0; !code && i < n; i++) {
        dt_span span = spans[i];
        uint64_t address = memory->address + span.offset;
        if (DT_UNLIKELY(!inside(memory, span, length)))
            return dt_fail_with(why, -EINVAL, EINVAL, DT_STEP_COPY, 0, 0);
        if (memory->unpinned)
            code = data ? dt_copy_vanishing(true, (uint8_t *)(uintptr_t)data, address, span.nbytes, why) /* only read */
                        : clear_vanishing(address, span.nbytes, why);
        /* SAFETY: within the memory, which the caller holds, and within `length` bytes of `data`. */
        else if (data)
            memcpy((uint8_t *)(uintptr_t)address, data, span.nbytes);
        else
            memset((uint8_t *)(uintptr_t)address, 0, span.nbytes);
        data = data ? data + span.nbytes : NULL;
        length -= span.nbytes;
    }
    return code;
}

int dt_all_zero(const uint8_t *data, uint64_t length)
{
    uint64_t whole = dt_down(length, 64);
    uint8_t any = 0;
    for (uint64_t i = whole; i < length; i++)
        any |= data[i];
    return !any && dt_is_zero(data, whole);
}

/* With what it is copied from, it fits into the second level of cache of all that is sold. */
#define PIECE_BYTES ((uint64_t)256 << 10)

int64_t dt_read_adding(int file, uint64_t offset, uint8_t *room, uint64_t length, dt_xxh64_parts *parts)
{
    uint64_t done = 0, added = 0;
    while (done < length) {
        ssize_t some = pread(file, room + done, dt_min(length - done, PIECE_BYTES), (off_t)(offset + done));
        if (some < 0 && errno == EINTR)
            continue;
        if (some < 0)
            return -errno;
        if (!some)
            break;
        done += (uint64_t)some;
        dt_xxh64_add(parts, room + added, done - added);
        added = dt_down(done, 32);
    }
    return (int64_t)done;
}

void dt_begin_writing(int file, uint64_t offset, uint64_t length)
{
    sync_file_range(file, (off_t)offset, (off_t)length, SYNC_FILE_RANGE_WRITE);
}
