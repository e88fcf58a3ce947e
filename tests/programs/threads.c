/* SPDX-License-Identifier: MIT
 * As many threads as the first argument says, each of which counts on a page of its own and sleeps. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint8_t *pages;
static _Atomic uint64_t rounds;

static void *count(void *which)
{
    _Atomic uint64_t *mine = (void *)(pages + (uintptr_t)which * 4096);
    for (;;) {
        ++*mine;
        rounds++;
        if (nanosleep(&(struct timespec){0, 50000000}, NULL))
            _exit(9);
    }
    return NULL;
}

int main(int arguments, char **argument)
{
    uintptr_t many = arguments > 1 ? (uintptr_t)atoi(argument[1]) : 1;
    pages = mmap(NULL, many * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 << 10);
    for (uintptr_t i = 0; i < many; i++) {
        pthread_t thread;
        if (pthread_create(&thread, &small, count, (void *)i))
            _exit(8);
    }
    puts("up");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        uint64_t then = rounds, some = many < 50 ? many : 50;
        while (rounds < then + some)
            usleep(1000);
        puts("well");
        fflush(stdout);
    }
    return 0;
}
