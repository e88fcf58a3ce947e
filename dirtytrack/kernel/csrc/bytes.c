/* SPDX-License-Identifier: MIT
 * The bytes of a set: gathered, scattered, copied to mirrors and compared with them, clipped to extents.
 *
 * Pinned memory is copied by memcpy. Unpinned memory may be unmapped or truncated by anyone while we copy; there the
 * kernel copies for us and a page that vanished is an error instead of a signal. */
#include "internal.h"
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#define BATCH_PIECES 64
#define BATCH_BYTES ((size_t)1 << 20)
#define BOUNCE_BYTES ((size_t)64 << 10) /* stays in the second-level cache between the copy and the comparison */

static uint64_t extent_end(const dt_extent *extent)
{
    uint64_t end = extent->address + extent->nbytes;
    return end < extent->address ? UINT64_MAX : end;
}

/* Index of the first run that ends after the extent's address. `from` is that of an extent at `before`: neighbours are
 * near, so search outward from there; extents that go backwards start afresh. */
static uint64_t seek(const dt_set *set, uint64_t from, uint64_t before, uint64_t address)
{
    if (address < before)
        return dt_set_first(set, address);
    uint64_t step = 1, end = from;
    while (end < set->count && set->runs[end].end <= address) {
        from = end + 1;
        end += step;
        step *= 2;
    }
    /* Every run before `from` ends at or before address; the one at `end`, if any, ends after it. */
    end = dt_min(end, set->count);
    while (from < end) {
        uint64_t middle = from + (end - from) / 2;
        if (set->runs[middle].end <= address)
            from = middle + 1;
        else
            end = middle;
    }
    return from;
}

/* ---- copies that survive a vanishing page ---- */

typedef struct batch {
    bool into;     /* true: from `ours` to `tracked` */
    int mem;       /* /proc/self/mem where process_vm_readv is refused, else -1 */
    unsigned count;
    size_t bytes;
    struct iovec ours[BATCH_PIECES], tracked[BATCH_PIECES];
} batch;

static _Atomic bool vm_refused; /* by a seccomp filter or a small kernel: asking once is enough */

static int open_mem(batch *b)
{
    if (b->mem >= 0)
        return 0;
    b->mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
    return b->mem < 0 ? -errno : 0;
}

/* Bytes copied of the pieces from `i` on, at least one, or -errno; one page at most where `one_page`. */
static ssize_t copy_some(batch *b, unsigned i, bool one_page)
{
    struct iovec ours = b->ours[i], tracked = b->tracked[i];
    if (one_page) {
        uint64_t at = (uintptr_t)tracked.iov_base;
        ours.iov_len = tracked.iov_len = dt_min(tracked.iov_len, dt_page_bytes() - (at & (dt_page_bytes() - 1)));
    }
    if (!atomic_load_explicit(&vm_refused, memory_order_relaxed)) {
        const struct iovec *local = one_page ? &ours : b->ours + i, *remote = one_page ? &tracked : b->tracked + i;
        unsigned n = one_page ? 1 : b->count - i;
        /* SAFETY: `ours` is the caller's and stays; `tracked` may be gone, which is what the kernel checks here. */
        ssize_t done = b->into ? process_vm_writev(getpid(), local, n, remote, n, 0)
                               : process_vm_readv(getpid(), local, n, remote, n, 0);
        if (done > 0)
            return done;
        if (done == 0)
            return -EFAULT;
        if (errno != EPERM && errno != ENOSYS)
            return -errno;
        atomic_store_explicit(&vm_refused, true, memory_order_relaxed);
    }
    int code = open_mem(b);
    if (code)
        return code;
    /* SAFETY: as above. A write by this door would go through read-only memory too; tracked memory is writable. */
    off_t at = (off_t)(uintptr_t)tracked.iov_base;
    ssize_t done = b->into ? pwrite(b->mem, ours.iov_base, ours.iov_len, at)
                           : pread(b->mem, ours.iov_base, ours.iov_len, at);
    if (done > 0)
        return done;
    return done == 0 || errno == EIO ? -EFAULT : -errno;
}

static void advance(struct iovec *piece, size_t bytes)
{
    piece->iov_base = (uint8_t *)piece->iov_base + bytes;
    piece->iov_len -= bytes;
}

/* Copies what the batch holds and empties it. */
static int flush(batch *b, dt_failure *why)
{
    bool one_page = false;
    for (unsigned i = 0; i < b->count;) {
        ssize_t done = copy_some(b, i, one_page);
        if (done == -EFAULT && !one_page) { /* a piece may have been refused for a page further on: find which */
            one_page = true;
            continue;
        }
        if (done < 0) {
            uint64_t at = (uintptr_t)b->tracked[i].iov_base;
            uint64_t end = dt_min(at + b->tracked[i].iov_len, dt_down(at, dt_page_bytes()) + dt_page_bytes());
            b->count = 0;
            b->bytes = 0;
            return dt_fail_with(why, (int)done, (int)-done, DT_STEP_COPY, at, end);
        }
        one_page = false;
        for (size_t left = (size_t)done; left;) {
            size_t part = dt_min(left, b->tracked[i].iov_len);
            advance(&b->tracked[i], part);
            advance(&b->ours[i], part);
            left -= part;
            if (!b->tracked[i].iov_len)
                i++;
        }
    }
    b->count = 0;
    b->bytes = 0;
    return 0;
}

static int queue(batch *b, uint8_t *ours, uint64_t tracked, uint64_t bytes, dt_failure *why)
{
    while (bytes) {
        if (b->count == BATCH_PIECES || b->bytes == BATCH_BYTES) {
            int code = flush(b, why);
            if (code)
                return code;
        }
        size_t part = dt_min(bytes, BATCH_BYTES - b->bytes);
        b->ours[b->count] = (struct iovec){ours, part};
        b->tracked[b->count++] = (struct iovec){(void *)(uintptr_t)tracked, part};
        b->bytes += part;
        ours += part;
        tracked += part;
        bytes -= part;
    }
    return 0;
}

static void close_batch(batch *b)
{
    if (b->mem >= 0)
        close(b->mem);
}

int dt_copy_vanishing(bool into, uint8_t *ours, uint64_t tracked, uint64_t bytes, dt_failure *why)
{
    batch b = {.into = into, .mem = -1};
    int code = queue(&b, ours, tracked, bytes, why);
    if (!code)
        code = flush(&b, why);
    close_batch(&b);
    return code;
}

/* ---- extent by extent ---- */

enum way { GATHER, SCATTER, COPY_OUT };

static void copy_differing(uint8_t *to, uint64_t from, uint64_t end)
{
    for (uint64_t page = dt_page_bytes(), next; from < end; to += next - from, from = next) {
        next = dt_min(dt_down(from, page) + page, end);
        if (!dt_same_bytes((const uint8_t *)(uintptr_t)from, to, next - from))
            memcpy(to, (const void *)(uintptr_t)from, next - from);
    }
}

/* What is assumed is mostly as the mirror has it, and where caches hold both, to compare costs less than to write.
 * assumed: the index of the first run of set->assumed that may touch it. */
static void copy_to_mirror(const dt_set *set, uint64_t *assumed, uint8_t *to, uint64_t from, uint64_t end)
{
    for (uint64_t stop; from < end; to += stop - from, from = stop) {
        while (*assumed < set->assumed_count && set->assumed[*assumed].end <= from)
            ++*assumed;
        const dt_run *next = *assumed < set->assumed_count ? &set->assumed[*assumed] : NULL;
        bool within = next && next->start <= from;
        stop = dt_min(end, !next ? end : within ? next->end : next->start);
        if (within)
            copy_differing(to, from, stop);
        else
            memcpy(to, (const void *)(uintptr_t)from, stop - from);
    }
}

/* Copies, and adds what it copies to the sum as long as that is of whole 32 bytes. */
static void copy_adding(dt_xxh64_parts *sum, uint8_t *packed, uint64_t done, const uint8_t *from, uint64_t bytes)
{
    uint64_t whole = sum->length == done ? dt_down(bytes, 32) : 0;
    dt_xxh64_copy(sum, packed + done, from, whole);
    memcpy(packed + done + whole, from + whole, bytes - whole);
}

/* Copies the extent's bytes in the set. The other side is packed from `packed` on, or the extent's mirror. */
static int move_extent(enum way way, const dt_set *set, uint64_t first, const dt_extent *extent, bool past,
                       uint8_t *packed, uint64_t *moved, dt_xxh64_parts *sum, batch *b, dt_failure *why)
{
    const dt_run *runs = set->runs;
    uint64_t address = extent->address, end = extent_end(extent), total = 0, assumed = 0;
    for (uint64_t i = first; i < set->count && runs[i].start < end; i++) {
        uint64_t from = dt_max(runs[i].start, address), bytes = dt_min(runs[i].end, end) - from;
        uint8_t *other = way == COPY_OUT ? (uint8_t *)extent->mirror + (from - address) : packed + total;
        if (extent->through && way != SCATTER) {
            int code = dt_compare_copy(extent->through, from, bytes, other, why);
            if (code)
                return code;
        } else if (extent->unpinned) {
            int code = queue(b, other, from, bytes, why);
            if (code)
                return code;
        } else {
            /* SAFETY: pinned memory stays mapped for as long as the caller holds its pin. Other threads may write it
             * meanwhile: what is torn is dirty again in the next epoch. */
            void *tracked = (void *)(uintptr_t)from;
            if (way == SCATTER)
                memcpy(tracked, other, bytes);
            else if (sum)
                copy_adding(sum, packed, total, tracked, bytes);
            else if (past)
                dt_copy_past(other, tracked, bytes);
            else if (way == COPY_OUT && set->assumed_count)
                copy_to_mirror(set, &assumed, other, from, from + bytes);
            else
                memcpy(other, tracked, bytes);
        }
        total += bytes;
    }
    *moved = total;
    return extent->unpinned ? flush(b, why) : 0;
}

static int move_all(enum way way, const dt_set *set, const dt_extent *extents, uint64_t n, uint8_t *packed,
                    uint64_t *sums, dt_failure *why)
{
    batch b = {.into = way == SCATTER, .mem = -1};
    dt_xxh64_parts sum;
    uint64_t first = 0, before = 0, moved = 0, most = 0;
    int code = 0;
    for (uint64_t i = 0; i < n; i++)
        most += extents[i].nbytes;
    bool past = dt_min(most, set->pages << dt_page_shift()) >= dt_copy_past_from;
    for (uint64_t i = 0; i < n && !code; i++) {
        const dt_extent *extent = extents + i;
        if (way == COPY_OUT && !extent->mirror)
            continue;
        first = seek(set, first, before, extent->address);
        before = extent->address;
        int fail = dt_fail_at(DT_SITE_COPY);
        bool known = extent->through && way != SCATTER;
        if (known)
            code = dt_compare_begin_copy(extent->through, why);
        dt_xxh64_begin(&sum, 0);
        if (fail <= 0 && !code)
            code = move_extent(way, set, first, extent, past, packed, &moved, sums ? &sum : NULL, &b, why);
        if (known && code != DT_CLOSED && code != DT_FORKED)
            dt_compare_end_copy(extent->through);
        if (DT_UNLIKELY(fail && !code)) {
            int error = abs(fail);
            code = dt_fail_with(why, -error, error, DT_STEP_COPY, extent->address, extent_end(extent));
        }
        if (sums && !code)
            sums[i] = dt_xxh64_end(&sum, packed + sum.length, moved - sum.length);
        if (way != COPY_OUT && !code)
            packed += moved;
    }
    close_batch(&b);
    if (past)
        dt_copy_past_end();
    return code;
}

uint64_t dt_set_nbytes(const dt_set *set, const dt_extent *extents, uint64_t n)
{
    uint64_t first = 0, before = 0, total = 0;
    if (n == 1 && set->count && set->runs[0].start >= extents->address && set->runs[set->count - 1].end <= extent_end(extents))
        return set->pages << dt_page_shift(); /* all of it: no need to walk the runs, which a copy then does */
    for (uint64_t i = 0; i < n; i++) {
        uint64_t address = extents[i].address, end = extent_end(extents + i);
        first = seek(set, first, before, address);
        before = address;
        for (uint64_t k = first; k < set->count && set->runs[k].start < end; k++)
            total += dt_min(set->runs[k].end, end) - dt_max(set->runs[k].start, address);
    }
    return total;
}

int dt_gather(const dt_set *set, const dt_extent *extents, uint64_t n, uint8_t *out, uint64_t room, dt_failure *why)
{
    if (dt_set_nbytes(set, extents, n) > room)
        return dt_fail_with(why, DT_TOO_SMALL, 0, DT_STEP_COPY, 0, 0);
    return move_all(GATHER, set, extents, n, out, NULL, why);
}

int dt_gather_summed(const dt_set *set, const dt_extent *extents, uint64_t n, uint8_t *out, uint64_t room, uint64_t *sums,
                     dt_failure *why)
{
    if (dt_set_nbytes(set, extents, n) > room)
        return dt_fail_with(why, DT_TOO_SMALL, 0, DT_STEP_COPY, 0, 0);
    return move_all(GATHER, set, extents, n, out, sums, why);
}

int dt_scatter(const dt_set *set, const dt_extent *extents, uint64_t n, const uint8_t *data, uint64_t length,
               dt_failure *why)
{
    if (dt_set_nbytes(set, extents, n) != length)
        return dt_fail_with(why, DT_TOO_SMALL, 0, DT_STEP_COPY, 0, 0);
    return move_all(SCATTER, set, extents, n, (uint8_t *)(uintptr_t)data, NULL, why); /* SCATTER only reads it */
}

int dt_copy_out(const dt_set *set, const dt_extent *extents, uint64_t n, dt_failure *why)
{
    return move_all(COPY_OUT, set, extents, n, NULL, NULL, why);
}

/* ---- comparing ---- */

typedef struct comparison {
    const dt_set *set;
    uint64_t granule;  /* bytes, a multiple of the page */
    dt_set found;      /* granules that differ; not coalesced once `unsorted` */
    bool unsorted;     /* an extent went backwards */
    uint8_t *bounce;
    batch batch;
} comparison;

static int add_granule(comparison *c, uint64_t start, uint64_t end)
{
    dt_set *found = &c->found;
    if (dt_set_reserve(found, found->count + 1))
        return -ENOMEM;
    if (found->count && start < found->runs[found->count - 1].start)
        c->unsorted = true;
    if (c->unsorted)
        found->runs[found->count++] = (dt_run){start, end};
    else
        dt_set_append(found, start, end);
    return 0;
}

#define AHEAD_BYTES 512

static int compare_extent(comparison *c, uint64_t first, const dt_extent *extent, dt_failure *why)
{
    const dt_run *runs = c->set->runs;
    uint64_t page = dt_page_bytes(), address = extent->address, end = extent_end(extent);
    for (uint64_t i = first; i < c->set->count && runs[i].start < end; i++) {
        uint64_t at = dt_max(runs[i].start, address), stop = dt_min(runs[i].end, end);
        uint64_t bounced = 0, bounced_end = 0; /* what the bounce buffer holds */
        while (at < stop) {
            uint64_t next = dt_min(dt_down(at, page) + page, stop);
            const uint8_t *now = (const uint8_t *)(uintptr_t)at;
            if (extent->unpinned || extent->through) {
                if (at >= bounced_end) {
                    bounced = at;
                    bounced_end = dt_min(dt_down(at, page) + BOUNCE_BYTES, stop);
                    int code = extent->through ? dt_compare_copy(extent->through, at, bounced_end - at, c->bounce, why)
                                               : queue(&c->batch, c->bounce, at, bounced_end - at, why);
                    if (!code)
                        code = flush(&c->batch, why);
                    if (code)
                        return code;
                }
                now = c->bounce + (at - bounced);
            }
            uint64_t then = next < stop ? next : i + 1 < c->set->count ? runs[i + 1].start : end;
            if (then < end && now == (const uint8_t *)(uintptr_t)at) { /* the processor's own guess ends with the page */
                dt_ask_for((const uint8_t *)(uintptr_t)then, AHEAD_BYTES);
                dt_ask_for((const uint8_t *)extent->mirror + (then - address), AHEAD_BYTES);
            }
            /* SAFETY: pinned memory stays mapped; what is unpinned was copied to the bounce buffer. */
            if (dt_same_bytes(now, (const uint8_t *)extent->mirror + (at - address), next - at)) {
                at = next;
                continue;
            }
            uint64_t start = at - at % c->granule;
            if (add_granule(c, start, start + c->granule))
                return dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
            at = dt_min(start + c->granule, stop); /* the rest of the granule goes along unseen */
        }
    }
    return 0;
}

static int by_start(const void *a, const void *b)
{
    uint64_t x = ((const dt_run *)a)->start, y = ((const dt_run *)b)->start;
    return (x > y) - (x < y);
}

static void sort_runs(dt_set *set)
{
    uint64_t count = set->count;
    qsort(set->runs, (size_t)count, sizeof *set->runs, by_start);
    set->count = 0;
    for (uint64_t i = 0; i < count; i++) /* the append never overtakes the read */
        dt_set_append(set, set->runs[i].start, set->runs[i].end);
}

int dt_changed(const dt_set *set, const dt_extent *extents, uint64_t n, uint64_t granule_bytes, dt_set *out)
{
    uint64_t page = dt_page_bytes(), first = 0, before = 0;
    if (!granule_bytes || granule_bytes % page)
        return dt_fail_with(&out->why, -EINVAL, 0, DT_STEP_NONE, 0, 0);
    comparison c = {.set = set, .granule = granule_bytes, .batch = {.mem = -1}};
    int code = dt_set_reserve(&c.found, 1);
    for (uint64_t i = 0; i < n && !code; i++)
        if ((extents[i].unpinned || extents[i].through) && !c.bounce && !(c.bounce = dt_alloc(BOUNCE_BYTES)))
            code = -ENOMEM;
    if (code)
        dt_fail_with(&out->why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    for (uint64_t i = 0; i < n && !code; i++) {
        const dt_extent *extent = extents + i;
        if (!extent->mirror)
            continue;
        first = seek(set, first, before, extent->address);
        before = extent->address;
        int fail = dt_fail_at(DT_SITE_COPY);
        if (extent->through)
            code = dt_compare_begin_copy(extent->through, &out->why);
        if (fail <= 0 && !code)
            code = compare_extent(&c, first, extent, &out->why);
        if (extent->through && code != DT_CLOSED && code != DT_FORKED)
            dt_compare_end_copy(extent->through);
        if (DT_UNLIKELY(fail && !code)) {
            int error = abs(fail);
            code = dt_fail_with(&out->why, -error, error, DT_STEP_COPY, extent->address, extent_end(extent));
        }
    }
    close_batch(&c.batch);
    dt_free(c.bounce);
    if (!code) {
        if (c.unsorted)
            sort_runs(&c.found);
        c.found.epoch = set->epoch;
        c.found.complete = set->complete;
        if (granule_bytes == page) {
            dt_set_count_pages(&c.found);
            *out = c.found;
            return 0;
        }
        /* A granule's other pages belong to the answer only where they are in the set. */
        c.found.complete = 1;
        code = dt_set_intersection(set, &c.found, out);
    }
    dt_set_clear(&c.found);
    return code;
}
