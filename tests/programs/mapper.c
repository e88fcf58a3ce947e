/* SPDX-License-Identifier: MIT
 * Maps, grows, moves, discards, protects and unmaps memory all the time, and checks what it wrote there. What mremap()
 * refuses since it is two mappings for a moment (EFAULT: see docs/processes.md) stays as it is, as realloc() has it. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SLOTS = 24, PAGE = 4096, MOST = 64 };
typedef struct slot { uint8_t *at; size_t pages; uint8_t seed; uint8_t empty[MOST]; } slot;
static _Atomic uint64_t rounds;

static void must(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        _exit(9);
    }
}

static uint8_t value(const slot *s, size_t page) { return s->empty[page] ? 0 : (uint8_t)(s->seed + page); }

static void fill(slot *s, size_t from)
{
    for (size_t i = from; i < s->pages; i++) {
        memset(s->at + i * PAGE, (uint8_t)(s->seed + i), PAGE);
        s->empty[i] = 0;
    }
}

static void check(const slot *s)
{
    for (size_t i = 0; i < s->pages; i++)
        must(s->at[i * PAGE] == value(s, i) && s->at[i * PAGE + PAGE - 1] == value(s, i), "a page has other content");
}

static void *work(void *unused)
{
    slot slots[SLOTS] = {0};
    uint64_t x = 88172645463325252u;
    for (;;) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        slot *s = &slots[x % SLOTS];
        if (!s->at) {
            s->pages = 1 + x / SLOTS % (MOST / 2);
            s->seed = (uint8_t)(x >> 40);
            s->at = mmap(NULL, s->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            must(s->at != MAP_FAILED, "mmap");
            fill(s, 0);
            continue;
        }
        check(s);
        size_t some = x / SLOTS % s->pages;
        switch (x >> 20 & 7) {
        case 0:
            must(!munmap(s->at, s->pages * PAGE), "munmap");
            s->at = NULL;
            break;
        case 1: { /* grow, wherever that is possible */
            size_t more = s->pages < MOST ? s->pages + 1 : s->pages;
            void *at = mremap(s->at, s->pages * PAGE, more * PAGE, MREMAP_MAYMOVE);
            must(at != MAP_FAILED || errno == EFAULT, "mremap");
            if (at == MAP_FAILED)
                break;
            s->at = at;
            size_t from = s->pages;
            s->pages = more;
            fill(s, from);
            break;
        }
        case 2: { /* move */
            void *to = mmap(NULL, s->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            void *at = mremap(s->at, s->pages * PAGE, s->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
            must(at == to || errno == EFAULT, "mremap");
            if (at == to) {
                s->at = to;
                break;
            }
            munmap(to, s->pages * PAGE); /* part of it may have been moved: begin anew */
            must(mmap(s->at, s->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == s->at, "mmap");
            s->seed++;
            fill(s, 0);
            break;
        }
        case 3: /* mapped anew at the same place */
            must(mmap(s->at, s->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == s->at, "mmap");
            s->seed++;
            fill(s, 0);
            break;
        case 4:
            must(!madvise(s->at + some * PAGE, PAGE, MADV_DONTNEED), "madvise");
            s->empty[some] = 1;
            break;
        case 5: /* a mapping that is split, and joined again */
            must(!mprotect(s->at + some * PAGE, PAGE, PROT_READ), "mprotect");
            must(!mprotect(s->at + some * PAGE, PAGE, PROT_READ | PROT_WRITE), "mprotect");
            break;
        default:
            memset(s->at + some * PAGE, (uint8_t)(s->seed + some), PAGE);
            s->empty[some] = 0;
        }
        rounds++;
    }
    return unused;
}

int main(void)
{
    pthread_t thread;
    must(!pthread_create(&thread, NULL, work, NULL), "pthread_create");
    puts("up");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        uint64_t then = rounds;
        while (rounds < then + 1000)
            usleep(100);
        puts("well");
        fflush(stdout);
    }
    return 0;
}
