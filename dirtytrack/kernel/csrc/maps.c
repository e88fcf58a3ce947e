/* SPDX-License-Identifier: MIT
 * Mappings of this process or another: by PROCMAP_QUERY (Linux 6.11), else from the text of /proc/self/maps and smaps. */
#include "internal.h" /* first: it asks for GNU names */
#include "abi.h"
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/sysinfo.h>
#include <unistd.h>

static int open_maps(const dt_space *space)
{
    if (space)
        return space->maps;
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (fd < 0) /* no /proc must not look like no mapping */
        return errno == ENOENT ? -ENODEV : -errno;
    return fd;
}

static void close_maps(const dt_space *space, int fd)
{
    if (!space && fd >= 0)
        close(fd);
}

FILE *dt_open_proc(const dt_space *space, const char *name)
{
    char path[64];
    if (space)
        snprintf(path, sizeof path, "/proc/%d/%s", (int)space->pid, name);
    else
        snprintf(path, sizeof path, "/proc/self/%s", name);
    return fopen(path, "re");
}

static int query(int fd, struct k_procmap_query *q, uint64_t address, char *name, uint32_t name_bytes)
{
    memset(q, 0, sizeof *q);
    q->size = sizeof *q;
    q->query_flags = K_VMA_COVERING_OR_NEXT;
    q->query_addr = address;
    q->vma_name_addr = (uintptr_t)name;
    q->vma_name_size = name_bytes;
    int fail = dt_fail_at(DT_SITE_MAPS);
    if (fail > 0)
        return -fail;
    if (ioctl(fd, K_PROCMAP_QUERY, q))
        return -errno;
    return fail;
}

static int by_query(int fd, uint64_t address, dt_mapping *out)
{
    struct k_procmap_query q;
    char name[PATH_MAX];
    int code = query(fd, &q, address, name, sizeof name);
    if (code == -ENAMETOOLONG) { /* deeper than a path can be told: the mapping counts, not its name */
        q.vma_name_size = 0;
        code = query(fd, &q, address, NULL, 0);
    }
    if (code)
        return code;
    memset(out, 0, sizeof *out);
    out->start = q.vma_start;
    out->end = q.vma_end;
    out->offset = q.vma_offset;
    out->inode = q.inode;
    out->device_major = q.dev_major;
    out->device_minor = q.dev_minor;
    out->readable = !!(q.vma_flags & K_VMA_READABLE);
    out->writable = !!(q.vma_flags & K_VMA_WRITABLE);
    out->executable = !!(q.vma_flags & K_VMA_EXECUTABLE);
    out->shared = !!(q.vma_flags & K_VMA_SHARED);
    out->page_bytes = q.vma_page_size;
    if (q.vma_name_size)
        memcpy(out->name, name, strnlen(name, sizeof out->name - 1));
    return 0;
}

/* The text writes a newline in a path as \012, and nothing else so. */
static void unescape(char *to, size_t room, const char *from)
{
    size_t n = 0;
    while (*from && n + 1 < room) {
        bool newline = !strncmp(from, "\\012", 4);
        to[n++] = newline ? '\n' : *from;
        from += newline ? 4 : 1;
    }
    to[n] = 0;
}

/* True where the line describes a mapping that ends after `address`. */
static bool parse(const char *line, uint64_t address, dt_mapping *out)
{
    unsigned long long start, end, offset, inode;
    unsigned major, minor;
    char mode[5];
    int name = 0;
    if (sscanf(line, "%llx-%llx %4s %llx %x:%x %llu%n", &start, &end, mode, &offset, &major, &minor, &inode,
               &name) < 7)
        return false;
    if (end <= address || start >> 63) /* [vsyscall] is the kernel's; the query does not tell it either */
        return false;
    memset(out, 0, sizeof *out);
    out->start = start;
    out->end = end;
    out->offset = offset;
    out->inode = inode;
    out->device_major = major;
    out->device_minor = minor;
    out->readable = mode[0] == 'r';
    out->writable = mode[1] == 'w';
    out->executable = mode[2] == 'x';
    out->shared = mode[3] == 's';
    while (line[name] == ' ')
        name++;
    unescape(out->name, sizeof out->name, line + name);
    return true;
}

/* Lines may be longer than `line`: what is cut belongs to a name that is longer than dt_mapping holds. */
static int by_text(int fd, uint64_t address, dt_mapping *out)
{
    char buffer[4096], line[80 + 4 * sizeof out->name];
    size_t used = 0;
    int fail = dt_fail_at(DT_SITE_MAPS);
    if (fail)
        return -abs(fail);
    if (lseek(fd, 0, SEEK_SET) < 0)
        return -errno;
    for (;;) {
        ssize_t got = read(fd, buffer, sizeof buffer);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got ? -errno : -ENOENT;
        for (const char *at = buffer, *end = buffer + got; at < end;) {
            const char *newline = memchr(at, '\n', (size_t)(end - at));
            size_t length = (size_t)((newline ? newline : end) - at), part = dt_min(length, sizeof line - 1 - used);
            memcpy(line + used, at, part);
            used += part;
            at += length;
            if (!newline)
                break;
            at++;
            line[used] = 0;
            used = 0;
            if (parse(line, address, out))
                return 0;
        }
    }
}

/* ---- what only /proc/self/smaps tells ------------------------------------------------------------------------ */

typedef struct smaps { uint64_t start, end, page_bytes, swap_bytes; } smaps;

/* Each mapping that touches [start, end): told at its last line (VmFlags). 0, or -errno. */
static int read_smaps(const dt_space *space, uint64_t start, uint64_t end, void (*visit)(void *context, const smaps *mapping), void *context)
{
    int fail = dt_fail_at(DT_SITE_MAPS);
    FILE *file = fail ? NULL : dt_open_proc(space, "smaps");
    if (!file)
        return fail ? -abs(fail) : -errno;
    smaps m = {0};
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, file) > 0) {
        unsigned long long a, b;
        if (sscanf(line, "%llx-%llx ", &a, &b) == 2)
            m = (smaps){.start = a, .end = b};
        else if (m.start >= end)
            break;
        else if (m.end <= start)
            continue;
        else if (sscanf(line, "KernelPageSize: %llu kB", &a) == 1)
            m.page_bytes = (uint64_t)a << 10;
        else if (sscanf(line, "Swap: %llu kB", &a) == 1)
            m.swap_bytes = (uint64_t)a << 10;
        else if (!strncmp(line, "VmFlags:", 8))
            visit(context, &m);
    }
    int code = ferror(file) ? -EIO : 0;
    free(line);
    fclose(file);
    return code;
}

static void note_page_bytes(void *context, const smaps *m) { *(uint64_t *)context = m->page_bytes; }
static void add_swap(void *context, const smaps *m) { *(uint64_t *)context += m->swap_bytes; }

int64_t dt_swapped_bytes(const dt_space *space, uint64_t start, uint64_t end)
{
    struct sysinfo info;
    if (!sysinfo(&info) && info.totalswap == info.freeswap)
        return 0;
    uint64_t bytes = 0;
    int code = read_smaps(space, start, end, add_swap, &bytes);
    return code ? code : (int64_t)bytes;
}

/* ---- one mapping, or each of many ----------------------------------------------------------------------------- */

static int next_mapping(const dt_space *space, int fd, uint64_t address, dt_mapping *out)
{
    int code = by_query(fd, address, out);
    /* The answers of kernels without the query, and of filters that forbid it. */
    if (code == -ENOTTY || code == -EINVAL || code == -E2BIG || code == -ENOSYS || code == -EPERM || code == -EACCES)
        code = by_text(fd, address, out);
    if (!code && !out->page_bytes) { /* the text does not say; what is no file cannot be a huge page of the pool */
        out->page_bytes = dt_page_bytes();
        if (out->name[0] == '/')
            code = read_smaps(space, out->start, out->start + 1, note_page_bytes, &out->page_bytes);
    }
    return code;
}

int dt_mapping_of(const dt_space *space, uint64_t address, dt_mapping *out)
{
    int fd = open_maps(space);
    if (fd < 0)
        return fd;
    int code = next_mapping(space, fd, address, out);
    close_maps(space, fd);
    return code;
}

int dt_mapping_at(uint64_t address, dt_mapping *out) { return dt_mapping_of(NULL, address, out); }

int dt_each_mapping(const dt_space *space, uint64_t start, uint64_t end,
                    int (*visit)(void *context, const dt_mapping *mapping), void *context)
{
    int fd = open_maps(space), code = fd < 0 ? fd : 0;
    for (uint64_t at = start; at < end && !code;) {
        dt_mapping m;
        code = next_mapping(space, fd, at, &m);
        if (code || m.start >= end)
            break;
        at = m.end;
        code = visit(context, &m);
    }
    close_maps(space, fd);
    return code == -ENOENT ? 0 : code;
}

bool dt_maps_query(void)
{
    int fd = open_maps(NULL);
    struct k_procmap_query q;
    int code = fd < 0 ? fd : query(fd, &q, 0, NULL, 0);
    if (fd >= 0)
        close(fd);
    return code == 0;
}

uint32_t dt_kind_of(const dt_mapping *m)
{
    uint64_t page = dt_page_bytes(), usual = page * (page / sizeof(uint64_t));
    uint32_t huge = m->page_bytes <= page ? 0 : m->page_bytes == usual ? DT_KIND_HUGETLB : DT_KIND_HUGETLB | DT_KIND_GIGANTIC;
    if (m->shared)
        return huge | DT_KIND_SHARED;
    bool file = m->inode || m->name[0] == '/';
    bool none = !strncmp(m->name, "/anon_hugepage", 14) || !strcmp(m->name, "/dev/zero"); /* anonymous by other names */
    return huge | (file && !none ? DT_KIND_FILE : DT_KIND_ANONYMOUS);
}
