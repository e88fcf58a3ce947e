/* SPDX-License-Identifier: MIT
 * Writes to memory that Python has no call for. Built and loaded by test_kernel_writes.py. Each returns 0 or an errno. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int ended(pid_t child)
{
    int status;
    while (waitpid(child, &status, __WALL) < 0)
        if (errno != EINTR)
            return errno;
    return WIFEXITED(status) ? WEXITSTATUS(status) : EPROTO;
}

static int nothing(void *unused)
{
    (void)unused;
    return 0;
}

/* A child that shares this memory: the kernel stores its thread id at its birth, and clears it again at its end. */
int write_thread_id(int32_t *at)
{
    size_t size = 1 << 16;
    char *stack = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED)
        return errno;
    pid_t child = clone(nothing, stack + size, CLONE_VM | CLONE_PARENT_SETTID | SIGCHLD, NULL, at, NULL, NULL);
    int number = child < 0 ? errno : ended(child);
    munmap(stack, size);
    return number;
}

int clear_thread_id(int32_t *at)
{
    size_t size = 1 << 16;
    char *stack = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED)
        return errno;
    pid_t child = clone(nothing, stack + size, CLONE_VM | CLONE_CHILD_CLEARTID | SIGCHLD, NULL, NULL, NULL, at);
    int number = child < 0 ? errno : ended(child);
    munmap(stack, size);
    return number;
}

static volatile unsigned char *stored_at;

static int store_one(void *unused)
{
    (void)unused;
    (*stored_at)++;
    return 0;
}

/* As vfork: the caller waits while the child stores to the same memory. */
int store_by_vfork(unsigned char *at)
{
    size_t size = 1 << 16;
    char *stack = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED)
        return errno;
    stored_at = at;
    pid_t child = clone(store_one, stack + size, CLONE_VM | CLONE_VFORK | SIGCHLD, NULL);
    int number = child < 0 ? errno : ended(child);
    munmap(stack, size);
    return number;
}

/* A debugger, which is a child of this process, changes a word of it. */
int poke_by_debugger(long *at, long word)
{
    pid_t here = getpid(), child = fork();
    if (child < 0)
        return errno;
    if (child)
        return ended(child);
    int status;
    if (ptrace(PTRACE_SEIZE, here, 0, 0) || ptrace(PTRACE_INTERRUPT, here, 0, 0))
        _exit(errno);
    if (waitpid(here, &status, __WALL) < 0)
        _exit(errno);
    int number = ptrace(PTRACE_POKEDATA, here, at, word) ? errno : 0;
    if (ptrace(PTRACE_DETACH, here, 0, 0))
        _exit(errno);
    _exit(number);
}

/* The kernel computes: *at = 42. */
int set_by_futex(uint32_t *at)
{
    static uint32_t other;
    long done = syscall(SYS_futex, &other, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 1, 1L, at,
                        FUTEX_OP(FUTEX_OP_SET, 42, FUTEX_OP_CMP_EQ, 0));
    return done < 0 ? errno : 0;
}

static void ignore(int number)
{
    (void)number;
}

/* The kernel puts the frame of a signal on this stack. */
int take_a_signal_on(void *stack, size_t size)
{
    stack_t before, now = {.ss_sp = stack, .ss_size = size};
    struct sigaction old, new = {.sa_handler = ignore, .sa_flags = SA_ONSTACK};
    if (sigaltstack(&now, &before) || sigaction(SIGUSR2, &new, &old))
        return errno;
    int number = raise(SIGUSR2) ? errno : 0;
    sigaction(SIGUSR2, &old, NULL);
    sigaltstack(&before, NULL);
    return number;
}
