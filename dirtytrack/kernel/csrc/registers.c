/* SPDX-License-Identifier: MIT
 * The registers of all threads of a process that stands still, as the kernel tells them in the stop: a thread that was in a
 * system call has the kernel's own answer there (-ERESTARTSYS and its like), which says that the call is to be made again. */
#include "guard.h"
#include <elf.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif
#ifndef PTRACE_GETSIGMASK
#define PTRACE_GETSIGMASK 0x420a
#endif

/* What a set may have: AMX makes NT_X86_XSTATE 11 KiB. */
#define MOST_BYTES ((size_t)64 << 10)

/* The bytes of one set; none where the thread has no such set. */
static int64_t read_set(dt_guard *g, pid_t tid, int set, uint8_t *out)
{
    struct iovec vector = {out, MOST_BYTES};
    long rc = dt_ptrace(g, PTRACE_GETREGSET, tid, (void *)(intptr_t)set, &vector);
    if (rc == -EINVAL || rc == -ENODEV || rc == -EIO)
        return 0;
    return rc ? rc : (int64_t)vector.iov_len;
}

static void read_name(const dt_guard *g, dt_thread_state *out)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task/%d/comm", (int)g->wish->pid, (int)out->tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, out->name, sizeof out->name);
    if (fd >= 0)
        close(fd);
    if (n > 0)
        out->name[n - 1] = 0; /* the newline */
}

static int write_all(int fd, const void *data, size_t bytes)
{
    for (const uint8_t *at = data; bytes;) {
        ssize_t n = write(fd, at, bytes);
        if (n < 0 && errno != EINTR)
            return -errno;
        at += n > 0 ? n : 0;
        bytes -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* `room` has place for a dt_thread_state and three sets. */
static int save_one(dt_guard *g, pid_t tid, int fd, uint8_t *room)
{
    dt_thread_state state = {.tid = tid};
    uint8_t *at = room + sizeof state;
    uint32_t *const sizes[] = {&state.prstatus_bytes, &state.fpregset_bytes, &state.xstate_bytes};
    static const int sets[] = {NT_PRSTATUS, NT_PRFPREG, NT_X86_XSTATE};
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
#if !defined(__x86_64__)
        if (sets[i] == NT_X86_XSTATE)
            continue;
#endif
        int64_t n = read_set(g, tid, sets[i], at);
        if (n < 0)
            return (int)n;
        *sizes[i] = (uint32_t)n;
        at += n;
    }
    if (!state.prstatus_bytes)
        return -EIO;
    int rc = (int)dt_ptrace(g, PTRACE_GETSIGMASK, tid, (void *)sizeof state.signal_mask, &state.signal_mask);
    if (rc)
        return rc;
    read_name(g, &state);
    memcpy(room, &state, sizeof state);
    while ((at - room) % 8)
        *at++ = 0;
    return write_all(fd, room, (size_t)(at - room));
}

int dt_save_registers(dt_guard *g)
{
    int fd = memfd_create("registers", MFD_CLOEXEC);
    uint8_t *room = malloc(sizeof(dt_thread_state) + 3 * MOST_BYTES + 8);
    int rc = fd < 0 ? -errno : !room ? -ENOMEM : 0;
    for (int first = 1; !rc && first >= 0; first--)
        for (uint64_t i = 0; i < g->count && !rc; i++) {
            const dt_thread *t = &g->threads[i];
            if (t->gone || !t->stopped || (t->tid == g->wish->pid) != first)
                continue;
            rc = save_one(g, t->tid, fd, room);
            if (rc == -ESRCH && t->tid != g->wish->pid)
                rc = 0; /* killed meanwhile, and so is the process */
        }
    free(room);
    if (rc && fd >= 0)
        close(fd);
    return rc ? rc : fd;
}
