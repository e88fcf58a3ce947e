/* SPDX-License-Identifier: MIT
 * Remedy R2: discards that no scan reports.
 *
 * In memory of a file, shared memory and huge pages of the pool an armed page that is discarded (MADV_DONTNEED of a private
 * mapping, a punched hole, MADV_REMOVE, truncation) leaves its marker behind, and reads as clean (measured, Linux 6.12 to
 * 7.3). So such a region keeps a bit a page that means "may have content": set by whatever says that a page was written,
 * and wherever a page is seen present. A page with the bit set that is neither present nor known to hold data was
 * discarded, and counts as written.
 *
 * What tells whether a page that is not present holds data:
 *   shared            SEEK_DATA of its file, else mincore() of memory that no file system holds
 *   private           nothing: it is gone, unless it is in swap, which looks like a marker
 *   huge, shared      the file's blocks, where all of them are accounted for by present pages
 * Where that is no answer the page counts as written, and does so again in each collect until it is read.
 *
 * Data may have come back into a hole: a large folio that cannot be split is filled with zeroes instead, and a store near
 * by has a whole one allocated (measured, Linux 6.18: tmpfs, ext4). So a second bit a page says that it was present at the
 * last look. If it is no longer, somebody took it out of the page table, and it counts as written whatever it holds. */
#include "engine.h"
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

enum answer { HOLDS_DATA, IS_EMPTY, UNKNOWN };
typedef void (*on_answer)(void *context, uint64_t start, uint64_t end, enum answer answer);

static const dt_question NOT_PRESENT = {.mask = K_PAGE_IS_PRESENT, .inverted = K_PAGE_IS_PRESENT};
static const dt_question PRESENT = {.mask = K_PAGE_IS_PRESENT};
static const dt_question EITHER = {.anyof = K_PAGE_IS_PRESENT | K_PAGE_IS_SWAPPED};

bool dt_needs_content(const dt_region *r)
{
    if (r->session->remedy & DT_REMEDY_NO_LOST)
        return false;
    return r->present || r->kinds & (DT_KIND_FILE | DT_KIND_SHARED | DT_KIND_HUGETLB);
}

int dt_content_begin(dt_session *s, dt_region *r)
{
    if (r->content || !dt_needs_content(r))
        return 0;
    int rc = dt_room((void **)&s->watches, &s->watch_room, s->watch_count + 1, sizeof *s->watches);
    dt_watch *content = rc ? NULL : dt_make_watch(NULL, r, 2);
    if (!content)
        return -ENOMEM;
    dt_mark_whole(content);
    r->content = s->watches[s->watch_count++] = content;
    s->layout_version++;
    return 0;
}

void dt_content_end(dt_session *s, dt_region *r)
{
    dt_watch *content = r->content;
    r->content = NULL;
    for (uint64_t i = 0; content && i < s->watch_count; i++)
        if (s->watches[i] == content) {
            s->watches[i] = s->watches[--s->watch_count];
            s->layout_version++;
            break;
        }
    dt_free(content);
}

/* ---- what a mapping's file says ---------------------------------------------------------------------------------- */

/* Memory of the kernel's own tmpfs, which everybody may write. */
static bool is_shmem(const char *name)
{
    return !strncmp(name, "/memfd:", 7) || !strncmp(name, "/SYSV", 5) || !strncmp(name, "/dev/zero", 9);
}

static bool is_same(const dt_mapping *m, const struct stat *about)
{
    return about->st_ino == m->inode && major(about->st_dev) == m->device_major &&
           minor(about->st_dev) == m->device_minor;
}

static bool is_file(int fd, const dt_mapping *m, struct stat *about) { return !fstat(fd, about) && is_same(m, about); }

/* The mapping's file, opened anew so that nobody's file position moves: by its path, by a descriptor that its process
 * has of it, or by the mapping itself, which takes a privilege. -1: it cannot be had. */
static int open_file(const dt_space *space, const dt_mapping *m, struct stat *about)
{
    char path[300], process[32] = "/proc/self";
    if (space)
        snprintf(process, sizeof process, "/proc/%d", (int)space->pid);
    if (!space && m->name[0] == '/' && /* a path of another process may be another file here */ (strncmp(m->name, "/dev/", 5) || !strncmp(m->name, "/dev/shm/", 9))) {
        int fd = open(m->name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        if (fd >= 0 && is_file(fd, m, about))
            return fd;
        if (fd >= 0)
            close(fd);
    }
    snprintf(path, sizeof path, "%s/map_files/%llx-%llx", process, (unsigned long long)m->start, (unsigned long long)m->end);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* no doubt whose it is; an overlay tells other numbers */
    if (fd >= 0 && !fstat(fd, about))
        return fd;
    if (fd >= 0)
        close(fd);
    snprintf(path, sizeof path, "%s/fd", process);
    DIR *list = opendir(path);
    fd = -1;
    for (struct dirent *entry; list && fd < 0 && (entry = readdir(list));) {
        int number = atoi(entry->d_name);
        snprintf(path, sizeof path, "%s/fd/%d", process, number);
        if (entry->d_name[0] == '.' || (!space && number == dirfd(list)) || stat(path, about) || !is_same(m, about))
            continue;
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd >= 0 && !is_file(fd, m, about)) {
            close(fd);
            fd = -1;
        }
    }
    if (list)
        closedir(list);
    return fd;
}

/* Elsewhere SEEK_DATA may be the kernel's makeshift, which says of every byte that it is data. */
static bool tells_holes(int fd)
{
    static const unsigned kinds[] = {0x01021994 /* tmpfs */, 0xef53 /* ext2-4 */, 0x58465342 /* xfs */,
                                     0x9123683e /* btrfs */, 0xf2f52010 /* f2fs */, 0x794c7630 /* overlay of one of these */};
    struct statfs about;
    for (size_t i = 0; !fstatfs(fd, &about) && i < sizeof kinds / sizeof *kinds; i++)
        if ((unsigned)about.f_type == kinds[i])
            return true;
    return false;
}

static void by_seeking(int fd, const dt_mapping *m, uint64_t start, uint64_t end, on_answer tell, void *context)
{
    uint64_t page = dt_page_bytes();
    for (uint64_t at = start; at < end;) {
        uint64_t offset = m->offset + (at - m->start);
        off_t data = lseek(fd, (off_t)offset, SEEK_DATA);
        if (data < 0 && errno != ENXIO) { /* ENXIO: no data behind it */
            tell(context, at, end, UNKNOWN);
            return;
        }
        uint64_t from = data < 0 ? end : dt_min(end, at + (dt_down((uint64_t)data, page) - offset));
        if (from > at)
            tell(context, at, from, IS_EMPTY);
        if (from >= end)
            return;
        off_t hole = lseek(fd, data, SEEK_HOLE);
        uint64_t to = hole < 0 ? from + page : dt_min(end, from + (dt_up((uint64_t)hole, page) - dt_down((uint64_t)data, page)));
        tell(context, from, to, HOLDS_DATA);
        at = to;
    }
}

/* SAFETY: only of memory whose mode lets everybody write it. Of a file that this process may not write, mincore() says
 * that all of it is there (Linux 5.2). */
static void by_mincore(uint64_t start, uint64_t end, enum answer otherwise, on_answer tell, void *context)
{
    unsigned char there[1024];
    unsigned shift = dt_page_shift();
    for (uint64_t at = start; at < end;) {
        uint64_t pages = dt_min((end - at) >> shift, sizeof there);
        if (mincore((void *)at, pages << shift, there)) {
            tell(context, at, end, UNKNOWN);
            return;
        }
        for (uint64_t i = 0, next; i < pages; i = next) {
            for (next = i + 1; next < pages && (there[next] & 1) == (there[i] & 1);)
                next++;
            tell(context, at + (i << shift), at + (next << shift), there[i] & 1 ? HOLDS_DATA : otherwise);
        }
        at += pages << shift;
    }
}

static void add_bytes(void *context, uint64_t start, uint64_t end) { *(uint64_t *)context += end - start; }

/* A file of huge pages knows no SEEK_DATA, but how many blocks it has: as many as are present here leave none for a page
 * that is not. */
static bool all_accounted_for(dt_session *s, const dt_mapping *m, int fd)
{
    struct stat about;
    uint64_t present = 0;
    return fd >= 0 && !dt_query(s, m->start, m->end, &PRESENT, add_bytes, &present) && !fstat(fd, &about) &&
           (uint64_t)about.st_blocks * 512 == present;
}

typedef struct asking {
    dt_session *s;
    uint64_t start, end;
    on_answer tell;
    void *context;
} asking;

static int ask_mapping(void *context, const dt_mapping *m)
{
    const asking *a = context;
    uint64_t start = dt_max(a->start, m->start), end = dt_min(a->end, m->end);
    uint32_t kind = dt_kind_of(m);
    struct stat about;
    bool certain = dt_swapped_bytes(a->s->space, m->start, m->end) == 0;
    if (!(kind & DT_KIND_SHARED)) {
        a->tell(a->context, start, end, certain || kind & DT_KIND_HUGETLB ? IS_EMPTY : UNKNOWN);
        return 0;
    }
    int fd = open_file(a->s->space, m, &about);
    if (kind & DT_KIND_HUGETLB)
        a->tell(a->context, start, end, all_accounted_for(a->s, m, fd) ? IS_EMPTY : UNKNOWN);
    else if (fd >= 0 && tells_holes(fd))
        by_seeking(fd, m, start, end, a->tell, a->context);
    else if (is_shmem(m->name) && !a->s->space) /* mincore() tells of this process alone */
        by_mincore(start, end, certain ? IS_EMPTY : UNKNOWN, a->tell, a->context);
    else
        a->tell(a->context, start, end, UNKNOWN);
    if (fd >= 0)
        close(fd);
    return 0;
}

/* Of pages that are not present: whether they hold data all the same. */
static int ask(dt_session *s, uint64_t start, uint64_t end, on_answer tell, void *context)
{
    asking a = {s, start, end, tell, context};
    return dt_each_mapping(s->space, start, end, ask_mapping, &a);
}

/* ---- around the first arming -------------------------------------------------------------------------------------- */

static void mark_run(void *context, uint64_t start, uint64_t end) { dt_mark(context, start, end); }

static bool is_set(const uint64_t *bits, uint64_t i) { return bits[i >> 6] >> (i & 63) & 1; }

/* The bits that say that a page was present at the last look lie behind the others. */
static uint64_t *was_present(const dt_watch *content) { return (uint64_t *)content->bits + content->words; }

static void set_present(dt_watch *c, uint64_t start, uint64_t end, bool present)
{
    unsigned shift = dt_page_shift();
    uint64_t *bits = was_present(c), last = (dt_min(end, c->end) - c->start) >> shift;
    for (uint64_t i = (dt_max(start, c->start) - c->start) >> shift; i < last;) {
        uint64_t next = dt_min(last, (i | 63) + 1), mask = (~(uint64_t)0 >> (64 - (next - i))) << (i & 63);
        if (present)
            bits[i >> 6] |= mask;
        else
            bits[i >> 6] &= ~mask;
        i = next;
    }
}

static void note_present(void *context, uint64_t start, uint64_t end)
{
    dt_mark(context, start, end);
    set_present(context, start, end, true);
}

static void mark_unless_empty(void *context, uint64_t start, uint64_t end, enum answer answer)
{
    if (answer != IS_EMPTY)
        dt_mark(context, start, end);
}

int dt_content_before_arming(dt_session *s, dt_region *r, uint64_t start, uint64_t end)
{
    dt_watch *content = r->content;
    start = dt_max(start, r->start);
    end = dt_min(end, r->end);
    if (!content || start >= end)
        return 0;
    dt_unmark(content, start, end);
    set_present(content, start, end, false);
    int rc = dt_query(s, start, end, &EITHER, mark_run, content);
    if (!rc && r->kinds & DT_KIND_SHARED)
        rc = ask(s, start, end, mark_unless_empty, content);
    if (rc)
        dt_mark(content, start, end); /* unknown */
    return rc;
}

/* Shared pages that hold data, and are in memory, are mapped now: only of a page that was present can it be told that
 * somebody took it away, where data came back. What is on a disk alone is left there. */
static void populate(void *context, uint64_t start, uint64_t end)
{
    const dt_watch *c = context;
    unsigned char there[256];
    uint64_t page = dt_page_bytes(), part;
    start = dt_max(start, c->start);
    for (end = dt_min(end, c->end); start < end; start += part) {
        part = dt_min(end - start, page * sizeof there);
        if (mincore((void *)start, part, there))
            return;
        for (uint64_t i = 0, from; i < part / page; i++) {
            for (from = i; i < part / page && there[i] & 1 && is_set(c->bits, (start + i * page - c->start) / page);)
                i++;
            if (i > from)
                madvise((void *)(start + from * page), (i - from) * page, MADV_POPULATE_READ);
        }
    }
}

/* A page may have come between the look before and the arming. */
int dt_content_after_arming(dt_session *s, dt_region *r, uint64_t start, uint64_t end)
{
    if (r->content && (r->kinds & (DT_KIND_SHARED | DT_KIND_HUGETLB)) == DT_KIND_SHARED && !s->space) {
        int rc = dt_query(s, dt_max(start, r->start), dt_min(end, r->end), &NOT_PRESENT, populate, r->content);
        if (rc)
            return rc;
    }
    return r->content ? dt_query(s, dt_max(start, r->start), dt_min(end, r->end), &PRESENT, note_present, r->content) : 0;
}

/* ---- in a collect -------------------------------------------------------------------------------------------------- */

typedef struct looking {
    dt_session *s;
    dt_watch *content;
    uint64_t at;          /* up to here it is known */
    bool note;            /* what was seen is kept */
    bool taken;           /* the pages in question were present at the last look */
    dt_on_lost on_lost;
    void *context;
    int rc;
} looking;

static void tell_lost(void *context, uint64_t start, uint64_t end, enum answer answer)
{
    looking *l = context;
    if (answer != HOLDS_DATA || l->taken)
        l->on_lost(l->context, start, end, answer != IS_EMPTY);
}

static void look_at_absent(void *context, uint64_t start, uint64_t end)
{
    looking *l = context;
    dt_watch *c = l->content;
    start = dt_max(start, c->start);
    end = dt_min(end, c->end);
    if (start >= end)
        return;
    if (l->note && start > l->at)
        note_present(c, l->at, start);
    l->at = end;
    unsigned shift = dt_page_shift();
    uint64_t first = (start - c->start) >> shift, beyond = (end - c->start) >> shift;
    const uint64_t *present = was_present(c);
    for (uint64_t i = first, from; i < beyond && !l->rc;) { /* the runs of pages that may have content */
        uint64_t word = c->bits[i >> 6] >> (i & 63);
        if (!word) {
            i = (i | 63) + 1;
            continue;
        }
        i += (uint64_t)__builtin_ctzll(word);
        if (i >= beyond)
            break;
        l->taken = is_set(present, i);
        for (from = i; i < beyond && is_set(c->bits, i) && is_set(present, i) == l->taken;)
            i++;
        uint64_t a = c->start + (from << shift), b = c->start + (i << shift);
        if (c->region->present)
            l->on_lost(l->context, a, b, false); /* an empty entry is no marker: nothing is left of it */
        else
            l->rc = ask(l->s, a, b, tell_lost, l);
    }
    if (l->note && !l->rc)
        set_present(c, start, end, false);
}

int dt_find_lost(dt_session *s, dt_watch *c, uint64_t start, uint64_t end, bool note, dt_on_lost on_lost, void *context)
{
    start = dt_max(start, c->start);
    end = dt_min(end, c->end);
    if (start >= end)
        return 0;
    looking l = {.s = s, .content = c, .at = start, .note = note, .on_lost = on_lost, .context = context};
    int rc = dt_query(s, start, end, c->region->present ? &DT_ABSENT : &NOT_PRESENT, look_at_absent, &l);
    if (!rc && note && end > l.at)
        note_present(c, l.at, end);
    return rc ? rc : l.rc;
}
