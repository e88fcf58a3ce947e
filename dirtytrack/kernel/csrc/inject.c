/* SPDX-License-Identifier: MIT
 * One system call made by a thread of another process that stands in a ptrace stop.
 *
 * The thread runs a `syscall` instruction that is in its process's text already: nothing is written there. Its registers
 * and signal mask are put back at a stop inside the kernel's signal handling (PTRACE_EVENT_STOP), with what says that it
 * was in a system call, so that the kernel restarts that call, or not, just as it does after any stop.
 *
 * What if the guardian dies in the middle? On x86-64, wherever a `ret` follows the `syscall` and the text has the C
 * library's call of rt_sigreturn, a signal frame lies below the stack with everything as it was: the thread makes the
 * call, returns into rt_sigreturn and goes on by itself. What stays then is a descriptor that nothing was done with. */
#include "guard.h"
#include <elf.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <fcntl.h>
#include <unistd.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef SYS_userfaultfd
#error "userfaultfd(2) came with Linux 4.3"
#endif
#ifndef PTRACE_GETSIGMASK
#define PTRACE_GETSIGMASK 0x420a
#define PTRACE_SETSIGMASK 0x420b
#endif
#ifdef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ PTRACE_GET_RSEQ_CONFIGURATION
#else
#define PTRACE_GET_RSEQ 0x420f /* Linux 5.13 */
#endif
#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

/* ---- what differs between processors --------------------------------------------------------------------------------- */

#if defined(__x86_64__)
typedef struct user_regs_struct registers;
static const uint8_t CALL[] = {0x0f, 0x05}, CALL_AND_RETURN[] = {0x0f, 0x05, 0xc3};
static const uint8_t GIVE_BACK[] = {0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05}; /* mov $15, %rax; syscall */
static bool in_call(const registers *r) { return (long)r->orig_rax >= 0; }
static bool is_native(const registers *r, size_t bytes) { return bytes == sizeof *r && r->cs == 0x33; }
static long answer_of(const registers *r) { return (long)r->rax; }
static void set_call(registers *r, uint64_t at, long number, uint64_t argument)
{
    r->rip = at;
    r->rax = (uint64_t)number;
    r->rdi = argument;
    r->orig_rax = (uint64_t)-1; /* no system call: nothing to restart */
}
#elif defined(__aarch64__)
/* Written after the kernel's source, and not tested on such a machine. */
typedef struct user_regs_struct registers;
static const uint8_t CALL[] = {0x01, 0x00, 0x00, 0xd4};
static bool in_call(const registers *r) { return (void)r, false; } /* the registers do not tell */
static bool is_native(const registers *r, size_t bytes) { return bytes == sizeof *r && !(r->pstate & 0x10); }
static long answer_of(const registers *r) { return (long)r->regs[0]; }
static void set_call(registers *r, uint64_t at, long number, uint64_t argument)
{
    r->pc = at;
    r->regs[8] = (uint64_t)number;
    r->regs[0] = argument;
}
#else
typedef struct { int none; } registers;
static const uint8_t CALL[] = {0};
static bool in_call(const registers *r) { return (void)r, false; }
static bool is_native(const registers *r, size_t bytes) { return (void)r, (void)bytes, false; }
static long answer_of(const registers *r) { return (void)r, -ENOSYS; }
static void set_call(registers *r, uint64_t at, long number, uint64_t argument) { (void)r, (void)at, (void)number, (void)argument; }
#endif

/* ---- looking for the instruction -------------------------------------------------------------------------------------- */

typedef struct hunt { pid_t pid; dt_gadget *found; uint64_t any; } hunt;

static uint64_t find(const uint8_t *text, size_t bytes, const uint8_t *what, size_t length, uint64_t start)
{
    const uint8_t *at = memmem(text, bytes, what, length);
    return at ? start + (uint64_t)(at - text) : 0;
}

static int look_in(void *context, const dt_mapping *m)
{
    enum { PART = 1 << 20 };
    hunt *h = context;
    if (!m->executable || !m->readable)
        return 0;
    uint8_t *text = malloc(PART);
    if (!text)
        return -ENOMEM;
    bool all = false;
    for (uint64_t at = m->start; at < m->end && !all; at += PART) {
        struct iovec to = {text, PART}, from = {(void *)at, dt_min(PART, m->end - at)};
        ssize_t got = process_vm_readv(h->pid, &to, 1, &from, 1, 0);
        if (got <= 0)
            continue;
        if (!h->any)
            h->any = find(text, (size_t)got, CALL, sizeof CALL, at);
#if defined(__x86_64__)
        if (!h->found->call)
            h->found->call = find(text, (size_t)got, CALL_AND_RETURN, sizeof CALL_AND_RETURN, at);
        if (!h->found->give_back)
            h->found->give_back = find(text, (size_t)got, GIVE_BACK, sizeof GIVE_BACK, at);
        all = h->found->call && h->found->give_back;
#else
        all = h->any != 0;
#endif
    }
    free(text);
    return all;
}

int dt_find_gadget(pid_t pid, dt_gadget *out)
{
    *out = (dt_gadget){0};
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/maps", (int)pid);
    dt_space space = {pid, open(path, O_RDONLY | O_CLOEXEC)};
    if (space.maps < 0)
        return errno == ENOENT ? -ESRCH : -errno;
    hunt h = {.pid = pid, .found = out};
    int rc = dt_each_mapping(&space, 0, UINT64_MAX, look_in, &h);
    close(space.maps);
    if (rc < 0)
        return rc;
    if (!out->call)
        *out = (dt_gadget){.call = h.any};
    return out->call ? 0 : -ENOEXEC;
}

static bool is_there(pid_t pid, uint64_t at, const uint8_t *what, size_t bytes)
{
    uint8_t there[16] = {0};
    struct iovec to = {there, bytes}, from = {(void *)at, bytes};
    return process_vm_readv(pid, &to, 1, &from, 1, 0) == (ssize_t)bytes && !memcmp(there, what, bytes);
}

/* The text may have been mapped anew since it was looked through. */
static bool still_there(pid_t pid, const dt_gadget *gadget)
{
#if defined(__x86_64__)
    if (gadget->give_back)
        return is_there(pid, gadget->call, CALL_AND_RETURN, sizeof CALL_AND_RETURN) &&
               is_there(pid, gadget->give_back, GIVE_BACK, sizeof GIVE_BACK);
#endif
    return is_there(pid, gadget->call, CALL, sizeof CALL);
}

/* ---- the call ----------------------------------------------------------------------------------------------------------- */

static long get_registers(dt_guard *g, pid_t tid, registers *r, size_t *bytes)
{
    struct iovec vector = {r, sizeof *r};
    long rc = dt_ptrace(g, PTRACE_GETREGSET, tid, (void *)NT_PRSTATUS, &vector);
    *bytes = vector.iov_len;
    return rc;
}

static long set_registers(dt_guard *g, pid_t tid, registers *r)
{
    struct iovec vector = {r, sizeof *r};
    return dt_ptrace(g, PTRACE_SETREGSET, tid, (void *)NT_PRSTATUS, &vector);
}

/* To the next stop at a system call's beginning or end. Signals are blocked, but for the one that cannot be. */
static int to_system_call(dt_guard *g, dt_thread *t)
{
    for (;;) {
        int status, rc = (int)dt_ptrace(g, PTRACE_SYSCALL, t->tid, NULL, NULL);
        if (rc)
            return rc;
        t->stopped = false;
        /* No deadline: the thread's registers are not its own, and these calls do not sleep. */
        rc = dt_guard_wait(g, t, UINT64_MAX, &status);
        if (rc)
            return rc;
        t->stopped = true;
        if (WSTOPSIG(status) == (SIGTRAP | 0x80))
            return 0;
        if (!(status >> 16))
            t->owed = WSTOPSIG(status);
    }
}

/* Of a thread whose registers are set for it. */
static int make_call(dt_guard *g, dt_thread *t, registers *r, long *answer)
{
    size_t bytes;
    int rc = to_system_call(g, t);
    if (!rc)
        rc = to_system_call(g, t);
    if (!rc)
        rc = (int)get_registers(g, t->tid, r, &bytes);
    if (!rc)
        *answer = answer_of(r);
    return rc;
}

/* Back to a stop inside the kernel's handling of signals, where an interrupted system call is restarted. */
static int put_back(dt_guard *g, dt_thread *t, registers *r, uint64_t *mask)
{
    long rc = dt_ptrace(g, PTRACE_SETSIGMASK, t->tid, (void *)sizeof *mask, mask);
    if (!rc)
        rc = set_registers(g, t->tid, r);
    if (!rc)
        rc = dt_ptrace(g, PTRACE_INTERRUPT, t->tid, NULL, NULL);
    if (!rc)
        rc = dt_ptrace(g, PTRACE_CONT, t->tid, NULL, NULL);
    for (int status; !rc;) {
        t->stopped = false;
        rc = dt_guard_wait(g, t, UINT64_MAX, &status);
        if (rc)
            break;
        t->stopped = true;
        if (status >> 16 == PTRACE_EVENT_STOP)
            break;
        rc = dt_ptrace(g, PTRACE_CONT, t->tid, NULL, (void *)(intptr_t)(status >> 16 ? 0 : WSTOPSIG(status)));
    }
    return (int)rc;
}

/* In a restartable sequence: code that the kernel has begin anew if the thread loses its processor in it, and that it no
 * longer would if it saw the thread elsewhere. Those who are in a system call are not in one. */
static bool in_sequence(dt_guard *g, pid_t tid)
{
    struct { uint64_t at; uint32_t bytes, signature, flags, padding; } sequences;
    uint64_t running = 0;
    long n = ptrace(PTRACE_GET_RSEQ, tid, (void *)sizeof sequences, &sequences);
    dt_guard_step(g);
    if (n < (long)sizeof sequences || !sequences.at)
        return false;
    struct iovec to = {&running, sizeof running}, from = {(void *)(sequences.at + 8), sizeof running};
    return process_vm_readv(g->wish->pid, &to, 1, &from, 1, 0) != sizeof running || running;
}

int dt_inject(dt_guard *g, dt_thread *t, const dt_gadget *gadget, int32_t *step)
{
    registers saved, r;
    uint64_t mask, all = ~(uint64_t)0;
    size_t bytes;
    *step = DT_GUARD_CALL;
    int rc = (int)get_registers(g, t->tid, &saved, &bytes);
    if (rc)
        return rc;
    if (!is_native(&saved, bytes) || !still_there(g->wish->pid, gadget))
        return -ENOEXEC;
    if (!in_call(&saved) && in_sequence(g, t->tid))
        return -EBUSY;
    rc = (int)dt_ptrace(g, PTRACE_GETSIGMASK, t->tid, (void *)sizeof mask, &mask);
    if (rc)
        return rc;
    r = saved;
#if defined(__x86_64__)
    dt_frame frame;
    if (dt_frame_make(g, t->tid, gadget, &saved, mask, &frame))
        r.rsp = frame.at;
#endif
    const registers lent = r;
    long made = -EBUSY, closed;
    set_call(&r, gadget->call, SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* UFFD_USER_MODE_ONLY */);
    rc = (int)set_registers(g, t->tid, &r); /* first: with the mask alone it would be deaf if we died here */
    if (!rc)
        rc = (int)dt_ptrace(g, PTRACE_SETSIGMASK, t->tid, (void *)sizeof all, &all);
    if (!rc)
        rc = make_call(g, t, &r, &made);
    int fd = rc;
    if (!rc && made < 0) {
        *step = DT_GUARD_USERFAULTFD;
        fd = (int)made;
    } else if (!rc) {
        *step = DT_GUARD_TAKE;
        fd = (int)syscall(SYS_pidfd_getfd, g->wish->pidfd, (int)made, 0);
        fd = fd < 0 ? -errno : fd;
        dt_guard_step(g);
        r = lent;
        set_call(&r, gadget->call, SYS_close, (uint64_t)made);
        rc = (int)set_registers(g, t->tid, &r);
        if (!rc)
            rc = make_call(g, t, &r, &closed);
    }
    int back = put_back(g, t, &saved, &mask);
#if defined(__x86_64__)
    dt_frame_unmake(g, &frame);
#endif
    rc = rc ? rc : back;
    if (rc && fd >= 0) {
        *step = DT_GUARD_CALL;
        close(fd);
    }
    return rc ? rc : fd;
}

#if defined(__x86_64__)
/* Calls that give up after a stop, with EINTR and with nothing done: see signal(7), "Interruption of system calls and
 * library functions by stop signals". */
static bool gives_up(long number)
{
    static const int calls[] = {SYS_epoll_wait, SYS_epoll_pwait, 441 /* epoll_pwait2 */, SYS_semop, SYS_semtimedop,
                                SYS_rt_sigtimedwait, SYS_io_getevents, 333 /* io_pgetevents */, 426 /* io_uring_enter */,
                                SYS_read, SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_recvmmsg, SYS_accept, SYS_accept4,
                                SYS_connect, SYS_write, SYS_writev, SYS_sendto, SYS_sendmsg, SYS_sendmmsg, SYS_sendfile,
                                SYS_splice};
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (calls[i] == number)
            return true;
    return false;
}

/* A signal that the thread would handle is what has the call give up. One that it does not ask for waits only since the
 * thread is traced: a child's end, for one. */
static bool signal_waits(pid_t tid)
{
    dt_space thread = {tid, -1};
    FILE *status = dt_open_proc(&thread, "status");
    char line[256];
    unsigned long long pending = 0, blocked = 0, caught = 0, word;
    if (!status)
        return true;
    while (fgets(line, sizeof line, status)) {
        if (sscanf(line, "SigPnd: %llx", &word) == 1 || sscanf(line, "ShdPnd: %llx", &word) == 1)
            pending |= word;
        else if (sscanf(line, "SigBlk: %llx", &word) == 1)
            blocked = word;
        else if (sscanf(line, "SigCgt: %llx", &word) == 1)
            caught = word;
    }
    fclose(status);
    return pending & ~blocked & caught;
}

void dt_mend_call(dt_guard *g, dt_thread *t)
{
    registers r;
    size_t bytes;
    if (get_registers(g, t->tid, &r, &bytes) || !is_native(&r, bytes) || !in_call(&r) || (long)r.rax != -EINTR ||
        !gives_up((long)r.orig_rax) || signal_waits(t->tid))
        return;
    r.rax = r.orig_rax;
    r.orig_rax = (uint64_t)-1;
    r.rip -= sizeof CALL;
    set_registers(g, t->tid, &r);
}
#else
void dt_mend_call(dt_guard *g, dt_thread *t) { (void)g, (void)t; } /* what was in a call, the registers do not tell */
#endif
