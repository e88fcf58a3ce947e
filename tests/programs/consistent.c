/* SPDX-License-Identifier: MIT
 * As many threads as the first argument says. Each writes a number into a page, then into another one far away, then one
 * higher, and so on, over many such pairs: at each instant, of each pair the first is the second, or one more. Beside that
 * each keeps the sum of all that it wrote, and one thread maps, grows, moves and unmaps memory that it fills first and
 * says where that is last. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, PAIRS = 64, WORDS = PAGE / 8 };
typedef _Atomic uint64_t word;
typedef struct { word sum, total; uint64_t empty[WORDS - 2]; } tally;
static uint8_t *first, *second;
static tally *tallies;
/* Of memory that comes and goes: where it is, of how many pages, and what each of its words is. 0: none now. */
static struct { word at, pages, value; } told;

static void *count(void *which)
{
    uintptr_t mine = (uintptr_t)which;
    uint64_t x = 88172645463325252u + mine;
    for (;;) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        uintptr_t pair = mine * PAIRS + x % PAIRS;
        word *a = (void *)(first + pair * PAGE), *b = (void *)(second + pair * PAGE);
        uint64_t next = *a + 1;
        *a = next;
        for (volatile int wait = 0; wait < 40; wait++)
            ;
        *b = next;
        tallies[mine].sum++;
        tallies[mine].total++;
    }
    return NULL;
}

static void *change(void *unused)
{
    uint64_t value = 1;
    for (;;) {
        uint64_t pages = 1 + value % 40;
        uint64_t *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED)
            _exit(8);
        for (uint64_t i = 0; i < pages * WORDS; i++)
            at[i] = value;
        told.pages = pages;
        told.value = value;
        told.at = (uintptr_t)at;
        usleep(value % 7 * 300);
        told.at = 0;
        uint64_t *to = mmap(NULL, (pages + 3) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        at = mremap(at, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
        if (at != MAP_FAILED) {
            told.at = (uintptr_t)at;
            usleep(value % 5 * 300);
            told.at = 0;
        }
        munmap(to, (pages + 3) * PAGE);
        value++;
    }
    return unused;
}

int main(int arguments, char **argument)
{
    uintptr_t many = arguments > 1 ? (uintptr_t)atoi(argument[1]) : 1;
    size_t bytes = many * PAIRS * PAGE;
    first = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); /* they are no neighbours */
    second = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    tallies = mmap(NULL, many * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_t thread;
    for (uintptr_t i = 0; i < many; i++)
        if (pthread_create(&thread, NULL, count, (void *)i))
            _exit(8);
    if (pthread_create(&thread, NULL, change, NULL))
        _exit(8);
    printf("up\n%lx %lx %lx %lx\n", (long)first, (long)second, (long)tallies, (long)&told);
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        uint64_t then = tallies[0].sum;
        while (tallies[0].sum < then + 50)
            usleep(1000);
        puts("well");
        fflush(stdout);
    }
    return 0;
}
