/* SPDX-License-Identifier: MIT
 * As many threads as the first argument says, each with registers full of values of its own, in a system call that does
 * not return: thread i has 0x1000 * i + n in each, and in two of AVX-512's where there are such. x86-64 only; elsewhere
 * they merely wait. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

static void *wait_full(void *which)
{
    uint64_t base = 0x1000 * (uint64_t)(uintptr_t)which;
    char name[16];
    snprintf(name, sizeof name, "full %d", (int)(uintptr_t)which);
    prctl(PR_SET_NAME, name);
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &mask, NULL);
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) /* in its other parts the area of XSAVE is not alike everywhere */
        __asm__ volatile("vpbroadcastq %0, %%zmm17\n\tkmovw %k0, %%k1" : : "r"(base + 6) : "memory");
    __asm__ volatile("mov %0, %%rbx\n\t"
                     "lea 1(%%rbx), %%r12\n\t"
                     "lea 2(%%rbx), %%r13\n\t"
                     "lea 3(%%rbx), %%r14\n\t"
                     "lea 4(%%rbx), %%r15\n\t"
                     "lea 5(%%rbx), %%rdi\n\t"
                     "movq %%r12, %%xmm1\n\t"
                     "movq %%r15, %%xmm9\n\t"
                     "1: mov $34, %%eax\n\t" /* pause */
                     "syscall\n\t"
                     "jmp 1b"
                     :
                     : "r"(base)
                     : "rbx", "r12", "r13", "r14", "r15", "rdi", "rax", "rcx", "r11", "xmm1", "xmm9", "memory");
#else
    (void)base;
    for (;;)
        pause();
#endif
    return NULL;
}

int main(int arguments, char **argument)
{
    uintptr_t many = arguments > 1 ? (uintptr_t)atoi(argument[1]) : 1;
    for (uintptr_t i = 1; i <= many; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, wait_full, (void *)i))
            _exit(8);
    }
    usleep(20000);
    puts("up");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        puts("well");
        fflush(stdout);
    }
    return 0;
}
