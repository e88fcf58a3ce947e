/* SPDX-License-Identifier: MIT
 * This process's mappings: by PROCMAP_QUERY (Linux 6.11), else from the text of /proc/self/maps. */
#include "internal.h" /* first: it asks for GNU names */
#include "abi.h"
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int open_maps(void)
{
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (fd < 0) /* no /proc must not look like no mapping */
        return errno == ENOENT ? -ENODEV : -errno;
    return fd;
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

int dt_mapping_at(uint64_t address, dt_mapping *out)
{
    int fd = open_maps();
    if (fd < 0)
        return fd;
    int code = by_query(fd, address, out);
    /* The answers of kernels without the query, and of filters that forbid it. */
    if (code == -ENOTTY || code == -EINVAL || code == -E2BIG || code == -ENOSYS || code == -EPERM || code == -EACCES)
        code = by_text(fd, address, out);
    close(fd);
    return code;
}
