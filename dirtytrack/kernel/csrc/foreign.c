/* SPDX-License-Identifier: MIT
 * Sessions for the memory of another process. A userfaultfd acts on the process that made it, a page map on the one that
 * it was opened of: with these two the rest of the core works as it does here. What differs: mappings come and go without
 * our knowing, so whether they are others than before is asked at each epoch; and the process may end. */
#include "engine.h"
#include <limits.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Arming and scanning have the target's mmap lock for reading: whoever maps memory there waits so long. Some 2 ms a call
 * where all of it is populated, 0.8 ms where it has to make page tables (measured, Linux 6.18). */
#define TARGET_CHUNK_BYTES ((uint64_t)128 << 20)

typedef struct seen_mapping {
    uint64_t start, end, offset, inode;
    uint32_t flags;
    uint32_t device_major, device_minor;
} seen_mapping;

typedef struct target_space {
    dt_space space; /* first: sessions know it as that */
    seen_mapping *seen;
    uint64_t seen_count, seen_room;
    bool known;
} target_space;

static target_space *target_of(const dt_session *s) { return (target_space *)s->space; }

int dt_shares_memory(int32_t pid, int32_t other)
{
    long order = syscall(SYS_kcmp, pid, other, KCMP_VM, 0, 0);
    return order < 0 ? -errno : order == 0;
}

int dt_open_userfaultfd(int32_t *out, dt_failure *why)
{
    int door, fd = dt_open_any_door(why, &door);
    if (fd < 0)
        return fd;
    *out = fd;
    return 0;
}

int dt_session_adopt(const dt_target *target, uint32_t remedy, dt_session **out, dt_failure *why)
{
    dt_session *s;
    int rc = dt_new_session(&s, why);
    if (rc)
        return rc;
    target_space *space = dt_alloc(sizeof *space);
    if (!space) {
        dt_free_session(s);
        return dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    }
    space->space = (dt_space){target->pid, target->maps};
    s->space = &space->space;
    s->chunk_bytes = TARGET_CHUNK_BYTES;
    s->pagemap = target->pagemap;
    s->pidfd = target->pidfd;
    s->uffd = target->uffd;
    uint64_t wanted = K_UFFD_FEATURE_WP_ASYNC | K_UFFD_FEATURE_WP_UNPOPULATED | K_UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    if (!target->ready && (rc = dt_uffd_api(s->uffd, wanted, &s->features)))
        dt_fail_with(why, rc, -rc, DT_STEP_API, 0, 0);
    if (!rc && (rc = dt_target_there(s)))
        dt_fail_with(why, rc, -rc, DT_STEP_SCAN, 0, 0);
    if (!rc) {
        dt_choose_remedies(s, remedy);
        *out = s;
        return 0;
    }
    dt_free_session(s);
    return rc;
}

void dt_target_finished(dt_session *s)
{
    if (!s->space)
        return;
    dt_free(target_of(s)->seen);
    dt_free(s->space);
    s->space = NULL;
}

void dt_close_target(dt_session *s)
{
    if (s->space->maps >= 0)
        close(s->space->maps);
    if (s->pidfd >= 0)
        close(s->pidfd);
    s->space->maps = s->pidfd = -1;
}

/* A scan of a process that ended or replaced itself by exec may say that nothing was written (see pagemap.c); to read the
 * page map gives the end of the file then. The process may have ended while a child of vfork still has its memory. Asked
 * after the scan: neither comes back. */
int dt_target_there(const dt_session *s)
{
    uint64_t entry;
    struct pollfd ended = {.fd = s->pidfd, .events = POLLIN};
    ssize_t n = pread(s->pagemap, &entry, sizeof entry, 0);
    if (n <= 0)
        return n < 0 && errno != ESRCH ? -errno : -ESRCH;
    return poll(&ended, 1, 0) > 0 ? -ESRCH : 0;
}

/* ---- mappings ---------------------------------------------------------------------------------------------------- */

typedef struct coverage { uint64_t at, end; } coverage;

static int cover(void *context, const dt_mapping *m)
{
    coverage *c = context;
    if (m->start > c->at)
        return 1;
    c->at = m->end;
    return 0;
}

bool dt_target_mapped(const dt_session *s, uint64_t start, uint64_t end)
{
    coverage c = {start, end};
    return dt_each_mapping(s->space, start, end, cover, &c) == 0 && c.at >= end;
}

typedef struct edges { uint64_t start, end; bool any; } edges;

static int widen(void *context, const dt_mapping *m)
{
    edges *e = context;
    if (!e->any)
        e->start = m->start;
    e->end = m->end;
    e->any = true;
    return 0;
}

int dt_target_fits(dt_session *s, uint64_t start, uint64_t end)
{
    edges e = {0};
    int rc = dt_each_mapping(s->space, start, end, widen, &e);
    if (rc)
        return rc;
    if (!e.any || e.start > start || e.end > end)
        return -EAGAIN;
    return e.start == start || dt_page_armable(s, start) > 0 ? 0 : -EAGAIN;
}

static uint32_t flags_of(const dt_mapping *m)
{
    return (m->readable ? K_VMA_READABLE : 0) | (m->writable ? K_VMA_WRITABLE : 0) | (m->shared ? K_VMA_SHARED : 0);
}

typedef struct reading {
    target_space *target;
    dt_mapping *out;
    uint64_t room, count, end;
} reading;

static int keep_all(void *context, const dt_mapping *m)
{
    reading *r = context;
    uint64_t start = dt_max(m->start, r->end); /* mappings may be joined while they are read: none is told twice */
    if (r->count < r->room) {
        r->out[r->count] = *m;
        r->out[r->count].start = start;
        r->out[r->count].offset += m->inode ? start - m->start : 0;
    }
    r->end = m->end;
    r->count++;
    return 0;
}

static int keep(void *context, const dt_mapping *m)
{
    reading *r = context;
    target_space *t = r->target;
    keep_all(r, m);
    if (!m->writable)
        return 0;
    if (dt_room((void **)&t->seen, &t->seen_room, t->seen_count + 1, sizeof *t->seen))
        return -ENOMEM;
    t->seen[t->seen_count++] = (seen_mapping){m->start, m->end, m->offset, m->inode, flags_of(m), m->device_major, m->device_minor};
    return 0;
}

int64_t dt_layout_read(dt_session *s, dt_mapping *out, uint64_t room)
{
    int rc = dt_enter(s);
    if (rc)
        return rc;
    target_space *t = target_of(s);
    reading r = {.target = t, .out = out, .room = room};
    t->known = false;
    t->seen_count = 0;
    rc = dt_each_mapping(s->space, 0, UINT64_MAX, keep, &r);
    if (!rc)
        rc = dt_target_there(s); /* one that is gone has no mappings, and says so without an error */
    t->known = !rc && r.count <= room;
    dt_leave(s);
    return rc ? rc : (int64_t)r.count;
}

int64_t dt_mappings_of(int32_t pid, int32_t maps, dt_mapping *out, uint64_t room)
{
    dt_space space = {pid, maps};
    reading r = {.out = out, .room = room};
    int rc = dt_each_mapping(&space, 0, UINT64_MAX, keep_all, &r);
    return rc ? rc : (int64_t)r.count;
}

typedef struct comparing {
    const target_space *target;
    uint64_t at;
    bool differs;
} comparing;

static int same(void *context, const dt_mapping *m)
{
    comparing *c = context;
    if (!m->writable)
        return 0;
    const seen_mapping *seen = c->at < c->target->seen_count ? &c->target->seen[c->at++] : NULL;
    c->differs = !seen || seen->start != m->start || seen->end != m->end || seen->flags != flags_of(m) ||
                 seen->inode != m->inode || seen->offset != m->offset || seen->device_major != m->device_major ||
                 seen->device_minor != m->device_minor;
    return c->differs;
}

/* By the query where there is one: only the writable ones, and no names, which are dear. */
static int quickly(const dt_session *s, comparing *c)
{
    struct k_procmap_query q = {.size = sizeof q, .query_flags = K_VMA_COVERING_OR_NEXT | K_VMA_WRITABLE};
    while (!c->differs) {
        if (ioctl(s->space->maps, K_PROCMAP_QUERY, &q))
            return -errno;
        dt_mapping m = {.start = q.vma_start, .end = q.vma_end, .offset = q.vma_offset, .inode = q.inode,
                        .device_major = q.dev_major, .device_minor = q.dev_minor, .readable = !!(q.vma_flags & K_VMA_READABLE),
                        .writable = !!(q.vma_flags & K_VMA_WRITABLE), .shared = !!(q.vma_flags & K_VMA_SHARED)};
        same(c, &m);
        q = (struct k_procmap_query){.size = sizeof q, .query_flags = q.query_flags, .query_addr = m.end};
    }
    return 0;
}

int dt_layout_changed(dt_session *s)
{
    int rc = dt_enter(s);
    if (rc)
        return rc;
    comparing c = {.target = target_of(s)};
    rc = c.target->known ? quickly(s, &c) : 0;
    if (rc && rc != -ENOENT && rc != -ESRCH) {
        c = (comparing){.target = target_of(s)};
        rc = dt_each_mapping(s->space, 0, UINT64_MAX, same, &c);
        rc = rc < 0 ? rc : 0;
    }
    bool changed = !c.target->known || c.differs || c.at != c.target->seen_count;
    dt_leave(s);
    return rc && rc != -ENOENT ? rc : changed;
}

/* ---- bytes -------------------------------------------------------------------------------------------------------- */

/* One system call a run: for whoever has the descriptor and not the right to trace. */
static ssize_t read_by_descriptor(int mem, const struct iovec *from, uint8_t *to)
{
    return pread(mem, to, from->iov_len, (off_t)(uintptr_t)from->iov_base);
}

int dt_read_target(int32_t pid, int32_t mem, const dt_set *set, uint8_t *out, uint64_t room, uint64_t *done, dt_failure *why)
{
    enum { BATCH = 1024 }; /* IOV_MAX: as few calls as there can be */
    struct iovec from[BATCH];
    uint64_t filled = 0;
    for (uint64_t i = 0, begun = 0; i < set->count;) {
        uint64_t wanted = 0;
        size_t n = 0;
        for (uint64_t k = i, offset = begun; k < set->count && n < BATCH && wanted < (uint64_t)256 << 20; k++, offset = 0) {
            uint64_t bytes = dt_min(set->runs[k].end - set->runs[k].start - offset, ((uint64_t)256 << 20) - wanted);
            from[n++] = (struct iovec){(void *)(set->runs[k].start + offset), bytes};
            wanted += bytes;
        }
        if (filled + wanted > room)
            return dt_fail_with(why, DT_TOO_SMALL, 0, DT_STEP_COPY, 0, 0);
        struct iovec to = {out + filled, wanted};
        int fail = dt_fail_at(DT_SITE_COPY);
        ssize_t got = fail > 0 ? -1 : mem >= 0 ? read_by_descriptor(mem, from, to.iov_base) : process_vm_readv(pid, &to, 1, from, n, 0);
        if (got <= 0) {
            int error = fail > 0 ? fail : !got || errno == EIO ? EFAULT : errno; /* EIO: by descriptor */
            uint64_t at = set->runs[i].start + begun;
            *done = filled;
            return dt_fail_with(why, -error, error, DT_STEP_COPY, at, at + dt_page_bytes());
        }
        filled += (uint64_t)got;
        for (uint64_t left = (uint64_t)got; left;) { /* where it goes on: behind what was read */
            uint64_t part = dt_min(left, set->runs[i].end - set->runs[i].start - begun);
            begun += part;
            left -= part;
            if (begun == set->runs[i].end - set->runs[i].start)
                i++, begun = 0;
        }
    }
    *done = filled;
    return 0;
}
