/* SPDX-License-Identifier: MIT */
/* A program whose state after each line is known: what is asked for n times has counted to n, in memory of each kind.
 * Its threads rest in functions that call themselves, as deep as their number. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { THREADS = 3, LENGTH = 5000 };

long counted = 1000;           /* .data */
double squares[LENGTH];        /* .bss */
struct point { int x, y; } point = {7, -7};
static const char motto[] = "never written";
char *on_heap;
long *mapped;
static pthread_barrier_t begun, ended;
static int rest_pipe[2];

static __attribute__((noinline)) long rests(long number, long depth)
{
    volatile long seen = 100 * number + depth;
    char byte;
    if (depth > 0)
        return rests(number, depth - 1) + seen;
    pthread_barrier_wait(&begun);
    if (read(rest_pipe[0], &byte, 1) < 0) /* until main closes the other end */
        return -1;
    pthread_barrier_wait(&ended);
    return seen;
}

static void *thread(void *number)
{
    long sum = rests((long)number, (long)number);
    return (void *)sum;
}

static __attribute__((noinline)) void count(void)
{
    counted++;
    long n = counted - 1000;
    squares[n % LENGTH] = (double)n * (double)n;
    point.x = (int)n;
    snprintf(on_heap, 100, "on the heap: %ld", n);
    mapped[512 * (n % 8)] = n;
}

int main(void)
{
    pthread_t threads[THREADS];
    char line[100];
    on_heap = malloc(200000); /* mapped apart; what is below is from brk */
    on_heap = strcpy(malloc(100), "on the heap: 0");
    mapped = mmap(NULL, 8 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED || pipe(rest_pipe))
        return 1;
    pthread_barrier_init(&begun, NULL, THREADS + 1);
    pthread_barrier_init(&ended, NULL, THREADS + 1);
    for (long i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, thread, (void *)(i + 1));
    pthread_barrier_wait(&begun);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("up");
    while (fgets(line, sizeof line, stdin)) {
        count();
        puts(motto[0] == 'n' ? "well" : "no motto");
    }
    close(rest_pipe[1]);
    pthread_barrier_wait(&ended);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    return 0;
}
