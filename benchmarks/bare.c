/* SPDX-License-Identifier: MIT
 *
 * What the benchmarks compare with: the shortest C that does the same job, without a library around it.
 *
 * Each function that is timed reads the clock itself, so that no call from Python is in its time, and returns
 * nanoseconds, or -errno. Compiled by benchmarks/bare.py; shares no code with dirtytrack.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>

/* From <linux/fs.h>, Linux 6.7; distributions ship older headers. */
struct page_region {
    uint64_t start, end, categories;
};

struct pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define SCAN _IOWR('f', 16, struct pm_scan_arg)
#define WRITTEN (UINT64_C(1) << 1)
#define WP_MATCHING (UINT64_C(1) << 0)
#define CHECK_WPASYNC (UINT64_C(1) << 1)

struct run {
    uint64_t start, end;
};

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int bare_open(void)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* 4 KiB pages whatever the system's policy, each of them populated. */
int bare_populate(uint64_t address, uint64_t nbytes)
{
    void *memory = (void *)(uintptr_t)address;
    if (madvise(memory, nbytes, MADV_NOHUGEPAGE) != 0 && errno != EINVAL) /* EINVAL: a kernel without huge pages */
        return -errno;
    memset(memory, 1, nbytes);
    return 0;
}

/* One store to each of `n` pages, `at` bytes into the page. */
void bare_write(uint64_t address, uint64_t page_bytes, const uint64_t *pages, uint64_t n, uint64_t at, uint8_t value)
{
    for (uint64_t i = 0; i < n; i++)
        *(volatile uint8_t *)(uintptr_t)(address + pages[i] * page_bytes + at) = value;
}

/* One pass: every written page of [start, end), re-armed, resumed when `vec` is full. With `mirror` each run is copied
 * to the same offset there as soon as it is known. What was found is kept in `kept`, an array that is large enough and
 * used again by each pass: whoever asks wants the answer. Returns how many runs there are. */
static int64_t pass(int fd, uint64_t start, uint64_t end, struct page_region *vec, uint64_t room, uint64_t page_bytes,
                    uint8_t *mirror, struct run *kept, uint64_t *pages)
{
    int64_t count = 0;
    struct pm_scan_arg arg = {
        .size = sizeof arg,
        .flags = WP_MATCHING | CHECK_WPASYNC,
        .start = start,
        .end = end,
        .vec = (uintptr_t)vec,
        .vec_len = room,
        .category_mask = WRITTEN,
        .return_mask = WRITTEN,
    };
    for (;;) {
        int found = ioctl(fd, SCAN, &arg);
        if (found < 0)
            return -errno;
        for (int i = 0; i < found; i++) {
            uint64_t length = vec[i].end - vec[i].start;
            *pages += length / page_bytes;
            kept[count++] = (struct run){vec[i].start, vec[i].end};
            if (mirror)
                memcpy(mirror + (vec[i].start - start), (const void *)(uintptr_t)vec[i].start, length);
        }
        if ((uint64_t)found < room || arg.walk_end >= end)
            return count;
        arg.start = arg.walk_end;
    }
}

/* The first of `passes` listeners finds; each other one makes its own pass, which finds nothing, and has a copy of the
 * list. That is the least that gives each of them its answer, and less than the same job: a list grows without bound
 * while its listener sleeps. `kept` has `each` runs for each of them. */
int64_t bare_collect(int fd, uint64_t start, uint64_t end, struct page_region *vec, uint64_t room, uint64_t page_bytes,
                     uint64_t passes, uint8_t *mirror, struct run *kept, uint64_t each, uint64_t *pages)
{
    *pages = 0;
    int64_t begin = now();
    int64_t count = pass(fd, start, end, vec, room, page_bytes, mirror, kept, pages);
    for (uint64_t i = 1; i < passes && count >= 0; i++) {
        int64_t more = pass(fd, start, end, vec, room, page_bytes, mirror, kept + i * each, pages);
        if (more != 0)
            return more < 0 ? more : -EBUSY;
        memcpy(kept + i * each, kept, (uint64_t)count * sizeof *kept);
    }
    return count < 0 ? count : now() - begin;
}

/* ---- several listeners, each told of everything at a bit a page, however long it sleeps ---- */

/* Sets the bits of each run, counted from `base`. */
static void mark(uint64_t *bits, const struct run *runs, int64_t count, uint64_t base, unsigned shift)
{
    for (int64_t i = 0; i < count; i++) {
        uint64_t first = (runs[i].start - base) >> shift, last = ((runs[i].end - base) >> shift) - 1;
        uint64_t low = ~UINT64_C(0) << (first & 63), high = ~UINT64_C(0) >> (63 - (last & 63));
        uint64_t *word = bits + first / 64, *to = bits + last / 64;
        if (word == to) {
            *word |= low & high;
            continue;
        }
        *word++ |= low;
        while (word < to)
            *word++ = ~UINT64_C(0);
        *word |= high;
    }
}

/* The runs of set bits, which are cleared. Returns how many runs there are. */
static int64_t take(uint64_t *bits, uint64_t words, uint64_t base, unsigned shift, struct run *kept, uint64_t *pages)
{
    int64_t count = 0;
    uint64_t open = 0; /* 1: the run at `count` goes on from the word before */
    for (uint64_t i = 0; i < words; i++) {
        uint64_t word = bits[i], at = base + (i * 64 << shift);
        if (!(word | open))
            continue;
        bits[i] = 0;
        *pages += (uint64_t)__builtin_popcountll(word);
        for (uint64_t edges = word ^ (word << 1 | open); edges; edges &= edges - 1) { /* where 0 and 1 meet */
            uint64_t edge = at + ((uint64_t)__builtin_ctzll(edges) << shift);
            if (open)
                kept[count++].end = edge;
            else
                kept[count].start = edge;
            open ^= 1;
        }
    }
    if (open)
        kept[count++].end = base + (words * 64 << shift);
    return count;
}

/* `passes` listeners collect in turn. Each makes its pass, marks what it found in the bitmap of each other one, and has
 * what it found and what others had marked for it. Here the first finds, and the others read it out of their bits.
 * `bitmaps` has `words` words for each of them, all zero before and after. */
int64_t bare_listen(int fd, uint64_t start, uint64_t end, struct page_region *vec, uint64_t room, uint64_t page_bytes,
                    uint64_t passes, struct run *kept, uint64_t each, uint64_t *bitmaps, uint64_t words, uint64_t *pages)
{
    unsigned shift = (unsigned)__builtin_ctzll(page_bytes);
    *pages = 0;
    int64_t begin = now();
    for (uint64_t i = 0; i < passes; i++) {
        struct run *mine = kept + i * each;
        uint64_t *bits = bitmaps + i * words;
        int64_t count = pass(fd, start, end, vec, room, page_bytes, NULL, mine, pages);
        if (count < 0)
            return count;
        for (uint64_t j = 0; count && j < passes; j++)
            if (j != i)
                mark(bitmaps + j * words, mine, count, start, shift);
        if (!i) /* nothing is marked for the first: each of the others has seen it collect */
            continue;
        if (count)
            return -EBUSY; /* somebody writes meanwhile: this loop unites nothing */
        take(bits, words, start, shift, mine, pages);
    }
    return now() - begin;
}

/* What people do without the kernel: each page is compared with a mirror, and copied to it where it differs. */
int64_t bare_compare(uint64_t address, uint64_t nbytes, uint8_t *mirror, uint64_t page_bytes, struct run *kept,
                     uint64_t *pages)
{
    int64_t begin = now();
    uint64_t differ = 0, count = 0;
    for (uint64_t at = 0; at < nbytes; at += page_bytes) {
        const uint8_t *page = (const uint8_t *)(uintptr_t)(address + at);
        if (!memcmp(page, mirror + at, page_bytes))
            continue;
        memcpy(mirror + at, page, page_bytes);
        differ++;
        if (count && kept[count - 1].end == address + at)
            kept[count - 1].end += page_bytes;
        else
            kept[count++] = (struct run){address + at, address + at + page_bytes};
    }
    *pages = differ;
    return now() - begin;
}

/* One pass over each of `n` ranges. */
int64_t bare_ranges(int fd, const struct run *ranges, uint64_t n, struct page_region *vec, uint64_t room,
                    uint64_t page_bytes, struct run *kept, uint64_t *pages)
{
    int64_t count = 0;
    *pages = 0;
    int64_t begin = now();
    for (uint64_t i = 0; i < n; i++) {
        int64_t more = pass(fd, ranges[i].start, ranges[i].end, vec, room, page_bytes, NULL, kept + count, pages);
        if (more < 0)
            return more;
        count += more;
    }
    return now() - begin;
}

int64_t bare_gather(const struct run *runs, uint64_t n, uint8_t *out)
{
    int64_t begin = now();
    for (uint64_t i = 0; i < n; i++) {
        uint64_t length = runs[i].end - runs[i].start;
        memcpy(out, (const void *)(uintptr_t)runs[i].start, length);
        out += length;
    }
    return now() - begin;
}

int64_t bare_changed(const struct run *runs, uint64_t n, uint64_t base, const uint8_t *mirror, uint64_t page_bytes,
                     uint64_t *pages)
{
    uint64_t differ = 0;
    int64_t begin = now();
    for (uint64_t i = 0; i < n; i++)
        for (uint64_t page = runs[i].start; page < runs[i].end; page += page_bytes)
            differ += memcmp((const void *)(uintptr_t)page, mirror + (page - base), page_bytes) != 0;
    *pages = differ;
    return now() - begin;
}

/* The runs of another process, one behind the other, in as few calls as the kernel allows: nanoseconds, or -errno. */
int64_t bare_read(int pid, const uint64_t *runs, uint64_t count, uint8_t *out)
{
    enum { MOST = 1024 };
    struct iovec from[MOST];
    int64_t begin = now();
    for (uint64_t i = 0; i < count;) {
        uint64_t n = 0, bytes = 0;
        for (; n < MOST && i < count && bytes < (uint64_t)1 << 30; n++, i++) {
            from[n] = (struct iovec){(void *)runs[2 * i], runs[2 * i + 1] - runs[2 * i]};
            bytes += from[n].iov_len;
        }
        struct iovec to = {out, bytes};
        ssize_t got = process_vm_readv(pid, &to, 1, from, n, 0);
        if (got < 0)
            return -errno;
        if ((uint64_t)got != bytes)
            return -EFAULT;
        out += bytes;
    }
    return now() - begin;
}

/* From <linux/fs.h>, Linux 6.11. */
struct procmap_query {
    uint64_t size, query_flags, query_addr;
    uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    uint64_t vma_name_addr, build_id_addr;
};
#define PROCMAP_QUERY _IOWR('f', 17, struct procmap_query)

/* One look at each writable mapping of a process: nanoseconds, or -errno. */
int64_t bare_mappings(int maps, uint64_t *count)
{
    int64_t begin = now();
    *count = 0;
    for (uint64_t at = 0;; ++*count) {
        struct procmap_query q = {.size = sizeof q, .query_flags = 0x12 /* writable, at `at` or the next */, .query_addr = at};
        if (ioctl(maps, PROCMAP_QUERY, &q))
            break;
        at = q.vma_end;
    }
    return errno == ENOENT ? now() - begin : -errno;
}
