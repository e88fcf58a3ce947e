/* SPDX-License-Identifier: MIT
 * The guardian: a process of its own, in a session of its own, that has another process stand still. What it does it does
 * by itself, from the first stop to the letting go, so that it makes no difference when whoever asked for it dies.
 *
 * All threads are stopped, not only the one that makes a system call for us: another could fork meanwhile, and its child
 * have our descriptor for ever, or put one of its own in its place.
 *
 * If the guardian dies, the kernel lets every thread go on (PTRACE_SEIZE without PTRACE_O_EXITKILL; those that were
 * stopped before stay so). What that means in the midst of an injected call: see inject.c. */
#include "guard.h"
#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef PTRACE_O_SUSPEND_SECCOMP
#define PTRACE_O_SUSPEND_SECCOMP (1 << 21)
#endif
#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

/* How long a thread may take to stop before another is asked to make the call; all together: wish->timeout_ms. */
#define PATIENCE_NS ((uint64_t)50 * 1000000)

void dt_guard_step(dt_guard *g)
{
    if (++g->steps != g->wish->fault_step)
        return;
    kill(g->wish->fault_tracker ? getppid() : getpid(), SIGKILL);
}

long dt_ptrace(dt_guard *g, int request, pid_t tid, void *address, void *data)
{
    long rc = ptrace(request, tid, address, data);
    int error = errno;
    dt_guard_step(g);
    return rc < 0 ? -error : 0;
}

/* Where the process is killed, the end of its first thread is told only once those of all others were waited for. Of
 * threads that are traced this tells stops too, though they were not asked for: they are kept for who waits for them. */
static void reap(dt_guard *g)
{
    for (siginfo_t told = {0}; !waitid(P_ALL, 0, &told, WEXITED | WNOHANG | __WALL) && told.si_pid; told.si_pid = 0)
        for (uint64_t i = 0; i < g->count; i++) {
            dt_thread *t = &g->threads[i];
            if (t->tid == told.si_pid && (told.si_code == CLD_TRAPPED || told.si_code == CLD_STOPPED))
                t->met = told.si_status << 8 | 0x7f; /* as waitpid() has it */
            else if (t->tid == told.si_pid)
                t->gone = true;
        }
}

int dt_guard_wait(dt_guard *g, dt_thread *t, uint64_t deadline, int *status)
{
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    for (;;) {
        if (t->met) {
            *status = t->met;
            t->met = 0;
            return 0;
        }
        pid_t got = t->gone ? -1 : waitpid(t->tid, status, __WALL | WNOHANG);
        if (got == t->tid && WIFSTOPPED(*status))
            return 0;
        if (got < 0 || got == t->tid) { /* it ended, or belongs to nobody any more */
            t->gone = true;
            return -ESRCH;
        }
        uint64_t now = dt_now_ns();
        if (now >= deadline)
            return -ETIMEDOUT;
        uint64_t left = dt_min(deadline - now, 10000000);
        if (sigtimedwait(&child, NULL, &(struct timespec){0, (long)left}) < 0)
            reap(g);
    }
}

/* ---- stopping ------------------------------------------------------------------------------------------------------ */

static bool is_traced(pid_t tid)
{
    dt_space thread = {tid, -1};
    FILE *status = dt_open_proc(&thread, "status");
    char line[256];
    int tracer = 0;
    while (status && fgets(line, sizeof line, status) && sscanf(line, "TracerPid: %d", &tracer) != 1)
        ;
    if (status)
        fclose(status);
    return tracer != 0;
}

/* Another guardian may have it for a moment. */
static int seize_in_turn(dt_guard *g, pid_t tid, intptr_t options)
{
    for (bool again = false;;) {
        int rc = (int)dt_ptrace(g, PTRACE_SEIZE, tid, NULL, (void *)options);
        bool traced = rc == -EPERM && is_traced(tid);
        if (rc != -EPERM || (again && !traced) || dt_now_ns() >= g->deadline)
            return rc;
        again = !traced; /* it may have been let go of between the two looks */
        if (traced)
            nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
}

static int seize(dt_guard *g, pid_t tid)
{
    int rc = dt_room((void **)&g->threads, &g->room, g->count + 1, sizeof *g->threads);
    if (rc)
        return rc;
    intptr_t options = PTRACE_O_TRACESYSGOOD;
    if (g->wish->suspend_seccomp)
        options |= PTRACE_O_SUSPEND_SECCOMP;
    rc = seize_in_turn(g, tid, options);
    if (rc)
        return rc;
    g->threads[g->count++] = (dt_thread){.tid = tid};
    if (!g->stopped_ns)
        g->stopped_ns = dt_now_ns();
    dt_ptrace(g, PTRACE_INTERRUPT, tid, NULL, NULL);
    return 0;
}

static bool has(const dt_guard *g, pid_t tid)
{
    for (uint64_t i = g->count; i--;)
        if (g->threads[i].tid == tid)
            return true;
    return false;
}

/* Each thread that is not seized yet. A thread that ended meanwhile is no failure. */
static int seize_new(dt_guard *g, uint64_t *more)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/task", (int)g->wish->pid);
    DIR *list = opendir(path);
    if (!list)
        return errno == ENOENT ? -ESRCH : -errno;
    int rc = 0;
    *more = 0;
    uint64_t known = g->count;
    for (struct dirent *entry; !rc && (entry = readdir(list));) {
        pid_t tid = (pid_t)atoi(entry->d_name);
        if (tid <= 0 || (known && has(g, tid)))
            continue;
        rc = seize(g, tid);
        *more += !rc;
        if (rc == -ESRCH && tid != g->wish->pid)
            rc = 0;
        if (rc == -EPERM && known) { /* one that is about to end cannot be seized; the first told whether we may */
            rc = 0;
        }
    }
    closedir(list);
    return rc;
}

/* Until it stands in a stop of our asking. A signal that comes first is delivered. */
static int stop(dt_guard *g, dt_thread *t, uint64_t deadline)
{
    int status, rc;
    while (!t->stopped && !(rc = dt_guard_wait(g, t, deadline, &status))) {
        int event = status >> 16, sig = WSTOPSIG(status);
        if (event == PTRACE_EVENT_STOP)
            t->stopped = true;
        else
            dt_ptrace(g, PTRACE_CONT, t->tid, NULL, (void *)(intptr_t)(event ? 0 : sig));
    }
    return t->stopped ? 0 : rc;
}

/* Another process may have its number by now. */
static bool ended(const dt_guard *g)
{
    struct pollfd process = {.fd = g->wish->pidfd, .events = POLLIN};
    return poll(&process, 1, 0) > 0;
}

/* All threads, those included that were made while we asked. 0 where all stand; -EBUSY where some do not (a thread waits
 * for its vfork, or for a disk): those cannot return to their program either, since they stop before. */
static int stop_all(dt_guard *g, uint64_t deadline)
{
    bool late = false;
    for (uint64_t more = 1, from = 0; more;) {
        int rc = seize_new(g, &more);
        if (rc)
            return rc;
        for (; from < g->count; from++) {
            rc = stop(g, &g->threads[from], late ? 0 : deadline);
            late |= rc == -ETIMEDOUT;
        }
    }
    return ended(g) ? -ESRCH : late ? -EBUSY : 0;
}

static void let_one_go(dt_guard *g, dt_thread *t, uint64_t deadline)
{
    if (t->stopped || !stop(g, t, deadline)) {
        dt_mend_call(g, t);
        dt_ptrace(g, PTRACE_DETACH, t->tid, NULL, NULL);
        t->gone = true;
    }
}

/* Those that stand, then those that were late. A thread that is let go of by our end alone has its system call given up,
 * with nobody to mend it: so whoever had no processor in time is waited for. Who waits in the kernel for a vfork or a disk
 * has nothing to be mended, and goes on when this process ends. */
static void let_go(dt_guard *g)
{
    for (uint64_t i = 0; i < g->count; i++) {
        dt_thread *t = &g->threads[i];
        if (!t->gone && t->owed)
            syscall(SYS_tgkill, g->wish->pid, t->tid, t->owed);
        if (!t->gone)
            let_one_go(g, t, 0);
    }
    g->freed_ns = dt_now_ns();
    for (uint64_t i = 0; i < g->count; i++)
        if (!g->threads[i].gone)
            let_one_go(g, &g->threads[i], g->freed_ns + 4 * PATIENCE_NS);
}

/* ---- what it is for -------------------------------------------------------------------------------------------------- */

static int fetch(dt_guard *g, int32_t *step)
{
    dt_gadget gadget;
    *step = DT_GUARD_GADGET;
    int rc = dt_find_gadget(g->wish->pid, &gadget);
    if (rc)
        return rc;
    *step = DT_GUARD_STOP;
    rc = stop_all(g, dt_min(g->deadline, dt_now_ns() + PATIENCE_NS));
    if (rc && rc != -EBUSY)
        return rc;
    rc = -EBUSY;
    for (uint64_t i = 0; i < g->count && rc == -EBUSY; i++)
        if (g->threads[i].stopped && !g->threads[i].gone)
            rc = dt_inject(g, &g->threads[i], &gadget, step);
    while (rc == -EBUSY && dt_now_ns() < g->deadline) /* none stood, or each in the wrong place: whoever does first */
        for (uint64_t i = 0; i < g->count && rc == -EBUSY; i++) {
            dt_thread *t = &g->threads[i];
            if (t->stopped && !dt_ptrace(g, PTRACE_CONT, t->tid, NULL, NULL)) {
                t->stopped = false;
                dt_ptrace(g, PTRACE_INTERRUPT, t->tid, NULL, NULL);
            }
            if (!t->gone && !stop(g, t, dt_now_ns() + PATIENCE_NS / 16))
                rc = dt_inject(g, t, &gadget, step);
        }
    return rc;
}

static void answer(int channel, const dt_guard_answer *told, int fd)
{
    union { char room[CMSG_SPACE(sizeof fd)]; struct cmsghdr align; } control = {0};
    struct iovec bytes = {(void *)told, sizeof *told};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        *head = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(head), &fd, sizeof fd);
    }
    sendmsg(channel, &message, MSG_NOSIGNAL);
}

static void hold(dt_guard *g, dt_guard_answer *told)
{
    struct pollfd gone = {.fd = g->wish->channel, .events = POLLIN};
    told->step = DT_GUARD_STOP;
    told->code = stop_all(g, g->deadline);
    told->threads = (uint32_t)g->count;
    int registers = -1;
    if (!told->code && g->wish->registers) {
        told->step = DT_GUARD_REGISTERS;
        registers = dt_save_registers(g);
        told->code = registers < 0 ? registers : 0;
    }
    if (!told->code) {
        answer(g->wish->channel, told, registers);
        if (registers >= 0)
            close(registers);
        while (poll(&gone, 1, -1) < 0 && errno == EINTR)
            ;
    }
    let_go(g);
    told->stall_ns = g->stopped_ns ? g->freed_ns - g->stopped_ns : 0;
    answer(g->wish->channel, told, -1);
}

int dt_guard_run(const dt_guard_wish *wish)
{
    dt_guard g = {.wish = wish, .deadline = dt_now_ns() + (uint64_t)wish->timeout_ms * 1000000};
    sigset_t all;
    sigfillset(&all); /* SIGCHLD is waited for; a signal to the group of whoever asked does not come here anyway */
    sigprocmask(SIG_BLOCK, &all, NULL);
    dt_guard_answer told = {0};
    struct pollfd asker = {.fd = wish->channel};
    if (poll(&asker, 1, 0) > 0 && asker.revents & POLLHUP)
        return 1; /* whoever asked is dead: nothing is begun */
    if (ended(&g)) {
        told.code = -ESRCH;
        answer(wish->channel, &told, -1);
        return 1;
    }
    if (wish->freeze) {
        hold(&g, &told);
        return told.code != 0;
    }
    int fd = fetch(&g, &told.step);
    let_go(&g);
    told.code = fd < 0 ? fd : 0;
    told.stall_ns = g.stopped_ns ? g.freed_ns - g.stopped_ns : 0;
    told.threads = (uint32_t)g.count;
    told.steps = g.steps;
    answer(wish->channel, &told, fd);
    return fd < 0;
}
